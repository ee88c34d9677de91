// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* The server endpoint: echo the redirect option of a SYN in its SYN-ACK, and in nothing else.
 *
 * A sock_ops program on the servers' cgroup.  Listeners are asked to let it write header options; their children are
 * asked to stop as soon as they are established.  TCP_SAVE_SYN is set beside, because only then can the option be found
 * again when the SYN-ACK is retransmitted.  Listeners that are older than the program get no callback; listeners.bpf.c
 * finds them.
 *
 * A socket has one set of callback flags for all sock_ops programs: what others asked for stays. */
#include <linux/bpf.h>
#include <linux/tcp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "address.h"
#include "length.h"
#include "server.h"
#include "syn.h"

#define SYN 0x02
#define ACK 0x10
#define ENOENT 2

/* clang 14 merges neighbouring reads of a context into one that the verifier refuses. */
#define READ(x) (*(volatile typeof(x) *)&(x))

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 4096);
    __type(key, struct crab_vip);
    __type(value, __u32);
} server_vips SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 4096);
    __type(key, struct crab_vip);
    __type(value, struct crab_connections);
} server_connections SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 4096);
    __type(key, struct crab_vip);
    __type(value, struct crab_redirects);
} server_redirects SEC(".maps");

/* Open connections that are counted, by their sockets' cookies, and the VIP that each is counted for.  (Storage in the
 * sockets takes four times as long to make and to free.) */
struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 524288);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, __u64);
    __type(value, struct crab_vip);
} server_open SEC(".maps");

/* The redirect that the SYN-ACK under way echoes: its options are written on the CPU on which room was made for them.  And
 * the SYN's header, which is not on the stack because Linux 6.1 takes a varying offset into a function's stack for one into
 * its caller's. */
struct answer {
    __u64 cookie; /* of the connection's request */
    struct crab_vip vip;
    __u32 length;
    __u8 option[CRAB_REDIRECT];
    __u8 tcp[CRAB_SYN_ROOM];
};

struct {
    __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, struct answer);
} server_answer SEC(".maps");

/* SO_NETNS_COOKIE of the network namespace whose connections are ours: others may be in the cgroup as well. */
struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, __u64);
} server_netns SEC(".maps");

static __always_inline int ours(struct bpf_sock_ops *ctx)
{
    __u32 zero = 0;
    __u64 *cookie = bpf_map_lookup_elem(&server_netns, &zero);
    return cookie && *cookie == bpf_get_netns_cookie(ctx);
}

/* A redirect that is not to be echoed. */
#define REFUSED (-1)

/* Does the packet carry data?  IPv6 extension headers, which no load balancer of ours forwards, are taken for it. */
static __always_inline int has_data(const __u8 ip[8], const __u8 *tcp)
{
    __u32 headers = (tcp[12] >> 4) * 4;
    if (ip[0] >> 4 == 4)
        return (__u32)(ip[2] << 8 | ip[3]) > (ip[0] & 15) * 4 + headers;
    return (__u32)(ip[4] << 8 | ip[5]) > headers;
}

/* The redirect of the SYN, as it came.  Returns its length; 0: there is none; REFUSED: there is one, but the SYN carries data
 * or a Fast Open cookie.
 *
 * A redirect may stand behind our client's offer, of the same kind, so the list is walked (bpf_load_hdr_opt finds the
 * first of a kind). */
static __attribute__((noinline)) int redirect_of_syn(struct bpf_sock_ops *ctx, struct answer *answer)
{
    __u8 *tcp = answer->tcp, ip[8] __attribute__((aligned(8)));
    struct crab_walk walk;

    if (bpf_getsockopt(ctx, SOL_TCP, TCP_BPF_SYN, tcp, sizeof answer->tcp) < CRAB_TCP_HEADER)
        return 0;
    crab_walk(tcp, &walk);
    __u32 at = walk.at;
    int n = walk.length;
    if (!n || at > CRAB_TCP_OPTIONS)
        return 0;
    for (int i = 0; i < CRAB_REDIRECT; i++)
        answer->option[i] = tcp[CRAB_TCP_HEADER + at + i];
    bpf_getsockopt(ctx, SOL_TCP, TCP_BPF_SYN_IP, ip, sizeof ip); /* ENOSPC: it is longer */
    return walk.cookie || has_data(ip, tcp) ? REFUSED : n;
}

/* The VIP and port that a redirect of n bytes names; none (port 0), if it is an IPv4 VIP in an IPv6 redirect. */
static __always_inline void vip_of(const __u8 option[CRAB_REDIRECT], int n, __u16 port, struct crab_vip *vip)
{
    *vip = (struct crab_vip){.proto = 6, .port = bpf_htons(port)};
    switch (n) {
    case 6:
        __builtin_memcpy(vip->addr + 12, option + 2, 4);
        break;
    case 8:
        __builtin_memcpy(vip->addr + 12, option + 4, 4);
        break;
    case 18:
        __builtin_memcpy(vip->addr, option + 2, 16);
        break;
    case 20:
        __builtin_memcpy(vip->addr, option + 4, 16);
        break;
    }
    if (n < 10)
        vip->addr[10] = vip->addr[11] = 0xff;
    else if (crab_is_mapped(vip->addr))
        vip->port = 0;
}

