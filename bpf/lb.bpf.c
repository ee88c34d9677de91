// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* The load balancer's XDP program: is the packet a VIP's?  A packet of a known flow (a connection that goes by fallback)
 * goes straight out again; any other goes to the AF_XDP socket of its queue, where user space decides.  So does what is a
 * VIP's but no service's, unless this machine has the address as well.  Everything else passes on untouched, except what a
 * program that uses the library has asked for.
 *
 * Flows are made by user space, for the first packet after the handshake, so a flood of SYNs makes none.  They outlive
 * it: when the daemon dies, known flows go on.
 *
 * A VIP's packet that finds no socket is dropped, never passed: the kernel has no such listener and would answer with a
 * RST, which tells the client that the service is gone. */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "hop.h"
#include "length.h"
#include "mac.h"
#include "maps.h"
#include "match.h"
#include "siphash.h"
#include "valid.h"

/* lbtap.bpf.c is this program too, with more in these places. */
#ifndef ENTRY
#define ENTRY SEC("xdp")
#define SHOW_COUNTED(what)
#define SHOW_BACKEND(backend, ifindex)
#endif

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, CRAB_MAX_SERVICES);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, struct crab_vip);
    __type(value, __u32);
} services SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    __uint(max_entries, 1); /* user space says how many */
    __type(key, __u32);
    __type(value, struct crab_service_counters);
} service_counters SEC(".maps");

/* User space maps it, to write a rate and leave the tokens. */
struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 1); /* user space says how many */
    __uint(map_flags, BPF_F_MMAPABLE);
    __type(key, __u32);
    __type(value, struct crab_limit);
} limits SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, struct crab_hashing);
} hashing SEC(".maps");

/* A hash table of our own in an array: an entry is one cache line away, where the kernel's hash maps need three or four;
 * and user space, which maps it, adds, ages and counts flows without system calls. */
struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 1); /* user space says how many: a power of two */
    __uint(map_flags, BPF_F_MMAPABLE);
    __type(key, __u32);
    __type(value, struct crab_bucket);
} flows SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 65536);
    __type(key, __u32);
    __type(value, struct crab_path);
} paths SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_XSKMAP);
    __uint(max_entries, CRAB_MAX_QUEUES);
    __type(key, __u32);
    __type(value, __u32);
} sockets SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, CRAB_MAX_INTERFACES);
    __type(key, __u32);
    __type(value, struct crab_queues);
} interfaces SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, CRAB_MAX_INTERFACES);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, __u32);
    __type(value, struct crab_macs);
} macs SEC(".maps");

/* Not preallocated: a change is then seen whole or not at all. */
struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 1);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, __u32);
    __type(value, struct crab_matches);
} handlers SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    __uint(max_entries, CRAB_XDP_COUNTERS);
    __type(key, __u32);
    __type(value, __u64);
} xdp_counters SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, CRAB_MAX_SERVICES);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, struct crab_address);
    __type(value, __u32);
} vips SEC(".maps");

/* Packets to a VIP that the kernel was given last: what the way leaves alone of them. */
struct passed {
    __u8 ip[40]; /* IPv4's header in the first half */
    __u8 l4[8];
};

struct passing {
    __u64 at_ns;
    __u64 hops;
};

struct {
    __uint(type, BPF_MAP_TYPE_LRU_HASH);
    __uint(max_entries, 4096);
    __type(key, struct passed);
    __type(value, struct passing);
} passed SEC(".maps");

/* The workers' counters.  User space maps this array and writes it directly; it lives here so that it can be read when
 * the daemon is gone. */
struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, CRAB_MAX_QUEUES);
    __uint(map_flags, BPF_F_MMAPABLE);
    __type(key, __u32);
    __type(value, struct crab_worker_counters);
} worker_counters SEC(".maps");

/* The daemon's own counters; here for the same reason. */
struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, CRAB_DAEMON_COUNTERS);
    __type(key, __u32);
    __type(value, __u64);
} daemon_counters SEC(".maps");

/* Where bytes are copied to that lie in a frame's further buffers. */
#define PIECE 512
struct piece {
    __u8 bytes[PIECE];
};
struct {
    __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, struct piece);
} pieces SEC(".maps");

static __always_inline void count(__u32 what)
{
    __u64 *n = bpf_map_lookup_elem(&xdp_counters, &what);
    if (n)
        (*n)++;
    SHOW_COUNTED(what);
}

