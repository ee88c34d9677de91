/* SPDX-License-Identifier: MIT */
/* `random`: each member with a probability that is its share of the weights. */
#include <stdlib.h>

#include "select.h"

static int prepare(struct crab_pool *pool)
{
    struct crab_alias *columns = pool->state = malloc(pool->count * sizeof *columns);
    return columns ? crab_alias_build(pool, columns) : -1;
}

static uint32_t pick(struct crab_pool *pool, uint64_t random)
{
    return crab_alias_draw(pool, pool->state, random);
}

const struct crab_policy crab_policy_random = {"random", prepare, pick, NULL};
