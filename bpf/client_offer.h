/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Our own connections, as sock_ops hears of them: which offer, whether a redirect was taken up, and their end.
 *
 * Other programs on the cgroup have callback flags on the same sockets.  Ours stay, where they cost little; the one that
 * costs something for each packet is set when all programs have seen the connection begin and taken back within the SYN,
 * if it was not there before. */
#ifndef CRAB_CLIENT_OFFER_H
#define CRAB_CLIENT_OFFER_H

#include "client.h"
#include "client_health.h"
#include "client_proof.h"

#define AF_INET 2
#define SOL_TCP 6
/* A TCP header's flags. */
#define SYN 0x02
#define ACK 0x10

/* TCP options that an offer may stand beside (RFC 8684 3.1 for the last). */
#define MSS 2
#define WINDOW_SCALE 3
#define SACK_PERMITTED 4
#define TIMESTAMPS 8
#define MPTCP 30
#define MP_CAPABLE 0
/* What MP_CAPABLE grows by from SYN to SYN-ACK: the server's key. */
#define MP_CAPABLE_MORE 8

/* How long a connection that the client closed is translated on: its TIME_WAIT, or an orphan's FIN_WAIT2, which still
 * answers the server's FIN (TCP_TIMEWAIT_LEN and tcp_fin_timeout, 60 s each).  One that the server closed first has
 * neither. */
#define LINGER_NS (65 * 1000000000ull)
/* All others: an aborted one's RST goes out after the socket's state has changed, and what was translated in the same batch
 * as the packet that ended it is answered by one. */
#define LINGER_SHORT_NS (1 * 1000000000ull)

/* An address of one family or the other.  All are read first: the compiler would read by a pointer into the context, which
 * is the verifier's to refuse. */
CRAB_INLINE void choose(struct bpf_sock_ops *ctx, __u32 *to, __u32 v4, __u32 w0, __u32 w1, __u32 w2, __u32 w3)
{
    int mapped = READ(ctx->family) == AF_INET;
    to[0] = mapped ? 0 : w0;
    to[1] = mapped ? 0 : w1;
    to[2] = mapped ? bpf_htonl(0xffff) : w2;
    to[3] = mapped ? v4 : w3;
}

CRAB_INLINE void remote_of(struct bpf_sock_ops *ctx, void *to)
{
    choose(ctx, to, READ(ctx->remote_ip4), READ(ctx->remote_ip6[0]), READ(ctx->remote_ip6[1]), READ(ctx->remote_ip6[2]),
           READ(ctx->remote_ip6[3]));
}

CRAB_INLINE void ports_of(struct bpf_sock_ops *ctx, struct crab_client_ports *ports)
{
    choose(ctx, (void *)ports->local, READ(ctx->local_ip4), READ(ctx->local_ip6[0]), READ(ctx->local_ip6[1]),
           READ(ctx->local_ip6[2]), READ(ctx->local_ip6[3]));
    ports->lport = bpf_htons((__u16)READ(ctx->local_port)); /* host order in the context, unlike the remote one */
    ports->rport = (__be16)(READ(ctx->remote_port) >> 16);
}

/* The socket's entry, if it has one, and its ports. */
CRAB_INLINE struct crab_client_flow *own(struct bpf_sock_ops *ctx, struct crab_client_ports *ports)
{
    ports_of(ctx, ports);
    struct crab_client_flow *flow = flow_of(ports);
    return flow && flow->owner == bpf_get_socket_cookie(ctx) ? flow : NULL;
}

/* ---- it begins ---- */

/* May this connection to a VIP offer?  If not, that is counted. */
CRAB_INLINE int may_offer(struct crab_client_vip *vip, const struct crab_client_settings *s, int alone, int full, int bound)
{
    __u32 why;
    if (!s->offering)
        return 0;
    if (full || used > (__s32)(s->flows - s->flows / 16)) /* some room for those that go straight to a backend */
        why = CRAB_CLIENT_NO_OFFER_FULL;
    else if (bound)
        why = CRAB_CLIENT_NO_OFFER_BOUND;
    else if (!alone)
        why = CRAB_CLIENT_NO_OFFER_SHARED;
    else if (held_back(&vip->health))
        why = CRAB_CLIENT_NO_OFFER_BACKOFF;
    else
        return 1;
    count(why);
    return 0;
}

/* The time until the SYN is sent again if nothing answers the offer; three times the round-trip time if that is longer, for
 * an answer that is merely on its way, or held, is no failure.  0: as the system does. */
