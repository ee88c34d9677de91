/* SPDX-License-Identifier: MIT */
/* The hash of a connection, SipHash-1-3, inlined for the two lengths that the packet path hashes. */
#ifndef CRAB_HASH_H
#define CRAB_HASH_H

#include "bytes.h"
#include "siphash.h"

static inline struct crab_sip crab_sip_init(const uint8_t key[16])
{
    return crab_sip_start(load64(key), load64(key + 8));
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
