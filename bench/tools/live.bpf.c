// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* The ends of a live measurement: a source that writes every frame anew (the kernel gives it the pages back as the
 * receiver left them), and a sink that counts. */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/ip.h>
#include <linux/tcp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, __u32);
} settings SEC(".maps"); /* how many flows */

struct {
    __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, __u64);
} received SEC(".maps");

/* ACKs of flows, one picked at random each time: client 11.0.0.0 + flow / 2^14, port 1024 + flow % 2^14. */
SEC("xdp")
int source(struct xdp_md *ctx)
{
    struct {
        struct ethhdr eth;
        struct iphdr ip;
        struct tcphdr tcp;
    } __attribute__((packed)) *f = (void *)(long)ctx->data;
    __u32 zero = 0, *flows = bpf_map_lookup_elem(&settings, &zero);
    if (!flows || (void *)(f + 1) > (void *)(long)ctx->data_end)
        return XDP_DROP;
    __u32 flow = (__u32)(((__u64)bpf_get_prandom_u32() * *flows) >> 32);
    __builtin_memset(f, 0, sizeof *f);
    f->eth.h_proto = bpf_htons(ETH_P_IP);
    f->ip.version = 4;
    f->ip.ihl = 5;
    f->ip.tot_len = bpf_htons(40);
    f->ip.ttl = 64;
    f->ip.protocol = 6;
    f->ip.saddr = bpf_htonl(0x0b000000 + (flow >> 14));
    f->ip.daddr = bpf_htonl(0x0a000064);
    f->tcp.source = bpf_htons((__u16)(1024 + (flow & 16383)));
    f->tcp.dest = bpf_htons(80);
    f->tcp.doff = 5;
    f->tcp.ack = 1;
    f->tcp.check = 0x1234;
    return XDP_TX;
}

SEC("xdp")
int sink(struct xdp_md *ctx)
{
    __u32 zero = 0;
    __u64 *n = bpf_map_lookup_elem(&received, &zero);
    if (n)
        (*n)++;
    return XDP_DROP;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
