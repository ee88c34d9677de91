/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* What the client's programs share: what they were told, their connections, and their counters. */
#ifndef CRAB_CLIENT_H
#define CRAB_CLIENT_H

#include <linux/bpf.h>
#include <linux/in.h>
#include <linux/tcp.h>
#include <stddef.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "address.h"
#include "length.h"
#include "maps.h"

/* TCP options (IANA, "TCP Parameters"). */
#define EOL 0
#define NOP 1

/* clang 14 merges neighbouring reads of a context into one that the verifier refuses. */
#define READ(x) (*(volatile typeof(x) *)&(x))

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, struct crab_client_settings);
} client_settings SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 4096);
    __type(key, struct crab_vip);
    __type(value, struct crab_client_vip);
} client_vips SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_LPM_TRIE);
    __uint(max_entries, 4096);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, struct crab_lpm);
    __type(value, __u32);
} client_backends SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, CRAB_CLIENT_FLOWS);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, struct crab_client_ports);
    __type(value, struct crab_client_flow);
} client_flows SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    __uint(max_entries, CRAB_CLIENT_COUNTERS);
    __type(key, __u32);
    __type(value, __u64);
} client_counters SEC(".maps");

/* Entries of client_flows.  What parallel changes make wrong in it the next sweep puts right. */
static __s32 used;

CRAB_INLINE const struct crab_client_settings *settings(void)
{
    __u32 zero = 0;
    return bpf_map_lookup_elem(&client_settings, &zero);
}

CRAB_INLINE void count(__u32 what)
{
    __u64 *n = bpf_map_lookup_elem(&client_counters, &what);
    if (n)
        (*n)++;
}

/* Copy an address, by words: the compiler would do it by bytes.  Both are aligned to 4. */
CRAB_INLINE void copy(void *to, const void *from)
{
    __u32 *t = to;
    const __u32 *f = from;
    t[0] = f[0];
    t[1] = f[1];
    t[2] = f[2];
    t[3] = f[3];
}

CRAB_INLINE void map_v4(void *addr, __be32 v4)
{
    __u32 *w = addr;
    w[0] = w[1] = 0;
    w[2] = bpf_htonl(0xffff);
    w[3] = v4;
}

CRAB_INLINE int is_mapped(const __u8 addr[16])
{
    const __u32 *w = (const void *)addr;
    return crab_words_are_mapped(w[0], w[1], w[2]);
}

CRAB_INLINE int same(const __u8 a[16], const __u8 b[16])
{
    const __u32 *x = (const void *)a, *y = (const void *)b;
    return !((x[0] ^ y[0]) | (x[1] ^ y[1]) | (x[2] ^ y[2]) | (x[3] ^ y[3]));
}

CRAB_INLINE int in_prefixes(const __u8 addr[16])
{
    struct crab_lpm key = {.bits = 128};
    copy(key.addr, addr);
    __u32 *family = bpf_map_lookup_elem(&client_backends, &key);
    return family && !(*family == 6 && is_mapped(addr)); /* ::/0 holds mapped addresses too */
}

CRAB_INLINE struct crab_client_vip *vip_of(const __u8 addr[16], __be16 port)
{
    struct crab_vip key __attribute__((aligned(4))) = {.port = port, .proto = IPPROTO_TCP};
    copy(key.addr, addr);
    return bpf_map_lookup_elem(&client_vips, &key);
}

/* ---- connections ---- */

CRAB_INLINE struct crab_client_flow *flow_of(const struct crab_client_ports *ports)
{
    return bpf_map_lookup_elem(&client_flows, ports);
}

/* What an offer left is of no use any more.  By comparing, for whose it is not may look at an entry that is another
 * flow's by now. */
CRAB_INLINE void forget(struct crab_client_flow *flow, __u32 state)
{
    __sync_val_compare_and_swap(&flow->state, state, CRAB_CLIENT_FREE);
}

/* A connection begins.  Returns its entry; NULL if another one has these ports, or there is no room (`full`). */
CRAB_INLINE struct crab_client_flow *claim(const struct crab_client_ports *ports, __u64 owner, int *full)
{
    struct crab_client_flow new = {.owner = owner};
    if (!bpf_map_update_elem(&client_flows, ports, &new, BPF_NOEXIST)) {
        __sync_fetch_and_add(&used, 1);
        return flow_of(ports);
    }
    struct crab_client_flow *flow = flow_of(ports);
    if (!flow) {
        *full = 1;
        return NULL;
    }
    if (__sync_val_compare_and_swap(&flow->owner, 0, owner))
        return NULL;
    /* The sweep may have deleted it meanwhile, and its memory be another entry. */
    if (flow_of(ports) != flow) {
        __sync_val_compare_and_swap(&flow->owner, owner, 0);
        return NULL;
    }
    flow->state = CRAB_CLIENT_FREE; /* whatever was translated yet */
    flow->ends_ns = 0;
    flow->offer = flow->flag = flow->syn_count = flow->retransmitted = flow->opening = 0;
    flow->rto = 0;
    return flow;
}

/* How long an answer may take. */
#define ANSWER_NS (100 * 1000000ull)

/* The SYN leaves: from now on it may be answered by a redirect. */
CRAB_INLINE void wait(struct crab_client_flow *flow, __be32 isn)
{
    flow->ack = bpf_htonl(bpf_ntohl(isn) + 1);
    flow->left = flow->again = flow->failed = 0;
    flow->said = CRAB_CLIENT_NEW;
    flow->ends_ns = bpf_ktime_get_coarse_ns();
    flow->state = CRAB_CLIENT_WAITING;
}

CRAB_INLINE void delete(const struct crab_client_ports *ports, struct crab_client_flow *flow, __u64 owner)
{
    if (__sync_val_compare_and_swap(&flow->owner, owner, CRAB_CLIENT_GONE) == owner &&
        !bpf_map_delete_elem(&client_flows, ports))
        __sync_fetch_and_add(&used, -1);
}

#endif
