/* Convolutions in register blocks along the batch. Part of the template kernels.h. */

/* Positions of up to two vectors whose lanes may cross from one image column to the next. lanes: lanes in the first
 * column (VL: all); begin: position of the first lane; on: extra offset of the lanes in the second column. */
typedef struct {
    int lanes[2];
    ptrdiff_t begin[2], on;
} NAME(cut);

/* Products of `nu` rows of weights with `nv` vectors along the batch, summed over three nested loops. In a step of loop
 * k the vectors advance by sv[k] elements and the weights by sw[k]. With some > 0 there is one vector, of `some` lanes.
 * Vectors are contiguous unless `cut` gives their positions. */
INLINE void NAME(micro)(const int nu, const int nv, const int some, const NAME(cut) * cut, const int n[3], const R *v,
                        const ptrdiff_t sv[3], const R *w, const ptrdiff_t sw[3], R *out, ptrdiff_t so, const R *bias,
                        int add)
{
    V acc[UNITS][2];
#pragma GCC unroll 16
    for (int u = 0; u < nu; u++)
#pragma GCC unroll 2
        for (int k = 0; k < nv; k++) {
            if (add)
                acc[u][k] = some ? LOAD_SOME(out + u * so, some) : LOAD(out + u * so + k * VL);
            else
                acc[u][k] = SET1(bias ? bias[u] : (R)0);
        }
    for (int a = 0; a < n[0]; a++)
        for (int b = 0; b < n[1]; b++) {
            const R *pv = v + a * sv[0] + b * sv[1], *pw = w + a * sw[0] + b * sw[1];
            for (int c = 0; c < n[2]; c++) {
                V x[2];
#pragma GCC unroll 2
                for (int k = 0; k < nv; k++)
                    x[k] = cut    ? LOAD_CUT(pv + cut->begin[k], cut->lanes[k], cut->on)
                           : some ? LOAD_SOME(pv, some)
                                  : LOAD(pv + k * VL);
#pragma GCC unroll 16
                for (int u = 0; u < nu; u++) {
                    V weight = SET1(pw[u]);
#pragma GCC unroll 2
                    for (int k = 0; k < nv; k++)
                        acc[u][k] = FMA(weight, x[k], acc[u][k]);
                }
                pv += sv[2];
                pw += sw[2];
            }
        }
#pragma GCC unroll 16
    for (int u = 0; u < nu; u++)
#pragma GCC unroll 2
        for (int k = 0; k < nv; k++) {
            if (some)
                STORE_SOME(out + u * so, some, acc[u][k]);
            else
                STORE(out + u * so + k * VL, acc[u][k]);
        }
}

/* ONE(nu) with a constant for each value of nu, so that the compiler unrolls the loops. */
#if UNITS > 6
#define ANY(nu)                                                                                                        \
    switch (nu) {                                                                                                      \
        ONE(1) ONE(2) ONE(3) ONE(4) ONE(5) ONE(6) ONE(7) ONE(8) ONE(9) ONE(10)                                         \
    }
#else
#define ANY(nu)                                                                                                        \
    switch (nu) {                                                                                                      \
        ONE(1) ONE(2) ONE(3) ONE(4) ONE(5) ONE(6)                                                                      \
    }
#endif

static void NAME(block)(int nu, int nv, int some, const int n[3], const R *v, const ptrdiff_t sv[3], const R *w,
                        const ptrdiff_t sw[3], R *out, ptrdiff_t so, const R *bias, int add)
{
#define ONE(u)                                                                                                         \
    case u:                                                                                                            \
        if (nv == 2)                                                                                                   \
            NAME(micro)(u, 2, 0, 0, n, v, sv, w, sw, out, so, bias, add);                                              \
        else if (!some)                                                                                                \
            NAME(micro)(u, 1, 0, 0, n, v, sv, w, sw, out, so, bias, add);                                              \
        else                                                                                                           \
            NAME(micro)(u, 1, some, 0, n, v, sv, w, sw, out, so, bias, add);                                           \
        break;
    ANY(nu)
#undef ONE
}

/* block() for vectors at the positions of `cut`. */
static void NAME(block_cut)(int nu, int nv, const NAME(cut) * cut, const int n[3], const R *v, const ptrdiff_t sv[3],
                            const R *w, const ptrdiff_t sw[3], R *out, ptrdiff_t so, const R *bias)
{
#define ONE(u)                                                                                                         \
    case u:                                                                                                            \
        if (nv == 2)                                                                                                   \
            NAME(micro)(u, 2, 0, cut, n, v, sv, w, sw, out, so, bias, 0);                                              \
        else                                                                                                           \
            NAME(micro)(u, 1, 0, cut, n, v, sv, w, sw, out, so, bias, 0);                                              \
        break;
    ANY(nu)
#undef ONE
}

