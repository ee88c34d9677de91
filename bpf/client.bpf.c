// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* The client endpoint: offer redirection, take up a redirect if it is really ours, and translate between the VIP that
 * the application knows and the DIP that is on the wire.
 *
 * Five programs share the maps in client.h:
 *   crab_offer    sock_ops, on the clients' cgroup: the offer in the first SYN, whether it was taken up, and the end of
 *                 connections (client_offer.h)
 *   crab_ingress  clsact ingress: checks SYN-ACKs, translates source DIP -> VIP, also in quoted packets of ICMP errors
 *   crab_egress   LWT xmit, on the routes to the VIPs: translates destination VIP -> DIP and routes anew
 *   crab_sweep    starts the timer that forgets closed connections
 *   crab_end      ends one of whose end sock_ops did not hear: its cgroup was another agent's, or somebody took our flags
 *
 * No program may change the destination of a socket in SYN_SENT, so packets are translated instead.  On egress a route
 * does it, not clsact, so that the VIP needs no neighbour: it works on when the load balancer is dead.
 *
 * Four-tuples.  Two local connections may have the same local port and remote port, one to the VIP and one to the DIP
 * itself; redirected, both were the same four-tuple on the wire.  Hence: no offer if such a connection is known
 * (client_flows), a look for a socket when the SYN-ACK comes, and no offer in any SYN but the first, so that whatever
 * goes wrong costs one retransmission and the connection takes the fallback.
 *
 * A redirect is accepted in three steps, each by who can know: egress has seen the SYN leave by its route (so it will see
 * the rest), ingress has checked the SYN-ACK, and the socket has taken that very SYN-ACK.  Only then packets are translated,
 * and never a SYN.  That its sender hears us is proven before, if it is not known (client_proof.h). */
#include "client.h"
#include "client_health.h"
#include "client_offer.h"
#include "client_packet.h"
#include "client_proof.h"

/* linux/icmp.h does not compile for this target. */
#define ICMP_DEST_UNREACH 3
#define ICMP_TIME_EXCEEDED 11
#define ICMP_PARAMETERPROB 12
#define ICMP6_CKSUM 2

/* How long closed connections are translated on when the table is half full.  What a server then still sends of one is
 * answered by a RST, which ends it there too; that is better than no room for new ones. */
#define LINGER_CROWDED_NS (10 * 1000000000ull)
#define SWEEP_NS (5 * 1000000000ull)
#define CLOCK_MONOTONIC 1

/* Whom we have connections with, by a hash of the address: packets of others are let pass after a look at one bit of a
 * memory that is always at hand. */
struct peers {
    __u64 bits[512];
};

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, struct peers);
} client_peers SEC(".maps");

static __always_inline __u64 *peer_bits(const __u8 addr[16], __u64 *bit)
{
    const __u32 *w = (const void *)addr;
    __u32 zero = 0, h = ((w[0] ^ w[1] ^ w[2] ^ w[3]) * 0x9e3779b1u) >> 17;
    struct peers *peers = bpf_map_lookup_elem(&client_peers, &zero);
    *bit = 1ull << (h & 63);
    return peers ? &peers->bits[h >> 6 & 511] : NULL;
}

static __always_inline int is_peer(const __u8 addr[16])
{
    __u64 bit, *bits = peer_bits(addr, &bit);
    return bits && *bits & bit;
}

static __always_inline void make_peer(const __u8 addr[16])
{
    __u64 bit, *bits = peer_bits(addr, &bit);
    if (bits && !(*bits & bit))
        __sync_fetch_and_or(bits, bit);
}

/* ---- crab_ingress ---- */

#define GO_ON (-2)

/* Take up a redirect that has passed all checks but this: a four-tuple is one connection's. */
static __noinline int accept(struct __sk_buff *skb, const struct packet *p, struct crab_client_flow *flow,
                             struct crab_client_health *path)
{
    if (collides(skb, p)) {
        count(CRAB_CLIENT_RESET_COLLISION);
        return answer_by_reset(skb, p);
    }
    copy(flow->dip, p->peer);
    flow->diff = (__u32)bpf_csum_diff((void *)p->peer, 16, (void *)flow->vip, 16, 0);
    flow->seq = p->tcp.seq;
    flow->again = 0;
    flow->state = CRAB_CLIENT_ACCEPTED;
    make_peer(p->peer);
    count(CRAB_CLIENT_REDIRECTED);
    if (path)
        note(&path->minute, CRAB_CLIENT_MINUTE_TAKEN, bpf_ktime_get_coarse_ns());
    return GO_ON;
}

