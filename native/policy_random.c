/* SPDX-License-Identifier: MIT */
/* `random`: each member with a probability that is its share of the weights. */
#include "select.h"

static uint32_t pick(struct crab_pool *pool, uint64_t random)
{
    return crab_alias_draw(pool, pool->state, random);
}

const struct crab_policy crab_policy_random = {"random", crab_alias_prepare, pick, NULL};
