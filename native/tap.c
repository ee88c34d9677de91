/* SPDX-License-Identifier: MIT */
/* What becomes of packets, shown to whoever wants to see it.
 *
 * A frame that is shown gets a batch to itself: what the counters say of the batch is then said of it, and the passes need
 * not know that anybody looks on.  The records lie in a ring of bytes, one writer and one reader, neither of whom waits. */
#include "tap.h"

#include "batch.h"

#include <stdlib.h>
#include <time.h>

struct crab_shown {
    _Atomic(uint64_t) written; /* bytes, since the beginning */
    _Atomic(uint64_t) read;
    _Atomic(uint64_t) lost; /* records */
    uint32_t mask;
    uint16_t queue;
    uint8_t bytes[];
};

/* A record in the making: where it is in the ring, and whether it has room there. */
struct record {
    struct crab_tapped head;
    uint64_t at;
    bool room;
};

int crab_core_show(struct crab_core *core, uint32_t queue, uint32_t size)
{
    if (core->shown)
        return 0;
    struct crab_shown *shown = calloc(1, sizeof *shown + size);
    if (!shown)
        return -1;
    shown->mask = size - 1;
    shown->queue = (uint16_t)queue;
    core->shown = shown;
    return 0;
}

void crab_core_hide(struct crab_core *core)
{
    free(core->shown);
    core->shown = NULL;
}

/* Copy into the ring, or out of it, at a place from which so many bytes may go round its end. */
static void put(struct crab_shown *s, uint64_t at, const void *from, uint32_t n)
{
    uint32_t place = (uint32_t)at & s->mask, first = s->mask + 1 - place;
    first = first < n ? first : n;
    memcpy(s->bytes + place, from, first);
    memcpy(s->bytes, (const uint8_t *)from + first, n - first);
}

static void get(const struct crab_shown *s, uint64_t at, void *to, uint32_t n)
{
    uint32_t place = (uint32_t)at & s->mask, first = s->mask + 1 - place;
    first = first < n ? first : n;
    memcpy(to, s->bytes + place, first);
    memcpy((uint8_t *)to + first, s->bytes, n - first);
}

uint32_t crab_core_shown(struct crab_core *core, uint8_t *out)
{
    struct crab_shown *s = core->shown;
    if (!s)
        return 0;
    uint64_t from = atomic_load_explicit(&s->read, memory_order_relaxed);
    uint32_t n = (uint32_t)(atomic_load_explicit(&s->written, memory_order_acquire) - from);
    get(s, from, out, n);
    atomic_store_explicit(&s->read, from + n, memory_order_release);
    return n;
}

uint64_t crab_core_unshown(const struct crab_core *core)
{
    return core->shown ? atomic_load_explicit(&core->shown->lost, memory_order_relaxed) : 0;
}

uint32_t crab_taps_find(const struct crab_taps *taps, const uint8_t *frame, size_t len, uint16_t backend, bool left)
{
    struct crab_sides sides = crab_sides_of(frame, frame + len);
    return crab_taps_keep(taps, crab_taps_hold(taps, &sides), backend, left);
}

static uint32_t held_of(const struct crab_taps *taps, const struct crab_frame *frame)
{
    struct crab_sides sides = crab_sides_of(frame->data, frame->data + frame->len);
    return crab_taps_hold(taps, &sides);
}

static uint64_t clock_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* The first bytes of a frame, behind what the record has already.  Returns how many. */
static uint16_t keep(struct crab_shown *s, const struct record *r, const struct crab_frame *frame, uint32_t snap)
{
    uint32_t n = frame->len < snap ? frame->len : snap;
    if (r->room)
        put(s, r->at + sizeof r->head + r->head.in_kept, frame->data, n);
    return (uint16_t)n;
}

/* Does a frame that goes out look as one that was sent to a backend? */
static bool is_to(const struct crab_frame *frame, const struct crab_service *service, const struct crab_backend *backend)
{
    uint16_t type = 0;
    size_t l3 = crab_find_l3(frame->data, frame->len, &type);
    if (!l3 || frame->ifindex != backend->ifindex || memcmp(frame->data, backend->dst_mac, 6))
        return false;
    uint8_t to[16];
    memcpy(to, crab_mapped_prefix, 12);
    if (type == htons(0x0800))
        memcpy(to + 12, frame->data + l3 + CRAB_IP4_DST, 4);
    else
        memcpy(to, frame->data + l3 + CRAB_IP6_DST, 16);
    return !memcmp(to, backend->addr, 16) || !memcmp(to, service->addr, 16);
}

