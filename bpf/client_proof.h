/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* A backend's SYN-ACK proves that it reaches us, not that we reach it.  Where something in between lets only the one
 * through, a redirected connection would hang: its socket is connected, and no byte of it arrives.
 *
 * So the first SYN-ACK from a backend is held, and the agent's process sends an ACK with the connection's own ports and
 * numbers, a little below what the backend expects (much as a keep-alive, RFC 9293 3.8.4), by the host's own routes.  The
 * backend, which has the SYN, answers an ACK that is out of its window by another one (3.10.7.4).  That is made the SYN-ACK
 * that was held, and the redirect taken up; it costs the first connection a round trip.  If no answer comes the SYN is sent
 * again and takes the fallback.  A RST is none: a backend sends one if it does not remember SYNs (SYN cookies), but so do
 * firewalls.
 *
 * Without a process nobody sends; then it shows after the handshake, in one connection a back-off period. */
#ifndef CRAB_CLIENT_PROOF_H
#define CRAB_CLIENT_PROOF_H

#include "client.h"
#include "client_health.h"
#include "client_packet.h"

/* How much below.  Linux's SYN cookies are the sequence number and an index into a table of four sizes, added up: what is
 * fewer than four below may be a good cookie, of another size, and made a connection. */
#define BELOW 16

struct {
    __uint(type, BPF_MAP_TYPE_LRU_HASH);
    __uint(max_entries, 4096);
    __type(key, struct crab_client_ports);
    __type(value, struct crab_client_held);
} client_held SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_RINGBUF);
    __uint(max_entries, 1 << 18);
} client_asks SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, struct crab_client_verifier);
} client_verifier SEC(".maps");

CRAB_INLINE struct crab_client_verifier *verifier(void)
{
    __u32 zero = 0;
    return bpf_map_lookup_elem(&client_verifier, &zero);
}

/* Is this backend's word to be proven, and somebody there to do it? */
CRAB_INLINE int unproven(const struct crab_client_health *path)
{
    const struct crab_client_settings *s = settings();
    const struct crab_client_verifier *v = verifier();
    __u64 now = bpf_ktime_get_coarse_ns(), proven = path->proven_ns;
    if (!s || !v || now >= v->until_ns)
        return 0;
    return !proven || proven <= doubted_ns || proven < v->since_ns || now >= proven + s->proven_ns;
}

/* Keep a SYN-ACK, and have its sender asked.  0, or -1 if that cannot be. */
static __noinline int hold(struct __sk_buff *skb, const struct packet *p)
{
    struct crab_client_held held = {};
    struct crab_client_ask ask = {
        .ports = p->key,
        .seq = bpf_htonl(bpf_ntohl(p->tcp.ack_seq) - BELOW),
        .ack = bpf_htonl(bpf_ntohl(p->tcp.seq) + 1),
    };
    copy(ask.remote, p->peer);
    if (bpf_skb_load_bytes(skb, p->l4, held.tcp, crab_length_within(p->tcp.doff * 4, CRAB_CLIENT_HEADER)) ||
        bpf_map_update_elem(&client_held, &p->key, &held, BPF_ANY))
        return -1;
    return bpf_ringbuf_output(&client_asks, &ask, sizeof ask, 0) ? -1 : 0;
}

/* The fallback was faster than the answer of a backend whose SYN-ACK is held.  Has it had the time? */
CRAB_INLINE int unanswered(const struct crab_client_ports *ports)
{
    const struct crab_client_held *held = bpf_map_lookup_elem(&client_held, ports);
    if (held && held->asked_ns && bpf_ktime_get_coarse_ns() >= held->asked_ns + ANSWER_NS)
        return 1;
    /* The process has no time to ask: go on without until it is back. */
    struct crab_client_verifier *v = verifier();
    if (held && !held->asked_ns && v)
        v->until_ns = 0;
    return 0;
}

/* Make the backend's ACK the SYN-ACK that was held. */
static __noinline int release_held(struct __sk_buff *skb, struct packet *p)
{
    struct crab_client_held *held = bpf_map_lookup_elem(&client_held, &p->key), saved;
    if (!held)
        return -1;
    saved = *held;
    __u8 *tcp = saved.tcp;
    bpf_map_delete_elem(&client_held, &p->key);
    __builtin_memcpy(&p->tcp, tcp, sizeof p->tcp);
    __u32 size = p->tcp.doff * 4;
    /* of the pseudo header, and of all that follows */
    struct {
        __u8 local[16], peer[16];
        __be32 length, proto;
    } pseudo = {.length = bpf_htonl(size), .proto = bpf_htonl(IPPROTO_TCP)};
    if (p->v6) {
        copy(pseudo.local, p->key.local);
        copy(pseudo.peer, p->peer);
    } else {
        __builtin_memcpy(pseudo.local, p->key.local + 12, 4);
        __builtin_memcpy(pseudo.peer, p->peer + 12, 4);
    }
    __builtin_memset(tcp + offsetof(struct tcphdr, check), 0, 2);
    __s64 sum = bpf_csum_diff(NULL, 0, (void *)&pseudo, sizeof pseudo, 0);
    sum = bpf_csum_diff(NULL, 0, (void *)tcp, CRAB_CLIENT_HEADER, (__u32)sum);
    __u16 check = (__u16)~fold((__u32)sum), length;
    __builtin_memcpy(tcp + offsetof(struct tcphdr, check), &check, 2);
    if (bpf_skb_change_tail(skb, p->l4 + size, 0) ||
        bpf_skb_store_bytes(skb, p->l4, tcp, crab_length_within(size, CRAB_CLIENT_HEADER), BPF_F_RECOMPUTE_CSUM))
        return -1;
    if (p->v6) {
        length = bpf_htons((__u16)size);
        return bpf_skb_store_bytes(skb, ETH_HLEN + offsetof(struct ipv6hdr, payload_len), &length, 2, BPF_F_RECOMPUTE_CSUM)
                   ? -1 : 0;
    }
    __u16 before;
    if (bpf_skb_load_bytes(skb, ETH_HLEN + offsetof(struct iphdr, tot_len), &before, 2))
        return -1;
    length = bpf_htons((__u16)(p->l4 - ETH_HLEN + size));
    return bpf_l3_csum_replace(skb, ETH_HLEN + offsetof(struct iphdr, check), before, length, 2) ||
           bpf_skb_store_bytes(skb, ETH_HLEN + offsetof(struct iphdr, tot_len), &length, 2, 0) ? -1 : 0;
}

#endif
