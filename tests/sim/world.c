/* SPDX-License-Identifier: MIT */
/* A farm in one process: clients, a router (ECMP), load balancers, servers, under a virtual clock.
 *
 * Reads a scenario (tests/sim/scenario.py writes it) from standard input, plays it, and prints what happened.  Everything that
 * happens follows from the scenario, whose seed is that of all that is random.  Endpoints follow the protocol's page, and are
 * written apart from bpf/ and native/.  Frames carry, beside their bytes, whose they are: only the checks look at that.
 *
 * Exit status 0: no invariant was broken; 1: some were; 2: the scenario is wrong. */
#include "sim.h"
#include "token.h"

#include <sys/mman.h>

#define NONE 0xffffffffu
#define FRAMES 65536
#define WINDOW 4 /* segments */
#define HEADER 9 /* of a request: connection (4), sizes of request and answer (4), rounds (1) */
#define SYN_TRIES 6
#define JOIN_TRIES 3
#define DATA_TRIES 10
#define ANSWER_TIME (30 * S) /* that an application waits */
#define IDLE_TIME (400 * S)  /* until a server forgets a client that says nothing */
#define TIME_WAIT (60 * S)
#define PATIENCE (900 * S) /* since all has healed, or somebody was served: then nobody will be any more */
#define BATCH_AFTER (20 * US)

enum { C_NEW, C_SYN, C_OPEN, C_CLOSING, C_DONE, C_FAILED };
enum { K_SYN_RECEIVED, K_OPEN, K_LAST_ACK, K_FIN_WAIT, K_TIME_WAIT };
enum { E_FRAME, E_CONN, E_CHILD, E_BATCH, E_SCRIPT, E_TASK, E_VIEW };
enum { AT_BALANCER, AT_SERVER, AT_CLIENT };
enum { MP_CAPABLE, MP_JOIN, MP_DSS, MP_ADD_ADDR }; /* RFC 8684, 3 */

/* What a load balancer has seen of a connection. */
struct seen {
    uint64_t members; /* its tables' when it decided */
    uint64_t at;
    uint32_t memory, pending;
    uint8_t server;
    uint8_t level; /* 1: its SYN; 2: more */
    uint8_t data;   /* its SYN had some */
    uint8_t others; /* SYNs with other sequence numbers since, of strangers, or late ones */
};

struct conn {
    uint32_t task, isn, irs;
    uint32_t una, nxt, top, got; /* of the request: acknowledged, sent next, sent at most; of the answer: received */
    uint16_t client, port, request, answer, rounds, round, mss;
    uint8_t service, state, server, tries, copies, family;
    uint8_t acquainted; /* as of its SYN */
    bool offers, stubborn, taken, fast, doomed, excused, pooled, pausing, forges;
    bool waits, ending; /* its server closes first; and has */
    uint64_t deadline, armed, rto, members;
    uint32_t lost;     /* servers, a bit each, whose half of it is lost */
    uint32_t executed; /* serial of the child whose application had the request; 0: none */
    uint32_t lives;    /* of that one's server, then */
    uint8_t executed_by;
    struct seen seen[BALANCERS];
    /* MPTCP.  A subflow is a connection of its own, which takes the rest of the rounds over from the one that it joins. */
    uint32_t joins, moved; /* the connection that it joins; the subflow that has taken over */
    bool asks, multipath;  /* for MPTCP; and has it */
    bool told, tried, full; /* the server's own address; a subflow; it joins the VIP, not that address */
    bool direct;           /* a subflow to the server's own address */
    uint8_t key[8];        /* the server's */
    uint64_t learned[BALANCERS]; /* when its key passed them, as token_age has it; 0: it did not */
    uint8_t led[BALANCERS];      /* and the server that it went to */
};

struct child {
    uint32_t next, serial, irs, iss, got, una, nxt, limit, conn, client;
    uint16_t port, request, answer, rounds, mss;
    uint8_t server, service, via, state, tries, family;
    bool used;
    bool multipath, joined, closes;
    uint8_t key[8], token[4];
    uint64_t deadline, armed, rto;
};

struct task {
    uint8_t served, tried;
};

struct client {
    uint32_t ports[SIM_SERVICES][PORTS];
    uint32_t claims[PORTS]; /* of connections that have a port, the one that may be redirected */
    uint32_t next[SIM_SERVICES];
    uint64_t until[SIM_SERVICES]; /* no offers before */
    uint64_t backoff[SIM_SERVICES];
    bool agent, stubborn, card, fast, forges;
    bool fades; /* behind a NAT that forgets: its connections end without a word, and their ports are used again at once */
    bool multipath, full; /* asks for MPTCP; joins VIPs, though servers ask it not to */
    bool walled; /* whatever is not the VIP's does not get through to it: NAT, a stateful firewall */
};

struct server {
    bool up;
    uint32_t lives;
    uint64_t back; /* until when it returns what was not for it: frames of VIPs */
};

struct script {
    uint64_t at;
    char name[16];
    long a, b, c;
};

struct event {
    uint64_t at;
    uint32_t number, what;
    uint16_t kind, whose;
};

static struct setting setting;
static struct balancer balancers[BALANCERS];
static struct server servers[SERVERS];
static struct client clients[CLIENTS];
static struct child *children;
static struct conn *conns;
static struct task *tasks;
static struct frame *frames;
static uint32_t free_frames[FRAMES], free_count;
static struct event *heap;
static uint32_t heap_count, heap_room, event_number;
static struct script scripts[4096];
static uint32_t script_count;
static uint32_t *child_heads, child_count, child_room, free_child = NONE, child_serial;
static uint32_t conn_count, conn_room, served, task_count = 1000, balancer_count = 1, server_count = 1, client_count = 1;
static uint32_t rate = 10000, agents = 50, ports = PORTS, trace, agents_pending, multipath, collide;
static uint64_t now, progress, seed = 1, heal_at, random_state, birth;
static bool logging;
static struct {
    uint32_t loss, dup, reorder, corrupt; /* of 10,000 */
    uint32_t cut, strip;                  /* 1: no frames between clients and backends' own addresses; no SYN-ACKs with redirects */
    uint32_t narrow;                      /* MTU of the way to clients; 0: any */
} wire;
static bool routed[BALANCERS];
static uint32_t salt;
/* Load balancers, a bit each, that have seen a connection of a client's port to a service.  One that saw an earlier one alone
 * takes what comes of a later one, whose SYN another load balancer had, for that: nobody tells it. */
static uint8_t acquainted[CLIENTS][PORTS][SIM_SERVICES];
static const uint8_t router_mac[6] = {2, 0, 0, 0, 0, 1};

/* What became of frames. */
static struct {
    uint64_t born, delivered, lost, dropped, passed, to_nobody;
    uint64_t batches, redirected, fallback, by_xdp, excused, violations, hostile, limited, refused, resets, timeouts, failures;
    uint64_t checksums, taken, twice_excused, most_passes, learned, restarts;
    uint64_t joins, joins_known, joins_direct, joins_refused, moved;
    uint64_t errors, errors_heeded, tagged, elsewhere;
    uint64_t early, shared, faded, waited, refused_syns;
} tally;

