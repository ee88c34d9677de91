/* SPDX-License-Identifier: MIT */
/* bpf/lb.bpf.c, and a kernel for it. */
#include "balancer.h" /* libc's headers before the kernel's: only those know of the others */

#include "../../bpf/lb.bpf.c"

static struct {
    struct xdp *of;
    uint64_t now;
    bool socket; /* the last redirect was to one */
    uint32_t ifindex; /* of the last one to an interface */
    uint32_t queue;
    struct passed key[256]; /* of map `passed` */
    struct passing value[256];
} turn;

static uint32_t place_of_passed(const void *key)
{
    uint32_t h = 2166136261u;
    for (size_t i = 0; i < sizeof(struct passed); i++)
        h = (h ^ ((const uint8_t *)key)[i]) * 16777619u;
    return h & 255;
}

void *sim_map_lookup(const void *map, const void *key)
{
    struct xdp *x = turn.of;
    uint32_t i = *(const uint32_t *)key;
    if (map == &flows)
        return i < x->buckets ? &x->flows[i] : NULL;
    if (map == &hashing)
        return &x->hashing;
    if (map == &services) {
        for (uint32_t n = 0; n < x->services; n++)
            if (!memcmp(&x->vip[n], key, sizeof x->vip[n]))
                return &x->index[n];
        return NULL;
    }
    if (map == &macs)
        return i == SIM_IFINDEX || i == SIM_ELSEWHERE ? &x->macs : NULL;
    if (map == &interfaces)
        return i == SIM_IFINDEX || i == SIM_ELSEWHERE ? &x->interface : NULL;
    if (map == &sockets)
        return i < SIM_QUEUES && x->sockets[i] ? &x->sockets[i] : NULL;
    if (map == &paths)
        return i < SIM_BACKENDS ? &x->paths[i] : NULL;
    if (map == &service_counters)
        return i < SIM_SERVICES ? &x->service_counters[i] : NULL;
    if (map == &limits)
        return i < SIM_SERVICES ? &x->limits[i] : NULL;
    if (map == &xdp_counters)
        return i < CRAB_XDP_COUNTERS ? &x->counters[i] : NULL;
    if (map == &vips) {
        for (uint32_t n = 0; n < x->services; n++)
            if (!memcmp(x->vip[n].addr, key, 16))
                return &x->kinds;
        return NULL;
    }
    if (map == &pieces) {
        static struct piece piece;
        return &piece;
    }
    if (map == &passed) {
        uint32_t at = place_of_passed(key);
        return memcmp(&turn.key[at], key, sizeof turn.key[at]) ? NULL : &turn.value[at];
    }
    return NULL; /* handlers: there are none */
}

long sim_map_update(const void *map, const void *key, const void *value)
{
    if (map == &passed) {
        uint32_t at = place_of_passed(key);
        memcpy(&turn.key[at], key, sizeof turn.key[at]);
        memcpy(&turn.value[at], value, sizeof turn.value[at]);
    }
    return 0;
}

long sim_redirect_map(__u32 place, __u64 otherwise)
{
    if (place >= SIM_QUEUES || !turn.of->sockets[place])
        return (long)otherwise;
    turn.socket = true;
    return XDP_REDIRECT;
}

long sim_redirect(__u32 ifindex)
{
    turn.ifindex = ifindex;
    turn.socket = false;
    return XDP_REDIRECT;
}

long sim_adjust_head(struct xdp_md *ctx, int by)
{
    ctx->data += (__u32)by;
    return 0;
}

__u64 sim_ktime(void)
{
    return turn.now;
}

int sim_xdp(struct xdp *x, struct frame *f, uint32_t queue, uint64_t now_ns, uint32_t *why)
{
    struct xdp_md ctx = {.data = (__u32)(uintptr_t)f->data, .data_end = (__u32)(uintptr_t)(f->data + f->len),
                         .ingress_ifindex = f->ifindex, .rx_queue_index = queue};
    uint64_t before[CRAB_XDP_COUNTERS];
    memcpy(before, x->counters, sizeof before);
    turn.of = x;
    turn.now = now_ns;
    turn.socket = false;
    int verdict = crab_lb(&ctx);
    f->data = (uint8_t *)(uintptr_t)ctx.data;
    f->len = ctx.data_end - ctx.data;
    *why = CRAB_XDP_COUNTERS;
    for (uint32_t i = 0; i < CRAB_XDP_COUNTERS; i++)
        if (x->counters[i] != before[i])
            *why = *why == CRAB_XDP_COUNTERS && x->counters[i] == before[i] + 1 ? i : CRAB_XDP_COUNTERS + 1;
    switch (verdict) {
    case XDP_PASS:
        return XDP_IS_PASSED;
    case XDP_TX:
        return XDP_IS_SENT;
    case XDP_REDIRECT:
        if (!turn.socket)
            f->ifindex = (uint8_t)turn.ifindex;
        return turn.socket ? XDP_IS_A_WORKERS : XDP_IS_SENT;
    default:
        return XDP_IS_DROPPED;
    }
}
