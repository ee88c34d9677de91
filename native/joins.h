/* SPDX-License-Identifier: MIT */
/* MPTCP connections by their tokens (RFC 8684, 3.2): whose backend a SYN that joins one has to reach.
 *
 * A join comes from another port, often from another address, so to any queue: the workers share the table.  A word is an
 * entry, written and read at once; nobody waits.  Two that write to a set at the same time may lose an entry, or have one
 * twice.  The set is a cache line, chosen by a keyed hash; the newest comes in at its front, and the last one goes.
 *
 * Anybody can have an entry made, by a third ACK that he made up.  It can mislead a join, which its server then refuses by a
 * RST, as it would without a table. */
#ifndef CRAB_JOINS_H
#define CRAB_JOINS_H

#include <stdatomic.h>

#include "crablb.h"
#include "siphash.h"

#define CRAB_JOINS_SET 8

/* An entry: the token, the service's index, and the backend's id from above, so that 0 is none. */
struct crab_joins {
    struct crab_sip hash_init;
    uint64_t mask; /* sets - 1 */
    _Atomic(uint64_t) *words;
};

/* The token of a connection, in network order, by its server's key of 8 bytes: the first 32 bits of the key's SHA-256. */
uint32_t crab_token(const uint8_t *key);

/* A connection's backend, or CRAB_NO_BACKEND. */
uint16_t crab_joins_find(const struct crab_joins *joins, uint32_t token, uint16_t service);
void crab_joins_learn(struct crab_joins *joins, uint32_t token, uint16_t service, uint16_t backend);

#endif
