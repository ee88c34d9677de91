/* SPDX-License-Identifier: MIT */
#include "packet.h"

int crab_packet_parse(const uint8_t *frame, size_t len, struct crab_packet *out)
{
    return crab_parse(frame, len, out);
}
