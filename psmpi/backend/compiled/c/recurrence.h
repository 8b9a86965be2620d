/* Recurrent cells: the product with the previous states and the cells' functions, a block of units at a time. Part of
 * the template kernels.h.
 *
 * Samples form groups of up to WIDE vectors. The states of a group, or the gradients of its products, are contiguous:
 * (rows, lanes of the group). Lanes after the last sample have undefined values, which are never written to arrays.
 */

/* Largest numbers of units in a block and of vectors in a group: their sums fill the registers. */
#define CELLS 6
#if UNITS > 6
#define WIDE 4
#else
#define WIDE 2
#endif
#define LANES (WIDE * VL)

#define RNN 0
#define GRU 1
#define LSTM 2

/* exp(x) = scale + scale * rest for |x| <= LARGE, see `exponential`. rest = exp(r) - 1, |r| <= log(2) / 2, keeps the
 * digits of a small x. */
INLINE void NAME(exponential_parts)(V x, V *scale, V *rest)
{
    const V t = FMA(x, SET1((R)1.44269504088896340736), SET1((R)SHIFT)), n = t - SET1((R)SHIFT);
    const V r = FMA(n, SET1(-(R)LOG2_LOW), FMA(n, SET1(-(R)LOG2_HIGH), x));
    V sum = SET1((R)0);
    R factorial = 1;
#pragma GCC unroll 16
    for (int k = 2; k <= TERMS; k++)
        factorial *= (R)1 / k;
#pragma GCC unroll 16
    for (int k = TERMS; k >= 2; k--) {
        sum = FMA(sum, r, SET1(factorial));
        factorial *= (R)k;
    }
    *scale = POWER(t);
    *rest = FMA(sum, r * r, r);
}

/* 1 / (1 + exp(-x)); NaN stays NaN. */
INLINE V NAME(sigmoid_of)(V x)
{
    V scale, rest;
    NAME(exponential_parts)(MIN(SET1((R)LARGE), MAX(SET1(-(R)LARGE), -x)), &scale, &rest);
    return SET1((R)1) / (SET1((R)1) + FMA(scale, rest, scale));
}

/* tanh(x) = (exp(2 x) - 1) / (exp(2 x) + 1); NaN stays NaN. Beyond |x| = 22 it is 1 to rounding. */
INLINE V NAME(tanh_of)(V x)
{
    V scale, rest;
    NAME(exponential_parts)(MIN(SET1((R)44), MAX(SET1((R)-44), x + x)), &scale, &rest);
    const V e = FMA(scale, rest, scale - SET1((R)1));
    return e / (e + SET1((R)2));
}

/* Memory to prefetch: `count` arrays, each with as many rows as a block has units, with stride `row`. */
typedef struct {
    const R *from[8];
    int count;
    ptrdiff_t row;
} NAME(ahead);

/* out (nu, LANES) = bias (nu) + products of weights w (n, nu) with x (n, nv vectors). In between, rows of the arrays
 * `ahead` are prefetched one by one: each row is on another page, so the processor does not prefetch it by itself, and
 * many prefetches at once would delay the products. */
INLINE void NAME(panel)(const int nu, const int nv, int n, const R *x, const R *w, const R *bias, R *out,
                        const NAME(ahead) * ahead)
{
    const int parts = nu * ahead->count;
    V acc[CELLS][WIDE];
#pragma GCC unroll 16
    for (int u = 0; u < nu; u++)
#pragma GCC unroll 4
        for (int k = 0; k < nv; k++)
            acc[u][k] = SET1(bias ? bias[u] : (R)0);
    for (int part = 0, c = 0; part < parts; part++) {
        const R *const soon = ahead->from[part / nu] + part % nu * ahead->row;
        for (int k = 0; k < nv * VL; k += 64 / (int)sizeof(R))
            __builtin_prefetch(soon + k, 1);
        __builtin_prefetch(soon + nv * VL - 1, 1);
        for (const int last = EDGE(part + 1, parts, n); c < last; c++) {
            V v[WIDE];
#pragma GCC unroll 4
            for (int k = 0; k < nv; k++)
                v[k] = LOAD(x + k * VL);
#pragma GCC unroll 16
            for (int u = 0; u < nu; u++) {
                const V weight = SET1(w[u]);
#pragma GCC unroll 4
                for (int k = 0; k < nv; k++)
                    acc[u][k] = FMA(weight, v[k], acc[u][k]);
            }
            x += nv * VL;
            w += nu;
        }
    }
#pragma GCC unroll 16
    for (int u = 0; u < nu; u++)
#pragma GCC unroll 4
        for (int k = 0; k < nv; k++)
            STORE(out + u * LANES + k * VL, acc[u][k]);
}

