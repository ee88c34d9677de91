/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* How redirects fare, by VIP and by its backends: what fails is not tried again for a while. */
#ifndef CRAB_CLIENT_HEALTH_H
#define CRAB_CLIENT_HEALTH_H

#include "client.h"

/* While offers come to nothing, one connection tries.  If its outcome is never known (it took the fallback), another one
 * does after this time. */
#define TRIAL_NS (10 * 1000000000ull)

/* Those that were not used for the longest time go. */
struct {
    __uint(type, BPF_MAP_TYPE_LRU_HASH);
    __uint(max_entries, 16384);
    __type(key, struct crab_client_path);
    __type(value, struct crab_client_health);
} client_paths SEC(".maps");

static const struct crab_client_health nothing; /* too large for the stack */

static __noinline struct crab_client_health *path_of(const __u8 vip[16], __be16 port, const __u8 dip[16])
{
    struct crab_client_path key __attribute__((aligned(4))) = {.port = port, .proto = IPPROTO_TCP};
    copy(key.vip, vip);
    copy(key.dip, dip);
    struct crab_client_health *found = bpf_map_lookup_elem(&client_paths, &key);
    if (found)
        return found;
    bpf_map_update_elem(&client_paths, &key, &nothing, BPF_NOEXIST);
    return bpf_map_lookup_elem(&client_paths, &key);
}

/* When last a backend was found not to hear us, whom we had thought to: what we know of all others is in doubt (CLOCK_MONOTONIC). */
static __u64 doubted_ns;

CRAB_INLINE void note(struct crab_client_minute *m, __u32 what, __u64 now)
{
    __u64 since = m->since_ns;
    if (now >= since + CRAB_CLIENT_MINUTE_NS) {
        int next = now < since + 2 * CRAB_CLIENT_MINUTE_NS;
        if (__sync_val_compare_and_swap(&m->since_ns, since, next ? since + CRAB_CLIENT_MINUTE_NS : now) == since) {
            for (int i = 0; i < 4; i++) {
                m->before[i] = next ? m->now[i] : 0;
                m->now[i] = 0;
            }
        }
    }
    __sync_fetch_and_add(&m->now[what], 1);
}

/* Another failure.  Returns until when there shall be no offers, 0 if this says nothing new: what fails while there are
 * none had offered before. */
CRAB_INLINE __u64 fails(struct crab_client_health *h, __u32 reason, __u64 now)
{
    const struct crab_client_settings *s = settings();
    __u64 until = h->until_ns;
    __sync_fetch_and_add(&h->failed, 1);
    note(&h->minute, CRAB_CLIENT_MINUTE_FAILED, now);
    h->proven_ns = 0;
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

CRAB_INLINE void recovers(struct crab_client_health *h)
{
    h->until_ns = h->since_ns = 0;
    h->failures = h->reason = 0;
}

/* An offer to a VIP came to nothing.  A client cannot choose its backend: what one backend does wrong holds back all
 * offers to the VIP, but how long depends on that backend alone. */
static __noinline int failed(const __u8 *to, __be16 port, const __u8 *dip, __u32 reason)
{
    struct crab_client_vip *vip = vip_of(to, port);
    __u64 now = bpf_ktime_get_coarse_ns();
    if (!vip)
        return 0;
    count(CRAB_CLIENT_FAILED);
    if (!dip) {
        if (fails(&vip->health, reason, now))
            __builtin_memset(vip->blamed, 0, 16);
        return 0;
    }
    if (reason == CRAB_CLIENT_SILENT)
        doubted_ns = now;
    __sync_fetch_and_add(&vip->health.failed, 1);
    note(&vip->health.minute, CRAB_CLIENT_MINUTE_FAILED, now);
    struct crab_client_health *path = path_of(to, port, dip);
    __u64 until = path ? fails(path, reason, now) : 0;
    if (until > vip->health.until_ns) {
        if (!vip->health.until_ns)
            vip->health.since_ns = path->since_ns;
        vip->health.reason = reason;
        copy(vip->blamed, dip);
        vip->health.until_ns = until;
    }
    return 0;
}

/* A backend has spoken after its redirect.  It makes up for what others did wrong only when their time is over. */
static __noinline int completed(const __u8 *to, __be16 port, const __u8 *dip)
{
    __u64 now = bpf_ktime_get_coarse_ns();
    count(CRAB_CLIENT_COMPLETED);
    struct crab_client_vip *vip = vip_of(to, port);
    if (!vip)
        return 0;
    struct crab_client_health *path = path_of(to, port, dip);
    if (path) {
        __sync_fetch_and_add(&path->completed, 1);
        note(&path->minute, CRAB_CLIENT_MINUTE_COMPLETED, now);
        path->proven_ns = now;
        if (path->failures)
            recovers(path);
    }
    __sync_fetch_and_add(&vip->health.completed, 1);
    note(&vip->health.minute, CRAB_CLIENT_MINUTE_COMPLETED, now);
    __u64 until = vip->health.until_ns;
    if (until) {
        const __u64 *blamed = (const void *)vip->blamed;
        if ((!blamed[0] && !blamed[1]) || same(vip->blamed, dip) || now >= until)
            recovers(&vip->health);
    }
    return 0;
}

/* Do failures forbid an offer?  When their time is over one connection at a time tries. */
CRAB_INLINE int held_back(struct crab_client_health *h)
{
    if (!h->until_ns)
        return 0;
    __u64 now = bpf_ktime_get_coarse_ns(), trial = h->trial_ns;
    if (now < h->until_ns || now < trial)
        return 1;
    return __sync_val_compare_and_swap(&h->trial_ns, trial, now + TRIAL_NS) != trial;
}

/* Nothing has come from the backend since its SYN-ACK, and something should have. */
CRAB_INLINE void mute(struct crab_client_flow *flow, __be16 port)
{
    if (flow->said != CRAB_CLIENT_NEW)
        return;
    flow->said = CRAB_CLIENT_MUTE;
    failed(flow->vip, port, flow->dip, CRAB_CLIENT_SILENT);
}

#endif
