// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* The client endpoint: offer redirection, take up a redirect if it is really ours, and translate between the VIP that
 * the application knows and the DIP that is on the wire.
 *
 * Four programs share the maps below:
 *   crab_offer    sock_ops, on the clients' cgroup: the offer in the first SYN, whether it was taken up, and the end of
 *                 connections
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
 * goes wrong costs one retransmission and the connection takes the fallback.
 *
 * A redirect is accepted in three steps, each by who can know: egress has seen the SYN leave by its route (so it will see
 * the rest), ingress has checked the SYN-ACK, and the socket has taken that very SYN-ACK.  Only then packets are translated,
 * and never a SYN.
 *
 * Other programs on the cgroup have callback flags on the same sockets.  Ours stay, where they cost little; the one that
 * costs something for each packet is set when all programs have seen the connection begin and taken back within the SYN,
 * if it was not there before. */
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
#define SOL_TCP 6
/* A TCP header's flags. */
#define SYN 0x02
#define ACK 0x10

/* TCP options (IANA, "TCP Parameters"; RFC 8684 3.1). */
#define EOL 0
#define NOP 1
#define MSS 2
#define WINDOW_SCALE 3
#define SACK_PERMITTED 4
#define TIMESTAMPS 8
#define MPTCP 30
#define MP_CAPABLE 0
/* What MP_CAPABLE grows by from SYN to SYN-ACK: the server's key. */
#define MP_CAPABLE_MORE 8

/* linux/icmp.h does not compile for this target. */
#define ICMP_DEST_UNREACH 3
#define ICMP_TIME_EXCEEDED 11
#define ICMP_PARAMETERPROB 12
#define ICMP6_CKSUM 2

/* How long a connection that the client closed is translated on: its TIME_WAIT, or an orphan's FIN_WAIT2, which still
 * answers the server's FIN (TCP_TIMEWAIT_LEN and tcp_fin_timeout, 60 s each).  One that the server closed first has
 * neither. */
#define LINGER_NS (65 * 1000000000ull)
/* The same when the table is half full.  What a server then still sends of a closed connection is answered by a RST, which
 * ends it there too; that is better than no room for new ones. */
#define LINGER_CROWDED_NS (10 * 1000000000ull)
/* All others: an aborted one's RST goes out after the socket's state has changed, and what was translated in the same batch
 * as the packet that ended it is answered by one. */
#define LINGER_SHORT_NS (1 * 1000000000ull)
/* An accepted redirect waits for its socket.  The socket's end is heard of, unless this program was taken away. */
#define WAIT_NS (150 * 1000000000ull)
#define SWEEP_NS (5 * 1000000000ull)
/* While offers come to nothing, one connection tries.  If its outcome is never known (it took the fallback), another one
 * does after this time. */
#define TRIAL_NS (10 * 1000000000ull)
#define CLOCK_MONOTONIC 1

/* clang 14 merges neighbouring reads of a context into one that the verifier refuses. */
#define READ(x) (*(volatile typeof(x) *)&(x))

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, struct crab_client_settings);
} client_settings SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 4096);
    __type(key, struct crab_vip);
    __type(value, struct crab_client_vip);
} client_vips SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 65536);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, struct crab_client_path);
    __type(value, struct crab_client_health);
} client_paths SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_LPM_TRIE);
    __uint(max_entries, 4096);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, struct crab_lpm);
    __type(value, __u32);
} client_backends SEC(".maps");

#define FLOW_MAP(key_type, value_type) \
    struct { \
        __uint(type, BPF_MAP_TYPE_HASH); \
        __uint(max_entries, CRAB_CLIENT_FLOWS); \
        __uint(map_flags, BPF_F_NO_PREALLOC); \
        __type(key, key_type); \
        __type(value, value_type); \
    }

FLOW_MAP(struct crab_pending_key, struct crab_pending) client_pending SEC(".maps");
FLOW_MAP(struct crab_flow_key, struct crab_client_out) client_out SEC(".maps");
FLOW_MAP(struct crab_flow_key, struct crab_client_in) client_in SEC(".maps");
FLOW_MAP(struct crab_port_key, __u32) client_ports SEC(".maps");