CRAB_INLINE __u32 hasten(const struct crab_client_vip *vip, const struct crab_client_settings *s)
{
    if (!s->rto)
        return 0;
    __u64 answer = 3ull * vip->rtt_us * s->hz / 1000000 + 1;
    return answer >= s->hz ? 0 : answer > s->rto ? (__u32)answer : s->rto;
}

static __noinline int connecting(struct bpf_sock_ops *ctx)
{
    const struct crab_client_settings *s = settings();
    struct crab_client_ports ports __attribute__((aligned(4)));
    __u8 to[16] __attribute__((aligned(4)));
    int full = 0, flags = BPF_SOCK_OPS_STATE_CB_FLAG;
    struct bpf_sock *sk = ctx->sk;
    if (!s || !sk || bpf_get_netns_cookie(ctx) != s->netns_cookie)
        return 0;
    ports_of(ctx, &ports);
    remote_of(ctx, to);
    struct crab_client_vip *vip = vip_of(to, ports.rport);
    if (!vip && !in_prefixes(to))
        return 0;
    struct crab_client_flow *flow = claim(&ports, bpf_get_socket_cookie(ctx), &full);
    int bound = READ(sk->bound_dev_if) != 0, offers = vip && may_offer(vip, s, flow != NULL, full, bound);
    if (!flow)
        return 0;
    if (vip && s->offering && !bound) { /* a load balancer may redirect what does not offer as well */
        int experimental = vip->form == CRAB_FORM_EXPERIMENTAL;
        copy(flow->vip, to);
        flow->kind = experimental ? CRAB_OPT_KIND_EXPERIMENTAL : CRAB_OPT_KIND;
        flow->size = (is_mapped(to) ? 6 : 18) + (experimental ? 2 : 0);
        flow->opening = 1;
    }
    if (offers) {
        flow->rto = hasten(vip, s);
        flow->offer = CRAB_CLIENT_WANTED;
        flags |= BPF_SOCK_OPS_RTO_CB_FLAG;
    }
    bpf_sock_ops_cb_flags_set(ctx, (int)READ(ctx->bpf_sock_ops_cb_flags) | flags);
    return 0;
}

/* The kernel asks for the SYN's timeout when every program has seen the connection begin, and later again; and for those of
 * all other connections. */
static __noinline int arm(struct bpf_sock_ops *ctx)
{
    int flags = (int)READ(ctx->bpf_sock_ops_cb_flags);
    struct crab_client_ports ports __attribute__((aligned(4)));
    struct crab_client_flow *flow = flags & BPF_SOCK_OPS_RTO_CB_FLAG ? own(ctx, &ports) : NULL;
    if (!flow)
        return 0;
    if (flow->offer == CRAB_CLIENT_WANTED) {
        flow->offer = CRAB_CLIENT_ARMED;
        flow->flag = !(flags & BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG);
        if (flow->flag)
            bpf_sock_ops_cb_flags_set(ctx, flags | BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG);
    }
    if (flow->rto)
        ctx->reply = flow->rto;
    return 0;
}

/* ---- its SYN ---- */

CRAB_INLINE void disarm(struct bpf_sock_ops *ctx, struct crab_client_flow *flow, __u8 offer)
{
    flow->offer = offer;
    if (flow->flag)
        bpf_sock_ops_cb_flags_set(ctx, (int)READ(ctx->bpf_sock_ops_cb_flags) & ~BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG);
    flow->flag = 0;
}

/* Room for the offer.  Whatever else speaks against it is seen when the other options are written. */
static __noinline int reserve(struct bpf_sock_ops *ctx)
{
    struct crab_client_ports ports __attribute__((aligned(4)));
    struct crab_client_flow *flow = own(ctx, &ports);
    if (!flow || flow->offer != CRAB_CLIENT_ARMED)
        return 0;
    if (READ(ctx->total_retrans)) { /* the first one never came this far */
        disarm(ctx, flow, CRAB_CLIENT_NONE);
    } else if (READ(ctx->skb_len)) { /* Fast Open's data: two servers might get it */
        count(CRAB_CLIENT_NO_OFFER_OPTIONS);
        disarm(ctx, flow, CRAB_CLIENT_NONE);
    } else if (bpf_reserve_hdr_opt(ctx, 4, 0)) {
        count(CRAB_CLIENT_NO_OFFER_ROOM);
        disarm(ctx, flow, CRAB_CLIENT_NONE);
    }
    return 0;
}

/* The options of a SYN, from the header's end to `end`: their length if all of them may go with an offer, and that of the
 * server's answer to them; more than 40 if not. */
