// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* The client endpoint: offer redirection, take up a redirect if it is really ours, and translate between the VIP that
 * the application knows and the DIP that is on the wire.
 *
 * Four programs share the maps below:
 *   crab_offer    sock_ops, on the clients' cgroup: the offer in the first SYN, and the end of connections
 *   crab_ingress  clsact ingress: checks SYN-ACKs, translates source DIP -> VIP, also in quoted packets of ICMP errors
 *   crab_egress   LWT xmit, on the routes to the VIPs: translates destination VIP -> DIP and routes anew
 *   crab_sweep    starts the timer that forgets closed connections
 *
 * No program may change the destination of a socket in SYN_SENT, so packets are translated instead.  On egress a route
 * does it, not clsact, so that the VIP needs no neighbour: it works on when the load balancer is dead.
 *
 * Four-tuples.  Two local connections may have the same local port and remote port, one to the VIP and one to the DIP
 * itself; redirected, both were the same four-tuple on the wire.  Hence: no offer if such a connection is known
 * (client_ports), a look for a socket when the SYN-ACK comes, and no offer in any SYN but the first, so that whatever
 * goes wrong costs one retransmission and the connection takes the fallback. */
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

#include "length.h"
#include "maps.h"

#define AF_INET 2
#define AF_INET6 10
#define NOP 1

/* linux/icmp.h does not compile for this target. */
#define ICMP_DEST_UNREACH 3
#define ICMP_TIME_EXCEEDED 11
#define ICMP_PARAMETERPROB 12
#define ICMP6_CKSUM 2

/* Seconds that a closed connection's translation stays: its TIME_WAIT, or an orphan's FIN_WAIT2, which still answers
 * the server's FIN (TCP_TIMEWAIT_LEN and tcp_fin_timeout, 60 s each). */
#define LINGER_NS (65 * 1000000000ull)
/* The same when the table is half full.  What a server then still sends of a closed connection is answered by a RST, which
 * ends it there too; that is better than no room for new ones. */
#define LINGER_CROWDED_NS (10 * 1000000000ull)
#define SWEEP_NS (5 * 1000000000ull)
#define CLOCK_MONOTONIC 1

/* clang 14 merges neighbouring reads of a context into one that the verifier refuses. */
#define READ(x) (*(volatile typeof(x) *)&(x))

struct out {
    __u8 dip[16];
    __u64 closed_ns; /* when the connection ended (CLOCK_MONOTONIC); 0: it lives */
};

struct in {
    __u8 vip[16];
};

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 4096);
    __type(key, struct crab_vip);
    __type(value, struct crab_client_vip);
} client_vips SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_LPM_TRIE);
    __uint(max_entries, 4096);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, struct crab_lpm);
    __type(value, __u32);
} client_backends SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, CRAB_MAX_CLIENT_FLOWS);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, struct crab_pending_key);
    __type(value, struct crab_pending);
} client_pending SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, CRAB_MAX_CLIENT_FLOWS);
    __type(key, struct crab_flow_key);
    __type(value, struct out);
} client_out SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, CRAB_MAX_CLIENT_FLOWS);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, struct crab_flow_key);
    __type(value, struct in);
} client_in SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, CRAB_MAX_CLIENT_FLOWS);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, struct crab_port_key);
    __type(value, __u32);
} client_ports SEC(".maps");

/* One timer sweeps closed flows.  A timer for each flow would be simpler, but bpf_timer_init may answer ENOMEM at any
 * time (its memory comes from kmalloc_nolock), and a packet cannot wait. */
struct sweeper {
    struct bpf_timer timer;
    __u32 left; /* flows that the sweep under way has found, and let be */
};

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, struct sweeper);
} client_sweeper SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    __uint(max_entries, CRAB_CLIENT_COUNTERS);
    __type(key, __u32);
    __type(value, __u64);
} client_counters SEC(".maps");

static __always_inline void count(__u32 what)
{
    __u64 *n = bpf_map_lookup_elem(&client_counters, &what);
    if (n)
        (*n)++;
}

static __always_inline void map_v4(__u8 addr[16], __be32 v4)
{
    __builtin_memset(addr, 0, 10);
    addr[10] = addr[11] = 0xff;
    __builtin_memcpy(addr + 12, &v4, 4);
}

