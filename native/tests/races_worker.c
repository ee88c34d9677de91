/* SPDX-License-Identifier: MIT */
/* A worker's loop on its rings, and who does what meanwhile, for ThreadSanitizer (`make race`): the kernel, which is a thread
 * here, behind the calls that xsk.c and worker.c make of it (the Makefile has them wrapped); and the control side, which
 * publishes snapshots, reads counters, has a worker write down what it changes, breaks that off, and has another one take
 * over.  No frame may be lost, and what is taken over must be what there was. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "check.h"
#include "frames.h"
#include "xsk.h"

#define FRAMES 256
#define FRAME_SIZE 2048
#define RING 128
#define HEADROOM 256
#define TOTAL 60000
#define TAKEOVERS 12
#define SIZE 251
#define MEMBERS 5

/* ---- the kernel ---- */

struct ends {
    _Alignas(64) _Atomic(uint32_t) producer;
    _Alignas(64) _Atomic(uint32_t) consumer;
    _Alignas(64) _Atomic(uint32_t) flags;
};
static struct {
    struct ends ends;
    uint64_t descs[FRAMES];
} fill, completion;
static struct {
    struct ends ends;
    struct xdp_desc descs[RING];
} rx, tx;
static uint8_t *umem;
static int came;                    /* eventfd, of which each process has a copy as its AF_XDP socket */
static _Atomic(uint32_t) delivered; /* frames */
static uint32_t sent;               /* likewise; by whoever kicks */

int __wrap_socket(int domain, int type, int protocol);
int __wrap_bind(int fd, const struct sockaddr *addr, socklen_t len);
int __wrap_setsockopt(int fd, int level, int option, const void *value, socklen_t len);
int __wrap_getsockopt(int fd, int level, int option, void *value, socklen_t *len);
void *__wrap_mmap(void *addr, size_t len, int prot, int flags, int fd, off_t offset);
int __wrap_munmap(void *addr, size_t len);
ssize_t __wrap_sendto(int fd, const void *data, size_t len, int flags, const struct sockaddr *to, socklen_t to_len);
int __wrap_poll(struct pollfd *fds, nfds_t n, int timeout);
void *__real_mmap(void *addr, size_t len, int prot, int flags, int fd, off_t offset);
int __real_munmap(void *addr, size_t len);
int __real_poll(struct pollfd *fds, nfds_t n, int timeout);

int __wrap_socket(int domain, int type, int protocol)
{
    (void)type, (void)protocol;
    int fd = eventfd(0, EFD_NONBLOCK);
    if (domain != AF_XDP)
        return fd;
    came = fd;
    return dup(came);
}

int __wrap_bind(int fd, const struct sockaddr *addr, socklen_t len)
{
    (void)fd, (void)addr, (void)len;
    return 0;
}

int __wrap_setsockopt(int fd, int level, int option, const void *value, socklen_t len)
{
    (void)fd, (void)level, (void)option, (void)value, (void)len;
    return 0;
}

int __wrap_getsockopt(int fd, int level, int option, void *value, socklen_t *len)
{
    (void)fd;
    memset(value, 0, *len);
    if (level == SOL_XDP && option == XDP_MMAP_OFFSETS) {
        const struct xdp_ring_offset off = {.producer = offsetof(struct ends, producer), .consumer = offsetof(struct ends, consumer),
                                            .flags = offsetof(struct ends, flags), .desc = sizeof(struct ends)};
        *(struct xdp_mmap_offsets *)value = (struct xdp_mmap_offsets){off, off, off, off};
    }
    return 0;
}

void *__wrap_mmap(void *addr, size_t len, int prot, int flags, int fd, off_t offset)
{
    if (fd < 0)
        return __real_mmap(addr, len, prot, flags, fd, offset);
    switch ((uint64_t)offset) {
    case XDP_UMEM_PGOFF_FILL_RING:
        return &fill;
    case XDP_UMEM_PGOFF_COMPLETION_RING:
        return &completion;
    case XDP_PGOFF_TX_RING:
        return &tx;
    default:
        return &rx;
    }
}

int __wrap_munmap(void *addr, size_t len)
{
    bool ring = addr == &fill || addr == &completion || addr == &tx || addr == &rx;
    return ring ? 0 : __real_munmap(addr, len);
}

/* A kick: in the caller's time, as in copy mode.  What goes out is whole, and to a backend. */
ssize_t __wrap_sendto(int fd, const void *data, size_t len, int flags, const struct sockaddr *to, socklen_t to_len)
{
    (void)fd, (void)data, (void)len, (void)flags, (void)to, (void)to_len;
    uint32_t from = atomic_load(&tx.ends.consumer), until = atomic_load_explicit(&tx.ends.producer, memory_order_acquire);
    uint32_t at = atomic_load(&completion.ends.producer);
    for (; from != until; from++, at++) {
        struct xdp_desc d = tx.descs[from % RING];
        CHECK(d.len >= 54 && !memcmp(umem + d.addr, "\x02\0\0\0\0", 5) && umem[d.addr + 5] >= 11);
        completion.descs[at % FRAMES] = d.addr;
        sent++;
    }
    atomic_store_explicit(&completion.ends.producer, at, memory_order_release);
    atomic_store_explicit(&tx.ends.consumer, from, memory_order_release);
    return 0;
}

