/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* What bench/redirect.py writes into the maps of redirect.bpf.c. */
#ifndef REDIRECT_H
#define REDIRECT_H

#include "maps.h"

struct redirect_settings {
    __u64 key[2]; /* of SipHash-1-3 */
    __u32 table_size;
    __u32 pad;
};

struct redirect_service {
    __u32 first;      /* slot of `table` */
    __u32 option_sum; /* of the redirect option's words */
    __u8 option[20];
};

struct redirect_backend {
    __u8 addr[16];
    __u8 macs[12];  /* destination, source */
    __u32 ifindex;  /* to send on by a redirect; 0: XDP_TX */
};

struct redirect_frame {
    __u32 len;
    __u16 port; /* source port of the last one, counted up */
    __u16 v6;
    __u8 bytes[104];
};

enum { REDIRECT_REDIRECTED, REDIRECT_FALLBACK, REDIRECT_COUNTERS };

#endif
