/* SPDX-License-Identifier: MIT */
/* How many new connections a service takes. */
#include "crablb.h"

bool crab_limit_take(struct crab_limit *limit, uint64_t now_ns)
{
    uint64_t full = __atomic_load_n(&limit->full_ns, __ATOMIC_RELAXED), then;
    do {
        if (full > now_ns && full - now_ns > limit->size_ns)
            return false;
        then = (full > now_ns ? full : now_ns) + limit->token_ns;
    } while (!__atomic_compare_exchange_n(&limit->full_ns, &full, then, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return true;
}
