/* SPDX-License-Identifier: MIT */
#include "oracle.h"

#include "../sim/token.h"

#include <stdlib.h>
#include <string.h>

enum { FIN = 1, SYN = 2, RST = 4, ACK = 16 };

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
    put16(p + 2, v & 0xffff);
}

/* ---- checksums (RFC 1071), SipHash-1-3 (Aumasson and Bernstein) ---- */

uint16_t oracle_checksum(const uint8_t *data, uint32_t len, uint32_t from)
{
    uint64_t sum = from;
    for (uint32_t i = 0; i < len; i++)
        sum += i % 2 ? data[i] : (uint32_t)data[i] << 8;
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)~sum;
}

static uint64_t turn(uint64_t x, int n)
{
    return x << n | x >> (64 - n);
}

static void sip_round(uint64_t v[4])
{
    v[0] += v[1], v[1] = turn(v[1], 13) ^ v[0], v[0] = turn(v[0], 32);
    v[2] += v[3], v[3] = turn(v[3], 16) ^ v[2];
    v[0] += v[3], v[3] = turn(v[3], 21) ^ v[0];
    v[2] += v[1], v[1] = turn(v[1], 17) ^ v[2], v[2] = turn(v[2], 32);
}

uint64_t oracle_hash(const uint8_t key[16], const uint8_t *data, uint32_t len)
{
    uint64_t k[2] = {0, 0};
    for (int i = 15; i >= 0; i--)
        k[i / 8] = k[i / 8] << 8 | key[i];
    uint64_t v[4] = {k[0] ^ 0x736f6d6570736575ull, k[1] ^ 0x646f72616e646f6dull, k[0] ^ 0x6c7967656e657261ull,
                     k[1] ^ 0x7465646279746573ull};
    for (uint32_t at = 0; at <= len / 8 * 8; at += 8) {
        uint64_t word = at + 8 > len ? (uint64_t)len << 56 : 0;
        for (uint32_t i = at; i < at + 8 && i < len; i++)
            word |= (uint64_t)data[i] << 8 * (i - at);
        v[3] ^= word;
        sip_round(v);
        v[0] ^= word;
    }
    v[2] ^= 0xff;
    for (int i = 0; i < 3; i++)
        sip_round(v);
    return v[0] ^ v[1] ^ v[2] ^ v[3];
}

/* ---- options ---- */

uint32_t oracle_options(const uint8_t *list, uint32_t len, struct oracle_option out[40], uint32_t *end)
{
    uint32_t n = 0, at = 0;
    while (at < len && list[at] != 0) {
        uint32_t size = list[at] == 1 ? 1 : at + 1 < len ? list[at + 1] : 0;
        if ((list[at] != 1 && size < 2) || at + size > len)
            break;
        out[n++] = (struct oracle_option){.kind = list[at], .len = (uint8_t)size, .at = list + at};
        at += size;
    }
    *end = at;
    return n;
}

static bool is_exid(const struct oracle_option *o, uint32_t exid)
{
    return o->len >= 4 && get16(o->at + 2) == exid;
}

static bool is_cr(const struct oracle_option *o)
{
    return o->kind == 42 || (o->kind == 253 && is_exid(o, 0x4352));
}

/* 0: by kind 42; 1: by RFC 6994; -1: none. */
static int offer_of(const struct oracle_option *o)
{
    if (!is_cr(o))
        return -1;
    return o->kind == 42 ? (o->len == 2 ? 0 : -1) : (o->len == 4 ? 1 : -1);
}

static int subtype(const struct oracle_option *o)
{
    return o->kind == 30 && o->len >= 3 ? o->at[2] >> 4 : -1;
}

int oracle_flags(const uint8_t *list, uint32_t len, bool experimental)
{
    struct oracle_option options[40];
    uint32_t end, n = oracle_options(list, len, options, &end);
    int flags = 0;
    for (struct oracle_option *o = options; o < options + n; o++) {
        if (is_cr(o))
            flags |= offer_of(o) < 0 ? CRAB_OPTION_FORGED : offer_of(o) == experimental ? CRAB_OPTION_OFFER
                                                                                        : CRAB_OPTION_OTHER;
        if (o->kind == 19 || o->kind == 29)
            flags |= CRAB_OPTION_SIGNED | CRAB_OPTION_UNSAFE;
        if (o->kind == 34 || (o->kind == 254 && is_exid(o, 0xf989)))
            flags |= CRAB_OPTION_UNSAFE;
        if (subtype(o) == 0)
            flags |= CRAB_OPTION_MPTCP;
        if (subtype(o) == 1)
            flags |= CRAB_OPTION_JOIN | CRAB_OPTION_UNSAFE;
    }
    return flags;
}