/* Where the AF_XDP socket of the packet's queue is in `sockets`; CRAB_MAX_QUEUES: nowhere. */
static __always_inline __u32 place_of_socket(struct xdp_md *ctx)
{
    __u32 ifindex = ctx->ingress_ifindex, queue = ctx->rx_queue_index;
    struct crab_queues *queues = bpf_map_lookup_elem(&interfaces, &ifindex);
    return queues && queue < queues->count ? queues->first + queue : CRAB_MAX_QUEUES;
}

/* To that socket; `otherwise`, where there is none. */
static __always_inline int to_socket(struct xdp_md *ctx, __u64 otherwise)
{
    return (int)bpf_redirect_map(&sockets, place_of_socket(ctx), otherwise);
}

/* Does a daemon take the packets of this queue? */
static __noinline int has_socket(struct xdp_md *ctx)
{
    __u32 place = place_of_socket(ctx);
    return bpf_map_lookup_elem(&sockets, &place) != NULL;
}

/* Is a frame sent to a group's MAC address?  Then nobody answers what is in it (RFC 1122, 3.3.6). */
static __always_inline int is_group(struct xdp_md *ctx)
{
    const __u8 *data = (void *)(long)ctx->data;
    return data + ETH_HLEN > (const __u8 *)(long)ctx->data_end || data[0] & 1;
}

/* A packet that comes back within so long, with fewer hops left, is one that the kernel forwarded and a router returned. */
#define COMES_BACK_NS 1000000000ull

/* Has the kernel had this packet, and sent it back to the network?  If not, it has it now.  Whatever on this machine takes it
 * (netfilter may translate what no socket is seen to wait for), it does not come back then.  Options are left out: routers
 * write into them (RFC 791: record route; RFC 8200, 4.2).  where: l3 of struct crab_where, and l4 from bit 8 on. */
static __noinline int comes_back(struct xdp_md *ctx, __u32 where)
{
    const __u8 *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
    const __u8 *ip = data + (where & 31), *l4 = data + (where >> 8 & 127);
    struct passed key = {};
    __u64 hops;
    int v6;
    if (ip + sizeof(struct iphdr) > end)
        return 0;
    v6 = ip[0] >> 4 == 6;
    if (v6) {
        if (ip + sizeof(struct ipv6hdr) > end)
            return 0;
        __builtin_memcpy(key.ip, ip, sizeof(struct ipv6hdr));
        hops = key.ip[7];
        key.ip[0] = key.ip[1] = key.ip[7] = 0;
        if (ip[6] == IPPROTO_HOPOPTS && l4 + 2 <= end)
            l4 += 8 + 8 * l4[1];
    } else {
        __builtin_memcpy(key.ip, ip, sizeof(struct iphdr));
        hops = key.ip[8];
        key.ip[1] = key.ip[8] = key.ip[10] = key.ip[11] = 0;
    }
    if (l4 + sizeof key.l4 <= end)
        __builtin_memcpy(key.l4, l4, sizeof key.l4);
    struct passing now = {.at_ns = bpf_ktime_get_ns(), .hops = hops}, *before = bpf_map_lookup_elem(&passed, &key);
    if (before && hops < before->hops && now.at_ns - before->at_ns < COMES_BACK_NS)
        return 1;
    bpf_map_update_elem(&passed, &key, &now, BPF_ANY);
    return 0;
}

#define IF_IT_COMES_BACK (1 << 30)

/* Is a packet to a VIP that is no service's for user space to answer or to drop?  kinds: CRAB_VIP_*; why: as of pass();
 * where_l4: as in struct crab_where.  IF_IT_COMES_BACK: the caller asks, as Linux 6.1 has no stack for one call more. */
static __noinline int is_answered(struct xdp_md *ctx, __u32 kinds, __u32 why, __u32 proto, __u32 where_l4)
{
    const __u8 *end = (void *)(long)ctx->data_end, *l4 = (const __u8 *)(long)ctx->data + (where_l4 & 127);
    __u32 icmp = 0;
    if (proto == IPPROTO_ICMPV6 && l4 + 1 <= end)
        icmp = l4[0];
    if (icmp >= 133 && icmp <= 137) /* neighbour discovery asks for VIPs too (RFC 4861) */
        return 0;
    if (proto == IPPROTO_ICMP && l4 + 1 <= end)
        icmp = l4[0] == 8 ? 128 : 0;
    if (why == CRAB_XDP_PASS_NOT_VIP && icmp == 128)
        return kinds & CRAB_VIP_ECHO;
    if (kinds & CRAB_VIP_ALL || (why == CRAB_XDP_PASS_NOT_VIP && proto == IPPROTO_TCP))
        return kinds & (CRAB_VIP_ALL | CRAB_VIP_CLOSED);
    return kinds & CRAB_VIP_CLOSED ? IF_IT_COMES_BACK : 0;
}