static __always_inline int is_mapped(const __u8 addr[16])
{
    const __u32 *w = (const void *)addr;
    return !w[0] && !w[1] && w[2] == bpf_htonl(0xffff);
}

static __always_inline int same(const __u8 a[16], const __u8 b[16])
{
    __u32 differ = 0;
    for (int i = 0; i < 16; i++)
        differ |= a[i] ^ b[i];
    return !differ;
}

static __always_inline int in_prefixes(const __u8 addr[16])
{
    struct crab_lpm key = {.bits = 128};
    __builtin_memcpy(key.addr, addr, 16);
    return bpf_map_lookup_elem(&client_backends, &key) != NULL;
}

/* ---- crab_offer: our own connections ---- */

static __always_inline void addresses(struct bpf_sock_ops *ctx, struct crab_flow_key *k)
{
    if (READ(ctx->family) == AF_INET) {
        map_v4(k->local, READ(ctx->local_ip4));
        map_v4(k->remote, READ(ctx->remote_ip4));
    } else {
        __u32 *local = (void *)k->local, *remote = (void *)k->remote;
        local[0] = READ(ctx->local_ip6[0]);
        local[1] = READ(ctx->local_ip6[1]);
        local[2] = READ(ctx->local_ip6[2]);
        local[3] = READ(ctx->local_ip6[3]);
        remote[0] = READ(ctx->remote_ip6[0]);
        remote[1] = READ(ctx->remote_ip6[1]);
        remote[2] = READ(ctx->remote_ip6[2]);
        remote[3] = READ(ctx->remote_ip6[3]);
    }
    k->lport = bpf_htons((__u16)READ(ctx->local_port)); /* host order in the context, unlike the remote one */
    k->rport = (__be16)(READ(ctx->remote_port) >> 16);
}

static __always_inline struct crab_client_vip *vip_of(const struct crab_flow_key *k)
{
    struct crab_vip key = {.port = k->rport, .proto = IPPROTO_TCP};
    __builtin_memcpy(key.addr, k->remote, 16);
    return bpf_map_lookup_elem(&client_vips, &key);
}

static __always_inline struct crab_port_key ports_of(const struct crab_flow_key *k)
{
    struct crab_port_key p = {.lport = k->lport, .rport = k->rport};
    __builtin_memcpy(p.local, k->local, 16);
    return p;
}

/* Both directions go; inward only if it is not by now that of another VIP's connection, from the same port to the same
 * backend. */
static __always_inline void forget(const struct crab_flow_key *k, const struct out *out)
{
    struct crab_flow_key key = *k;
    __builtin_memcpy(key.remote, out->dip, 16);
    struct in *in = bpf_map_lookup_elem(&client_in, &key);
    if (in && same(in->vip, k->remote))
        bpf_map_delete_elem(&client_in, &key);
    bpf_map_delete_elem(&client_out, k);
}

/* One connection less has these ports. */
static __always_inline void give_back(const struct crab_port_key *p)
{
    __u32 *n = bpf_map_lookup_elem(&client_ports, p);
    if (n && __sync_fetch_and_add(n, -1) == 1)
        bpf_map_delete_elem(&client_ports, p);
}

static __always_inline void connecting(struct bpf_sock_ops *ctx, const struct crab_flow_key *k)
{
    struct crab_client_vip *vip = vip_of(k);
    if (!vip && !in_prefixes(k->remote))
        return;
    struct crab_port_key p = ports_of(k);
    __u32 one = 1, *n = bpf_map_lookup_elem(&client_ports, &p);
    int shared = n && *n;
    if (n)
        __sync_fetch_and_add(n, 1);
    else if (bpf_map_update_elem(&client_ports, &p, &one, BPF_NOEXIST))
        shared = 1; /* full: who else has these ports cannot be known */
    /* What an old connection of the same four-tuple left would send this one's SYN straight to a backend. */
    struct out *old = bpf_map_lookup_elem(&client_out, k);
    if (old)
        forget(k, old);
    int flags = BPF_SOCK_OPS_STATE_CB_FLAG;
    if (vip && shared)
        count(CRAB_CLIENT_NO_OFFER_SHARED);
    else if (vip)
        flags |= BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG;
    bpf_sock_ops_cb_flags_set(ctx, READ(ctx->bpf_sock_ops_cb_flags) | flags);
}

