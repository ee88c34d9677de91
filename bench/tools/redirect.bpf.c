// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* What crablb is measured against: the same redirect in the kernel alone, by XDP.  A SYN with an offer goes to a backend of
 * the VIP's Maglev table, its offer replaced by the redirect; any other packet goes by MAC address.
 *
 * It does less than the hot loop: no checksum is verified (one that is left to a network card is completed), nothing is
 * remembered of a connection, there is one form of the
 * option and no VLAN tags.  So it flatters itself.
 *
 * `renewed` and `harness` are for BPF_PROG_TEST_RUN, which does not undo between two runs what a program did to the frame. */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "redirect.h"
#include "hop.h"
#include "siphash.h"

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 1024);
    __type(key, struct crab_vip);
    __type(value, struct redirect_service);
} services SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 1); /* user space says how many: table_size a service */
    __type(key, __u32);
    __type(value, __u32);
} table SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 65536);
    __type(key, __u32);
    __type(value, struct redirect_backend);
} backends SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, struct redirect_settings);
} settings SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    __uint(max_entries, REDIRECT_COUNTERS);
    __type(key, __u32);
    __type(value, __u64);
} counters SEC(".maps");

/* The frame that a test run starts from. */
struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, struct redirect_frame);
} frames SEC(".maps");

static __always_inline void count(__u32 what)
{
    __u64 *n = bpf_map_lookup_elem(&counters, &what);
    if (n)
        (*n)++;
}

static __always_inline __u16 fold(__u64 sum)
{
    sum = (sum & 0xffffffff) + (sum >> 32);
    sum = (sum & 0xffffffff) + (sum >> 32);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    return (__u16)sum;
}

static __always_inline __u64 sum16(const __u8 *address)
{
    const __u32 *words = (const void *)address;
    return (__u64)words[0] + words[1] + words[2] + words[3];
}

#define FRONT4 (14 + 20 + 20)
#define FRONT6 (14 + 40 + 20)

/* The word of the options that holds the offer and NOPs, or -1. */
static __always_inline int find_offer(const __u8 *options, __u32 len, const __u8 *end)
{
    __u32 i = 0;
    for (int step = 0; step < 40; step++) {
        if (i > 38 || i + 2 > len)
            return -1;
        const __u8 *o = options + i;
        if (o + 2 > end || o[0] == 0)
            return -1;
        if (o[0] == 1) {
            i++;
            continue;
        }
        if (o[0] == CRAB_OPT_KIND)
            break;
        if (o[1] < 2)
            return -1;
        i += o[1];
    }
    __u32 word = i / 4;
    if (word > 9)
        return -1;
    const __u8 *w = options + 4 * word;
    if (w + 4 > end || i % 4 > 2)
        return -1;
    __u32 wanted = 0x01010101, offer = CRAB_OPT_KIND | 2u << 8;
    wanted = (wanted & ~(0xffffu << 8 * (i % 4))) | offer << 8 * (i % 4);
    return *(const __u32 *)w == wanted ? (int)word : -1;
}

/* Move the headers (front bytes of them, then `word` words of options) by `grow` to the front, and put in the option. */
#define MOVE(ctx, front, grow, word, option)                                              \
    ({                                                                                    \
        int done_ = -1;                                                                   \
        __u8 headers_[front];                                                             \
        if (!bpf_xdp_adjust_head(ctx, -(int)(grow))) {                                    \
            __u8 *to_ = (void *)(long)(ctx)->data, *end_ = (void *)(long)(ctx)->data_end; \
            if (to_ + (front) + (grow) + 4 <= end_) {                                     \
                __builtin_memcpy(headers_, to_ + (grow), front);                          \
                __builtin_memcpy(to_, headers_, front);                                   \
                _Pragma("unroll") for (__u32 w_ = 0; w_ < 10; w_++) {                     \
                    __u8 *from_ = to_ + (front) + (grow) + 4 * w_;                        \
                    if (w_ >= (word) || from_ + 4 > end_)                                 \
                        break;                                                            \
                    *(__u32 *)(from_ - (grow)) = *(__u32 *)from_;                         \
                }                                                                         \
                __u8 *at_ = to_ + (front) + 4 * ((word)&15);                              \
                if (at_ + (grow) + 4 <= end_) {                                           \
                    __builtin_memcpy(at_, option, (grow) + 4);                            \
                    done_ = 0;                                                            \
                }                                                                         \
            }                                                                             \
        }                                                                                 \
        done_;                                                                            \
    })

