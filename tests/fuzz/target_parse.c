/* SPDX-License-Identifier: MIT */
/* Functions that look at bytes as they came: parsing, checksums, hashes, matches, taps; and those that change a frame. */
#include "batch.h"
#include "match.h"
#include "oracle.h"
#include "rewrite.h"
#include "tap.h"
#include "target.h"

/* A whole frame's rewriting is right by itself: see target_packet.c.  Here with any options, and any address. */
static void rewrite(const uint8_t *frame, size_t size, const struct crab_packet *was, const uint8_t *more)
{
    uint8_t *memory = malloc(CRAB_HEADROOM + size), options[44];
    CHECK(memory);
    memcpy(memory + CRAB_HEADROOM, frame, size);
    struct crab_packet p = *was;
    uint8_t *f = memory + CRAB_HEADROOM;
    const uint8_t *ip = frame + p.l3;
    uint32_t address = p.family == 4 ? 4 : 16, options_len = (more[0] % 12) * 4u, len = (uint32_t)size;
    for (uint32_t i = 0; i < options_len; i++)
        options[i] = more[i % 16];
    struct crab_tcp_sum sum = crab_tcp_sum(frame + p.l4, (size_t)(p.end - p.l4), ip + (p.family == 4 ? 12 : 8), 2 * address);
    uint8_t *moved = crab_rewrite(f, &len, &p, &sum, options, options_len, more[1] & 1 ? more : NULL);
    if (options_len > CRAB_MAX_OPTIONS) {
        CHECK(!moved && len == size && !memcmp(f, frame, size));
    } else {
        struct crab_packet again;
        CHECK(moved >= memory && moved + len <= memory + CRAB_HEADROOM + size);
        CHECK(crab_packet_parse(moved, len, &again) == CRAB_V_OK && again.end == len);
        CHECK(again.tcp_header == 20 + options_len && !memcmp(moved + again.l4 + 20, options, options_len));
        CHECK(!memcmp(moved + again.l4 + again.tcp_header, frame + was->l4 + was->tcp_header,
                      (size_t)(was->end - was->l4 - was->tcp_header)));
        uint32_t segment = (uint32_t)(again.end - again.l4);
        uint32_t pseudo = (uint16_t)~oracle_checksum(moved + again.l3 + (p.family == 4 ? 12 : 8), 2 * address, 6 + segment);
        CHECK(!oracle_checksum(moved + again.l4, segment, pseudo));
        if (p.family == 4 && !oracle_checksum(ip, 20, 0))
            CHECK(!oracle_checksum(moved + again.l3, 20, 0));
    }
    free(memory);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    uint8_t more[16];
    struct crab_packet p;
    if (size < 16 || size > 4096)
        return 0;
    memcpy(more, data, 16);
    uint8_t *frame = malloc(size - 16 + (size == 16));
    CHECK(frame);
    size -= 16;
    memcpy(frame, data + 16, size);
    uint16_t sum = crab_csum(frame, size);
    CHECK(ntohs((uint16_t)~sum) == oracle_checksum(frame, (uint32_t)size, 0));
    CHECK(crab_siphash13(more, frame, size) == oracle_hash(more, frame, (uint32_t)size));
    if (crab_packet_parse(frame, size, &p) == CRAB_V_OK) {
        CHECK(p.l3 < p.l4 && p.l4 + 20 <= p.end && p.end <= size && p.tcp_header >= 20 && p.l4 + p.tcp_header <= p.end);
        uint16_t right;
        const uint8_t *ip = frame + p.l3;
        uint32_t segment = (uint32_t)(p.end - p.l4), address = p.family == 4 ? 4 : 16;
        uint32_t pseudo = (uint16_t)~oracle_checksum(ip + (p.family == 4 ? 12 : 8), 2 * address, 6 + segment);
        int state = crab_csum_state(ip, (size_t)(p.end - p.l3), &right);
        bool whole = !oracle_checksum(frame + p.l4, segment, pseudo);
        bool partial = load16_be(frame + p.l4 + 16) == pseudo;
        CHECK(state == (whole ? CRAB_CSUM_OK : partial ? CRAB_CSUM_PARTIAL : CRAB_CSUM_BAD));
        rewrite(frame, size, &p, more);
    }
    struct crab_matches matches = {.count = 2};
    memcpy(matches.list[0].addr, more, 16);
    matches.list[0].fields = more[3] & 15;
    matches.list[0].port = htons(80);
    matches.list[0].proto = more[4];
    matches.list[0].ethertype = htons(0x0800);
    matches.list[1] = (struct crab_match){.handler = 1};
    CHECK(crab_match_find(&matches, frame, size) >= 0);
    struct crab_taps taps = {.count = CRAB_MAX_TAPS, .snap = 100};
    for (int i = 0; i < CRAB_MAX_TAPS; i++) {
        memcpy(taps.list[i].client, more, 16);
        memset(taps.list[i].client_mask, i, 16);
        taps.list[i].vport = taps.list[i].port = htons(80);
        taps.list[i].fields = more[i] & 31;
    }
    crab_taps_find(&taps, frame, size, more[5] & 7, more[6] & 1);
    free(frame);
    return 0;
}
