// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* The load balancer's XDP program once more, on the same maps, for while somebody captures: it does the same, and shows what
 * it decides by itself.  What it hands to user space the workers show.  It takes the other one's place for that time, which
 * so costs nothing for it. */
#include "maps.h"

#define SHOW_COUNTED(what) show_counted(what)
#define SHOW_BACKEND(backend, ifindex) show_backend(backend, ifindex)
static void show_counted(__u32 what);
static void show_backend(__u32 backend, __u32 ifindex);

#define crab_lb crab_decide
#define ENTRY __noinline
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

static __always_inline void show_counted(__u32 what)
{
    __u32 zero = 0;
    struct tapped *t = bpf_map_lookup_elem(&tapping, &zero);
    if (t)
        t->head.counters |= 1ull << what;
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

/* Which taps show the packet, so far.  Global, so that it is verified once. */
__noinline __u32 held_of(struct xdp_md *ctx)
{
    __u32 zero = 0;
    struct crab_taps *wanted = bpf_map_lookup_elem(&taps, &zero);
    if (!wanted)
        return 0;
    struct crab_sides sides = crab_sides_of((void *)(long)ctx->data, (void *)(long)ctx->data_end);
    return crab_taps_hold(wanted, &sides);
}

SEC("xdp")
int crab_lb_tap(struct xdp_md *ctx)
{
    __u32 zero = 0, held = 0;
    struct crab_taps *wanted = bpf_map_lookup_elem(&taps, &zero);
    struct tapped *t = bpf_map_lookup_elem(&tapping, &zero);
    if (!wanted || !t)
        return XDP_DROP; /* never */
    __u64 now = bpf_ktime_get_ns();
    if (now < wanted->until_ns)
        held = held_of(ctx);
    if (!held)
        return crab_decide(ctx);

    __u32 in = (__u32)bpf_xdp_get_buff_len(ctx);
    __u32 in_kept = crab_length_within(shorter(in, wanted->snap), CRAB_TAP_SNAP);
    if (bpf_xdp_load_bytes(ctx, 0, t->bytes, in_kept))
        in_kept = 0;
    t->head = (struct crab_tapped){
        .at_ns = now, .in_ifindex = ctx->ingress_ifindex, .in_len = in, .in_kept = (__u16)in_kept,
        .backend = 65535, .queue = (__u16)ctx->rx_queue_index, .xdp = 1};

    int verdict = crab_decide(ctx);

    /* The workers show what they get. */
    if (t->head.counters & (1ull << CRAB_XDP_SYN | 1ull << CRAB_XDP_OTHER | 1ull << CRAB_XDP_ICMP |
                            1ull << CRAB_XDP_HANDLER | 1ull << CRAB_XDP_VIP))
        return verdict;
    int sent = verdict == XDP_TX || verdict == XDP_REDIRECT;
    if (!sent)
        t->head.out_ifindex = 0;
    held = crab_taps_keep(wanted, held, t->head.backend, verdict == XDP_PASS);
    if (!held)
        return verdict;
    t->head.done_ns = bpf_ktime_get_ns();
    t->head.taps = (__u8)held;
    t->head.verdict = (__u8)verdict;
    in_kept = t->head.in_kept;
    __u32 out_kept = 0;
    if (sent) {
        __u32 out = t->head.out_len = (__u32)bpf_xdp_get_buff_len(ctx);
        out_kept = crab_length_within(shorter(out, wanted->snap), CRAB_TAP_SNAP);
        in_kept &= 2 * CRAB_TAP_SNAP - 1;
        if (in_kept > CRAB_TAP_SNAP || bpf_xdp_load_bytes(ctx, 0, t->bytes + in_kept, out_kept))
            out_kept = 0;
    }
    t->head.out_kept = (__u16)out_kept;
    __u32 size = (sizeof t->head + in_kept + out_kept + 7) & ~7u;
    t->head.size = size;
    if (bpf_ringbuf_output(&tapped, t, crab_length_within(size, sizeof *t), 0)) {
        __u64 *lost = bpf_map_lookup_elem(&untapped, &zero);
        if (lost)
            (*lost)++;
    }
    return verdict;
}
