/* SPDX-License-Identifier: MIT */
/* Whole frames through the batch: rewriting, decisions, retransmissions, the flow cache. */
#include <pthread.h>

#include "check.h"
#include "flows.h"
#include "joins.h"
#include "packet.h"
#include "segment.h"
#include "table.h"

#define SIZE 251
static uint16_t table[SIZE];
static const uint8_t key[16] = {7};
static uint64_t counters[CRAB_COUNTERS];

static struct crab_service services[2] = {
    {.addr = {[10] = 0xff, [11] = 0xff, 10, 0, 0, 100}, .protocol = 6, .fallback = CRAB_FALLBACK_L2, .table = table},
    {.addr = {0xfd, [15] = 0x64}, .protocol = 6, .fallback = CRAB_FALLBACK_L2, .table = table},
};
static struct crab_backend backends[2] = {
    {.addr = {[10] = 0xff, [11] = 0xff, 10, 0, 0, 11}, .dst_mac = {2, 0, 0, 0, 0, 11}, .src_mac = {2, 0, 0, 0, 0, 2}},
    {.addr = {[10] = 0xff, [11] = 0xff, 10, 0, 0, 12}, .dst_mac = {2, 0, 0, 0, 0, 12}, .src_mac = {2, 0, 0, 0, 0, 2}},
};

static struct crab_snapshot *snapshot(uint32_t flags)
{
    struct crab_table_member m[2];
    for (uint16_t i = 0; i < 2; i++) {
        backends[i].flags = flags;
        backends[i].mtu = 1500;
        m[i] = (struct crab_table_member){.weight = 1, .backend = i};
        memcpy(m[i].addr, backends[i].addr, 16);
    }
    CHECK(crab_maglev_build(table, SIZE, m, 2, key) == 0);
    services[0].port_be = services[1].port_be = htons(80);
    return crab_snapshot_new(services, 2, backends, 2, NULL, 0, NULL, 0, SIZE, CRAB_FORM_CRAB, key);
}

static const uint8_t offer[24] = {2, 4, 5, 180, 4, 2, 8, 10, 1, 2, 3, 4, 0, 0, 0, 0, 1, 3, 3, 7, 42, 2, 1, 1};

/* Send one frame; returns the destination's last MAC byte, or 0 if it is dropped; checks both checksums. */
static uint8_t send_data(struct crab_core *core, int family, uint16_t sport, uint8_t flags, uint32_t seq, size_t options,
                         size_t payload, uint32_t now)
{
    uint8_t *memory;
    struct crab_frame f = make(&memory, family, sport, flags, seq, offer, options, payload);
    uint8_t to = 0;
    if (crab_core_batch(core, &f, 1, now)) {
        uint16_t right;
        to = f.data[5];
        CHECK(family == 6 || crab_csum(f.data + 14, 20) == 0xffff);
        CHECK(crab_csum_state(f.data + 14, f.len - 14, &right) == CRAB_CSUM_OK);
    }
    free(memory);
    return to;
}

static uint8_t send_one(struct crab_core *core, int family, uint16_t sport, uint8_t flags, uint32_t seq, size_t options,
                        uint32_t now)
{
    return send_data(core, family, sport, flags, seq, options, 0, now);
}

struct storm {
    struct crab_core *core;
    _Atomic int stop;
    uint64_t sent;
};

static void *storm(void *arg)
{
    struct storm *s = arg;
    for (uint16_t port = 1; !s->stop; port++)
        s->sent += send_one(s->core, 4, port, CRAB_SYN, port, 24, 1) != 0;
    return NULL;
}

/* Whoever makes up MPTCP's keys has so many hashed a second, and no more. */
static void many_keys(struct crab_snapshot *s)
{
    struct crab_core *core = crab_core_new(64, counters);
    crab_core_publish(core, s);
    for (uint32_t second = 0; second < 2; second++) {
        struct crab_joins *joins = crab_joins_new(1 << 18);
        uint32_t known = 0;
        crab_core_join(core, joins);
        for (uint32_t i = 0; i < 60000; i++) {
            uint8_t *memory, keys[20] = {30, 20, 1, 1, [12] = (uint8_t)second};
            memcpy(keys + 16, &i, 4);
            struct crab_frame f = make(&memory, 4, 1, CRAB_ACK, 1, keys, sizeof keys, 0);
            CHECK(crab_core_batch(core, &f, 1, 100 + second) == 1);
            known += crab_joins_find(joins, crab_token(keys + 12), 0) < 2;
            free(memory);
        }
        CHECK(known == 50000);
        crab_core_join(core, NULL);
        crab_joins_free(joins);
    }
    crab_core_free(core);
}

static struct crab_snapshot *lead_to(struct crab_core *core, uint16_t backend, struct crab_snapshot *old)
{
    for (int i = 0; i < SIZE; i++)
        table[i] = backend;
    struct crab_snapshot *s = crab_snapshot_new(services, 2, backends, 2, NULL, 0, NULL, 0, SIZE, CRAB_FORM_CRAB, key);
    crab_core_publish(core, s);
    crab_snapshot_free(old);
    return s;
}

