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
#ifndef MADV_COLLAPSE /* Linux 6.1 */
#define MADV_COLLAPSE 25
#endif
#define BIND_TRIES 250
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

/* The same of a file that other processes may map too.  A child of fork(2) has none of it. */
static uint8_t *map_shared(size_t len, int fd)
{
    size_t align = len < HUGE_PAGE ? 0 : HUGE_PAGE;
    uint8_t *all = mmap(NULL, len + align, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED)
        return NULL;
    size_t before = align ? -(uintptr_t)all % align : 0;
    if (before)
        munmap(all, before);
    if (align - before)
        munmap(all + before + len, align - before);
    all += before;
    if (mmap(all, len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_POPULATE, fd, 0) == MAP_FAILED) {
        munmap(all, len);
        return NULL;
    }
    madvise(all, len, MADV_DONTFORK);
    madvise(all, len, MADV_COLLAPSE); /* a wish, of Linux 6.1: MADV_HUGEPAGE is seldom allowed for such memory */
    return all;
}

size_t crab_umem_size(uint32_t frame_count, uint32_t frame_size)
{
    return (size_t)frame_count * frame_size + CRAB_WHOLE;
}

struct crab_umem *crab_umem_new(uint32_t frame_count, uint32_t frame_size, int fd)
{
    struct crab_umem *u = calloc(1, sizeof *u);
    if (!u)
        return NULL;
    *u = (struct crab_umem){.len = (size_t)frame_count * frame_size, .frame_count = frame_count,
                            .frame_size = frame_size};
    u->memory = fd < 0 ? map_umem(u->len + CRAB_WHOLE) : map_shared(u->len + CRAB_WHOLE, fd);
    u->free = malloc(frame_count * sizeof *u->free);
    if (!u->memory || !u->free) {
        crab_umem_free(u);
        return NULL;
    }
    for (uint32_t i = 0; i < frame_count; i++)
        u->free[i] = (uint64_t)(frame_count - 1 - i) * frame_size;
    u->free_count = frame_count;
    return u;
}

void crab_umem_free(struct crab_umem *u)
{
    if (u->memory)
        munmap(u->memory, u->len + CRAB_WHOLE);
    free(u->free);
    free(u->rings);
    free(u);
}

uint8_t *crab_umem_memory(const struct crab_umem *u)
{
    return u->memory;
}

uint32_t crab_umem_sockets(const struct crab_umem *u)
{
    return u->count;
}

int crab_umem_share(struct crab_umem *u, const bool *held)
{
    if (u->rings)
        return 0;
    uint32_t *rings = calloc(u->frame_count, sizeof *rings), n = 0;
    if (!rings)
        return -ENOMEM;
    for (uint32_t i = 0; i < u->frame_count; i++)
        rings[i] = held[i] ? 0 : u->sockets->number;
    for (uint32_t i = 0; i < u->free_count; i++)
        rings[u->free[i] / u->frame_size] = 0;
    for (uint32_t i = 0; i < u->frame_count; i++)
        n += rings[i] != 0;
    if (n != u->sockets->in_fill + u->sockets->in_tx) {
        free(rings);
        return -EBUSY;
    }
    u->rings = rings;
    return 0;
}

void crab_umem_add(struct crab_umem *u, const uint64_t *addresses, uint32_t n)
{
    memcpy(u->free + u->free_count, addresses, n * sizeof *addresses);
    u->free_count += n;
}

static void divide(struct crab_umem *u)
{
    for (struct crab_xsk *x = u->sockets; x; x = x->next)
        x->share = u->frame_count / 2 > u->count ? u->frame_count / 2 / u->count : 1;
}

/* These frames go into the rings of a socket, or, 0, out of them. */
static void mark(struct crab_xsk *x, const uint64_t *addresses, uint32_t n, uint32_t number)
{
    struct crab_umem *u = x->pool;
    if (crab_unlikely(u->rings))
        for (uint32_t i = 0; i < n; i++)
            u->rings[addresses[i] / u->frame_size] = number;
}

static void mark_descs(struct crab_xsk *x, const struct crab_desc *descs, uint32_t n, uint32_t number)
{
    struct crab_umem *u = x->pool;
    if (crab_unlikely(u->rings))
        for (uint32_t i = 0; i < n; i++)
            u->rings[descs[i].addr / u->frame_size] = number;
}

