/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "xsk.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

/* The kernel keeps this much in front of every received frame (copy mode included). */
#define KERNEL_HEADROOM 256
/* Kicks for one call.  A copy-mode kick sends a limited number of frames and answers EAGAIN when more wait. */
#define MAX_KICKS 256
/* Frames that such a kick may send, where the kernel lets us say so; its default is 32. */
#define TX_BUDGET 256
#define HUGE_PAGE (2u << 20)
#define BIND_TRIES 50
#define BIND_PAUSE_MS 20

static int map_ring(struct crab_ring *r, int fd, uint64_t pgoff, const struct xdp_ring_offset *off, uint32_t size,
                    size_t desc)
{
    r->map_len = off->desc + size * desc;
    r->map = mmap(NULL, r->map_len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, (off_t)pgoff);
    if (r->map == MAP_FAILED) {
        r->map = NULL;
        return -errno;
    }
    /* A mapping keeps the socket, and so the queue: a child of fork(2) must have none. */
    madvise(r->map, r->map_len, MADV_DONTFORK);
    r->producer = (void *)((char *)r->map + off->producer);
    r->consumer = (void *)((char *)r->map + off->consumer);
    r->flags = (void *)((char *)r->map + off->flags);
    r->descs = (char *)r->map + off->desc;
    r->size = size;
    r->mask = size - 1;
    return 0;
}

/* Memory for frames: on huge pages, where the kernel has some, it costs fewer walks through the page tables. */
static uint8_t *map_umem(size_t len)
{
    size_t align = len < HUGE_PAGE ? 0 : HUGE_PAGE;
    uint8_t *all = mmap(NULL, len + align, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED)
        return NULL;
    /* A child of fork(2) gets zeros: nothing is copied for it, and what it writes is its own. */
    madvise(all, len + align, MADV_WIPEONFORK);
    if (!align)
        return all;
    size_t before = -(uintptr_t)all % align;
    if (before)
        munmap(all, before);
    munmap(all + before + len, align - before);
    madvise(all + before, len, MADV_HUGEPAGE); /* a wish: without huge pages it works as well */
    return all + before;
}

/* Bind.  A queue whose last socket was closed a moment ago is released by a kernel worker: EBUSY until then. */
static int bind_queue(struct crab_xsk *x, uint16_t flags)
{
    struct sockaddr_xdp addr = {
        .sxdp_family = AF_XDP, .sxdp_flags = flags, .sxdp_ifindex = x->ifindex, .sxdp_queue_id = x->queue};
    for (int i = 0;; i++) {
        if (!bind(x->fd, (struct sockaddr *)&addr, sizeof addr)) {
            x->bind_flags = flags;
            return 0;
        }
        if (errno != EBUSY || i == BIND_TRIES)
            return -errno;
        poll(NULL, 0, BIND_PAUSE_MS);
    }
}

