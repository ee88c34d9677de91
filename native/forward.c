/* SPDX-License-Identifier: MIT */
/* Second pass: decide about each frame, and rewrite it. */
#include "answer.h"
#include "batch.h"
#include "hop.h"
#include "rewrite.h"

#define BACKENDS_AHEAD 8

/* Flows learned in a second without having seen their SYN (it went to another load balancer, or to the daemon before us).
 * A flood of other packets pushes no more than so many flows out of the map; what is beyond goes by the hash alone. */
#define UNKNOWN_A_SECOND 10000

/* MPTCP connections learned in a second: a token takes as long as two SYNs, and whoever makes up keys pays nothing. */
#define TOKENS_A_SECOND 50000

/* Bytes of MP_CAPABLE with both keys. */
#define KEYS 20

/* Where an item's slot leads.  By the table it is the same for any worker, daemon and load balancer of one configuration; by
 * a policy: see ask.c. */
static inline uint16_t backend_of(const struct crab_snapshot *s, const struct crab_item *it)
{
    uint16_t backend = *it->slot;
    return crab_usable(s, it->service, backend) ? backend : CRAB_NO_BACKEND;
}

static inline bool same_family(const struct crab_packet *p, const struct crab_backend *backend)
{
    return (p->family == 6) == !!(backend->flags & CRAB_BACKEND_V6);
}

/* Does a SYN that has room for it get a redirect to a backend? */
static bool is_redirected(const struct crab_snapshot *s, const struct crab_item *it, uint16_t backend)
{
    return it->outcome == CRAB_C_REDIRECTED && crab_backend_flags(s, it->service, backend) & CRAB_BACKEND_CR &&
           same_family(&it->packet, &s->backends[backend]);
}

/* What the XDP program knows of a connection.  Returns whether it knows it. */
static inline bool is_written(const struct crab_core *core, const struct crab_item *it, uint32_t now, struct crab_flow *flow)
{
    return core->table && crab_table_get(core->table, it->hash, now, flow);
}

/* Whether a connection whose backend it may not be sent to now goes to another one: those of dead backends alone.  Without a
 * next hop for the moment, a backend still has its connections. */
static inline bool moves(const struct crab_snapshot *s, const struct crab_service *service, uint16_t backend)
{
    return backend < s->backend_count && crab_backend_flags(s, service, backend) & CRAB_BACKEND_DEAD &&
           service->on_dead != CRAB_ON_DEAD_RESET;
}

/* What becomes of a packet of a connection that does not. */
CRAB_APART enum crab_counter stop(const struct crab_snapshot *s, struct crab_frame *frame, const struct crab_item *it,
                                  uint16_t backend)
{
    const struct crab_packet *p = &it->packet;
    bool dead = backend < s->backend_count && crab_backend_flags(s, it->service, backend) & CRAB_BACKEND_DEAD;
    if (!dead || p->tcp_flags & CRAB_RST) /* which is never answered by another (RFC 9293, 3.10.7.1) */
        return CRAB_C_DROP_NO_BACKEND;
    frame->data = crab_answer_by_reset(frame->data, &frame->len, p);
    return CRAB_C_RESET;
}

/* Remember a SYN.  twin: the connection has another entry, that stays. */
static inline void remember(const struct crab_item *it, struct crab_entry *place, uint16_t backend, uint32_t isn,
                            uint32_t now, bool twin)
{
    *place = (struct crab_entry){.tag = it->hash >> 16, .state = CRAB_ENTRY_SYN, .copies = 1, .twin = twin,
                                 .isn = isn, .backend = backend, .seen = (uint16_t)now};
}

/* What was decided for a SYN is another's: take back what its service's policy counts for it. */
static inline void unassign(const struct crab_item *it)
{
    if (it->slot == &it->chosen && it->service->pool)
        crab_unassign(it->service->pool, it->member);
}

