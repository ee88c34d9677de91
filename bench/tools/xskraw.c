/* SPDX-License-Identifier: MIT */
/* The floor under crablb: its AF_XDP layer (native/xsk.c) with no work done on the frames.
 *
 *   xskraw receive|send|l2fwd INTERFACE QUEUE XSKMAP BATCH BUDGET [wakeup] [busy]
 *
 * XSKMAP: an inherited descriptor of the map that the socket is put into.  BATCH: frames that are taken at once.  BUDGET:
 * frames that the kernel sends in one kick (XDP_MAX_TX_SKB_BUDGET; its default is 32).  `wakeup`: XDP_USE_NEED_WAKEUP;
 * `busy`: SO_PREFER_BUSY_POLL.  It turns without sleeping, which is the least that a worker under load can do.
 *
 * Says "ready"; answers each line of its input with the numbers of frames received and sent; ends at its input's end. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/bpf.h>
#include <net/if.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "xsk.h"

#define MAX_BATCH 1024
#define FRAMES 4096 /* and rings: as crablb/kernel/xsk.py has them */
#define RING 2048

static _Atomic(uint64_t) received, sent;
static _Atomic(bool) stop;

static void *answer(void *unused)
{
    char line[16];
    while (fgets(line, sizeof line, stdin)) {
        printf("%llu %llu\n", (unsigned long long)received, (unsigned long long)sent);
        fflush(stdout);
    }
    stop = true;
    return unused;
}

static void die(const char *what)
{
    fprintf(stderr, "xskraw: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void set(int fd, int level, int option, int value, const char *name)
{
    if (setsockopt(fd, level, option, &value, sizeof value))
        die(name);
}

static void swap_macs(uint8_t *frame)
{
    uint8_t mac[6];
    memcpy(mac, frame, 6);
    memcpy(frame, frame + 6, 6);
    memcpy(frame + 6, mac, 6);
}

/* All of `descs` into the TX ring, with kicks while it is full. */
static void send_all(struct crab_xsk *x, const struct crab_desc *descs, uint32_t n)
{
    for (uint32_t done = 0; done < n && !stop;) {
        done += crab_xsk_send(x, descs + done, n - done);
        if (crab_xsk_kick(x))
            die("send");
        crab_xsk_reap(x);
    }
    sent += n;
}

int main(int argc, char **argv)
{
    if (argc < 7) {
        fprintf(stderr, "xskraw: receive|send|l2fwd INTERFACE QUEUE XSKMAP BATCH BUDGET [wakeup] [busy]\n");
        return 2;
    }
    uint32_t ifindex = if_nametoindex(argv[2]), queue = (uint32_t)atoi(argv[3]), batch = (uint32_t)atoi(argv[5]);
    int map = atoi(argv[4]), error;
    bool wakeup = false, busy = false, receives = strcmp(argv[1], "send"), sends = strcmp(argv[1], "receive");
    for (int i = 7; i < argc; i++) {
        wakeup |= !strcmp(argv[i], "wakeup");
        busy |= !strcmp(argv[i], "busy");
    }
    if (!ifindex)
        die(argv[2]);
    if (!batch || batch > MAX_BATCH)
        return 2;
    const char *stage;
    struct crab_umem *umem = crab_umem_new(FRAMES, 2048, -1);
    if (!umem)
        die("memory");
    struct crab_xsk *x = crab_xsk_new(umem, NULL, ifindex, queue, RING,
                                      CRAB_BIND_COPY | (wakeup ? CRAB_BIND_NEED_WAKEUP : 0), &error, &stage);
    if (!x) {
        errno = error;
        die(stage);
    }
    int fd = crab_xsk_fd(x);
    if (setsockopt(fd, SOL_XDP, XDP_MAX_TX_SKB_BUDGET, &(int){atoi(argv[6])}, sizeof(int)) && errno != ENOPROTOOPT)
        die("XDP_MAX_TX_SKB_BUDGET");
    if (busy) {
        set(fd, SOL_SOCKET, SO_PREFER_BUSY_POLL, 1, "SO_PREFER_BUSY_POLL");
        set(fd, SOL_SOCKET, SO_BUSY_POLL, 20, "SO_BUSY_POLL");
        set(fd, SOL_SOCKET, SO_BUSY_POLL_BUDGET, (int)batch, "SO_BUSY_POLL_BUDGET");
    }
    union bpf_attr attr;
    memset(&attr, 0, sizeof attr);
    attr.map_fd = (uint32_t)map;
    attr.key = (uintptr_t)&queue;
    attr.value = (uintptr_t)&fd;
    if (syscall(SYS_bpf, BPF_MAP_UPDATE_ELEM, &attr, sizeof attr))
        die("XSKMAP");
    pthread_t thread;
    if (pthread_create(&thread, NULL, answer, NULL))
        die("thread");
    printf("ready\n");
    fflush(stdout);

    struct crab_desc descs[MAX_BATCH];
    while (!stop) {
        uint32_t n;
        if (receives) {
            n = crab_xsk_receive(x, descs, batch);
            received += n;
            if (busy)
                recvfrom(fd, NULL, 0, MSG_DONTWAIT, NULL, NULL);
        } else {
            n = crab_xsk_take(x, descs, batch);
            for (uint32_t i = 0; i < n; i++)
                descs[i].len = 64;
        }
        if (!sends) {
            crab_xsk_release(x, descs, n);
        } else {
            if (receives)
                for (uint32_t i = 0; i < n; i++)
                    swap_macs(crab_umem_memory(umem) + descs[i].addr);
            if (n || !receives)
                send_all(x, descs, n);
        }
        crab_xsk_refill(x);
    }
    crab_xsk_free(x);
    crab_umem_free(umem);
    return 0;
}
