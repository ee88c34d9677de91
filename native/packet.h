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
    size_t l4 = l3 + CRAB_IP_HEADER(family);
    if (crab_unlikely(len < l4 || len > UINT16_MAX))
        return CRAB_V_MALFORMED;
    int verdict = crab_valid_header(ip, family, CRAB_PROTO_TCP);
    if (crab_unlikely(verdict != CRAB_V_OK))
        return verdict;
    size_t length = crab_valid_length(ip, family, CRAB_TCP_MIN, (uint32_t)(len - l3)), end = l3 + length;
    if (crab_unlikely(!length))
        return CRAB_V_MALFORMED;
    uint32_t tcp_header = crab_valid_tcp(frame + l4, (uint32_t)(end - l4));
    if (crab_unlikely(!tcp_header))
        return CRAB_V_MALFORMED;
    *out = (struct crab_packet){.l3 = (uint16_t)l3, .l4 = (uint16_t)l4, .end = (uint16_t)end, .family = (uint8_t)family,
                                .tcp_header = (uint8_t)tcp_header, .tcp_flags = frame[l4 + CRAB_TCP_FLAGS]};
    return CRAB_V_OK;
}

/* Has a segment data?  A SYN's server may act on them before the client is heard again (Fast Open, RFC 7413). */
static inline bool crab_has_data(const struct crab_packet *p)
{
    return p->end - p->l4 != p->tcp_header;
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

/* Parse what crab_parse_at calls CRAB_V_NOT_TCP as an ICMP error about a TCP packet.  tuple: the quoted packet's addresses and
 * ports the other way round, as they lie in a packet of the connection's client: source and destination address, then source
 * and destination port.  Returns whether it is one; *out has l3, l4, end and family. */
static inline bool crab_parse_icmp(const uint8_t *frame, size_t len, size_t l3, int family, struct crab_packet *out,
                                   uint8_t tuple[36])
{
    const uint8_t *ip = frame + l3, *icmp = ip + CRAB_IP_HEADER(family), *quote = icmp + CRAB_ICMP_HEADER;
    if (crab_valid_header(ip, family, CRAB_PROTO_ICMP(family)) != CRAB_V_OK)
        return false;
    uint32_t length = crab_valid_length(ip, family, CRAB_ICMP_ERROR(family), (uint32_t)(len - l3));
    if (!length || !crab_valid_icmp(icmp, family))
        return false;
    size_t size = family == 4 ? 4 : 16;
    const uint8_t *from = quote + (family == 4 ? CRAB_IP4_SRC : CRAB_IP6_SRC), *ports = quote + CRAB_IP_HEADER(family);
    memcpy(tuple, from + size, size);
    memcpy(tuple + size, from, size);
    memcpy(tuple + 2 * size, ports + 2, 2);
    memcpy(tuple + 2 * size + 2, ports, 2);
    *out = (struct crab_packet){.l3 = (uint16_t)l3, .l4 = (uint16_t)(icmp - frame), .end = (uint16_t)(l3 + length),
                                .family = (uint8_t)family};
    return true;
}

/* Is the checksum of an ICMP message right, and that of its IPv4 header? */
static inline bool crab_icmp_sum_is_right(const uint8_t *frame, const struct crab_packet *p)
{
    const uint8_t *ip = frame + p->l3;
    uint32_t len = p->end - p->l4;
    uint64_t sum = crab_sum(frame + p->l4, len);
    if (p->family == 4)
        return crab_valid_ip4_sum(ip) && crab_is_whole(sum);
    return crab_is_whole(sum + crab_sum(ip + CRAB_IP6_SRC, 32) + htons((uint16_t)len) + htons(CRAB_PROTO_ICMP(6)));
}

#endif
