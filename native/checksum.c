/* SPDX-License-Identifier: MIT */
#include "checksum.h"

#include "crablb.h"

uint16_t crab_csum(const uint8_t *data, size_t len)
{
    return crab_fold(crab_sum(data, len));
}
