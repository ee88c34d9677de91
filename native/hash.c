/* SPDX-License-Identifier: MIT */
#include "hash.h"

#include "crablb.h"

uint64_t crab_siphash13(const uint8_t *key16, const uint8_t *data, size_t len)
{
    struct crab_sip s = crab_sip_init(key16);
    size_t whole = len & ~(size_t)7;
    for (size_t i = 0; i < whole; i += 8)
        crab_sip_word(&s, load64(data + i));
    uint64_t last = (uint64_t)len << 56;
    for (size_t i = whole; i < len; i++)
        last |= (uint64_t)data[i] << 8 * (i - whole);
    return crab_sip_end(&s, last);
}

uint64_t crab_flow_hash(const uint8_t *key16, const uint8_t *saddr16, const uint8_t *daddr16, uint16_t sport_be,
                        uint16_t dport_be)
{
    struct crab_sip init = crab_sip_init(key16);
    uint8_t addrs[32], ports[4];
    store16(ports, sport_be);
    store16(ports + 2, dport_be);
    if (crab_is_mapped(saddr16) && crab_is_mapped(daddr16)) {
        memcpy(addrs, saddr16 + 12, 4);
        memcpy(addrs + 4, daddr16 + 12, 4);
        return crab_hash4(&init, addrs, ports);
    }
    memcpy(addrs, saddr16, 16);
    memcpy(addrs + 16, daddr16, 16);
    return crab_hash6(&init, addrs, ports);
}
