/* SPDX-License-Identifier: MIT */
/* AF_XDP sockets, and their UMEM: Documentation/networking/af_xdp.rst, straight on linux/if_xdp.h.
 *
 * Frames are conserved.  Each is in exactly one place: the UMEM's free stack, in the owner's hands (taken), or in a ring of
 * one of its sockets: the fill ring (the kernel may receive into it), the RX ring (received, not yet taken), the TX ring
 * (to be sent), or the completion ring (sent, not yet reaped).  The first two and the sum of the rest are counted here;
 * crab_xsk_conserved compares.
 *
 * Several sockets may have one UMEM (XDP_SHARED_UMEM), each on a queue of its own, with rings of its own: what one received
 * another can send.
 *
 * Rings are single producer, single consumer, and the stack has no lock: one thread at a time uses the sockets of a UMEM. */
#ifndef CRAB_XSK_H
#define CRAB_XSK_H

#include <linux/if_xdp.h>
#include <stdatomic.h>
#include <sys/socket.h>

#include "bytes.h"
#include "crablb.h"

/* What older headers do not have. */
#ifndef AF_XDP
#define AF_XDP 44
#endif
#ifndef SOL_XDP
#define SOL_XDP 283
#endif
#ifndef XDP_USE_SG /* Linux 6.6 */
#define XDP_USE_SG 16
#define XDP_PKT_CONTD 1
#endif
#ifndef XDP_MAX_TX_SKB_BUDGET /* Linux 6.18 */
#define XDP_MAX_TX_SKB_BUDGET 9
#endif
#ifndef SO_NETNS_COOKIE /* Linux 5.14 */
#define SO_NETNS_COOKIE 71
#endif
#ifndef SO_PREFER_BUSY_POLL /* Linux 5.11 */
#define SO_PREFER_BUSY_POLL 69
#define SO_BUSY_POLL_BUDGET 70
#endif

struct crab_ring {
    _Atomic(uint32_t) *producer, *consumer, *flags;
    void *descs;
    uint32_t size, mask;
    uint32_t mine;   /* our end's index, not yet published beyond *producer or *consumer */
    uint32_t theirs; /* the kernel's end's index, as last read */
    void *map;
    size_t map_len;
};

struct crab_umem {
    uint8_t *memory;
    size_t len;
    uint32_t frame_count, frame_size;
    uint64_t *free; /* stack of frame addresses */
    uint32_t free_count;
    uint32_t held;
    struct crab_xsk *sockets; /* list of the open ones */
    uint32_t count, made;     /* of the open ones; of all */
    uint32_t *rings; /* of each frame: the number of the socket in whose rings it is, 0: none; NULL: there was but one */
};

struct crab_xsk {
    struct crab_umem *pool;
    struct crab_xsk *next;
    uint32_t number; /* from 1, of the sockets of its UMEM */
    int fd;
    uint32_t ifindex, queue;
    uint32_t frame_size;
    uint32_t bind_flags; /* what the kernel agreed to: XDP_ZEROCOPY or XDP_COPY, XDP_USE_NEED_WAKEUP, XDP_USE_SG */
    bool busy_poll;      /* system calls drive the driver; no interrupt does */
    uint8_t *umem; /* the pool's memory */
    size_t umem_len;
    struct crab_ring fill, completion, rx, tx;
    uint32_t share;          /* frames to have in in_fill */
    uint32_t in_fill, in_tx; /* in_fill: in the fill or RX ring; in_tx: in the TX or completion ring */
    uint64_t dropped;        /* frames that the kernel took for sending and dropped (EBUSY) */
};

/* Entries ready to be consumed, at most want. */
static inline uint32_t crab_ring_ready(struct crab_ring *r, uint32_t want)
{
    if (r->theirs - r->mine < want)
        r->theirs = atomic_load_explicit(r->producer, memory_order_acquire);
    uint32_t n = r->theirs - r->mine;
    return n < want ? n : want;
}

/* Room for entries to be produced, at most want. */
static inline uint32_t crab_ring_room(struct crab_ring *r, uint32_t want)
{
    if (r->size - (r->mine - r->theirs) < want)
        r->theirs = atomic_load_explicit(r->consumer, memory_order_acquire);
    uint32_t n = r->size - (r->mine - r->theirs);
    return n < want ? n : want;
}

static inline void crab_ring_consumed(struct crab_ring *r, uint32_t n)
{
    r->mine += n;
    atomic_store_explicit(r->consumer, r->mine, memory_order_release);
}

static inline void crab_ring_produced(struct crab_ring *r, uint32_t n)
{
    r->mine += n;
    atomic_store_explicit(r->producer, r->mine, memory_order_release);
}

static inline bool crab_ring_needs_wakeup(const struct crab_ring *r)
{
    return atomic_load_explicit(r->flags, memory_order_relaxed) & XDP_RING_NEED_WAKEUP;
}

#endif
