/* SPDX-License-Identifier: MIT */
/* The table of flows that is shared with the XDP program: places, ages, and writers and readers at the same time. */
#include <pthread.h>
#include <stdlib.h>

#include "check.h"
#include "table.h"

static struct crab_bucket buckets[4];

static struct crab_flow flow(uint64_t hash, uint16_t backend, uint16_t seen)
{
    return (struct crab_flow){.hash = hash, .backend = backend, .seen = seen, .state = CRAB_FLOW_OPEN};
}

static int there(uint64_t hash)
{
    for (int i = 0; i < CRAB_BUCKET; i++)
        if (buckets[hash & 3].flows[i].hash == hash)
            return buckets[hash & 3].flows[i].backend;
    return -1;
}

static void places(void)
{
    struct crab_table *t = crab_table_new(buckets, 4);
    struct crab_flow f = flow(0, 1, 100);
    CHECK(!crab_table_write(t, &f)); /* 0 means free */
    for (uint16_t i = 1; i <= 4; i++) {
        f = flow(i * 8u + 1, i, (uint16_t)(100 + i));
        CHECK(crab_table_write(t, &f));
    }
    f = flow(8 + 1, 7, 104); /* again, elsewhere */
    CHECK(crab_table_write(t, &f) && there(9) == 7);
    f = flow(5 * 8 + 1, 5, 103); /* the oldest had a packet 1 s ago, another one in the future: all stay */
    CHECK(!crab_table_write(t, &f) && there(5 * 8 + 1) < 0);
    f.seen = 104; /* 2 s */
    CHECK(crab_table_write(t, &f) && there(5 * 8 + 1) == 5 && there(2 * 8 + 1) < 0);
    /* one that is over is taken before the oldest, and time wraps */
    f = flow(6 * 8 + 1, 6, (uint16_t)(105 + CRAB_AGE_OPEN));
    CHECK(crab_table_write(t, &f) && there(6 * 8 + 1) == 6);
    /* of those of which a single packet was seen, the oldest gives way before any other; and they push out no other */
    for (uint16_t i = 0; i < 4; i++) {
        buckets[1].flows[i] = flow(i * 8u + 1, i, (uint16_t)(100 + i));
        buckets[1].flows[i].state = i % 2 ? CRAB_FLOW_LONE : CRAB_FLOW_OPEN;
    }
    f = flow(6 * 8 + 1, 6, 104);
    CHECK(crab_table_write(t, &f) && there(1 * 8 + 1) < 0);
    f.hash += 8;
    f.state = CRAB_FLOW_LONE;
    CHECK(!crab_table_write(t, &f)); /* the other one has had its packet just now */
    f.seen = 105;
    CHECK(crab_table_write(t, &f) && there(3 * 8 + 1) < 0 && there(0 * 8 + 1) == 0 && there(2 * 8 + 1) == 2);
    f.hash += 8;
    f.seen = 106;
    CHECK(!crab_table_write(t, &f) && there(0 * 8 + 1) == 0);
    f.seen = 107;
    CHECK(crab_table_write(t, &f) && there(7 * 8 + 1) < 0 && there(0 * 8 + 1) == 0);
    f.hash += 8;
    f.state = CRAB_FLOW_OPEN;
    f.seen = 109;
    CHECK(crab_table_write(t, &f) && there(8 * 8 + 1) < 0 && there(0 * 8 + 1) == 0);
    f.hash += 8;
    CHECK(crab_table_write(t, &f) && there(0 * 8 + 1) < 0); /* no lone one is left */
    buckets[1] = (struct crab_bucket){0};
    f = flow(9, 1, 65530);
    CHECK(crab_table_write(t, &f));
    CHECK(crab_table_age(&buckets[1].flows[0], 65536 + 10) == 16);
    crab_table_free(t);
}

/* ---- every flow's backend is a function of its hash, so a reader can tell a torn one ---- */

static _Atomic(bool) stop;

static void *write_all(void *t)
{
    uint64_t x = (uintptr_t)&x | 1;
    for (uint16_t now = 0; !atomic_load(&stop); now++) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        struct crab_flow f = flow(x, (uint16_t)(x >> 16), now);
        crab_table_write(t, &f);
    }
    return NULL;
}

static void together(void)
{
    struct crab_table *t = crab_table_new(buckets, 4);
    pthread_t writers[2];
    memset(buckets, 0, sizeof buckets);
    for (int i = 0; i < 2; i++)
        pthread_create(&writers[i], NULL, write_all, t);
    uint32_t seen = 0;
    for (uint32_t i = 0; seen < 200000; i++) {
        struct crab_flow *f = &buckets[i & 3].flows[i >> 2 & 3];
        uint64_t hash = __atomic_load_n(&f->hash, __ATOMIC_ACQUIRE);
        uint64_t word = __atomic_load_n((uint64_t *)(void *)&f->backend, __ATOMIC_ACQUIRE);
        if (hash && hash == __atomic_load_n(&f->hash, __ATOMIC_ACQUIRE)) {
            CHECK((uint16_t)word == (uint16_t)(hash >> 16));
            seen++;
        }
    }
    atomic_store(&stop, true);
    for (int i = 0; i < 2; i++)
        pthread_join(writers[i], NULL);
    crab_table_free(t);
}

int main(void)
{
    places();
    together();
    DONE();
}
