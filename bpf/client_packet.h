/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Packets of the client's connections: whose they are, and what is written into them. */
#ifndef CRAB_CLIENT_PACKET_H
#define CRAB_CLIENT_PACKET_H

#include <linux/if_ether.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>

#include "client.h"

struct packet {
    struct crab_client_ports key;
    __u8 peer[16]; /* the other one's address */
    struct tcphdr tcp;
    __u32 l4; /* its header's offset */
    __u8 v6;
    __u8 proto;
};

/* Have n bytes where programs can read them, or all if there are fewer.  No more than are needed: what TCP sends lies elsewhere
 * than its header, and would be copied. */
CRAB_INLINE void reach(struct __sk_buff *skb, __u32 n)
{
    __u32 linear = (__u32)(READ(skb->data_end) - READ(skb->data)), len = READ(skb->len);
    if (linear < n && linear < len)
        bpf_skb_pull_data(skb, n < len ? n : len);
}

/* Parse the IP header at offset l3 of a packet that comes to us (inward) or that we send. */
CRAB_INLINE int parse_ip(struct __sk_buff *skb, struct packet *p, __u32 l3, __be16 ethertype, int inward)
{
    __u8 *src = inward ? p->peer : p->key.local, *dst = inward ? p->key.local : p->peer;
    reach(skb, l3 + (ethertype == bpf_htons(ETH_P_IP) ? sizeof(struct iphdr) : sizeof(struct ipv6hdr)) + 20);
    void *at = (void *)(long)READ(skb->data) + l3, *end = (void *)(long)READ(skb->data_end);
    if (ethertype == bpf_htons(ETH_P_IP)) {
        struct iphdr *ip = at;
        if ((void *)(ip + 1) > end)
            return -1;
        if (ip->ihl < 5 || (ip->frag_off & bpf_htons(0x1fff)))
            return -1;
        map_v4(src, ip->saddr);
        map_v4(dst, ip->daddr);
        p->l4 = l3 + ip->ihl * 4;
        p->proto = ip->protocol;
        p->v6 = 0;
    } else if (ethertype == bpf_htons(ETH_P_IPV6)) {
        struct ipv6hdr *ip = at;
        if ((void *)(ip + 1) > end)
            return -1;
        copy(src, &ip->saddr);
        copy(dst, &ip->daddr);
        if (is_mapped(src) || is_mapped(dst)) /* on the wire it is nobody's */
            return -1;
        p->l4 = l3 + sizeof *ip;
        p->proto = ip->nexthdr;
        p->v6 = 1;
    } else {
        return -1;
    }
    return 0;
}

CRAB_INLINE int parse_tcp(struct __sk_buff *skb, struct packet *p, int inward)
{
    __u32 l4 = p->l4;
    barrier_var(l4); /* or the compiler leaves the next line out, which the verifier needs */
    l4 &= 127;
    reach(skb, l4 + sizeof(struct tcphdr));
    struct tcphdr *tcp = (void *)(long)READ(skb->data) + l4;
    if ((void *)(tcp + 1) > (void *)(long)READ(skb->data_end))
        return -1;
    p->tcp = *tcp;
    p->key.lport = inward ? tcp->dest : tcp->source;
    p->key.rport = inward ? tcp->source : tcp->dest;
    return 0;
}

CRAB_INLINE __u16 fold(__u32 sum)
{
    sum = (sum & 0xffff) + (sum >> 16);
    return (__u16)((sum & 0xffff) + (sum >> 16));
}

/* A sum that a difference is added to: both of them have 32 bits. */
CRAB_INLINE __u16 mended(__u16 check, __u32 diff)
{
    return (__u16)~fold((__u32)(__u16)~check + fold(diff));
}

/* Write `to` into the place of the peer's address, and mend the checksums, whatever the card has taken over of them.
 * diff: of their sums. */
CRAB_INLINE int translate(struct __sk_buff *skb, const struct packet *p, int inward, const __u8 to[16], __u32 diff)
{
    void *l3 = (void *)(long)READ(skb->data) + (inward ? ETH_HLEN : 0), *end = (void *)(long)READ(skb->data_end);
    if (p->v6) {
        struct ipv6hdr *ip = l3;
        if ((void *)(ip + 1) > end)
            return -1;
        copy(inward ? &ip->saddr : &ip->daddr, to);
    } else {
        struct iphdr *ip = l3;
        if ((void *)(ip + 1) > end)
            return -1;
        *(inward ? &ip->saddr : &ip->daddr) = ((const __u32 *)to)[3];
        ip->check = mended(ip->check, diff);
    }
    if (bpf_l4_csum_replace(skb, p->l4 + offsetof(struct tcphdr, check), 0, diff, BPF_F_PSEUDO_HDR))
        return -1;
    /* It takes the sum of the whole packet, if the card has made one, to lie on an IPv4 header, which sums up to nothing. */
    if (p->v6)
        bpf_csum_update(skb, diff);
    return 0;
}

