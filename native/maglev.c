/* SPDX-License-Identifier: MIT */
/* Maglev hashing: Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016, section 3.4.
 *
 * Each backend has a permutation of the slots, (offset + i * skip) mod size; in turn each claims the next free slot of
 * its own.  A backend's turns come in proportion to its weight.  Load balancers that share the seed and the set of
 * backends build the same table, in whatever order they were told of them: members are taken in the order of their
 * addresses. */
#include <stdlib.h>

#include "bytes.h"
#include "crablb.h"

struct turn {
    const struct crab_maglev_member *member;
    uint32_t next, skip;
    uint32_t credit;
};

static int by_address(const void *a, const void *b)
{
    return memcmp(((const struct turn *)a)->member->addr, ((const struct turn *)b)->member->addr, 16);
}

int crab_maglev_build(uint16_t *table, uint32_t size, const struct crab_maglev_member *members, uint32_t count,
                      const uint8_t *key16)
{
    for (uint32_t i = 0; i < size; i++)
        table[i] = CRAB_NO_BACKEND;

    uint8_t skip_key[16];
    for (int i = 0; i < 16; i++)
        skip_key[i] = key16[i] ^ 0xa5;
    struct turn *turns = malloc((count ? count : 1) * sizeof *turns);
    if (!turns)
        return -1;
    uint32_t n = 0, max_weight = 0;
    for (uint32_t i = 0; i < count; i++) {
        const struct crab_maglev_member *m = &members[i];
        if (m->weight == 0)
            continue;
        if (m->weight > max_weight)
            max_weight = m->weight;
        turns[n++] = (struct turn){
            .member = m,
            .next = (uint32_t)(crab_siphash13(key16, m->addr, 16) % size),
            .skip = (uint32_t)(crab_siphash13(skip_key, m->addr, 16) % (size - 1)) + 1,
        };
    }
    qsort(turns, n, sizeof *turns, by_address);

    for (uint32_t filled = 0; n && filled < size;) {
        for (uint32_t i = 0; i < n && filled < size; i++) {
            struct turn *t = &turns[i];
            t->credit += t->member->weight;
            if (t->credit < max_weight)
                continue;
            t->credit -= max_weight;
            uint32_t slot = t->next;
            while (table[slot] != CRAB_NO_BACKEND) {
                slot += t->skip;
                if (slot >= size)
                    slot -= size;
            }
            table[slot] = t->member->backend;
            filled++;
            t->next = slot + t->skip >= size ? slot + t->skip - size : slot + t->skip;
        }
    }
    free(turns);
    return 0;
}
