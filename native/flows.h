/* SPDX-License-Identifier: MIT */
/* The flow cache of a worker: which backend a connection's packets go to.  One a worker, so nothing here is atomic.
 *
 * An entry's clock has 16 bits: 18.2 hours after its last packet a dead one would look alive, and name a backend that is
 * another by then.  So dead ones are cleared, a part of the cache at a time (crab_flows_tidy).
 *
 * A bucket is one cache line of four entries.  An entry is known by 48 bits of the connection's keyed hash beside the
 * bits that chose its bucket; who does not know the key cannot make two connections meet.
 *
 * Bounded without a sweep: a new entry comes in at the front of its bucket, and the last one goes; if that is an
 * established connection's, a dead or yielding one goes instead, else of those that have ended the one that has been
 * silent for longest, else the oldest that is still a SYN's, never one of an established connection that lives.  So a
 * flood of SYNs pushes out SYNs and what has ended only.
 *
 * A connection has at most two entries.  A SYN does not end the flow of its four-tuple, nor another SYN that is not
 * acknowledged yet, for anybody may send one: it stands beside it, pending, until its client has acknowledged the answer;
 * then the other goes.  Nor does a FIN or a RST: the flow goes on to decide, and only makes room for others sooner. */
#ifndef CRAB_FLOWS_H
#define CRAB_FLOWS_H

#include <stdbool.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "bytes.h"
#include "maps.h"

enum crab_entry_state { CRAB_ENTRY_FREE, CRAB_ENTRY_SYN, CRAB_ENTRY_ESTABLISHED, CRAB_ENTRY_CLOSING };

#define CRAB_HUGE_PAGE (2u << 20)
#define CRAB_MANY 31

struct crab_entry {
    uint64_t tag : 48;
    uint64_t state : 8;
    uint64_t copies : 5; /* of its SYN seen so far; stays at CRAB_MANY */
    uint64_t data : 1;   /* one of them had data, on which the backend may have acted */
    uint64_t twin : 1;   /* the connection may have another entry */
    uint64_t plain : 1;  /* the first of them made no offer, and was to be redirected all the same */
    uint32_t isn;        /* initial sequence number, as it lies in the packet */
    uint16_t backend;
    uint16_t seen; /* second of the last packet, modulo 2^16 */
};
_Static_assert(sizeof(struct crab_entry) * CRAB_BUCKET == 64, "a bucket is a cache line");

struct crab_flows {
    struct crab_entry *entries;
    uint64_t mask; /* buckets - 1 */
    uint64_t next; /* bucket to be tidied */
    uint32_t tidied; /* when that was done last, seconds; 0: never */
};

/* Seconds after the last packet, by state (see CRAB_AGE_SYN); a free entry's is 0.  In one word: no load. */
#define CRAB_LIFETIMES \
    ((uint64_t)CRAB_AGE_SYN << 16 | (uint64_t)CRAB_AGE_OPEN << 32 | (uint64_t)CRAB_AGE_OPEN << 48)

static inline uint16_t crab_entry_lifetime(unsigned state)
{
    return (uint16_t)(CRAB_LIFETIMES >> 16 * state);
}

static inline int crab_entry_dead(const struct crab_entry *f, uint32_t now)
{
    return (uint16_t)((uint16_t)now - f->seen) >= crab_entry_lifetime(f->state);
}