static __always_inline int refuse(struct crab_client_flow *flow, const struct packet *p, const __u8 *dip, __u32 reason)
{
    flow->failed = 1;
    failed(flow->vip, p->key.rport, dip, reason);
    return TC_ACT_SHOT;
}

/* Is the SYN that offered yet to be sent again, for the fallback? */
static __always_inline int asks_again(const struct crab_client_flow *flow)
{
    return flow->offer == CRAB_CLIENT_OUT && !flow->retransmitted;
}

/* A SYN-ACK or a RST whose acknowledgement number says that a SYN of ours is answered. */
static __noinline int answer(struct __sk_buff *skb, const struct packet *p, struct crab_client_flow *flow)
{
    int redirected = flow->state >= CRAB_CLIENT_HELD;
    if (same(flow->vip, p->peer)) { /* by the fallback: from the VIP itself */
        if (flow->state != CRAB_CLIENT_ACCEPTED || flow->again || p->tcp.rst)
            return TC_ACT_UNSPEC; /* whichever the socket takes */
        count(CRAB_CLIENT_RESET_LATE);
        return answer_by_reset(skb, p);
    }
    if (!in_prefixes(p->peer)) {
        count(CRAB_CLIENT_DROP_SOURCE);
        return refuse(flow, p, p->peer, CRAB_CLIENT_SOURCE);
    }
    if (p->tcp.rst) {
        /* A closed port, whose RST carries no option; or a firewall on the way there.  The fallback may do better. */
        count(CRAB_CLIENT_REFUSED_PORT);
        if (asks_again(flow))
            return refuse(flow, p, p->peer, CRAB_CLIENT_REFUSED);
        __u32 diff = (__u32)bpf_csum_diff((void *)p->peer, 16, (void *)flow->vip, 16, 0);
        if (translate(skb, p, 1, flow->vip, diff))
            return TC_ACT_SHOT;
        return TC_ACT_UNSPEC;
    }
    if (!redirects_to(skb, p, flow)) {
        count(CRAB_CLIENT_DROP_VIP);
        return refuse(flow, p, p->peer, CRAB_CLIENT_NO_ECHO);
    }
    if (!flow->left) {
        count(CRAB_CLIENT_RESET_ROUTE);
        refuse(flow, p, NULL, CRAB_CLIENT_ROUTE);
        return answer_by_reset(skb, p);
    }
    if (redirected && same(flow->dip, p->peer) && flow->seq == p->tcp.seq) { /* the same one again */
        if (flow->state != CRAB_CLIENT_HELD)
            return GO_ON;
        if (!flow->again)
            return TC_ACT_SHOT;
    } else if (redirected && !flow->again) {
        count(CRAB_CLIENT_RESET_LATE);
        return answer_by_reset(skb, p);
    }
    struct crab_client_health *path = path_of(flow->vip, p->key.rport, p->peer);
    /* Where a SYN without an offer is redirected as well there is no fallback to wait for: one that was held before goes on. */
    if (redirected || !path || !unproven(path) || hold(skb, p))
        return accept(skb, p, flow, path);
    copy(flow->dip, p->peer);
    flow->seq = p->tcp.seq;
    flow->state = CRAB_CLIENT_HELD;
    make_peer(p->peer);
    return TC_ACT_SHOT;
}

/* What the agent's process sent to a backend whose redirect is held has been answered. */
static __noinline int proven(struct __sk_buff *skb, struct packet *p, struct crab_client_flow *flow)
{
    struct crab_client_health *path = path_of(flow->vip, p->key.rport, p->peer);
    if (path)
        path->proven_ns = bpf_ktime_get_coarse_ns();
    count(CRAB_CLIENT_VERIFIED);
    if (release_held(skb, p)) {
        flow->failed = 1;
        flow->state = CRAB_CLIENT_WAITING;
        return TC_ACT_SHOT;
    }
    return accept(skb, p, flow, path);
}

