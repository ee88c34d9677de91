/* SPDX-License-Identifier: MIT */
#include "check.h"
#include "crablb.h"

#define SIZE 65537
static uint16_t a[SIZE], b[SIZE];
static const uint8_t key[16] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};

typedef int builder(uint16_t *, uint32_t, const struct crab_table_member *, uint32_t, const uint8_t *);

/* Each has its share of slots, give or take so many, but nobody more than one in `above` beyond it. */
static void table(builder *build, uint32_t around, uint32_t above, double moves)
{
    struct crab_table_member m[100];
    for (uint16_t i = 0; i < 100; i++) {
        m[i] = (struct crab_table_member){.addr = {[10] = 0xff, [11] = 0xff, 10, 0, 1, (uint8_t)i}, .weight = 1, .backend = i};
    }
    uint32_t share[100] = {0}, moved = 0;
    CHECK(build(a, SIZE, m, 100, key) == 0);
    for (int i = 0; i < SIZE; i++)
        share[a[i]]++;
    for (int i = 0; i < 100; i++)
        CHECK(share[i] >= SIZE / 100 - around && share[i] <= SIZE / 100 + 1 + (above ? SIZE / 100 / above : 0));

    /* the order of members does not matter */
    struct crab_table_member swapped[100];
    for (int i = 0; i < 100; i++)
        swapped[i] = m[(i * 37) % 100];
    CHECK(build(b, SIZE, swapped, 100, key) == 0);
    CHECK(!memcmp(a, b, sizeof a));

    /* a backend fails: its slots move, and no others; with half its weight half of them do */
    m[17].weight = 0;
    m[17].full = 1;
    CHECK(build(b, SIZE, m, 100, key) == 0);
    memset(share, 0, sizeof share);
    for (int i = 0; i < SIZE; i++) {
        CHECK(a[i] == 17 ? b[i] != 17 : a[i] == b[i]);
        share[b[i]]++;
    }
    for (int i = 0; i < 100; i++)
        CHECK(i == 17 || (share[i] >= SIZE / 99 - around && share[i] <= SIZE / 99 + 2 + (above ? SIZE / 99 / above : 0)));
    m[17].weight = 2;
    m[17].full = 4;
    for (int i = 0; i < 100; i++)
        if (i != 17)
            m[i].weight = m[i].full = 4;
    CHECK(build(b, SIZE, m, 100, key) == 0);
    memset(share, 0, sizeof share);
    for (int i = 0; i < SIZE; i++) {
        CHECK(a[i] == 17 || a[i] == b[i]);
        share[b[i]]++;
    }
    CHECK(share[17] > SIZE / 199 - 5 - around / 2 && share[17] < SIZE / 199 + 5 + around / 2);
    for (int i = 0; i < 100; i++)
        m[i].full = m[i].weight = 1;
    memset(share, 0, sizeof share);
    for (int i = 0; i < SIZE; i++)
        share[a[i]]++;

    /* a backend goes: its slots must move, and few others */
    m[17].full = m[17].weight = 0;
    CHECK(build(b, SIZE, m, 100, key) == 0);
    for (int i = 0; i < SIZE; i++) {
        CHECK(b[i] != 17);
        moved += a[i] != b[i];
    }
    CHECK(moved < share[17] * moves);

    /* weights */
    memset(share, 0, sizeof share);
    m[0].weight = m[0].full = 3;
    m[1].weight = 1;
    CHECK(build(a, SIZE, m, 2, key) == 0);
    for (int i = 0; i < SIZE; i++)
        share[a[i]]++;
    CHECK(share[0] > SIZE * 0.75 - 50 - around && share[0] < SIZE * 0.75 + 50 + around);

    /* nobody to choose */
    CHECK(build(a, 7, m, 0, key) == 0);
    CHECK(a[0] == CRAB_NO_BACKEND && a[6] == CRAB_NO_BACKEND);
}

/* The orders of no two members of a rendezvous table run alike: with many keys nobody has much less than its share. */
static void shares(uint16_t count, uint32_t least)
{
    static struct crab_table_member m[1000];
    for (uint16_t i = 0; i < count; i++)
        m[i] = (struct crab_table_member){
            .addr = {[10] = 0xff, [11] = 0xff, 10, 0, (uint8_t)(i >> 8), (uint8_t)i}, .weight = 1, .backend = i};
    for (uint8_t k = 0; k < 100; k++) {
        uint8_t one[16] = {k};
        uint32_t share[1000] = {0};
        CHECK(crab_rendezvous_build(a, SIZE, m, count, one) == 0);
        for (int i = 0; i < SIZE; i++)
            share[a[i]]++;
        for (uint16_t i = 0; i < count; i++)
            CHECK(share[i] * 100u * count >= SIZE * least);
    }
}

int main(void)
{
    table(crab_maglev_build, 0, 0, 3); /* moves: the paper, section 5.3 */
    table(crab_rendezvous_build, 100, 32, 1.1);
    shares(100, 88);
    shares(1000, 60);
    DONE();
}
