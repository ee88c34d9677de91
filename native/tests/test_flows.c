/* SPDX-License-Identifier: MIT */
/* The flow cache: who makes room for whom. */
#include "check.h"
#include "crablb.h"
#include "flows.h"

#define BUCKETS 16

static struct crab_flows flows;

/* The n-th connection of a bucket. */
static uint64_t hash_of(uint32_t bucket, uint32_t n)
{
    return (uint64_t)(n + 1) << 16 | bucket;
}

static struct crab_entry *find(uint64_t hash, uint32_t now)
{
    return crab_flows_find(crab_flows_bucket(&flows, hash), hash, now);
}

static int put(uint64_t hash, enum crab_entry_state state, uint32_t now)
{
    struct crab_entry *e = crab_flows_place(crab_flows_bucket(&flows, hash), now);
    if (e)
        *e = (struct crab_entry){.tag = hash >> 16, .state = (uint8_t)state, .seen = (uint16_t)now};
    return e != NULL;
}

static void start(void)
{
    free(flows.entries);
    CHECK(!crab_flows_init(&flows, BUCKETS * CRAB_BUCKET));
    CHECK(flows.mask == BUCKETS - 1);
}

/* The last four SYNs are there, and those before are not. */
static void test_syns(void)
{
    start();
    for (uint32_t n = 0; n < 20; n++) {
        CHECK(!find(hash_of(3, n), 100));
        CHECK(put(hash_of(3, n), CRAB_ENTRY_SYN, 100));
        for (uint32_t i = 0; i <= n; i++)
            CHECK(!!find(hash_of(3, i), 100) == (i + CRAB_BUCKET > n));
    }
}

/* Established connections stay, whatever comes, until they have been silent for their time; then the SYNs have the room. */
static void test_established(void)
{
    for (uint32_t count = 0; count <= CRAB_BUCKET; count++) {
        start();
        for (uint32_t n = 0; n < count; n++)
            CHECK(put(hash_of(5, n), CRAB_ENTRY_ESTABLISHED, 100));
        for (uint32_t n = 100; n < 150; n++) {
            CHECK(put(hash_of(5, n), CRAB_ENTRY_SYN, 101) == (count < CRAB_BUCKET));
            CHECK(!!find(hash_of(5, n), 101) == (count < CRAB_BUCKET));
            for (uint32_t i = 0; i < count; i++)
                CHECK(find(hash_of(5, i), 101));
        }
        uint32_t later = 100 + CRAB_AGE_OPEN;
        for (uint32_t i = 0; i < count; i++)
            CHECK(!find(hash_of(5, i), later));
        for (uint32_t n = 200; n < 250; n++) {
            CHECK(put(hash_of(5, n), CRAB_ENTRY_SYN, later));
            CHECK(find(hash_of(5, n), later));
        }
    }
}

/* By age, where the last place is not free: a dead one, else one that ended a while ago, else the oldest SYN. */
static void test_oldest(void)
{
    const uint32_t crowded = 99 + CRAB_AGE_CROWDED, ending = 99 + CRAB_AGE_ENDING;
    struct crab_entry bucket[CRAB_BUCKET] = {
        {.tag = 1, .state = CRAB_ENTRY_SYN, .seen = 98},
        {.tag = 2, .state = CRAB_ENTRY_SYN, .seen = 97},
        {.tag = 3, .state = CRAB_ENTRY_CLOSING, .seen = 99},
        {.tag = 4, .state = CRAB_ENTRY_ESTABLISHED, .seen = 90},
    };
    CHECK(crab_flows_place(bucket, 100) == &bucket[1]);
    CHECK(crab_flows_place(bucket, crowded - 1) == &bucket[1]);
    CHECK(crab_flows_place(bucket, crowded) == &bucket[2]);
    CHECK(crab_flows_place(bucket, ending) == &bucket[0]); /* dead since */
    bucket[1].state = CRAB_ENTRY_ESTABLISHED;
    CHECK(crab_flows_place(bucket, 100) == &bucket[0]);
    bucket[0].state = CRAB_ENTRY_FREE;
    CHECK(crab_flows_place(bucket, 100) == &bucket[0]);
    bucket[0].state = CRAB_ENTRY_ESTABLISHED;
    CHECK(crab_flows_place(bucket, crowded - 1) == NULL);
    CHECK(crab_flows_place(bucket, crowded) == &bucket[2]);
    CHECK(crab_flows_place(bucket, ending) == &bucket[2]);
    CHECK(crab_flows_find(bucket, 3ull << 16, ending) == &bucket[2]); /* till then it is there */
    bucket[1] = (struct crab_entry){.tag = 2, .state = CRAB_ENTRY_CLOSING, .seen = 98};
    CHECK(crab_flows_place(bucket, crowded) == &bucket[1]); /* it has been silent for longer */
    /* Seconds are counted modulo 2^16. */
    bucket[0] = (struct crab_entry){.tag = 1, .state = CRAB_ENTRY_SYN, .seen = 65535};
    CHECK(crab_entry_dead(&bucket[0], 65536 + CRAB_AGE_SYN) && !crab_entry_dead(&bucket[0], 65536));
}

