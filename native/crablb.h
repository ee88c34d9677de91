/* SPDX-License-Identifier: MIT */
/* The C API of the hot loop, by parts, each a module of that name.  Python's cffi declarations are read from this file: plain
 * declarations and integer #defines only; inline code lives in the modules' own headers.
 *
 * Units.  Addresses are 16 bytes in network order, IPv4 as ::ffff:a.b.c.d.  Names that end in _be are in network order, all
 * else in the machine's.  Lengths and sizes are bytes, unless it says slots, entries or frames.  `now` is whole seconds of
 * one monotonic clock.  A backend's id is its index into the snapshot's backends.  `form` is CRAB_FORM_*.
 *
 * Threads.  Functions that are given no object work on their arguments alone: from any thread, at the same time.  An object
 * is used by one thread at a time, unless it says otherwise.
 *
 * Ownership.  What *_new returns is the caller's, who gives it to *_free (which takes NULL too) when no thread is inside a
 * function that uses it.  Arrays are copied or only looked at during the call; what is kept by reference, and so must outlive
 * the object, is named. */
#ifndef CRABLB_H
#define CRABLB_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "maps.h"

/* ---- hash: SipHash-1-3.  key16: 16 bytes, which only load balancers of one configuration know ---- */

uint64_t crab_siphash13(const uint8_t *key16, const uint8_t *data, size_t len);

/* Hash of a connection: SipHash-1-3 over source address, destination address (4 + 4 or 16 + 16 bytes, so an IPv4-mapped
 * pair is hashed as IPv4), source port, destination port, all in network order. */
uint64_t crab_flow_hash(const uint8_t *key16, const uint8_t *saddr16, const uint8_t *daddr16, uint16_t sport_be,
                        uint16_t dport_be);

/* ---- checksum: RFC 1071, RFC 1624 ---- */

/* One's-complement sum of len bytes, folded to 16 bits, not complemented, in memory (network) byte order. */
uint16_t crab_csum(const uint8_t *data, size_t len);

/* ---- option: the CR option in a TCP option list, and what the others say about redirecting ---- */

#define CRAB_OPTION_OFFER 1  /* an offer of the form asked for */
#define CRAB_OPTION_FORGED 2 /* a CR option of either form that only a load balancer may send, or of an unknown length */
#define CRAB_OPTION_OTHER 4  /* an offer of the other form */
#define CRAB_OPTION_UNSAFE 8 /* a Fast Open option, a signature or MP_JOIN: never to be redirected */
#define CRAB_OPTION_SIGNED 16 /* a signature (TCP-MD5, TCP-AO) is among the unsafe ones */
#define CRAB_OPTION_MPTCP 32 /* MP_CAPABLE */
#define CRAB_OPTION_JOIN 64  /* MP_JOIN, which is one of the unsafe ones */
#define CRAB_MAX_OPTIONS 40

/* Flags (CRAB_OPTION_*) of len bytes of TCP options, at most 40.  The search ends at EOL, at a length under 2 and at a length
 * past the end. */
int crab_option_find(const uint8_t *options, size_t len, int form);

/* The same, and in *word which word of the list is an offer and NOPs, all of those that adjoin, where crab_option_rewrite
 * changes this word alone and the flags are CRAB_OPTION_OFFER alone; else -1. */
int crab_option_scan(const uint8_t *options, size_t len, int form, int *word);

/* Write the redirect to a VIP, padded by NOPs.  Returns its length, 8 or 20. */
size_t crab_option_redirect(uint8_t out[20], int form, const uint8_t vip16[16]);

/* Write the list to send on.  Each run of CR options and NOPs (with at least one CR option in it) shrinks to so few NOPs, none
 * to three, that what is behind keeps its alignment; if vip16 is not NULL, the first run begins with a redirect to that VIP,
 * or without any run, the list does.  All else stays as it is, in its order.  len is a multiple of 4.  Returns the new length (a
 * multiple of 4, at most 40) or -1 if it does not fit; out has room for 40 bytes and does not overlap. */
int crab_option_rewrite(const uint8_t *options, size_t len, int form, const uint8_t *vip16, uint8_t *out);

/* Overwrite the CR options that only a load balancer may send by NOPs.  Offers stay. */
void crab_option_blank(uint8_t *options, size_t len);

/* Bytes of options in Linux' answer to a SYN, without a redirect. */
size_t crab_option_answer(const uint8_t *options, size_t len);

/* Of MPTCP (RFC 8684, figures 4 and 5), or NULL.  The key of the server, 8 bytes, in the MP_CAPABLE of its client's ACK. */
const uint8_t *crab_option_key(const uint8_t *options, size_t len);
/* The token of the connection, 4 bytes, in a SYN's MP_JOIN. */
const uint8_t *crab_option_token(const uint8_t *options, size_t len);

/* ---- packet ---- */

/* A parsed frame: offsets from its first byte. */
struct crab_packet {
    uint16_t l3;        /* IP header */
    uint16_t l4;        /* TCP header */
    uint16_t end;       /* end of the IP datagram: the frame without Ethernet padding */
    uint8_t family;     /* 4 or 6 */
    uint8_t tcp_header; /* bytes, 20 to 60 */
    uint8_t tcp_flags;
};