static int set_up(struct crab_xsk *x, uint32_t ring_size, uint32_t bind_flags, const char **stage)
{
    int rc;
    *stage = "socket";
    x->fd = socket(AF_XDP, SOCK_RAW | SOCK_CLOEXEC, 0);
    if (x->fd < 0)
        return -errno;

    *stage = "umem";
    x->umem_len = (size_t)x->frame_count * x->frame_size;
    x->umem = map_umem(x->umem_len + CRAB_WHOLE);
    if (!x->umem)
        return -errno;
    /* The kernel refuses a structure whose unknown tail is not zero, so it is zeroed as a whole. */
    struct xdp_umem_reg reg;
    memset(&reg, 0, sizeof reg);
    reg.addr = (uintptr_t)x->umem;
    reg.len = x->umem_len;
    reg.chunk_size = x->frame_size;
    if (setsockopt(x->fd, SOL_XDP, XDP_UMEM_REG, &reg, sizeof reg))
        return -errno;

    *stage = "rings";
    /* Every frame fits into the fill ring, and into the completion ring, at once. */
    uint32_t umem_ring = x->frame_count;
    const struct {
        int option;
        uint32_t size;
    } rings[] = {{XDP_UMEM_FILL_RING, umem_ring}, {XDP_UMEM_COMPLETION_RING, umem_ring}, {XDP_RX_RING, ring_size},
                 {XDP_TX_RING, ring_size}};
    for (size_t i = 0; i < sizeof rings / sizeof *rings; i++)
        if (setsockopt(x->fd, SOL_XDP, rings[i].option, &rings[i].size, sizeof rings[i].size))
            return -errno;
    /* Fewer kicks a batch.  Only a wish: older kernels do not know it. */
    uint32_t budget = ring_size < TX_BUDGET ? ring_size : TX_BUDGET;
    setsockopt(x->fd, SOL_XDP, XDP_MAX_TX_SKB_BUDGET, &budget, sizeof budget);
    struct xdp_mmap_offsets off;
    socklen_t len = sizeof off;
    if (getsockopt(x->fd, SOL_XDP, XDP_MMAP_OFFSETS, &off, &len))
        return -errno;
    if ((rc = map_ring(&x->fill, x->fd, XDP_UMEM_PGOFF_FILL_RING, &off.fr, umem_ring, sizeof(uint64_t))) ||
        (rc = map_ring(&x->completion, x->fd, XDP_UMEM_PGOFF_COMPLETION_RING, &off.cr, umem_ring, sizeof(uint64_t))) ||
        (rc = map_ring(&x->rx, x->fd, XDP_PGOFF_RX_RING, &off.rx, ring_size, sizeof(struct xdp_desc))) ||
        (rc = map_ring(&x->tx, x->fd, XDP_PGOFF_TX_RING, &off.tx, ring_size, sizeof(struct xdp_desc))))
        return rc;

    *stage = "frames";
    x->free = malloc(x->frame_count * sizeof *x->free);
    if (!x->free)
        return -ENOMEM;
    for (uint32_t i = 0; i < x->frame_count; i++)
        x->free[i] = (uint64_t)(x->frame_count - 1 - i) * x->frame_size;
    x->free_count = x->frame_count;
    crab_xsk_refill(x); /* before the socket is bound: some drivers look at the fill ring only then */

    *stage = "bind";
    uint16_t wakeup = bind_flags & XDP_USE_NEED_WAKEUP, frags = bind_flags & XDP_USE_SG;
    const uint16_t modes[] = {XDP_ZEROCOPY, XDP_COPY}, forced = bind_flags & (XDP_ZEROCOPY | XDP_COPY);
    rc = -EINVAL;
    for (int i = 0; i < 2 && rc && rc != -EBUSY; i++) {
        if (forced && forced != modes[i])
            continue;
        rc = bind_queue(x, modes[i] | frags | wakeup);
        if (rc && rc != -EBUSY && frags)
            rc = bind_queue(x, modes[i] | wakeup);
    }
    return rc;
}

struct crab_xsk *crab_xsk_new(uint32_t ifindex, uint32_t queue, uint32_t frame_count, uint32_t frame_size,
                              uint32_t ring_size, uint32_t bind_flags, int *error, const char **stage)
{
    struct crab_xsk *x = calloc(1, sizeof *x);
    *stage = "memory";
    if (!x) {
        *error = ENOMEM;
        return NULL;
    }
    *x = (struct crab_xsk){.fd = -1, .ifindex = ifindex, .queue = queue, .frame_count = frame_count,
                           .frame_size = frame_size};
    int rc = set_up(x, ring_size, bind_flags, stage);
    if (rc) {
        crab_xsk_free(x);
        *error = -rc;
        return NULL;
    }
    *error = 0;
    return x;
}

static void close_socket(struct crab_xsk *x, bool rings_are_mapped)
{
    if (x->fd >= 0)
        close(x->fd);
    x->fd = -1;
    struct crab_ring *rings[] = {&x->fill, &x->completion, &x->rx, &x->tx};
    for (size_t i = 0; i < sizeof rings / sizeof *rings; i++) {
        if (rings[i]->map && rings_are_mapped)
            munmap(rings[i]->map, rings[i]->map_len);
        rings[i]->map = NULL;
    }
}