/* What a connection of ours is about, kept in its socket from connect() to its end. */
struct conn {
    struct crab_flow_key key;
    __be32 ack; /* that the answer to its offer carries */
    __u32 rto;  /* jiffies until its SYN is sent again; 0: the system's */
    __u32 form;
    __u8 offer;     /* NONE, ... */
    __u8 syn_count; /* TCP_SYNCNT as it was; 0: it still is */
    __u8 flag : 1;  /* BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG is ours */
    __u8 retransmitted : 1;
    __u8 counted : 1; /* in client_ports */
};

/* An offer's life. */
#define NONE 0
#define WANTED 1
#define ARMED 2 /* the next SYN's options are asked for */
#define OUT 3

struct {
    __uint(type, BPF_MAP_TYPE_SK_STORAGE);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, int);
    __type(value, struct conn);
} client_conns SEC(".maps");

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

/* Entries of client_out.  What parallel changes make wrong in it the next sweep puts right. */
static __s32 used;

static __always_inline const struct crab_client_settings *settings(void)
{
    __u32 zero = 0;
    return bpf_map_lookup_elem(&client_settings, &zero);
}

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

static __always_inline struct crab_client_vip *vip_of(const __u8 addr[16], __be16 port)
{
    struct crab_vip key = {.port = port, .proto = IPPROTO_TCP};
    __builtin_memcpy(key.addr, addr, 16);
    return bpf_map_lookup_elem(&client_vips, &key);
}

static __always_inline struct crab_port_key ports_of(const struct crab_flow_key *k)
{
    struct crab_port_key p = {.lport = k->lport, .rport = k->rport};
    __builtin_memcpy(p.local, k->local, 16);
    return p;
}

static __always_inline struct crab_pending_key pending_of(const struct crab_flow_key *k, __be32 ack)
{
    struct crab_pending_key p = {.lport = k->lport, .rport = k->rport, .ack = ack};
    __builtin_memcpy(p.local, k->local, 16);
    return p;
}

/* Both directions go; inward only if it is not by now that of another VIP's connection, from the same port to the same
 * backend. */
static __always_inline void forget(const struct crab_flow_key *k, const struct crab_client_out *out)
{
    struct crab_flow_key key = *k;
    __builtin_memcpy(key.remote, out->dip, 16);
    struct crab_client_in *in = bpf_map_lookup_elem(&client_in, &key);
    if (in && same(in->vip, k->remote))
        bpf_map_delete_elem(&client_in, &key);
    if (!bpf_map_delete_elem(&client_out, k))
        __sync_fetch_and_add(&used, -1);
}

/* One connection less has these ports. */
static __always_inline void give_back(const struct crab_port_key *p)
{
    __u32 *n = bpf_map_lookup_elem(&client_ports, p);
    if (n && __sync_fetch_and_add(n, -1) == 1)
        bpf_map_delete_elem(&client_ports, p);
}

/* ---- how redirects fare ---- */

static __always_inline struct crab_client_health *path_of(const __u8 vip[16], __be16 port, const __u8 dip[16])
{
    struct crab_client_path key = {.port = port, .proto = IPPROTO_TCP};
    __builtin_memcpy(key.vip, vip, 16);
    __builtin_memcpy(key.dip, dip, 16);
    struct crab_client_health *found = bpf_map_lookup_elem(&client_paths, &key);
    if (found)
        return found;
    struct crab_client_health new = {};
    bpf_map_update_elem(&client_paths, &key, &new, BPF_NOEXIST);
    return bpf_map_lookup_elem(&client_paths, &key);
}

/* Another failure.  Returns until when there shall be no offers, 0 if this says nothing new: what fails while there are
 * none had offered before. */
static __always_inline __u64 fails(struct crab_client_health *h, __u32 reason)
{
    const struct crab_client_settings *s = settings();
    __u64 now = bpf_ktime_get_ns(), until = h->until_ns;
    __sync_fetch_and_add(&h->failed, 1);
    if (!s || now < until)
        return 0;
    __u32 before = h->failures;
    __u64 pause = s->backoff_ns << (before < 16 ? before : 16);
    if (pause > s->backoff_max_ns)
        pause = s->backoff_max_ns;
    if (__sync_val_compare_and_swap(&h->until_ns, until, now + pause) != until)
        return 0;
    if (!before)
        h->since_ns = now;
    h->failures = before + 1;
    h->reason = reason;
    return now + pause;
}