/* A packet of no service: a handler's, to a VIP, or the kernel's.  Without a socket a handler's is the kernel's, as it was
 * before there was a handler.  foreign: it is for another machine.  Global, so that it is verified once. */
__noinline int pass(struct xdp_md *ctx, __u32 why, int foreign)
{
    __u32 zero = 0;
    struct crab_matches *matches = bpf_map_lookup_elem(&handlers, &zero);
    struct crab_where where;
    struct crab_match has = crab_match_of((void *)(long)ctx->data, (void *)(long)ctx->data_end, &where);
    if (matches) {
        for (__u32 i = 0; i < CRAB_MAX_MATCHES && i < matches->count; i++)
            if (crab_match_holds(&matches->list[i], &has)) {
                if (to_socket(ctx, XDP_PASS) != XDP_REDIRECT)
                    break;
                count(CRAB_XDP_HANDLER);
                return XDP_REDIRECT;
            }
    }
    __u32 *kinds = NULL;
    if (!foreign && has.fields & CRAB_MATCH_ADDR)
        kinds = bpf_map_lookup_elem(&vips, has.addr);
    int answered = kinds && !is_group(ctx) ? is_answered(ctx, *kinds, why, has.proto, where.l4) : 0;
    if (answered == IF_IT_COMES_BACK)
        answered = comes_back(ctx, where.l3 | where.l4 << 8);
    if (answered) {
        int verdict = to_socket(ctx, XDP_DROP);
        count(verdict == XDP_REDIRECT ? CRAB_XDP_VIP : CRAB_XDP_DROP_NO_SOCKET);
        return verdict;
    }
    count(foreign ? CRAB_XDP_PASS_OTHER_MAC : why);
    return XDP_PASS;
}

static __always_inline __u32 fold(__u64 sum)
{
    sum = (sum & 0xffffffff) + (sum >> 32);
    sum = (sum & 0xffffffff) + (sum >> 32);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    return (__u32)sum;
}

struct packet {
    struct crab_vip vip;
    __u8 client[16];
    __be16 cport;
    __be16 check;   /* of TCP */
    __u32 pseudo;   /* sum of the pseudo-header */
    __u32 frame;    /* bytes, of all buffers that the packet is in; the headers are in the first, which alone is in reach */
    __u32 len;      /* bytes of the IP packet; 0: it is not what its headers say, and user space refuses it */
    __u16 l3, l4;   /* offsets of the headers */
    __u8 class, v6;
    __u8 mapped; /* an IPv4-mapped address is in it: nobody's connection */
};

/* Have the frame leave with CRAB_ROOM bytes of metadata: zeros, as whoever receives it may see them.  Where there can be
 * none it leaves without. */
static __always_inline void make_room(struct xdp_md *ctx)
{
    if (bpf_xdp_adjust_meta(ctx, -CRAB_ROOM))
        return;
    __u64 *meta = (void *)(long)ctx->data_meta;
    if ((void *)meta + CRAB_ROOM <= (void *)(long)ctx->data)
        meta[0] = meta[1] = 0;
}

