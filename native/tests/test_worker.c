/* SPDX-License-Identifier: MIT */
/* A worker on a pretended kernel (pretend.h): what comes goes on, or is counted; what the kernel refuses is counted, too, and
 * the worker goes on where it can. */
#include "pretend.h" /* first: it is GNU's */

#include "packet.h"
#include "segment.h"

#include <time.h>

#define FRAMES 128
#define RING 16
#define SIZE 251
#define HERE 3
#define ELSEWHERE 4

static uint16_t table[SIZE];
static const uint8_t key[16] = {7};
static uint64_t counters[CRAB_COUNTERS], told[CRAB_COUNTERS];
static struct crab_rounds rounds;
static struct crab_umem *u;
static struct crab_xsk *x;
static struct crab_core *core;
static struct crab_snapshot *snapshot;
static struct crab_worker *w;
static struct pretended *s;

/* Two backends, of which one is behind another interface. */
static void begin(uint32_t flags)
{
    struct crab_service service = {.addr = {[10] = 0xff, [11] = 0xff, 10, 0, 0, 100}, .port_be = htons(80), .protocol = 6,
                                   .fallback = CRAB_FALLBACK_L2, .table = table};
    struct crab_backend backends[2] = {0};
    struct crab_table_member m[2];
    int error;
    const char *stage;
    for (uint16_t i = 0; i < 2; i++) {
        backends[i] = (struct crab_backend){.addr = {[10] = 0xff, [11] = 0xff, 10, 0, 0, (uint8_t)(11 + i)}, .mtu = 9000,
                                            .dst_mac = {2, 0, 0, 0, 0, (uint8_t)(11 + i)}, .src_mac = {2, 0, 0, 0, 0, 2},
                                            .flags = CRAB_BACKEND_USABLE | CRAB_BACKEND_ON_LINK,
                                            .ifindex = i ? ELSEWHERE : HERE};
        m[i] = (struct crab_table_member){.weight = 1, .backend = i};
        memcpy(m[i].addr, backends[i].addr, 16);
    }
    CHECK(!crab_maglev_build(table, SIZE, m, 2, key));
    memset(&rounds, 0, sizeof rounds);
    memset(counters, 0, sizeof counters);
    memset(&kernel, 0, sizeof kernel);
    u = crab_umem_new(FRAMES, 2048, -1);
    x = crab_xsk_new(u, NULL, HERE, 0, RING, flags, &error, &stage);
    core = crab_core_new(256, counters);
    snapshot = crab_snapshot_new(&service, 1, backends, 2, NULL, 0, NULL, 0, SIZE, CRAB_FORM_CRAB, key);
    CHECK(u && x && core && snapshot);
    crab_core_publish(core, snapshot);
    w = crab_worker_new(x, core, counters);
    CHECK(w);
    s = pretended(crab_xsk_fd(x));
}

static void end(void)
{
    CHECK(crab_xsk_conserved(x));
    crab_worker_free(w);
    crab_core_free(core);
    crab_xsk_free(x);
    crab_umem_free(u);
    crab_snapshot_free(snapshot);
    CHECK(!open_sockets());
}

/* Whether a port's connections go by another interface. */
static bool goes_elsewhere(uint16_t port)
{
    uint8_t client[16] = {[10] = 0xff, [11] = 0xff, 10, 0, 0, 1}, vip[16] = {[10] = 0xff, [11] = 0xff, 10, 0, 0, 100};
    return table[((crab_flow_hash(key, client, vip, htons(port), htons(80)) >> 32) * SIZE) >> 32];
}

/* A SYN from the next port, of which it can be told whither it goes. */
static uint16_t syn(bool elsewhere)
{
    static uint16_t port = 1000;
    uint8_t *memory;
    while (goes_elsewhere(++port) != elsewhere)
        ;
    struct crab_frame f = make(&memory, 4, port, CRAB_SYN, 1, key, 0, 0);
    CHECK(arrives(s, f.data, f.len, false));
    free(memory);
    return port;
}

