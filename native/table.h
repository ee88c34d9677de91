/* SPDX-License-Identifier: MIT */
/* The XDP program's flows, in memory shared with it: see struct crab_flow.
 *
 * The workers write here what they decided; they share the table, so they take turns, and one that would have to wait does
 * not write: the flow's next packet comes to user space too.  Readers (the XDP program, on every CPU) never wait. */
#ifndef CRAB_TABLE_H
#define CRAB_TABLE_H

#include <stdatomic.h>
#include <string.h>

#include "crablb.h"

struct crab_table {
    struct crab_bucket *buckets;
    uint64_t mask;
    _Atomic(bool) busy;
};

/* Seconds for which a flow that had a packet is not pushed out by another: a bucket of busy flows keeps them, so that they
 * do not push each other out all the time. */
#define CRAB_TABLE_BUSY 2

static inline uint16_t crab_table_age(const struct crab_flow *f, uint32_t now)
{
    uint16_t age = (uint16_t)((uint16_t)now - f->seen);
    return age > CRAB_AGE_NEGATIVE ? 0 : age;
}

/* Of two flows that are not busy, whether the first is pushed out before the second. */
static inline bool crab_table_before(const struct crab_flow *f, const struct crab_flow *other, uint32_t now)
{
    bool lone = f->state == CRAB_FLOW_LONE;
    if (lone != (other->state == CRAB_FLOW_LONE))
        return lone;
    return crab_table_age(f, now) > crab_table_age(other, now);
}

/* Where a flow is or may be written, or NULL: the bucket is full of busy ones, or for a lone one of others. */
static inline struct crab_flow *crab_table_place(struct crab_table *t, const struct crab_flow *flow)
{
    uint64_t hash = flow->hash;
    uint32_t now = flow->seen;
    struct crab_bucket *b = &t->buckets[hash & t->mask];
    struct crab_flow *free = NULL, *oldest = NULL;
    for (int i = 0; i < CRAB_BUCKET; i++) {
        struct crab_flow *f = &b->flows[i];
        uint16_t age = crab_table_age(f, now);
        if (f->hash == hash)
            return f;
        if (!f->hash || age > (f->state == CRAB_FLOW_ENDING ? CRAB_AGE_ENDING : CRAB_AGE_OPEN))
            free = free ? free : f;
        else if (age >= CRAB_TABLE_BUSY && (flow->state != CRAB_FLOW_LONE || f->state == CRAB_FLOW_LONE) &&
                 (!oldest || crab_table_before(f, oldest, now)))
            oldest = f;
    }
    return free ? free : oldest;
}

/* A flow that is alive, as it is written down.  Returns whether there is one. */
static inline bool crab_table_get(const struct crab_table *t, uint64_t hash, uint32_t now, struct crab_flow *out)
{
    const struct crab_bucket *b = &t->buckets[hash & t->mask];
    for (int i = 0; i < CRAB_BUCKET; i++) {
        const struct crab_flow *f = &b->flows[i];
        if (__atomic_load_n(&f->hash, __ATOMIC_ACQUIRE) != hash)
            continue;
        uint64_t word = __atomic_load_n((const uint64_t *)(const void *)&f->backend, __ATOMIC_RELAXED);
        atomic_thread_fence(memory_order_acquire);
        if (__atomic_load_n(&f->hash, __ATOMIC_RELAXED) != hash)
            return false;
        out->hash = hash;
        memcpy((uint8_t *)out + 8, &word, 8);
        return crab_table_age(out, now) <= CRAB_AGE_OPEN;
    }
    return false;
}

/* Have the XDP program leave a flow's packets to user space until it is written down again. */
static inline void crab_table_ask(struct crab_table *t, uint64_t hash)
{
    struct crab_bucket *b = &t->buckets[hash & t->mask];
    for (int i = 0; i < CRAB_BUCKET; i++)
        if (__atomic_load_n(&b->flows[i].hash, __ATOMIC_RELAXED) == hash)
            __atomic_fetch_or(&b->flows[i].flags, CRAB_FLOW_ASK, __ATOMIC_RELAXED);
}

/* Write a flow down.  Returns whether it could be. */
static inline bool crab_table_put(struct crab_table *t, struct crab_flow flow)
{
    if (!flow.hash || atomic_exchange_explicit(&t->busy, true, memory_order_acquire))
        return false;
    struct crab_flow *f = crab_table_place(t, &flow);
    if (f) {
        uint64_t word;
        memcpy(&word, (const uint8_t *)&flow + 8, 8);
        if (f->hash != flow.hash)
            __atomic_store_n(&f->hash, 0, __ATOMIC_RELAXED);
        atomic_thread_fence(memory_order_release);
        __atomic_store_n((uint64_t *)(void *)&f->backend, word, __ATOMIC_RELAXED);
        __atomic_store_n(&f->hash, flow.hash, __ATOMIC_RELEASE);
    }
    atomic_store_explicit(&t->busy, false, memory_order_release);
    return f != NULL;
}

#endif
