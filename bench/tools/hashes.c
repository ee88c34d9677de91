/* SPDX-License-Identifier: MIT */
/* Other ways from a hash to a backend, to be measured beside the tables of native/, which crablb does not use.  Written from:
 *
 *   AnchorHash    Mendelson, Vargaftik, Barabash, Lorenz, Keslassy, Orda, "AnchorHash: A Scalable Consistent Hash", IEEE/ACM
 *                 ToN 29(2), 2021, algorithm 3
 *   DxHash        Dong, Wang, Feng, "DxHash: A Scalable Consistent Hash Based on the Pseudo-Random Sequence", arXiv 2107.07930
 *   JumpBackHash  Ertl, "JumpBackHash: Say Goodbye to the Modulo Operation to Distribute Keys Uniformly to Buckets", arXiv
 *                 2403.18682
 *
 * A connection's hash is random already (SipHash under a seed): what more random numbers they need are SplitMix64's from there. */
#include <stdlib.h>
#include <time.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "snapshot.h"

#include "hashes.h"

#define DX_BITS 16
#define DX_WHOLE (1u << DX_BITS) /* the weight of who takes all that comes to it */
#define DX_DRAWS 64              /* for each bucket that there may be, before they are looked at in turn */

/* The random number of this number, from 1 on, that follows from a seed: Steele, Lea, Flood, "Fast Splittable Pseudorandom
 * Number Generators", OOPSLA 2014. */
