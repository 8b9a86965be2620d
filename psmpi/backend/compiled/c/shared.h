/* Updates of weights that other processes update at the same time. Part of the template kernels.h.
 *
 * Without `atomic` an element is read and later written: an addition by another process in between is lost. With
 * `atomic` additions are atomic, by compare and exchange. Products are rounded before they are added. */

typedef INTEGER NAME(bits) __attribute__((may_alias));

/* Keep the compiler from fusing a product with an addition. */
#define ROUNDED(a) __asm__("" : "+x"(a))

/* *place = keep *place + change. */
INLINE void NAME(change)(R *place, R keep, R change, int atomic)
{
    R v;
    if (!atomic) {
        v = *(volatile R *)place * keep;
        ROUNDED(v);
        *(volatile R *)place = v + change;
        return;
    }
    NAME(bits) *at = (NAME(bits) *)place, old = __atomic_load_n(at, __ATOMIC_RELAXED), new;
    do {
        memcpy(&v, &old, sizeof v);
        v *= keep;
        ROUNDED(v);
        v += change;
        memcpy(&new, &v, sizeof v);
    } while (!__atomic_compare_exchange_n(at, &old, new, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
}

/* The factor 1 - shrink of a weight after a step along the penalty's gradient, at least 0. */
INLINE R NAME(kept)(R shrink)
{
    return shrink < 1 ? 1 - shrink : 0;
}

/* w (n) += factor g where g is not 0; other elements of w are not written. */
void NAME(add_shared)(ptrdiff_t n, R *w, const R *restrict g, double factor, int atomic)
{
    const R f = (R)factor;
    ptrdiff_t k = 0;
    for (; k + VL <= n; k += VL) {
        int some = 0;
        for (int i = 0; i < VL; i++)
            some += g[k + i] != 0;
        if (some == VL && !atomic) {
            V change = SET1(f) * LOAD(g + k);
            __asm__("" : "+v"(change));
            STORE(w + k, LOAD(w + k) + change);
        } else if (some) {
            for (int i = 0; i < VL; i++)
                if (g[k + i] != 0)
                    NAME(change)(w + k + i, 1, f * g[k + i], atomic);
        }
    }
    for (; k < n; k++)
        if (g[k] != 0)
            NAME(change)(w + k, 1, f * g[k], atomic);
}

/* Return the derivative of the loss of a score m with the target t, and add the loss to *loss. Targets of logistic and
 * hinge are -1 and 1. NaN stays NaN. */
static double NAME(slope)(int kind, double m, double t, double *loss)
{
    const double z = t * m;
    if (kind == 0) {
        const double e = exp(-fabs(z));
        *loss += (z > 0 ? 0 : -z) + log1p(e);
        return -t * (z > 0 ? e : 1) / (1 + e);
    }
    if (kind == 1) {
        *loss += z < 1 ? 1 - z : z != z ? z : 0;
        return z < 1 ? -t : z != z ? z : 0;
    }
    *loss += (m - t) * (m - t);
    return 2 * (m - t);
}

/* sum_k values[k] w[columns[k]] */
static __attribute__((noinline)) R NAME(margin)(ptrdiff_t n, const int32_t *restrict columns, const R *restrict values,
                                                const R *w)
{
    R a = 0, b = 0, c = 0, d = 0;
    ptrdiff_t k = 0;
    for (; k + 4 <= n; k += 4) {
        a += values[k] * w[columns[k]];
        b += values[k + 1] * w[columns[k + 1]];
        c += values[k + 2] * w[columns[k + 2]];
        d += values[k + 3] * w[columns[k + 3]];
    }
    for (; k < n; k++)
        a += values[k] * w[columns[k]];
    return (a + b) + (c + d);
}

/* The factor of a row's values in the step along the gradient of its loss. */
INLINE R NAME(step_of)(ptrdiff_t n, const int32_t *columns, const R *values, const R *w, const R *bias, int kind,
                       double scale, double target, double lr, double clip, double *loss)
{
    const R score = NAME(margin)(n, columns, values, w) + (bias ? *(const volatile R *)bias : 0);
    double d = scale * NAME(slope)(kind, score, target, loss);
    if (clip > 0) {
        double square = bias != NULL;
        for (ptrdiff_t k = 0; k < n; k++)
            square += (double)values[k] * values[k];
        const double length = fabs(d) * __builtin_sqrt(square);
        if (length > clip)
            d *= clip / length;
    }
    return (R)(-lr * d);
}

static void NAME(one_row)(const int atomic, ptrdiff_t n, const int32_t *restrict columns, const R *restrict values,
                          R *w, R step, R shrink, const R *restrict often)
{
    for (ptrdiff_t k = 0; k < n; k++) {
        R change = step * values[k];
        ROUNDED(change);
        const R keep = shrink != 0 ? NAME(kept)(shrink * often[columns[k]]) : 1;
        NAME(change)(w + columns[k], keep, change, atomic);
    }
}

/* A gradient step of a linear model with one score for each of `count` samples, in their order. The loss of a sample is
 * scale times the loss `kind` (0 logistic, 1 hinge, 2 squared) of its row, whose gradient is clipped to the norm `clip`
 * (0: not clipped), plus penalty / 2 often[column] w[column]^2 for the row's columns. bias: an element, or NULL. *loss:
 * the sum of the losses without scale and penalty. Each step holds the lock at `at`, of the kind `lock`. */
void NAME(sparse_steps)(ptrdiff_t count, const int64_t *order, const int64_t *starts, const int32_t *columns,
                        const R *values, const R *targets, R *w, R *bias, const R *often, int kind, double scale, double lr,
                        double penalty, double clip, int atomic, int lock, void *at, double *loss)
{
    const R shrink = (R)(lr * penalty);
    for (ptrdiff_t s = 0; s < count; s++) {
        const int64_t sample = order[s], start = starts[sample];
        const ptrdiff_t n = starts[sample + 1] - start;
        if (s + 2 < count) {
            const int64_t next = starts[order[s + 2]];
            for (int64_t k = next; k < starts[order[s + 2] + 1]; k += 64 / (int)sizeof(R)) {
                __builtin_prefetch(columns + k);
                __builtin_prefetch(values + k);
            }
        }
        take(lock, at);
        const R step = NAME(step_of)(n, columns + start, values + start, w, bias, kind, scale, targets[sample], lr, clip,
                                     loss);
        if (atomic)
            NAME(one_row)(1, n, columns + start, values + start, w, step, shrink, often);
        else
            NAME(one_row)(0, n, columns + start, values + start, w, step, shrink, often);
        if (bias)
            NAME(change)(bias, NAME(kept)(shrink), step, atomic);
        give(lock, at);
    }
}

/* sparse_steps on copies of the weights, whose changes are added to w after each `block` samples. Only weights of
 * columns that the samples have are copied. Scratch of this process: own, base, touched (features), and mark
 * (features), which is 0 before and after. */
void NAME(sparse_blocks)(ptrdiff_t count, const int64_t *order, const int64_t *starts, const int32_t *columns,
                         const R *values, const R *targets, R *w, R *bias, const R *often, int kind, double scale,
                         double lr, double penalty, double clip, int atomic, ptrdiff_t block, R *restrict own,
                         R *restrict base, uint8_t *restrict mark, int32_t *restrict touched, double *loss)
{
    const R shrink = (R)(lr * penalty);
    for (ptrdiff_t first = 0; first < count; first += block) {
        const ptrdiff_t behind = first + block < count ? first + block : count;
        const R base_bias = bias ? *(volatile R *)bias : 0;
        R own_bias = base_bias;
        ptrdiff_t found = 0;
        for (ptrdiff_t s = first; s < behind; s++)
            for (int64_t k = starts[order[s]]; k < starts[order[s] + 1]; k++) {
                const int32_t column = columns[k];
                touched[found] = column;
                found += !mark[column];
                mark[column] = 1;
            }
        for (ptrdiff_t k = 0; k < found; k++)
            own[touched[k]] = base[touched[k]] = *(volatile R *)(w + touched[k]);
        for (ptrdiff_t s = first; s < behind; s++) {
            const int64_t sample = order[s], start = starts[sample];
            const ptrdiff_t n = starts[sample + 1] - start;
            const R step = NAME(step_of)(n, columns + start, values + start, own, bias ? &own_bias : NULL, kind, scale,
                                         targets[sample], lr, clip, loss);
            NAME(one_row)(0, n, columns + start, values + start, own, step, shrink, often);
            if (bias)
                own_bias = own_bias * NAME(kept)(shrink) + step;
        }
        for (ptrdiff_t k = 0; k < found; k++) {
            const int32_t column = touched[k];
            mark[column] = 0;
            if (own[column] != base[column])
                NAME(change)(w + column, 1, own[column] - base[column], atomic);
        }
        if (bias)
            NAME(change)(bias, 1, own_bias - base_bias, atomic);
    }
}

/* A gradient step of a matrix factorization for each of `count` pairs of different tokens, in their order. It changes
 * the two columns (units) of w (units, size). The loss of a pair is (scalar product of the columns - target)^2, whose
 * gradient is clipped to the norm `clip` (0: not clipped), plus penalty / 2 often[token] |column|^2 for both. *loss:
 * the sum of the losses without the penalty. */
void NAME(factor_steps)(ptrdiff_t count, const int64_t *order, const int32_t *pairs, const R *targets, R *w,
                        ptrdiff_t units, ptrdiff_t size, const R *often, double lr, double penalty, double clip,
                        int atomic, double *loss)
{
    const R shrink = (R)(lr * penalty);
    for (ptrdiff_t s = 0; s < count; s++) {
        const int64_t sample = order[s];
        R *a = w + pairs[2 * sample], *b = w + pairs[2 * sample + 1];
        double score = 0, square = 0;
        for (ptrdiff_t u = 0; u < units; u++) {
            const double p = a[u * size], q = b[u * size];
            score += p * q;
            square += p * p + q * q;
        }
        double d = NAME(slope)(2, score, targets[sample], loss);
        const double length = fabs(d) * __builtin_sqrt(square);
        if (clip > 0 && length > clip)
            d *= clip / length;
        const R step = (R)(-lr * d), keep_a = shrink != 0 ? NAME(kept)(shrink * often[pairs[2 * sample]]) : 1,
                keep_b = shrink != 0 ? NAME(kept)(shrink * often[pairs[2 * sample + 1]]) : 1;
        for (ptrdiff_t u = 0; u < units; u++) {
            R to_a = step * b[u * size], to_b = step * a[u * size];
            ROUNDED(to_a);
            ROUNDED(to_b);
            NAME(change)(a + u * size, keep_a, to_a, atomic);
            NAME(change)(b + u * size, keep_b, to_b, atomic);
        }
    }
}
#undef ROUNDED
