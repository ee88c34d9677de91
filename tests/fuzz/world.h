/* SPDX-License-Identifier: MIT */
/* What an input of the packet target is made into: a configuration, and frames for it.
 *
 * An input is three bytes that choose the world, then frames.  Most of them are put together from a few bytes each, with
 * checksums as they should be, so that a changed byte still gets past the first checks; some are taken as they are. */
#ifndef FUZZ_WORLD_H
#define FUZZ_WORLD_H

#include "crablb.h"

#define SERVICES 4
#define BACKENDS 8
#define SLOTS 61
#define MOST_FRAMES 24
#define LONGEST 2048
#define HERE 3 /* ifindex that frames come in by */
#define ELSEWHERE 1003

struct world {
    uint8_t form, mode, fallback, policy; /* policy: CUSTOM, or the number of one; of service 0 and 2 */
    bool elsewhere, answers, table, put_off, joins, pooled, matches, taps, refuses, source, said, wild;
    uint8_t key[16];
    struct crab_backend backends[BACKENDS];
    struct crab_service services[SERVICES];
    struct crab_prefix prefixes[2];
    struct crab_exception exceptions[3];
    uint32_t exception_count;
    uint16_t four[SLOTS], six[SLOTS];
};

#define CUSTOM 6
#define POLICIES 7

struct step {
    uint8_t frame[LONGEST];
    uint32_t len;
    uint32_t now;
    bool ends; /* the last one of its batch */
};

struct script {
    uint8_t world[3];
    uint32_t count;
    struct step steps[MOST_FRAMES];
};

/* So that a copy costs what is used of it. */
void script_read(struct script *script, const uint8_t *data, size_t size);
void world_make(struct world *world, const uint8_t chosen[3]);

/* What the function of a service that is CUSTOM's says of a connection: a backend, or nonsense. */
uint16_t world_chooses(uint64_t hash);

/* Handlers of a world with `matches`: what they take, and what comes of it. */
#define TAKES_ARP 0   /* sends it, unchanged */
#define TAKES_DNS 1   /* UDP to port 53: keeps it */
#define TAKES_ADDRESS 2 /* IPv6 to fd00::99: fails */

#endif
