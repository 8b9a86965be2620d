/* Layer normalization (of columns), and GELU. Part of the template kernels.h. */

/* Number of vectors of columns that are normalized together. */
#define BESIDE 4

#define TAKE(p) (some ? LOAD_SOME(p, some) : LOAD(p))
#define GIVE(p, v)                                                                                                     \
    do {                                                                                                               \
        if (some)                                                                                                      \
            STORE_SOME(p, some, v);                                                                                    \
        else                                                                                                           \
            STORE(p, v);                                                                                               \
    } while (0)

/* layer_norm for nv vectors of columns, or for `some` columns if these are fewer than a vector. */
INLINE void NAME(norm_columns)(const int nv, const int some, ptrdiff_t n, ptrdiff_t m, const R *x, double eps,
                               const R *gamma, const R *beta, R *normal, R *scale, R *y)
{
    V mean[BESIDE], factor[BESIDE];
    const V share = SET1((R)(1 / (double)n));
#pragma GCC unroll 4
    for (int k = 0; k < nv; k++)
        mean[k] = SET1((R)0);
    for (ptrdiff_t first = 0; first < n; first += SHORT) {
        const ptrdiff_t last = n - first < SHORT ? n : first + SHORT;
        V sum[BESIDE];
#pragma GCC unroll 4
        for (int k = 0; k < nv; k++)
            sum[k] = SET1((R)0);
        for (ptrdiff_t i = first; i < last; i++)
#pragma GCC unroll 4
            for (int k = 0; k < nv; k++)
                sum[k] += TAKE(x + i * m + k * VL);
#pragma GCC unroll 4
        for (int k = 0; k < nv; k++)
            mean[k] = FMA(sum[k], share, mean[k]);
    }
    V rest[BESIDE];
#pragma GCC unroll 4
    for (int k = 0; k < nv; k++)
        rest[k] = factor[k] = SET1((R)0);
    for (ptrdiff_t first = 0; first < n; first += SHORT) {
        const ptrdiff_t last = n - first < SHORT ? n : first + SHORT;
        V sum[BESIDE], square[BESIDE];
#pragma GCC unroll 4
        for (int k = 0; k < nv; k++)
            sum[k] = square[k] = SET1((R)0);
        for (ptrdiff_t i = first; i < last; i++)
#pragma GCC unroll 4
            for (int k = 0; k < nv; k++) {
                const V d = TAKE(x + i * m + k * VL) - mean[k];
                sum[k] += d;
                square[k] = FMA(d, d, square[k]);
            }
#pragma GCC unroll 4
        for (int k = 0; k < nv; k++) {
            rest[k] = FMA(sum[k], share, rest[k]);
            factor[k] = FMA(square[k], share, factor[k]);
        }
    }
#pragma GCC unroll 4
    for (int k = 0; k < nv; k++) {
        R roots[VL];
        STORE(roots, FMA(-rest[k], rest[k], factor[k]) + SET1((R)eps));
        for (int i = 0; i < VL; i++)
            roots[i] = (R)1 / ROOT(roots[i]);
        factor[k] = LOAD(roots);
        GIVE(scale + k * VL, factor[k]);
    }
    for (ptrdiff_t i = 0; i < n; i++) {
        const V by = SET1(gamma[i]), more = SET1(beta[i]);
#pragma GCC unroll 4
        for (int k = 0; k < nv; k++) {
            const ptrdiff_t at = i * m + k * VL;
            const V v = (TAKE(x + at) - mean[k] - rest[k]) * factor[k];
            GIVE(normal + at, v);
            GIVE(y + at, FMA(by, v, more));
        }
    }
}

/* normal (n, m) = (x - mean) scale, scale (m,) = 1 / sqrt(variance + eps), for each column of x. y (n, m) = gamma (n,)
 * normal + beta (n,). normal may be x. */
void NAME(layer_norm)(ptrdiff_t n, ptrdiff_t m, const R *x, double eps, const R *gamma, const R *beta, R *normal,
                      R *scale, R *y)
{
    ptrdiff_t j = 0;
    for (; j + BESIDE * VL <= m; j += BESIDE * VL)
        NAME(norm_columns)(BESIDE, 0, n, m, x + j, eps, gamma, beta, normal + j, scale + j, y + j);
    for (; j + VL <= m; j += VL)
        NAME(norm_columns)(1, 0, n, m, x + j, eps, gamma, beta, normal + j, scale + j, y + j);
    if (j < m)
        NAME(norm_columns)(1, (int)(m - j), n, m, x + j, eps, gamma, beta, normal + j, scale + j, y + j);
}

INLINE void NAME(norm_columns_back)(const int nv, const int some, ptrdiff_t n, ptrdiff_t m, const R *normal,
                                    const R *scale, const R *gamma, R *dy)
{
    V mean[BESIDE], along[BESIDE];
    const V share = SET1((R)(1 / (double)n));
#pragma GCC unroll 4
    for (int k = 0; k < nv; k++)
        mean[k] = along[k] = SET1((R)0);
    for (ptrdiff_t first = 0; first < n; first += SHORT) {
        const ptrdiff_t last = n - first < SHORT ? n : first + SHORT;
        V sum[BESIDE], dot[BESIDE];
#pragma GCC unroll 4
        for (int k = 0; k < nv; k++)
            sum[k] = dot[k] = SET1((R)0);
        for (ptrdiff_t i = first; i < last; i++) {
            const V by = SET1(gamma[i]);
#pragma GCC unroll 4
            for (int k = 0; k < nv; k++) {
                const V d = TAKE(dy + i * m + k * VL) * by;
                sum[k] += d;
                dot[k] = FMA(d, TAKE(normal + i * m + k * VL), dot[k]);
            }
        }
#pragma GCC unroll 4
        for (int k = 0; k < nv; k++) {
            mean[k] = FMA(sum[k], share, mean[k]);
            along[k] = FMA(dot[k], share, along[k]);
        }
    }
    for (ptrdiff_t i = 0; i < n; i++) {
        const V by = SET1(gamma[i]);
#pragma GCC unroll 4
        for (int k = 0; k < nv; k++) {
            const ptrdiff_t at = i * m + k * VL;
            const V d = FMA(TAKE(dy + at), by, -mean[k]);
            GIVE(dy + at, TAKE(scale + k * VL) * FMA(-TAKE(normal + at), along[k], d));
        }
    }
}

