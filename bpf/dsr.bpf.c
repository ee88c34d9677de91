// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* The server's side of direct server return by IP in IP:
 *
 *   crab_decap   xdp: takes the outer header off packets to a VIP of ours (4 in 4, 6 in 6, 4 in 6, 6 in 4), so that the
 *                kernel needs no tunnel device.  XDP, because it comes before GRO, which then sees plain TCP.
 *   crab_clamp   clsact egress: lowers the MSS that SYN-ACKs from a VIP offer, so that what the client sends fits through
 *                the tunnel, by whichever interface tunnels come in.  Redirected connections answer from the server's
 *                own address: their MSS stays.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <stddef.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "address.h"
#include "length.h"
#include "mac.h"
#include "maps.h"
#include "syn.h"
#include "valid.h"

#define TCPOPT_MSS 2
#define OUTER 40 /* bytes of the larger outer header, IPv6's */
#define ECN_ECT1 1
#define ECN_ECT0 2
#define ECN_CE 3

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 4096);
    __type(key, struct crab_address);
    __type(value, __u32);
} dsr_vips SEC(".maps");

/* The interfaces by which tunnels have come in, by index: the SYN that a SYN-ACK answers has come before it. */
struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 1024);
    __type(key, __u32);
    __type(value, __u32);
} dsr_tunnels SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    __uint(max_entries, CRAB_DSR_COUNTERS);
    __type(key, __u32);
    __type(value, __u64);
} dsr_counters SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 1024);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, __u32);
    __type(value, struct crab_macs);
} dsr_macs SEC(".maps");

/* Prefixes that tunnels may come from; the value is a prefix's family, 4 or 6. */
struct {
    __uint(type, BPF_MAP_TYPE_LPM_TRIE);
    __uint(max_entries, 4096);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, struct crab_lpm);
    __type(value, __u32);
} dsr_sources SEC(".maps");

static __always_inline void count(__u32 what)
{
    __u64 *n = bpf_map_lookup_elem(&dsr_counters, &what);
    if (n)
        (*n)++;
}

static __always_inline int is_vip(const struct crab_address *a)
{
    return bpf_map_lookup_elem(&dsr_vips, a) != NULL;
}

static __always_inline void map_v4(struct crab_address *a, __be32 v4)
{
    __builtin_memset(a, 0, sizeof *a);
    a->addr[10] = a->addr[11] = 0xff;
    __builtin_memcpy(a->addr + 12, &v4, 4);
}

/* What the inner header's ECN field becomes when the outer one is taken off (RFC 6040, 4.2); -1: the packet is dropped, as
 * who sent it does not know of marks, and a router that had found no other would have done so. */
static __always_inline int ecn_after(__u8 outer, __u8 inner)
{
    if (outer == ECN_CE)
        return inner ? ECN_CE : -1;
    return outer == ECN_ECT1 && inner == ECN_ECT0 ? ECN_ECT1 : inner;
}

/* Write it; where: of an IPv4 header (whose checksum stays as right as it is, RFC 1624), or of an IPv6 one.  0 or -1. */
static __always_inline int carry_ecn(__u8 *ip, int family, __u8 outer)
{
    __u8 *class = ip + 1, shift = family == 4 ? 0 : 4, inner = *class >> shift & 3;
    int after = ecn_after(outer, inner);
    if (after <= 0 || after == inner)
        return after < 0 ? -1 : 0;
    *class = (__u8)(*class ^ (after ^ inner) << shift);
    if (family == 4) {
        __u32 sum = 0x1fffe - crab_read16(ip + 10) - inner + (__u32)after;
        sum = ~((sum & 0xffff) + (sum >> 16));
        ip[10] = (__u8)(sum >> 8);
        ip[11] = (__u8)sum;
    }
    count(CRAB_DSR_MARKED);
    return 0;
}

/* Why a tunnel's packet is not taken, CRAB_DSR_OTHER_MAC or CRAB_DSR_DROP_SOURCE; or CRAB_DSR_DECAPSULATED.  Global, so that
 * it is verified once. */