/* Put an IP header in front of the frame's own (RFC 2003, RFC 2473, RFC 4213). */
static __always_inline int encapsulate(struct xdp_md *ctx, const struct packet *p, const struct crab_path *path)
{
    struct {
        struct ethhdr eth;
        struct iphdr ip;
    } __attribute__((packed)) *four;
    struct {
        struct ethhdr eth;
        struct ipv6hdr ip;
    } __attribute__((packed)) *six;
    __u8 proto = p->v6 ? IPPROTO_IPV6 : IPPROTO_IPIP;

    if (path->v6) {
        if (bpf_xdp_adjust_head(ctx, -(int)sizeof(struct ipv6hdr)))
            return -1;
        six = (void *)(long)ctx->data;
        if ((void *)(six + 1) > (void *)(long)ctx->data_end)
            return -1;
        __u32 label = (__u32)p->cport ^ p->pseudo; /* RFC 6438: any function of the flow */
        __builtin_memcpy(&six->eth, path->macs, 12);
        six->eth.h_proto = bpf_htons(ETH_P_IPV6);
        struct ipv6hdr ip = {.payload_len = bpf_htons((__u16)p->len), .nexthdr = proto, .hop_limit = 64};
        *(__be32 *)&ip = bpf_htonl(6u << 28 | (__u32)p->class << 20 | (label & 0xfffff));
        __builtin_memcpy(&ip.saddr, path->tunnel_src, 16);
        __builtin_memcpy(&ip.daddr, path->addr, 16);
        __builtin_memcpy(&six->ip, &ip, sizeof ip);
        return 0;
    }
    if (bpf_xdp_adjust_head(ctx, -(int)sizeof(struct iphdr)))
        return -1;
    four = (void *)(long)ctx->data;
    if ((void *)(four + 1) > (void *)(long)ctx->data_end)
        return -1;
    __builtin_memcpy(&four->eth, path->macs, 12);
    four->eth.h_proto = bpf_htons(ETH_P_IP);
    struct iphdr ip = {
        .version = 4,
        .ihl = 5,
        .tos = p->class,
        .tot_len = bpf_htons((__u16)(p->len + sizeof ip)),
        .frag_off = bpf_htons(0x4000),
        .ttl = 64,
        .protocol = proto,
    };
    __builtin_memcpy(&ip.saddr, path->tunnel_src + 12, 4);
    __builtin_memcpy(&ip.daddr, path->addr + 12, 4);
    __u64 sum = 0;
    __u16 *words = (void *)&ip;
    for (int i = 0; i < 10; i++)
        sum += words[i];
    ip.check = (__u16)~fold(sum);
    __builtin_memcpy(&four->ip, &ip, sizeof ip);
    return 0;
}

/* The connection's hash, as crab_hash4 and crab_hash6 of native/hash.h have it. */
static __always_inline __u64 flow_hash(const struct crab_hashing *h, const struct packet *p)
{
    struct crab_sip s = crab_sip_start(h->key[0], h->key[1]);
    const __u32 *client = (const void *)p->client, *vip = (const void *)p->vip.addr;
    __u64 ports = (__u64)p->cport | (__u64)p->vip.port << 16;
    if (!p->v6) {
        crab_sip_word(&s, (__u64)vip[3] << 32 | client[3]);
        return crab_sip_end(&s, ports | 12ull << 56);
    }
    crab_sip_word(&s, (__u64)client[1] << 32 | client[0]);
    crab_sip_word(&s, (__u64)client[3] << 32 | client[2]);
    crab_sip_word(&s, (__u64)vip[1] << 32 | vip[0]);
    crab_sip_word(&s, (__u64)vip[3] << 32 | vip[2]);
    return crab_sip_end(&s, ports | 36ull << 56);
}

/* The sum of len bytes at an offset, in 32 bits; 0 (which no packet's is), if they are too many or not in reach.  By the
 * helper, in pieces of so many bytes that both it and the verifier take them.  Global, so that it is verified once. */
__noinline __u32 sum_of(struct xdp_md *ctx, __u32 at, __u32 len)
{
    void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
    __u32 sum = 0;
#define SUM(size)                                                \
    do {                                                         \
        at &= 0x3fff;                                            \
        if (data + at + (size) > end)                            \
            return 0;                                            \
        sum = (__u32)bpf_csum_diff(NULL, 0, data + at, size, sum); \
        at += (size);                                            \
    } while (0)
    if (len >= 0x2000)
        return 0;
    for (int i = 0; i < 16 && len >= 512; i++) {
        SUM(512);
        len -= 512;
    }
#pragma unroll
    for (__u32 size = 256; size >= 4; size /= 2)
        if (len & size)
            SUM(size);
#undef SUM
    __u64 rest = sum;
    at &= 0x3fff;
    if (len & 2) {
        if (data + at + 2 > end)
            return 0;
        rest += *(__u16 *)(data + at);
        at += 2;
    }
    if (len & 1) { /* the first byte of a word whose second is zero */
        if (data + at + 1 > end)
            return 0;
        rest += *(__u8 *)(data + at);
    }
    return (__u32)((rest & 0xffffffff) + (rest >> 32));
}

/* The same of longer ones, and of those that lie in several buffers; 0, if the frame ends before.  What is not a whole piece
 * is no matter of the loop, or the verifier would follow that part once for each piece there may be. */