/* Parse Ethernet, at most two VLAN tags (802.1Q or 802.1ad), IPv4 without options or IPv6 without extension headers, and
 * TCP.  Returns a crab_verdict; *out is valid only with CRAB_V_OK. */
int crab_packet_parse(const uint8_t *frame, size_t len, struct crab_packet *out);

/* State (CRAB_CSUM_*) of the TCP checksum of an IPv4 or IPv6 datagram without options or extension headers, as
 * crab_packet_parse finds it right, and, unless it is bad, the checksum that it should carry (in memory order) in *right. */
int crab_csum_state(const uint8_t *ip, size_t ip_len, uint16_t *right);

/* ---- tables: which backend a hash means ---- */

struct crab_table_member {
    uint8_t addr[16];
    uint32_t weight; /* now; 0: no slots */
    uint32_t full;   /* when all is well with it; less than `weight`: that */
    uint16_t backend; /* what the table's slots hold */
    uint16_t pad;
};

/* Fill table[size] (slots; size is prime) with backend ids.  The table depends on the set of (addr, weight, full), never on
 * the order of members.  Where a member has less than its full weight, the slots that it lacks are the only ones that differ
 * from the table of full weights.  Slots hold CRAB_NO_BACKEND when no member has a weight.  Returns 0, or -1 without memory.
 * Nobody writes a table that a snapshot has. */
#define CRAB_NO_BACKEND 65535
/* Maglev hashing, Eisenbud et al., NSDI 2016, 3.4: each has its share, to the slot. */
int crab_maglev_build(uint16_t *table, uint32_t size, const struct crab_table_member *members, uint32_t count,
                      const uint8_t *key16);
/* Rendezvous hashing with bounded loads (native/rendezvous.c): nobody has more than a 32nd beyond its share, and hardly any
 * slots move but those of who comes or goes. */
int crab_rendezvous_build(uint16_t *table, uint32_t size, const struct crab_table_member *members, uint32_t count,
                          const uint8_t *key16);

/* ---- select: policies, which backend a connection is redirected to (native/select.h) ---- */

/* What is known of one backend of one service.  Shared by all workers and snapshots, which write `assigned` alone, by atomic
 * additions; who has the reports writes the others, word by word, at any time. */
struct crab_load {
    uint32_t assigned; /* connections given to it, modulo 2^32 */
    uint32_t base;     /* `assigned` as of the last report */
    uint32_t open;     /* connections that its server reported */
    uint32_t figure;   /* load that its server reported, thousandths */
};

/* A position in a sequence, which outlives the pool; on a cache line of its own.  0 at first; policies alone write it. */
struct crab_turn {
    uint64_t next;
    uint64_t pad[7];
};

struct crab_member {
    uint16_t backend;
    uint16_t pad;
    uint32_t weight; /* at least 1 */
    struct crab_load *load; /* must outlive the pool */
};

struct crab_pool;

/* Names of the policies, by number from 0; NULL: there is no such number. */
const char *crab_policy_name(uint32_t i);
/* Copies the members; at most 65,535.  `turn` must outlive the pool.  NULL without memory, or if there is no such policy. */
struct crab_pool *crab_pool_new(const char *policy, const struct crab_member *members, uint32_t count,
                                struct crab_turn *turn);
/* When every snapshot that has it was freed. */
void crab_pool_free(struct crab_pool *pool);
/* Choose n backends (at most CRAB_BATCH), one after the other, and count them as assigned.  random: the state of the
 * caller's random numbers, any number at first.  From any thread, at the same time as any other.  Returns n, or 0 if there
 * are no members. */
uint32_t crab_pool_pick(struct crab_pool *pool, uint64_t *random, uint16_t *backends, uint32_t n);
/* Take the loads as they are now into account.  One thread at a time, while others pick. */
void crab_pool_refresh(struct crab_pool *pool);

/* ---- snapshot: what the workers look up, immutable ---- */

#define CRAB_MODE_NEGOTIATED 0
#define CRAB_MODE_ALWAYS 1
#define CRAB_MODE_NEVER 2

#define CRAB_ON_DEAD_REASSIGN 0 /* a dead backend's flows go to another (which will reset them, if they are not stateless) */
#define CRAB_ON_DEAD_RESET 1    /* we reset them */

#define CRAB_FALLBACK_AUTO 0 /* by MAC address where the backend is on the segment, else encapsulated */
#define CRAB_FALLBACK_L2 1
#define CRAB_FALLBACK_IPIP 2

#define CRAB_BACKEND_USABLE 1  /* its next hop is known: frames may be sent to it */
#define CRAB_BACKEND_CR 2      /* speaks connection redirection */
#define CRAB_BACKEND_ON_LINK 4 /* on the served segment, so that DSR by MAC address reaches it */
#define CRAB_BACKEND_V6 8      /* its address is an IPv6 one */
#define CRAB_BACKEND_DEAD 16   /* its connections are lost: never usable */
#define CRAB_BACKEND_EXCEPTED 32 /* some service has an exception for it; filled in by crab_snapshot_new */

