/* SPDX-License-Identifier: MIT */
/* Times of the hot loop by itself.  Each call measures one thing once, with its baseline in turn, and prints JSON:
 *
 *   hotloop syn FAMILY FRAMES [flush]       a SYN: bare loop, headers moved and no more, crab_core_batch
 *   hotloop scale BACKENDS SERVICES FLOWS   a SYN, with so many of each
 *   hotloop stages FAMILY                   parts of the work
 *   hotloop policy NAME                     a SYN, beside Maglev
 *   hotloop checksum BYTES                  crab_sum
 *   hotloop table NAME SIZE BACKENDS        a table, how even it is, and what changes when a backend goes
 *   hotloop threads N                       SYNs a second, by N threads on CPUs of their own
 *   hotloop batches FAMILY N WAY            nothing timed: for callgrind.  redirect: SYNs; fallback: SYNs without an offer,
 *                                           and as many packets of their connections, in turn
 *
 * Every SYN is a new connection.  Frames lie in a ring as they do in a UMEM, 2048 bytes apart; the ring's length says how much
 * of it the caches hold.  Frames are written before a pass, which is not timed; `flush` takes frames and tables out of all
 * caches before each batch. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "flows.h"
#include "packet.h"
#include "rewrite.h"

#define STRIDE 2048
#define FRONT 256
#define TABLE 65537
#define PACKETS (1 << 17) /* timed in one measurement, at the least */
#define FLOWS (1 << 20)

static const uint8_t key[16] = {1, 2, 3};

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void die(const char *why)
{
    fprintf(stderr, "hotloop: %s\n", why);
    exit(1);
}

static void *memory(size_t size)
{
    void *p = aligned_alloc(4096, (size + 4095) & ~(size_t)4095);
    if (!p)
        die("no memory");
    return memset(p, 0, size);
}

static void store32(uint8_t *p, uint32_t v)
{
    memcpy(p, &v, 4);
}

static uint32_t length(int family)
{
    return family == 4 ? 78 : 98;
}

/* A packet with the options of the SYN that Linux sends, with an offer or without, to a service: n says from where. */
static void make_packet(uint8_t *f, int family, uint32_t n, uint32_t service, uint8_t flags, bool offers)
{
    uint8_t options[24] = {2, 4, 5, 180, 4, 2, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0, 1, 3, 3, 7, 42, 2, 1, 1};
    uint32_t l4 = family == 4 ? 34 : 54, len = length(family);
    uint8_t *ip = f + 14, *tcp = f + l4;
    if (!offers)
        memset(options + 20, 1, 4); /* NOPs */
    memset(f, 0, len);
    store16(f + 12, htons(family == 4 ? 0x0800 : 0x86dd));
    const uint8_t *addrs;
    size_t addrs_len;
    if (family == 4) {
        ip[0] = 0x45;
        store16(ip + CRAB_IP4_LEN, htons((uint16_t)(len - 14)));
        ip[8] = 64;
        ip[9] = 6;
        store32(ip + CRAB_IP4_SRC, htonl(0x0a000000u + (n >> 14)));
        store32(ip + CRAB_IP4_DST, htonl(0x0a000064u + service));
        store16(ip + CRAB_IP4_CSUM, (uint16_t)~crab_fold(crab_sum(ip, 20)));
        addrs = ip + CRAB_IP4_SRC;
        addrs_len = 8;
    } else {
        ip[0] = 0x60;
        store16(ip + CRAB_IP6_LEN, htons((uint16_t)(len - l4)));
        ip[6] = 6;
        ip[7] = 64;
        ip[8] = ip[24] = 0xfd;
        store32(ip + CRAB_IP6_SRC + 12, htonl(n >> 14));
        store32(ip + CRAB_IP6_DST + 12, htonl(0x64u + service));
        addrs = ip + CRAB_IP6_SRC;
        addrs_len = 32;
    }
    store16(tcp, htons((uint16_t)(1024 + (n & 16383))));
    store16(tcp + 2, htons(80));
    store32(tcp + CRAB_TCP_SEQ, n);
    tcp[CRAB_TCP_DOFF] = (uint8_t)((20 + sizeof options) / 4 << 4);
    tcp[CRAB_TCP_FLAGS] = flags;
    memcpy(tcp + 20, options, sizeof options);
    store16(tcp + CRAB_TCP_CSUM, crab_tcp_right(crab_tcp_sum(tcp, len - l4, addrs, addrs_len)));
}

