/* SPDX-License-Identifier: MIT */
/* A batch under way, and what lies between its passes.
 *
 * The first pass (examine.c) parses and looks up all frames; then policies are asked (ask.c); the second pass (forward.c)
 * decides about each frame and rewrites it; what is a handler's goes there in the end (handle.c).  So the cache lines that the
 * second pass needs (flow bucket, Maglev slot) are on their way while the first still parses.  core.c calls each of them once
 * a batch; while somebody looks on, tap.c does.  What is a VIP's, but nobody's, is answered where that is seen (answer.c). */
#ifndef CRAB_BATCH_H
#define CRAB_BATCH_H

#include <stdatomic.h>

#include "flows.h"
#include "joins.h"
#include "option.h"
#include "packet.h"
#include "select.h"
#include "snapshot.h"
#include "table.h"

struct crab_core {
    _Atomic(struct crab_snapshot *) published;
    _Atomic(struct crab_snapshot *) hazard;
    uint64_t *counters;
    struct crab_table *table;
    struct crab_joins *joins;
    void (*choose)(void *context, struct crab_choice *choices, uint32_t n);
    void *context;
    void (*handle)(void *context, struct crab_handled *frames, uint32_t n);
    void *handle_context;
    uint64_t random; /* state of the policies' random numbers */
    uint32_t unknown_second, unknown_count; /* unknown flows learned in this second */
    uint32_t token_second, token_count; /* and MPTCP connections' tokens */
    uint32_t answered_second, answered_count; /* packets answered in this second: see answer.h */
    struct crab_flows flows;
    _Atomic(uint64_t *) touched; /* NULL: nobody wants to know */
    struct crab_seen_lists seen; /* of TCP options */
    struct crab_shown *shown; /* NULL: nothing is (see tap.c) */
    bool put_off; /* flows are written by crab_core_settle: these, if the snapshot that has decided them is published still */
    uint32_t learned_count, learned_at;
    const struct crab_snapshot *learned_by;
    _Atomic(uint32_t) publications; /* a snapshot may come where one was before */
    struct crab_flow learned[CRAB_BATCH];
};

/* What the second pass has to do with a frame.  Those that there are most of have code of their own. */
enum crab_kind { CRAB_KIND_NONE, CRAB_KIND_SYN4, CRAB_KIND_SYN6, CRAB_KIND_TAGGED_SYN, CRAB_KIND_ICMP, CRAB_KIND_OTHER };

struct crab_item {
    const struct crab_service *service;
    uint8_t kind;
    uint8_t found;      /* of a SYN: CRAB_OPTION_* among its options */
    int8_t word;        /* as crab_option_scan has it */
    uint8_t outcome;    /* of a SYN: as decide has it */
    bool room;          /* of a SYN: it is to be redirected, and the redirect has room in it and in its answer */
    bool straight;      /* of a SYN with room: the redirect takes the place of its offer's word */
    uint16_t chosen;    /* backend, by the service's policy; then slot leads here */
    uint16_t member;    /* the same as a member of the service's pool */
    uint16_t joined;    /* backend of the MPTCP connection that a SYN joins; then slot leads here */
    uint64_t hash;      /* of the connection */
    struct crab_entry *bucket; /* of the flow cache */
    const struct crab_redirect *redirect; /* of a SYN: its service's */
    const uint16_t *slot; /* where its backend is: in the service's table, by the connection's hash or the client's, or above */
    const uint16_t *by_table; /* the first of these, where slot leads to `chosen` */
    struct crab_tcp_sum sum;
    struct crab_packet packet;
};

/* Frames of a batch that are for handlers. */
struct crab_handed {
    uint32_t count;
    uint8_t of[CRAB_BATCH]; /* which of the batch they are */
    struct crab_handled frames[CRAB_BATCH];
};

_Static_assert(CRAB_BATCH <= UINT8_MAX, "a frame's place fits");

struct crab_batch {
    struct crab_core *core;
    const struct crab_snapshot *s;
    struct crab_frame *frames;
    struct crab_item *items;
    uint32_t count, now, kept;
    struct crab_handed handed;
};

/* All of them. */
void crab_batch_pass(struct crab_batch *b);
/* All of them, where taps show some of the frames. */
void crab_batch_show(struct crab_batch *b);
void crab_batch_examine(struct crab_batch *b);
void crab_batch_ask(const struct crab_batch *b);
void crab_batch_forward(struct crab_batch *b);
/* After the passes: have the handlers' frames handled, all at once. */
void crab_batch_handle(struct crab_batch *b);
void crab_batch_mark(const struct crab_batch *b, uint64_t *touched);
/* After the passes: say which parts of the flow cache they may have changed, if somebody wants to know (crab_core_note). */
static inline void crab_batch_note(const struct crab_batch *b)
{
    uint64_t *touched = atomic_load_explicit(&b->core->touched, memory_order_acquire);
    if (crab_unlikely(touched != NULL))
        crab_batch_mark(b, touched);
}
/* Keep a frame that no service wants for a handler.  Returns whether one wants it. */
bool crab_batch_hand(struct crab_batch *b, uint32_t place, enum crab_counter why);

static inline bool crab_is_drop(enum crab_counter c)
{
    return c >= CRAB_C_DROP_NOT_SERVICE && c <= CRAB_C_DROP_TX;
}

/* May a service's frames be sent to a backend? */
static inline bool crab_usable(const struct crab_snapshot *s, const struct crab_service *service, uint16_t backend)
{
    return backend < s->backend_count && (crab_backend_flags(s, service, backend) &
                                          (CRAB_BACKEND_USABLE | CRAB_BACKEND_DEAD)) == CRAB_BACKEND_USABLE;
}

/* Does a SYN go where a flow went?  It is that flow's SYN again. */
static inline bool crab_keeps(const struct crab_snapshot *s, const struct crab_service *service,
                              const struct crab_entry *f)
{
    return f && crab_usable(s, service, f->backend);
}

#endif