__noinline __u32 sum_of_copies(struct xdp_md *ctx, __u32 at, __u32 len)
{
    __u32 zero = 0, sum = 0;
    struct piece *piece = bpf_map_lookup_elem(&pieces, &zero);
    if (!piece)
        return 0;
    for (int i = 0; i < 0x10000 / PIECE && len >= PIECE; i++) {
        if (bpf_xdp_load_bytes(ctx, at, piece, PIECE))
            return 0;
        sum = (__u32)bpf_csum_diff(NULL, 0, (void *)piece, PIECE, sum);
        at += PIECE;
        len -= PIECE;
    }
    if (len) {
        __builtin_memset(piece, 0, sizeof *piece);
        if (bpf_xdp_load_bytes(ctx, at, piece, crab_length_within(len, PIECE)))
            return 0;
        sum = (__u32)bpf_csum_diff(NULL, 0, (void *)piece, PIECE, sum);
    }
    return sum;
}

/* The checksum of a packet's TCP segment or ICMP message: CRAB_CSUM_*.  right: what it should be, where it is partial: the
 * field holds the pseudo-header's sum, so that the segment's is the whole one. */
static __always_inline int checksum(struct xdp_md *ctx, const struct packet *p, int icmp, __u16 *right)
{
    __u32 len = p->len - (p->l4 - p->l3), sum = sum_of(ctx, p->l4, len);
    if (!sum)
        sum = sum_of_copies(ctx, p->l4, len);
    if (!sum)
        return CRAB_CSUM_BAD;
    if (crab_is_whole((__u64)sum + p->pseudo))
        return CRAB_CSUM_OK;
    if (icmp || p->check != p->pseudo)
        return CRAB_CSUM_BAD;
    *right = (__u16)~fold(sum);
    return CRAB_CSUM_PARTIAL;
}

/* Does a backend merely send back what was sent to it?  Unless it is the connection's client too. */
static __always_inline int is_sent_back(const __u8 *frame, const struct packet *p, const struct crab_path *path)
{
    const __u16 *from = (const void *)(frame + 6), *to = (const void *)path->macs;
    const __u32 *client = (const void *)p->client, *backend = (const void *)path->addr;
    if ((from[0] ^ to[0]) | (from[1] ^ to[1]) | (from[2] ^ to[2]))
        return 0;
    return ((client[0] ^ backend[0]) | (client[1] ^ backend[1]) | (client[2] ^ backend[2]) | (client[3] ^ backend[3])) != 0;
}

