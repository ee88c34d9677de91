/* SPDX-License-Identifier: MIT */
/* AF_XDP sockets on a pretended kernel (pretend.h): each call that sets one up fails in its turn; what kicks answer; sockets
 * that share a UMEM, and that go from one process to the next; and any order of all, with frames conserved. */
#include "pretend.h"

#define FRAMES 64
#define RING 16

static const char *stage;
static int error;

static struct crab_xsk *make(struct crab_umem *u, const struct crab_xsk *share, uint32_t queue, uint32_t flags)
{
    return crab_xsk_new(u, share, 3, queue, RING, flags, &error, &stage);
}

static uint32_t free_frames(const struct crab_umem *u)
{
    struct crab_xsk_places p;
    crab_umem_frames(u, &p);
    CHECK(p.all == FRAMES);
    return p.free;
}

/* Whatever is refused, one error says so, at a stage; no descriptor, and no frame, is lost. */
static void set_up_fails(void)
{
    uint32_t refused = 0, stages = 0;
    struct crab_umem *u = crab_umem_new(FRAMES, 2048, -1);
    kernel.with = EPERM;
    for (uint32_t n = 1;; n++) {
        kernel.struck = false;
        kernel.fails = n;
        struct crab_xsk *x = make(u, NULL, 0, XDP_COPY | XDP_USE_NEED_WAKEUP);
        kernel.fails = 0;
        if (x) {
            CHECK(!error && crab_xsk_conserved(x) && crab_umem_sockets(u) == 1 && !crab_xsk_zero_copy(x));
            crab_xsk_free(x);
            CHECK(!open_sockets() && !crab_umem_sockets(u));
            crab_umem_free(u);
            u = crab_umem_new(FRAMES, 2048, -1);
        } else {
            static const char *before;
            CHECK(kernel.struck && (error == EPERM || error == ENOMEM));
            CHECK(!open_sockets() && !crab_umem_sockets(u) && free_frames(u) == FRAMES);
            refused++;
            stages += !before || strcmp(before, stage);
            before = stage;
        }
        if (!kernel.struck)
            break;
    }
    kernel.with = 0;
    CHECK(refused >= 12 && stages == 5); /* memory, socket, umem, rings, bind: frames cannot fail */
    crab_umem_free(u);
}

/* Which memory, of which size, in which of the ways. */
static void memory_fails(void)
{
    static const uint32_t counts[2] = {FRAMES, 2048}; /* less than a huge page, and more */
    for (int big = 0; big < 2; big++)
        for (int shared = 0; shared < 2; shared++) {
            int fd = shared ? memfd_create("umem", MFD_CLOEXEC) : -1;
            CHECK(!shared || !ftruncate(fd, (off_t)crab_umem_size(counts[big], 2048)));
            uint32_t failed = 0;
            for (uint32_t n = 1;; n++) {
                kernel.struck = false;
                kernel.fails = n;
                struct crab_umem *u = crab_umem_new(counts[big], 2048, fd);
                kernel.fails = 0;
                CHECK((u != NULL) == !kernel.struck);
                failed += kernel.struck;
                if (!u)
                    continue;
                uint8_t *memory = crab_umem_memory(u);
                memory[0] = memory[crab_umem_size(counts[big], 2048) - 1] = 1;
                CHECK(!big || (uintptr_t)memory % (2u << 20) == 0);
                crab_umem_free(u);
                break;
            }
            CHECK(failed == (shared ? 4u : 3u)); /* the structure, the mapping (or a place, and it), the stack */
            if (shared)
                close(fd);
        }
}

