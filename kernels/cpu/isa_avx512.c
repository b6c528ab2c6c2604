/* AVX-512 F, BW, VL and DQ: Intel servers since 2017 (Skylake-SP), AMD since 2022 (Zen 4). */
#if defined(__x86_64__)
#include <immintrin.h>

#include "sampled_row.h"
#include "scalar.h"
#include "target.h"

BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#define ISA avx512
#include "simd_avx512.h"
#include "template.h"
END_TARGET
#else
typedef int nothing_for_this_machine;
#endif
