/* SPDX-License-Identifier: MIT */
/* The CR option in a TCP option list.
 *
 * Senders differ in where they put it (first, last, NOPs before or after, or at no alignment at all), so the whole list is
 * searched, option by option: what looks like a NOP in another option's data is none.  What is sent on keeps every other
 * option at its alignment, and gives back the NOPs that an offer came with. */
#include "option.h"

#define EOL 0
#define NOP 1
#define SACK_PERMITTED 4
#define WINDOW_SCALE 3
#define TIMESTAMPS 8
#define MD5 19 /* RFC 2385 */
#define AUTHENTICATION 29 /* TCP-AO, RFC 5925 */
#define MULTIPATH 30 /* RFC 8684; the subtype is in the upper half of the third byte */
#define MP_CAPABLE 0
#define MP_JOIN 1
#define FAST_OPEN 34 /* RFC 7413 */
#define EXPERIMENT_2 254 /* RFC 6994: an ExID follows */
#define FAST_OPEN_EXID 0xf989

#define CR_OPTIONS (CRAB_OPTION_OFFER | CRAB_OPTION_FORGED | CRAB_OPTION_OTHER)

static inline bool has_exid(const uint8_t *o, size_t len, uint16_t exid)
{
    return len >= 4 && load16_be(o + 2) == exid;
}

/* Flags of the option at o, which is len bytes long. */
static int flags_of(const uint8_t *o, size_t len, int form)
{
    switch (o[0]) {
    case CRAB_OPT_KIND:
        if (len != 2)
            return CRAB_OPTION_FORGED;
        return form == CRAB_FORM_CRAB ? CRAB_OPTION_OFFER : CRAB_OPTION_OTHER;
    case CRAB_OPT_KIND_EXPERIMENTAL:
        if (!has_exid(o, len, CRAB_OPT_EXID))
            return 0;
        if (len != 4)
            return CRAB_OPTION_FORGED;
        return form == CRAB_FORM_EXPERIMENTAL ? CRAB_OPTION_OFFER : CRAB_OPTION_OTHER;
    case MD5:
    case AUTHENTICATION:
        return CRAB_OPTION_UNSAFE | CRAB_OPTION_SIGNED;
    case FAST_OPEN: /* a request for a cookie too: the server that gives one is the one that it is good for */
        return CRAB_OPTION_UNSAFE;
    case EXPERIMENT_2:
        return has_exid(o, len, FAST_OPEN_EXID) ? CRAB_OPTION_UNSAFE : 0;
    case MULTIPATH:
        if (len < 3 || o[2] >> 4 > MP_JOIN)
            return 0;
        return o[2] >> 4 == MP_JOIN ? CRAB_OPTION_UNSAFE | CRAB_OPTION_JOIN : CRAB_OPTION_MPTCP;
    default:
        return 0;
    }
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

/* A run of CR options and NOPs with at least one CR option in it. */
struct run {
    size_t start, end;
};

/* The first run from an option on. */
static bool next_run(const uint8_t *options, size_t len, size_t from, struct run *run)
{
    bool ours = false;
    run->start = run->end = from;
    while (run->end < len) {
        const uint8_t *o = options + run->end;
        size_t n = option_len(o, len - run->end);
        bool cr = n && flags_of(o, n, CRAB_FORM_CRAB) & CR_OPTIONS;
        if (!cr && *o != NOP) {
            if (ours || !n)
                break;
            run->start = run->end + n;
        }
        ours |= cr;
        run->end += n;
    }
    return ours;
}

int crab_option_scan(const uint8_t *options, size_t len, int form, int *word)
{
    int flags = 0;
    struct run run, other;
    for (size_t i = 0, n; i < len && (n = option_len(options + i, len - i)); i += n)
        flags |= flags_of(options + i, n, form);
    *word = -1;
    if (flags == CRAB_OPTION_OFFER && next_run(options, len, 0, &run) && run.start % 4 == 0 &&
        run.end == run.start + 4 && !next_run(options, len, run.end, &other))
        *word = (int)(run.start / 4);
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
        /* Kind and length; and what an experiment it is, or what of MPTCP. */
        bool experiment = options[i] == CRAB_OPT_KIND_EXPERIMENTAL || options[i] == EXPERIMENT_2;
        size_t looked_at = experiment ? 4 : options[i] == MULTIPATH ? 3 : 2;
        memset(seen->mask + i, 0xff, n < looked_at ? n : looked_at);
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
    uint8_t list[CRAB_MAX_OPTIONS + 20], redirect[20];
    size_t n = 0, from = 0, padded = vip16 ? crab_option_redirect(redirect, form, vip16) : 0;
    struct run run;
    if (padded && !next_run(options, len, 0, &run)) {
        memcpy(list, redirect, n = padded);
        padded = 0;
    }
    while (next_run(options, len, from, &run)) {
        memcpy(list + n, options + from, run.start - from);
        n += run.start - from;
        if (padded) {
            memcpy(list + n, redirect, redirect[1]);
            n += redirect[1];
            padded = 0;
        }
        while ((n - run.end) % 4) /* the list's end is at a multiple of 4 as well, so that what is behind fits to it */
            list[n++] = NOP;
        from = run.end;
    }
    memcpy(list + n, options + from, len - from);
    n += len - from;
    if (n > CRAB_MAX_OPTIONS)
        return -1;
    memcpy(out, list, n);
    return (int)n;
}

void crab_option_blank(uint8_t *options, size_t len)
{
    for (size_t i = 0, n; i < len && (n = option_len(options + i, len - i)); i += n)
        if (flags_of(options + i, n, CRAB_FORM_CRAB) & CRAB_OPTION_FORGED)
            memset(options + i, NOP, n);
}

size_t crab_option_answer(const uint8_t *options, size_t len)
{
    bool timestamps = false, sack = false, scale = false, multipath = false;
    for (size_t i = 0, n; i < len && (n = option_len(options + i, len - i)); i += n) {
        timestamps |= options[i] == TIMESTAMPS;
        sack |= options[i] == SACK_PERMITTED;
        scale |= options[i] == WINDOW_SCALE;
        multipath |= (flags_of(options + i, n, CRAB_FORM_CRAB) & CRAB_OPTION_MPTCP) != 0;
    }
    /* MSS; SACK-permitted takes two of the bytes that align timestamps; MP_CAPABLE with the server's key. */
    return 4u + (timestamps ? 12u : sack ? 4u : 0u) + (scale ? 4u : 0u) + (multipath ? 12u : 0u);
}

const uint8_t *crab_option_key(const uint8_t *options, size_t len)
{
    /* By itself, or with the length of the data that it came with, and a checksum. */
    for (size_t i = 0, n; i < len && (n = option_len(options + i, len - i)); i += n)
        if (options[i] == MULTIPATH && (n == 20 || n == 22 || n == 24) && options[i + 2] == (MP_CAPABLE << 4 | 1))
            return options + i + 12;
    return NULL;
}

const uint8_t *crab_option_token(const uint8_t *options, size_t len)
{
    for (size_t i = 0, n; i < len && (n = option_len(options + i, len - i)); i += n)
        if (options[i] == MULTIPATH && n == 12 && options[i + 2] >> 4 == MP_JOIN)
            return options + i + 4;
    return NULL;
}
