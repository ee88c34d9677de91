/* SPDX-License-Identifier: MIT */
/* Rendezvous hashing of slots with bounded loads: Thaler and Ravishankar, "Using Name-Based Mappings to Increase Hit Rates",
 * IEEE/ACM ToN 6(1), 1998; Mirrokni, Thorup and Zadimoghaddam, "Consistent Hashing with Bounded Loads", SODA 2018.
 *
 * A slot belongs to the member in whose permutation it comes first.  So who comes or goes takes or leaves slots, and no others
 * change: where a Maglev table (native/maglev.c) has a member that finds a slot taken look for another at once, which moves who
 * comes behind, here the look is lost.  The price is that members have more or fewer slots, as chance has it.  Nobody gets more
 * than a 32nd beyond its share, which moves a few slots after all: measured with 1,000 members, 1.5 times the least possible
 * with 65 slots for each, 1.1 times with 655 (Maglev: 6.6 and 4.2).
 *
 * Members look at times that go by their weights, and each the slower, the fewer slots it has not looked at yet: as if it drew
 * them by chance, and only those count that it had not drawn.  Else heavy members would have more than their share, where they
 * are few.
 *
 * As in a Maglev table, who has less than its full weight gives back the last of its claims, and no other slot changes. */
#include <stdlib.h>

#include "permutation.h"

#define SPARE 32  /* beyond its share a member may have a slot in so many */
#define ROUNDS 16 /* that are looked ahead */
#define POINT 16  /* binary places of times, which are in looks of a member that has all slots before it, and of ratios */

/* A member's order is the permutation a * (i + c)^power + b of the field of so many elements as there are slots: power is the
 * least odd number above 1 that has no divisor in common with size - 1.  Two progressions, power 1, run alike for long where the
 * skip of one is some simple fraction of the other's, and who comes behind finds its slots taken; these meet in few places.
 *
 * An order is walked by its differences, modulo size, of which there are power + 1: the first is the slot, the last one is
 * always the same. */
static uint32_t power_of(uint32_t size)
{
    for (uint32_t power = 3;; power += 2) {
        uint32_t a = power, b = size - 1;
        while (b) { /* Euclid: 9 may not divide size - 1 where 3 does */
            uint32_t rest = a % b;
            a = b;
            b = rest;
        }
        if (a == 1)
            return power;
    }
}

static inline uint32_t sum_of(uint32_t a, uint32_t b, uint32_t size)
{
    uint32_t sum = a + b;
    return sum >= size ? sum - size : sum;
}

/* On to the next slot. */
static inline void step(uint32_t *differences, uint32_t power, uint32_t size)
{
    for (uint32_t d = 0; d < power; d++)
        differences[d] = sum_of(differences[d], differences[d + 1], size);
}

/* The start of a member's order. */
static void start(uint32_t *differences, const struct permutation *p, const uint8_t *key16, uint32_t power, uint32_t size)
{
    uint8_t from_key[16];
    for (int i = 0; i < 16; i++)
        from_key[i] = key16[i] ^ 0x5a;
    uint64_t from = crab_siphash13(from_key, p->member->addr, 16) % size;
    for (uint32_t i = 0; i <= power; i++) {
        uint64_t base = (from + i) % size, value = p->skip;
        for (uint32_t k = 0; k < power; k++)
            value = value * base % size;
        differences[i] = (uint32_t)((value + p->offset) % size);
    }
    for (uint32_t d = 1; d <= power; d++)
        for (uint32_t i = power; i >= d; i--)
            differences[i] = sum_of(differences[i], size - differences[i - 1], size);
}

/* Arrays by member, in the order of addresses. */
struct race {
    uint16_t *table;
    uint64_t *free; /* a bit a slot: fits a cache where the table does not */
    uint64_t *times; /* of a member's looks; those of the first `known` are there */
    uint32_t known;
    uint32_t size, n;
    uint32_t power; /* of orders */
    struct permutation *who;
    const uint32_t *starts; /* of orders: power + 1 differences each */
    uint32_t *next;         /* likewise, from the look on that is next */
    uint32_t *weight; /* that counts now */
    uint64_t *ratio;  /* the greatest weight by this one */
    uint32_t *looked; /* how many slots it has looked at */
    uint32_t *room;   /* slots that it may still claim */
    uint32_t *able;   /* members with room, in order */
    uint32_t ables;
    uint64_t round;     /* the next one */
    uint64_t *looks;    /* of the next rounds, n each, in order: who << 32 | slot */
};