/* Somebody sends SYNs in a client's name between its own and its acknowledgement, when new connections go to another backend. */
static void forged_in_a_handshake(void)
{
    for (uint32_t forged = 0; forged < 4; forged++)
        for (uint32_t offered = 0; offered < 2; offered++) {
            struct crab_core *core = crab_core_new(64, counters);
            struct crab_snapshot *s = lead_to(core, 0, NULL);
            CHECK(send_one(core, 4, 900, CRAB_SYN, 5, 20, 100) == 11);
            s = lead_to(core, 1, s);
            for (uint32_t i = 0; i < forged; i++)
                CHECK(send_one(core, 4, 900, CRAB_SYN, 0x40000000 * (i + 1), offered ? 24 : 20, 100) == 12);
            CHECK(send_one(core, 4, 900, CRAB_SYN, 5, 20, 101) == 11); /* a copy goes where the first one went */
            CHECK(send_one(core, 4, 900, CRAB_ACK, 6, 0, 101) == 11);
            for (uint32_t i = 0; i < forged; i++)
                CHECK(send_one(core, 4, 900, CRAB_SYN, 0x40000000 * (i + 1), offered ? 24 : 20, 101) == 12);
            CHECK(send_one(core, 4, 900, CRAB_ACK, 7, 0, 102) == 11);
            /* The client's own new connection is one. */
            CHECK(send_one(core, 4, 900, CRAB_SYN, 0x30000000, 20, 103) == 12);
            CHECK(send_one(core, 4, 900, CRAB_ACK, 7, 0, 103) == 11);
            CHECK(send_one(core, 4, 900, CRAB_ACK, 0x30000001, 0, 103) == 12);
            CHECK(send_one(core, 4, 900, CRAB_ACK, 7, 0, 104) == 12);
            crab_core_free(core);
            crab_snapshot_free(s);
        }
}

/* A client that uses its port again and again pushes nobody's SYN out, whose bucket has room for both. */
static void one_port_again_and_again(void)
{
    struct crab_core *core = crab_core_new(64, counters);
    struct crab_snapshot *s = lead_to(core, 0, NULL);
    const uint8_t client[16] = {[10] = 0xff, [11] = 0xff, 10, 0, 0, 1};
    uint16_t port = 2000, other = 2001;
#define BUCKET(p) (crab_flow_hash(key, client, services[0].addr, htons(p), htons(80)) & 15)
    while (BUCKET(port) != BUCKET(other))
        other++;
    CHECK(send_one(core, 4, port, CRAB_SYN, 5, 20, 100) == 11);
    for (uint32_t i = 0; i < 20; i++) {
        CHECK(send_one(core, 4, other, CRAB_SYN, i << 20, 20, 100) == 11);
        CHECK(send_one(core, 4, other, CRAB_ACK, (i << 20) + 1, 0, 100) == 11);
    }
    s = lead_to(core, 1, s);
    CHECK(send_one(core, 4, port, CRAB_SYN, 5, 20, 101) == 11);
    crab_core_free(core);
    crab_snapshot_free(s);
}

/* Have a core remember as many connections as it has room for. */
static void fill(struct crab_core *core)
{
    for (uint16_t port = 1; port <= 2000; port++) {
        send_one(core, 4, port, CRAB_SYN, 5, 20, 100);
        send_one(core, 4, port, CRAB_ACK, 6, 0, 100);
    }
}

/* Where there is no room to remember SYNs, the second copy of one that offers again goes by fallback at the latest. */
static void redirected_without_room(void)
{
    for (uint32_t first = 100; first < 102; first++) {
        struct crab_core *core = crab_core_new(64, counters);
        struct crab_snapshot *s = lead_to(core, 0, NULL);
        fill(core);
        memset(counters, 0, sizeof counters);
        CHECK(send_one(core, 4, 3000, CRAB_SYN, 5, 24, first) == 11);
        CHECK(send_one(core, 4, 3000, CRAB_SYN, 5, 24, first + 1) == 11);
        CHECK(counters[CRAB_C_FLOWS_FULL] == 2);
        CHECK(counters[CRAB_C_REDIRECTED] == 1 && counters[CRAB_C_FALLBACK_RETRANSMIT] == 1);
        crab_core_free(core);
        crab_snapshot_free(s);
    }
}

