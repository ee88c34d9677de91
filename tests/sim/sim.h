/* SPDX-License-Identifier: MIT */
/* The simulated world: see world.c. */
#ifndef SIM_H
#define SIM_H

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "balancer.h"

#define BALANCERS 4
#define SERVERS (SIM_BACKENDS / 2)
#define CLIENTS 256
#define PORTS 2048 /* of a client, from FIRST_PORT on */
#define FIRST_PORT 20000
#define NOBODY 255

#define US 1000ull
#define MS 1000000ull
#define S 1000000000ull

/* ---- frames.c: packets as bytes, written and read apart from native/ ---- */

struct segment {
    uint8_t from[16], to[16]; /* IPv4-mapped, or IPv6 */
    uint16_t sport, dport;
    uint32_t seq, ack;
    uint8_t flags, family, ttl;
    uint8_t options[40];
    uint32_t option_count; /* bytes */
    uint8_t *payload;
    uint32_t length;
    uint8_t *ip; /* of one that was read: where it begins, */
    uint32_t ip_length;
    uint8_t tunnels; /* and how many headers are around it */
    uint8_t icmp;    /* it is an error about this segment, whose next hop has a MTU */
    uint32_t mtu;
};

void frame_write(struct frame *f, const uint8_t to_mac[6], const uint8_t from_mac[6], const struct segment *s);
/* Read a TCP segment, or an ICMP error about one, through tunnels.  0: it is none; -1: its checksum is wrong. */
int frame_read(struct frame *f, struct segment *s);
/* An ICMP error about a frame, to the packet's sender: it is longer than the next hop's MTU. */
void frame_complain(struct frame *f, const struct frame *about, const uint8_t from[16], uint32_t mtu);
/* Put VLAN tags into a frame; take them out again.  False: they are others. */
void frame_tag(struct frame *f, uint32_t tags);
bool frame_untag(struct frame *f, uint32_t tags);
/* Leave the checksum to the network card. */
void frame_partial(struct frame *f);
/* The field holds the sum of the pseudo-header: whoever corrupts a packet so makes one that says it is not finished. */
bool frame_looks_partial(struct frame *f);
/* Change a bit of what checksums cover. */
void frame_corrupt(struct frame *f, uint64_t random);
/* Redirect options of either form; the address that the first one has. */
int options_redirects(const struct segment *s, uint8_t vip[16]);

#endif
