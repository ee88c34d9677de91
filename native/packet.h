/* SPDX-License-Identifier: MIT */
#ifndef CRAB_PACKET_H
#define CRAB_PACKET_H

#include "checksum.h"
#include "crablb.h"

#define CRAB_ETH_LEN 14
#define CRAB_TCP_MIN 20

/* Offsets into headers. */
#define CRAB_IP4_LEN 2
#define CRAB_IP4_CSUM 10
#define CRAB_IP4_SRC 12
#define CRAB_IP4_DST 16
#define CRAB_IP6_LEN 4
#define CRAB_IP6_SRC 8
#define CRAB_IP6_DST 24
#define CRAB_TCP_SEQ 4
#define CRAB_TCP_DOFF 12
#define CRAB_TCP_FLAGS 13
#define CRAB_TCP_CSUM 16

#define CRAB_FIN 0x01
#define CRAB_SYN 0x02
#define CRAB_RST 0x04
#define CRAB_ACK 0x10

struct crab_tcp_sum {
    uint64_t body; /* sum of pseudo-header and segment, the checksum field taken as zero */
    uint8_t state; /* CRAB_CSUM_* */
};

/* One pass serves both the verification and the checksum of the rewritten packet, which differs from `body` only by
 * the words that change. */
static inline struct crab_tcp_sum crab_tcp_sum(const uint8_t *tcp, size_t tcp_len, const uint8_t *addrs,
                                               size_t addrs_len)
{
    uint16_t field = load16(tcp + CRAB_TCP_CSUM);
    uint64_t pseudo = crab_sum_pseudo(addrs, addrs_len, (uint32_t)tcp_len), all = crab_sum_more(pseudo, tcp, tcp_len);
    struct crab_tcp_sum out = {.body = crab_sum_small(all) + (uint16_t)~field, .state = CRAB_CSUM_OK};
    if (crab_unlikely(!crab_is_whole(all)))
        out.state = field == crab_fold(pseudo) ? CRAB_CSUM_PARTIAL : CRAB_CSUM_BAD;
    return out;
}

/* The checksum that the segment should carry. */
static inline uint16_t crab_tcp_right(struct crab_tcp_sum sum)
{
    return (uint16_t)~crab_fold(sum.body);
}

#define CRAB_MAX_TAGS 2 /* 802.1ad around 802.1Q */

static inline bool crab_is_tag(uint16_t ethertype)
{
    return ethertype == htons(0x8100) || ethertype == htons(0x88a8);
}

/* The IP packet of a family at l3. */
CRAB_TEMPLATE int crab_parse_at(const uint8_t *frame, size_t len, size_t l3, int family, struct crab_packet *out)
{
    const uint8_t *ip = frame + l3;
    size_t l4 = l3 + (family == 4 ? 20 : 40), end;
    if (crab_unlikely(len < l4 || len > UINT16_MAX))
        return CRAB_V_MALFORMED;
    if (family == 4) {
        if (crab_unlikely(ip[0] != 0x45)) {
            if (ip[0] >> 4 != 4 || (ip[0] & 15) < 5)
                return CRAB_V_MALFORMED;
            return ip[9] == 6 ? CRAB_V_IP_OPTIONS : CRAB_V_NOT_TCP;
        }
        if (crab_unlikely(ip[9] != 6))
            return CRAB_V_NOT_TCP;
        if (crab_unlikely(load16(ip + 6) & htons(0x3fff)))
            return CRAB_V_FRAGMENT;
        end = l3 + load16_be(ip + CRAB_IP4_LEN);
    } else {
        if (crab_unlikely(ip[0] >> 4 != 6))
            return CRAB_V_MALFORMED;
        if (crab_unlikely(ip[6] != 6)) {
            /* hop-by-hop, routing, fragment, AH, destination options, mobility, HIP, shim6 */
            switch (ip[6]) {
            case 0: case 43: case 44: case 51: case 60: case 135: case 139: case 140:
                return CRAB_V_IP_OPTIONS;
            default:
                return CRAB_V_NOT_TCP;
            }
        }
        end = l4 + load16_be(ip + CRAB_IP6_LEN);
    }
    if (crab_unlikely(end > len || end < l4 + CRAB_TCP_MIN))
        return CRAB_V_MALFORMED;
    size_t tcp_header = (frame[l4 + CRAB_TCP_DOFF] >> 4) * 4u;
    if (crab_unlikely(tcp_header < CRAB_TCP_MIN || l4 + tcp_header > end))
        return CRAB_V_MALFORMED;
    *out = (struct crab_packet){.l3 = (uint16_t)l3, .l4 = (uint16_t)l4, .end = (uint16_t)end, .family = (uint8_t)family,
                                .tcp_header = (uint8_t)tcp_header, .tcp_flags = frame[l4 + CRAB_TCP_FLAGS]};
    return CRAB_V_OK;
}