struct crab_backend {
    uint8_t addr[16];
    uint8_t dst_mac[6];
    uint8_t src_mac[6];
    uint32_t flags;
    uint8_t tunnel_src[16]; /* outer source address of packets encapsulated for it, of the family of addr */
    uint32_t mtu;           /* of the way to it: bytes of an IP packet, the outer header included */
    uint32_t ifindex;       /* interface that leads to it */
    uint32_t sum;           /* of addr's words, less the prefix of an IPv4-mapped one; filled in by crab_snapshot_new */
    uint32_t pad;           /* one cache line */
};

struct crab_prefix {
    uint8_t addr[16];
    uint32_t bits; /* 0 to 128; an IPv4 prefix counts its 96 mapped bits too */
};

/* A backend that is otherwise for one service than its flags say. */
struct crab_exception {
    uint16_t backend;
    uint16_t flags; /* CRAB_BACKEND_CR, CRAB_BACKEND_DEAD: count for the service in place of these two of its own */
};

struct crab_service {
    uint8_t addr[16];
    uint16_t port_be;
    uint8_t protocol;
    uint8_t mode;
    uint32_t first_prefix; /* clients that may be redirected: prefixes [first, first + count); count 0: all */
    uint32_t prefix_count;
    uint32_t first_exception; /* likewise; in the order of backends' ids, each once */
    uint32_t exception_count;
    uint8_t fallback; /* CRAB_FALLBACK_* */
    uint8_t on_dead;  /* CRAB_ON_DEAD_* */
    uint8_t source4;  /* the table is asked by this many bits of the client's address alone; 0: by the four-tuple */
    uint8_t source6;
    const uint16_t *table; /* Maglev table, table_size slots; must outlive the snapshot */
    struct crab_pool *pool; /* chooses whom to redirect to; NULL: the table.  Must outlive the snapshot */
    uint32_t index; /* into map `service_counters` */
    uint8_t custom; /* 1: crab_core_ask's function chooses whom to redirect to */
    uint8_t refuses; /* 1: a SYN that no backend can take is answered by a RST */
    uint8_t particular; /* the snapshot's own: it redirects nobody, or not all */
    uint8_t pad;
};

struct crab_snapshot;

/* Copies everything but the services' tables and pools, which must outlive the snapshot; several services and snapshots may
 * have the same.  backends is indexed by backend id, table_size is the length of all tables, in slots.
 *
 * NULL with errno set.  ENOMEM: no memory.  EINVAL: a service's prefixes or exceptions are not all in their array, or its
 * exceptions are not in order, or name a backend that there is not. */
struct crab_snapshot *crab_snapshot_new(const struct crab_service *services, uint32_t service_count,
                                        const struct crab_backend *backends, uint32_t backend_count,
                                        const struct crab_prefix *prefixes, uint32_t prefix_count,
                                        const struct crab_exception *exceptions, uint32_t exception_count,
                                        uint32_t table_size, int form, const uint8_t *key16);
/* Which frames, of those that are no service's, are for crab_core_handle's function.  Copied.  Before the snapshot is
 * published: from then on it does not change, and any number of threads read it. */
void crab_snapshot_match(struct crab_snapshot *snapshot, const struct crab_matches *matches);
/* What is done about packets to these addresses that are no service's, nor a handler's (see CRAB_VIP_*): whether echo requests
 * are answered, and whether the rest gets a RST or an ICMP error.  Copied; before the snapshot is published.  Returns 0, or -1
 * without memory. */
int crab_snapshot_answer(struct crab_snapshot *snapshot, const struct crab_address *vips, uint32_t count, bool ping,
                         bool reset);
/* Which packets are shown (see "tap").  Copied; before the snapshot is published. */
void crab_snapshot_tap(struct crab_snapshot *snapshot, const struct crab_taps *taps);
/* When crab_core_uses says no of every core that it was published to. */
void crab_snapshot_free(struct crab_snapshot *snapshot);

/* ---- table: the XDP program's flows, in memory shared with it ---- */

struct crab_table;

/* Map `flows`, mapped at buckets, count (a power of two) of them; the mapping must outlive the table.  Several cores may share
 * one.  NULL without memory. */
struct crab_table *crab_table_new(struct crab_bucket *buckets, uint32_t count);
/* When every core that learns into it was freed. */
void crab_table_free(struct crab_table *table);
/* Write a flow down.  Returns whether there was room, and nobody else was writing: it never waits.  From any thread, at the
 * same time as cores that learn, and as the XDP program. */
bool crab_table_write(struct crab_table *table, const struct crab_flow *flow);

/* ---- joins: MPTCP connections by their tokens, so that the subflows that join them get to their backends ---- */

struct crab_joins;

/* Room for so many tokens (8 bytes each), rounded up; when it is used up, older ones give way.  NULL without memory. */
struct crab_joins *crab_joins_new(uint32_t tokens);
/* When every core that has it was freed. */
void crab_joins_free(struct crab_joins *joins);
/* Forget the connections of all backends and services but these; both: 65536, by id and by index.  Any thread. */
void crab_joins_keep(struct crab_joins *joins, const bool *backends, const bool *services);

/* What the table remembers, crab_joins_size bytes; to have it remember that instead.  While no core uses it. */
uint64_t crab_joins_size(const struct crab_joins *joins);
void crab_joins_give(const struct crab_joins *joins, uint8_t *out);
void crab_joins_take(struct crab_joins *joins, const uint8_t *given);

