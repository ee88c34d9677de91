/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Families of addresses, for native/ and for BPF programs.
 *
 * Inside, an IPv4 address is an IPv4-mapped one.  On the wire there are none (RFC 6890: neither source nor destination), but
 * anybody can send one: whoever keeps an IPv6 header's address in 16 bytes must see first that it is not mapped, or takes it
 * for the IPv4 address. */
#ifndef CRAB_ADDRESS_H
#define CRAB_ADDRESS_H

#include "maps.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "as everywhere in the hot loop");

/* Do an address' first three words, as they lie in memory, make it an IPv4-mapped one (RFC 4291, 2.5.5.2)? */
CRAB_INLINE int crab_words_are_mapped(__u32 a, __u32 b, __u32 c)
{
    return !(a | b) && c == 0xffff0000;
}

/* The same of an address. */
CRAB_INLINE int crab_is_mapped(const __u8 addr[16])
{
    __u32 w[3];
    __builtin_memcpy(w, addr, sizeof w);
    return crab_words_are_mapped(w[0], w[1], w[2]);
}

/* Is one of an IPv6 header's two addresses mapped? */
CRAB_INLINE int crab_either_is_mapped(const __u8 addrs[32])
{
    return crab_is_mapped(addrs) || crab_is_mapped(addrs + 16);
}

#endif
