/* SPDX-License-Identifier: MIT */
#include "world.h"

#include <arpa/inet.h>
#include <stdlib.h>
#include <string.h>

/* ---- the configuration: that of tests/helpers/frames.reference, and more ---- */

static void address(uint8_t out[16], int six, uint8_t last)
{
    static const uint8_t four[16] = {[10] = 0xff, [11] = 0xff, 10}, big[16] = {0xfd};
    memcpy(out, six ? big : four, 16);
    out[15] = last;
}

static void fill(uint16_t table[SLOTS], const struct world *w, uint16_t first)
{
    struct crab_table_member members[4] = {0};
    for (uint16_t i = 0; i < 4; i++) {
        memcpy(members[i].addr, w->backends[first + i].addr, 16);
        members[i].weight = 1;
        members[i].backend = first + i;
    }
    if (crab_maglev_build(table, SLOTS, members, 4, w->key))
        abort();
}

void world_make(struct world *w, const uint8_t chosen[3])
{
    uint8_t a = chosen[0], b = chosen[1], c = chosen[2];
    memset(w, 0, sizeof *w);
    w->form = a & 1;
    w->mode = (uint8_t[]){CRAB_MODE_NEGOTIATED, CRAB_MODE_ALWAYS, CRAB_MODE_NEVER, CRAB_MODE_NEGOTIATED}[a >> 1 & 3];
    w->fallback = (a >> 3 & 3) % 3;
    w->elsewhere = a & 32;
    bool reset = a & 64;
    w->source = a & 128;
    w->answers = b & 1;
    w->table = b & 2;
    w->put_off = b & 4;
    w->joins = !(b & 8);
    w->pooled = b & 16;
    w->matches = b & 32;
    w->taps = b & 64;
    w->refuses = b & 128;
    w->policy = (c & 7) % POLICIES;
    w->said = c & 8;
    w->wild = c & 128;
    for (uint8_t i = 0; i < 16; i++)
        w->key[i] = i;
    for (uint8_t i = 0; i < BACKENDS; i++) {
        struct crab_backend *k = &w->backends[i];
        uint8_t n = i % 4, six = i / 4;
        address(k->addr, six, six ? (uint8_t)(0x11 + n) : (uint8_t)(11 + n));
        memcpy(k->dst_mac, (uint8_t[6]){2, 0, 0, 0, six + 1, n}, 6);
        memcpy(k->src_mac, (uint8_t[6]){2, 0, 0, 0, 0, 2}, 6);
        address(k->tunnel_src, six, 2);
        k->mtu = (uint32_t[]){1500, 200, 1400, 1500}[n]; /* a way that nothing long fits by, one that the longest do not */
        k->ifindex = HERE;
        k->flags = CRAB_BACKEND_USABLE | (n != 2 ? CRAB_BACKEND_CR : 0) | (i != 1 ? CRAB_BACKEND_ON_LINK : 0) |
                   (six ? CRAB_BACKEND_V6 : 0);
        if (w->elsewhere && n == 3) {
            k->mtu = 150;
            k->ifindex = ELSEWHERE;
        }
    }
    if (c & 16)
        w->backends[0].flags |= CRAB_BACKEND_DEAD, w->backends[5].flags |= CRAB_BACKEND_DEAD;
    if (c & 32)
        w->backends[3].flags &= ~(uint32_t)CRAB_BACKEND_USABLE, w->backends[4].flags &= ~(uint32_t)CRAB_BACKEND_USABLE;
    static uint16_t tables[2][SLOTS]; /* the same in every world */
    static bool filled;
    if (!filled) {
        fill(tables[0], w, 0);
        fill(tables[1], w, 4);
        filled = true;
    }
    memcpy(w->four, tables[0], sizeof w->four);
    memcpy(w->six, tables[1], sizeof w->six);
    if (c & 64) /* nobody */
        memset(w->six, 0xff, sizeof w->six);
    static const uint16_t ports_of[SERVICES] = {80, 443, 80, 81};
    for (uint8_t i = 0; i < SERVICES; i++) {
        struct crab_service *s = &w->services[i];
        bool six = i >= 2, crossed = w->fallback == CRAB_FALLBACK_IPIP && i % 2;
        address(s->addr, six, six ? 0 : 100);
        if (six)
            s->addr[14] = 1; /* fd00::100 */
        s->port_be = htons(ports_of[i]);
        s->protocol = 6;
        s->mode = i == 3 ? CRAB_MODE_NEVER : w->mode;
        s->fallback = w->fallback;
        s->on_dead = reset ? CRAB_ON_DEAD_RESET : CRAB_ON_DEAD_REASSIGN;
        s->table = six != crossed ? w->six : w->four;
        s->index = i;
        s->refuses = w->refuses;
        if (w->source && i == 0)
            s->source4 = 20, s->source6 = 61;
        if (w->source && i == 2)
            s->source4 = 32, s->source6 = 64;
        s->custom = w->pooled && w->policy == CUSTOM && !(i % 2);
        if (i == 1)
            s->prefix_count = 1;
        if (i == 2)
            s->first_prefix = s->prefix_count = 1;
    }
    address(w->prefixes[0].addr, 0, 0);
    w->prefixes[0].bits = 96 + 15;
    w->prefixes[1] = (struct crab_prefix){.addr = {0xfd, 0, 0, 5}, .bits = 33};
    if (w->said) {
        w->exceptions[0] = (struct crab_exception){.backend = 0, .flags = CRAB_BACKEND_CR};
        w->exceptions[1] = (struct crab_exception){.backend = 3, .flags = 0};
        w->exceptions[2] = (struct crab_exception){.backend = 6, .flags = CRAB_BACKEND_CR | CRAB_BACKEND_DEAD};
        w->exception_count = 3;
        w->services[0].exception_count = 3;
        w->services[2].first_exception = 1;
        w->services[2].exception_count = 2;
    }
}

