/* SPDX-License-Identifier: MIT */
/* `round-robin`: one after the other, in rounds; a member of weight w takes part in w rounds of as many as the largest
 * weight (interleaved weighted round-robin; Katevenis et al., 1991). */
#include <stdlib.h>

#include "select.h"

#define LONGEST 65536

static int prepare(struct crab_pool *pool)
{
    uint32_t *weights = malloc(pool->count * sizeof *weights);
    if (!weights)
        return -1;
    uint32_t length = crab_scale_weights(pool, LONGEST, weights), n = 0;
    struct crab_sequence *s = pool->state = malloc(sizeof *s + length * sizeof *s->members);
    if (s) {
        s->length = length;
        for (uint32_t round = 0; n < length; round++)
            for (uint32_t i = 0; i < pool->count; i++)
                if (weights[i] > round)
                    s->members[n++] = (uint16_t)i;
    }
    free(weights);
    return s ? 0 : -1;
}

const struct crab_policy crab_policy_round_robin = {"round-robin", prepare, crab_sequence_pick, NULL};
