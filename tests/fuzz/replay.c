/* SPDX-License-Identifier: MIT */
/* A target's main without libFuzzer: each line of standard input is an input, in hexadecimal.  With -p it prints what it sees. */
#include "target.h"

FILE *target_prints;

static int digit(int c)
{
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

int main(int argc, char **argv)
{
    static uint8_t input[1 << 16];
    size_t n = 0, inputs = 0;
    int c, half = -1;
    if (argc > 1 && !strcmp(argv[1], "-p"))
        target_prints = stdout;
    while ((c = getchar()) != EOF) {
        if (c == '\n') {
            /* in memory of just its size, as libFuzzer gives it */
            uint8_t *exact = malloc(n + !n);
            CHECK(exact);
            memcpy(exact, input, n);
            LLVMFuzzerTestOneInput(exact, n);
            free(exact);
            inputs++;
            n = 0;
        } else if (half < 0) {
            half = digit(c);
            CHECK(half >= 0);
        } else {
            CHECK(digit(c) >= 0 && n < sizeof input);
            input[n++] = (uint8_t)(half << 4 | digit(c));
            half = -1;
        }
    }
    fprintf(stderr, "%zu inputs\n", inputs);
    return 0;
}
