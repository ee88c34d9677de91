/* SPDX-License-Identifier: MIT */
/* The interface of a policy.  A new one is a file of its own (policy_*.c) and a line in select.c.
 *
 * A policy chooses among the members of a pool: the backends of one service that can be redirected to, with their weights
 * (never 0) and loads.  A pool is made anew when members or weights change; what must outlive that is in `turn` and in
 * the members' loads, which all workers share: they are written by atomic additions only. */
#ifndef CRAB_SELECT_H
#define CRAB_SELECT_H

#include <stdatomic.h>

#include "bytes.h"
#include "crablb.h"

struct crab_policy {
    const char *name;
    /* Make what pick needs, as pool->state (one allocation, freed with the pool).  -1 without memory.  NULL: nothing. */
    int (*prepare)(struct crab_pool *pool);
    /* Choose n members (at most CRAB_BATCH), one after the other, and crab_assign each.  random: for crab_random.  Called by
     * all workers at the same time. */
    void (*pick)(struct crab_pool *pool, uint64_t *random, uint16_t *members, uint32_t n);
    /* The loads have changed.  Called by one thread at a time, while others pick.  NULL: nothing to do. */
    void (*refresh)(struct crab_pool *pool);
};

struct crab_pool {
    const struct crab_policy *policy;
    struct crab_turn *turn;
    void *state;
    uint64_t digest; /* of the loads that were last taken into account */
    uint32_t count;
    struct crab_member members[];
};

extern const struct crab_policy crab_policy_random, crab_policy_round_robin, crab_policy_weighted_round_robin,
    crab_policy_power_of_two, crab_policy_least_connections, crab_policy_least_loaded;

static inline uint32_t crab_load_read(const uint32_t *value)
{
    return __atomic_load_n(value, __ATOMIC_RELAXED);
}

/* Connections of a member: those reported, and those assigned since. */
static inline uint32_t crab_connections(const struct crab_member *m)
{
    const struct crab_load *l = m->load;
    return crab_load_read(&l->open) + (crab_load_read(&l->assigned) - crab_load_read(&l->base));
}

/* 64 random bits: wyrand (Wang Yi, https://github.com/wangyi-fudan/wyhash). */
static inline uint64_t crab_random(uint64_t *state)
{
    uint64_t x = *state += 0xa0761d6478bd642full;
    unsigned __int128 product = (unsigned __int128)x * (x ^ 0xe7037ed1a0b428dbull);
    return (uint64_t)(product >> 64) ^ (uint64_t)product;
}

static inline void crab_assign(struct crab_pool *pool, uint16_t member)
{
    __atomic_fetch_add(&pool->members[member].load->assigned, 1, __ATOMIC_RELAXED);
}

/* Assign what a policy chose without looking at loads.  Their cache lines first: an atomic addition waits for its own, and
 * nothing behind it begins. */
static inline void crab_assign_all(struct crab_pool *pool, const uint16_t *members, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        __builtin_prefetch(pool->members[members[i]].load, 1);
    for (uint32_t i = 0; i < n; i++)
        crab_assign(pool, members[i]);
}

/* Take it back. */
static inline void crab_unassign(struct crab_pool *pool, uint16_t member)
{
    __atomic_fetch_sub(&pool->members[member].load->assigned, 1, __ATOMIC_RELAXED);
}

/* Weights brought down so that their sum is at most `most` (or their number, if that is more), as exactly as whole
 * numbers allow; first their common divisor is taken out.  Returns the sum.  out: one a member. */
uint32_t crab_scale_weights(const struct crab_pool *pool, uint32_t most, uint32_t *out);

/* A sequence of members that is gone round. */
struct crab_sequence {
    uint32_t length;
    uint16_t members[];
};

void crab_sequence_pick(struct crab_pool *pool, uint64_t *random, uint16_t *members, uint32_t n);

/* Draw a member by weight: Walker's alias method (Vose, 1991), two loads and no loop. */
struct crab_alias {
    uint32_t threshold; /* up to it the column's own member, else the other */
    uint32_t other;
};

/* As pool->state: one column a member. */
int crab_alias_prepare(struct crab_pool *pool);

/* The random number's whole part in columns says which, the rest who of the two.  Without a branch: nobody could foretell
 * it. */
static inline uint16_t crab_alias_draw(const struct crab_alias *columns, uint32_t count, uint32_t random)
{
    uint64_t scaled = (uint64_t)random * count;
    const struct crab_alias *column = &columns[scaled >> 32];
    uint32_t own = -(uint32_t)((uint32_t)scaled <= column->threshold);
    return (uint16_t)((scaled >> 32 & own) | (column->other & ~own));
}

/* A schedule: the members that a greedy choice by least cost would take one after the other, worked out ahead.  Workers
 * share it by taking places; when it is used up they go round its second half, where costs are level. */
#define CRAB_SCHEDULE 4096

/* What the n-th next connection to a member costs, n from 1: (base + n * step) / weight.  Both below 2^36. */
struct crab_cost {
    uint64_t base, step;
};
#define CRAB_COST_MAX ((1ull << 36) - 1)

int crab_schedule_prepare(struct crab_pool *pool);
void crab_schedule_pick(struct crab_pool *pool, uint64_t *random, uint16_t *members, uint32_t n);
/* Work out the schedule.  costs: one a member; they are used up. */
void crab_schedule_build(struct crab_pool *pool, struct crab_cost *costs);

#endif
