/* SPDX-License-Identifier: MIT */
#include "packet.h"

int crab_packet_parse(const uint8_t *frame, size_t len, struct crab_packet *out)
{
    return crab_parse(frame, len, out);
}

int crab_csum_state(const uint8_t *ip, size_t ip_len, uint16_t *right)
{
    int six = ip[0] >> 4 == 6;
    size_t header = six ? 40 : 20;
    struct crab_tcp_sum sum = crab_tcp_sum(ip + header, ip_len - header, ip + (six ? 8 : 12), six ? 32 : 8);
    *right = crab_tcp_right(sum);
    return sum.state;
}
