// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* Listeners that were there before the server endpoint: an iterator that arms them, or disarms them.
 *
 * An object of its own, on the maps of server.bpf.c, because it needs a kernel with BTF and the endpoint does not. */
#include <linux/bpf.h>
#include <linux/tcp.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

#include "server.h"

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

/* Arm the listeners of `server_ports`, or disarm them, as it says.  What it prints: the ports (__u32, host order) of
 * listeners that could not be armed. */
SEC("iter/tcp")
int crab_arm(struct bpf_iter__tcp *ctx)
{
    struct sock_common *sk = ctx->sk_common;
    if (!sk || sk->skc_state != TCP_LISTEN)
        return 0;
    __u32 port = sk->skc_num, *state = bpf_map_lookup_elem(&server_ports, &port), one = 1;
    void *tp = state ? bpf_skc_to_tcp_sock(sk) : NULL;
    if (!state || !tp)
        return 0;
    int on = 1, flags = 0;
    __u32 *armed = bpf_sk_storage_get(&server_armed, tp, NULL, 0);
    int unknown = bpf_getsockopt(tp, SOL_TCP, TCP_BPF_SOCK_OPS_CB_FLAGS, &flags, sizeof flags);
    if (*state == DISARMED) {
        flags &= ~BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG;
        if (armed && !unknown && !bpf_setsockopt(tp, SOL_TCP, TCP_BPF_SOCK_OPS_CB_FLAGS, &flags, sizeof flags))
            bpf_sk_storage_delete(&server_armed, tp);
        return 0;
    }
    if (!armed && !unknown) {
        if (!(flags & BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG)) {
            flags |= BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG;
            unknown = bpf_setsockopt(tp, SOL_TCP, TCP_BPF_SOCK_OPS_CB_FLAGS, &flags, sizeof flags);
            if (!unknown)
                bpf_sk_storage_get(&server_armed, tp, &one, BPF_SK_STORAGE_GET_F_CREATE);
        } else if (*state == ARMED)
            bpf_sk_storage_get(&server_shared, tp, &one, BPF_SK_STORAGE_GET_F_CREATE);
        else
            bpf_sk_storage_get(&server_armed, tp, &one, BPF_SK_STORAGE_GET_F_CREATE);
    }
    /* Armed by sock_ops it is also where the kernel is older than the option. */
    if ((armed || !unknown) && !bpf_setsockopt(tp, SOL_TCP, TCP_SAVE_SYN, &on, sizeof on))
        count(CRAB_SERVER_ARMED);
    else
        bpf_seq_write(ctx->meta->seq, &port, sizeof port);
    return 0;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