static void make_syn(uint8_t *f, int family, uint32_t n, uint32_t service)
{
    make_packet(f, family, n, service, CRAB_SYN, true);
}

/* ---- what is looked up ---- */

struct world {
    struct crab_core *core;
    struct crab_snapshot *snapshot;
    struct crab_service *services;
    struct crab_backend *backends;
    struct crab_redirect redirect; /* of the first service */
    uint16_t *table;
    uint32_t backend_count, service_count;
    int family;
    uint64_t counters[CRAB_COUNTERS];
};

static struct crab_snapshot *snapshot(const struct world *w)
{
    struct crab_snapshot *s = crab_snapshot_new(w->services, w->service_count, w->backends, w->backend_count, NULL, 0,
                                                NULL, 0, TABLE, CRAB_FORM_CRAB, key);
    if (!s)
        die("no memory");
    return s;
}

static void set_address(uint8_t addr[16], int family, uint8_t net, uint32_t host)
{
    memset(addr, 0, 16);
    if (family == 4) {
        addr[10] = addr[11] = 0xff;
        store32(addr + 12, htonl(0x0a000000u | (uint32_t)net << 16 | host));
    } else {
        addr[0] = 0xfd;
        addr[13] = net;
        store16(addr + 14, htons((uint16_t)host));
    }
}

/* Services share a table, as those with the same backends do. */
static struct world *make_world(int family, uint32_t backends, uint32_t services, uint32_t flows)
{
    struct world *w = memory(sizeof *w);
    *w = (struct world){.backend_count = backends, .service_count = services, .family = family};
    w->backends = memory(backends * sizeof *w->backends);
    w->services = memory(services * sizeof *w->services);
    w->table = memory(TABLE * sizeof *w->table);
    struct crab_table_member *members = memory(backends * sizeof *members);
    for (uint32_t i = 0; i < backends; i++) {
        set_address(w->backends[i].addr, family, 1, i);
        w->backends[i].dst_mac[0] = 2; /* not the frames' source, which is zero */
        memcpy(members[i].addr, w->backends[i].addr, 16);
        members[i].weight = 1;
        members[i].backend = (uint16_t)i;
        w->backends[i].flags = CRAB_BACKEND_USABLE | CRAB_BACKEND_CR | CRAB_BACKEND_ON_LINK |
                               (family == 6 ? CRAB_BACKEND_V6 : 0);
    }
    if (crab_maglev_build(w->table, TABLE, members, backends, key))
        die("no memory");
    free(members);
    for (uint32_t i = 0; i < services; i++) {
        struct crab_service *s = &w->services[i];
        *s = (struct crab_service){.port_be = htons(80), .protocol = 6, .table = w->table, .index = i};
        set_address(s->addr, family, 0, 0x64 + i);
    }
    crab_redirect_init(&w->redirect, CRAB_FORM_CRAB, w->services[0].addr);
    w->core = crab_core_new(flows, w->counters);
    if (!w->core)
        die("no memory");
    w->snapshot = snapshot(w);
    crab_core_publish(w->core, w->snapshot);
    return w;
}

/* ---- the bare loop ---- */

/* What any redirect has to do, and no more: it takes the frame for a sound SYN to the one service there is, with its offer in
 * the last word.  Parse, hash, Maglev, headers moved, option, incremental checksums. */