int oracle_rewrite(const uint8_t *list, uint32_t len, bool experimental, const uint8_t *vip, uint32_t vip_len,
                   uint8_t out[80])
{
    struct oracle_option options[40];
    uint8_t redirect[20], made[80];
    uint32_t end, n = oracle_options(list, len, options, &end), size = 0, have = 0;
    if (vip) {
        redirect[have++] = experimental ? 253 : 42;
        redirect[have++] = (uint8_t)((experimental ? 4 : 2) + vip_len);
        if (experimental) {
            redirect[have++] = 0x43;
            redirect[have++] = 0x52;
        }
        memcpy(redirect + have, vip, vip_len);
        have += vip_len;
    }
    for (uint32_t i = 0; i < n;) {
        /* a run of NOPs and CR options, or one other option */
        uint32_t before = 0, first = i;
        bool ours = false;
        for (; i < n && (options[i].kind == 1 || is_cr(&options[i])); i++) {
            ours |= is_cr(&options[i]);
            before += options[i].len;
        }
        if (!ours) {
            uint32_t to = i > first ? i : ++i;
            for (; first < to; first++) {
                memcpy(made + size, options[first].at, options[first].len);
                size += options[first].len;
            }
            continue;
        }
        memcpy(made + size, redirect, have);
        size += have;
        for (uint32_t nops = (before - have) % 4; nops; nops--)
            made[size++] = 1;
        have = 0;
    }
    memcpy(made + size, list + end, len - end);
    size += len - end;
    uint32_t front = 0;
    if (have) {
        memcpy(out, redirect, have);
        for (front = have; front % 4;)
            out[front++] = 1;
    }
    memcpy(out + front, made, size);
    return front + size > 40 ? -1 : (int)(front + size);
}

/* Linux' answer has an MSS, and of the rest what the SYN has. */
static uint32_t answered(const struct oracle_option *o, uint32_t n)
{
    bool stamps = false, sack = false, scale = false, multipath = false;
    for (uint32_t i = 0; i < n; i++) {
        stamps |= o[i].kind == 8;
        sack |= o[i].kind == 4;
        scale |= o[i].kind == 3;
        multipath |= subtype(&o[i]) == 0;
    }
    return 4 + (stamps ? 12 : sack ? 4 : 0) + (scale ? 4 : 0) + (multipath ? 12 : 0);
}

/* ---- what is what ---- */

/* A frame, taken apart. */
struct look {
    const struct world *w;
    const uint8_t *frame, *ip, *up; /* link layer, IP header, what is behind */
    uint32_t l3, header, total;     /* total: bytes of the IP packet, header included */
    bool six;
    const uint8_t *from, *to;
    uint32_t size; /* of an address */
};

static bool is_mapped(const uint8_t *a)
{
    static const uint8_t prefix[12] = {[10] = 0xff, [11] = 0xff};
    return !memcmp(a, prefix, 12);
}

/* addr: as an address of 16 bytes. */
static int service_at(const struct world *w, const uint8_t addr[16], const uint8_t *port)
{
    for (int i = 0; i < SERVICES; i++)
        if (!memcmp(w->services[i].addr, addr, 16) && !memcmp(&w->services[i].port_be, port, 2))
            return i;
    return -1;
}

static void widen(uint8_t out[16], const uint8_t *addr, uint32_t size)
{
    memset(out, 0, 16);
    if (size == 4)
        out[10] = out[11] = 0xff;
    memcpy(out + 16 - size, addr, size);
}

static uint32_t pseudo_sum(const struct look *k, uint32_t protocol, uint32_t length)
{
    return (uint16_t)~oracle_checksum(k->from, 2 * k->size, protocol + length);
}

/* What may be said of a backend in a service. */
static uint32_t flags_of(const struct world *w, int service, uint16_t backend)
{
    const struct crab_service *s = &w->services[service];
    uint32_t flags = w->backends[backend].flags;
    for (uint32_t i = s->first_exception; i < s->first_exception + s->exception_count; i++)
        if (w->exceptions[i].backend == backend) {
            flags &= ~(uint32_t)(CRAB_BACKEND_CR | CRAB_BACKEND_DEAD);
            flags |= w->exceptions[i].flags;
        }
    return flags;
}

static bool is_usable(const struct world *w, int service, uint16_t backend)
{
    if (backend >= BACKENDS)
        return false;
    uint32_t flags = flags_of(w, service, backend);
    return flags & CRAB_BACKEND_USABLE && !(flags & CRAB_BACKEND_DEAD);
}

/* ---- what is sent ---- */

static void put(struct verdict *v, const void *bytes, uint32_t n)
{
    memcpy(v->bytes + v->len, bytes, n);
    v->len += n;
}

/* The link layer's header, back to the sender. */
static void put_back(struct verdict *v, const struct look *k)
{
    v->len = 0;
    put(v, k->frame + 6, 6);
    put(v, k->frame, 6);
    put(v, k->frame + 12, k->l3 - 12);
}

/* The header to a backend; other: the EtherType to be written, or 0. */
static void put_link(struct verdict *v, const struct look *k, const struct crab_backend *b, uint32_t other)
{
    v->len = 0;
    v->ifindex = b->ifindex;
    put(v, b->dst_mac, 6);
    put(v, b->src_mac, 6);
    uint32_t from = b->ifindex == HERE ? 12 : k->l3 - 2; /* tags are of no meaning elsewhere */
    put(v, k->frame + from, k->l3 - from);
    if (other)
        put16(v->bytes + v->len - 2, other);
}