/* ---- core: one worker's state, and its work on a batch ---- */

/* Another number when what cores and joins remember has another form, or another meaning. */
#define CRAB_MEMORY_FORM 1

/* A core has a thread: the one that is in crab_core_batch.  Others may meanwhile call what is marked "any thread"; what is
 * marked "before batches" is for the time before its first. */

/* What became of packets.  A worker's counters are CRAB_COUNTERS of uint64_t, in this order; only the thread that runs the
 * core or the worker writes them, any thread may read them meanwhile, one by one. */
enum crab_counter {
    CRAB_C_RECEIVED,
    CRAB_C_SENT,
    /* forwarded */
    CRAB_C_REDIRECTED,
    CRAB_C_FALLBACK_NO_OFFER,
    CRAB_C_FALLBACK_MODE,          /* the service's mode is `never` */
    CRAB_C_FALLBACK_PREFIX,        /* client outside the service's redirect_clients */
    CRAB_C_FALLBACK_NO_CR_BACKEND, /* the chosen backend does not speak CR */
    CRAB_C_FALLBACK_UNSAFE,        /* carries data, a Fast Open option, a signature or MP_JOIN */
    CRAB_C_FALLBACK_NO_ROOM,       /* the redirect does not fit into the TCP header, or not into that of the SYN-ACK */
    CRAB_C_FALLBACK_RETRANSMIT,    /* twice its SYN got no answer by redirect, or once by fallback_unsafe */
    CRAB_C_FALLBACK_ESTABLISHED,   /* any packet but a SYN */
    CRAB_C_FALLBACK_ICMP,          /* an ICMP error, to the backend whose packet it quotes */
    /* answered to the client instead */
    CRAB_C_TOO_BIG, /* does not fit on the way: ICMP "fragmentation needed", ICMPv6 "packet too big" */
    CRAB_C_RESET,   /* its backend is dead: RST */
    CRAB_C_REFUSED, /* a SYN to a service none of whose backends can take it: RST */
    CRAB_C_CLOSED,  /* to a VIP's other ports: RST, ICMP "port unreachable" */
    CRAB_C_ECHO,    /* to a VIP: echo reply */
    /* a handler's, beside the services */
    CRAB_C_HANDLER_SENT,
    CRAB_C_HANDLER_KEPT, /* it had what it wanted */
    /* dropped */
    CRAB_C_DROP_NOT_SERVICE,
    CRAB_C_DROP_MALFORMED,
    CRAB_C_DROP_FLAGS,    /* SYN together with ACK, RST or FIN */
    CRAB_C_DROP_CHECKSUM, /* wrong IPv4 header or TCP checksum */
    CRAB_C_DROP_MAPPED,   /* IPv6 with an IPv4-mapped address, which there is none of on the wire */
    CRAB_C_DROP_CLOSED,   /* to a VIP, but no service's; of a kind that is not answered */
    CRAB_C_DROP_RATE,     /* it would have been answered, but enough others were in this second */
    CRAB_C_DROP_NO_BACKEND,
    CRAB_C_DROP_NO_PATH,  /* a fallback packet whose backend is behind a gateway, where DSR by MAC cannot reach it */
    CRAB_C_DROP_TOO_BIG,  /* does not fit on the way, and may be fragmented: that is for the sender to do */
    CRAB_C_DROP_HOPS,     /* no hop is left (TTL, hop limit) to forward it by MAC address */
    CRAB_C_DROP_SENT_BACK, /* from the backend that it would be sent to by MAC address, which is not its source */
    CRAB_C_DROP_HANDLER,  /* its handler failed */
    CRAB_C_DROP_TX,       /* the kernel refused to send */
    /* seen on the way, beside one of the above */
    CRAB_C_REASSIGNED,   /* packets of a flow whose backend is dead, sent to another */
    CRAB_C_LEARNED,      /* flows given to the XDP program */
    CRAB_C_ENCAPSULATED, /* fallback packets sent as IP in IP */
    CRAB_C_RETRANSMITTED_SYN,
    CRAB_C_FORGED_OPTION, /* a client sent a redirect; it was removed or overwritten */
    CRAB_C_MPTCP,         /* SYNs of clients that speak MPTCP (MP_CAPABLE) */
    CRAB_C_MPTCP_JOIN,    /* SYNs that join an MPTCP connection (MP_JOIN) */
    CRAB_C_MPTCP_JOIN_KNOWN, /* those of them whose connection's backend is known by the token */
    CRAB_C_FLOWS_FULL,    /* no room to remember a SYN */
    /* the kernel's own, of the worker's socket: as struct crab_xsk_stats, once a second */
    CRAB_C_XSK_RX_DROPPED,
    CRAB_C_XSK_RX_INVALID,
    CRAB_C_XSK_TX_INVALID,
    CRAB_C_XSK_RX_FULL,
    CRAB_C_XSK_FILL_EMPTY,
    CRAB_COUNTERS
};

/* Bytes that must be free in front of every frame given to crab_core_batch: a frame grows at its front. */
#define CRAB_HEADROOM 64
#define CRAB_BATCH 64

