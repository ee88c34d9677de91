/* SPDX-License-Identifier: MIT */
/* The token of an MPTCP connection (RFC 8684, 3.2): the first 32 bits of its server's key's SHA-256 (FIPS 180-4), of which the
 * constants are made as the standard says.  Apart from native/joins.c; also the fuzzer's oracle's. */
#ifndef SIM_TOKEN_H
#define SIM_TOKEN_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

/* The fractional part of a prime's square or cube root, in 2^32nds. */
static uint32_t token_root(uint32_t prime, int power)
{
    unsigned __int128 low = 0, high = (unsigned __int128)20 << 32;
    while (high - low > 1) {
        unsigned __int128 mid = (low + high) / 2;
        /* power 2: mid^2 against prime * 2^64; power 3: mid^3 / 2^32 against the same, which loses nothing of 40 bits. */
        unsigned __int128 square = mid * mid, right = (unsigned __int128)prime << 64;
        bool above = power == 2 ? square > right : (square >> 32) * mid + ((square & 0xffffffff) * mid >> 32) >= right;
        *(above ? &high : &low) = mid;
    }
    return (uint32_t)low;
}

static uint32_t token_turn(uint32_t x, int n)
{
    return x >> n | x << (32 - n);
}

/* Both in network order. */
static void token_of(const uint8_t key[8], uint8_t token[4])
{
    static uint32_t k[64], start[8];
    if (!start[0]) {
        uint32_t n = 0;
        for (uint32_t p = 2; n < 64; p++) {
            bool prime = true;
            for (uint32_t d = 2; d * d <= p; d++)
                prime &= p % d != 0;
            if (prime && n < 8)
                start[n] = token_root(p, 2);
            if (prime)
                k[n++] = token_root(p, 3);
        }
    }
    uint32_t h[8], w[64] = {[2] = 0x80000000, [15] = 64};
    for (int i = 0; i < 8; i++)
        w[i / 4] = w[i / 4] << 8 | key[i];
    memcpy(h, start, sizeof h);
    for (int i = 16; i < 64; i++)
        w[i] = w[i - 16] + w[i - 7] + (token_turn(w[i - 15], 7) ^ token_turn(w[i - 15], 18) ^ w[i - 15] >> 3) +
               (token_turn(w[i - 2], 17) ^ token_turn(w[i - 2], 19) ^ w[i - 2] >> 10);
    for (int i = 0; i < 64; i++) {
        uint32_t t1 = h[7] + (token_turn(h[4], 6) ^ token_turn(h[4], 11) ^ token_turn(h[4], 25)) +
                      ((h[4] & h[5]) ^ (~h[4] & h[6])) + k[i] + w[i];
        uint32_t t2 = (token_turn(h[0], 2) ^ token_turn(h[0], 13) ^ token_turn(h[0], 22)) +
                      ((h[0] & h[1]) ^ (h[0] & h[2]) ^ (h[1] & h[2]));
        memmove(h + 1, h, 7 * sizeof *h);
        h[4] += t1;
        h[0] = t1 + t2;
    }
    uint32_t first = start[0] + h[0];
    for (int i = 0; i < 4; i++)
        token[i] = (uint8_t)(first >> (24 - 8 * i));
}

#endif
