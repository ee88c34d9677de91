/* SPDX-License-Identifier: MIT */
/* A kernel's AF_XDP sockets, pretended, whose calls fail when they are told to: linked in place of the C library's (native/
 * Makefile), for what a real one refuses too seldom to be waited for.  Rings are memory that both sides map, as they are; what
 * is written into a TX ring lands on a wire, what comes is written where the fill ring says. */
#ifndef CRAB_PRETEND_H
#define CRAB_PRETEND_H

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"
#include "xsk.h"

#define MOST_SOCKETS 8
#define FIRST_FD 5000 /* as numbers no descriptor has */
enum { FILL, COMPLETION, RX, TX };
enum { PRODUCER = 0, CONSUMER = 64, FLAGS = 128, DESCS = 192 }; /* offsets in a ring's memory */

enum call { SOCKET, SETSOCKOPT, GETSOCKOPT, BIND, MMAP, ALLOCATE, EVENTFD, SENDTO, SENDMMSG, POLL, CALLS };

struct pretended {
    bool open, bound, packet, gone;
    uint32_t size[4];
    int memory[4]; /* a file of a ring's bytes, -1: none yet */
    uint8_t *ring[4];
    struct sockaddr_xdp at;
    uint32_t wakes, budget;
    int error;
    uint8_t *umem;
    struct xdp_statistics statistics;
};

static struct {
    struct pretended sockets[MOST_SOCKETS];
    /* Which call fails: of all, or of one kind, the so-maniest from now on. */
    uint32_t fails, fails_of[CALLS];
    int with;
    bool struck;
    /* What bind says of modes. */
    bool no_zero_copy, no_frags, no_such_flags;
    uint32_t busy, pauses;
    int refused; /* of a socket that shares a UMEM */
    /* What the next kicks answer, and whether they complete a frame all the same: from the last one to the first. */
    struct kick {
        int error;
        bool completes;
    } kicks[8];
    uint32_t kick_count, wire, sent_elsewhere, elsewhere_bytes;
    /* What polls answer, and what happens while one waits. */
    int poll_error;
    short revents;
    void (*meanwhile)(void); /* or while a driver is woken */
    void (*while_sending)(void);
    int waited; /* timeout of the last one */
} kernel;

static bool strikes(enum call call)
{
    bool all = kernel.fails && !--kernel.fails, one = kernel.fails_of[call] && !--kernel.fails_of[call];
    if (!all && !one)
        return false;
    kernel.struck = true;
    errno = kernel.with ? kernel.with : ENOMEM;
    return true;
}

static struct pretended *pretended(int fd)
{
    return fd >= FIRST_FD && fd < FIRST_FD + MOST_SOCKETS && kernel.sockets[fd - FIRST_FD].open
               ? &kernel.sockets[fd - FIRST_FD] : NULL;
}

static uint32_t open_sockets(void)
{
    uint32_t n = 0;
    for (int i = 0; i < MOST_SOCKETS; i++)
        n += kernel.sockets[i].open;
    return n;
}

static _Atomic(uint32_t) *end_of(struct pretended *s, int ring, int what)
{
    return (void *)(s->ring[ring] + what);
}

/* ---- the calls ---- */

void *__real_mmap(void *at, size_t len, int prot, int flags, int fd, off_t from);
int __real_close(int fd);
void *__real_calloc(size_t n, size_t size);
void *__real_malloc(size_t size);
int __real_eventfd(unsigned value, int flags);
void *__wrap_mmap(void *at, size_t len, int prot, int flags, int fd, off_t from);
int __wrap_close(int fd);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_malloc(size_t size);
int __wrap_eventfd(unsigned value, int flags);
int __wrap_socket(int domain, int type, int protocol);
int __wrap_setsockopt(int fd, int level, int option, const void *value, socklen_t len);
int __wrap_getsockopt(int fd, int level, int option, void *value, socklen_t *len);
int __wrap_bind(int fd, const struct sockaddr *addr, socklen_t len);
ssize_t __wrap_sendto(int fd, const void *data, size_t n, int flags, const struct sockaddr *to, socklen_t len);
ssize_t __wrap_recvfrom(int fd, void *data, size_t n, int flags, struct sockaddr *from, socklen_t *len);
int __wrap_sendmmsg(int fd, struct mmsghdr *messages, unsigned n, int flags);
int __wrap_poll(struct pollfd *fds, nfds_t n, int timeout);

void *__wrap_calloc(size_t n, size_t size)
{
    return strikes(ALLOCATE) ? NULL : __real_calloc(n, size);
}

void *__wrap_malloc(size_t size)
{
    return strikes(ALLOCATE) ? NULL : __real_malloc(size);
}

int __wrap_eventfd(unsigned value, int flags)
{
    return strikes(EVENTFD) ? -1 : __real_eventfd(value, flags);
}

