/* SPDX-License-Identifier: MIT */
/* `power-of-two`: of two members drawn by weight, the one with fewer connections for its weight (Mitzenmacher, "The Power
 * of Two Choices in Randomized Load Balancing", 2001). */
#include "select.h"

static void pick(struct crab_pool *pool, uint64_t *random, uint16_t *members, uint32_t n)
{
    const struct crab_alias *columns = pool->state;
    const uint32_t count = pool->count;
    uint16_t others[CRAB_BATCH];
    uint64_t state = *random;
    /* All are drawn before loads are compared: so the cache lines of many are waited for at the same time. */
    for (uint32_t i = 0; i < n; i++) {
        uint64_t both = crab_random(&state);
        uint16_t a = members[i] = crab_alias_draw(columns, count, (uint32_t)both);
        uint16_t b = others[i] = crab_alias_draw(columns, count, (uint32_t)(both >> 32));
        __builtin_prefetch(pool->members[a].load, 1);
        __builtin_prefetch(pool->members[b].load, 1);
    }
    *random = state;
    for (uint32_t i = 0; i < n; i++) {
        uint16_t a = members[i], b = others[i];
        const struct crab_member *x = &pool->members[a], *y = &pool->members[b];
        uint64_t first = (uint64_t)crab_connections(x) * y->weight, second = (uint64_t)crab_connections(y) * x->weight;
        /* Without a branch, as in the draw. */
        members[i] = a ^= (uint16_t)((a ^ b) & -(first > second));
        crab_assign(pool, a);
    }
}

const struct crab_policy crab_policy_power_of_two = {"power-of-two", crab_alias_prepare, pick, NULL};
