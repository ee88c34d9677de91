// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* The load balancer's XDP program once more, on the same maps, for while somebody captures: it does the same, and shows what
 * it decides by itself.  What it hands to user space the workers show.  It takes the other one's place for that time, which
 * so costs nothing for it. */
#include "maps.h"

#define SHOW_COUNTED(what) show_counted(what)
#define SHOW_BACKEND(backend, ifindex) show_backend(backend, ifindex)
static int show_counted(__u32 what);
static void show_backend(__u32 backend, __u32 ifindex);

#define crab_lb crab_decide
#define ENTRY static __always_inline
#include "lb.bpf.c"
#undef crab_lb

#include "tap.h"

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, struct crab_taps);
} taps SEC(".maps");

/* A record in the making, of the packet that the CPU works on. */
struct tapped {
    struct crab_tapped head;
    __u8 bytes[2 * CRAB_TAP_SNAP];
};
struct {
    __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, struct tapped);
} tapping SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_RINGBUF);
    __uint(max_entries, 1 << 18);
} tapped SEC(".maps");

/* Records that there was no room for. */
struct {
    __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, __u64);
} untapped SEC(".maps");

/* Not inline: Linux 6.1 has no byte left on the stack for what it needs, where the packet is passed to the kernel. */
static __noinline int show_counted(__u32 what)
{
    __u32 zero = 0;
    struct tapped *t = bpf_map_lookup_elem(&tapping, &zero);
    if (t)
        t->head.counters |= 1ull << what;
    return 0;
}

static __always_inline void show_backend(__u32 backend, __u32 ifindex)
{
    __u32 zero = 0;
    struct tapped *t = bpf_map_lookup_elem(&tapping, &zero);
    if (!t)
        return;
    t->head.backend = (__u16)backend;
    t->head.out_ifindex = ifindex;
}

static __always_inline __u32 shorter(__u32 a, __u32 b)
{
    return a < b ? a : b;
}

/* Before the decision: is the packet shown, and what it is.  Global, as the next one, so that it is verified once, and beside
 * the program's own frame on the stack, of which there is nothing left (512 bytes, in all functions that call each other). */
__noinline int before(struct xdp_md *ctx)
{
    __u32 zero = 0;
    struct crab_taps *wanted = bpf_map_lookup_elem(&taps, &zero);
    struct tapped *t = bpf_map_lookup_elem(&tapping, &zero);
    if (!wanted || !t)
        return 0;
    t->head.taps = 0;
    __u64 now = bpf_ktime_get_ns();
    if (now >= wanted->until_ns)
        return 0;
    struct crab_sides sides = crab_sides_of((void *)(long)ctx->data, (void *)(long)ctx->data_end);
    __u32 held = crab_taps_hold(wanted, &sides);
    if (!held)
        return 0;
    __u32 in = (__u32)bpf_xdp_get_buff_len(ctx);
    __u32 kept = crab_length_within(shorter(in, wanted->snap), CRAB_TAP_SNAP);
    if (bpf_xdp_load_bytes(ctx, 0, t->bytes, kept))
        kept = 0;
    __builtin_memset(&t->head, 0, sizeof t->head);
    t->head.at_ns = now;
    t->head.in_ifindex = ctx->ingress_ifindex;
    t->head.in_len = in;
    t->head.in_kept = (__u16)kept;
    t->head.backend = 65535;
    t->head.queue = (__u16)ctx->rx_queue_index;
    t->head.taps = (__u8)held;
    t->head.xdp = 1;
    return 0;
}

/* What the workers get, they show. */
#define HANDED (1ull << CRAB_XDP_SYN | 1ull << CRAB_XDP_OTHER | 1ull << CRAB_XDP_ICMP | 1ull << CRAB_XDP_HANDLER | \
                1ull << CRAB_XDP_VIP)

/* After it: show it.  Returns the verdict. */
__noinline int after(struct xdp_md *ctx, int verdict)
{
    __u32 zero = 0;
    struct crab_taps *wanted = bpf_map_lookup_elem(&taps, &zero);
    struct tapped *t = bpf_map_lookup_elem(&tapping, &zero);
    if (!wanted || !t || !t->head.taps || t->head.counters & HANDED)
        return verdict;
    t->head.taps = (__u8)crab_taps_keep(wanted, t->head.taps, t->head.backend, verdict == XDP_PASS);
    if (!t->head.taps)
        return verdict;
    t->head.done_ns = bpf_ktime_get_ns();
    t->head.verdict = (__u8)verdict;
    __u32 in_kept = t->head.in_kept, out_kept = 0;
    if (in_kept > CRAB_TAP_SNAP)
        return verdict; /* never */
    if (verdict == XDP_TX || verdict == XDP_REDIRECT) {
        __u32 out = (__u32)bpf_xdp_get_buff_len(ctx);
        out_kept = crab_length_within(shorter(out, wanted->snap), CRAB_TAP_SNAP);
        if (bpf_xdp_load_bytes(ctx, 0, t->bytes + in_kept, out_kept))
            out_kept = 0;
        t->head.out_len = out;
        t->head.out_kept = (__u16)out_kept;
    } else {
        t->head.out_ifindex = 0;
    }
    __u32 size = t->head.size = (sizeof t->head + in_kept + out_kept + 7) & ~7u;
    if (bpf_ringbuf_output(&tapped, t, crab_length_within(size, sizeof *t), 0)) {
        __u64 *lost = bpf_map_lookup_elem(&untapped, &zero);
        if (lost)
            (*lost)++;
    }
    return verdict;
}

SEC("xdp")
int crab_lb_tap(struct xdp_md *ctx)
{
    before(ctx);
    return after(ctx, crab_decide(ctx));
}
