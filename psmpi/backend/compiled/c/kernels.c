/* The C kernels of psmpi: operations on layers, losses and vectors, with the minibatch as the last axis.
 *
 * An image array is (channels, height, width, batch), contiguous: every inner loop runs along the batch. One template
 * (kernels.h) is compiled for float and double, and for AVX-512 and AVX2 with FMA. psmpi_level() returns the
 * instruction set of this processor. Python calls the functions with ctypes.
 */
#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define PASTE2(a, b) a##b
#define PASTE(a, b) PASTE2(a, b)

/* The shape of a convolution with `count` stripes of n units each, connected to n_in channels each. */
typedef struct {
    int32_t count, n, n_in, source, source_step, out;
    int32_t height, width, rows, columns, kernel, stride, batch;
    /* The call computes the samples [first, last), except conv_weight, which sums over all samples. */
    int32_t first, last;
} shape_t;

/* A layer of recurrent cells, see recurrence.h. padded: the batch rounded up to whole vectors. A call computes the
 * samples [first, last); `first` is the start of a vector. */
typedef struct {
    int32_t kind, units, steps, batch, padded, first, last;
} cells_t;

/* Attention with heads of `size` units each. A call does the jobs [first, last), see attention.h. */
typedef struct {
    int32_t heads, size, steps, batch, causal, first, last;
} attention_t;

/* Number of vectors in a sum, before it is added to another sum. */
#define FLUSH 256

/* Number of vectors whose sum has the type of the arrays, before it is added to a sum in double. */
#define SHORT 32

/* Number of curvature vectors that one pass reads together. */
#define PAIRS 5

/* Checksum of the sources of this library, which psmpi compares with that of the installed sources. */
uint32_t psmpi_source(void)
{
    return PSMPI_SOURCE;
}