static int by_address(const void *a, const void *b)
{
    return memcmp(((const struct permutation *)a)->member->addr, ((const struct permutation *)b)->member->addr, 16);
}

static inline bool is_free(const struct race *r, uint32_t slot)
{
    return r->free[slot / 64] >> slot % 64 & 1;
}

/* Those with room. */
static void drop_full(struct race *r)
{
    uint32_t kept = 0;
    for (uint32_t k = 0; k < r->ables; k++) {
        r->able[kept] = r->able[k];
        kept += r->room[r->able[k]] != 0;
    }
    r->ables = kept;
}

/* The round of a member's look of this number.  No two of its looks are in one. */
static inline uint64_t round_of(struct race *r, uint32_t i, uint32_t number)
{
    while (number >= r->known) { /* who draws has to draw size / (size - n) times to have the next one behind n */
        uint64_t gap = ((uint64_t)r->size << POINT) / (r->size - r->known + 1);
        r->times[r->known] = r->times[r->known - 1] + gap;
        r->known++;
    }
    return (uint64_t)((unsigned __int128)r->times[number] * r->ratio[i] >> 2 * POINT);
}

/* Back to the start; returns the differences there. */
static uint32_t *rewind_order(struct race *r, uint32_t i)
{
    size_t size = r->power + 1, at = i * size;
    return memcpy(r->next + at, r->starts + at, size * sizeof *r->next);
}

/* Begin with these weights. */
static void begin(struct race *r)
{
    for (uint32_t slot = 0; slot < r->size; slot += 64)
        r->free[slot / 64] = 0;
    for (uint32_t slot = 0; slot < r->size; slot++)
        r->free[slot / 64] |= (uint64_t)(r->table[slot] == CRAB_NO_BACKEND) << slot % 64;
    uint64_t sum = 0, most = 0;
    for (uint32_t i = 0; i < r->n; i++) {
        sum += r->weight[i];
        most = r->weight[i] > most ? r->weight[i] : most;
    }
    r->ables = 0;
    r->round = 0;
    for (uint32_t i = 0; i < r->n; i++) {
        if (!r->weight[i])
            continue;
        r->ratio[i] = (most << POINT) / r->weight[i];
        r->looked[i] = 0;
        rewind_order(r, i);
        /* the next whole number above size * weight / sum * (1 + 1 / SPARE) */
        uint64_t bound = (uint64_t)r->size * r->weight[i] * (SPARE + 1);
        bound = (bound + sum * SPARE - 1) / (sum * SPARE);
        r->room[i] = bound > r->who[i].claims ? (uint32_t)bound - r->who[i].claims : 0;
        r->able[r->ables++] = i;
    }
    drop_full(r);
}

static inline void take(struct race *r, uint32_t i, uint32_t slot)
{
    r->table[slot] = r->who[i].member->backend;
    r->free[slot / 64] &= ~(1ull << slot % 64);
    r->room[i]--;
    r->who[i].claims++;
}

/* Which of the next rounds a member looks in, from `looked` on; alike for all of one weight. */
struct plan {
    uint64_t ratio;
    uint32_t looked, count;
    uint32_t rounds[ROUNDS]; /* from the next one on */
    uint64_t then;           /* the round of the look behind these */
};

static void plan(struct race *r, struct plan *p, uint32_t i)
{
    p->ratio = r->ratio[i];
    p->looked = r->looked[i];
    p->count = 0;
    p->then = UINT64_MAX;
    for (uint32_t number = p->looked; number < r->size; number++) {
        uint64_t round = round_of(r, i, number);
        if (round >= r->round + ROUNDS) {
            p->then = round;
            return;
        }
        p->rounds[p->count++] = (uint32_t)(round - r->round);
    }
}

/* The next rounds; who comes first in one comes last in the next.  Whether a slot is free no branch predictor can know, and most
 * are not: first all looks are made that may find something, without a branch; of those that a round was earlier, few are in
 * vain.  Returns how many slots were taken. */