static void NAME(any_panel)(int nu, int nv, int n, const R *x, const R *w, const R *bias, R *out,
                            const NAME(ahead) * ahead)
{
#define ONE(nu, nv)                                                                                                    \
    case nu * 8 + nv:                                                                                                  \
        NAME(panel)(nu, nv, n, x, w, bias, out, ahead);                                                                \
        break;
#define SOME(nv) ONE(1, nv) ONE(2, nv) ONE(3, nv) ONE(4, nv) ONE(5, nv) ONE(6, nv)
    switch (nu * 8 + nv) {
        SOME(1) SOME(2)
#if WIDE > 2
        SOME(3) SOME(4)
#endif
    }
#undef SOME
#undef ONE
}

/* pack = u (gates units, units) in blocks of units; a block has for each gate a matrix (units, units of the block). */
void NAME(cells_pack)(int gates, int units, const R *restrict u, R *restrict pack)
{
    const int blocks = (units + CELLS - 1) / CELLS;
    for (int block = 0; block < blocks; block++) {
        const int u0 = EDGE(block, blocks, units), nu = EDGE(block + 1, blocks, units) - u0;
        for (int g = 0; g < gates; g++)
            for (int c = 0; c < units; c++)
                for (int i = 0; i < nu; i++)
                    *pack++ = u[((ptrdiff_t)g * units + u0 + i) * units + c];
    }
}

/* pack = the transpose of u in blocks of units; a block is a matrix (gates units, units of the block). */
void NAME(cells_pack_back)(int gates, int units, const R *restrict u, R *restrict pack)
{
    const int blocks = (units + CELLS - 1) / CELLS;
    for (int block = 0; block < blocks; block++) {
        const int u0 = EDGE(block, blocks, units), nu = EDGE(block + 1, blocks, units) - u0;
        for (ptrdiff_t c = 0; c < (ptrdiff_t)gates * units; c++)
            for (int i = 0; i < nu; i++)
                *pack++ = u[c * units + u0 + i];
    }
}

/* Load a vector of which `some` lanes are samples, or all lanes (plain). */
#define TAKE(p) (plain ? LOAD(p) : LOAD_SOME(p, some))
#define GIVE(p, v)                                                                                                     \
    do {                                                                                                               \
        if (plain)                                                                                                     \
            STORE(p, v);                                                                                               \
        else                                                                                                           \
            STORE_SOME(p, some, v);                                                                                    \
    } while (0)
/* `then` for samples that have this step, `other` for samples that have ended before it. */
#define IF_LIVE(then, other) NAME(if_live)(plain, age, then, other)
INLINE V NAME(if_live)(const int plain, V age, V then, V other)
{
    if (plain)
        return then;
    return WHERE(age, then, other);
}

/* age (nv vectors) = the step minus the samples' lengths; negative for samples that have the step. */
INLINE void NAME(ages)(int t, const int32_t *lengths, int samples, R *age)
{
    for (int k = 0; k < LANES; k++)
        age[k] = lengths && k < samples ? (R)(t - lengths[k]) : (R)-1;
}

/* A step of a block of nu units and a group of nv vectors with `samples` samples, from the products `tile` (gates,
 * CELLS, LANES). a, h, more and c (of the previous step) point to the first unit and sample; row and c_row are strides
 * between units, gate the stride between gates. last, next: the states before and after the step, (nu, nv VL). */
