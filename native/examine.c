/* SPDX-License-Identifier: MIT */
/* First pass: what are the frames, and whose? */
#include <time.h>

#include "answer.h"
#include "batch.h"

#define PREFETCH_AHEAD 8

/* The hash of a client alone, by so many bits of its address. */
static uint64_t client_hash(const struct crab_snapshot *s, const struct crab_item *it, const uint8_t *addr)
{
    uint32_t size = it->packet.family == 4 ? 4 : 16, bits = size == 4 ? it->service->source4 : it->service->source6;
    uint8_t prefix[32] = {0}; /* as addresses of a connection to nowhere, from port 0 to port 0 */
    memcpy(prefix, addr, bits / 8);
    if (bits % 8)
        prefix[bits / 8] = addr[bits / 8] & (uint8_t)(0xff00 >> bits % 8);
    return size == 4 ? crab_hash4(&s->hash_init, prefix, (uint8_t[4]){0})
                     : crab_hash6(&s->hash_init, prefix, (uint8_t[4]){0});
}

/* Where the service's table is looked into.  addrs: the connection's addresses, the client's first. */
static inline const uint16_t *slot_of(const struct crab_snapshot *s, const struct crab_item *it, const uint8_t *addrs)
{
    uint64_t hash = crab_unlikely(it->service->source4) ? client_hash(s, it, addrs) : it->hash;
    return &it->service->table[crab_slot(hash, s->table_size)];
}

/* A packet with an IPv4-mapped address, to addr and a port: whether it pretends to be a service's. */
CRAB_APART enum crab_counter refuse_mapped(const struct crab_snapshot *s, const uint8_t addr[16], uint16_t port_be)
{
    return crab_service_find(s, load64(addr), load64(addr + 8), port_be) ? CRAB_C_DROP_MAPPED : CRAB_C_DROP_NOT_SERVICE;
}

/* An ICMP error: its connection is that of the packet which it quotes. */
CRAB_APART enum crab_counter examine_icmp(const struct crab_core *core, const struct crab_snapshot *s,
                                          const uint8_t *frame, uint32_t len, struct crab_item *it, uint32_t l3,
                                          int family)
{
    uint8_t tuple[36];
    if (!crab_parse_icmp(frame, len, l3, family, &it->packet, tuple))
        return CRAB_C_DROP_NOT_SERVICE;
    if (family == 6 &&
        (crab_either_is_mapped(tuple) || crab_either_is_mapped(frame + l3 + CRAB_IP6_SRC)))
        return refuse_mapped(s, tuple + 16, load16(tuple + 34));
    if (family == 4) {
        it->hash = crab_hash4(&s->hash_init, tuple, tuple + 8);
        it->service = crab_service_find(s, 0, 0xffff0000ull | (uint64_t)load32(tuple + 4) << 32, load16(tuple + 10));
    } else {
        it->hash = crab_hash6(&s->hash_init, tuple, tuple + 32);
        it->service = crab_service_find(s, load64(tuple + 16), load64(tuple + 24), load16(tuple + 34));
    }
    it->kind = CRAB_KIND_ICMP;
    if (!it->service)
        return CRAB_C_DROP_NOT_SERVICE;
    if (!crab_icmp_sum_is_right(frame, &it->packet))
        return CRAB_C_DROP_CHECKSUM;
    it->bucket = crab_flows_bucket(&core->flows, it->hash);
    it->slot = slot_of(s, it, tuple);
    return CRAB_COUNTERS;
}

/* addr: an IPv4 or an IPv6 client's, as `four` says.  A prefix as short as ::/0 would hold mapped addresses too. */
static bool prefix_holds(const struct crab_prefix *prefix, const uint8_t addr[16], bool four)
{
    uint32_t bytes = prefix->bits / 8, rest = prefix->bits % 8;
    if ((prefix->bits >= 96 && crab_is_mapped(prefix->addr)) != four || memcmp(prefix->addr, addr, bytes))
        return false;
    return !rest || !((prefix->addr[bytes] ^ addr[bytes]) >> (8 - rest));
}