static inline void bare(const struct world *w, const struct crab_sip *init, struct crab_frame *frame, int family)
{
    uint8_t *f = frame->data;
    const uint32_t l4 = family == 4 ? 34 : 54, grow = family == 4 ? 4 : 16;
    uint32_t header = (f[l4 + CRAB_TCP_DOFF] >> 4) * 4u, last = l4 + header - 4;
    if (load16(f + 12) != htons(family == 4 ? 0x0800 : 0x86dd) || load16(f + last) != (CRAB_OPT_KIND | 2 << 8))
        die("the bare loop knows one kind of frame");
    uint64_t hash = family == 4 ? crab_hash4(init, f + 14 + CRAB_IP4_SRC, f + l4)
                                : crab_hash6(init, f + 14 + CRAB_IP6_SRC, f + l4);
    const struct crab_backend *b = &w->backends[w->table[crab_slot(hash, TABLE)]];
    uint64_t change = (uint64_t)(uint32_t)~load32(f + last) + w->redirect.sum;
    uint8_t *m = f - grow, front[128];
    /* Whole vectors: what is moved beyond the headers is written again. */
    memcpy(front, f, family == 4 ? 80 : 96);
    memcpy(m, front, family == 4 ? 80 : 96);
    memcpy(m + last, w->redirect.bytes, family == 4 ? 8 : 20);
    uint8_t *ip = m + 14, *tcp = m + l4;
    uint16_t tcp_len = (uint16_t)(frame->len - l4), doff = load16(tcp + CRAB_TCP_DOFF);
    uint16_t grown = htons((uint16_t)(ntohs(doff) + (grow / 4 << 12)));
    store16(tcp + CRAB_TCP_DOFF, grown);
    change += (uint16_t)~doff + (uint64_t)grown + (uint16_t)~htons(tcp_len) + (uint64_t)htons((uint16_t)(tcp_len + grow));
    if (family == 4) {
        uint32_t dip = load32(b->addr + 12);
        uint64_t moved = (uint64_t)(uint32_t)~load32(ip + CRAB_IP4_DST) + dip;
        uint16_t total = htons((uint16_t)(tcp_len + 20 + grow));
        uint64_t header_sum = (uint16_t)~load16(ip + CRAB_IP4_CSUM) + moved + (uint16_t)~load16(ip + CRAB_IP4_LEN) + total;
        store16(ip + CRAB_IP4_LEN, total);
        store32(ip + CRAB_IP4_DST, dip);
        store16(ip + CRAB_IP4_CSUM, (uint16_t)~crab_fold(header_sum));
        change += moved;
    } else {
        change += (uint16_t)~crab_fold(crab_sum(ip + CRAB_IP6_DST, 16)) + crab_sum(b->addr, 16);
        store16(ip + CRAB_IP6_LEN, htons((uint16_t)(tcp_len + grow)));
        memcpy(ip + CRAB_IP6_DST, b->addr, 16);
    }
    store16(tcp + CRAB_TCP_CSUM, (uint16_t)~crab_fold((uint16_t)~load16(tcp + CRAB_TCP_CSUM) + change));
    memcpy(m, b->dst_mac, 12);
    frame->data = m;
    frame->len += grow;
}

static void bare_batch(struct world *w, struct crab_frame *frames, uint32_t count, uint32_t now)
{
    (void)now;
    struct crab_sip init = crab_sip_init(key);
    for (uint32_t i = 0; i < count; i++) {
        if (i + 8 < count) {
            __builtin_prefetch(frames[i + 8].data, 1);
            __builtin_prefetch(frames[i + 8].data + 64, 1);
        }
        if (w->family == 4)
            bare(w, &init, &frames[i], 4);
        else
            bare(w, &init, &frames[i], 6);
    }
}

/* Memory alone. */
static void move_batch(struct world *w, struct crab_frame *frames, uint32_t count, uint32_t now)
{
    (void)now;
    for (uint32_t i = 0; i < count; i++)
        memmove(frames[i].data - 4, frames[i].data, w->family == 4 ? 54 : 74);
}

static void core_batch(struct world *w, struct crab_frame *frames, uint32_t count, uint32_t now)
{
    if (crab_core_batch(w->core, frames, count, now) != count)
        die("SYNs were dropped");
}

/* ---- passes ---- */

