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

/* BPF programs have no calls to spare. */
#define CRAB_INLINE static inline __attribute__((always_inline))

/* The CR option (kinds, and lengths without padding). */
#define CRAB_OPT_KIND 42
#define CRAB_OPT_KIND_EXPERIMENTAL 253
#define CRAB_OPT_EXID 0x4352
#define CRAB_FORM_CRAB 0
#define CRAB_FORM_EXPERIMENTAL 1

/* ---- load balancer (lb.bpf.c) ---- */

/* What a packet is to valid.h. */
enum crab_verdict {
    CRAB_V_OK,
    CRAB_V_NOT_TCP,    /* not IPv4 or IPv6 with TCP */
    CRAB_V_FRAGMENT,   /* IPv4 fragment (IPv6 fragments have an extension header) */
    CRAB_V_IP_OPTIONS, /* IPv4 options or IPv6 extension headers */
    CRAB_V_MALFORMED   /* truncated, or lengths that contradict each other */
};

/* A TCP checksum. */
#define CRAB_CSUM_OK 0
#define CRAB_CSUM_PARTIAL 1 /* the field holds the folded pseudo-header sum: the sender left it to its network card */
#define CRAB_CSUM_BAD 2

#define CRAB_MAX_SERVICES 65536
#define CRAB_MAX_QUEUES 256 /* of all interfaces together */
#define CRAB_MAX_INTERFACES 64

/* Value of map `interfaces` (key: ifindex, __u32): where its queues are in `sockets` and `worker_counters`. */
struct crab_queues {
    __u32 first;
    __u32 count;
};

/* Value of maps `macs` and `dsr_macs` (key: ifindex, __u32): the MAC addresses to which what comes in by an interface is sent,
 * as numbers whose lowest byte is the first; all are filled, with one of them again if need be. */
#define CRAB_MAX_MACS 16
struct crab_macs {
    __u64 list[CRAB_MAX_MACS];
};

/* Key of map `services`. */
struct crab_vip {
    __u8 addr[16];
    __be16 port;
    __u8 proto; /* IPPROTO_TCP */
    __u8 pad;
};

/* Value of map `services`: the service's index into map `service_counters`, whose values (per CPU) say what the XDP
 * program forwarded by itself. */
struct crab_service_counters {
    __u64 packets;
    __u64 bytes; /* of frames, as they came */
};

/* What SYNs a service takes: a bucket of tokens.  One word, so that a change of it is seen whole.  0: all. */
struct crab_rate {
    __u32 token_ns; /* in which there is another token */
    __u32 burst;    /* that it holds: SYNs at once */
};

/* Value of map `limits` (index: a service's), of all CPUs together.  What the bucket has is told by the time (CLOCK_MONOTONIC) at
 * which it will be full (the virtual scheduling of ITU-T I.371), which the XDP program alone writes. */
struct crab_limit {
    __u64 full_ns;
    struct crab_rate rate;
};

/* Value of map `vips` (key: struct crab_address): which packets to a VIP's address that are no service's are user space's, to
 * answer or to drop.  An address of this machine is not in it: those the kernel answers. */
#define CRAB_VIP_ECHO 1   /* echo requests */
#define CRAB_VIP_CLOSED 2 /* TCP; and of the rest what the kernel had, and sent back to the network */
#define CRAB_VIP_ALL 4    /* the rest at once */

/* A 16-byte address as a key by itself. */
struct crab_address {
    __u8 addr[16];
};

/* The only value of map `hashing`: how connections are found in map `flows`. */
struct crab_hashing {
    __u64 key[2]; /* of SipHash-1-3 */
    __u32 mask;   /* buckets of `flows` - 1 */
    __u32 pad;
};

#define CRAB_FLOW_OPEN 1
#define CRAB_FLOW_ENDING 2 /* a FIN or a RST was seen */
/* Its SYN was not seen, and no packet in another second than its first.  Another load balancer's connection begins so here, and
 * so does what anybody makes up by the million: it gives way to others. */
#define CRAB_FLOW_LONE 3

/* Seconds without a packet after which a flow is forgotten.  A Linux client's last SYN retransmission comes 63 s after
 * the first copy (six retries); an established connection sends a keep-alive at the latest every 7,200 s, if it asked
 * for them. */