static void right_header(uint8_t *ip)
{
    put16(ip + 10, 0);
    put16(ip + 10, oracle_checksum(ip, 20, 0));
}

/* An ICMP error about the packet. */
static void complain(struct verdict *v, const struct look *k, const uint8_t *ip, uint32_t total, uint8_t type, uint8_t code,
                     uint32_t more)
{
    uint8_t head[40] = {0}, body[72] = {type, code};
    uint32_t quoted = total < 64 ? total : 64, size = 8 + quoted;
    put32(body + 4, more);
    memcpy(body + 8, ip, quoted);
    put_back(v, k);
    if (!k->six) {
        put16(body + 2, oracle_checksum(body, size, 0));
        memcpy(head, (uint8_t[10]){0x45, 0xc0, 0, (uint8_t)(20 + size), 0, 0, 0x40, 0, 64, 1}, 10);
        memcpy(head + 12, ip + 16, 4);
        memcpy(head + 16, ip + 12, 4);
        right_header(head);
        put(v, head, 20);
    } else {
        head[0] = 0x60;
        put16(head + 4, size);
        head[6] = 58;
        head[7] = 64;
        memcpy(head + 8, ip + 24, 16);
        memcpy(head + 24, ip + 8, 16);
        uint32_t sum = (uint16_t)~oracle_checksum(head + 8, 32, 58 + size);
        put16(body + 2, oracle_checksum(body, size, sum));
        put(v, head, 40);
    }
    put(v, body, size);
}

/* A RST (RFC 9293, 3.5.2). */
static void answer_by_reset(struct verdict *v, const struct look *k)
{
    const uint8_t *tcp = k->up;
    uint8_t head[40], out[20] = {0};
    uint32_t header = (uint32_t)(tcp[12] >> 4) * 4, taken = k->total - k->header - header;
    memcpy(head, k->ip, k->header);
    memcpy(head + (k->from - k->ip), k->to, k->size);
    memcpy(head + (k->to - k->ip), k->from, k->size);
    memcpy(out, tcp + 2, 2);
    memcpy(out + 2, tcp, 2);
    out[12] = 5 << 4;
    if (tcp[13] & ACK) {
        memcpy(out + 4, tcp + 8, 4);
        out[13] = RST;
    } else {
        put32(out + 8, get32(tcp + 4) + taken + !!(tcp[13] & SYN) + !!(tcp[13] & FIN));
        out[13] = RST | ACK;
    }
    if (!k->six) {
        put16(head + 2, 40);
        head[8] = 64;
        right_header(head);
    } else {
        put16(head + 4, 20);
        head[7] = 64;
    }
    put16(out + 16, oracle_checksum(out, 20, pseudo_sum(k, 6, 20)));
    put_back(v, k);
    put(v, head, k->header);
    put(v, out, 20);
}

/* By direct server return: a packet of `total` bytes at ip, to a backend. */
static void fall_back(const struct look *k, const struct crab_service *s, uint16_t id, const uint8_t *ip, uint32_t total,
                      uint64_t hash, enum crab_counter what, struct verdict *v)
{
    const struct crab_backend *b = &k->w->backends[id];
    bool six = b->flags & CRAB_BACKEND_V6, on_link = b->flags & CRAB_BACKEND_ON_LINK, icmp = what == CRAB_C_FALLBACK_ICMP;
    const uint8_t *addr = b->addr + (six ? 0 : 12), *source = b->tunnel_src + (six ? 0 : 12);
    bool by_mac = six == k->six && on_link && s->fallback != CRAB_FALLBACK_IPIP;
    uint32_t hop = k->six ? 7 : 8, outer = by_mac ? 0 : six ? 40 : 20;
    v->what = CRAB_C_DROP_NO_PATH;
    if (!by_mac && s->fallback == CRAB_FALLBACK_L2)
        return;
    v->what = CRAB_C_DROP_SENT_BACK;
    if (by_mac && !memcmp(k->frame + 6, b->dst_mac, 6) && memcmp(k->from, addr, k->size))
        return;
    v->what = CRAB_C_DROP_HOPS;
    if (by_mac && ip[hop] < 2)
        return;
    uint32_t fits = b->mtu - outer;
    if (!by_mac && (int32_t)fits < (k->six ? 1280 : 552))
        fits = k->six ? 1280 : 552;
    if ((!by_mac || b->ifindex != HERE) && total > fits) {
        v->what = CRAB_C_DROP_TOO_BIG;
        if (icmp || (!k->six && !(ip[6] & 0x40)))
            return;
        v->what = CRAB_C_TOO_BIG;
        if (k->six)
            complain(v, k, ip, total, 2, 0, fits);
        else
            complain(v, k, ip, total, 3, 4, fits);
        return;
    }
    v->what = what;
    if (by_mac) {
        put_link(v, k, b, 0);
        put(v, ip, total);
        uint8_t *out = v->bytes + v->len - total;
        out[hop]--;
        if (!k->six)
            right_header(out);
        return;
    }
    uint8_t class = k->six ? (uint8_t)(ip[0] << 4 | ip[1] >> 4) : ip[1], protocol = k->six ? 41 : 4, head[40] = {0};
    put_link(v, k, b, six ? 0x86dd : 0x0800);
    if (!six) {
        memcpy(head, (uint8_t[10]){0x45, class, 0, 0, 0, 0, 0x40, 0, 64, protocol}, 10);
        put16(head + 2, 20 + total);
        memcpy(head + 12, source, 4);
        memcpy(head + 16, addr, 4);
        right_header(head);
    } else {
        /* The flow label is any that is the connection's own: its lower 20 bits, as they lie in memory. */
        head[0] = (uint8_t)(0x60 | class >> 4);
        head[1] = (uint8_t)(class << 4 | (hash & 15));
        head[2] = (uint8_t)(hash >> 4);
        head[3] = (uint8_t)(hash >> 12);
        put16(head + 4, total);
        head[6] = protocol;
        head[7] = 64;
        memcpy(head + 8, source, 16);
        memcpy(head + 24, addr, 16);
    }
    put(v, head, outer);
    put(v, ip, total);
}