/* Whom a frame was sent to: of those that it may have been, the first that it looks like. */
static uint16_t backend_of(const struct crab_batch *b, const struct crab_item *it, const struct crab_flow *written)
{
    struct crab_entries known = crab_flows_entries(it->bucket, it->hash, b->now);
    uint16_t may[] = {
        known.pending ? known.pending->backend : CRAB_NO_BACKEND,
        known.settled ? known.settled->backend : CRAB_NO_BACKEND,
        written->hash ? written->backend : CRAB_NO_BACKEND,
        *it->slot,
    };
    for (size_t i = 0; i < sizeof may / sizeof *may; i++)
        if (may[i] < b->s->backend_count && is_to(b->frames, it->service, &b->s->backends[may[i]]))
            return may[i];
    return CRAB_NO_BACKEND;
}

/* The passes, for one frame, and what they did in the record.  The counters before: those of the core. */
static void pass_one(struct crab_batch *b, struct record *r)
{
    struct crab_core *core = b->core;
    const struct crab_item *it = b->items;
    struct crab_flow written = {0};
    uint64_t before[CRAB_COUNTERS];
    memcpy(before, core->counters, sizeof before);
    crab_batch_examine(b);
    if (it->kind != CRAB_KIND_NONE) {
        r->head.flags |= CRAB_TAPPED_SERVICE;
        if (crab_flows_find(it->bucket, it->hash, b->now))
            r->head.flags |= CRAB_TAPPED_KNOWN;
        if (!core->table || !crab_table_get(core->table, it->hash, b->now, &written))
            written.hash = 0;
        if (written.hash)
            r->head.flags |= CRAB_TAPPED_WRITTEN;
        bool syn = it->kind != CRAB_KIND_ICMP && it->kind != CRAB_KIND_OTHER;
        if (syn && it->found & CRAB_OPTION_OFFER)
            r->head.flags |= CRAB_TAPPED_OFFER;
    }
    if (b->s->asks)
        crab_batch_ask(b);
    crab_batch_forward(b);
    if (b->handed.count)
        crab_batch_handle(b);
    crab_batch_note(b);
    for (uint32_t i = 0; i < CRAB_COUNTERS; i++)
        if (core->counters[i] != before[i])
            r->head.counters |= 1ull << i;
    if (it->kind == CRAB_KIND_NONE)
        return;
    if (it->slot == &it->chosen)
        r->head.flags |= CRAB_TAPPED_CHOSEN;
    const uint64_t forwarded = (2ull << CRAB_C_FALLBACK_ICMP) - (1ull << CRAB_C_REDIRECTED);
    if (r->head.counters & forwarded)
        r->head.backend = backend_of(b, it, &written);
}

/* The one frame of a batch, which these taps show so far. */
static void show_one(struct crab_batch *b, uint32_t held)
{
    struct crab_shown *s = b->core->shown;
    const struct crab_taps *taps = &b->s->taps;
    struct crab_frame *frame = b->frames;
    struct record r = {
        .head = {.at_ns = clock_ns(), .in_ifindex = frame->ifindex, .in_len = frame->len, .backend = CRAB_NO_BACKEND,
                 .queue = s->queue},
        .at = atomic_load_explicit(&s->written, memory_order_relaxed)};
    uint64_t used = r.at - atomic_load_explicit(&s->read, memory_order_acquire);
    r.room = s->mask + 1 - used >= sizeof r.head + 2 * taps->snap + 8;
    r.head.in_kept = keep(s, &r, frame, taps->snap);
    pass_one(b, &r);
    r.head.taps = (uint8_t)crab_taps_keep(taps, held, r.head.backend, false);
    if (!r.head.taps)
        return;
    if (!r.room) {
        atomic_fetch_add_explicit(&s->lost, 1, memory_order_relaxed);
        return;
    }
    if (frame->len) {
        r.head.out_ifindex = frame->ifindex;
        r.head.out_len = frame->len;
        r.head.out_kept = keep(s, &r, frame, taps->snap);
    }
    r.head.done_ns = clock_ns();
    r.head.size = (uint32_t)(sizeof r.head + r.head.in_kept + r.head.out_kept + 7) & ~7u;
    put(s, r.at, &r.head, sizeof r.head);
    atomic_store_explicit(&s->written, r.at + r.head.size, memory_order_release);
}

void crab_batch_show(struct crab_batch *b)
{
    struct crab_frame *frames = b->frames;
    for (uint32_t i = 0, count = b->count; i < count; i += b->count) {
        uint32_t held = held_of(&b->s->taps, &frames[i]);
        b->frames = frames + i;
        b->handed.count = 0;
        if (held) {
            b->count = 1;
            show_one(b, held);
            continue;
        }
        for (b->count = 1; i + b->count < count; b->count++)
            if (held_of(&b->s->taps, &frames[i + b->count]))
                break;
        crab_batch_pass(b);
    }
}

_Static_assert(CRAB_COUNTERS <= 64, "a bit each");