int __wrap_socket(int domain, int type, int protocol)
{
    (void)type, (void)protocol;
    if (strikes(SOCKET))
        return -1;
    for (int i = 0; i < MOST_SOCKETS; i++)
        if (!kernel.sockets[i].open) {
            kernel.sockets[i] = (struct pretended){.open = true, .packet = domain == AF_PACKET, .memory = {-1, -1, -1, -1}};
            return FIRST_FD + i;
        }
    errno = EMFILE;
    return -1;
}

int __wrap_close(int fd)
{
    struct pretended *s = pretended(fd);
    if (!s)
        return __real_close(fd);
    for (int i = 0; i < 4; i++)
        if (s->memory[i] >= 0) {
            munmap(s->ring[i], DESCS + s->size[i] * 16ul);
            __real_close(s->memory[i]);
        }
    s->open = false;
    return 0;
}

int __wrap_setsockopt(int fd, int level, int option, const void *value, socklen_t len)
{
    struct pretended *s = pretended(fd);
    if (strikes(SETSOCKOPT))
        return -1;
    CHECK(s && len >= sizeof(int));
    if (level == SOL_XDP && option >= XDP_RX_RING && option <= XDP_UMEM_COMPLETION_RING && option != XDP_UMEM_REG) {
        int ring = option == XDP_RX_RING ? RX : option == XDP_TX_RING ? TX : option == XDP_UMEM_FILL_RING ? FILL : COMPLETION;
        memcpy(&s->size[ring], value, 4);
        CHECK(s->size[ring] && !(s->size[ring] & (s->size[ring] - 1)));
        s->memory[ring] = memfd_create("ring", MFD_CLOEXEC);
        CHECK(s->memory[ring] >= 0 && !ftruncate(s->memory[ring], DESCS + s->size[ring] * 16));
        s->ring[ring] = __real_mmap(NULL, DESCS + s->size[ring] * 16, PROT_READ | PROT_WRITE, MAP_SHARED, s->memory[ring], 0);
        CHECK(s->ring[ring] != MAP_FAILED);
    } else if (level == SOL_XDP && option == XDP_UMEM_REG) {
        struct xdp_umem_reg reg;
        memcpy(&reg, value, sizeof reg);
        s->umem = (uint8_t *)(uintptr_t)reg.addr;
    } else if (level == SOL_XDP && option == XDP_MAX_TX_SKB_BUDGET) {
        memcpy(&s->budget, value, 4);
    }
    return 0;
}

int __wrap_getsockopt(int fd, int level, int option, void *value, socklen_t *len)
{
    struct pretended *s = pretended(fd);
    if (strikes(GETSOCKOPT))
        return -1;
    CHECK(s);
    memset(value, 0, *len);
    if (level == SOL_XDP && option == XDP_MMAP_OFFSETS) {
        struct xdp_ring_offset off = {.producer = PRODUCER, .consumer = CONSUMER, .flags = FLAGS, .desc = DESCS};
        *(struct xdp_mmap_offsets *)value = (struct xdp_mmap_offsets){.rx = off, .tx = off, .fr = off, .cr = off};
    } else if (level == SOL_XDP && option == XDP_STATISTICS) {
        memcpy(value, &s->statistics, *len < sizeof s->statistics ? *len : sizeof s->statistics);
    } else if (option == SO_ERROR) {
        memcpy(value, &s->error, sizeof s->error);
        s->error = 0;
    } else if (option == SO_NETNS_COOKIE) {
        memcpy(value, &(uint64_t){77}, 8);
    }
    return 0;
}

int __wrap_bind(int fd, const struct sockaddr *addr, socklen_t len)
{
    struct pretended *s = pretended(fd);
    struct sockaddr_xdp at;
    CHECK(s && len == sizeof at);
    memcpy(&at, addr, sizeof at);
    if (strikes(BIND))
        return -1;
    errno = 0;
    if (!at.sxdp_ifindex)
        errno = kernel.no_such_flags && at.sxdp_flags & XDP_USE_SG ? EINVAL : ENODEV;
    else if (kernel.busy && kernel.busy--)
        errno = EBUSY;
    else if (at.sxdp_flags & XDP_SHARED_UMEM && kernel.refused)
        errno = kernel.refused;
    else if (at.sxdp_flags & XDP_ZEROCOPY && kernel.no_zero_copy)
        errno = EOPNOTSUPP;
    else if (at.sxdp_flags & XDP_USE_SG && kernel.no_frags)
        errno = EOPNOTSUPP;
    if (errno)
        return -1;
    s->bound = true;
    s->at = at;
    if (at.sxdp_flags & XDP_SHARED_UMEM)
        s->umem = pretended((int)at.sxdp_shared_umem_fd)->umem;
    return 0;
}

void *__wrap_mmap(void *at, size_t len, int prot, int flags, int fd, off_t from)
{
    struct pretended *s = pretended(fd);
    if (strikes(MMAP))
        return MAP_FAILED;
    if (!s)
        return __real_mmap(at, len, prot, flags, fd, from);
    int ring = from == (off_t)XDP_UMEM_PGOFF_FILL_RING ? FILL : from == (off_t)XDP_UMEM_PGOFF_COMPLETION_RING ? COMPLETION
               : from == XDP_PGOFF_TX_RING ? TX : RX;
    return __real_mmap(at, len, prot, MAP_SHARED, s->memory[ring], 0);
}

