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

#include "permutation.h"

#define LOOKAHEAD 32 /* slots of a permutation that are looked at together */

struct turn {
    struct permutation p;
    uint32_t next;   /* slot of it that it looks at next */
    uint32_t weight; /* that counts now */
    uint32_t credit;
    uint32_t ahead, used;          /* candidates, and how many of them have been looked at */
    uint32_t candidates[LOOKAHEAD]; /* slots that were free when it last looked ahead */
};

static int by_address(const void *a, const void *b)
{
    return memcmp(((const struct turn *)a)->p.member->addr, ((const struct turn *)b)->p.member->addr, 16);
}

/* The slot behind this one. */
static inline uint32_t behind(const struct permutation *p, uint32_t slot, uint32_t size)
{
    slot += p->skip;
    return slot >= size ? slot - size : slot;
}

/* 1 / a modulo a prime; 0 < a < prime.  Extended Euclid. */
static uint32_t inverse_of(uint32_t a, uint32_t prime)
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
static inline uint32_t steps_to(uint32_t slot, uint32_t from, uint32_t inverse, uint32_t size)
{
    uint64_t away = slot >= from ? slot - from : slot + size - from;
    return (uint32_t)(away * inverse % size);
}

/* Free what a member holds beyond the share of its weight now in its full one: the last of what it claimed.  Returns how many. */
static uint32_t give_back(uint16_t *table, uint32_t size, struct permutation *p)
{
    const struct crab_table_member *m = p->member;
    uint32_t keeps = (uint32_t)((uint64_t)p->claims * m->weight / crab_full_weight(m));
    uint32_t slot = p->offset, seen = 0, gives = p->claims - keeps;
    while (gives && seen < p->claims) { /* in the order in which it claimed them */
        if (table[slot] == m->backend && ++seen > keeps)
            table[slot] = CRAB_NO_BACKEND;
        slot = behind(p, slot, size);
    }
    p->claims = keeps;
    return gives;
}

/* A free slot, and how many steps away it is. */
struct place {
    uint32_t steps, slot;
};

#define DIGIT 11 /* bits that are sorted by at a time */

/* In the order of their steps, which are below size; between is room for as many. */
static void sort(struct place *places, struct place *between, uint32_t count, uint32_t size)
{
    struct place *from = places, *to = between;
    for (unsigned int shift = 0; size >> shift; shift += DIGIT) {
        uint32_t starts[(1 << DIGIT) + 1] = {0};
        for (uint32_t i = 0; i < count; i++)
            starts[(from[i].steps >> shift & ((1 << DIGIT) - 1)) + 1]++;
        for (uint32_t i = 1; i < 1 << DIGIT; i++)
            starts[i] += starts[i - 1];
        for (uint32_t i = 0; i < count; i++)
            to[starts[from[i].steps >> shift & ((1 << DIGIT) - 1)]++] = from[i];
        struct place *swap = from;
        from = to;
        to = swap;
    }
    if (from != places)
        memcpy(places, from, count * sizeof *places);
}

/* With few free slots, each is far from the next one in a permutation: in place of looking at all between, they are sorted by
 * where they are in it.  From so many on that is dearer than what it saves (measured: the minimum is flat), and for less than
 * MIN_SORTED so are the counts of the sort. */
#define MIN_SORTED 64

static uint32_t few(uint32_t size, uint32_t n)
{
    uint32_t slots = size / n / 8;
    return slots < MIN_SORTED ? 0 : slots;
}

/* Where a member finds the free slots from its next one on, in their order. */
static void find(struct place *places, struct place *between, const uint32_t *slots, uint32_t count,
                 const struct turn *t, uint32_t size)
{
    uint32_t inverse = inverse_of(t->p.skip, size);
    uint32_t from = t->used < t->ahead ? t->candidates[t->used] : t->next;
    for (uint32_t i = 0; i < count; i++)
        places[i] = (struct place){steps_to(slots[i], from, inverse, size), slots[i]};
    sort(places, between, count, size);
}

/* The member's next free slot.  Whether a slot is free no branch predictor can know: so many are looked at without a branch,
 * and few of those that were free will have been taken when it is their turn. */