/* Forward a known flow's packet; flags: its TCP flags.  Returns an XDP action, or -1: it is none, or user space decides. */
static __always_inline int forward(struct xdp_md *ctx, const struct packet *p, __u8 flags, int icmp)
{
    __u32 zero = 0;
    struct crab_hashing *h = bpf_map_lookup_elem(&hashing, &zero);
    if (!h)
        return -1;
    __u64 hash = flow_hash(h, p);
    __u32 index = (__u32)hash & h->mask;
    struct crab_bucket *bucket = bpf_map_lookup_elem(&flows, &index);
    if (!bucket)
        return -1;
    volatile struct crab_flow *f;
    if (bucket->flows[0].hash == hash)
        f = &bucket->flows[0];
    else if (bucket->flows[1].hash == hash)
        f = &bucket->flows[1];
    else if (bucket->flows[2].hash == hash)
        f = &bucket->flows[2];
    else if (bucket->flows[3].hash == hash)
        f = &bucket->flows[3];
    else
        return -1;
    union {
        __u64 word;
        struct {
            __u16 backend, service, seen;
            __u8 state, flags;
        };
    } flow = {.word = *(volatile __u64 *)&f->backend};
    if (f->hash != hash)
        return -1;
    __u16 right = 0;
    int sum = checksum(ctx, p, icmp, &right);
    if (sum == CRAB_CSUM_BAD)
        return -1;
    if (flags & CRAB_SYN) {
        f->flags = flow.flags | CRAB_FLOW_ASK;
        return -1;
    }
    __u16 now = (__u16)(bpf_ktime_get_coarse_ns() / 1000000000u);
    __u16 age = now - flow.seen;
    if (age <= CRAB_AGE_NEGATIVE && age > CRAB_AGE_OPEN) {
        f->hash = 0;
        return -1;
    }
    if (flow.flags & CRAB_FLOW_ASK)
        return -1;
    int ends = flags & (CRAB_FIN | CRAB_RST);
    if (ends && has_socket(ctx)) /* the worker's cache is to know as well */
        return -1;
    __u32 backend = flow.backend, service = flow.service;
    struct crab_path *path = bpf_map_lookup_elem(&paths, &backend);
    struct crab_service_counters *counters = bpf_map_lookup_elem(&service_counters, &service);
    if (!path || !counters)
        return -1;
    __u32 tunnel = flow.flags & CRAB_FLOW_TUNNEL, ifindex = path->ifindex, outer = 0;
    SHOW_BACKEND(backend, ifindex);
    int back = ifindex == ctx->ingress_ifindex, tx = back && path->tx;
    if (!tx && !path->redirect)
        return -1;
    if (!tx && !path->frags && p->frame > (__u32)(ctx->data_end - ctx->data))
        return -1;
    if (sum == CRAB_CSUM_PARTIAL && path->partial == CRAB_PARTIAL_ASK)
        return -1;
    if (tunnel)
        outer = path->v6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr);
    if ((tunnel || !back) && p->len + outer > path->mtu)
        return -1; /* user space tells the client */
    if (!tunnel) {
        void *data = (void *)(long)ctx->data;
        if (data + ETH_HLEN + sizeof(struct iphdr) > (void *)(long)ctx->data_end)
            return XDP_DROP;
        __u32 why = 0;
        if (is_sent_back(data, p, path))
            why = CRAB_XDP_DROP_SENT_BACK;
        else if (!crab_has_hop(data + ETH_HLEN, p->v6 ? 6 : 4))
            why = CRAB_XDP_DROP_HOPS;
        if (why) {
            count(why);
            return XDP_DROP;
        }
    }
    if (sum == CRAB_CSUM_PARTIAL && path->partial == CRAB_PARTIAL_FINISH) {
        struct tcphdr *tcp = (void *)(long)ctx->data + ETH_HLEN + (p->v6 ? CRAB_IP6_HEADER : CRAB_IP4_HEADER);
        if ((void *)(tcp + 1) > (void *)(long)ctx->data_end)
            return XDP_DROP;
        tcp->check = right;
    }
    if (flow.seen != now) {
        f->seen = now;
        if (flow.state == CRAB_FLOW_LONE)
            f->state = CRAB_FLOW_OPEN;
    }
    if (ends)
        f->state = CRAB_FLOW_ENDING;

    if (tunnel) {
        /* Ethernet's padding of short frames must not become a part of the outer packet. */
        int padding = (int)p->frame - (int)(ETH_HLEN + p->len);
        if (padding > 0 && bpf_xdp_adjust_tail(ctx, -padding))
            return XDP_DROP;
        if (encapsulate(ctx, p, path))
            return XDP_DROP;
    } else {
        void *data = (void *)(long)ctx->data;
        if (data + ETH_HLEN + sizeof(struct iphdr) > (void *)(long)ctx->data_end)
            return XDP_DROP;
        __builtin_memcpy(data, path->macs, 12);
        crab_take_hop(data + ETH_HLEN, p->v6 ? 6 : 4);
    }
    count(CRAB_XDP_FLOW);
    counters->packets++;
    counters->bytes += p->frame;
    if (path->room)
        make_room(ctx);
    return tx ? XDP_TX : (int)bpf_redirect(ifindex, 0);
}

/* An ICMP error: what it quotes is the beginning of a packet from a VIP.  0 if it is one. */
static __always_inline int parse_icmp(void *icmp, void *end, struct packet *p)
{
    __u8 *quote = icmp + CRAB_ICMP_HEADER;
    __be16 *ports;
    if (p->v6) {
        if (icmp + CRAB_ICMP_ERROR(6) > end || !crab_valid_icmp(icmp, 6))
            return -1;
        struct ipv6hdr *ip = (void *)quote;
        __builtin_memcpy(p->vip.addr, &ip->saddr, 16);
        __builtin_memcpy(p->client, &ip->daddr, 16);
        p->mapped |= crab_is_mapped(p->vip.addr) || crab_is_mapped(p->client);
        ports = (void *)(ip + 1);
    } else {
        if (icmp + CRAB_ICMP_ERROR(4) > end || !crab_valid_icmp(icmp, 4))
            return -1;
        struct iphdr *ip = (void *)quote;
        p->vip.addr[10] = p->vip.addr[11] = p->client[10] = p->client[11] = 0xff;
        __builtin_memcpy(p->vip.addr + 12, &ip->saddr, 4);
        __builtin_memcpy(p->client + 12, &ip->daddr, 4);
        ports = (void *)(ip + 1);
    }
    p->vip.port = ports[0];
    p->cport = ports[1];
    return 0;
}

