/* SPDX-License-Identifier: MIT */
/* The order in which a member of a table looks at the slots: (offset + i * skip) mod size, as in Eisenbud et al., NSDI 2016,
 * 3.4.  Both tables, native/maglev.c and native/rendezvous.c, are made of such permutations; they differ in whose turn it is. */
#ifndef CRABLB_PERMUTATION_H
#define CRABLB_PERMUTATION_H

#include "bytes.h"
#include "crablb.h"

struct permutation {
    const struct crab_table_member *member;
    uint32_t offset, skip;
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

/* The slot behind this one. */
static inline uint32_t crab_behind(const struct permutation *p, uint32_t slot, uint32_t size)
{
    slot += p->skip;
    return slot >= size ? slot - size : slot;
}

/* 1 / a modulo a prime; 0 < a < prime.  Extended Euclid. */
static inline uint32_t crab_inverse(uint32_t a, uint32_t prime)
{
    int64_t r = prime, next_r = a, t = 0, next_t = 1;
    while (next_r) {
        int64_t quotient = r / next_r, swap = r - quotient * next_r;
        r = next_r;
        next_r = swap;
        swap = t - quotient * next_t;
        t = next_t;
        next_t = swap;
    }
    return (uint32_t)(t < 0 ? t + prime : t);
}

/* How many steps behind `from` a slot is; inverse: that of the skip. */
static inline uint32_t crab_steps(uint32_t slot, uint32_t from, uint32_t inverse, uint32_t size)
{
    uint64_t away = slot >= from ? slot - from : slot + size - from;
    return (uint32_t)(away * inverse % size);
}

/* Free what a member holds beyond the share of its weight now in its full one: the last of what it claimed.  Returns how many. */
static inline uint32_t crab_give_back(uint16_t *table, uint32_t size, struct permutation *p)
{
    const struct crab_table_member *m = p->member;
    uint32_t keeps = (uint32_t)((uint64_t)p->claims * m->weight / crab_full_weight(m));
    uint32_t slot = p->offset, seen = 0, gives = p->claims - keeps;
    while (gives && seen < p->claims) { /* in the order in which it claimed them */
        if (table[slot] == m->backend && ++seen > keeps)
            table[slot] = CRAB_NO_BACKEND;
        slot = crab_behind(p, slot, size);
    }
    p->claims = keeps;
    return gives;
}

#endif
