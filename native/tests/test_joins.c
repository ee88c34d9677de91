/* SPDX-License-Identifier: MIT */
#include "check.h"
#include "joins.h"

#define CAPACITY 64

static bool all[65536], services[65536], backends[65536];

int main(void)
{
    /* FIPS 180-4 by sha256sum: printf '12345678', and eight bytes of nought and of ff. */
    CHECK_BYTES(&(uint32_t){crab_token((const uint8_t *)"12345678")}, "\xef\x79\x7c\x81", 4);
    CHECK_BYTES(&(uint32_t){crab_token((const uint8_t *)"\0\0\0\0\0\0\0\0")}, "\xaf\x55\x70\xf5", 4);
    CHECK_BYTES(&(uint32_t){crab_token((const uint8_t *)"\xff\xff\xff\xff\xff\xff\xff\xff")}, "\x12\xa3\xae\x44", 4);

    struct crab_joins *joins = crab_joins_new(CAPACITY);
    CHECK(joins);
    memset(all, true, sizeof all);

    /* Token, service and backend of any value, nought and the highest included; one token is a service's own. */
    const uint32_t tokens[] = {0, 1, 0xffffffff, 0x80000000};
    const uint16_t ids[] = {0, 1, 65534}, of[] = {0, 7, 65535};
    for (int t = 0; t < 4; t++)
        for (int s = 0; s < 3; s++) {
            CHECK(crab_joins_find(joins, tokens[t], of[s]) == CRAB_NO_BACKEND);
            crab_joins_learn(joins, tokens[t], of[s], ids[(t + s) % 3]);
            CHECK(crab_joins_find(joins, tokens[t], of[s]) == ids[(t + s) % 3]);
            crab_joins_learn(joins, tokens[t], of[s], ids[(t + s + 1) % 3]); /* it is somewhere else now */
            CHECK(crab_joins_find(joins, tokens[t], of[s]) == ids[(t + s + 1) % 3]);
        }

    /* What has no backend or no service any more is forgotten, and nothing else. */
    memset(services, true, sizeof services);
    memset(backends, true, sizeof backends);
    services[7] = false;
    backends[65534] = false;
    crab_joins_keep(joins, all, all);
    for (int round = 0; round < 2; round++) {
        for (int t = 0; t < 4; t++)
            for (int s = 0; s < 3; s++) {
                uint16_t id = ids[(t + s + 1) % 3];
                bool gone = round && (of[s] == 7 || id == 65534);
                CHECK(crab_joins_find(joins, tokens[t], of[s]) == (gone ? CRAB_NO_BACKEND : id));
            }
        crab_joins_keep(joins, backends, services);
    }

    /* However many come, there is room for so many: the newest are there, and each leads where it was said to. */
    for (uint32_t token = 1; token <= 100000; token++) {
        crab_joins_learn(joins, token, 1, (uint16_t)(token % 1000));
        CHECK(crab_joins_find(joins, token, 1) == token % 1000);
    }
    uint32_t there = 0;
    for (uint32_t token = 1; token <= 100000; token++) {
        uint16_t backend = crab_joins_find(joins, token, 1);
        CHECK(backend == CRAB_NO_BACKEND || (backend == token % 1000 && token > 100000 - 20 * CAPACITY));
        there += backend != CRAB_NO_BACKEND;
    }
    CHECK(there == CAPACITY);

    /* A connection that is told of again and again takes one place. */
    for (int i = 0; i < 1000; i++)
        crab_joins_learn(joins, 100000, 1, 5);
    there = 0;
    for (uint32_t token = 1; token <= 100000; token++)
        there += crab_joins_find(joins, token, 1) != CRAB_NO_BACKEND;
    CHECK(there == CAPACITY);

    crab_joins_free(joins);
    crab_joins_free(NULL);
    DONE();
}