static __always_inline struct crab_pending_key pending_of(const struct crab_flow_key *k, __be32 ack)
{
    struct crab_pending_key p = {.lport = k->lport, .rport = k->rport, .ack = ack};
    __builtin_memcpy(p.local, k->local, 16);
    return p;
}

static __always_inline void closed(struct bpf_sock_ops *ctx, const struct crab_flow_key *k)
{
    struct crab_port_key p = ports_of(k);
    give_back(&p);
    /* of a connection that was never answered; snd_una is then still the initial sequence number */
    struct crab_pending_key pending = pending_of(k, bpf_htonl(READ(ctx->snd_una) + 1));
    bpf_map_delete_elem(&client_pending, &pending);
    struct out *out = bpf_map_lookup_elem(&client_out, k);
    if (out)
        out->closed_ns = bpf_ktime_get_ns();
}

static __always_inline void write_offer(struct bpf_sock_ops *ctx, const struct crab_flow_key *k)
{
    struct crab_client_vip *vip = vip_of(k);
    struct tcphdr *tcp = READ(ctx->skb_data), *end = READ(ctx->skb_data_end);
    if (!vip || (void *)(tcp + 1) > (void *)end)
        return;
    struct crab_pending_key key = pending_of(k, bpf_htonl(bpf_ntohl(tcp->seq) + 1));
    if (READ(ctx->total_retrans)) {
        bpf_map_delete_elem(&client_pending, &key);
        count(CRAB_CLIENT_RETRANSMITTED);
        return;
    }
    struct crab_pending pending = {.form = vip->form};
    __builtin_memcpy(pending.vip, k->remote, 16);
    __u8 option[4] = {CRAB_OPT_KIND, 2};
    __u32 n = 2;
    if (vip->form == CRAB_FORM_EXPERIMENTAL) {
        option[0] = CRAB_OPT_KIND_EXPERIMENTAL;
        option[1] = 4;
        option[2] = CRAB_OPT_EXID >> 8;
        option[3] = CRAB_OPT_EXID & 0xff;
        n = 4;
    }
    if (bpf_map_update_elem(&client_pending, &key, &pending, BPF_ANY)) {
        count(CRAB_CLIENT_NO_OFFER_ROOM);
        return;
    }
    if (bpf_store_hdr_opt(ctx, option, crab_length_within(n, sizeof option), 0)) {
        bpf_map_delete_elem(&client_pending, &key);
        count(CRAB_CLIENT_NO_OFFER_ROOM);
        return;
    }
    count(CRAB_CLIENT_OFFERED);
}

SEC("sockops")
int crab_offer(struct bpf_sock_ops *ctx)
{
    struct crab_flow_key k __attribute__((aligned(8))) = {}; /* written by words */
    __u32 op = READ(ctx->op);
    int syn = (READ(ctx->skb_tcp_flags) & 0x12) == 0x02;
    switch (op) {
    case BPF_SOCK_OPS_TCP_CONNECT_CB:
        addresses(ctx, &k);
        connecting(ctx, &k);
        break;
    case BPF_SOCK_OPS_HDR_OPT_LEN_CB: {
        if (!syn)
            break;
        addresses(ctx, &k);
        /* A retransmission reserves too: only then comes the callback that forgets the offer.  It writes NOPs. */
        struct crab_client_vip *vip = vip_of(&k);
        if (vip && bpf_reserve_hdr_opt(ctx, 4, 0))
            count(CRAB_CLIENT_NO_OFFER_ROOM);
        break;
    }
    case BPF_SOCK_OPS_WRITE_HDR_OPT_CB:
        if (!syn)
            break;
        addresses(ctx, &k);
        write_offer(ctx, &k);
        break;
    case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
        bpf_sock_ops_cb_flags_set(ctx, READ(ctx->bpf_sock_ops_cb_flags) & ~BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG);
        break;
    case BPF_SOCK_OPS_STATE_CB:
        if (READ(ctx->args[1]) != BPF_TCP_CLOSE)
            break;
        addresses(ctx, &k);
        closed(ctx, &k);
        break;
    }
    return 1;
}

/* ---- packets ---- */

struct packet {
    struct crab_flow_key key; /* local: our address; remote: the other one's */
    __u32 l3, l4;             /* offsets */
    __u8 v6;
    __u8 proto;
};

