/* SPDX-License-Identifier: MIT */
/* Change a frame where it lies. */
#ifndef CRAB_REWRITE_H
#define CRAB_REWRITE_H

#include "packet.h"
#include "snapshot.h"

/* After the options have changed and the headers in front of them have moved: lengths, the destination address (dip: 4
 * or 16 bytes by the frame's family, or NULL to keep it), checksums.  body: the TCP checksum's sum so far, of which the
 * options' part is right already.  Updates *len and *p. */
static inline void crab_settle(uint8_t *moved, uint32_t *len, struct crab_packet *p, int32_t growth, uint64_t body,
                               const uint8_t *dip)
{
    uint8_t *ip = moved + p->l3, *tcp = moved + p->l4;
    uint16_t old_tcp_len = htons((uint16_t)(p->end - p->l4)), doff = load16(tcp + CRAB_TCP_DOFF), new_doff;
    p->end = (uint16_t)(p->end + growth);
    p->tcp_header = (uint8_t)(p->tcp_header + growth);
    *len = p->end;
    new_doff = htons((uint16_t)((ntohs(doff) & 0x0fff) | p->tcp_header << 10));
    store16(tcp + CRAB_TCP_DOFF, new_doff);
    body += (uint16_t)~doff;
    body += new_doff;
    body += (uint16_t)~old_tcp_len;
    body += htons((uint16_t)(p->end - p->l4));
    if (p->family == 4) {
        uint64_t header = (uint16_t)~load16(ip + CRAB_IP4_CSUM);
        uint16_t total = htons((uint16_t)(p->end - p->l3));
        header += (uint16_t)~load16(ip + CRAB_IP4_LEN);
        store16(ip + CRAB_IP4_LEN, total);
        header += total;
        if (dip) {
            uint64_t change = crab_sum_less(crab_sum(ip + CRAB_IP4_DST, 4)) + crab_sum(dip, 4);
            memcpy(ip + CRAB_IP4_DST, dip, 4);
            header += change;
            body += change;
        }
        store16(ip + CRAB_IP4_CSUM, (uint16_t)~crab_fold(header));
    } else {
        store16_be(ip + CRAB_IP6_LEN, (uint16_t)(p->end - p->l4));
        if (dip) {
            body += crab_sum_less(crab_sum(ip + CRAB_IP6_DST, 16)) + crab_sum(dip, 16);
            memcpy(ip + CRAB_IP6_DST, dip, 16);
        }
    }
    store16(tcp + CRAB_TCP_CSUM, (uint16_t)~crab_fold(body));
}

/* Replace the TCP options of a frame, and its destination address if dip is not NULL, and write the checksums that
 * belong to it.
 *
 * The payload stays; what is in front of it moves by the difference of the options' lengths, into the headroom when
 * they grow.  options_len is a multiple of 4; the front of the frame has CRAB_HEADROOM bytes.  Returns the frame's new first
 * byte and updates *len and *p; NULL, and nothing is changed, if they do not fit. */
static inline uint8_t *crab_rewrite(uint8_t *frame, uint32_t *len, struct crab_packet *p,
                                    const struct crab_tcp_sum *sum, const uint8_t *options, uint32_t options_len,
                                    const uint8_t *dip)
{
    if (crab_unlikely(options_len > CRAB_MAX_OPTIONS))
        return NULL;
    int32_t growth = (int32_t)(options_len + CRAB_TCP_MIN) - p->tcp_header;
    uint8_t *old_options = frame + p->l4 + CRAB_TCP_MIN;
    uint64_t body = sum->body + crab_sum_less(crab_sum(old_options, (size_t)(p->tcp_header - CRAB_TCP_MIN)));

    /* grows by 20 at most (an offer becomes an IPv6 redirect), shrinks by 40 at most */
    uint8_t *moved = frame - growth;
    if (growth)
        memmove(moved, frame, (size_t)p->l4 + CRAB_TCP_MIN);
    memcpy(moved + p->l4 + CRAB_TCP_MIN, options, options_len);
    crab_settle(moved, len, p, growth, body + crab_sum(options, options_len), dip);
    return moved;
}