#undef ANY

/* The first row of block k, if n rows are divided into `blocks` blocks of nearly equal size. */
#define EDGE(k, blocks, n) ((int)((int64_t)(k) * (n) / (blocks)))

/* The number of adjacent columns, 1, 2 or 4, that are computed together: the one that leaves the fewest lanes of
 * vectors empty. The batches of adjacent columns are contiguous. */
static int NAME(together)(const shape_t *s)
{
    int best = 1;
    if (s->first > 0 || s->last < s->batch || s->batch < VL)
        return 1;
    for (int g = 2; g <= 4 && g <= s->columns; g *= 2) {
        const int more = (g * s->batch + VL - 1) / VL, before = (best * s->batch + VL - 1) / VL;
        best = more * best < before * g ? g : best;
    }
    return best;
}

/* conv_forward for one stripe and the columns [j0, j1), `g` at a time. j1 - j0 is a multiple of g. */
static void NAME(forward_columns)(const shape_t *s, int j0, int j1, int g, const R *xs, const R *pack, const R *bias,
                                  R *ys)
{
    const int k2 = s->kernel * s->kernel, taps = s->n_in * k2, blocks = (s->n + UNITS - 1) / UNITS;
    const ptrdiff_t plane = (ptrdiff_t)s->height * s->width * s->batch, out = (ptrdiff_t)s->rows * s->columns * s->batch;
    const ptrdiff_t row = (ptrdiff_t)s->width * s->batch, step = (ptrdiff_t)s->stride * s->batch;
    const int last = g > 1 ? g * s->batch : s->last;
    for (int f = g > 1 ? 0 : s->first; f < last;) {
        const int left = last - f, nv = left >= 2 * VL ? 2 : 1, some = left < VL ? left : 0, column = f / s->batch;
        NAME(cut) cut = {{VL, VL}, {0, 0}, step - s->batch};
        int cuts = 0;
        for (int k = 0; k < nv && !some; k++) {
            const int at = f + k * VL, c = at / s->batch, here = s->batch - at % s->batch;
            cut.begin[k] = k * VL + (c - column) * cut.on;
            cut.lanes[k] = here < VL ? here : VL;
            cuts |= here < VL || c > column;
        }
        for (int i = 0; i < s->rows; i++)
            for (int j = j0; j < j1; j += g)
                for (int block = 0; block < blocks; block++) {
                    const int u0 = EDGE(block, blocks, s->n), nu = EDGE(block + 1, blocks, s->n) - u0;
                    const int n[3] = {s->n_in, s->kernel, s->kernel};
                    const ptrdiff_t sv[3] = {plane, row, s->batch};
                    const ptrdiff_t sw[3] = {(ptrdiff_t)k2 * nu, (ptrdiff_t)s->kernel * nu, nu};
                    const R *v = xs + i * s->stride * row + (j + column) * step + (f - (ptrdiff_t)column * s->batch);
                    R *into = ys + u0 * out + ((ptrdiff_t)i * s->columns + j) * s->batch + f;
                    const R *w = pack + (ptrdiff_t)u0 * taps, *b = bias ? bias + u0 : 0;
                    if (cuts)
                        NAME(block_cut)(nu, nv, &cut, n, v, sv, w, sw, into, out, b);
                    else
                        NAME(block)(nu, nv, some, n, v, sv, w, sw, into, out, b, 0);
                }
        f += some ? some : nv * VL;
    }
}

/* y (units, rows, columns, batch) = bias + correlation of x (channels, height, width, batch) with kernels
 * (units, n_in, kernel, kernel), for the stripes of s. pack: scratch of n x n_in x kernel^2 elements. */