int __wrap_poll(struct pollfd *fds, nfds_t n, int timeout)
{
    int ready = __real_poll(fds, n, timeout);
    uint64_t ignored;
    if (n == 2 && fds[0].revents & POLLIN)
        CHECK(read(fds[0].fd, &ignored, sizeof ignored) == sizeof ignored);
    return ready;
}

static void rest(void)
{
    nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
}

/* What comes: bursts, as long as there are frames to receive into. */
static void *receive(void *arg)
{
    (void)arg;
    uint32_t random = 1;
    for (uint32_t done = 0; done < TOTAL;) {
        random = random * 1664525 + 1013904223;
        uint32_t n = 1 + (random >> 24) % 48, from = atomic_load(&fill.ends.consumer), at = atomic_load(&rx.ends.producer);
        uint32_t there = atomic_load_explicit(&fill.ends.producer, memory_order_acquire) - from;
        uint32_t room = RING - (at - atomic_load_explicit(&rx.ends.consumer, memory_order_acquire));
        n = n < there ? n : there;
        n = n < room ? n : room;
        n = n < TOTAL - done ? n : TOTAL - done;
        for (uint32_t i = 0; i < n; i++, done++) {
            uint64_t addr = fill.descs[(from + i) % FRAMES] + HEADROOM;
            uint32_t len;
            make_frame(umem + addr, &len, (uint16_t)(1 + done % 4000), done % 3 == 0, false);
            rx.descs[(at + i) % RING] = (struct xdp_desc){.addr = addr, .len = len};
        }
        atomic_store(&delivered, done); /* before the worker can have them */
        atomic_store_explicit(&fill.ends.consumer, from + n, memory_order_release);
        atomic_store_explicit(&rx.ends.producer, at + n, memory_order_release);
        CHECK(write(came, &(uint64_t){1}, 8) == 8);
        if (random >> 30 == 0 || !n)
            rest();
    }
    return NULL;
}

/* ---- the control side ---- */

static const uint8_t key[16] = {7};
static uint16_t slots[SIZE];
static struct crab_service service = {.addr = {[10] = 0xff, [11] = 0xff, 10, 0, 0, 100}, .protocol = 6,
                                      .fallback = CRAB_FALLBACK_L2, .table = slots};
static struct crab_backend backends[MEMBERS];
static uint64_t counters[CRAB_COUNTERS];
static struct crab_rounds rounds;
static struct crab_snapshot *snapshot;

/* One process' part. */
struct process {
    pthread_t thread;
    struct crab_umem *umem;
    struct crab_xsk *xsk;
    struct crab_core *core;
    struct crab_worker *worker;
};

static void *run(void *arg)
{
    struct process *p = arg;
    CHECK(crab_worker_run(p->worker) == 0);
    return NULL;
}

/* Numbers that the worker counts in, as Python reads them: one by one, while they are written. */
__attribute__((no_sanitize("thread")))
static uint64_t peek(const uint64_t *number)
{
    return __atomic_load_n(number, __ATOMIC_RELAXED);
}

/* Likewise a cache, which is copied while it is written. */
__attribute__((no_sanitize("thread")))
static void copy(uint8_t *to, const uint8_t *from, uint64_t bytes)
{
    for (uint64_t at = 0; at < bytes; at += 8) {
        uint64_t word = __atomic_load_n((const uint64_t *)(const void *)(from + at), __ATOMIC_RELAXED);
        for (int i = 0; i < 8; i++)
            to[at + (uint64_t)i] = (uint8_t)(word >> 8 * i);
    }
}

static void publish(struct process *p)
{
    struct crab_snapshot *old = snapshot;
    snapshot = crab_snapshot_new(&service, 1, backends, MEMBERS, NULL, 0, NULL, 0, SIZE, CRAB_FORM_CRAB, key);
    CHECK(snapshot);
    crab_core_publish(p->core, snapshot);
    while (old && crab_core_uses(p->core, old))
        ;
    crab_snapshot_free(old);
}

static void begin(struct process *p)
{
    p->worker = crab_worker_new(p->xsk, p->core, counters);
    CHECK(p->worker);
    crab_worker_spin(p->worker, 20);
    crab_worker_rounds(p->worker, &rounds);
    CHECK(!pthread_create(&p->thread, NULL, run, p));
}

static void end(struct process *p)
{
    crab_worker_stop(p->worker);
    pthread_join(p->thread, NULL);
    crab_worker_free(p->worker);
}

static void until_turned(struct process *p)
{
    for (uint64_t before = crab_worker_turns(p->worker); crab_worker_turns(p->worker) == before; rest())
        crab_worker_wake(p->worker);
}