/* A SYN goes nowhere now, whoever might take it. */
static inline uint16_t withhold(struct crab_item *it)
{
    unassign(it);
    it->outcome = CRAB_C_DROP_NO_BACKEND;
    return CRAB_NO_BACKEND;
}

/* The backend of a SYN that cannot be remembered: its client's next packet would be taken for the flow's that its four-tuple
 * has had, so it goes where that goes; and if it has had none, and goes by fallback, where the table says, as that packet will.
 * Nor is known how often it came before: it counts as if it had in every other second, so that who cannot be redirected is not
 * redirected for ever; copies come 1, 3, 7, ... seconds after the first. */
CRAB_APART uint16_t assign_without_room(struct crab_core *core, const struct crab_snapshot *s, struct crab_item *it,
                                        const struct crab_entry *settled, uint32_t now)
{
    struct crab_flow flow;
    if (now & 1 && it->outcome == CRAB_C_REDIRECTED) {
        it->outcome = CRAB_C_FALLBACK_RETRANSMIT;
        it->straight = false;
    }
    if (crab_unlikely(crab_has_data(&it->packet))) { /* nobody could tell where they were acted on: the copy has none */
        core->counters[CRAB_C_FLOWS_FULL]++;
        return withhold(it);
    }
    uint16_t known = settled ? settled->backend : is_written(core, it, now, &flow) ? flow.backend : CRAB_NO_BACKEND;
    core->counters[CRAB_C_FLOWS_FULL]++;
    bool goes_on = crab_usable(s, it->service, known);
    if (goes_on || (it->slot == &it->chosen && !is_redirected(s, it, it->chosen))) {
        unassign(it);
        it->slot = it->slot == &it->chosen ? it->by_table : it->slot;
    }
    return goes_on ? known : backend_of(s, it);
}

/* The first place of a bucket, or NULL: made free by that which crab_flows_oldest finds, so that a connection whose port is
 * used again and again, and whose entries come and go, pushes no other one's out. */
CRAB_APART struct crab_entry *squeeze(struct crab_entry *bucket, uint32_t now)
{
    struct crab_entry *last = crab_flows_oldest(bucket, now);
    if (!last)
        return NULL;
    for (; last > bucket; last--)
        *last = last[-1];
    return bucket;
}

/* See assign: a SYN of a connection that is known.  One with another initial sequence number may be a new connection's, or
 * forged: it is decided like any other, and what its client says next is watched for (see take). */
CRAB_APART uint16_t assign_known(struct crab_core *core, const struct crab_snapshot *s, struct crab_item *it,
                                 uint32_t isn, uint32_t now, unsigned *copies)
{
    struct crab_entries known = crab_flows_entries(it->bucket, it->hash, now);
    struct crab_entry *f = crab_flows_of_syn(known, isn);
    if (crab_keeps(s, it->service, f)) {
        *copies = f->copies;
        f->copies += f->copies < CRAB_MANY;
        core->counters[CRAB_C_RETRANSMITTED_SYN]++;
        f->seen = (uint16_t)now;
        unassign(it); /* both copies are in this batch */
        return f->backend;
    }
    /* What a backend may have acted on is no other's to act on: its copy says the same again, with data or without. */
    bool data = f && f->data;
    if (crab_unlikely(data)) {
        f->seen = (uint16_t)now;
        if (!moves(s, it->service, f->backend))
            return withhold(it);
    }
    uint16_t backend = backend_of(s, it);
    if (backend == CRAB_NO_BACKEND)
        return backend;
    /* One SYN more than two entries hold takes the place of the newer one. */
    struct crab_entry *other = known.settled ? known.settled : known.pending;
    other->twin = true; /* before it is moved */
    struct crab_entry *place = known.settled && known.pending ? known.pending : squeeze(it->bucket, now);
    bool beside = place != NULL;
    if (!place && other->state != CRAB_ENTRY_ESTABLISHED)
        place = other;
    if (!place)
        return assign_without_room(core, s, it, known.settled, now);
    remember(it, place, backend, isn, now, beside);
    if (crab_unlikely(data)) {
        place->data = true;
        place->copies = *copies = CRAB_MANY;
    }
    /* The XDP program saw the SYN too, but perhaps before we wrote down what came in front of it. */
    if (core->table && known.settled) {
        crab_table_ask(core->table, it->hash);
        for (uint32_t i = 0; i < core->learned_count; i++)
            if (core->learned[i].hash == it->hash)
                core->learned[i].hash = 0;
    }
    return backend;
}