void NAME(conv_forward)(const shape_t *s, const R *x, const R *kernels, const R *bias, R *y, R *pack)
{
    const int k2 = s->kernel * s->kernel, taps = s->n_in * k2, blocks = (s->n + UNITS - 1) / UNITS;
    const ptrdiff_t plane = (ptrdiff_t)s->height * s->width * s->batch, out = (ptrdiff_t)s->rows * s->columns * s->batch;
    const int g = NAME(together)(s), even = s->columns / g * g;
    for (int stripe = 0; stripe < s->count; stripe++) {
        const int unit = s->out + stripe * s->n;
        const R *xs = x + (s->source + stripe * s->source_step) * plane, *ks = kernels + (ptrdiff_t)unit * taps;
        for (int block = 0; block < blocks; block++) {
            const int u0 = EDGE(block, blocks, s->n), nu = EDGE(block + 1, blocks, s->n) - u0;
            R *packed = pack + (ptrdiff_t)u0 * taps;
            for (int u = 0; u < nu; u++)
                for (int t = 0; t < taps; t++)
                    packed[(ptrdiff_t)t * nu + u] = ks[(ptrdiff_t)(u0 + u) * taps + t];
        }
        NAME(forward_columns)(s, 0, even, g, xs, pack, bias ? bias + unit : 0, y + unit * out);
        NAME(forward_columns)(s, even, s->columns, 1, xs, pack, bias ? bias + unit : 0, y + unit * out);
    }
}

/* dx = or, with `add`, += the adjoint of conv_forward applied to dy, for the stripes of s. */
void NAME(conv_input)(const shape_t *s, const R *dy, const R *kernels, R *dx, R *pack, int add)
{
    const int k2 = s->kernel * s->kernel, blocks = (s->n_in + UNITS - 1) / UNITS;
    const ptrdiff_t plane = (ptrdiff_t)s->height * s->width * s->batch, out = (ptrdiff_t)s->rows * s->columns * s->batch;
    for (int stripe = 0; stripe < s->count; stripe++) {
        const int unit = s->out + stripe * s->n;
        const R *ds = dy + unit * out, *ks = kernels + (ptrdiff_t)unit * s->n_in * k2;
        R *xs = dx + (s->source + stripe * s->source_step) * plane;
        for (int block = 0; block < blocks; block++) {
            const int c0 = EDGE(block, blocks, s->n_in), nc = EDGE(block + 1, blocks, s->n_in) - c0;
            R *packed = pack + (ptrdiff_t)c0 * s->n * k2;
            for (int u = 0; u < s->n; u++)
                for (int c = 0; c < nc; c++)
                    for (int t = 0; t < k2; t++)
                        packed[((ptrdiff_t)u * k2 + t) * nc + c] = ks[((ptrdiff_t)u * s->n_in + c0 + c) * k2 + t];
        }
        for (int b = s->first; b < s->last;) {
            const int left = s->last - b, nv = left >= 2 * VL ? 2 : 1, some = left < VL ? left : 0;
            for (int i = 0; i < s->height; i++)
                for (int j = 0; j < s->width; j++) {
                    /* Output rows and columns whose windows contain this input. The kernel's row increases as the
                     * output row decreases. */
                    int top = i / s->stride, right = j / s->stride;
                    if (top >= s->rows)
                        top = s->rows - 1;
                    if (right >= s->columns)
                        right = s->columns - 1;
                    const int ki = i - top * s->stride, kj = j - right * s->stride;
                    int ni = ki >= s->kernel ? 0 : (s->kernel - 1 - ki) / s->stride + 1;
                    int nj = kj >= s->kernel ? 0 : (s->kernel - 1 - kj) / s->stride + 1;
                    ni = ni > top + 1 ? top + 1 : ni;
                    nj = nj > right + 1 ? right + 1 : nj;
                    for (int block = 0; block < blocks; block++) {
                        const int c0 = EDGE(block, blocks, s->n_in), nc = EDGE(block + 1, blocks, s->n_in) - c0;
                        const int n[3] = {s->n, ni, nj};
                        const ptrdiff_t sv[3] = {out, -(ptrdiff_t)s->columns * s->batch, -(ptrdiff_t)s->batch};
                        const ptrdiff_t sw[3] = {(ptrdiff_t)k2 * nc, (ptrdiff_t)s->stride * s->kernel * nc,
                                                 (ptrdiff_t)s->stride * nc};
                        const R *v = ds + ((ptrdiff_t)top * s->columns + right) * s->batch + b;
                        const R *w = pack + (ptrdiff_t)c0 * s->n * k2 + ((ptrdiff_t)ki * s->kernel + kj) * nc;
                        R *into = xs + c0 * plane + ((ptrdiff_t)i * s->width + j) * s->batch + b;
                        NAME(block)(nc, nv, some, n, v, sv, w, sw, into, plane, 0, add);
                    }
                }
            b += some ? some : nv * VL;
        }
    }
}

/* Sums over outputs and batch of `nu` rows of dy times `nt` taps of x, into out (nu rows with stride so). After every
 * FLUSH vectors the sums are added to others, so that rounding does not grow with the image and the batch. */