/* Into the list of its UMEM's sockets. */
static void join(struct crab_xsk *x)
{
    struct crab_umem *u = x->pool;
    x->number = ++u->made;
    x->next = u->sockets;
    u->sockets = x;
    u->count++;
    divide(u);
}

static void leave(struct crab_xsk *x)
{
    struct crab_umem *u = x->pool;
    for (struct crab_xsk **at = &u->sockets; *at; at = &(*at)->next)
        if (*at == x) {
            *at = x->next;
            u->count--;
            divide(u);
            return;
        }
}

/* Bind.  A queue whose last socket was closed a moment ago is released by a kernel worker, which waits for its turn, and
 * for whoever configures networks just then: EBUSY until then. */
static int bind_queue(struct crab_xsk *x, const struct crab_xsk *share, uint16_t flags)
{
    struct sockaddr_xdp addr = {
        .sxdp_family = AF_XDP, .sxdp_flags = flags, .sxdp_ifindex = x->ifindex, .sxdp_queue_id = x->queue};
    if (share) { /* it is bound like the other one; any flag more is refused */
        addr.sxdp_flags = XDP_SHARED_UMEM;
        addr.sxdp_shared_umem_fd = (uint32_t)share->fd;
    }
    for (int i = 0;; i++) {
        if (!bind(x->fd, (struct sockaddr *)&addr, sizeof addr)) {
            x->bind_flags = flags;
            return 0;
        }
        /* On the very queue of the other one, which would have its fill and completion rings. */
        if (errno == EINVAL && share && share->ifindex == x->ifindex && share->queue == x->queue)
            return -EBUSY;
        if (errno != EBUSY || i == BIND_TRIES)
            return -errno;
        poll(NULL, 0, BIND_PAUSE_MS);
    }
}

static int map_rings(struct crab_xsk *x, uint32_t ring_size)
{
    int rc;
    uint32_t umem_ring = x->pool->frame_count;
    struct xdp_mmap_offsets off;
    socklen_t len = sizeof off;
    if (getsockopt(x->fd, SOL_XDP, XDP_MMAP_OFFSETS, &off, &len))
        return -errno;
    if ((rc = map_ring(&x->fill, x->fd, XDP_UMEM_PGOFF_FILL_RING, &off.fr, umem_ring, sizeof(uint64_t))) ||
        (rc = map_ring(&x->completion, x->fd, XDP_UMEM_PGOFF_COMPLETION_RING, &off.cr, umem_ring, sizeof(uint64_t))) ||
        (rc = map_ring(&x->rx, x->fd, XDP_PGOFF_RX_RING, &off.rx, ring_size, sizeof(struct xdp_desc))) ||
        (rc = map_ring(&x->tx, x->fd, XDP_PGOFF_TX_RING, &off.tx, ring_size, sizeof(struct xdp_desc))))
        return rc;
    return 0;
}

static int set_up(struct crab_xsk *x, const struct crab_xsk *share, uint32_t ring_size, uint32_t bind_flags,
                  const char **stage)
{
    int rc;
    *stage = "socket";
    x->fd = socket(AF_XDP, SOCK_RAW | SOCK_CLOEXEC, 0);
    if (x->fd < 0)
        return -errno;

    *stage = "umem";
    /* The kernel refuses a structure whose unknown tail is not zero, so it is zeroed as a whole. */
    struct xdp_umem_reg reg;
    memset(&reg, 0, sizeof reg);
    reg.addr = (uintptr_t)x->umem;
    reg.len = x->umem_len;
    reg.chunk_size = x->frame_size;
    if (!share && setsockopt(x->fd, SOL_XDP, XDP_UMEM_REG, &reg, sizeof reg))
        return -errno;

    *stage = "rings";
    /* Every frame fits into the fill ring, and into the completion ring, at once. */
    uint32_t umem_ring = x->pool->frame_count;
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
    if ((rc = map_rings(x, ring_size)))
        return rc;

    *stage = "frames";
    join(x);
    crab_xsk_refill(x); /* before the socket is bound: some drivers look at the fill ring only then */

    *stage = "bind";
    if (share)
        return bind_queue(x, share, (uint16_t)share->bind_flags);
    uint16_t wakeup = bind_flags & XDP_USE_NEED_WAKEUP, frags = bind_flags & XDP_USE_SG;
    const uint16_t modes[] = {XDP_ZEROCOPY, XDP_COPY}, forced = bind_flags & (XDP_ZEROCOPY | XDP_COPY);
    rc = -EINVAL;
    for (int i = 0; i < 2 && rc && rc != -EBUSY; i++) {
        if (forced && forced != modes[i])
            continue;
        rc = bind_queue(x, NULL, modes[i] | frags | wakeup);
        if (rc && rc != -EBUSY && frags)
            rc = bind_queue(x, NULL, modes[i] | wakeup);
    }
    return rc;
}