/* Of a service that has prefixes. */
CRAB_APART bool may_be_redirected(const struct crab_snapshot *s, const struct crab_service *service, const uint8_t *ip,
                                  int family)
{
    uint8_t client[16];
    if (family == 4) {
        memcpy(client, crab_mapped_prefix, 12);
        memcpy(client + 12, ip + CRAB_IP4_SRC, 4);
    } else {
        memcpy(client, ip + CRAB_IP6_SRC, 16);
    }
    for (uint32_t i = 0; i < service->prefix_count; i++)
        if (prefix_holds(&s->prefixes[service->first_prefix + i], client, family == 4))
            return true;
    return false;
}

/* Why this SYN goes by fallback, whichever its backend, or CRAB_C_REDIRECTED: what all services have in common. */
static inline enum crab_counter decide(const struct crab_item *it, bool data)
{
    const struct crab_service *service = it->service;
    /* A server may act on data at once; what a signature signs, and what a cookie or a token is good for, is the VIP. */
    if (crab_unlikely(data || it->found & CRAB_OPTION_UNSAFE))
        return CRAB_C_FALLBACK_UNSAFE;
    if (service->mode == CRAB_MODE_NEGOTIATED && !(it->found & CRAB_OPTION_OFFER))
        return CRAB_C_FALLBACK_NO_OFFER;
    return CRAB_C_REDIRECTED;
}

/* The same of a service that is particular. */
CRAB_APART enum crab_counter decide_particular(const struct crab_snapshot *s, const struct crab_item *it,
                                               const uint8_t *ip, bool data)
{
    const struct crab_service *service = it->service;
    if (service->mode == CRAB_MODE_NEVER)
        return CRAB_C_FALLBACK_MODE;
    enum crab_counter outcome = decide(it, data);
    if (outcome == CRAB_C_REDIRECTED && service->prefix_count &&
        !may_be_redirected(s, service, ip, it->packet.family))
        return CRAB_C_FALLBACK_PREFIX;
    return outcome;
}

/* Can the redirect be written into the TCP header, and be echoed in the SYN-ACK's?  There only an MPTCP server's options are
 * many enough to leave no room. */
CRAB_APART bool fits(const struct crab_snapshot *s, const struct crab_item *it, const uint8_t *tcp)
{
    uint8_t list[CRAB_MAX_OPTIONS];
    const uint8_t *options = tcp + CRAB_TCP_MIN;
    size_t len = it->packet.tcp_header - CRAB_TCP_MIN;
    if (it->found & CRAB_OPTION_MPTCP && crab_option_answer(options, len) + it->redirect->len > CRAB_MAX_OPTIONS)
        return false;
    return crab_option_rewrite(options, len, s->form, it->service->addr, list) >= 0;
}

/* What few SYNs have among their options: counted, and a join's way found. */
CRAB_APART void take_note(struct crab_core *core, const struct crab_snapshot *s, struct crab_item *it, const uint8_t *tcp)
{
    core->counters[CRAB_C_FORGED_OPTION] += !!(it->found & CRAB_OPTION_FORGED);
    core->counters[CRAB_C_MPTCP] += !!(it->found & CRAB_OPTION_MPTCP);
    if (!(it->found & CRAB_OPTION_JOIN))
        return;
    core->counters[CRAB_C_MPTCP_JOIN]++;
    const uint8_t *token = crab_option_token(tcp + CRAB_TCP_MIN, it->packet.tcp_header - CRAB_TCP_MIN);
    if (!token || !core->joins)
        return;
    it->joined = crab_joins_find(core->joins, load32(token), (uint16_t)it->service->index);
    if (crab_usable(s, it->service, it->joined)) {
        core->counters[CRAB_C_MPTCP_JOIN_KNOWN]++;
        it->slot = &it->joined;
    }
}

