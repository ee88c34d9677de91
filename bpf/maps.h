/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Every struct that a BPF program and user space share, defined once: the BPF programs and native/ include this file,
 * and Python's cffi declarations are read from it (so: plain declarations and integer #defines only).
 *
 * Addresses are 16 bytes in network order; an IPv4 address is IPv4-mapped (::ffff:a.b.c.d, RFC 4291 2.5.5.2), so that
 * one map serves both families.  Ports are in network order.  Padding is named and must be zero: map keys are compared
 * byte by byte. */
#ifndef CRAB_MAPS_H
#define CRAB_MAPS_H

#include <linux/types.h>

/* The CR option (kinds, and lengths without padding). */
#define CRAB_OPT_KIND 42
#define CRAB_OPT_KIND_EXPERIMENTAL 253
#define CRAB_OPT_EXID 0x4352
#define CRAB_FORM_CRAB 0
#define CRAB_FORM_EXPERIMENTAL 1

/* ---- load balancer (lb.bpf.c) ---- */

#define CRAB_MAX_SERVICES 65536
#define CRAB_MAX_QUEUES 64

/* Key of map `services`. */
struct crab_vip {
    __u8 addr[16];
    __be16 port;
    __u8 proto; /* IPPROTO_TCP */
    __u8 pad;
};

/* What the XDP program did with a packet: index into map `xdp_counters` (per CPU, __u64 each). */
enum crab_xdp_counter {
    CRAB_XDP_PASS_NOT_VIP,      /* not a VIP's: given to the kernel untouched */
    CRAB_XDP_PASS_FRAGMENT,     /* IP fragment: its ports cannot be known */
    CRAB_XDP_PASS_IP_OPTIONS,   /* IPv4 options or IPv6 extension headers */
    CRAB_XDP_PASS_MALFORMED,    /* truncated headers */
    CRAB_XDP_SYN,               /* a VIP's SYN, handed to its AF_XDP socket */
    CRAB_XDP_OTHER,             /* any other TCP packet of a VIP, handed to its AF_XDP socket */
    CRAB_XDP_DROP_NO_SOCKET,    /* a VIP's packet, and no daemon has a socket on this queue */
    CRAB_XDP_COUNTERS
};

/* Value of map `worker_counters`, one a queue: see enum crab_counter in native/crablb.h, which fits in.  Two queues never
 * share a cache line. */
#define CRAB_WORKER_COUNTERS 64
struct crab_worker_counters {
    __u64 n[CRAB_WORKER_COUNTERS];
};

#endif