INLINE void NAME(cells_step)(const int kind, const int plain, int nu, int nv, int samples, ptrdiff_t row,
                             ptrdiff_t gate, const R *tile, const R *ages, R *a, R *h, R *more, const R *c,
                             ptrdiff_t c_row, const R *last, R *next)
{
    const V one = SET1((R)1);
    for (int u = 0; u < nu; u++)
        for (int k = 0; k < nv; k++) {
            const int some = samples - k * VL < VL ? samples - k * VL : VL;
            const V age = LOAD(ages + k * VL), before = LOAD(last + (u * nv + k) * VL);
            const R *sums = tile + u * LANES + k * VL;
            const ptrdiff_t at = u * row + k * VL;
            V new;
            if (kind == RNN) {
                new = NAME(tanh_of)(TAKE(a + at) + LOAD(sums));
            } else if (kind == GRU) {
                const V r = NAME(sigmoid_of)(TAKE(a + at) + LOAD(sums));
                const V z = NAME(sigmoid_of)(TAKE(a + gate + at) + LOAD(sums + CELLS * LANES));
                const V product = LOAD(sums + 2 * CELLS * LANES);
                const V n = NAME(tanh_of)(FMA(r, product, TAKE(a + 2 * gate + at)));
                new = FMA(z, before, (one - z) * n);
                GIVE(a + at, r);
                GIVE(a + gate + at, z);
                GIVE(a + 2 * gate + at, n);
                GIVE(more + at, product);
            } else {
                const V i = NAME(sigmoid_of)(TAKE(a + at) + LOAD(sums));
                const V f = NAME(sigmoid_of)(TAKE(a + gate + at) + LOAD(sums + CELLS * LANES));
                const V g = NAME(tanh_of)(TAKE(a + 2 * gate + at) + LOAD(sums + 2 * CELLS * LANES));
                const V o = NAME(sigmoid_of)(TAKE(a + 3 * gate + at) + LOAD(sums + 3 * CELLS * LANES));
                const V old = TAKE(c + u * c_row + k * VL), cell = FMA(f, old, i * g);
                new = o * NAME(tanh_of)(cell);
                GIVE(a + at, i);
                GIVE(a + gate + at, f);
                GIVE(a + 2 * gate + at, g);
                GIVE(a + 3 * gate + at, o);
                GIVE(more + at, IF_LIVE(cell, old));
            }
            new = IF_LIVE(new, before);
            GIVE(h + at, new);
            STORE(next + (u * nv + k) * VL, new);
        }
}

/* Loop over blocks of nu units from u0 on and groups of nv vectors from sample b on, with `samples` samples. Groups are
 * the inner loop, so that the weights of a block are read from memory once. */
#define EACH_BLOCK                                                                                                     \
    for (int block = 0; block < blocks; block++)                                                                       \
        for (int b = s->first, u0 = EDGE(block, blocks, units), nu = EDGE(block + 1, blocks, units) - u0, samples, nv; \
             samples = s->last - b < LANES ? s->last - b : LANES, nv = (samples + VL - 1) / VL, b < s->last;           \
             b += nv * VL)

INLINE void NAME(forward_steps)(const int kind, const cells_t *s, const R *pack, const R *bias, R *a, const R *before,
                                R *h, R *more, const int32_t *lengths, R *state)
{
    const int gates = kind == RNN ? 1 : kind == GRU ? 3 : 4, units = s->units, batch = s->batch;
    const int blocks = (units + CELLS - 1) / CELLS;
    const ptrdiff_t row = (ptrdiff_t)s->steps * batch, gate = units * row;
    /* The states before and after a step. */
    R *from = state, *into = state + (ptrdiff_t)units * s->padded;
    R tile[4 * CELLS * LANES] __attribute__((aligned(64))), age[LANES] __attribute__((aligned(64)));
    EACH_BLOCK
        for (int u = u0; u < u0 + nu; u++)
            for (int k = 0; k < nv; k++) {
                const int some = samples - k * VL < VL ? samples - k * VL : VL;
                const R *const state_of = before + (ptrdiff_t)u * batch + b + k * VL;
                STORE(from + (ptrdiff_t)b * units + (u * nv + k) * VL, LOAD_SOME(state_of, some));
            }
    for (int t = 0; t < s->steps; t++) {
        EACH_BLOCK {
            const ptrdiff_t here = (ptrdiff_t)b * units, at = u0 * row + (ptrdiff_t)t * batch + b;
            for (int g = 0; g < gates; g++) {
                const NAME(ahead) soon = {{a + g * gate + at, g ? more + at : h + at}, g < 2 ? 2 : 1, row};
                NAME(any_panel)(nu, nv, units, from + here, pack + ((ptrdiff_t)u0 * gates + g * nu) * units,
                                bias ? bias + g * units + u0 : 0, tile + g * CELLS * LANES, &soon);
            }
            const R *c = t ? more + at - batch : before + (ptrdiff_t)(units + u0) * batch + b;
            const ptrdiff_t c_row = t ? row : batch, mine = here + u0 * nv * VL;
            NAME(ages)(t, lengths ? lengths + b : 0, samples, age);
            if (!lengths && samples == nv * VL)
                NAME(cells_step)(kind, 1, nu, nv, samples, row, gate, tile, age, a + at, h + at, more + at, c, c_row,
                                 from + mine, into + mine);
            else
                NAME(cells_step)(kind, 0, nu, nv, samples, row, gate, tile, age, a + at, h + at, more + at, c, c_row,
                                 from + mine, into + mine);
        }
        R *const other = from;
        from = into;
        into = other;
    }
}

