/* SPDX-License-Identifier: MIT */
/* Whole frames through a core, in memory of just their size: one by one against the oracle, verdict and bytes; and again in
 * batches, as workers do it, with what may be on beside (taps, flows written later). */
#include "batch.h"
#include "oracle.h"
#include "target.h"

#include <sanitizer/asan_interface.h>

#define FLOWS 1024
#define WILD_FLOWS 64
#define TABLE 64
#define RING 8192
#define GAP 64
#define PLACE (GAP + CRAB_HEADROOM + LONGEST + GAP) /* of a frame */

/* A configuration that was made: most inputs have that of an earlier one, and making one costs as much as ten frames. */
struct made {
    struct world world;
    uint32_t chosen; /* by what, and 1 << 24; 0: nothing was made here yet */
    struct crab_snapshot *snapshots[2]; /* for frames one by one; for batches */
};

struct lane {
    struct crab_core *core;
    struct crab_core *cores[2]; /* by whether the world is wild */
    struct crab_table *table, *small;
    struct crab_joins *joins;
    struct crab_bucket buckets[TABLE];
    uint64_t counters[CRAB_COUNTERS];
    uint64_t received, touched[FLOWS / CRAB_BUCKET / 64];
};

/* A policy's pool, of one service. */
struct pooled {
    struct crab_pool *pool;
    struct crab_turn turn;
    struct crab_load loads[4];
    struct crab_member members[4];
    uint32_t count;
};

struct run {
    const struct made *made;
    const struct world *world;
    struct pooled *pools[2]; /* of service 0 and 2 */
    struct lane *lane;
    uint32_t picked;
    struct oracle oracle;
};

static void choose(void *context, struct crab_choice *choices, uint32_t n)
{
    (void)context;
    for (uint32_t i = 0; i < n; i++)
        choices[i].backend = world_chooses(choices[i].hash);
}

static void handle(void *context, struct crab_handled *frames, uint32_t n)
{
    (void)context;
    for (uint32_t i = 0; i < n; i++)
        if (frames[i].handler != TAKES_ADDRESS)
            frames[i].verdict = frames[i].handler == TAKES_ARP ? CRAB_HANDLED_SEND : CRAB_HANDLED_KEPT;
}

/* Those that the daemon would put into it: whom the service may redirect to.  A pool is kept, as making one costs a hundred
 * inputs: where a policy goes on does not decide what is right. */
static struct pooled *pool_of(const struct world *w, uint32_t service)
{
    static struct pooled pools[2][POLICIES][8];
    bool dead = w->backends[0].flags & CRAB_BACKEND_DEAD, unusable = !(w->backends[3].flags & CRAB_BACKEND_USABLE);
    struct pooled *p = &pools[service / 2][w->policy][w->said + 2 * dead + 4 * unusable];
    if (!w->pooled || w->policy == CUSTOM || p->pool)
        return p;
    for (uint16_t i = 0; i < 4; i++) {
        uint16_t backend = (uint16_t)(i + 2 * service);
        uint32_t flags = w->backends[backend].flags;
        for (uint32_t e = 0; e < w->services[service].exception_count; e++) {
            const struct crab_exception *x = &w->exceptions[w->services[service].first_exception + e];
            if (x->backend == backend)
                flags = (flags & ~(uint32_t)(CRAB_BACKEND_CR | CRAB_BACKEND_DEAD)) | x->flags;
        }
        if ((flags & (CRAB_BACKEND_USABLE | CRAB_BACKEND_CR | CRAB_BACKEND_DEAD)) != (CRAB_BACKEND_USABLE | CRAB_BACKEND_CR))
            continue;
        p->loads[p->count] = (struct crab_load){.open = 3u * i, .figure = 1000u * i};
        p->members[p->count] = (struct crab_member){.backend = backend, .weight = 1u + i, .load = &p->loads[p->count]};
        p->count++;
    }
    p->pool = crab_pool_new(crab_policy_name(w->policy), p->members, p->count, &p->turn);
    CHECK(p->pool);
    return p;
}