#define CRAB_AGE_SYN 75
#define CRAB_AGE_OPEN 7800
/* And after which one of which a FIN or a RST was seen gives way to others.  It is not forgotten sooner: anybody may send a
 * FIN, and who has sent one may be silent for long while the other side speaks. */
#define CRAB_AGE_ENDING 120

/* An age above this is none: the packet's clock was read a little before that of another CPU, which wrote `seen`. */
#define CRAB_AGE_NEGATIVE 0xff00

#define CRAB_FLOW_TUNNEL 1 /* encapsulated; else by MAC address */
#define CRAB_FLOW_ASK 2    /* a SYN came: user space decides anew about the flow's next packet */

/* A connection that goes by fallback, in map `flows`: made by user space, kept current by the XDP program.  It is known by
 * the hash of its four-tuple alone, which nobody can steer who does not know the key.  Written are the words: first `hash`
 * as 0, then the second, then `hash`; who reads looks at `hash` again in the end. */
struct crab_flow {
    __u64 hash;    /* 0: free */
    __u16 backend; /* index into map `paths` */
    __u16 service; /* index into map `service_counters` */
    __u16 seen;    /* second of the last packet, CLOCK_MONOTONIC_COARSE, modulo 2^16 */
    __u8 state;    /* CRAB_FLOW_OPEN, CRAB_FLOW_ENDING, CRAB_FLOW_LONE */
    __u8 flags;    /* CRAB_FLOW_TUNNEL, CRAB_FLOW_ASK */
};

/* Value of map `flows`: the flows whose hash ends in its index.  One cache line. */
#define CRAB_BUCKET 4
struct crab_bucket {
    struct crab_flow flows[CRAB_BUCKET];
};

/* What the XDP program does with a TCP checksum that the sender left to its network card, as a virtual neighbour (veth,
 * virtio) does.  A native program's frame is all that there is of the packet.  In generic mode there is a socket buffer
 * too, which says still that the checksum is left: the interface that it is sent by does it, and would sum up one that is
 * there already. */
#define CRAB_PARTIAL_ASK 0 /* nothing: user space does it */
#define CRAB_PARTIAL_FINISH 1
#define CRAB_PARTIAL_KEEP 2

/* What leaves zero-copy memory is copied by the kernel, with just the bytes in front that are its metadata
 * (xdp_convert_zc_to_xdp_frame).  A driver that puts a header of its own there, as virtio_net does, drops what has less. */
#define CRAB_ROOM 16

/* Value of map `paths` (index: a backend's id): whose it is, and how frames get there.  One cache line. */
struct crab_path {
    __u8 addr[16];
    __u8 tunnel_src[16];
    __u8 macs[12]; /* destination, source */
    __u32 mtu;
    __u32 ifindex; /* interface to send on */
    __u8 v6;       /* 1: the outer header is an IPv6 one */
    __u8 tx;       /* 1: what came in by that interface may go out again by XDP_TX */
    __u8 redirect; /* 1: the interface takes what is sent by XDP_REDIRECT; with neither, user space forwards */
    __u8 partial;  /* CRAB_PARTIAL_* */
    __u8 frags;    /* 1: the interface takes frames of several buffers, too, by XDP_REDIRECT */
    __u8 room;     /* 1: frames may lie in zero-copy memory: they leave with CRAB_ROOM bytes in front */
    __u8 pad[6];
};

/* Which frames a handler takes: those that have all the fields named.  Also what a frame has. */
#define CRAB_MATCH_ETHERTYPE 1
#define CRAB_MATCH_PROTO 2
#define CRAB_MATCH_PORT 4
#define CRAB_MATCH_ADDR 8
struct crab_match {
    __u8 addr[16]; /* destination address */
    __be16 ethertype;
    __be16 port; /* destination port */
    __u8 proto;
    __u8 fields; /* CRAB_MATCH_* */
    __u16 handler;
};

/* The only value of map `handlers`, if there are any: the first match counts. */
#define CRAB_MAX_MATCHES 16
struct crab_matches {
    struct crab_match list[CRAB_MAX_MATCHES];
    __u32 count;
};