struct crab_frame {
    uint8_t *data; /* first byte; moves when the frame is rewritten */
    uint32_t len;  /* 0 after the batch: dropped */
    uint32_t ifindex; /* interface that it came in by; after the batch: the one to send it on */
};

struct crab_core;

/* flows: capacity of the flow cache in entries (16 bytes each), rounded up to a power of two, at least 64.
 * counters: CRAB_COUNTERS of uint64_t, which must outlive the core.  NULL without memory. */
struct crab_core *crab_core_new(uint32_t flows, uint64_t *counters);
/* The snapshot, the table and the counters stay their owners'. */
void crab_core_free(struct crab_core *core);

/* Give the core another snapshot, or NULL: drop everything, as at first.  Any thread, but one at a time; it does not wait for
 * the batch under way.  The one before may be freed when crab_core_uses says no. */
void crab_core_publish(struct crab_core *core, struct crab_snapshot *snapshot);
/* Whether it is published, or a batch under way works with it.  Any thread. */
bool crab_core_uses(const struct crab_core *core, const struct crab_snapshot *snapshot);

/* Its flow cache: an array, and how many bytes.  While no thread uses the core they may be another core's of the same size,
 * and of the same CRAB_MEMORY_FORM. */
uint8_t *crab_core_flows(struct crab_core *core, uint64_t *bytes);

/* Which of its parts, of CRAB_PART bytes, a core may have changed: from its next batch on it sets bits in `touched`, in their
 * order (NULL: no more).  Any thread, which has to wait for the batch that is under way. */
#define CRAB_PART 64
void crab_core_note(struct crab_core *core, uint64_t *touched);
/* Copy the touched parts of a cache of so many bytes. */
void crab_flows_renew(uint8_t *to, const uint8_t *from, const uint64_t *touched, uint64_t bytes);

/* Write the flows that this core decides into a table (or NULL: nowhere), which must outlive the core.  Before batches. */
void crab_core_learn(struct crab_core *core, struct crab_table *table);
/* From now on new flows are written when crab_core_settle is called, by the core's thread: after their packets, which the core
 * was given, have been sent.  Otherwise the XDP program sends the packets that follow before them, and a server that sees data
 * before the ACK that ends the handshake takes an MPTCP connection for TCP.  Before batches. */
void crab_core_put_off(struct crab_core *core);
void crab_core_settle(struct crab_core *core);

/* Learn MPTCP connections' tokens, and send joins by them (NULL: not); the table must outlive the core, and may be several
 * cores'.  Before batches. */
void crab_core_join(struct crab_core *core, struct crab_joins *joins);

/* Remember n flows of map `flows`, so that a SYN of the same four-tuple does not move them.  Before batches. */
void crab_core_adopt(struct crab_core *core, const struct crab_flow *flows, uint32_t n, uint32_t now);

/* Add to counts[backend] how many flows each backend below n has in the core's cache; open: those in CRAB_MEMORY_OPEN alone.
 * Any thread; what the core writes meanwhile may be counted or not. */
void crab_core_count(const struct crab_core *core, uint32_t *counts, uint32_t n, uint32_t now, bool open);

/* What a core remembers of a connection. */
struct crab_memory {
    uint32_t isn_be;  /* of its SYN, if that was seen */
    uint16_t backend;
    uint16_t idle;    /* seconds since its last packet */
    uint8_t state;    /* CRAB_MEMORY_* */
    uint8_t copies;   /* of its SYN */
    uint16_t pad;
};
#define CRAB_MEMORY_SYN 1 /* its client has not acknowledged an answer yet */
#define CRAB_MEMORY_OPEN 2
#define CRAB_MEMORY_ENDING 3

/* Fill in what the core remembers of a connection, by its hash: at most two, of which one at least is pending.  Returns how many.  Any
 * thread; what the core writes meanwhile may be missed. */
uint32_t crab_core_recall(const struct crab_core *core, uint64_t hash, uint32_t now, struct crab_memory found[2]);

/* Work on at most CRAB_BATCH frames where they lie: they stay the caller's, and each has CRAB_HEADROOM bytes in front of it.
 * By the core's thread; it neither waits nor allocates.  Returns how many are to be sent. */
uint32_t crab_core_batch(struct crab_core *core, struct crab_frame *frames, uint32_t count, uint32_t now);

/* ---- tap: what becomes of packets, shown to whoever wants to see it ---- */

/* Have a core show the packets that its snapshot's taps name: it works on each of them by itself then, and writes down a
 * struct crab_tapped, in a ring of so many bytes (a power of two); without room there it counts.  Before a snapshot with taps
 * is published to it, any thread.  Returns 0, or -1 without memory. */
int crab_core_show(struct crab_core *core, uint32_t queue, uint32_t size);
/* Show no more; the ring is freed.  When the core uses no snapshot with taps, any thread. */
void crab_core_hide(struct crab_core *core);
/* Take what is shown: whole records, at most as many bytes as the ring has, into `out`.  Returns how many bytes.  Any thread,
 * but one at a time. */