/* Move n bytes, at least 64 and at most 128, which may overlap: all are loaded before any is stored. */
static inline void crab_move_front(uint8_t *to, const uint8_t *from, size_t n)
{
    typedef uint8_t vector __attribute__((vector_size(16), aligned(1), may_alias));
    const vector *first = (const void *)from, *last = (const void *)(from + n - 64);
    vector a = first[0], b = first[1], c = first[2], d = first[3], e = last[0], f = last[1], g = last[2], h = last[3];
    vector *to_first = (void *)to, *to_last = (void *)(to + n - 64);
    to_first[0] = a;
    to_first[1] = b;
    to_first[2] = c;
    to_first[3] = d;
    to_last[0] = e;
    to_last[1] = f;
    to_last[2] = g;
    to_last[3] = h;
}

/* The usual redirect: one word of the options, which holds the offer, becomes r, and the others stay; the destination
 * becomes the backend.  All of it is of one family.  Returns as crab_rewrite does. */
CRAB_TEMPLATE uint8_t *crab_rewrite_word(uint8_t *frame, uint32_t *len, const struct crab_packet *p,
                                         const struct crab_tcp_sum *sum, uint32_t word, const struct crab_redirect *r,
                                         const struct crab_backend *backend)
{
    size_t before = (size_t)p->l4 + CRAB_TCP_MIN + 4 * word, size = p->family == 4 ? 8 : 20, growth = size - 4;
    if (crab_unlikely(r->len != size || CRAB_TCP_MIN + 4 * word >= p->tcp_header ||
                      p->tcp_header + growth > CRAB_TCP_MIN + CRAB_MAX_OPTIONS))
        return NULL;
    uint8_t *moved = frame - growth, *ip = moved + p->l3, *tcp = moved + p->l4;
    /* All that is read, is read where it was: what was just stored in large pieces is slow to read in small ones. */
    uint64_t body = sum->body + (uint32_t)~load32(frame + before) + r->tcp_change + backend->sum;
    uint64_t ip_sum = (uint64_t)(uint16_t)~load16(frame + p->l3 + CRAB_IP4_CSUM) + r->ip_change + backend->sum;
    uint8_t header = (uint8_t)(frame[p->l4 + CRAB_TCP_DOFF] + (growth / 4 << 4));
    if (crab_likely(before >= 64 && before <= 128))
        crab_move_front(moved, frame, before);
    else
        memmove(moved, frame, before);
    memcpy(moved + before, r->bytes, 8);
    if (p->family == 4) {
        store16_be(ip + CRAB_IP4_LEN, (uint16_t)(p->end - p->l3 + growth));
        store16(ip + CRAB_IP4_CSUM, (uint16_t)~crab_fold(ip_sum));
        memcpy(ip + CRAB_IP4_DST, backend->addr + 12, 4);
    } else {
        memcpy(moved + before + 8, r->bytes + 8, 12);
        store16_be(ip + CRAB_IP6_LEN, (uint16_t)(p->end - p->l4 + growth));
        memcpy(ip + CRAB_IP6_DST, backend->addr, 16);
    }
    tcp[CRAB_TCP_DOFF] = header;
    store16(tcp + CRAB_TCP_CSUM, (uint16_t)~crab_fold(body));
    *len = (uint32_t)(p->end + growth);
    return moved;
}

static inline void crab_set_macs(uint8_t *frame, const struct crab_backend *b)
{
    memcpy(frame, b->dst_mac, 12); /* destination, then source, in the struct as in the frame */
}
_Static_assert(offsetof(struct crab_backend, src_mac) == offsetof(struct crab_backend, dst_mac) + 6, "MACs adjoin");

static inline uint32_t crab_outer_header(const struct crab_backend *b)
{
    return b->flags & CRAB_BACKEND_V6 ? 40 : 20;
}

/* Put an IP header in front of a frame's own: IP in IP (RFC 2003, RFC 2473, RFC 4213), to the backend's address.  The
 * frame is as long as its IP packet; the front has CRAB_HEADROOM bytes.  label: any function of the connection; routers
 * spread IPv6 by it (RFC 6438).  Returns the frame's new first byte and updates *len; *p is of no use any more. */