/* Parse the IP header at offset l3 of a packet that comes to us (inward) or that we send. */
static __always_inline int parse_ip(struct __sk_buff *skb, struct packet *p, __be16 ethertype, int inward)
{
    __u8 *src = inward ? p->key.remote : p->key.local, *dst = inward ? p->key.local : p->key.remote;
    if (ethertype == bpf_htons(ETH_P_IP)) {
        struct iphdr ip;
        if (bpf_skb_load_bytes(skb, p->l3, &ip, sizeof ip))
            return -1;
        if (ip.ihl < 5 || (ip.frag_off & bpf_htons(0x1fff)))
            return -1;
        map_v4(src, ip.saddr);
        map_v4(dst, ip.daddr);
        p->l4 = p->l3 + ip.ihl * 4;
        p->proto = ip.protocol;
        p->v6 = 0;
    } else if (ethertype == bpf_htons(ETH_P_IPV6)) {
        struct ipv6hdr ip;
        if (bpf_skb_load_bytes(skb, p->l3, &ip, sizeof ip))
            return -1;
        __builtin_memcpy(src, &ip.saddr, 16);
        __builtin_memcpy(dst, &ip.daddr, 16);
        p->l4 = p->l3 + sizeof ip;
        p->proto = ip.nexthdr;
        p->v6 = 1;
    } else {
        return -1;
    }
    return 0;
}

/* Replace an address of the packet and mend its checksums, whatever the card has taken over of them. */
static __always_inline int replace_address(struct __sk_buff *skb, const struct packet *p, int source,
                                           const __u8 from[16], const __u8 to[16])
{
    __u32 csum = p->l4 + offsetof(struct tcphdr, check);
    if (p->v6) {
        __s64 diff = bpf_csum_diff((void *)from, 16, (void *)to, 16, 0);
        __u32 at = p->l3 + (source ? offsetof(struct ipv6hdr, saddr) : offsetof(struct ipv6hdr, daddr));
        if (bpf_skb_store_bytes(skb, at, to, 16, 0))
            return -1;
        return bpf_l4_csum_replace(skb, csum, 0, (__u64)diff, BPF_F_PSEUDO_HDR) ? -1 : 0;
    }
    __be32 old, new;
    __builtin_memcpy(&old, from + 12, 4);
    __builtin_memcpy(&new, to + 12, 4);
    __u32 at = p->l3 + (source ? offsetof(struct iphdr, saddr) : offsetof(struct iphdr, daddr));
    if (bpf_l4_csum_replace(skb, csum, old, new, BPF_F_PSEUDO_HDR | 4) ||
        bpf_l3_csum_replace(skb, p->l3 + offsetof(struct iphdr, check), old, new, 4))
        return -1;
    return bpf_skb_store_bytes(skb, at, &new, 4, 0) ? -1 : 0;
}

/* ---- crab_ingress ---- */

/* Does the option list of len bytes hold the redirect of this form to this VIP?
 *
 * The list is walked by position, not by option: the verifier can follow that, as every position is a constant. */
static __always_inline int redirects_to(struct __sk_buff *skb, __u32 options, __u32 len, const struct crab_pending *want)
{
    __u8 list[64] = {};
    __u32 experimental = want->form == CRAB_FORM_EXPERIMENTAL, next = 0, at = 0;
    __u8 kind = experimental ? CRAB_OPT_KIND_EXPERIMENTAL : CRAB_OPT_KIND;
    __u8 size = (experimental ? 4 : 2) + (is_mapped(want->vip) ? 4 : 16);

    if (len < 1 || len > 40 || bpf_skb_load_bytes(skb, options, list, crab_length_within(len, 40)))
        return 0;
#pragma unroll
    for (__u32 i = 0; i < 40; i++) {
        if (i != next || at)
            continue;
        if (list[i] == NOP) {
            next = i + 1;
            continue;
        }
        __u32 n = list[i + 1];
        if (list[i] == 0 || n < 2 || i + n > len)
            return 0;
        if (list[i] == kind && n == size) {
            if (!experimental)
                at = i + 2;
            else if (list[i + 2] == CRAB_OPT_EXID >> 8 && list[i + 3] == (CRAB_OPT_EXID & 0xff))
                at = i + 4;
        }
        next = i + n;
    }
    if (!at)
        return 0;
    __u32 differ = 0;
    if (is_mapped(want->vip)) {
        for (int b = 0; b < 4; b++)
            differ |= list[(at + b) & 63] ^ want->vip[12 + b];
    } else {
        for (int b = 0; b < 16; b++)
            differ |= list[(at + b) & 63] ^ want->vip[b];
    }
    return !differ;
}

