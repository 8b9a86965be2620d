/* The template: included once for each type and instruction set, see kernels.c for the macros. */

#if DOUBLE
#define R double
#define INTEGER uint64_t
#define MANTISSA 52
#define SHIFT 6755399441055744.0
#define TERMS 13
#define LARGE 708.0
#define LOG2_HIGH 6.93145751953125e-1
#define LOG2_LOW 1.42860682030941723212e-6
#define ROOT(a) __builtin_sqrt(a)
#else
#define R float
#define INTEGER uint32_t
#define MANTISSA 23
#define SHIFT 12582912.0
#define TERMS 7
#define LARGE 87.0
#define LOG2_HIGH 0.693359375
#define LOG2_LOW -2.12194440054690583e-4
#define ROOT(a) __builtin_sqrtf(a)
#endif

/* Products of `nu` rows of weights with `nv` vectors along the batch, summed over three nested loops. In a step of loop
 * k the vectors advance by sv[k] elements and the weights by sw[k]. With some > 0 the only vector has `some` lanes. */
INLINE void NAME(micro)(const int nu, const int nv, const int some, const int n[3], const R *v, const ptrdiff_t sv[3],
                        const R *w, const ptrdiff_t sw[3], R *out, ptrdiff_t so, const R *bias, int add)
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
                    x[k] = some ? LOAD_SOME(pv, some) : LOAD(pv + k * VL);
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

/* The same for any nu, with constants where the compiler needs them. */
static void NAME(block)(int nu, int nv, int some, const int n[3], const R *v, const ptrdiff_t sv[3], const R *w,
                        const ptrdiff_t sw[3], R *out, ptrdiff_t so, const R *bias, int add)
{
#define ONE(u)                                                                                                         \
    case u:                                                                                                            \
        if (nv == 2)                                                                                                   \
            NAME(micro)(u, 2, 0, n, v, sv, w, sw, out, so, bias, add);                                                 \
        else if (!some)                                                                                                \
            NAME(micro)(u, 1, 0, n, v, sv, w, sw, out, so, bias, add);                                                 \
        else                                                                                                           \
            NAME(micro)(u, 1, some, n, v, sv, w, sw, out, so, bias, add);                                              \
        break;
    switch (nu) {
        ONE(1) ONE(2) ONE(3) ONE(4) ONE(5) ONE(6)
#if UNITS > 6
        ONE(7) ONE(8) ONE(9) ONE(10)
#endif
    }
#undef ONE
}

/* Where block number k of `blocks` equal ones of `n` rows begins. */
#define EDGE(k, blocks, n) ((int)((int64_t)(k) * (n) / (blocks)))

/* y (units, rows, columns, batch) = bias + correlation of x (channels, height, width, batch) with kernels
 * (units, n_in, kernel, kernel), for one segment. pack: scratch of n x n_in x kernel^2 elements. */
void NAME(conv_forward)(const shape_t *s, const R *x, const R *kernels, const R *bias, R *y, R *pack)
{
    const int k2 = s->kernel * s->kernel, taps = s->n_in * k2, blocks = (s->n + UNITS - 1) / UNITS;
    const ptrdiff_t plane = (ptrdiff_t)s->height * s->width * s->batch, out = (ptrdiff_t)s->rows * s->columns * s->batch;
    const ptrdiff_t row = (ptrdiff_t)s->width * s->batch;
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
        for (int b = s->first; b < s->last;) {
            const int left = s->last - b, nv = left >= 2 * VL ? 2 : 1, some = left < VL ? left : 0;
            for (int i = 0; i < s->rows; i++)
                for (int j = 0; j < s->columns; j++)
                    for (int block = 0; block < blocks; block++) {
                        const int u0 = EDGE(block, blocks, s->n), nu = EDGE(block + 1, blocks, s->n) - u0;
                        const int n[3] = {s->n_in, s->kernel, s->kernel};
                        const ptrdiff_t sv[3] = {plane, row, s->batch};
                        const ptrdiff_t sw[3] = {(ptrdiff_t)k2 * nu, (ptrdiff_t)s->kernel * nu, nu};
                        const R *v = xs + i * s->stride * row + (ptrdiff_t)j * s->stride * s->batch + b;
                        R *into = y + (unit + u0) * out + ((ptrdiff_t)i * s->columns + j) * s->batch + b;
                        NAME(block)(nu, nv, some, n, v, sv, pack + (ptrdiff_t)u0 * taps, sw, into, out,
                                    bias ? bias + unit + u0 : 0, 0);
                    }
            b += some ? some : nv * VL;
        }
    }
}

