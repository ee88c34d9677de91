/* SPDX-License-Identifier: MIT */
#include "snapshot.h"

#include "checksum.h"

#include <stdlib.h>

/* On a cache line's boundary, so that what is no longer than a line lies on one.  from: NULL for zeros. */
static void *copy(const void *from, size_t count, size_t size)
{
    size_t bytes = (count * size + 63) / 64 * 64;
    void *to = aligned_alloc(64, bytes ? bytes : 64);
    if (to && from && count)
        memcpy(to, from, count * size);
    else if (to)
        memset(to, 0, bytes);
    return to;
}

/* Of the words of an address, as it stands in a packet. */
static uint16_t sum_of_address(const uint8_t addr[16])
{
    return crab_is_mapped(addr) ? crab_csum(addr + 12, 4) : crab_csum(addr, 16);
}

void crab_redirect_init(struct crab_redirect *r, int form, const uint8_t addr[16])
{
    r->len = (uint32_t)crab_option_redirect(r->bytes, form, addr);
    r->sum = crab_csum(r->bytes, r->len);
    uint16_t growth = (uint16_t)(r->len - 4), less = (uint16_t)~sum_of_address(addr);
    r->ip_change = (uint32_t)htons(growth) + less;
    /* the segment's length, in the pseudo-header, and the header's, in words, in the upper four bits */
    r->tcp_change = r->sum + r->ip_change + htons((uint16_t)(growth / 4 << 12));
}

_Static_assert(sizeof(struct crab_backend) == 64, "a backend is a cache line");
_Static_assert(sizeof(struct crab_service) == 64, "a service is a cache line");
_Static_assert(sizeof(struct crab_redirect) == 64, "a redirect is a cache line");

struct crab_snapshot *crab_snapshot_new(const struct crab_service *services, uint32_t service_count,
                                        const struct crab_backend *backends, uint32_t backend_count,
                                        const struct crab_prefix *prefixes, uint32_t prefix_count,
                                        uint32_t table_size, int form, const uint8_t *key16)
{
    struct crab_snapshot *s = calloc(1, sizeof *s);
    if (!s)
        return NULL;
    uint32_t places = 16;
    while (places < 2 * service_count)
        places *= 2;
    s->places = copy(NULL, places, sizeof *s->places);
    s->services = copy(services, service_count, sizeof *services);
    s->backends = copy(backends, backend_count, sizeof *backends);
    s->prefixes = copy(prefixes, prefix_count, sizeof *prefixes);
    s->redirects = copy(NULL, service_count, sizeof *s->redirects);
    if (!s->places || !s->services || !s->backends || !s->prefixes || !s->redirects) {
        crab_snapshot_free(s);
        return NULL;
    }
    for (uint32_t i = 0; i < backend_count; i++)
        s->backends[i].sum = sum_of_address(s->backends[i].addr);
    s->hash_init = crab_sip_init(key16);
    s->form = (uint8_t)form;
    s->table_size = table_size;
    s->backend_count = backend_count;
    s->mask = places - 1;
    for (uint32_t n = 0; n < service_count; n++) {
        s->asks |= services[n].custom || services[n].pool;
        crab_redirect_init(&s->redirects[n], form, services[n].addr);
        uint64_t a = load64(services[n].addr), b = load64(services[n].addr + 8);
        uint32_t i = crab_place_of(a, b, services[n].port_be) & s->mask;
        while (s->places[i].service)
            i = (i + 1) & s->mask;
        s->places[i] = (struct crab_place){.addr = {a, b}, .service = n + 1, .port_be = services[n].port_be};
    }
    return s;
}

void crab_snapshot_match(struct crab_snapshot *s, const struct crab_matches *matches)
{
    s->matches = *matches;
}

void crab_snapshot_free(struct crab_snapshot *s)
{
    if (!s)
        return;
    free(s->places);
    free(s->services);
    free(s->backends);
    free(s->prefixes);
    free(s->redirects);
    free(s);
}