uint32_t crab_core_shown(struct crab_core *core, uint8_t *out);
/* Packets that there was no room for, since crab_core_show.  Any thread. */
uint64_t crab_core_unshown(const struct crab_core *core);
/* The taps, a bit each, that show a frame, were it sent to this backend (CRAB_NO_BACKEND: to none); left: the kernel gets it. */
uint32_t crab_taps_find(const struct crab_taps *taps, const uint8_t *frame, size_t len, uint16_t backend, bool left);

/* ---- ask: the question to a function, which backend a connection is redirected to ---- */

/* A connection that is to be redirected, for which a function chooses. */
struct crab_choice {
    uint8_t client[16];
    uint8_t vip[16];
    uint16_t cport_be;
    uint16_t vport_be;
    uint32_t service; /* crab_service.index */
    uint64_t hash;
    uint64_t arrival; /* nanoseconds, CLOCK_MONOTONIC */
    uint32_t isn_be;  /* initial sequence number */
    uint16_t backend; /* to be filled in; CRAB_NO_BACKEND, as it is at first: the table decides */
    uint16_t pad;
};

/* Have a function choose for the services whose `custom` is 1: it is called at most once a batch, with all connections that
 * need a choice, by the core's thread; they are its own for the time of the call.  `context` must outlive the core.  Before
 * batches. */
void crab_core_ask(struct crab_core *core, void (*choose)(void *context, struct crab_choice *choices, uint32_t n),
                   void *context);

/* ---- handle: frames of one's own ---- */

/* A frame that is no service's, but a handler's. */
struct crab_handled {
    uint8_t *data;    /* first byte; stays where it is, what it points to may be rewritten */
    uint32_t len;     /* bytes; may be changed, to what fits in the memory that the frame lies in */
    uint32_t ifindex; /* as in struct crab_frame; may be changed */
    uint16_t handler; /* of the first match that holds */
    uint16_t verdict; /* CRAB_HANDLED_*, to be filled in */
    uint32_t pad;
};
#define CRAB_HANDLED_FAILED 0 /* as it is at first */
#define CRAB_HANDLED_SEND 1
#define CRAB_HANDLED_KEPT 2 /* the handler has done with it */

/* Have a function handle the frames that a snapshot's matches name: it is called at most once a batch, by the core's thread;
 * they are its own for the time of the call.  `context` must outlive the core.  Before batches. */
void crab_core_handle(struct crab_core *core, void (*handle)(void *context, struct crab_handled *frames, uint32_t n),
                      void *context);

/* The handler of the first match that holds for a frame, or -1. */
int crab_match_find(const struct crab_matches *matches, const uint8_t *frame, size_t len);

/* ---- xsk: AF_XDP sockets, and the UMEM of one or several ---- */

/* By one thread at a time for all sockets of a UMEM, but for what does not change (fd, memory, zero_copy) and what asks the
 * kernel alone (statistics, error): any thread. */

/* A frame: its address in the UMEM, and its length in bytes.  A packet may lie in several that follow each other, if the
 * socket was made with CRAB_BIND_FRAGS. */
struct crab_desc {
    uint64_t addr;
    uint32_t len;
    uint32_t more; /* 1: the packet goes on in the next one */
};

struct crab_xsk_stats { /* frames since the socket was made; linux/if_xdp.h, struct xdp_statistics */
    uint64_t rx_dropped;
    uint64_t rx_invalid_descs;
    uint64_t tx_invalid_descs;
    uint64_t rx_ring_full;
    uint64_t rx_fill_ring_empty_descs;
    uint64_t tx_ring_empty_descs;
};

/* Where a UMEM's frames are, and how many; all = the sum of the others.  Those of closed sockets are not counted. */
struct crab_xsk_places {
    uint32_t all, free, receiving, held, sending;
};

#define CRAB_BIND_COPY 2        /* XDP_COPY */
#define CRAB_BIND_ZEROCOPY 4    /* XDP_ZEROCOPY */
#define CRAB_BIND_NEED_WAKEUP 8 /* XDP_USE_NEED_WAKEUP */
#define CRAB_BIND_FRAGS 16      /* XDP_USE_SG, where there is that */

/* Bytes behind the UMEM that the kernel does not know of: for whoever puts a packet together. */
#define CRAB_WHOLE 65536

struct crab_umem;
struct crab_xsk;

/* frame_count is a power of two; frame_size is 2048 or 4096.  fd: -1, or a file (memfd_create) of crab_umem_size bytes for the
 * memory, so that another process can have it too.  NULL: no memory. */
struct crab_umem *crab_umem_new(uint32_t frame_count, uint32_t frame_size, int fd);
size_t crab_umem_size(uint32_t frame_count, uint32_t frame_size);
/* Unmaps it: when none of its sockets is left. */
void crab_umem_free(struct crab_umem *umem);
/* frame_count * frame_size bytes, and CRAB_WHOLE behind them; a crab_desc's addr is an offset into them. */
uint8_t *crab_umem_memory(const struct crab_umem *umem);
/* Open sockets. */
uint32_t crab_umem_sockets(const struct crab_umem *umem);
/* For all of them: take back what was sent, and give the kernel free frames to receive into. */
void crab_umem_settle(struct crab_umem *umem);
/* Before a second socket: from now on remember which frames are in which socket's rings.  held: of each frame, whether it
 * is in the caller's hands.  0, or -errno: ENOMEM, or EBUSY, if so many cannot be. */