uint16_t world_chooses(uint64_t hash)
{
    return hash >> 60 == 15 ? CRAB_NO_BACKEND : hash >> 60 == 14 ? 40000 : (uint16_t)(hash >> 40 & 7);
}

/* ---- frames ---- */

struct reader {
    const uint8_t *at, *end;
};

static uint8_t byte(struct reader *r)
{
    return r->at < r->end ? *r->at++ : 0;
}

static void take(struct reader *r, uint8_t *out, size_t n)
{
    size_t have = (size_t)(r->end - r->at) < n ? (size_t)(r->end - r->at) : n;
    if (have)
        memcpy(out, r->at, have);
    memset(out + have, 0, n - have);
    r->at += have;
}

static void put16(uint8_t *p, uint32_t value)
{
    p[0] = (uint8_t)(value >> 8);
    p[1] = (uint8_t)value;
}

static uint32_t sum(const uint8_t *p, size_t n, uint32_t from)
{
    for (size_t i = 0; i < n; i++)
        from += i % 2 ? p[i] : (uint32_t)p[i] << 8;
    while (from >> 16)
        from = (from & 0xffff) + (from >> 16);
    return from;
}

/* An IP header to one of the places that matter.  Returns its length. */
static uint32_t head(uint8_t *ip, bool six, uint8_t who, uint8_t to, uint8_t protocol, uint8_t hops, bool may_fragment,
                     uint32_t rest)
{
    static const uint8_t clients4[8][4] = {{10, 0, 0, 1}, {10, 1, 2, 3}, {10, 3, 0, 1}, {10, 0, 0, 11},
                                           {127, 0, 0, 1}, {224, 0, 0, 1}, {0, 0, 0, 0}, {10, 0, 0, 100}};
    static const uint8_t clients6[8][16] = {{0xfd, [15] = 1}, {0xfd, 0, 0, 5, [15] = 1}, {0xfd, 0, 0, 5, 0x80, [15] = 1},
                                            {0xfd, [15] = 0x14}, {[15] = 1}, {[10] = 0xff, 0xff, 10, 0, 0, 1},
                                            {0xff, 2, [15] = 1}, {[12] = 10, 0, 0, 1}};
    static const uint8_t to4[4][4] = {{10, 0, 0, 100}, {10, 0, 0, 100}, {10, 0, 0, 101}, {10, 0, 0, 9}};
    static const uint8_t to6[4][16] = {{0xfd, [14] = 1}, {0xfd, [14] = 1}, {[10] = 0xff, 0xff, 10, 0, 0, 100},
                                       {0xfd, [15] = 0x99}};
    memset(ip, 0, six ? 40 : 20);
    if (six) {
        ip[0] = 0x6a;
        ip[1] = 0x30;
        put16(ip + 4, rest);
        ip[6] = protocol;
        ip[7] = hops;
        memcpy(ip + 8, clients6[who], 16);
        memcpy(ip + 24, to6[to], 16);
        return 40;
    }
    ip[0] = 0x45;
    ip[1] = 0x02;
    put16(ip + 2, 20 + rest);
    put16(ip + 4, 0x1234);
    ip[6] = may_fragment ? 0 : 0x40;
    ip[8] = hops;
    ip[9] = protocol;
    memcpy(ip + 12, clients4[who], 4);
    memcpy(ip + 16, to4[to], 4);
    return 20;
}

