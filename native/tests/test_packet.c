/* SPDX-License-Identifier: MIT */
#include "bytes.h"
#include "check.h"
#include "crablb.h"

static const uint8_t eth4[14] = {2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0};
static const uint8_t eth6[14] = {2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x86, 0xdd};
static const uint8_t ip4[20] = {0x45, 0, 0, 40, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 100};
static const uint8_t ip6[40] = {0x60, 0, 0, 0, 0, 20, 6, 64, 0xfd, [23] = 1, 0xfd, [39] = 0x64};
static const uint8_t tcp[20] = {0x9c, 0x40, 0, 80, [12] = 0x50, 2, 0xff, 0xff};

static size_t frame4(uint8_t *f)
{
    memcpy(f, eth4, 14);
    memcpy(f + 14, ip4, 20);
    memcpy(f + 34, tcp, 20);
    return 54;
}

static size_t frame6(uint8_t *f)
{
    memcpy(f, eth6, 14);
    memcpy(f + 14, ip6, 40);
    memcpy(f + 54, tcp, 20);
    return 74;
}

int main(void)
{
    uint8_t f[200];
    struct crab_packet p;

    size_t n = frame4(f);
    CHECK(crab_packet_parse(f, n, &p) == CRAB_V_OK);
    CHECK(p.l3 == 14 && p.l4 == 34 && p.end == 54 && p.family == 4 && p.tcp_header == 20 && p.tcp_flags == 2);
    CHECK(crab_packet_parse(f, n + 6, &p) == CRAB_V_OK && p.end == 54); /* Ethernet padding */
    n = frame6(f);
    CHECK(crab_packet_parse(f, n, &p) == CRAB_V_OK);
    CHECK(p.l3 == 14 && p.l4 == 54 && p.end == 74 && p.family == 6);

    /* one VLAN tag, either ethertype; two are not ours */
    for (int tag = 0; tag < 2; tag++) {
        n = frame4(f);
        memmove(f + 18, f + 14, n - 14);
        memcpy(f + 12, tag ? "\x88\xa8\x00\x05\x08\x00" : "\x81\x00\x00\x05\x08\x00", 6);
        CHECK(crab_packet_parse(f, n + 4, &p) == CRAB_V_OK && p.l3 == 18 && p.l4 == 38 && p.end == 58);
        memcpy(f + 16, "\x81\x00", 2);
        CHECK(crab_packet_parse(f, n + 4, &p) == CRAB_V_NOT_TCP);
    }

    /* one byte changed, one verdict */
    static const struct {
        int family, at, value, verdict;
    } table[] = {
        {4, 14, 0x46, CRAB_V_IP_OPTIONS}, {4, 14, 0x44, CRAB_V_MALFORMED},  {4, 14, 0x65, CRAB_V_MALFORMED},
        {4, 23, 17, CRAB_V_NOT_TCP},      {4, 20, 0x20, CRAB_V_FRAGMENT},   {4, 21, 1, CRAB_V_FRAGMENT},
        {4, 20, 0x40, CRAB_V_OK},         {4, 17, 41, CRAB_V_MALFORMED},    {4, 17, 39, CRAB_V_MALFORMED},
        {4, 16, 0xff, CRAB_V_MALFORMED},  {4, 46, 0x40, CRAB_V_MALFORMED},  {4, 46, 0x60, CRAB_V_MALFORMED},
        {4, 46, 0xf0, CRAB_V_MALFORMED},  {4, 12, 0x09, CRAB_V_NOT_TCP},    {6, 20, 44, CRAB_V_IP_OPTIONS},
        {6, 20, 0, CRAB_V_IP_OPTIONS},    {6, 20, 17, CRAB_V_NOT_TCP},      {6, 14, 0x40, CRAB_V_MALFORMED},
        {6, 19, 21, CRAB_V_MALFORMED},    {6, 19, 19, CRAB_V_MALFORMED},    {6, 18, 0xff, CRAB_V_MALFORMED},
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        n = table[i].family == 4 ? frame4(f) : frame6(f);
        f[table[i].at] = (uint8_t)table[i].value;
        CHECK(crab_packet_parse(f, n, &p) == table[i].verdict);
    }

    struct crab_matches web = {
        .list = {{.port = htons(80), .proto = 6, .fields = CRAB_MATCH_PORT | CRAB_MATCH_PROTO, .handler = 7}}, .count = 1};

    /* every truncation, in an allocation of its own size */
    for (int family = 4; family <= 6; family += 2) {
        n = family == 4 ? frame4(f) : frame6(f);
        for (size_t cut = 0; cut < n; cut++) {
            uint8_t *exact = malloc(cut ? cut : 1);
            memcpy(exact, f, cut);
            CHECK(crab_packet_parse(exact, cut, &p) != CRAB_V_OK);
            /* the ports' last byte is the first that a match on a port needs */
            CHECK((crab_match_find(&web, exact, cut) == 7) == (cut >= (family == 4 ? 38 : 58)));
            free(exact);
        }
    }
    DONE();
}
