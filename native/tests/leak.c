/* SPDX-License-Identifier: MIT */
/* Loses what a core has: `make test` looks whether that is found. */
#include "check.h"
#include "crablb.h"

int main(void)
{
    static uint64_t counters[CRAB_COUNTERS];
    for (int i = 0; i < 8; i++)
        CHECK(crab_core_new(64, counters));
    DONE();
}