/* Is there a local connection that has this four-tuple already? */
static __noinline int collides(struct __sk_buff *skb, const struct packet *p)
{
    struct bpf_sock_tuple tuple = {};
    __u32 len;
    if (p->v6) {
        copy(tuple.ipv6.saddr, p->peer);
        copy(tuple.ipv6.daddr, p->key.local);
        tuple.ipv6.sport = p->key.rport;
        tuple.ipv6.dport = p->key.lport;
        len = sizeof tuple.ipv6;
    } else {
        __builtin_memcpy(&tuple.ipv4.saddr, p->peer + 12, 4);
        __builtin_memcpy(&tuple.ipv4.daddr, p->key.local + 12, 4);
        tuple.ipv4.sport = p->key.rport;
        tuple.ipv4.dport = p->key.lport;
        len = sizeof tuple.ipv4;
    }
    struct bpf_sock *sk = bpf_skc_lookup_tcp(skb, &tuple, len, BPF_F_CURRENT_NETNS, 0);
    if (!sk)
        return 0;
    __u32 state = sk->state;
    bpf_sk_release(sk);
    return state != BPF_TCP_LISTEN && state != BPF_TCP_TIME_WAIT;
}

/* Is the first redirect of this form in the packet's TCP options the one to this VIP?
 *
 * The list is an array that no option can reach over, so the verifier need not know where each begins; and without
 * branches by form or family it follows the loop only once. */
static __noinline int redirects_to(struct __sk_buff *skb, const struct packet *p, const struct crab_client_flow *to)
{
    __u8 before[16 + 40 + 64] = {}, *list = before + 16;
    __u32 at = 0, differ = 0, len = (__u32)p->tcp.doff * 4 - 20;

    if (p->tcp.doff < 6 || len > 40 || bpf_skb_load_bytes(skb, p->l4 + 20, list, crab_length_within(len, 40)))
        return 0;
    for (__u32 i = 0; i < 40; i++) {
        barrier_var(at); /* or the compiler leaves the next line out, which the verifier needs */
        at &= 63;
        if (at >= len || list[at] == EOL)
            return 0;
        if (list[at] == NOP) {
            at++;
            continue;
        }
        __u32 n = list[at + 1];
        if (n < 2 || at + n > len)
            return 0;
        if (list[at] == to->kind && n == to->size &&
            (to->kind == CRAB_OPT_KIND ||
             (list[at + 2] == CRAB_OPT_EXID >> 8 && list[at + 3] == (CRAB_OPT_EXID & 0xff)))) {
            __u8 v6 = -(to->size > 8);
            at += n;
            barrier_var(at);
            at &= 63; /* the option's end, and so the VIP's */
            for (__u32 b = 0; b < 16; b++)
                differ |= (before[at + b] ^ to->vip[b]) & (b < 12 ? v6 : 0xff);
            return !differ;
        }
        at += n;
    }
    return 0;
}

/* Turn a SYN-ACK into the RST that answers it, and send it back where it came from.  The options become NOPs: with their
 * time stamps the server's PAWS check would not look at it. */
static __noinline int answer_by_reset(struct __sk_buff *skb, const struct packet *p)
{
    __u8 macs[12], turned[12];
    __u32 nop = 0x01010101, word;
    const struct tcphdr *tcp = &p->tcp;
    struct tcphdr rst = *tcp;
    rst.source = tcp->dest;
    rst.dest = tcp->source;
    rst.seq = tcp->ack_seq;
    rst.ack_seq = 0;
    rst.syn = rst.ack = rst.ece = rst.cwr = 0;
    rst.rst = 1;
    rst.window = 0;
    /* Addresses and ports change places, which no sum notices; the rest goes through the checksum. */
    __s64 diff = bpf_csum_diff((void *)tcp, 16, (void *)&rst, 16, 0);
    for (__u32 i = 0; i < 40; i += 4) {
        __u32 at = p->l4 + 20 + i;
        if (i >= (__u32)tcp->doff * 4 - 20)
            break;
        if (bpf_skb_load_bytes(skb, at, &word, 4))
            return TC_ACT_SHOT;
        diff = bpf_csum_diff(&word, 4, &nop, 4, (__u32)diff);
        if (bpf_skb_store_bytes(skb, at, &nop, 4, 0))
            return TC_ACT_SHOT;
    }
    if (bpf_skb_store_bytes(skb, p->l4, &rst, 16, 0) ||
        bpf_l4_csum_replace(skb, p->l4 + offsetof(struct tcphdr, check), 0, (__u64)diff, 0))
        return TC_ACT_SHOT;
    if (p->v6) {
        bpf_skb_store_bytes(skb, ETH_HLEN + offsetof(struct ipv6hdr, saddr), p->key.local, 16, 0);
        bpf_skb_store_bytes(skb, ETH_HLEN + offsetof(struct ipv6hdr, daddr), p->peer, 16, 0);
    } else {
        bpf_skb_store_bytes(skb, ETH_HLEN + offsetof(struct iphdr, saddr), p->key.local + 12, 4, 0);
        bpf_skb_store_bytes(skb, ETH_HLEN + offsetof(struct iphdr, daddr), p->peer + 12, 4, 0);
    }
    if (bpf_skb_load_bytes(skb, 0, macs, 12))
        return TC_ACT_SHOT;
    __builtin_memcpy(turned, macs + 6, 6);
    __builtin_memcpy(turned + 6, macs, 6);
    bpf_skb_store_bytes(skb, 0, turned, 12, 0);
    return (int)bpf_redirect(skb->ifindex, 0);
}

#endif