struct ring {
    uint8_t *memory;
    uint32_t frames;
    uint32_t made; /* SYNs so far: each is another connection */
    bool flush;
};

typedef void batch_function(struct world *, struct crab_frame *, uint32_t, uint32_t);

static void flush(const void *p, size_t size)
{
#ifdef __x86_64__
    for (size_t i = 0; i < size; i += 64)
        _mm_clflush((const char *)p + i);
#else
    (void)p;
    (void)size;
    die("this machine's caches cannot be flushed from here");
#endif
}

/* Nanoseconds a frame, timed batch by batch, over PACKETS frames or the whole ring. */
static double pass(struct world *w, struct ring *r, batch_function *work)
{
    struct crab_frame batch[CRAB_BATCH];
    uint64_t spent = 0;
    uint32_t packets = r->flush ? PACKETS / 16 : PACKETS > r->frames ? PACKETS : r->frames, done = 0;
    while (done < packets) {
        for (uint32_t i = 0; i < r->frames; i++, r->made++)
            make_syn(r->memory + (size_t)i * STRIDE + FRONT, w->family, r->made, r->made % w->service_count);
        for (uint32_t at = 0; at < r->frames; at += CRAB_BATCH, done += CRAB_BATCH) {
            for (uint32_t i = 0; i < CRAB_BATCH; i++)
                batch[i] = (struct crab_frame){.data = r->memory + (size_t)(at + i) * STRIDE + FRONT,
                                               .len = length(w->family)};
            if (r->flush) {
                for (uint32_t i = 0; i < CRAB_BATCH; i++)
                    flush(batch[i].data - 64, 256);
                flush(w->table, TABLE * sizeof *w->table);
                flush(w->backends, w->backend_count * sizeof *w->backends);
            }
            uint64_t start = now_ns();
            work(w, batch, CRAB_BATCH, 1000 + r->made / 100000);
            spent += now_ns() - start;
        }
    }
    return (double)spent / done;
}

static struct ring make_ring(uint32_t frames)
{
    return (struct ring){.memory = memory((size_t)frames * STRIDE), .frames = frames};
}

static void check(const struct world *w)
{
    if (w->counters[CRAB_C_REDIRECTED] != w->counters[CRAB_C_RECEIVED])
        die("not every SYN was redirected");
}

static int syn(int family, uint32_t frames, bool flushed)
{
    struct world *w = make_world(family, 1000, 1, FLOWS);
    struct ring r = make_ring(frames);
    r.flush = flushed;
    pass(w, &r, core_batch); /* pages, tables, branch predictors */
    double move = pass(w, &r, move_batch), floor = pass(w, &r, bare_batch), ours = pass(w, &r, core_batch);
    /* The other way round as well: what drifts, drifts against both. */
    ours = (ours + pass(w, &r, core_batch)) / 2;
    floor = (floor + pass(w, &r, bare_batch)) / 2;
    move = (move + pass(w, &r, move_batch)) / 2;
    check(w);
    return printf("{\"moved\": %.3f, \"bare\": %.3f, \"crablb\": %.3f}\n", move, floor, ours) < 0;
}

static int scale(uint32_t backends, uint32_t services, uint32_t flows)
{
    struct world *w = make_world(4, backends, services, flows + flows / 3);
    struct ring r = make_ring(4096);
    while (r.made < flows) /* the cache is full when it is measured */
        pass(w, &r, core_batch);
    double ours = pass(w, &r, core_batch);
    check(w);
    return printf("{\"crablb\": %.3f}\n", ours) < 0;
}

/* ---- parts ---- */

#define TIME(name, setup, expression)                                                  \
    do {                                                                               \
        uint64_t spent_ = 0, sink_ = 0;                                                \
        for (uint32_t round_ = 0; round_ < PACKETS / 64; round_++) {                   \
            setup;                                                                     \
            uint64_t start_ = now_ns();                                                \
            for (uint32_t i = 0; i < 64; i++)                                          \
                sink_ += (uint64_t)(expression);                                       \
            spent_ += now_ns() - start_;                                               \
        }                                                                              \
        __asm__ volatile("" : : "r"(sink_));                                           \
        printf("%s\"%s\": %.3f", first ? "{" : ", ", name, (double)spent_ / PACKETS);  \
        first = false;                                                                 \
    } while (0)