/* ---- a VIP's, but no service's ---- */

static bool is_nobody(const struct look *k)
{
    static const uint8_t zeros[16];
    const uint8_t *a = k->from;
    if (!k->six)
        return a[0] == 0 || a[0] == 127 || a[0] >= 224;
    return a[0] == 0xff || is_mapped(a) || (!memcmp(a, zeros, 15) && a[15] < 2);
}

static bool is_vip(const struct world *w, const struct look *k)
{
    uint8_t addr[16];
    widen(addr, k->to, k->size);
    if (k->six && is_mapped(k->to))
        return false;
    return w->answers && (!memcmp(addr, w->services[0].addr, 16) || !memcmp(addr, w->services[2].addr, 16));
}

/* Without IPv4 options, extension headers and fragments; least: bytes behind the header. */
static bool is_plain(const struct look *k, uint8_t protocol, uint32_t least, uint32_t room)
{
    if (k->six ? k->ip[6] != protocol : k->ip[0] != 0x45 || k->ip[9] != protocol || get16(k->ip + 6) & 0x3fff)
        return false;
    return k->total <= room && k->total >= k->header + least;
}

static void be_host(const struct look *k, uint32_t room, struct verdict *v)
{
    v->what = CRAB_C_DROP_NOT_SERVICE;
    if (!is_vip(k->w, k))
        return;
    v->what = CRAB_C_DROP_CLOSED;
    if (is_nobody(k))
        return;
    if (!k->six && k->ip[0] == 0x45 && oracle_checksum(k->ip, 20, 0)) {
        v->what = CRAB_C_DROP_CHECKSUM;
        return;
    }
    uint32_t length = k->total - k->header;
    if (is_plain(k, 6, 20, room) && k->up[12] >> 4 >= 5 && (uint32_t)(k->up[12] >> 4) * 4 <= length) {
        uint32_t pseudo = pseudo_sum(k, 6, length);
        uint8_t flags = k->up[13];
        if (oracle_checksum(k->up, length, pseudo) && get16(k->up + 16) != pseudo) {
            v->what = CRAB_C_DROP_CHECKSUM;
        } else if (!(flags & RST) && !(flags & SYN && flags & (ACK | FIN))) {
            v->what = CRAB_C_CLOSED;
            answer_by_reset(v, k);
        }
        return;
    }
    uint8_t icmp = k->six ? 58 : 1;
    if (is_plain(k, icmp, 8, room)) {
        if (k->up[0] != (k->six ? 128 : 8) || k->up[1])
            return;
        uint32_t pseudo = k->six ? pseudo_sum(k, 58, length) : 0;
        if (oracle_checksum(k->up, length, pseudo)) {
            v->what = CRAB_C_DROP_CHECKSUM;
            return;
        }
        v->what = CRAB_C_ECHO;
        put_back(v, k);
        put(v, k->ip, k->total);
        uint8_t *ip = v->bytes + k->l3, *out = ip + k->header;
        memcpy(ip + (k->from - k->ip), k->to, k->size);
        memcpy(ip + (k->to - k->ip), k->from, k->size);
        ip[k->six ? 7 : 8] = 64;
        if (!k->six)
            right_header(ip);
        out[0] = k->six ? 129 : 0;
        put16(out + 2, 0);
        put16(out + 2, oracle_checksum(out, length, pseudo));
        return;
    }
    if (is_plain(k, 17, 8, room)) {
        v->what = CRAB_C_CLOSED;
        complain(v, k, k->ip, k->total, k->six ? 1 : 3, k->six ? 4 : 3, 0);
    }
}

/* ---- services ---- */

static uint16_t by_table(const struct look *k, int service, const uint8_t *tuple, uint64_t hash)
{
    const struct crab_service *s = &k->w->services[service];
    if (s->source4) {
        uint8_t prefix[36] = {0};
        uint32_t bits = k->six ? s->source6 : s->source4;
        for (uint32_t i = 0; i < bits; i++)
            prefix[i / 8] |= tuple[i / 8] & 0x80 >> i % 8;
        hash = oracle_hash(k->w->key, prefix, 2 * k->size + 4);
    }
    uint16_t backend = s->table[((hash >> 32) * SLOTS) >> 32];
    return is_usable(k->w, service, backend) ? backend : CRAB_NO_BACKEND;
}

