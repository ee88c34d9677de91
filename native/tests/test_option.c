/* SPDX-License-Identifier: MIT */
#include "check.h"
#include "option.h"

static const uint8_t vip4[16] = {[10] = 0xff, [11] = 0xff, 10, 0, 0, 100};
static const uint8_t vip6[16] = {0xfd, [15] = 0x64};

struct bytes {
    size_t len;
    uint8_t b[60];
};
#define B(...) {sizeof((uint8_t[]){__VA_ARGS__}), {__VA_ARGS__}}
#define MSS 2, 4, 5, 180
#define SACK_TS 4, 2, 8, 10, 1, 2, 3, 4, 0, 0, 0, 0
#define WS 1, 3, 3, 7
#define REDIRECT 42, 6, 10, 0, 0, 100, 1, 1
#define REDIRECT_EXP 253, 8, 0x43, 0x52, 10, 0, 0, 100

static const struct {
    const char *what;
    int form, found;
    struct bytes in, redirected, stripped;
} cases[] = {
    {"Linux SYN, offer last", 0, CRAB_OPTION_OFFER, B(MSS, SACK_TS, WS, 42, 2, 1, 1), B(MSS, SACK_TS, WS, REDIRECT),
     B(MSS, SACK_TS, WS)},
    {"offer first", 0, CRAB_OPTION_OFFER, B(42, 2, 1, 1, MSS), B(REDIRECT, MSS), B(MSS)},
    {"NOPs before the offer", 0, CRAB_OPTION_OFFER, B(MSS, 1, 1, 42, 2, WS), B(MSS, REDIRECT, WS), B(MSS, WS)},
    {"offer shares its word", 0, CRAB_OPTION_OFFER, B(42, 2, 4, 2, MSS), B(42, 6, 10, 0, 0, 100, 4, 2, MSS),
     B(1, 1, 4, 2, MSS)},
    {"offer among NOPs", 0, CRAB_OPTION_OFFER, B(MSS, 1, 1, 1, 42, 2, 1, 1, 1, WS),
     B(MSS, 42, 6, 10, 0, 0, 100, 1, 1, 1, 3, 3, 7), B(MSS, WS)},
    {"window scale 1 is no NOP", 0, CRAB_OPTION_OFFER, B(MSS, 1, 1, 3, 3, 1, 42, 2, 1),
     B(MSS, 1, 1, 3, 3, 1, 42, 6, 10, 0, 0, 100, 1), B(MSS, 1, 1, 3, 3, 1, 1, 1, 1)},
    {"window scale 1 is no NOP, experimental form", 1, CRAB_OPTION_OFFER, B(1, 1, 3, 3, 1, 253, 4, 0x43, 0x52, 1, 1, 1),
     B(1, 1, 3, 3, 1, 253, 8, 0x43, 0x52, 10, 0, 0, 100, 1, 1, 1), B(1, 1, 3, 3, 1, 1, 1, 1)},
    {"an MSS of 257 is no NOPs", 0, CRAB_OPTION_OFFER, B(1, 1, 2, 4, 1, 1, 42, 2, WS),
     B(1, 1, 2, 4, 1, 1, 42, 6, 10, 0, 0, 100, 1, 3, 3, 7), B(1, 1, 2, 4, 1, 1, 1, 1, 1, 3, 3, 7)},
    {"what is behind EOL is no NOPs", 0, CRAB_OPTION_OFFER, B(MSS, 42, 2, 0, 1), B(MSS, 42, 6, 10, 0, 0, 100, 0, 1),
     B(MSS, 1, 1, 0, 1)},
    {"Fast Open's cookie", 0, CRAB_OPTION_OFFER | CRAB_OPTION_UNSAFE, B(34, 6, 1, 2, 3, 4, 42, 2),
     B(34, 6, 1, 2, 3, 4, 42, 6, 10, 0, 0, 100), B(34, 6, 1, 2, 3, 4, 1, 1)},
    {"a request for one, old form", 0, CRAB_OPTION_UNSAFE, B(254, 4, 0xf9, 0x89), B(REDIRECT, 254, 4, 0xf9, 0x89),
     B(254, 4, 0xf9, 0x89)},
    {"another experiment", 0, 0, B(254, 4, 0xf9, 0x88), B(REDIRECT, 254, 4, 0xf9, 0x88), B(254, 4, 0xf9, 0x88)},
    {"TCP-MD5", 0, CRAB_OPTION_UNSAFE | CRAB_OPTION_SIGNED, B(19, 4, 0, 0), B(REDIRECT, 19, 4, 0, 0), B(19, 4, 0, 0)},
    {"TCP-AO", 0, CRAB_OPTION_UNSAFE | CRAB_OPTION_SIGNED, B(29, 4, 0, 0), B(REDIRECT, 29, 4, 0, 0), B(29, 4, 0, 0)},
    {"MP_CAPABLE", 0, CRAB_OPTION_MPTCP, B(30, 4, 1, 1), B(REDIRECT, 30, 4, 1, 1), B(30, 4, 1, 1)},
    {"MP_JOIN", 0, CRAB_OPTION_UNSAFE | CRAB_OPTION_JOIN, B(30, 4, 0x10, 1), B(REDIRECT, 30, 4, 0x10, 1), B(30, 4, 0x10, 1)},
    {"experimental form", 1, CRAB_OPTION_OFFER, B(MSS, 253, 4, 0x43, 0x52), B(MSS, REDIRECT_EXP), B(MSS)},
    {"offer of the other form", 1, CRAB_OPTION_OTHER, B(MSS, 42, 2, 1, 1), B(MSS, REDIRECT_EXP), B(MSS)},
    {"another experiment's option stays", 1, 0, B(253, 4, 0x99, 0x99, MSS), B(REDIRECT_EXP, 253, 4, 0x99, 0x99, MSS),
     B(253, 4, 0x99, 0x99, MSS)},
    {"forged redirect", 0, CRAB_OPTION_FORGED, B(MSS, 42, 6, 6, 6, 6, 6, 1, 1), B(MSS, REDIRECT), B(MSS)},
    {"forged redirect beside an offer", 0, CRAB_OPTION_FORGED | CRAB_OPTION_OFFER,
     B(42, 6, 6, 6, 6, 6, 1, 1, 42, 2, 1, 1), B(REDIRECT), {0, {0}}},
    {"no option at all", 0, 0, {0, {0}}, B(REDIRECT), {0, {0}}},
    {"nothing is searched after EOL", 0, 0, B(0, 42, 2, 1), B(REDIRECT, 0, 42, 2, 1), B(0, 42, 2, 1)},
    {"length 0 ends the search", 0, 0, B(8, 0, 42, 2), B(REDIRECT, 8, 0, 42, 2), B(8, 0, 42, 2)},
    {"length 1 ends the search", 0, 0, B(42, 1, 42, 2), B(REDIRECT, 42, 1, 42, 2), B(42, 1, 42, 2)},
    {"length past the end ends the search", 0, 0, B(MSS, 42, 9, 1, 1), B(REDIRECT, MSS, 42, 9, 1, 1),
     B(MSS, 42, 9, 1, 1)},
    {"kind without a length", 0, 0, B(1, 1, 1, 42), B(REDIRECT, 1, 1, 1, 42), B(1, 1, 1, 42)},
};