/* Neighbours do not notice. */
static void test_other_buckets(void)
{
    start();
    for (uint32_t b = 0; b < BUCKETS; b++)
        for (uint32_t n = 0; n < CRAB_BUCKET; n++)
            CHECK(put(hash_of(b, n), CRAB_ENTRY_SYN, 100));
    for (uint32_t n = 10; n < 30; n++)
        CHECK(put(hash_of(7, n), CRAB_ENTRY_SYN, 100));
    for (uint32_t b = 0; b < BUCKETS; b++)
        for (uint32_t n = 0; n < CRAB_BUCKET; n++)
            CHECK(!!find(hash_of(b, n), 100) == (b != 7));
}

/* What is dead does not live again when its clock of 16 bits has gone round, however seldom packets come. */
static void test_the_clock_goes_round(void)
{
    static const uint32_t steps[] = {1, 60, 1000, CRAB_TIDY_SECONDS, CRAB_AGE_OPEN - 1, CRAB_AGE_OPEN, 65536, 65636, 200000};
    for (uint32_t s = 0; s < sizeof steps / sizeof *steps; s++) {
        start();
        flows.tidied = 100;
        for (uint32_t b = 0; b < BUCKETS; b++) {
            CHECK(put(hash_of(b, 0), CRAB_ENTRY_ESTABLISHED, 100));
            CHECK(put(hash_of(b, 1), CRAB_ENTRY_SYN, 100));
            CHECK(put(hash_of(b, 2), CRAB_ENTRY_CLOSING, 100));
        }
        for (uint32_t now = 100; now < 100 + 140000 + steps[s]; now += steps[s]) {
            crab_flows_tidy(&flows, now);
            for (uint32_t b = 0; b < BUCKETS; b++) {
                CHECK(!!find(hash_of(b, 0), now) == (now - 100 < CRAB_AGE_OPEN));
                CHECK(!!find(hash_of(b, 1), now) == (now - 100 < CRAB_AGE_SYN));
                CHECK(!!find(hash_of(b, 2), now) == (now - 100 < CRAB_AGE_OPEN));
            }
        }
    }
}

/* What a daemon before had written down is remembered, counted, and copied to the next one's cache part by part. */
static void test_adopted(void)
{
    enum { MOST = 40 };
    static uint64_t counters[CRAB_COUNTERS];
    struct crab_flow known[MOST];
    for (uint16_t i = 0; i < MOST; i++)
        known[i] = (struct crab_flow){.hash = hash_of(i % 8u, i / 8u), .backend = i % 3,
                                      .state = i % 2 ? CRAB_FLOW_OPEN : CRAB_FLOW_ENDING};
    struct crab_core *core = crab_core_new(64, counters), *next = crab_core_new(64, counters);
    CHECK(core && next);
    crab_core_adopt(core, known, MOST, 100); /* five a bucket: the last one finds no place */
    uint32_t all[3] = {0}, open[3] = {0}, fewer[1] = {0};
    crab_core_count(core, all, 3, 100, false);
    crab_core_count(core, open, 3, 100, true);
    crab_core_count(core, fewer, 1, 100, false);
    CHECK(all[0] + all[1] + all[2] == 32 && fewer[0] == all[0]);
    CHECK(open[0] + open[1] + open[2] == 16);
    struct crab_memory found[2];
    uint32_t recalled = 0;
    for (uint32_t i = 0; i < MOST; i++)
        recalled += crab_core_recall(core, known[i].hash, 100, found);
    CHECK(recalled == 32);
    uint64_t bytes, touched = 0xf0;
    const uint8_t *from = crab_core_flows(core, &bytes);
    uint8_t *to = crab_core_flows(next, &bytes);
    CHECK(bytes == 16 * CRAB_PART);
    crab_flows_renew(to, from, &touched, bytes);
    for (uint32_t part = 0; part < 16; part++) {
        static const uint8_t none[CRAB_PART];
        CHECK_BYTES(to + part * CRAB_PART, touched >> part & 1 ? from + part * CRAB_PART : none, CRAB_PART);
    }
    uint32_t long_after[3] = {0};
    crab_core_count(core, long_after, 3, 100 + CRAB_AGE_OPEN, false);
    CHECK(!long_after[0] && !long_after[1] && !long_after[2]);
    crab_core_free(core);
    crab_core_free(next);
}

int main(void)
{
    test_adopted();
    test_the_clock_goes_round();
    test_syns();
    test_established();
    test_oldest();
    test_other_buckets();
    free(flows.entries);
    DONE();
}
