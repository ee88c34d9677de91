// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* SYNs at a rate that no socket reaches: `source` is run on live frames (BPF_F_TEST_XDP_LIVE_FRAMES) at one end of a veth,
 * `sink` or `sink_tc` counts and drops what comes back there.  Each SYN is a new connection, with right checksums: the load balancer
 * verifies them. */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/ip.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

/* A SYN as Linux sends it, with an offer. */
struct syn {
    struct ethhdr eth;
    struct iphdr ip;
    struct tcphdr tcp;
    __u8 options[24];
} __attribute__((packed));

/* The frame to send.  What differs from one SYN to the next is 0 in it: the last 22 bits of the client's address, its port,
 * the sequence number. */
struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, struct syn);
} frame SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, __u64);
} received SEC(".maps");

/* When the first frame since this was zeroed was made on a CPU, and the last one (coarse nanoseconds), and how many.  A run's
 * setting up and taking down of its pages are not in it. */
struct span {
    __u64 first, last, frames;
};

struct {
    __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, struct span);
} span SEC(".maps");

static __always_inline __u16 checksum(__u16 check, __u64 more)
{
    __u64 sum = (__u16)~check + (more & 0xffffffff) + (more >> 32);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    return (__u16)~sum;
}

/* The kernel gives a page back as its receiver left it, so all of the frame is written anew. */
SEC("xdp")
int source(struct xdp_md *ctx)
{
    struct syn *f = (void *)(long)ctx->data, *template;
    __u32 zero = 0;
    template = bpf_map_lookup_elem(&frame, &zero);
    struct span *s = bpf_map_lookup_elem(&span, &zero);
    if (!template || !s || (void *)(f + 1) > (void *)(long)ctx->data_end)
        return XDP_DROP;
    __builtin_memcpy(f, template, sizeof *f);
    __u32 address = bpf_htonl(bpf_get_prandom_u32() & 0x3fffff), random = bpf_get_prandom_u32();
    f->ip.saddr |= address;
    f->ip.check = checksum(f->ip.check, address);
    f->tcp.source = (__u16)random;
    f->tcp.seq = random;
    f->tcp.check = checksum(f->tcp.check, (__u64)address + (__u16)random + random);
    s->last = bpf_ktime_get_coarse_ns();
    if (!s->first)
        s->first = s->last;
    s->frames++;
    return XDP_TX;
}

static __always_inline void count(void)
{
    __u32 zero = 0;
    __u64 *n = bpf_map_lookup_elem(&received, &zero);
    if (n)
        (*n)++;
}

/* For what XDP sends. */
SEC("xdp")
int sink(struct xdp_md *ctx __attribute__((unused)))
{
    count();
    return XDP_DROP;
}

/* For what sockets send: before the kernel makes a buffer of it that an XDP program could look at. */
SEC("tc")
int sink_tc(struct __sk_buff *skb __attribute__((unused)))
{
    count();
    return TC_ACT_SHOT;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
