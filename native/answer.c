/* SPDX-License-Identifier: MIT */
/* A VIP is an address: what comes to it and is no service's gets what a host would answer. */
#include "answer.h"
#include "rewrite.h"

#define ECHO_REQUEST(family) ((family) == 4 ? 8 : 128)
#define PROTO_UDP 17

/* Is it nobody's address: unspecified, loopback, a group's (RFC 1122, 3.2.1.3; RFC 4291, 2.5, 2.7)?  Then it cannot be answered. */
static bool is_nobody(const uint8_t *addr, int family)
{
    if (family == 4)
        return addr[0] == 0 || addr[0] == 127 || addr[0] >= 224;
    static const uint8_t zeros[15];
    return addr[0] == 0xff || crab_is_mapped(addr) || (!memcmp(addr, zeros, 15) && addr[15] <= 1);
}

static bool may_answer(struct crab_core *core, uint32_t now)
{
    if (core->answered_second != now) {
        core->answered_second = now;
        core->answered_count = 0;
    }
    return core->answered_count < CRAB_ANSWERS && ++core->answered_count;
}

enum crab_counter crab_answer_syn(struct crab_core *core, struct crab_frame *frame, const struct crab_packet *p, uint32_t now)
{
    if (is_nobody(frame->data + p->l3 + (p->family == 4 ? CRAB_IP4_SRC : CRAB_IP6_SRC), p->family))
        return CRAB_C_DROP_NO_BACKEND;
    if (!may_answer(core, now))
        return CRAB_C_DROP_RATE;
    frame->data = crab_answer_by_reset(frame->data, &frame->len, p);
    return CRAB_C_REFUSED;
}

/* A packet without IPv4 options or IPv6 extension headers, of a protocol with a header of eight bytes. */
static bool parse(const struct crab_frame *frame, uint32_t l3, int family, uint8_t proto, struct crab_packet *p)
{
    const uint8_t *ip = frame->data + l3;
    if (crab_valid_header(ip, family, proto) != CRAB_V_OK)
        return false;
    uint32_t length = crab_valid_length(ip, family, 8, frame->len - l3);
    *p = (struct crab_packet){.l3 = (uint16_t)l3, .l4 = (uint16_t)(l3 + CRAB_IP_HEADER(family)),
                              .end = (uint16_t)(l3 + length), .family = (uint8_t)family};
    return length;
}

/* Of a family.  What is to be done about it, if there is time. */
CRAB_TEMPLATE enum crab_counter decide(const struct crab_answers *answers, const struct crab_frame *frame, uint32_t l3,
                                       int family, struct crab_packet *p)
{
    const uint8_t *ip = frame->data + l3, *addrs = ip + (family == 4 ? CRAB_IP4_SRC : CRAB_IP6_SRC);
    uint32_t size = family == 4 ? 4 : 16;
    uint8_t to[16];
    memcpy(to, crab_mapped_prefix, 12);
    memcpy(to + 16 - size, addrs + size, size);
    if (family == 6 && crab_is_mapped(to))
        return CRAB_C_DROP_NOT_SERVICE;
    if (!crab_is_answered_for(answers, to))
        return CRAB_C_DROP_NOT_SERVICE;
    if (is_nobody(addrs, family))
        return CRAB_C_DROP_CLOSED;
    if (family == 4 && ip[0] == 0x45 && !crab_valid_ip4_sum(ip))
        return CRAB_C_DROP_CHECKSUM;
    if (crab_parse_at(frame->data, frame->len, l3, family, p) == CRAB_V_OK) {
        uint32_t segment = p->end - p->l4;
        if (crab_tcp_sum(frame->data + p->l4, segment, addrs, 2 * size).state == CRAB_CSUM_BAD)
            return CRAB_C_DROP_CHECKSUM;
        /* never answered (RFC 9293, 3.10.7.1), or no segment of a connection's */
        if (p->tcp_flags & CRAB_RST || !crab_valid_flags(p->tcp_flags))
            return CRAB_C_DROP_CLOSED;
        return answers->reset ? CRAB_C_CLOSED : CRAB_C_DROP_CLOSED;
    }
    if (parse(frame, l3, family, CRAB_PROTO_ICMP(family), p)) {
        const uint8_t *icmp = frame->data + p->l4;
        if (icmp[0] != ECHO_REQUEST(family) || icmp[1] || !answers->ping)
            return CRAB_C_DROP_CLOSED;
        return crab_icmp_sum_is_right(frame->data, p) ? CRAB_C_ECHO : CRAB_C_DROP_CHECKSUM;
    }
    return answers->reset && parse(frame, l3, family, PROTO_UDP, p) ? CRAB_C_CLOSED : CRAB_C_DROP_CLOSED;
}

enum crab_counter crab_batch_answer(const struct crab_batch *b, uint32_t place)
{
    struct crab_frame *frame = &b->frames[place];
    struct crab_packet p;
    uint16_t type = 0;
    uint32_t l3 = (uint32_t)crab_find_l3(frame->data, frame->len, &type);
    enum crab_counter what = CRAB_C_DROP_NOT_SERVICE;
    if (l3 && type == htons(0x0800))
        what = decide(&b->s->answers, frame, l3, 4, &p);
    else if (type == htons(0x86dd) && l3 && frame->len >= l3 + 40)
        what = decide(&b->s->answers, frame, l3, 6, &p);
    if (what != CRAB_C_ECHO && what != CRAB_C_CLOSED)
        return what;
    if (!may_answer(b->core, b->now))
        return CRAB_C_DROP_RATE;
    if (what == CRAB_C_ECHO)
        frame->data = crab_answer_echo(frame->data, &frame->len, &p);
    else if (p.tcp_header)
        frame->data = crab_answer_by_reset(frame->data, &frame->len, &p);
    else
        frame->data = crab_answer_unreachable(frame->data, &frame->len, &p);
    return what;
}