/* The TCP header's length field and the checksum, `tcp_len` bytes before it grew.  change: of the rest. */
static __always_inline void settle(struct tcphdr *tcp, __u32 tcp_len, __u32 grow, __u64 change)
{
    __u16 *offset = (__u16 *)tcp + 6, before = *offset;
    tcp->doff += grow / 4;
    change += (__u16)~before + (__u64)*offset;
    change += (__u16)~bpf_htons((__u16)tcp_len) + (__u64)bpf_htons((__u16)(tcp_len + grow));
    tcp->check = (__u16)~fold((__u16)~tcp->check + change);
}

/* A virtual neighbour may have left the checksum of a SYN to a network card that does not exist: its field holds the sum of the
 * pseudo-header alone.  Complete it. */
static __noinline void complete(struct tcphdr *tcp, __u32 header, __u64 pseudo, const void *end)
{
    if ((void *)(tcp + 1) > end || tcp->check != fold(pseudo))
        return;
    __u64 sum = pseudo + (__u16)~tcp->check;
    for (int i = 0; i < 15; i++) {
        __u32 *word = (__u32 *)tcp + i;
        if (i * 4u >= header || (void *)(word + 1) > end)
            break;
        sum += *word;
    }
    tcp->check = (__u16)~fold(sum);
}

static __always_inline int send(struct xdp_md *ctx, const struct redirect_backend *b)
{
    __u8 *data = (void *)(long)ctx->data;
    if (data + 14 > (__u8 *)(long)ctx->data_end)
        return XDP_DROP;
    __builtin_memcpy(data, b->macs, 12);
    /* A veth's other end is woken by a redirect, not by XDP_TX. */
    return b->ifindex ? (int)bpf_redirect(b->ifindex, 0) : XDP_TX;
}

