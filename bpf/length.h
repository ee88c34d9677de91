/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Variable lengths that are given to helpers. */
#ifndef CRAB_LENGTH_H
#define CRAB_LENGTH_H

#include <bpf/bpf_helpers.h>

#include "maps.h"

/* n, which is from 1 to max, so that the verifier sees it too.
 *
 * It believes what is compared of the very register that the helper gets, all 64 bits.  The compiler compares a copy of
 * 32 bits, or, as it knows what values n can have, nothing at all: hence the barriers.  And it makes n != 0 of n >= 1,
 * from which Linux before 6.8 learns no lower bound: hence counted from 0. */
CRAB_INLINE __u32 crab_length_within(__u32 n, __u32 max)
{
    __u64 less_one = (__u64)n - 1;
    barrier_var(less_one);
    if (less_one > max - 1)
        less_one = max - 1;
    barrier_var(less_one);
    return (__u32)less_one + 1;
}

#endif