/* A packet's parts of so many bytes; lies: it says that it is so much longer. */
static void in_parts(uint32_t payload, uint32_t part, uint32_t lies)
{
    uint8_t *memory;
    struct crab_frame f = make(&memory, 4, 999, CRAB_ACK, 1, key, 0, payload + lies);
    f.len -= lies;
    for (uint32_t at = 0; at < f.len; at += part)
        CHECK(arrives(s, f.data + at, at + part < f.len ? part : f.len - at, at + part < f.len));
    free(memory);
}

static uint64_t dropped(void)
{
    return counters[CRAB_C_DROP_TX];
}

static void forwards(void)
{
    begin(XDP_COPY);
    crab_worker_rounds(w, &rounds);
    for (int i = 0; i < 3; i++)
        syn(false);
    for (int i = 0; i < 5; i++)
        syn(true);
    CHECK(arrives(s, "no packet", 9, false));
    CHECK(crab_worker_once(w, 0) == 9);
    CHECK(kernel.wire == 3 && kernel.sent_elsewhere == 5 && counters[CRAB_C_SENT] == 8 && !dropped());
    CHECK(counters[CRAB_C_RECEIVED] == 9 && counters[CRAB_C_DROP_MALFORMED] == 1);
    CHECK(rounds.sizes[4] == 1 && rounds.frames == 9 && rounds.timed_ns > 0); /* 9 are more than 8 */
    CHECK(crab_worker_once(w, 0) == 0 && rounds.sizes[0] == 0);
    syn(false);
    CHECK(crab_worker_once(w, 0) == 1 && rounds.sizes[0] == 1);
    /* What is refused does not hold back the others. */
    for (int i = 0; i < 5; i++)
        syn(true);
    kernel.fails_of[SENDMMSG] = 2;
    CHECK(crab_worker_once(w, 0) == 5 && kernel.sent_elsewhere == 9 && dropped() == 1 && counters[CRAB_C_SENT] == 13);
    end();
}

static void whole_packets(void)
{
    begin(XDP_COPY | XDP_USE_SG);
    in_parts(3000, 1000, 0);
    syn(false);
    CHECK(crab_worker_once(w, 0) == 5); /* four frames, and one */
    CHECK(kernel.sent_elsewhere == 1 && kernel.elsewhere_bytes == 54 + 3000 && kernel.wire == 1);
    /* What was queued before goes first. */
    syn(false);
    in_parts(3000, 2000, 0);
    CHECK(crab_worker_once(w, 0) == 3 && kernel.sent_elsewhere == 2 && kernel.wire == 2);
    /* One that ends before it should; one that is longer than any may be. */
    in_parts(1000, 800, 200);
    CHECK(crab_worker_once(w, 0) == 2 && kernel.sent_elsewhere == 2 && counters[CRAB_C_DROP_MALFORMED] == 1);
    end();
    begin(XDP_COPY | XDP_USE_SG);
    crab_xsk_free(x); /* with rings for so many parts */
    int error;
    const char *stage;
    crab_worker_free(w);
    crab_umem_free(u);
    u = crab_umem_new(FRAMES, 2048, -1);
    x = crab_xsk_new(u, NULL, HERE, 0, 64, XDP_COPY | XDP_USE_SG, &error, &stage);
    w = crab_worker_new(x, core, counters);
    CHECK(x && w);
    s = pretended(crab_xsk_fd(x));
    static uint8_t part[1500];
    for (uint32_t i = 0; i < 45; i++) /* 67,500 bytes */
        CHECK(arrives(s, part, sizeof part, i < 44));
    CHECK(crab_worker_once(w, 0) == 45 && !kernel.sent_elsewhere);
    CHECK(counters[CRAB_C_RECEIVED] == 1 && counters[CRAB_C_DROP_MALFORMED] + counters[CRAB_C_DROP_NOT_SERVICE] == 1);
    end();
}