static void right_head(uint8_t *ip)
{
    if (ip[0] >> 4 != 4)
        return;
    put16(ip + 10, 0);
    put16(ip + 10, ~sum(ip, 20, 0));
}

/* What a checksum of the upper layer is over, beside the segment. */
static uint32_t pseudo(const uint8_t *ip, uint32_t rest)
{
    return ip[0] >> 4 == 4 ? sum(ip + 12, 8, ip[9] + rest) : sum(ip + 8, 32, ip[6] + rest);
}

static uint32_t ports(uint8_t *at, uint8_t chosen)
{
    static const uint16_t to[8] = {80, 80, 80, 443, 81, 9, 53, 443};
    put16(at, 1 + (chosen & 7));
    put16(at + 2, to[chosen >> 3 & 7]);
    return 4;
}

/* Bytes that are otherwise: where, and what. */
static void patch(uint8_t *frame, uint32_t len, const uint8_t (*patches)[2], uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        if (patches[i][0] < len)
            frame[patches[i][0]] = patches[i][1];
}

/* Ethernet, with so many tags.  Returns its length. */
static uint32_t link_header(uint8_t *f, uint8_t tags, bool six, bool sent_back)
{
    uint32_t at = 12;
    memcpy(f, (uint8_t[12]){2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1}, 12);
    if (sent_back)
        f[10] = (uint8_t)(1 + six), f[11] = six ? 3 : 0;
    for (uint8_t i = 0; i < tags; i++, at += 4) {
        put16(f + at, i + 1 < tags ? 0x88a8 : 0x8100);
        put16(f + at + 2, 5u + i);
    }
    put16(f + at, six ? 0x86dd : 0x0800);
    return at + 2;
}

static const uint8_t hop_counts[4] = {64, 255, 1, 0};

