/* SPDX-License-Identifier: MIT */
/* RX ring -> core -> TX ring, for one queue.  Nothing here allocates.  A round takes what has come, at most ROUND frames;
 * there are few system calls a round: the kick, the sending of what goes out by another interface, and the sleep when
 * nothing is to do.
 *
 * A sleep and a wake-up cost microseconds on either side.  So a worker that was woken soon after it fell asleep turns for
 * a moment before the next sleep, and no longer does when a moment has passed in vain: at rest it costs nothing, and what
 * it turns in vain is bounded by what came. */
#define _GNU_SOURCE
#include <assert.h>
#include <errno.h>
#include <linux/if_packet.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "xsk.h"

struct crab_worker {
    struct crab_xsk *xsk;
    struct crab_core *core;
    uint64_t *counters;
    uint32_t own; /* index of the interface that the AF_XDP socket sends by; 0: it sends by none */
    int wake;   /* eventfd */
    int packet; /* socket that sends by any interface, and receives nothing */
    uint32_t asked;             /* second in which the kernel's counters were read */
    struct crab_xsk_stats told; /* what they were then */
    struct crab_rounds *rounds;
    uint32_t round; /* of those that had frames */
    uint64_t spin; /* nanoseconds: turn so long before a sleep, if that seems worth it */
    bool worth_it;
    _Atomic(bool) stop;
    _Atomic(uint64_t) turns; /* of crab_worker_run; this thread's.  Who sees one sees what was done before */
};

/* Frames of a round: a kick's fixed costs are shared, and the socket's cache lines change hands less often. */
#define ROUND (4 * CRAB_BATCH)
/* Looks at the RX ring between two at the clock. */
#define LOOKS 64

_Static_assert(ROUND == 1 << (CRAB_ROUND_SIZES - 1), "a round's size has a place");

struct crab_worker *crab_worker_new(struct crab_xsk *xsk, struct crab_core *core, uint64_t *counters)
{
    struct crab_worker *w = calloc(1, sizeof *w);
    if (!w)
        return NULL;
    *w = (struct crab_worker){.xsk = xsk, .core = core, .counters = counters, .own = xsk->ifindex};
    crab_core_put_off(core);
    w->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    w->packet = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    /* Like the AF_XDP socket: straight to the driver.  A full queue then drops, and is counted. */
    if (w->wake < 0 || w->packet < 0 ||
        setsockopt(w->packet, SOL_PACKET, PACKET_QDISC_BYPASS, &(int){1}, sizeof(int))) {
        int error = errno;
        crab_worker_free(w);
        errno = error;
        return NULL;
    }
    crab_xsk_statistics(xsk, &w->told); /* of a socket that was another worker's, which has counted them */
    return w;
}

void crab_worker_free(struct crab_worker *w)
{
    if (!w)
        return;
    if (w->wake >= 0)
        close(w->wake);
    if (w->packet >= 0)
        close(w->packet);
    free(w);
}

void crab_worker_send_elsewhere(struct crab_worker *w)
{
    w->own = 0;
}

void crab_worker_stop(struct crab_worker *w)
{
    atomic_store(&w->stop, true);
    crab_worker_wake(w);
}

void crab_worker_wake(struct crab_worker *w)
{
    ssize_t n = write(w->wake, &(uint64_t){1}, 8);
    (void)n; /* it fails only when the counter is full, and then the worker is awake */
}

uint64_t crab_worker_turns(const struct crab_worker *w)
{
    return atomic_load_explicit(&w->turns, memory_order_acquire);
}

/* Send frames that the AF_XDP socket does not, in order.  One that is refused (a link that is down, a frame
 * too long for it) does not hold back the others. */
static void send_elsewhere(struct crab_worker *w, const struct crab_frame *frames, uint32_t count)
{
    struct mmsghdr messages[CRAB_BATCH];
    struct sockaddr_ll to[CRAB_BATCH];
    struct iovec data[CRAB_BATCH];
    for (uint32_t i = 0; i < count; i++) {
        data[i] = (struct iovec){.iov_base = frames[i].data, .iov_len = frames[i].len};
        to[i] = (struct sockaddr_ll){.sll_family = AF_PACKET, .sll_ifindex = (int)frames[i].ifindex};
        messages[i] = (struct mmsghdr){.msg_hdr = {
            .msg_name = &to[i], .msg_namelen = sizeof to[i], .msg_iov = &data[i], .msg_iovlen = 1}};
    }
    for (uint32_t done = 0; done < count;) {
        int sent = sendmmsg(w->packet, messages + done, count - done, MSG_DONTWAIT);
        if (sent > 0)
            w->counters[CRAB_C_SENT] += (uint32_t)sent;
        else
            w->counters[CRAB_C_DROP_TX]++;
        done += sent > 0 ? (uint32_t)sent : 1;
    }
}