static __always_inline void recovers(struct crab_client_health *h)
{
    h->until_ns = h->since_ns = 0;
    h->failures = h->reason = 0;
}

/* An offer to a VIP came to nothing.  A client cannot choose its backend: what one backend does wrong holds back all
 * offers to the VIP, but how long depends on that backend alone. */
static __noinline int failed(const struct crab_flow_key *to, const __u8 *dip, __u32 reason)
{
    struct crab_client_vip *vip = vip_of(to->remote, to->rport);
    if (!vip)
        return 0;
    count(CRAB_CLIENT_FAILED);
    if (!dip) {
        if (fails(&vip->health, reason))
            __builtin_memset(vip->blamed, 0, 16);
        return 0;
    }
    __sync_fetch_and_add(&vip->health.failed, 1);
    struct crab_client_health *path = path_of(to->remote, to->rport, dip);
    __u64 until = path ? fails(path, reason) : 0;
    if (until > vip->health.until_ns) {
        if (!vip->health.until_ns)
            vip->health.since_ns = path->since_ns;
        vip->health.reason = reason;
        __builtin_memcpy(vip->blamed, dip, 16);
        vip->health.until_ns = until;
    }
    return 0;
}

/* A backend has spoken after its redirect.  It makes up for what others did wrong only when their time is over. */
static __noinline int completed(const struct crab_flow_key *to, const __u8 *dip)
{
    count(CRAB_CLIENT_COMPLETED);
    struct crab_client_vip *vip = vip_of(to->remote, to->rport);
    if (!vip)
        return 0;
    struct crab_client_health *path = path_of(to->remote, to->rport, dip);
    if (path) {
        __sync_fetch_and_add(&path->completed, 1);
        if (path->failures)
            recovers(path);
    }
    __sync_fetch_and_add(&vip->health.completed, 1);
    __u64 until = vip->health.until_ns;
    if (until) {
        const __u64 *blamed = (const void *)vip->blamed;
        if ((!blamed[0] && !blamed[1]) || same(vip->blamed, dip) || bpf_ktime_get_ns() >= until)
            recovers(&vip->health);
    }
    return 0;
}

/* Do failures forbid an offer?  When their time is over one connection at a time tries. */
static __always_inline int held_back(struct crab_client_health *h)
{
    if (!h->until_ns)
        return 0;
    __u64 now = bpf_ktime_get_ns(), trial = h->trial_ns;
    if (now < h->until_ns || now < trial)
        return 1;
    return __sync_val_compare_and_swap(&h->trial_ns, trial, now + TRIAL_NS) != trial;
}

/* ---- crab_offer: our own connections ---- */

static __always_inline struct conn *conn_of(struct bpf_sock_ops *ctx)
{
    struct bpf_sock *sk = ctx->sk;
    return sk ? bpf_sk_storage_get(&client_conns, sk, NULL, 0) : NULL;
}

/* May this connection to a VIP offer?  If not, that is counted. */
static __always_inline int may_offer(struct crab_client_vip *vip, const struct crab_client_settings *s, int shared,
                                     int full)
{
    __u32 why;
    if (!s->offering)
        return 0;
    if (shared)
        why = CRAB_CLIENT_NO_OFFER_SHARED;
    else if (full || used >= (__s32)(s->flows - s->flows / 16)) /* those whose answers are under way need a place too */
        why = CRAB_CLIENT_NO_OFFER_FULL;
    else if (held_back(&vip->health))
        why = CRAB_CLIENT_NO_OFFER_BACKOFF;
    else
        return 1;
    count(why);
    return 0;
}

/* The time until the SYN is sent again if nothing answers the offer; twice the round-trip time if that is longer, for an
 * answer that is merely on its way is no failure.  0: as the system does. */
static __always_inline __u32 hasten(const struct crab_client_vip *vip, const struct crab_client_settings *s)
{
    if (!s->rto)
        return 0;
    __u64 answer = 2ull * vip->rtt_us * s->hz / 1000000 + 1;
    return answer >= s->hz ? 0 : answer > s->rto ? (__u32)answer : s->rto;
}