/* See assign: a SYN whose bucket may have no place for it. */
CRAB_APART uint16_t assign_crowded(struct crab_core *core, const struct crab_snapshot *s, struct crab_item *it,
                                   uint16_t backend, uint32_t isn, uint32_t now)
{
    struct crab_entry *place = crab_flows_oldest(it->bucket, now);
    if (!place)
        return assign_without_room(core, s, it, NULL, now);
    remember(it, place, backend, isn, now, false);
    return backend;
}

/* The backend of a SYN, and in *copies how often this SYN came before.  A retransmission (same initial sequence number)
 * goes where its first copy went. */
static inline uint16_t assign(struct crab_core *core, const struct crab_snapshot *s, struct crab_item *it,
                              uint32_t isn, uint32_t now, unsigned *copies)
{
    *copies = 0;
    if (crab_unlikely(crab_flows_find(it->bucket, it->hash, now) != NULL))
        return assign_known(core, s, it, isn, now, copies);
    uint16_t backend = backend_of(s, it);
    if (crab_unlikely(backend == CRAB_NO_BACKEND))
        return backend;
    if (crab_unlikely(crab_flows_crowded(it->bucket)))
        return assign_crowded(core, s, it, backend, isn, now);
    remember(it, crab_flows_front(it->bucket), backend, isn, now, false);
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

/* Does a backend merely send back what was sent to it?  Unless it is the packet's source: it may be a client too. */
static inline bool is_sent_back(const uint8_t *frame, const struct crab_packet *p, const struct crab_backend *backend)
{
    const uint8_t *ip = frame + p->l3;
    if (crab_likely(memcmp(frame + 6, backend->dst_mac, 6)))
        return false;
    return p->family == 4 ? memcmp(ip + CRAB_IP4_SRC, backend->addr + 12, 4)
                          : memcmp(ip + CRAB_IP6_SRC, backend->addr, 16);
}

/* Bytes that a packet may have by a tunnel, whatever is said of the way there: IPv6 takes no less (RFC 8200, 5), nor does Linux
 * with IPv4 (net.ipv4.route.min_pmtu).  Who is told less stalls; and what is said may be forged. */
#define LEAST4 552
#define LEAST6 1280

/* How long a packet may be, by a tunnel or by a way whose MTU it has to fit. */
static inline uint32_t room_of(const struct crab_packet *p, const struct crab_backend *backend, uint32_t outer)
{
    uint32_t least = !outer ? 0 : p->family == 4 ? LEAST4 : LEAST6;
    uint32_t room = backend->mtu > outer ? backend->mtu - outer : 0;
    return room > least ? room : least;
}

/* Have the sender of a packet that does not fit be told how long one may be. */
CRAB_APART enum crab_counter refuse(struct crab_frame *frame, const struct crab_item *it, uint32_t room)
{
    const struct crab_packet *p = &it->packet;
    if (it->kind == CRAB_KIND_ICMP) /* no error about an error (RFC 1122, 3.2.2) */
        return CRAB_C_DROP_TOO_BIG;
    if (p->family == 4 && !(frame->data[p->l3 + 6] & 0x40))
        return CRAB_C_DROP_TOO_BIG;
    frame->data = crab_answer_too_big(frame->data, &frame->len, p, room);
    return CRAB_C_TOO_BIG;
}

/* Forward a frame, whose headers are right otherwise, by direct server return.  Returns `outcome`, or the counter of
 * what became of it instead. */
CRAB_APART enum crab_counter send_by_dsr(struct crab_core *core, struct crab_frame *frame, const struct crab_item *it,
                                         const struct crab_backend *backend, enum crab_counter outcome)
{
    const struct crab_packet *p = &it->packet;
    bool on_link = backend->flags & CRAB_BACKEND_ON_LINK;
    uint32_t how = it->service->fallback;
    bool by_mac = on_link && how != CRAB_FALLBACK_IPIP && same_family(p, backend);
    if (crab_unlikely(!by_mac && how == CRAB_FALLBACK_L2))
        return CRAB_C_DROP_NO_PATH;
    if (by_mac) {
        const uint8_t *ip = frame->data + p->l3;
        if (crab_unlikely(is_sent_back(frame->data, p, backend)))
            return CRAB_C_DROP_SENT_BACK;
        if (crab_unlikely(!crab_has_hop(ip, p->family)))
            return CRAB_C_DROP_HOPS;
    }
    uint32_t outer = by_mac ? 0 : crab_outer_header(backend);
    /* On the segment that it came from it fits: there no router would say so either. */
    bool must_fit = !by_mac || frame->ifindex != backend->ifindex;
    if (crab_unlikely(must_fit && frame->len - p->l3 + outer > backend->mtu)) {
        uint32_t room = room_of(p, backend, outer);
        if (frame->len - p->l3 > room)
            return refuse(frame, it, room);
    }
    if (by_mac) {
        crab_take_hop(frame->data + p->l3, p->family);
    } else {
        frame->data = crab_encapsulate(frame->data, &frame->len, p, backend, it->hash);
        core->counters[CRAB_C_ENCAPSULATED]++;
    }
    send_to(frame, p, backend);
    return outcome;
}

/* A TCP packet that stays as it is: without Ethernet's padding, and with its checksum where the sender left that to its card. */
static inline void finish(struct crab_frame *frame, const struct crab_item *it)
{
    frame->len = it->packet.end;
    store16(frame->data + it->packet.l4 + CRAB_TCP_CSUM, crab_tcp_right(it->sum));
}

/* The options of a SYN that goes by fallback.  Returns their length.
 *
 * Signed ones stay: TCP-MD5 signs their length, TCP-AO all of them.  An offer among them tells a server nothing; a forged
 * redirect would, and is overwritten: then a TCP-AO server finds the signature wrong, as it should. */
CRAB_APART uint32_t fallback_options(const struct crab_item *it, const uint8_t *options, uint32_t len, int form,
                                     uint8_t list[CRAB_MAX_OPTIONS])
{
    if (!(it->found & CRAB_OPTION_SIGNED))
        return (uint32_t)crab_option_rewrite(options, len, form, NULL, list);
    memcpy(list, options, len);
    crab_option_blank(list, len);
    return len;
}

/* A SYN, by fallback.  Returns `why`, or as send_by_dsr does. */
CRAB_APART enum crab_counter fall_back(struct crab_core *core, const struct crab_snapshot *s, struct crab_frame *frame,
                                       struct crab_item *it, const struct crab_backend *backend, enum crab_counter why)
{
    struct crab_packet *p = &it->packet;
    if (crab_likely(!it->found)) {
        finish(frame, it);
    } else {
        uint8_t list[CRAB_MAX_OPTIONS], *options = frame->data + p->l4 + CRAB_TCP_MIN;
        uint32_t n = fallback_options(it, options, p->tcp_header - CRAB_TCP_MIN, s->form, list);
        uint8_t *moved = crab_rewrite(frame->data, &frame->len, p, &it->sum, list, n, NULL);
        if (crab_unlikely(!moved))
            return CRAB_C_DROP_MALFORMED;
        frame->data = moved;
    }
    return send_by_dsr(core, frame, it, backend, why);
}

/* A SYN that is to be redirected, if its backend and its options allow. */
CRAB_APART enum crab_counter redirect(struct crab_core *core, const struct crab_snapshot *s, struct crab_frame *frame,
                                      struct crab_item *it, const struct crab_backend *backend)
{
    struct crab_packet *p = &it->packet;
    uint8_t list[CRAB_MAX_OPTIONS];
    uint32_t flags = crab_backend_flags(s, it->service, (uint16_t)(backend - s->backends));
    if (!(flags & CRAB_BACKEND_CR) || !same_family(p, backend))
        return fall_back(core, s, frame, it, backend, CRAB_C_FALLBACK_NO_CR_BACKEND);
    uint8_t *moved = NULL;
    if (it->straight) {
        moved = crab_rewrite_word(frame->data, &frame->len, p, &it->sum, (uint32_t)it->word, it->redirect, backend);
    } else if (it->room) {
        int n = crab_option_rewrite(frame->data + p->l4 + CRAB_TCP_MIN, p->tcp_header - CRAB_TCP_MIN, s->form,
                                    it->service->addr, list);
        moved = crab_rewrite(frame->data, &frame->len, p, &it->sum, list, (uint32_t)n,
                             p->family == 4 ? backend->addr + 12 : backend->addr);
    }
    if (!moved)
        return fall_back(core, s, frame, it, backend, CRAB_C_FALLBACK_NO_ROOM);
    frame->data = moved;
    send_to(frame, p, backend);
    return CRAB_C_REDIRECTED;
}

/* Why a SYN, of which there were so many copies before, goes by fallback, or CRAB_C_REDIRECTED: what was decided for it alone,
 * and what is remembered. */
CRAB_APART enum crab_counter decide_by_copies(const struct crab_item *it, uint32_t isn, unsigned copies, uint32_t now)
{
    struct crab_entry *f = crab_flows_of_syn(crab_flows_entries(it->bucket, it->hash, now), isn);
    enum crab_counter outcome = it->outcome;
    if (f && crab_has_data(&it->packet))
        f->data = true;
    if (outcome == CRAB_C_FALLBACK_UNSAFE) {
        /* Its server may have acted on the data: a copy without, redirected, would be another connection that sends them. */
        if (f)
            f->copies = CRAB_MANY;
    } else if (copies >= 2 && (outcome == CRAB_C_REDIRECTED || outcome == CRAB_C_FALLBACK_PREFIX)) {
        return CRAB_C_FALLBACK_RETRANSMIT;
    } else if (outcome == CRAB_C_REDIRECTED && !(it->found & CRAB_OPTION_OFFER) && f) {
        if (!copies)
            f->plain = true;
        else if (!f->plain) /* an offer withdrawn asks for the fallback, whatever the mode */
            return CRAB_C_FALLBACK_NO_OFFER;
    }
    return outcome;
}

/* A SYN that has its backend but goes another way than the usual. */
CRAB_APART enum crab_counter forward_syn_otherwise(struct crab_core *core, const struct crab_snapshot *s,
                                                   struct crab_frame *frame, struct crab_item *it,
                                                   const struct crab_backend *backend)
{
    if (it->outcome == CRAB_C_REDIRECTED)
        return redirect(core, s, frame, it, backend);
    return fall_back(core, s, frame, it, backend, it->outcome);
}

/* A SYN that no backend takes, or none now. */
CRAB_APART enum crab_counter turn_away(struct crab_core *core, const struct crab_snapshot *s, struct crab_frame *frame,
                                       const struct crab_item *it, uint32_t isn, uint32_t now)
{
    if (crab_likely(it->outcome != CRAB_C_DROP_NO_BACKEND))
        return it->service->refuses ? crab_answer_syn(core, frame, &it->packet, now) : CRAB_C_DROP_NO_BACKEND;
    struct crab_entry *f = crab_flows_of_syn(crab_flows_entries(it->bucket, it->hash, now), isn);
    return stop(s, frame, it, f ? f->backend : CRAB_NO_BACKEND);
}

/* A SYN.  Returns the counter of what became of it. */
CRAB_TEMPLATE enum crab_counter forward_syn_at(struct crab_core *core, const struct crab_snapshot *s,
                                               struct crab_frame *frame, struct crab_item *it, uint32_t now, uint32_t l3,
                                               int family)
{
    struct crab_packet p = it->packet;
    p.l3 = (uint16_t)l3;
    p.l4 = (uint16_t)(l3 + (family == 4 ? 20 : 40));
    p.family = (uint8_t)family;
    unsigned copies;
    uint32_t isn = load32(frame->data + p.l4 + CRAB_TCP_SEQ);
    uint16_t id = assign(core, s, it, isn, now, &copies);
    if (crab_unlikely(id == CRAB_NO_BACKEND))
        return turn_away(core, s, frame, it, isn, now);
    const struct crab_backend *backend = &s->backends[id];
    /* Whoever has exceptions is looked at more closely. */
    const uint32_t mask = CRAB_BACKEND_CR | CRAB_BACKEND_V6 | CRAB_BACKEND_EXCEPTED;
    const uint32_t right = CRAB_BACKEND_CR | (family == 6 ? CRAB_BACKEND_V6 : 0);
    if (crab_unlikely(!it->straight || copies >= 2 || (backend->flags & mask) != right)) {
        if (it->outcome != CRAB_C_FALLBACK_NO_OFFER)
            it->outcome = (uint8_t)decide_by_copies(it, isn, copies, now);
        return forward_syn_otherwise(core, s, frame, it, backend);
    }
    uint8_t *moved = crab_rewrite_word(frame->data, &frame->len, &p, &it->sum, (uint32_t)it->word, it->redirect, backend);
    if (crab_unlikely(!moved))
        return fall_back(core, s, frame, it, backend, CRAB_C_FALLBACK_NO_ROOM);
    frame->data = moved;
    send_to(frame, &p, backend);
    return CRAB_C_REDIRECTED;
}

static inline void count_one(struct crab_batch *b, uint32_t i, enum crab_counter what)
{
    b->core->counters[what]++;
    if (crab_unlikely(crab_is_drop(what)))
        b->frames[i].len = 0;
    else
        b->kept++;
}

static inline void prefetch_backend(const struct crab_snapshot *s, const struct crab_item *items, uint32_t i, uint32_t count)
{
    if (crab_likely(i < count && items[i].kind))
        __builtin_prefetch(&s->backends[*items[i].slot]);
}

/* A run of SYNs of a family without tags, in code of their own (see examine_run). */
CRAB_TEMPLATE uint32_t forward_syns(struct crab_batch *b, uint32_t i, enum crab_kind kind)
{
    struct crab_frame *frames = b->frames;
    struct crab_item *items = b->items;
    struct crab_core *core = b->core;
    const struct crab_snapshot *s = b->s;
    uint32_t count = b->count, now = b->now, redirected = 0;
    do {
        prefetch_backend(s, items, i + BACKENDS_AHEAD, count);
        enum crab_counter what =
            forward_syn_at(core, s, &frames[i], &items[i], now, CRAB_ETH_LEN, kind == CRAB_KIND_SYN4 ? 4 : 6);
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

CRAB_APART uint32_t forward_syns_ip4(struct crab_batch *b, uint32_t i)
{
    return forward_syns(b, i, CRAB_KIND_SYN4);
}

CRAB_APART uint32_t forward_syns_ip6(struct crab_batch *b, uint32_t i)
{
    return forward_syns(b, i, CRAB_KIND_SYN6);
}

CRAB_APART enum crab_counter forward_tagged_syn(struct crab_core *core, const struct crab_snapshot *s,
                                                struct crab_frame *frame, struct crab_item *it, uint32_t now)
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

static inline struct crab_entry recall(const struct crab_flow *flow)
{
    return (struct crab_entry){
        .state = flow->state == CRAB_FLOW_ENDING ? CRAB_ENTRY_CLOSING : CRAB_ENTRY_ESTABLISHED,
        .backend = flow->backend,
        .seen = flow->seen,
    };
}

/* The flow that a packet with these TCP flags and this sequence number belongs to, or NULL: one that may follow a pending SYN
 * belongs to that; any other to what was there before; that may be known from the XDP program alone, for what it forwards is
 * not seen here, and forgotten in time. */
static inline struct crab_entry *take(struct crab_entries *known, struct crab_entry *recalled, uint8_t tcp_flags,
                                      uint32_t seq)
{
    struct crab_entry *pending = known->pending, *before = known->settled ? known->settled : recalled;
    if (!pending || (before && !crab_entry_may_precede(pending, seq)))
        return before;
    if ((tcp_flags & (CRAB_ACK | CRAB_RST)) == CRAB_ACK) {
        /* The client was answered: the connection has begun, and the one before it is over. */
        if (crab_unlikely(known->settled != NULL))
            *known->settled = (struct crab_entry){0};
        pending->state = CRAB_ENTRY_ESTABLISHED;
        pending->twin = false;
        known->pending = NULL;
    }
    return pending;
}

/* A packet whose options have room for MPTCP's keys, to a backend: where it has them, subflows that join its connection are to
 * go there, too. */
CRAB_APART void learn_token(struct crab_core *core, const struct crab_item *it, const uint8_t *tcp, uint16_t backend,
                            uint32_t now)
{
    const uint8_t *key = crab_option_key(tcp + CRAB_TCP_MIN, it->packet.tcp_header - CRAB_TCP_MIN);
    if (!key)
        return;
    if (core->token_second != now) {
        core->token_second = now;
        core->token_count = 0;
    }
    if (core->token_count < TOKENS_A_SECOND && ++core->token_count)
        crab_joins_learn(core->joins, crab_token(key), (uint16_t)it->service->index, backend);
}

/* Have the XDP program send a flow's packets by itself.  One that is written already is kept right at once. */
CRAB_APART void write_down(struct crab_core *core, const struct crab_flow *flow, bool written)
{
    if (!core->put_off || written) {
        core->counters[CRAB_C_LEARNED] += crab_table_put(core->table, *flow);
        return;
    }
    const struct crab_snapshot *by = atomic_load(&core->hazard);
    uint32_t at = atomic_load(&core->publications);
    if (core->learned_by != by || core->learned_at != at) /* what was decided by another is learned from its next packet */
        core->learned_count = 0;
    core->learned_by = by;
    core->learned_at = at;
    if (core->learned_count < CRAB_BATCH) /* likewise */
        core->learned[core->learned_count++] = *flow;
}

/* Any other packet of a VIP: it belongs to a connection that goes by fallback. */
CRAB_APART enum crab_counter forward_other(struct crab_core *core, const struct crab_snapshot *s,
                                           struct crab_frame *frame, struct crab_item *it, uint32_t now)
{
    struct crab_packet *p = &it->packet;
    struct crab_flow flow;
    struct crab_entry recalled, *before = NULL;
    bool written = is_written(core, it, now, &flow);
    if (written) {
        recalled = recall(&flow);
        before = &recalled;
    }
    uint32_t seq = load32(frame->data + p->l4 + CRAB_TCP_SEQ);
    struct crab_entries known = crab_flows_entries_of(it->bucket, it->hash, now, seq);
    struct crab_entry *f = take(&known, before, p->tcp_flags, seq);
    uint16_t id;
    if (f) {
        id = f->backend;
        if (crab_unlikely(!crab_usable(s, it->service, id))) {
            if (!moves(s, it->service, id))
                return stop(s, frame, it, id);
            id = backend_of(s, it);
            if (id == CRAB_NO_BACKEND)
                return CRAB_C_DROP_NO_BACKEND;
            f->backend = id;
            core->counters[CRAB_C_REASSIGNED]++;
        }
        if (p->tcp_flags & (CRAB_FIN | CRAB_RST) && f != known.pending)
            f->state = CRAB_ENTRY_CLOSING;
        f->seen = (uint16_t)now;
    } else {
        id = backend_of(s, it);
        if (id == CRAB_NO_BACKEND)
            return CRAB_C_DROP_NO_BACKEND;
    }
    const struct crab_backend *backend = &s->backends[id];
    if (core->joins && crab_unlikely(p->tcp_header >= CRAB_TCP_MIN + KEYS))
        learn_token(core, it, frame->data + p->l4, id, now);
    /* Also of backends out of the XDP program's reach, and of those with VLAN tags, which it leaves to us: flows are there for
     * the daemon that comes after us as well.  What is written is kept right, or it would lead back to an earlier backend, or
     * be swept.  While a SYN is pending only we can tell whose packets are whose. */
    bool learn = core->table && !known.pending &&
                 (written || (!(p->tcp_flags & CRAB_RST) && (f || may_learn_unknown(core, now))));
    uint64_t tunnelled = core->counters[CRAB_C_ENCAPSULATED];
    finish(frame, it);
    enum crab_counter outcome = send_by_dsr(core, frame, it, backend, CRAB_C_FALLBACK_ESTABLISHED);
    if (learn && outcome == CRAB_C_FALLBACK_ESTABLISHED) {
        bool ending = f ? f->state == CRAB_ENTRY_CLOSING : p->tcp_flags & CRAB_FIN;
        struct crab_flow learned = {
            .hash = it->hash, .backend = id, .service = (uint16_t)it->service->index, .seen = (uint16_t)now,
            .state = ending ? CRAB_FLOW_ENDING : f ? CRAB_FLOW_OPEN : CRAB_FLOW_LONE,
            .flags = core->counters[CRAB_C_ENCAPSULATED] != tunnelled ? CRAB_FLOW_TUNNEL : 0};
        if (!written || memcmp(&learned, &flow, sizeof flow))
            write_down(core, &learned, written);
    }
    return outcome;
}

/* An ICMP error. */
CRAB_APART enum crab_counter forward_icmp(struct crab_core *core, const struct crab_snapshot *s, struct crab_frame *frame,
                                          struct crab_item *it, uint32_t now)
{
    struct crab_entries known = crab_flows_entries(it->bucket, it->hash, now);
    struct crab_flow flow;
    /* An error comes to another queue than its connection's packets, which knows of an earlier one at best; what is written is
     * kept right by whoever forwards them. */
    uint16_t id = is_written(core, it, now, &flow) ? flow.backend
                  : known.settled                   ? known.settled->backend
                  : known.pending                    ? known.pending->backend
                                                     : CRAB_NO_BACKEND;
    if (id == CRAB_NO_BACKEND)
        id = backend_of(s, it);
    if (!crab_usable(s, it->service, id)) /* it is about a connection that is no other backend's */
        return CRAB_C_DROP_NO_BACKEND;
    frame->len = it->packet.end;
    return send_by_dsr(core, frame, it, &s->backends[id], CRAB_C_FALLBACK_ICMP);
}

void crab_batch_forward(struct crab_batch *b)
{
    for (uint32_t i = 0; i < b->count;) {
        struct crab_item *it = &b->items[i];
        struct crab_frame *frame = &b->frames[i];
        switch (it->kind) {
        case CRAB_KIND_SYN4:
            i = forward_syns_ip4(b, i);
            continue;
        case CRAB_KIND_SYN6:
            i = forward_syns_ip6(b, i);
            continue;
        case CRAB_KIND_TAGGED_SYN:
            count_one(b, i, forward_tagged_syn(b->core, b->s, frame, it, b->now));
            break;
        case CRAB_KIND_ICMP:
            count_one(b, i, forward_icmp(b->core, b->s, frame, it, b->now));
            break;
        case CRAB_KIND_OTHER:
            count_one(b, i, forward_other(b->core, b->s, frame, it, b->now));
            break;
        }
        i++;
    }
}