static struct crab_snapshot *snapshot_of(const struct world *w, bool batches)
{
    struct crab_snapshot *s = crab_snapshot_new(w->services, SERVICES, w->backends, BACKENDS, w->prefixes, 2, w->exceptions,
                                                w->exception_count, SLOTS, w->form, w->key);
    CHECK(s);
    if (w->answers) {
        struct crab_address vips[2];
        memcpy(vips[0].addr, w->services[2].addr, 16);
        memcpy(vips[1].addr, w->services[0].addr, 16);
        CHECK(!crab_snapshot_answer(s, vips, 2, true, true));
    }
    if (w->matches) {
        struct crab_matches m = {.count = 3};
        m.list[0] = (struct crab_match){.fields = CRAB_MATCH_ETHERTYPE, .ethertype = htons(0x0806), .handler = TAKES_ARP};
        m.list[1] = (struct crab_match){.fields = CRAB_MATCH_PROTO | CRAB_MATCH_PORT, .proto = 17, .port = htons(53),
                                        .handler = TAKES_DNS};
        m.list[2] = (struct crab_match){.fields = CRAB_MATCH_ADDR, .addr = {0xfd, [15] = 0x99}, .handler = TAKES_ADDRESS};
        crab_snapshot_match(s, &m);
    }
    if (batches && w->taps) {
        struct crab_taps taps = {.count = 2, .snap = 96};
        taps.list[0] = (struct crab_tap){.fields = CRAB_TAP_PORT, .port = htons(80)};
        taps.list[1] = (struct crab_tap){.fields = CRAB_TAP_BACKEND, .backend = 3};
        crab_snapshot_tap(s, &taps);
    }
    return s;
}

static const struct made *made_of(const uint8_t bytes[3])
{
    static struct made kept[1024];
    uint32_t chosen = 1u << 24 | (uint32_t)bytes[0] << 16 | (uint32_t)bytes[1] << 8 | bytes[2];
    struct made *m = &kept[chosen * 0x9e3779b1u >> 22];
    if (m->chosen == chosen)
        return m;
    for (int i = 0; i < 2; i++)
        crab_snapshot_free(m->snapshots[i]);
    world_make(&m->world, bytes);
    if (m->world.pooled && m->world.policy != CUSTOM)
        for (uint32_t service = 0; service < SERVICES; service += 2)
            m->world.services[service].pool = pool_of(&m->world, service)->pool;
    for (int i = 0; i < 2; i++)
        m->snapshots[i] = snapshot_of(&m->world, i);
    m->chosen = chosen;
    return m;
}

/* A core as a new one is: making one would cost more than most inputs. */
static struct crab_core *fresh(struct lane *l, bool wild)
{
    struct crab_core *core = l->cores[wild];
    if (!core) {
        core = l->cores[wild] = crab_core_new(wild ? WILD_FLOWS : FLOWS, l->counters);
        l->joins = l->joins ? l->joins : crab_joins_new(64);
        l->table = l->table ? l->table : crab_table_new(l->buckets, TABLE);
        l->small = l->small ? l->small : crab_table_new(l->buckets, 1);
        CHECK(core && l->joins && l->table && l->small);
    }
    struct crab_flows flows = core->flows;
    memset(core, 0, offsetof(struct crab_core, learned)); /* of which none counts */
    flows.next = flows.tidied = 0;
    core->counters = l->counters;
    core->random = 1;
    core->flows = flows;
    core->touched = l->touched;
    crab_seen_init(&core->seen);
    memset(l->counters, 0, sizeof l->counters);
    l->received = 0;
    return core;
}

static void lane_open(const struct made *made, struct lane *l, bool batches)
{
    const struct world *w = &made->world;
    l->core = fresh(l, w->wild);
    if (w->joins)
        crab_core_join(l->core, l->joins);
    if (w->table)
        crab_core_learn(l->core, w->wild ? l->small : l->table);
    if (w->pooled)
        crab_core_ask(l->core, choose, NULL);
    if (w->matches)
        crab_core_handle(l->core, handle, NULL);
    if (batches && w->put_off)
        crab_core_put_off(l->core);
    if (batches && w->taps)
        CHECK(!crab_core_show(l->core, 1, RING));
    crab_core_publish(l->core, made->snapshots[batches]);
}

static void lane_close(struct lane *l)
{
    struct crab_flows *flows = &l->core->flows;
    for (uint64_t word = 0; word < sizeof l->touched / sizeof *l->touched; word++)
        for (; l->touched[word]; l->touched[word] &= l->touched[word] - 1)
            memset(&flows->entries[(word * 64 + (uint64_t)__builtin_ctzll(l->touched[word])) * CRAB_BUCKET], 0, CRAB_PART);
    if (l->counters[CRAB_C_LEARNED])
        memset(l->buckets, 0, sizeof l->buckets);
    if (l->core->joins)
        memset((void *)l->joins->words, 0, (l->joins->mask + 1) * CRAB_JOINS_SET * sizeof *l->joins->words);
    crab_core_publish(l->core, NULL);
    crab_core_hide(l->core);
}

/* Each frame is counted once: what is beside that has a counter behind CRAB_C_DROP_TX. */
static uint64_t counted(const struct lane *l)
{
    uint64_t n = 0;
    for (uint32_t i = CRAB_C_REDIRECTED; i <= CRAB_C_DROP_TX; i++)
        n += l->counters[i];
    return n;
}