static void no_room(void)
{
    /* The link is down: frames stay in the ring until it is full; what comes then is counted as dropped. */
    begin(XDP_COPY);
    for (int i = 0; i < RING; i++)
        syn(false);
    kernel.kicks[0] = (struct kick){ENETDOWN, false};
    kernel.kick_count = 1;
    CHECK(crab_worker_once(w, 0) == RING && !kernel.wire && !dropped());
    for (int i = 0; i < 3; i++)
        syn(false);
    kernel.kicks[0] = kernel.kicks[1] = (struct kick){ENETDOWN, false};
    kernel.kick_count = 2;
    CHECK(crab_worker_once(w, 0) == 3 && dropped() == 3 && counters[CRAB_C_SENT] == RING);
    /* The kernel has no memory: likewise. */
    syn(false);
    kernel.kicks[0] = kernel.kicks[1] = (struct kick){ENOMEM, false};
    kernel.kick_count = 2;
    CHECK(crab_worker_once(w, 0) == 1 && dropped() == 4);
    /* There is room again once it has sent some. */
    syn(false);
    CHECK(crab_worker_once(w, 0) == 1 && dropped() == 4 && kernel.wire == RING + 1);
    /* A frame that the device refused was counted as sent, and is taken back. */
    syn(false);
    kernel.kicks[0] = (struct kick){EBUSY, true};
    kernel.kick_count = 1;
    uint64_t sent = counters[CRAB_C_SENT];
    CHECK(crab_worker_once(w, 0) == 1 && dropped() == 5 && counters[CRAB_C_SENT] == sent);
    /* The interface is gone. */
    syn(false);
    kernel.kicks[0] = (struct kick){ENXIO, false};
    kernel.kick_count = 1;
    CHECK(crab_worker_once(w, 0) == -ENXIO);
    /* What is left in rings at the end is lost, and said to be. */
    syn(false);
    uint64_t dropped_before = dropped();
    sent = counters[CRAB_C_SENT];
    s->statistics.rx_dropped += 2;
    crab_worker_lose(w);
    CHECK(dropped() == dropped_before + 1 && counters[CRAB_C_SENT] == sent - 1 && counters[CRAB_C_XSK_RX_DROPPED] == 3);
    end();
}

static void waits(void)
{
    begin(XDP_COPY);
    kernel.revents = POLLIN;
    CHECK(crab_worker_once(w, 5) == 0 && kernel.waited == 5);
    CHECK(crab_worker_once(w, 5000) == 0 && kernel.waited == 1000); /* an interface that goes is seen by looking alone */
    CHECK(crab_worker_once(w, -1) == 0 && kernel.waited == 1000);
    kernel.poll_error = EINTR;
    CHECK(crab_worker_once(w, 5) == 0);
    kernel.poll_error = ENOMEM;
    CHECK(crab_worker_once(w, 5) == -ENOMEM);
    kernel.poll_error = 0;
    kernel.revents = 0;
    CHECK(crab_worker_once(w, 5) == 0);
    s->error = ENETDOWN; /* which poll does not tell */
    CHECK(crab_worker_once(w, 5) == -ENETDOWN);
    kernel.revents = POLLERR;
    s->error = EIO;
    CHECK(crab_worker_once(w, 5) == -EIO);
    CHECK(crab_worker_once(w, 5) == -ENETDOWN);
    kernel.revents = POLLNVAL;
    CHECK(crab_worker_once(w, 5) == -ENETDOWN);
    /* What the kernel has not sent is kicked again soon. */
    kernel.revents = POLLIN;
    syn(false);
    kernel.kicks[0] = kernel.kicks[1] = (struct kick){ENOMEM, false};
    kernel.kick_count = 2;
    CHECK(crab_worker_once(w, 0) == 1 && crab_worker_once(w, 500) == 0 && kernel.waited == 1 && kernel.wire == 1);
    crab_worker_stop(w); /* whoever is to stop does not look for errors */
    kernel.revents = 0;
    s->error = ENETDOWN;
    CHECK(crab_worker_once(w, 5) == 0);
    end();
}

static uint32_t turns_left;

/* Frames come, now and then, then it is to stop. */
static void something(void)
{
    if (!turns_left)
        crab_worker_stop(w);
    else if (turns_left-- % 2)
        syn(false);
}

static void slow(void)
{
    nanosleep(&(struct timespec){.tv_nsec = 40000000}, NULL);
}