static int stages(int family)
{
    struct world *w = make_world(family, 1000, 1, FLOWS);
    struct crab_sip init = crab_sip_init(key);
    struct crab_flows flows;
    uint8_t *ring = memory(64 * STRIDE), *f[64];
    struct crab_packet p[64];
    struct crab_tcp_sum sums[64];
    uint64_t hashes[64], seed = 1;
    bool first = true;
    const uint32_t l4 = family == 4 ? 34 : 54, len = length(family), addrs = family == 4 ? 26 : 22;
    if (crab_flows_init(&flows, FLOWS))
        die("no memory");
    for (uint32_t i = 0; i < 64; i++) {
        f[i] = ring + i * STRIDE + FRONT;
        make_syn(f[i], family, i, 0);
        crab_parse(f[i], len, &p[i]);
        sums[i] = crab_tcp_sum(f[i] + l4, len - l4, f[i] + addrs, family == 4 ? 8 : 32);
    }
    TIME("nothing (the clock and the loop)", , i);
    TIME("parse", , crab_parse(f[i], len, &p[i]));
    TIME("hash", , family == 4 ? crab_hash4(&init, f[i] + addrs, f[i] + l4) : crab_hash6(&init, f[i] + addrs, f[i] + l4));
    TIME("checksum", , crab_tcp_sum(f[i] + l4, len - l4, f[i] + addrs, family == 4 ? 8 : 32).body);
    const uint8_t *vip = w->services[0].addr;
    TIME("service", , crab_service_find(w->snapshot, load64(vip), load64(vip + 8), htons(80)) != NULL);
    int word;
    TIME("options", , crab_option_scan(f[i] + l4 + 20, 24, CRAB_FORM_CRAB, &word) + word);
    TIME("flow cache, a new flow",
         for (uint32_t i = 0; i < 64; i++) {
             seed = seed * 6364136223846793005u + 1442695040888963407u;
             hashes[i] = seed ^ seed >> 29;
             __builtin_prefetch(crab_flows_bucket(&flows, hashes[i]), 1);
         },
         (*crab_flows_place(crab_flows_bucket(&flows, hashes[i]), 1) =
              (struct crab_entry){.tag = hashes[i] >> 16, .state = CRAB_ENTRY_SYN, .seen = 1})
             .tag);
    uint32_t size;
    TIME("rewrite",
         for (uint32_t i = 0; i < 64; i++) {
             f[i] = ring + i * STRIDE + FRONT;
             make_syn(f[i], family, i, 0);
             crab_parse(f[i], len, &p[i]);
         },
         *crab_rewrite_word(f[i], &size, &p[i], &sums[i], 5, &w->redirect, &w->snapshot->backends[i]));
    return puts("}") < 0;
}

static int policy(const char *name)
{
    static struct crab_load loads[1000];
    static struct crab_turn turn;
    struct crab_member members[1000];
    struct world *w = make_world(4, 1000, 1, FLOWS);
    struct ring r = make_ring(4096);
    for (uint16_t i = 0; i < 1000; i++)
        members[i] = (struct crab_member){.backend = i, .weight = 1 + i % 3, .load = &loads[i]};
    struct crab_pool *pool = crab_pool_new(name, members, 1000, &turn);
    if (!pool)
        die("there is no such policy");
    struct crab_snapshot *maglev = w->snapshot;
    w->services[0].pool = pool;
    struct crab_snapshot *ours = snapshot(w);
    double times[2] = {0}, refresh = 0;
    pass(w, &r, core_batch);
    for (int turn_ = 0; turn_ < 8; turn_++) {
        crab_core_publish(w->core, maglev);
        times[0] += pass(w, &r, core_batch);
        crab_core_publish(w->core, ours);
        times[1] += pass(w, &r, core_batch);
        uint64_t start = now_ns(); /* another thread's work in production, ten times a second */
        crab_pool_refresh(pool);
        refresh += (double)(now_ns() - start);
    }
    check(w);
    return printf("{\"maglev\": %.3f, \"policy\": %.3f, \"refresh\": %.3f}\n", times[0] / 8, times[1] / 8,
                  refresh / 8000) < 0;
}

