/* SPDX-License-Identifier: MIT */
/* What several threads do at the same time, for ThreadSanitizer (`make race`): workers that pick, learn and forward, while
 * others refresh a pool, publish snapshots, count and recall flows, forget and copy tokens, read the table and what is shown.
 * It says so itself where something is wrong. */
#include <pthread.h>

#include "check.h"
#include "frames.h"

#define SIZE 251
#define MEMBERS 5
#define ROUNDS 60
#define WORKERS 2

static const uint8_t key[16] = {7};
static uint16_t slots[SIZE];
static struct crab_bucket buckets[16];
static struct crab_load loads[MEMBERS];
static struct crab_turn turn;
static struct crab_service service = {.addr = {[10] = 0xff, [11] = 0xff, 10, 0, 0, 100}, .protocol = 6,
                                      .fallback = CRAB_FALLBACK_L2, .table = slots};
static struct crab_backend backends[MEMBERS];
static _Atomic(bool) done;
static bool odd[65536] = {[0] = true, [1] = true, [3] = true}; /* backends, and services */

struct worker {
    pthread_t thread;
    struct crab_core *core;
    uint64_t counters[CRAB_COUNTERS], kept, seen;
};
static struct worker workers[WORKERS];

static struct crab_snapshot *snapshot(void)
{
    struct crab_snapshot *s = crab_snapshot_new(&service, 1, backends, MEMBERS, NULL, 0, NULL, 0, SIZE, CRAB_FORM_CRAB, key);
    CHECK(s);
    return s;
}

static void *work(void *arg)
{
    struct worker *w = arg;
    for (uint16_t port = 1; !atomic_load(&done); port++) {
        static _Thread_local uint8_t memory[CRAB_BATCH][CRAB_HEADROOM + 128];
        struct crab_frame frames[CRAB_BATCH];
        for (uint16_t i = 0; i < CRAB_BATCH; i++) {
            frames[i] = (struct crab_frame){.data = memory[i] + CRAB_HEADROOM};
            make_frame(frames[i].data, &frames[i].len, (uint16_t)(port * 7 + i / 2), i % 2 == 0, i % 8 == 0);
        }
        w->kept += crab_core_batch(w->core, frames, CRAB_BATCH, 100 + port % 4);
        crab_core_settle(w->core);
    }
    return NULL;
}

/* The loads as crab_pool_refresh takes them: what reports write. */
static void report(uint32_t n)
{
    for (uint32_t i = 0; i < MEMBERS; i++)
        __atomic_store_n(&loads[i].open, n * (i + 1) % 11, __ATOMIC_RELAXED);
}

#define RING 65536

/* What a worker shows: whole records, of frames that it was given, in their order. */
static void look(struct worker *w)
{
    static uint8_t shown[RING];
    uint32_t n = crab_core_shown(w->core, shown);
    uint64_t before = 0;
    for (uint32_t at = 0; at < n;) {
        struct crab_tapped t;
        memcpy(&t, shown + at, sizeof t);
        CHECK(t.size % 8 == 0 && t.size <= n - at && t.taps == 1 && t.at_ns >= before && t.done_ns >= t.at_ns);
        CHECK(t.in_kept == t.in_len && !memcmp(shown + at + sizeof t, "\x02\0\0\0\0\x02", 6));
        CHECK(t.out_kept == t.out_len && t.backend < MEMBERS && t.counters);
        before = t.at_ns;
        at += t.size;
        w->seen++;
    }
}