/* Which packets a tap shows: those that have all that is named.  Addresses are compared under their masks. */
#define CRAB_TAP_FOUR 1 /* IPv4 alone */
#define CRAB_TAP_SIX 2
#define CRAB_TAP_VPORT 4
#define CRAB_TAP_PORT 8
#define CRAB_TAP_BACKEND 16
struct crab_tap {
    __u8 client[16];
    __u8 client_mask[16];
    __u8 vip[16];
    __u8 vip_mask[16];
    __be16 vport;  /* the VIP's */
    __be16 port;   /* of either side */
    __u16 backend; /* id of the one that it was sent to */
    __u8 fields;   /* CRAB_TAP_*; 0: no condition, and then not what is left to the kernel */
    __u8 pad;
};

/* The only value of map `taps`. */
#define CRAB_MAX_TAPS 4
#define CRAB_TAP_SNAP 2048
struct crab_taps {
    struct crab_tap list[CRAB_MAX_TAPS];
    __u64 until_ns; /* of the XDP program: it shows nothing later (CLOCK_MONOTONIC) */
    __u32 count;
    __u32 snap; /* bytes of a frame that are shown, at most CRAB_TAP_SNAP */
};

/* What became of a packet: a record, behind which come the first bytes of the frame as it came in, and then as it went out. */
#define CRAB_TAPPED_KNOWN 1   /* a worker's flow cache knew the connection */
#define CRAB_TAPPED_WRITTEN 2 /* so did map `flows` */
#define CRAB_TAPPED_OFFER 4   /* a SYN with an offer */
#define CRAB_TAPPED_CHOSEN 8  /* a policy chose the backend; else a table */
#define CRAB_TAPPED_SERVICE 16 /* of a service */
struct crab_tapped {
    __u64 at_ns; /* CLOCK_MONOTONIC, when work on it began */
    __u64 done_ns;
    __u64 counters; /* bit n: counter n of enum crab_xdp_counter, or of a worker's enum crab_counter, counted it */
    __u32 size;     /* bytes of the record, with what is behind it, to the next multiple of eight */
    __u32 in_ifindex;
    __u32 out_ifindex;
    __u32 in_len; /* bytes of the frames */
    __u32 out_len; /* 0: nothing went out */
    __u16 in_kept; /* bytes of them that follow */
    __u16 out_kept;
    __u16 backend; /* id of the one that it was sent to; 65535: none */
    __u16 queue;
    __u8 taps;    /* bit n: tap n shows it */
    __u8 xdp;     /* 1: by the XDP program alone, whose verdict is this */
    __u8 verdict;
    __u8 flags; /* CRAB_TAPPED_* */
};

/* What the XDP program did with a packet: index into map `xdp_counters` (per CPU, __u64 each). */
enum crab_xdp_counter {
    CRAB_XDP_PASS_NOT_VIP,      /* not a VIP's: given to the kernel untouched */
    CRAB_XDP_PASS_FRAGMENT,     /* IP fragment: its ports cannot be known */
    CRAB_XDP_PASS_IP_OPTIONS,   /* IPv4 options or IPv6 extension headers */
    CRAB_XDP_PASS_MALFORMED,    /* truncated headers */
    CRAB_XDP_SYN,               /* a VIP's SYN, handed to its AF_XDP socket */
    CRAB_XDP_OTHER,             /* any other TCP packet of a VIP, handed to its AF_XDP socket */
    CRAB_XDP_ICMP,              /* an ICMP error about a VIP's packet, handed to an AF_XDP socket */
    CRAB_XDP_HANDLER,           /* no VIP's, but a handler's: handed to an AF_XDP socket */
    CRAB_XDP_FLOW,              /* a known flow's packet, forwarded by the program alone */
    CRAB_XDP_DROP_NO_SOCKET,    /* a VIP's packet, and no daemon has a socket on this queue */
    CRAB_XDP_DROP_HOPS,         /* a known flow's packet that has no hop left (TTL, hop limit) */
    CRAB_XDP_DROP_SENT_BACK,    /* a known flow's packet, from the backend that it would be sent to, which is not its source */
    CRAB_XDP_PASS_OTHER_MAC,    /* sent to another machine's MAC address: given to the kernel, which drops it */
    CRAB_XDP_VIP,               /* to a VIP, but no service's, handed to an AF_XDP socket to be answered or dropped */
    CRAB_XDP_DROP_MAPPED,       /* to an IPv4 VIP, or from an IPv4 address, but in an IPv6 header (IPv4-mapped) */
    CRAB_XDP_DROP_SYN_RATE,     /* a service's SYN, above the rate that it takes */
    CRAB_XDP_COUNTERS
};

