/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* What is forwarded by MAC address stays the same packet, so it could go round for ever: it loses a hop, as it would at a
 * router.  For native/ and the XDP program. */
#ifndef CRAB_HOP_H
#define CRAB_HOP_H

#include "valid.h"

/* May an IPv4 or IPv6 packet go on? */
CRAB_INLINE int crab_has_hop(const __u8 *ip, int family)
{
    return ip[family == 4 ? 8 : 7] > 1;
}

/* One hop less; the IPv4 header's checksum stays as right as it is (RFC 1624). */
CRAB_INLINE void crab_take_hop(__u8 *ip, int family)
{
    ip[family == 4 ? 8 : 7]--;
    if (family != 4)
        return;
    __u32 sum = crab_read16(ip + 10) + 0x100;
    sum += sum >= 0xffff;
    ip[10] = (__u8)(sum >> 8);
    ip[11] = (__u8)sum;
}

#endif
