/* SPDX-License-Identifier: MIT */
/* Packets as bytes.  Written by RFC 791, 8200, 9293, 792, 4443 and the protocol's page: nothing of native/ is used. */
#include "sim.h"

static uint32_t get16(const uint8_t *p)
{
    return (uint32_t)p[0] << 8 | p[1];
}

static uint32_t get32(const uint8_t *p)
{
    return get16(p) << 16 | get16(p + 2);
}

static void put16(uint8_t *p, uint32_t v)
{
    p[0] = (uint8_t)(v >> 8);
    p[1] = (uint8_t)v;
}

static void put32(uint8_t *p, uint32_t v)
{
    put16(p, v >> 16);
    put16(p + 2, v);
}

static uint32_t sum_of(const uint8_t *p, uint32_t n, uint32_t sum)
{
    uint64_t all = sum;
    for (; n >= 4; p += 4, n -= 4)
        all += get32(p);
    if (n >= 2)
        all += get16(p);
    if (n & 1)
        all += (uint32_t)p[n - 1] << 8;
    all = (all >> 32) + (all & 0xffffffff);
    all = (all >> 32) + (all & 0xffffffff);
    all = (all >> 16) + (all & 0xffff);
    all = (all >> 16) + (all & 0xffff);
    return (uint32_t)((all >> 16) + (all & 0xffff));
}

static uint32_t pseudo(const uint8_t *ip, uint32_t length, uint32_t proto)
{
    return ip[0] >> 4 == 4 ? sum_of(ip + 12, 8, length + proto) : sum_of(ip + 8, 32, length + proto);
}

static bool is4(const uint8_t *a)
{
    static const uint8_t prefix[12] = {[10] = 0xff, [11] = 0xff};
    return !memcmp(a, prefix, 12);
}

void frame_write(struct frame *f, const uint8_t to_mac[6], const uint8_t from_mac[6], const struct segment *s)
{
    uint32_t header = is4(s->to) ? 20 : 40, tcp_length = 20 + s->option_count + s->length;
    f->data = f->place + SIM_HEADROOM;
    f->len = 14 + header + tcp_length;
    memcpy(f->data, to_mac, 6);
    memcpy(f->data + 6, from_mac, 6);
    uint8_t *ip = f->data + 14, *tcp = ip + header;
    memset(ip, 0, header + 20);
    if (header == 20) {
        put16(f->data + 12, 0x0800);
        ip[0] = 0x45;
        put16(ip + 2, 20 + tcp_length);
        put16(ip + 6, 0x4000);
        ip[8] = s->ttl ? s->ttl : 64;
        ip[9] = 6;
        memcpy(ip + 12, s->from + 12, 4);
        memcpy(ip + 16, s->to + 12, 4);
        put16(ip + 10, ~sum_of(ip, 20, 0) & 0xffff);
    } else {
        put16(f->data + 12, 0x86dd);
        ip[0] = 0x60;
        put16(ip + 4, tcp_length);
        ip[6] = 6;
        ip[7] = s->ttl ? s->ttl : 64;
        memcpy(ip + 8, s->from, 16);
        memcpy(ip + 24, s->to, 16);
    }
    put16(tcp, s->sport);
    put16(tcp + 2, s->dport);
    put32(tcp + 4, s->seq);
    put32(tcp + 8, s->ack);
    tcp[12] = (uint8_t)((20 + s->option_count) / 4 << 4);
    tcp[13] = s->flags;
    put16(tcp + 14, 65535);
    memcpy(tcp + 20, s->options, s->option_count);
    if (s->length)
        memcpy(tcp + 20 + s->option_count, s->payload, s->length);
    put16(tcp + 16, ~sum_of(tcp, tcp_length, pseudo(ip, tcp_length, 6)) & 0xffff);
}