/* Nor is remembered whom a policy chose: what goes by fallback goes where its client's next packet will. */
static void chosen_without_room(void)
{
    struct crab_load load = {0};
    struct crab_turn turn = {0};
    struct crab_member second = {.backend = 1, .weight = 1, .load = &load};
    struct crab_core *core = crab_core_new(64, counters);
    struct crab_snapshot *s = lead_to(core, 0, NULL);
    fill(core);
    services[0].pool = crab_pool_new("round-robin", &second, 1, &turn);
    s = lead_to(core, 0, s);
    memset(counters, 0, sizeof counters);
    CHECK(send_one(core, 4, 3000, CRAB_SYN, 5, 24, 100) == 12 && load.assigned == 1);
    CHECK(send_one(core, 4, 3000, CRAB_SYN, 5, 24, 101) == 11 && load.assigned == 1);
    CHECK(send_one(core, 4, 3000, CRAB_ACK, 6, 0, 101) == 11);
    CHECK(counters[CRAB_C_REDIRECTED] == 1 && counters[CRAB_C_FALLBACK_RETRANSMIT] == 1);
    crab_core_free(core);
    crab_snapshot_free(s);
    crab_pool_free(services[0].pool);
    services[0].pool = NULL;
}

/* What a SYN carries, its backend may have acted on: without a next hop for the moment that one keeps it, in whatever form its
 * copies come, for as long as they come.  Those of a dead one are reset, or go to another, which keeps them likewise. */
static void data_in_a_syn(int family, size_t options, uint8_t mode)
{
    const uint32_t all = backends[0].flags, lost = all & ~(uint32_t)CRAB_BACKEND_USABLE, dead = all | CRAB_BACKEND_DEAD;
    struct crab_core *core = crab_core_new(64, counters);
    services[family == 6].mode = mode;
    backends[0].flags = backends[1].flags = all | (family == 6 ? CRAB_BACKEND_V6 : 0);
    struct crab_snapshot *s = lead_to(core, 0, NULL);
    memset(counters, 0, sizeof counters);
    CHECK(send_data(core, family, 900, CRAB_SYN, 5, 20, 100, 100) == 11);
    CHECK(send_one(core, family, 901, CRAB_SYN, 5, options, 100) == 11); /* without data */
    backends[0].flags = lost | (family == 6 ? CRAB_BACKEND_V6 : 0);
    services[family == 6].refuses = 1; /* but others could take it */
    s = lead_to(core, 1, s);
    CHECK(send_one(core, family, 901, CRAB_SYN, 5, options, 101) == 12);
    for (uint32_t i = 0; i < 6; i++)
        CHECK(send_one(core, family, 900, CRAB_SYN, 5, options, 101 + i * (CRAB_AGE_SYN - 2)) == 0);
    CHECK(send_data(core, family, 900, CRAB_SYN, 5, 20, 100, 110 + 5 * (CRAB_AGE_SYN - 2)) == 0);
    CHECK(counters[CRAB_C_DROP_NO_BACKEND] == 7);
    const uint32_t now = 120 + 5 * (CRAB_AGE_SYN - 2);
    CHECK(send_data(core, family, 900, CRAB_SYN, 6, 20, 100, now) == 12); /* a connection of its own */
    backends[0].flags = dead | (family == 6 ? CRAB_BACKEND_V6 : 0);
    services[family == 6].on_dead = CRAB_ON_DEAD_RESET;
    s = lead_to(core, 1, s);
    CHECK(send_one(core, family, 900, CRAB_SYN, 5, options, now) == 1 && counters[CRAB_C_RESET] == 1);
    services[family == 6].on_dead = CRAB_ON_DEAD_REASSIGN;
    s = lead_to(core, 1, s);
    CHECK(send_one(core, family, 900, CRAB_SYN, 5, options, now) == 12);
    backends[0].flags = all | (family == 6 ? CRAB_BACKEND_V6 : 0);
    backends[1].flags = lost | (family == 6 ? CRAB_BACKEND_V6 : 0);
    s = lead_to(core, 0, s);
    CHECK(send_one(core, family, 900, CRAB_SYN, 5, options, now) == 0);
    backends[1].flags = backends[0].flags;
    s = lead_to(core, 0, s);
    CHECK(send_one(core, family, 900, CRAB_SYN, 5, options, now) == 12);
    CHECK(counters[CRAB_C_REDIRECTED] <= 2); /* of the one without data */
    services[family == 6].refuses = 0;
    services[family == 6].mode = CRAB_MODE_NEGOTIATED;
    backends[0].flags = backends[1].flags = all;
    crab_core_free(core);
    crab_snapshot_free(s);
}

/* Nor is a SYN with data sent to anybody where there is no room to remember to whom: its copy has none. */
static void data_without_room(void)
{
    struct crab_core *core = crab_core_new(64, counters);
    struct crab_snapshot *s = lead_to(core, 0, NULL);
    fill(core);
    memset(counters, 0, sizeof counters);
    CHECK(send_data(core, 4, 3000, CRAB_SYN, 5, 20, 100, 100) == 0);
    CHECK(counters[CRAB_C_FLOWS_FULL] == 1 && counters[CRAB_C_DROP_NO_BACKEND] == 1);
    CHECK(send_one(core, 4, 3000, CRAB_SYN, 5, 20, 101) == 11);
    crab_core_free(core);
    crab_snapshot_free(s);
}

