/* SPDX-License-Identifier: MIT */
/* `power-of-two`: of two members drawn by weight, the one with fewer connections for its weight (Mitzenmacher, "The Power
 * of Two Choices in Randomized Load Balancing", 2001). */
#include "select.h"

static uint32_t pick(struct crab_pool *pool, uint64_t random)
{
    uint32_t a = crab_alias_draw(pool, pool->state, random);
    uint32_t b = crab_alias_draw(pool, pool->state, random * 0x9e3779b97f4a7c15ull ^ random >> 29);
    const struct crab_member *x = &pool->members[a], *y = &pool->members[b];
    return (uint64_t)crab_connections(x) * y->weight <= (uint64_t)crab_connections(y) * x->weight ? a : b;
}

const struct crab_policy crab_policy_power_of_two = {"power-of-two", crab_alias_prepare, pick, NULL};
