/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Which frames go to handlers, for native/ and the XDP program: both find the same. */
#ifndef CRAB_MATCH_H
#define CRAB_MATCH_H

#include "address.h"

#define CRAB_ETH_TYPE 12

CRAB_INLINE __be16 crab_match_load16(const __u8 *p)
{
    __be16 value;
    __builtin_memcpy(&value, p, 2);
    return value;
}

CRAB_INLINE __be16 crab_match_be16(__u16 value)
{
    return __builtin_bswap16(value);
}

/* Where a frame's IP header begins, and what is behind it and its options: bytes; 0: it has none. */
struct crab_where {
    __u8 l3, l4;
};

/* What a frame has.  Only what is wholly there counts: later fragments have no port, nor has a frame that ends before it. */
CRAB_INLINE struct crab_match crab_match_of(const __u8 *frame, const __u8 *end, struct crab_where *where)
{
    struct crab_match m = {};
    const __u8 *l3 = frame + 14;
    *where = (struct crab_where){};
    if (l3 > end)
        return m;
    m.ethertype = crab_match_load16(frame + CRAB_ETH_TYPE);
#pragma GCC unroll 2
    for (int tags = 0; tags < 2; tags++) {
        if (m.ethertype != crab_match_be16(0x8100) && m.ethertype != crab_match_be16(0x88a8))
            break;
        if (l3 + 4 > end)
            return m;
        m.ethertype = crab_match_load16(l3 + 2);
        l3 += 4;
    }
    m.fields = CRAB_MATCH_ETHERTYPE;
    const __u8 *l4;
    if (m.ethertype == crab_match_be16(0x0800)) {
        if (l3 + 20 > end || l3[0] >> 4 != 4 || (l3[0] & 15) < 5)
            return m;
        m.addr[10] = m.addr[11] = 0xff;
        __builtin_memcpy(m.addr + 12, l3 + 16, 4);
        m.proto = l3[9];
        m.fields |= CRAB_MATCH_ADDR | CRAB_MATCH_PROTO;
        l4 = l3 + (l3[0] & 15) * 4;
        *where = (struct crab_where){.l3 = (__u8)(l3 - frame), .l4 = (__u8)(l4 - frame)};
        if (crab_match_load16(l3 + 6) & crab_match_be16(0x1fff))
            return m;
    } else if (m.ethertype == crab_match_be16(0x86dd)) {
        if (l3 + 40 > end || l3[0] >> 4 != 6)
            return m;
        m.proto = l3[6];
        m.fields |= CRAB_MATCH_PROTO;
        if (!crab_is_mapped(l3 + 24)) { /* it would be an IPv4 one */
            __builtin_memcpy(m.addr, l3 + 24, 16);
            m.fields |= CRAB_MATCH_ADDR;
        }
        l4 = l3 + 40;
        *where = (struct crab_where){.l3 = (__u8)(l3 - frame), .l4 = (__u8)(l4 - frame)};
    } else {
        return m;
    }
    /* TCP, UDP, DCCP, SCTP, UDP-Lite */
    if ((m.proto == 6 || m.proto == 17 || m.proto == 33 || m.proto == 132 || m.proto == 136) && l4 + 4 <= end) {
        m.port = crab_match_load16(l4 + 2);
        m.fields |= CRAB_MATCH_PORT;
    }
    return m;
}

CRAB_INLINE int crab_match_holds(const struct crab_match *wanted, const struct crab_match *has)
{
    __u8 fields = wanted->fields;
    if (fields & ~has->fields)
        return 0;
    if ((fields & CRAB_MATCH_ETHERTYPE && wanted->ethertype != has->ethertype) ||
        (fields & CRAB_MATCH_PROTO && wanted->proto != has->proto) ||
        (fields & CRAB_MATCH_PORT && wanted->port != has->port))
        return 0;
    if (!(fields & CRAB_MATCH_ADDR))
        return 1;
    const __u64 *a = (const void *)wanted->addr, *b = (const void *)has->addr;
    return a[0] == b[0] && a[1] == b[1];
}

#endif
