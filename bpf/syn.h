/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* What a server looks for among a SYN's options: a redirect, and a Fast Open cookie (RFC 7413).  No helper is called. */
#ifndef CRAB_SYN_H
#define CRAB_SYN_H

#include "maps.h"

#define CRAB_TCP_HEADER 20
#define CRAB_TCP_OPTIONS 40
#define CRAB_REDIRECT 20 /* bytes of the longest */
/* A TCP header, and zeros so that a redirect's length can be read from anywhere in it. */
#define CRAB_SYN_ROOM (CRAB_TCP_HEADER + CRAB_TCP_OPTIONS + CRAB_REDIRECT)

/* The state of a walk.  The verifier follows what is stored at multiples of 8, and would walk on from each value that
 * it ever had; what lies beside them it takes for any value, and walks once.  So it does with the header's end: in a
 * register each comparison would leave it with other bounds, and clang 19's code was walked for a million instructions. */
struct crab_walk {
    __u8 pad;
    volatile __u8 end;    /* where the options end, counted from the first */
    volatile __u8 next;   /* where the next option begins, counted from the first */
    volatile __u8 at;     /* the first redirect, */
    volatile __u8 length; /* its length; 0: there is none */
    volatile __u8 cookie; /* 1: there is a Fast Open cookie */
} __attribute__((aligned(8)));

CRAB_INLINE int crab_is_redirect(const __u8 *option, __u8 length)
{
    if (option[0] == CRAB_OPT_KIND)
        return length == 6 || length == 18;
    return option[0] == CRAB_OPT_KIND_EXPERIMENTAL && (length == 8 || length == 20) &&
           option[2] == (CRAB_OPT_EXID >> 8) && option[3] == (CRAB_OPT_EXID & 0xff);
}

/* A cookie, or several bytes that say they are one; asking for a cookie is none. */
CRAB_INLINE int crab_is_cookie(const __u8 *option, __u8 length)
{
    return (option[0] == 34 && length > 2) || (option[0] == 254 && length > 4 && option[2] == 0xf9 && option[3] == 0x89);
}

/* Is the SYN a load balancer's check, of which no connection comes?  It has timestamps where Linux has them, and in the place
 * of an echo, which means nothing in a SYN (RFC 7323, 3.2), what no client has there.  tcp: CRAB_SYN_ROOM bytes. */
CRAB_INLINE int crab_is_check(const __u8 *tcp)
{
    const __u8 *stamps = tcp + CRAB_TCP_HEADER + 6;
    return tcp[12] >> 4 >= 9 && stamps[0] == 8 && stamps[1] == 10 && stamps[6] == 'C' && stamps[7] == 'R' &&
           stamps[8] == 'A' && stamps[9] == 'B';
}

/* Walk the options of a TCP header of CRAB_SYN_ROOM bytes.  They end at EOL, at a bad length, or with the header. */
CRAB_INLINE void crab_walk(const __u8 *tcp, struct crab_walk *walk)
{
    const __u8 *options = tcp + CRAB_TCP_HEADER;
    __u32 end = (tcp[12] >> 4) * 4;
    walk->next = walk->at = walk->length = walk->cookie = 0;
    walk->end = (__u8)(end < CRAB_TCP_HEADER ? 0 : end - CRAB_TCP_HEADER);
    for (__u32 i = 0; i < CRAB_TCP_OPTIONS; i++) {
        if (i < walk->next)
            continue;
        if (i >= walk->end || options[i] == 0)
            break;
        if (options[i] == 1)
            continue;
        __u8 length = options[i + 1];
        if (i + 1 >= walk->end || length < 2 || i + length > walk->end)
            break;
        if (crab_is_cookie(options + i, length))
            walk->cookie = 1;
        if (!walk->length && crab_is_redirect(options + i, length)) {
            walk->at = (__u8)i;
            walk->length = length;
        }
        walk->next = (__u8)(i + length);
    }
}

#endif