/* Value of map `worker_counters`, one a queue: see enum crab_counter in native/crablb.h, which fits in.  Two queues never
 * share a cache line. */
#define CRAB_WORKER_COUNTERS 64
struct crab_worker_counters {
    __u64 n[CRAB_WORKER_COUNTERS];
};

/* What befell the daemon: index into map `daemon_counters` (__u64 each).  A log line tells of each. */
enum crab_daemon_counter {
    CRAB_DAEMON_RELOADS,         /* configurations applied */
    CRAB_DAEMON_RELOADS_REFUSED, /* configurations refused */
    CRAB_DAEMON_BACKENDS_LOST,   /* backends whose next hop stopped answering */
    CRAB_DAEMON_BACKENDS_MOVED,  /* changes of a backend's (or its gateway's) MAC address */
    CRAB_DAEMON_VIPS_IN_USE,     /* times that somebody else on the segment claimed a VIP, once in 10 s each */
    CRAB_DAEMON_VIPS_TAKEN,      /* times that a VIP was taken, as nobody else had it */
    CRAB_DAEMON_VIPS_YIELDED,    /* times that a VIP was left to somebody else */
    CRAB_DAEMON_TASKS_FAILED,    /* times that a background task failed, and was begun anew */
    CRAB_DAEMON_NARROW_TUNNELS,  /* tunnels found too narrow for IPv6 */
    CRAB_DAEMON_FLOWS_NEARLY_FULL, /* sweeps that found map `flows` nearly full */
    CRAB_DAEMON_CACHE_FULL,      /* sweeps since whose predecessor a worker's flow cache had no room */
    CRAB_DAEMON_POLICY_FAILED,   /* batches for which a policy in Python raised, or returned nonsense */
    CRAB_DAEMON_HANDLER_FAILED,  /* batches for which a handler raised, or returned nonsense */
    CRAB_DAEMON_REPORTS,         /* servers' reports taken */
    CRAB_DAEMON_REPORTS_UNKNOWN, /* refused: of no backend of ours */
    CRAB_DAEMON_REPORTS_MALFORMED,
    CRAB_DAEMON_REPORTS_FORGED,   /* refused: not under the backend's key */
    CRAB_DAEMON_REPORTS_REPLAYED, /* refused: older than the last one */
    CRAB_DAEMON_REPORTS_SILENT,   /* servers that stopped reporting */
    CRAB_DAEMON_REDIRECTS_STOPPED, /* times that a backend completed no redirects, and got the fallback alone */
    CRAB_DAEMON_XSK_DROPPED, /* sweeps since whose predecessor the kernel dropped packets in front of a worker */
    CRAB_DAEMON_INTERFACES_LOST,  /* times that an interface served was gone */
    CRAB_DAEMON_INTERFACES_UNSERVED, /* times that an interface, or some of its queues, could not be served */
    CRAB_DAEMON_SERVICES_IDLE, /* services found configured without a backend that takes new connections */
    CRAB_DAEMON_BACKENDS_UNHEALTHY, /* times that checks took a backend of a service out */
    CRAB_DAEMON_PANICS,         /* times that too little of a service was healthy, and health was disregarded */
    CRAB_DAEMON_QUORUMS_LOST,   /* times that a VIP was withdrawn for want of healthy backends */
    CRAB_DAEMON_CHANGES,        /* changes at run time, by the API */
    CRAB_DAEMON_STATE_UNSAVED,  /* times that such changes could not be written down */
    CRAB_DAEMON_TAKEOVERS_FAILED, /* times that another process was to take over, and this one served on */
    CRAB_DAEMON_COUNTERS
};

/* ---- server endpoint (server.bpf.c) ---- */

enum crab_server_counter {
    CRAB_SERVER_ECHOED,       /* SYN-ACKs that carried a redirect back */
    CRAB_SERVER_UNKNOWN_VIP,  /* SYNs whose redirect names a VIP and port that this server was not told of */
    CRAB_SERVER_NO_ROOM,      /* SYN-ACKs whose options left no room */
    CRAB_SERVER_ARMED,        /* listeners prepared */
    CRAB_SERVER_FAST_OPEN,    /* redirected SYNs with data or a Fast Open cookie: dropped, or the redirect not echoed */
    CRAB_SERVER_COUNTERS
};