/* dx (+)= the adjoint of conv_forward on dy, for one segment. Where no output sees an input, it is 0 (or stays). */
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
                    /* Output rows and columns that see this input; kernel rows go up as output rows go down. */
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

/* Sums over outputs and batch of `nu` rows of dy times `nt` taps of x, into out (nu rows, so apart). Every FLUSH vectors
 * the sums go into others, so that their rounding does not grow with the image and the batch. */
INLINE void NAME(products)(const int nu, const int nt, const shape_t *s, const R *dy, ptrdiff_t sd, const R *x,
                           const ptrdiff_t *taps, R *out, ptrdiff_t so)
{
    V acc[ROWS][TAPS], sums[ROWS][TAPS];
    const R *px[TAPS];
    const ptrdiff_t row = (ptrdiff_t)s->stride * s->width * s->batch, step = (ptrdiff_t)s->stride * s->batch;
    const int whole = s->batch / VL * VL, some = s->batch - whole;
    int since = 0;
#pragma GCC unroll 8
    for (int u = 0; u < nu; u++)
#pragma GCC unroll 8
        for (int t = 0; t < nt; t++)
            acc[u][t] = sums[u][t] = SET1((R)0);
    for (int i = 0; i < s->rows; i++)
        for (int j = 0; j < s->columns; j++) {
            const R *d = dy + ((ptrdiff_t)i * s->columns + j) * s->batch;
#pragma GCC unroll 8
            for (int t = 0; t < nt; t++)
                px[t] = x + taps[t] + i * row + j * step;
            for (int first = 0; first < s->batch; first += FLUSH * VL) {
                const int last = first + FLUSH * VL < whole ? first + FLUSH * VL : whole;
                for (int b = first; b < last; b += VL) {
                    V v[TAPS];
#pragma GCC unroll 8
                    for (int t = 0; t < nt; t++)
                        v[t] = LOAD(px[t] + b);
#pragma GCC unroll 8
                    for (int u = 0; u < nu; u++) {
                        V g = LOAD(d + u * sd + b);
#pragma GCC unroll 8
                        for (int t = 0; t < nt; t++)
                            acc[u][t] = FMA(g, v[t], acc[u][t]);
                    }
                }
                if (some && first + FLUSH * VL >= s->batch) {
                    V v[TAPS];
#pragma GCC unroll 8
                    for (int t = 0; t < nt; t++)
                        v[t] = LOAD_SOME(px[t] + whole, some);
#pragma GCC unroll 8
                    for (int u = 0; u < nu; u++) {
                        V g = LOAD_SOME(d + u * sd + whole, some);
#pragma GCC unroll 8
                        for (int t = 0; t < nt; t++)
                            acc[u][t] = FMA(g, v[t], acc[u][t]);
                    }
                }
                since += last > first ? (last - first) / VL : 1;
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

/* dkernels (units, n_in, kernel, kernel): the gradient of conv_forward with respect to its kernels, for one segment. */
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

/* Sums over outputs, for each sample apart, of `nu` rows of dy times `nt` taps of x. The rows of out are so apart, its
 * taps a batch. */
INLINE void NAME(apart)(const int nu, const int nt, const int some, const shape_t *s, const R *dy, ptrdiff_t sd,
                        const R *x, const ptrdiff_t *taps, R *out, ptrdiff_t so)
{
    V acc[ROWS][TAPS];
    const R *px[TAPS];
    const ptrdiff_t row = (ptrdiff_t)s->stride * s->width * s->batch, step = (ptrdiff_t)s->stride * s->batch;
#pragma GCC unroll 8
    for (int u = 0; u < nu; u++)
#pragma GCC unroll 8
        for (int t = 0; t < nt; t++)
            acc[u][t] = SET1((R)0);
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
    }
#pragma GCC unroll 8
    for (int u = 0; u < nu; u++)
#pragma GCC unroll 8
        for (int t = 0; t < nt; t++) {
            if (some)
                STORE_SOME(out + u * so + (ptrdiff_t)t * s->batch, some, acc[u][t]);
            else
                STORE(out + u * so + (ptrdiff_t)t * s->batch, acc[u][t]);
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

/* dkernels (units, n_in, kernel, kernel, batch): what each sample adds to the result of conv_weight, for the samples
 * from first to last; dbias (units, batch): the sums of dy over the outputs. */
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
                    for (ptrdiff_t at = u * out + b; at < (u + 1) * out; at += s->batch)
                        sum += some ? LOAD_SOME(dy + at, some) : LOAD(dy + at);
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

/* y (channels, height / size, width / size, batch): maxima of size x size windows of x. */
void NAME(max_pool)(int channels, int height, int width, int batch, int size, const R *restrict x, R *restrict y)
{
    for (int c = 0; c < channels; c++)
        for (int i = 0; i < height / size; i++)
            for (int j = 0; j < width / size; j++) {
                R *restrict m = y + (((ptrdiff_t)c * (height / size) + i) * (width / size) + j) * batch;
                for (int k = 0; k < size * size; k++) {
                    const R *restrict v =
                        x + (((ptrdiff_t)c * height + i * size + k / size) * width + j * size + k % size) * batch;
                    if (k == 0)
                        memcpy(m, v, batch * sizeof(R));
                    else
                        for (int b = 0; b < batch; b++)
                            m[b] = v[b] > m[b] || v[b] != v[b] ? v[b] : m[b];
                }
            }
}

/* dx: dy where x is a window's first maximum, 0 elsewhere. y is scratch. */
void NAME(max_pool_back)(int channels, int height, int width, int batch, int size, const R *restrict x, R *restrict y,
                         const R *restrict dy, R *restrict dx)
{
    const int rows = height / size, columns = width / size;
    NAME(max_pool)(channels, height, width, batch, size, x, y);
    if (rows * size != height || columns * size != width)
        memset(dx, 0, sizeof(R) * channels * height * width * batch);
    for (int c = 0; c < channels; c++)
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < columns; j++) {
                const ptrdiff_t at = (((ptrdiff_t)c * rows + i) * columns + j) * batch;
                R *restrict m = y + at;
                const R *restrict d = dy + at;
                for (int k = 0; k < size * size; k++) {
                    const ptrdiff_t in = (((ptrdiff_t)c * height + i * size + k / size) * width + j * size + k % size) * batch;
                    const R *restrict v = x + in;
                    R *restrict into = dx + in;
                    for (int b = 0; b < batch; b++) {
                        /* A later entry of the window may tie with this one: NaN equals nothing, so it cannot win again. */
                        const int hit = v[b] == m[b];
                        into[b] = hit ? d[b] : (R)0;
                        m[b] = hit ? (R)NAN : m[b];
                    }
                }
            }
}

/* out (at i so + j to) = y summed over the n elements of row (i, j), rows one after the other. */
void NAME(row_sums)(int count, int rows, ptrdiff_t n, const R *y, R *out, ptrdiff_t so, ptrdiff_t to)
{
    for (int i = 0; i < count; i++)
        for (int j = 0; j < rows; j++) {
            double total = 0;
            /* Short sums in the dtype, their sum in double. */
            for (ptrdiff_t k = 0; k < n; k += 128 * VL) {
                const ptrdiff_t left = n - k < 128 * VL ? n - k : 128 * VL, whole = left / (2 * VL) * 2 * VL;
                V a = SET1((R)0), b = a;
                for (ptrdiff_t q = 0; q < whole; q += 2 * VL) {
                    a += LOAD(y + q);
                    b += LOAD(y + q + VL);
                }
                R sum = SUM(a + b);
                for (ptrdiff_t q = whole; q < left; q++)
                    sum += y[q];
                total += sum;
                y += left;
            }
            out[i * so + j * to] = (R)total;
        }
}

/* Rows of y (n elements each, one after the other) += bias (at i sb + j tb). */
void NAME(add_bias)(int count, int rows, ptrdiff_t n, R *restrict y, const R *restrict bias, ptrdiff_t sb, ptrdiff_t tb)
{
    for (int i = 0; i < count; i++)
        for (int j = 0; j < rows; j++, y += n) {
            const R b = bias[i * sb + j * tb];
            for (ptrdiff_t k = 0; k < n; k++)
                y[k] += b;
        }
}

/* out (n_in, k + pool - 1, k + pool - 1) for each of count x rows units: w (n_in, k, k), at i sw + j tw, smoothed by a
 * pool x pool box. */
void NAME(fold)(int count, int rows, int n_in, int k, int pool, const R *restrict w, ptrdiff_t sw, ptrdiff_t tw,
                R *restrict out)
{
    const int wide = k + pool - 1;
    const R scale = (R)(1.0 / (pool * pool));
    memset(out, 0, sizeof(R) * count * rows * n_in * wide * wide);
    for (int i = 0; i < count; i++)
        for (int j = 0; j < rows; j++) {
            const R *restrict from = w + i * sw + j * tw;
            for (int c = 0; c < n_in; c++, from += k * k, out += wide * wide)
                for (int a = 0; a < k; a++)
                    for (int b = 0; b < k; b++) {
                        const R value = scale * from[a * k + b];
                        for (int p = 0; p < pool; p++)
                            for (int q = 0; q < pool; q++)
                                out[(a + p) * wide + b + q] += value;
                    }
        }
}

/* The adjoint of fold, into out (n_in, k, k), at i sw + j tw. */
void NAME(unfold)(int count, int rows, int n_in, int k, int pool, const R *restrict from, R *restrict out, ptrdiff_t sw,
                  ptrdiff_t tw)
{
    const int wide = k + pool - 1;
    const R scale = (R)(1.0 / (pool * pool));
    for (int i = 0; i < count; i++)
        for (int j = 0; j < rows; j++) {
            R *restrict into = out + i * sw + j * tw;
            for (int c = 0; c < n_in; c++, into += k * k, from += wide * wide)
                for (int a = 0; a < k; a++)
                    for (int b = 0; b < k; b++) {
                        R sum = 0;
                        for (int p = 0; p < pool; p++)
                            for (int q = 0; q < pool; q++)
                                sum += from[(a + p) * wide + b + q];
                        into[a * k + b] = scale * sum;
                    }
        }
}

/* exp(x) for |x| <= LARGE: 2^n times the Taylor polynomial of the rest, |r| <= log(2) / 2, which is exact to rounding.
 * Adding SHIFT rounds to a whole number, which then is in the lowest bits. */
INLINE R NAME(exponential)(R x)
{
    union {
        R value;
        INTEGER bits;
    } t, scale;
    t.value = x * (R)1.44269504088896340736 + (R)SHIFT;
    const R n = t.value - (R)SHIFT, r = x - n * (R)LOG2_HIGH - n * (R)LOG2_LOW;
    R sum = (R)1;
#pragma GCC unroll 16
    for (int k = TERMS; k > 0; k--)
        sum = sum * (r * (R)(1.0 / k)) + (R)1;
    scale.value = (R)1;
    scale.bits += t.bits << MANTISSA;
    return sum * scale.value;
}

/* `runs` runs: out[to ..] = values[from ..] or, with `add`, += ; table: from, to and length of each. */
void NAME(transfer)(ptrdiff_t runs, const int64_t *table, const R *restrict values, R *restrict out, int add)
{
    for (ptrdiff_t k = 0; k < runs; k++) {
        const R *restrict from = values + table[3 * k];
        R *restrict to = out + table[3 * k + 1];
        if (add)
            for (ptrdiff_t i = 0; i < table[3 * k + 2]; i++)
                to[i] += from[i];
        else
            memcpy(to, from, table[3 * k + 2] * sizeof(R));
    }
}

/* Scalar products of `nr` rows of z, `row` elements apart, with v (n); short sums in the type, their sum in double. */
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

/* out (n) += the sum of `nr` rows of z, `row` elements apart, times w. */
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

/* coefficients (rows) = Z v and out (n) = sigma v + Z^T (middle Z v): Z (rows, n, `row` elements apart), middle (rows,
 * rows). weights: scratch (rows). Z is read from memory once where it fits the cache. */
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

/* `element_product` for each of `count` elements, all arrays of one element after those of another. */
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

/* q += U_e^T B_e U_e p for each element e; *curvature = the sum of their p^T U_e^T B_e U_e p. sizes: variables of each
 * element, at most n; table: from (in p), to (in rows of n elements) and length of runs, those of element e from
 * starts[e] to starts[e + 1]; work: scratch (2 n + rows). */
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

/* y = 1 / (1 + exp(-y)) */
void NAME(sigmoid)(ptrdiff_t n, R *y)
{
    for (ptrdiff_t k = 0; k < n; k++) {
        /* Not a number stays so: comparisons with it are false. */
        const R x = y[k] > (R)LARGE ? (R)LARGE : y[k] < -(R)LARGE ? -(R)LARGE : y[k];
        y[k] = (R)1 / ((R)1 + NAME(exponential)(-x));
    }
}

/* dy *= y (1 - y) */
void NAME(sigmoid_back)(ptrdiff_t n, const R *restrict y, R *restrict dy)
{
    for (ptrdiff_t k = 0; k < n; k++)
        dy[k] *= y[k] * ((R)1 - y[k]);
}

/* dy *= 1 - y^2 */
void NAME(tanh_back)(ptrdiff_t n, const R *restrict y, R *restrict dy)
{
    for (ptrdiff_t k = 0; k < n; k++)
        dy[k] *= (R)1 - y[k] * y[k];
}

/* dy where y > 0, else 0; not a number stays so. */
void NAME(relu_back)(ptrdiff_t n, const R *restrict y, R *restrict dy)
{
    for (ptrdiff_t k = 0; k < n; k++)
        dy[k] = y[k] > (R)0 ? dy[k] : y[k] * (R)0;
}

/* Adam (Kingma and Ba 2015, algorithm 1) along g + l2 w: rate = lr / (1 - beta1^t), root = 1 / sqrt(1 - beta2^t); w is
 * multiplied by `keep` first (the decoupled decay of AdamW). */
void NAME(adam)(ptrdiff_t n, R *restrict w, const R *restrict g, R *restrict m, R *restrict v, double rate, double root,
                double beta1, double beta2, double eps, double l2, double keep)
{
    const R b1 = (R)beta1, c1 = (R)(1 - beta1), b2 = (R)beta2, c2 = (R)(1 - beta2);
    const R lr = (R)rate, r = (R)root, e = (R)eps, penalty = (R)l2, kept = (R)keep;
    for (ptrdiff_t k = 0; k < n; k++) {
        const R d = g[k] + penalty * w[k], a = b1 * m[k] + c1 * d, s = b2 * v[k] + c2 * (d * d);
        m[k] = a;
        v[k] = s;
        w[k] = kept * w[k] - lr * (a / (ROOT(s) * r + e));
    }
}

#undef R
#undef V
#undef VL
#undef UNITS
#undef ROWS
#undef TAPS
#undef NAME
#undef LOAD
#undef STORE
#undef LOAD_SOME
#undef STORE_SOME
#undef SET1
#undef FMA
#undef SUM
#undef MASK
#undef ROOT
#undef INTEGER
#undef MANTISSA
#undef SHIFT
#undef TERMS
#undef LARGE
#undef LOG2_HIGH
#undef LOG2_LOW
#undef DOUBLE
