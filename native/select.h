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
    /* The member to take.  random: 64 bits.  Called by all workers at the same time. */
    uint32_t (*pick)(struct crab_pool *pool, uint64_t random);
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

/* Weights brought down so that their sum is at most `most` (or their number, if that is more), as exactly as whole
 * numbers allow; first their common divisor is taken out.  Returns the sum.  out: one a member. */
uint32_t crab_scale_weights(const struct crab_pool *pool, uint32_t most, uint32_t *out);

/* A sequence of members that is gone round. */
struct crab_sequence {
    uint32_t length;
    uint16_t members[];
};

static inline uint32_t crab_sequence_pick(struct crab_pool *pool)
{
    const struct crab_sequence *s = pool->state;
    uint64_t turn = __atomic_fetch_add(&pool->turn->next, 1, __ATOMIC_RELAXED);
    return s->members[turn % s->length];
}

/* Draw a member by weight: Walker's alias method (Vose, 1991), two loads and no loop. */
struct crab_alias {
    uint32_t threshold; /* of the random number's lower half: below it the column's own member, else the other */
    uint32_t other;
};

/* As pool->state: one column a member. */
int crab_alias_prepare(struct crab_pool *pool);

static inline uint32_t crab_alias_draw(const struct crab_pool *pool, const struct crab_alias *columns, uint64_t random)
{
    uint32_t column = (uint32_t)(((random >> 32) * pool->count) >> 32);
    return (uint32_t)random <= columns[column].threshold ? column : columns[column].other;
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
uint32_t crab_schedule_pick(struct crab_pool *pool, uint64_t random);
/* Work out the schedule.  costs: one a member; they are used up. */
void crab_schedule_build(struct crab_pool *pool, struct crab_cost *costs);

#endif