int crab_umem_share(struct crab_umem *umem, const bool *held);
/* Frames of a closed socket's that the kernel has let go of are free. */
void crab_umem_add(struct crab_umem *umem, const uint64_t *addresses, uint32_t n);

/* A socket with a UMEM, which has to outlive it.  ring_size (entries) is a power of two.  share: NULL for the UMEM's first
 * socket; for another (after crab_umem_share) an open one, like which it is bound.  bind_flags, for the first: CRAB_BIND_*;
 * with neither COPY nor ZEROCOPY, zero-copy is tried first.  On failure: NULL, *error an errno, *stage what was being done (a constant). */
struct crab_xsk *crab_xsk_new(struct crab_umem *umem, const struct crab_xsk *share, uint32_t ifindex, uint32_t queue,
                              uint32_t ring_size, uint32_t bind_flags, int *error, const char **stage);
/* ---- a socket that goes from one process to the next, which has the UMEM's file too ----
 *
 * The one that gives it has stopped using it; rings are the kernel's, so packets that come meanwhile wait in them. */

struct crab_xsk_bound {
    uint32_t ifindex, queue, ring_size, bind_flags;
};
struct crab_xsk_given {
    uint32_t in_fill, in_tx, free_count;
    uint64_t dropped;
};

/* How a socket is bound. */
void crab_xsk_is_bound(const struct crab_xsk *xsk, struct crab_xsk_bound *out);
/* In the next process: get ready for a socket, which is in use still.  fd is its own if that goes well, else see crab_xsk_new. */
struct crab_xsk *crab_xsk_adopt(struct crab_umem *umem, int fd, const struct crab_xsk_bound *bound, int *error,
                                const char **stage);
/* What there is to know of a UMEM's only socket beside its rings; free_frames: room for all frames' addresses. */
void crab_xsk_give(const struct crab_xsk *xsk, struct crab_xsk_given *out, uint64_t *free_frames);
/* From now on it is used here. */
void crab_xsk_take_over(struct crab_xsk *xsk, const struct crab_xsk_given *given, const uint64_t *free_frames);
/* Whether it has been used elsewhere since it was given; if not, it can be used on here. */
bool crab_xsk_moved(const struct crab_xsk *xsk);

/* Closes the socket.  What it had in its rings is not free by that: the kernel may still write to it, and send it. */
void crab_xsk_close(struct crab_xsk *xsk);
/* The same in a child of fork(2), where the socket stays its parent's, the rings are not mapped, and the UMEM is zeros. */
void crab_xsk_forked(struct crab_xsk *xsk);
/* Closes the socket, if it is open. */
void crab_xsk_free(struct crab_xsk *xsk);
/* Of one of several: the addresses of the frames in its rings, at most the UMEM's.  Returns how many. */
uint32_t crab_xsk_in_rings(const struct crab_xsk *xsk, uint64_t *addresses);
/* Whether the kernel has unbound it: its interface is gone, from this network namespace at least. */
bool crab_xsk_unbound(const struct crab_xsk *xsk);
/* Which network namespace it is in (SO_NETNS_COOKIE); 0 before Linux 5.14, which cannot tell. */
uint64_t crab_xsk_namespace(const struct crab_xsk *xsk);
/* Have system calls run the driver for so long, and for so many frames at once, in place of interrupts: af_xdp.rst and
 * SO_PREFER_BUSY_POLL of socket(7).  0, or -errno. */
int crab_xsk_busy_poll(struct crab_xsk *xsk, uint32_t microseconds, uint32_t budget);
/* The socket's, which closes it. */
int crab_xsk_fd(const struct crab_xsk *xsk);
bool crab_xsk_zero_copy(const struct crab_xsk *xsk);
/* Whether packets may lie in several frames. */
bool crab_xsk_frags(const struct crab_xsk *xsk);
/* Whether this kernel has such sockets (Linux 6.6). */
bool crab_xsk_knows_frags(void);

/* Give the kernel free frames to receive into, so that it has half of all, an equal part by each socket; the other half is
 * for sending.  Returns how many. */
uint32_t crab_xsk_refill(struct crab_xsk *xsk);
/* Take up to n received frames, which are the caller's until released or sent.  Returns how many: whole packets only, of
 * which none has more than CRAB_MAX_FRAGS. */
#define CRAB_MAX_FRAGS 64
uint32_t crab_xsk_receive(struct crab_xsk *xsk, struct crab_desc *out, uint32_t n);
/* Take up to n free frames to write into, which are the caller's likewise.  Returns how many. */
uint32_t crab_xsk_take(struct crab_xsk *xsk, struct crab_desc *out, uint32_t n);
/* Give frames of the caller's back unsent. */
void crab_xsk_release(struct crab_xsk *xsk, const struct crab_desc *descs, uint32_t n);
/* Queue up to n of the caller's frames for sending, whole packets only; the rest stay the caller's.  Returns how many. */
uint32_t crab_xsk_send(struct crab_xsk *xsk, const struct crab_desc *descs, uint32_t n);
/* Make the kernel send what is queued.  0, or -errno if the interface is gone. */
int crab_xsk_kick(struct crab_xsk *xsk);
/* Take back the frames that were sent: they are free.  Returns how many. */
uint32_t crab_xsk_reap(struct crab_xsk *xsk);
/* Tell a driver that asks for it that there are frames to receive into, or run it when busy polling: for who turns instead
 * of sleeping in poll(2). */
