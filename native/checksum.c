/* SPDX-License-Identifier: MIT */
#include "checksum.h"

#include "crablb.h"
#include "packet.h"

uint16_t crab_csum(const uint8_t *data, size_t len)
{
    return crab_fold(crab_sum(data, len));
}

int crab_csum_state(const uint8_t *ip, size_t ip_len, uint16_t *right)
{
    int six = ip[0] >> 4 == 6;
    size_t header = six ? 40 : 20;
    struct crab_tcp_sum sum = crab_tcp_sum(ip + header, ip_len - header, ip + (six ? 8 : 12), six ? 32 : 8);
    *right = crab_tcp_right(sum);
    return sum.state;
}
