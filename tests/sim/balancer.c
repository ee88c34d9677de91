/* SPDX-License-Identifier: MIT */
#include "balancer.h"

#include <stdio.h>
#include <stdlib.h>

static void *must(void *p)
{
    if (!p) {
        fprintf(stderr, "sim: no memory\n");
        exit(2);
    }
    return p;
}

static bool is_v6(uint32_t id)
{
    return id >= SIM_BACKENDS / 2;
}

static const uint8_t *address_of(const struct balancer *b, uint32_t id)
{
    return b->setting->dip[is_v6(id)][id % (SIM_BACKENDS / 2)];
}

void balancer_init(struct balancer *b, struct setting *setting, const uint8_t mac[6], uint32_t number, uint32_t seed)
{
    *b = (struct balancer){.setting = setting, .mtu = 1500, .seed = seed, .up = true};
    memcpy(b->mac, mac, 6);
    memcpy(b->addr[0], "\0\0\0\0\0\0\0\0\0\0\xff\xff\x0a\0\0", 15);
    memcpy(b->addr[1], "\xfd", 1);
    b->addr[0][15] = b->addr[1][15] = (uint8_t)(2 + number);
    for (uint32_t i = 0; i < SIM_BACKENDS; i++)
        b->view[i] = (struct backend_view){.weight = 1, .member = true, .resolved = true};
    struct xdp *x = &b->xdp;
    uint64_t own = 0;
    memcpy(&own, mac, 6);
    for (int i = 0; i < CRAB_MAX_MACS; i++)
        x->macs.list[i] = own;
    x->interface = (struct crab_queues){0, SIM_QUEUES};
    x->buckets = setting->flows;
    x->flows = must(calloc(x->buckets, sizeof *x->flows));
    memcpy(x->hashing.key, setting->key, 16);
    x->hashing.mask = x->buckets - 1;
    x->kinds = CRAB_VIP_ECHO | CRAB_VIP_CLOSED;
    x->services = setting->services;
    for (uint32_t n = 0; n < x->services; n++) {
        x->vip[n] = (struct crab_vip){.port = setting->service[n].port_be, .proto = 6};
        memcpy(x->vip[n].addr, setting->service[n].addr, 16);
        x->index[n] = n;
    }
    b->table = must(crab_table_new(x->flows, x->buckets));
}

static bool usable(const struct backend_view *v)
{
    return v->resolved && !v->dead;
}

/* Of a backend that is a member: what it gets of the service now. */
static uint32_t share(const struct backend_view *v)
{
    return v->resolved && !v->dead && !v->drain ? v->weight : 0;
}

static void publish_paths(struct balancer *b)
{
    for (uint32_t id = 0; id < SIM_BACKENDS; id++) {
        struct crab_path *p = &b->xdp.paths[id];
        *p = (struct crab_path){0};
        memcpy(p->addr, address_of(b, id), 16);
        if (id % (SIM_BACKENDS / 2) >= b->setting->backends || !usable(&b->view[id]))
            continue;
        memcpy(p->macs, b->setting->mac[id % (SIM_BACKENDS / 2)], 6);
        memcpy(p->macs + 6, b->mac, 6);
        memcpy(p->tunnel_src, b->addr[is_v6(id)], 16);
        p->mtu = b->mtu;
        p->ifindex = sim_interface(b->setting, id);
        p->v6 = is_v6(id);
        p->tx = p->redirect = !(b->setting->apart && id % (SIM_BACKENDS / 2) % 3 == 2);
        p->partial = CRAB_PARTIAL_FINISH;
    }
}