/* Queue frames for sending. */
static void queue(struct crab_worker *w, const struct crab_desc *out, uint32_t n)
{
    struct crab_xsk *x = w->xsk;
    for (uint32_t done = 0; done < n;) {
        uint32_t queued = crab_xsk_send(x, out + done, n - done);
        w->counters[CRAB_C_SENT] += queued;
        done += queued;
        if (done < n) {
            /* The TX ring is full and stays so after a kick: give these up rather than wait. */
            int rc = crab_xsk_kick(x);
            crab_xsk_reap(x);
            if (rc || !crab_ring_room(&x->tx, 1)) {
                w->counters[CRAB_C_DROP_TX] += n - done;
                crab_xsk_release(x, out + done, n - done);
                break;
            }
        }
    }
}

/* The core's work on at most CRAB_BATCH frames, each a packet, and whither they go then. */
static void forward(struct crab_worker *w, const struct crab_desc *descs, uint32_t n, uint32_t now)
{
    struct crab_xsk *x = w->xsk;
    struct crab_desc out[CRAB_BATCH], rest[CRAB_BATCH];
    struct crab_frame frames[CRAB_BATCH], elsewhere[CRAB_BATCH];
    uint32_t sent = 0, done_with = 0, others = 0;
    for (uint32_t i = 0; i < n; i++)
        frames[i] = (struct crab_frame){.data = x->umem + descs[i].addr, .len = descs[i].len, .ifindex = x->ifindex};
    crab_core_batch(w->core, frames, n, now);
    for (uint32_t i = 0; i < n; i++) {
        if (crab_likely(frames[i].len && frames[i].ifindex == w->own)) {
            out[sent++] = (struct crab_desc){.addr = (uint64_t)(frames[i].data - x->umem), .len = frames[i].len};
            continue;
        }
        if (frames[i].len)
            elsewhere[others++] = frames[i];
        rest[done_with++] = descs[i];
    }
    if (others)
        send_elsewhere(w, elsewhere, others);
    crab_xsk_release(x, rest, done_with);
    queue(w, out, sent);
}

/* The same of a packet in several frames.  It is put together where there is room for one: known flows' do not come here.
 * It goes out by the packet socket, which takes it whole, behind what is queued already.  Returns how many frames it had. */
static uint32_t forward_whole(struct crab_worker *w, const struct crab_desc *descs, uint32_t now)
{
    struct crab_xsk *x = w->xsk;
    uint8_t *start = x->umem + x->umem_len + CRAB_HEADROOM;
    uint32_t n = 0, room = CRAB_WHOLE - CRAB_HEADROOM;
    struct crab_frame frame = {.data = start, .ifindex = x->ifindex};
    do { /* what is too long loses its end, and is malformed then */
        uint32_t len = descs[n].len < room - frame.len ? descs[n].len : room - frame.len;
        memcpy(start + frame.len, x->umem + descs[n].addr, len);
        frame.len += len;
    } while (descs[n++].more);
    crab_xsk_release(x, descs, n);
    crab_core_batch(w->core, &frame, 1, now);
    if (!frame.len)
        return n;
    if (x->in_tx)
        crab_xsk_kick(x);
    send_elsewhere(w, &frame, 1);
    return n;
}

/* Frames in front of the first packet that has several, at most CRAB_BATCH. */
static inline uint32_t single(const struct crab_desc *descs, uint32_t n)
{
    uint32_t i = 0;
    while (i < n && i < CRAB_BATCH && crab_likely(!descs[i].more))
        i++;
    return i;
}

/* Let who reads the worker's counters see the kernel's, which begin anew with each socket. */
static void count_kernels(struct crab_worker *w)
{
    struct crab_xsk_stats s, *told = &w->told;
    if (crab_xsk_statistics(w->xsk, &s))
        return;
    w->counters[CRAB_C_XSK_RX_DROPPED] += s.rx_dropped - told->rx_dropped;
    w->counters[CRAB_C_XSK_RX_INVALID] += s.rx_invalid_descs - told->rx_invalid_descs;
    w->counters[CRAB_C_XSK_TX_INVALID] += s.tx_invalid_descs - told->tx_invalid_descs;
    w->counters[CRAB_C_XSK_RX_FULL] += s.rx_ring_full - told->rx_ring_full;
    w->counters[CRAB_C_XSK_FILL_EMPTY] += s.rx_fill_ring_empty_descs - told->rx_fill_ring_empty_descs;
    *told = s;
}

void crab_worker_lose(struct crab_worker *w)
{
    struct crab_ring *rx = &w->xsk->rx, *tx = &w->xsk->tx;
    uint32_t unsent = tx->mine - atomic_load_explicit(tx->consumer, memory_order_acquire);
    count_kernels(w);
    w->counters[CRAB_C_XSK_RX_DROPPED] += crab_ring_ready(rx, rx->size);
    w->counters[CRAB_C_DROP_TX] += unsent;
    w->counters[CRAB_C_SENT] -= unsent;
}

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* The least i with 2^i >= n, which is at least 1. */
static inline uint32_t power(uint64_t n)
{
    return n < 2 ? 0 : 64 - (uint32_t)__builtin_clzll(n - 1);
}