static void runs(void)
{
    begin(XDP_COPY | XDP_USE_NEED_WAKEUP);
    *end_of(s, TX, FLAGS) = *end_of(s, FILL, FLAGS) = XDP_RING_NEED_WAKEUP;
    kernel.meanwhile = something;
    kernel.revents = POLLIN;
    turns_left = 7;
    CHECK(crab_worker_run(w) == 0);
    CHECK(counters[CRAB_C_RECEIVED] == 4 && kernel.wire == 4 && crab_worker_turns(w) >= 7);
    end();
    /* The same turning: frames come while it does, or not; it is told to stop while it does. */
    begin(XDP_COPY | XDP_USE_NEED_WAKEUP);
    *end_of(s, TX, FLAGS) = *end_of(s, FILL, FLAGS) = XDP_RING_NEED_WAKEUP;
    crab_worker_spin(w, 10000000);
    kernel.meanwhile = something;
    kernel.revents = POLLIN;
    turns_left = 9;
    CHECK(crab_worker_run(w) == 0 && counters[CRAB_C_RECEIVED] == 5 && s->wakes > 0);
    end();
    begin(XDP_COPY);
    crab_worker_spin(w, 1); /* which a sleep is longer than, some time */
    kernel.meanwhile = something;
    kernel.revents = POLLIN;
    turns_left = 200;
    CHECK(crab_worker_run(w) == 0 && counters[CRAB_C_RECEIVED] == 100);
    end();
    begin(XDP_COPY);
    kernel.meanwhile = NULL;
    kernel.revents = POLLERR;
    CHECK(crab_worker_run(w) == -ENETDOWN);
    kernel.kicks[0] = (struct kick){ENXIO, false};
    kernel.kick_count = 1;
    syn(false);
    CHECK(crab_worker_run(w) == -ENXIO);
    end();
    /* A round that takes longer than any place of `times` says is in the last one. */
    begin(XDP_COPY | XDP_USE_NEED_WAKEUP);
    *end_of(s, TX, FLAGS) = XDP_RING_NEED_WAKEUP;
    crab_worker_rounds(w, &rounds);
    kernel.while_sending = slow;
    syn(false);
    CHECK(crab_worker_once(w, 0) == 1 && rounds.times[CRAB_ROUND_TIMES - 1] == 1);
    end();
}

static void counts(void)
{
    begin(XDP_COPY);
    s->statistics = (struct xdp_statistics){1, 2, 3, 4, 5, 6};
    kernel.fails_of[GETSOCKOPT] = 1;
    CHECK(crab_worker_once(w, 0) == 0 && !counters[CRAB_C_XSK_RX_DROPPED]);
    crab_worker_lose(w); /* asks again */
    CHECK(counters[CRAB_C_XSK_RX_DROPPED] == 1 && counters[CRAB_C_XSK_RX_INVALID] == 2 && counters[CRAB_C_XSK_TX_INVALID] == 3);
    CHECK(counters[CRAB_C_XSK_RX_FULL] == 4 && counters[CRAB_C_XSK_FILL_EMPTY] == 5);
    memcpy(told, counters, sizeof told);
    crab_worker_lose(w);
    CHECK(!memcmp(told, counters, sizeof told));
    /* Another worker of the same socket counts what is new. */
    crab_worker_free(w);
    w = crab_worker_new(x, core, counters);
    s->statistics.rx_dropped = 3;
    crab_worker_lose(w);
    CHECK(counters[CRAB_C_XSK_RX_DROPPED] == 3);
    /* Each call of a start fails. */
    for (uint32_t n = 1;; n++) {
        uint32_t before = open_sockets();
        kernel.struck = false;
        kernel.with = EMFILE;
        kernel.fails = n;
        struct crab_worker *other = crab_worker_new(x, core, counters);
        kernel.fails = 0;
        if (other) {
            crab_worker_free(other);
            CHECK(n == 5 || !kernel.struck); /* the statistics are a wish */
            CHECK(open_sockets() == before);
            if (!kernel.struck)
                break;
        } else {
            CHECK(errno == EMFILE && open_sockets() == before);
        }
    }
    crab_worker_free(NULL);
    end();
}

int main(void)
{
    forwards();
    whole_packets();
    no_room();
    waits();
    runs();
    counts();
    DONE();
}
