/* SPDX-License-Identifier: MIT */
/* SipHash-1-3 (Aumasson, Bernstein: "SipHash: a fast short-input PRF", 2012, with 1 compression and 3 finalisation
 * rounds), inlined for the two lengths that the packet path hashes. */
#ifndef CRAB_HASH_H
#define CRAB_HASH_H

#include "bytes.h"

struct crab_sip {
    uint64_t v0, v1, v2, v3;
};

static inline uint64_t crab_rotl(uint64_t x, int b)
{
    return (x << b) | (x >> (64 - b));
}

static inline void crab_sip_round(struct crab_sip *s)
{
    s->v0 += s->v1;
    s->v1 = crab_rotl(s->v1, 13) ^ s->v0;
    s->v0 = crab_rotl(s->v0, 32);
    s->v2 += s->v3;
    s->v3 = crab_rotl(s->v3, 16) ^ s->v2;
    s->v0 += s->v3;
    s->v3 = crab_rotl(s->v3, 21) ^ s->v0;
    s->v2 += s->v1;
    s->v1 = crab_rotl(s->v1, 17) ^ s->v2;
    s->v2 = crab_rotl(s->v2, 32);
}

static inline struct crab_sip crab_sip_init(const uint8_t key[16])
{
    uint64_t k0 = load64(key), k1 = load64(key + 8);
    return (struct crab_sip){k0 ^ 0x736f6d6570736575ull, k1 ^ 0x646f72616e646f6dull, k0 ^ 0x6c7967656e657261ull,
                             k1 ^ 0x7465646279746573ull};
}

static inline void crab_sip_word(struct crab_sip *s, uint64_t word)
{
    s->v3 ^= word;
    crab_sip_round(s);
    s->v0 ^= word;
}

/* last: the remaining 0 to 7 bytes, with the length modulo 256 in the top byte. */
static inline uint64_t crab_sip_end(struct crab_sip *s, uint64_t last)
{
    crab_sip_word(s, last);
    s->v2 ^= 0xff;
    crab_sip_round(s);
    crab_sip_round(s);
    crab_sip_round(s);
    return s->v0 ^ s->v1 ^ s->v2 ^ s->v3;
}

/* addrs: source and destination address, as they follow each other in the IP header; ports: both, likewise. */
static inline uint64_t crab_hash4(const struct crab_sip *init, const uint8_t *addrs, const uint8_t *ports)
{
    struct crab_sip s = *init;
    crab_sip_word(&s, load64(addrs));
    return crab_sip_end(&s, load32(ports) | 12ull << 56);
}

static inline uint64_t crab_hash6(const struct crab_sip *init, const uint8_t *addrs, const uint8_t *ports)
{
    struct crab_sip s = *init;
    for (int i = 0; i < 32; i += 8)
        crab_sip_word(&s, load64(addrs + i));
    return crab_sip_end(&s, load32(ports) | 36ull << 56);
}

#endif
