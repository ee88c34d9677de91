/* SPDX-License-Identifier: MIT */
#include "table.h"

#include <stdlib.h>

struct crab_table *crab_table_new(struct crab_bucket *buckets, uint32_t count)
{
    struct crab_table *t = calloc(1, sizeof *t);
    if (t)
        *t = (struct crab_table){.buckets = buckets, .mask = count - 1};
    return t;
}

void crab_table_free(struct crab_table *table)
{
    free(table);
}

bool crab_table_write(struct crab_table *table, const struct crab_flow *flow)
{
    return crab_table_put(table, *flow);
}