static inline uint8_t *crab_encapsulate(uint8_t *frame, uint32_t *len, const struct crab_packet *p,
                                        const struct crab_backend *b, uint64_t label)
{
    uint32_t outer = crab_outer_header(b), inner_len = *len - p->l3;
    const uint8_t *inner = frame + p->l3;
    uint8_t class = p->family == 4 ? inner[1] : (uint8_t)(inner[0] << 4 | inner[1] >> 4);
    uint8_t protocol = p->family == 4 ? 4 : 41;
    uint8_t *moved = frame - outer, *ip = moved + p->l3;
    memmove(moved, frame, p->l3);
    *len += outer;
    if (outer == 20) {
        store16(ip - 2, htons(0x0800));
        memcpy(ip, (uint8_t[12]){0x45, class, 0, 0, 0, 0, 0x40 /* do not fragment */, 0, 64, protocol}, 12);
        store16_be(ip + CRAB_IP4_LEN, (uint16_t)(outer + inner_len));
        memcpy(ip + CRAB_IP4_SRC, b->tunnel_src + 12, 4);
        memcpy(ip + CRAB_IP4_DST, b->addr + 12, 4);
        store16(ip + CRAB_IP4_CSUM, (uint16_t)~crab_fold(crab_sum(ip, 20)));
    } else {
        store16(ip - 2, htons(0x86dd));
        ip[0] = (uint8_t)(0x60 | class >> 4);
        ip[1] = (uint8_t)(class << 4 | (label & 15));
        store16(ip + 2, (uint16_t)(label >> 4));
        store16_be(ip + CRAB_IP6_LEN, (uint16_t)inner_len);
        ip[6] = protocol;
        ip[7] = 64;
        memcpy(ip + CRAB_IP6_SRC, b->tunnel_src, 16);
        memcpy(ip + CRAB_IP6_DST, b->addr, 16);
    }
    return moved;
}

/* Exchange a packet's addresses, on the link and of IP. */
static inline void crab_turn_round(uint8_t *frame, const struct crab_packet *p)
{
    uint8_t swap[16], *from = frame + p->l3 + (p->family == 4 ? CRAB_IP4_SRC : CRAB_IP6_SRC);
    size_t size = p->family == 4 ? 4 : 16;
    memcpy(swap, frame, 6);
    memcpy(frame, frame + 6, 6);
    memcpy(frame + 6, swap, 6);
    memcpy(swap, from, size);
    memcpy(from, from + size, size);
    memcpy(from + size, swap, size);
}

/* Turn a packet into the RST that answers it (RFC 9293, 3.5.2). */
static inline uint8_t *crab_answer_by_reset(uint8_t *frame, uint32_t *len, const struct crab_packet *p)
{
    uint8_t *ip = frame + p->l3, *tcp = frame + p->l4, *addrs = ip + (p->family == 4 ? CRAB_IP4_SRC : CRAB_IP6_SRC);
    uint32_t length = (uint32_t)(p->end - p->l4 - p->tcp_header) + !!(p->tcp_flags & CRAB_FIN) +
                      !!(p->tcp_flags & CRAB_SYN);
    uint16_t port = load16(tcp);
    crab_turn_round(frame, p);
    store16(tcp, load16(tcp + 2));
    store16(tcp + 2, port);
    uint32_t seq = ntohl(load32(tcp + CRAB_TCP_SEQ)), ack = load32(tcp + CRAB_TCP_SEQ + 4), next = htonl(seq + length);
    memset(tcp + CRAB_TCP_SEQ, 0, 16);
    tcp[CRAB_TCP_DOFF] = 5 << 4;
    if (p->tcp_flags & CRAB_ACK) {
        tcp[CRAB_TCP_FLAGS] = CRAB_RST;
        memcpy(tcp + CRAB_TCP_SEQ, &ack, 4);
    } else {
        tcp[CRAB_TCP_FLAGS] = CRAB_RST | CRAB_ACK;
        memcpy(tcp + CRAB_TCP_SEQ + 4, &next, 4);
    }
    if (p->family == 4) {
        store16_be(ip + CRAB_IP4_LEN, 40);
        ip[8] = 64;
        store16(ip + CRAB_IP4_CSUM, 0);
        store16(ip + CRAB_IP4_CSUM, (uint16_t)~crab_fold(crab_sum(ip, 20)));
    } else {
        store16_be(ip + CRAB_IP6_LEN, 20);
        ip[7] = 64;
    }
    store16(tcp + CRAB_TCP_CSUM, crab_tcp_right(crab_tcp_sum(tcp, 20, addrs, p->family == 4 ? 8 : 32)));
    *len = p->l4 + 20u;
    return frame;
}

#define CRAB_QUOTE 64 /* bytes of the packet that an ICMP error quotes: its headers at the least */