static struct oracle_flow *flow_of(struct oracle *o, const uint8_t *tuple, uint32_t size, enum oracle_state state)
{
    for (uint32_t i = 0; i < o->flow_count; i++)
        if (o->flows[i].state == state && o->flows[i].size == size && !memcmp(o->flows[i].tuple, tuple, size))
            return &o->flows[i];
    return NULL;
}

static void forget(struct oracle *o, struct oracle_flow *f)
{
    *f = o->flows[--o->flow_count];
}

static bool in_prefixes(const struct look *k, const struct crab_service *s)
{
    uint8_t client[16];
    widen(client, k->from, k->size);
    for (uint32_t i = s->first_prefix; i < s->first_prefix + s->prefix_count; i++) {
        const struct crab_prefix *p = &k->w->prefixes[i];
        bool same = true;
        for (uint32_t bit = 0; bit < p->bits; bit++)
            same &= !((client[bit / 8] ^ p->addr[bit / 8]) & 0x80 >> bit % 8);
        if (same)
            return true;
    }
    return !s->prefix_count;
}

/* Write the right TCP checksum into a packet. */
static void with_checksum(const struct look *k, uint8_t *ip, uint32_t total)
{
    uint8_t *tcp = ip + k->header;
    uint32_t length = total - k->header;
    uint32_t pseudo = (uint16_t)~oracle_checksum(ip + (k->six ? 8 : 12), 2 * k->size, 6 + length);
    put16(tcp + 16, 0);
    put16(tcp + 16, oracle_checksum(tcp, length, pseudo));
}

/* A SYN-ACK's window is not scaled, so what the client sends first is within 64 kB. */
static bool follows(const struct look *k, const struct oracle_flow *syn)
{
    return get32(k->up + 4) - get32(syn->isn) - 1 < 65536;
}

static void judge_other(struct oracle *o, const struct look *k, int service, const uint8_t *tuple, uint32_t tuple_size,
                        uint64_t hash, struct verdict *v)
{
    const struct world *w = k->w;
    const struct crab_service *s = &w->services[service];
    uint8_t flags = k->up[13], packet[LONGEST];
    struct oracle_flow *settled = flow_of(o, tuple, tuple_size, SETTLED), *pending = flow_of(o, tuple, tuple_size, PENDING);
    struct oracle_flow *before = settled ? settled : flow_of(o, tuple, tuple_size, WRITTEN);
    struct oracle_flow *earlier = flow_of(o, tuple, tuple_size, EARLIER);
    uint16_t chosen = by_table(k, service, tuple, hash);
    if (earlier && follows(k, earlier) && !follows(k, pending))
        pending = earlier;
    struct oracle_flow *flow = pending && (follows(k, pending) || !before) ? pending : before;
    if (flow && flow == pending && flags & ACK && !(flags & RST)) {
        struct oracle_flow *over = settled ? settled : earlier;
        flow->state = SETTLED;
        if (over && over != flow) {
            *over = *flow;
            forget(o, flow);
            flow = over;
        }
    }
    if (flow) {
        bool dead = flags_of(w, service, flow->backend) & CRAB_BACKEND_DEAD;
        if (is_usable(w, service, flow->backend)) {
            chosen = flow->backend;
        } else if (!dead) {
            chosen = CRAB_NO_BACKEND;
        } else if (s->on_dead == CRAB_ON_DEAD_RESET) {
            v->what = flags & RST ? CRAB_C_DROP_NO_BACKEND : CRAB_C_RESET;
            if (!(flags & RST))
                answer_by_reset(v, k);
            return;
        }
        if (chosen != CRAB_NO_BACKEND)
            flow->backend = chosen;
    }
    v->what = CRAB_C_DROP_NO_BACKEND;
    if (chosen == CRAB_NO_BACKEND)
        return;
    struct oracle_option options[40];
    uint32_t end, n = oracle_options(k->up + 20, (uint32_t)(k->up[12] >> 4) * 4 - 20, options, &end);
    for (uint32_t i = 0; i < n && w->joins; i++)
        if (subtype(&options[i]) == 0 && (options[i].at[2] & 15) == 1 &&
            (options[i].len == 20 || options[i].len == 22 || options[i].len == 24)) {
            struct oracle_token *t = o->tokens, new = {.service = s->index, .backend = chosen};
            token_of(options[i].at + 12, new.token);
            while (t < o->tokens + o->token_count && (t->service != s->index || memcmp(t->token, new.token, 4)))
                t++;
            o->token_count += t == o->tokens + o->token_count;
            *t = new;
            break;
        }
    memcpy(packet, k->ip, k->total);
    with_checksum(k, packet, k->total);
    fall_back(k, s, chosen, packet, k->total, hash, CRAB_C_FALLBACK_ESTABLISHED, v);
    /* The XDP program's from now on: known to it, whether its SYN was seen or not. */
    if (w->table && !flow && !(flags & RST) && v->what == CRAB_C_FALLBACK_ESTABLISHED) {
        struct oracle_flow *f = &o->flows[o->flow_count++];
        *f = (struct oracle_flow){.size = tuple_size, .backend = chosen, .state = WRITTEN};
        memcpy(f->tuple, tuple, tuple_size);
    }
}

