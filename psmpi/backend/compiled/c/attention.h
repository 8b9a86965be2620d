/* Multi-head attention, with samples side by side in vectors. Part of the template kernels.h.
 *
 * The queries, keys and values of a head and VL samples are packed, (steps, size) vectors each, so that products of
 * small matrices read contiguous memory. Probabilities exist for TALL steps at a time.
 */

#define TALL (4 * ROWS)

/* c (nu, nt) = or += the products of nu rows of a and nt rows of b, of n vectors each. The strides of c are ci and cj;
 * ak and bk are the strides along the rows of a and b. */
INLINE void NAME(product_tile)(const int nu, const int nt, const int add, int n, const R *a, ptrdiff_t ai, ptrdiff_t ak,
                               const R *b, ptrdiff_t bj, ptrdiff_t bk, R *c, ptrdiff_t ci, ptrdiff_t cj)
{
    V acc[ROWS][TAPS];
#pragma GCC unroll 8
    for (int i = 0; i < nu; i++)
#pragma GCC unroll 8
        for (int j = 0; j < nt; j++)
            acc[i][j] = add ? LOAD(c + i * ci + j * cj) : SET1((R)0);
    for (int k = 0; k < n; k++, a += ak, b += bk) {
        V v[TAPS];
#pragma GCC unroll 8
        for (int j = 0; j < nt; j++)
            v[j] = LOAD(b + j * bj);
#pragma GCC unroll 8
        for (int i = 0; i < nu; i++) {
            const V u = LOAD(a + i * ai);
#pragma GCC unroll 8
            for (int j = 0; j < nt; j++)
                acc[i][j] = FMA(u, v[j], acc[i][j]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < nu; i++)
#pragma GCC unroll 8
        for (int j = 0; j < nt; j++)
            STORE(c + i * ci + j * cj, acc[i][j]);
}

/* The same for nu rows of c and any number m of columns. */
static void NAME(product_rows)(int nu, int m, int add, int n, const R *a, ptrdiff_t ai, ptrdiff_t ak, const R *b,
                               ptrdiff_t bj, ptrdiff_t bk, R *c, ptrdiff_t ci, ptrdiff_t cj)
{
#define ONE(u, t)                                                                                                      \
    case u * 8 + t:                                                                                                    \
        if (add)                                                                                                       \
            NAME(product_tile)(u, t, 1, n, a, ai, ak, b, bj, bk, c, ci, cj);                                           \
        else                                                                                                           \
            NAME(product_tile)(u, t, 0, n, a, ai, ak, b, bj, bk, c, ci, cj);                                           \
        break;
#define SOME(u) ONE(u, 1) ONE(u, 2) ONE(u, 3) ONE(u, 4)
#define MORE(u) ONE(u, 5) ONE(u, 6)
    for (int j = 0; j < m; j += TAPS, b += TAPS * bj, c += TAPS * cj) {
        const int nt = m - j < TAPS ? m - j : TAPS;
        switch (nu * 8 + nt) {
            SOME(1) SOME(2) SOME(3)
#if ROWS > 3
            SOME(4) MORE(1) MORE(2) MORE(3) MORE(4)
#endif
        }
    }
#undef ONE
#undef SOME
#undef MORE
}

/* Pack rows of a head, x (size, steps, batch) from its first sample on, into out (steps, size) vectors. Lanes without a
 * sample are 0. */
INLINE void NAME(pack_head)(const attention_t *s, int some, const R *x, R *out)
{
    for (int c = 0; c < s->size; c++)
        for (int t = 0; t < s->steps; t++, x += s->batch)
            STORE(out + ((ptrdiff_t)t * s->size + c) * VL, some ? LOAD_SOME(x, some) : LOAD(x));
}

/* The reverse of pack_head. */
INLINE void NAME(unpack_head)(const attention_t *s, int some, const R *from, R *y)
{
    for (int c = 0; c < s->size; c++)
        for (int t = 0; t < s->steps; t++, y += s->batch) {
            const V v = LOAD(from + ((ptrdiff_t)t * s->size + c) * VL);
            if (some)
                STORE_SOME(y, some, v);
            else
                STORE(y, v);
        }
}

/* The number of steps that the rows of a tile attend to: all, or if causal those up to the last row's own. */
INLINE int NAME(seen)(const attention_t *s, int t, int nu)
{
    return s->causal ? t + nu : s->steps;
}

/* p (tall, steps) vectors = the probabilities of `tall` steps from t0 on, padded with 0 to a whole tile. ends: the
 * lengths of the samples, or NULL. */
INLINE void NAME(probabilities)(const attention_t *s, int t0, int tall, const R *q, const R *k, const R *ends, R *p)
{
    const ptrdiff_t row = (ptrdiff_t)s->steps * VL, wide = (ptrdiff_t)s->size * VL;
    const V scale = SET1((R)(1 / __builtin_sqrt((double)s->size)));
    for (int i = 0; i < tall; i += ROWS) {
        const int nu = tall - i < ROWS ? tall - i : ROWS, m = NAME(seen)(s, t0 + i, nu);
        NAME(product_rows)(nu, m, 0, s->size, q + (t0 + i) * wide, wide, VL, k, wide, VL, p + i * row, row, VL);
        for (int j = i; j < i + nu; j++) {
            R *const out = p + j * row;
            const int n = NAME(seen)(s, t0 + j, 1);
            V most = LOAD(out), sum = SET1((R)0);
            /* Start from step 0, which every sequence has. */
            for (int u = 1; u < n; u++) {
                V v = LOAD(out + u * VL);
                if (ends)
                    v = WHERE(SET1((R)u) - LOAD(ends), v, most);
                most = MAX(v, most);
            }
            for (int u = 0; u < n; u++) {
                V factor, rest;
                const V x = (LOAD(out + u * VL) - most) * scale;
                NAME(exponential_parts)(MAX(SET1(-(R)LARGE), x), &factor, &rest);
                V e = FMA(factor, rest, factor);
                if (ends)
                    e = WHERE(SET1((R)u) - LOAD(ends), e, SET1((R)0));
                sum += e;
                STORE(out + u * VL, e);
            }
            sum = SET1((R)1) / sum;
            for (int u = 0; u < n; u++)
                STORE(out + u * VL, LOAD(out + u * VL) * sum);
            for (int u = n; u < m; u++)
                STORE(out + u * VL, SET1((R)0));
        }
    }
}

/* The lengths of the samples from b on as a vector, or NULL without lengths. */
INLINE const R *NAME(ends_of)(const attention_t *s, int b, const int32_t *lengths, R *ends)
{
    for (int i = 0; i < VL; i++)
        ends[i] = lengths && b + i < s->batch ? (R)lengths[b + i] : (R)s->steps;
    return lengths ? ends : 0;
}

/* y (heads size, steps, batch) = values weighted by softmax(queries^T keys / sqrt(size)), for each head.
 * x (heads 3 size, steps, batch): for each head queries, keys, values. A job is a head and a vector of samples; this
 * call does the jobs [first, last). room: scratch of (4 size + TALL) steps vectors. */
void NAME(attention)(const attention_t *s, const R *x, const int32_t *lengths, R *y, R *room)
{
    const ptrdiff_t one = (ptrdiff_t)s->size * s->steps, row = (ptrdiff_t)s->steps * VL, wide = (ptrdiff_t)s->size * VL;
    const int groups = (s->batch + VL - 1) / VL;
    R ends[VL], *const q = room, *const k = q + one * VL, *const v = k + one * VL, *const o = v + one * VL;
    R *const p = o + one * VL;
    for (int job = s->first; job < s->last; job++) {
        const int head = job / groups, b = job % groups * VL, some = s->batch - b < VL ? s->batch - b : 0;
        const R *const from = x + 3 * head * one * s->batch + b, *const limits = NAME(ends_of)(s, b, lengths, ends);
        for (int part = 0; part < 3; part++)
            NAME(pack_head)(s, some, from + part * one * s->batch, q + part * one * VL);
        for (int t = 0; t < s->steps; t += TALL) {
            const int tall = s->steps - t < TALL ? s->steps - t : TALL;
            NAME(probabilities)(s, t, tall, q, k, limits, p);
            for (int i = 0; i < tall; i += ROWS) {
                const int nu = tall - i < ROWS ? tall - i : ROWS;
                NAME(product_rows)(nu, s->size, 0, NAME(seen)(s, t + i, nu), p + i * row, row, VL, v, VL, wide,
                                   o + (t + i) * wide, wide, VL);
            }
        }
        NAME(unpack_head)(s, some, o, y + head * one * s->batch + b);
    }
}

/* The adjoint of attention: dx of the shape of x. room: scratch of (7 size + 2 TALL) steps vectors. */
void NAME(attention_back)(const attention_t *s, const R *x, const int32_t *lengths, const R *dy, R *dx, R *room)
{
    const ptrdiff_t one = (ptrdiff_t)s->size * s->steps, row = (ptrdiff_t)s->steps * VL, wide = (ptrdiff_t)s->size * VL;
    const int groups = (s->batch + VL - 1) / VL;
    const V scale = SET1((R)(1 / __builtin_sqrt((double)s->size)));
    R ends[VL], *const q = room, *const k = q + one * VL, *const v = k + one * VL, *const o = v + one * VL;
    R *const dq = o + one * VL, *const dk = dq + one * VL, *const dv = dk + one * VL, *const p = dv + one * VL;
    R *const d = p + TALL * row;
    for (int job = s->first; job < s->last; job++) {
        const int head = job / groups, b = job % groups * VL, some = s->batch - b < VL ? s->batch - b : 0;
        const ptrdiff_t at = 3 * head * one * s->batch + b;
        const R *const limits = NAME(ends_of)(s, b, lengths, ends);
        for (int part = 0; part < 3; part++)
            NAME(pack_head)(s, some, x + at + part * one * s->batch, q + part * one * VL);
        NAME(pack_head)(s, some, dy + head * one * s->batch + b, o);
        memset(dk, 0, 2 * one * VL * sizeof(R));
        for (int t = 0; t < s->steps; t += TALL) {
            const int tall = s->steps - t < TALL ? s->steps - t : TALL;
            NAME(probabilities)(s, t, tall, q, k, limits, p);
            for (int i = 0; i < tall; i += ROWS) {
                const int nu = tall - i < ROWS ? tall - i : ROWS, m = NAME(seen)(s, t + i, nu);
                NAME(product_rows)(nu, m, 0, s->size, o + (t + i) * wide, wide, VL, v, wide, VL, d + i * row, row, VL);
                for (int j = i; j < i + nu; j++) {
                    const R *const in = p + j * row;
                    R *const out = d + j * row;
                    V sum = SET1((R)0);
                    for (int u = 0; u < m; u++)
                        sum = FMA(LOAD(in + u * VL), LOAD(out + u * VL), sum);
                    for (int u = 0; u < m; u++)
                        STORE(out + u * VL, LOAD(in + u * VL) * (LOAD(out + u * VL) - sum) * scale);
                }
                NAME(product_rows)(nu, s->size, 0, m, d + i * row, row, VL, k, VL, wide, dq + (t + i) * wide, wide, VL);
            }
            for (int u = 0; u < NAME(seen)(s, t, tall); u += ROWS) {
                const int nu = s->steps - u < ROWS ? s->steps - u : ROWS, i = s->causal && u > t ? u - t : 0;
                NAME(product_rows)(nu, s->size, 1, tall - i, p + i * row + u * VL, VL, row, o + (t + i) * wide, VL,
                                   wide, dv + u * wide, wide, VL);
                NAME(product_rows)(nu, s->size, 1, tall - i, d + i * row + u * VL, VL, row, q + (t + i) * wide, VL,
                                   wide, dk + u * wide, wide, VL);
            }
        }
        for (int part = 0; part < 3; part++)
            NAME(unpack_head)(s, some, dq + part * one * VL, dx + at + part * one * s->batch);
    }
}

#undef TALL
