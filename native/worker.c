/* SPDX-License-Identifier: MIT */
/* RX ring -> core -> TX ring, for one queue.  Nothing here allocates, and there are three system calls at most a batch: the
 * kick, the sending of what goes out by another interface, and the sleep when nothing is to do. */
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
    int wake;   /* eventfd */
    int packet; /* socket that sends by any interface, and receives nothing */
    _Atomic(bool) stop;
};

struct crab_worker *crab_worker_new(struct crab_xsk *xsk, struct crab_core *core, uint64_t *counters)
{
    struct crab_worker *w = calloc(1, sizeof *w);
    if (!w)
        return NULL;
    *w = (struct crab_worker){.xsk = xsk, .core = core, .counters = counters};
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

void crab_worker_stop(struct crab_worker *w)
{
    atomic_store(&w->stop, true);
    ssize_t n = write(w->wake, &(uint64_t){1}, 8);
    (void)n; /* it fails only when the counter is full, and then the worker is awake */
}

/* Send frames by other interfaces than the AF_XDP socket's, in order.  One that is refused (a link that is down, a frame
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

static int work(struct crab_worker *w)
{
    struct crab_xsk *x = w->xsk;
    struct crab_desc descs[CRAB_BATCH], out[CRAB_BATCH], rest[CRAB_BATCH];
    struct crab_frame frames[CRAB_BATCH], elsewhere[CRAB_BATCH];
    uint32_t n = crab_xsk_receive(x, descs, CRAB_BATCH), sent = 0, done_with = 0, others = 0;
    if (n) {
        for (uint32_t i = 0; i < n; i++)
            frames[i] = (struct crab_frame){.data = x->umem + descs[i].addr, .len = descs[i].len, .ifindex = x->ifindex};
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
        crab_core_batch(w->core, frames, n, (uint32_t)now.tv_sec);
        for (uint32_t i = 0; i < n; i++) {
            if (crab_likely(frames[i].len && frames[i].ifindex == x->ifindex)) {
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
        for (uint32_t done = 0; done < sent;) {
            uint32_t queued = crab_xsk_send(x, out + done, sent - done);
            w->counters[CRAB_C_SENT] += queued;
            done += queued;
            if (done < sent) {
                /* The TX ring is full and stays so after a kick: give these up rather than wait. */
                int rc = crab_xsk_kick(x);
                crab_xsk_reap(x);
                if (rc || !crab_ring_room(&x->tx, 1)) {
                    w->counters[CRAB_C_DROP_TX] += sent - done;
                    crab_xsk_release(x, out + done, sent - done);
                    break;
                }
            }
        }
    }
    int rc = 0;
    if (x->in_tx) {
        uint64_t before = x->dropped;
        rc = crab_xsk_kick(x);
        w->counters[CRAB_C_DROP_TX] += x->dropped - before;
        w->counters[CRAB_C_SENT] -= x->dropped - before;
        crab_xsk_reap(x);
    }
    crab_xsk_refill(x);
#ifdef CRAB_DEBUG
    assert(crab_xsk_conserved(x));
#endif
    /* A link that is down keeps its frames until it comes up again. */
    return rc && rc != -ENETDOWN ? rc : (int)n;
}

int crab_worker_once(struct crab_worker *w, int timeout_ms)
{
    int n = work(w);
    if (n || !timeout_ms)
        return n;
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
    bool failed = fds[0].revents & (POLLERR | POLLNVAL);
    int error = ready && !failed ? 0 : crab_xsk_error(w->xsk);
    if (error || failed)
        return error ? -error : -ENETDOWN;
    return work(w);
}

int crab_worker_run(struct crab_worker *w)
{
    while (!atomic_load_explicit(&w->stop, memory_order_relaxed)) {
        int n = crab_worker_once(w, -1);
        if (n < 0)
            return n;
    }
    return 0;
}
