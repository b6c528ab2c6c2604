/* exp of 16 floats at a time. Included under a target with avx512f. */
#ifndef POSTTRAIN_EXP512_H
#define POSTTRAIN_EXP512_H

#include <immintrin.h>

/* Of MXCSR. Tiles take subnormal numbers for zeros; so does what is between them, which would else wait for each one. */
enum { SUBNORMALS_ARE_ZERO = 0x8040 };

/* exp(-104) is less than half of the smallest float: what lies below need not be told apart. A NaN stays. */
static inline __m512 at_least_104(__m512 x) { return _mm512_max_ps(_mm512_set1_ps(-104.0f), x); }

/* e^x for -104 <= x <= 88, as exp_parts in swiglu.h: a polynomial in what x is above a multiple of ln 2. */
static inline __m512 exp512(__m512 x) {
    const __m512 magic = _mm512_set1_ps(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    const __m512 n = _mm512_sub_ps(_mm512_fmadd_ps(x, _mm512_set1_ps(1.44269504f), magic), magic);
    __m512 f = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    f = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), f);
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(1.9875691500e-4f), f, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(p, f), f, f), _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

#endif