static __always_inline int ingress_tcp(struct __sk_buff *skb, struct packet *p)
{
    if (parse_tcp(skb, p, 1) || (!p->tcp.syn && !p->tcp.rst && !is_peer(p->peer)))
        return TC_ACT_UNSPEC;
    struct crab_client_flow *flow = flow_of(&p->key);
    if (!flow)
        return TC_ACT_UNSPEC;
    __u32 state = flow->state;
    int answers = p->tcp.ack && p->tcp.ack_seq == flow->ack, from = same(flow->dip, p->peer);
    if (state == CRAB_CLIENT_TAKEN) {
        if (!from) {
            if (flow->ends_ns || !same(flow->vip, p->peer))
                return TC_ACT_UNSPEC;
            /* While our route is gone, packets go untranslated to the VIP, whose servers do not know the connection.  They
             * are lost, and sent again when the route is back. */
            if (p->tcp.rst) {
                count(CRAB_CLIENT_DROP_RESET);
                return TC_ACT_SHOT;
            }
            /* The fallback's answer to a retransmission, after the redirect's. */
            if (!p->tcp.syn || !answers)
                return TC_ACT_UNSPEC;
            count(CRAB_CLIENT_RESET_LATE);
            return answer_by_reset(skb, p);
        }
        if (p->tcp.syn && !answers) {
            /* Of another connection, by a program outside of the cgroup?  While this one lives anybody may have sent it, and
             * the socket knows what to do (RFC 5961, 4). */
            if (flow->ends_ns || collides(skb, p)) {
                forget(flow, state);
                return TC_ACT_UNSPEC;
            }
        } else if (p->tcp.syn) {
            mute(flow, p->key.rport); /* our ACK did not get there */
        } else if (flow->said != CRAB_CLIENT_SPOKE && !p->tcp.rst) {
            flow->said = CRAB_CLIENT_SPOKE;
            completed(flow->vip, p->key.rport, flow->dip);
        }
    } else if (state == CRAB_CLIENT_FREE) {
        return TC_ACT_UNSPEC;
    } else {
        int verdict = GO_ON;
        if ((p->tcp.syn || p->tcp.rst) && answers)
            verdict = answer(skb, p, flow);
        else if (!from)
            return TC_ACT_UNSPEC;
        else if (state == CRAB_CLIENT_HELD) {
            if (p->tcp.rst || !answers)
                return TC_ACT_SHOT;
            verdict = proven(skb, p, flow);
        }
        if (verdict != GO_ON)
            return verdict;
    }
    if (translate(skb, p, 1, flow->vip, flow->diff))
        return TC_ACT_SHOT;
    count(CRAB_CLIENT_PACKETS_IN);
    return TC_ACT_UNSPEC;
}

/* An error about a packet of ours quotes the DIP; the socket knows the VIP. */
static __always_inline int ingress_icmp(struct __sk_buff *skb, const struct packet *outer)
{
    struct packet p = {};
    __u32 l3 = outer->l4 + 8;
    struct {
        __be16 source, dest;
        __be32 seq;
    } tcp;
    __u8 type, vip[16] __attribute__((aligned(4)));
    if (bpf_skb_load_bytes(skb, outer->l4, &type, 1))
        return TC_ACT_UNSPEC;
    if (outer->v6 ? type >= 128 : type != ICMP_DEST_UNREACH && type != ICMP_TIME_EXCEEDED && type != ICMP_PARAMETERPROB)
        return TC_ACT_UNSPEC;
    barrier_var(l3); /* see parse_tcp() */
    l3 &= 127;
    if (parse_ip(skb, &p, l3, outer->v6 ? bpf_htons(ETH_P_IPV6) : bpf_htons(ETH_P_IP), 0) || p.proto != IPPROTO_TCP)
        return TC_ACT_UNSPEC;
    if (bpf_skb_load_bytes(skb, p.l4, &tcp, sizeof tcp))
        return TC_ACT_UNSPEC;
    p.key.lport = tcp.source;
    p.key.rport = tcp.dest;
    struct crab_client_flow *flow = flow_of(&p.key);
    if (!flow || flow->state == CRAB_CLIENT_FREE)
        return TC_ACT_UNSPEC;
    int to = flow->state >= CRAB_CLIENT_HELD && same(flow->dip, p.peer);
    /* or about a SYN on its way to a backend */
    if (!to && (flow->state == CRAB_CLIENT_TAKEN || flow->ack != bpf_htonl(bpf_ntohl(tcp.seq) + 1) ||
                !in_prefixes(p.peer)))
        return TC_ACT_UNSPEC;
    if (!to && asks_again(flow))
        return refuse(flow, &p, p.peer, CRAB_CLIENT_REFUSED);
    copy(vip, flow->vip);
    if (p.v6) {
        __s64 diff = bpf_csum_diff((void *)p.peer, 16, (void *)vip, 16, 0);
        if (bpf_skb_store_bytes(skb, l3 + offsetof(struct ipv6hdr, daddr), vip, 16, 0) ||
            bpf_l4_csum_replace(skb, outer->l4 + ICMP6_CKSUM, 0, (__u64)diff, 0))
            return TC_ACT_SHOT;
    } else {
        /* The quoted header's checksum makes up for its address, so ICMP's own sum stays what it was. */
        __be32 old, new;
        __builtin_memcpy(&old, p.peer + 12, 4);
        __builtin_memcpy(&new, vip + 12, 4);
        if (bpf_l3_csum_replace(skb, l3 + offsetof(struct iphdr, check), old, new, 4) ||
            bpf_skb_store_bytes(skb, l3 + offsetof(struct iphdr, daddr), &new, 4, 0))
            return TC_ACT_SHOT;
    }
    count(CRAB_CLIENT_ICMP);
    return TC_ACT_UNSPEC;
}