INLINE void NAME(products)(const int nu, const int nt, const shape_t *s, const R *dy, ptrdiff_t sd, const R *x,
                           const ptrdiff_t *taps, R *out, ptrdiff_t so)
{
    V acc[ROWS][TAPS], sums[ROWS][TAPS];
    const ptrdiff_t row = (ptrdiff_t)s->stride * s->width * s->batch, step = (ptrdiff_t)s->stride * s->batch;
    /* The batches of the columns of a row are contiguous in dy: as one run they leave the fewest lanes empty. A batch
     * smaller than a vector is a run of its own, since a vector must not reach over more than two columns. */
    const int runs = s->batch < VL ? s->columns : 1, size = s->columns / runs * s->batch;
    int since = 0;
#pragma GCC unroll 8
    for (int u = 0; u < nu; u++)
#pragma GCC unroll 8
        for (int t = 0; t < nt; t++)
            acc[u][t] = sums[u][t] = SET1((R)0);
    for (int k = 0; k < s->rows * runs; k++) {
        const R *d = dy + (ptrdiff_t)k * size;
        ptrdiff_t at = k / runs * row + k % runs * step;
        for (int f = 0, b = 0; f < size; f += VL) {
            const int left = size - f, here = s->batch - b;
            V v[TAPS];
            if (here >= VL) {
#pragma GCC unroll 8
                for (int t = 0; t < nt; t++)
                    v[t] = LOAD(x + taps[t] + at);
            } else if (left >= VL) {
#pragma GCC unroll 8
                for (int t = 0; t < nt; t++)
                    v[t] = LOAD_CUT(x + taps[t] + at, here, step - s->batch);
            } else {
#pragma GCC unroll 8
                for (int t = 0; t < nt; t++)
                    v[t] = LOAD_SOME(x + taps[t] + at, left);
            }
#pragma GCC unroll 8
            for (int u = 0; u < nu; u++) {
                V g = left >= VL ? LOAD(d + u * sd + f) : LOAD_SOME(d + u * sd + f, left);
#pragma GCC unroll 8
                for (int t = 0; t < nt; t++)
                    acc[u][t] = FMA(g, v[t], acc[u][t]);
            }
            b += VL;
            at += VL;
            if (b >= s->batch) {
                b -= s->batch;
                at += step - s->batch;
            }
            if (++since >= FLUSH) {
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
    }
#pragma GCC unroll 8
    for (int u = 0; u < nu; u++)
#pragma GCC unroll 8
        for (int t = 0; t < nt; t++)
            out[u * so + t] = SUM(sums[u][t] + acc[u][t]);
}

static void NAME(rows)(int nu, int nt, const shape_t *s, const R *dy, ptrdiff_t sd, const R *x, const ptrdiff_t *taps,
                       R *out, ptrdiff_t so)
{
#define ONE(u, t)                                                                                                      \
    case u * 8 + t:                                                                                                    \
        NAME(products)(u, t, s, dy, sd, x, taps, out, so);                                                             \
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

/* dkernels (units, n_in, kernel, kernel) = the gradient of conv_forward with respect to the kernels, for the stripes of
 * s. */
void NAME(conv_weight)(const shape_t *s, const R *x, const R *dy, R *dkernels)
{
    const int k2 = s->kernel * s->kernel, all = s->n_in * k2;
    const int blocks = (s->n + ROWS - 1) / ROWS, groups = (all + TAPS - 1) / TAPS;
    const ptrdiff_t plane = (ptrdiff_t)s->height * s->width * s->batch, out = (ptrdiff_t)s->rows * s->columns * s->batch;
    for (int stripe = 0; stripe < s->count; stripe++) {
        const int unit = s->out + stripe * s->n;
        const R *xs = x + (s->source + stripe * s->source_step) * plane;
        for (int block = 0; block < blocks; block++) {
            const int u0 = EDGE(block, blocks, s->n), nu = EDGE(block + 1, blocks, s->n) - u0;
            for (int group = 0; group < groups; group++) {
                const int t0 = EDGE(group, groups, all), nt = EDGE(group + 1, groups, all) - t0;
                ptrdiff_t taps[TAPS];
                for (int t = 0; t < nt; t++) {
                    const int c = (t0 + t) / k2, r = (t0 + t) % k2;
                    taps[t] = c * plane + ((ptrdiff_t)(r / s->kernel) * s->width + r % s->kernel) * s->batch;
                }
                NAME(rows)(nu, nt, s, dy + (unit + u0) * out, out, xs, taps, dkernels + (ptrdiff_t)(unit + u0) * all + t0,
                           all);
            }
        }
    }
}
