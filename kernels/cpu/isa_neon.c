/* NEON, which every AArch64 machine has. */
#if defined(__aarch64__)
#include "sampled_row.h"
#define ISA neon
#include "simd_neon.h"
#include "template.h"
#else
typedef int nothing_for_this_machine;
#endif
