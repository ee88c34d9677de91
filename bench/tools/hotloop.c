/* SPDX-License-Identifier: MIT */
/* Nanoseconds for each SYN in the hot loop (crab_core_batch), everything that it does in production: parse, verify the
 * checksum, service, flow cache, Maglev, rewrite, counters.  Every SYN is a new connection.
 *
 *   hotloop [RUNS]
 *
 * Frames lie in a ring as they do in a UMEM, 2048 bytes apart; the ring's length says how much of it the caches hold.
 * The floor beside each figure is a loop over the same frames that only moves the headers to make room: memory alone.
 * Each policy is measured with 4,096 frames, in turn with Maglev.  Loads are taken into account after each pass: that is
 * another thread's work in production, ten times a second, and has a figure of its own.
 * Medians of RUNS runs (default 9), with minimum and maximum. */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "packet.h"

#define STRIDE 2048
#define FRONT 256
#define TABLE 65537
#define BACKENDS 1000 /* of each family */
#define MAX_RUNS 99

static const uint8_t key[16] = {1, 2, 3};

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void put32(uint8_t *p, uint32_t v)
{
    memcpy(p, &v, 4);
}

/* The SYN that Linux sends, with an offer.  Returns its length. */
static uint32_t make_syn(uint8_t *f, int family, uint32_t n)
{
    static const uint8_t options[24] = {2, 4, 5, 180, 4, 2, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0, 1, 3, 3, 7, 42, 2, 1, 1};
    uint32_t l4 = family == 4 ? 34 : 54, len = l4 + 20 + sizeof options;
    uint8_t *ip = f + 14, *tcp = f + l4;
    memset(f, 0, len);
    store16(f + 12, htons(family == 4 ? 0x0800 : 0x86dd));
    const uint8_t *addrs;
    size_t addrs_len;
    if (family == 4) {
        ip[0] = 0x45;
        store16(ip + CRAB_IP4_LEN, htons((uint16_t)(len - 14)));
        ip[8] = 64;
        ip[9] = 6;
        put32(ip + CRAB_IP4_SRC, htonl(0x0a000000u + (n >> 14)));
        put32(ip + CRAB_IP4_DST, htonl(0x0a000064));
        store16(ip + CRAB_IP4_CSUM, (uint16_t)~crab_fold(crab_sum(ip, 20)));
        addrs = ip + CRAB_IP4_SRC;
        addrs_len = 8;
    } else {
        ip[0] = 0x60;
        store16(ip + CRAB_IP6_LEN, htons((uint16_t)(len - l4)));
        ip[6] = 6;
        ip[7] = 64;
        ip[8] = ip[24] = 0xfd;
        put32(ip + CRAB_IP6_SRC + 12, htonl(n >> 14));
        ip[39] = 0x64;
        addrs = ip + CRAB_IP6_SRC;
        addrs_len = 32;
    }
    store16(tcp, htons((uint16_t)(1024 + (n & 16383))));
    store16(tcp + 2, htons(80));
    put32(tcp + CRAB_TCP_SEQ, n);
    tcp[CRAB_TCP_DOFF] = (uint8_t)((20 + sizeof options) / 4 << 4);
    tcp[CRAB_TCP_FLAGS] = CRAB_SYN;
    memcpy(tcp + 20, options, sizeof options);
    store16(tcp + CRAB_TCP_CSUM, crab_tcp_sum(tcp, len - l4, addrs, addrs_len).right);
    return len;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

struct bench {
    struct crab_core *core;
    uint8_t *ring;
    uint32_t frames;
    struct crab_pool *pool; /* to be refreshed after each pass, or NULL */
    double refreshed; /* microseconds that the last refresh took */
    uint32_t made; /* SYNs so far: each is another connection */
};

/* One pass over the ring, timed batch by batch: filling the frames is not counted. */
static double pass(struct bench *b, int family, bool floor)
{
    struct crab_frame batch[CRAB_BATCH];
    uint64_t spent = 0;
    for (uint32_t i = 0; i < b->frames; i++)
        make_syn(b->ring + (size_t)i * STRIDE + FRONT, family, b->made++);
    for (uint32_t at = 0; at < b->frames; at += CRAB_BATCH) {
        for (uint32_t i = 0; i < CRAB_BATCH; i++)
            batch[i] = (struct crab_frame){.data = b->ring + (size_t)(at + i) * STRIDE + FRONT,
                                           .len = family == 4 ? 78 : 98};
        uint64_t start = now_ns();
        if (floor) {
            for (uint32_t i = 0; i < CRAB_BATCH; i++)
                memmove(batch[i].data - 4, batch[i].data, family == 4 ? 54 : 74);
        } else if (crab_core_batch(b->core, batch, CRAB_BATCH, 1000 + b->made / 100000) != CRAB_BATCH) {
            fprintf(stderr, "hotloop: SYNs were dropped\n");
            exit(1);
        }
        spent += now_ns() - start;
    }
    if (b->pool) {
        uint64_t start = now_ns();
        crab_pool_refresh(b->pool);
        b->refreshed = (double)(now_ns() - start) / 1000;
    }
    return (double)spent / b->frames;
}

static double measure(struct bench *b, int family, bool floor, int runs, double *low, double *high)
{
    double samples[MAX_RUNS];
    for (int run = 0; run < runs; run++) {
        double sum = 0;
        uint32_t repeats = b->frames < 65536 ? 65536 / b->frames : 1;
        for (uint32_t i = 0; i < repeats; i++)
            sum += pass(b, family, floor);
        samples[run] = sum / repeats;
    }
    qsort(samples, (size_t)runs, sizeof *samples, compare);
    *low = samples[0];
    *high = samples[runs - 1];
    return samples[runs / 2];
}

/* Every policy beside Maglev, over IPv4: medians of ratios, each of two passes that follow each other. */
static int policies(struct bench *b, struct crab_service *services, const struct crab_backend *backends, int runs)
{
    static struct crab_load loads[BACKENDS];
    static struct crab_turn turn;
    struct crab_member members[BACKENDS];
    struct crab_snapshot *s[2];
    for (uint16_t i = 0; i < BACKENDS; i++)
        members[i] = (struct crab_member){.backend = i, .weight = 1 + i % 3, .load = &loads[i]};
    b->frames = 4096;
    b->ring = aligned_alloc(4096, (size_t)b->frames * STRIDE);
    if (!b->ring)
        return 1;
    printf("%-34s %24s %24s %22s\n", "policy, ns per SYN, IPv4", "", "of Maglev's", "loads, us for 1,000");
    s[0] = crab_snapshot_new(services, 2, backends, 2 * BACKENDS, NULL, 0, TABLE, CRAB_FORM_CRAB, key);
    for (uint32_t i = 0; crab_policy_name(i); i++) {
        double times[MAX_RUNS], ratios[MAX_RUNS], low, high;
        struct crab_pool *pool = crab_pool_new(crab_policy_name(i), members, BACKENDS, &turn);
        services[0].pool = pool;
        s[1] = crab_snapshot_new(services, 2, backends, 2 * BACKENDS, NULL, 0, TABLE, CRAB_FORM_CRAB, key);
        if (!pool || !s[0] || !s[1])
            return 1;
        for (int run = 0; run < runs; run++) {
            double of[2];
            for (int which = 0; which < 2; which++) {
                crab_core_publish(b->core, s[which]);
                b->pool = which ? pool : NULL;
                of[which] = measure(b, 4, false, 1, &low, &high);
            }
            times[run] = of[1];
            ratios[run] = of[1] / of[0];
        }
        crab_core_publish(b->core, NULL);
        b->pool = services[0].pool = NULL;
        qsort(times, (size_t)runs, sizeof *times, compare);
        qsort(ratios, (size_t)runs, sizeof *ratios, compare);
        printf("%-34s   %6.1f (%5.1f - %5.1f)   %6.2f (%5.2f - %5.2f) %22.0f\n", crab_policy_name(i), times[runs / 2],
               times[0], times[runs - 1], ratios[runs / 2], ratios[0], ratios[runs - 1], b->refreshed);
        fflush(stdout);
        crab_snapshot_free(s[1]);
        crab_pool_free(pool);
    }
    crab_snapshot_free(s[0]);
    free(b->ring);
    return 0;
}

int main(int argc, char **argv)
{
    int runs = argc > 1 ? atoi(argv[1]) : 9;
    if (runs < 1 || runs > MAX_RUNS) {
        fprintf(stderr, "hotloop: RUNS is 1 to %d\n", MAX_RUNS);
        return 2;
    }
    static uint16_t tables[2][TABLE]; /* IPv4's backends, IPv6's */
    struct crab_maglev_member members[2 * BACKENDS] = {0};
    struct crab_backend backends[2 * BACKENDS] = {0};
    for (uint16_t i = 0; i < 2 * BACKENDS; i++) {
        bool v6 = i >= BACKENDS;
        uint8_t last = (uint8_t)i, high = (uint8_t)(i % BACKENDS >> 8);
        members[i] = v6 ? (struct crab_maglev_member){.addr = {0xfd, [14] = high, last}, .weight = 1, .backend = i}
                        : (struct crab_maglev_member){.addr = {[10] = 0xff, [11] = 0xff, 10, 1, high, last},
                                                      .weight = 1, .backend = i};
        memcpy(backends[i].addr, members[i].addr, 16);
        backends[i].flags = CRAB_BACKEND_USABLE | CRAB_BACKEND_CR | CRAB_BACKEND_ON_LINK | (v6 ? CRAB_BACKEND_V6 : 0);
    }
    struct crab_service services[2] = {
        {.addr = {[10] = 0xff, [11] = 0xff, 10, 0, 0, 100}, .port_be = htons(80), .protocol = 6, .table = tables[0]},
        {.addr = {0xfd, [15] = 0x64}, .port_be = htons(80), .protocol = 6, .table = tables[1]},
    };
    uint64_t counters[CRAB_COUNTERS] = {0};
    struct bench b = {.core = crab_core_new(1 << 20, counters)};
    if (!b.core || crab_maglev_build(tables[0], TABLE, members, BACKENDS, key) ||
        crab_maglev_build(tables[1], TABLE, members + BACKENDS, BACKENDS, key))
        return 1;
    struct crab_snapshot *s =
        crab_snapshot_new(services, 2, backends, 2 * BACKENDS, NULL, 0, TABLE, CRAB_FORM_CRAB, key);
    crab_core_publish(b.core, s);

    printf("%-34s %24s %24s\n", "ns per SYN (median, min - max)", "IPv4", "IPv6");
    static const struct {
        const char *name;
        uint32_t frames;
    } sizes[] = {{"64 frames", 64}, {"4,096 frames (a queue's UMEM)", 4096}, {"65,536 frames (128 MiB)", 65536}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        b.frames = sizes[i].frames;
        b.ring = aligned_alloc(4096, (size_t)b.frames * STRIDE);
        if (!b.ring)
            return 1;
        for (int floor = 0; floor < 2; floor++) {
            printf("%-34s", floor ? "  floor: headers moved, no more" : sizes[i].name);
            for (int family = 4; family <= 6; family += 2) {
                double low, high, median = measure(&b, family, floor, runs, &low, &high);
                printf("   %6.1f (%5.1f - %5.1f)", median, low, high);
            }
            printf("\n");
            fflush(stdout);
        }
        free(b.ring);
    }
    if (policies(&b, services, backends, runs))
        return 1;
    if (counters[CRAB_C_REDIRECTED] != counters[CRAB_C_RECEIVED]) {
        fprintf(stderr, "hotloop: not every SYN was redirected\n");
        return 1;
    }
    crab_core_publish(b.core, NULL);
    crab_snapshot_free(s);
    crab_core_free(b.core);
    return 0;
}
