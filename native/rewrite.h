/* SPDX-License-Identifier: MIT */
/* Change a frame where it lies. */
#ifndef CRAB_REWRITE_H
#define CRAB_REWRITE_H

#include "packet.h"

/* Replace the TCP options of a frame, and its destination address if dip is not NULL (4 or 16 bytes, by the frame's
 * family), and write the checksums that belong to it.
 *
 * The payload stays; what is in front of it moves by the difference of the options' lengths, into the headroom when
 * they grow.  options_len is a multiple of 4, at most 40; the front of the frame has CRAB_HEADROOM bytes.  Returns the
 * frame's new first byte and updates *len and *p. */
static inline uint8_t *crab_rewrite(uint8_t *frame, uint32_t *len, struct crab_packet *p,
                                    const struct crab_tcp_sum *sum, const uint8_t *options, uint32_t options_len,
                                    const uint8_t *dip)
{
    int32_t growth = (int32_t)(options_len + CRAB_TCP_MIN) - p->tcp_header;
    uint8_t *old_options = frame + p->l4 + CRAB_TCP_MIN;
    uint64_t body = sum->body + crab_sum_less(crab_sum(old_options, (size_t)(p->tcp_header - CRAB_TCP_MIN)));

    /* grows by 20 at most (an offer becomes an IPv6 redirect), shrinks by 40 at most */
    uint8_t *moved = frame - growth;
    if (growth)
        memmove(moved, frame, (size_t)p->l4 + CRAB_TCP_MIN);
    uint8_t *ip = moved + p->l3, *tcp = moved + p->l4;
    memcpy(tcp + CRAB_TCP_MIN, options, options_len);
    body += crab_sum(options, options_len);

    uint16_t doff = load16(tcp + CRAB_TCP_DOFF);
    tcp[CRAB_TCP_DOFF] = (uint8_t)((tcp[CRAB_TCP_DOFF] & 0x0f) | (options_len + CRAB_TCP_MIN) << 2);
    body += (uint16_t)~doff;
    body += load16(tcp + CRAB_TCP_DOFF);

    uint16_t old_tcp_len = htons((uint16_t)(p->end - p->l4));
    p->end = (uint16_t)(p->end + growth);
    p->tcp_header = (uint8_t)(options_len + CRAB_TCP_MIN);
    *len = p->end;
    body += (uint16_t)~old_tcp_len;
    body += htons((uint16_t)(p->end - p->l4));

    if (p->family == 4) {
        uint64_t header = (uint16_t)~load16(ip + CRAB_IP4_CSUM);
        header += (uint16_t)~load16(ip + CRAB_IP4_LEN);
        store16_be(ip + CRAB_IP4_LEN, (uint16_t)(p->end - p->l3));
        header += load16(ip + CRAB_IP4_LEN);
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
    return moved;
}

static inline void crab_set_macs(uint8_t *frame, const struct crab_backend *b)
{
    memcpy(frame, b->dst_mac, 12); /* destination, then source, in the struct as in the frame */
}
_Static_assert(offsetof(struct crab_backend, src_mac) == offsetof(struct crab_backend, dst_mac) + 6, "MACs adjoin");

#endif