/* Where the IP header is, behind VLAN tags, and in *type the EtherType in front of it; 0: the frame ends before. */
static inline size_t crab_find_l3(const uint8_t *frame, size_t len, uint16_t *type)
{
    size_t l3 = CRAB_ETH_LEN;
    if (crab_unlikely(len < l3 + 20))
        return 0;
    *type = load16(frame + 12);
    for (int tags = 0; crab_unlikely(crab_is_tag(*type)) && tags < CRAB_MAX_TAGS; tags++) {
        *type = load16(frame + l3 + 2);
        l3 += 4;
        if (len < l3 + 20)
            return 0;
    }
    return l3;
}

static inline int crab_parse(const uint8_t *frame, size_t len, struct crab_packet *out)
{
    uint16_t type;
    size_t l3 = crab_find_l3(frame, len, &type);
    if (!l3)
        return CRAB_V_MALFORMED;
    if (type == htons(0x0800))
        return crab_parse_at(frame, len, l3, 4, out);
    return type == htons(0x86dd) ? crab_parse_at(frame, len, l3, 6, out) : CRAB_V_NOT_TCP;
}

/* Parse a frame that crab_parse calls CRAB_V_NOT_TCP as an ICMP error about a TCP packet (RFC 792, RFC 4443).  tuple: the
 * quoted packet's addresses and ports the other way round, as they lie in a packet of the connection's client: source and
 * destination address, then source and destination port.  Returns whether it is one; *out has l3, l4, end and family. */
static inline bool crab_parse_icmp(const uint8_t *frame, size_t len, struct crab_packet *out, uint8_t tuple[36])
{
    size_t l3 = CRAB_ETH_LEN;
    uint16_t type = load16(frame + 12);
    for (int tags = 0; crab_is_tag(type) && tags < CRAB_MAX_TAGS; tags++) {
        type = load16(frame + l3 + 2);
        l3 += 4;
    }
    const uint8_t *ip = frame + l3, *icmp, *quote;
    size_t size = type == htons(0x0800) ? 4 : 16, header = size == 4 ? 20 : 40, end;
    if (type != htons(0x0800) && type != htons(0x86dd))
        return false;
    if (len < l3 + 2 * header + 16)
        return false;
    icmp = ip + header;
    quote = icmp + 8;
    if (size == 4) {
        if (ip[0] != 0x45 || ip[9] != 1 || (load16(ip + 6) & htons(0x3fff)) ||
            (icmp[0] != 3 && icmp[0] != 11 && icmp[0] != 12))
            return false;
        end = l3 + load16_be(ip + CRAB_IP4_LEN);
        if (quote[0] != 0x45 || quote[9] != 6 || (load16(quote + 6) & htons(0x1fff)))
            return false;
    } else {
        if (ip[0] >> 4 != 6 || ip[6] != 58 || icmp[0] < 1 || icmp[0] > 4)
            return false;
        end = l3 + 40 + load16_be(ip + CRAB_IP6_LEN);
        if (quote[0] >> 4 != 6 || quote[6] != 6)
            return false;
    }
    if (end > len || end < l3 + 2 * header + 16 || end > UINT16_MAX)
        return false;
    const uint8_t *from = quote + (size == 4 ? CRAB_IP4_SRC : CRAB_IP6_SRC), *ports = quote + header;
    memcpy(tuple, from + size, size);
    memcpy(tuple + size, from, size);
    memcpy(tuple + 2 * size, ports + 2, 2);
    memcpy(tuple + 2 * size + 2, ports, 2);
    *out = (struct crab_packet){.l3 = (uint16_t)l3, .l4 = (uint16_t)(l3 + header), .end = (uint16_t)end,
                                .family = size == 4 ? 4 : 6};
    return true;
}

#endif