/* The driver: up to n frames of the TX ring, to the wire (or, dropped, nowhere), and into the completion ring. */
static uint32_t transmit(struct pretended *s, uint32_t n, bool to_wire)
{
    uint32_t from = *end_of(s, TX, CONSUMER), to = *end_of(s, TX, PRODUCER), done = 0;
    uint32_t completed = *end_of(s, COMPLETION, PRODUCER);
    const struct xdp_desc *descs = (void *)(s->ring[TX] + DESCS);
    uint64_t *out = (void *)(s->ring[COMPLETION] + DESCS);
    for (; from != to && done < n && completed - *end_of(s, COMPLETION, CONSUMER) < s->size[COMPLETION]; done++, from++)
        out[completed++ & (s->size[COMPLETION] - 1)] = descs[from & (s->size[TX] - 1)].addr;
    *end_of(s, TX, CONSUMER) = from;
    *end_of(s, COMPLETION, PRODUCER) = completed;
    kernel.wire += to_wire ? done : 0;
    return done;
}

ssize_t __wrap_sendto(int fd, const void *data, size_t n, int flags, const struct sockaddr *to, socklen_t len)
{
    struct pretended *s = pretended(fd);
    (void)data, (void)n, (void)to, (void)len;
    CHECK(s && flags & MSG_DONTWAIT);
    if (strikes(SENDTO))
        return -1;
    if (kernel.while_sending)
        kernel.while_sending();
    if (kernel.kick_count) {
        struct kick k = kernel.kicks[--kernel.kick_count];
        if (k.completes)
            transmit(s, 1, k.error != EBUSY);
        errno = k.error;
        return k.error ? -1 : 0;
    }
    uint32_t most = s->budget ? s->budget : 32, done = transmit(s, most, true);
    if (*end_of(s, TX, CONSUMER) != *end_of(s, TX, PRODUCER) && done == most) {
        errno = EAGAIN;
        return -1;
    }
    return 0;
}

ssize_t __wrap_recvfrom(int fd, void *data, size_t n, int flags, struct sockaddr *from, socklen_t *len)
{
    struct pretended *s = pretended(fd);
    (void)data, (void)n, (void)from, (void)len;
    CHECK(s && flags & MSG_DONTWAIT);
    s->wakes++;
    if (kernel.meanwhile)
        kernel.meanwhile();
    errno = s->gone ? ENXIO : EAGAIN;
    return -1;
}

int __wrap_sendmmsg(int fd, struct mmsghdr *messages, unsigned n, int flags)
{
    struct pretended *s = pretended(fd);
    CHECK(s && s->packet && n && flags & MSG_DONTWAIT);
    if (strikes(SENDMMSG))
        return -1;
    unsigned sent = n > 2 ? 2 : n; /* a short count */
    for (unsigned i = 0; i < sent; i++) {
        kernel.sent_elsewhere++;
        kernel.elsewhere_bytes += (uint32_t)messages[i].msg_hdr.msg_iov->iov_len;
    }
    return (int)sent;
}

int __wrap_poll(struct pollfd *fds, nfds_t n, int timeout)
{
    if (!n) { /* a pause */
        kernel.pauses++;
        return 0;
    }
    kernel.waited = timeout;
    fds[0].revents = kernel.revents;
    fds[1].revents = 0;
    if (kernel.poll_error) {
        errno = kernel.poll_error;
        return -1;
    }
    if (kernel.meanwhile)
        kernel.meanwhile();
    /* Somebody woke it? */
    uint64_t value;
    if (read(fds[1].fd, &value, sizeof value) == sizeof value) {
        fds[1].revents = POLLIN;
        ssize_t put_back = write(fds[1].fd, &value, sizeof value);
        (void)put_back;
    }
    return 1;
}

/* ---- what comes ---- */

/* A frame, or a packet's part.  Returns whether there was a place. */
static bool arrives(struct pretended *s, const void *data, uint32_t n, bool more)
{
    uint32_t from = *end_of(s, FILL, CONSUMER), at = *end_of(s, RX, PRODUCER);
    if (from == *end_of(s, FILL, PRODUCER)) {
        s->statistics.rx_fill_ring_empty_descs++;
        return false;
    }
    if (at - *end_of(s, RX, CONSUMER) == s->size[RX]) {
        s->statistics.rx_ring_full++;
        return false;
    }
    uint64_t addr = ((uint64_t *)(void *)(s->ring[FILL] + DESCS))[from & (s->size[FILL] - 1)] + 256;
    *end_of(s, FILL, CONSUMER) = from + 1;
    memcpy(s->umem + addr, data, n);
    ((struct xdp_desc *)(void *)(s->ring[RX] + DESCS))[at & (s->size[RX] - 1)] =
        (struct xdp_desc){.addr = addr, .len = n, .options = more ? XDP_PKT_CONTD : 0};
    *end_of(s, RX, PRODUCER) = at + 1;
    return true;
}

#endif
