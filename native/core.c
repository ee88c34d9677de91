/* SPDX-License-Identifier: MIT */
/* What a load balancer does with a batch of frames: parse and look up all of them, then decide and rewrite each.
 *
 * Two passes, so that the cache lines which the second needs (flow bucket, Maglev slot) are on their way while the first
 * still parses.
 *
 * The snapshot is guarded by a hazard pointer: the core says which snapshot it is using, and whoever published a new one
 * frees the old one when no core names it.  The packet path pays one store a batch. */
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/random.h>
#include <time.h>

#include "flows.h"
#include "option.h"
#include "rewrite.h"
#include "select.h"
#include "snapshot.h"
#include "table.h"

struct crab_core {
    _Atomic(struct crab_snapshot *) published;
    _Atomic(struct crab_snapshot *) hazard;
    uint64_t *counters;
    struct crab_table *table;
    void (*choose)(void *context, struct crab_choice *choices, uint32_t n);
    void *context;
    void (*handle)(void *context, struct crab_handled *frames, uint32_t n);
    void *handle_context;
    uint64_t random; /* state of the policies' random numbers */
    uint32_t unknown_second, unknown_count; /* unknown flows learned in this second */
    struct crab_flows flows;
    struct crab_seen_lists seen; /* of TCP options */
};

/* What the second pass has to do with a frame.  Those that there are most of have code of their own. */
enum kind { KIND_NONE, KIND_SYN4, KIND_SYN6, KIND_TAGGED_SYN, KIND_ICMP, KIND_OTHER };

struct item {
    const struct crab_service *service;
    uint8_t kind;
    uint8_t found;      /* of a SYN: CRAB_OPTION_* among its options */
    int8_t word;        /* as crab_option_scan has it */
    uint8_t outcome;    /* of a SYN: as decide has it */
    bool room;          /* of a SYN: it is to be redirected, and the redirect has room in it */
    bool straight;      /* of a SYN with room: the redirect takes the place of its offer's word */
    uint16_t chosen;    /* backend, by the service's policy; then slot leads here */
    uint16_t member;    /* the same as a member of the service's pool */
    uint64_t hash;      /* of the connection */
    struct crab_entry *bucket; /* of the flow cache */
    const struct crab_redirect *redirect; /* of a SYN: its service's */
    const uint16_t *slot; /* where its backend is: in the service's table, by the connection's hash or the client's, or above */
    struct crab_tcp_sum sum;
    struct crab_packet packet;
};

#define PREFETCH_AHEAD 8
#define BACKENDS_AHEAD 8

/* Flows learned in a second without having seen their SYN (it went to another load balancer, or to the daemon before us).
 * A flood of other packets pushes no more than so many flows out of the map; what is beyond goes by the hash alone. */
#define UNKNOWN_A_SECOND 10000

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

struct crab_table *crab_table_new(struct crab_bucket *buckets, uint32_t count)
{
    struct crab_table *t = calloc(1, sizeof *t);
    if (t)
        *t = (struct crab_table){.buckets = buckets, .mask = count - 1};
    return t;
}

void crab_table_free(struct crab_table *table)
{
    free(table);
}

bool crab_table_write(struct crab_table *table, const struct crab_flow *flow)
{
    return crab_table_put(table, *flow);
}

void crab_core_learn(struct crab_core *core, struct crab_table *table)
{
    core->table = table;
}

void crab_core_adopt(struct crab_core *core, const struct crab_flow *flows, uint32_t n, uint32_t now)
{
    for (uint32_t i = 0; i < n; i++) {
        struct crab_entry *e = crab_flows_place(crab_flows_bucket(&core->flows, flows[i].hash), now);
        if (e)
            *e = (struct crab_entry){.tag = flows[i].hash >> 16, .state = CRAB_ENTRY_ESTABLISHED,
                                     .backend = flows[i].backend, .seen = (uint16_t)now};
    }
}

void crab_core_count(const struct crab_core *core, uint32_t *counts, uint32_t n, uint32_t now)
{
    for (uint64_t i = 0; i < (core->flows.mask + 1) * CRAB_BUCKET; i++) {
        /* The core's thread may be writing it, or moving it: it is an estimate. */
        struct crab_entry e = core->flows.entries[i];
        if (!crab_entry_dead(&e, now) && e.backend < n)
            counts[e.backend]++;
    }
}

void crab_core_ask(struct crab_core *core, void (*choose)(void *context, struct crab_choice *choices, uint32_t n),
                   void *context)
{
    core->choose = choose;
    core->context = context;
}

