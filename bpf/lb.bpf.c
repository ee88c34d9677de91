// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* The load balancer's XDP program: is the packet a VIP's?  Then it goes to the AF_XDP socket of its queue.  Everything
 * else passes on untouched.
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

#include "maps.h"

#define IP_MF_OFFSET 0x3fff /* more-fragments flag and fragment offset */

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, CRAB_MAX_SERVICES);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, struct crab_vip);
    __type(value, __u32); /* 1: served */
} services SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_XSKMAP);
    __uint(max_entries, CRAB_MAX_QUEUES);
    __type(key, __u32);
    __type(value, __u32);
} sockets SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    __uint(max_entries, CRAB_XDP_COUNTERS);
    __type(key, __u32);
    __type(value, __u64);
} xdp_counters SEC(".maps");

/* The workers' counters.  User space maps this array and writes it directly; it lives here so that it can be read when
 * the daemon is gone. */
struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, CRAB_MAX_QUEUES);
    __uint(map_flags, BPF_F_MMAPABLE);
    __type(key, __u32);
    __type(value, struct crab_worker_counters);
} worker_counters SEC(".maps");

static __always_inline void count(__u32 what)
{
    __u64 *n = bpf_map_lookup_elem(&xdp_counters, &what);
    if (n)
        (*n)++;
}

static __always_inline int pass(__u32 why)
{
    count(why);
    return XDP_PASS;
}

SEC("xdp")
int crab_lb(struct xdp_md *ctx)
{
    void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
    struct ethhdr *eth = data;
    struct crab_vip vip = {.proto = IPPROTO_TCP};
    struct tcphdr *tcp;
    void *l3 = eth + 1;

    if (l3 > end)
        return pass(CRAB_XDP_PASS_MALFORMED);
    __be16 type = eth->h_proto;
    if (type == bpf_htons(ETH_P_8021Q) || type == bpf_htons(ETH_P_8021AD)) {
        if (l3 + 4 > end)
            return pass(CRAB_XDP_PASS_MALFORMED);
        type = *(__be16 *)(l3 + 2);
        l3 += 4;
    }
    if (type == bpf_htons(ETH_P_IP)) {
        struct iphdr *ip = l3;
        if ((void *)(ip + 1) > end)
            return pass(CRAB_XDP_PASS_MALFORMED);
        if (ip->protocol != IPPROTO_TCP)
            return pass(CRAB_XDP_PASS_NOT_VIP);
        if (ip->ihl != 5)
            return pass(CRAB_XDP_PASS_IP_OPTIONS);
        if (ip->frag_off & bpf_htons(IP_MF_OFFSET))
            return pass(CRAB_XDP_PASS_FRAGMENT);
        vip.addr[10] = vip.addr[11] = 0xff;
        __builtin_memcpy(vip.addr + 12, &ip->daddr, 4);
        tcp = (void *)(ip + 1);
    } else if (type == bpf_htons(ETH_P_IPV6)) {
        struct ipv6hdr *ip = l3;
        if ((void *)(ip + 1) > end)
            return pass(CRAB_XDP_PASS_MALFORMED);
        switch (ip->nexthdr) {
        case IPPROTO_TCP:
            break;
        case IPPROTO_FRAGMENT:
            return pass(CRAB_XDP_PASS_FRAGMENT);
        case IPPROTO_HOPOPTS:
        case IPPROTO_ROUTING:
        case IPPROTO_DSTOPTS:
        case IPPROTO_AH:
            return pass(CRAB_XDP_PASS_IP_OPTIONS);
        default:
            return pass(CRAB_XDP_PASS_NOT_VIP);
        }
        __builtin_memcpy(vip.addr, &ip->daddr, 16);
        tcp = (void *)(ip + 1);
    } else {
        return pass(CRAB_XDP_PASS_NOT_VIP);
    }
    if ((void *)(tcp + 1) > end)
        return pass(CRAB_XDP_PASS_MALFORMED);
    vip.port = tcp->dest;
    if (!bpf_map_lookup_elem(&services, &vip))
        return pass(CRAB_XDP_PASS_NOT_VIP);

    /* The flags argument is what the helper returns where no socket is bound to the queue. */
    int verdict = bpf_redirect_map(&sockets, ctx->rx_queue_index, XDP_DROP);
    if (verdict != XDP_REDIRECT)
        count(CRAB_XDP_DROP_NO_SOCKET);
    else
        count(tcp->syn ? CRAB_XDP_SYN : CRAB_XDP_OTHER);
    return verdict;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
