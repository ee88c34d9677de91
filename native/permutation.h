/* SPDX-License-Identifier: MIT */
/* What the order in which a member of a table looks at the slots is made of, in native/maglev.c and native/rendezvous.c. */
#ifndef CRABLB_PERMUTATION_H
#define CRABLB_PERMUTATION_H

#include "bytes.h"
#include "crablb.h"

struct permutation {
    const struct crab_table_member *member;
    uint32_t offset, skip; /* as in Eisenbud et al., NSDI 2016, 3.4 */
    uint32_t claims; /* slots that the member holds */
};

static inline uint32_t crab_full_weight(const struct crab_table_member *m)
{
    return m->full > m->weight ? m->full : m->weight;
}

static inline struct permutation crab_permutation(const struct crab_table_member *m, uint32_t size, const uint8_t *key16)
{
    uint8_t skip_key[16];
    for (int i = 0; i < 16; i++)
        skip_key[i] = key16[i] ^ 0xa5;
    return (struct permutation){
        .member = m,
        .offset = (uint32_t)(crab_siphash13(key16, m->addr, 16) % size),
        .skip = (uint32_t)(crab_siphash13(skip_key, m->addr, 16) % (size - 1)) + 1,
    };
}

#endif
