/* SPDX-License-Identifier: MIT */
#include "select.h"

#include <stdlib.h>
#include <string.h>

static const struct crab_policy *const policies[] = {
    &crab_policy_random,        &crab_policy_round_robin,       &crab_policy_weighted_round_robin,
    &crab_policy_power_of_two,  &crab_policy_least_connections, &crab_policy_least_loaded,
};

const char *crab_policy_name(uint32_t i)
{
    return i < sizeof policies / sizeof *policies ? policies[i]->name : NULL;
}

struct crab_pool *crab_pool_new(const char *policy, const struct crab_member *members, uint32_t count,
                                struct crab_turn *turn)
{
    const struct crab_policy *found = NULL;
    for (uint32_t i = 0; crab_policy_name(i); i++)
        if (!strcmp(policies[i]->name, policy))
            found = policies[i];
    struct crab_pool *pool = found ? calloc(1, sizeof *pool + count * sizeof *members) : NULL;
    if (!pool)
        return NULL;
    pool->policy = found;
    pool->turn = turn;
    pool->count = count;
    if (count)
        memcpy(pool->members, members, count * sizeof *members);
    if (count && found->prepare && found->prepare(pool)) {
        free(pool);
        return NULL;
    }
    crab_pool_refresh(pool);
    return pool;
}

void crab_pool_free(struct crab_pool *pool)
{
    if (pool)
        free(pool->state);
    free(pool);
}

void crab_pool_refresh(struct crab_pool *pool)
{
    if (!pool->count || !pool->policy->refresh)
        return;
    uint64_t digest = 1;
    for (uint32_t i = 0; i < pool->count; i++) {
        const struct crab_load *l = pool->members[i].load;
        digest = (digest ^ crab_load_read(&l->assigned)) * 0x9e3779b97f4a7c15ull;
        digest = (digest ^ crab_load_read(&l->base)) * 0x9e3779b97f4a7c15ull;
        digest = (digest ^ crab_load_read(&l->open)) * 0x9e3779b97f4a7c15ull;
        digest = (digest ^ crab_load_read(&l->figure)) * 0x9e3779b97f4a7c15ull;
        digest ^= digest >> 32;
    }
    if (digest == pool->digest)
        return;
    pool->digest = digest;
    pool->policy->refresh(pool);
}

uint32_t crab_pool_pick(struct crab_pool *pool, uint64_t *random, uint16_t *backends, uint32_t n)
{
    uint16_t members[CRAB_BATCH];
    if (!pool->count)
        return 0;
    pool->policy->pick(pool, random, members, n);
    for (uint32_t i = 0; i < n; i++)
        backends[i] = pool->members[members[i]].backend;
    return n;
}

/* ---- weights ---- */