/* Recurrence.forward for the samples [first, last): h (units, steps, batch). pack: from cells_pack. state: scratch (2
 * units padded). */
void NAME(cells_forward)(const cells_t *s, const R *pack, const R *bias, R *a, const R *before, R *h, R *more,
                         const int32_t *lengths, R *state)
{
    if (s->kind == RNN)
        NAME(forward_steps)(RNN, s, pack, bias, a, before, h, more, lengths, state);
    else if (s->kind == GRU)
        NAME(forward_steps)(GRU, s, pack, bias, a, before, h, more, lengths, state);
    else
        NAME(forward_steps)(LSTM, s, pack, bias, a, before, h, more, lengths, state);
}

/* The adjoint of cells_step. tile (CELLS, LANES): the gradient of h through the products of the next step. last: h, or
 * for lstm c, of the previous step. direct (nu, nv VL): the part of the gradient of the previous states that does not
 * pass through the product. du: the gradient of the product, with stride gate_du between gates. */
INLINE void NAME(cells_step_back)(const int kind, const int plain, int nu, int nv, int samples, ptrdiff_t row,
                                  ptrdiff_t gate, const R *tile, const R *ages, R *a, const R *h, R *more, const R *dh,
                                  const R *last, ptrdiff_t last_row, R *dc, ptrdiff_t dc_row, R *direct, R *du,
                                  ptrdiff_t gate_du)
{
    const V one = SET1((R)1), zero = SET1((R)0);
    for (int u = 0; u < nu; u++)
        for (int k = 0; k < nv; k++) {
            const int some = samples - k * VL < VL ? samples - k * VL : VL;
            const V age = LOAD(ages + k * VL);
            const ptrdiff_t at = u * row + k * VL, mine = (u * nv + k) * VL;
            V total = LOAD(tile + u * LANES + k * VL) + TAKE(dh + at);
            if (kind == RNN) {
                const V y = TAKE(h + at), d = IF_LIVE(total * FMA(-y, y, one), zero);
                GIVE(a + at, d);
                STORE(du + mine, d);
                if (!plain)
                    STORE(direct + mine, WHERE(age, zero, total));
            } else if (kind == GRU) {
                const V r = TAKE(a + at), z = TAKE(a + gate + at), n = TAKE(a + 2 * gate + at);
                const V product = TAKE(more + at), old = TAKE(last + u * last_row + k * VL);
                V dn = total * (one - z) * FMA(-n, n, one);
                V dz = total * (old - n) * (z * (one - z)), dr = dn * product * (r * (one - r)), dproduct = dn * r;
                dn = IF_LIVE(dn, zero);
                dz = IF_LIVE(dz, zero);
                dr = IF_LIVE(dr, zero);
                dproduct = IF_LIVE(dproduct, zero);
                GIVE(a + at, dr);
                GIVE(a + gate + at, dz);
                GIVE(a + 2 * gate + at, dn);
                GIVE(more + at, dproduct);
                STORE(du + mine, dr);
                STORE(du + gate_du + mine, dz);
                STORE(du + 2 * gate_du + mine, dproduct);
                STORE(direct + mine, IF_LIVE(total * z, total));
            } else {
                const V i = TAKE(a + at), f = TAKE(a + gate + at), g = TAKE(a + 2 * gate + at);
                const V o = TAKE(a + 3 * gate + at);
                const V old = TAKE(last + u * last_row + k * VL), y = NAME(tanh_of)(TAKE(more + at));
                const V later = TAKE(dc + u * dc_row + k * VL), d = FMA(total * o, FMA(-y, y, one), later);
                const V di = IF_LIVE(d * g * (i * (one - i)), zero), df = IF_LIVE(d * old * (f * (one - f)), zero);
                const V dg = IF_LIVE(d * i * FMA(-g, g, one), zero), dout = IF_LIVE(total * y * (o * (one - o)), zero);
                GIVE(dc + u * dc_row + k * VL, IF_LIVE(d * f, later));
                GIVE(a + at, di);
                GIVE(a + gate + at, df);
                GIVE(a + 2 * gate + at, dg);
                GIVE(a + 3 * gate + at, dout);
                STORE(du + mine, di);
                STORE(du + gate_du + mine, df);
                STORE(du + 2 * gate_du + mine, dg);
                STORE(du + 3 * gate_du + mine, dout);
                if (!plain)
                    STORE(direct + mine, WHERE(age, zero, total));
            }
        }
}

