/* Gradients of a convolution's kernels for each sample. Part of the template kernels.h. */

/* Sums over outputs, for each sample separately, of `nu` rows of dy times `nt` taps of x. The rows of out have the
 * stride so, its taps the stride batch. At the end of a row of outputs, after at least FLUSH outputs, the sums are
 * added to others, as in `products`. */
INLINE void NAME(apart)(const int nu, const int nt, const int some, const shape_t *s, const R *dy, ptrdiff_t sd,
                        const R *x, const ptrdiff_t *taps, R *out, ptrdiff_t so)
{
    V acc[ROWS][TAPS], sums[ROWS][TAPS];
    const R *px[TAPS];
    int since = 0;
    const ptrdiff_t row = (ptrdiff_t)s->stride * s->width * s->batch, step = (ptrdiff_t)s->stride * s->batch;
#pragma GCC unroll 8
    for (int u = 0; u < nu; u++)
#pragma GCC unroll 8
        for (int t = 0; t < nt; t++)
            acc[u][t] = sums[u][t] = SET1((R)0);
    for (int i = 0; i < s->rows; i++) {
#pragma GCC unroll 8
        for (int t = 0; t < nt; t++)
            px[t] = x + taps[t] + i * row;
        for (int j = 0; j < s->columns; j++) {
            const R *d = dy + ((ptrdiff_t)i * s->columns + j) * s->batch;
            V v[TAPS];
#pragma GCC unroll 8
            for (int t = 0; t < nt; t++)
                v[t] = some ? LOAD_SOME(px[t] + j * step, some) : LOAD(px[t] + j * step);
#pragma GCC unroll 8
            for (int u = 0; u < nu; u++) {
                const V g = some ? LOAD_SOME(d + u * sd, some) : LOAD(d + u * sd);
#pragma GCC unroll 8
                for (int t = 0; t < nt; t++)
                    acc[u][t] = FMA(g, v[t], acc[u][t]);
            }
        }
        since += s->columns;
        if (since >= FLUSH) {
            since = 0;
#pragma GCC unroll 8
            for (int u = 0; u < nu; u++)
#pragma GCC unroll 8
                for (int t = 0; t < nt; t++) {
                    sums[u][t] += acc[u][t];
                    acc[u][t] = SET1((R)0);
                }
        }
    }
#pragma GCC unroll 8
    for (int u = 0; u < nu; u++)
#pragma GCC unroll 8
        for (int t = 0; t < nt; t++) {
            if (some)
                STORE_SOME(out + u * so + (ptrdiff_t)t * s->batch, some, sums[u][t] + acc[u][t]);
            else
                STORE(out + u * so + (ptrdiff_t)t * s->batch, sums[u][t] + acc[u][t]);
        }
}

static void NAME(rows_apart)(int nu, int nt, int some, const shape_t *s, const R *dy, ptrdiff_t sd, const R *x,
                             const ptrdiff_t *taps, R *out, ptrdiff_t so)
{
#define ONE(u, t)                                                                                                      \
    case u * 8 + t:                                                                                                    \
        if (some)                                                                                                      \
            NAME(apart)(u, t, some, s, dy, sd, x, taps, out, so);                                                      \
        else                                                                                                           \
            NAME(apart)(u, t, 0, s, dy, sd, x, taps, out, so);                                                         \
        break;
#define SOME(u) ONE(u, 1) ONE(u, 2) ONE(u, 3) ONE(u, 4)
#define MORE(u) ONE(u, 5) ONE(u, 6)
    switch (nu * 8 + nt) {
        SOME(1) SOME(2) SOME(3)
#if ROWS > 3
        SOME(4) MORE(1) MORE(2) MORE(3) MORE(4)
#endif
    }
#undef ONE
#undef SOME
#undef MORE
}

/* dkernels (units, n_in, kernel, kernel, batch) = the gradient of the kernels of each sample in [first, last); dbias
 * (units, batch) = the sums of dy over the outputs. */
void NAME(conv_samples)(const shape_t *s, const R *x, const R *dy, R *dkernels, R *dbias)
{
    const int k2 = s->kernel * s->kernel, all = s->n_in * k2;
    const int blocks = (s->n + ROWS - 1) / ROWS, groups = (all + TAPS - 1) / TAPS;
    const ptrdiff_t plane = (ptrdiff_t)s->height * s->width * s->batch, out = (ptrdiff_t)s->rows * s->columns * s->batch;
    for (int b = s->first; b < s->last; b += VL) {
        const int some = s->last - b < VL ? s->last - b : 0;
        for (int stripe = 0; stripe < s->count; stripe++) {
            const int unit = s->out + stripe * s->n;
            const R *xs = x + (s->source + stripe * s->source_step) * plane + b;
            for (int block = 0; block < blocks; block++) {
                const int u0 = EDGE(block, blocks, s->n), nu = EDGE(block + 1, blocks, s->n) - u0;
                for (int u = unit + u0; u < unit + u0 + nu; u++) {
                    V sum = SET1((R)0);
                    for (ptrdiff_t at = u * out + b; at < (u + 1) * out;) {
                        V few = SET1((R)0);
                        for (int k = 0; k < s->columns; k++, at += s->batch)
                            few += some ? LOAD_SOME(dy + at, some) : LOAD(dy + at);
                        sum += few;
                    }
                    if (some)
                        STORE_SOME(dbias + (ptrdiff_t)u * s->batch + b, some, sum);
                    else
                        STORE(dbias + (ptrdiff_t)u * s->batch + b, sum);
                }
                for (int group = 0; group < groups; group++) {
                    const int t0 = EDGE(group, groups, all), nt = EDGE(group + 1, groups, all) - t0;
                    ptrdiff_t taps[TAPS];
                    for (int t = 0; t < nt; t++) {
                        const int c = (t0 + t) / k2, r = (t0 + t) % k2;
                        taps[t] = c * plane + ((ptrdiff_t)(r / s->kernel) * s->width + r % s->kernel) * s->batch;
                    }
                    NAME(rows_apart)(nu, nt, some, s, dy + (unit + u0) * out + b, out, xs, taps,
                                     dkernels + ((ptrdiff_t)(unit + u0) * all + t0) * s->batch + b,
                                     (ptrdiff_t)all * s->batch);
                }
            }
        }
    }
}
