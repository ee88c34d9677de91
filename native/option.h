/* SPDX-License-Identifier: MIT */
/* Lists of TCP options that were seen before.
 *
 * Clients of one kind write lists that differ only in values: a timestamp, an MSS.  So what a search found in the last list
 * of a length holds for the next one, if all bytes that it looked at are the same: three comparisons instead of a walk. */
#ifndef CRAB_OPTION_H
#define CRAB_OPTION_H

#include "bytes.h"
#include "crablb.h"

struct crab_seen_list {
    uint8_t mask[CRAB_MAX_OPTIONS]; /* 0xff: a byte that the search looked at */
    uint8_t list[CRAB_MAX_OPTIONS]; /* the others as 0 */
    int8_t form;                    /* -1: none was seen yet */
    int8_t word;                    /* as crab_option_scan has it */
    uint8_t found;
} __attribute__((aligned(16)));

/* The last list of each length, in words. */
struct crab_seen_lists {
    struct crab_seen_list of[CRAB_MAX_OPTIONS / 4 + 1];
};

void crab_seen_init(struct crab_seen_lists *seen);
/* Search a list, and remember it. */
void crab_seen_learn(struct crab_seen_list *seen, const uint8_t *options, size_t len, int form);

/* As crab_option_scan.  len: a multiple of 4, at most 40. */
static inline int crab_option_scan_again(struct crab_seen_lists *lists, const uint8_t *options, size_t len, int form,
                                         int *word)
{
    struct crab_seen_list *seen = &lists->of[len / 4];
    typedef uint64_t pair __attribute__((vector_size(16), aligned(1), may_alias));
    uint64_t differ = (uint64_t)(seen->form ^ form);
    size_t i = 0;
    for (; i + 16 <= len; i += 16) {
        pair d = (*(const pair *)(options + i) & *(const pair *)(seen->mask + i)) ^ *(const pair *)(seen->list + i);
        differ |= d[0] | d[1];
    }
    if (len & 8) {
        differ |= (load64(options + i) & load64(seen->mask + i)) ^ load64(seen->list + i);
        i += 8;
    }
    if (len & 4)
        differ |= (load32(options + i) & load32(seen->mask + i)) ^ load32(seen->list + i);
    if (crab_unlikely(differ))
        crab_seen_learn(seen, options, len, form);
    *word = seen->word;
    return seen->found;
}

#endif
