/* SPDX-License-Identifier: MIT */
/* What a service says of backends otherwise: every search against a walk through the list. */
#include <errno.h>

#include "check.h"
#include "snapshot.h"

#define BACKENDS 300
#define SERVICES 40
#define SIZE 7

static const uint16_t table[SIZE];
static struct crab_backend backends[BACKENDS];
static struct crab_service services[SERVICES];
static struct crab_prefix prefixes[3];

static struct crab_snapshot *made(struct crab_exception *exceptions, uint32_t count)
{
    /* In an allocation of exactly that size: a read beyond it is seen. */
    struct crab_exception *exact = malloc(count * sizeof *exact + !count);
    if (count)
        memcpy(exact, exceptions, count * sizeof *exact);
    errno = 0;
    struct crab_snapshot *s =
        crab_snapshot_new(services, SERVICES, backends, BACKENDS, prefixes, 3, exact, count, SIZE, CRAB_FORM_CRAB,
                          (const uint8_t[16]){0});
    free(exact);
    return s;
}

static uint32_t walked(const struct crab_exception *exceptions, const struct crab_service *service, uint16_t backend)
{
    const uint32_t ours = CRAB_BACKEND_CR | CRAB_BACKEND_DEAD;
    for (uint32_t i = 0; i < service->exception_count; i++) {
        const struct crab_exception *e = &exceptions[service->first_exception + i];
        if (e->backend == backend)
            return (backends[backend].flags & ~ours) | (e->flags & ours);
    }
    return backends[backend].flags;
}

static void refused(struct crab_exception *exceptions, uint32_t count)
{
    CHECK(!made(exceptions, count) && errno == EINVAL);
}

int main(void)
{
    static struct crab_exception exceptions[SERVICES * BACKENDS];
    bool excepted[BACKENDS] = {0};
    uint32_t count = 0, known = 0;
    srand(7);
    for (int i = 0; i < BACKENDS; i++)
        backends[i].flags = (uint32_t)rand() & (CRAB_BACKEND_EXCEPTED - 1);
    for (uint32_t n = 0; n < SERVICES; n++) {
        services[n] = (struct crab_service){.port_be = (uint16_t)n, .table = table, .first_exception = count};
        /* From none to nearly all; the last few backends have no exception. */
        for (uint16_t i = 0; i < BACKENDS - 5; i++)
            if ((uint32_t)rand() % SERVICES < n) {
                exceptions[count++] = (struct crab_exception){.backend = i, .flags = (uint16_t)rand()};
                excepted[i] = true;
            }
        services[n].exception_count = count - services[n].first_exception;
    }
    backends[BACKENDS - 1].flags |= CRAB_BACKEND_EXCEPTED; /* nobody's to say but the snapshot's */
    struct crab_snapshot *s = made(exceptions, count);
    backends[BACKENDS - 1].flags &= ~(uint32_t)CRAB_BACKEND_EXCEPTED;
    for (uint16_t i = 0; i < BACKENDS; i++) {
        CHECK(!!(s->backends[i].flags & CRAB_BACKEND_EXCEPTED) == excepted[i]);
        known += excepted[i];
        for (uint32_t n = 0; n < SERVICES; n++) {
            uint32_t flags = crab_backend_flags(s, &s->services[n], i) & ~(uint32_t)CRAB_BACKEND_EXCEPTED;
            CHECK(flags == walked(exceptions, &services[n], i));
        }
    }
    CHECK(known == BACKENDS - 5);
    crab_snapshot_free(s);

    /* What is not in its array, not in order, or about nobody. */
    memset(services, 0, sizeof services);
    services[1] = (struct crab_service){.first_exception = 1, .exception_count = 2};
    struct crab_exception few[3] = {{9, 0}, {4, 0}, {5, 0}};
    s = made(few, 3);
    CHECK(s);
    crab_snapshot_free(s);
    refused(few, 2);
    few[2].backend = 4;
    refused(few, 3);
    few[2].backend = 3;
    refused(few, 3);
    few[2].backend = BACKENDS;
    refused(few, 3);
    few[2].backend = CRAB_NO_BACKEND;
    refused(few, 3);
    services[1].exception_count = UINT32_MAX; /* the sum overflows */
    refused(few, 3);
    services[1] = (struct crab_service){.first_prefix = 1, .prefix_count = 2};
    s = made(NULL, 0);
    CHECK(s);
    crab_snapshot_free(s);
    services[1].prefix_count = 3;
    refused(NULL, 0);
    services[1] = (struct crab_service){.first_prefix = 4};
    refused(NULL, 0);
    DONE();
}