static __noinline int connecting(struct bpf_sock_ops *ctx)
{
    const struct crab_client_settings *s = settings();
    struct bpf_sock *sk = ctx->sk;
    struct crab_flow_key k __attribute__((aligned(8))) = {}; /* written by words */
    if (!s || !sk || bpf_get_netns_cookie(ctx) != s->netns_cookie)
        return 0;
    addresses(ctx, &k);
    struct crab_client_vip *vip = vip_of(k.remote, k.rport);
    if (!vip && !in_prefixes(k.remote))
        return 0;
    struct conn *conn = bpf_sk_storage_get(&client_conns, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
    if (!conn)
        return 0;
    *conn = (struct conn){.key = k};
    struct crab_port_key p = ports_of(&k);
    __u32 one = 1;
    int shared = 0, full = 0;
    if (bpf_map_update_elem(&client_ports, &p, &one, BPF_NOEXIST)) {
        __u32 *n = bpf_map_lookup_elem(&client_ports, &p);
        shared = n != NULL;
        full = !shared; /* who else has these cannot be known */
        if (n)
            __sync_fetch_and_add(n, 1);
    }
    conn->counted = !full;
    int flags = BPF_SOCK_OPS_STATE_CB_FLAG;
    if (vip) { /* what an old connection of the same four-tuple left, its SYN ends: see egress_syn */
        if (may_offer(vip, s, shared, full)) {
            conn->offer = WANTED;
            conn->form = vip->form;
            conn->rto = hasten(vip, s);
            flags |= BPF_SOCK_OPS_RTO_CB_FLAG;
        }
    } else if (!shared && !full) {
        /* Straight to a backend: what a closed connection left would translate this one's packets. */
        struct crab_client_in *in = bpf_map_lookup_elem(&client_in, &k);
        if (in) {
            __builtin_memcpy(k.remote, in->vip, 16);
            struct crab_client_out *old = bpf_map_lookup_elem(&client_out, &k);
            if (old)
                forget(&k, old);
        }
    }
    bpf_sock_ops_cb_flags_set(ctx, READ(ctx->bpf_sock_ops_cb_flags) | flags);
    return 0;
}

/* The kernel asks for the SYN's timeout when every program has seen the connection begin, and later again. */
static __noinline int arm(struct bpf_sock_ops *ctx)
{
    struct conn *conn = conn_of(ctx);
    if (!conn)
        return 0;
    if (conn->offer == WANTED) {
        int flags = (int)READ(ctx->bpf_sock_ops_cb_flags);
        conn->offer = ARMED;
        conn->flag = !(flags & BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG);
        if (conn->flag)
            bpf_sock_ops_cb_flags_set(ctx, flags | BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG);
    }
    if (conn->rto)
        ctx->reply = conn->rto;
    return 0;
}

static __always_inline void disarm(struct bpf_sock_ops *ctx, struct conn *conn, __u8 offer)
{
    conn->offer = offer;
    if (conn->flag)
        bpf_sock_ops_cb_flags_set(ctx, (int)READ(ctx->bpf_sock_ops_cb_flags) & ~BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG);
    conn->flag = 0;
}

/* Room for the offer.  Whatever else speaks against it is seen when the other options are written. */
static __noinline int reserve(struct bpf_sock_ops *ctx)
{
    struct conn *conn = conn_of(ctx);
    if (!conn || conn->offer != ARMED)
        return 0;
    if (READ(ctx->total_retrans)) { /* the first one never came this far */
        disarm(ctx, conn, NONE);
    } else if (READ(ctx->skb_len)) { /* Fast Open's data: two servers might get it */
        count(CRAB_CLIENT_NO_OFFER_OPTIONS);
        disarm(ctx, conn, NONE);
    } else if (bpf_reserve_hdr_opt(ctx, 4, 0)) {
        count(CRAB_CLIENT_NO_OFFER_ROOM);
        disarm(ctx, conn, NONE);
    }
    return 0;
}

/* The options of a SYN, from the header's end to `end`: their length if all of them may go with an offer, and that of the
 * server's answer to them; more than 40 if not. */
static __always_inline __u32 length_of_options(const __u8 *tcp, const __u8 *end)
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
    struct conn *conn = conn_of(ctx);
    if (!conn || conn->offer != ARMED)
        return 0;
    struct tcphdr *tcp = READ(ctx->skb_data), *end = READ(ctx->skb_data_end);
    __u8 offer = NONE;
    if ((void *)(tcp + 1) > (void *)end)
        goto out;
    __u32 length = length_of_options((void *)tcp, (void *)end);
    if (length > 40) {
        count(CRAB_CLIENT_NO_OFFER_OPTIONS);
        goto out;
    }
    int v4 = is_mapped(conn->key.remote);
    if (length + (v4 ? 8 : 20) > 40) {
        count(CRAB_CLIENT_NO_OFFER_ROOM);
        goto out;
    }
    __u8 option[4] = {CRAB_OPT_KIND, 2};
    __u32 n = 2;
    if (conn->form == CRAB_FORM_EXPERIMENTAL) {
        option[0] = CRAB_OPT_KIND_EXPERIMENTAL;
        option[1] = 4;
        option[2] = CRAB_OPT_EXID >> 8;
        option[3] = CRAB_OPT_EXID & 0xff;
        n = 4;
    }
    struct crab_pending pending = {.kind = option[0], .size = (__u8)(n + (v4 ? 4 : 16))};
    __builtin_memcpy(pending.vip, conn->key.remote, 16);
    conn->ack = bpf_htonl(bpf_ntohl(tcp->seq) + 1);
    struct crab_pending_key key = pending_of(&conn->key, conn->ack);
    if (bpf_map_update_elem(&client_pending, &key, &pending, BPF_ANY)) {
        count(CRAB_CLIENT_NO_OFFER_FULL);
        goto out;
    }
    if (bpf_store_hdr_opt(ctx, option, crab_length_within(n, sizeof option), 0)) {
        bpf_map_delete_elem(&client_pending, &key);
        count(CRAB_CLIENT_NO_OFFER_ROOM);
        goto out;
    }
    count(CRAB_CLIENT_OFFERED);
    offer = OUT;
out:
    disarm(ctx, conn, offer);
    return 0;
}

