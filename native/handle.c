/* SPDX-License-Identifier: MIT */
/* Frames that are no service's, but a handler's. */
#include "batch.h"
#include "match.h"

void crab_core_handle(struct crab_core *core, void (*handle)(void *context, struct crab_handled *frames, uint32_t n),
                      void *context)
{
    core->handle = handle;
    core->handle_context = context;
}

int crab_match_find(const struct crab_matches *matches, const uint8_t *frame, size_t len)
{
    struct crab_where where;
    struct crab_match has = crab_match_of(frame, frame + len, &where);
    for (uint32_t i = 0; i < matches->count && i < CRAB_MAX_MATCHES; i++)
        if (crab_match_holds(&matches->list[i], &has))
            return matches->list[i].handler;
    return -1;
}

bool crab_batch_hand(struct crab_batch *b, uint32_t place, enum crab_counter why)
{
    const struct crab_frame *frame = &b->frames[place];
    struct crab_handed *handed = &b->handed;
    if (!b->core->handle || (why != CRAB_C_DROP_NOT_SERVICE && why != CRAB_C_DROP_MALFORMED))
        return false;
    int handler = crab_match_find(&b->s->matches, frame->data, frame->len);
    if (handler < 0)
        return false;
    handed->of[handed->count] = (uint8_t)place;
    handed->frames[handed->count++] = (struct crab_handled){
        .data = frame->data, .len = frame->len, .ifindex = frame->ifindex, .handler = (uint16_t)handler};
    return true;
}

void crab_batch_handle(struct crab_batch *b)
{
    struct crab_core *core = b->core;
    core->handle(core->handle_context, b->handed.frames, b->handed.count);
    for (uint32_t i = 0; i < b->handed.count; i++) {
        const struct crab_handled *h = &b->handed.frames[i];
        struct crab_frame *frame = &b->frames[b->handed.of[i]];
        if (h->verdict == CRAB_HANDLED_SEND && h->len) {
            frame->len = h->len;
            frame->ifindex = h->ifindex;
            core->counters[CRAB_C_HANDLER_SENT]++;
            b->kept++;
        } else {
            core->counters[h->verdict == CRAB_HANDLED_KEPT ? CRAB_C_HANDLER_KEPT : CRAB_C_DROP_HANDLER]++;
        }
    }
}
