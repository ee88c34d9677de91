/* SPDX-License-Identifier: MIT */
/* Between the passes: have policies choose for the connections that are to be redirected. */
#include <time.h>

#include "batch.h"

void crab_core_ask(struct crab_core *core, void (*choose)(void *context, struct crab_choice *choices, uint32_t n),
                   void *context)
{
    core->choose = choose;
    core->context = context;
}

/* Connections of a batch for which a policy has to choose, in its order. */
struct asking {
    uint32_t count;
    struct crab_item *of[CRAB_BATCH];
};

/* It goes where its policy says. */
static inline void choose(struct crab_item *it)
{
    it->by_table = it->slot;
    it->slot = &it->chosen;
}

/* Those of one pool. */
static void ask_pool(const struct crab_batch *b, struct crab_pool *pool, struct asking *asking)
{
    uint16_t members[CRAB_BATCH];
    pool->policy->pick(pool, &b->core->random, members, asking->count);
    for (uint32_t i = 0; i < asking->count; i++) {
        struct crab_item *it = asking->of[i];
        it->member = members[i];
        it->chosen = pool->members[members[i]].backend;
        if (crab_likely(crab_usable(b->s, it->service, it->chosen)))
            choose(it);
        else
            crab_unassign(pool, members[i]);
    }
    asking->count = 0;
}

/* Those of all services whose policy is a function's. */
static void ask_function(const struct crab_batch *b, const struct asking *asking)
{
    struct crab_choice choices[CRAB_BATCH];
    struct timespec clock;
    clock_gettime(CLOCK_MONOTONIC, &clock);
    uint64_t arrival = (uint64_t)clock.tv_sec * 1000000000u + (uint64_t)clock.tv_nsec;
    for (uint32_t i = 0; i < asking->count; i++) {
        const struct crab_item *it = asking->of[i];
        const struct crab_packet *p = &it->packet;
        const uint8_t *frame = b->frames[it - b->items].data, *ip = frame + p->l3, *tcp = frame + p->l4;
        struct crab_choice *c = &choices[i];
        *c = (struct crab_choice){.cport_be = load16(tcp), .vport_be = load16(tcp + 2), .service = it->service->index,
                                  .hash = it->hash, .arrival = arrival, .isn_be = load32(tcp + CRAB_TCP_SEQ),
                                  .backend = CRAB_NO_BACKEND};
        memcpy(c->vip, it->service->addr, 16);
        if (p->family == 4) {
            memcpy(c->client, crab_mapped_prefix, 12);
            memcpy(c->client + 12, ip + CRAB_IP4_SRC, 4);
        } else {
            memcpy(c->client, ip + CRAB_IP6_SRC, 16);
        }
    }
    b->core->choose(b->core->context, choices, asking->count);
    for (uint32_t i = 0; i < asking->count; i++) {
        struct crab_item *it = asking->of[i];
        if (!crab_usable(b->s, it->service, choices[i].backend))
            continue;
        it->chosen = choices[i].backend;
        choose(it);
    }
}

/* As many at once as follow each other to one service. */
void crab_batch_ask(const struct crab_batch *b)
{
    struct asking pooled, custom, *whom = NULL;
    const struct crab_service *service = NULL;
    pooled.count = custom.count = 0;
    for (uint32_t i = 0; i < b->count; i++) {
        struct crab_item *it = &b->items[i];
        if (it->kind < CRAB_KIND_SYN4 || it->kind > CRAB_KIND_TAGGED_SYN)
            continue;
        if (crab_unlikely(it->service != service)) {
            if (pooled.count)
                ask_pool(b, service->pool, &pooled);
            service = it->service;
            whom = service->custom && b->core->choose ? &custom
                   : service->pool && service->pool->count ? &pooled : NULL;
        }
        if (!whom || crab_unlikely(!it->room))
            continue;
        if (crab_unlikely(crab_flows_find(it->bucket, it->hash, b->now) != NULL)) {
            uint32_t isn = load32(b->frames[i].data + it->packet.l4 + CRAB_TCP_SEQ);
            if (crab_keeps(b->s, service, crab_flows_of_syn(crab_flows_entries(it->bucket, it->hash, b->now), isn)))
                continue;
        }
        whom->of[whom->count++] = it;
    }
    if (pooled.count)
        ask_pool(b, service->pool, &pooled);
    if (custom.count)
        ask_function(b, &custom);
}