static uint16_t chosen(void *context, uint64_t hash, const uint8_t isn[4])
{
    struct run *r = context;
    struct crab_memory found[2];
    uint32_t n = crab_core_recall(r->lane->core, hash, 1000, found);
    for (uint32_t i = 0; i < n; i++)
        if (found[i].state == CRAB_MEMORY_SYN && !memcmp(&found[i].isn_be, isn, 4))
            for (int p = 0; p < 2; p++)
                for (uint32_t m = 0; m < r->pools[p]->count; m++)
                    if (r->pools[p]->members[m].backend == found[i].backend) {
                        r->picked++;
                        return found[i].backend;
                    }
    return CRAB_NO_BACKEND;
}

struct sent {
    uint8_t *memory;
    struct crab_frame frame;
};

/* Frames in memory of just their size: what lies in front of one and behind it, as far as the next one, ASan knows as nobody's. */
static void put(struct sent *to, uint8_t (*places)[PLACE], const struct step *s, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        to[i].memory = places[i] + GAP;
        ASAN_UNPOISON_MEMORY_REGION(to[i].memory, CRAB_HEADROOM + s[i].len);
        memcpy(to[i].memory + CRAB_HEADROOM, s[i].frame, s[i].len);
        to[i].frame = (struct crab_frame){.data = to[i].memory + CRAB_HEADROOM, .len = s[i].len, .ifindex = HERE};
    }
}

static void take_back(const struct sent *sent, const struct step *s, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        ASAN_POISON_MEMORY_REGION(sent[i].memory, CRAB_HEADROOM + s[i].len);
}

/* One batch.  Returns how many are kept. */
static void batch(struct lane *l, struct sent *sent, const struct step *steps, uint32_t n)
{
    struct crab_frame frames[MOST_FRAMES];
    uint32_t kept = 0;
    for (uint32_t i = 0; i < n; i++)
        frames[i] = sent[i].frame;
    uint32_t said = crab_core_batch(l->core, frames, n, steps->now);
    crab_core_settle(l->core);
    for (uint32_t i = 0; i < n; i++) {
        const uint8_t *end = sent[i].memory + CRAB_HEADROOM + steps[i].len;
        CHECK(!frames[i].len || (frames[i].data >= sent[i].memory && frames[i].data + frames[i].len <= end));
        kept += frames[i].len != 0;
        sent[i].frame = frames[i];
    }
    l->received += n;
    CHECK(said == kept);
    CHECK(l->counters[CRAB_C_RECEIVED] == l->received && counted(l) == l->received);
}

/* What was shown is whole. */
static void look(struct lane *l)
{
    static uint8_t shown[RING];
    uint32_t n = crab_core_shown(l->core, shown);
    for (uint32_t at = 0; at < n;) {
        struct crab_tapped t;
        CHECK(n - at >= sizeof t);
        memcpy(&t, shown + at, sizeof t);
        CHECK(t.size % 8 == 0 && t.size <= n - at && t.size >= sizeof t + t.in_kept + t.out_kept);
        CHECK(t.taps && !(t.taps & ~3) && t.counters);
        CHECK(t.backend < BACKENDS || t.backend == CRAB_NO_BACKEND);
        at += t.size;
    }
}

static const char *const forms[] = {"false", "true"}, *const modes[] = {"negotiated", "always", "never"},
                         *const fallbacks[] = {"auto", "l2", "ipip"};

static void print_bytes(FILE *to, const uint8_t *bytes, uint32_t n)
{
    fputc('"', to);
    for (uint32_t i = 0; i < n; i++)
        fprintf(to, "%02x", bytes[i]);
    fputc('"', to);
}

/* The input as others can follow it: see tests/fuzz/corpus.py. */
static void print_world(FILE *to, const struct world *w)
{
    bool plain = !(w->answers || w->pooled || w->matches || w->refuses || w->source || w->wild || w->table || !w->joins);
    fprintf(to, "{\"plain\": %s, \"experimental\": %s, \"mode\": \"%s\", \"fallback\": \"%s\", \"elsewhere\": %s, ",
            forms[plain], forms[w->form], modes[w->mode], fallbacks[w->fallback], forms[w->elsewhere]);
    fprintf(to, "\"on_dead\": \"%s\", \"said\": %s, \"nobody\": %s, \"dead\": %s, \"unusable\": %s, \"frames\": [",
            w->services[0].on_dead == CRAB_ON_DEAD_RESET ? "reset" : "reassign", forms[w->said],
            forms[w->six[0] == CRAB_NO_BACKEND], forms[!!(w->backends[0].flags & CRAB_BACKEND_DEAD)],
            forms[!(w->backends[3].flags & CRAB_BACKEND_USABLE)]);
}