/* Value of map `server_connections` (key: struct crab_vip): connections to it that were established, and that ended.  One
 * is open while its application may still answer: until it says FIN, or the connection is lost. */
struct crab_connections {
    __u64 opened;
    __u64 closed;
};

/* Value of map `server_redirects` (key: struct crab_vip): redirected SYNs answered (not by cookies: nobody knows then what
 * becomes of them; and no load balancers' checks), and connections that came of them. */
struct crab_redirects {
    __u64 begun;
    __u64 completed;
};

/* ---- direct server return on the server (dsr.bpf.c; key of map `dsr_vips`: struct crab_address) ---- */

enum crab_dsr_counter {
    CRAB_DSR_DECAPSULATED, /* packets whose outer header was taken off */
    CRAB_DSR_NOT_VIP,      /* IP in IP, but not to a VIP of ours: left to the kernel */
    CRAB_DSR_CLAMPED,      /* SYN-ACKs whose MSS was lowered */
    CRAB_DSR_OTHER_MAC,    /* IP in IP to another machine's MAC address: left to the kernel, which drops it */
    CRAB_DSR_MARKED,       /* packets whose outer header's congestion mark (CE, ECT(1)) the inner one got */
    CRAB_DSR_DROP_MARKED,  /* packets marked CE outside whose sender does not know of marks */
    CRAB_DSR_DROP_SOURCE,  /* IP in IP to a VIP, from an address that no load balancer has */
    CRAB_DSR_COUNTERS
};

/* ---- client endpoint (client.bpf.c) ---- */

/* Redirected connections that there is room for, if nobody says otherwise: 20,000 new ones a second, each closed by the
 * client and kept for 10 to 15 s more, as it is when the room gets short. */
#define CRAB_CLIENT_FLOWS 524288

/* The only value of map `client_settings`. */
#define CRAB_CLIENT_RETRIES 7
struct crab_client_settings {
    __u64 netns_cookie;   /* SO_NETNS_COOKIE of the network namespace whose connections may offer */
    __u64 backoff_ns;     /* how long a VIP gets no offers after the first failure; doubled by each that follows */
    __u64 backoff_max_ns; /* but never longer than this */
    __u64 proven_ns;      /* how long a backend is known to hear us after it has shown it */
    __u32 flows;          /* size of map `client_flows` */
    __u32 hz;             /* jiffies a second */
    __u32 offering;       /* 0: no new offers; what is redirected is translated to its end */
    __u32 rto;            /* jiffies after which a SYN that offered is sent again; 0: as the system does */
    /* How much oftener, so that a VIP which does not answer at all is given up no sooner than without an offer: for sockets
     * that would send a SYN again (TCP_SYNCNT) 1, 2, ... times, the last one for all above. */
    __u8 more[CRAB_CLIENT_RETRIES];
    __u8 pad;
};

/* Why offers came to nothing. */
enum crab_client_failure {
    CRAB_CLIENT_FINE,
    CRAB_CLIENT_LOST,      /* no redirect came; the fallback served, after a retransmission */
    CRAB_CLIENT_ROUTE,     /* the SYN left by another route than the agent's */
    CRAB_CLIENT_SOURCE,    /* the redirect came from outside the backend prefixes */
    CRAB_CLIENT_NO_ECHO,   /* the backend answered without the redirect */
    CRAB_CLIENT_NOT_TAKEN, /* the redirect came in, but this host dropped it before its socket (rp_filter, firewall) */
    CRAB_CLIENT_REFUSED,   /* a RST or an ICMP error answered the redirected SYN, before the fallback was asked */
    CRAB_CLIENT_SILENT     /* the redirect came, and then nothing from the backend: it does not hear us */
};

/* What happened in this minute and in the one before, for a figure of the last sixty seconds. */
#define CRAB_CLIENT_MINUTE_NS 60000000000
struct crab_client_minute {
    __u64 since_ns; /* when this one began */
    __u32 now[4];   /* offered (a VIP alone), taken, completed, failed */
    __u32 before[4];
};
#define CRAB_CLIENT_MINUTE_OFFERED 0
#define CRAB_CLIENT_MINUTE_TAKEN 1
#define CRAB_CLIENT_MINUTE_COMPLETED 2
#define CRAB_CLIENT_MINUTE_FAILED 3

