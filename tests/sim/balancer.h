/* SPDX-License-Identifier: MIT */
/* A simulated load balancer: bpf/lb.bpf.c, compiled for this machine, in front of native/'s cores.  What is simulated of it is
 * what the kernel and the daemon do: maps, sockets, when a batch begins, which snapshot is published, who adopts what. */
#ifndef SIM_BALANCER_H
#define SIM_BALANCER_H

#include "batch.h"
#include "joins.h"

#define SIM_QUEUES 2
#define SIM_SERVICES 4
#define SIM_BACKENDS 64
#define SIM_IFINDEX 3
#define SIM_ELSEWHERE 4   /* the interface of servers that are not on the segment of the VIPs */
#define SIM_SLOTS 1021
#define SIM_ROOM 2048     /* bytes of a frame's place */
#define SIM_HEADROOM 256  /* of them in front, at first */
#define SIM_WAITING 1024  /* packets in front of a worker: what comes more is lost */

struct frame {
    uint8_t *data;
    uint32_t len;
    uint32_t conn;      /* whose it is, of the simulation's connections; 0: nobody's.  Not in its bytes: nobody but checks looks */
    uint64_t birth;     /* number of the packet that it is */
    uint16_t passes;    /* through load balancers */
    uint8_t hostile;
    uint8_t corrupt;    /* bits were changed on the way */
    uint8_t redirected; /* a load balancer has */
    uint8_t copy;       /* the network sent it twice */
    uint8_t server;     /* that sent what it quotes */
    uint8_t ifindex;    /* at a load balancer; 0: that of clients */
    uint8_t came;       /* by which it came there */
    uint8_t place[SIM_ROOM];
};

/* What the operator and the neighbour table say. */
struct backend_view {
    uint32_t weight;
    bool member, drain, dead, resolved;
};

struct service_setting {
    uint8_t addr[16];
    uint16_t port_be;
    uint8_t mode, fallback, on_dead;
    const char *policy; /* NULL: the table */
};

struct setting {
    uint32_t services, backends;
    struct service_setting service[SIM_SERVICES];
    uint8_t dip[2][SIM_BACKENDS][16]; /* by family: backend i is two backends, i of IPv4 and SIM_BACKENDS/2 + i of IPv6 */
    uint8_t mac[SIM_BACKENDS][6];
    uint32_t cache, flows; /* entries of a flow cache, buckets of map `flows` */
    uint32_t tokens; /* of MPTCP connections that there is room for */
    uint32_t tags;   /* VLAN tags of frames on the VIPs' segment */
    bool split;      /* every other server is on another interface of the load balancers */
    bool apart;      /* the XDP program reaches every third server by no way: user space alone sends to it */
    uint8_t key[16];
    uint32_t syn_rate; /* that each service takes; 0: all */
};

struct xdp {
    uint32_t queues;
    bool sockets[SIM_QUEUES];
    struct crab_macs macs;
    struct crab_hashing hashing;
    struct crab_queues interface;
    struct crab_bucket *flows;
    uint32_t buckets;
    uint32_t services;
    struct crab_vip vip[SIM_SERVICES];
    uint32_t index[SIM_SERVICES];
    struct crab_service_counters service_counters[SIM_SERVICES];
    struct crab_limit limits[SIM_SERVICES];
    struct crab_path paths[SIM_BACKENDS];
    uint64_t counters[CRAB_XDP_COUNTERS];
    uint32_t kinds; /* of every service's VIP */
};

#define XDP_IS_DROPPED 0
#define XDP_IS_PASSED 1
#define XDP_IS_SENT 2
#define XDP_IS_A_WORKERS 3
/* Run the program on a frame; its counter in *why. */
int sim_xdp(struct xdp *x, struct frame *f, uint32_t queue, uint64_t now_ns, uint32_t *why);

/* Where a server is; by its number, or by a backend's. */
static inline uint32_t sim_interface(const struct setting *setting, uint32_t server)
{
    return setting->split && server % 2 ? SIM_ELSEWHERE : SIM_IFINDEX;
}

struct balancer {
    struct xdp xdp;
    struct setting *setting;
    uint8_t mac[6];
    uint8_t addr[2][16];
    bool up;      /* the machine */
    bool serving; /* the daemon */
    uint32_t mtu; /* of ways to backends */
    uint32_t seed;
    struct backend_view view[SIM_BACKENDS];
    struct crab_core *cores[SIM_QUEUES];
    uint64_t counters[SIM_QUEUES][CRAB_COUNTERS];
    struct crab_table *table;
    struct crab_joins *joins;
    struct crab_snapshot *snapshot;
    struct crab_pool *pools[SIM_SERVICES];
    struct crab_load loads[SIM_SERVICES][SIM_BACKENDS];
    struct crab_turn turns[SIM_SERVICES] __attribute__((aligned(64)));
    uint16_t tables[SIM_SERVICES][SIM_SLOTS];
    uint64_t members; /* what the tables are made of, as a hash */
    uint32_t memory;  /* goes up when all is forgotten, */
    uint32_t pending; /* and when handshakes under way are, and tokens; */
    uint32_t swept[SIM_BACKENDS]; /* and when a backend's tokens are */
    struct frame *waiting[SIM_QUEUES][SIM_WAITING];
    uint32_t count[SIM_QUEUES];
    bool woken[SIM_QUEUES];
};

void balancer_init(struct balancer *b, struct setting *setting, const uint8_t mac[6], uint32_t number, uint32_t seed);
/* A configuration, and what is known of backends, become a snapshot, and paths. */
void balancer_publish(struct balancer *b);
/* The daemon's sweep: what neither the configuration nor a flow names any more is forgotten. */
void balancer_sweep(struct balancer *b, uint32_t now);
/* As crablb/dataplane/limits.py does: what is changed begins with a full bucket; `anew`: all do. */
void balancer_limit(struct balancer *b, bool anew);
void balancer_start(struct balancer *b, uint32_t now);
/* SIGKILL: what the kernel has stays. */
void balancer_kill(struct balancer *b);
/* The machine loses its power. */
void balancer_lose(struct balancer *b);
/* Another process takes the daemon's place: it copies the caches, packets come meanwhile (between the two), and it renews. */
void balancer_take_over(struct balancer *b, void (*meanwhile)(void *context), void *context);
/* Flows that it knows, of all backends, in caches and in the table. */
uint32_t balancer_remembers(struct balancer *b, uint32_t now);

#endif
