/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* SipHash-1-3 (Aumasson, Bernstein: "SipHash: a fast short-input PRF", 2012, with 1 compression and 3 finalisation
 * rounds), for native/ and for BPF programs: by this both find the same connection. */
#ifndef CRAB_SIPHASH_H
#define CRAB_SIPHASH_H

#include "maps.h"

struct crab_sip {
    __u64 v0, v1, v2, v3;
};

CRAB_INLINE __u64 crab_rotl(__u64 x, int b)
{
    return (x << b) | (x >> (64 - b));
}

CRAB_INLINE void crab_sip_round(struct crab_sip *s)
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

/* k0, k1: the key's two words. */
CRAB_INLINE struct crab_sip crab_sip_start(__u64 k0, __u64 k1)
{
    return (struct crab_sip){k0 ^ 0x736f6d6570736575ull, k1 ^ 0x646f72616e646f6dull, k0 ^ 0x6c7967656e657261ull,
                             k1 ^ 0x7465646279746573ull};
}

CRAB_INLINE void crab_sip_word(struct crab_sip *s, __u64 word)
{
    s->v3 ^= word;
    crab_sip_round(s);
    s->v0 ^= word;
}

/* last: the remaining 0 to 7 bytes, with the length modulo 256 in the top byte. */
CRAB_INLINE __u64 crab_sip_end(struct crab_sip *s, __u64 last)
{
    crab_sip_word(s, last);
    s->v2 ^= 0xff;
    crab_sip_round(s);
    crab_sip_round(s);
    crab_sip_round(s);
    return s->v0 ^ s->v1 ^ s->v2 ^ s->v3;
}

#endif
