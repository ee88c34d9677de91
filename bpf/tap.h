/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Which packets a tap shows, for native/ and the XDP program: both find the same. */
#ifndef CRAB_TAP_H
#define CRAB_TAP_H

#include "match.h"
#include "valid.h"

#define CRAB_NO_FAMILY 0

/* Of a packet what taps ask for.  An ICMP error is of the connection that it quotes. */
struct crab_sides {
    __u8 client[16];
    __u8 vip[16];
    __be16 cport; /* 0: it has no ports */
    __be16 vport;
    __u32 family; /* 4, 6, or CRAB_NO_FAMILY: it has no addresses */
};

CRAB_INLINE void crab_sides_four(struct crab_sides *s, const __u8 *client, const __u8 *vip)
{
    s->client[10] = s->client[11] = s->vip[10] = s->vip[11] = 0xff;
    __builtin_memcpy(s->client + 12, client, 4);
    __builtin_memcpy(s->vip + 12, vip, 4);
    s->family = 4;
}

CRAB_INLINE void crab_sides_six(struct crab_sides *s, const __u8 *client, const __u8 *vip)
{
    __builtin_memcpy(s->client, client, 16);
    __builtin_memcpy(s->vip, vip, 16);
    s->family = 6;
}

/* Only what is wholly there counts. */
CRAB_INLINE struct crab_sides crab_sides_of(const __u8 *frame, const __u8 *end)
{
    struct crab_sides s = {};
    const __u8 *l3 = frame + 14, *l4;
    __u8 proto;
    if (l3 > end)
        return s;
    __be16 type = crab_match_load16(frame + CRAB_ETH_TYPE);
#pragma GCC unroll 2
    for (int tags = 0; tags < 2; tags++) {
        if (type != crab_match_be16(0x8100) && type != crab_match_be16(0x88a8))
            break;
        if (l3 + 4 > end)
            return s;
        type = crab_match_load16(l3 + 2);
        l3 += 4;
    }
    if (type == crab_match_be16(0x0800)) {
        if (l3 + CRAB_IP4_HEADER > end || l3[0] >> 4 != 4 || (l3[0] & 15) < 5)
            return s;
        crab_sides_four(&s, l3 + 12, l3 + 16);
        if (crab_match_load16(l3 + 6) & crab_match_be16(0x1fff))
            return s;
        proto = l3[9];
        l4 = l3 + (l3[0] & 15) * 4;
        if (proto == CRAB_PROTO_ICMP(4) && l4 + CRAB_ICMP_ERROR(4) <= end && crab_valid_icmp(l4, 4)) {
            const __u8 *quote = l4 + CRAB_ICMP_HEADER;
            crab_sides_four(&s, quote + 16, quote + 12);
            s.vport = crab_match_load16(quote + CRAB_IP4_HEADER);
            s.cport = crab_match_load16(quote + CRAB_IP4_HEADER + 2);
            return s;
        }
    } else if (type == crab_match_be16(0x86dd)) {
        if (l3 + CRAB_IP6_HEADER > end || l3[0] >> 4 != 6)
            return s;
        crab_sides_six(&s, l3 + 8, l3 + 24);
        proto = l3[6];
        l4 = l3 + CRAB_IP6_HEADER;
        if (proto == CRAB_PROTO_ICMP(6) && l4 + CRAB_ICMP_ERROR(6) <= end && crab_valid_icmp(l4, 6)) {
            const __u8 *quote = l4 + CRAB_ICMP_HEADER;
            crab_sides_six(&s, quote + 24, quote + 8);
            s.vport = crab_match_load16(quote + CRAB_IP6_HEADER);
            s.cport = crab_match_load16(quote + CRAB_IP6_HEADER + 2);
            return s;
        }
    } else {
        return s;
    }
    /* TCP, UDP, DCCP, SCTP, UDP-Lite */
    if ((proto == 6 || proto == 17 || proto == 33 || proto == 132 || proto == 136) && l4 + 4 <= end) {
        s.cport = crab_match_load16(l4);
        s.vport = crab_match_load16(l4 + 2);
    }
    return s;
}

CRAB_INLINE int crab_under_mask(const __u8 addr[16], const __u8 wanted[16], const __u8 mask[16])
{
    const __u64 *a = (const void *)addr, *w = (const void *)wanted, *m = (const void *)mask;
    return !(((a[0] & m[0]) ^ w[0]) | ((a[1] & m[1]) ^ w[1]));
}

/* All that a packet shows by itself: all but its backend. */
CRAB_INLINE int crab_tap_holds(const struct crab_tap *t, const struct crab_sides *s)
{
    if ((t->fields & CRAB_TAP_FOUR && s->family != 4) || (t->fields & CRAB_TAP_SIX && s->family != 6))
        return 0;
    if ((t->fields & CRAB_TAP_VPORT && s->vport != t->vport) ||
        (t->fields & CRAB_TAP_PORT && s->vport != t->port && s->cport != t->port))
        return 0;
    return crab_under_mask(s->client, t->client, t->client_mask) && crab_under_mask(s->vip, t->vip, t->vip_mask);
}

/* The taps that show a packet, a bit each, before it is known where it goes. */
CRAB_INLINE __u32 crab_taps_hold(const struct crab_taps *taps, const struct crab_sides *s)
{
    __u32 held = 0;
#pragma GCC unroll 4
    for (__u32 i = 0; i < CRAB_MAX_TAPS; i++)
        if (i < taps->count && crab_tap_holds(&taps->list[i], s))
            held |= 1u << i;
    return held;
}

/* Of these taps those that show it still, when it was sent to a backend (65535: to none); left: the kernel gets it. */
CRAB_INLINE __u32 crab_taps_keep(const struct crab_taps *taps, __u32 held, __u16 backend, int left)
{
#pragma GCC unroll 4
    for (__u32 i = 0; i < CRAB_MAX_TAPS; i++) {
        const struct crab_tap *t = &taps->list[i];
        if ((t->fields & CRAB_TAP_BACKEND && t->backend != backend) || (left && !t->fields))
            held &= ~(1u << i);
    }
    return held;
}

#endif
