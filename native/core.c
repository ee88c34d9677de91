/* SPDX-License-Identifier: MIT */
/* A worker's state: its life, and a batch's way through the passes (see batch.h).
 *
 * The snapshot is guarded by a hazard pointer: the core says which snapshot it is using, and whoever published a new one
 * frees the old one when no core names it.  The packet path pays one store a batch. */
#include "batch.h"

#include <stdlib.h>
#include <sys/random.h>

_Static_assert(CRAB_COUNTERS <= CRAB_WORKER_COUNTERS, "the counters fit into the shared map's value");

struct crab_core *crab_core_new(uint32_t flows, uint64_t *counters)
{
    struct crab_core *core = calloc(1, sizeof *core);
    if (!core)
        return NULL;
    core->counters = counters;
    crab_seen_init(&core->seen);
    if (getrandom(&core->random, sizeof core->random, 0) != sizeof core->random)
        core->random = (uintptr_t)core;
    if (crab_flows_init(&core->flows, flows)) {
        free(core);
        return NULL;
    }
    return core;
}

void crab_core_free(struct crab_core *core)
{
    if (!core)
        return;
    crab_core_hide(core);
    free(core->flows.entries);
    free(core);
}

void crab_core_publish(struct crab_core *core, struct crab_snapshot *snapshot)
{
    atomic_store(&core->published, snapshot);
}

bool crab_core_uses(const struct crab_core *core, const struct crab_snapshot *snapshot)
{
    return atomic_load(&core->published) == snapshot || atomic_load(&core->hazard) == snapshot;
}

void crab_core_learn(struct crab_core *core, struct crab_table *table)
{
    core->table = table;
}

void crab_core_adopt(struct crab_core *core, const struct crab_flow *flows, uint32_t n, uint32_t now)
{
    core->flows.tidied = now;
    for (uint32_t i = 0; i < n; i++) {
        struct crab_entry *e = crab_flows_place(crab_flows_bucket(&core->flows, flows[i].hash), now);
        if (e)
            *e = (struct crab_entry){.tag = flows[i].hash >> 16, .backend = flows[i].backend,
                                     .state = flows[i].state == CRAB_FLOW_OPEN ? CRAB_ENTRY_ESTABLISHED
                                                                               : CRAB_ENTRY_CLOSING,
                                     .seen = (uint16_t)now};
    }
}

/* The core's thread may be writing an entry, or moving it, by plain stores, which a packet has the right to: what is counted
 * meanwhile is an estimate.  Each word is read once, so that what was checked is what is used. */
__attribute__((no_sanitize("thread")))
void crab_core_count(const struct crab_core *core, uint32_t *counts, uint32_t n, uint32_t now)
{
    for (uint64_t i = 0; i < (core->flows.mask + 1) * CRAB_BUCKET; i++) {
        uint64_t words[2];
        const uint64_t *from = (const void *)&core->flows.entries[i];
        for (int half = 0; half < 2; half++)
            words[half] = __atomic_load_n(from + half, __ATOMIC_RELAXED);
        struct crab_entry e;
        memcpy(&e, words, sizeof e);
        if (!crab_entry_dead(&e, now) && e.backend < n)
            counts[e.backend]++;
    }
}

static const struct crab_snapshot *acquire(struct crab_core *core)
{
    struct crab_snapshot *s = atomic_load(&core->published), *seen;
    do {
        seen = s;
        atomic_store(&core->hazard, seen);
        s = atomic_load(&core->published); /* still published after we said so: nobody frees it */
    } while (s != seen);
    return s;
}

static void release(struct crab_core *core)
{
    atomic_store_explicit(&core->hazard, NULL, memory_order_release);
}

void crab_batch_pass(struct crab_batch *b)
{
    crab_batch_examine(b);
    if (b->s->asks)
        crab_batch_ask(b);
    crab_batch_forward(b);
    if (crab_unlikely(b->handed.count))
        crab_batch_handle(b);
}

uint32_t crab_core_batch(struct crab_core *core, struct crab_frame *frames, uint32_t count, uint32_t now)
{
    struct crab_item items[CRAB_BATCH];
    struct crab_batch b;
    b.core = core;
    b.s = acquire(core);
    b.frames = frames;
    b.items = items;
    b.count = count;
    b.now = now;
    b.kept = b.handed.count = 0;

    if (crab_unlikely(now != core->flows.tidied))
        crab_flows_tidy(&core->flows, now);
    core->counters[CRAB_C_RECEIVED] += count;
    if (crab_unlikely(!b.s)) {
        core->counters[CRAB_C_DROP_NOT_SERVICE] += count;
        for (uint32_t i = 0; i < count; i++)
            frames[i].len = 0;
    } else if (crab_unlikely(b.s->taps.count)) {
        crab_batch_show(&b);
    } else {
        crab_batch_pass(&b);
    }
    release(core);
    return b.kept;
}