static inline uint64_t draw(uint64_t seed, uint64_t number)
{
    uint64_t z = seed + number * 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static struct method *method_new(uint32_t buckets, size_t state, size_t more)
{
    struct method *m = calloc(1, sizeof *m);
    if (!m)
        return NULL;
    m->buckets = buckets;
    m->backends = calloc(buckets, sizeof *m->backends);
    m->state = calloc(1, state ? state : 1);
    m->more = calloc(1, more ? more : 1);
    m->state_bytes = state;
    m->bytes = buckets * sizeof *m->backends + state + more;
    if (!m->backends || !m->state || !m->more) {
        method_free(m);
        return NULL;
    }
    return m;
}

void method_free(struct method *m)
{
    free(m->backends);
    free(m->state);
    free(m->more);
    free(m);
}

/* ---- a table ---- */

/* As the hot loop does: examine.c finds and prefetches the slots of a batch, forward.c reads them. */
static void table_look(const struct method *m, const uint64_t *hashes, uint32_t count, uint16_t *chosen)
{
    const uint16_t *slots[CRAB_BATCH];
    for (uint32_t i = 0; i < count; i++) {
        slots[i] = &m->backends[crab_slot(hashes[i], m->buckets)];
        __builtin_prefetch(slots[i]);
    }
    for (uint32_t i = 0; i < count; i++)
        chosen[i] = *slots[i];
}

struct method *table_new(uint32_t size)
{
    struct method *m = method_new(size, 0, 0);
    if (m)
        m->look = table_look;
    return m;
}

/* ---- AnchorHash ---- */

/* The arrays that the paper calls A and K, which lookups read, and W, L and R, which changes need too. */
struct anchor {
    uint32_t *a; /* 0: the bucket works; else how many did when it had stopped */
    uint32_t *k; /* who took its place among those that work */
    uint32_t *w, *l; /* who works, in the first places of w; where a bucket is in it */
    uint32_t *r; /* who stopped, in order */
};

static struct anchor anchor_of(const struct method *m)
{
    uint32_t *state = m->state, *more = m->more;
    size_t n = m->buckets;
    return (struct anchor){.a = state, .k = state + n, .w = more, .l = more + n, .r = more + 2 * n};
}

static inline uint32_t anchor(const uint32_t *a, const uint32_t *k, uint32_t capacity, uint64_t hash)
{
    uint32_t b = crab_slot(hash, capacity);
    while (a[b]) {
        uint32_t h = crab_slot(draw(hash, b + 1ull), a[b]);
        while (a[h] >= a[b]) /* stopped before b did: who had its place then? */
            h = k[h];
        b = h;
    }
    return b;
}

static void anchor_look(const struct method *m, const uint64_t *hashes, uint32_t count, uint16_t *chosen)
{
    struct anchor t = anchor_of(m);
    for (uint32_t i = 0; i < count; i++)
        chosen[i] = m->backends[anchor(t.a, t.k, m->buckets, hashes[i])];
}

struct method *anchor_new(uint32_t capacity, uint32_t working)
{
    struct method *m = method_new(capacity, 2 * (size_t)capacity * sizeof(uint32_t), 3 * (size_t)capacity * sizeof(uint32_t));
    if (!m)
        return NULL;
    m->look = anchor_look;
    m->working = working;
    struct anchor t = anchor_of(m);
    for (uint32_t b = 0; b < capacity; b++)
        t.k[b] = t.l[b] = t.w[b] = b;
    for (uint32_t b = capacity; b-- > working;) { /* as if the last had stopped first */
        t.r[capacity - 1 - b] = b;
        t.a[b] = b;
    }
    return m;
}

uint32_t anchor_add(struct method *m)
{
    struct anchor t = anchor_of(m);
    if (m->working == m->buckets)
        return UINT32_MAX;
    uint32_t n = m->working++, b = t.r[m->buckets - 1 - n];
    t.a[b] = 0;
    t.l[t.w[n]] = n;
    t.w[t.l[b]] = t.k[b] = b;
    return b;
}

void anchor_remove(struct method *m, uint32_t b)
{
    struct anchor t = anchor_of(m);
    t.r[m->buckets - m->working] = b;
    uint32_t n = --m->working;
    t.a[b] = n;
    t.w[t.l[b]] = t.k[b] = t.w[n];
    t.l[t.w[n]] = t.l[b];
}

/* ---- DxHash ---- */

/* The first bucket of the hash's sequence that is there and takes it.  Weights are by rejection: a part of the same random
 * number decides, so a bucket that gets more weight gets more hashes, and no other bucket gets any. */
static inline uint32_t dx(const uint32_t *weights, uint32_t capacity, uint64_t hash)
{
    uint32_t mask = capacity - 1, b = 0;
    for (uint32_t number = 1; number <= capacity * DX_DRAWS; number++) {
        uint64_t r = draw(hash, number);
        b = (uint32_t)r & mask;
        if (r >> (64 - DX_BITS) < weights[b])
            return b;
    }
    for (uint32_t steps = 0; steps < capacity && !weights[b]; steps++) /* hardly anybody is there */
        b = (b + 1) & mask;
    return b;
}

static void dx_look(const struct method *m, const uint64_t *hashes, uint32_t count, uint16_t *chosen)
{
    const uint32_t *weights = m->state;
    for (uint32_t i = 0; i < count; i++)
        chosen[i] = m->backends[dx(weights, m->buckets, hashes[i])];
}

struct method *dx_new(uint32_t capacity, const uint32_t *weights, uint32_t count)
{
    struct method *m = method_new(capacity, capacity * sizeof(uint32_t), 0);
    if (!m)
        return NULL;
    m->look = dx_look;
    for (uint32_t b = 0; b < count; b++)
        dx_weigh(m, b, weights[b]);
    return m;
}

void dx_weigh(struct method *m, uint32_t bucket, uint32_t weight)
{
    uint32_t *weights = m->state;
    m->working += !!weight;
    m->working -= !!weights[bucket];
    weights[bucket] = weight;
}

/* ---- JumpBackHash ---- */

/* Each hash has some active indices; its bucket is the greatest of them below n.  They are found from above, by octaves [low, 2
 * low).  Half of the octaves have any, which the bits of one random number say; the greatest comes of that number too, those
 * below it of more, and a number below the octave ends it.  Only the octave that n cuts ever needs more. */
static inline uint32_t jumpback(uint64_t hash, uint32_t n)
{
    if (n < 2)
        return 0;
    uint64_t first = draw(hash, 1), number = 1;
    uint32_t octaves = (uint32_t)(first ^ first >> 32) & (UINT32_MAX >> __builtin_clz(n - 1));
    while (octaves) {
        uint32_t low = 1u << (31 - __builtin_clz(octaves)), below = low * 2 - 1;
        uint32_t b = low + ((uint32_t)(first >> (__builtin_popcount(octaves) & 1) * 32) & (low - 1));
        for (;;) {
            if (b < n)
                return b;
            uint64_t next = draw(hash, ++number);
            b = (uint32_t)next & below;
            if (b < low)
                break;
            if (b < n)
                return b;
            b = (uint32_t)(next >> 32) & below;
            if (b < low)
                break;
        }
        octaves ^= low;
    }
    return 0;
}

static void jumpback_look(const struct method *m, const uint64_t *hashes, uint32_t count, uint16_t *chosen)
{
    for (uint32_t i = 0; i < count; i++)
        chosen[i] = m->backends[jumpback(hashes[i], m->working)];
}

struct method *jumpback_new(uint32_t capacity, uint32_t working)
{
    struct method *m = method_new(capacity, 0, 0);
    if (!m)
        return NULL;
    m->look = jumpback_look;
    m->working = working;
    return m;
}

/* ---- any of them ---- */

void method_look(const struct method *m, const uint64_t *hashes, uint32_t count, uint16_t *chosen)
{
    for (uint32_t at = 0; at < count; at += CRAB_BATCH)
        m->look(m, hashes + at, count - at < CRAB_BATCH ? count - at : CRAB_BATCH, chosen + at);
}

void method_fill(const struct method *m, struct method *table, uint64_t seed)
{
    uint64_t hashes[CRAB_BATCH];
    for (uint32_t at = 0; at < table->buckets; at += CRAB_BATCH) {
        uint32_t count = table->buckets - at < CRAB_BATCH ? table->buckets - at : CRAB_BATCH;
        for (uint32_t i = 0; i < count; i++)
            hashes[i] = draw(seed, at + i + 1ull);
        m->look(m, hashes, count, table->backends + at);
    }
}

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static bool flush(const void *p, size_t size)
{
#ifdef __x86_64__
    for (size_t i = 0; i < size; i += 64)
        _mm_clflush((const char *)p + i);
    _mm_mfence();
    return true;
#else
    (void)p;
    (void)size;
    return false;
#endif
}

double method_ns(const struct method *m, const uint64_t *hashes, uint32_t count, bool cold)
{
    uint16_t chosen[CRAB_BATCH];
    uint64_t spent = 0, start;
    uint32_t done = 0;
    if (!cold) {
        start = now_ns();
        for (; done + CRAB_BATCH <= count; done += CRAB_BATCH)
            m->look(m, hashes + done, CRAB_BATCH, chosen);
        return (double)(now_ns() - start) / done;
    }
    for (; done + CRAB_BATCH <= count; done += CRAB_BATCH) {
        if (!flush(m->backends, m->buckets * sizeof *m->backends) || !flush(m->state, m->state_bytes))
            return -1;
        start = now_ns();
        m->look(m, hashes + done, CRAB_BATCH, chosen);
        spent += now_ns() - start;
    }
    return (double)spent / done;
}