void balancer_publish(struct balancer *b)
{
    const struct setting *setting = b->setting;
    struct crab_backend backends[SIM_BACKENDS] = {0};
    struct crab_service services[SIM_SERVICES] = {0};
    struct crab_pool *before[SIM_SERVICES];
    memcpy(before, b->pools, sizeof before);
    for (uint32_t id = 0; id < SIM_BACKENDS; id++) {
        const struct backend_view *v = &b->view[id];
        struct crab_backend *to = &backends[id];
        if (id % (SIM_BACKENDS / 2) >= setting->backends)
            continue;
        memcpy(to->addr, address_of(b, id), 16);
        to->flags = CRAB_BACKEND_CR | (is_v6(id) ? CRAB_BACKEND_V6 : 0) | (v->dead ? CRAB_BACKEND_DEAD : 0);
        if (v->resolved)
            to->flags |= CRAB_BACKEND_USABLE | CRAB_BACKEND_ON_LINK;
        memcpy(to->dst_mac, setting->mac[id % (SIM_BACKENDS / 2)], 6);
        memcpy(to->src_mac, b->mac, 6);
        memcpy(to->tunnel_src, b->addr[is_v6(id)], 16);
        to->mtu = b->mtu;
        to->ifindex = sim_interface(setting, id);
    }
    b->members = 14695981039346656037ull;
    for (uint32_t n = 0; n < setting->services; n++) {
        const struct service_setting *from = &setting->service[n];
        uint32_t first = crab_is_mapped(from->addr) ? 0 : SIM_BACKENDS / 2, count = 0, eligible = 0;
        struct crab_table_member members[SIM_BACKENDS];
        struct crab_member pooled[SIM_BACKENDS];
        for (uint32_t id = first; id < first + setting->backends; id++) {
            const struct backend_view *v = &b->view[id];
            if (!v->member)
                continue;
            members[count] = (struct crab_table_member){.weight = share(v), .full = v->weight, .backend = (uint16_t)id};
            memcpy(members[count++].addr, address_of(b, id), 16);
            b->members = (b->members ^ (id << 16 | share(v) << 8 | v->weight)) * 1099511628211ull;
            if (share(v))
                pooled[eligible++] = (struct crab_member){.backend = (uint16_t)id, .weight = v->weight,
                                                          .load = &b->loads[n][id]};
        }
        if (crab_maglev_build(b->tables[n], SIM_SLOTS, members, count, setting->key))
            must(NULL);
        b->pools[n] = from->policy ? must(crab_pool_new(from->policy, pooled, eligible, &b->turns[n])) : NULL;
        services[n] = (struct crab_service){.port_be = from->port_be, .protocol = 6, .mode = from->mode,
                                            .fallback = from->fallback, .on_dead = from->on_dead, .table = b->tables[n],
                                            .pool = b->pools[n], .index = n};
        memcpy(services[n].addr, from->addr, 16);
    }
    struct crab_snapshot *old = b->snapshot;
    b->snapshot = must(crab_snapshot_new(services, setting->services, backends, SIM_BACKENDS, NULL, 0, NULL, 0, SIM_SLOTS,
                                         CRAB_FORM_CRAB, setting->key));
    struct crab_address vips[SIM_SERVICES];
    for (uint32_t n = 0; n < setting->services; n++)
        memcpy(vips[n].addr, setting->service[n].addr, 16);
    if (crab_snapshot_answer(b->snapshot, vips, setting->services, true, true))
        must(NULL);
    for (int q = 0; q < SIM_QUEUES; q++)
        if (b->cores[q])
            crab_core_publish(b->cores[q], b->snapshot);
    crab_snapshot_free(old);
    for (uint32_t n = 0; n < setting->services; n++)
        crab_pool_free(before[n]);
    publish_paths(b);
}

void balancer_limit(struct balancer *b, bool anew)
{
    uint32_t r = b->setting->syn_rate;
    struct crab_rate rate = {0};
    if (r)
        rate = (struct crab_rate){.token_ns = 1000000000u / r, .burst = r / 10 > 16 ? r / 10 : 16};
    for (uint32_t n = 0; n < b->setting->services; n++)
        if (anew || memcmp(&b->xdp.limits[n].rate, &rate, sizeof rate))
            b->xdp.limits[n] = (struct crab_limit){.rate = rate};
}

static struct crab_core *new_core(struct balancer *b, int q)
{
    struct crab_core *core = must(crab_core_new(b->setting->cache, b->counters[q]));
    core->random = b->seed = b->seed * 1664525u + 1013904223u;
    crab_core_learn(core, b->table);
    crab_core_join(core, b->joins);
    crab_core_put_off(core);
    return core;
}

/* Its sets are found by a random key. */
static struct crab_joins *new_joins(struct balancer *b)
{
    struct crab_joins *joins = must(crab_joins_new(b->setting->tokens));
    uint8_t key[16] = {(uint8_t)b->seed, (uint8_t)(b->seed >> 8), (uint8_t)(b->seed >> 16)};
    joins->hash_init = crab_sip_init(key);
    return joins;
}