/* 2: AVX-512, 1: AVX2 and FMA, 0: neither. */
int psmpi_level(void)
{
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq"))
        return 2;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

#include "together.h"

static const int32_t ones[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx2,fma")
#endif

/* MIN and MAX return b if one operand is NaN. WHERE returns a where m is negative. POWER is 2 to the integer in the
 * lowest bits of t. */
#define DOUBLE 0
#define V __m512
#define VL 16
#define UNITS 10
#define ROWS 4
#define TAPS 6
#define NAME(f) PASTE(f, _float_2)
#define LOAD(p) _mm512_loadu_ps(p)
#define STORE(p, v) _mm512_storeu_ps(p, v)
#define LOAD_SOME(p, n) _mm512_maskz_loadu_ps((__mmask16)((1u << (n)) - 1), p)
#define LOAD_CUT(p, n, on) _mm512_mask_loadu_ps(LOAD_SOME(p, n), (__mmask16) ~((1u << (n)) - 1), (p) + (on))
#define STORE_SOME(p, n, v) _mm512_mask_storeu_ps(p, (__mmask16)((1u << (n)) - 1), v)
#define SET1(a) _mm512_set1_ps(a)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define SUM(v) _mm512_reduce_add_ps(v)
#define MIN(a, b) _mm512_min_ps(a, b)
#define MAX(a, b) _mm512_max_ps(a, b)
#define WHERE(m, a, b) _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(m)), b, a)
#define BITS(v) _mm512_castps_si512(v)
#define POWER(t) _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(BITS(t), MANTISSA), BITS(SET1(1))))
#include "kernels.h"

#define DOUBLE 1
#define V __m512d
#define VL 8
#define UNITS 10
#define ROWS 4
#define TAPS 6
#define NAME(f) PASTE(f, _double_2)
#define LOAD(p) _mm512_loadu_pd(p)
#define STORE(p, v) _mm512_storeu_pd(p, v)
#define LOAD_SOME(p, n) _mm512_maskz_loadu_pd((__mmask8)((1u << (n)) - 1), p)
#define LOAD_CUT(p, n, on) _mm512_mask_loadu_pd(LOAD_SOME(p, n), (__mmask8) ~((1u << (n)) - 1), (p) + (on))
#define STORE_SOME(p, n, v) _mm512_mask_storeu_pd(p, (__mmask8)((1u << (n)) - 1), v)
#define SET1(a) _mm512_set1_pd(a)
#define FMA(a, b, c) _mm512_fmadd_pd(a, b, c)
#define SUM(v) _mm512_reduce_add_pd(v)
#define MIN(a, b) _mm512_min_pd(a, b)
#define MAX(a, b) _mm512_max_pd(a, b)
#define WHERE(m, a, b) _mm512_mask_blend_pd(_mm512_movepi64_mask(_mm512_castpd_si512(m)), b, a)
#define BITS(v) _mm512_castpd_si512(v)
#define POWER(t) _mm512_castsi512_pd(_mm512_add_epi64(_mm512_slli_epi64(BITS(t), MANTISSA), BITS(SET1(1))))
#include "kernels.h"

#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define DOUBLE 0
#define V __m256
#define VL 8
#define UNITS 6
#define ROWS 3
#define TAPS 4
#define NAME(f) PASTE(f, _float_1)
#define MASK(n) _mm256_loadu_si256((const __m256i *)(ones + 8 - (n)))
#define REST(n) _mm256_xor_si256(MASK(n), _mm256_set1_epi32(-1))
#define LOAD(p) _mm256_loadu_ps(p)
#define STORE(p, v) _mm256_storeu_ps(p, v)
#define LOAD_SOME(p, n) _mm256_maskload_ps(p, MASK(n))
#define LOAD_CUT(p, n, on) _mm256_or_ps(LOAD_SOME(p, n), _mm256_maskload_ps((p) + (on), REST(n)))
#define STORE_SOME(p, n, v) _mm256_maskstore_ps(p, MASK(n), v)
#define SET1(a) _mm256_set1_ps(a)
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define SUM(v) PASTE(sum, _float_1)(v)
#define MIN(a, b) _mm256_min_ps(a, b)
#define MAX(a, b) _mm256_max_ps(a, b)
#define WHERE(m, a, b) _mm256_blendv_ps(b, a, m)
#define BITS(v) _mm256_castps_si256(v)
#define POWER(t) _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(BITS(t), MANTISSA), BITS(SET1(1))))
INLINE float sum_float_1(__m256 v)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
#include "kernels.h"

#define DOUBLE 1
#define V __m256d
#define VL 4
#define UNITS 6
#define ROWS 3
#define TAPS 4
#define NAME(f) PASTE(f, _double_1)
#define MASK(n) _mm256_loadu_si256((const __m256i *)(ones + 8 - 2 * (n)))
#define REST(n) _mm256_xor_si256(MASK(n), _mm256_set1_epi32(-1))
#define LOAD(p) _mm256_loadu_pd(p)
#define STORE(p, v) _mm256_storeu_pd(p, v)
#define LOAD_SOME(p, n) _mm256_maskload_pd(p, MASK(n))
#define LOAD_CUT(p, n, on) _mm256_or_pd(LOAD_SOME(p, n), _mm256_maskload_pd((p) + (on), REST(n)))
#define STORE_SOME(p, n, v) _mm256_maskstore_pd(p, MASK(n), v)
#define SET1(a) _mm256_set1_pd(a)
#define FMA(a, b, c) _mm256_fmadd_pd(a, b, c)
#define SUM(v) PASTE(sum, _double_1)(v)
#define MIN(a, b) _mm256_min_pd(a, b)
#define MAX(a, b) _mm256_max_pd(a, b)
#define WHERE(m, a, b) _mm256_blendv_pd(b, a, m)
#define BITS(v) _mm256_castpd_si256(v)
#define POWER(t) _mm256_castsi256_pd(_mm256_add_epi64(_mm256_slli_epi64(BITS(t), MANTISSA), BITS(SET1(1))))
INLINE double sum_double_1(__m256d v)
{
    __m128d s = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}
#include "kernels.h"

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
