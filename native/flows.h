/* SPDX-License-Identifier: MIT */
/* The flow cache of a worker: which backend a connection's packets go to.  One a worker, so nothing here is atomic.
 *
 * A bucket is one cache line of four entries.  An entry is known by 48 bits of the connection's keyed hash beside the
 * bits that chose its bucket; who does not know the key cannot make two connections meet.
 *
 * Bounded and aged without a sweep: a new entry takes a free or expired place of its bucket, else the oldest one that
 * is still a SYN's, never one of an established connection.  So a flood of SYNs pushes out SYNs only. */
#ifndef CRAB_FLOWS_H
#define CRAB_FLOWS_H

#include <stdlib.h>
#include <sys/mman.h>

#include "bytes.h"
#include "maps.h"

enum crab_entry_state { CRAB_ENTRY_FREE, CRAB_ENTRY_SYN, CRAB_ENTRY_ESTABLISHED, CRAB_ENTRY_CLOSING };

#define CRAB_HUGE_PAGE (2u << 20)

struct crab_entry {
    uint64_t tag : 48;
    uint64_t state : 8;
    uint64_t copies : 8; /* of its SYN seen so far; stays at 255 */
    uint32_t isn;        /* initial sequence number, as it lies in the packet */
    uint16_t backend;
    uint16_t seen; /* second of the last packet, modulo 2^16 */
};
_Static_assert(sizeof(struct crab_entry) * CRAB_BUCKET == 64, "a bucket is a cache line");

struct crab_flows {
    struct crab_entry *entries;
    uint64_t mask; /* buckets - 1 */
};

/* Seconds after the last packet, by state (see CRAB_AGE_SYN); a free entry's is 0.  In one word: no load. */
#define CRAB_LIFETIMES \
    ((uint64_t)CRAB_AGE_SYN << 16 | (uint64_t)CRAB_AGE_OPEN << 32 | (uint64_t)CRAB_AGE_ENDING << 48)

static inline uint16_t crab_entry_lifetime(unsigned state)
{
    return (uint16_t)(CRAB_LIFETIMES >> 16 * state);
}

static inline int crab_entry_dead(const struct crab_entry *f, uint32_t now)
{
    return (uint16_t)((uint16_t)now - f->seen) >= crab_entry_lifetime(f->state);
}

static inline int crab_flows_init(struct crab_flows *t, uint32_t capacity)
{
    uint64_t buckets = 16;
    while (buckets * CRAB_BUCKET < capacity)
        buckets *= 2;
    /* A bucket is found at random: on huge pages that costs a cache miss, but seldom a walk through the page tables. */
    size_t size = buckets * 64, align = size < CRAB_HUGE_PAGE ? 64 : CRAB_HUGE_PAGE;
    t->entries = aligned_alloc(align, size);
    if (!t->entries)
        return -1;
    if (align == CRAB_HUGE_PAGE)
        madvise(t->entries, size, MADV_HUGEPAGE); /* a wish: without huge pages it works as well */
    memset(t->entries, 0, buckets * 64);
    t->mask = buckets - 1;
    return 0;
}

static inline struct crab_entry *crab_flows_bucket(const struct crab_flows *t, uint64_t hash)
{
    return &t->entries[(hash & t->mask) * CRAB_BUCKET];
}

static inline struct crab_entry *crab_flows_find(const struct crab_flows *t, uint64_t hash, uint32_t now)
{
    struct crab_entry *bucket = crab_flows_bucket(t, hash);
    for (int i = 0; i < CRAB_BUCKET; i++) {
        uint64_t word; /* of which the tag is the lower part */
        memcpy(&word, &bucket[i], sizeof word);
        if (crab_unlikely((word ^ hash >> 16) << 16 == 0) && !crab_entry_dead(&bucket[i], now))
            return &bucket[i];
    }
    return NULL;
}

/* A place for a new entry of this hash, or NULL: four live established connections fill the bucket. */
static inline struct crab_entry *crab_flows_place(const struct crab_flows *t, uint64_t hash, uint32_t now)
{
    struct crab_entry *bucket = crab_flows_bucket(t, hash);
    /* The entries' words side by side, four lanes: no branch for each, for which of a bucket live cannot be foretold. */
    typedef int32_t lanes __attribute__((vector_size(16)));
    const uint32_t *words = (const void *)bucket;
    lanes state = (lanes){(int)words[1], (int)words[5], (int)words[9], (int)words[13]} >> 16 & 0xff;
    lanes age = ((int)now - ((lanes){(int)words[3], (int)words[7], (int)words[11], (int)words[15]} >> 16)) & 0xffff;
    lanes syn = state == CRAB_ENTRY_SYN;
    lanes lifetime = (syn & CRAB_AGE_SYN) | ((state == CRAB_ENTRY_ESTABLISHED) & CRAB_AGE_OPEN) |
                     ((state == CRAB_ENTRY_CLOSING) & CRAB_AGE_ENDING);
    lanes alive = lifetime > age;
    /* Above an entry's number, from 3 down: the age of a SYN, whether it is one, and whether it is dead. */
    lanes score = (((alive & syn & (age | 1 << 16)) | (~alive & 1 << 17)) << 2) | (lanes){3, 2, 1, 0};
    int32_t best = score[0], other = score[2] > score[3] ? score[2] : score[3];
    best = score[1] > best ? score[1] : best;
    best = other > best ? other : best;
    return best >= CRAB_BUCKET ? &bucket[CRAB_BUCKET - 1 - best % CRAB_BUCKET] : NULL;
}

#endif