struct crab_xsk *crab_xsk_new(struct crab_umem *umem, const struct crab_xsk *share, uint32_t ifindex, uint32_t queue,
                              uint32_t ring_size, uint32_t bind_flags, int *error, const char **stage)
{
    struct crab_xsk *x = calloc(1, sizeof *x);
    *stage = "memory";
    if (!x) {
        *error = ENOMEM;
        return NULL;
    }
    *x = (struct crab_xsk){.pool = umem, .fd = -1, .ifindex = ifindex, .queue = queue, .frame_size = umem->frame_size,
                           .umem = umem->memory, .umem_len = umem->len};
    int rc = set_up(x, share, ring_size, bind_flags, stage);
    if (rc) {
        /* Not bound: the kernel has taken none. */
        if (x->in_fill) {
            mark(x, x->fill.descs, x->in_fill, 0);
            crab_umem_add(umem, x->fill.descs, x->in_fill);
        }
        crab_xsk_free(x);
        *error = -rc;
        return NULL;
    }
    *error = 0;
    return x;
}

/* ---- from one process to the next ---- */

struct crab_xsk *crab_xsk_adopt(struct crab_umem *umem, int fd, const struct crab_xsk_bound *bound, int *error,
                                const char **stage)
{
    struct crab_xsk *x = calloc(1, sizeof *x);
    *stage = "memory";
    *error = ENOMEM;
    if (!x)
        return NULL;
    *x = (struct crab_xsk){.pool = umem, .fd = fd, .ifindex = bound->ifindex, .queue = bound->queue,
                           .bind_flags = bound->bind_flags, .frame_size = umem->frame_size, .umem = umem->memory,
                           .umem_len = umem->len};
    *stage = "rings";
    *error = -map_rings(x, bound->ring_size);
    if (*error) {
        x->fd = -1; /* it stays the caller's */
        crab_xsk_free(x);
        return NULL;
    }
    join(x);
    return x;
}

void crab_xsk_is_bound(const struct crab_xsk *x, struct crab_xsk_bound *out)
{
    *out = (struct crab_xsk_bound){.ifindex = x->ifindex, .queue = x->queue, .ring_size = x->rx.size,
                                   .bind_flags = x->bind_flags};
}

void crab_xsk_give(const struct crab_xsk *x, struct crab_xsk_given *out, uint64_t *free_frames)
{
    const struct crab_umem *u = x->pool;
    *out = (struct crab_xsk_given){.in_fill = x->in_fill, .in_tx = x->in_tx, .free_count = u->free_count,
                                   .dropped = x->dropped};
    memcpy(free_frames, u->free, u->free_count * sizeof *u->free);
}

/* Our end of a ring is where it was published last. */
static void look_at(struct crab_ring *r, bool producing)
{
    uint32_t producer = atomic_load_explicit(r->producer, memory_order_acquire);
    uint32_t consumer = atomic_load_explicit(r->consumer, memory_order_acquire);
    r->mine = producing ? producer : consumer;
    r->theirs = producing ? consumer : producer;
}

void crab_xsk_take_over(struct crab_xsk *x, const struct crab_xsk_given *given, const uint64_t *free_frames)
{
    struct crab_umem *u = x->pool;
    u->free_count = given->free_count;
    memcpy(u->free, free_frames, u->free_count * sizeof *u->free);
    x->in_fill = given->in_fill;
    x->in_tx = given->in_tx;
    x->dropped = given->dropped;
    look_at(&x->fill, true);
    look_at(&x->tx, true);
    look_at(&x->rx, false);
    look_at(&x->completion, false);
}