/* SYNs of one four-tuple in one batch.  Copies go where the first one goes, and count once for the policy; others have what they
 * are given themselves, as if they had come one after the other.  Of one that is known when the policy is asked, and whose
 * place another SYN takes within the batch, the table decides. */
static void one_four_tuple_in_a_batch(void)
{
    struct crab_load loads[2] = {{0}};
    struct crab_turn turn = {0};
    struct crab_member members[2] = {{.backend = 0, .weight = 1, .load = &loads[0]},
                                     {.backend = 1, .weight = 1, .load = &loads[1]}};
    const uint32_t first[][2] = {{CRAB_SYN, 5}, {CRAB_SYN, 5}, {CRAB_SYN, 0x40000000}, {CRAB_SYN, 5}, {CRAB_SYN, 0x40000000}};
    const uint32_t then[][2] = {{CRAB_SYN, 0x20000000}, {CRAB_SYN, 0x40000000}, {CRAB_ACK, 6}, {CRAB_SYN, 5}};
    struct crab_core *core = crab_core_new(64, counters);
    services[0].pool = crab_pool_new("round-robin", members, 2, &turn);
    struct crab_snapshot *s = lead_to(core, 0, NULL);
    uint8_t *memory[5], to[2][5] = {{0}};
    for (uint32_t b = 0; b < 2; b++) {
        struct crab_frame frames[5];
        uint32_t n = b ? 4 : 5;
        for (uint32_t i = 0; i < n; i++)
            frames[i] = make(&memory[i], 4, 900, (uint8_t)(b ? then : first)[i][0], (b ? then : first)[i][1], offer, 24, 0);
        CHECK(crab_core_batch(core, frames, n, 100) == n);
        for (uint32_t i = 0; i < n; i++) {
            to[b][i] = frames[i].data[5];
            free(memory[i]);
        }
        if (b)
            break;
        CHECK(to[0][1] == to[0][0] && to[0][3] == to[0][0] && to[0][4] == to[0][2]);
        CHECK(loads[0].assigned + loads[1].assigned == 2);
        CHECK(loads[to[0][0] - 11].assigned && loads[to[0][2] - 11].assigned);
        s = lead_to(core, to[0][2] == 11, s); /* the table's is another than the policy's was */
    }
    CHECK(to[1][1] == 11 + (to[0][2] == 11) && loads[0].assigned + loads[1].assigned == 3);
    CHECK(to[1][2] == to[0][0] && to[1][3] == to[0][0]); /* the client's own is not moved */
    crab_core_free(core);
    crab_snapshot_free(s);
    crab_pool_free(services[0].pool);
    services[0].pool = NULL;
}

/* A connection in frames with VLAN tags is written down for the next daemon, once a second. */
static void written_with_tags(void)
{
    static struct crab_bucket buckets[16];
    struct crab_table *flows = crab_table_new(buckets, 16);
    struct crab_core *core = crab_core_new(64, counters);
    struct crab_snapshot *s = lead_to(core, 0, NULL);
    const uint8_t client[16] = {[10] = 0xff, [11] = 0xff, 10, 0, 0, 1};
    struct crab_flow flow;
    crab_core_learn(core, flows);
    memset(counters, 0, sizeof counters);
    for (uint32_t i = 0; i < 4; i++) {
        uint8_t *memory;
        struct crab_frame f = make(&memory, 4, 900, i ? CRAB_ACK : CRAB_SYN, 5 + !!i, offer, 0, 0);
        memmove(f.data - 4, f.data, 12);
        memcpy(f.data + 8, "\x81\0\0\5", 4);
        f.data -= 4;
        f.len += 4;
        CHECK(crab_core_batch(core, &f, 1, 100 + i / 3) == 1 && f.data[5] == 11 && !memcmp(f.data + 12, "\x81\0\0\5", 4));
        free(memory);
    }
    CHECK(crab_table_get(flows, crab_flow_hash(key, client, services[0].addr, htons(900), htons(80)), 101, &flow));
    CHECK(flow.backend == 0 && flow.state == CRAB_FLOW_OPEN && flow.seen == 101 && counters[CRAB_C_LEARNED] == 2);
    crab_core_free(core);
    crab_snapshot_free(s);
    crab_table_free(flows);
}

