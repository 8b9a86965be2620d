/* Products with the quasi-Newton matrices of elements. Part of the template kernels.h. */

/* Scalar products of `nr` rows of z, with stride `row`, and v (n). Short sums are in the type of the arrays, the sum of
 * these in double. */
INLINE void NAME(dots)(const int nr, ptrdiff_t n, const R *z, ptrdiff_t row, const R *v, double *out)
{
#pragma GCC unroll 8
    for (int r = 0; r < nr; r++)
        out[r] = 0;
    for (ptrdiff_t first = 0; first < n; first += 64 * VL) {
        const ptrdiff_t left = n - first < 64 * VL ? n - first : 64 * VL, last = first + left / VL * VL;
        const int some = (int)(first + left - last);
        V acc[PAIRS];
#pragma GCC unroll 8
        for (int r = 0; r < nr; r++)
            acc[r] = SET1((R)0);
        for (ptrdiff_t i = first; i < last; i += VL) {
            const V x = LOAD(v + i);
#pragma GCC unroll 8
            for (int r = 0; r < nr; r++)
                acc[r] = FMA(LOAD(z + r * row + i), x, acc[r]);
        }
        if (some) {
            const V x = LOAD_SOME(v + last, some);
#pragma GCC unroll 8
            for (int r = 0; r < nr; r++)
                acc[r] = FMA(LOAD_SOME(z + r * row + last, some), x, acc[r]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < nr; r++)
            out[r] += SUM(acc[r]);
    }
}

/* out (n) += the sum of `nr` rows of z, with stride `row`, each times its weight in w (nr). */
INLINE void NAME(combine)(const int nr, ptrdiff_t n, const R *z, ptrdiff_t row, const R *w, R *out)
{
    V weight[PAIRS];
#pragma GCC unroll 8
    for (int r = 0; r < nr; r++)
        weight[r] = SET1(w[r]);
    const ptrdiff_t whole = n / VL * VL;
    const int some = (int)(n - whole);
    for (ptrdiff_t i = 0; i < whole; i += VL) {
        V sum = LOAD(out + i);
#pragma GCC unroll 8
        for (int r = 0; r < nr; r++)
            sum = FMA(weight[r], LOAD(z + r * row + i), sum);
        STORE(out + i, sum);
    }
    if (some) {
        V sum = LOAD_SOME(out + whole, some);
#pragma GCC unroll 8
        for (int r = 0; r < nr; r++)
            sum = FMA(weight[r], LOAD_SOME(z + r * row + whole, some), sum);
        STORE_SOME(out + whole, some, sum);
    }
}

/* coefficients (rows) = Z v and out (n) = sigma v + Z^T (middle Z v), with Z (rows, n) of stride `row` and middle
 * (rows, rows). weights: scratch (rows). If Z fits the cache, it is read from memory once. */
INLINE void NAME(element_product)(ptrdiff_t rows, ptrdiff_t n, const R *z, ptrdiff_t row, const double *middle, R sigma,
                          double *coefficients, R *weights, const R *v, R *out)
{
    ptrdiff_t r = 0;
    for (; r + PAIRS <= rows; r += PAIRS)
        NAME(dots)(PAIRS, n, z + r * row, row, v, coefficients + r);
    for (; r < rows; r++)
        NAME(dots)(1, n, z + r * row, row, v, coefficients + r);
    for (ptrdiff_t i = 0; i < rows; i++) {
        double sum = 0;
        for (ptrdiff_t j = 0; j < rows; j++)
            sum += middle[i * rows + j] * coefficients[j];
        weights[i] = (R)sum;
    }
    for (ptrdiff_t i = 0; i < n; i++)
        out[i] = sigma * v[i];
    for (r = 0; r + PAIRS <= rows; r += PAIRS)
        NAME(combine)(PAIRS, n, z + r * row, row, weights + r, out);
    for (; r < rows; r++)
        NAME(combine)(1, n, z + r * row, row, weights + r, out);
}

/* element_product for each of `count` elements. Each array has the elements as its first axis. */
void NAME(element_products)(ptrdiff_t count, ptrdiff_t rows, ptrdiff_t n, const R *pairs, const double *middle,
                    const double *sigma, double *coefficients, R *weights, const R *v, R *out)
{
    for (ptrdiff_t e = 0; e < count; e++)
        NAME(element_product)(rows, n, pairs + e * rows * n, n, middle + e * rows * rows, (R)sigma[e], coefficients + e * rows,
                      weights, v + e * n, out + e * n);
}

/* out[e] = the scalar product of rows e of a and b (count, n). */
void NAME(row_dots)(ptrdiff_t count, ptrdiff_t n, const R *a, const R *b, double *out)
{
    for (ptrdiff_t e = 0; e < count; e++)
        NAME(dots)(1, n, a + e * n, n, b + e * n, out + e);
}

/* q += U_e^T B_e U_e p for each element e; *curvature = the sum of p^T U_e^T B_e U_e p over the elements. sizes: the
 * number of variables of each element, at most n. table: the runs of U_e, with the position in p, the position in the
 * element's row of n variables, and the length; element e has the runs [starts[e], starts[e + 1]). work: scratch (2 n +
 * rows). */
void NAME(restricted_products)(ptrdiff_t count, ptrdiff_t rows, ptrdiff_t n, const int64_t *sizes,
                               const int64_t *starts, const int64_t *table, const R *pairs, const double *middle,
                               const double *sigma, double *coefficients, R *work, const R *p, R *q)
{
    R *const v = work, *const out = work + n, *const weights = out + n;
    for (ptrdiff_t e = 0; e < count; e++) {
        for (int64_t k = starts[e]; k < starts[e + 1]; k++)
            memcpy(v + table[3 * k + 1] - e * n, p + table[3 * k], table[3 * k + 2] * sizeof(R));
        NAME(element_product)(rows, sizes[e], pairs + e * rows * n, n, middle + e * rows * rows, (R)sigma[e],
                      coefficients + e * rows, weights, v, out);
        for (int64_t k = starts[e]; k < starts[e + 1]; k++) {
            R *restrict to = q + table[3 * k];
            const R *restrict from = out + table[3 * k + 1] - e * n;
            for (int64_t i = 0; i < table[3 * k + 2]; i++)
                to[i] += from[i];
        }
    }
}