bool crab_xsk_moved(const struct crab_xsk *x)
{
    return atomic_load(x->fill.producer) != x->fill.mine || atomic_load(x->tx.producer) != x->tx.mine ||
           atomic_load(x->rx.consumer) != x->rx.mine || atomic_load(x->completion.consumer) != x->completion.mine;
}

static void close_socket(struct crab_xsk *x, bool rings_are_mapped)
{
    if (x->fd >= 0) {
        leave(x);
        close(x->fd);
    }
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
    free(x);
}

int crab_xsk_fd(const struct crab_xsk *x)
{
    return x->fd;
}

uint32_t crab_xsk_in_rings(const struct crab_xsk *x, uint64_t *addresses)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < x->pool->frame_count; i++)
        if (x->pool->rings[i] == x->number)
            addresses[n++] = (uint64_t)i * x->frame_size;
    return n;
}

bool crab_xsk_unbound(const struct crab_xsk *x)
{
    if (recvfrom(x->fd, NULL, 0, MSG_DONTWAIT, NULL, NULL) >= 0 || errno != ENXIO)
        return false;
    struct crab_xsk_stats s;
    crab_xsk_statistics(x, &s); /* waits for the unbinding to end: it takes the same mutex */
    return true;
}

uint64_t crab_xsk_namespace(const struct crab_xsk *x)
{
    uint64_t cookie = 0;
    socklen_t len = sizeof cookie;
    return getsockopt(x->fd, SOL_SOCKET, SO_NETNS_COOKIE, &cookie, &len) ? 0 : cookie;
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

/* Free frames that one of several sockets may have to receive into.  The first took half of all when it was alone, and
 * gives them back only as frames come in by it: so that something is left to send with, the others leave an eighth, of
 * which a socket that has none takes half. */
static uint32_t spare(const struct crab_xsk *x)
{
    uint32_t left = x->pool->frame_count / 8, n = x->pool->free_count;
    return n > left ? n - left : x->in_fill ? 0 : (n + 1) / 2;
}

uint32_t crab_xsk_refill(struct crab_xsk *x)
{
    struct crab_umem *u = x->pool;
    if (x->in_fill >= x->share)
        return 0;
    uint32_t n = x->share - x->in_fill, most = crab_unlikely(u->count > 1) ? spare(x) : u->free_count;
    if (n > most)
        n = most;
    n = crab_ring_room(&x->fill, n);
    uint64_t *ring = x->fill.descs;
    const uint64_t *top = u->free + u->free_count;
    for (uint32_t i = 0; i < n; i++)
        ring[(x->fill.mine + i) & x->fill.mask] = *--top;
    u->free_count -= n;
    mark(x, top, n, x->number);
    crab_ring_produced(&x->fill, n);
    x->in_fill += n;
    return n;
}

void crab_umem_settle(struct crab_umem *u)
{
    for (struct crab_xsk *x = u->sockets; x; x = x->next)
        crab_xsk_reap(x);
    for (struct crab_xsk *x = u->sockets; x; x = x->next)
        if (crab_xsk_refill(x) && !x->busy_poll) /* that one runs its driver itself */
            crab_xsk_wake(x);
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
    mark_descs(x, out, n, 0);
    crab_ring_consumed(&x->rx, n);
    x->in_fill -= n;
    x->pool->held += n;
    return n;
}

uint32_t crab_xsk_take(struct crab_xsk *x, struct crab_desc *out, uint32_t want)
{
    struct crab_umem *u = x->pool;
    uint32_t n = want < u->free_count ? want : u->free_count;
    for (uint32_t i = 0; i < n; i++)
        out[i] = (struct crab_desc){.addr = u->free[--u->free_count] + KERNEL_HEADROOM, .len = 0};
    u->held += n;
    return n;
}

void crab_xsk_release(struct crab_xsk *x, const struct crab_desc *descs, uint32_t n)
{
    struct crab_umem *u = x->pool;
    uint64_t *top = u->free + u->free_count;
    for (uint32_t i = 0; i < n; i++)
        *top++ = descs[i].addr - descs[i].addr % x->frame_size;
    u->free_count += n;
    u->held -= n;
}

uint32_t crab_xsk_send(struct crab_xsk *x, const struct crab_desc *descs, uint32_t want)
{
    uint32_t n = whole_packets(descs, crab_ring_room(&x->tx, want));
    struct xdp_desc *ring = x->tx.descs;
    for (uint32_t i = 0; i < n; i++)
        ring[(x->tx.mine + i) & x->tx.mask] =
            (struct xdp_desc){.addr = descs[i].addr, .len = descs[i].len, .options = descs[i].more ? XDP_PKT_CONTD : 0};
    mark_descs(x, descs, n, x->number);
    crab_ring_produced(&x->tx, n);
    x->pool->held -= n;
    x->in_tx += n;
    return n;
}

uint32_t crab_xsk_reap(struct crab_xsk *x)
{
    uint32_t n = crab_ring_ready(&x->completion, x->completion.size);
    const uint64_t *ring = x->completion.descs;
    uint64_t *top = x->pool->free + x->pool->free_count;
    for (uint32_t i = 0; i < n; i++) {
        uint64_t addr = ring[(x->completion.mine + i) & x->completion.mask];
        *top++ = addr - addr % x->frame_size;
    }
    mark(x, top - n, n, 0);
    x->pool->free_count += n;
    crab_ring_consumed(&x->completion, n);
    x->in_tx -= n;
    return n;
}

int crab_xsk_kick(struct crab_xsk *x)
{
    if ((x->bind_flags & XDP_USE_NEED_WAKEUP) && !x->busy_poll && !crab_ring_needs_wakeup(&x->tx))
        return 0;
    for (int i = 0; i < MAX_KICKS; i++) {
        uint32_t completed = atomic_load_explicit(x->completion.producer, memory_order_relaxed);
        if (sendto(x->fd, NULL, 0, MSG_DONTWAIT, NULL, 0) >= 0)
            return 0;
        switch (errno) {
        case EAGAIN: /* the kick's budget is used up, or the completion ring is full */
            crab_xsk_reap(x);
            break;
        case EBUSY: /* the device's queue refused a frame: dropped, and completed all the same; or a driver has no time */
            x->dropped += atomic_load_explicit(x->completion.producer, memory_order_acquire) != completed;
            break;
        case ENOMEM: /* none for a packet at the moment: the next kick may find some */
            return 0;
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

void crab_xsk_hand_out(struct crab_xsk *x, struct crab_desc *out, uint32_t want, bool received, uint64_t *tickets,
                       uint64_t ticket, uint32_t *got)
{
    if (!received)
        crab_umem_settle(x->pool);
    uint32_t n = received ? crab_xsk_receive(x, out, want) : crab_xsk_take(x, out, want);
    for (uint32_t i = 0; i < n; i++)
        tickets[out[i].addr / x->frame_size] = ticket;
    *got = n;
    if (received) {
        crab_umem_settle(x->pool);
        crab_xsk_wake(x);
    }
}

int crab_xsk_hand_in(struct crab_xsk *x, const struct crab_desc *descs, uint32_t n, bool send, uint64_t *tickets,
                     uint64_t ticket, uint32_t *sent)
{
    *sent = 0;
    for (uint32_t i = 0; i < n; i++) {
        uint64_t *of = &tickets[descs[i].addr / x->frame_size];
        if (*of != ticket) {
            while (i--)
                tickets[descs[i].addr / x->frame_size] = ticket;
            return -EEXIST;
        }
        *of = 0;
    }
    if (send)
        *sent = crab_xsk_send(x, descs, n);
    crab_xsk_release(x, descs + *sent, n - *sent);
    int rc = send ? crab_xsk_kick(x) : 0;
    crab_umem_settle(x->pool);
    return rc;
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

void crab_umem_frames(const struct crab_umem *u, struct crab_xsk_places *out)
{
    *out = (struct crab_xsk_places){.all = u->frame_count, .free = u->free_count, .held = u->held};
    for (const struct crab_xsk *x = u->sockets; x; x = x->next) {
        out->receiving += x->in_fill;
        out->sending += x->in_tx;
    }
}

void crab_xsk_frames(const struct crab_xsk *x, uint32_t *receiving, uint32_t *sending)
{
    *receiving = x->in_fill;
    *sending = x->in_tx;
}

bool crab_xsk_conserved(const struct crab_xsk *x)
{
    struct crab_xsk_places p;
    crab_umem_frames(x->pool, &p);
    return p.free + p.receiving + p.held + p.sending == p.all;
}
