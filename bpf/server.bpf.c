// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* The server endpoint: echo the redirect option of a SYN in its SYN-ACK, and in nothing else.
 *
 * A sock_ops program on the servers' cgroup.  Listeners are asked to let it write header options; their children are
 * asked to stop as soon as they are established.  TCP_SAVE_SYN is set beside, because only then can the option be found
 * again when the SYN-ACK is retransmitted.  Listeners that are older than the program get no callback; the iterator
 * below finds them. */
#include <linux/bpf.h>
#include <linux/tcp.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "length.h"
#include "maps.h"

#define SOL_TCP 6
#define SYN 0x02
#define ACK 0x10

/* clang 14 merges neighbouring reads of a context into one that the verifier refuses. */
#define READ(x) (*(volatile typeof(x) *)&(x))

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 4096);
    __type(key, struct crab_vip);
    __type(value, __u32);
} server_vips SEC(".maps");

/* The ports of those VIPs (host order): other listeners are let alone. */
struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 4096);
    __type(key, __u32);
    __type(value, __u32);
} server_ports SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    __uint(max_entries, CRAB_SERVER_COUNTERS);
    __type(key, __u32);
    __type(value, __u64);
} server_counters SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 4096);
    __type(key, struct crab_vip);
    __type(value, struct crab_connections);
} server_connections SEC(".maps");

/* The VIP that a connection is counted for, kept in its socket. */
struct {
    __uint(type, BPF_MAP_TYPE_SK_STORAGE);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, int);
    __type(value, struct crab_vip);
} server_counted SEC(".maps");

static __always_inline void count(__u32 what)
{
    __u64 *n = bpf_map_lookup_elem(&server_counters, &what);
    if (n)
        (*n)++;
}

/* The redirect of the SYN, as it came.  Returns its length, 0 if there is none. */
static __always_inline int redirect_of_syn(struct bpf_sock_ops *ctx, __u8 option[20])
{
    option[0] = CRAB_OPT_KIND;
    option[1] = 0;
    int n = bpf_load_hdr_opt(ctx, option, 20, BPF_LOAD_HDR_OPT_TCP_SYN);
    if (n == 6 || n == 18)
        return n;
    option[0] = CRAB_OPT_KIND_EXPERIMENTAL;
    option[1] = 4; /* search by kind and the two bytes that follow the length */
    option[2] = CRAB_OPT_EXID >> 8;
    option[3] = CRAB_OPT_EXID & 0xff;
    n = bpf_load_hdr_opt(ctx, option, 20, BPF_LOAD_HDR_OPT_TCP_SYN);
    if (n == 8 || n == 20)
        return n;
    return 0;
}

/* The VIP and port that a redirect of n bytes names. */
static __always_inline void redirected_from(struct bpf_sock_ops *ctx, const __u8 option[20], int n,
                                            struct crab_vip *vip)
{
    *vip = (struct crab_vip){.proto = 6, .port = bpf_htons((__u16)READ(ctx->local_port))};
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
}