static void judge_syn(struct oracle *o, const struct look *k, int service, const uint8_t *tuple, uint32_t tuple_size,
                      uint64_t hash, struct verdict *v)
{
    const struct world *w = k->w;
    const struct crab_service *s = &w->services[service];
    const uint8_t *list = k->up + 20;
    uint32_t header = (uint32_t)(k->up[12] >> 4) * 4, len = header - 20, data = k->total - k->header - header, end;
    struct oracle_option options[40];
    uint32_t n = oracle_options(list, len, options, &end);
    bool experimental = w->form == CRAB_FORM_EXPERIMENTAL;
    int found = oracle_flags(list, len, experimental);
    const uint8_t *vip = s->addr + (k->six ? 0 : 12);
    uint8_t listed[80], packet[LONGEST];
    bool offers = found & CRAB_OPTION_OFFER;
    bool has_room = oracle_rewrite(list, len, experimental, vip, k->size, listed) >= 0 &&
                    !(found & CRAB_OPTION_MPTCP && answered(options, n) + (k->six ? 20 : 8) > 40);
    /* Why it goes by fallback, whoever its backend is. */
    enum crab_counter by_itself = s->mode == CRAB_MODE_NEVER                           ? CRAB_C_FALLBACK_MODE
                                  : data || found & CRAB_OPTION_UNSAFE                 ? CRAB_C_FALLBACK_UNSAFE
                                  : s->mode == CRAB_MODE_NEGOTIATED && !offers         ? CRAB_C_FALLBACK_NO_OFFER
                                  : !in_prefixes(k, s)                                 ? CRAB_C_FALLBACK_PREFIX
                                                                                       : CRAB_C_REDIRECTED;
    struct oracle_flow *settled = flow_of(o, tuple, tuple_size, SETTLED), *pending = flow_of(o, tuple, tuple_size, PENDING);
    settled = settled ? settled : flow_of(o, tuple, tuple_size, EARLIER);
    struct oracle_flow *flow = pending && !memcmp(pending->isn, k->up + 4, 4)   ? pending
                               : settled && !memcmp(settled->isn, k->up + 4, 4) ? settled
                                                                                : NULL;
    uint32_t copies = 0;
    uint16_t chosen;
    if (flow && is_usable(w, service, flow->backend)) {
        chosen = flow->backend;
        copies = flow->copies++;
    } else {
        chosen = by_table(k, service, tuple, hash);
        for (uint32_t i = 0; i < n; i++)
            if (subtype(&options[i]) == 1 && options[i].len == 12) {
                for (uint32_t t = 0; t < o->token_count; t++)
                    if (o->tokens[t].service == s->index && !memcmp(o->tokens[t].token, options[i].at + 4, 4) &&
                        is_usable(w, service, o->tokens[t].backend))
                        chosen = o->tokens[t].backend;
                break;
            }
        if (by_itself == CRAB_C_REDIRECTED && has_room && s->custom && is_usable(w, service, world_chooses(hash)))
            chosen = world_chooses(hash);
        else if (by_itself == CRAB_C_REDIRECTED && has_room && w->pooled && w->policy != CUSTOM && service % 2 == 0)
            chosen = o->chosen(o->context, hash, k->up + 4);
        if (chosen == CRAB_NO_BACKEND) {
            v->what = CRAB_C_DROP_NO_BACKEND;
            if (s->refuses && !is_nobody(k)) {
                v->what = CRAB_C_REFUSED;
                answer_by_reset(v, k);
            }
            return;
        }
        if (pending && !settled) { /* one SYN more than two takes the place of the newer one */
            pending->state = EARLIER;
            pending = NULL;
        }
        if (!pending) {
            pending = &o->flows[o->flow_count++];
            pending->size = tuple_size;
            memcpy(pending->tuple, tuple, tuple_size);
            pending->state = PENDING;
        }
        memcpy(pending->isn, k->up + 4, 4);
        pending->backend = chosen;
        pending->copies = 1;
        pending->offered = offers;
        flow = pending;
    }
    const struct crab_backend *b = &w->backends[chosen];
    bool six = b->flags & CRAB_BACKEND_V6;
    v->what = by_itself;
    if (by_itself == CRAB_C_FALLBACK_UNSAFE)
        flow->copies = 1000;
    else if ((by_itself == CRAB_C_REDIRECTED || by_itself == CRAB_C_FALLBACK_PREFIX) && copies >= 2)
        v->what = CRAB_C_FALLBACK_RETRANSMIT;
    else if (by_itself == CRAB_C_REDIRECTED && copies && flow->offered && !offers)
        v->what = CRAB_C_FALLBACK_NO_OFFER;
    else if (by_itself == CRAB_C_REDIRECTED && (!(flags_of(w, service, chosen) & CRAB_BACKEND_CR) || six != k->six))
        v->what = CRAB_C_FALLBACK_NO_CR_BACKEND;
    else if (by_itself == CRAB_C_REDIRECTED && !has_room)
        v->what = CRAB_C_FALLBACK_NO_ROOM;
    bool redirected = v->what == CRAB_C_REDIRECTED;
    int listed_len = (int)len;
    if (found & CRAB_OPTION_SIGNED && !redirected) {
        memcpy(listed, list, len);
        for (uint32_t i = 0; i < n; i++)
            if (is_cr(&options[i]) && offer_of(&options[i]) < 0)
                memset(listed + (options[i].at - list), 1, options[i].len);
    } else {
        listed_len = oracle_rewrite(list, len, experimental, redirected ? vip : NULL, k->size, listed);
    }
    uint32_t total = k->header + 20 + (uint32_t)listed_len + data;
    memcpy(packet, k->ip, k->header + 20);
    memcpy(packet + k->header + 20, listed, (size_t)listed_len);
    memcpy(packet + k->header + 20 + listed_len, k->up + header, data);
    packet[k->header + 12] = (uint8_t)((20 + listed_len) << 2 | (k->up[12] & 15));
    if (redirected)
        memcpy(packet + (k->to - k->ip), b->addr + (six ? 0 : 12), k->size);
    if (k->six) {
        put16(packet + 4, total - 40);
    } else {
        put16(packet + 2, total);
        right_header(packet);
    }
    with_checksum(k, packet, total);
    if (redirected) {
        put_link(v, k, b, 0);
        put(v, packet, total);
    } else {
        fall_back(k, s, chosen, packet, total, hash, v->what, v);
    }
}