/* How redirects fare.  Times are of CLOCK_MONOTONIC.  While `until_ns` is not 0, failures are remembered: before it there
 * are no offers, after it one connection tries (at a time, see `trial_ns`).  A redirect that works ends that. */
struct crab_client_health {
    __u64 since_ns; /* the first failure of those in a row */
    __u64 until_ns;
    __u64 trial_ns;
    __u64 proven_ns; /* when last something came back for what we sent; 0: never, or not since a failure */
    __u64 completed; /* redirects after which the backend spoke */
    __u64 failed;    /* offers that came to nothing */
    __u32 failures;  /* in a row; what comes while nothing is offered does not count */
    __u32 reason;    /* CRAB_CLIENT_FINE, ... */
    struct crab_client_minute minute;
};

/* Value of map `client_vips` (key: struct crab_vip). */
struct crab_client_vip {
    __u32 form; /* CRAB_FORM_* */
    __u32 rtt_us; /* round-trip time of its connections, rather too long than too short */
    __u64 offered; /* offers that were answered, or given up */
    __u64 taken;   /* redirects that sockets took */
    struct crab_client_health health;
    __u8 blamed[16]; /* the backend whose failure holds offers back; zero: not one's alone */
};

/* Key of map `client_paths`, whose value is a struct crab_client_health: a VIP's redirects to one backend. */
struct crab_client_path {
    __u8 vip[16];
    __u8 dip[16];
    __be16 port;
    __u8 proto;
    __u8 pad;
};

/* Key of map `client_backends`, an LPM trie of the prefixes that backends may have.  Its value is the prefix' family, 4 or 6. */
struct crab_lpm {
    __u32 bits; /* an IPv4 prefix counts its 96 mapped bits too */
    __u8 addr[16];
};

/* Connections of one local address and port to one remote port, whatever the remote address: key of map `client_flows`.
 * A packet of either direction has it, translated or not. */
struct crab_client_ports {
    __u8 local[16];
    __be16 lport;
    __be16 rport;
};

/* Value of map `client_flows`: whose the ports are, and what became of its offer. */
struct crab_client_flow {
    __u64 owner;   /* cookie of the first socket that has the ports; 0: it has ended; CRAB_CLIENT_GONE: being deleted */
    __u64 ends_ns; /* of one that is taken: when its translation ends (CLOCK_MONOTONIC), 0: it lives; before: when its SYN left */
    __u8 vip[16];
    __u8 dip[16];  /* the redirect's, from CRAB_CLIENT_HELD on */
    __u32 state;   /* CRAB_CLIENT_FREE, ... */
    __be32 ack;    /* of the answer to its SYN: the initial sequence number + 1 */
    __be32 seq;    /* of the SYN-ACK, by which the socket's state tells whether it took it */
    __u32 diff;    /* from the DIP's checksum to the VIP's */
    __u32 rto;     /* jiffies until the SYN is sent again; 0: the system's */
    __u8 kind;     /* of offer and redirect, */
    __u8 size;     /* and the redirect's length */
    __u8 offer;    /* CRAB_CLIENT_NONE, ... */
    __u8 flag;     /* BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG is ours */
    __u8 syn_count; /* TCP_SYNCNT as it was; 0: it still is */
    __u8 retransmitted; /* the SYN was */
    __u8 left;     /* the SYN went out by the agent's route */
    __u8 again;    /* it was sent again after a redirect came: another one may come in its place */
    __u8 failed;   /* the offer's failure is remembered */
    __u8 said;     /* CRAB_CLIENT_NEW, ... */
    __u8 opening;  /* a connection to a VIP whose SYN is not answered yet: a redirect may come, offered or not */
    __u8 pad;
};
#define CRAB_CLIENT_GONE 1 /* cookies are even larger */

/* What crab_end is told: a connection whose socket is no more, and nobody heard of its end. */
struct crab_client_ended {
    __u64 owner;
    struct crab_client_ports ports;
    __u32 pad;
};

/* An offer's life. */
#define CRAB_CLIENT_NONE 0
#define CRAB_CLIENT_WANTED 1
#define CRAB_CLIENT_ARMED 2 /* the next SYN's options are asked for */
#define CRAB_CLIENT_OUT 3

