/* SPDX-License-Identifier: MIT */
/* RX ring -> core -> TX ring, for one queue.  Nothing here allocates, and there are three system calls at most a batch: the
 * kick, the update of the XDP program's flows, and the sleep when nothing is to do. */
#define _GNU_SOURCE
#include <assert.h>
#include <errno.h>
#include <linux/bpf.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "xsk.h"

struct crab_worker {
    struct crab_xsk *xsk;
    struct crab_core *core;
    uint64_t *counters;
    int wake; /* eventfd */
    int flow_map;
    _Atomic(bool) stop;
    struct crab_learned learned;
};

struct crab_worker *crab_worker_new(struct crab_xsk *xsk, struct crab_core *core, uint64_t *counters, int flow_map)
{
    struct crab_worker *w = calloc(1, sizeof *w);
    if (!w)
        return NULL;
    *w = (struct crab_worker){.xsk = xsk, .core = core, .counters = counters, .flow_map = flow_map};
    crab_core_learn(core, flow_map < 0 ? NULL : &w->learned);
    w->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (w->wake < 0) {
        free(w);
        return NULL;
    }
    return w;
}

void crab_worker_free(struct crab_worker *w)
{
    if (!w)
        return;
    close(w->wake);
    free(w);
}

void crab_worker_stop(struct crab_worker *w)
{
    atomic_store(&w->stop, true);
    ssize_t n = write(w->wake, &(uint64_t){1}, 8);
    (void)n; /* it fails only when the counter is full, and then the worker is awake */
}

/* Hand flows to the XDP program.  bpf(2), BPF_MAP_UPDATE_BATCH: an LRU map makes room by itself.  A flow that could not
 * be written passes here again with its next packet. */
static void teach(struct crab_worker *w)
{
    union bpf_attr attr;
    memset(&attr, 0, sizeof attr);
    attr.batch.map_fd = (uint32_t)w->flow_map;
    attr.batch.keys = (uintptr_t)w->learned.keys;
    attr.batch.values = (uintptr_t)w->learned.values;
    attr.batch.count = w->learned.count;
    if (syscall(SYS_bpf, BPF_MAP_UPDATE_BATCH, &attr, sizeof attr.batch))
        w->counters[CRAB_C_LEARNED] -= w->learned.count - attr.batch.count;
}

static int work(struct crab_worker *w)
{
    struct crab_xsk *x = w->xsk;
    struct crab_desc descs[CRAB_BATCH], out[CRAB_BATCH], rest[CRAB_BATCH];
    struct crab_frame frames[CRAB_BATCH];
    uint32_t n = crab_xsk_receive(x, descs, CRAB_BATCH), sent = 0, dropped = 0;
    if (n) {
        for (uint32_t i = 0; i < n; i++)
            frames[i] = (struct crab_frame){.data = x->umem + descs[i].addr, .len = descs[i].len};
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
        crab_core_batch(w->core, frames, n, (uint32_t)now.tv_sec);
        if (w->learned.count)
            teach(w);
        for (uint32_t i = 0; i < n; i++) {
            if (frames[i].len)
                out[sent++] = (struct crab_desc){.addr = (uint64_t)(frames[i].data - x->umem), .len = frames[i].len};
            else
                rest[dropped++] = descs[i];
        }
        crab_xsk_release(x, rest, dropped);
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
