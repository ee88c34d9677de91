/* SPDX-License-Identifier: MIT */
/* What is rewritten has its room, whatever it is called with: each frame lies in an allocation of exactly its size. */
#include "check.h"
#include "rewrite.h"

static const uint8_t vip4[16] = {[10] = 0xff, [11] = 0xff, 10, 0, 0, 100}, vip6[16] = {0xfd, [15] = 100};

static uint8_t *make(struct crab_packet *p, int family, uint32_t options)
{
    uint16_t l4 = family == 4 ? 34 : 54, end = (uint16_t)(l4 + 20 + options);
    uint8_t *memory = calloc(1, (size_t)CRAB_HEADROOM + end), *frame = memory + CRAB_HEADROOM;
    *p = (struct crab_packet){.l3 = 14, .l4 = l4, .end = end, .family = (uint8_t)family,
                              .tcp_header = (uint8_t)(20 + options)};
    memset(frame, 1, end);
    frame[l4 + CRAB_TCP_DOFF] = (uint8_t)((20 + options) << 2);
    return memory;
}

int main(void)
{
    const struct crab_backend backend = {.addr = {0xfd}};
    const struct crab_tcp_sum sum = {.body = 1};
    for (int family = 4; family <= 6; family += 2)
        for (int of = 4; of <= 6; of += 2)
            for (uint32_t options = 0; options <= 40; options += 4)
                for (uint32_t word = 0; word < 12; word++) {
                    struct crab_redirect r = {.len = 0};
                    struct crab_packet p;
                    uint8_t *memory = make(&p, family, options), *frame = memory + CRAB_HEADROOM;
                    uint32_t len = p.end, size = of == 4 ? 8 : 20;
                    crab_redirect_init(&r, CRAB_FORM_CRAB, of == 4 ? vip4 : vip6);
                    uint8_t *moved = crab_rewrite_word(frame, &len, &p, &sum, word, &r, &backend);
                    bool fits = family == of && 4 * word < options && options - 4 + size <= 40;
                    CHECK((moved != NULL) == fits);
                    CHECK(len == p.end + (fits ? size - 4 : 0));
                    if (fits) {
                        CHECK(moved == frame - (size - 4));
                        CHECK(!memcmp(moved + p.l4 + 20 + 4 * word, r.bytes, size));
                    }
                    free(memory);
                }
    for (uint32_t options = 0; options <= 40; options += 4)
        for (uint32_t n = 0; n <= 48; n += 4) {
            static const uint8_t list[48];
            struct crab_packet p;
            uint8_t *memory = make(&p, 6, options), *frame = memory + CRAB_HEADROOM;
            uint32_t len = p.end;
            uint8_t *moved = crab_rewrite(frame, &len, &p, &sum, list, n, NULL);
            CHECK((moved != NULL) == (n <= 40));
            CHECK(n > 40 || (moved + len == frame + 74 + options && p.tcp_header == 20 + n));
            free(memory);
        }
    DONE();
}
