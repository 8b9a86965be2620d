/* Runs of vectors, and a step of Adam. Part of the template kernels.h. */

/* Copy or, with `add`, add runs of `values` to `out`. table (runs, 3): source, target and length of each run. */
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

/* out (units, n) = the columns of table (units, size) at tokens (n), integers in the type of the arrays. */
void NAME(look_up)(ptrdiff_t units, ptrdiff_t n, ptrdiff_t size, const R *restrict table, const R *restrict tokens,
                   R *restrict out)
{
    for (ptrdiff_t u = 0; u < units; u++, table += size, out += n)
        for (ptrdiff_t k = 0; k < n; k++)
            out[k] = table[(ptrdiff_t)(tokens[k] + (R)0.5)];
}

/* The adjoint of look_up: column t of out (units, size) = the sum of the columns of values (units, n) with token t. */
void NAME(add_up)(ptrdiff_t units, ptrdiff_t n, ptrdiff_t size, const R *restrict tokens, const R *restrict values,
                  R *restrict out)
{
    memset(out, 0, units * size * sizeof(R));
    for (ptrdiff_t u = 0; u < units; u++, values += n, out += size)
        for (ptrdiff_t k = 0; k < n; k++)
            out[(ptrdiff_t)(tokens[k] + (R)0.5)] += values[k];
}

/* A step of Adam (Kingma and Ba 2015, algorithm 1) with the gradient g + l2 w. rate = lr / (1 - beta1^t), root = 1 /
 * sqrt(1 - beta2^t). w is first multiplied by `keep` (the decoupled weight decay of AdamW). */
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