static __always_inline int handle(struct xdp_md *ctx)
{
    __u8 *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
    struct ethhdr *eth = (void *)data;
    struct crab_vip vip = {.proto = IPPROTO_TCP};
    struct tcphdr *tcp;
    __u32 zero = 0, tcp_len, v6 = 0;
    __u64 pseudo;
    struct redirect_settings *set = bpf_map_lookup_elem(&settings, &zero);
    if (!set || (void *)(eth + 1) > (void *)end)
        return XDP_PASS;
    struct crab_sip sip = crab_sip_start(set->key[0], set->key[1]);
    if (eth->h_proto == bpf_htons(ETH_P_IP)) {
        struct iphdr *ip = (void *)(eth + 1);
        tcp = (void *)(ip + 1);
        if ((void *)(tcp + 1) > (void *)end || ip->ihl != 5 || ip->protocol != IPPROTO_TCP ||
            ip->frag_off & bpf_htons(0x3fff))
            return XDP_PASS;
        vip.addr[10] = vip.addr[11] = 0xff;
        __builtin_memcpy(vip.addr + 12, &ip->daddr, 4);
        crab_sip_word(&sip, (__u64)ip->daddr << 32 | ip->saddr);
        tcp_len = bpf_ntohs(ip->tot_len) - 20u;
        pseudo = (__u64)ip->saddr + ip->daddr;
    } else if (eth->h_proto == bpf_htons(ETH_P_IPV6)) {
        struct ipv6hdr *ip = (void *)(eth + 1);
        tcp = (void *)(ip + 1);
        if ((void *)(tcp + 1) > (void *)end || ip->nexthdr != IPPROTO_TCP)
            return XDP_PASS;
        __builtin_memcpy(vip.addr, &ip->daddr, 16);
        const __u32 *a = (const void *)&ip->saddr;
        crab_sip_word(&sip, (__u64)a[1] << 32 | a[0]);
        crab_sip_word(&sip, (__u64)a[3] << 32 | a[2]);
        crab_sip_word(&sip, (__u64)a[5] << 32 | a[4]);
        crab_sip_word(&sip, (__u64)a[7] << 32 | a[6]);
        tcp_len = bpf_ntohs(ip->payload_len);
        pseudo = sum16((const void *)&ip->saddr) + sum16((const void *)&ip->daddr);
        v6 = 1;
    } else {
        return XDP_PASS;
    }
    vip.port = tcp->dest;
    struct redirect_service *service = bpf_map_lookup_elem(&services, &vip);
    if (!service)
        return XDP_PASS;
    __u64 ports = (__u64)tcp->source | (__u64)tcp->dest << 16;
    __u64 hash = crab_sip_end(&sip, ports | (v6 ? 36ull : 12ull) << 56);
    __u32 slot = service->first + (__u32)(((hash >> 32) * set->table_size) >> 32);
    __u32 *id = bpf_map_lookup_elem(&table, &slot);
    struct redirect_backend *b = id ? bpf_map_lookup_elem(&backends, id) : NULL;
    if (!b)
        return XDP_DROP;
    __u32 header = tcp->doff * 4u;
    int word = -1;
    if (tcp->syn && !tcp->ack && header >= 20 && header <= 60)
        word = find_offer((__u8 *)(tcp + 1), header - 20, end);
    __u32 grow = v6 ? 16 : 4;
    if (word < 0 || header + grow > 60) {
        count(REDIRECT_FALLBACK);
        __u8 *ip = (void *)(eth + 1);
        if (!crab_has_hop(ip, v6 ? 6 : 4))
            return XDP_DROP;
        crab_take_hop(ip, v6 ? 6 : 4);
        return send(ctx, b);
    }
    __u8 *old = (__u8 *)(tcp + 1) + 4 * (word & 15);
    if (old + 4 > end)
        return XDP_DROP;
    complete(tcp, header, pseudo + bpf_htons((__u16)tcp_len) + bpf_htons(IPPROTO_TCP), end);
    __u64 change = (__u64)service->option_sum + (__u32)~*(__u32 *)old;
    if (v6) {
        if (MOVE(ctx, FRONT6, 16, (__u32)word, service->option))
            return XDP_DROP;
        data = (void *)(long)ctx->data;
        end = (void *)(long)ctx->data_end;
        struct ipv6hdr *ip = (void *)(data + 14);
        tcp = (void *)(ip + 1);
        if ((void *)(tcp + 1) > (void *)end)
            return XDP_DROP;
        ip->payload_len = bpf_htons((__u16)(tcp_len + 16));
        change += (__u16)~fold(sum16((__u8 *)&ip->daddr)) + sum16(b->addr);
        __builtin_memcpy(&ip->daddr, b->addr, 16);
        settle(tcp, tcp_len, 16, change);
    } else {
        if (MOVE(ctx, FRONT4, 4, (__u32)word, service->option))
            return XDP_DROP;
        data = (void *)(long)ctx->data;
        end = (void *)(long)ctx->data_end;
        struct iphdr *ip = (void *)(data + 14);
        tcp = (void *)(ip + 1);
        if ((void *)(tcp + 1) > (void *)end)
            return XDP_DROP;
        __u32 dip = *(__u32 *)(b->addr + 12);
        __u64 moved = (__u64)(__u32)~ip->daddr + dip;
        __u16 total = bpf_htons((__u16)(tcp_len + 24));
        ip->check = (__u16)~fold((__u16)~ip->check + moved + (__u16)~ip->tot_len + (__u64)total);
        ip->tot_len = total;
        ip->daddr = dip;
        settle(tcp, tcp_len, 4, change + moved);
    }
    count(REDIRECT_REDIRECTED);
    return send(ctx, b);
}

SEC("xdp")
int redirect(struct xdp_md *ctx)
{
    return handle(ctx);
}

/* The frame as it was before the last run, from another port. */
static __always_inline int renew(struct xdp_md *ctx, __u32 grown)
{
    __u32 zero = 0;
    struct redirect_frame *f = bpf_map_lookup_elem(&frames, &zero);
    if (!f)
        return -1;
    __u32 len = (__u32)((long)ctx->data_end - (long)ctx->data);
    if (len != f->len && bpf_xdp_adjust_head(ctx, (int)(len - f->len)))
        return -1;
    __u8 *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
    f->port++;
    if (f->v6) {
        if (data + 98 > end)
            return -1;
        __builtin_memcpy(data, f->bytes, 98);
        *(__u16 *)(data + 54) = f->port;
    } else {
        if (data + 78 > end)
            return -1;
        __builtin_memcpy(data, f->bytes, 78);
        *(__u16 *)(data + 34) = f->port;
    }
    return grown ? bpf_xdp_adjust_head(ctx, -(int)(f->v6 ? 16 : 4)) : 0;
}

SEC("xdp")
int renewed(struct xdp_md *ctx)
{
    return renew(ctx, 0) ? XDP_ABORTED : handle(ctx);
}

SEC("xdp")
int harness(struct xdp_md *ctx)
{
    return renew(ctx, 1) ? XDP_ABORTED : XDP_TX;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