static void together(const char *policy)
{
    struct crab_member members[MEMBERS];
    for (uint16_t i = 0; i < MEMBERS; i++)
        members[i] = (struct crab_member){.backend = i, .weight = 1, .load = &loads[i]};
    struct crab_pool *pool = crab_pool_new(policy, members, MEMBERS, &turn);
    struct crab_table *table = crab_table_new(buckets, 16);
    struct crab_joins *joins = crab_joins_new(64);
    service.pool = pool;
    struct crab_snapshot *s = snapshot(), *old;
    uint8_t *given = malloc(crab_joins_size(joins));
    struct crab_memory found[2];
    CHECK(pool && table && joins && s && given);
    atomic_store(&done, false);
    for (int i = 0; i < WORKERS; i++) {
        memset(&workers[i], 0, sizeof workers[i]);
        workers[i].core = crab_core_new(4096, workers[i].counters);
        crab_core_learn(workers[i].core, table);
        crab_core_join(workers[i].core, joins);
        if (i)
            crab_core_put_off(workers[i].core);
        CHECK(crab_core_show(workers[i].core, (uint32_t)i, RING) == 0);
        crab_core_publish(workers[i].core, s);
        pthread_create(&workers[i].thread, NULL, work, &workers[i]);
    }
    for (uint32_t round = 0; round < ROUNDS; round++) {
        uint32_t counts[MEMBERS] = {0};
        for (uint32_t more = 0; more < 4; more++) { /* without publishing: schedules are exchanged while they are taken from */
            report(4 * round + more);
            crab_pool_refresh(pool);
        }
        old = s;
        CHECK(s = snapshot());
        if (round % 2)
            crab_snapshot_tap(s, &(struct crab_taps){.count = 1, .snap = 128});
        for (int i = 0; i < WORKERS; i++) {
            look(&workers[i]);
            crab_core_publish(workers[i].core, s);
            crab_core_count(workers[i].core, counts, MEMBERS, 100, round % 2);
        }
        for (int i = 0; i < WORKERS; i++)
            while (crab_core_uses(workers[i].core, old))
                ;
        crab_snapshot_free(old);
        crab_joins_keep(joins, odd, odd);
        crab_joins_give(joins, given);
        for (int i = 0; i < WORKERS; i++)
            for (uint64_t hash = 1; hash < 16; hash++)
                CHECK(crab_core_recall(workers[i].core, hash * 0x9e3779b97f4a7c15, 100, found) <= 2);
        for (uint64_t hash = 1; hash < 16; hash++) {
            struct crab_flow flow = {.hash = hash << 32 | hash, .backend = (uint16_t)hash, .seen = 100, .state = CRAB_FLOW_OPEN};
            crab_table_write(table, &flow);
            crab_table_ask(table, flow.hash);
            if (crab_table_get(table, flow.hash, 100, &flow))
                CHECK(flow.backend == hash);
        }
    }
    atomic_store(&done, true);
    for (int i = 0; i < WORKERS; i++) {
        pthread_join(workers[i].thread, NULL);
        look(&workers[i]);
        CHECK(workers[i].seen && workers[i].counters[CRAB_C_MPTCP_JOIN_KNOWN]);
        CHECK(workers[i].counters[CRAB_C_LEARNED] && workers[i].kept == workers[i].counters[CRAB_C_RECEIVED]);
        crab_core_free(workers[i].core);
    }
    crab_snapshot_free(s);
    crab_table_free(table);
    crab_joins_free(joins);
    crab_pool_free(pool);
    free(given);
}

int main(void)
{
    service.port_be = htons(80);
    for (uint16_t i = 0; i < MEMBERS; i++)
        backends[i] = (struct crab_backend){.addr = {[10] = 0xff, [11] = 0xff, 10, 0, 0, (uint8_t)(11 + i)},
                                            .dst_mac = {2, 0, 0, 0, 0, (uint8_t)(11 + i)}, .mtu = 1500,
                                            .flags = CRAB_BACKEND_USABLE | CRAB_BACKEND_CR | CRAB_BACKEND_ON_LINK};
    for (uint32_t i = 0; i < SIZE; i++)
        slots[i] = (uint16_t)(i % MEMBERS);
    for (uint32_t i = 0; crab_policy_name(i); i++)
        together(crab_policy_name(i));
    DONE();
}