int main(void)
{
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint8_t out[40];
        /* exact allocations, so that ASan sees a read past the list */
        uint8_t *in = malloc(cases[i].in.len ? cases[i].in.len : 1);
        memcpy(in, cases[i].in.b, cases[i].in.len);
        CHECK(crab_option_find(in, cases[i].in.len, cases[i].form) == cases[i].found);
        int n = crab_option_rewrite(in, cases[i].in.len, cases[i].form, vip4, out);
        CHECK(n == (int)cases[i].redirected.len);
        CHECK_BYTES(out, cases[i].redirected.b, (size_t)n);
        n = crab_option_rewrite(in, cases[i].in.len, cases[i].form, NULL, out);
        CHECK(n == (int)cases[i].stripped.len);
        CHECK_BYTES(out, cases[i].stripped.b, (size_t)n);
        free(in);
    }

    /* An IPv6 redirect beside Linux's 20 bytes fills the header exactly; with one word more it does not fit. */
    uint8_t out[40], full[28] = {MSS, SACK_TS, WS, 42, 2, 1, 1, 34, 2, 1, 1};
    CHECK(crab_option_rewrite(full, 24, CRAB_FORM_CRAB, vip6, out) == 40);
    CHECK_BYTES(out + 20, ((uint8_t[]){42, 18, 0xfd, 0}), 4);
    CHECK_BYTES(out + 36, ((uint8_t[]){0, 0x64, 1, 1}), 4);
    CHECK(crab_option_rewrite(full, 28, CRAB_FORM_CRAB, vip6, out) == -1);
    CHECK(crab_option_rewrite(full, 24, CRAB_FORM_EXPERIMENTAL, vip6, out) == 40);

    /* What a signed list is sent on as: a redirect is gone, by the other form as well; offers stay. */
    uint8_t list[20] = {REDIRECT_EXP, 42, 2, 42, 6, 1, 2, 3, 4, 253, 4, 0x43, 0x52};
    crab_option_blank(list, sizeof list);
    CHECK_BYTES(list, ((uint8_t[]){1, 1, 1, 1, 1, 1, 1, 1, 42, 2, 1, 1, 1, 1, 1, 1, 253, 4, 0x43, 0x52}), sizeof list);

    /* Linux' SYN-ACK: MSS; SACK-permitted and timestamps; window scale; MP_CAPABLE. */
    CHECK(crab_option_answer(NULL, 0) == 4);
    CHECK(crab_option_answer((uint8_t[]){MSS, WS, 1, 1, 4, 2}, 12) == 4 + 4 + 4);
    CHECK(crab_option_answer((uint8_t[]){MSS, SACK_TS, WS}, 20) == 4 + 12 + 4);
    CHECK(crab_option_answer((uint8_t[]){MSS, SACK_TS, WS, 30, 4, 1, 1}, 24) == 4 + 12 + 4 + 12);

    /* Every list of random bytes: no loop, nothing read or written outside, all CR options gone. */
    srand(1);
    uint32_t words = 0;
    for (int round = 0; round < 200000; round++) {
        size_t len = 4 * (size_t)(rand() % 11);
        uint8_t *in = malloc(len ? len : 1), *exact = malloc(40);
        static const struct bytes pieces[] = {B(1),     B(MSS),         B(4, 2),                B(WS),
                                              B(42, 2), B(42, 2, 1, 1), B(253, 4, 0x43, 0x52), B(0)};
        static const uint8_t likely[] = {0, 1, 2, 4, 6, 8, 18, 20, 30, 42, 253, 0x43, 0x52};
        for (size_t i = 0; i < len;) {
            const struct bytes *piece = &pieces[(size_t)rand() % (sizeof pieces / sizeof *pieces)];
            if (round % 2 && piece->len <= len - i) {
                memcpy(in + i, piece->b, piece->len);
                i += piece->len;
            } else {
                in[i++] = rand() % 4 ? likely[(size_t)rand() % sizeof likely] : (uint8_t)rand();
            }
        }
        int form = rand() & 1;
        int n = crab_option_rewrite(in, len, form, NULL, exact);
        CHECK(n >= 0 && n <= (int)len && n % 4 == 0);
        CHECK(!(crab_option_find(exact, (size_t)n, form) & (CRAB_OPTION_OFFER | CRAB_OPTION_FORGED | CRAB_OPTION_OTHER)));
        n = crab_option_rewrite(in, len, form, rand() & 1 ? vip4 : vip6, exact);
        CHECK(n == -1 || (n <= 40 && n % 4 == 0));
        /* Where one word is to change, the others do not. */
        int word, found = crab_option_scan(in, len, form, &word);
        if (word >= 0) {
            uint8_t wanted[60];
            size_t grown = crab_option_redirect(wanted + 4 * word, form, vip4);
            memcpy(wanted, in, 4 * (size_t)word);
            memcpy(wanted + 4 * word + grown, in + 4 * word + 4, len - 4 * (size_t)word - 4);
            n = crab_option_rewrite(in, len, form, vip4, exact);
            CHECK(found == CRAB_OPTION_OFFER && n == (len + 4 > 40 ? -1 : (int)len + 4));
            CHECK(n < 0 || !memcmp(exact, wanted, (size_t)n));
            words++;
        }
        free(in);
        free(exact);
    }
    CHECK(words > 1000);

    /* What was found in a list holds for the next: for lists of which each is the one before with a few bytes changed. */
    static struct crab_seen_lists seen;
    uint32_t held = 0;
    crab_seen_init(&seen);
    for (int round = 0; round < 200000; round++) {
        const struct bytes *b = &cases[(size_t)round / 2000 % (sizeof cases / sizeof *cases)].in;
        uint8_t *in = malloc(b->len ? b->len : 1);
        memcpy(in, b->b, b->len);
        for (int change = rand() % 4; change && b->len; change--)
            in[(size_t)rand() % b->len] = (uint8_t)(rand() % 4 ? rand() : 42);
        int word, again, form = round / 1000 % 2;
        struct crab_seen_list before = seen.of[b->len / 4];
        int found = crab_option_scan(in, b->len, form, &word);
        CHECK(crab_option_scan_again(&seen, in, b->len, form, &again) == found && again == word);
        held += !memcmp(&before, &seen.of[b->len / 4], sizeof before);
        free(in);
    }
    CHECK(held > 20000);
    DONE();
}
