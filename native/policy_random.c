/* SPDX-License-Identifier: MIT */
/* `random`: each member with a probability that is its share of the weights. */
#include "select.h"

static void pick(struct crab_pool *pool, uint64_t *random, uint16_t *members, uint32_t n)
{
    const struct crab_alias *columns = pool->state;
    const uint32_t count = pool->count;
    uint64_t state = *random;
    for (uint32_t i = 0; i < n; i++)
        members[i] = crab_alias_draw(columns, count, (uint32_t)crab_random(&state));
    *random = state;
    crab_assign_all(pool, members, n);
}

const struct crab_policy crab_policy_random = {"random", crab_alias_prepare, pick, NULL};