int main(void)
{
    const uint32_t all = CRAB_BACKEND_USABLE | CRAB_BACKEND_CR | CRAB_BACKEND_ON_LINK;
    struct crab_core *core = crab_core_new(4096, counters);
    struct crab_snapshot *s = snapshot(all), *old;

    /* Before the first snapshot nothing is anyone's. */
    CHECK(send_one(core, 4, 1, CRAB_SYN, 1, 24, 0) == 0 && counters[CRAB_C_DROP_NOT_SERVICE] == 1);
    crab_core_publish(core, s);

    /* The redirect, byte for byte. */
    for (int family = 4; family <= 6; family += 2) {
        uint8_t *memory;
        struct crab_frame f = make(&memory, family, 40000, CRAB_SYN, 9, offer, 24, 0);
        size_t l4 = family == 4 ? 34 : 54, growth = family == 4 ? 4 : 16;
        old = s;
        crab_core_publish(core, s = snapshot(family == 6 ? all | CRAB_BACKEND_V6 : all));
        crab_snapshot_free(old);
        CHECK(crab_core_batch(core, &f, 1, 100) == 1);
        CHECK(f.len == l4 + 20 + 24 + growth);
        CHECK(!memcmp(f.data, backends[f.data[5] - 11].dst_mac, 12));
        uint8_t *ip = f.data + 14;
        CHECK(!memcmp(family == 4 ? ip + 16 : ip + 24, backends[f.data[5] - 11].addr + (family == 4 ? 12 : 0),
                      family == 4 ? 4 : 16));
        CHECK_BYTES(f.data + l4 + 20, offer, 20);
        CHECK(f.data[l4 + 40] == 42 && f.data[l4 + 41] == (family == 4 ? 6 : 18));
        CHECK(!memcmp(f.data + l4 + 42, services[family == 6].addr + (family == 4 ? 12 : 0), family == 4 ? 4 : 16));
        uint16_t right;
        CHECK(crab_csum_state(ip, f.len - 14, &right) == CRAB_CSUM_OK);
        CHECK(family == 6 || crab_csum(ip, 20) == 0xffff);
        free(memory);
    }
    CHECK(counters[CRAB_C_REDIRECTED] == 2);
    old = s;
    crab_core_publish(core, s = snapshot(all));
    crab_snapshot_free(old);

    /* One connection's SYNs go to one backend: twice by redirect, then by fallback. */
    uint8_t to = send_one(core, 4, 50000, CRAB_SYN, 5, 24, 100);
    CHECK(to >= 11);
    CHECK(send_one(core, 4, 50000, CRAB_SYN, 5, 24, 101) == to && counters[CRAB_C_REDIRECTED] == 4);
    CHECK(send_one(core, 4, 50000, CRAB_SYN, 5, 24, 103) == to && counters[CRAB_C_FALLBACK_RETRANSMIT] == 1);
    CHECK(send_one(core, 4, 50000, CRAB_SYN, 5, 24, 107) == to && counters[CRAB_C_FALLBACK_RETRANSMIT] == 2);
    CHECK(counters[CRAB_C_RETRANSMITTED_SYN] == 3);
    /* An established flow's port, taken by a new connection: its copies are counted as any other's. */
    to = send_one(core, 4, 50003, CRAB_SYN, 6, 20, 100);
    CHECK(to >= 11 && send_one(core, 4, 50003, CRAB_ACK, 7, 0, 100) == to);
    for (uint32_t copy = 0; copy < 4; copy++)
        CHECK(send_one(core, 4, 50003, CRAB_SYN, 70, 24, 101 + copy) == to);
    CHECK(counters[CRAB_C_REDIRECTED] == 6 && counters[CRAB_C_FALLBACK_RETRANSMIT] == 4);
    CHECK(counters[CRAB_C_RETRANSMITTED_SYN] == 6);
    memset(counters, 0, sizeof counters);

    /* without the offer: by fallback at once; its packets follow it */
    CHECK(send_one(core, 4, 50001, CRAB_SYN, 5, 20, 100) >= 11 && counters[CRAB_C_FALLBACK_NO_OFFER] == 1);
    to = send_one(core, 4, 50001, CRAB_ACK, 6, 0, 100);
    CHECK(to >= 11 && counters[CRAB_C_FALLBACK_ESTABLISHED] == 1);

    /* An established flow outlives its hash: another table, the same backend, for as long as it may be idle. */
    old = s;
    uint16_t held = to - 11;
    for (int i = 0; i < SIZE; i++)
        table[i] = !held;
    crab_core_publish(core, s = crab_snapshot_new(services, 2, backends, 2, NULL, 0, NULL, 0, SIZE, CRAB_FORM_CRAB, key));
    CHECK(!crab_core_uses(core, old) && crab_core_uses(core, s));
    crab_snapshot_free(old);
    CHECK(send_one(core, 4, 50001, CRAB_ACK, 6, 0, 7000) == to);
    CHECK(send_one(core, 4, 50001, CRAB_FIN | CRAB_ACK, 6, 0, 7002) == to);
    CHECK(send_one(core, 4, 50001, CRAB_ACK, 6, 0, 7300) == to); /* closing: it gives way, but nobody wants its place */
    CHECK(send_one(core, 4, 50001, CRAB_ACK, 6, 0, 7300 + CRAB_AGE_OPEN) == (held ? 11 : 12)); /* forgotten */
    /* a new connection of the same four-tuple, after a SYN that was never answered, is a new decision */
    CHECK(send_one(core, 4, 50000, CRAB_SYN, 6, 24, 110) == (held ? 11 : 12));

    /* Reasons. */
    CHECK(send_one(core, 4, 1000, CRAB_SYN | CRAB_ACK, 1, 24, 100) == 0 && counters[CRAB_C_DROP_FLAGS] == 1);
    CHECK(send_one(core, 4, 1000, CRAB_SYN | CRAB_RST, 1, 24, 100) == 0 && counters[CRAB_C_DROP_FLAGS] == 2);
    CHECK(send_one(core, 4, 1000, CRAB_SYN | CRAB_FIN, 1, 24, 100) == 0 && counters[CRAB_C_DROP_FLAGS] == 3);
    for (int at = 0; at < 2; at++) {
        uint8_t *memory;
        struct crab_frame f = make(&memory, 4, 1001, CRAB_SYN, 1, offer, 24, 0);
        f.data[at ? 22 : 39] ^= 1; /* TTL under the header's checksum; sequence number under TCP's */
        CHECK(crab_core_batch(core, &f, 1, 100) == 0 && counters[CRAB_C_DROP_CHECKSUM] == (uint64_t)at + 1);
        free(memory);
    }

    const struct {
        uint32_t flags;
        uint8_t mode;
        enum crab_counter offered, plain;
    } modes[] = {
        {all, CRAB_MODE_NEVER, CRAB_C_FALLBACK_MODE, CRAB_C_FALLBACK_MODE},
        {all, CRAB_MODE_ALWAYS, CRAB_C_REDIRECTED, CRAB_C_REDIRECTED},
        {all & ~CRAB_BACKEND_CR, CRAB_MODE_ALWAYS, CRAB_C_FALLBACK_NO_CR_BACKEND, CRAB_C_FALLBACK_NO_CR_BACKEND},
        {all & ~CRAB_BACKEND_ON_LINK, CRAB_MODE_NEGOTIATED, CRAB_C_REDIRECTED, CRAB_C_DROP_NO_PATH},
        {all & ~CRAB_BACKEND_USABLE, CRAB_MODE_NEGOTIATED, CRAB_C_DROP_NO_BACKEND, CRAB_C_DROP_NO_BACKEND},
    };
    for (uint16_t i = 0; i < sizeof modes / sizeof *modes; i++) {
        services[0].mode = modes[i].mode;
        old = s;
        crab_core_publish(core, s = snapshot(modes[i].flags));
        crab_snapshot_free(old);
        memset(counters, 0, sizeof counters);
        send_one(core, 4, 2000 + 2 * i, CRAB_SYN, 1, 24, 9000);
        CHECK(counters[modes[i].offered] == 1);
        send_one(core, 4, 2001 + 2 * i, CRAB_SYN, 1, 20, 9000);
        CHECK(counters[modes[i].plain] == (modes[i].plain == modes[i].offered ? 2 : 1));
    }

    /* A SYN's copies, in every mode: with an offer, without one, and with the offer withdrawn (as our client does). */
    const struct {
        uint8_t mode, options[4];
        enum crab_counter what[4];
    } copies[] = {
#define FOUR(a) {a, a, a, a}
        {CRAB_MODE_NEGOTIATED, FOUR(24),
         {CRAB_C_REDIRECTED, CRAB_C_REDIRECTED, CRAB_C_FALLBACK_RETRANSMIT, CRAB_C_FALLBACK_RETRANSMIT}},
        {CRAB_MODE_NEGOTIATED, {24, 20, 20, 20},
         {CRAB_C_REDIRECTED, CRAB_C_FALLBACK_NO_OFFER, CRAB_C_FALLBACK_NO_OFFER, CRAB_C_FALLBACK_NO_OFFER}},
        {CRAB_MODE_NEGOTIATED, FOUR(20), FOUR(CRAB_C_FALLBACK_NO_OFFER)},
        {CRAB_MODE_ALWAYS, FOUR(24),
         {CRAB_C_REDIRECTED, CRAB_C_REDIRECTED, CRAB_C_FALLBACK_RETRANSMIT, CRAB_C_FALLBACK_RETRANSMIT}},
        {CRAB_MODE_ALWAYS, {24, 20, 20, 20},
         {CRAB_C_REDIRECTED, CRAB_C_FALLBACK_NO_OFFER, CRAB_C_FALLBACK_RETRANSMIT, CRAB_C_FALLBACK_RETRANSMIT}},
        {CRAB_MODE_ALWAYS, FOUR(20),
         {CRAB_C_REDIRECTED, CRAB_C_REDIRECTED, CRAB_C_FALLBACK_RETRANSMIT, CRAB_C_FALLBACK_RETRANSMIT}},
        {CRAB_MODE_NEVER, FOUR(24), FOUR(CRAB_C_FALLBACK_MODE)},
    };
    old = s;
    crab_core_publish(core, s = snapshot(all));
    crab_snapshot_free(old);
    for (uint16_t i = 0; i < sizeof copies / sizeof *copies; i++) {
        services[0].mode = copies[i].mode;
        old = s;
        crab_core_publish(core, s = snapshot(all));
        crab_snapshot_free(old);
        uint8_t first = 0;
        for (uint16_t copy = 0; copy < 4; copy++) {
            memset(counters, 0, sizeof counters);
            uint8_t now_to = send_one(core, 4, 5000 + i, CRAB_SYN, 1, copies[i].options[copy], 9000 + (1u << copy));
            CHECK(counters[copies[i].what[copy]] == 1 && counters[CRAB_C_RETRANSMITTED_SYN] == (copy > 0));
            CHECK(now_to >= 11 && (!copy || now_to == first));
            first = now_to;
            for (int slot = 0; slot < SIZE; slot++) /* another table: its backend stays */
                table[slot] = first == 11;
        }
    }

    /* Data in a SYN: by fallback, byte for byte, and so are its copies without data: the server may have had them. */
    for (uint16_t mode = CRAB_MODE_NEGOTIATED; mode <= CRAB_MODE_NEVER; mode++) {
        uint8_t *memory, to_first;
        services[0].mode = (uint8_t)mode;
        old = s;
        crab_core_publish(core, s = snapshot(all));
        crab_snapshot_free(old);
        memset(counters, 0, sizeof counters);
        struct crab_frame f = make(&memory, 4, 6000 + mode, CRAB_SYN, 1, offer, 24, 5);
        CHECK(crab_core_batch(core, &f, 1, 9000) == 1);
        CHECK(counters[mode == CRAB_MODE_NEVER ? CRAB_C_FALLBACK_MODE : CRAB_C_FALLBACK_UNSAFE] == 1);
        CHECK(f.len == 34 + 40 + 5 && !memcmp(f.data + 30, "\x0a\0\0\x64", 4));
        CHECK_BYTES(f.data + 54, offer, 20);
        CHECK(f.data[74] == 1 && f.data[78] == 29);
        to_first = f.data[5];
        free(memory);
        CHECK(send_one(core, 4, 6000 + mode, CRAB_SYN, 1, 24, 9001) == to_first);
        CHECK(send_one(core, 4, 6000 + mode, CRAB_SYN, 1, 20, 9002) == to_first);
        CHECK(counters[CRAB_C_REDIRECTED] == 0 && counters[CRAB_C_RETRANSMITTED_SYN] == 2);
    }

    /* Encapsulation: to the largest packet that fits, and no byte outside of the headroom. */
    for (int family = 4; family <= 6; family += 2)
        for (int v6 = 0; v6 < 2; v6++)
            for (uint32_t over = 0; over < 2; over++) {
                uint32_t header = family == 4 ? 40 : 60, outer = v6 ? 40 : 20;
                uint8_t *memory;
                services[family == 6].fallback = CRAB_FALLBACK_IPIP;
                old = s;
                crab_core_publish(core, s = snapshot(v6 ? all | CRAB_BACKEND_V6 : all));
                crab_snapshot_free(old);
                memset(counters, 0, sizeof counters);
                struct crab_frame f = make(&memory, family, 5, CRAB_ACK, 1, offer, 0, 1500 - outer - header + over);
                f.data[20] = 0x40; /* IPv4: do not fragment */
                if (family == 4)
                    store16(f.data + 24, (uint16_t)(load16(f.data + 24) - 0x40));
                else
                    f.data[20] = 6;
                CHECK(crab_core_batch(core, &f, 1, 9000) == 1);
                if (!over) {
                    CHECK(counters[CRAB_C_ENCAPSULATED] == 1 && f.len == 14 + 1500);
                    CHECK(load16_be(f.data + 12) == (v6 ? 0x86dd : 0x0800));
                    CHECK(f.data[14 + (v6 ? 6 : 9)] == (family == 4 ? 4 : 41));
                } else {
                    CHECK(counters[CRAB_C_TOO_BIG] == 1 && load16_be(f.data + 12) == (family == 4 ? 0x0800 : 0x86dd));
                    CHECK(load16_be(f.data + f.len - 64 - 2) == 1500 - outer);
                }
                free(memory);
            }
    services[0].fallback = services[1].fallback = CRAB_FALLBACK_L2;

    /* redirect_clients: 10.0.0.0/31 holds the client 10.0.0.1, 10.0.0.2/31 does not. */
    services[0].mode = CRAB_MODE_NEGOTIATED;
    services[0].prefix_count = 1;
    for (int outside = 0; outside < 2; outside++) {
        struct crab_prefix prefix = {.addr = {[10] = 0xff, [11] = 0xff, 10, 0, 0, (uint8_t)(2 * outside)}, .bits = 127};
        crab_snapshot_free(snapshot(all)); /* for the table and the flags that it sets */
        old = s;
        s = crab_snapshot_new(services, 2, backends, 2, &prefix, 1, NULL, 0, SIZE, CRAB_FORM_CRAB, key);
        crab_core_publish(core, s);
        crab_snapshot_free(old);
        memset(counters, 0, sizeof counters);
        send_one(core, 4, (uint16_t)(3000 + outside), CRAB_SYN, 1, 24, 9000);
        CHECK(counters[outside ? CRAB_C_FALLBACK_PREFIX : CRAB_C_REDIRECTED] == 1);
    }
    services[0].prefix_count = 0;

    /* A backend that is dead to one of two services, then without CR to it: the other's connections do not notice. */
    const struct crab_service kept = services[1];
    for (uint16_t ours = 0; ours < 2; ours++) {
        struct crab_exception exception = {.backend = 1, .flags = CRAB_BACKEND_CR | CRAB_BACKEND_DEAD};
        uint16_t port = 4000 + 10 * ours;
        crab_snapshot_free(snapshot(all)); /* for the flags that it sets */
        services[1] = services[0];
        services[1].port_be = htons(81);
        for (int step = 0; step < 5; step++) {
            for (int i = 0; i < SIZE; i++)
                table[i] = step == 0 || step > 2;
            services[ours].exception_count = step > 0;
            services[ours].on_dead = step == 1 ? CRAB_ON_DEAD_RESET : CRAB_ON_DEAD_REASSIGN;
            exception.flags = step < 4 ? CRAB_BACKEND_CR | CRAB_BACKEND_DEAD : 0;
            old = s;
            s = crab_snapshot_new(services, 2, backends, 2, NULL, 0, &exception, 1, SIZE, CRAB_FORM_CRAB, key);
            crab_core_publish(core, s);
            crab_snapshot_free(old);
            memset(counters, 0, sizeof counters);
            for (uint16_t n = 0; n < 2; n++) {
                bool mine = n == ours;
                to_port = 80 + n;
                if (!step)
                    CHECK(send_one(core, 4, port, CRAB_SYN, 1, 20, 9000) == 12);
                if (step < 3) /* by reset, then to another */
                    CHECK(send_one(core, 4, port, CRAB_ACK, 2, 0, 9000) == (!mine || !step ? 12 : step == 1 ? 1 : 11));
                else
                    CHECK(send_one(core, 4, port + (uint16_t)step, CRAB_SYN, 1, 24, 9000) == (mine && step == 3 ? 0 : 12));
            }
            CHECK(counters[CRAB_C_RESET] == (step == 1) && counters[CRAB_C_REASSIGNED] == (step == 2));
            CHECK(counters[CRAB_C_DROP_NO_BACKEND] == (step == 3) && counters[CRAB_C_REDIRECTED] == (step > 2));
            CHECK(counters[CRAB_C_FALLBACK_NO_CR_BACKEND] == (step == 4));
        }
        services[ours].exception_count = 0;
    }
    services[1] = kept;
    to_port = 80;

    /* A flood of SYNs does not push out an established flow. */
    old = s;
    crab_core_publish(core, s = snapshot(all));
    crab_snapshot_free(old);
    struct crab_core *small = crab_core_new(64, counters);
    crab_core_publish(small, s);
    to = send_one(small, 4, 7, CRAB_SYN, 1, 20, 100);
    send_one(small, 4, 7, CRAB_ACK, 2, 0, 100);
    for (uint16_t port = 10000; port < 20000; port++)
        CHECK(send_one(small, 4, port, CRAB_SYN, port, 24, 101) >= 11);
    for (int i = 0; i < SIZE; i++)
        table[i] = to == 11;
    CHECK(send_one(small, 4, 7, CRAB_ACK, 2, 0, 102) == to);
    crab_core_free(small);

    /* Snapshots are replaced and freed under a running core: ASan sees a use after free. */
    struct storm st = {.core = core};
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, storm, &st) == 0);
    for (int i = 0; i < 2000; i++) {
        old = s;
        crab_core_publish(core, s = crab_snapshot_new(services, 2, backends, 2, NULL, 0, NULL, 0, SIZE, CRAB_FORM_CRAB, key));
        while (crab_core_uses(core, old))
            ;
        crab_snapshot_free(old);
    }
    st.stop = 1;
    pthread_join(thread, NULL);
    crab_core_free(core);
    many_keys(s);
    crab_snapshot_free(s);
    for (uint32_t i = 0; i < 2; i++)
        backends[i].flags = all;
    services[0].mode = CRAB_MODE_NEGOTIATED;
    services[0].fallback = CRAB_FALLBACK_L2;
    forged_in_a_handshake();
    one_port_again_and_again();
    redirected_without_room();
    chosen_without_room();
    data_in_a_syn(4, 20, CRAB_MODE_NEGOTIATED);
    data_in_a_syn(4, 24, CRAB_MODE_NEGOTIATED);
    data_in_a_syn(4, 20, CRAB_MODE_ALWAYS);
    data_in_a_syn(4, 20, CRAB_MODE_NEVER);
    data_in_a_syn(6, 24, CRAB_MODE_NEGOTIATED);
    data_without_room();
    one_four_tuple_in_a_batch();
    written_with_tags();
    DONE();
}