static uint32_t divisor(uint32_t a, uint32_t b)
{
    while (b) {
        uint32_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

uint32_t crab_scale_weights(const struct crab_pool *pool, uint32_t most, uint32_t *out)
{
    uint64_t sum = 0, scaled = 0;
    uint32_t common = 0;
    for (uint32_t i = 0; i < pool->count; i++)
        common = divisor(pool->members[i].weight, common);
    for (uint32_t i = 0; i < pool->count; i++)
        sum += out[i] = pool->members[i].weight / common;
    if (sum <= most)
        return (uint32_t)sum;
    for (uint32_t i = 0; i < pool->count; i++) {
        uint64_t w = ((uint64_t)out[i] * most + sum / 2) / sum;
        scaled += out[i] = w ? (uint32_t)w : 1;
    }
    return (uint32_t)scaled;
}

int crab_alias_prepare(struct crab_pool *pool)
{
    /* A share is in 2^32nds of a column; in all there are count columns' worth. */
    uint32_t n = pool->count, small = 0, large = 0;
    uint64_t total = 0, *share = malloc(n * sizeof *share);
    uint32_t *todo = malloc(2 * n * sizeof *todo), *below = todo, *above = todo + n;
    struct crab_alias *columns = pool->state = malloc(n * sizeof *columns);
    if (!share || !todo || !columns) {
        free(share);
        free(todo);
        free(columns);
        return -1;
    }
    for (uint32_t i = 0; i < n; i++)
        total += pool->members[i].weight;
    for (uint32_t i = 0; i < n; i++) {
        share[i] = (uint64_t)((unsigned __int128)pool->members[i].weight * n * (1ull << 32) / total);
        if (share[i] < 1ull << 32)
            below[small++] = i;
        else
            above[large++] = i;
    }
    while (small && large) {
        uint32_t b = below[--small], a = above[large - 1];
        columns[b] = (struct crab_alias){.threshold = share[b] ? (uint32_t)(share[b] - 1) : 0, .other = a};
        share[a] -= (1ull << 32) - share[b];
        if (share[a] < 1ull << 32) {
            large--;
            below[small++] = a;
        }
    }
    /* What is left are full columns, but for rounding. */
    while (small)
        columns[below[--small]] = (struct crab_alias){.threshold = UINT32_MAX};
    while (large)
        columns[above[--large]] = (struct crab_alias){.threshold = UINT32_MAX};
    free(share);
    free(todo);
    return 0;
}

void crab_sequence_pick(struct crab_pool *pool, uint64_t *random, uint16_t *members, uint32_t n)
{
    (void)random;
    const struct crab_sequence *s = pool->state;
    uint64_t at = __atomic_fetch_add(&pool->turn->next, n, __ATOMIC_RELAXED) % s->length;
    for (uint32_t i = 0; i < n; i++, at = at + 1 < s->length ? at + 1 : 0)
        members[i] = s->members[at];
    crab_assign_all(pool, members, n);
}

/* ---- schedules ---- */

struct schedule {
    _Atomic(uint32_t) next; /* place to be taken */
    uint32_t length;        /* even */
    uint16_t members[];
};

/* Two of them: one is taken from while the other is written. */
struct schedules {
    _Atomic(uint32_t) active;
    struct schedule *of[2];
    struct heap_entry {
        uint64_t key; /* cost of the next connection, in 2^-27ths: equal where the quotients are equal */
        uint32_t member;
    } heap[];
};

int crab_schedule_prepare(struct crab_pool *pool)
{
    uint32_t length = 2 * pool->count > CRAB_SCHEDULE ? 2 * pool->count : CRAB_SCHEDULE;
    size_t heap = sizeof(struct schedules) + pool->count * sizeof(struct heap_entry);
    size_t one = (sizeof(struct schedule) + length * sizeof(uint16_t) + 63) / 64 * 64;
    heap = (heap + 63) / 64 * 64;
    uint8_t *memory = aligned_alloc(64, heap + 2 * one);
    if (!memory)
        return -1;
    memset(memory, 0, heap + 2 * one);
    struct schedules *s = pool->state = memory;
    for (int i = 0; i < 2; i++) {
        s->of[i] = (struct schedule *)(void *)(memory + heap + (size_t)i * one);
        s->of[i]->length = length;
    }
    return 0;
}

/* Whether a is to be taken before b: by cost of the next connection, then by order. */
static bool cheaper(const struct heap_entry *a, const struct heap_entry *b)
{
    return a->key != b->key ? a->key < b->key : a->member < b->member;
}

static void sift(struct heap_entry *heap, uint32_t n, uint32_t i)
{
    struct heap_entry moved = heap[i];
    for (uint32_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && cheaper(&heap[child + 1], &heap[child]))
            child++;
        if (!cheaper(&heap[child], &moved))
            break;
        heap[i] = heap[child];
    }
    heap[i] = moved;
}

static uint64_t key_of(uint64_t cost, uint32_t weight)
{
    cost = cost < CRAB_COST_MAX ? cost : CRAB_COST_MAX;
    return (cost << 27) / weight;
}

void crab_schedule_build(struct crab_pool *pool, struct crab_cost *costs)
{
    struct schedules *s = pool->state;
    uint32_t idle = !atomic_load_explicit(&s->active, memory_order_relaxed);
    struct schedule *to = s->of[idle];
    for (uint32_t i = 0; i < pool->count; i++)
        s->heap[i] = (struct heap_entry){
            .key = key_of(costs[i].base += costs[i].step, pool->members[i].weight), .member = i};
    for (uint32_t i = pool->count; i-- > 0;)
        sift(s->heap, pool->count, i);
    for (uint32_t i = 0; i < to->length; i++) {
        uint32_t m = s->heap[0].member;
        __atomic_store_n(&to->members[i], (uint16_t)m, __ATOMIC_RELAXED);
        s->heap[0].key = key_of(costs[m].base += costs[m].step, pool->members[m].weight);
        sift(s->heap, pool->count, 0);
    }
    atomic_store_explicit(&to->next, 0, memory_order_relaxed);
    atomic_store_explicit(&s->active, idle, memory_order_release);
}

void crab_schedule_pick(struct crab_pool *pool, uint64_t *random, uint16_t *members, uint32_t n)
{
    (void)random;
    struct schedules *s = pool->state;
    struct schedule *from = s->of[atomic_load_explicit(&s->active, memory_order_acquire)];
    uint32_t first = atomic_fetch_add_explicit(&from->next, n, memory_order_relaxed), half = from->length / 2;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t place = first + i;
        /* A schedule that is being written meanwhile holds members all the same, old or new ones. */
        place = crab_likely(place < from->length) ? place : half + place % half;
        members[i] = __atomic_load_n(&from->members[place], __ATOMIC_RELAXED);
    }
    crab_assign_all(pool, members, n);
}