/* A SYN-ACK echoes the redirect.  Repeated it does not count: then the SYN's link-layer header is not there, which
 * TCP_SAVE_SYN 1 does not save.  Nor does a cookie: of a connection that comes of it, nobody knows if it was redirected. */
static __always_inline void begun(struct bpf_sock_ops *ctx, const struct crab_vip *vip)
{
    __u8 mac[8];
    struct crab_redirects *r = bpf_map_lookup_elem(&server_redirects, vip);
    if (r && READ(ctx->args[0]) != BPF_WRITE_HDR_TCP_SYNACK_COOKIE &&
        bpf_getsockopt(ctx, SOL_TCP, TCP_BPF_SYN_MAC, mac, sizeof mac) != -ENOENT)
        __sync_fetch_and_add(&r->begun, 1);
}

static __always_inline void completed(const struct crab_vip *vip)
{
    struct crab_redirects *r = bpf_map_lookup_elem(&server_redirects, vip);
    if (r)
        __sync_fetch_and_add(&r->completed, 1);
}

/* The VIP and port of a connection that was not redirected: where it was accepted. */
static __always_inline void accepted_on(struct bpf_sock_ops *ctx, struct crab_vip *vip)
{
    *vip = (struct crab_vip){.proto = 6, .port = bpf_htons((__u16)READ(ctx->local_port))};
    __u32 *words = (__u32 *)vip->addr;
    words[0] = READ(ctx->local_ip6[0]);
    words[1] = READ(ctx->local_ip6[1]);
    words[2] = READ(ctx->local_ip6[2]);
    words[3] = READ(ctx->local_ip6[3]);
    if (READ(ctx->family) == 2 || (!words[0] && !words[1] && words[2] == bpf_htonl(0xffff))) {
        words[0] = words[1] = 0;
        words[2] = bpf_htonl(0xffff);
        words[3] = READ(ctx->local_ip4);
    }
}

/* A connection is established.  Its socket says when it ends, whatever ends it: FIN, RST, a timeout, its process' death. */
static __always_inline void opened(struct bpf_sock_ops *ctx)
{
    __u32 port = READ(ctx->local_port), zero = 0;
    struct crab_vip vip;
    struct bpf_sock *sk = ctx->sk;
    struct answer *syn = bpf_map_lookup_elem(&server_answer, &zero);
    if (!sk || !syn || !bpf_map_lookup_elem(&server_ports, &port) || !ours(ctx))
        return;
    __u32 before = READ(ctx->bpf_sock_ops_cb_flags), flags = before;
    if (!bpf_sk_storage_get(&server_shared, sk, NULL, 0))
        flags &= ~BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG;
    int n = redirect_of_syn(ctx, syn);
    if (n > 0) {
        vip_of(syn->option, n, (__u16)port, &vip);
        completed(&vip);
    } else
        accepted_on(ctx, &vip);
    struct crab_connections *c = bpf_map_lookup_elem(&server_connections, &vip);
    __u64 cookie = bpf_get_socket_cookie(ctx);
    if (c && !bpf_map_update_elem(&server_open, &cookie, &vip, BPF_ANY)) {
        __sync_fetch_and_add(&c->opened, 1);
        flags |= BPF_SOCK_OPS_STATE_CB_FLAG;
    }
    if (flags != before)
        bpf_sock_ops_cb_flags_set(ctx, flags);
}

static __always_inline void changed(struct bpf_sock_ops *ctx, __u32 state)
{
    if (state == BPF_TCP_ESTABLISHED || state == BPF_TCP_CLOSE_WAIT)
        return;
    __u64 cookie = bpf_get_socket_cookie(ctx);
    struct crab_vip *found = bpf_map_lookup_elem(&server_open, &cookie), vip;
    if (!found)
        return;
    vip = *found;
    bpf_map_delete_elem(&server_open, &cookie);
    struct crab_connections *c = bpf_map_lookup_elem(&server_connections, &vip);
    if (c)
        __sync_fetch_and_add(&c->closed, 1);
}

static __always_inline void arm(struct bpf_sock_ops *ctx)
{
    __u32 port = READ(ctx->local_port), *state = bpf_map_lookup_elem(&server_ports, &port), flags, one = 1;
    struct bpf_sock *sk = ctx->sk;
    int on = 1;
    if (!sk || !state || *state == DISARMED || !ours(ctx))
        return;
    flags = READ(ctx->bpf_sock_ops_cb_flags);
    if (flags & BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG) {
        if (!bpf_sk_storage_get(&server_armed, sk, NULL, 0)) /* it may listen for the second time */
            bpf_sk_storage_get(&server_shared, sk, &one, BPF_SK_STORAGE_GET_F_CREATE);
    } else {
        bpf_sk_storage_get(&server_armed, sk, &one, BPF_SK_STORAGE_GET_F_CREATE);
        bpf_sock_ops_cb_flags_set(ctx, flags | BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG);
    }
    bpf_setsockopt(ctx, SOL_TCP, TCP_SAVE_SYN, &on, sizeof on);
    count(CRAB_SERVER_ARMED);
}