void balancer_start(struct balancer *b, uint32_t now)
{
    struct crab_flow *known = must(calloc(b->xdp.buckets * CRAB_BUCKET, sizeof *known));
    uint32_t n = 0;
    for (uint32_t i = 0; i < b->xdp.buckets * CRAB_BUCKET; i++) {
        struct crab_flow *f = &b->xdp.flows[i / CRAB_BUCKET].flows[i % CRAB_BUCKET];
        if (f->hash)
            known[n++] = *f;
    }
    b->joins = new_joins(b);
    for (int q = 0; q < SIM_QUEUES; q++) {
        b->cores[q] = new_core(b, q);
        crab_core_adopt(b->cores[q], known, n, now);
        b->xdp.sockets[q] = true;
    }
    free(known);
    b->up = b->serving = true;
    balancer_limit(b, true);
    balancer_publish(b);
}

void balancer_kill(struct balancer *b)
{
    for (int q = 0; q < SIM_QUEUES; q++) {
        crab_core_free(b->cores[q]);
        b->cores[q] = NULL;
        b->xdp.sockets[q] = false;
    }
    crab_joins_free(b->joins);
    b->joins = NULL;
    b->serving = false;
    b->pending++;
}

void balancer_lose(struct balancer *b)
{
    if (b->serving)
        balancer_kill(b);
    memset(b->xdp.flows, 0, b->xdp.buckets * sizeof *b->xdp.flows);
    b->up = false;
    b->memory++;
}

void balancer_take_over(struct balancer *b, void (*meanwhile)(void *context), void *context)
{
    struct crab_core *next[SIM_QUEUES];
    uint64_t *touched[SIM_QUEUES], bytes;
    struct crab_joins *before = b->joins;
    b->joins = new_joins(b);
    uint8_t *tokens = must(malloc(crab_joins_size(before)));
    for (int q = 0; q < SIM_QUEUES; q++) {
        next[q] = new_core(b, q);
        uint8_t *from = crab_core_flows(b->cores[q], &bytes), *to = crab_core_flows(next[q], &bytes);
        touched[q] = must(calloc(bytes / CRAB_PART / 64 + 1, sizeof **touched));
        crab_core_note(b->cores[q], touched[q]);
        memcpy(to, from, bytes);
    }
    meanwhile(context);
    crab_joins_give(before, tokens);
    crab_joins_take(b->joins, tokens);
    free(tokens);
    for (int q = 0; q < SIM_QUEUES; q++) {
        crab_core_note(b->cores[q], NULL);
        crab_flows_renew(crab_core_flows(next[q], &bytes), crab_core_flows(b->cores[q], &bytes), touched[q], bytes);
        free(touched[q]);
        crab_core_free(b->cores[q]);
        b->cores[q] = next[q];
    }
    crab_joins_free(before);
    balancer_limit(b, true);
    balancer_publish(b);
}

/* Flows that it knows, by backend, in caches and in the table. */
static void count_flows(struct balancer *b, uint32_t counts[SIM_BACKENDS], uint32_t now)
{
    memset(counts, 0, SIM_BACKENDS * sizeof *counts);
    for (int q = 0; q < SIM_QUEUES; q++)
        if (b->cores[q])
            crab_core_count(b->cores[q], counts, SIM_BACKENDS, now, false);
    for (uint32_t i = 0; i < b->xdp.buckets * CRAB_BUCKET; i++) {
        const struct crab_flow *f = &b->xdp.flows[i / CRAB_BUCKET].flows[i % CRAB_BUCKET];
        if (f->hash && crab_table_age(f, now) <= CRAB_AGE_OPEN)
            counts[f->backend]++;
    }
}

void balancer_sweep(struct balancer *b, uint32_t now)
{
    static bool backends[65536], services[65536];
    uint32_t counts[SIM_BACKENDS];
    count_flows(b, counts, now);
    for (uint32_t i = 0; i < SIM_BACKENDS; i++) {
        backends[i] = b->view[i].member || counts[i];
        b->swept[i] += !backends[i];
    }
    for (uint32_t n = 0; n < b->setting->services; n++)
        services[n] = true;
    crab_joins_keep(b->joins, backends, services);
}

uint32_t balancer_remembers(struct balancer *b, uint32_t now)
{
    uint32_t counts[SIM_BACKENDS], sum = 0;
    count_flows(b, counts, now);
    for (uint32_t i = 0; i < SIM_BACKENDS; i++)
        sum += counts[i];
    return sum;
}