/* An IP packet of a family at l3. */
CRAB_TEMPLATE enum crab_counter examine_at(struct crab_core *core, const struct crab_snapshot *s, const uint8_t *frame,
                                           uint32_t len, struct crab_item *it, uint32_t l3, int family)
{
    struct crab_packet *p = &it->packet;
    int verdict = crab_parse_at(frame, len, l3, family, p);
    if (crab_unlikely(verdict != CRAB_V_OK)) {
        if (verdict == CRAB_V_NOT_TCP)
            return examine_icmp(core, s, frame, len, it, l3, family);
        return verdict == CRAB_V_MALFORMED ? CRAB_C_DROP_MALFORMED : CRAB_C_DROP_NOT_SERVICE;
    }
    const uint8_t *ip = frame + l3, *tcp = ip + (family == 4 ? 20 : 40);
    const uint8_t *addrs = ip + (family == 4 ? CRAB_IP4_SRC : CRAB_IP6_SRC);
    uint64_t a, b;
    if (family == 4) {
        a = 0;
        b = 0xffff0000ull | (uint64_t)load32(ip + CRAB_IP4_DST) << 32;
        if (crab_unlikely(!crab_valid_ip4_sum(ip)))
            return CRAB_C_DROP_CHECKSUM;
        it->hash = crab_hash4(&s->hash_init, addrs, tcp);
    } else {
        a = load64(ip + CRAB_IP6_DST);
        b = load64(ip + CRAB_IP6_DST + 8);
        /* whose first eight bytes are zero */
        if (crab_unlikely(!a || !load64(addrs)) && crab_either_is_mapped(addrs))
            return refuse_mapped(s, ip + CRAB_IP6_DST, load16(tcp + 2));
        it->hash = crab_hash6(&s->hash_init, addrs, tcp);
    }
    it->service = crab_service_find(s, a, b, load16(tcp + 2));
    if (crab_unlikely(!it->service))
        return CRAB_C_DROP_NOT_SERVICE;
    it->bucket = crab_flows_bucket(&core->flows, it->hash);
    __builtin_prefetch(it->bucket, 1);
    it->slot = slot_of(s, it, addrs);
    __builtin_prefetch(it->slot);
    if (crab_unlikely(!crab_valid_flags(p->tcp_flags)))
        return CRAB_C_DROP_FLAGS;
    it->sum = crab_tcp_sum(tcp, (size_t)(p->end - p->l4), addrs, family == 4 ? 8 : 32);
    if (crab_unlikely(it->sum.state == CRAB_CSUM_BAD))
        return CRAB_C_DROP_CHECKSUM;
    it->kind = CRAB_KIND_OTHER;
    if (crab_likely(p->tcp_flags & CRAB_SYN)) {
        it->kind = l3 != CRAB_ETH_LEN ? CRAB_KIND_TAGGED_SYN : family == 4 ? CRAB_KIND_SYN4 : CRAB_KIND_SYN6;
        int word;
        it->found = (uint8_t)crab_option_scan_again(&core->seen, tcp + CRAB_TCP_MIN, p->tcp_header - CRAB_TCP_MIN,
                                                    s->form, &word);
        it->word = (int8_t)word;
        it->redirect = &s->redirects[it->service - s->services];
        bool data = crab_has_data(p);
        bool in_place = word >= 0 && p->tcp_header + it->redirect->len <= CRAB_TCP_MIN + CRAB_MAX_OPTIONS + 4;
        if (crab_likely(in_place && !data && !it->service->particular)) {
            it->outcome = CRAB_C_REDIRECTED;
            it->straight = it->room = true;
        } else {
            enum crab_counter outcome =
                crab_likely(!it->service->particular) ? decide(it, data) : decide_particular(s, it, ip, data);
            it->outcome = (uint8_t)outcome;
            it->straight = outcome == CRAB_C_REDIRECTED && in_place;
            it->room = it->straight || (outcome == CRAB_C_REDIRECTED && fits(s, it, tcp));
        }
        if (crab_unlikely(it->found & (CRAB_OPTION_FORGED | CRAB_OPTION_MPTCP | CRAB_OPTION_JOIN)))
            take_note(core, s, it, tcp);
    }
    return CRAB_COUNTERS;
}