/* Modes are tried from the best one on; a queue that is released late is waited for. */
static void binds(void)
{
    const uint16_t wakeup = XDP_USE_NEED_WAKEUP, frags = XDP_USE_SG;
    const struct {
        uint32_t asked;
        bool no_zero_copy, no_frags;
        uint32_t got; /* 0: refused */
    } cases[] = {
        {wakeup, false, false, XDP_ZEROCOPY | wakeup},
        {wakeup, true, false, XDP_COPY | wakeup},
        {wakeup | frags, false, false, XDP_ZEROCOPY | wakeup | frags},
        {wakeup | frags, false, true, XDP_ZEROCOPY | wakeup},
        {wakeup | frags, true, true, XDP_COPY | wakeup},
        {wakeup | XDP_ZEROCOPY, true, false, 0},
        {XDP_COPY | frags, true, false, XDP_COPY | frags},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct crab_umem *u = crab_umem_new(FRAMES, 2048, -1);
        kernel.no_zero_copy = cases[i].no_zero_copy;
        kernel.no_frags = cases[i].no_frags;
        struct crab_xsk *x = make(u, NULL, 0, cases[i].asked);
        CHECK((x != NULL) == (cases[i].got != 0));
        if (x) {
            struct crab_xsk_bound bound;
            crab_xsk_is_bound(x, &bound);
            CHECK(bound.bind_flags == cases[i].got && bound.ifindex == 3 && bound.ring_size == RING);
            CHECK(crab_xsk_zero_copy(x) == !!(cases[i].got & XDP_ZEROCOPY) && crab_xsk_frags(x) == !!(cases[i].got & frags));
        } else {
            CHECK(error == EOPNOTSUPP && !strcmp(stage, "bind") && free_frames(u) == FRAMES);
        }
        crab_xsk_free(x);
        crab_umem_free(u);
    }
    kernel.no_zero_copy = kernel.no_frags = false;
    struct crab_umem *u = crab_umem_new(FRAMES, 2048, -1);
    kernel.busy = 3;
    kernel.pauses = 0;
    struct crab_xsk *x = make(u, NULL, 0, XDP_COPY);
    CHECK(x && kernel.pauses == 3);
    crab_xsk_free(x);
    crab_umem_free(u);
    u = crab_umem_new(FRAMES, 2048, -1);
    kernel.busy = 1000; /* somebody's for good; no other mode is tried then */
    CHECK(!make(u, NULL, 0, 0) && error == EBUSY && 1000 - kernel.busy == 251);
    kernel.busy = 0;
    crab_umem_free(u);
    kernel.no_such_flags = true;
    CHECK(!crab_xsk_knows_frags());
    kernel.no_such_flags = false;
    CHECK(crab_xsk_knows_frags());
    kernel.fails_of[SOCKET] = 1;
    CHECK(!crab_xsk_knows_frags() && !open_sockets());
}

static uint32_t send_some(struct crab_xsk *x, uint32_t n)
{
    struct crab_desc descs[FRAMES];
    n = crab_xsk_take(x, descs, n);
    for (uint32_t i = 0; i < n; i++)
        descs[i].len = 60;
    uint32_t sent = crab_xsk_send(x, descs, n);
    crab_xsk_release(x, descs + sent, n - sent);
    return sent;
}

