/* SPDX-License-Identifier: MIT */
#include "check.h"
#include "checksum.h"
#include "crablb.h"

/* RFC 1071, section 3: the sum of these is ddf2 (network order). */
static const uint8_t rfc1071[] = {0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7};

/* A plain reference: 16-bit words in network order. */
static uint16_t slow(const uint8_t *p, size_t len)
{
    uint32_t sum = 0;
    for (size_t i = 0; i < len; i++)
        sum += i % 2 ? p[i] : (uint32_t)p[i] << 8;
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return htons((uint16_t)sum);
}

/* A SYN from 10.0.0.1:40000 to 10.0.0.100:80 without options, checksum zero. */
static const uint8_t syn4[40] = {0x45, 0, 0, 40, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 100, 0x9c, 0x40, 0, 80,
                                 1, 2, 3, 4, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0};

int main(void)
{
    CHECK(crab_csum(rfc1071, 8) == htons(0xddf2));
    srand(2);
    for (int round = 0; round < 20000; round++) {
        size_t len = (size_t)rand() % 200;
        uint8_t *p = malloc(len + 1);
        for (size_t i = 0; i < len; i++)
            p[i] = rand() % 3 ? (uint8_t)rand() : 0xff;
        CHECK(crab_csum(p, len) == slow(p, len));
        /* What was summed up before is added, with the carries. */
        uint64_t before = round % 2 ? UINT64_MAX : (uint64_t)rand() << 33;
        CHECK(crab_sum_small(crab_sum_more(before, p, len)) % 0xffff == (crab_sum(p, len) + before % 0xffff) % 0xffff);
        free(p);
    }

    /* Whole are the multiples of 65,535, as are the sums that fold to it. */
    for (int round = 0; round < 100000; round++) {
        uint64_t some = (uint64_t)rand() << 40 ^ (uint64_t)rand() << 20 ^ (uint64_t)rand(), whole = some - some % 0xffff;
        CHECK(crab_is_whole(some) == (crab_fold(some) == 0xffff));
        CHECK(crab_is_whole(whole) && crab_fold(whole) == 0xffff);
        CHECK(!crab_is_whole(whole + 1 + (uint64_t)rand() % 0xfffe));
    }
    CHECK(crab_is_whole(UINT64_MAX) && !crab_is_whole(UINT64_MAX - 1) && crab_is_whole(0xffff) && !crab_is_whole(0xfffe));

    uint8_t ip[41];
    uint16_t right, pseudo = htons(0x0a00 + 0x0001 + 0x0a00 + 0x0064 + 6 + 20);
    memcpy(ip, syn4, 40);
    CHECK(crab_csum_state(ip, 40, &right) == CRAB_CSUM_BAD);
    store16(ip + 36, right);
    CHECK(crab_csum_state(ip, 40, &right) == CRAB_CSUM_OK);
    CHECK(right == load16(ip + 36));
    store16(ip + 36, pseudo);
    uint16_t again;
    CHECK(crab_csum_state(ip, 40, &again) == CRAB_CSUM_PARTIAL);
    CHECK(again == right);
    for (int bit = 0; bit < 16; bit++) {
        store16(ip + 36, right ^ (uint16_t)(1 << bit));
        CHECK(crab_csum_state(ip, 40, &again) == CRAB_CSUM_BAD);
    }
    DONE();
}
