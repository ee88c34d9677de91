/* SPDX-License-Identifier: MIT */
/* Frames of any kind, in memory of just their size: what is shown of them reads none behind their end. */
#include "batch.h"
#include "check.h"

#define SIZE 251
#define RING 4096
static uint16_t slots[SIZE];
static const uint8_t key[16] = {7};
static uint64_t counters[CRAB_COUNTERS];
static struct crab_service service = {.addr = {[10] = 0xff, [11] = 0xff, 10, 0, 0, 100}, .protocol = 6, .table = slots};
static struct crab_backend backend = {.addr = {[10] = 0xff, [11] = 0xff, 10, 0, 0, 11}, .mtu = 1500,
                                      .flags = CRAB_BACKEND_USABLE | CRAB_BACKEND_CR | CRAB_BACKEND_ON_LINK};

/* A frame that looks like something: Ethernet, perhaps tags, IPv4 or IPv6, TCP, UDP or an ICMP error. */
static uint32_t make(uint8_t *f)
{
    static const uint16_t types[] = {0x0800, 0x86dd, 0x8100, 0x88a8, 0x0806};
    static const uint8_t protos[] = {1, 6, 17, 58, 44};
    uint32_t len = (uint32_t)(rand() % 160), at = 12;
    for (uint32_t i = 0; i < 160; i++)
        f[i] = (uint8_t)rand();
    for (int tags = 0; tags < 3; tags++, at += 4) {
        uint16_t type = types[rand() % 5];
        store16(f + at, htons(type));
        if (type != 0x8100 && type != 0x88a8)
            break;
    }
    uint8_t *ip = f + at + 2;
    bool six = f[at] == 0x86;
    ip[0] = six ? 0x60 : rand() % 4 ? 0x45 : (uint8_t)(0x40 | rand() % 16);
    ip[six ? 6 : 9] = protos[rand() % 5];
    if (!six) {
        if (rand() % 4)
            store16(ip + 6, 0);
        store16(ip + 2, htons((uint16_t)(len > at + 2 ? len - at - 2 : 0)));
    }
    uint8_t *icmp = ip + (six ? 40 : 20);
    if (rand() % 2) {
        icmp[0] = six ? 1 : 3;
        icmp[8] = six ? 0x60 : 0x45;
        icmp[8 + (six ? 6 : 9)] = 6;
        store16(icmp + 14, 0);
    }
    return len;
}

int main(void)
{
    struct crab_taps taps = {.count = CRAB_MAX_TAPS, .snap = 100};
    taps.list[1] = (struct crab_tap){.port = htons(80), .fields = CRAB_TAP_PORT};
    taps.list[2] = (struct crab_tap){.fields = CRAB_TAP_BACKEND};
    taps.list[3] = (struct crab_tap){.fields = CRAB_TAP_FOUR | CRAB_TAP_SIX}; /* nothing */
    service.port_be = htons(80);
    struct crab_snapshot *s = crab_snapshot_new(&service, 1, &backend, 1, NULL, 0, NULL, 0, SIZE, CRAB_FORM_CRAB, key);
    struct crab_core *core = crab_core_new(256, counters);
    CHECK(s && core && crab_core_show(core, 9, RING) == 0 && crab_core_show(core, 9, RING) == 0);
    crab_snapshot_tap(s, &taps);
    crab_core_publish(core, s);
    uint8_t shown[RING], model[160];
    uint64_t all = 0, seen = 0;
    for (uint32_t round = 0; round < 20000; round++) {
        uint32_t len = make(model);
        uint8_t *memory = malloc(CRAB_HEADROOM + len);
        memcpy(memory + CRAB_HEADROOM, model, len);
        struct crab_frame frame = {.data = memory + CRAB_HEADROOM, .len = len, .ifindex = 1};
        uint32_t held = crab_taps_find(&taps, frame.data, len, CRAB_NO_BACKEND, false);
        CHECK((held & 1) && !(held & 8));
        CHECK((crab_taps_find(&taps, frame.data, len, CRAB_NO_BACKEND, true) & 1) == 0);
        crab_core_batch(core, &frame, 1, 1);
        free(memory);
        all++;
        if (rand() % 16)
            continue;
        uint32_t n = crab_core_shown(core, shown);
        CHECK(n <= RING);
        for (uint32_t at = 0; at < n; seen++) {
            struct crab_tapped t;
            CHECK(n - at >= sizeof t);
            memcpy(&t, shown + at, sizeof t);
            CHECK(t.size >= sizeof t + t.in_kept + t.out_kept && t.size <= n - at && t.queue == 9);
            CHECK(t.in_kept <= 100 && t.in_kept <= t.in_len && t.out_kept <= t.out_len);
            at += t.size;
        }
        CHECK(seen + crab_core_unshown(core) == all);
        CHECK(crab_core_shown(core, shown) == 0);
    }
    CHECK(crab_core_unshown(core) && seen > crab_core_unshown(core));
    /* What a shown packet changes is noted like what others change: a successor copies it. */
    static const uint8_t syn[54] = {2, [11] = 1, 8, 0, 0x45, 0, 0, 40, [22] = 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 100, 0, 7,
                                    0, 80, [46] = 0x50, 2};
    uint8_t *memory = malloc(CRAB_HEADROOM + sizeof syn);
    memcpy(memory + CRAB_HEADROOM, syn, sizeof syn);
    uint16_t right;
    store16(memory + CRAB_HEADROOM + 24, (uint16_t)~crab_csum(memory + CRAB_HEADROOM + 14, 20));
    crab_csum_state(memory + CRAB_HEADROOM + 14, 40, &right);
    store16(memory + CRAB_HEADROOM + 50, right);
    struct crab_frame frame = {.data = memory + CRAB_HEADROOM, .len = sizeof syn, .ifindex = 1};
    uint64_t touched = 0;
    crab_core_note(core, &touched);
    CHECK(crab_core_batch(core, &frame, 1, 1) == 1);
    CHECK(touched && !(touched & (touched - 1)));
    free(memory);
    crab_core_publish(core, NULL);
    crab_core_hide(core);
    CHECK(crab_core_shown(core, shown) == 0 && crab_core_unshown(core) == 0);
    crab_core_free(core);
    crab_snapshot_free(s);
    DONE();
}