/* ---- ICMP errors ---- */

/* Returns whether it is one. */
static bool judge_error(struct oracle *o, const struct look *k, uint32_t room, struct verdict *v)
{
    const struct world *w = k->w;
    const uint8_t *quote = k->up + 8, *ports = quote + k->header;
    if (!is_plain(k, k->six ? 58 : 1, 8 + k->header + 8, room))
        return false;
    uint8_t type = k->up[0];
    if (k->six ? type < 1 || type > 4 || quote[0] >> 4 != 6 || quote[6] != 6
               : (type != 3 && type != 11 && type != 12) || quote[0] != 0x45 || quote[9] != 6 || get16(quote + 6) & 0x1fff)
        return false;
    /* The connection, as its client sends it. */
    uint8_t tuple[36], vip[16];
    const uint8_t *from = quote + (k->six ? 8 : 12);
    memcpy(tuple, from + k->size, k->size);
    memcpy(tuple + k->size, from, k->size);
    memcpy(tuple + 2 * k->size, ports + 2, 2);
    memcpy(tuple + 2 * k->size + 2, ports, 2);
    widen(vip, from, k->size);
    int service = service_at(w, vip, ports);
    if (k->six && (is_mapped(from) || is_mapped(from + 16) || is_mapped(k->from) || is_mapped(k->to))) {
        if (service < 0)
            return false;
        v->what = CRAB_C_DROP_MAPPED;
        return v->quoting = true;
    }
    if (service < 0)
        return false;
    v->quoting = true;
    uint32_t length = k->total - k->header;
    if ((!k->six && oracle_checksum(k->ip, 20, 0)) ||
        oracle_checksum(k->up, length, k->six ? pseudo_sum(k, 58, length) : 0)) {
        v->what = CRAB_C_DROP_CHECKSUM;
        return true;
    }
    uint32_t tuple_size = 2 * k->size + 4;
    uint64_t hash = oracle_hash(w->key, tuple, tuple_size);
    struct oracle_flow *flow = flow_of(o, tuple, tuple_size, SETTLED);
    flow = flow ? flow : flow_of(o, tuple, tuple_size, EARLIER);
    flow = flow ? flow : flow_of(o, tuple, tuple_size, WRITTEN);
    flow = flow ? flow : flow_of(o, tuple, tuple_size, PENDING);
    uint16_t chosen = flow ? flow->backend : by_table(k, service, tuple, hash);
    v->what = CRAB_C_DROP_NO_BACKEND;
    if (is_usable(w, service, chosen))
        fall_back(k, &w->services[service], chosen, k->ip, k->total, hash, CRAB_C_FALLBACK_ICMP, v);
    return true;
}

/* ---- all ---- */

/* A handler's, of what is no service's: behind at most two tags. */
static int handler_of(const struct world *w, const uint8_t *frame, uint32_t len)
{
    uint32_t at = 12;
    if (!w->matches || len < 14)
        return -1;
    for (int tags = 0; tags < 2 && (get16(frame + at) == 0x8100 || get16(frame + at) == 0x88a8); tags++) {
        at += 4;
        if (at + 2 > len)
            return -1;
    }
    const uint8_t *ip = frame + at + 2;
    uint32_t type = get16(frame + at), room = len - at - 2, header = 0;
    static const uint8_t taken[16] = {0xfd, [15] = 0x99};
    if (type == 0x0806)
        return TAKES_ARP;
    if (type == 0x0800 && room >= 20 && ip[0] >> 4 == 4 && (ip[0] & 15) >= 5 && ip[9] == 17 && !(get16(ip + 6) & 0x1fff))
        header = (uint32_t)(ip[0] & 15) * 4;
    if (type == 0x86dd && room >= 40 && ip[0] >> 4 == 6 && ip[6] == 17)
        header = 40;
    if (header && room >= header + 4 && get16(ip + header + 2) == 53)
        return TAKES_DNS;
    if (type == 0x86dd && room >= 40 && ip[0] >> 4 == 6 && !memcmp(ip + 24, taken, 16))
        return TAKES_ADDRESS;
    return -1;
}