CRAB_INLINE __u32 length_of_options(const __u8 *tcp, const __u8 *end)
{
    __u32 at = 20, more = 0;
    for (__u32 i = 0; i < 16; i++) { /* Linux writes fewer */
        barrier_var(at); /* or the compiler leaves the next line out, which the verifier needs */
        at &= 63;
        const __u8 *o = tcp + at;
        if (o + 1 > end || o[0] == EOL)
            return at - 20 + more;
        if (o[0] == NOP) {
            at++;
            continue;
        }
        if (o + 2 > end || o[1] < 2)
            return 99;
        __u8 kind = o[0];
        if (kind == MPTCP && o + 3 <= end && o[2] >> 4 == MP_CAPABLE)
            more = MP_CAPABLE_MORE;
        else if (kind != MSS && kind != WINDOW_SCALE && kind != SACK_PERMITTED && kind != TIMESTAMPS)
            return 99;
        at += o[1];
        if (at > 60)
            return 99;
    }
    return 99;
}

static __noinline int write_offer(struct bpf_sock_ops *ctx)
{
    struct crab_client_ports ports __attribute__((aligned(4)));
    struct crab_client_flow *flow = own(ctx, &ports);
    if (!flow || flow->offer != CRAB_CLIENT_ARMED)
        return 0;
    struct tcphdr *tcp = READ(ctx->skb_data), *end = READ(ctx->skb_data_end);
    __u8 offer = CRAB_CLIENT_NONE;
    if ((void *)(tcp + 1) > (void *)end)
        goto out;
    __u32 length = length_of_options((void *)tcp, (void *)end);
    if (length > 40) {
        count(CRAB_CLIENT_NO_OFFER_OPTIONS);
        goto out;
    }
    if (length + (is_mapped(flow->vip) ? 8 : 20) > 40) {
        count(CRAB_CLIENT_NO_OFFER_ROOM);
        goto out;
    }
    __u8 option[4] = {CRAB_OPT_KIND, 2};
    __u32 n = 2;
    if (flow->kind == CRAB_OPT_KIND_EXPERIMENTAL) {
        option[0] = CRAB_OPT_KIND_EXPERIMENTAL;
        option[1] = 4;
        option[2] = CRAB_OPT_EXID >> 8;
        option[3] = CRAB_OPT_EXID & 0xff;
        n = 4;
    }
    __be32 isn = tcp->seq;
    if (bpf_store_hdr_opt(ctx, option, crab_length_within(n, sizeof option), 0)) {
        count(CRAB_CLIENT_NO_OFFER_ROOM);
        goto out;
    }
    wait(flow, isn);
    count(CRAB_CLIENT_OFFERED);
    offer = CRAB_CLIENT_OUT;
out:
    disarm(ctx, flow, offer);
    return 0;
}

/* What begins sooner is done oftener. */
CRAB_INLINE void prolong(struct bpf_sock_ops *ctx, struct crab_client_flow *flow)
{
    const struct crab_client_settings *s = settings();
    int n = 0;
    if (!s || !flow->rto || bpf_getsockopt(ctx, SOL_TCP, TCP_SYNCNT, &n, sizeof n) || n < 1 || n > 120)
        return;
    __u32 i = (__u32)n - 1;
    barrier_var(i);
    flow->syn_count = (__u8)n;
    n += s->more[i < CRAB_CLIENT_RETRIES ? i : CRAB_CLIENT_RETRIES - 1];
    bpf_setsockopt(ctx, SOL_TCP, TCP_SYNCNT, &n, sizeof n);
}

static __noinline int timed_out(struct bpf_sock_ops *ctx)
{
    struct crab_client_ports ports __attribute__((aligned(4)));
    struct crab_client_flow *flow = own(ctx, &ports);
    if (!flow)
        return 0;
    if (READ(ctx->state) == BPF_TCP_SYN_SENT) {
        if (READ(ctx->args[2])) /* it was the last one */
            return 0;
        if (!flow->retransmitted)
            prolong(ctx, flow); /* also if in the end there was no offer: its timeout was set before */
        flow->retransmitted = 1;
        if (flow->offer == CRAB_CLIENT_OUT)
            count(CRAB_CLIENT_RETRANSMITTED);
    } else if (flow->state == CRAB_CLIENT_TAKEN) {
        mute(flow, ports.rport);
    }
    return 0;
}

/* ---- what becomes of it ---- */

