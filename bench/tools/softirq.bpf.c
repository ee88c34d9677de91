// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* Time of the network's softirqs that is not in that of anybody's threads: a softirq is charged to whom it interrupts.  What
 * interrupts those that are known is theirs, and in their own time; the rest, of an idle CPU for example, is added up here. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

/* include/linux/interrupt.h */
#define NET_TX_SOFTIRQ 2
#define NET_RX_SOFTIRQ 3
/* In `known`: threads by this and their number, cgroups by their id. */
#define THREAD (1ull << 63)

struct softirq {
    __u64 began, total; /* nanoseconds; began 0: none is on, or a known one's */
};

struct {
    __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, struct softirq);
} softirqs SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 256);
    __type(key, __u64);
    __type(value, __u8);
} known SEC(".maps");

SEC("tp_btf/softirq_entry")
int entry(unsigned long long *ctx)
{
    __u64 kind = ctx[0];
    __u32 zero = 0;
    struct softirq *softirq = bpf_map_lookup_elem(&softirqs, &zero);
    __u64 cgroup = bpf_get_current_cgroup_id(), thread = THREAD | (__u32)bpf_get_current_pid_tgid();
    if (!softirq || (kind != NET_RX_SOFTIRQ && kind != NET_TX_SOFTIRQ))
        return 0;
    if (!bpf_map_lookup_elem(&known, &cgroup) && !bpf_map_lookup_elem(&known, &thread))
        softirq->began = bpf_ktime_get_ns();
    return 0;
}

SEC("tp_btf/softirq_exit")
int leave(void *ctx)
{
    (void)ctx;
    __u32 zero = 0;
    struct softirq *softirq = bpf_map_lookup_elem(&softirqs, &zero);
    if (!softirq || !softirq->began)
        return 0;
    softirq->total += bpf_ktime_get_ns() - softirq->began;
    softirq->began = 0;
    return 0;
}

char LICENSE[] SEC("license") = "GPL";
