/* AVX2 with FMA and F16C: Intel since 2013 (Haswell), AMD since 2015. */
#if defined(__x86_64__)
#include <immintrin.h>

#include "sampled_row.h"
#include "scalar.h"
#include "target.h"

BEGIN_TARGET("avx2,fma,f16c")
#define ISA avx2
#include "simd_avx2.h"
#include "template.h"
END_TARGET
#else
typedef int nothing_for_this_machine;
#endif
