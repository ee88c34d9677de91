/* SPDX-License-Identifier: MIT */
/* A TCP packet to a VIP: 10.0.0.1 to 10.0.0.100, or fd00::1 to fd00::64. */
#ifndef CRAB_SEGMENT_H
#define CRAB_SEGMENT_H

#include <arpa/inet.h>

#include "bytes.h"
#include "crablb.h"

static uint16_t to_port = 80;

/* A TCP frame with headroom in front of it, in an allocation of exactly that size. */
static struct crab_frame make(uint8_t **memory, int family, uint16_t sport, uint8_t flags, uint32_t seq,
                              const uint8_t *options, size_t n, size_t payload)
{
    size_t l4 = family == 4 ? 34 : 54, len = l4 + 20 + n + payload;
    *memory = malloc(CRAB_HEADROOM + len);
    uint8_t *f = *memory + CRAB_HEADROOM;
    memset(f, 0, len);
    memcpy(f, "\x02\0\0\0\0\x02\x02\0\0\0\0\x01", 12);
    store16_be(f + 12, family == 4 ? 0x0800 : 0x86dd);
    uint8_t *ip = f + 14, *tcp = f + l4;
    if (family == 4) {
        ip[0] = 0x45;
        store16_be(ip + 2, (uint16_t)(len - 14));
        ip[8] = 64;
        ip[9] = 6;
        memcpy(ip + 12, "\x0a\0\0\x01\x0a\0\0\x64", 8);
        store16(ip + 10, (uint16_t)~crab_csum(ip, 20));
    } else {
        ip[0] = 0x60;
        store16_be(ip + 4, (uint16_t)(len - l4));
        ip[6] = 6;
        ip[7] = 64;
        ip[8] = 0xfd;
        ip[23] = 1;
        ip[24] = 0xfd;
        ip[39] = 0x64;
    }
    store16_be(tcp, sport);
    store16_be(tcp + 2, to_port);
    memcpy(tcp + 4, &(uint32_t){htonl(seq)}, 4);
    tcp[12] = (uint8_t)((20 + n) << 2);
    tcp[13] = flags;
    memcpy(tcp + 20, options, n);
    for (size_t i = 0; i < payload; i++)
        tcp[20 + n + i] = (uint8_t)(i * 7 + 1);
    uint16_t right;
    crab_csum_state(ip, len - 14, &right);
    store16(tcp + 16, right);
    return (struct crab_frame){.data = f, .len = (uint32_t)len};
}

#endif