/* Turn a packet into the ICMP error about it, as if from the address it was sent to.  more: the header's second word. */
static inline uint8_t *crab_answer_by_error(uint8_t *frame, uint32_t *len, const struct crab_packet *p, uint8_t type,
                                            uint8_t code, uint32_t more)
{
    uint32_t header = p->family == 4 ? 20 : 40, quoted = p->end - p->l3 < CRAB_QUOTE ? p->end - p->l3 : CRAB_QUOTE;
    /* The quote stays; the headers go in front of it. */
    uint8_t *moved = frame - header - 8, *ip = moved + p->l3, *icmp = ip + header, *inner = icmp + 8;
    uint8_t macs[12];
    memcpy(macs, frame, 12);
    memmove(moved, frame, p->l3);
    memcpy(moved, macs + 6, 6);
    memcpy(moved + 6, macs, 6);
    *len = p->l3 + header + 8 + quoted;
    memset(ip, 0, header + 8);
    icmp[0] = type;
    icmp[1] = code;
    memcpy(icmp + 4, &(uint32_t){htonl(more)}, 4);
    if (p->family == 4) {
        memcpy(ip, (uint8_t[10]){0x45, 0xc0, 0, 0, 0, 0, 0x40, 0, 64, 1}, 10);
        store16_be(ip + CRAB_IP4_LEN, (uint16_t)(header + 8 + quoted));
        memcpy(ip + CRAB_IP4_SRC, inner + CRAB_IP4_DST, 4);
        memcpy(ip + CRAB_IP4_DST, inner + CRAB_IP4_SRC, 4);
        store16(ip + CRAB_IP4_CSUM, (uint16_t)~crab_fold(crab_sum(ip, 20)));
        store16(icmp + 2, (uint16_t)~crab_fold(crab_sum(icmp, 8 + quoted)));
    } else {
        ip[0] = 0x60;
        store16_be(ip + CRAB_IP6_LEN, (uint16_t)(8 + quoted));
        ip[6] = 58;
        ip[7] = 64;
        memcpy(ip + CRAB_IP6_SRC, inner + CRAB_IP6_DST, 16);
        memcpy(ip + CRAB_IP6_DST, inner + CRAB_IP6_SRC, 16);
        uint64_t sum = crab_sum(ip + CRAB_IP6_SRC, 32) + load16(ip + CRAB_IP6_LEN) + htons(58);
        store16(icmp + 2, (uint16_t)~crab_fold(sum + crab_sum(icmp, 8 + quoted)));
    }
    return moved;
}

/* The one that tells its sender to send smaller ones: "fragmentation needed" (RFC 1191) or "packet too big" (RFC 4443, 3.2).
 * mtu: the largest IP packet that fits. */
static inline uint8_t *crab_answer_too_big(uint8_t *frame, uint32_t *len, const struct crab_packet *p, uint32_t mtu)
{
    return p->family == 4 ? crab_answer_by_error(frame, len, p, 3, 4, mtu & 0xffff)
                          : crab_answer_by_error(frame, len, p, 2, 0, mtu);
}

/* The one that says that nobody has its port: "port unreachable" (RFC 792, RFC 4443, 3.1). */
static inline uint8_t *crab_answer_unreachable(uint8_t *frame, uint32_t *len, const struct crab_packet *p)
{
    return p->family == 4 ? crab_answer_by_error(frame, len, p, 3, 3, 0) : crab_answer_by_error(frame, len, p, 1, 4, 0);
}

/* Turn an echo request, whose checksum is right, into its reply. */
static inline uint8_t *crab_answer_echo(uint8_t *frame, uint32_t *len, const struct crab_packet *p)
{
    uint8_t *ip = frame + p->l3, *icmp = frame + p->l4;
    uint32_t length = (uint32_t)(p->end - p->l4);
    crab_turn_round(frame, p);
    icmp[0] = p->family == 4 ? 0 : 129;
    /* Whole: of nothing but zeros RFC 1624 makes a sum that is no zero's. */
    store16(icmp + 2, 0);
    uint64_t sum = crab_sum(icmp, length);
    if (p->family == 6)
        sum += crab_sum(ip + CRAB_IP6_SRC, 32) + htons((uint16_t)length) + htons(58);
    store16(icmp + 2, (uint16_t)~crab_fold(sum));
    ip[p->family == 4 ? 8 : 7] = 64;
    if (p->family == 4) {
        store16(ip + CRAB_IP4_CSUM, 0);
        store16(ip + CRAB_IP4_CSUM, (uint16_t)~crab_fold(crab_sum(ip, 20)));
    }
    *len = p->end;
    return frame;
}

#endif
