/* SPDX-License-Identifier: MIT */
/* The Internet checksum (RFC 1071) and its incremental update (RFC 1624).
 *
 * Sums are taken over 16-bit words as they lie in memory: one's-complement addition does not care about byte order
 * (RFC 1071, 2.B), so nothing is ever swapped. */
#ifndef CRAB_CHECKSUM_H
#define CRAB_CHECKSUM_H

#include "bytes.h"
#include "valid.h"

/* One's-complement addition: two instructions. */
static inline uint64_t crab_add(uint64_t a, uint64_t b)
{
    a += b;
    return a + (a < b);
}

/* sum and the words of len bytes, in one's complement of 64 bits. */
CRAB_TEMPLATE uint64_t crab_sum_more(uint64_t sum, const uint8_t *p, size_t len)
{
    for (; len >= 16; p += 16, len -= 16)
        sum = crab_add(crab_add(sum, load64(p)), load64(p + 8));
    if (len & 8) {
        sum = crab_add(sum, load64(p));
        p += 8;
    }
    if (len & 4) {
        sum = crab_add(sum, load32(p));
        p += 4;
    }
    if (crab_unlikely(len & 3)) {
        if (len & 2) {
            sum = crab_add(sum, load16(p));
            p += 2;
        }
        if (len & 1)
            sum = crab_add(sum, *p); /* an odd last byte is the first of a word whose second is zero */
    }
    return sum;
}

/* The same below 2^33: some of them can be added up as they are. */
static inline uint64_t crab_sum_small(uint64_t sum)
{
    return (sum & 0xffffffff) + (sum >> 32);
}

/* Sum of len bytes, below 2^33. */
CRAB_TEMPLATE uint64_t crab_sum(const uint8_t *p, size_t len)
{
    return crab_sum_small(crab_sum_more(0, p, len));
}

/* To 16 bits, by end-around carry: a number and itself turned by half its width add up in the upper half to what both halves
 * make together, with the carry that came out at the top. */
static inline uint16_t crab_fold(uint64_t sum)
{
    sum += sum << 32 | sum >> 32;
    uint32_t half = (uint32_t)(sum >> 32);
    half += half << 16 | half >> 16;
    return (uint16_t)(half >> 16);
}

/* ~sum, as a number to add: taking words away is adding their complement (RFC 1624, equation 3). */
static inline uint64_t crab_sum_less(uint64_t sum)
{
    return (uint16_t)~crab_fold(sum);
}

/* Sum, in 64 bits, of the pseudo-header of a TCP segment of tcp_len bytes (RFC 9293, 3.1; RFC 8200, 8.1). */
static inline uint64_t crab_sum_pseudo(const uint8_t *addrs, size_t addrs_len, uint32_t tcp_len)
{
    return crab_sum_more((uint64_t)htons((uint16_t)tcp_len) + htons(6 /* IPPROTO_TCP */), addrs, addrs_len);
}

#endif
