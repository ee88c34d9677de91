/* SPDX-License-Identifier: MIT */
/* `weighted-round-robin`: as round-robin, but the turns of a heavy member are spread out evenly (smooth weighted
 * round-robin, as nginx does it: each turn every member gains its weight, and who has most pays the sum of all). */
#include <stdlib.h>

#include "select.h"

/* Making the sequence takes its length times the number of members: no more than this. */
#define MOST_WORK (1u << 22)
#define LONGEST 65536

static int prepare(struct crab_pool *pool)
{
    uint32_t n = pool->count, most = MOST_WORK / n < LONGEST ? MOST_WORK / n : LONGEST;
    uint32_t *weights = malloc(n * sizeof *weights);
    int64_t *credit = calloc(n, sizeof *credit);
    struct crab_sequence *s = NULL;
    if (weights && credit) {
        uint32_t length = crab_scale_weights(pool, most, weights);
        s = pool->state = malloc(sizeof *s + length * sizeof *s->members);
        for (uint32_t turn = 0; s && turn < length; turn++) {
            uint32_t best = 0;
            for (uint32_t i = 0; i < n; i++) {
                credit[i] += weights[i];
                if (credit[i] > credit[best])
                    best = i;
            }
            credit[best] -= length;
            s->length = length;
            s->members[turn] = (uint16_t)best;
        }
    }
    free(weights);
    free(credit);
    return s ? 0 : -1;
}

const struct crab_policy crab_policy_weighted_round_robin = {"weighted-round-robin", prepare, crab_sequence_pick, NULL};