/* The socket's SYN is answered, or given up. */
CRAB_INLINE void answered(struct bpf_sock_ops *ctx, const struct crab_client_ports *ports, struct crab_client_flow *flow,
                          int connected)
{
    if (flow->offer == CRAB_CLIENT_ARMED)
        disarm(ctx, flow, CRAB_CLIENT_NONE);
    flow->rto = 0;
    if (flow->syn_count) {
        int n = flow->syn_count;
        bpf_setsockopt(ctx, SOL_TCP, TCP_SYNCNT, &n, sizeof n);
        flow->syn_count = 0;
    }
    if (!flow->opening)
        return;
    flow->opening = 0;
    struct crab_client_vip *vip = vip_of(flow->vip, ports->rport);
    __u64 now = bpf_ktime_get_coarse_ns();
    __u32 state = flow->state;
    int offered = flow->offer == CRAB_CLIENT_OUT;
    if (vip && offered) {
        __u32 rtt = connected ? READ(ctx->srtt_us) >> 3 : 0, less = vip->rtt_us - vip->rtt_us / 8 + rtt / 8;
        __sync_fetch_and_add(&vip->offered, 1);
        note(&vip->health.minute, CRAB_CLIENT_MINUTE_OFFERED, now);
        if (connected)
            vip->rtt_us = rtt > less ? rtt : less;
    }
    if (connected && state == CRAB_CLIENT_ACCEPTED && bpf_ntohl(flow->seq) + 1 == READ(ctx->rcv_nxt)) {
        flow->ends_ns = 0;
        flow->state = CRAB_CLIENT_TAKEN;
        if (vip) {
            __sync_fetch_and_add(&vip->taken, 1);
            note(&vip->health.minute, CRAB_CLIENT_MINUTE_TAKEN, now);
        }
        return;
    }
    /* By the fallback, which without a retransmission the load balancer chose.  Or not at all, because the application did
     * not wait for it; if it did, the VIP is dead, which says nothing against redirects. */
    int early = !connected && !flow->retransmitted &&
                now >= flow->ends_ns + ANSWER_NS + (vip ? 2000ull * vip->rtt_us : 0);
    if (offered && !flow->failed && ((connected && flow->retransmitted) || early)) {
        if (state <= CRAB_CLIENT_WAITING)
            failed(flow->vip, ports->rport, NULL, CRAB_CLIENT_LOST);
        else if (state == CRAB_CLIENT_ACCEPTED)
            failed(flow->vip, ports->rport, flow->dip, CRAB_CLIENT_NOT_TAKEN);
        else if (unanswered(ports))
            failed(flow->vip, ports->rport, flow->dip, CRAB_CLIENT_SILENT);
    }
    flow->state = CRAB_CLIENT_FREE;
}

static __noinline int changed(struct bpf_sock_ops *ctx)
{
    __u32 before = READ(ctx->args[0]), now = READ(ctx->args[1]);
    struct crab_client_ports ports __attribute__((aligned(4)));
    if (before != BPF_TCP_SYN_SENT && now != BPF_TCP_CLOSE)
        return 0;
    struct crab_client_flow *flow = own(ctx, &ports);
    if (!flow)
        return 0;
    if (before == BPF_TCP_SYN_SENT)
        answered(ctx, &ports, flow, now != BPF_TCP_CLOSE);
    if (now != BPF_TCP_CLOSE)
        return 0;
    if (flow->state == CRAB_CLIENT_FREE) {
        delete(&ports, flow, flow->owner);
    } else {
        flow->ends_ns = bpf_ktime_get_coarse_ns() + (before == BPF_TCP_FIN_WAIT1 || before == BPF_TCP_FIN_WAIT2 ||
                                                     before == BPF_TCP_CLOSING ? LINGER_NS : LINGER_SHORT_NS);
        flow->owner = 0;
    }
    return 0;
}

SEC("sockops")
int crab_offer(struct bpf_sock_ops *ctx)
{
    switch (READ(ctx->op)) {
    case BPF_SOCK_OPS_TCP_CONNECT_CB:
        connecting(ctx);
        break;
    case BPF_SOCK_OPS_TIMEOUT_INIT:
        arm(ctx);
        break;
    case BPF_SOCK_OPS_HDR_OPT_LEN_CB:
        if ((READ(ctx->skb_tcp_flags) & (SYN | ACK)) == SYN)
            reserve(ctx);
        break;
    case BPF_SOCK_OPS_WRITE_HDR_OPT_CB:
        if ((READ(ctx->skb_tcp_flags) & (SYN | ACK)) == SYN)
            write_offer(ctx);
        break;
    case BPF_SOCK_OPS_STATE_CB:
        changed(ctx);
        break;
    case BPF_SOCK_OPS_RTO_CB:
        timed_out(ctx);
        break;
    }
    return 1;
}

#endif
