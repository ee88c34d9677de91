/* SPDX-License-Identifier: MIT */
/* What hashes.c has.  bench/hashes.py reads this file too: declarations, and nothing that a preprocessor is needed for. */

/* A way from a hash to a backend. */
struct method {
    void (*look)(const struct method *m, const uint64_t *hashes, uint32_t count, uint16_t *chosen);
    uint16_t *backends; /* by bucket; of a table: by slot */
    uint32_t buckets;   /* how many there may be; of a table: its size */
    uint32_t working;   /* how many there are */
    void *state;        /* what a lookup reads beside: state_bytes of it */
    size_t state_bytes;
    void *more;   /* what only changes need */
    size_t bytes; /* of all that */
};

/* A table of a prime size; who makes it fills `backends`. */
struct method *table_new(uint32_t size);
/* AnchorHash with room for so many buckets; the first `working` of them work. */
struct method *anchor_new(uint32_t capacity, uint32_t working);
/* DxHash with room for so many buckets, a power of two; weights[count] of the first of them: 0 to DX_WHOLE. */
struct method *dx_new(uint32_t capacity, const uint32_t *weights, uint32_t count);
/* JumpBackHash with room for so many buckets; the first `working` of them work.  More or fewer: write `working`. */
struct method *jumpback_new(uint32_t capacity, uint32_t working);
void method_free(struct method *m);

/* The bucket that works again, which is the one that stopped last; UINT32_MAX if all do. */
uint32_t anchor_add(struct method *m);
void anchor_remove(struct method *m, uint32_t bucket);
void dx_weigh(struct method *m, uint32_t bucket, uint32_t weight);

/* chosen[count]: the backends of hashes, which are as random as SipHash's. */
void method_look(const struct method *m, const uint64_t *hashes, uint32_t count, uint16_t *chosen);
/* Fill a table by another method: the slot's number, hashed under a seed, takes a connection's place. */
void method_fill(const struct method *m, struct method *table, uint64_t seed);
/* Nanoseconds of a lookup, in batches as the hot loop's.  cold: what it reads is in no cache at each batch's beginning; negative
 * where caches cannot be flushed. */
double method_ns(const struct method *m, const uint64_t *hashes, uint32_t count, bool cold);
