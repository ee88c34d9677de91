/* SPDX-License-Identifier: MIT */
/* Maglev hashing: Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016, section 3.4.
 *
 * Each backend has a permutation of the slots, (offset + i * skip) mod size; in turn each claims the next free slot of
 * its own.  A backend's turns come in proportion to its weight.  Load balancers that share the seed and the set of
 * backends build the same table, in whatever order they were told of them: members are taken in the order of their
 * addresses.
 *
 * When a backend goes, the paper's table changes in more places than the backend had: some of its neighbours' claims move, and
 * then others'.  Mostly backends do not go, they fail, are drained, or warm up.  So the table is made for all of them at
 * full weight; who has less gives back the last of its claims, and the others claim those in turn.  No other slot changes,
 * and load balancers that do not agree on who is alive agree on all else. */
#include <stdlib.h>

#include "bytes.h"
#include "crablb.h"

struct turn {
    const struct crab_maglev_member *member;
    uint32_t offset, skip; /* of its permutation */
    uint32_t next;         /* slot of it that it looks at next */
    uint32_t claims;
    uint32_t weight;       /* that counts now */
    uint32_t credit;
};

static int by_address(const void *a, const void *b)
{
    return memcmp(((const struct turn *)a)->member->addr, ((const struct turn *)b)->member->addr, 16);
}

static uint32_t full_weight(const struct crab_maglev_member *m)
{
    return m->full > m->weight ? m->full : m->weight;
}

static inline uint32_t step(const struct turn *t, uint32_t slot, uint32_t size)
{
    slot += t->skip;
    return slot >= size ? slot - size : slot;
}

/* Have those with a weight claim all free slots. */
static void claim(uint16_t *table, uint32_t size, struct turn *turns, uint32_t n, uint32_t free)
{
    uint32_t most = 0;
    for (uint32_t i = 0; i < n; i++)
        most = turns[i].weight > most ? turns[i].weight : most;
    while (most && free)
        for (uint32_t i = 0; i < n && free; i++) {
            struct turn *t = &turns[i];
            t->credit += t->weight;
            if (t->credit < most)
                continue;
            t->credit -= most;
            uint32_t slot = t->next;
            while (table[slot] != CRAB_NO_BACKEND)
                slot = step(t, slot, size);
            table[slot] = t->member->backend;
            t->next = step(t, slot, size);
            t->claims++;
            free--;
        }
}

/* Free what a member has beyond its share.  Returns how many slots. */
static uint32_t give_back(uint16_t *table, uint32_t size, const struct turn *t)
{
    const struct crab_maglev_member *m = t->member;
    uint32_t keeps = (uint32_t)((uint64_t)t->claims * m->weight / full_weight(m));
    uint32_t slot = t->offset, seen = 0;
    while (seen < t->claims) { /* in the order in which it claimed them */
        if (table[slot] == m->backend && ++seen > keeps)
            table[slot] = CRAB_NO_BACKEND;
        slot = step(t, slot, size);
    }
    return t->claims - keeps;
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
    uint32_t n = 0, freed = 0;
    for (uint32_t i = 0; i < count; i++) {
        const struct crab_maglev_member *m = &members[i];
        if (!full_weight(m))
            continue;
        uint32_t offset = (uint32_t)(crab_siphash13(key16, m->addr, 16) % size);
        turns[n++] = (struct turn){
            .member = m,
            .offset = offset,
            .next = offset,
            .skip = (uint32_t)(crab_siphash13(skip_key, m->addr, 16) % (size - 1)) + 1,
            .weight = full_weight(m),
        };
    }
    qsort(turns, n, sizeof *turns, by_address);
    claim(table, size, turns, n, size);
    for (uint32_t i = 0; i < n; i++)
        if (turns[i].member->weight < turns[i].weight)
            freed += give_back(table, size, &turns[i]);
    if (freed) {
        for (uint32_t i = 0; i < n; i++) {
            turns[i].next = turns[i].offset;
            turns[i].credit = 0;
            turns[i].weight = turns[i].member->weight;
        }
        claim(table, size, turns, n, freed);
    }
    free(turns);
    return 0;
}
