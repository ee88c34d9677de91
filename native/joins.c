/* SPDX-License-Identifier: MIT */
#include "joins.h"

#include <stdlib.h>
#include <sys/random.h>

#include "bytes.h"
#include "hash.h"

#define BACKEND 0xffffull

static inline uint64_t word_of(uint32_t token, uint16_t service, uint16_t backend)
{
    return (uint64_t)token << 32 | (uint64_t)service << 16 | (uint16_t)~backend;
}

static inline _Atomic(uint64_t) *set_of(const struct crab_joins *joins, uint32_t token, uint16_t service)
{
    struct crab_sip s = joins->hash_init;
    return &joins->words[(crab_sip_end(&s, token | (uint64_t)service << 32 | 6ull << 56) & joins->mask) * CRAB_JOINS_SET];
}

struct crab_joins *crab_joins_new(uint32_t tokens)
{
    uint8_t key[16];
    struct crab_joins *joins = calloc(1, sizeof *joins);
    if (!joins)
        return NULL;
    uint64_t sets = 1;
    while (sets * CRAB_JOINS_SET < tokens)
        sets *= 2;
    joins->words = calloc(sets, CRAB_JOINS_SET * sizeof *joins->words);
    if (!joins->words || getrandom(key, sizeof key, 0) != sizeof key) {
        crab_joins_free(joins);
        return NULL;
    }
    joins->mask = sets - 1;
    joins->hash_init = crab_sip_init(key);
    return joins;
}

void crab_joins_free(struct crab_joins *joins)
{
    if (joins)
        free(joins->words);
    free(joins);
}

uint16_t crab_joins_find(const struct crab_joins *joins, uint32_t token, uint16_t service)
{
    _Atomic(uint64_t) *set = set_of(joins, token, service);
    for (int i = 0; i < CRAB_JOINS_SET; i++) {
        uint64_t word = atomic_load_explicit(&set[i], memory_order_relaxed);
        if ((word ^ word_of(token, service, 0)) <= BACKEND && word & BACKEND)
            return (uint16_t)~word;
    }
    return CRAB_NO_BACKEND;
}

void crab_joins_learn(struct crab_joins *joins, uint32_t token, uint16_t service, uint16_t backend)
{
    _Atomic(uint64_t) *set = set_of(joins, token, service);
    uint64_t coming = word_of(token, service, backend);
    for (int i = 0; i < CRAB_JOINS_SET; i++) {
        uint64_t there = atomic_exchange_explicit(&set[i], coming, memory_order_relaxed);
        if (!(there & BACKEND) || (there ^ coming) <= BACKEND)
            return; /* the place was free, or the connection's own */
        coming = there;
    }
}

void crab_joins_keep(struct crab_joins *joins, const bool *backends, const bool *services)
{
    for (uint64_t i = 0; i < (joins->mask + 1) * CRAB_JOINS_SET; i++) {
        uint64_t word = atomic_load_explicit(&joins->words[i], memory_order_relaxed);
        if (word & BACKEND && !(backends[(uint16_t)~word] && services[(uint16_t)(word >> 16)]))
            atomic_compare_exchange_strong_explicit(&joins->words[i], &word, 0, memory_order_relaxed, memory_order_relaxed);
    }
}

/* The key that sets are found by, then the words.  Others may learn meanwhile: each word is whole. */
uint64_t crab_joins_size(const struct crab_joins *joins)
{
    return sizeof joins->hash_init + (joins->mask + 1) * CRAB_JOINS_SET * sizeof *joins->words;
}

void crab_joins_give(const struct crab_joins *joins, uint8_t *out)
{
    memcpy(out, &joins->hash_init, sizeof joins->hash_init);
    out += sizeof joins->hash_init;
    for (uint64_t i = 0; i < (joins->mask + 1) * CRAB_JOINS_SET; i++) {
        uint64_t word = atomic_load_explicit(&joins->words[i], memory_order_relaxed);
        memcpy(out + i * sizeof word, &word, sizeof word);
    }
}

void crab_joins_take(struct crab_joins *joins, const uint8_t *given)
{
    memcpy(&joins->hash_init, given, sizeof joins->hash_init);
    memcpy((void *)joins->words, given + sizeof joins->hash_init, crab_joins_size(joins) - sizeof joins->hash_init);
}

/* ---- SHA-256 (FIPS 180-4) of a key, whose length is one block's ---- */

static const uint32_t rounds[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01,
    0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc,
    0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147,
    0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08,
    0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
    0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static inline uint32_t right(uint32_t x, int n)
{
    return x >> n | x << (32 - n);
}

uint32_t crab_token(const uint8_t *key)
{
    static const uint32_t first[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    uint32_t w[64] = {ntohl(load32(key)), ntohl(load32(key + 4)), 1u << 31, [15] = 64}; /* the padding; bits */
    for (int i = 16; i < 64; i++) {
        uint32_t a = w[i - 15], b = w[i - 2];
        w[i] = w[i - 16] + (right(a, 7) ^ right(a, 18) ^ a >> 3) + w[i - 7] + (right(b, 17) ^ right(b, 19) ^ b >> 10);
    }
    uint32_t a = first[0], b = first[1], c = first[2], d = first[3], e = first[4], f = first[5], g = first[6], h = first[7];
    for (int i = 0; i < 64; i++) {
        uint32_t one = h + (right(e, 6) ^ right(e, 11) ^ right(e, 25)) + ((e & f) ^ (~e & g)) + rounds[i] + w[i];
        uint32_t two = (right(a, 2) ^ right(a, 13) ^ right(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
        h = g, g = f, f = e, e = d + one;
        d = c, c = b, b = a, a = one + two;
    }
    return htonl(a + first[0]);
}
