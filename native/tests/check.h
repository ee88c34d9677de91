/* SPDX-License-Identifier: MIT */
/* The few lines of test harness that the C tests need. */
#ifndef CRAB_CHECK_H
#define CRAB_CHECK_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static _Atomic(int) checks; /* of all threads */

#define CHECK(x)                                                                   \
    do {                                                                           \
        checks++;                                                                  \
        if (!(x)) {                                                                \
            fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #x);        \
            abort();                                                               \
        }                                                                          \
    } while (0)

#define CHECK_BYTES(a, b, n)                                                       \
    do {                                                                           \
        checks++;                                                                  \
        if (memcmp(a, b, n)) {                                                     \
            fprintf(stderr, "%s:%d: %s differs from %s\n", __FILE__, __LINE__, #a, #b); \
            for (size_t i_ = 0; i_ < (size_t)(n); i_++)                            \
                fprintf(stderr, "%02x/%02x ", (a)[i_], (b)[i_]);                   \
            abort();                                                               \
        }                                                                          \
    } while (0)

#define DONE() return printf("%s: %d checks\n", __FILE__, checks), 0

#endif
