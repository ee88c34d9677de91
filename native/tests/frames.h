/* SPDX-License-Identifier: MIT */
/* Frames to the VIP of the tests of races: from 10.0.0.1, to 10.0.0.100:80. */
#ifndef CRAB_TESTS_FRAMES_H
#define CRAB_TESTS_FRAMES_H

#include "batch.h"

/* A SYN that offers, one that joins, or an ACK with MPTCP's keys. */
static inline void make_frame(uint8_t *f, uint32_t *len, uint16_t sport, bool syn, bool joins)
{
    static const uint8_t offer[8] = {2, 4, 5, 180, 42, 2, 1, 1};
    uint8_t join[12] = {30, 12, 0x10}, keys[20] = {30, 20, 1, 1, [12] = (uint8_t)sport};
    memcpy(join + 4, &(uint32_t){crab_token(keys + 12)}, 4);
    const uint8_t *options = syn ? joins ? join : offer : keys;
    size_t n = syn ? joins ? sizeof join : sizeof offer : sizeof keys;
    *len = (uint32_t)(54 + n);
    memset(f, 0, *len);
    memcpy(f, "\x02\0\0\0\0\x02\x02\0\0\0\0\x01\x08\0\x45\0\0", 17);
    f[17] = (uint8_t)(40 + n);
    f[22] = 64;
    f[23] = 6;
    memcpy(f + 26, "\x0a\0\0\x01\x0a\0\0\x64", 8);
    store16(f + 24, (uint16_t)~crab_csum(f + 14, 20));
    store16(f + 34, htons(sport));
    store16(f + 36, htons(80));
    f[41] = syn ? 1 : 2;
    f[46] = (uint8_t)((20 + n) << 2);
    f[47] = syn ? CRAB_SYN : CRAB_ACK;
    memcpy(f + 54, options, n);
    uint16_t right;
    crab_csum_state(f + 14, *len - 14, &right);
    store16(f + 50, right);
}

#endif