/* The adjoint of layer_norm: dy (n, m) becomes the gradient of x. dgamma and dbeta (n,) are filled unless they are
 * NULL. */
void NAME(layer_norm_back)(ptrdiff_t n, ptrdiff_t m, const R *normal, const R *scale, const R *gamma, R *dy, R *dgamma,
                           R *dbeta)
{
    for (ptrdiff_t i = 0; dgamma && i < n; i++) {
        double dot;
        dbeta[i] = (R)NAME(long_sums)(1, m, normal + i * m, dy + i * m, &dot);
        dgamma[i] = (R)dot;
    }
    ptrdiff_t j = 0;
    for (; j + BESIDE * VL <= m; j += BESIDE * VL)
        NAME(norm_columns_back)(BESIDE, 0, n, m, normal + j, scale + j, gamma, dy + j);
    for (; j + VL <= m; j += VL)
        NAME(norm_columns_back)(1, 0, n, m, normal + j, scale + j, gamma, dy + j);
    if (j < m)
        NAME(norm_columns_back)(1, (int)(m - j), n, m, normal + j, scale + j, gamma, dy + j);
}

/* Coefficients of the polynomial in psmpi.backend.reference.gelu, fewer for float. */
#if DOUBLE
static const double NAME(tail_terms)[] = {
    0.47205320650984467, -0.09670347732652607, 0.013999634724430469, 0.02860036405357749, -0.03219783742831453,
    0.01793609747886859, -0.0050023785870514665, -0.00028562308680939413, 0.0006948970692570495,
    -9.443033944152223e-05, -8.785300442645791e-05, 2.1250446856208376e-05, 1.3626315192600401e-05,
    -3.433372216853275e-06, -2.6118464340168558e-06, 4.0671730125154447e-07, 5.507747965364098e-07,
    -1.237153366992197e-09, -1.1022354013739079e-07, -1.7932121916642413e-08, 1.7442583764419795e-08,
    5.474708632048689e-09, -1.5456221598143852e-09, -6.763267210562454e-10,
};
#define TAIL_TERMS 24
/* Arguments are limited to this size: beyond it densities are subnormal numbers. */
#define FAR 37.0
#else
static const float NAME(tail_terms)[] = {
    0.472053206f, -0.0967034704f, 0.01399965f, 0.0286001681f, -0.0321980864f, 0.0179376959f, -0.00500084044f,
    -0.000291267495f, 0.000690303486f, -8.45540179e-05f, -8.0593274e-05f, 1.25685467e-05f, 7.50067958e-06f,
};
#define TAIL_TERMS 13
#define FAR 13.0f
#endif

/* Phi(x), the distribution function of the standard normal, and its density. NaN stays NaN. */
INLINE void NAME(normal_law)(V x, V *below, V *density)
{
    V scale, rest, sum = SET1(NAME(tail_terms)[TAIL_TERMS - 1]);
    const V a = MIN(SET1((R)FAR), MAX(x, -x)), four = SET1((R)4), one = SET1((R)1);
    const V over = one / ((one + a) * (four + a)), t = (a - four) * (one + a) * over;
#pragma GCC unroll 32
    for (int k = TAIL_TERMS - 2; k >= 0; k--)
        sum = FMA(sum, t, SET1(NAME(tail_terms)[k]));
    NAME(exponential_parts)(a * a * SET1((R)-0.5), &scale, &rest);
    const V e = FMA(scale, rest, scale), tail = sum * (four + a) * over * e;
    *below = WHERE(x, tail, one - tail);
    *density = e * SET1((R)0.39894228040143267794);
}

/* y = x Phi(x). */
void NAME(gelu)(ptrdiff_t n, const R *x, R *y)
{
    V below, density;
    for (ptrdiff_t k = 0; k < n; k += VL) {
        const int some = n - k < VL ? (int)(n - k) : 0;
        const V v = TAKE(x + k);
        NAME(normal_law)(v, &below, &density);
        /* Phi is constant below -FAR: limit the factor x too, so that y does not grow there. */
        GIVE(y + k, MAX(SET1((R)-FAR), v) * below);
    }
}

/* dy *= Phi(x) + x phi(x). */
void NAME(gelu_back)(ptrdiff_t n, const R *x, R *dy)
{
    V below, density;
    for (ptrdiff_t k = 0; k < n; k += VL) {
        const int some = n - k < VL ? (int)(n - k) : 0;
        const V v = TAKE(x + k);
        NAME(normal_law)(v, &below, &density);
        GIVE(dy + k, TAKE(dy + k) * FMA(MIN(SET1((R)FAR), MAX(SET1((R)-FAR), v)), density, below));
    }
}

#undef BESIDE
#undef TAKE
#undef GIVE
#undef TAIL_TERMS
#undef FAR