void frame_complain(struct frame *f, const struct frame *about, const uint8_t from[16], uint32_t mtu)
{
    const uint8_t *quoted = about->data + 14;
    bool v4 = quoted[0] >> 4 == 4;
    uint32_t header = v4 ? 20 : 40, n = about->len - 14 < 128 ? about->len - 14 : 128, size = header + 8 + n;
    f->data = f->place + SIM_HEADROOM;
    f->len = 14 + size;
    memcpy(f->data + 12, about->data + 12, 2);
    uint8_t *ip = f->data + 14, *icmp = ip + header;
    memset(ip, 0, header + 8);
    memcpy(icmp + 8, quoted, n);
    if (v4) {
        ip[0] = 0x45;
        put16(ip + 2, size);
        ip[8] = 64;
        ip[9] = 1;
        memcpy(ip + 12, from + 12, 4);
        memcpy(ip + 16, quoted + 12, 4);
        put16(ip + 10, ~sum_of(ip, 20, 0) & 0xffff);
        icmp[0] = 3;
        icmp[1] = 4;
        put16(icmp + 6, mtu);
    } else {
        ip[0] = 0x60;
        put16(ip + 4, 8 + n);
        ip[6] = 58;
        ip[7] = 64;
        memcpy(ip + 8, from, 16);
        memcpy(ip + 24, quoted + 8, 16);
        icmp[0] = 2;
        put32(icmp + 4, mtu);
    }
    put16(icmp + 2, ~sum_of(icmp, 8 + n, v4 ? 0 : pseudo(ip, 8 + n, 58)) & 0xffff);
}

/* The outer one of two is the provider's (802.1ad). */
static void tag(uint8_t bytes[4], uint32_t i, uint32_t tags)
{
    put16(bytes, i + 1 < tags ? 0x88a8 : 0x8100);
    put16(bytes + 2, 0x6005 + i);
}

void frame_tag(struct frame *f, uint32_t tags)
{
    memmove(f->data - 4 * tags, f->data, 12);
    f->data -= 4 * tags;
    f->len += 4 * tags;
    for (uint32_t i = 0; i < tags; i++)
        tag(f->data + 12 + 4 * i, i, tags);
}

bool frame_untag(struct frame *f, uint32_t tags)
{
    uint8_t wanted[4];
    uint32_t there = 0;
    bool same = f->len >= 14 + 4 * tags;
    for (; same && there < tags; there++) {
        tag(wanted, there, tags);
        same = !memcmp(f->data + 12 + 4 * there, wanted, 4);
    }
    if (!same)
        return false;
    memmove(f->data + 4 * tags, f->data, 12);
    f->data += 4 * tags;
    f->len -= 4 * tags;
    uint32_t type = get16(f->data + 12);
    return type != 0x8100 && type != 0x88a8;
}

/* The innermost IP header of a frame, and the bytes from it on; NULL: there is none. */
static uint8_t *innermost(struct frame *f, uint32_t *room, uint8_t *tunnels)
{
    uint8_t *ip = f->data + 14;
    uint32_t left = f->len - 14;
    *tunnels = 0;
    if (f->len < 34)
        return NULL;
    for (;;) {
        uint32_t v = ip[0] >> 4, header = v == 4 ? 20 : 40, proto = v == 4 ? ip[9] : ip[6];
        if ((v != 4 && v != 6) || left < header || (v == 4 && ip[0] != 0x45))
            return NULL;
        uint32_t length = v == 4 ? get16(ip + 2) : 40 + get16(ip + 4);
        if (length < header || length > left)
            return NULL;
        left = length;
        if (proto != 4 && proto != 41) {
            *room = left;
            return ip;
        }
        ip += header;
        left -= header;
        ++*tunnels;
    }
}

/* An address of an IP header's, as 16 bytes. */
static void address(uint8_t to[16], const uint8_t *ip, bool source)
{
    if (ip[0] >> 4 == 6) {
        memcpy(to, ip + (source ? 8 : 24), 16);
        return;
    }
    memset(to, 0, 10);
    to[10] = to[11] = 0xff;
    memcpy(to + 12, ip + (source ? 12 : 16), 4);
}