static int checksum(uint32_t bytes)
{
    uint8_t *data = memory(bytes + 64);
    uint64_t sum = 0, start, spent;
    const uint32_t rounds = (1u << 26) / (bytes + 64);
    for (uint32_t i = 0; i < bytes; i++)
        data[i] = (uint8_t)(i * 7);
    start = now_ns();
    for (uint32_t i = 0; i < rounds; i++) {
        sum += crab_csum(data, bytes);
        __asm__ volatile("" : : "r"(sum) : "memory");
    }
    spent = now_ns() - start;
    return printf("{\"ns\": %.3f}\n", (double)spent / rounds) < 0;
}

static int slots(const char *name, uint32_t size, uint32_t backends)
{
    int (*build)(uint16_t *, uint32_t, const struct crab_table_member *, uint32_t, const uint8_t *) =
        !strcmp(name, "maglev") ? crab_maglev_build : !strcmp(name, "rendezvous") ? crab_rendezvous_build : NULL;
    if (!build)
        die("no such table");
    uint16_t *table = memory(size * sizeof *table), *after = memory(size * sizeof *table);
    struct crab_table_member *members = memory(backends * sizeof *members);
    for (uint32_t i = 0; i < backends; i++) {
        members[i] = (struct crab_table_member){.weight = 1, .backend = (uint16_t)i};
        set_address(members[i].addr, 4, 1, i);
    }
    uint64_t start = now_ns();
    if (build(table, size, members, backends, key))
        die("no memory");
    double ms = (double)(now_ns() - start) / 1e6;
    uint32_t *shares = memory(backends * sizeof *shares), most = 0, least = size;
    memset(shares, 0, backends * sizeof *shares);
    for (uint32_t i = 0; i < size; i++)
        shares[table[i]]++;
    for (uint32_t i = 0; i < backends; i++) {
        most = shares[i] > most ? shares[i] : most;
        least = shares[i] < least ? shares[i] : least;
    }
    double share = (double)size / backends;
    /* Each in turn of some goes: at first it fails, then it leaves the configuration. */
    double ratios[2] = {0};
    const uint32_t goers = 20;
    for (uint32_t g = 0; g < goers; g++)
        for (int left = 0; left < 2; left++) {
            struct crab_table_member *gone = &members[g * (backends / goers)], kept = *gone;
            uint32_t lost = 0, changed = 0;
            gone->full = left ? 0 : gone->weight;
            gone->weight = 0;
            if (build(after, size, members, backends, key))
                die("no memory");
            for (uint32_t i = 0; i < size; i++) {
                lost += table[i] == gone->backend;
                changed += table[i] != after[i];
            }
            ratios[left] += (double)changed / lost / goers;
            *gone = kept;
        }
    return printf("{\"ms\": %.4f, \"disruption\": %.4f, \"removal\": %.4f, \"most\": %.4f, \"least\": %.4f}\n", ms,
                  ratios[0], ratios[1], most / share, least / share) < 0;
}

/* ---- threads ---- */

struct thread {
    pthread_t id;
    int cpu;
    pthread_barrier_t *barrier;
    double rate; /* SYNs a microsecond */
};

static void *run(void *arg)
{
    struct thread *t = arg;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(t->cpu, &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);
    struct world *w = make_world(4, 1000, 1, FLOWS);
    struct ring r = make_ring(4096);
    pass(w, &r, core_batch);
    pthread_barrier_wait(t->barrier);
    double sum = 0;
    for (int i = 0; i < 8; i++)
        sum += pass(w, &r, core_batch);
    check(w);
    t->rate = 8000 / sum;
    return NULL;
}