/* A round of n frames begins: when, if it is to be timed, else 0. */
static inline uint64_t begin_round(struct crab_worker *w, uint32_t n)
{
    if (!n || !w->rounds)
        return 0;
    w->rounds->sizes[power(n)]++;
    w->rounds->frames += n;
    return crab_unlikely(w->round++ % CRAB_ROUND_SAMPLE == 0) ? now_ns() : 0;
}

static void end_round(struct crab_worker *w, uint32_t n, uint64_t began)
{
    uint64_t ns = now_ns() - began;
    uint32_t place = power((ns + CRAB_ROUND_NS - 1) / CRAB_ROUND_NS);
    w->rounds->times[place < CRAB_ROUND_TIMES ? place : CRAB_ROUND_TIMES - 1] += n;
    w->rounds->timed_ns += ns * n;
}

static int work(struct crab_worker *w)
{
    struct crab_xsk *x = w->xsk;
    struct crab_desc descs[ROUND];
    uint32_t n = crab_xsk_receive(x, descs, ROUND);
    uint64_t began = begin_round(w, n), before = x->dropped;
    struct timespec clock;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &clock);
    uint32_t now = (uint32_t)clock.tv_sec;
    for (uint32_t at = 0; at < n;) {
        uint32_t run = single(descs + at, n - at);
        if (crab_likely(run))
            forward(w, descs + at, run, now);
        else
            run = forward_whole(w, descs + at, now);
        at += run;
    }
    if (crab_unlikely(w->asked != now)) {
        w->asked = now;
        count_kernels(w);
    }
    int rc = 0;
    if (x->in_tx) {
        rc = crab_xsk_kick(x);
        crab_xsk_reap(x);
    }
    w->counters[CRAB_C_DROP_TX] += x->dropped - before;
    w->counters[CRAB_C_SENT] -= x->dropped - before;
    crab_core_settle(w->core);
    crab_xsk_refill(x);
    if (crab_unlikely(began))
        end_round(w, n, began);
#ifdef CRAB_DEBUG
    assert(crab_xsk_conserved(x));
#endif
    /* A link that is down keeps its frames until it comes up again. */
    return rc && rc != -ENETDOWN ? rc : (int)n;
}

/* Sleep until frames come, the worker is woken, or timeout_ms (-1: none) have passed.  0 or -errno.  poll(2) looks at
 * the RX ring after it has put itself on the list of those to be woken, so no frame is overlooked. */
static int wait_for_frames(struct crab_worker *w, int timeout_ms)
{
    struct pollfd fds[] = {{.fd = w->xsk->fd, .events = POLLIN}, {.fd = w->wake, .events = POLLIN}};
    /* Frames that the kernel has not sent yet are kicked again soon, not when the next SYN happens to come. */
    if (w->xsk->in_tx && (timeout_ms < 0 || timeout_ms > 1))
        timeout_ms = 1;
    /* An interface that goes is only seen by looking: see crab_xsk_error. */
    if (timeout_ms < 0 || timeout_ms > 1000)
        timeout_ms = 1000;
    int ready = poll(fds, 2, timeout_ms);
    if (ready < 0)
        return errno == EINTR ? 0 : -errno;
    if (fds[1].revents) {
        uint64_t asked;
        ssize_t n = read(w->wake, &asked, sizeof asked);
        (void)n;
    }
    bool failed = fds[0].revents & (POLLERR | POLLNVAL);
    int error = (fds[0].revents || atomic_load(&w->stop)) && !failed ? 0 : crab_xsk_error(w->xsk);
    if (error || failed)
        return error ? -error : -ENETDOWN;
    return 0;
}

int crab_worker_once(struct crab_worker *w, int timeout_ms)
{
    int n = work(w);
    if (n || !timeout_ms)
        return n;
    int rc = wait_for_frames(w, timeout_ms);
    return rc ? rc : work(w);
}

static inline void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Turn until frames come; whether they did. */
static bool turn(struct crab_worker *w)
{
    uint64_t end = now_ns() + w->spin;
    do {
        crab_xsk_wake(w->xsk);
        for (int i = 0; i < LOOKS; i++) {
            if (crab_ring_ready(&w->xsk->rx, 1))
                return true;
            relax();
        }
    } while (!atomic_load_explicit(&w->stop, memory_order_relaxed) && now_ns() < end);
    return false;
}

void crab_worker_spin(struct crab_worker *w, uint32_t microseconds)
{
    w->spin = (uint64_t)microseconds * 1000;
}

void crab_worker_rounds(struct crab_worker *w, struct crab_rounds *rounds)
{
    w->rounds = rounds;
}

static int run(struct crab_worker *w)
{
    while (!atomic_load_explicit(&w->stop, memory_order_relaxed)) {
        atomic_store_explicit(&w->turns, crab_worker_turns(w) + 1, memory_order_release);
        int n = work(w);
        if (n < 0)
            return n;
        if (n || (w->worth_it && turn(w)))
            continue;
        uint64_t asleep = now_ns();
        int rc = wait_for_frames(w, -1);
        if (rc)
            return rc;
        w->worth_it = now_ns() - asleep < w->spin;
    }
    return 0;
}

int crab_worker_run(struct crab_worker *w)
{
    int rc = run(w);
    count_kernels(w);
    return rc;
}
