/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Is a packet what its headers say?  One rule, for native/ and the XDP program: what the one refuses the other does not forward.
 *
 * Functions look at as many bytes as they say, which are there; family (4 or 6) is a constant where they are called. */
#ifndef CRAB_VALID_H
#define CRAB_VALID_H

#include "address.h"

#define CRAB_IP4_HEADER 20
#define CRAB_IP6_HEADER 40
#define CRAB_TCP_HEADER 20
#define CRAB_ICMP_HEADER 8
#define CRAB_IP_HEADER(family) ((family) == 4 ? CRAB_IP4_HEADER : CRAB_IP6_HEADER)

#define CRAB_PROTO_TCP 6
#define CRAB_PROTO_ICMP(family) ((family) == 4 ? 1 : 58)

/* A TCP header's flags. */
#define CRAB_FIN 0x01
#define CRAB_SYN 0x02
#define CRAB_RST 0x04
#define CRAB_ACK 0x10

CRAB_INLINE __u32 crab_read16(const __u8 *p)
{
    __u16 value;
    __builtin_memcpy(&value, p, 2);
    return __builtin_bswap16(value);
}

/* CRAB_V_OK, if an IP header is that of a whole packet of a protocol, without IPv4 options or IPv6 extension headers. */
CRAB_INLINE int crab_valid_header(const __u8 *ip, int family, __u8 proto)
{
    if (family == 4) {
        if (ip[0] != 0x45) {
            if (ip[0] >> 4 != 4 || (ip[0] & 15) < 5)
                return CRAB_V_MALFORMED;
            return ip[9] == proto ? CRAB_V_IP_OPTIONS : CRAB_V_NOT_TCP;
        }
        if (ip[9] != proto)
            return CRAB_V_NOT_TCP;
        return crab_read16(ip + 6) & 0x3fff ? CRAB_V_FRAGMENT : CRAB_V_OK;
    }
    if (ip[0] >> 4 != 6)
        return CRAB_V_MALFORMED;
    if (ip[6] == proto)
        return CRAB_V_OK;
    /* hop-by-hop, routing, fragment, AH, destination options, mobility, HIP, shim6 */
    switch (ip[6]) {
    case 0: case 43: case 44: case 51: case 60: case 135: case 139: case 140:
        return CRAB_V_IP_OPTIONS;
    default:
        return CRAB_V_NOT_TCP;
    }
}

/* Bytes of the packet, as its header has it; 0, if the frame does not hold so many, or `least` are not behind the header.
 * room: bytes of the frame from the header on. */
CRAB_INLINE __u32 crab_valid_length(const __u8 *ip, int family, __u32 least, __u32 room)
{
    __u32 length = family == 4 ? crab_read16(ip + 2) : CRAB_IP6_HEADER + crab_read16(ip + 4);
    return length > room || length < CRAB_IP_HEADER(family) + least ? 0 : length;
}

/* Does a sum of words, at least one of which is not 0, fold to 0xffff, as what has the right checksum in it does?  Then it is
 * a multiple of 65,535, and of those alone the product with the inverse of 65,535 is so small (Granlund and Montgomery 1994,
 * section 9). */
CRAB_INLINE int crab_is_whole(__u64 sum)
{
    return sum * 0xfffefffefffeffffull <= 0xffffffffffffffffull / 0xffff;
}

/* Is the checksum of an IPv4 header without options right? */
CRAB_INLINE int crab_valid_ip4_sum(const __u8 *ip)
{
    __u32 w[5];
    __builtin_memcpy(w, ip, sizeof w);
    return crab_is_whole((__u64)w[0] + w[1] + w[2] + w[3] + w[4]);
}

/* Bytes of a TCP header; 0, if it cannot be so many in a segment of so many. */
CRAB_INLINE __u32 crab_valid_tcp(const __u8 *tcp, __u32 segment)
{
    __u32 header = (tcp[12] >> 4) * 4;
    return header < CRAB_TCP_HEADER || header > segment ? 0 : header;
}

/* A SYN that is nothing else besides, or no SYN. */
CRAB_INLINE int crab_valid_flags(__u8 flags)
{
    return !(flags & CRAB_SYN) || !(flags & (CRAB_ACK | CRAB_RST | CRAB_FIN));
}

/* Is it an ICMP error (RFC 792, RFC 4443) that quotes a TCP packet, its ports at least?  icmp: of CRAB_ICMP_ERROR bytes. */
#define CRAB_ICMP_ERROR(family) (CRAB_ICMP_HEADER + CRAB_IP_HEADER(family) + 8)
CRAB_INLINE int crab_valid_icmp(const __u8 *icmp, int family)
{
    const __u8 *quote = icmp + CRAB_ICMP_HEADER;
    if (family == 4)
        return (icmp[0] == 3 || icmp[0] == 11 || icmp[0] == 12) && quote[0] == 0x45 && quote[9] == CRAB_PROTO_TCP &&
               !(crab_read16(quote + 6) & 0x1fff);
    return icmp[0] >= 1 && icmp[0] <= 4 && quote[0] >> 4 == 6 && quote[6] == CRAB_PROTO_TCP;
}

#endif