/* What other threads do all the time. */
static void look_on(struct process *p)
{
    uint32_t counts[MEMBERS] = {0};
    struct crab_memory found[2];
    publish(p);
    crab_core_count(p->core, counts, MEMBERS, (uint32_t)time(NULL), false);
    for (uint64_t hash = 1; hash < 64; hash++)
        CHECK(crab_core_recall(p->core, hash * 0x9e3779b97f4a7c15, (uint32_t)time(NULL), found) <= 2);
    CHECK(peek(&counters[CRAB_C_RECEIVED]) <= atomic_load(&delivered));
    CHECK(peek(&rounds.frames) <= TOTAL);
}

static struct process taken_over(struct process *old)
{
    uint64_t bytes, same;
    uint8_t *cache = crab_core_flows(old->core, &bytes), *copied = malloc(bytes);
    uint64_t *touched = calloc(bytes / CRAB_PART / 64 + 1, 8), frames[FRAMES];
    struct crab_xsk_bound bound;
    struct crab_xsk_given given;
    int error;
    const char *stage;
    CHECK(copied && touched);
    crab_core_note(old->core, touched);
    until_turned(old);
    copy(copied, cache, bytes);
    look_on(old);
    struct process new = {.umem = crab_umem_new(FRAMES, FRAME_SIZE, -1), .core = crab_core_new(4096, counters)};
    CHECK(new.umem && new.core);
    munmap(new.umem->memory, new.umem->len + CRAB_WHOLE);
    new.umem->memory = umem; /* the same, as other processes map it */
    crab_xsk_is_bound(old->xsk, &bound);
    CHECK(new.xsk = crab_xsk_adopt(new.umem, dup(came), &bound, &error, &stage));
    crab_core_publish(new.core, snapshot);

    end(old);
    crab_flows_renew(copied, cache, touched, bytes);
    CHECK_BYTES(copied, cache, bytes);
    crab_xsk_give(old->xsk, &given, frames);
    CHECK(!crab_xsk_moved(old->xsk));
    memcpy(crab_core_flows(new.core, &same), copied, bytes);
    CHECK(same == bytes);
    crab_xsk_take_over(new.xsk, &given, frames);
    begin(&new);

    crab_core_publish(old->core, NULL);
    crab_core_free(old->core);
    crab_xsk_free(old->xsk);
    old->umem->memory = NULL;
    crab_umem_free(old->umem);
    free(copied);
    free(touched);
    return new;
}

/* One that is broken off: the memory that changes were written down in is somebody else's then. */
static void broken_off(struct process *p)
{
    uint64_t bytes;
    crab_core_flows(p->core, &bytes);
    uint64_t *touched = calloc(bytes / CRAB_PART / 64 + 1, 8);
    crab_core_note(p->core, touched);
    until_turned(p);
    look_on(p);
    crab_core_note(p->core, NULL);
    until_turned(p);
    free(touched);
}

int main(void)
{
    service.port_be = htons(80);
    for (uint16_t i = 0; i < MEMBERS; i++)
        backends[i] = (struct crab_backend){.addr = {[10] = 0xff, [11] = 0xff, 10, 0, 0, (uint8_t)(11 + i)},
                                            .dst_mac = {2, 0, 0, 0, 0, (uint8_t)(11 + i)}, .mtu = 1500, .ifindex = 2,
                                            .flags = CRAB_BACKEND_USABLE | CRAB_BACKEND_CR | CRAB_BACKEND_ON_LINK};
    for (uint32_t i = 0; i < SIZE; i++)
        slots[i] = (uint16_t)(i % MEMBERS);
    int error;
    const char *stage;
    struct process now = {.umem = crab_umem_new(FRAMES, FRAME_SIZE, -1), .core = crab_core_new(4096, counters)};
    CHECK(now.umem && now.core);
    umem = now.umem->memory;
    CHECK(now.xsk = crab_xsk_new(now.umem, NULL, 2, 0, RING, CRAB_BIND_COPY, &error, &stage));
    publish(&now);
    begin(&now);
    pthread_t kernel;
    CHECK(!pthread_create(&kernel, NULL, receive, NULL));
    for (uint32_t n = 0; n < TAKEOVERS; n++) {
        while (atomic_load(&delivered) < TOTAL / (TAKEOVERS + 1) * (n + 1)) {
            look_on(&now);
            rest();
        }
        broken_off(&now);
        now = taken_over(&now);
    }
    pthread_join(kernel, NULL);
    while (peek(&counters[CRAB_C_RECEIVED]) < TOTAL)
        rest();
    end(&now);
    uint64_t dropped = 0;
    for (uint32_t c = CRAB_C_DROP_NOT_SERVICE; c <= CRAB_C_DROP_TX; c++)
        dropped += counters[c];
    printf("%u frames: %u sent, %lu dropped, %u takeovers\n", TOTAL, sent, (unsigned long)dropped, TAKEOVERS);
    CHECK(counters[CRAB_C_RECEIVED] == TOTAL && sent + dropped == TOTAL && sent > TOTAL / 2 && sent == counters[CRAB_C_SENT]);
    CHECK(crab_xsk_conserved(now.xsk));
    crab_core_publish(now.core, NULL);
    crab_snapshot_free(snapshot);
    crab_core_free(now.core);
    crab_xsk_free(now.xsk);
    crab_umem_free(now.umem);
    DONE();
}