/* A frame that is no service's: it goes nowhere, to a handler, or back. */
CRAB_APART void refuse(struct crab_batch *b, uint32_t i, enum crab_counter why)
{
    struct crab_frame *frame = &b->frames[i];
    b->items[i].kind = CRAB_KIND_NONE;
    if (!b->s->matches.count || !crab_batch_hand(b, i, why)) {
        if (why == CRAB_C_DROP_NOT_SERVICE && b->s->answers.count)
            why = crab_batch_answer(b, i);
        b->core->counters[why]++;
        if (!crab_is_drop(why)) {
            b->kept++;
            return;
        }
    }
    frame->len = 0;
}

static inline void prefetch_frame(const struct crab_frame *frames, uint32_t i, uint32_t count)
{
    if (crab_likely(i < count)) {
        __builtin_prefetch(frames[i].data, 1);
        __builtin_prefetch(frames[i].data + 64, 1);
    }
}

static inline uint16_t ethertype(const struct crab_frame *frame)
{
    return crab_likely(frame->len >= CRAB_ETH_LEN + 20) ? load16(frame->data + 12) : 0;
}

/* A run of frames of one EtherType, from i on: in the code for it every offset is a constant, and what is the same for all
 * stays in registers.  Returns where it ends. */
CRAB_TEMPLATE uint32_t examine_run(struct crab_batch *b, uint32_t i, int family)
{
    /* In variables of their own: a frame's bytes may be anything's, for all that the compiler knows. */
    const uint16_t type = htons(family == 4 ? 0x0800 : 0x86dd);
    const struct crab_frame *frames = b->frames;
    struct crab_item *items = b->items;
    struct crab_core *core = b->core;
    const struct crab_snapshot *s = b->s;
    uint32_t count = b->count;
    do {
        prefetch_frame(frames, i + PREFETCH_AHEAD, count);
        enum crab_counter why = examine_at(core, s, frames[i].data, frames[i].len, &items[i], CRAB_ETH_LEN, family);
        if (crab_unlikely(why != CRAB_COUNTERS))
            refuse(b, i, why);
        i++;
    } while (i < count && ethertype(&frames[i]) == type);
    return i;
}

CRAB_APART uint32_t examine_ip4(struct crab_batch *b, uint32_t i)
{
    return examine_run(b, i, 4);
}

CRAB_APART uint32_t examine_ip6(struct crab_batch *b, uint32_t i)
{
    return examine_run(b, i, 6);
}

CRAB_APART uint32_t examine_other(struct crab_batch *b, uint32_t i)
{
    const uint8_t *frame = b->frames[i].data;
    uint32_t len = b->frames[i].len;
    uint16_t type = 0;
    uint32_t l3 = (uint32_t)crab_find_l3(frame, len, &type);
    enum crab_counter why = l3 ? CRAB_C_DROP_NOT_SERVICE : CRAB_C_DROP_MALFORMED;
    prefetch_frame(b->frames, i + PREFETCH_AHEAD, b->count);
    if (type == htons(0x0800) && l3)
        why = examine_at(b->core, b->s, frame, len, &b->items[i], l3, 4);
    else if (type == htons(0x86dd) && l3)
        why = examine_at(b->core, b->s, frame, len, &b->items[i], l3, 6);
    if (why != CRAB_COUNTERS)
        refuse(b, i, why);
    return i + 1;
}

void crab_batch_examine(struct crab_batch *b)
{
    for (uint32_t i = 0; i < PREFETCH_AHEAD; i++)
        prefetch_frame(b->frames, i, b->count);
    for (uint32_t i = 0; i < b->count;) {
        uint16_t type = ethertype(&b->frames[i]);
        i = type == htons(0x0800) ? examine_ip4(b, i) : type == htons(0x86dd) ? examine_ip6(b, i) : examine_other(b, i);
    }
}
