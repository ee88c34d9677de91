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

uint8_t *crab_core_flows(struct crab_core *core, uint64_t *bytes)
{
    *bytes = (core->flows.mask + 1) * CRAB_BUCKET * sizeof *core->flows.entries;
    return (uint8_t *)core->flows.entries;
}

void crab_core_note(struct crab_core *core, uint64_t *touched)
{
    atomic_store(&core->touched, touched);
}

_Static_assert(CRAB_PART == CRAB_BUCKET * sizeof(struct crab_entry), "a part is a bucket");

void crab_flows_renew(uint8_t *to, const uint8_t *from, const uint64_t *touched, uint64_t bytes)
{
    for (uint64_t word = 0; word * 64 * CRAB_PART < bytes; word++)
        for (uint64_t left = touched[word]; left; left &= left - 1) {
            uint64_t at = (word * 64 + (uint64_t)__builtin_ctzll(left)) * CRAB_PART;
            memcpy(to + at, from + at, CRAB_PART);
        }
}

void crab_core_publish(struct crab_core *core, struct crab_snapshot *snapshot)
{
    atomic_fetch_add(&core->publications, 1);
    atomic_store(&core->published, snapshot);
}

bool crab_core_uses(const struct crab_core *core, const struct crab_snapshot *snapshot)
{
    return atomic_load(&core->published) == snapshot || atomic_load(&core->hazard) == snapshot;
}

void crab_core_put_off(struct crab_core *core)
{
    core->put_off = true;
}

void crab_core_learn(struct crab_core *core, struct crab_table *table)
{
    core->table = table;
}

void crab_core_join(struct crab_core *core, struct crab_joins *joins)
{
    core->joins = joins;
}

/* A lone one makes room sooner, as one that ends does. */
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

/* A copy of an entry.  The core's thread may be writing it, or moving it, by plain stores, which a packet has the right to: it
 * may be half of one and half of another.  Each word is read once, so that what was checked is what is used. */
__attribute__((no_sanitize("thread")))
static struct crab_entry peek(const struct crab_entry *entry)
{
    uint64_t words[2];
    const uint64_t *from = (const void *)entry;
    for (int half = 0; half < 2; half++)
        words[half] = __atomic_load_n(from + half, __ATOMIC_RELAXED);
    struct crab_entry e;
    memcpy(&e, words, sizeof e);
    return e;
}

void crab_core_count(const struct crab_core *core, uint32_t *counts, uint32_t n, uint32_t now, bool open)
{
    for (uint64_t i = 0; i < (core->flows.mask + 1) * CRAB_BUCKET; i++) {
        struct crab_entry e = peek(&core->flows.entries[i]);
        if (!crab_entry_dead(&e, now) && e.backend < n && (!open || e.state == CRAB_ENTRY_ESTABLISHED))
            counts[e.backend]++;
    }
}

_Static_assert(CRAB_MEMORY_SYN == (int)CRAB_ENTRY_SYN && CRAB_MEMORY_OPEN == (int)CRAB_ENTRY_ESTABLISHED &&
               CRAB_MEMORY_ENDING == (int)CRAB_ENTRY_CLOSING, "the cache's states are those that are told");

uint32_t crab_core_recall(const struct crab_core *core, uint64_t hash, uint32_t now, struct crab_memory found[2])
{
    const struct crab_entry *bucket = crab_flows_bucket(&core->flows, hash);
    uint32_t n = 0;
    for (int i = 0; i < CRAB_BUCKET && n < 2; i++) {
        struct crab_entry e = peek(&bucket[i]);
        if (e.state && crab_entry_has(&e, hash) && !crab_entry_dead(&e, now))
            found[n++] = (struct crab_memory){.isn_be = e.isn, .backend = e.backend, .state = (uint8_t)e.state,
                                              .idle = (uint16_t)((uint16_t)now - e.seen), .copies = (uint8_t)e.copies};
    }
    return n;
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

void crab_batch_mark(const struct crab_batch *b, uint64_t *touched)
{
    for (uint32_t i = 0; i < b->count; i++)
        if (b->items[i].kind != CRAB_KIND_NONE) {
            uint64_t bucket = (uint64_t)(b->items[i].bucket - b->core->flows.entries) / CRAB_BUCKET;
            touched[bucket / 64] |= 1ull << bucket % 64;
        }
}

void crab_batch_pass(struct crab_batch *b)
{
    crab_batch_examine(b);
    if (b->s->asks)
        crab_batch_ask(b);
    crab_batch_forward(b);
    if (crab_unlikely(b->handed.count))
        crab_batch_handle(b);
    crab_batch_note(b);
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

void crab_core_settle(struct crab_core *core)
{
    if (crab_likely(!core->learned_count))
        return;
    if (acquire(core) == core->learned_by && atomic_load(&core->publications) == core->learned_at)
        for (uint32_t i = 0; i < core->learned_count; i++)
            core->counters[CRAB_C_LEARNED] += crab_table_put(core->table, core->learned[i]);
    core->learned_count = 0;
    release(core);
}