static uint32_t next_free(const uint16_t *table, uint32_t size, struct turn *t)
{
    for (;;) {
        while (t->used < t->ahead) {
            uint32_t slot = t->candidates[t->used++];
            if (crab_likely(table[slot] == CRAB_NO_BACKEND))
                return slot;
        }
        uint32_t slot = t->next, count = 0;
        for (int i = 0; i < LOOKAHEAD; i++) {
            t->candidates[count] = slot;
            count += table[slot] == CRAB_NO_BACKEND;
            slot = behind(&t->p, slot, size);
        }
        t->next = slot;
        t->ahead = count;
        t->used = 0;
    }
}

/* Whether it is a member's turn. */
static inline bool is_due(struct turn *t, uint32_t most)
{
    t->credit += t->weight;
    if (t->credit < most)
        return false;
    t->credit -= most;
    return true;
}

static inline void take(uint16_t *table, struct turn *t, uint32_t slot)
{
    table[slot] = t->p.member->backend;
    t->p.claims++;
}

/* Have those with a weight claim all free slots.  Returns 0, or -1 without memory. */
static int claim(uint16_t *table, uint32_t size, struct turn *turns, uint32_t n, uint32_t free_slots)
{
    uint32_t most = 0;
    for (uint32_t i = 0; i < n; i++)
        most = turns[i].weight > most ? turns[i].weight : most;
    if (!most)
        return 0;
    uint32_t i = 0, left = few(size, n);
    for (; free_slots > left; i = i + 1 < n ? i + 1 : 0) {
        struct turn *t = &turns[i];
        if (!is_due(t, most))
            continue;
        take(table, t, next_free(table, size, t));
        free_slots--;
    }
    if (!free_slots)
        return 0;

    uint32_t count = free_slots, *slots = malloc(count * sizeof *slots);
    struct place **found = calloc(n, sizeof *found), *places = malloc((size_t)(n + 1) * count * sizeof *places);
    if (!slots || !found || !places) {
        free(slots);
        free(found);
        free(places);
        return -1;
    }
    for (uint32_t slot = 0, k = 0; k < count; slot++)
        if (table[slot] == CRAB_NO_BACKEND)
            slots[k++] = slot;
    for (uint32_t k = 0; k < n; k++) {
        found[k] = places + (size_t)k * count;
        if (turns[k].weight)
            find(found[k], places + (size_t)n * count, slots, count, &turns[k], size);
    }
    for (; free_slots; i = i + 1 < n ? i + 1 : 0) {
        if (!is_due(&turns[i], most))
            continue;
        while (table[found[i]->slot] != CRAB_NO_BACKEND)
            found[i]++;
        take(table, &turns[i], found[i]->slot);
        free_slots--;
    }
    free(slots);
    free(found);
    free(places);
    return 0;
}

int crab_maglev_build(uint16_t *table, uint32_t size, const struct crab_table_member *members, uint32_t count,
                      const uint8_t *key16)
{
    for (uint32_t i = 0; i < size; i++)
        table[i] = CRAB_NO_BACKEND;

    struct turn *turns = malloc((count ? count : 1) * sizeof *turns);
    if (!turns)
        return -1;
    uint32_t n = 0, freed = 0;
    for (uint32_t i = 0; i < count; i++) {
        if (!crab_full_weight(&members[i]))
            continue;
        struct permutation p = crab_permutation(&members[i], size, key16);
        turns[n++] = (struct turn){.p = p, .next = p.offset, .weight = crab_full_weight(p.member)};
    }
    qsort(turns, n, sizeof *turns, by_address);
    int failed = claim(table, size, turns, n, size);
    for (uint32_t i = 0; i < n && !failed; i++)
        freed += give_back(table, size, &turns[i].p);
    if (freed) {
        for (uint32_t i = 0; i < n; i++) {
            turns[i].next = turns[i].p.offset;
            turns[i].ahead = turns[i].used = 0;
            turns[i].credit = 0;
            turns[i].weight = turns[i].p.member->weight;
        }
        failed |= claim(table, size, turns, n, freed);
    }
    free(turns);
    return failed;
}