void crab_xsk_close(struct crab_xsk *x)
{
    close_socket(x, true);
}

void crab_xsk_forked(struct crab_xsk *x)
{
    close_socket(x, false);
}

void crab_xsk_free(struct crab_xsk *x)
{
    if (!x)
        return;
    crab_xsk_close(x);
    if (x->umem)
        munmap(x->umem, x->umem_len + CRAB_WHOLE);
    free(x->free);
    free(x);
}

int crab_xsk_fd(const struct crab_xsk *x)
{
    return x->fd;
}

uint8_t *crab_xsk_umem(const struct crab_xsk *x)
{
    return x->umem;
}

int crab_xsk_busy_poll(struct crab_xsk *x, uint32_t microseconds, uint32_t budget)
{
    const struct {
        int option;
        int value;
    } options[] = {{SO_PREFER_BUSY_POLL, 1}, {SO_BUSY_POLL, (int)microseconds}, {SO_BUSY_POLL_BUDGET, (int)budget}};
    for (size_t i = 0; i < sizeof options / sizeof *options; i++)
        if (setsockopt(x->fd, SOL_SOCKET, options[i].option, &options[i].value, sizeof options[i].value))
            return -errno;
    x->busy_poll = true;
    return 0;
}

bool crab_xsk_zero_copy(const struct crab_xsk *x)
{
    return x->bind_flags & XDP_ZEROCOPY;
}

bool crab_xsk_frags(const struct crab_xsk *x)
{
    return x->bind_flags & XDP_USE_SG;
}

bool crab_xsk_knows_frags(void)
{
    /* The flags are looked at first, then the interface, of which there is no number 0. */
    struct sockaddr_xdp addr = {.sxdp_family = AF_XDP, .sxdp_flags = XDP_USE_SG};
    int fd = socket(AF_XDP, SOCK_RAW | SOCK_CLOEXEC, 0);
    bool known = fd >= 0 && bind(fd, (struct sockaddr *)&addr, sizeof addr) && errno == ENODEV;
    if (fd >= 0)
        close(fd);
    return known;
}

uint32_t crab_xsk_refill(struct crab_xsk *x)
{
    uint32_t share = x->frame_count / 2;
    if (x->in_fill >= share)
        return 0;
    uint32_t n = share - x->in_fill;
    if (n > x->free_count)
        n = x->free_count;
    n = crab_ring_room(&x->fill, n);
    uint64_t *ring = x->fill.descs;
    for (uint32_t i = 0; i < n; i++)
        ring[(x->fill.mine + i) & x->fill.mask] = x->free[--x->free_count];
    crab_ring_produced(&x->fill, n);
    x->in_fill += n;
    return n;
}

/* How many of n frames are there until a packet's end. */
static inline uint32_t whole_packets(const struct crab_desc *descs, uint32_t n)
{
    while (crab_unlikely(n && descs[n - 1].more))
        n--;
    return n;
}

uint32_t crab_xsk_receive(struct crab_xsk *x, struct crab_desc *out, uint32_t want)
{
    uint32_t n = crab_ring_ready(&x->rx, want);
    const struct xdp_desc *ring = x->rx.descs;
    for (uint32_t i = 0; i < n; i++) {
        const struct xdp_desc *d = &ring[(x->rx.mine + i) & x->rx.mask];
        out[i] = (struct crab_desc){.addr = d->addr, .len = d->len, .more = d->options & XDP_PKT_CONTD};
    }
    n = whole_packets(out, n);
    crab_ring_consumed(&x->rx, n);
    x->in_fill -= n;
    x->held += n;
    return n;
}

uint32_t crab_xsk_take(struct crab_xsk *x, struct crab_desc *out, uint32_t want)
{
    uint32_t n = want < x->free_count ? want : x->free_count;
    for (uint32_t i = 0; i < n; i++)
        out[i] = (struct crab_desc){.addr = x->free[--x->free_count] + KERNEL_HEADROOM, .len = 0};
    x->held += n;
    return n;
}

