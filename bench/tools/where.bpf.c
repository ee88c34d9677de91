// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* Where packets are worked on: those of TCP over IPv4 that pass a tc hook, by CPU. */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

struct {
    __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, __u64);
} packets SEC(".maps");

SEC("tc")
int where(struct __sk_buff *skb)
{
    __u32 key = 0;
    __u8 protocol = 0;
    __u64 *n = bpf_map_lookup_elem(&packets, &key);
    if (n && skb->protocol == bpf_htons(ETH_P_IP)
        && !bpf_skb_load_bytes(skb, ETH_HLEN + __builtin_offsetof(struct iphdr, protocol), &protocol, 1) && protocol == IPPROTO_TCP)
        ++*n;
    return TC_ACT_UNSPEC;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