/* Bytes of the packet, as crab_valid_length has it, if need be in several buffers. */
static __always_inline __u32 length_of(struct xdp_md *ctx, struct packet *p, const __u8 *l3, int family, __u32 least)
{
    __u32 length = crab_valid_length(l3, family, least, p->frame - p->l3);
    if (length)
        return length;
    p->frame = (__u32)bpf_xdp_get_buff_len(ctx);
    return crab_valid_length(l3, family, least, p->frame - p->l3);
}

/* How often a token is tried for while other CPUs take some at the same moment: each time one of them got one. */
#define TRIES 4

/* Has a service had as many SYNs as it is to have by now?  If not, it has one more.
 *
 * One bucket for all CPUs: how a card spreads packets is nobody's to know, and one client's may all come to one queue.  Who
 * finds it empty writes nothing, so a flood leaves the cache line with all CPUs.  Here and not in the worker, as what it is to
 * protect is the ring in front of that.  Global, so that it is verified once. */
__noinline int has_enough(__u32 service)
{
    struct crab_limit *limit = bpf_map_lookup_elem(&limits, &service);
    if (!limit)
        return 0;
    union {
        __u64 word;
        struct crab_rate is;
    } rate = {.word = *(volatile __u64 *)&limit->rate};
    if (!rate.word)
        return 0;
    __u64 token = rate.is.token_ns, all = token * rate.is.burst, now = bpf_ktime_get_ns();
#pragma unroll
    for (int i = 0; i < TRIES; i++) {
        __u64 full = *(volatile __u64 *)&limit->full_ns;
        __u64 lacks = full > now ? full - now : 0;
        if (lacks > all) /* more than there is room for: a token of a rate before, taken while it was changed */
            lacks = 0;
        if (lacks + token > all)
            return 1;
        if (__sync_val_compare_and_swap(&limit->full_ns, full, now + lacks + token) == full)
            return 0;
    }
    return 1;
}