INLINE void NAME(backward_steps)(const int kind, const cells_t *s, const R *pack, R *a, const R *before, const R *h,
                                 R *more, const R *dh, R *carry, const int32_t *lengths, R *state)
{
    const int gates = kind == RNN ? 1 : kind == GRU ? 3 : 4, units = s->units, batch = s->batch, rows = gates * units;
    const int blocks = (units + CELLS - 1) / CELLS;
    const ptrdiff_t row = (ptrdiff_t)s->steps * batch, gate = units * row;
    /* Gradients of the products of the next step and of this one, and the part of the gradient of h that does not pass
     * through the products. */
    R *from = state, *into = state + (ptrdiff_t)rows * s->padded, *past = into + (ptrdiff_t)rows * s->padded;
    R tile[CELLS * LANES] __attribute__((aligned(64))), age[LANES] __attribute__((aligned(64)));
    for (int t = s->steps - 1; t >= -1; t--) {
        EACH_BLOCK {
            const ptrdiff_t at = u0 * row + (ptrdiff_t)t * batch + b, mine = u0 * nv * VL;
            R *const direct = past + (ptrdiff_t)b * units + mine, *const c = carry + (ptrdiff_t)u0 * batch + b;
            const int plain = !lengths && samples == nv * VL;
            NAME(ahead) soon = {{dh + at, kind == RNN ? h + at : more + at}, 2, row};
            if (kind == GRU || (kind == LSTM && t > 0))
                soon.from[soon.count++] = (kind == GRU ? h : more) + at - (t ? batch : 0);
            for (int g = 0; g < gates; g++)
                soon.from[soon.count++] = a + g * gate + at;
            if (t < 0)
                soon.from[0] = c, soon.row = batch, soon.count = 1;
            if (t < s->steps - 1)
                NAME(any_panel)(nu, nv, rows, from + (ptrdiff_t)b * rows, pack + (ptrdiff_t)u0 * rows, 0, tile, &soon);
            for (int u = 0; u < nu; u++)
                for (int k = 0; k < nv; k++) {
                    const int some = samples - k * VL < VL ? samples - k * VL : VL;
                    R *const sum = tile + u * LANES + k * VL;
                    if (t == s->steps - 1)
                        STORE(sum, LOAD_SOME(c + (ptrdiff_t)u * batch + k * VL, some));
                    else if (kind == GRU || !plain)
                        STORE(sum, LOAD(sum) + LOAD(direct + (u * nv + k) * VL));
                    if (t < 0)
                        STORE_SOME(c + (ptrdiff_t)u * batch + k * VL, some, LOAD(sum));
                }
            if (t < 0)
                continue;
            const R *const states = kind == LSTM ? more : h;
            const R *last = t ? states + at - batch : before + (ptrdiff_t)((kind == LSTM ? units : 0) + u0) * batch + b;
            const ptrdiff_t last_row = t ? row : batch;
            R *const dc = carry + (ptrdiff_t)(units + u0) * batch + b, *const du = into + (ptrdiff_t)b * rows + mine;
            const ptrdiff_t gate_du = (ptrdiff_t)units * nv * VL;
            NAME(ages)(t, lengths ? lengths + b : 0, samples, age);
            if (plain)
                NAME(cells_step_back)(kind, 1, nu, nv, samples, row, gate, tile, age, a + at, h + at, more + at,
                                      dh + at, last, last_row, dc, batch, direct, du, gate_du);
            else
                NAME(cells_step_back)(kind, 0, nu, nv, samples, row, gate, tile, age, a + at, h + at, more + at,
                                      dh + at, last, last_row, dc, batch, direct, du, gate_du);
        }
        R *const other = from;
        from = into;
        into = other;
    }
}

/* Recurrence.backward for the samples [first, last). pack: from cells_pack_back. state: scratch ((2 gates + 1) units
 * padded). */
void NAME(cells_backward)(const cells_t *s, const R *pack, R *a, const R *before, const R *h, R *more, const R *dh,
                          R *carry, const int32_t *lengths, R *state)
{
    if (s->steps == 0)
        return;
    if (s->kind == RNN)
        NAME(backward_steps)(RNN, s, pack, a, before, h, more, dh, carry, lengths, state);
    else if (s->kind == GRU)
        NAME(backward_steps)(GRU, s, pack, a, before, h, more, dh, carry, lengths, state);
    else
        NAME(backward_steps)(LSTM, s, pack, a, before, h, more, dh, carry, lengths, state);
}

#undef CELLS
#undef WIDE
#undef LANES
#undef RNN
#undef GRU
#undef LSTM
#undef TAKE
#undef GIVE
#undef IF_LIVE
#undef EACH_BLOCK