int frame_read(struct frame *f, struct segment *s)
{
    uint32_t room;
    uint8_t *ip = innermost(f, &room, &s->tunnels);
    if (!ip)
        return 0;
    uint32_t v = ip[0] >> 4, header = v == 4 ? 20 : 40, proto = v == 4 ? ip[9] : ip[6], n = room - header;
    uint8_t *l4 = ip + header;
    if (v == 4 && sum_of(ip, 20, 0) != 0xffff)
        return -1;
    s->ip = ip;
    s->ip_length = room;
    s->family = (uint8_t)v;
    s->ttl = v == 4 ? ip[8] : ip[7];
    address(s->from, ip, true);
    address(s->to, ip, false);
    s->icmp = 0;
    s->length = s->option_count = 0;
    if (proto == (v == 4 ? 1 : 58) && n >= 8 + header + 8) {
        if (sum_of(l4, n, v == 4 ? 0 : pseudo(ip, n, 58)) != 0xffff)
            return -1;
        uint8_t *quote = l4 + 8;
        if ((v == 4 ? l4[0] != 3 : l4[0] > 4) || quote[0] >> 4 != v || (v == 4 ? quote[9] : quote[6]) != 6)
            return 0;
        address(s->from, quote, true);
        address(s->to, quote, false);
        s->sport = (uint16_t)get16(quote + header);
        s->dport = (uint16_t)get16(quote + header + 2);
        s->seq = get32(quote + header + 4);
        s->mtu = v == 4 ? (l4[1] == 4 ? get16(l4 + 6) : 0) : (l4[0] == 2 ? get32(l4 + 4) : 0);
        s->icmp = 1;
        s->flags = 0;
        return 1;
    }
    if (proto != 6 || n < 20)
        return 0;
    uint32_t tcp_header = (uint32_t)(l4[12] >> 4) * 4;
    if (tcp_header < 20 || tcp_header > n)
        return 0;
    s->sport = (uint16_t)get16(l4);
    s->dport = (uint16_t)get16(l4 + 2);
    s->seq = get32(l4 + 4);
    s->ack = get32(l4 + 8);
    s->flags = l4[13];
    s->option_count = tcp_header - 20;
    memcpy(s->options, l4 + 20, s->option_count);
    s->payload = l4 + tcp_header;
    s->length = n - tcp_header;
    return sum_of(l4, n, pseudo(ip, n, 6)) == 0xffff ? 1 : -1;
}

void frame_partial(struct frame *f)
{
    uint8_t *ip = f->data + 14;
    uint32_t header = ip[0] >> 4 == 4 ? 20 : 40;
    put16(ip + header + 16, pseudo(ip, f->len - 14 - header, 6));
}

bool frame_looks_partial(struct frame *f)
{
    uint32_t room;
    uint8_t tunnels, *ip = innermost(f, &room, &tunnels);
    uint32_t header = !ip || ip[0] >> 4 == 4 ? 20 : 40;
    return ip && room >= header + 20 && get16(ip + header + 16) == pseudo(ip, room - header, 6);
}

void frame_corrupt(struct frame *f, uint64_t random)
{
    uint32_t room;
    uint8_t tunnels, *ip = innermost(f, &room, &tunnels);
    if (!ip || (ip[0] >> 4 == 4 ? ip[9] : ip[6]) != 6)
        return;
    uint32_t from = ip[0] >> 4 == 4 ? 0 : 8, at = from + (uint32_t)(random >> 8) % (room - from);
    ip[at] ^= (uint8_t)(1 << (random & 7));
    f->corrupt = 1;
}

int options_redirects(const struct segment *s, uint8_t vip[16])
{
    int n = 0;
    for (uint32_t i = 0; i < s->option_count && s->options[i];) {
        const uint8_t *o = &s->options[i];
        if (o[0] == 1) {
            i++;
            continue;
        }
        if (i + 2 > s->option_count || o[1] < 2 || i + o[1] > s->option_count)
            break;
        uint32_t skip = o[0] == 42 ? 2 : o[0] == 253 && o[1] >= 4 && o[2] == 0x43 && o[3] == 0x52 ? 4 : 0;
        if (skip && o[1] > skip && !n++) {
            memset(vip, 0, 16);
            if (o[1] == skip + 4) {
                vip[10] = vip[11] = 0xff;
                memcpy(vip + 12, o + skip, 4);
            } else if (o[1] == skip + 16) {
                memcpy(vip, o + skip, 16);
            }
        }
        i += o[1];
    }
    return n;
}
