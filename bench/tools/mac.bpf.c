// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* The least that a forwarding XDP program can do: other MAC addresses, and out again.  What the bypass is compared to. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

SEC("xdp")
int mac(struct xdp_md *ctx)
{
    unsigned char *data = (void *)(long)ctx->data;
    if (data + 14 > (unsigned char *)(long)ctx->data_end)
        return XDP_DROP;
    for (int i = 0; i < 12; i++)
        data[i] = (unsigned char)(0x20 + i);
    return XDP_TX;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