/* The socket's SYN is answered, or given up. */
static __always_inline void answered(struct bpf_sock_ops *ctx, struct conn *conn, int connected)
{
    if (conn->offer == ARMED)
        disarm(ctx, conn, NONE);
    conn->rto = 0;
    if (conn->syn_count) {
        int n = conn->syn_count;
        bpf_setsockopt(ctx, SOL_TCP, TCP_SYNCNT, &n, sizeof n);
        conn->syn_count = 0;
    }
    if (conn->offer != OUT)
        return;
    struct crab_pending_key key = pending_of(&conn->key, conn->ack);
    int known = 0;
    if (conn->retransmitted) {
        struct crab_pending *pending = bpf_map_lookup_elem(&client_pending, &key);
        known = pending && pending->failed;
    }
    bpf_map_delete_elem(&client_pending, &key);
    struct crab_client_out *out = bpf_map_lookup_elem(&client_out, &conn->key);
    struct crab_client_vip *vip = vip_of(conn->key.remote, conn->key.rport);
    if (vip)
        __sync_fetch_and_add(&vip->offered, 1);
    if (connected) {
        __u32 rtt = READ(ctx->srtt_us) >> 3;
        if (vip) {
            __u32 less = vip->rtt_us - vip->rtt_us / 8 + rtt / 8;
            vip->rtt_us = rtt > less ? rtt : less;
        }
        if (out && bpf_ntohl(out->seq) + 1 == READ(ctx->rcv_nxt)) {
            out->ends_ns = 0;
            out->taken = 1;
            if (vip)
                __sync_fetch_and_add(&vip->taken, 1);
            return;
        }
        /* by the fallback; without a retransmission the load balancer chose that */
        if (conn->retransmitted && !known)
            failed(&conn->key, out ? out->dip : NULL, out ? CRAB_CLIENT_NOT_TAKEN : CRAB_CLIENT_LOST);
    }
    if (out)
        forget(&conn->key, out);
}

