/* SPDX-License-Identifier: MIT */
/* The Internet checksum (RFC 1071) and its incremental update (RFC 1624).
 *
 * Sums are taken over 16-bit words as they lie in memory: one's-complement addition does not care about byte order
 * (RFC 1071, 2.B), so nothing is ever swapped. */
#ifndef CRAB_CHECKSUM_H
#define CRAB_CHECKSUM_H

#include "bytes.h"

/* Unfolded sum of len bytes.  Adding 32-bit halves into 64 bits cannot overflow for any len < 2^32. */
static inline uint64_t crab_sum(const uint8_t *p, size_t len)
{
    uint64_t sum = 0;
    for (; len >= 8; p += 8, len -= 8) {
        uint64_t w = load64(p);
        sum += (w & 0xffffffff) + (w >> 32);
    }
    if (len >= 4) {
        sum += load32(p);
        p += 4;
        len -= 4;
    }
    if (len >= 2) {
        sum += load16(p);
        p += 2;
        len -= 2;
    }
    if (len)
        sum += *p; /* an odd last byte is the first of a word whose second is zero */
    return sum;
}

static inline uint16_t crab_fold(uint64_t sum)
{
    sum = (sum & 0xffffffff) + (sum >> 32);
    sum = (sum & 0xffffffff) + (sum >> 32);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)sum;
}

/* ~sum, as a number to add: taking words away is adding their complement (RFC 1624, equation 3). */
static inline uint64_t crab_sum_less(uint64_t sum)
{
    return (uint16_t)~crab_fold(sum);
}

/* Sum of the pseudo-header of a TCP segment of tcp_len bytes (RFC 9293, 3.1; RFC 8200, 8.1). */
static inline uint64_t crab_sum_pseudo(const uint8_t *addrs, size_t addrs_len, uint32_t tcp_len)
{
    return crab_sum(addrs, addrs_len) + htons((uint16_t)tcp_len) + htons(6 /* IPPROTO_TCP */);
}

#endif
