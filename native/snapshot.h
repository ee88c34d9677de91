/* SPDX-License-Identifier: MIT */
#ifndef CRAB_SNAPSHOT_H
#define CRAB_SNAPSHOT_H

#include "crablb.h"
#include "hash.h"

/* A place of the service index: open addressing with linear probing, at most half full. */
struct crab_place {
    uint64_t addr[2];
    uint32_t service; /* index + 1; 0: empty */
    uint16_t port_be;
    uint16_t pad;
};

/* A service's redirect option, ready to be copied. */
struct crab_redirect {
    uint8_t bytes[20];
    uint32_t len;
    uint32_t sum;        /* of its words */
    uint32_t ip_change;  /* what an IPv4 header's sum changes by, but for the backend's address */
    uint32_t tcp_change; /* what the TCP sum changes by, but for that and the word that the option takes the place of */
} __attribute__((aligned(64)));

/* addr: the service's. */
void crab_redirect_init(struct crab_redirect *r, int form, const uint8_t addr[16]);

/* What is done about packets to VIPs that are no service's: see crab_snapshot_answer. */
struct crab_answers {
    struct crab_address *vips; /* in order */
    uint32_t count;
    bool ping, reset;
};

struct crab_snapshot {
    struct crab_sip hash_init;
    uint8_t form;
    bool asks; /* some service has a policy beside its table */
    uint32_t table_size;
    uint32_t service_count, backend_count;
    uint32_t mask; /* places - 1 */
    struct crab_place *places;
    struct crab_service *services;
    struct crab_backend *backends;
    struct crab_prefix *prefixes;
    struct crab_exception *exceptions;
    struct crab_redirect *redirects; /* one a service */
    struct crab_matches matches;     /* of frames that are no service's */
    struct crab_answers answers;     /* to those of which no match holds */
    struct crab_taps taps;
};

static inline uint32_t crab_place_of(uint64_t a, uint64_t b, uint16_t port_be)
{
    /* VIPs that differ in an IPv4 address' last byte differ in the upper bits of b, which products do not bring down. */
    uint64_t h = (a ^ (b + port_be)) * 0x9e3779b97f4a7c15ull;
    h = (h ^ h >> 32 ^ b >> 40) * 0xff51afd7ed558ccdull;
    return (uint32_t)(h >> 32);
}

static inline const struct crab_service *crab_service_find(const struct crab_snapshot *s, uint64_t a, uint64_t b,
                                                           uint16_t port_be)
{
    for (uint32_t i = crab_place_of(a, b, port_be) & s->mask;; i = (i + 1) & s->mask) {
        const struct crab_place *p = &s->places[i];
        if (!p->service)
            return NULL;
        if (crab_likely(p->addr[0] == a && p->addr[1] == b && p->port_be == port_be))
            return &s->services[p->service - 1];
    }
}

/* Of a backend that has exceptions, see below. */
uint32_t crab_backend_flags_excepted(const struct crab_snapshot *s, const struct crab_service *service, uint16_t backend);

/* A backend's flags (CRAB_BACKEND_*) as they are for a service.  backend: below backend_count. */
static inline uint32_t crab_backend_flags(const struct crab_snapshot *s, const struct crab_service *service,
                                          uint16_t backend)
{
    uint32_t flags = s->backends[backend].flags;
    return crab_likely(!(flags & CRAB_BACKEND_EXCEPTED)) ? flags : crab_backend_flags_excepted(s, service, backend);
}

bool crab_is_answered_for(const struct crab_answers *answers, const uint8_t addr[16]);

/* The slot of a hash: multiply-shift by its upper half, so no division. */
static inline uint32_t crab_slot(uint64_t hash, uint32_t table_size)
{
    return (uint32_t)(((hash >> 32) * table_size) >> 32);
}

#endif