static void print_frame(FILE *to, const struct step *s, const struct verdict *v, bool first)
{
    fputs(first ? "[" : ", [", to);
    print_bytes(to, s->frame, s->len);
    fprintf(to, ", %d, %s, ", v->what, forms[v->quoting]);
    print_bytes(to, v->bytes, v->len);
    fprintf(to, ", %s]", forms[v->ifindex != HERE]);
}

static void differ(uint32_t i, const struct step *s, const char *one, int what, const uint8_t *bytes, uint32_t n,
                   const char *other, int other_what, const uint8_t *other_bytes, uint32_t other_n)
{
    fprintf(stderr, "frame %u: ", i);
    print_bytes(stderr, s->frame, s->len);
    fprintf(stderr, "\n%s, counter %d: ", one, what);
    print_bytes(stderr, bytes, n);
    fprintf(stderr, "\n%s, counter %d: ", other, other_what);
    print_bytes(stderr, other_bytes, other_n);
    fputc('\n', stderr);
    abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct script script;
    static struct run r;
    static struct lane ones, batches;
    static struct verdict verdict;
    static uint8_t places[2][MOST_FRAMES][PLACE] __attribute__((aligned(64)));
    static bool begun;
    struct sent one[MOST_FRAMES], many[MOST_FRAMES];
    if (!begun)
        ASAN_POISON_MEMORY_REGION(places, sizeof places);
    begun = true;
    script_read(&script, data, size);
    r.made = made_of(script.world);
    r.world = &r.made->world;
    for (uint32_t p = 0; p < 2; p++) {
        r.pools[p] = pool_of(r.world, 2 * p);
        for (uint32_t i = 0; i < r.pools[p]->count; i++)
            r.pools[p]->loads[i].assigned = 0;
    }
    lane_open(r.made, &ones, false);
    r.lane = &ones;
    r.picked = 0;
    oracle_begin(&r.oracle, r.world);
    r.oracle.chosen = chosen;
    r.oracle.context = &r;
    if (target_prints)
        print_world(target_prints, r.world);
    put(one, places[0], script.steps, script.count);
    for (uint32_t i = 0; i < script.count; i++) {
        const struct step *s = &script.steps[i];
        uint64_t before[CRAB_COUNTERS];
        memcpy(before, ones.counters, sizeof before);
        batch(&ones, &one[i], s, 1);
        if (r.world->wild)
            continue;
        enum crab_counter what = CRAB_C_REDIRECTED;
        while (ones.counters[what] == before[what])
            what++;
        oracle_judge(&r.oracle, s->frame, s->len, &verdict);
        const struct crab_frame *got = &one[i].frame;
        if (what != verdict.what || got->len != verdict.len || memcmp(got->data, verdict.bytes, got->len) ||
            (got->len && got->ifindex != verdict.ifindex))
            differ(i, s, "core", what, got->data, got->len, "oracle", verdict.what, verdict.bytes, verdict.len);
        if (target_prints)
            print_frame(target_prints, s, &verdict, !i);
    }
    if (target_prints)
        fputs("]}\n", target_prints), fflush(target_prints);
    if (r.world->pooled && r.world->policy != CUSTOM && !r.world->wild) {
        uint32_t assigned = 0;
        for (int p = 0; p < 2; p++)
            for (uint32_t m = 0; m < r.pools[p]->count; m++)
                assigned += r.pools[p]->loads[m].assigned;
        CHECK(assigned == r.picked);
    }
    lane_open(r.made, &batches, true);
    put(many, places[1], script.steps, script.count);
    for (uint32_t i = 0, n; i < script.count; i += n) {
        for (n = 1; i + n < script.count && !script.steps[i + n - 1].ends; n++)
            ;
        batch(&batches, &many[i], &script.steps[i], n);
        look(&batches);
    }
    /* What is decided for a whole batch at once is decided as it would be for each: but for policies, which are asked before
     * the first frame is forwarded (of a SYN whose flow another SYN replaces in the same batch the table decides), for tokens,
     * and for flows that are not written down yet. */
    bool same = !r.world->wild && !r.world->pooled && !(r.world->put_off && r.world->table) &&
                ones.counters[CRAB_C_MPTCP_JOIN_KNOWN] == batches.counters[CRAB_C_MPTCP_JOIN_KNOWN];
    for (uint32_t i = 0; i < script.count; i++) {
        const struct crab_frame *a = &one[i].frame, *b = &many[i].frame;
        if (same && (a->len != b->len || a->ifindex != b->ifindex || memcmp(a->data, b->data, a->len)))
            differ(i, &script.steps[i], "alone", -1, a->data, a->len, "in a batch", -1, b->data, b->len);
    }
    take_back(one, script.steps, script.count);
    take_back(many, script.steps, script.count);
    lane_close(&ones);
    lane_close(&batches);
    return 0;
}