__noinline int judge(struct xdp_md *ctx)
{
    void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
    struct ethhdr *eth = data;
    struct crab_lpm source = {.bits = 128};
    __u32 family = 4, ifindex = ctx->ingress_ifindex;
    if ((void *)(eth + 1) + sizeof(struct iphdr) > end || !crab_is_to(bpf_map_lookup_elem(&dsr_macs, &ifindex), data))
        return CRAB_DSR_OTHER_MAC;
    if (eth->h_proto == bpf_htons(ETH_P_IP)) {
        map_v4((void *)source.addr, ((struct iphdr *)(eth + 1))->saddr);
    } else {
        struct ipv6hdr *ip = (void *)(eth + 1);
        if ((void *)(ip + 1) > end)
            return CRAB_DSR_DROP_SOURCE;
        family = 6;
        __builtin_memcpy(source.addr, &ip->saddr, 16);
    }
    __u32 *of = bpf_map_lookup_elem(&dsr_sources, &source);
    return of && *of == family ? CRAB_DSR_DECAPSULATED : CRAB_DSR_DROP_SOURCE; /* ::/0 holds mapped addresses too */
}

/* All headers that it looks at are in a frame's first buffer, however many there are (an MTU above a page's). */
SEC("xdp.frags")
int crab_decap(struct xdp_md *ctx)
{
    void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
    struct ethhdr *eth = data, saved;
    void *inner;
    __u8 proto, ecn;
    __u32 outer;
    int foreign = 0; /* to or from an IPv4-mapped address, which is no VIP's */

    if ((void *)(eth + 1) > end)
        return XDP_PASS;
    if (eth->h_proto == bpf_htons(ETH_P_IP)) {
        struct iphdr *ip = (void *)(eth + 1);
        if ((void *)(ip + 1) > end || ip->ihl != 5 || (ip->frag_off & bpf_htons(0x3fff)))
            return XDP_PASS;
        proto = ip->protocol;
        ecn = ip->tos & 3;
        outer = sizeof *ip;
        inner = ip + 1;
    } else if (eth->h_proto == bpf_htons(ETH_P_IPV6)) {
        struct ipv6hdr *ip = (void *)(eth + 1);
        if ((void *)(ip + 1) > end)
            return XDP_PASS;
        if (crab_either_is_mapped((void *)&ip->saddr))
            return XDP_PASS;
        proto = ip->nexthdr;
        ecn = ((__u8 *)ip)[1] >> 4 & 3;
        outer = sizeof *ip;
        inner = ip + 1;
    } else {
        return XDP_PASS;
    }

    struct crab_address vip;
    __be16 type;
    if (proto == IPPROTO_IPIP) {
        struct iphdr *ip = inner;
        if ((void *)(ip + 1) > end || ip->version != 4)
            return XDP_PASS;
        map_v4(&vip, ip->daddr);
        type = bpf_htons(ETH_P_IP);
    } else if (proto == IPPROTO_IPV6) {
        struct ipv6hdr *ip = inner;
        if ((void *)(ip + 1) > end || ip->version != 6)
            return XDP_PASS;
        __builtin_memcpy(vip.addr, &ip->daddr, 16);
        foreign = crab_either_is_mapped((void *)&ip->saddr);
        type = bpf_htons(ETH_P_IPV6);
    } else {
        return XDP_PASS;
    }
    if (foreign || !is_vip(&vip)) {
        count(CRAB_DSR_NOT_VIP);
        return XDP_PASS;
    }
    __u32 ifindex = ctx->ingress_ifindex, not = (__u32)judge(ctx);
    if (not != CRAB_DSR_DECAPSULATED) {
        count(not);
        return not == CRAB_DSR_OTHER_MAC ? XDP_PASS : XDP_DROP;
    }
    if (carry_ecn(inner, proto == IPPROTO_IPIP ? 4 : 6, ecn)) {
        count(CRAB_DSR_DROP_MARKED);
        return XDP_DROP;
    }
    if (!bpf_map_lookup_elem(&dsr_tunnels, &ifindex))
        bpf_map_update_elem(&dsr_tunnels, &ifindex, &(__u32){1}, BPF_ANY);
    __builtin_memcpy(&saved, eth, sizeof saved);
    saved.h_proto = type;
    if (bpf_xdp_adjust_head(ctx, (int)outer))
        return XDP_DROP;
    eth = (void *)(long)ctx->data;
    if ((void *)(eth + 1) > (void *)(long)ctx->data_end)
        return XDP_DROP;
    __builtin_memcpy(eth, &saved, sizeof saved);
    count(CRAB_DSR_DECAPSULATED);
    return XDP_PASS;
}

