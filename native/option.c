/* SPDX-License-Identifier: MIT */
/* The CR option in a TCP option list.
 *
 * Senders differ in where they put it (first, last, NOPs before or after), so the whole list is searched, and what is
 * sent on keeps every other option at its alignment: a CR option becomes NOPs, and words that then are nothing but NOPs
 * go.  So the usual forms, two bytes and two NOPs in one word, come and go without a trace. */
#include "option.h"

#define EOL 0
#define NOP 1

enum { NOT_CR, OFFER_CRAB, OFFER_EXPERIMENTAL, NOT_AN_OFFER };

static int classify(const uint8_t *o, size_t len)
{
    if (o[0] == CRAB_OPT_KIND)
        return len == 2 ? OFFER_CRAB : NOT_AN_OFFER;
    if (o[0] == CRAB_OPT_KIND_EXPERIMENTAL && len >= 4 && (o[2] << 8 | o[3]) == CRAB_OPT_EXID)
        return len == 4 ? OFFER_EXPERIMENTAL : NOT_AN_OFFER;
    return NOT_CR;
}

/* Length of the option at o, which has room bytes to the end of the list; 0: the search ends here. */
static inline size_t option_len(const uint8_t *o, size_t room)
{
    if (o[0] == NOP)
        return 1;
    if (o[0] == EOL || room < 2 || o[1] < 2 || o[1] > room)
        return 0;
    return o[1];
}

static int flag_of(int kind, int form)
{
    if (kind == NOT_AN_OFFER)
        return CRAB_OPTION_FORGED;
    return (kind == OFFER_EXPERIMENTAL) == (form == CRAB_FORM_EXPERIMENTAL) ? CRAB_OPTION_OFFER : CRAB_OPTION_OTHER;
}

int crab_option_scan(const uint8_t *options, size_t len, int form, int *word)
{
    int flags = 0;
    unsigned found = 0;
    size_t at = 0, size = 0;
    for (size_t i = 0, n; i < len && (n = option_len(options + i, len - i)); i += n) {
        int kind = classify(options + i, n);
        if (crab_likely(kind == NOT_CR))
            continue;
        flags |= flag_of(kind, form);
        found++;
        at = i;
        size = n;
    }
    *word = -1;
    if (found == 1 && size <= 4 && at / 4 == (at + size - 1) / 4) {
        uint8_t rest[4];
        memcpy(rest, options + at / 4 * 4, 4);
        memset(rest + at % 4, NOP, size);
        if (load32(rest) == 0x01010101u * NOP)
            *word = (int)(at / 4);
    }
    return flags;
}

void crab_seen_init(struct crab_seen_lists *seen)
{
    memset(seen, 0, sizeof *seen);
    for (size_t i = 0; i < sizeof seen->of / sizeof *seen->of; i++)
        seen->of[i].form = -1;
}

void crab_seen_learn(struct crab_seen_list *seen, const uint8_t *options, size_t len, int form)
{
    int word;
    size_t i = 0, n;
    seen->found = (uint8_t)crab_option_scan(options, len, form, &word);
    seen->word = (int8_t)word;
    seen->form = (int8_t)form;
    memset(seen->mask, 0, sizeof seen->mask);
    for (; i < len && (n = option_len(options + i, len - i)); i += n) {
        /* Kind and length; of one that may be ours, all of it and what shares its words. */
        bool ours = options[i] == CRAB_OPT_KIND || options[i] == CRAB_OPT_KIND_EXPERIMENTAL;
        size_t first = ours ? i / 4 * 4 : i, last = ours ? (i + n + 3) / 4 * 4 : i + (n > 1 ? 2 : 1);
        memset(seen->mask + first, 0xff, last - first);
    }
    /* Where it ended: an EOL, or a length that cannot be. */
    for (size_t end = i + 2; i < len && i < end; i++)
        seen->mask[i] = 0xff;
    for (i = 0; i < len; i++)
        seen->list[i] = options[i] & seen->mask[i];
}

int crab_option_find(const uint8_t *options, size_t len, int form)
{
    int word;
    return crab_option_scan(options, len, form, &word);
}

size_t crab_option_redirect(uint8_t out[20], int form, const uint8_t vip16[16])
{
    const uint8_t *vip = vip16;
    size_t vip_len = 16, n = 0;
    if (crab_is_mapped(vip16)) {
        vip += 12;
        vip_len = 4;
    }
    if (form == CRAB_FORM_EXPERIMENTAL) {
        out[n++] = CRAB_OPT_KIND_EXPERIMENTAL;
        out[n++] = (uint8_t)(4 + vip_len);
        out[n++] = CRAB_OPT_EXID >> 8;
        out[n++] = CRAB_OPT_EXID & 0xff;
    } else {
        out[n++] = CRAB_OPT_KIND;
        out[n++] = (uint8_t)(2 + vip_len);
    }
    memcpy(out + n, vip, vip_len);
    n += vip_len;
    while (n % 4)
        out[n++] = NOP;
    return n;
}

int crab_option_rewrite(const uint8_t *options, size_t len, int form, const uint8_t *vip16, uint8_t *out)
{
    uint8_t list[CRAB_MAX_OPTIONS];
    uint32_t touched = 0; /* words in which a CR option lay */
    memcpy(list, options, len);
    for (size_t i = 0, n; i < len && (n = option_len(options + i, len - i)); i += n) {
        if (classify(options + i, n) == NOT_CR)
            continue;
        memset(list + i, NOP, n);
        for (size_t w = i / 4; w <= (i + n - 1) / 4; w++)
            touched |= 1u << w;
    }
    uint32_t gone = 0; /* words to leave out */
    for (uint32_t w = 0; w < len / 4; w++)
        if (touched >> w & 1 && load32(list + 4 * w) == 0x01010101u * NOP)
            gone |= 1u << w;

    size_t place = gone ? (size_t)__builtin_ctz(gone) : 0;
    size_t redirect = 0;
    uint8_t option[20];
    if (vip16)
        redirect = crab_option_redirect(option, form, vip16);
    if (len - 4u * (size_t)__builtin_popcount(gone) + redirect > CRAB_MAX_OPTIONS)
        return -1;
    size_t n = 0;
    for (size_t w = 0; w <= len / 4; w++) {
        if (w == place) {
            memcpy(out + n, option, redirect);
            n += redirect;
        }
        if (w < len / 4 && !(gone >> w & 1)) {
            memcpy(out + n, list + 4 * w, 4);
            n += 4;
        }
    }
    return (int)n;
}