/* Room in a SYN-ACK for the redirect of its SYN, if it is to be echoed. */
static __always_inline void reserve(struct bpf_sock_ops *ctx)
{
    __u32 zero = 0;
    struct answer *answer = bpf_map_lookup_elem(&server_answer, &zero);
    if (!answer)
        return;
    answer->length = 0;
    int n = ours(ctx) ? redirect_of_syn(ctx, answer) : 0;
    if (!n)
        return;
    if (n == REFUSED) {
        count(CRAB_SERVER_FAST_OPEN);
        return;
    }
    vip_of(answer->option, n, (__u16)READ(ctx->local_port), &answer->vip);
    if (!bpf_map_lookup_elem(&server_vips, &answer->vip)) {
        count(CRAB_SERVER_UNKNOWN_VIP);
    } else if (bpf_reserve_hdr_opt(ctx, (__u32)n, 0)) {
        count(CRAB_SERVER_NO_ROOM);
    } else {
        answer->cookie = bpf_get_socket_cookie(ctx);
        answer->length = (__u32)n;
    }
}

static __always_inline void echo(struct bpf_sock_ops *ctx)
{
    __u32 zero = 0;
    struct answer *answer = bpf_map_lookup_elem(&server_answer, &zero);
    if (!answer || !answer->length || answer->cookie != bpf_get_socket_cookie(ctx))
        return;
    if (!bpf_store_hdr_opt(ctx, answer->option, crab_length_within(answer->length, sizeof answer->option), 0)) {
        count(CRAB_SERVER_ECHOED);
        if (!crab_is_check(answer->tcp))
            begun(ctx, &answer->vip);
    }
    answer->length = 0;
}

SEC("sockops")
int crab_server(struct bpf_sock_ops *ctx)
{
    switch (READ(ctx->op)) {
    case BPF_SOCK_OPS_TCP_LISTEN_CB:
        arm(ctx);
        break;
    case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
        opened(ctx);
        break;
    case BPF_SOCK_OPS_STATE_CB:
        changed(ctx, READ(ctx->args[1]));
        break;
    case BPF_SOCK_OPS_HDR_OPT_LEN_CB:
        if ((READ(ctx->skb_tcp_flags) & (SYN | ACK)) == (SYN | ACK))
            reserve(ctx);
        break;
    case BPF_SOCK_OPS_WRITE_HDR_OPT_CB:
        if ((READ(ctx->skb_tcp_flags) & (SYN | ACK)) == (SYN | ACK))
            echo(ctx);
        break;
    }
    return 1;
}

/* ---- Fast Open ---- */

/* Drop a redirected SYN that carries data or a Fast Open cookie, where the kernel might give the data to the application
 * (net.ipv4.tcp_fastopen & 2): the client does not take up what comes from here before it has the handshake's answer, and
 * would give the same data to another server.  It sends its SYN again, without them, and that is redirected.
 *
 * A program of the cgroup's, because it runs between the look-up of the listener and the listener. */
SEC("cgroup_skb/ingress")
int crab_fast_open(struct __sk_buff *skb)
{
    __u8 tcp[CRAB_SYN_ROOM] __attribute__((aligned(8))) = {}, ip[8] __attribute__((aligned(8)));
    struct bpf_sock *sk = skb->sk;
    struct crab_walk walk;
    struct crab_vip vip;
    __u8 option[CRAB_REDIRECT];
    __u32 at = 40, end, port;

    if (!sk || READ(sk->state) != BPF_TCP_LISTEN)
        return 1;
    port = READ(sk->src_port);
    if (!bpf_map_lookup_elem(&server_ports, &port) || bpf_skb_load_bytes(skb, 0, ip, sizeof ip))
        return 1;
    if (ip[0] >> 4 == 4)
        at = (ip[0] & 15) * 4;
    else if (ip[6] != 6) /* an extension header: see has_data() */
        return 1;
    if (bpf_skb_load_bytes(skb, at, tcp, CRAB_TCP_HEADER) || (tcp[13] & (SYN | ACK)) != SYN)
        return 1;
    end = (tcp[12] >> 4) * 4;
    if (end <= CRAB_TCP_HEADER ||
        bpf_skb_load_bytes(skb, at + CRAB_TCP_HEADER, tcp + CRAB_TCP_HEADER,
                           crab_length_within(end - CRAB_TCP_HEADER, CRAB_TCP_OPTIONS)))
        return 1;
    crab_walk(tcp, &walk);
    at = walk.at;
    if (!walk.length || at > CRAB_TCP_OPTIONS || !(walk.cookie || has_data(ip, tcp)))
        return 1;
    for (int i = 0; i < CRAB_REDIRECT; i++)
        option[i] = tcp[CRAB_TCP_HEADER + at + i];
    vip_of(option, walk.length, (__u16)port, &vip);
    if (!bpf_map_lookup_elem(&server_vips, &vip))
        return 1;
    count(CRAB_SERVER_FAST_OPEN);
    return 0;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