/* Whether its place is another's for the taking. */
static inline int crab_entry_yields(const struct crab_entry *f, uint32_t now)
{
    return crab_entry_dead(f, now) ||
           (f->state == CRAB_ENTRY_CLOSING && (uint16_t)((uint16_t)now - f->seen) >= CRAB_AGE_ENDING);
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

/* Seconds in which every bucket is looked at. */
#define CRAB_TIDY_SECONDS 4096
_Static_assert(CRAB_TIDY_SECONDS + CRAB_AGE_OPEN < 65536, "what is dead is cleared before its clock goes round");

/* Clear the dead entries of as many buckets as the seconds since the last call are worth. */
static inline void crab_flows_tidy(struct crab_flows *t, uint32_t now)
{
    uint32_t passed = now - t->tidied;
    uint64_t buckets = t->mask + 1;
    bool first = !t->tidied;
    t->tidied = now;
    if (first)
        return;
    if (passed >= CRAB_AGE_OPEN) { /* there was no packet since: none lives, whatever its clock says */
        memset(t->entries, 0, buckets * CRAB_BUCKET * sizeof *t->entries);
        return;
    }
    uint64_t n = passed >= CRAB_TIDY_SECONDS ? buckets : buckets * passed / CRAB_TIDY_SECONDS + 1;
    for (; n; n--, t->next = (t->next + 1) & t->mask)
        for (int i = 0; i < CRAB_BUCKET; i++) {
            struct crab_entry *e = &t->entries[t->next * CRAB_BUCKET + (uint64_t)i];
            if (e->state && crab_entry_dead(e, now))
                *e = (struct crab_entry){0};
        }
}

static inline struct crab_entry *crab_flows_bucket(const struct crab_flows *t, uint64_t hash)
{
    return &t->entries[(hash & t->mask) * CRAB_BUCKET];
}

static inline bool crab_entry_has(const struct crab_entry *f, uint64_t hash)
{
    uint64_t word; /* of which the tag is the lower part */
    memcpy(&word, f, sizeof word);
    return (word ^ hash >> 16) << 16 == 0;
}

/* An entry of a hash in its bucket, or NULL. */
static inline struct crab_entry *crab_flows_find(struct crab_entry *bucket, uint64_t hash, uint32_t now)
{
    for (int i = 0; i < CRAB_BUCKET; i++)
        if (crab_unlikely(crab_entry_has(&bucket[i], hash)) && !crab_entry_dead(&bucket[i], now))
            return &bucket[i];
    return NULL;
}

/* The entries of a connection.  pending: of a SYN that was not acknowledged yet; settled: of what was before, another such
 * SYN it may be. */
struct crab_entries {
    struct crab_entry *pending, *settled;
};

CRAB_APART struct crab_entries crab_flows_both(struct crab_entry *bucket, uint64_t hash, uint32_t now)
{
    struct crab_entries found = {NULL, NULL};
    for (struct crab_entry *e = bucket; e < bucket + CRAB_BUCKET; e++) {
        if (crab_likely(!crab_entry_has(e, hash)) || crab_entry_dead(e, now))
            continue;
        if (e->state == CRAB_ENTRY_SYN && !found.pending)
            found.pending = e;
        else if (e->state != CRAB_ENTRY_SYN || !found.settled)
            found.settled = e;
    }
    return found;
}

/* Of a connection that has one entry, or none: NULL. */
static inline struct crab_entries crab_flows_one(struct crab_entry *e)
{
    bool pending = e && e->state == CRAB_ENTRY_SYN;
    return (struct crab_entries){.pending = pending ? e : NULL, .settled = pending ? NULL : e};
}

static inline struct crab_entries crab_flows_entries(struct crab_entry *bucket, uint64_t hash, uint32_t now)
{
    struct crab_entry *e = crab_flows_find(bucket, hash, now);
    if (crab_unlikely(e && e->twin))
        return crab_flows_both(bucket, hash, now);
    return crab_flows_one(e);
}

/* What a client may send before it has an acknowledgement of more than its SYN: a SYN-ACK's window is not scaled (RFC 7323,
 * 2.2). */
#define CRAB_FIRST_WINDOW 65536

/* May a packet with this sequence number follow that SYN? */
static inline bool crab_entry_may_precede(const struct crab_entry *syn, uint32_t seq)
{
    return ntohl(seq) - ntohl(syn->isn) - 1 < CRAB_FIRST_WINDOW;
}

/* See below: of two entries. */
CRAB_APART struct crab_entries crab_flows_both_of(struct crab_entry *bucket, uint64_t hash, uint32_t now, uint32_t seq)
{
    struct crab_entries found = crab_flows_both(bucket, hash, now);
    if (found.settled && found.settled->state == CRAB_ENTRY_SYN) { /* two SYNs: only one is the client's */
        if (crab_entry_may_precede(found.settled, seq) && !crab_entry_may_precede(found.pending, seq))
            found.pending = found.settled;
        found.settled = NULL;
    }
    return found;
}

/* The entries of a connection that a packet with this sequence number may belong to: of two SYNs, that which it may follow. */
static inline struct crab_entries crab_flows_entries_of(struct crab_entry *bucket, uint64_t hash, uint32_t now, uint32_t seq)
{
    struct crab_entry *e = crab_flows_find(bucket, hash, now);
    if (crab_unlikely(e && e->twin))
        return crab_flows_both_of(bucket, hash, now, seq);
    return crab_flows_one(e);
}

/* The entry that knows a SYN by its initial sequence number, or NULL. */
static inline struct crab_entry *crab_flows_of_syn(struct crab_entries of, uint32_t isn)
{
    if (of.pending && of.pending->isn == isn)
        return of.pending;
    return of.settled && of.settled->isn == isn ? of.settled : NULL;
}

/* Seconds of silence after which an ended connection makes room where there is no other.  Clients that are done close and
 * come again by the thousand a second: what they leave for CRAB_AGE_ENDING would be more than there is room for. */
#define CRAB_AGE_CROWDED 10

/* The place in a bucket for a new entry, by age, or NULL: four live established connections fill it. */
CRAB_APART struct crab_entry *crab_flows_oldest(struct crab_entry *bucket, uint32_t now)
{
    struct crab_entry *ended = NULL, *syn = NULL;
    uint16_t ended_most = CRAB_AGE_CROWDED - 1, syn_most = 0;
    for (struct crab_entry *e = bucket; e < bucket + CRAB_BUCKET; e++) {
        if (crab_entry_yields(e, now))
            return e;
        uint16_t age = (uint16_t)((uint16_t)now - e->seen);
        if (e->state == CRAB_ENTRY_CLOSING && age > ended_most) {
            ended = e;
            ended_most = age;
        } else if (e->state == CRAB_ENTRY_SYN && age >= syn_most) {
            syn = e;
            syn_most = age;
        }
    }
    return ended ? ended : syn;
}

/* Whether the last place of a bucket is an established connection's. */
static inline bool crab_flows_crowded(const struct crab_entry *bucket)
{
    return bucket[CRAB_BUCKET - 1].state > CRAB_ENTRY_SYN;
}

/* The first place of a bucket that is not crowded, made free. */
static inline struct crab_entry *crab_flows_front(struct crab_entry *bucket)
{
    struct crab_entry first = bucket[0], second = bucket[1], third = bucket[2];
    bucket[1] = first;
    bucket[2] = second;
    bucket[3] = third;
    return bucket;
}

/* A place in a bucket for a new entry, or NULL: see crab_flows_oldest. */
static inline struct crab_entry *crab_flows_place(struct crab_entry *bucket, uint32_t now)
{
    return crab_unlikely(crab_flows_crowded(bucket)) ? crab_flows_oldest(bucket, now) : crab_flows_front(bucket);
}

#endif
