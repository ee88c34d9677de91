/* SPDX-License-Identifier: MIT */
/* `least-connections`: the member with the fewest connections for its weight: those its server reports, and those assigned
 * since.  Not searched for at every SYN: see struct crab_cost. */
#include <stdlib.h>

#include "select.h"

static void refresh(struct crab_pool *pool)
{
    struct crab_cost *costs = malloc(pool->count * sizeof *costs);
    if (!costs)
        return; /* the schedule that is there goes on */
    for (uint32_t i = 0; i < pool->count; i++)
        costs[i] = (struct crab_cost){.base = crab_connections(&pool->members[i]), .step = 1};
    crab_schedule_build(pool, costs);
    free(costs);
}

const struct crab_policy crab_policy_least_connections = {"least-connections", crab_schedule_prepare,
                                                          crab_schedule_pick, refresh};