/* What a flow's state is. */
#define CRAB_CLIENT_FREE 0     /* nothing of an offer */
#define CRAB_CLIENT_WAITING 1  /* the SYN is sent */
#define CRAB_CLIENT_HELD 2     /* a redirect came, and is held until its sender is known to hear us: see client_proof.h */
#define CRAB_CLIENT_ACCEPTED 3 /* and was accepted.  The host may drop it yet, or another answer be faster */
#define CRAB_CLIENT_TAKEN 4    /* and its socket has taken it: what goes out is translated, until it ends */

/* What a backend has said. */
#define CRAB_CLIENT_NEW 0
#define CRAB_CLIENT_SPOKE 1 /* more than its SYN-ACK */
#define CRAB_CLIENT_MUTE 2  /* no more, and it should have by now */

/* Value of map `client_held` (key: struct crab_client_ports): a SYN-ACK that waits until its sender is known to hear us. */
#define CRAB_CLIENT_HEADER 60
struct crab_client_held {
    __u64 asked_ns; /* when the agent's process asked it (CLOCK_MONOTONIC); 0: it has not */
    __u8 tcp[CRAB_CLIENT_HEADER]; /* its TCP header, zeros behind it */
    __u8 pad[4];
};

/* The only value of map `client_verifier`, which the agent's process writes.  Times are of CLOCK_MONOTONIC. */
struct crab_client_verifier {
    __u64 until_ns; /* it answers what it is asked, until then at least */
    __u64 since_ns; /* routes have changed: what was proven before has to be again */
};

/* What the agent's process is asked by ring buffer `client_asks`: to send `remote` an ACK that takes the way of the
 * connection's own, but is answered. */
struct crab_client_ask {
    struct crab_client_ports ports;
    __u8 remote[16];
    __be32 seq;
    __be32 ack;
};

enum crab_client_counter {
    CRAB_CLIENT_OFFERED,          /* SYNs sent with an offer */
    CRAB_CLIENT_REDIRECTED,       /* SYN-ACKs with a redirect accepted */
    CRAB_CLIENT_COMPLETED,        /* redirects after which the backend spoke */
    CRAB_CLIENT_FAILED,           /* offers that came to nothing: see crab_client_failure */
    CRAB_CLIENT_REFUSED_PORT,     /* RSTs from a backend to a redirected SYN */
    CRAB_CLIENT_NO_OFFER_SHARED,  /* no offer: another connection has the same local port and remote port */
    CRAB_CLIENT_NO_OFFER_ROOM,    /* no offer: it, or the redirect, does not fit beside the other options */
    CRAB_CLIENT_NO_OFFER_OPTIONS, /* no offer: data in the SYN, or options that need not survive a redirect */
    CRAB_CLIENT_NO_OFFER_BOUND,   /* no offer: a socket that is bound to an interface, as a translated packet is not */
    CRAB_CLIENT_NO_OFFER_FULL,    /* no offer: too many connections */
    CRAB_CLIENT_NO_OFFER_BACKOFF, /* no offer: those before came to nothing */
    CRAB_CLIENT_VERIFIED,         /* backends that were found to hear us, before a redirect of theirs was taken up */
    CRAB_CLIENT_RETRANSMITTED,    /* SYNs sent again, without their offer: they ask for the fallback */
    CRAB_CLIENT_DROP_SOURCE,      /* answer to a SYN of ours from outside the backend prefixes */
    CRAB_CLIENT_DROP_VIP,         /* SYN-ACK to a SYN of ours whose redirect is missing or names another VIP */
    CRAB_CLIENT_DROP_RESET,       /* RST from the VIP about a redirected connection, which went there by a lost route */
    CRAB_CLIENT_RESET_ROUTE,      /* SYN-ACK refused by RST: the SYN left by another route than the agent's */
    CRAB_CLIENT_RESET_LATE,       /* SYN-ACK refused by RST: another one was accepted before */
    CRAB_CLIENT_RESET_COLLISION,  /* SYN-ACK refused by RST: another local connection has the four-tuple */
    CRAB_CLIENT_PACKETS_IN,       /* translated from DIP to VIP */
    CRAB_CLIENT_PACKETS_OUT,      /* translated from VIP to DIP */
    CRAB_CLIENT_ICMP,             /* ICMP errors translated */
    CRAB_CLIENT_COUNTERS
};

#endif