void crab_xsk_release(struct crab_xsk *x, const struct crab_desc *descs, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        x->free[x->free_count++] = descs[i].addr - descs[i].addr % x->frame_size;
    x->held -= n;
}

uint32_t crab_xsk_send(struct crab_xsk *x, const struct crab_desc *descs, uint32_t want)
{
    uint32_t n = whole_packets(descs, crab_ring_room(&x->tx, want));
    struct xdp_desc *ring = x->tx.descs;
    for (uint32_t i = 0; i < n; i++)
        ring[(x->tx.mine + i) & x->tx.mask] =
            (struct xdp_desc){.addr = descs[i].addr, .len = descs[i].len, .options = descs[i].more ? XDP_PKT_CONTD : 0};
    crab_ring_produced(&x->tx, n);
    x->held -= n;
    x->in_tx += n;
    return n;
}

uint32_t crab_xsk_reap(struct crab_xsk *x)
{
    uint32_t n = crab_ring_ready(&x->completion, x->completion.size);
    const uint64_t *ring = x->completion.descs;
    for (uint32_t i = 0; i < n; i++) {
        uint64_t addr = ring[(x->completion.mine + i) & x->completion.mask];
        x->free[x->free_count++] = addr - addr % x->frame_size;
    }
    crab_ring_consumed(&x->completion, n);
    x->in_tx -= n;
    return n;
}

int crab_xsk_kick(struct crab_xsk *x)
{
    if ((x->bind_flags & XDP_USE_NEED_WAKEUP) && !x->busy_poll && !crab_ring_needs_wakeup(&x->tx))
        return 0;
    for (int i = 0; i < MAX_KICKS; i++) {
        if (sendto(x->fd, NULL, 0, MSG_DONTWAIT, NULL, 0) >= 0)
            return 0;
        switch (errno) {
        case EAGAIN: /* the kick's budget is used up, or the completion ring is full */
            crab_xsk_reap(x);
            break;
        case EBUSY: /* the device's queue refused this frame: dropped, and completed all the same */
            x->dropped++;
            break;
        case EINTR:
        case ENOBUFS: /* the socket's send buffer is full: completions will free it */
            crab_xsk_reap(x);
            break;
        default: /* ENETDOWN, ENXIO: the link is gone */
            return -errno;
        }
        if (atomic_load_explicit(x->tx.consumer, memory_order_acquire) == x->tx.mine)
            return 0;
    }
    return 0; /* still frames in the ring: the next kick goes on */
}

void crab_xsk_wake(struct crab_xsk *x)
{
    if (x->busy_poll || ((x->bind_flags & XDP_USE_NEED_WAKEUP) && crab_ring_needs_wakeup(&x->fill)))
        recvfrom(x->fd, NULL, 0, MSG_DONTWAIT, NULL, NULL);
}

int crab_xsk_error(const struct crab_xsk *x)
{
    int error = 0;
    socklen_t len = sizeof error;
    if (getsockopt(x->fd, SOL_SOCKET, SO_ERROR, &error, &len))
        return errno;
    return error;
}

uint64_t crab_xsk_dropped(const struct crab_xsk *x)
{
    return x->dropped;
}

int crab_xsk_statistics(const struct crab_xsk *x, struct crab_xsk_stats *out)
{
    struct xdp_statistics s;
    memset(&s, 0, sizeof s);
    socklen_t len = sizeof s;
    if (getsockopt(x->fd, SOL_XDP, XDP_STATISTICS, &s, &len))
        return -errno;
    *out = (struct crab_xsk_stats){s.rx_dropped, s.rx_invalid_descs, s.tx_invalid_descs, s.rx_ring_full,
                                   s.rx_fill_ring_empty_descs, s.tx_ring_empty_descs};
    return 0;
}

void crab_xsk_frames(const struct crab_xsk *x, struct crab_xsk_places *out)
{
    *out = (struct crab_xsk_places){x->frame_count, x->free_count, x->in_fill, x->held, x->in_tx};
}

bool crab_xsk_conserved(const struct crab_xsk *x)
{
    return x->free_count + x->in_fill + x->held + x->in_tx == x->frame_count;
}
