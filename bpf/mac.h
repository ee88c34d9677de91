/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Whose a frame is: an XDP program sees also what a switch floods, and all in promiscuous mode. */
#ifndef CRAB_MAC_H
#define CRAB_MAC_H

#include "maps.h"

/* Is a frame sent to one of these MAC addresses?  An interface of which nothing was said (NULL) takes all. */
CRAB_INLINE int crab_is_to(const struct crab_macs *macs, const __u8 *frame)
{
    __u32 low;
    __u16 high;
    if (!macs)
        return 1;
    __builtin_memcpy(&low, frame, 4);
    __builtin_memcpy(&high, frame + 4, 2);
    __u64 to = low | (__u64)high << 32;
#pragma unroll
    for (int i = 0; i < CRAB_MAX_MACS; i++)
        if (macs->list[i] == to)
            return 1;
    return 0;
}

#endif