void crab_core_handle(struct crab_core *core, void (*handle)(void *context, struct crab_handled *frames, uint32_t n),
                      void *context)
{
    core->handle = handle;
    core->handle_context = context;
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

/* The hash of a client alone, by so many bits of its address. */
static uint64_t client_hash(const struct crab_snapshot *s, const struct item *it, const uint8_t *addr)
{
    uint32_t size = it->packet.family == 4 ? 4 : 16, bits = size == 4 ? it->service->source4 : it->service->source6;
    uint8_t prefix[32] = {0}; /* as addresses of a connection to nowhere, from port 0 to port 0 */
    memcpy(prefix, addr, bits / 8);
    if (bits % 8)
        prefix[bits / 8] = addr[bits / 8] & (uint8_t)(0xff00 >> bits % 8);
    return size == 4 ? crab_hash4(&s->hash_init, prefix, (uint8_t[4]){0})
                     : crab_hash6(&s->hash_init, prefix, (uint8_t[4]){0});
}

/* Where the service's table is looked into.  addrs: the connection's addresses, the client's first. */
static inline const uint16_t *slot_of(const struct crab_snapshot *s, const struct item *it, const uint8_t *addrs)
{
    uint64_t hash = crab_unlikely(it->service->source4) ? client_hash(s, it, addrs) : it->hash;
    return &it->service->table[crab_slot(hash, s->table_size)];
}

/* First pass, an ICMP error: its connection is that of the packet which it quotes. */
CRAB_APART enum crab_counter examine_icmp(const struct crab_core *core, const struct crab_snapshot *s,
                                          const uint8_t *frame, uint32_t len, struct item *it)
{
    uint8_t tuple[36];
    if (!crab_parse_icmp(frame, len, &it->packet, tuple))
        return CRAB_C_DROP_NOT_SERVICE;
    if (it->packet.family == 4) {
        it->hash = crab_hash4(&s->hash_init, tuple, tuple + 8);
        it->service = crab_service_find(s, 0, 0xffff0000ull | (uint64_t)load32(tuple + 4) << 32, load16(tuple + 10));
    } else {
        it->hash = crab_hash6(&s->hash_init, tuple, tuple + 32);
        it->service = crab_service_find(s, load64(tuple + 16), load64(tuple + 24), load16(tuple + 34));
    }
    it->kind = KIND_ICMP;
    if (!it->service)
        return CRAB_C_DROP_NOT_SERVICE;
    it->bucket = crab_flows_bucket(&core->flows, it->hash);
    it->slot = slot_of(s, it, tuple);
    return CRAB_COUNTERS;
}

static bool prefix_holds(const struct crab_prefix *prefix, const uint8_t addr[16])
{
    uint32_t bytes = prefix->bits / 8, rest = prefix->bits % 8;
    if (memcmp(prefix->addr, addr, bytes))
        return false;
    return !rest || !((prefix->addr[bytes] ^ addr[bytes]) >> (8 - rest));
}

/* Of a service that has prefixes. */
CRAB_APART bool may_be_redirected(const struct crab_snapshot *s, const struct crab_service *service, const uint8_t *ip,
                                  int family)
{
    uint8_t client[16];
    if (family == 4) {
        memcpy(client, crab_mapped_prefix, 12);
        memcpy(client + 12, ip + CRAB_IP4_SRC, 4);
    } else {
        memcpy(client, ip + CRAB_IP6_SRC, 16);
    }
    for (uint32_t i = 0; i < service->prefix_count; i++)
        if (prefix_holds(&s->prefixes[service->first_prefix + i], client))
            return true;
    return false;
}

/* Why this SYN goes by fallback, whichever its backend, or CRAB_C_REDIRECTED. */
static inline enum crab_counter decide(const struct crab_snapshot *s, const struct item *it, const uint8_t *ip)
{
    const struct crab_service *service = it->service;
    if (crab_unlikely(service->mode == CRAB_MODE_NEVER))
        return CRAB_C_FALLBACK_MODE;
    if (service->mode == CRAB_MODE_NEGOTIATED && !(it->found & CRAB_OPTION_OFFER))
        return CRAB_C_FALLBACK_NO_OFFER;
    if (crab_unlikely(service->prefix_count) && !may_be_redirected(s, service, ip, it->packet.family))
        return CRAB_C_FALLBACK_PREFIX;
    return CRAB_C_REDIRECTED;
}

/* Can the redirect be written into the TCP header? */
CRAB_APART bool fits(const struct crab_snapshot *s, const struct item *it, const uint8_t *tcp)
{
    uint8_t list[CRAB_MAX_OPTIONS];
    return crab_option_rewrite(tcp + CRAB_TCP_MIN, it->packet.tcp_header - CRAB_TCP_MIN, s->form, it->service->addr,
                               list) >= 0;
}

/* First pass, an IP packet of a family at l3. */
CRAB_TEMPLATE enum crab_counter examine_at(struct crab_core *core, const struct crab_snapshot *s, const uint8_t *frame,
                                           uint32_t len, struct item *it, uint32_t l3, int family)
{
    struct crab_packet *p = &it->packet;
    int verdict = crab_parse_at(frame, len, l3, family, p);
    if (crab_unlikely(verdict != CRAB_V_OK)) {
        if (verdict == CRAB_V_NOT_TCP)
            return examine_icmp(core, s, frame, len, it);
        return verdict == CRAB_V_MALFORMED ? CRAB_C_DROP_MALFORMED : CRAB_C_DROP_NOT_SERVICE;
    }
    const uint8_t *ip = frame + l3, *tcp = ip + (family == 4 ? 20 : 40);
    const uint8_t *addrs = ip + (family == 4 ? CRAB_IP4_SRC : CRAB_IP6_SRC);
    uint64_t a, b;
    if (family == 4) {
        a = 0;
        b = 0xffff0000ull | (uint64_t)load32(ip + CRAB_IP4_DST) << 32;
        if (crab_unlikely(!crab_is_whole(crab_sum_more(0, ip, 20))))
            return CRAB_C_DROP_CHECKSUM;
        it->hash = crab_hash4(&s->hash_init, addrs, tcp);
    } else {
        a = load64(ip + CRAB_IP6_DST);
        b = load64(ip + CRAB_IP6_DST + 8);
        it->hash = crab_hash6(&s->hash_init, addrs, tcp);
    }
    it->service = crab_service_find(s, a, b, load16(tcp + 2));
    if (crab_unlikely(!it->service))
        return CRAB_C_DROP_NOT_SERVICE;
    it->bucket = crab_flows_bucket(&core->flows, it->hash);
    __builtin_prefetch(it->bucket, 1);
    it->slot = slot_of(s, it, addrs);
    __builtin_prefetch(it->slot);
    if (crab_unlikely((p->tcp_flags & CRAB_SYN) && (p->tcp_flags & (CRAB_ACK | CRAB_RST | CRAB_FIN))))
        return CRAB_C_DROP_FLAGS;
    it->sum = crab_tcp_sum(tcp, (size_t)(p->end - p->l4), addrs, family == 4 ? 8 : 32);
    if (crab_unlikely(it->sum.state == CRAB_CSUM_BAD))
        return CRAB_C_DROP_CHECKSUM;
    it->kind = KIND_OTHER;
    if (crab_likely(p->tcp_flags & CRAB_SYN)) {
        it->kind = l3 != CRAB_ETH_LEN ? KIND_TAGGED_SYN : family == 4 ? KIND_SYN4 : KIND_SYN6;
        int word;
        it->found = (uint8_t)crab_option_scan_again(&core->seen, tcp + CRAB_TCP_MIN, p->tcp_header - CRAB_TCP_MIN,
                                                    s->form, &word);
        it->word = (int8_t)word;
        it->outcome = (uint8_t)decide(s, it, ip);
        it->redirect = &s->redirects[it->service - s->services];
        it->straight = it->outcome == CRAB_C_REDIRECTED && word >= 0 &&
                       p->tcp_header + it->redirect->len <= CRAB_TCP_MIN + CRAB_MAX_OPTIONS + 4;
        it->room = crab_likely(it->straight) || (it->outcome == CRAB_C_REDIRECTED && fits(s, it, tcp));
        if (crab_unlikely(it->found & CRAB_OPTION_FORGED))
            core->counters[CRAB_C_FORGED_OPTION]++;
    }
    return CRAB_COUNTERS;
}

/* Frames of a batch that are for handlers. */
struct handed {
    uint32_t count;
    uint8_t of[CRAB_BATCH]; /* which of the batch they are */
    struct crab_handled frames[CRAB_BATCH];
};

_Static_assert(CRAB_BATCH <= UINT8_MAX, "a frame's place fits");

/* First pass, a frame that no service wants.  Returns whether a handler does. */
CRAB_APART bool is_handled(const struct crab_core *core, const struct crab_snapshot *s, const struct crab_frame *frame,
                       uint32_t place, enum crab_counter why, struct handed *handed)
{
    if (!core->handle || (why != CRAB_C_DROP_NOT_SERVICE && why != CRAB_C_DROP_MALFORMED))
        return false;
    int handler = crab_match_find(&s->matches, frame->data, frame->len);
    if (handler < 0)
        return false;
    handed->of[handed->count] = (uint8_t)place;
    handed->frames[handed->count++] = (struct crab_handled){
        .data = frame->data, .len = frame->len, .ifindex = frame->ifindex, .handler = (uint16_t)handler};
    return true;
}

/* A batch under way. */
struct batch {
    struct crab_core *core;
    const struct crab_snapshot *s;
    struct crab_frame *frames;
    struct item *items;
    uint32_t count, now, kept;
    struct handed handed;
};

/* A frame that goes nowhere, or to a handler. */
CRAB_APART void refuse(struct batch *b, uint32_t i, enum crab_counter why)
{
    struct crab_frame *frame = &b->frames[i];
    if (!b->s->matches.count || !is_handled(b->core, b->s, frame, i, why, &b->handed))
        b->core->counters[why]++;
    frame->len = 0;
    b->items[i].kind = KIND_NONE;
}

static inline void prefetch_frame(const struct crab_frame *frames, uint32_t i, uint32_t count)
{
    if (crab_likely(i < count)) {
        __builtin_prefetch(frames[i].data, 1);
        __builtin_prefetch(frames[i].data + 64, 1);
    }
}

static inline uint16_t ethertype(const struct crab_frame *frame)
{
    return crab_likely(frame->len >= CRAB_ETH_LEN + 20) ? load16(frame->data + 12) : 0;
}

/* First pass: what are they, and whose?  A run of frames of one EtherType, from i on: in the code for it every offset is a
 * constant, and what is the same for all stays in registers.  Returns where it ends. */
CRAB_TEMPLATE uint32_t examine_run(struct batch *b, uint32_t i, int family)
{
    /* In variables of their own: a frame's bytes may be anything's, for all that the compiler knows. */
    const uint16_t type = htons(family == 4 ? 0x0800 : 0x86dd);
    const struct crab_frame *frames = b->frames;
    struct item *items = b->items;
    struct crab_core *core = b->core;
    const struct crab_snapshot *s = b->s;
    uint32_t count = b->count;
    do {
        prefetch_frame(frames, i + PREFETCH_AHEAD, count);
        enum crab_counter why = examine_at(core, s, frames[i].data, frames[i].len, &items[i], CRAB_ETH_LEN, family);
        if (crab_unlikely(why != CRAB_COUNTERS))
            refuse(b, i, why);
        i++;
    } while (i < count && ethertype(&frames[i]) == type);
    return i;
}

CRAB_APART uint32_t examine_ip4(struct batch *b, uint32_t i)
{
    return examine_run(b, i, 4);
}

CRAB_APART uint32_t examine_ip6(struct batch *b, uint32_t i)
{
    return examine_run(b, i, 6);
}

CRAB_APART uint32_t examine_other(struct batch *b, uint32_t i)
{
    const uint8_t *frame = b->frames[i].data;
    uint32_t len = b->frames[i].len;
    uint16_t type = 0;
    uint32_t l3 = (uint32_t)crab_find_l3(frame, len, &type);
    enum crab_counter why = l3 ? CRAB_C_DROP_NOT_SERVICE : CRAB_C_DROP_MALFORMED;
    prefetch_frame(b->frames, i + PREFETCH_AHEAD, b->count);
    if (type == htons(0x0800) && l3)
        why = examine_at(b->core, b->s, frame, len, &b->items[i], l3, 4);
    else if (type == htons(0x86dd) && l3)
        why = examine_at(b->core, b->s, frame, len, &b->items[i], l3, 6);
    if (why != CRAB_COUNTERS)
        refuse(b, i, why);
    return i + 1;
}

static void examine(struct batch *b)
{
    for (uint32_t i = 0; i < PREFETCH_AHEAD; i++)
        prefetch_frame(b->frames, i, b->count);
    for (uint32_t i = 0; i < b->count;) {
        uint16_t type = ethertype(&b->frames[i]);
        i = type == htons(0x0800) ? examine_ip4(b, i) : type == htons(0x86dd) ? examine_ip6(b, i) : examine_other(b, i);
    }
}

static inline bool usable(const struct crab_snapshot *s, uint16_t backend)
{
    return backend < s->backend_count &&
           (s->backends[backend].flags & (CRAB_BACKEND_USABLE | CRAB_BACKEND_DEAD)) == CRAB_BACKEND_USABLE;
}

/* By the table: the same for any worker, daemon and load balancer of one configuration.  By a policy: see ask. */
static inline uint16_t choose(const struct crab_snapshot *s, const struct item *it)
{
    uint16_t backend = *it->slot;
    return usable(s, backend) ? backend : CRAB_NO_BACKEND;
}

/* Does a SYN go where its flow, if there is one, went?  It is that flow's SYN again, or the flow is established. */
static inline bool keeps(const struct crab_snapshot *s, const struct crab_entry *f, uint32_t isn)
{
    return crab_unlikely(f != NULL) && usable(s, f->backend) && (f->isn == isn || f->state == CRAB_ENTRY_ESTABLISHED);
}

/* The backend of a SYN, and in *copies how often this SYN came before.  A retransmission (same initial sequence number)
 * goes where its first copy went. */
static inline uint16_t assign(struct crab_core *core, const struct crab_snapshot *s, const struct item *it,
                              uint32_t isn, uint32_t now, unsigned *copies)
{
    *copies = 0;
    struct crab_entry *f = crab_flows_find(it->bucket, it->hash, now);
    if (crab_unlikely(keeps(s, f, isn))) {
        /* A SYN with another sequence number on an established flow: its server knows whether the old connection
         * lives, and answers accordingly; whoever forged it must not move the flow. */
        if (f->isn == isn) {
            *copies = f->copies;
            f->copies += f->copies < 255;
            core->counters[CRAB_C_RETRANSMITTED_SYN]++;
        }
        f->seen = (uint16_t)now;
        if (it->slot == &it->chosen && it->service->pool) /* both copies are in this batch */
            crab_unassign(it->service->pool, it->member);
        return f->backend;
    }
    uint16_t backend = choose(s, it);
    if (crab_unlikely(backend == CRAB_NO_BACKEND))
        return backend;
    if (crab_likely(!f))
        f = crab_flows_place(it->bucket, now);
    if (crab_likely(f != NULL))
        *f = (struct crab_entry){.tag = it->hash >> 16, .state = CRAB_ENTRY_SYN, .copies = 1, .isn = isn,
                                .backend = backend, .seen = (uint16_t)now};
    else
        core->counters[CRAB_C_FLOWS_FULL]++;
    return backend;
}

/* Write the link-layer addresses for a backend, and say by which interface it goes there. */
static inline void send_to(struct crab_frame *frame, const struct crab_packet *p, const struct crab_backend *backend)
{
    if (crab_unlikely(frame->ifindex != backend->ifindex)) {
        /* VLANs are those of the interface that it came in by; the kernel's route leads there without any. */
        uint32_t tags = p->l3 - 14u;
        frame->data += tags;
        frame->len -= tags;
        frame->ifindex = backend->ifindex;
    }
    crab_set_macs(frame->data, backend);
}

static inline bool same_family(const struct crab_packet *p, const struct crab_backend *backend)
{
    return (p->family == 6) == !!(backend->flags & CRAB_BACKEND_V6);
}

/* Forward a frame, whose headers are right otherwise, by direct server return.  Returns `outcome`, or the counter of
 * what became of it instead. */
CRAB_APART enum crab_counter send_by_dsr(struct crab_core *core, struct crab_frame *frame, const struct item *it,
                                            const struct crab_backend *backend, enum crab_counter outcome)
{
    const struct crab_packet *p = &it->packet;
    bool on_link = backend->flags & CRAB_BACKEND_ON_LINK;
    uint32_t how = it->service->fallback;
    bool by_mac = on_link && how != CRAB_FALLBACK_IPIP && same_family(p, backend);
    if (crab_unlikely(!by_mac && how == CRAB_FALLBACK_L2))
        return CRAB_C_DROP_NO_PATH;
    uint32_t outer = by_mac ? 0 : crab_outer_header(backend);
    /* On the segment that it came from it fits: there no router would say so either. */
    bool must_fit = !by_mac || frame->ifindex != backend->ifindex;
    if (crab_unlikely(must_fit && frame->len - p->l3 + outer > backend->mtu)) {
        if (it->kind == KIND_ICMP) /* no error about an error (RFC 1122, 3.2.2) */
            return CRAB_C_DROP_TOO_BIG;
        if (p->family == 4 && !(frame->data[p->l3 + 6] & 0x40))
            return CRAB_C_DROP_TOO_BIG;
        frame->data = crab_answer_too_big(frame->data, &frame->len, p, backend->mtu - outer);
        return CRAB_C_TOO_BIG;
    }
    if (!by_mac) {
        frame->data = crab_encapsulate(frame->data, &frame->len, p, backend, it->hash);
        core->counters[CRAB_C_ENCAPSULATED]++;
    }
    send_to(frame, p, backend);
    return outcome;
}

/* Second pass, a SYN that has its backend but goes another way than the usual. */
CRAB_APART enum crab_counter forward_syn_otherwise(struct crab_core *core, const struct crab_snapshot *s,
                                                   struct crab_frame *frame, struct item *it,
                                                   const struct crab_backend *backend, unsigned copies)
{
    struct crab_packet *p = &it->packet;
    const uint8_t *options = frame->data + p->l4 + CRAB_TCP_MIN;
    uint32_t options_len = p->tcp_header - CRAB_TCP_MIN;
    enum crab_counter outcome = it->outcome;
    uint8_t list[CRAB_MAX_OPTIONS];
    int n;
    if (copies >= 2 && (outcome == CRAB_C_REDIRECTED || outcome == CRAB_C_FALLBACK_PREFIX))
        outcome = CRAB_C_FALLBACK_RETRANSMIT;
    if (outcome == CRAB_C_REDIRECTED) {
        if (!(backend->flags & CRAB_BACKEND_CR) || !same_family(p, backend))
            outcome = CRAB_C_FALLBACK_NO_CR_BACKEND;
        else if (!it->room)
            outcome = CRAB_C_FALLBACK_NO_ROOM;
    }
    if (outcome == CRAB_C_REDIRECTED) {
        n = crab_option_rewrite(options, options_len, s->form, it->service->addr, list);
        frame->data = crab_rewrite(frame->data, &frame->len, p, &it->sum, list, (uint32_t)n,
                                   p->family == 4 ? backend->addr + 12 : backend->addr);
        send_to(frame, p, backend);
        return outcome;
    }
    /* Without CR options the list stays, to the byte. */
    if (it->found)
        n = crab_option_rewrite(options, options_len, s->form, NULL, list);
    else
        memcpy(list, options, (size_t)(n = (int)options_len));
    frame->data = crab_rewrite(frame->data, &frame->len, p, &it->sum, list, (uint32_t)n, NULL);
    return send_by_dsr(core, frame, it, backend, outcome);
}

/* Second pass, a SYN.  Returns the counter of what became of it. */
CRAB_TEMPLATE enum crab_counter forward_syn_at(struct crab_core *core, const struct crab_snapshot *s,
                                               struct crab_frame *frame, struct item *it, uint32_t now, uint32_t l3,
                                               int family)
{
    struct crab_packet p = it->packet;
    p.l3 = (uint16_t)l3;
    p.l4 = (uint16_t)(l3 + (family == 4 ? 20 : 40));
    p.family = (uint8_t)family;
    unsigned copies;
    uint16_t id = assign(core, s, it, load32(frame->data + p.l4 + CRAB_TCP_SEQ), now, &copies);
    if (crab_unlikely(id == CRAB_NO_BACKEND))
        return CRAB_C_DROP_NO_BACKEND;
    const struct crab_backend *backend = &s->backends[id];
    const uint32_t mask = CRAB_BACKEND_CR | CRAB_BACKEND_V6, right = CRAB_BACKEND_CR | (family == 6 ? CRAB_BACKEND_V6 : 0);
    if (crab_unlikely(!it->straight || copies >= 2 || (backend->flags & mask) != right))
        return forward_syn_otherwise(core, s, frame, it, backend, copies);
    frame->data = crab_rewrite_word(frame->data, &frame->len, &p, &it->sum, (uint32_t)it->word, it->redirect, backend);
    send_to(frame, &p, backend);
    return CRAB_C_REDIRECTED;
}

static inline bool is_drop(enum crab_counter c)
{
    return c >= CRAB_C_DROP_NOT_SERVICE && c <= CRAB_C_DROP_TX;
}

static inline void count_one(struct batch *b, uint32_t i, enum crab_counter what)
{
    b->core->counters[what]++;
    if (crab_unlikely(is_drop(what)))
        b->frames[i].len = 0;
    else
        b->kept++;
}

static inline void prefetch_backend(const struct crab_snapshot *s, const struct item *items, uint32_t i, uint32_t count)
{
    if (crab_likely(i < count && items[i].kind))
        __builtin_prefetch(&s->backends[*items[i].slot]);
}

/* Second pass, a run of SYNs of a family without tags, as in examine_run. */
CRAB_TEMPLATE uint32_t forward_syns(struct batch *b, uint32_t i, enum kind kind)
{
    struct crab_frame *frames = b->frames;
    struct item *items = b->items;
    struct crab_core *core = b->core;
    const struct crab_snapshot *s = b->s;
    uint32_t count = b->count, now = b->now, redirected = 0;
    do {
        prefetch_backend(s, items, i + BACKENDS_AHEAD, count);
        enum crab_counter what =
            forward_syn_at(core, s, &frames[i], &items[i], now, CRAB_ETH_LEN, kind == KIND_SYN4 ? 4 : 6);
        if (crab_likely(what == CRAB_C_REDIRECTED))
            redirected++;
        else
            count_one(b, i, what);
        i++;
    } while (i < count && items[i].kind == kind);
    core->counters[CRAB_C_REDIRECTED] += redirected;
    b->kept += redirected;
    return i;
}

CRAB_APART uint32_t forward_syns_ip4(struct batch *b, uint32_t i)
{
    return forward_syns(b, i, KIND_SYN4);
}

CRAB_APART uint32_t forward_syns_ip6(struct batch *b, uint32_t i)
{
    return forward_syns(b, i, KIND_SYN6);
}

CRAB_APART enum crab_counter forward_tagged_syn(struct crab_core *core, const struct crab_snapshot *s,
                                                struct crab_frame *frame, struct item *it, uint32_t now)
{
    uint32_t l3 = it->packet.l3;
    return it->packet.family == 4 ? forward_syn_at(core, s, frame, it, now, l3, 4)
                                  : forward_syn_at(core, s, frame, it, now, l3, 6);
}

static inline bool may_learn_unknown(struct crab_core *core, uint32_t now)
{
    if (core->unknown_second != now) {
        core->unknown_second = now;
        core->unknown_count = 0;
    }
    return core->unknown_count < UNKNOWN_A_SECOND && ++core->unknown_count;
}

/* Second pass, any other packet of a VIP: it belongs to a connection that goes by fallback. */
CRAB_APART enum crab_counter forward_other(struct crab_core *core, const struct crab_snapshot *s,
                                              struct crab_frame *frame, struct item *it, uint32_t now)
{
    struct crab_packet *p = &it->packet;
    struct crab_entry *f = crab_flows_find(it->bucket, it->hash, now);
    uint16_t id;
    if (f) {
        id = f->backend;
        if (crab_unlikely(!usable(s, id))) {
            /* Without a next hop for the moment, the backend still has its connections. */
            if (id >= s->backend_count || !(s->backends[id].flags & CRAB_BACKEND_DEAD))
                return CRAB_C_DROP_NO_BACKEND;
            if (it->service->on_dead == CRAB_ON_DEAD_RESET) {
                frame->data = crab_answer_by_reset(frame->data, &frame->len, p);
                return CRAB_C_RESET;
            }
            id = choose(s, it);
            if (id == CRAB_NO_BACKEND)
                return CRAB_C_DROP_NO_BACKEND;
            f->backend = id;
            core->counters[CRAB_C_REASSIGNED]++;
        }
        if (p->tcp_flags & (CRAB_FIN | CRAB_RST))
            f->state = CRAB_ENTRY_CLOSING;
        else if (f->state == CRAB_ENTRY_SYN)
            f->state = CRAB_ENTRY_ESTABLISHED;
        f->seen = (uint16_t)now;
    } else {
        id = choose(s, it);
        if (id == CRAB_NO_BACKEND)
            return CRAB_C_DROP_NO_BACKEND;
    }
    const struct crab_backend *backend = &s->backends[id];
    /* The XDP program leaves frames with VLAN tags, and backends out of its reach, to us: they are not worth a flow. */
    bool learn = core->table && backend->flags & CRAB_BACKEND_BYPASS && p->l3 == 14 && !(p->tcp_flags & CRAB_RST) &&
                 (f || may_learn_unknown(core, now));
    uint64_t tunnelled = core->counters[CRAB_C_ENCAPSULATED];
    frame->len = p->end;
    store16(frame->data + p->l4 + CRAB_TCP_CSUM, crab_tcp_right(it->sum));
    enum crab_counter outcome = send_by_dsr(core, frame, it, backend, CRAB_C_FALLBACK_ESTABLISHED);
    if (learn && outcome == CRAB_C_FALLBACK_ESTABLISHED) {
        struct crab_flow flow = {
            .hash = it->hash, .backend = id, .service = (uint16_t)it->service->index, .seen = (uint16_t)now,
            .state = p->tcp_flags & CRAB_FIN ? CRAB_FLOW_ENDING : CRAB_FLOW_OPEN,
            .flags = core->counters[CRAB_C_ENCAPSULATED] != tunnelled ? CRAB_FLOW_TUNNEL : 0};
        core->counters[CRAB_C_LEARNED] += crab_table_put(core->table, flow);
    }
    return outcome;
}

/* Second pass, an ICMP error. */
CRAB_APART enum crab_counter forward_icmp(struct crab_core *core, const struct crab_snapshot *s, struct crab_frame *frame,
                                      struct item *it, uint32_t now)
{
    struct crab_entry *f = crab_flows_find(it->bucket, it->hash, now);
    uint16_t id = f && usable(s, f->backend) ? f->backend : choose(s, it);
    if (id == CRAB_NO_BACKEND)
        return CRAB_C_DROP_NO_BACKEND;
    frame->len = it->packet.end;
    return send_by_dsr(core, frame, it, &s->backends[id], CRAB_C_FALLBACK_ICMP);
}

/* Connections of a batch for which a policy has to choose, in its order. */
struct asking {
    uint32_t count;
    struct item *of[CRAB_BATCH];
};

/* Between the passes: those of one pool. */
static void ask_pool(const struct batch *b, struct crab_pool *pool, struct asking *asking)
{
    uint16_t members[CRAB_BATCH];
    pool->policy->pick(pool, &b->core->random, members, asking->count);
    for (uint32_t i = 0; i < asking->count; i++) {
        struct item *it = asking->of[i];
        it->member = members[i];
        it->chosen = pool->members[members[i]].backend;
        if (crab_likely(usable(b->s, it->chosen)))
            it->slot = &it->chosen;
        else
            crab_unassign(pool, members[i]);
    }
    asking->count = 0;
}

/* Between the passes: those of all services whose policy is a function's. */
static void ask_function(const struct batch *b, const struct asking *asking)
{
    struct crab_choice choices[CRAB_BATCH];
    struct timespec clock;
    clock_gettime(CLOCK_MONOTONIC, &clock);
    uint64_t arrival = (uint64_t)clock.tv_sec * 1000000000u + (uint64_t)clock.tv_nsec;
    for (uint32_t i = 0; i < asking->count; i++) {
        const struct item *it = asking->of[i];
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
        struct item *it = asking->of[i];
        if (!usable(b->s, choices[i].backend))
            continue;
        it->chosen = choices[i].backend;
        it->slot = &it->chosen;
    }
}

/* Between the passes: have the batch's connections chosen for, as many at once as follow each other to one service. */
CRAB_APART void ask(const struct batch *b)
{
    struct asking pooled, custom, *whom = NULL;
    const struct crab_service *service = NULL;
    pooled.count = custom.count = 0;
    for (uint32_t i = 0; i < b->count; i++) {
        struct item *it = &b->items[i];
        if (it->kind < KIND_SYN4 || it->kind > KIND_TAGGED_SYN)
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
        const struct crab_entry *f = crab_flows_find(it->bucket, it->hash, b->now);
        if (crab_unlikely(f != NULL) && keeps(b->s, f, load32(b->frames[i].data + it->packet.l4 + CRAB_TCP_SEQ)))
            continue;
        whom->of[whom->count++] = it;
    }
    if (pooled.count)
        ask_pool(b, service->pool, &pooled);
    if (custom.count)
        ask_function(b, &custom);
}

static void forward(struct batch *b)
{
    for (uint32_t i = 0; i < b->count;) {
        struct item *it = &b->items[i];
        struct crab_frame *frame = &b->frames[i];
        switch (it->kind) {
        case KIND_SYN4:
            i = forward_syns_ip4(b, i);
            continue;
        case KIND_SYN6:
            i = forward_syns_ip6(b, i);
            continue;
        case KIND_TAGGED_SYN:
            count_one(b, i, forward_tagged_syn(b->core, b->s, frame, it, b->now));
            break;
        case KIND_ICMP:
            count_one(b, i, forward_icmp(b->core, b->s, frame, it, b->now));
            break;
        case KIND_OTHER:
            count_one(b, i, forward_other(b->core, b->s, frame, it, b->now));
            break;
        }
        i++;
    }
}

/* After the passes: have the handlers' frames handled, all at once.  Returns how many are to be sent. */
CRAB_APART uint32_t hand_over(struct crab_core *core, struct crab_frame *frames, struct handed *handed)
{
    uint32_t kept = 0;
    core->handle(core->handle_context, handed->frames, handed->count);
    for (uint32_t i = 0; i < handed->count; i++) {
        const struct crab_handled *h = &handed->frames[i];
        struct crab_frame *frame = &frames[handed->of[i]];
        if (h->verdict == CRAB_HANDLED_SEND && h->len) {
            frame->len = h->len;
            frame->ifindex = h->ifindex;
            core->counters[CRAB_C_HANDLER_SENT]++;
            kept++;
        } else {
            core->counters[h->verdict == CRAB_HANDLED_KEPT ? CRAB_C_HANDLER_KEPT : CRAB_C_DROP_HANDLER]++;
        }
    }
    return kept;
}

uint32_t crab_core_batch(struct crab_core *core, struct crab_frame *frames, uint32_t count, uint32_t now)
{
    struct item items[CRAB_BATCH];
    struct batch b;
    b.core = core;
    b.s = acquire(core);
    b.frames = frames;
    b.items = items;
    b.count = count;
    b.now = now;
    b.kept = b.handed.count = 0;

    core->counters[CRAB_C_RECEIVED] += count;
    if (crab_unlikely(!b.s)) {
        core->counters[CRAB_C_DROP_NOT_SERVICE] += count;
        for (uint32_t i = 0; i < count; i++)
            frames[i].len = 0;
    } else {
        examine(&b);
        if (b.s->asks)
            ask(&b);
        forward(&b);
        if (crab_unlikely(b.handed.count))
            b.kept += hand_over(core, frames, &b.handed);
    }
    release(core);
    return b.kept;
}
