/* SPDX-License-Identifier: MIT */
/* What is made without memory: NULL or -1, nothing kept, nothing leaked; whichever of its allocations fails. */
#include <errno.h>

#include "batch.h"
#include "check.h"

#define SIZE 251

/* Linked in place of the C library's (native/Makefile): the next but so many fails; 0: none. */
static unsigned fails;
void *__real_malloc(size_t);
void *__real_calloc(size_t, size_t);
void *__real_aligned_alloc(size_t, size_t);
void *__wrap_malloc(size_t size);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_aligned_alloc(size_t align, size_t size);

static bool fail(void)
{
    if (!fails || --fails)
        return false;
    errno = ENOMEM;
    return true;
}

void *__wrap_malloc(size_t size)
{
    return fail() ? NULL : __real_malloc(size);
}

void *__wrap_calloc(size_t n, size_t size)
{
    return fail() ? NULL : __real_calloc(n, size);
}

void *__wrap_aligned_alloc(size_t align, size_t size)
{
    return fail() ? NULL : __real_aligned_alloc(align, size);
}

/* Whether `made` says that all went well, with each allocation failing in its turn, and then with none. */
#define EACH(made, unmake)                        \
    for (unsigned n = 1, went = 1; went; n++) {   \
        fails = n;                                \
        bool well = made;                         \
        went = fails == 0; /* one has failed */   \
        fails = 0;                                \
        CHECK(well != went);                      \
        CHECK(n > 1 || went);                     \
        unmake;                                   \
    }

static uint16_t slots[SIZE];
static const uint8_t key[16] = {7};
static uint64_t counters[CRAB_COUNTERS];

int main(void)
{
    struct crab_service service = {.addr = {[10] = 0xff, [11] = 0xff, 10, 0, 0, 100}, .protocol = 6, .table = slots};
    struct crab_backend backend = {.mtu = 1500};
    struct crab_address vip = {{1}};
    struct crab_bucket buckets[1] = {0};
    struct crab_core *core = NULL;
    struct crab_snapshot *s = NULL;
    struct crab_joins *joins = NULL;
    struct crab_table *table = NULL;
    struct crab_pool *pool = NULL;
    EACH((core = crab_core_new(64, counters)) != NULL, crab_core_free(core));
    EACH((s = crab_snapshot_new(&service, 1, &backend, 1, NULL, 0, NULL, 0, SIZE, CRAB_FORM_CRAB, key)) != NULL,
         CHECK(s || errno == ENOMEM); crab_snapshot_free(s));
    EACH((joins = crab_joins_new(64)) != NULL, crab_joins_free(joins));
    EACH((table = crab_table_new(buckets, 1)) != NULL, crab_table_free(table));
    s = crab_snapshot_new(&service, 1, &backend, 1, NULL, 0, NULL, 0, SIZE, CRAB_FORM_CRAB, key);
    core = crab_core_new(64, counters);
    CHECK(s && core);
    EACH(crab_snapshot_answer(s, &vip, 1, true, true) == 0, );
    EACH(crab_core_show(core, 0, 4096) == 0, crab_core_hide(core));
    crab_core_free(core);
    crab_snapshot_free(s);

    struct crab_load loads[3] = {0};
    struct crab_turn turn = {0};
    struct crab_member members[3];
    struct crab_table_member placed[3] = {0};
    for (uint16_t i = 0; i < 3; i++) {
        members[i] = (struct crab_member){.backend = i, .weight = 1u + i, .load = &loads[i]};
        placed[i] = (struct crab_table_member){.addr = {(uint8_t)(i + 1)}, .weight = i, .full = 3, .backend = i};
    }
    for (uint32_t i = 0; crab_policy_name(i); i++) {
        pool = NULL;
        if (!strcmp(crab_policy_name(i), "least-connections") || !strcmp(crab_policy_name(i), "least-loaded"))
            continue; /* they do without a schedule until the next report: below */
        EACH((pool = crab_pool_new(crab_policy_name(i), members, 3, &turn)) != NULL, crab_pool_free(pool));
    }
    /* Without memory for the costs the schedule stays what it is: whole, of members. */
    static const char *const by_schedule[] = {"least-connections", "least-loaded"};
    for (int i = 0; i < 2; i++)
        for (unsigned n = 1; n < 6; n++) {
            uint16_t chosen[CRAB_BATCH];
            uint64_t random = 1;
            fails = n;
            pool = crab_pool_new(by_schedule[i], members, 3, &turn);
            fails = 0;
            if (!pool)
                continue;
            CHECK(crab_pool_pick(pool, &random, chosen, CRAB_BATCH) == CRAB_BATCH);
            for (int j = 0; j < CRAB_BATCH; j++)
                CHECK(chosen[j] < 3);
            crab_pool_free(pool);
        }
    CHECK(!crab_pool_new("nothing of the kind", members, 3, &turn));
    EACH(crab_maglev_build(slots, SIZE, placed, 3, key) == 0, );
    EACH(crab_rendezvous_build(slots, SIZE, placed, 3, key) == 0, );
    /* Nothing is nobody's to free. */
    crab_pool_free(NULL);
    crab_core_free(NULL);
    crab_joins_free(NULL);
    crab_table_free(NULL);
    crab_snapshot_free(NULL);
    DONE();
}
