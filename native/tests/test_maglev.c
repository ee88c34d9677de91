/* SPDX-License-Identifier: MIT */
#include "check.h"
#include "crablb.h"

#define SIZE 65537
static uint16_t a[SIZE], b[SIZE];
static const uint8_t key[16] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};

int main(void)
{
    struct crab_maglev_member m[100];
    for (uint16_t i = 0; i < 100; i++) {
        m[i] = (struct crab_maglev_member){.addr = {[10] = 0xff, [11] = 0xff, 10, 0, 1, (uint8_t)i}, .weight = 1, .backend = i};
    }
    uint32_t share[100] = {0}, moved = 0;
    CHECK(crab_maglev_build(a, SIZE, m, 100, key) == 0);
    for (int i = 0; i < SIZE; i++)
        share[a[i]]++;
    for (int i = 0; i < 100; i++)
        CHECK(share[i] == SIZE / 100 || share[i] == SIZE / 100 + 1);

    /* the order of members does not matter */
    struct crab_maglev_member swapped[100];
    for (int i = 0; i < 100; i++)
        swapped[i] = m[(i * 37) % 100];
    CHECK(crab_maglev_build(b, SIZE, swapped, 100, key) == 0);
    CHECK(!memcmp(a, b, sizeof a));

    /* a backend fails: its slots move, and no others; with half its weight half of them do */
    m[17].weight = 0;
    m[17].full = 1;
    CHECK(crab_maglev_build(b, SIZE, m, 100, key) == 0);
    memset(share, 0, sizeof share);
    for (int i = 0; i < SIZE; i++) {
        CHECK(a[i] == 17 ? b[i] != 17 : a[i] == b[i]);
        share[b[i]]++;
    }
    for (int i = 0; i < 100; i++)
        CHECK(i == 17 || (share[i] >= SIZE / 99 && share[i] <= SIZE / 99 + 2));
    m[17].weight = 2;
    m[17].full = 4;
    for (int i = 0; i < 100; i++)
        if (i != 17)
            m[i].weight = m[i].full = 4;
    CHECK(crab_maglev_build(b, SIZE, m, 100, key) == 0);
    memset(share, 0, sizeof share);
    for (int i = 0; i < SIZE; i++) {
        CHECK(a[i] == 17 || a[i] == b[i]);
        share[b[i]]++;
    }
    CHECK(share[17] > SIZE / 199 - 5 && share[17] < SIZE / 199 + 5);
    for (int i = 0; i < 100; i++)
        m[i].full = m[i].weight = 1;
    memset(share, 0, sizeof share);
    for (int i = 0; i < SIZE; i++)
        share[a[i]]++;

    /* a backend goes: its slots must move, and few others (the paper: section 5.3) */
    m[17].full = m[17].weight = 0;
    CHECK(crab_maglev_build(b, SIZE, m, 100, key) == 0);
    for (int i = 0; i < SIZE; i++) {
        CHECK(b[i] != 17);
        moved += a[i] != b[i];
    }
    CHECK(moved < share[17] * 3);

    /* weights */
    memset(share, 0, sizeof share);
    m[0].weight = m[0].full = 3;
    m[1].weight = 1;
    CHECK(crab_maglev_build(a, SIZE, m, 2, key) == 0);
    for (int i = 0; i < SIZE; i++)
        share[a[i]]++;
    CHECK(share[0] > SIZE * 0.749 && share[0] < SIZE * 0.751);

    /* nobody to choose */
    CHECK(crab_maglev_build(a, 7, m, 0, key) == 0);
    CHECK(a[0] == CRAB_NO_BACKEND && a[6] == CRAB_NO_BACKEND);
    DONE();
}