static uint64_t rnd(void)
{
    random_state += 0x9e3779b97f4a7c15ull;
    uint64_t z = random_state;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

static uint32_t below(uint32_t n)
{
    return (uint32_t)((rnd() >> 32) * n >> 32);
}

static bool chance(uint32_t of_10000)
{
    return of_10000 && below(10000) < of_10000;
}

static void *must(void *p)
{
    if (!p || p == MAP_FAILED) {
        fprintf(stderr, "sim: no memory\n");
        exit(2);
    }
    return p;
}

__attribute__((format(printf, 3, 4))) static void violation(const char *what, uint32_t conn, const char *how, ...)
{
    static struct {
        const char *what;
        uint32_t count;
    } kinds[32];
    uint32_t i = 0;
    tally.violations++;
    while (kinds[i].what && strcmp(kinds[i].what, what))
        i++;
    kinds[i].what = what;
    if (kinds[i].count++ >= 5) /* the first ones say it */
        return;
    va_list list;
    printf("violation %s at=%.6f conn=%u ", what, (double)now / S, conn);
    va_start(list, how);
    vprintf(how, list);
    va_end(list);
    printf("\n");
}

/* ---- events ---- */

static bool sooner(const struct event *a, const struct event *b)
{
    return a->at != b->at ? a->at < b->at : (int32_t)(a->number - b->number) < 0;
}

static void push(uint64_t at, uint16_t kind, uint16_t whose, uint32_t what)
{
    if (heap_count == heap_room)
        heap = must(realloc(heap, (heap_room = heap_room ? 2 * heap_room : 65536) * sizeof *heap));
    struct event e = {at, event_number++, what, kind, whose};
    uint32_t i = heap_count++;
    for (; i && sooner(&e, &heap[(i - 1) / 4]); i = (i - 1) / 4)
        heap[i] = heap[(i - 1) / 4];
    heap[i] = e;
}

static struct event pop(void)
{
    struct event first = heap[0], last = heap[--heap_count];
    for (uint32_t i = 0;;) {
        uint32_t least = 4 * i + 1;
        if (least >= heap_count) {
            heap[i] = last;
            return first;
        }
        for (uint32_t k = 4 * i + 2; k <= 4 * i + 4 && k < heap_count; k++)
            if (sooner(&heap[k], &heap[least]))
                least = k;
        if (!sooner(&heap[least], &last)) {
            heap[i] = last;
            return first;
        }
        heap[i] = heap[least];
        i = least;
    }
}

/* A timer is an event that looks again: it is put off without being taken out. */
static void arm(uint64_t *deadline, uint64_t *armed, uint64_t at, uint16_t kind, uint32_t what)
{
    *deadline = at;
    if (at && (!*armed || at < *armed)) {
        *armed = at;
        push(at, kind, 0, what);
    }
}

static bool fires(uint64_t *deadline, uint64_t *armed, uint16_t kind, uint32_t what)
{
    if (*armed != now) /* one that was armed for later */
        return false;
    *armed = 0;
    if (*deadline > now)
        arm(deadline, armed, *deadline, kind, what);
    return *deadline == now;
}

/* ---- addresses ---- */

static void client_address(uint8_t to[16], uint32_t client, uint32_t family)
{
    memset(to, 0, 16);
    if (family == 4)
        memcpy(to, "\0\0\0\0\0\0\0\0\0\0\xff\xff\x0a\x01", 14);
    else
        memcpy(to, "\xfd\x01", 2);
    to[14] = (uint8_t)(client >> 8);
    to[15] = (uint8_t)client;
}

static uint32_t client_of(const uint8_t *addr)
{
    uint8_t own[16];
    uint32_t client = (uint32_t)addr[14] << 8 | addr[15];
    client_address(own, client, addr[0] ? 6 : 4);
    return client < client_count && !memcmp(own, addr, 16) ? client : NONE;
}

static uint32_t server_of(const uint8_t *addr)
{
    for (uint32_t v6 = 0; v6 < 2; v6++)
        if (addr[15] && addr[15] <= server_count && !memcmp(addr, setting.dip[v6][addr[15] - 1], 16))
            return addr[15] - 1u;
    return NONE;
}

static uint32_t service_of(const uint8_t *addr, uint16_t port)
{
    for (uint32_t n = 0; n < setting.services; n++)
        if (!memcmp(addr, setting.service[n].addr, 16) && port == ntohs(setting.service[n].port_be))
            return n;
    return NONE;
}

/* ---- frames and the wire ---- */

static struct frame *new_frame(uint32_t conn)
{
    if (!free_count) {
        fprintf(stderr, "sim: more than %u frames under way\n", FRAMES);
        exit(2);
    }
    struct frame *f = &frames[free_frames[--free_count]];
    memset(f, 0, offsetof(struct frame, place));
    f->conn = conn;
    f->server = NOBODY;
    f->birth = birth++;
    tally.born++;
    return f;
}

static void end_frame(struct frame *f, uint64_t *why)
{
    ++*why;
    free_frames[free_count++] = (uint32_t)(f - frames);
}

static void show(const struct frame *f, const char *where, uint32_t whose)
{
    struct frame copy = *f;
    struct segment s;
    copy.data = copy.place + (f->data - f->place);
    if (!trace || f->conn != trace)
        return;
    int read = frame_read(&copy, &s);
    s.flags *= !s.icmp;
    printf("trace %.6f %s %u packet=%llu ", (double)now / S, where, whose, (unsigned long long)f->birth);
    if (read)
        printf("%s%u.%u>%u.%u:%u %s%s%s%s%s seq=%u ack=%u len=%u tunnels=%u\n", read < 0 ? "(checksum) " : "", s.from[14], s.from[15], s.to[14], s.to[15], s.dport,
               s.icmp ? "icmp " : "", s.flags & 2 ? "S" : "", s.flags & 1 ? "F" : "", s.flags & 4 ? "R" : "",
               s.flags & 16 ? "." : "", s.seq, s.ack, s.length, s.tunnels);
    else
        printf("unreadable\n");
}

static void move(struct frame *f, uint16_t where, uint32_t whose, uint64_t delay)
{
    if (chance(wire.loss)) {
        end_frame(f, &tally.lost);
        return;
    }
    if (chance(wire.dup)) {
        struct frame *twin = new_frame(f->conn);
        ptrdiff_t at = f->data - f->place;
        uint64_t number = twin->birth;
        memcpy(twin, f, sizeof *f);
        twin->birth = number;
        twin->copy = f->copy = 1;
        twin->data = twin->place + at;
        push(now + delay + below(3000) * US, E_FRAME, (uint16_t)(where << 12 | whose), (uint32_t)(twin - frames));
    }
    if (chance(wire.corrupt) && !f->corrupt)
        frame_corrupt(f, rnd());
    if (chance(wire.reorder))
        delay += below(5000) * US;
    push(now + delay, E_FRAME, (uint16_t)(where << 12 | whose), (uint32_t)(f - frames));
}

static uint64_t mix(uint64_t h)
{
    h = (h ^ h >> 33) * 0xff51afd7ed558ccdull;
    h = (h ^ h >> 33) * 0xc4ceb9fe1a85ec53ull;
    return h ^ h >> 33;
}

static uint64_t tuple_hash(const struct segment *s)
{
    return mix((uint64_t)s->from[15] << 40 | (uint64_t)s->from[14] << 48 | (uint64_t)s->to[15] << 32 | (uint64_t)s->sport << 16 | s->dport);
}

/* To a load balancer, by a hash. */
static void to_vip(struct frame *f, uint64_t hash)
{
    uint32_t n = 0, alive[BALANCERS];
    for (uint32_t l = 0; l < balancer_count; l++)
        if (routed[l])
            alive[n++] = l;
    if (!n) {
        end_frame(f, &tally.lost);
        return;
    }
    uint32_t l = alive[mix(hash ^ salt) % n];
    memcpy(f->data, balancers[l].mac, 6);
    memcpy(f->data + 6, router_mac, 6);
    move(f, AT_BALANCER, l, 150 * US + below(50) * US);
}

/* The router says to a server that its frame is too long: to its address, or to the VIP's, where a load balancer takes it (by the
 * router's address and not by the client's: another one, perhaps, than takes the connection). */
static void complain(const struct frame *about, const struct segment *s)
{
    uint32_t backend = server_of(s->from), sender = NONE;
    for (uint32_t i = 0; i < server_count; i++)
        if (!memcmp(about->data + 6, setting.mac[i], 6))
            sender = i;
    uint8_t router[16];
    client_address(router, 0xfffe, crab_is_mapped(s->to) ? 4 : 6);
    struct frame *f = new_frame(about->conn);
    frame_complain(f, about, router, wire.narrow);
    f->server = (uint8_t)sender;
    tally.errors++;
    if (backend == NONE) {
        to_vip(f, tuple_hash(s) * 31);
        return;
    }
    memcpy(f->data, setting.mac[backend], 6);
    memcpy(f->data + 6, router_mac, 6);
    move(f, AT_SERVER, backend, 200 * US + below(50) * US);
}

/* A client's or server's frame, by the router, or along the segment. */
static void route(struct frame *f, const struct segment *s, bool from_client)
{
    uint32_t to = client_of(s->to), backend = server_of(s->to);
    uint32_t with = from_client ? client_of(s->from) : to;
    bool direct = backend != NONE || (!from_client && server_of(s->from) != NONE);
    if (direct && (wire.cut || (with != NONE && clients[with].walled))) {
        end_frame(f, &tally.lost);
        return;
    }
    if (to != NONE && !from_client && wire.narrow && f->len - 14 > wire.narrow) {
        complain(f, s);
        end_frame(f, &tally.lost);
    } else if (to != NONE) {
        uint8_t vip[16];
        if (wire.strip && options_redirects(s, vip))
            end_frame(f, &tally.lost);
        else
            move(f, AT_CLIENT, to, 200 * US + below(50) * US);
    } else if (backend != NONE) {
        memcpy(f->data, setting.mac[backend], 6);
        memcpy(f->data + 6, router_mac, 6);
        move(f, AT_SERVER, backend, 200 * US + below(50) * US);
    } else if (from_client) {
        to_vip(f, tuple_hash(s));
    } else {
        end_frame(f, &tally.to_nobody);
    }
}

/* ---- options of MPTCP ---- */

/* One of a subtype and so many bytes (0: any), or NULL. */
static const uint8_t *multipath_option(const struct segment *s, uint32_t subtype, uint32_t size)
{
    for (uint32_t i = 0; i + 2 <= s->option_count && s->options[i]; i += s->options[i] == 1 ? 1 : s->options[i + 1]) {
        const uint8_t *o = &s->options[i];
        if (o[0] != 1 && (o[1] < 2 || i + o[1] > s->option_count))
            return NULL;
        if (o[0] == 30 && o[1] > 2 && o[2] >> 4 == subtype && (!size || o[1] == size))
            return o;
    }
    return NULL;
}

/* Append one, whose bytes behind the first four are these and zeros, and NOPs. */
static void say_multipath(struct segment *s, uint32_t subtype, uint8_t flags, uint32_t size, const uint8_t *bytes, uint32_t n)
{
    uint8_t *o = s->options + s->option_count;
    memset(o, 0, size);
    o[0] = 30;
    o[1] = (uint8_t)size;
    o[2] = (uint8_t)(subtype << 4 | (subtype == MP_CAPABLE));
    o[3] = flags;
    memcpy(o + 4, bytes, n);
    for (s->option_count += size; s->option_count % 4;)
        s->options[s->option_count++] = 1;
}

/* ---- load balancers ---- */

/* Where tables are so small that some connections find no room: what counts is what a load balancer says that it remembers. */
static bool is_small(void)
{
    return setting.cache < 1 << 18 || setting.flows < 1 << 16;
}

static uint8_t *acquaintance(const struct conn *c)
{
    return &acquainted[c->client][c->port - FIRST_PORT][c->service];
}

static bool knows(const struct balancer *b, const struct seen *s)
{
    if (s->level == 2)
        return s->memory == b->memory && (b->serving || !is_small());
    return s->level == 1 && !is_small() && s->memory == b->memory && s->pending == b->pending && now - s->at < (CRAB_AGE_SYN - 2) * S;
}

/* It remembers two SYNs of a four-tuple that are not acknowledged yet: a third one may have taken the place. */
static bool displaced(const struct conn *c, const struct seen *s)
{
    uint32_t earlier = c->acquainted >> (s - c->seen) & 1;
    return s->level == 1 && s->others + earlier > 1;
}

static uint64_t hash_of(const struct conn *c)
{
    uint8_t client[16];
    client_address(client, c->client, c->family);
    return crab_flow_hash(setting.key, client, setting.service[c->service].addr, htons(c->port), htons(80));
}

/* Are there as many live entries as its bucket of a cache has places?  Then a SYN may have made room for another. */
static bool is_crowded(const struct balancer *b, const struct conn *c)
{
    for (uint32_t q = 0; q < SIM_QUEUES && b->serving; q++) {
        uint64_t bytes;
        const struct crab_entry *entries = (const void *)crab_core_flows(b->cores[q], &bytes);
        const struct crab_entry *bucket = &entries[(hash_of(c) & (bytes / CRAB_PART - 1)) * CRAB_BUCKET];
        uint32_t live = 0;
        for (int i = 0; i < CRAB_BUCKET; i++)
            live += !crab_entry_dead(&bucket[i], (uint32_t)(now / S));
        if (live == CRAB_BUCKET)
            return true;
    }
    return false;
}

static bool remembers(const struct balancer *b, const struct conn *c, uint32_t server)
{
    struct crab_memory found[2];
    uint64_t hash = hash_of(c);
    for (uint32_t q = 0; q < SIM_QUEUES && b->serving; q++)
        for (uint32_t n = crab_core_recall(b->cores[q], hash, (uint32_t)(now / S), found); n; n--)
            if (found[n - 1].state == CRAB_MEMORY_OPEN && found[n - 1].backend % SERVERS == server)
                return true;
    return false;
}

/* How often a load balancer has forgotten a server's tokens. */
static uint64_t token_age(const struct balancer *b, uint32_t server, uint32_t family)
{
    return 1ull + b->memory + b->pending + b->swept[server + (family == 6 ? SERVERS : 0)];
}

/* A subflow's first SYN leaves a load balancer that knows its connection: it is to go to that one's server. */
static void check_join(const struct balancer *b, uint32_t id, uint32_t server)
{
    uint32_t l = (uint32_t)(b - balancers);
    const struct conn *c = &conns[id], *whole = &conns[c->joins];
    const struct backend_view *v = &b->view[whole->led[l]];
    if (!whole->learned[l] || whole->learned[l] != token_age(b, whole->led[l], c->family) || !v->resolved || v->dead || is_small())
        return;
    tally.joins_known++;
    if (server != whole->led[l])
        violation("join-strayed", id, "a subflow's SYN was sent to server %u, its connection is server %u's", server, whole->led[l]);
}

/* A stranger's FIN or RST: the flow that it names makes room for others sooner. */
static void note_end(struct balancer *b, const struct segment *s, uint32_t service)
{
    uint32_t client = client_of(s->from), port = s->sport - FIRST_PORT;
    if (is_small() && client != NONE && port < PORTS && service != NONE)
        conns[clients[client].ports[service][port]].seen[b - balancers].level = 0;
}

/* A SYN to a service, of any connection's, or a stranger's packet: who knows nothing of a flow learns it from that. */
static void note_other(const struct balancer *b, const struct segment *s, uint32_t service)
{
    uint32_t client = client_of(s->from), port = s->sport - FIRST_PORT;
    if (client == NONE || port >= PORTS || service == NONE)
        return;
    struct conn *c = &conns[clients[client].ports[service][port]];
    struct seen *seen = &c->seen[b - balancers];
    if (c->service == service && c->isn != s->seq && seen->others < 255)
        seen->others++;
}

/* A frame of a connection's leaves a load balancer for a server: may it? */
static void check_way(struct balancer *b, const struct frame *f, const struct segment *s, uint32_t server)
{
    struct conn *c = &conns[f->conn];
    struct seen *seen = &c->seen[b - balancers];
    bool known = knows(b, seen) && !displaced(c, seen), lives = !c->doomed && !c->excused;
    uint64_t members = known ? seen->members : b->members;
    /* Whoever does not know a connection goes by what SYN of its four-tuple he has seen last. */
    bool mistaken = !known && (seen->others || c->acquainted >> (b - balancers) & 1);
    if (is_small() && c->acquainted) /* a SYN that there is no room for goes where its port's last connection went */
        mistaken |= !known;
    if (is_small() && seen->level && seen->server == server) /* or where its own SYN went */
        mistaken |= !known;
    *acquaintance(c) |= (uint8_t)(1u << (b - balancers));
    if (s->flags & CRAB_SYN) {
        if (s->seq != c->isn || c->state > C_CLOSING)
            return;
        for (uint32_t l = 0; l < balancer_count; l++)
            if (c->seen[l].level && c->seen[l].server != server && &c->seen[l] != seen)
                c->excused |= c->seen[l].members != b->members || setting.service[c->service].policy || c->joins;
        if (c->joins && !seen->level)
            check_join(b, f->conn, server);
        if (seen->level && seen->server != server) {
            const struct backend_view *v = &b->view[seen->server];
            /* What it had in its SYN may be executed there: it waits until there is a way again. */
            bool waits = v->resolved || seen->data;
            if (known && lives && waits && !v->dead && !is_crowded(b, c))
                violation("copy-moved", f->conn, "a SYN's copy went to server %u, the one before to %u", server, seen->server);
            c->excused |= !known || !waits;
        }
        /* Where a copy goes again while it is not certain that its load balancer remembers, the tables of the first may have decided. */
        bool unsure = !known && seen->level && seen->server == server && seen->members != b->members;
        if (!known || seen->server != server)
            *seen = (struct seen){.members = unsure ? 0 : b->members, .memory = b->memory, .pending = b->pending, .server = (uint8_t)server,
                                  .level = 1};
        seen->data |= s->length != 0;
        seen->at = now;
        return;
    }
    if (c->state == C_OPEN && !c->taken && c->server != server && lives) {
        mistaken |= known && seen->level == 1 && is_crowded(b, c);
        known &= !mistaken;
        if ((known && seen->server == c->server) || (members == c->members && !c->pooled && !mistaken)) {
            violation("moved", f->conn, "a packet of server %u's connection was sent to server %u", c->server, server);
        } else {
            c->excused = true;
            tally.excused++;
        }
    }
    if (s->flags & CRAB_ACK && !(s->flags & CRAB_RST)) {
        if (!known)
            *seen = (struct seen){.members = b->members, .memory = b->memory, .pending = b->pending};
        seen->level = is_small() && !remembers(b, c, server) ? 0 : 2;
        seen->server = (uint8_t)server;
        seen->at = now;
    }
}

/* An ICMP error about what a server sent from a VIP leaves a load balancer for a server: is it that one?  It comes to any queue,
 * which knows of another's connections what map `flows` has room for. */
static void check_error(const struct balancer *b, const struct frame *f, uint32_t server)
{
    const struct conn *c = &conns[f->conn];
    const struct seen *seen = &c->seen[b - balancers];
    bool known = knows(b, seen) && seen->level == 2 && !is_crowded(b, c);
    bool mistaken = !known && (seen->others || c->acquainted || seen->level);
    if (is_small() || c->state != C_OPEN || c->doomed || c->excused || f->server != c->server || server == f->server)
        return;
    if ((known && seen->server == c->server) || (b->members == c->members && !c->pooled && !mistaken))
        violation("error-moved", f->conn, "an error about server %u's packet was sent to server %u", f->server, server);
}

/* A frame that a load balancer sends; by_worker: not by the XDP program alone. */
static void leave(struct balancer *b, struct frame *f, bool by_worker)
{
    struct segment s;
    uint32_t who = (uint32_t)(b - balancers), ifindex = f->ifindex;
    /* Tags are those of the interface that it came in by. */
    if (!frame_untag(f, ifindex == SIM_IFINDEX && f->came == ifindex ? setting.tags : 0))
        violation("tags", f->conn, "a frame came by interface %u and leaves by %u, with other VLAN tags than it should have", f->came, ifindex);
    f->ifindex = 0;
    int read = frame_read(f, &s);
    show(f, "balancer-out", who);
    if (++f->passes > tally.most_passes)
        tally.most_passes = f->passes;
    if (f->passes > 64) {
        violation("loop", f->conn, "packet %llu passes load balancers for the %uth time", (unsigned long long)f->birth, f->passes);
        end_frame(f, &tally.dropped);
        return;
    }
    if (f->corrupt && read == 1)
        violation("healed", f->conn, "a packet that was corrupted has a right checksum");
    if (!f->corrupt && read < 0)
        violation("checksum", f->conn, "a packet that nobody corrupted has a wrong checksum");
    uint32_t server = NONE;
    for (uint32_t i = 0; i < server_count; i++)
        if (!memcmp(f->data, setting.mac[i], 6))
            server = i;
    if (ifindex != (server == NONE ? SIM_IFINDEX : sim_interface(&setting, server)))
        violation("interface", f->conn, "a frame leaves by interface %u, where whom it is for is not", ifindex);
    tally.elsewhere += ifindex != SIM_IFINDEX;
    if (server != NONE) {
        if (read == 1 && s.icmp && f->conn && f->server != NOBODY)
            check_error(b, f, server);
        if (read == 1 && s.flags & CRAB_SYN && !s.icmp) {
            uint8_t vip[16];
            int redirects = options_redirects(&s, vip);
            bool redirected = server_of(s.to) != NONE;
            if (redirects != redirected || (redirected && service_of(vip, s.dport) == NONE))
                violation("forged", f->conn, "%d redirects in a SYN that was %s", redirects, redirected ? "redirected" : "not redirected");
            if (redirected && f->hostile == 2)
                violation("data", f->conn, "a SYN with data was redirected");
            if (redirected && multipath_option(&s, MP_JOIN, 12))
                violation("join-redirected", f->conn, "a subflow's SYN was redirected");
            note_other(b, &s, redirected ? service_of(vip, s.dport) : service_of(s.to, s.dport));
            f->redirected = redirected;
            tally.redirected += redirected;
        }
        if (read == 1 && f->conn && !s.icmp)
            check_way(b, f, &s, server);
        if (read == 1 && f->conn && !s.icmp && by_worker && (multipath_option(&s, MP_CAPABLE, 20) || multipath_option(&s, MP_CAPABLE, 22))) {
            conns[f->conn].learned[who] = token_age(b, server, s.family);
            conns[f->conn].led[who] = (uint8_t)server;
        }
        if (read == 1 && !f->conn && !(s.flags & CRAB_SYN))
            note_other(b, &s, service_of(s.to, s.dport));
        if (read == 1 && !f->conn && s.flags & (CRAB_FIN | CRAB_RST))
            note_end(b, &s, service_of(s.to, s.dport));
        tally.fallback += !f->redirected;
        move(f, AT_SERVER, server, 40 * US + below(20) * US);
        return;
    }
    if (!memcmp(f->data, router_mac, 6)) {
        struct conn *c = &conns[f->conn];
        if (f->conn && (c->acquainted >> who & 1 || c->seen[who].others) && !knows(b, &c->seen[who]))
            c->excused = true;
        uint32_t client = read == 1 ? client_of(s.icmp ? s.from : s.to) : NONE; /* an error is about what he sent */
        if (client != NONE)
            move(f, AT_CLIENT, client, 200 * US);
        else
            end_frame(f, &tally.to_nobody);
        return;
    }
    for (uint32_t l = 0; l < balancer_count; l++)
        if (!memcmp(f->data, balancers[l].mac, 6)) {
            move(f, AT_BALANCER, l, 40 * US);
            return;
        }
    violation("nobody", f->conn, "a packet was sent to a MAC address that nobody has");
    end_frame(f, &tally.to_nobody);
}

static uint64_t outcomes(const uint64_t *counters, uint32_t from, uint32_t to)
{
    uint64_t sum = 0;
    for (uint32_t i = from; i <= to; i++)
        sum += counters[i];
    return sum;
}

static void work(struct balancer *b, uint32_t q)
{
    uint32_t n = b->count[q] < CRAB_BATCH ? b->count[q] : CRAB_BATCH;
    if (!n || !b->serving)
        return;
    struct crab_frame batch[CRAB_BATCH];
    uint64_t before[CRAB_COUNTERS], *after = b->counters[q];
    memcpy(before, after, sizeof before);
    for (uint32_t i = 0; i < n; i++)
        batch[i] = (struct crab_frame){.data = b->waiting[q][i]->data, .len = b->waiting[q][i]->len,
                                        .ifindex = b->waiting[q][i]->ifindex};
    uint32_t kept = crab_core_batch(b->cores[q], batch, n, (uint32_t)(now / S)), sent = 0;
    tally.batches++;
    for (uint32_t i = 0; i < n; i++) {
        struct frame *f = b->waiting[q][i];
        f->data = batch[i].data;
        f->len = batch[i].len;
        f->ifindex = (uint8_t)batch[i].ifindex;
        if (f->len) {
            sent++;
            leave(b, f, true);
        } else {
            end_frame(f, &tally.dropped);
        }
    }
    crab_core_settle(b->cores[q]);
    b->count[q] -= n;
    memmove(b->waiting[q], b->waiting[q] + n, b->count[q] * sizeof *b->waiting[q]);
    uint64_t forwarded = outcomes(after, CRAB_C_REDIRECTED, CRAB_C_HANDLER_KEPT) - outcomes(before, CRAB_C_REDIRECTED, CRAB_C_HANDLER_KEPT);
    uint64_t dropped = outcomes(after, CRAB_C_DROP_NOT_SERVICE, CRAB_C_DROP_TX) - outcomes(before, CRAB_C_DROP_NOT_SERVICE, CRAB_C_DROP_TX);
    if (after[CRAB_C_RECEIVED] - before[CRAB_C_RECEIVED] != n || kept != sent)
        violation("conserved", 0, "%u frames in, %u kept, %u to be sent", n, kept, sent);
    if (forwarded != sent || dropped != n - sent)
        violation("reason", 0, "%u frames: %u sent, counted %llu; %u dropped, counted %llu", n, sent,
                  (unsigned long long)forwarded, n - sent, (unsigned long long)dropped);
    if (b->count[q])
        push(now + BATCH_AFTER, E_BATCH, (uint16_t)(b - balancers), q);
    else
        b->woken[q] = false;
}

/* What SYNs a service takes: tokens, counted one by one. */
static struct bucket {
    uint32_t rate;
    uint64_t at;
    double held;
} buckets[BALANCERS][SIM_SERVICES];

static void fill(struct bucket *b)
{
    *b = (struct bucket){setting.syn_rate, now, setting.syn_rate / 10 > 16 ? setting.syn_rate / 10 : 16};
}

/* All of a load balancer's, or those whose rate has changed. */
static void fill_buckets(const struct balancer *b, bool all)
{
    for (uint32_t n = 0; n < setting.services; n++)
        if (all || buckets[b - balancers][n].rate != setting.syn_rate)
            fill(&buckets[b - balancers][n]);
}

/* The service that a SYN is sent to, whatever else is wrong with it; NONE: it is none. */
static uint32_t service_of_syn(const struct frame *f)
{
    const uint8_t *ip = f->data + 14 + 4 * (f->ifindex == SIM_IFINDEX ? setting.tags : 0);
    bool four = ip[0] >> 4 == 4;
    const uint8_t *tcp = ip + (four ? 20 : 40);
    if (tcp + 20 > f->data + f->len || (four ? ip[9] : ip[6]) != 6 || !(tcp[13] & CRAB_SYN))
        return NONE;
    for (uint32_t n = 0; n < setting.services; n++) {
        const struct service_setting *s = &setting.service[n];
        if (crab_is_mapped(s->addr) == four && !memcmp(four ? s->addr + 12 : s->addr, four ? ip + 16 : ip + 24, four ? 4 : 16) &&
            !memcmp(&s->port_be, tcp + 2, 2))
            return n;
    }
    return NONE;
}

/* A service's SYN is dropped where there is no token left, and nothing else is.  why: the XDP program's counter. */
static void check_rate(const struct balancer *b, const struct frame *f, uint32_t why)
{
    bool dropped = why == CRAB_XDP_DROP_SYN_RATE;
    if (!dropped && why != CRAB_XDP_SYN && why != CRAB_XDP_DROP_NO_SOCKET)
        return;
    uint32_t n = service_of_syn(f);
    tally.limited += dropped;
    if (n == NONE || !setting.syn_rate) {
        if (dropped)
            violation("rate", f->conn, "dropped for its rate, and it is %s", n == NONE ? "no SYN" : "of a service without one");
        return;
    }
    struct bucket *k = &buckets[b - balancers][n];
    double room = k->rate / 10 > 16 ? k->rate / 10 : 16, one = 1e9 / (1000000000u / k->rate);
    k->held += (double)(now - k->at) / 1e9 * one;
    k->held = k->held > room ? room : k->held;
    k->at = now;
    if (dropped ? k->held > 1 + 1e-6 : k->held < 1 - 1e-6)
        violation("rate", f->conn, "%s, and there are %.3f tokens", dropped ? "dropped" : "taken", k->held);
    k->held -= !dropped;
}

static void arrive_at_balancer(struct balancer *b, struct frame *f)
{
    struct segment s;
    uint32_t why, q = 0;
    show(f, "balancer-in", (uint32_t)(b - balancers));
    if (!b->up) {
        end_frame(f, &tally.lost);
        return;
    }
    if (f->corrupt && frame_looks_partial(f)) { /* it says that its card sums it up: nobody can tell */
        end_frame(f, &tally.lost);
        return;
    }
    if (frame_read(f, &s)) /* receive-side scaling looks at addresses and ports alone */
        q = (uint32_t)(mix(tuple_hash(&s)) % SIM_QUEUES);
    if (f->data - f->place < CRAB_HEADROOM) { /* it came through a tunnel: a driver puts it where there is room */
        memmove(f->place + SIM_HEADROOM, f->data, f->len);
        f->data = f->place + SIM_HEADROOM;
    }
    if (!f->ifindex)
        f->ifindex = SIM_IFINDEX;
    if (f->ifindex == SIM_IFINDEX)
        frame_tag(f, setting.tags);
    f->came = f->ifindex;
    tally.tagged += f->ifindex == SIM_IFINDEX && setting.tags;
    int verdict = sim_xdp(&b->xdp, f, q, now, &why);
    if (why >= CRAB_XDP_COUNTERS)
        violation("reason", f->conn, "the XDP program counted a packet %s", why == CRAB_XDP_COUNTERS ? "nowhere" : "twice");
    check_rate(b, f, why);
    switch (verdict) {
    case XDP_IS_SENT:
        tally.by_xdp++;
        leave(b, f, false);
        return;
    case XDP_IS_PASSED:
        end_frame(f, &tally.passed);
        return;
    case XDP_IS_DROPPED:
        end_frame(f, &tally.dropped);
        return;
    }
    if (b->count[q] == SIM_WAITING) {
        end_frame(f, &tally.lost);
        return;
    }
    b->waiting[q][b->count[q]++] = f;
    if (!b->woken[q]) {
        b->woken[q] = true;
        push(now + BATCH_AFTER, E_BATCH, (uint16_t)(b - balancers), q);
    }
}

/* What waited for a daemon that is no more. */
static void forget_waiting(struct balancer *b)
{
    for (uint32_t q = 0; q < SIM_QUEUES; q++) {
        for (uint32_t i = 0; i < b->count[q]; i++)
            end_frame(b->waiting[q][i], &tally.lost);
        b->count[q] = 0;
        b->woken[q] = false;
    }
}

/* ---- servers ---- */

static uint8_t pattern(uint32_t conn, uint32_t at)
{
    return (uint8_t)(conn * 31 + at * 7 + (at >> 8));
}

static uint32_t child_place(uint32_t server, uint32_t client, uint32_t port, uint32_t via)
{
    return (uint32_t)mix((uint64_t)server << 48 | (uint64_t)client << 24 | port << 4 | via) & 0xffff;
}

/* via: 0 and 1: by the server's own address, of IPv4, IPv6; 2 + n: by the VIP of service n. */
static uint32_t find_child(uint32_t server, uint32_t client, uint32_t port, uint32_t via)
{
    for (uint32_t i = child_heads[child_place(server, client, port, via)]; i != NONE; i = children[i].next) {
        struct child *k = &children[i];
        if (k->server == server && k->client == client && k->port == port && k->via == via)
            return i;
    }
    return NONE;
}

static uint32_t new_child(uint32_t server, uint32_t client, uint32_t port, uint32_t via)
{
    uint32_t i = free_child, *head = &child_heads[child_place(server, client, port, via)];
    if (i == NONE) {
        if (child_count == child_room) {
            fprintf(stderr, "sim: more than %u connections at servers\n", child_room);
            exit(2);
        }
        i = child_count++;
    } else {
        free_child = children[i].next;
    }
    uint64_t armed = children[i].armed;
    children[i] = (struct child){.next = *head, .serial = ++child_serial, .server = (uint8_t)server, .client = client,
                                 .port = (uint16_t)port, .via = (uint8_t)via, .iss = (uint32_t)rnd(), .used = true, .mss = 1000, .armed = armed};
    *head = i;
    return i;
}

static void drop_child(uint32_t i)
{
    struct child *k = &children[i];
    uint32_t *at = &child_heads[child_place(k->server, k->client, k->port, k->via)];
    while (*at != i)
        at = &children[*at].next;
    *at = k->next;
    k->used = false;
    k->deadline = 0;
    k->next = free_child;
    free_child = i;
}

/* seq, from 0: of the answer; NONE: of the SYN-ACK. */
static void server_say(struct child *k, uint8_t flags, uint32_t at, uint32_t length)
{
    struct frame *f = new_frame(k->conn);
    struct segment s = {.sport = 80, .dport = k->port, .flags = flags, .seq = at == NONE ? k->iss : k->iss + 1 + at,
                        .ack = k->irs + 1 + k->got + (k->state == K_LAST_ACK || k->state == K_TIME_WAIT), .length = length};
    uint8_t payload[1500];
    if (k->via < 2)
        memcpy(s.from, setting.dip[k->via][k->server], 16);
    else
        memcpy(s.from, setting.service[k->via - 2].addr, 16);
    client_address(s.to, k->client, k->family);
    for (uint32_t i = 0; i < length; i++)
        payload[i] = pattern(~k->conn, at + i);
    s.payload = payload;
    if (at == NONE && k->via < 2) { /* the redirect, echoed */
        bool v6 = k->via == 1;
        s.option_count = v6 ? 20 : 8;
        memcpy(s.options, v6 ? "\x2a\x12" : "\x2a\x06", 2);
        memcpy(s.options + 2, setting.service[k->service].addr + (v6 ? 0 : 12), v6 ? 16 : 4);
        memset(s.options + (v6 ? 18 : 6), 1, 2);
        s.option_count *= !k->joined;
    }
    if (k->multipath && at == NONE)
        say_multipath(&s, k->joined ? MP_JOIN : MP_CAPABLE, 0x81 | 0x20 * !k->joined, k->joined ? 16 : 12, k->key, k->joined ? 0 : 8);
    else if (k->multipath && !k->joined && !length && k->via >= 2) /* "come to my own address" */
        say_multipath(&s, MP_ADD_ADDR, 1, k->family == 4 ? 16 : 28, setting.dip[k->family == 6][k->server] + (k->family == 4 ? 12 : 0), k->family == 4 ? 4 : 16);
    frame_write(f, router_mac, setting.mac[k->server], &s);
    show(f, "server-out", k->server);
    route(f, &s, false);
}

static void server_output(uint32_t i)
{
    struct child *k = &children[i];
    while (k->nxt < k->limit && k->nxt - k->una < WINDOW * 1000u) {
        uint32_t n = k->limit - k->nxt < k->mss ? k->limit - k->nxt : k->mss;
        server_say(k, CRAB_ACK, k->nxt, n);
        k->nxt += n;
    }
    if (k->state == K_OPEN && k->closes && k->limit == (uint32_t)k->rounds * k->answer && k->nxt == k->limit) {
        k->state = K_FIN_WAIT;
        server_say(k, CRAB_FIN | CRAB_ACK, k->limit, 0);
    }
    bool waits = k->una < k->nxt || k->state != K_OPEN;
    arm(&k->deadline, &k->armed, now + (k->state == K_TIME_WAIT ? TIME_WAIT : waits ? k->rto : IDLE_TIME), E_CHILD, i);
}

/* What it has of the request lets it answer. */
static void grant(struct child *k)
{
    uint32_t whole = k->request ? k->got / k->request : 0;
    k->limit = (whole < k->rounds ? whole : k->rounds) * k->answer;
}

/* The application reads. */
static void execute(struct child *k, const struct frame *f, const struct segment *s, uint32_t skip)
{
    const uint8_t *p = s->payload;
    if (!k->got) {
        if (s->length < HEADER) {
            violation("bytes", f->conn, "a request begins with %u bytes", s->length);
            return;
        }
        k->conn = (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
        k->request = (uint16_t)(p[4] << 8 | p[5]);
        k->answer = (uint16_t)(p[6] << 8 | p[7]);
        k->rounds = p[8] & 127;
        k->closes = p[8] & 128;
        if (k->conn >= conn_count || !k->conn) {
            violation("bytes", f->conn, "a request of connection %u", k->conn);
            k->conn = 0;
            return;
        }
        struct conn *c = &conns[k->conn];
        if (c->executed && c->executed != k->serial) {
            /* A SYN with data that the network sends twice may be executed twice: RFC 7413, 2.1. */
            if (c->excused || c->doomed || (f->copy && s->flags & CRAB_SYN) || servers[c->executed_by].lives != c->lives)
                tally.twice_excused++;
            else
                violation("twice", k->conn, "server %u executes a request that server %u has executed", k->server, c->executed_by);
        }
        c->executed = k->serial;
        c->executed_by = k->server;
        c->lives = servers[k->server].lives;
    }
    if (k->conn != f->conn)
        violation("bytes", f->conn, "its data are in connection %u", k->conn);
    for (uint32_t i = skip; i < s->length; i++)
        if (k->got - skip + i >= HEADER && p[i] != pattern(k->conn, k->got - skip + i)) {
            violation("bytes", f->conn, "byte %u of a request is another one", k->got - skip + i);
            break;
        }
}

/* The connection that a subflow joins. */
static struct child *child_of_token(uint32_t server, uint32_t client, const uint8_t token[4])
{
    for (uint32_t i = 0; i < child_count; i++) {
        struct child *k = &children[i];
        if (k->used && k->server == server && k->client == client && k->multipath && !k->joined && k->state != K_LAST_ACK &&
            !memcmp(k->token, token, 4))
            return k;
    }
    return NULL;
}

static void server_refuse(uint32_t server, const struct segment *s)
{
    struct frame *f = new_frame(0);
    struct segment r = {.sport = s->dport, .dport = s->sport, .flags = CRAB_RST, .seq = s->ack};
    if (!(s->flags & CRAB_ACK)) {
        r.flags |= CRAB_ACK;
        r.seq = 0;
        r.ack = s->seq + s->length + !!(s->flags & CRAB_SYN);
    }
    memcpy(r.from, s->to, 16);
    memcpy(r.to, s->from, 16);
    frame_write(f, router_mac, setting.mac[server], &r);
    route(f, &r, false);
}

/* What it sent is too long for the way to its client. */
static void heed(uint32_t server, const struct segment *s)
{
    uint32_t client = client_of(s->to), service = service_of(s->from, s->sport), own = server_of(s->from);
    if (client == NONE || !s->mtu || (service == NONE && own != server))
        return;
    uint32_t i = find_child(server, client, s->dport, service != NONE ? 2 + service : s->family == 6);
    struct child *k = i == NONE ? NULL : &children[i];
    if (!k || s->seq - k->iss - 1 > k->nxt || s->mtu < 576) /* or made up */
        return;
    uint32_t fits = s->mtu - 60 - (k->multipath ? 24 : 0);
    if (fits >= k->mss)
        return;
    tally.errors_heeded++;
    k->mss = (uint16_t)fits;
    k->nxt = k->una;
    server_output(i);
}

static void arrive_at_server(uint32_t server, struct frame *f)
{
    struct segment s;
    show(f, "server-in", server);
    if (!servers[server].up) {
        end_frame(f, &tally.lost);
        return;
    }
    int read = frame_read(f, &s);
    if (read == 1 && f->corrupt)
        violation("healed", f->conn, "a server got a packet that was corrupted, with a right checksum");
    if (read < 0) {
        if (!f->corrupt)
            violation("checksum", f->conn, "a server got a packet that nobody corrupted, with a wrong checksum");
        tally.checksums++;
    }
    if (read == 1 && servers[server].back > now && service_of(s.to, s.dport) != NONE && balancers[0].up) {
        memcpy(f->data, balancers[0].mac, 6);
        memcpy(f->data + 6, setting.mac[server], 6);
        f->ifindex = (uint8_t)sim_interface(&setting, server);
        move(f, AT_BALANCER, 0, 40 * US);
        return;
    }
    end_frame(f, &tally.delivered); /* its bytes stay where they are until another one takes the place */
    if (read == 1 && s.icmp)
        heed(server, &s);
    if (read != 1 || s.icmp)
        return;
    uint32_t client = client_of(s.from), service = service_of(s.to, s.dport), own = server_of(s.to), via;
    if (client == NONE || (service == NONE && own != server))
        return;
    via = service != NONE ? 2 + service : s.family == 6;
    uint32_t i = find_child(server, client, s.sport, via);
    struct child *k = i == NONE ? NULL : &children[i];
    if (s.flags & CRAB_SYN) {
        uint8_t vip[16];
        const uint8_t *join = multipath_option(&s, MP_JOIN, 12), *capable = multipath_option(&s, MP_CAPABLE, 4);
        struct child *whole = join ? child_of_token(server, client, join + 4) : NULL;
        if (s.flags & CRAB_ACK)
            return;
        if (join && options_redirects(&s, vip))
            violation("forged", f->conn, "a forged redirect reached a server");
        if (join && !whole && !k) {
            server_refuse(server, &s);
            return;
        }
        if (join) {
            service = whole ? whole->service : k->service;
        } else if (own == server) { /* redirected: only to what it was told of */
            if (!options_redirects(&s, vip) || (service = service_of(vip, s.dport)) == NONE)
                return;
        } else if (options_redirects(&s, vip)) {
            violation("forged", f->conn, "a forged redirect reached a server");
        }
        if (k && k->state == K_TIME_WAIT && (int32_t)(s.seq - k->irs - k->got - 2) > 0) { /* RFC 9293, 3.10.7.4 */
            drop_child(i);
            k = NULL;
        }
        if (k && k->irs != s.seq) {
            tally.refused_syns++;
            server_say(k, CRAB_ACK, k->nxt, 0); /* RFC 5961, 4.2 */
            return;
        }
        if (!k) {
            i = new_child(server, client, s.sport, via);
            k = &children[i];
            k->service = (uint8_t)service;
            k->family = s.family;
            k->irs = s.seq;
            k->conn = f->conn;
            k->rto = S;
            if (join || capable) {
                uint64_t key = rnd();
                k->multipath = true;
                k->joined = join;
                memcpy(k->key, &key, 8);
                token_of(k->key, k->token);
            }
            if (s.length) { /* Fast Open, with a cookie that is right */
                execute(k, f, &s, 0);
                k->got = s.length;
                grant(k);
            }
        }
        server_say(k, CRAB_SYN | CRAB_ACK, NONE, 0);
        if (k->state != K_SYN_RECEIVED)
            return;
        if (k->limit && !k->nxt) { /* it need not wait for the client's ACK (RFC 7413, 4.2.2) */
            tally.early++;
            server_output(i);
        }
        arm(&k->deadline, &k->armed, now + k->rto, E_CHILD, i);
        return;
    }
    if (!k) {
        if (!(s.flags & CRAB_RST))
            server_refuse(server, &s);
        return;
    }
    uint32_t at = s.seq - k->irs - 1;
    if (s.flags & CRAB_RST) {
        if (at == k->got || ((k->state == K_LAST_ACK || k->state == K_TIME_WAIT) && at == k->got + 1))
            drop_child(i);
        return;
    }
    if (!(s.flags & CRAB_ACK))
        return;
    uint32_t acked = s.ack - k->iss - 1;
    if (k->state == K_SYN_RECEIVED) {
        if (acked > k->nxt || at > 1u << 20) {
            if (at <= 1u << 20)
                server_refuse(server, &s);
            return;
        }
        k->state = K_OPEN;
        k->rto = 300 * MS;
        k->tries = 0;
    }
    if (at > k->got + 65536 && (int32_t)(at - k->got) > 0) { /* out of the window */
        server_say(k, CRAB_ACK, k->nxt, 0);
        return;
    }
    if (k->state == K_LAST_ACK && acked == k->limit + 1) {
        drop_child(i);
        return;
    }
    if (acked <= k->nxt && acked > k->una) {
        k->una = acked;
        k->tries = 0;
        k->rto = 300 * MS;
    }
    bool said = false;
    if (s.length || s.flags & CRAB_FIN) {
        if (s.length && (int32_t)(at - k->got) <= 0 && (int32_t)(at + s.length - k->got) > 0 && k->state == K_OPEN) {
            execute(k, f, &s, k->got - at);
            k->got = at + s.length;
            grant(k);
        }
        if (s.flags & CRAB_FIN && at + s.length == k->got && (k->state == K_FIN_WAIT || k->state == K_TIME_WAIT)) {
            k->state = K_TIME_WAIT;
            k->una = k->nxt = k->limit;
            server_say(k, CRAB_ACK, k->limit + 1, 0);
            said = true;
        }
        if (s.flags & CRAB_FIN && at + s.length == k->got && k->state == K_OPEN) {
            k->state = K_LAST_ACK;
            k->tries = 0;
            server_say(k, CRAB_FIN | CRAB_ACK, k->limit, 0);
            said = true;
        }
        if (!said && k->nxt >= k->limit)
            server_say(k, CRAB_ACK, k->nxt + (k->state >= K_FIN_WAIT), 0);
    }
    server_output(i);
}

static void child_timer(uint32_t i)
{
    struct child *k = &children[i];
    if (!fires(&k->deadline, &k->armed, E_CHILD, i) || !k->used)
        return;
    if (++k->tries > (k->state == K_SYN_RECEIVED ? 5 : DATA_TRIES) || k->state == K_TIME_WAIT || (k->state == K_OPEN && k->una == k->nxt)) {
        drop_child(i);
        return;
    }
    if (k->rto < 8 * S)
        k->rto *= 2;
    if (k->state == K_SYN_RECEIVED) {
        server_say(k, CRAB_SYN | CRAB_ACK, NONE, 0);
        arm(&k->deadline, &k->armed, now + k->rto, E_CHILD, i);
        return;
    }
    if (k->state == K_LAST_ACK || k->state == K_FIN_WAIT)
        server_say(k, CRAB_FIN | CRAB_ACK, k->limit, 0);
    k->nxt = k->una;
    server_output(i);
}

/* ---- clients ---- */

static void client_says_multipath(const struct conn *c, struct segment *s, uint32_t at)
{
    uint8_t keys[18] = {0}, token[8] = {0};
    uint64_t own = mix(c->isn);
    if (at == NONE && c->joins) {
        token_of(conns[c->joins].key, token);
        say_multipath(s, MP_JOIN, 1, 12, token, 8);
    } else if (at == NONE) {
        say_multipath(s, MP_CAPABLE, 1, 4, NULL, 0);
    } else if (!c->multipath || s->flags & CRAB_RST) {
        return;
    } else if (c->joins && !c->una && !s->length) {
        say_multipath(s, MP_JOIN, 0, 24, NULL, 0);
    } else if (!c->joins && !c->una && (!s->length || !at)) { /* both keys; with data, their length too */
        memcpy(keys, &own, 8);
        memcpy(keys + 8, c->key, 8);
        say_multipath(s, MP_CAPABLE, 0x81, s->length ? 22 : 20, keys, s->length ? 18 : 16);
    } else {
        say_multipath(s, MP_DSS, 5, 20, NULL, 0);
    }
}

static void client_say(struct conn *c, uint8_t flags, uint32_t at, uint32_t length)
{
    struct client *client = &clients[c->client];
    struct frame *f = new_frame((uint32_t)(c - conns));
    struct segment s = {.sport = c->port, .dport = 80, .flags = flags, .seq = at == NONE ? c->isn : c->isn + 1 + at,
                        .ack = flags & CRAB_ACK ? c->irs + 1 + c->got + (c->state == C_DONE || c->ending) : 0, .length = length};
    uint8_t payload[1500];
    client_address(s.from, c->client, c->family);
    memcpy(s.to, setting.service[c->service].addr, 16);
    if ((c->taken && !(flags & CRAB_SYN)) || c->direct) /* a SYN is never translated */
        memcpy(s.to, setting.dip[c->family == 6][c->server], 16);
    uint32_t first = at == NONE ? 0 : at;
    for (uint32_t i = 0; i < length; i++)
        payload[i] = pattern((uint32_t)(c - conns), first + i);
    if (length && first < HEADER) {
        uint32_t id = (uint32_t)(c - conns);
        uint8_t header[HEADER] = {(uint8_t)(id >> 24), (uint8_t)(id >> 16), (uint8_t)(id >> 8), (uint8_t)id, (uint8_t)(c->request >> 8),
                                  (uint8_t)c->request, (uint8_t)(c->answer >> 8), (uint8_t)c->answer, (uint8_t)(c->rounds | c->waits << 7)};
        memcpy(payload, header, HEADER);
    }
    s.payload = payload;
    if (at == NONE) {
        memcpy(s.options, "\x02\x04\x05\xb4\x04\x02\x08\x0a\x01\x02\x03\x04\0\0\0\0\x01\x03\x03\x07", 20);
        s.option_count = 20;
        if (length) {
            memcpy(s.options, "\x22\x0a\x01\x02\x03\x04\x05\x06\x07\x08\x01\x01", 12); /* a cookie */
            s.option_count = 12;
            f->hostile = 2; /* never to be redirected */
        }
        if (c->forges) {
            memcpy(s.options + s.option_count, "\x2a\x06\x0a\0\0\x64\x01\x01", 8);
            s.option_count += 8;
        }
        if ((c->offers && !c->copies) || c->stubborn || length) {
            memcpy(s.options + s.option_count, "\x2a\x02\x01\x01", 4);
            s.option_count += 4;
            }
    }
    if (c->asks)
        client_says_multipath(c, &s, at);
    frame_write(f, router_mac, router_mac, &s);
    if (client->card && !c->taken)
        frame_partial(f);
    show(f, "client-out", c->client);
    route(f, &s, true);
}

static bool is_open(uint32_t conn)
{
    return conn && conns[conn].state < C_DONE;
}

/* A port of a client's that is free, or NONE.  alone: to all services, as it is for a connection to the server's own address;
 * otherwise a NAT, or a kernel, gives the same one to connections to several. */
static uint32_t free_port(struct client *who, uint32_t service, bool alone)
{
    uint32_t *next = &who->next[collide ? service : 0];
    if (conn_count == conn_room) {
        fprintf(stderr, "sim: more than %u connections of clients\n", conn_room);
        exit(2);
    }
    for (uint32_t n = 0; n < ports; n++) {
        uint32_t port = (*next)++ % ports;
        bool used = is_open(who->ports[service][port]);
        for (uint32_t other = 0; other < setting.services && (alone || !collide); other++)
            used |= is_open(who->ports[other][port]);
        if (!used)
            return port;
    }
    return NONE;
}

/* It has its port: may it be redirected?  The first one of those that have the same. */
static bool claim(struct client *who, uint32_t port, uint32_t id)
{
    who->ports[conns[id].service][port] = id;
    if (is_open(who->claims[port])) {
        tally.shared++;
        return false;
    }
    who->claims[port] = id;
    return true;
}

static void new_conn(uint32_t task)
{
    uint32_t client = task % client_count;
    struct client *who = &clients[client];
    uint32_t n = (task / client_count) % setting.services, port = free_port(who, n, who->stubborn);
    if (port == NONE) {
        push(now + S, E_TASK, 0, task);
        return;
    }
    uint32_t id = conn_count++;
    struct conn *c = &conns[id];
    *c = (struct conn){.task = task, .client = (uint16_t)client, .port = (uint16_t)(FIRST_PORT + port), .isn = (uint32_t)rnd(),
                       .service = (uint8_t)n, .server = NOBODY, .state = C_SYN, .mss = 1400, .stubborn = who->stubborn,
                       .fast = who->fast, .forges = who->forges, .asks = who->multipath, .full = who->full};
    c->family = crab_is_mapped(setting.service[n].addr) ? 4 : 6;
    c->forges &= c->family == 4;
    c->acquainted = *acquaintance(c);
    c->offers = claim(who, port, id) && who->agent && now >= who->until[n];
    c->request = (uint16_t)(below(8) ? 40 + below(200) : 1000 + below(3000));
    c->answer = (uint16_t)(below(8) ? 40 + below(400) : 1000 + below(6000));
    c->rounds = (uint16_t)(below(5) ? 1 : 2 + below(6));
    if (c->asks && c->rounds == 1)
        c->rounds = (uint16_t)(1 + below(6));
    c->waits = collide && !c->asks && !(mix(c->isn) % 4);
    c->rto = c->offers ? 250 * MS : S;
    agents_pending += c->offers;
    if (c->fast) {
        uint32_t n_first = c->request < 100 ? c->request : 100;
        client_say(c, CRAB_SYN, NONE, n_first);
    } else {
        client_say(c, CRAB_SYN, NONE, 0);
    }
    arm(&c->deadline, &c->armed, now + c->rto, E_CONN, id);
}

/* A connection that its server has acknowledged data of: to another subflow, once. */
static void try_to_join(struct conn *whole)
{
    struct client *who = &clients[whole->client];
    if (!whole->multipath || whole->joins || whole->tried || whole->taken || whole->state != C_OPEN ||
        whole->round + 1 >= whole->rounds || !(whole->full || whole->told))
        return;
    uint32_t port = free_port(who, whole->service, !whole->full);
    whole->tried = true;
    if (port == NONE)
        return;
    uint32_t id = conn_count++;
    struct conn *c = &conns[id];
    *c = (struct conn){.task = whole->task, .client = whole->client, .port = (uint16_t)(FIRST_PORT + port), .isn = (uint32_t)rnd(),
                       .service = whole->service, .server = NOBODY, .state = C_SYN, .mss = 1380, .family = whole->family,
                       .request = whole->request, .answer = whole->answer, .joins = (uint32_t)(whole - conns), .asks = true,
                       .direct = !whole->full, .rto = S};
    c->acquainted = *acquaintance(c);
    if (c->direct) {
        c->server = whole->server;
        c->taken = true;
    }
    tally.joins += !c->direct;
    tally.joins_direct += c->direct;
    claim(who, port, id);
    client_say(c, CRAB_SYN, NONE, 0);
    arm(&c->deadline, &c->armed, now + c->rto, E_CONN, id);
}

/* What was offered is answered, or given up. */
static void offer_ends(struct conn *c, bool well)
{
    struct client *who = &clients[c->client];
    if (!c->offers)
        return;
    c->offers = false;
    agents_pending--;
    if (well) {
        who->backoff[c->service] = 0;
        return;
    }
    if (now < who->until[c->service])
        return;
    uint64_t next = who->backoff[c->service] ? 2 * who->backoff[c->service] : 10 * S;
    who->backoff[c->service] = next < 600 * S ? next : 600 * S;
    who->until[c->service] = now + who->backoff[c->service];
}

static void conn_ends(struct conn *c, bool well)
{
    c->state = well ? C_DONE : C_FAILED;
    c->deadline = 0;
    offer_ends(c, well && c->taken);
    if (c->moved || (c->joins && conns[c->joins].moved != (uint32_t)(c - conns))) /* its connection goes on elsewhere */
        return;
    if (well && !tasks[c->task].served) {
        tasks[c->task].served = 1;
        served++;
        if (now > progress)
            progress = now;
    }
    if (!well) {
        tally.failures++;
        push(now + S + below(1000) * MS, E_TASK, 0, c->task);
    }
}

static void client_output(struct conn *c)
{
    uint32_t limit = (uint32_t)(c->round + 1) * c->request, id = (uint32_t)(c - conns);
    while (c->nxt < limit && c->nxt - c->una < (uint32_t)WINDOW * c->mss) {
        uint32_t n = limit - c->nxt < c->mss ? limit - c->nxt : c->mss;
        client_say(c, CRAB_ACK, c->nxt, n);
        c->nxt += n;
    }
    if (c->nxt > c->top)
        c->top = c->nxt;
    arm(&c->deadline, &c->armed, now + (c->una < c->nxt || c->state == C_CLOSING ? c->rto : ANSWER_TIME), E_CONN, id);
}

static void conn_timer(uint32_t id)
{
    struct conn *c = &conns[id];
    if (!fires(&c->deadline, &c->armed, E_CONN, id))
        return;
    if (c->state == C_SYN) {
        c->asks &= c->joins || c->copies < 2;
        if (++c->copies > (c->joins ? JOIN_TRIES : SYN_TRIES)) {
            tally.timeouts++;
            conn_ends(c, false);
            return;
        }
        c->rto = c->offers && c->copies == 1 ? S : 2 * c->rto;
        client_say(c, CRAB_SYN, NONE, 0); /* without its offer: it asks for the fallback */
        arm(&c->deadline, &c->armed, now + c->rto, E_CONN, id);
        return;
    }
    if (c->pausing) {
        struct client *who = &clients[c->client];
        c->pausing = false;
        if (who->fades && !c->joins && !c->moved && !(mix(c->isn + c->round) % 4)) {
            tally.faded++;
            who->next[c->service] = (uint32_t)(c->port - FIRST_PORT);
            conn_ends(c, false);
            return;
        }
        c->round++;
        client_output(c);
        return;
    }
    if (c->state == C_CLOSING ? ++c->tries > 4 : c->una < c->nxt ? ++c->tries > DATA_TRIES : true) {
        if (c->state == C_CLOSING) {
            conn_ends(c, true); /* it had its answer */
        } else {
            tally.timeouts++;
            client_say(c, CRAB_RST | CRAB_ACK, c->nxt, 0);
            conn_ends(c, false);
        }
        return;
    }
    if (c->rto < 8 * S)
        c->rto *= 2;
    if (c->state == C_CLOSING) {
        client_say(c, CRAB_FIN | CRAB_ACK, c->nxt, 0);
        arm(&c->deadline, &c->armed, now + c->rto, E_CONN, id);
        return;
    }
    c->nxt = c->una;
    client_output(c);
}

static void client_refuse(uint32_t client, const struct segment *s)
{
    if (s->flags & CRAB_RST)
        return;
    struct frame *f = new_frame(0);
    struct segment r = {.sport = s->dport, .dport = s->sport, .flags = CRAB_RST, .seq = s->ack};
    (void)client;
    memcpy(r.from, s->to, 16);
    memcpy(r.to, s->from, 16);
    frame_write(f, router_mac, router_mac, &r);
    route(f, &r, true);
}

static void client_closes(struct conn *c)
{
    c->state = C_CLOSING;
    c->tries = 0;
    c->rto = 300 * MS;
    c->pausing = false;
    client_say(c, CRAB_FIN | CRAB_ACK, c->nxt, 0);
    arm(&c->deadline, &c->armed, now + c->rto, E_CONN, (uint32_t)(c - conns));
}

/* A subflow stands: what its connection has not begun yet is its own; the first subflow is closed once its round is over. */
static bool takes_over(struct conn *c)
{
    struct conn *whole = &conns[c->joins];
    if (whole->state != C_OPEN || whole->round + 1 >= whole->rounds)
        return false;
    if (whole->server != c->server)
        violation("join-strayed", (uint32_t)(c - conns), "server %u took a subflow of server %u's connection", c->server, whole->server);
    tally.moved++;
    whole->moved = (uint32_t)(c - conns);
    c->rounds = (uint16_t)(whole->rounds - whole->round - 1);
    whole->rounds = (uint16_t)(whole->round + 1);
    c->doomed |= whole->doomed;
    if (whole->pausing)
        client_closes(whole);
    return true;
}

static void connected(struct conn *c, const struct segment *s, uint32_t server, bool redirected)
{
    c->state = C_OPEN;
    c->server = (uint8_t)server;
    c->irs = s->seq;
    c->taken = redirected;
    c->tries = 0;
    c->rto = 300 * MS;
    c->una = c->nxt = s->ack - c->isn - 1; /* Fast Open: what its SYN had is acknowledged, or is sent again */
    tally.taken += redirected;
    if (redirected || !c->offers || c->copies)
        offer_ends(c, redirected);
    for (uint32_t l = 0; l < balancer_count; l++)
        if (c->seen[l].level && c->seen[l].server == server)
            c->members = c->seen[l].members;
    c->doomed = c->lost >> server & 1;
    for (uint32_t l = 0; l < balancer_count; l++)
        c->doomed |= balancers[l].view[server].dead;
    c->pooled = setting.service[c->service].policy != NULL || c->joins;
    const uint8_t *capable = multipath_option(s, MP_CAPABLE, 12);
    c->multipath = c->asks && (c->joins || capable);
    if (c->multipath && capable)
        memcpy(c->key, capable + 4, 8);
    if (c->multipath && c->mss > 1380)
        c->mss = 1380;
    if (c->joins && !takes_over(c)) {
        client_say(c, CRAB_RST | CRAB_ACK, c->nxt, 0);
        conn_ends(c, false);
        return;
    }
    client_say(c, CRAB_ACK, c->nxt, 0);
    client_output(c);
}

static void arrive_at_client(uint32_t client, struct frame *f)
{
    struct segment s;
    show(f, "client-in", client);
    int read = frame_read(f, &s);
    uint8_t mac[6];
    memcpy(mac, f->data + 6, 6);
    if (read == 1 && f->corrupt)
        violation("healed", f->conn, "a client got a packet that was corrupted, with a right checksum");
    if (read < 0 && !f->corrupt)
        violation("checksum", f->conn, "a client got a packet that nobody corrupted, with a wrong checksum");
    end_frame(f, &tally.delivered);
    if (read != 1)
        return;
    uint32_t port = (s.icmp ? s.sport : s.dport) - FIRST_PORT;
    uint32_t server = server_of(s.from), service = s.icmp ? service_of(s.to, s.dport) : service_of(s.from, s.sport), from = NONE;
    uint32_t id = port >= PORTS ? 0 : service != NONE ? clients[client].ports[service][port] : clients[client].claims[port];
    struct conn *c = id ? &conns[id] : NULL;
    if (s.icmp) {
        uint32_t fits = s.mtu - 60 - (c && c->multipath ? 24 : 0); /* with the options that data have */
        if (c && c->state == C_OPEN && s.mtu && s.mtu >= 576 && fits < c->mss) {
            c->mss = (uint16_t)fits;
            c->nxt = c->una;
            client_output(c);
        }
        return;
    }
    for (uint32_t i = 0; i < server_count; i++)
        if (!memcmp(mac, setting.mac[i], 6))
            from = i;
    if (c && c->state >= C_DONE && !(c->state == C_DONE && s.flags & CRAB_FIN))
        c = NULL;
    if (server != NONE) { /* the agent's */
        uint8_t vip[16];
        bool mine = c && c->taken && c->server == server;
        if (!mine) {
            if (!c || !(clients[client].agent || c->stubborn) || (s.flags & (CRAB_SYN | CRAB_ACK)) != (CRAB_SYN | CRAB_ACK) ||
                s.ack != c->isn + 1 || !options_redirects(&s, vip) || service_of(vip, s.sport) != c->service || c->state != C_SYN) {
                client_refuse(client, &s); /* no connection has that address; or another answer was faster */
                return;
            }
            connected(c, &s, server, true);
            return;
        }
    } else if (!c || service != c->service) {
        if (service != NONE)
            client_refuse(client, &s);
        return;
    } else if (c->taken) {
        return; /* from the VIP, about a connection that has left it */
    }
    if (c->state == C_SYN) {
        if (!(s.flags & CRAB_ACK))
            return;
        uint32_t first = s.ack - c->isn - 1;
        if (first && !(c->fast && first <= 100)) {
            client_refuse(client, &s); /* RFC 9293, 3.10.7.3 */
            return;
        }
        if (s.flags & CRAB_RST) {
            tally.refused++;
            tally.joins_refused += c->joins != 0;
            conn_ends(c, false);
        } else if (s.flags & CRAB_SYN) {
            connected(c, &s, from, c->direct);
        }
        return;
    }
    c->told |= multipath_option(&s, MP_ADD_ADDR, 0) != NULL;
    uint32_t at = s.seq - c->irs - 1;
    if (c->state == C_DONE) {
        if (s.flags & CRAB_FIN)
            client_say(c, CRAB_ACK, c->nxt + 1, 0);
        return;
    }
    if (s.flags & CRAB_RST) {
        if (at != c->got)
            return;
        tally.resets++;
        if (!c->doomed && !c->excused && c->server != NOBODY && c->state == C_OPEN)
            violation("reset", (uint32_t)(c - conns), "a connection to server %u, which lives, was reset", c->server);
        conn_ends(c, false);
        return;
    }
    if (s.flags & CRAB_SYN) {
        client_say(c, CRAB_ACK, c->nxt, 0);
        return;
    }
    uint32_t acked = s.ack - c->isn - 1;
    bool news = false;
    if (acked > c->una && acked <= c->top) {
        c->una = acked;
        if (c->nxt < acked)
            c->nxt = acked;
        c->tries = 0;
        c->rto = 300 * MS;
        news = true;
    }
    if (s.length && c->state == C_OPEN) {
        if ((int32_t)(at - c->got) <= 0 && (int32_t)(at + s.length - c->got) > 0) {
            for (uint32_t i = c->got - at; i < s.length; i++)
                if (s.payload[i] != pattern(~(uint32_t)(c - conns), at + i)) {
                    violation("bytes", (uint32_t)(c - conns), "byte %u of the answer is another one", at + i);
                    break;
                }
            c->got = at + s.length;
            news = true;
            offer_ends(c, c->taken);
            try_to_join(c); /* the packet was read: its place may be another's now */
        }
        if (c->got == (uint32_t)c->answer * c->rounds && !c->waits) {
            client_closes(c);
            return;
        }
        client_say(c, CRAB_ACK, c->nxt, 0);
        if (c->got == (uint32_t)c->answer * (c->round + 1u) && !c->pausing && c->round + 1 < c->rounds) {
            c->pausing = true;
            arm(&c->deadline, &c->armed, now + 1 + (below(10) ? below(1000) * MS : below(60000) * MS), E_CONN, (uint32_t)(c - conns));
            return;
        }
    }
    if (c->waits && s.flags & CRAB_FIN && at + s.length == c->got && c->got == (uint32_t)c->answer * c->rounds && c->state == C_OPEN) {
        tally.waited++;
        c->ending = true;
        client_closes(c);
        return;
    }
    if (c->ending) {
        if (s.ack == c->isn + c->nxt + 2)
            conn_ends(c, true);
        return;
    }
    if (c->state == C_CLOSING) {
        if (s.flags & CRAB_FIN && at == c->got) {
            conn_ends(c, true);
            client_say(c, CRAB_ACK, c->nxt + 1, 0);
        }
        return;
    }
    if (news && !c->pausing)
        client_output(c);
}

/* ---- strangers ---- */

static void stranger(uint32_t kind)
{
    static const uint8_t random_source[12] = {[10] = 0xff, [11] = 0xff};
    uint32_t id = conn_count > 1 ? conn_count - 1 - below(conn_count < 2000 ? conn_count - 1 : 2000) : 0;
    struct conn *c = &conns[id];
    struct frame *f = new_frame(0);
    struct segment s = {.sport = (uint16_t)(1024 + below(60000)), .dport = 80, .seq = (uint32_t)rnd(), .flags = CRAB_SYN};
    uint32_t service = below(setting.services), at = 14;
    uint8_t junk[64];
    memcpy(s.to, setting.service[service].addr, 16);
    memcpy(s.from, random_source, 12);
    s.from[12] = 11;
    s.from[13] = (uint8_t)rnd();
    s.from[14] = (uint8_t)rnd();
    s.from[15] = (uint8_t)rnd();
    if (!crab_is_mapped(s.to)) {
        memset(s.from, 0, 12);
        s.from[0] = 0xfc;
    }
    if (kind < 5 && id && c->state == C_OPEN) { /* blind: he knows who speaks with whom, and no sequence number */
        client_address(s.from, c->client, c->family);
        memcpy(s.to, setting.service[c->service].addr, 16);
        s.sport = c->port;
        s.seq = c->isn + 0x40000000u + (uint32_t)(rnd() & 0x3fffffff);
        s.ack = (uint32_t)rnd();
        s.flags = (uint8_t[]){CRAB_SYN, CRAB_RST, CRAB_FIN | CRAB_ACK, CRAB_RST | CRAB_ACK, CRAB_SYN}[kind];
    }
    if (kind == 5)
        s.flags = CRAB_SYN | CRAB_ACK;
    if (kind == 6)
        s.flags = CRAB_SYN | CRAB_RST;
    if (kind == 7)
        s.flags = 0;
    if (kind == 8)
        s.dport = 81;
    if (kind == 4 || kind == 9) { /* a redirect, or several, to a server of his */
        memcpy(s.options, "\x2a\x06\x0a\x02\0\x63\x01\x01\x2a\x02\x01\x01\xfd\x08\x43\x52\x0a\0\0\x64", 20);
        s.option_count = 20;
    }
    s.ttl = (uint8_t)(kind == 10 ? 1 : 64);
    if (kind == 11)
        s.flags = CRAB_ACK;
    if (kind == 15) { /* keys of nobody's connection */
        uint8_t keys[16];
        for (uint32_t i = 0; i < sizeof keys; i++)
            keys[i] = (uint8_t)rnd();
        s.flags = CRAB_ACK;
        say_multipath(&s, MP_CAPABLE, 0x81, 20, keys, 16);
    }
    if (kind == 16) { /* to whomever it leads */
        uint64_t token = rnd();
        say_multipath(&s, MP_JOIN, 1, 12, (uint8_t *)&token, 8);
        memcpy(s.options + s.option_count, "\x2a\x02\x01\x01", 4);
        s.option_count += 4;
    }
    frame_write(f, balancers[0].mac, router_mac, &s);
    if (kind == 17 && id && c->state == C_OPEN) { /* an error about somebody's packet, which he has not seen */
        struct segment about = {.sport = 80, .dport = c->port, .seq = (uint32_t)rnd(), .flags = CRAB_ACK};
        memcpy(about.from, setting.service[c->service].addr, 16);
        client_address(about.to, c->client, c->family);
        struct frame *quoted = new_frame(0);
        frame_write(quoted, router_mac, router_mac, &about);
        frame_complain(f, quoted, about.to, 100);
        memcpy(f->data + 6, router_mac, 6);
        end_frame(quoted, &tally.to_nobody);
    }
    f->hostile = 1;
    tally.hostile++;
    if (kind == 12 || kind == 13) { /* bytes */
        for (uint32_t i = 0; i < sizeof junk; i++)
            junk[i] = (uint8_t)rnd();
        at += below(kind == 12 ? 8 : 40);
        uint32_t n = 1 + below(kind == 12 ? 4 : 40);
        if (at + n > f->len)
            n = f->len - at;
        memcpy(f->data + at, junk, n);
        if (kind == 13)
            f->len = 14 + below(f->len - 14);
    }
    uint32_t l = below(balancer_count);
    memcpy(f->data, balancers[l].mac, 6);
    move(f, AT_BALANCER, l, 100 * US);
}

/* ---- the script ---- */

/* A server's connections are lost, or given up. */
static void doom(uint32_t server)
{
    for (uint32_t i = 1; i < conn_count; i++)
        if (conns[i].state < C_DONE && conns[i].server == server)
            conns[i].doomed = true;
    for (uint32_t i = 0; i < child_count; i++)
        if (children[i].used && children[i].server == server)
            conns[children[i].conn].lost |= 1u << server;
}

static void forget_children(uint32_t server)
{
    for (uint32_t i = 0; i < child_count; i++)
        if (children[i].used && children[i].server == server)
            drop_child(i);
}

static void for_views(uint32_t server, long first, long count, void (*change)(struct backend_view *v, long to), long to)
{
    for (long l = first; l < first + count && l < (long)balancer_count; l++) {
        change(&balancers[l].view[server], to);
        change(&balancers[l].view[SERVERS + server], to);
        if (balancers[l].serving)
            balancer_publish(&balancers[l]);
    }
}

static void set_weight(struct backend_view *v, long to) { v->weight = (uint32_t)to; }
static void set_drain(struct backend_view *v, long to) { v->drain = to; }
static void set_member(struct backend_view *v, long to) { v->member = to; }
static void set_dead(struct backend_view *v, long to) { v->dead = to; }
static void set_resolved(struct backend_view *v, long to) { v->resolved = to; }

/* A load balancer hears of a change a little sooner or later than another. */
static void view(uint32_t l, const struct script *e)
{
    static const struct {
        const char *name;
        void (*change)(struct backend_view *v, long to);
    } changes[] = {{"weight", set_weight}, {"drain", set_drain}, {"member", set_member}, {"dead", set_dead}, {"resolved", set_resolved}};
    for (uint32_t i = 0; i < sizeof changes / sizeof *changes; i++)
        if (!strcmp(changes[i].name, e->name))
            for_views((uint32_t)e->a % server_count, l, 1, changes[i].change, e->b);
    if (!strcmp(e->name, "dead") && e->b)
        doom((uint32_t)e->a % server_count);
}

static void add_script(uint64_t at, const char *name, long a, long b, long c)
{
    if (script_count == sizeof scripts / sizeof *scripts) {
        fprintf(stderr, "sim: more than %zu events\n", sizeof scripts / sizeof *scripts);
        exit(2);
    }
    struct script *e = &scripts[script_count];
    *e = (struct script){.at = at, .a = a, .b = b, .c = c};
    snprintf(e->name, sizeof e->name, "%s", name);
    push(at, E_SCRIPT, 0, script_count++);
}

static void views(uint64_t at, const char *name, long a, long b)
{
    if (script_count == sizeof scripts / sizeof *scripts)
        exit(2);
    struct script *e = &scripts[script_count++];
    *e = (struct script){.at = at, .a = a, .b = b};
    snprintf(e->name, sizeof e->name, "%s", name);
    for (uint32_t l = 0; l < balancer_count; l++)
        push(at + below(50) * MS, E_VIEW, (uint16_t)l, script_count - 1);
}

static void meanwhile(void *context)
{
    struct balancer *b = context;
    for (uint32_t q = 0; q < SIM_QUEUES; q++)
        while (b->count[q])
            work(b, q);
}

static void server_goes(uint32_t s)
{
    servers[s].up = false;
    servers[s].lives++;
    doom(s);
    forget_children(s);
}

static void heal(void)
{
    wire.loss = wire.dup = wire.reorder = wire.corrupt = wire.cut = wire.strip = wire.narrow = 0;
    for (uint32_t s = 0; s < server_count; s++) {
        servers[s].up = true;
        servers[s].back = 0;
    }
    for (uint32_t l = 0; l < balancer_count; l++) {
        struct balancer *b = &balancers[l];
        for (uint32_t i = 0; i < SIM_BACKENDS; i++)
            b->view[i] = (struct backend_view){.weight = 1, .member = true, .resolved = true};
        b->mtu = 1500;
        if (!b->serving) {
            balancer_start(b, (uint32_t)(now / S));
            fill_buckets(b, true);
        } else {
            balancer_publish(b);
        }
        routed[l] = true;
    }
}

static void play(const struct script *e)
{
    const char *name = e->name;
    struct balancer *b = &balancers[(uint32_t)e->a % balancer_count];
    uint32_t server = (uint32_t)e->a % server_count, l = (uint32_t)(b - balancers);
    if (logging)
        printf("event %.6f %s %ld %ld %ld\n", (double)now / S, name, e->a, e->b, e->c);
    struct {
        const char *name;
        uint32_t *of;
    } knobs[] = {{"loss", &wire.loss}, {"dup", &wire.dup}, {"reorder", &wire.reorder}, {"corrupt", &wire.corrupt},
                 {"cut", &wire.cut}, {"strip", &wire.strip}, {"narrow", &wire.narrow}};
    for (uint32_t i = 0; i < sizeof knobs / sizeof *knobs; i++)
        if (!strcmp(name, knobs[i].name)) {
            *knobs[i].of = (uint32_t)e->a;
            if (e->b)
                add_script(now + (uint64_t)e->b * US, name, 0, 0, 0);
        }
    if (!strcmp(name, "mtu")) {
        for (uint32_t i = 0; i < balancer_count; i++) {
            balancers[i].mtu = (uint32_t)e->a;
            if (balancers[i].serving)
                balancer_publish(&balancers[i]);
        }
    } else if (!strcmp(name, "limit")) { /* of each service, from now on */
        setting.syn_rate = (uint32_t)e->a;
        for (uint32_t i = 0; i < balancer_count; i++) {
            balancer_limit(&balancers[i], false);
            fill_buckets(&balancers[i], false);
        }
    } else if (!strcmp(name, "ecmp")) {
        salt = (uint32_t)e->a;
    } else if (!strcmp(name, "reload")) {
        if (b->serving) {
            balancer_publish(b);
            balancer_sweep(b, (uint32_t)(now / S));
        }
    } else if (!strcmp(name, "takeover")) {
        if (b->serving) {
            balancer_take_over(b, meanwhile, b);
            fill_buckets(b, true);
        }
    } else if (!strcmp(name, "kill")) { /* the daemon */
        if (b->serving) {
            forget_waiting(b);
            balancer_kill(b);
            b->memory += is_small(); /* what the XDP program's table had no room for */
            add_script(now + (uint64_t)e->b * US, "start", l, 0, 0);
        }
    } else if (!strcmp(name, "start")) {
        if (!b->serving) {
            tally.restarts++;
            balancer_start(b, (uint32_t)(now / S));
            fill_buckets(b, true);
            routed[l] = true;
        }
    } else if (!strcmp(name, "lose")) { /* the machine; the router sees it a little later */
        if (b->up) {
            forget_waiting(b);
            balancer_lose(b);
            add_script(now + below(3000) * MS, "unroute", l, 0, 0);
            add_script(now + (uint64_t)e->b * US + 3 * S, "start", l, 0, 0);
        }
    } else if (!strcmp(name, "unroute")) {
        routed[l] = b->up;
    } else if (!strcmp(name, "crash")) { /* a server, which the load balancers find out */
        if (servers[server].up) {
            server_goes(server);
            views(now + S + below(2000) * MS, "resolved", server, 0);
            add_script(now + (uint64_t)e->b * US, "boot", server, 0, 0);
            views(now + (uint64_t)e->b * US + 4 * S, "resolved", server, 1);
        }
    } else if (!strcmp(name, "boot")) {
        servers[server].up = true;
    } else if (!strcmp(name, "bury")) { /* it has crashed, and its operator says so */
        if (servers[server].up) {
            server_goes(server);
            views(now + 200 * MS, "dead", server, 1);
            add_script(now + (uint64_t)e->b * US, "boot", server, 0, 0);
            views(now + (uint64_t)e->b * US + S, "dead", server, 0);
        }
    } else if (!strcmp(name, "weight") || !strcmp(name, "drain") || !strcmp(name, "member")) {
        views(now, name, server, e->b);
    } else if (!strcmp(name, "back")) {
        servers[server].back = now + (uint64_t)e->b * US;
    } else if (!strcmp(name, "hostile")) {
        for (long i = 0; i < e->b; i++)
            stranger(below(multipath ? 18 : 15));
        if (e->c > 1)
            add_script(now + 10 * MS, "hostile", 0, e->b, e->c - 1);
    } else if (!strcmp(name, "flood")) { /* of SYNs, from anywhere */
        for (long i = 0; i < e->b; i++)
            stranger(14);
        if (e->c > 1)
            add_script(now + 10 * MS, "flood", 0, e->b, e->c - 1);
    } else if (!strcmp(name, "heal")) {
        heal();
    }
}

/* ---- the run ---- */

static void say(const char *key, uint64_t value)
{
    printf("count %s %llu\n", key, (unsigned long long)value);
}

static void read_scenario(void)
{
    char line[256], key[32], word[32];
    static char policies[SIM_SERVICES][32];
    uint32_t n = 0;
    setting.cache = 1 << 18;
    setting.flows = 1 << 16;
    while (fgets(line, sizeof line, stdin)) {
        long at, a = 0, b = 0, c = 0;
        unsigned long long value;
        if (sscanf(line, "event %ld %15s %ld %ld %ld", &at, word, &a, &b, &c) >= 2) {
            add_script((uint64_t)at * US, word, a, b, c);
        } else if (sscanf(line, "service %31s %ld %ld %ld", word, &a, &b, &c) == 4 && n < SIM_SERVICES) {
            struct service_setting *s = &setting.service[n];
            *s = (struct service_setting){.port_be = htons(80), .mode = (uint8_t)a, .fallback = (uint8_t)b};
            bool v6 = c & 1;
            memcpy(s->addr, v6 ? "\xfd\0\0\0\0\0\0\0\0\0\0\0\0\0\0" : "\0\0\0\0\0\0\0\0\0\0\xff\xff\x0a\0\0", 15);
            s->addr[15] = (uint8_t)(100 + n);
            s->on_dead = (uint8_t)(c >> 1 & 1);
            strcpy(policies[n], word);
            s->policy = strcmp(word, "maglev") ? policies[n] : NULL;
            setting.services = ++n;
        } else if (sscanf(line, "%31s %llu", key, &value) == 2) {
            uint32_t v = (uint32_t)value;
            if (!strcmp(key, "seed")) seed = value;
            else if (!strcmp(key, "connections")) task_count = v;
            else if (!strcmp(key, "rate")) rate = v;
            else if (!strcmp(key, "balancers") && v <= BALANCERS) balancer_count = v;
            else if (!strcmp(key, "servers") && v <= SERVERS) server_count = v;
            else if (!strcmp(key, "clients") && v <= CLIENTS) client_count = v;
            else if (!strcmp(key, "agents")) agents = v;
            else if (!strcmp(key, "ports") && v && v <= PORTS) ports = v;
            else if (!strcmp(key, "trace")) trace = v;
            else if (!strcmp(key, "log")) logging = v;
            else if (!strcmp(key, "heal")) heal_at = value * US;
            else if (!strcmp(key, "cache")) setting.cache = v;
            else if (!strcmp(key, "flows")) setting.flows = v;
            else if (!strcmp(key, "multipath")) multipath = v;
            else if (!strcmp(key, "tags") && v <= 2) setting.tags = v;
            else if (!strcmp(key, "split") && v <= 1) setting.split = v;
            else if (!strcmp(key, "apart") && v <= 1) setting.apart = v;
            else if (!strcmp(key, "collide") && v <= 1) collide = v;
            else if (!strcmp(key, "syn_rate")) setting.syn_rate = v;
            else {
                fprintf(stderr, "sim: %s: unknown, or too large\n", key);
                exit(2);
            }
        } else {
            fprintf(stderr, "sim: not understood: %s", line);
            exit(2);
        }
    }
    if (!n || !balancer_count || !server_count || !client_count || !rate) {
        fprintf(stderr, "sim: a scenario has a service, a rate, and one of each machine at least\n");
        exit(2);
    }
}

static void begin(void)
{
    random_state = seed;
    setting.tokens = is_small() ? 64 : 1 << 16;
    uint64_t k = rnd();
    memcpy(setting.key, &k, 8);
    setting.backends = server_count;
    for (uint32_t i = 0; i < SERVERS; i++) {
        memcpy(setting.mac[i], "\x02\0\0\0\x01", 5);
        setting.mac[i][5] = (uint8_t)(i + 1);
        memcpy(setting.dip[0][i], "\0\0\0\0\0\0\0\0\0\0\xff\xff\x0a\x02\0", 15);
        memcpy(setting.dip[1][i], "\xfd\x02", 2);
        setting.dip[0][i][15] = setting.dip[1][i][15] = (uint8_t)(i + 1);
        servers[i].up = true;
    }
    for (uint32_t i = 0; i < client_count; i++) {
        struct client *c = &clients[i];
        c->agent = below(100) < agents;
        c->stubborn = !c->agent && !below(8);
        c->fast = !c->agent && !c->stubborn && !below(4);
        c->forges = !c->fast && !below(6);
        c->card = below(2);
        c->walled = !below(10);
        c->multipath = multipath && !c->fast && !c->forges && below(100) < multipath;
        c->full = c->multipath && below(2);
        c->fades = collide && i % 4 == 3;
    }
    /* Below 4 GiB: as much as struct xdp_md can point to. */
    frames = must(mmap((void *)0x20000000, FRAMES * sizeof *frames, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0));
    for (uint32_t i = 0; i < FRAMES; i++)
        free_frames[free_count++] = FRAMES - 1 - i;
    conn_room = 16 * task_count + 1000;
    child_room = 16 * task_count + 1000;
    conns = must(calloc(conn_room, sizeof *conns));
    children = must(calloc(child_room, sizeof *children));
    tasks = must(calloc(task_count, sizeof *tasks));
    child_heads = must(malloc(65536 * sizeof *child_heads));
    memset(child_heads, 0xff, 65536 * sizeof *child_heads);
    conn_count = 1;
    for (uint32_t l = 0; l < balancer_count; l++) {
        uint8_t mac[6] = {2, 0, 0, 0, 2, (uint8_t)l};
        balancer_init(&balancers[l], &setting, mac, l, (uint32_t)rnd());
        balancer_start(&balancers[l], (uint32_t)(now / S));
        fill_buckets(&balancers[l], true);
        routed[l] = true;
    }
}

/* What is to be so when all is over. */
static void finish(void)
{
    for (uint32_t i = 0; i < task_count; i++)
        if (!tasks[i].served) {
            uint32_t last = 0;
            for (uint32_t k = 1; k < conn_count; k++)
                last = conns[k].task == i ? k : last;
            violation("unserved", last, "task %u of client %u was never served", i, i % client_count);
        }
    uint64_t under_way = FRAMES - free_count, waiting = 0;
    for (uint32_t l = 0; l < balancer_count; l++)
        for (uint32_t q = 0; q < SIM_QUEUES; q++)
            waiting += balancers[l].count[q];
    if (tally.born != tally.delivered + tally.lost + tally.dropped + tally.passed + tally.to_nobody + under_way || under_way > waiting)
        violation("conserved", 0, "%llu frames were born, %llu ended, %llu are under way", (unsigned long long)tally.born,
                  (unsigned long long)(tally.delivered + tally.lost + tally.dropped + tally.passed + tally.to_nobody),
                  (unsigned long long)under_way);
    uint32_t much_later = (uint32_t)(now / S) + CRAB_AGE_OPEN + 1;
    for (uint32_t l = 0; l < balancer_count; l++) {
        uint64_t bytes;
        for (uint32_t q = 0; q < SIM_QUEUES; q++) {
            crab_core_flows(balancers[l].cores[q], &bytes);
            if (bytes > setting.cache * 16ull)
                violation("bounded", 0, "a cache of %u flows has %llu bytes", setting.cache, (unsigned long long)bytes);
        }
        uint32_t left = balancer_remembers(&balancers[l], much_later);
        if (left)
            violation("bounded", 0, "load balancer %u remembers %u flows after %u s of silence", l, left, CRAB_AGE_OPEN + 1);
    }
    uint32_t kept = 0;
    for (uint32_t i = 0; i < child_count; i++)
        kept += children[i].used;
    if (kept)
        violation("bounded", 0, "servers have %u connections when all are over", kept);
    if (agents_pending)
        violation("bounded", 0, "agents have %u offers when all are over", agents_pending);
}

int main(void)
{
    now = 1000 * S;
    read_scenario();
    for (uint32_t i = 0; i < heap_count; i++)
        heap[i].at += now;
    heal_at += now;
    begin();
    push(heal_at, E_SCRIPT, 0, script_count);
    snprintf(scripts[script_count++].name, sizeof scripts->name, "heal");
    for (uint32_t i = 0; i < task_count; i++)
        push(now + (uint64_t)i * (S / rate), E_TASK, 0, i);
    uint64_t began = now, starts = now + task_count * (S / rate);
    progress = heal_at > starts ? heal_at : starts;
    while (heap_count && heap[0].at < progress + PATIENCE) {
        struct event e = pop();
        now = e.at;
        switch (e.kind) {
        case E_FRAME: {
            struct frame *f = &frames[e.what];
            uint32_t whose = e.whose & 0xfff;
            if (e.whose >> 12 == AT_BALANCER)
                arrive_at_balancer(&balancers[whose], f);
            else if (e.whose >> 12 == AT_SERVER)
                arrive_at_server(whose, f);
            else
                arrive_at_client(whose, f);
            break;
        }
        case E_CONN:
            conn_timer(e.what);
            break;
        case E_CHILD:
            child_timer(e.what);
            break;
        case E_BATCH:
            work(&balancers[e.whose], e.what);
            break;
        case E_SCRIPT:
            play(&scripts[e.what]);
            break;
        case E_TASK:
            if (!tasks[e.what].served)
                new_conn(e.what);
            break;
        case E_VIEW:
            view(e.whose, &scripts[e.what]);
            break;
        }
    }
    finish();
    uint64_t learned = 0, full = 0;
    for (uint32_t l = 0; l < balancer_count; l++)
        for (uint32_t q = 0; q < SIM_QUEUES; q++) {
            learned += balancers[l].counters[q][CRAB_C_LEARNED];
            full += balancers[l].counters[q][CRAB_C_FLOWS_FULL];
        }
    say("tasks", task_count);
    say("served", served);
    say("connections", conn_count - 1);
    say("seconds", (now - began) / S);
    say("packets", tally.born);
    say("batches", tally.batches);
    say("redirected", tally.redirected);
    say("taken", tally.taken);
    say("fallback", tally.fallback);
    say("by_xdp", tally.by_xdp);
    say("learned", learned);
    say("flows_full", full);
    say("joins", tally.joins);
    say("joins_known", tally.joins_known);
    say("joins_direct", tally.joins_direct);
    say("joins_refused", tally.joins_refused);
    say("moved_over", tally.moved);
    say("errors", tally.errors);
    say("errors_heeded", tally.errors_heeded);
    say("tagged", tally.tagged);
    say("elsewhere", tally.elsewhere);
    say("early", tally.early);
    say("shared", tally.shared);
    say("faded", tally.faded);
    say("waited", tally.waited);
    say("refused_syns", tally.refused_syns);
    say("lost", tally.lost);
    say("dropped", tally.dropped);
    say("passed", tally.passed);
    say("to_nobody", tally.to_nobody);
    say("hostile", tally.hostile);
    say("limited", tally.limited);
    say("checksums", tally.checksums);
    say("most_passes", tally.most_passes);
    say("failures", tally.failures);
    say("refused", tally.refused);
    say("resets", tally.resets);
    say("timeouts", tally.timeouts);
    say("restarts", tally.restarts);
    say("excused", tally.excused);
    say("twice_excused", tally.twice_excused);
    say("violations", tally.violations);
    return tally.violations ? 1 : 0;
}
