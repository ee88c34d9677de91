/* SPDX-License-Identifier: MIT */
/* `least-loaded`: the member with the lowest figure that its server reports (CPU, in thousandths, or any other) for its
 * weight.  What a connection adds to the figure is taken from what the connections there are make of it. */
#include <stdlib.h>

#include "select.h"

#define UNIT 1024 /* the costs' fractions of a figure */

static void refresh(struct crab_pool *pool)
{
    struct crab_cost *costs = malloc(pool->count * sizeof *costs);
    if (!costs)
        return;
    uint64_t figures = 0, reported = 0;
    for (uint32_t i = 0; i < pool->count; i++) {
        figures += crab_load_read(&pool->members[i].load->figure);
        reported += crab_load_read(&pool->members[i].load->open);
    }
    uint64_t step = reported ? figures * UNIT / reported : UNIT;
    if (!step)
        step = 1;
    for (uint32_t i = 0; i < pool->count; i++) {
        const struct crab_load *l = pool->members[i].load;
        uint32_t since = crab_load_read(&l->assigned) - crab_load_read(&l->base);
        costs[i] = (struct crab_cost){.base = (uint64_t)crab_load_read(&l->figure) * UNIT + step * since, .step = step};
    }
    crab_schedule_build(pool, costs);
    free(costs);
}

const struct crab_policy crab_policy_least_loaded = {"least-loaded", crab_schedule_prepare, crab_schedule_pick,
                                                     refresh};