static inline uint32_t look(struct race *r, uint32_t power)
{
    uint64_t *ends[ROUNDS]; /* of each round's looks */
    for (uint32_t j = 0; j < ROUNDS; j++)
        ends[j] = r->looks + (size_t)j * r->n;
    struct plan p = {0};
    uint64_t soonest = UINT64_MAX;
    for (uint32_t k = 0; k < r->ables; k++) {
        uint32_t i = r->able[k];
        uint32_t *next = r->next + (size_t)i * (power + 1);
        if (p.ratio != r->ratio[i] || p.looked != r->looked[i])
            plan(r, &p, i);
        for (uint32_t j = 0; j < p.count; j++) {
            uint64_t **end = &ends[p.rounds[j]];
            uint32_t slot = next[0];
            **end = (uint64_t)i << 32 | slot;
            *end += is_free(r, slot);
            step(next, power, r->size);
        }
        r->looked[i] += p.count;
        soonest = p.then < soonest ? p.then : soonest;
    }
    uint32_t taken = 0, full = 0;
    for (uint32_t j = 0; j < ROUNDS; j++) {
        const uint64_t *looks = r->looks + (size_t)j * r->n;
        uint32_t count = (uint32_t)(ends[j] - looks);
        for (uint32_t k = 0; k < count; k++) {
            uint64_t l = looks[(r->round + j) & 1 ? count - 1 - k : k];
            uint32_t who = (uint32_t)(l >> 32), slot = (uint32_t)l;
            if (!is_free(r, slot) || !r->room[who])
                continue;
            take(r, who, slot);
            taken++;
            full += !r->room[who];
        }
    }
    if (full)
        drop_full(r);
    r->round = soonest; /* nobody looks before that */
    return taken;
}

/* Have those with a weight claim all free slots. */
static void claim(struct race *r, uint32_t left)
{
    begin(r);
    while (left && r->ables)
        left -= r->power == 3 ? look(r, 3) : look(r, r->power); /* 3 with the usual sizes */
}

/* Free what a member holds beyond the share of its weight now in its full one: the last of what it claimed.  Returns how many. */
static uint32_t give_back(struct race *r, uint32_t i)
{
    const struct crab_table_member *m = r->who[i].member;
    uint32_t claims = r->who[i].claims, keeps = (uint32_t)((uint64_t)claims * m->weight / crab_full_weight(m));
    uint32_t *next = rewind_order(r, i);
    for (uint32_t seen = 0; keeps < claims && seen < claims; step(next, r->power, r->size))
        if (r->table[next[0]] == m->backend && ++seen > keeps)
            r->table[next[0]] = CRAB_NO_BACKEND;
    r->who[i].claims = keeps;
    return claims - keeps;
}

int crab_rendezvous_build(uint16_t *table, uint32_t size, const struct crab_table_member *members, uint32_t count,
                          const uint8_t *key16)
{
    for (uint32_t i = 0; i < size; i++)
        table[i] = CRAB_NO_BACKEND;
    uint32_t n = count ? count : 1;
    struct permutation *who = malloc(n * sizeof *who);
    uint32_t *arrays = malloc((size_t)n * 4 * sizeof *arrays);
    uint64_t *ratio = malloc(n * sizeof *ratio), *times = malloc(size * sizeof *times);
    uint64_t *free_slots = malloc((size / 64 + 1) * sizeof *free_slots);
    uint32_t power = power_of(size);
    uint32_t *orders = malloc((size_t)n * 2 * (power + 1) * sizeof *orders);
    uint64_t *looks = malloc((size_t)n * ROUNDS * sizeof *looks);
    int failed = !who || !arrays || !ratio || !times || !free_slots || !looks || !orders ? -1 : 0;
    if (!failed) {
        times[0] = 0;
        struct race r = {.table = table, .free = free_slots, .times = times, .known = 1, .size = size, .who = who,
                         .looks = looks, .ratio = ratio, .weight = arrays, .looked = arrays + n,
                         .room = arrays + 2 * (size_t)n, .able = arrays + 3 * (size_t)n, .starts = orders,
                         .next = orders + (size_t)n * (power + 1), .power = power};
        for (uint32_t i = 0; i < count; i++)
            if (crab_full_weight(&members[i]))
                who[r.n++] = crab_permutation(&members[i], size, key16);
        qsort(who, r.n, sizeof *who, by_address);
        for (uint32_t i = 0; i < r.n; i++)
            start(orders + (size_t)i * (power + 1), &who[i], key16, power, size);
        for (uint32_t i = 0; i < r.n; i++)
            r.weight[i] = crab_full_weight(who[i].member);
        claim(&r, size);
        uint32_t freed = 0;
        for (uint32_t i = 0; i < r.n; i++) {
            freed += give_back(&r, i);
            r.weight[i] = who[i].member->weight;
        }
        if (freed)
            claim(&r, freed);
    }
    free(who);
    free(arrays);
    free(ratio);
    free(times);
    free(free_slots);
    free(looks);
    free(orders);
    return failed;
}