/* What a kick answers, and what becomes of the frames. */
static void kicks(void)
{
    const struct {
        struct kick first;
        int rc;
        uint32_t dropped, wire;
    } cases[] = {
        {{EAGAIN, true}, 0, 0, 4},   /* its budget is used up: the rest by the next one */
        {{EBUSY, true}, 0, 1, 3},    /* dropped, and completed */
        {{EBUSY, false}, 0, 0, 4},   /* no time */
        {{ENOMEM, false}, 0, 0, 0},  /* not now */
        {{EINTR, false}, 0, 0, 4},
        {{ENOBUFS, true}, 0, 0, 4},
        {{ENETDOWN, false}, -ENETDOWN, 0, 0},
        {{ENXIO, false}, -ENXIO, 0, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct crab_umem *u = crab_umem_new(FRAMES, 2048, -1);
        struct crab_xsk *x = make(u, NULL, 0, XDP_COPY);
        CHECK(x && send_some(x, 4) == 4);
        kernel.wire = 0;
        kernel.kicks[0] = cases[i].first;
        kernel.kick_count = 1;
        CHECK(crab_xsk_kick(x) == cases[i].rc);
        CHECK(crab_xsk_dropped(x) == cases[i].dropped && kernel.wire == cases[i].wire);
        CHECK(!crab_xsk_kick(x)); /* what is left goes then */
        crab_xsk_reap(x);
        uint32_t receiving, sending;
        crab_xsk_frames(x, &receiving, &sending);
        CHECK(!sending && receiving == FRAMES / 2 && crab_xsk_conserved(x));
        crab_xsk_free(x);
        crab_umem_free(u);
    }
    /* All went by a kick that was interrupted: no other one is made.  And one that never ends is given up. */
    struct crab_umem *u = crab_umem_new(FRAMES, 2048, -1);
    struct crab_xsk *x = make(u, NULL, 0, XDP_COPY | XDP_USE_NEED_WAKEUP);
    struct pretended *s = pretended(crab_xsk_fd(x));
    CHECK(send_some(x, 1) == 1);
    kernel.wire = 0;
    CHECK(!crab_xsk_kick(x) && !kernel.wire); /* the driver asks for none */
    *end_of(s, TX, FLAGS) = XDP_RING_NEED_WAKEUP;
    kernel.kicks[0] = (struct kick){EINTR, true};
    kernel.kick_count = 1;
    CHECK(!crab_xsk_kick(x) && kernel.wire == 1 && !kernel.kick_count);
    crab_xsk_wake(x);
    CHECK(!s->wakes);
    *end_of(s, FILL, FLAGS) = XDP_RING_NEED_WAKEUP;
    crab_xsk_wake(x);
    CHECK(s->wakes == 1);
    CHECK(send_some(x, RING) == RING && !send_some(x, 1)); /* the ring is full */
    s->budget = 1; /* a kick a frame */
    CHECK(!crab_xsk_kick(x) && kernel.wire == 1 + RING);
    /* Busy polling: each setting may be refused. */
    for (uint32_t n = 1; n < 4; n++) {
        kernel.fails_of[SETSOCKOPT] = n;
        CHECK(crab_xsk_busy_poll(x, 20, 64) == -ENOMEM);
    }
    CHECK(!crab_xsk_busy_poll(x, 20, 64));
    *end_of(s, TX, FLAGS) = *end_of(s, FILL, FLAGS) = 0;
    crab_xsk_wake(x);
    crab_umem_settle(u); /* the driver is run by no other call than its own */
    CHECK(s->wakes == 2 && send_some(x, 1) == 1 && !crab_xsk_kick(x) && kernel.wire == 2 + RING);
    /* What is asked may be refused too. */
    struct crab_xsk_stats stats;
    s->statistics.rx_dropped = 5;
    CHECK(!crab_xsk_statistics(x, &stats) && stats.rx_dropped == 5 && crab_xsk_namespace(x) == 77);
    kernel.with = EINVAL;
    kernel.fails_of[GETSOCKOPT] = 1;
    CHECK(crab_xsk_statistics(x, &stats) == -EINVAL);
    kernel.fails_of[GETSOCKOPT] = 1;
    CHECK(crab_xsk_namespace(x) == 0);
    kernel.fails_of[GETSOCKOPT] = 1;
    CHECK(crab_xsk_error(x) == EINVAL);
    kernel.with = 0;
    s->error = ENETDOWN;
    CHECK(crab_xsk_error(x) == ENETDOWN && crab_xsk_error(x) == 0);
    CHECK(!crab_xsk_unbound(x));
    s->gone = true;
    CHECK(crab_xsk_unbound(x));
    crab_xsk_free(x);
    crab_umem_free(u);
}

static void shared(void)
{
    bool held[FRAMES] = {false};
    uint64_t addresses[FRAMES];
    struct crab_umem *u = crab_umem_new(FRAMES, 2048, -1);
    struct crab_xsk *x = make(u, NULL, 0, XDP_COPY), *y, *z;
    held[FRAMES - 1 - FRAMES / 2] = true; /* which the socket's ring has: it cannot be */
    CHECK(crab_umem_share(u, held) == -EBUSY);
    memset(held, 0, sizeof held);
    kernel.fails_of[ALLOCATE] = 1;
    CHECK(crab_umem_share(u, held) == -ENOMEM);
    CHECK(!crab_umem_share(u, held) && !crab_umem_share(u, held));
    CHECK(crab_xsk_in_rings(x, addresses) == FRAMES / 2);
    /* The other one's own queue; then, refused; then well. */
    kernel.refused = EINVAL;
    CHECK(!make(u, x, 0, 0) && error == EBUSY);
    CHECK(!make(u, x, 1, 0) && error == EINVAL);
    CHECK(crab_umem_sockets(u) == 1 && crab_xsk_conserved(x) && crab_xsk_in_rings(x, addresses) == FRAMES / 2);
    kernel.refused = 0;
    y = make(u, x, 1, 0);
    z = make(u, x, 2, 0);
    CHECK(y && z && crab_umem_sockets(u) == 3 && crab_xsk_conserved(x));
    uint32_t receiving, sending;
    crab_xsk_frames(z, &receiving, &sending);
    CHECK(receiving > 0); /* a share of what there is, however little */
    /* What one received another sends. */
    struct crab_desc d[4];
    CHECK(arrives(pretended(crab_xsk_fd(y)), "0123456789", 10, false));
    CHECK(crab_xsk_receive(y, d, 4) == 1 && d[0].len == 10 && !memcmp(crab_umem_memory(u) + d[0].addr, "0123456789", 10));
    CHECK(crab_xsk_send(x, d, 1) == 1 && crab_xsk_in_rings(x, addresses) == FRAMES / 2 + 1);
    CHECK(!crab_xsk_kick(x));
    crab_umem_settle(u);
    CHECK(crab_xsk_conserved(y) && crab_xsk_in_rings(x, addresses) == FRAMES / 2);
    /* A packet in two frames: whole, or not at all. */
    CHECK(arrives(pretended(crab_xsk_fd(x)), "ab", 2, true));
    CHECK(!crab_xsk_receive(x, d, 4));
    CHECK(arrives(pretended(crab_xsk_fd(x)), "cd", 2, false));
    CHECK(!crab_xsk_receive(x, d, 1) && crab_xsk_receive(x, d, 4) == 2 && d[0].more && !d[1].more);
    CHECK(!crab_xsk_send(x, d, 1) && crab_xsk_send(x, d, 2) == 2 && !crab_xsk_kick(x));
    /* The first one is closed: the frames in its rings are said to be free once the kernel has let go. */
    uint32_t left = crab_xsk_in_rings(x, addresses);
    crab_xsk_forked(x);
    CHECK(crab_umem_sockets(u) == 2 && crab_xsk_fd(x) == -1);
    crab_umem_add(u, addresses, left);
    crab_xsk_free(x);
    crab_xsk_free(y);
    crab_xsk_free(z);
    crab_xsk_free(NULL);
    crab_umem_free(u);
}

/* Tickets: what is handed out, is handed in once. */
static void tickets(void)
{
    struct crab_umem *u = crab_umem_new(FRAMES, 2048, -1);
    struct crab_xsk *x = make(u, NULL, 0, XDP_COPY);
    uint64_t ticket[FRAMES] = {0};
    struct crab_desc d[8], twice[2];
    uint32_t n, sent;
    crab_xsk_hand_out(x, d, 3, false, ticket, 9, &n);
    CHECK(n == 3);
    twice[0] = twice[1] = d[0];
    CHECK(crab_xsk_hand_in(x, twice, 2, true, ticket, 9, &sent) == -EEXIST && !sent);
    CHECK(crab_xsk_hand_in(x, d, 3, true, ticket, 8, &sent) == -EEXIST && crab_xsk_conserved(x));
    CHECK(!crab_xsk_hand_in(x, d, 2, true, ticket, 9, &sent) && sent == 2);
    CHECK(!crab_xsk_hand_in(x, d + 2, 1, false, ticket, 9, &sent) && !sent);
    CHECK(arrives(pretended(crab_xsk_fd(x)), "x", 1, false));
    crab_xsk_hand_out(x, d, 8, true, ticket, 10, &n);
    CHECK(n == 1 && ticket[d[0].addr / 2048] == 10);
    kernel.kicks[0] = (struct kick){ENXIO, false};
    kernel.kick_count = 1;
    CHECK(crab_xsk_hand_in(x, d, 1, true, ticket, 10, &sent) == -ENXIO && sent == 1 && crab_xsk_conserved(x));
    crab_xsk_free(x);
    crab_umem_free(u);
}

/* From one process to the next, each with a mapping of its own. */
static void handed_over(void)
{
    int fd = memfd_create("umem", MFD_CLOEXEC);
    CHECK(!ftruncate(fd, (off_t)crab_umem_size(FRAMES, 2048)));
    struct crab_umem *old = crab_umem_new(FRAMES, 2048, fd), *new = crab_umem_new(FRAMES, 2048, fd);
    struct crab_xsk *x = make(old, NULL, 0, XDP_COPY), *y = NULL;
    struct pretended *s = pretended(crab_xsk_fd(x));
    struct crab_xsk_bound bound;
    struct crab_xsk_given given;
    uint64_t free_ones[FRAMES];
    struct crab_desc d[4];
    CHECK(arrives(s, "one", 3, false) && arrives(s, "two", 3, false));
    CHECK(crab_xsk_receive(x, d, 1) == 1 && crab_xsk_send(x, d, 1) == 1);
    crab_xsk_is_bound(x, &bound);
    for (uint32_t n = 1; !y; n++) {
        kernel.struck = false;
        kernel.fails = n;
        y = crab_xsk_adopt(new, crab_xsk_fd(x), &bound, &error, &stage);
        kernel.fails = 0;
        CHECK((y != NULL) == !kernel.struck && (y || error) && open_sockets() == 1);
    }
    crab_xsk_give(x, &given, free_ones);
    CHECK(!crab_xsk_moved(x));
    crab_xsk_take_over(y, &given, free_ones);
    CHECK(crab_xsk_conserved(y) && !crab_xsk_moved(x)); /* it could go on here still */
    CHECK(crab_xsk_receive(y, d, 4) == 1 && !memcmp(crab_umem_memory(new) + d[0].addr, "two", 3));
    CHECK(crab_xsk_moved(x));
    CHECK(crab_xsk_send(y, d, 1) == 1 && !crab_xsk_kick(y) && crab_xsk_reap(y) == 2);
    crab_xsk_refill(y);
    CHECK(crab_xsk_conserved(y) && free_frames(new) == FRAMES / 2);
    CHECK(crab_xsk_moved(x));
    /* Each end by itself says so. */
    _Atomic(uint32_t) *ends[] = {x->fill.producer, x->tx.producer, x->rx.consumer, x->completion.consumer};
    const uint32_t mine[] = {x->fill.mine, x->tx.mine, x->rx.mine, x->completion.mine};
    for (int i = 0; i < 4; i++) {
        for (int k = 0; k < 4; k++)
            *ends[k] = mine[k] + (i == k);
        CHECK(crab_xsk_moved(x));
    }
    crab_xsk_forked(x); /* the descriptor is the other's, here as there */
    crab_xsk_free(x);
    y->fd = -1;
    crab_xsk_free(y);
    crab_umem_free(old);
    crab_umem_free(new);
    close(fd);
}

/* Any order of calls, with kicks that fail: each frame is in one place, and the caller's are his alone. */
static void any_order(uint32_t seed)
{
    struct crab_umem *u = crab_umem_new(FRAMES, 2048, -1);
    struct crab_xsk *x = make(u, NULL, 0, XDP_COPY);
    struct pretended *s = pretended(crab_xsk_fd(x));
    struct crab_desc mine[FRAMES];
    uint32_t n = 0, state = seed;
    for (int step = 0; step < 20000; step++) {
        state = state * 1664525u + 1013904223u;
        uint32_t what = state >> 28, some = 1 + (state >> 20 & 7), got;
        if (what < 4) {
            arrives(s, "frame", 5, false);
        } else if (what < 7 && n + some <= FRAMES) {
            got = what == 4 ? crab_xsk_take(x, mine + n, some) : crab_xsk_receive(x, mine + n, some);
            for (uint32_t i = n; i < n + got; i++)
                for (uint32_t k = 0; k < i; k++)
                    CHECK(mine[i].addr / 2048 != mine[k].addr / 2048);
            n += got;
        } else if (what < 9) {
            got = crab_xsk_send(x, mine, some < n ? some : n);
            memmove(mine, mine + got, (n - got) * sizeof *mine);
            n -= got;
        } else if (what == 9) {
            got = some < n ? some : n;
            crab_xsk_release(x, mine, got);
            memmove(mine, mine + got, (n - got) * sizeof *mine);
            n -= got;
        } else if (what == 10) {
            crab_xsk_refill(x);
        } else if (what == 11) {
            crab_xsk_reap(x);
        } else {
            static const int errors[] = {0, EAGAIN, EBUSY, ENOMEM, EINTR, ENOBUFS, ENETDOWN, EBUSY};
            kernel.kicks[0] = (struct kick){errors[some % 8], state >> 16 & 1};
            kernel.kick_count = 1;
            crab_xsk_kick(x);
            kernel.kick_count = 0;
        }
        CHECK(crab_xsk_conserved(x));
    }
    CHECK(s->statistics.rx_ring_full && crab_xsk_dropped(x));
    crab_xsk_free(x);
    crab_umem_free(u);
}

int main(void)
{
    set_up_fails();
    memory_fails();
    binds();
    kicks();
    shared();
    tickets();
    handed_over();
    for (uint32_t seed = 1; seed <= 5; seed++)
        any_order(seed);
    CHECK(!open_sockets());
    DONE();
}
