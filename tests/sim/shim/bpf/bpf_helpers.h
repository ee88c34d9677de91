/* SPDX-License-Identifier: MIT */
/* In place of libbpf's: the helpers that lb.bpf.c calls, of the load balancer whose turn it is (xdp.c).  struct xdp_md has
 * pointers of 32 bits, so frames lie below 4 GiB. */
#ifndef SIM_BPF_HELPERS_H
#define SIM_BPF_HELPERS_H

#include <stddef.h>
#include <string.h>

#define __uint(name, val) int(*name)[val]
#define __type(name, val) typeof(val) *name
#define SEC(name) __attribute__((used))
#undef __always_inline
#define __always_inline inline __attribute__((always_inline))
#define __noinline __attribute__((noinline, unused))
#define barrier_var(var) __asm__ volatile("" : "=r"(var) : "0"(var))

struct xdp_md;
void *sim_map_lookup(const void *map, const void *key);
long sim_map_update(const void *map, const void *key, const void *value);
long sim_redirect_map(__u32 place, __u64 otherwise);
long sim_redirect(__u32 ifindex);
long sim_adjust_head(struct xdp_md *ctx, int by);
__u64 sim_ktime(void);

#define bpf_map_lookup_elem(map, key) sim_map_lookup(map, key)
#define bpf_map_update_elem(map, key, value, flags) sim_map_update(map, key, value)
#define bpf_redirect_map(map, place, otherwise) sim_redirect_map(place, otherwise)
#define bpf_redirect(ifindex, flags) sim_redirect(ifindex)
#define bpf_xdp_adjust_head(ctx, by) sim_adjust_head(ctx, by)
#define bpf_xdp_adjust_meta(ctx, by) (-1) /* there is no zero-copy memory */
#define bpf_xdp_adjust_tail(ctx, by) ((ctx)->data_end += (__u32)(by), 0)
#define bpf_xdp_get_buff_len(ctx) ((ctx)->data_end - (ctx)->data)
#define bpf_xdp_load_bytes(ctx, at, to, n)                    \
    ((at) + (n) > (ctx)->data_end - (ctx)->data               \
         ? -1                                                 \
         : (memcpy(to, (void *)(long)((ctx)->data + (at)), n), 0))
#define bpf_ktime_get_ns() sim_ktime()
#define bpf_ktime_get_coarse_ns() sim_ktime()

static inline __s64 bpf_csum_diff(const void *from, __u32 from_size, const void *to, __u32 size, __u32 seed)
{
    (void)from, (void)from_size;
    __u64 sum = seed;
    for (__u32 i = 0; i < size; i += 4) {
        __u32 word;
        memcpy(&word, (const __u8 *)to + i, 4);
        sum += word;
    }
    sum = (sum & 0xffffffff) + (sum >> 32);
    return (__s64)((sum & 0xffffffff) + (sum >> 32));
}

#endif