static int threads(uint32_t count)
{
    struct thread all[16];
    pthread_barrier_t barrier;
    cpu_set_t allowed;
    uint32_t made = 0;
    double rate = 0;
    sched_getaffinity(0, sizeof allowed, &allowed);
    if (count < 1 || count > 16 || count > (uint32_t)CPU_COUNT(&allowed))
        die("as many threads as there are CPUs, 16 at most");
    pthread_barrier_init(&barrier, NULL, count);
    for (int cpu = 0; made < count; cpu++) {
        if (!CPU_ISSET(cpu, &allowed))
            continue;
        all[made] = (struct thread){.cpu = cpu, .barrier = &barrier};
        if (pthread_create(&all[made].id, NULL, run, &all[made]))
            die("cannot start a thread");
        made++;
    }
    for (uint32_t i = 0; i < count; i++) {
        pthread_join(all[i].id, NULL);
        rate += all[i].rate;
    }
    return printf("{\"rate\": %.3f}\n", rate) < 0;
}

static int batches(int family, uint32_t count, bool fallback)
{
    struct world *w = make_world(family, 1000, 1, 4096);
    struct ring r = make_ring(CRAB_BATCH);
    struct crab_frame batch[CRAB_BATCH];
    for (uint32_t n = 0; n < count; n++) {
        bool first = !fallback || n % 2 == 0; /* else of the connections of the batch before */
        for (uint32_t i = 0; i < CRAB_BATCH; i++) {
            batch[i] = (struct crab_frame){.data = r.memory + (size_t)i * STRIDE + FRONT, .len = length(family)};
            make_packet(batch[i].data, family, r.made + i, 0, first ? CRAB_SYN : CRAB_ACK, !fallback);
        }
        r.made += first && fallback ? 0 : CRAB_BATCH;
        core_batch(w, batch, CRAB_BATCH, 1000);
    }
    if (!fallback)
        check(w);
    else if (w->counters[CRAB_C_FALLBACK_NO_OFFER] != (count + 1) / 2 * CRAB_BATCH ||
             w->counters[CRAB_C_FALLBACK_ESTABLISHED] != count / 2 * CRAB_BATCH)
        die("not every packet went by fallback");
    return 0;
}

static uint32_t number(const char *text)
{
    char *end;
    unsigned long n = strtoul(text, &end, 10);
    if (*end || !*text || !n || n > 100000000)
        die("a number from 1 to 100,000,000 was expected");
    return (uint32_t)n;
}

static int family_of(const char *text)
{
    uint32_t family = number(text);
    if (family != 4 && family != 6)
        die("FAMILY is 4 or 6");
    return (int)family;
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    if (!strcmp(what, "syn") && (argc == 4 || argc == 5)) {
        uint32_t frames = number(argv[3]);
        if (frames % CRAB_BATCH)
            die("FRAMES is a multiple of 64");
        return syn(family_of(argv[2]), frames, argc == 5);
    }
    if (!strcmp(what, "scale") && argc == 5)
        return scale(number(argv[2]), number(argv[3]), number(argv[4]));
    if (!strcmp(what, "stages") && argc == 3)
        return stages(family_of(argv[2]));
    if (!strcmp(what, "policy") && argc == 3)
        return policy(argv[2]);
    if (!strcmp(what, "checksum") && argc == 3)
        return checksum(number(argv[2]));
    if (!strcmp(what, "table") && argc == 5)
        return slots(argv[2], number(argv[3]), number(argv[4]));
    if (!strcmp(what, "threads") && argc == 3)
        return threads(number(argv[2]));
    if (!strcmp(what, "batches") && argc == 5) {
        if (strcmp(argv[4], "redirect") && strcmp(argv[4], "fallback"))
            die("WAY is redirect or fallback");
        return batches(family_of(argv[2]), number(argv[3]), !strcmp(argv[4], "fallback"));
    }
    fprintf(stderr, "hotloop: see the top of hotloop.c for what it can measure\n");
    return 2;
}
