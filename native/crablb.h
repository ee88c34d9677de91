/* SPDX-License-Identifier: MIT */
/* The C API of the hot loop.  Python's cffi declarations are read from this file: plain declarations and integer
 * #defines only; inline code lives in the modules' own headers. */
#ifndef CRABLB_H
#define CRABLB_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "maps.h"

#endif
