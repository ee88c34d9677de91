/* SPDX-License-Identifier: MIT */
/* Unaligned loads and stores, and fixed-width pieces of packets. */
#ifndef CRAB_BYTES_H
#define CRAB_BYTES_H

#include <arpa/inet.h>
#include <stdint.h>
#include <string.h>

#include "address.h"

#define crab_likely(x) __builtin_expect(!!(x), 1)
#define crab_unlikely(x) __builtin_expect(!!(x), 0)

/* Code for constants: each call is compiled for the arguments that it has. */
#define CRAB_TEMPLATE static inline __attribute__((always_inline))
/* Code that is seldom run, or has registers enough for itself alone. */
#define CRAB_APART static __attribute__((noinline))

static inline uint16_t load16(const uint8_t *p)
{
    uint16_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline uint32_t load32(const uint8_t *p)
{
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline uint64_t load64(const uint8_t *p)
{
    uint64_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline void store16(uint8_t *p, uint16_t v)
{
    memcpy(p, &v, sizeof v);
}

static inline uint16_t load16_be(const uint8_t *p)
{
    return ntohs(load16(p));
}

static inline void store16_be(uint8_t *p, uint16_t v)
{
    store16(p, htons(v));
}

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "crablb's hash reads words as little-endian; this machine is big-endian"
#endif

/* The first 12 bytes of an IPv4-mapped address (RFC 4291, 2.5.5.2). */
static const uint8_t crab_mapped_prefix[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};

#endif