static __always_inline void closed(struct conn *conn, __u32 state)
{
    if (conn->offer == OUT) {
        struct crab_client_out *out = bpf_map_lookup_elem(&client_out, &conn->key);
        if (out)
            out->ends_ns = bpf_ktime_get_ns() + (state == BPF_TCP_FIN_WAIT1 || state == BPF_TCP_FIN_WAIT2 ||
                                                 state == BPF_TCP_CLOSING ? LINGER_NS : LINGER_SHORT_NS);
    }
    struct crab_port_key p = ports_of(&conn->key);
    if (conn->counted)
        give_back(&p);
    conn->offer = NONE;
    conn->counted = 0; /* the rest goes with the socket */
}

static __noinline int changed(struct bpf_sock_ops *ctx)
{
    __u32 before = READ(ctx->args[0]), now = READ(ctx->args[1]);
    if (before != BPF_TCP_SYN_SENT && now != BPF_TCP_CLOSE)
        return 0;
    struct conn *conn = conn_of(ctx);
    if (!conn)
        return 0;
    if (before == BPF_TCP_SYN_SENT)
        answered(ctx, conn, now != BPF_TCP_CLOSE);
    if (now == BPF_TCP_CLOSE)
        closed(conn, before);
    return 0;
}

/* Nothing has come from the backend since its SYN-ACK, and something should have. */
static __always_inline void mute(struct crab_client_in *in, const struct crab_flow_key *to, const __u8 *dip)
{
    if (in->state != CRAB_CLIENT_NEW)
        return;
    in->state = CRAB_CLIENT_MUTE;
    failed(to, dip, CRAB_CLIENT_SILENT);
}

/* What begins sooner is done oftener. */
static __always_inline void prolong(struct bpf_sock_ops *ctx, struct conn *conn)
{
    const struct crab_client_settings *s = settings();
    int n = 0;
    if (!s || !conn->rto || bpf_getsockopt(ctx, SOL_TCP, TCP_SYNCNT, &n, sizeof n) || n < 1 || n > 120)
        return;
    __u32 i = (__u32)n - 1;
    barrier_var(i);
    conn->syn_count = (__u8)n;
    n += s->more[i < CRAB_CLIENT_RETRIES ? i : CRAB_CLIENT_RETRIES - 1];
    bpf_setsockopt(ctx, SOL_TCP, TCP_SYNCNT, &n, sizeof n);
}

