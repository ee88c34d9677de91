// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* The default program of crablb.kernel.xsk: every frame goes to the AF_XDP socket of its queue, if there is one. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "maps.h"

struct {
    __uint(type, BPF_MAP_TYPE_XSKMAP);
    __uint(max_entries, CRAB_MAX_QUEUES);
    __type(key, __u32);
    __type(value, __u32);
} sockets SEC(".maps");

SEC("xdp")
int crab_xsk(struct xdp_md *ctx)
{
    return bpf_redirect_map(&sockets, ctx->rx_queue_index, XDP_PASS);
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