/* Is there a local connection that has this four-tuple already? */
static __always_inline int collides(struct __sk_buff *skb, const struct packet *p)
{
    struct bpf_sock_tuple tuple = {};
    __u32 len;
    if (p->v6) {
        __builtin_memcpy(tuple.ipv6.saddr, p->key.remote, 16);
        __builtin_memcpy(tuple.ipv6.daddr, p->key.local, 16);
        tuple.ipv6.sport = p->key.rport;
        tuple.ipv6.dport = p->key.lport;
        len = sizeof tuple.ipv6;
    } else {
        __builtin_memcpy(&tuple.ipv4.saddr, p->key.remote + 12, 4);
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

/* Turn a SYN-ACK into the RST that answers it, and send it back where it came from.  The options become NOPs: with their
 * time stamps the server's PAWS check would not look at it. */
static __always_inline int answer_by_reset(struct __sk_buff *skb, const struct packet *p, const struct tcphdr *tcp)
{
    __u8 macs[12], turned[12];
    __u32 nop = 0x01010101, word;
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
        bpf_skb_store_bytes(skb, p->l3 + offsetof(struct ipv6hdr, saddr), p->key.local, 16, 0);
        bpf_skb_store_bytes(skb, p->l3 + offsetof(struct ipv6hdr, daddr), p->key.remote, 16, 0);
    } else {
        bpf_skb_store_bytes(skb, p->l3 + offsetof(struct iphdr, saddr), p->key.local + 12, 4, 0);
        bpf_skb_store_bytes(skb, p->l3 + offsetof(struct iphdr, daddr), p->key.remote + 12, 4, 0);
    }
    if (bpf_skb_load_bytes(skb, 0, macs, 12))
        return TC_ACT_SHOT;
    __builtin_memcpy(turned, macs + 6, 6);
    __builtin_memcpy(turned + 6, macs, 6);
    bpf_skb_store_bytes(skb, 0, turned, 12, 0);
    return (int)bpf_redirect(skb->ifindex, 0);
}

/* Make the connection's two entries.  0, or -1 if there is no room. */
static __always_inline int install(const struct packet *p, const __u8 vip[16])
{
    struct crab_flow_key out_key = p->key;
    struct out out = {};
    struct in in;
    __builtin_memcpy(out_key.remote, vip, 16);
    __builtin_memcpy(out.dip, p->key.remote, 16);
    __builtin_memcpy(in.vip, vip, 16);
    if (bpf_map_update_elem(&client_out, &out_key, &out, BPF_ANY))
        return -1;
    if (bpf_map_update_elem(&client_in, &p->key, &in, BPF_ANY)) {
        bpf_map_delete_elem(&client_out, &out_key);
        return -1;
    }
    return 0;
}

static __always_inline int ingress_tcp(struct __sk_buff *skb, struct packet *p)
{
    struct tcphdr tcp;
    if (bpf_skb_load_bytes(skb, p->l4, &tcp, sizeof tcp))
        return TC_ACT_UNSPEC;
    p->key.lport = tcp.dest;
    p->key.rport = tcp.source;

    /* A new connection's answer comes before a flow that an old one of the same four-tuple left. */
    if ((tcp.syn || tcp.rst) && tcp.ack) {
        struct crab_pending_key key = pending_of(&p->key, tcp.ack_seq);
        struct crab_pending *found = bpf_map_lookup_elem(&client_pending, &key);
        if (found) {
            struct crab_pending pending = *found;
            if (same(pending.vip, p->key.remote)) {
                /* by the fallback: from the VIP itself */
                bpf_map_delete_elem(&client_pending, &key);
                return TC_ACT_UNSPEC;
            }
            if (!in_prefixes(p->key.remote)) {
                count(CRAB_CLIENT_DROP_SOURCE);
                return TC_ACT_SHOT;
            }
            if (tcp.rst) {
                /* A closed port: its RST carries no option; the acknowledgement number proves it. */
                if (replace_address(skb, p, 1, p->key.remote, pending.vip))
                    return TC_ACT_SHOT;
                bpf_map_delete_elem(&client_pending, &key);
                count(CRAB_CLIENT_REFUSED_PORT);
                return TC_ACT_UNSPEC;
            }
            if (tcp.doff < 5 || !redirects_to(skb, p->l4 + 20, (__u32)tcp.doff * 4 - 20, &pending)) {
                count(CRAB_CLIENT_DROP_VIP);
                return TC_ACT_SHOT;
            }
            if (collides(skb, p)) {
                count(CRAB_CLIENT_RESET_COLLISION);
                return answer_by_reset(skb, p, &tcp);
            }
            if (install(p, pending.vip)) {
                count(CRAB_CLIENT_RESET_FULL);
                return answer_by_reset(skb, p, &tcp);
            }
            bpf_map_delete_elem(&client_pending, &key);
            count(CRAB_CLIENT_REDIRECTED);
        }
    }
    struct in *in = bpf_map_lookup_elem(&client_in, &p->key);
    if (!in)
        return TC_ACT_UNSPEC;
    __u8 vip[16];
    __builtin_memcpy(vip, in->vip, 16);
    if (replace_address(skb, p, 1, p->key.remote, vip))
        return TC_ACT_SHOT;
    count(CRAB_CLIENT_PACKETS_IN);
    return TC_ACT_UNSPEC;
}

/* An error about a packet of ours quotes the DIP; the socket knows the VIP. */
static __always_inline int ingress_icmp(struct __sk_buff *skb, const struct packet *outer)
{
    struct packet p = {.l3 = outer->l4 + 8};
    struct {
        __be16 source, dest;
        __be32 seq;
    } tcp;
    __u8 type, vip[16];
    if (bpf_skb_load_bytes(skb, outer->l4, &type, 1))
        return TC_ACT_UNSPEC;
    if (outer->v6 ? type >= 128 : type != ICMP_DEST_UNREACH && type != ICMP_TIME_EXCEEDED && type != ICMP_PARAMETERPROB)
        return TC_ACT_UNSPEC;
    if (parse_ip(skb, &p, outer->v6 ? bpf_htons(ETH_P_IPV6) : bpf_htons(ETH_P_IP), 0) || p.proto != IPPROTO_TCP)
        return TC_ACT_UNSPEC;
    if (bpf_skb_load_bytes(skb, p.l4, &tcp, sizeof tcp))
        return TC_ACT_UNSPEC;
    p.key.lport = tcp.source;
    p.key.rport = tcp.dest;
    struct in *in = bpf_map_lookup_elem(&client_in, &p.key);
    if (in) {
        __builtin_memcpy(vip, in->vip, 16);
    } else {
        /* about a SYN on its way to a backend */
        struct crab_pending_key key = pending_of(&p.key, bpf_htonl(bpf_ntohl(tcp.seq) + 1));
        struct crab_pending *pending = bpf_map_lookup_elem(&client_pending, &key);
        if (!pending || !in_prefixes(p.key.remote))
            return TC_ACT_UNSPEC;
        __builtin_memcpy(vip, pending->vip, 16);
    }
    if (p.v6) {
        __s64 diff = bpf_csum_diff((void *)p.key.remote, 16, (void *)vip, 16, 0);
        if (bpf_skb_store_bytes(skb, p.l3 + offsetof(struct ipv6hdr, daddr), vip, 16, 0) ||
            bpf_l4_csum_replace(skb, outer->l4 + ICMP6_CKSUM, 0, (__u64)diff, 0))
            return TC_ACT_SHOT;
    } else {
        /* The quoted header's checksum makes up for its address, so ICMP's own sum stays what it was. */
        __be32 old, new;
        __builtin_memcpy(&old, p.key.remote + 12, 4);
        __builtin_memcpy(&new, vip + 12, 4);
        if (bpf_l3_csum_replace(skb, p.l3 + offsetof(struct iphdr, check), old, new, 4) ||
            bpf_skb_store_bytes(skb, p.l3 + offsetof(struct iphdr, daddr), &new, 4, 0))
            return TC_ACT_SHOT;
    }
    count(CRAB_CLIENT_ICMP);
    return TC_ACT_UNSPEC;
}

SEC("tc")
int crab_ingress(struct __sk_buff *skb)
{
    struct packet p = {.l3 = ETH_HLEN};
    if (parse_ip(skb, &p, (__be16)skb->protocol, 1))
        return TC_ACT_UNSPEC;
    if (p.proto == IPPROTO_TCP)
        return ingress_tcp(skb, &p);
    if (p.proto == (p.v6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP))
        return ingress_icmp(skb, &p);
    return TC_ACT_UNSPEC;
}

/* ---- crab_egress ---- */

SEC("lwt_xmit")
int crab_egress(struct __sk_buff *skb)
{
    struct packet p = {};
    struct {
        __be16 source, dest;
    } ports;
    if (parse_ip(skb, &p, (__be16)skb->protocol, 0) || p.proto != IPPROTO_TCP)
        return BPF_OK;
    if (bpf_skb_load_bytes(skb, p.l4, &ports, sizeof ports))
        return BPF_OK;
    p.key.lport = ports.source;
    p.key.rport = ports.dest;
    struct out *out = bpf_map_lookup_elem(&client_out, &p.key);
    if (!out)
        return BPF_OK;
    __u8 dip[16];
    __builtin_memcpy(dip, out->dip, 16);
    if (replace_address(skb, &p, 0, p.key.remote, dip))
        return BPF_DROP;
    count(CRAB_CLIENT_PACKETS_OUT);
    return BPF_LWT_REROUTE;
}

/* ---- crab_sweep ---- */

struct sweep {
    __u64 now, linger;
};

static __always_inline int is_over(const struct out *out, const struct sweep *s)
{
    return out->closed_ns && s->now - out->closed_ns > s->linger;
}

/* Its element may be another flow's at any moment: another CPU forgets this one, and what it makes next has the memory.
 * And what is deleted by key may have been renewed by then.  So the sweep takes the ports as a connection does: as long
 * as it has them no other one gets a redirect; if somebody has them already, he forgets the flow or it waits. */
static long sweep_one(void *map __attribute__((unused)), struct crab_flow_key *k, struct out *out, struct sweep *s)
{
    if (is_over(out, s)) {
        struct crab_flow_key key = *k;
        struct crab_port_key p = ports_of(&key);
        __u32 one = 1;
        if (bpf_map_update_elem(&client_ports, &p, &one, BPF_NOEXIST))
            return 0;
        out = bpf_map_lookup_elem(&client_out, &key);
        if (out && is_over(out, s))
            forget(&key, out);
        give_back(&p);
        return 0;
    }
    /* Not on the stack: the verifier would follow its every value. */
    __u32 zero = 0;
    struct sweeper *sweeper = bpf_map_lookup_elem(&client_sweeper, &zero);
    if (sweeper)
        sweeper->left++;
    return 0;
}

static int sweep(void *map __attribute__((unused)), __u32 *key __attribute__((unused)), struct sweeper *sweeper)
{
    struct sweep s = {.now = bpf_ktime_get_ns(), .linger = LINGER_NS};
    sweeper->left = 0;
    bpf_for_each_map_elem(&client_out, sweep_one, &s, 0);
    if (sweeper->left > CRAB_MAX_CLIENT_FLOWS / 2) {
        s.linger = LINGER_CROWDED_NS;
        bpf_for_each_map_elem(&client_out, sweep_one, &s, 0);
    }
    bpf_timer_start(&sweeper->timer, SWEEP_NS, 0);
    return 0;
}

/* Run once, when the agent is installed.  The timer ends with the last pin and descriptor of its map. */
SEC("syscall")
int crab_sweep(void *ctx __attribute__((unused)))
{
    __u32 zero = 0;
    struct sweeper *sweeper = bpf_map_lookup_elem(&client_sweeper, &zero);
    if (!sweeper)
        return -1;
    long rc = bpf_timer_init(&sweeper->timer, &client_sweeper, CLOCK_MONOTONIC);
    if (!rc)
        rc = bpf_timer_set_callback(&sweeper->timer, sweep);
    if (!rc)
        rc = bpf_timer_start(&sweeper->timer, SWEEP_NS, 0);
    return (int)rc;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