/* Is it a VIP and port that we were told of? */
static __always_inline int known(struct bpf_sock_ops *ctx, const __u8 option[20], int n)
{
    struct crab_vip vip;
    redirected_from(ctx, option, n, &vip);
    return bpf_map_lookup_elem(&server_vips, &vip) != NULL;
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
static __always_inline void opened(struct bpf_sock_ops *ctx, int flags)
{
    __u8 option[20] = {};
    struct crab_vip vip;
    int n = redirect_of_syn(ctx, option);
    if (n)
        redirected_from(ctx, option, n, &vip);
    else
        accepted_on(ctx, &vip);
    struct crab_connections *c = bpf_map_lookup_elem(&server_connections, &vip);
    struct bpf_sock *sk = ctx->sk;
    if (c && sk && bpf_sk_storage_get(&server_counted, sk, &vip, BPF_SK_STORAGE_GET_F_CREATE)) {
        __sync_fetch_and_add(&c->opened, 1);
        flags |= BPF_SOCK_OPS_STATE_CB_FLAG;
    }
    bpf_sock_ops_cb_flags_set(ctx, flags);
}

static __always_inline void changed(struct bpf_sock_ops *ctx, __u32 state)
{
    struct bpf_sock *sk = ctx->sk;
    if (state == BPF_TCP_ESTABLISHED || state == BPF_TCP_CLOSE_WAIT || !sk)
        return;
    struct crab_vip *vip = bpf_sk_storage_get(&server_counted, sk, NULL, 0);
    if (!vip)
        return;
    struct crab_connections *c = bpf_map_lookup_elem(&server_connections, vip);
    if (c)
        __sync_fetch_and_add(&c->closed, 1);
    bpf_sk_storage_delete(&server_counted, sk);
}

static __always_inline void arm(struct bpf_sock_ops *ctx)
{
    __u32 port = READ(ctx->local_port);
    int on = 1;
    if (!bpf_map_lookup_elem(&server_ports, &port))
        return;
    bpf_setsockopt(ctx, SOL_TCP, TCP_SAVE_SYN, &on, sizeof on);
    bpf_sock_ops_cb_flags_set(ctx, READ(ctx->bpf_sock_ops_cb_flags) | BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG);
    count(CRAB_SERVER_ARMED);
}

SEC("sockops")
int crab_server(struct bpf_sock_ops *ctx)
{
    __u8 option[20] = {};
    int n;

    switch (READ(ctx->op)) {
    case BPF_SOCK_OPS_TCP_LISTEN_CB:
        arm(ctx);
        break;
    case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
        opened(ctx, READ(ctx->bpf_sock_ops_cb_flags) & ~BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG);
        break;
    case BPF_SOCK_OPS_STATE_CB:
        changed(ctx, READ(ctx->args[1]));
        break;
    case BPF_SOCK_OPS_HDR_OPT_LEN_CB:
        if ((READ(ctx->skb_tcp_flags) & (SYN | ACK)) != (SYN | ACK))
            break;
        n = redirect_of_syn(ctx, option);
        if (!n)
            break;
        if (!known(ctx, option, n))
            count(CRAB_SERVER_UNKNOWN_VIP);
        else if (bpf_reserve_hdr_opt(ctx, (__u32)n, 0))
            count(CRAB_SERVER_NO_ROOM);
        break;
    case BPF_SOCK_OPS_WRITE_HDR_OPT_CB:
        if ((READ(ctx->skb_tcp_flags) & (SYN | ACK)) != (SYN | ACK))
            break;
        n = redirect_of_syn(ctx, option);
        if (n && known(ctx, option, n) && !bpf_store_hdr_opt(ctx, option, crab_length_within((__u32)n, sizeof option), 0))
            count(CRAB_SERVER_ECHOED);
        break;
    }
    return 1;
}

/* ---- listeners that were there before ---- */

/* The few kernel fields that the iterator reads; CO-RE finds them (libbpf, "BPF CO-RE"). */
struct sock_common {
    volatile unsigned char skc_state;
    __u16 skc_num;
} __attribute__((preserve_access_index));

struct seq_file;

struct bpf_iter_meta {
    struct seq_file *seq;
} __attribute__((preserve_access_index));

struct bpf_iter__tcp {
    struct bpf_iter_meta *meta;
    struct sock_common *sk_common;
} __attribute__((preserve_access_index));

#define TCP_LISTEN 10
/* include/uapi/linux/bpf.h has it since Linux 6.12; older kernels answer EINVAL. */
#define TCP_BPF_SOCK_OPS_CB_FLAGS 1008

/* What it prints: the ports (__u32, host order) of listeners that could not be prepared. */
SEC("iter/tcp")
int crab_arm(struct bpf_iter__tcp *ctx)
{
    struct sock_common *sk = ctx->sk_common;
    if (!sk || sk->skc_state != TCP_LISTEN)
        return 0;
    __u32 port = sk->skc_num;
    if (!bpf_map_lookup_elem(&server_ports, &port))
        return 0;
    int on = 1, flags = BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG;
    void *tp = bpf_skc_to_tcp_sock(sk);
    if (!tp)
        return 0;
    if (!bpf_setsockopt(tp, SOL_TCP, TCP_BPF_SOCK_OPS_CB_FLAGS, &flags, sizeof flags) &&
        !bpf_setsockopt(tp, SOL_TCP, TCP_SAVE_SYN, &on, sizeof on))
        count(CRAB_SERVER_ARMED);
    else
        bpf_seq_write(ctx->meta->seq, &port, sizeof port);
    return 0;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