/* Where the MSS option is in so many bytes of options, and what it says; -1: nowhere.  `next` is unknown to the verifier, as
 * what it knew would be a way of its own for each place that an option may be at. */
static __always_inline int find_mss(const __u8 *options, __u32 length, __u32 *mss)
{
    volatile __u16 next = 0;
    for (__u32 i = 0; i + 4 <= CRAB_TCP_OPTIONS; i++) {
        if (i < next)
            continue;
        if (i + 4 > length || options[i] == 0)
            break;
        if (options[i] == 1)
            continue;
        if (options[i + 1] < 2)
            break;
        if (options[i] == TCPOPT_MSS && options[i + 1] == 4) {
            *mss = crab_read16(options + i + 2);
            return (int)i;
        }
        next = (__u16)(i + options[i + 1]);
    }
    return -1;
}

/* Lower the MSS option of the TCP header at `l4`.  Global, so that it is verified once. */
__noinline int clamp(struct __sk_buff *skb, __u32 l4, __u32 length, __u32 limit)
{
    __u8 options[CRAB_TCP_OPTIONS] = {};
    __u32 mss;
    if (bpf_skb_load_bytes(skb, l4 + sizeof(struct tcphdr), options, crab_length_within(length, CRAB_TCP_OPTIONS)))
        return 0;
    int at = find_mss(options, length, &mss);
    if (at < 0 || mss <= limit)
        return 0;
    __be16 new = bpf_htons((__u16)limit);
    /* At an odd place the value lies across two words of the checksum, its bytes changed round. */
    __u16 before = bpf_htons((__u16)mss), after = new;
    if (at & 1) {
        before = (__u16)mss;
        after = (__u16)limit;
    }
    bpf_l4_csum_replace(skb, l4 + offsetof(struct tcphdr, check), before, after, 2);
    bpf_skb_store_bytes(skb, l4 + sizeof(struct tcphdr) + (__u32)at + 2, &new, 2, 0);
    count(CRAB_DSR_CLAMPED);
    return 0;
}

struct narrowest {
    struct __sk_buff *skb;
    __u32 mtu; /* 0: no tunnels have come in */
};

static long narrower(void *map, const __u32 *ifindex, __u32 *value, struct narrowest *of)
{
    __u32 mtu = 0;
    (void)map;
    (void)value;
    bpf_check_mtu(of->skb, *ifindex, &mtu, 0, 0); /* which says the MTU, fitting or not; 0: it has gone */
    if (mtu && (!of->mtu || mtu < of->mtu))
        of->mtu = mtu;
    return 0;
}

SEC("tc")
int crab_clamp(struct __sk_buff *skb)
{
    struct crab_address vip;
    struct tcphdr tcp;
    __u32 l4, headers;
    if (skb->protocol == bpf_htons(ETH_P_IP)) {
        struct iphdr ip;
        if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof ip) || ip.protocol != IPPROTO_TCP)
            return TC_ACT_UNSPEC;
        map_v4(&vip, ip.saddr);
        l4 = ETH_HLEN + ip.ihl * 4;
        headers = sizeof ip + sizeof tcp;
    } else if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
        struct ipv6hdr ip;
        if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof ip) || ip.nexthdr != IPPROTO_TCP)
            return TC_ACT_UNSPEC;
        __builtin_memcpy(vip.addr, &ip.saddr, 16);
        if (crab_is_mapped(vip.addr))
            return TC_ACT_UNSPEC;
        l4 = ETH_HLEN + sizeof ip;
        headers = sizeof ip + sizeof tcp;
    } else {
        return TC_ACT_UNSPEC;
    }
    if (bpf_skb_load_bytes(skb, l4, &tcp, sizeof tcp) || !tcp.syn || !tcp.ack || tcp.doff < 6 || !is_vip(&vip))
        return TC_ACT_UNSPEC;
    struct narrowest way = {.skb = skb};
    bpf_for_each_map_elem(&dsr_tunnels, narrower, &way, 0);
    if (way.mtu > OUTER + headers)
        clamp(skb, l4, (__u32)tcp.doff * 4 - 20, way.mtu - OUTER - headers);
    return TC_ACT_UNSPEC;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
