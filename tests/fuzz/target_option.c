/* SPDX-License-Identifier: MIT */
/* Option lists: found, remembered, rewritten, blanked, in memory of just their size, against the oracle. */
#include "oracle.h"
#include "option.h"
#include "target.h"

static void check(const uint8_t *list, uint32_t len, int form, const uint8_t *vip)
{
    static struct crab_seen_lists seen;
    static bool begun;
    if (!begun)
        crab_seen_init(&seen);
    begun = true;
    struct oracle_option options[40];
    uint32_t end, n = oracle_options(list, len, options, &end);
    int word, again, flags = oracle_flags(list, len, form);
    CHECK(crab_option_find(list, len, form) == flags);
    CHECK(crab_option_scan(list, len, form, &word) == flags);
    const uint8_t *key = NULL, *token = NULL;
    size_t answer = 4;
    bool stamps = false, sack = false, scale = false, multipath = false;
    for (uint32_t i = n; i--;) {
        const struct oracle_option *o = &options[i];
        if (o->kind == 30 && (o->len == 20 || o->len == 22 || o->len == 24) && o->at[2] == 1)
            key = o->at + 12;
        if (o->kind == 30 && o->len == 12 && o->at[2] >> 4 == 1)
            token = o->at + 4;
        stamps |= o->kind == 8;
        sack |= o->kind == 4;
        scale |= o->kind == 3;
        multipath |= o->kind == 30 && o->len > 2 && o->at[2] >> 4 == 0;
    }
    answer += (stamps ? 12u : sack ? 4u : 0u) + (scale ? 4u : 0u) + (multipath ? 12u : 0u);
    CHECK(crab_option_key(list, len) == key && crab_option_token(list, len) == token);
    CHECK(crab_option_answer(list, len) == answer);
    uint8_t *blank = malloc(len + !len);
    memcpy(blank, list, len);
    crab_option_blank(blank, len);
    for (uint32_t i = 0; i < len; i++) {
        bool forged = false;
        for (uint32_t j = 0; j < n; j++)
            if (options[j].at <= list + i && list + i < options[j].at + options[j].len)
                forged = oracle_flags(options[j].at, options[j].len, form) & CRAB_OPTION_FORGED;
        CHECK(blank[i] == (forged ? 1 : list[i]));
    }
    CHECK(!(crab_option_find(blank, len, form) & CRAB_OPTION_FORGED));
    free(blank);
    if (len % 4)
        return;
    /* Of those that were seen before: the same as of those that were not. */
    CHECK(crab_option_scan_again(&seen, list, len, form, &again) == flags && again == word);
    CHECK(crab_option_scan_again(&seen, list, len, form, &again) == flags && again == word);
    uint8_t wanted[80], *got = malloc(40);
    const uint8_t *bare = vip && crab_is_mapped(vip) ? vip + 12 : vip;
    int size = oracle_rewrite(list, len, form, bare, bare == vip ? 16 : 4, wanted);
    CHECK(crab_option_rewrite(list, len, form, vip, got) == size);
    if (size >= 0) {
        CHECK(size % 4 == 0 && !memcmp(got, wanted, (size_t)size));
        /* Only the load balancer's own redirect is left, and no offer. */
        struct oracle_option left[40];
        uint32_t after, redirects = 0;
        n = oracle_options(got, (uint32_t)size, left, &after);
        for (uint32_t i = 0; i < n; i++)
            if (oracle_flags(left[i].at, left[i].len, form) & (CRAB_OPTION_OFFER | CRAB_OPTION_OTHER | CRAB_OPTION_FORGED))
                redirects++;
        CHECK(redirects == (vip != NULL));
        if (word >= 0 && vip) { /* the short way */
            uint8_t redirect[20];
            size_t more = crab_option_redirect(redirect, form, vip), before = 4 * (size_t)word;
            CHECK(len + more - 4 == (size_t)size && !memcmp(got, list, before) && !memcmp(got + before, redirect, more) &&
                  !memcmp(got + before + more, list + before + 4, len - before - 4));
        }
    }
    free(got);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const uint8_t vips[2][16] = {{[10] = 0xff, 0xff, 10, 0, 0, 100}, {0xfd, [14] = 1}};
    if (!size || size > 2 * CRAB_MAX_OPTIONS + 1)
        return 0;
    uint8_t how = *data++;
    /* Two lists one after the other, for what is remembered of the first. */
    uint32_t first = (uint32_t)(size - 1 < CRAB_MAX_OPTIONS ? size - 1 : CRAB_MAX_OPTIONS), rest = (uint32_t)size - 1 - first;
    for (int i = 0; i < 2; i++) {
        uint32_t len = i ? rest : first;
        uint8_t *list = malloc(len + !len);
        CHECK(list);
        memcpy(list, data + (i ? first : 0), len);
        check(list, len, how & 1, how & 2 ? vips[how >> 2 & 1] : NULL);
        free(list);
    }
    return 0;
}