static void nobodys(const struct look *k, const uint8_t *frame, uint32_t len, enum crab_counter why, struct verdict *v)
{
    static const enum crab_counter became[3] = {CRAB_C_HANDLER_SENT, CRAB_C_HANDLER_KEPT, CRAB_C_DROP_HANDLER};
    int handler = handler_of(k->w, frame, len);
    v->len = 0;
    if (handler >= 0) {
        v->what = became[handler];
        if (handler == TAKES_ARP)
            put(v, frame, len);
        return;
    }
    v->what = why;
    if (why == CRAB_C_DROP_NOT_SERVICE && k->ip)
        be_host(k, len - k->l3, v);
}

void oracle_begin(struct oracle *o, const struct world *world)
{
    o->world = world;
    o->flow_count = o->token_count = 0;
}

void oracle_judge(struct oracle *o, const uint8_t *frame, uint32_t len, struct verdict *v)
{
    const struct world *w = o->world;
    struct look k = {.w = w, .frame = frame, .l3 = 14};
    v->len = 0;
    v->ifindex = HERE;
    v->quoting = false;
    v->what = CRAB_C_DROP_MALFORMED;
    if (len < 34) {
        nobodys(&k, frame, len, CRAB_C_DROP_MALFORMED, v);
        return;
    }
    uint32_t type = get16(frame + 12);
    for (int tags = 0; tags < 2 && (type == 0x8100 || type == 0x88a8); tags++) {
        type = get16(frame + k.l3 + 2);
        k.l3 += 4;
        if (len < k.l3 + 20) {
            nobodys(&k, frame, len, CRAB_C_DROP_MALFORMED, v);
            return;
        }
    }
    const uint8_t *ip = frame + k.l3;
    uint32_t room = len - k.l3;
    k.six = type == 0x86dd;
    if (type != 0x0800 && type != 0x86dd) {
        nobodys(&k, frame, len, CRAB_C_DROP_NOT_SERVICE, v);
        return;
    }
    if (k.six ? room < 40 || ip[0] >> 4 != 6 : ip[0] >> 4 != 4 || (ip[0] & 15) < 5) {
        nobodys(&k, frame, len, CRAB_C_DROP_MALFORMED, v);
        return;
    }
    k.ip = ip;
    k.header = k.six ? 40 : 20;
    k.up = ip + k.header;
    k.size = k.six ? 16 : 4;
    k.from = ip + (k.six ? 8 : 12);
    k.to = k.from + k.size;
    k.total = k.six ? 40 + get16(ip + 4) : get16(ip + 2);
    uint8_t protocol = ip[k.six ? 6 : 9];
    bool whole = k.six || (ip[0] == 0x45 && !(get16(ip + 6) & 0x3fff));
    if (protocol != 6 || !whole) {
        if (protocol == 6 || !judge_error(o, &k, room, v))
            nobodys(&k, frame, len, CRAB_C_DROP_NOT_SERVICE, v);
        return;
    }
    uint32_t header = 0;
    if (k.total <= room && k.total >= k.header + 20)
        header = (uint32_t)(k.up[12] >> 4) * 4;
    if (header < 20 || header > k.total - k.header) {
        nobodys(&k, frame, len, CRAB_C_DROP_MALFORMED, v);
        return;
    }
    if (!k.six && oracle_checksum(ip, 20, 0)) {
        v->what = CRAB_C_DROP_CHECKSUM;
        return;
    }
    uint8_t to[16];
    widen(to, k.to, k.size);
    int service = service_at(w, to, k.up + 2);
    if (k.six && (is_mapped(k.from) || is_mapped(k.to))) {
        if (service >= 0)
            v->what = CRAB_C_DROP_MAPPED;
        else
            nobodys(&k, frame, len, CRAB_C_DROP_NOT_SERVICE, v);
        return;
    }
    if (service < 0) {
        nobodys(&k, frame, len, CRAB_C_DROP_NOT_SERVICE, v);
        return;
    }
    uint8_t flags = k.up[13];
    v->what = CRAB_C_DROP_FLAGS;
    if (flags & SYN && flags & (ACK | RST | FIN))
        return;
    uint32_t length = k.total - k.header, pseudo = pseudo_sum(&k, 6, length);
    v->what = CRAB_C_DROP_CHECKSUM;
    if (oracle_checksum(k.up, length, pseudo) && get16(k.up + 16) != pseudo)
        return;
    uint8_t tuple[36];
    uint32_t tuple_size = 2 * k.size + 4;
    memcpy(tuple, k.from, 2 * k.size);
    memcpy(tuple + 2 * k.size, k.up, 4);
    uint64_t hash = oracle_hash(w->key, tuple, tuple_size);
    (flags & SYN ? judge_syn : judge_other)(o, &k, service, tuple, tuple_size, hash, v);
}
