/* SPDX-License-Identifier: MIT */
#include "snapshot.h"

#include "checksum.h"

#include <errno.h>
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

/* What a service may say of a backend. */
#define OF_A_SERVICE ((uint32_t)(CRAB_BACKEND_CR | CRAB_BACKEND_DEAD))

static bool is_within(uint32_t first, uint32_t count, uint32_t all)
{
    return first <= all && count <= all - first;
}

static bool are_in_order(const struct crab_exception *e, uint32_t first, uint32_t count, uint32_t backend_count)
{
    for (uint32_t i = first; i < first + count; i++)
        if (e[i].backend >= backend_count || (i > first && e[i].backend <= e[i - 1].backend))
            return false;
    return true;
}

struct crab_snapshot *crab_snapshot_new(const struct crab_service *services, uint32_t service_count,
                                        const struct crab_backend *backends, uint32_t backend_count,
                                        const struct crab_prefix *prefixes, uint32_t prefix_count,
                                        const struct crab_exception *exceptions, uint32_t exception_count,
                                        uint32_t table_size, int form, const uint8_t *key16)
{
    for (const struct crab_service *service = services; service < services + service_count; service++)
        if (!is_within(service->first_prefix, service->prefix_count, prefix_count) ||
            !is_within(service->first_exception, service->exception_count, exception_count) ||
            !are_in_order(exceptions, service->first_exception, service->exception_count, backend_count)) {
            errno = EINVAL;
            return NULL;
        }
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
    s->exceptions = copy(exceptions, exception_count, sizeof *exceptions);
    s->redirects = copy(NULL, service_count, sizeof *s->redirects);
    if (!s->places || !s->services || !s->backends || !s->prefixes || !s->exceptions || !s->redirects) {
        crab_snapshot_free(s);
        errno = ENOMEM;
        return NULL;
    }
    for (uint32_t i = 0; i < backend_count; i++) {
        s->backends[i].sum = sum_of_address(s->backends[i].addr);
        s->backends[i].flags &= ~(uint32_t)CRAB_BACKEND_EXCEPTED;
    }
    s->hash_init = crab_sip_init(key16);
    s->form = (uint8_t)form;
    s->table_size = table_size;
    s->service_count = service_count;
    s->backend_count = backend_count;
    s->mask = places - 1;
    for (uint32_t n = 0; n < service_count; n++) {
        s->asks |= services[n].custom || services[n].pool;
        s->services[n].particular = services[n].mode == CRAB_MODE_NEVER || services[n].prefix_count;
        for (uint32_t i = 0; i < services[n].exception_count; i++)
            s->backends[exceptions[services[n].first_exception + i].backend].flags |= CRAB_BACKEND_EXCEPTED;
        crab_redirect_init(&s->redirects[n], form, services[n].addr);
        uint64_t a = load64(services[n].addr), b = load64(services[n].addr + 8);
        uint32_t i = crab_place_of(a, b, services[n].port_be) & s->mask;
        while (s->places[i].service)
            i = (i + 1) & s->mask;
        s->places[i] = (struct crab_place){.addr = {a, b}, .service = n + 1, .port_be = services[n].port_be};
    }
    return s;
}

uint32_t crab_backend_flags_excepted(const struct crab_snapshot *s, const struct crab_service *service, uint16_t backend)
{
    const struct crab_exception *from = s->exceptions + service->first_exception;
    uint32_t flags = s->backends[backend].flags;
    for (uint32_t n = service->exception_count; n;) {
        uint32_t half = n / 2;
        if (from[half].backend == backend)
            return (flags & ~OF_A_SERVICE) | (from[half].flags & OF_A_SERVICE);
        if (from[half].backend < backend) {
            from += half + 1;
            n -= half + 1;
        } else {
            n = half;
        }
    }
    return flags;
}

void crab_snapshot_match(struct crab_snapshot *s, const struct crab_matches *matches)
{
    s->matches = *matches;
}

void crab_snapshot_tap(struct crab_snapshot *s, const struct crab_taps *taps)
{
    s->taps = *taps;
}

static int compare(const void *a, const void *b)
{
    return memcmp(a, b, sizeof(struct crab_address));
}

int crab_snapshot_answer(struct crab_snapshot *s, const struct crab_address *vips, uint32_t count, bool ping, bool reset)
{
    struct crab_address *own = copy(vips, count, sizeof *vips);
    if (!own)
        return -1;
    qsort(own, count, sizeof *own, compare);
    s->answers = (struct crab_answers){.vips = own, .count = count, .ping = ping, .reset = reset};
    return 0;
}

bool crab_is_answered_for(const struct crab_answers *answers, const uint8_t addr[16])
{
    return answers->count && bsearch(addr, answers->vips, answers->count, sizeof *answers->vips, compare);
}

void crab_snapshot_free(struct crab_snapshot *s)
{
    if (!s)
        return;
    free(s->answers.vips);
    free(s->places);
    free(s->services);
    free(s->backends);
    free(s->prefixes);
    free(s->exceptions);
    free(s->redirects);
    free(s);
}
