/* Products with sparse matrices in compressed rows, minibatch last. Part of the template kernels.h.
 *
 * Samples are computed in blocks, so that the sums of a row stay in registers. */

/* y[r] = bias + sum of w_k x[columns_k] for the rows [first, last) of y (rows, b), and nv vectors of samples or, with
 * some > 0, the first `some` samples. */
INLINE void NAME(sparse_ahead)(const int nv, const int some, ptrdiff_t first, ptrdiff_t last, ptrdiff_t b,
                               const int64_t *starts, const int32_t *columns, const int64_t *places,
                               const int64_t *biases, const R *w, const R *x, R *y)
{
    for (ptrdiff_t r = first; r < last; r++) {
        const int32_t *c = columns + starts[r];
        const ptrdiff_t n = starts[r + 1] - starts[r];
        const R *weights = w + places[r];
        V acc[4];
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++)
            acc[v] = SET1(biases ? w[biases[r]] : (R)0);
        for (ptrdiff_t k = 0; k < n; k++) {
            const R *row = x + c[k] * b;
            const V f = SET1(weights[k]);
#pragma GCC unroll 4
            for (int v = 0; v < nv; v++)
                acc[v] = FMA(f, some ? LOAD_SOME(row, some) : LOAD(row + v * VL), acc[v]);
        }
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++) {
            if (some)
                STORE_SOME(y + r * b, some, acc[v]);
            else
                STORE(y + r * b + v * VL, acc[v]);
        }
    }
}

/* The gradients for the columns [first, last) and the same samples as in sparse_ahead: dx[c] = sum of w_k dy[rows_k],
 * and g_k = <dy[rows_k], x[c]>, added to that of earlier samples if `more`. An entry is read once for both. */
INLINE void NAME(sparse_behind)(const int nv, const int some, const int inputs, const int weights, const int more,
                                ptrdiff_t first, ptrdiff_t last, ptrdiff_t b, const int64_t *starts,
                                const int32_t *rows, const int32_t *places, const R *w, const R *x, const R *dy, R *dx,
                                R *g)
{
    for (ptrdiff_t c = first; c < last; c++) {
        V acc[4], seen[4];
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++) {
            acc[v] = SET1((R)0);
            if (weights)
                seen[v] = some ? LOAD_SOME(x + c * b, some) : LOAD(x + c * b + v * VL);
        }
        for (ptrdiff_t k = starts[c]; k < starts[c + 1]; k++) {
            const R *row = dy + rows[k] * b;
            const V f = SET1(inputs ? w[places[k]] : (R)0);
            V dot = SET1((R)0);
#pragma GCC unroll 4
            for (int v = 0; v < nv; v++) {
                const V d = some ? LOAD_SOME(row, some) : LOAD(row + v * VL);
                if (inputs)
                    acc[v] = FMA(f, d, acc[v]);
                if (weights)
                    dot = FMA(seen[v], d, dot);
            }
            if (weights)
                g[places[k]] = more ? g[places[k]] + SUM(dot) : SUM(dot);
        }
#pragma GCC unroll 4
        for (int v = 0; v < nv && inputs; v++) {
            if (some)
                STORE_SOME(dx + c * b, some, acc[v]);
            else
                STORE(dx + c * b + v * VL, acc[v]);
        }
    }
}

void NAME(sparse_forward)(ptrdiff_t first, ptrdiff_t last, ptrdiff_t b, const int64_t *starts, const int32_t *columns,
                          const int64_t *places, const int64_t *biases, const R *w, const R *x, R *y)
{
    for (ptrdiff_t q = 0; q < b;) {
        const ptrdiff_t left = (b - q) / VL;
#define AHEAD(nv, some) NAME(sparse_ahead)(nv, some, first, last, b, starts, columns, places, biases, w, x + q, y + q)
        if (left >= 4)
            AHEAD(4, 0), q += 4 * VL;
        else if (left >= 2)
            AHEAD(2, 0), q += 2 * VL;
        else if (left)
            AHEAD(1, 0), q += VL;
        else
            AHEAD(1, (int)(b - q)), q = b;
#undef AHEAD
    }
}

/* The gradients for the columns [first, last) and all samples. dx, g: NULL if not wanted. */
void NAME(sparse_backward)(ptrdiff_t first, ptrdiff_t last, ptrdiff_t b, const int64_t *starts, const int32_t *rows,
                           const int32_t *places, const R *w, const R *x, const R *dy, R *dx, R *g)
{
    for (ptrdiff_t q = 0; q < b;) {
        const ptrdiff_t left = (b - q) / VL;
        R *into = dx ? dx + q : 0;
#define ONE(nv, some, inputs, weights)                                                                                 \
    NAME(sparse_behind)(nv, some, inputs, weights, q > 0, first, last, b, starts, rows, places, w, x + q, dy + q, into, g)
#define BEHIND(nv, some)                                                                                               \
    if (dx && g)                                                                                                       \
        ONE(nv, some, 1, 1);                                                                                           \
    else if (g)                                                                                                        \
        ONE(nv, some, 0, 1);                                                                                           \
    else                                                                                                               \
        ONE(nv, some, 1, 0)
        if (left >= 4) {
            BEHIND(4, 0);
            q += 4 * VL;
        } else if (left >= 2) {
            BEHIND(2, 0);
            q += 2 * VL;
        } else if (left) {
            BEHIND(1, 0);
            q += VL;
        } else {
            BEHIND(1, (int)(b - q));
            q = b;
        }
#undef BEHIND
#undef ONE
    }
}

/* The gradients of the biases: g at places[r] = the sum of dy[r] (rows, b). */
void NAME(sparse_biases)(ptrdiff_t rows, ptrdiff_t b, const int64_t *places, const R *dy, R *g)
{
    for (ptrdiff_t r = 0; r < rows; r++)
        g[places[r]] = (R)NAME(long_sums)(0, b, 0, dy + r * b, 0);
}