static void compose(struct reader *r, struct step *s, uint8_t kind)
{
    uint8_t c0 = byte(r), c1 = byte(r), c2 = byte(r), c3 = byte(r), c4 = byte(r), patches[7][2];
    bool six = c0 & 1;
    uint8_t tags = c0 >> 1 & 3, who = c0 >> 3 & 7, to = c0 >> 6, *f = s->frame;
    uint32_t patch_count = c4 >> 5;
    uint32_t l3 = link_header(f, tags, six, c1 & 64), l4 = l3 + (six ? 40 : 20), rest;
    uint8_t *tcp = f + l4;
    if (kind < 2) { /* TCP */
        static const uint32_t seqs[4] = {1000, 1001, 70000, 0xffffffff};
        uint32_t words = (c3 & 15) % 11, data = (c3 >> 4) == 15 ? 1400 : (c3 >> 4) * 13u;
        memset(tcp, 0, 20);
        ports(tcp, c1);
        uint32_t seq = htonl(seqs[c4 >> 3 & 3]);
        memcpy(tcp + 4, &seq, 4);
        put16(tcp + 8, 77);
        tcp[12] = (uint8_t)((5 + words) << 4);
        tcp[13] = c2;
        put16(tcp + 14, 0xfaf0);
        take(r, tcp + 20, 4 * words);
        for (uint32_t i = 0; i < data; i++)
            tcp[20 + 4 * words + i] = (uint8_t)(i * 7);
        rest = 20 + 4 * words + data;
    } else { /* ICMP; or UDP */
        uint32_t data = c3 % 32;
        memset(tcp, 0, 200);
        bool udp = c2 == 255;
        if (udp) {
            ports(tcp, c1);
            rest = 8 + data;
            put16(tcp + 4, rest);
        } else if (c2 & 128) { /* echo */
            tcp[0] = six ? 128 : 8;
            take(r, tcp + 4, 4);
            rest = 8 + data;
            take(r, tcp + 8, data < 4 ? data : 4);
        } else { /* an error about a packet from a VIP */
            tcp[0] = six ? (uint8_t[]){2, 1, 4, 0}[c2 & 3] : (uint8_t[]){3, 11, 12, 5}[c2 & 3];
            uint8_t *quote = tcp + 8, vip[16];
            uint32_t h = head(quote, six, who, 0, 6, 60, false, 20 + data);
            uint32_t size = six ? 16 : 4, from = six ? 8 : 12;
            memcpy(vip, quote + from + size, size); /* the other way round */
            memcpy(quote + from + size, quote + from, size);
            memcpy(quote + from, vip, size);
            ports(quote + h, c1);
            uint8_t swap[2];
            memcpy(swap, quote + h, 2);
            memcpy(quote + h, quote + h + 2, 2);
            memcpy(quote + h + 2, swap, 2);
            rest = 8 + h + 8 + data;
        }
        head(f + l3, six, who, to, udp ? 17 : six ? 58 : 1, hop_counts[c4 & 3], c4 & 4, rest);
    }
    if (kind < 2)
        head(f + l3, six, who, to, 6, hop_counts[c4 & 3], c4 & 4, rest);
    s->len = l4 + rest;
    for (uint32_t i = 0; i < patch_count; i++)
        take(r, patches[i], 2);
    /* The first half before checksums, the rest behind. */
    uint32_t first = (patch_count + 1) / 2;
    patch(f, s->len, patches, first);
    right_head(f + l3);
    uint8_t protocol = f[l3 + (six ? 6 : 9)];
    uint32_t field = protocol == 6 ? 16 : 2, from = protocol == 1 ? 0 : pseudo(f + l3, rest);
    put16(tcp + field, 0);
    put16(tcp + field, c1 & 128 && protocol == 6 ? from : ~sum(tcp, rest, from));
    patch(f, s->len, patches + first, patch_count - first);
    if (kind == 1) { /* too long, or too short */
        uint8_t more = byte(r);
        if (more & 128) {
            s->len = more % 128 < s->len ? s->len - more % 128 : 0;
        } else {
            memset(f + s->len, 0, more);
            s->len += more;
        }
    }
}

void script_read(struct script *script, const uint8_t *data, size_t size)
{
    struct reader r = {data, data + size};
    uint32_t now = 1000;
    take(&r, script->world, 3);
    bool wild = script->world[2] & 128;
    for (script->count = 0; r.at < r.end && script->count < MOST_FRAMES; script->count++) {
        struct step *s = &script->steps[script->count];
        uint8_t how = byte(&r);
        s->ends = how & 4;
        if (wild && how & 8)
            now += (uint32_t[]){1, 4, 11, 29, 61, 301, 5000, 70000}[how >> 4 & 7];
        s->now = now;
        if ((how & 3) == 3) {
            s->len = byte(&r) % 200u;
            take(&r, s->frame, s->len);
        } else {
            compose(&r, s, how & 3);
        }
    }
}
