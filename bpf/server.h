/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* What the server's programs share: which listeners are to be asked, and which were. */
#ifndef CRAB_SERVER_H
#define CRAB_SERVER_H

#include <bpf/bpf_helpers.h>

#include "maps.h"

#define SOL_TCP 6

/* The ports of the VIPs that the server was told of (host order): other listeners are let alone. */
#define ARMED 1
#define ARMED_BEFORE 2 /* so they are, by an agent that did not note which */
#define DISARMED 0     /* they were, and are not to be any more */
struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 4096);
    __type(key, __u32);
    __type(value, __u32);
} server_ports SEC(".maps");

/* Listeners that were asked by us alone to let header options be written, */
struct {
    __uint(type, BPF_MAP_TYPE_SK_STORAGE);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, int);
    __type(value, __u32);
} server_armed SEC(".maps");

/* and those that somebody else had asked before; their children too. */
struct {
    __uint(type, BPF_MAP_TYPE_SK_STORAGE);
    __uint(map_flags, BPF_F_NO_PREALLOC | BPF_F_CLONE);
    __type(key, int);
    __type(value, __u32);
} server_shared SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    __uint(max_entries, CRAB_SERVER_COUNTERS);
    __type(key, __u32);
    __type(value, __u64);
} server_counters SEC(".maps");

CRAB_INLINE void count(__u32 what)
{
    __u64 *n = bpf_map_lookup_elem(&server_counters, &what);
    if (n)
        (*n)++;
}

#endif