ENTRY
int crab_lb(struct xdp_md *ctx)
{
    void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
    struct ethhdr *eth = data;
    struct packet p = {.vip.proto = IPPROTO_TCP};
    void *l3 = eth + 1, *l4;
    __u8 flags = 0;
    int icmp, verdict;

    if (l3 > end)
        return pass(ctx, CRAB_XDP_PASS_MALFORMED, 0);
    __u32 ifindex = ctx->ingress_ifindex;
    int ours = crab_is_to(bpf_map_lookup_elem(&macs, &ifindex), data);
    int foreign = !ours && !(eth->h_dest[0] & 1); /* and no group's, as ARP's and neighbour discovery's are */
    __be16 type = eth->h_proto;
#pragma unroll
    for (int tags = 0; tags < 2; tags++) {
        if (type != bpf_htons(ETH_P_8021Q) && type != bpf_htons(ETH_P_8021AD))
            break;
        if (l3 + 4 > end)
            return pass(ctx, CRAB_XDP_PASS_MALFORMED, foreign);
        type = *(__be16 *)(l3 + 2);
        l3 += 4;
    }
    p.l3 = (__u16)(l3 - data);
    p.frame = (__u32)(end - data);
    if (type == bpf_htons(ETH_P_IP)) {
        struct iphdr *ip = l3;
        if ((void *)(ip + 1) > end)
            return pass(ctx, CRAB_XDP_PASS_MALFORMED, foreign);
        icmp = ip->protocol == IPPROTO_ICMP;
        verdict = crab_valid_header(l3, 4, icmp ? IPPROTO_ICMP : IPPROTO_TCP);
        p.vip.addr[10] = p.vip.addr[11] = p.client[10] = p.client[11] = 0xff;
        __builtin_memcpy(p.vip.addr + 12, &ip->daddr, 4);
        __builtin_memcpy(p.client + 12, &ip->saddr, 4);
        p.class = ip->tos;
        p.len = length_of(ctx, &p, l3, 4, icmp ? CRAB_ICMP_ERROR(4) : CRAB_TCP_HEADER);
        if (!crab_valid_ip4_sum(l3))
            p.len = 0;
        p.pseudo = icmp ? 0 : fold((__u64)ip->saddr + ip->daddr + bpf_htons((__u16)(p.len - sizeof *ip)) +
                                   bpf_htons(IPPROTO_TCP));
        l4 = ip + 1;
    } else if (type == bpf_htons(ETH_P_IPV6)) {
        struct ipv6hdr *ip = l3;
        if ((void *)(ip + 1) > end)
            return pass(ctx, CRAB_XDP_PASS_MALFORMED, foreign);
        icmp = ip->nexthdr == IPPROTO_ICMPV6;
        verdict = ip->nexthdr == IPPROTO_FRAGMENT ? CRAB_V_FRAGMENT
                                                  : crab_valid_header(l3, 6, icmp ? IPPROTO_ICMPV6 : IPPROTO_TCP);
        __builtin_memcpy(p.vip.addr, &ip->daddr, 16);
        __builtin_memcpy(p.client, &ip->saddr, 16);
        p.class = (__u8)(bpf_ntohl(*(__be32 *)ip) >> 20);
        p.len = length_of(ctx, &p, l3, 6, icmp ? CRAB_ICMP_ERROR(6) : CRAB_TCP_HEADER);
        p.mapped = crab_is_mapped(p.vip.addr) || crab_is_mapped(p.client);
        p.v6 = 1;
        __u32 *words = (void *)&ip->saddr;
        __u64 sum = bpf_htons((__u16)(p.len - sizeof *ip)) + bpf_htons(ip->nexthdr);
        for (int i = 0; i < 8; i++)
            sum += words[i];
        p.pseudo = fold(sum);
        l4 = ip + 1;
    } else {
        return pass(ctx, CRAB_XDP_PASS_NOT_VIP, foreign);
    }
    switch (verdict) {
    case CRAB_V_OK:
        break;
    case CRAB_V_FRAGMENT:
        return pass(ctx, CRAB_XDP_PASS_FRAGMENT, foreign);
    case CRAB_V_IP_OPTIONS:
        return pass(ctx, CRAB_XDP_PASS_IP_OPTIONS, foreign);
    case CRAB_V_MALFORMED:
        return pass(ctx, CRAB_XDP_PASS_MALFORMED, foreign);
    default:
        return pass(ctx, CRAB_XDP_PASS_NOT_VIP, foreign);
    }
    if (icmp) {
        __builtin_memset(&p.vip.addr, 0, 16);
        __builtin_memset(&p.client, 0, 16);
        if (!p.len || parse_icmp(l4, end, &p))
            return pass(ctx, CRAB_XDP_PASS_NOT_VIP, foreign);
    } else {
        struct tcphdr *tcp = l4;
        if ((void *)(tcp + 1) > end)
            return pass(ctx, CRAB_XDP_PASS_MALFORMED, foreign);
        p.vip.port = tcp->dest;
        p.cport = tcp->source;
        p.check = tcp->check;
        flags = ((__u8 *)l4)[13];
        if (p.len && !(crab_valid_tcp(l4, p.len - (__u32)(l4 - l3)) && crab_valid_flags(flags)))
            p.len = 0;
    }
    p.l4 = (__u16)(l4 - data);
    verdict = -1;
    if (p.len && !p.mapped && ours && p.l3 == ETH_HLEN) /* what has VLAN tags is user space's */
        verdict = forward(ctx, &p, flags, icmp);
    if (verdict >= 0)
        return verdict;
    __u32 *service = bpf_map_lookup_elem(&services, &p.vip);
    if (!service)
        return pass(ctx, CRAB_XDP_PASS_NOT_VIP, foreign);
    if (!ours) { /* the workers would take it */
        count(foreign ? CRAB_XDP_PASS_OTHER_MAC : CRAB_XDP_PASS_NOT_VIP);
        return XDP_PASS;
    }
    if (p.mapped) {
        count(CRAB_XDP_DROP_MAPPED);
        return XDP_DROP;
    }
    if (flags & CRAB_SYN && has_enough(*service)) {
        count(CRAB_XDP_DROP_SYN_RATE);
        return XDP_DROP;
    }

    verdict = to_socket(ctx, XDP_DROP);
    if (verdict != XDP_REDIRECT)
        count(CRAB_XDP_DROP_NO_SOCKET);
    else
        count(icmp ? CRAB_XDP_ICMP : flags & CRAB_SYN ? CRAB_XDP_SYN : CRAB_XDP_OTHER);
    return verdict;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