SEC("tc")
int crab_ingress(struct __sk_buff *skb)
{
    struct packet p = {};
    if (parse_ip(skb, &p, ETH_HLEN, (__be16)skb->protocol, 1))
        return TC_ACT_UNSPEC;
    if (p.proto == IPPROTO_TCP)
        return ingress_tcp(skb, &p);
    if (p.proto == (p.v6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP))
        return ingress_icmp(skb, &p);
    return TC_ACT_UNSPEC;
}

/* ---- crab_egress ---- */

/* A SYN goes to the VIP.  What an old connection of the same four-tuple left ends here, for this one may be nobody's that
 * we know: other cgroups use the same route. */
static __always_inline int egress_syn(struct crab_client_flow *flow, __be32 seq)
{
    __u32 state = flow->state;
    if (state == CRAB_CLIENT_FREE) {
        if (!flow->opening)
            return BPF_OK;
        wait(flow, seq); /* one that did not offer */
    } else if (state == CRAB_CLIENT_TAKEN || flow->ack != bpf_htonl(bpf_ntohl(seq) + 1)) {
        forget(flow, state);
        return BPF_OK;
    }
    flow->left = 1;
    /* If a redirect of ours has come in just now, the socket may be about to take it. */
    if (state >= CRAB_CLIENT_HELD)
        flow->again = 1;
    return BPF_OK;
}

SEC("lwt_xmit")
int crab_egress(struct __sk_buff *skb)
{
    struct packet p = {};
    if (parse_ip(skb, &p, 0, (__be16)skb->protocol, 0) || p.proto != IPPROTO_TCP || parse_tcp(skb, &p, 0))
        return BPF_OK;
    struct crab_client_flow *flow = flow_of(&p.key);
    if (!flow || !same(flow->vip, p.peer))
        return BPF_OK;
    if (p.tcp.syn && !p.tcp.ack)
        return egress_syn(flow, p.tcp.seq);
    if (flow->state != CRAB_CLIENT_TAKEN)
        return BPF_OK;
    if (translate(skb, &p, 0, flow->dip, ~flow->diff))
        return BPF_DROP;
    count(CRAB_CLIENT_PACKETS_OUT);
    return BPF_LWT_REROUTE;
}

/* ---- crab_sweep ---- */

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

struct sweep {
    __u64 now; /* what ends before goes */
};

/* Nobody but a new connection of the same ports can want the entry meanwhile, and that one sees `owner`: see claim(). */
static long sweep_one(void *map __attribute__((unused)), struct crab_client_ports *k, struct crab_client_flow *flow,
                      struct sweep *s)
{
    if (!flow->owner && (flow->state == CRAB_CLIENT_FREE || flow->ends_ns < s->now)) {
        struct crab_client_ports ports = *k;
        delete(&ports, flow, 0);
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
    const struct crab_client_settings *set = settings();
    struct sweep s = {.now = bpf_ktime_get_ns()};
    sweeper->left = 0;
    bpf_for_each_map_elem(&client_flows, sweep_one, &s, 0);
    if (set && sweeper->left > set->flows / 2) {
        s.now += LINGER_NS - LINGER_CROWDED_NS;
        sweeper->left = 0;
        bpf_for_each_map_elem(&client_flows, sweep_one, &s, 0);
    }
    used = (__s32)sweeper->left;
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
        rc = bpf_timer_start(&sweeper->timer, 0, 0);
    return (int)rc;
}

SEC("syscall")
int crab_end(struct crab_client_ended *ended)
{
    struct crab_client_ports ports = ended->ports;
    __u64 owner = ended->owner;
    struct crab_client_flow *flow = flow_of(&ports);
    if (!flow || flow->owner != owner)
        return 0;
    if (flow->state == CRAB_CLIENT_FREE) {
        delete(&ports, flow, owner);
        return 0;
    }
    flow->ends_ns = bpf_ktime_get_ns() + LINGER_SHORT_NS; /* the other clock is not for programs of this type */
    __sync_val_compare_and_swap(&flow->owner, owner, 0);
    return 0;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