void crab_xsk_wake(struct crab_xsk *xsk);
/* For callers who may be torn out between any two calls, as Python is by a signal's handler that raises: what has to happen
 * together, with the frames' tickets (crablb/kernel/xsk.py), of which each place in the UMEM has one.
 * Out: up to n received or free frames, as many as are then in *got; these have the ticket from now on. */
void crab_xsk_hand_out(struct crab_xsk *xsk, struct crab_desc *out, uint32_t n, bool received, uint64_t *tickets,
                       uint64_t ticket, uint32_t *got);
/* In: n frames that have the ticket, and lose it; to be sent, as many as are then in *sent, the rest is released.  0;
 * -EEXIST if one has another ticket, or is there twice: nothing is done; or -errno if the interface is gone. */
int crab_xsk_hand_in(struct crab_xsk *xsk, const struct crab_desc *descs, uint32_t n, bool send, uint64_t *tickets,
                     uint64_t ticket, uint32_t *sent);
/* The socket's pending error (an errno), taken; 0 if there is none.  When its interface is unregistered a socket gets
 * ENETDOWN, but poll(2) does not tell. */
int crab_xsk_error(const struct crab_xsk *xsk);
/* Frames that the kernel took for sending and dropped. */
uint64_t crab_xsk_dropped(const struct crab_xsk *xsk);
/* 0, or -errno. */
int crab_xsk_statistics(const struct crab_xsk *xsk, struct crab_xsk_stats *out);
void crab_umem_frames(const struct crab_umem *umem, struct crab_xsk_places *out);
/* The same of the frames in this socket's rings. */
void crab_xsk_frames(const struct crab_xsk *xsk, uint32_t *receiving, uint32_t *sending);
/* Whether every frame is in one place, if no socket was closed.  Always, unless there is a bug. */
bool crab_xsk_conserved(const struct crab_xsk *xsk);

/* ---- worker: one queue, one thread ---- */

struct crab_worker;

/* The worker uses the socket, the core and its counters, which must outlive it, and frees none of them.  Frames for other
 * interfaces than the socket's go out by a packet socket.  NULL with errno set: no memory or descriptor, or no right to a
 * packet socket. */
struct crab_worker *crab_worker_new(struct crab_xsk *xsk, struct crab_core *core, uint64_t *counters);
void crab_worker_free(struct crab_worker *worker);
/* Before the socket is closed that another one is to follow, when the worker runs no more: what is in its rings and was
 * neither taken nor sent is lost, and counted so. */
void crab_worker_lose(struct crab_worker *worker);

/* Before it runs: all frames go out by the packet socket, as those of a queue that only receives. */
void crab_worker_send_elsewhere(struct crab_worker *worker);

/* Before it runs: turn for so long before a sleep, when frames came soon after the last one.  At first: 0, never. */
void crab_worker_spin(struct crab_worker *worker, uint32_t microseconds);

/* How a worker's rounds were: what it took off the RX ring at once, worked on, and gave to the kernel again.  In powers of two:
 * place i of `sizes` counts the rounds of more than 2^(i-1) and at most 2^i frames; place i of `times` counts frames whose
 * round took more than 2^(i-1) and at most 2^i times CRAB_ROUND_NS nanoseconds, the first one also all below, the last all
 * above.  Every round has a size; one in CRAB_ROUND_SAMPLE has a time. */
#define CRAB_ROUND_SIZES 9
#define CRAB_ROUND_TIMES 18
#define CRAB_ROUND_NS 256
#define CRAB_ROUND_SAMPLE 64
struct crab_rounds {
    uint64_t sizes[CRAB_ROUND_SIZES];
    uint64_t times[CRAB_ROUND_TIMES];
    uint64_t frames;   /* of all rounds */
    uint64_t timed_ns; /* sum of what `times` counts */
};

/* Before it runs: count its rounds there, too; any thread may read them meanwhile, one by one.  At first: nowhere. */
void crab_worker_rounds(struct crab_worker *worker, struct crab_rounds *rounds);

/* Receive, work, send; sleep while there is nothing to do.  The calling thread is the core's, and the socket's.  Returns 0
 * after crab_worker_stop, or -errno when the socket fails (the interface is gone). */
int crab_worker_run(struct crab_worker *worker);
/* One round, likewise: wait at most timeout_ms (and at most a second) for frames, and work on them.  Returns how many were
 * received, or -errno. */
int crab_worker_once(struct crab_worker *worker, int timeout_ms);
/* From any thread: make crab_worker_run return, now or when it is called. */
void crab_worker_stop(struct crab_worker *worker);
/* From any thread: how often crab_worker_run has turned.  A thread that lives does so once a second at the least, and soon
 * after it is woken; one that is in a policy or a handler does not. */
uint64_t crab_worker_turns(const struct crab_worker *worker);
void crab_worker_wake(struct crab_worker *worker);

#endif