static __noinline int timed_out(struct bpf_sock_ops *ctx)
{
    struct conn *conn = conn_of(ctx);
    if (!conn)
        return 0;
    if (READ(ctx->state) == BPF_TCP_SYN_SENT) {
        if (READ(ctx->args[2])) /* it was the last one */
            return 0;
        if (!conn->retransmitted)
            prolong(ctx, conn); /* also if in the end there was no offer: its timeout was set before */
        conn->retransmitted = 1;
        if (conn->offer == OUT)
            count(CRAB_CLIENT_RETRANSMITTED);
        return 0;
    }
    if (conn->offer != OUT)
        return 0;
    struct crab_client_out *out = bpf_map_lookup_elem(&client_out, &conn->key);
    if (!out)
        return 0;
    struct crab_flow_key inward = conn->key;
    __builtin_memcpy(inward.remote, out->dip, 16);
    struct crab_client_in *in = bpf_map_lookup_elem(&client_in, &inward);
    if (in && same(in->vip, conn->key.remote))
        mute(in, &conn->key, inward.remote);
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

/* Is the first redirect of this form in an option list of len bytes the one to this VIP?
 *
 * The list is an array that no option can reach over, so the verifier need not know where each begins; and without
 * branches by form or family it follows the loop only once. */
static __noinline int redirects_to(struct __sk_buff *skb, __u32 options, __u32 len, const struct crab_pending *to)
{
    __u8 before[16 + 40 + 64] = {}, *list = before + 16;
    __u32 at = 0, differ = 0;

    if (len < 1 || len > 40 || bpf_skb_load_bytes(skb, options, list, crab_length_within(len, 40)))
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

/* Is there a local connection that has this four-tuple already? */
static __noinline int collides(struct __sk_buff *skb, const struct packet *p)
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
static __noinline int answer_by_reset(struct __sk_buff *skb, const struct packet *p, const struct tcphdr *tcp)
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

/* Make the connection's two entries, for the socket to take.  0, or -1 if there is no room. */
static __noinline int install(const struct packet *p, const struct crab_flow_key *out_key, __be32 seq)
{
    struct crab_client_out out = {.ends_ns = bpf_ktime_get_ns() + WAIT_NS, .seq = seq};
    struct crab_client_in in = {};
    __builtin_memcpy(out.dip, p->key.remote, 16);
    __builtin_memcpy(in.vip, out_key->remote, 16);
    if (bpf_map_update_elem(&client_out, out_key, &out, BPF_ANY))
        return -1;
    if (bpf_map_update_elem(&client_in, &p->key, &in, BPF_ANY)) {
        bpf_map_delete_elem(&client_out, out_key);
        return -1;
    }
    __sync_fetch_and_add(&used, 1);
    return 0;
}

#define GO_ON (-2)

/* A SYN-ACK or a RST whose acknowledgement number says that a SYN of ours is answered. */
static __noinline int answer(struct __sk_buff *skb, struct packet *p, const struct tcphdr *tcp,
                           struct crab_pending *pending)
{
    struct crab_flow_key to = p->key; /* as the socket sees it */
    __builtin_memcpy(to.remote, pending->vip, 16);
    struct crab_client_out *out = bpf_map_lookup_elem(&client_out, &to);
    if (same(pending->vip, p->key.remote)) { /* by the fallback: from the VIP itself */
        if (!out || out->again || out->taken || tcp->rst)
            return TC_ACT_UNSPEC; /* whichever the socket takes */
        count(CRAB_CLIENT_RESET_LATE);
        return answer_by_reset(skb, p, tcp);
    }
    if (!in_prefixes(p->key.remote)) {
        count(CRAB_CLIENT_DROP_SOURCE);
        failed(&to, p->key.remote, CRAB_CLIENT_SOURCE);
        pending->failed = 1;
        return TC_ACT_SHOT;
    }
    if (tcp->rst) {
        /* A closed port: its RST carries no option; the acknowledgement number proves it. */
        if (replace_address(skb, p, 1, p->key.remote, to.remote))
            return TC_ACT_SHOT;
        count(CRAB_CLIENT_REFUSED_PORT);
        return TC_ACT_UNSPEC;
    }
    if (tcp->doff < 5 || !redirects_to(skb, p->l4 + 20, (__u32)tcp->doff * 4 - 20, pending)) {
        count(CRAB_CLIENT_DROP_VIP);
        failed(&to, p->key.remote, CRAB_CLIENT_NO_ECHO);
        pending->failed = 1;
        return TC_ACT_SHOT;
    }
    if (!pending->left) {
        count(CRAB_CLIENT_RESET_ROUTE);
        failed(&to, NULL, CRAB_CLIENT_ROUTE);
        pending->failed = 1;
        return answer_by_reset(skb, p, tcp);
    }
    if (out && same(out->dip, p->key.remote) && out->seq == tcp->seq)
        return GO_ON; /* the same one again */
    if (out && !out->again) {
        count(CRAB_CLIENT_RESET_LATE);
        return answer_by_reset(skb, p, tcp);
    }
    if (out)
        forget(&to, out);
    if (collides(skb, p)) {
        count(CRAB_CLIENT_RESET_COLLISION);
        return answer_by_reset(skb, p, tcp);
    }
    if (install(p, &to, tcp->seq)) {
        count(CRAB_CLIENT_RESET_FULL);
        return answer_by_reset(skb, p, tcp);
    }
    count(CRAB_CLIENT_REDIRECTED);
    return GO_ON;
}

static __always_inline int ingress_tcp(struct __sk_buff *skb, struct packet *p)
{
    struct tcphdr tcp;
    if (bpf_skb_load_bytes(skb, p->l4, &tcp, sizeof tcp))
        return TC_ACT_UNSPEC;
    p->key.lport = tcp.dest;
    p->key.rport = tcp.source;

    /* A new connection's answer comes before a flow that an old one of the same four-tuple left. */
    int again = 0;
    if ((tcp.syn || tcp.rst) && tcp.ack) {
        struct crab_pending_key key = pending_of(&p->key, tcp.ack_seq);
        struct crab_pending *found = bpf_map_lookup_elem(&client_pending, &key);
        if (found) {
            struct crab_pending pending = *found;
            int verdict = answer(skb, p, &tcp, &pending);
            if (pending.failed)
                found->failed = 1;
            if (verdict != GO_ON)
                return verdict;
        } else if (tcp.syn) {
            /* The fallback's answer to a retransmission, after the redirect's. */
            struct crab_client_out *out = bpf_map_lookup_elem(&client_out, &p->key);
            if (out && out->taken && !out->ends_ns) {
                count(CRAB_CLIENT_RESET_LATE);
                return answer_by_reset(skb, p, &tcp);
            }
            again = 1;
        }
    }
    struct crab_client_in *in = bpf_map_lookup_elem(&client_in, &p->key);
    if (!in)
        return TC_ACT_UNSPEC;
    struct crab_flow_key to = p->key;
    __builtin_memcpy(to.remote, in->vip, 16);
    if (again) {
        mute(in, &to, p->key.remote); /* our ACK did not get there */
    } else if (in->state != CRAB_CLIENT_SPOKE && !tcp.syn && !tcp.rst) {
        in->state = CRAB_CLIENT_SPOKE;
        completed(&to, p->key.remote);
    }
    if (replace_address(skb, p, 1, p->key.remote, to.remote))
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
    struct crab_client_in *in = bpf_map_lookup_elem(&client_in, &p.key);
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

/* A SYN goes to the VIP.  What an old connection of the same four-tuple left ends here, for this one may be nobody's that
 * we know: other cgroups use the same route. */
static __always_inline int egress_syn(const struct crab_flow_key *k, __be32 seq)
{
    struct crab_pending_key key = pending_of(k, bpf_htonl(bpf_ntohl(seq) + 1));
    struct crab_pending *pending = bpf_map_lookup_elem(&client_pending, &key);
    int ours = pending && same(pending->vip, k->remote);
    if (ours)
        pending->left = 1;
    struct crab_client_out *out = bpf_map_lookup_elem(&client_out, k);
    /* If a redirect of ours has come in just now, the socket may be about to take it. */
    if (out && ours && !out->taken)
        out->again = 1;
    else if (out)
        forget(k, out);
    return BPF_OK;
}

SEC("lwt_xmit")
int crab_egress(struct __sk_buff *skb)
{
    struct packet p = {};
    struct tcphdr tcp;
    if (parse_ip(skb, &p, (__be16)skb->protocol, 0) || p.proto != IPPROTO_TCP)
        return BPF_OK;
    if (bpf_skb_load_bytes(skb, p.l4, &tcp, sizeof tcp))
        return BPF_OK;
    p.key.lport = tcp.source;
    p.key.rport = tcp.dest;
    if (tcp.syn && !tcp.ack)
        return egress_syn(&p.key, tcp.seq);
    struct crab_client_out *out = bpf_map_lookup_elem(&client_out, &p.key);
    if (!out || !out->taken)
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
    __u64 now; /* what ends before goes */
};

static __always_inline int is_over(const struct crab_client_out *out, const struct sweep *s)
{
    return out->ends_ns && out->ends_ns < s->now;
}

/* Its element may be another flow's at any moment: another CPU forgets this one, and what it makes next has the memory.
 * And what is deleted by key may have been renewed by then.  So the sweep takes the ports as a connection does: as long
 * as it has them no other one gets a redirect; if somebody has them already, he forgets the flow or it waits. */
static long sweep_one(void *map __attribute__((unused)), struct crab_flow_key *k,
                      struct crab_client_out *out, struct sweep *s)
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
    const struct crab_client_settings *set = settings();
    struct sweep s = {.now = bpf_ktime_get_ns()};
    sweeper->left = 0;
    bpf_for_each_map_elem(&client_out, sweep_one, &s, 0);
    if (set && sweeper->left > set->flows / 2) {
        s.now += LINGER_NS - LINGER_CROWDED_NS;
        sweeper->left = 0;
        bpf_for_each_map_elem(&client_out, sweep_one, &s, 0);
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

char LICENSE[] SEC("license") = "Dual MIT/GPL";
