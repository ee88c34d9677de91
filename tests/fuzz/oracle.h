/* SPDX-License-Identifier: MIT */
/* What a load balancer does with one frame after the other: the protocol, written down apart from native/ and from
 * tests/reference, as plainly as can be.  Of native/ it has the names of outcomes, and the shape of a configuration. */
#ifndef FUZZ_ORACLE_H
#define FUZZ_ORACLE_H

#include "world.h"

/* WRITTEN: known to the XDP program, but without a SYN.  EARLIER: a SYN that was not acknowledged when another one came, which
 * is PENDING: whoever acknowledges says which of the two is the client's. */
enum oracle_state { PENDING, EARLIER, SETTLED, WRITTEN };

struct oracle_flow {
    uint8_t tuple[36]; /* addresses and ports as they lie in the packet */
    uint32_t size;
    uint8_t isn[4];
    uint16_t backend;
    uint32_t copies;
    bool offered;
    enum oracle_state state;
};

struct oracle_token {
    uint32_t service;
    uint8_t token[4];
    uint16_t backend;
};

struct oracle {
    const struct world *world;
    /* Which backend a policy chose for a connection, by its hash: told afterwards, and checked. */
    uint16_t (*chosen)(void *context, uint64_t hash, const uint8_t isn[4]);
    void *context;
    uint32_t flow_count, token_count;
    struct oracle_flow flows[2 * MOST_FRAMES];
    struct oracle_token tokens[MOST_FRAMES];
};

struct verdict {
    enum crab_counter what;
    bool quoting; /* an ICMP error that quotes a service's packet */
    uint32_t len; /* 0: nothing is sent */
    uint32_t ifindex;
    uint8_t bytes[LONGEST + 128];
};

void oracle_begin(struct oracle *o, const struct world *world);
void oracle_judge(struct oracle *o, const uint8_t *frame, uint32_t len, struct verdict *v);

/* For the targets of single functions. */
struct oracle_option {
    uint8_t kind, len; /* len 1: no length byte, a NOP */
    const uint8_t *at;
};
/* Options up to EOL or a length that cannot be; returns how many, and in *end where the rest begins. */
uint32_t oracle_options(const uint8_t *list, uint32_t len, struct oracle_option out[40], uint32_t *end);
/* The list to send on, and its length, or -1 if it does not fit.  vip: 4 or 16 bytes, or NULL. */
int oracle_rewrite(const uint8_t *list, uint32_t len, bool experimental, const uint8_t *vip, uint32_t vip_len,
                   uint8_t out[80]);
/* CRAB_OPTION_* */
int oracle_flags(const uint8_t *list, uint32_t len, bool experimental);
uint64_t oracle_hash(const uint8_t key[16], const uint8_t *data, uint32_t len);
/* The checksum of so many bytes, in host order; from: what is added. */
uint16_t oracle_checksum(const uint8_t *data, uint32_t len, uint32_t from);

#endif
