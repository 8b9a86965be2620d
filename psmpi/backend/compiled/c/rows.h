/* Sums over rows, and normalization by them. Part of the template kernels.h. */

/* The sum of the n elements of y and, with `products`, *dot = the scalar product of x and y. Short sums are in the type
 * of the arrays and the sum of these in double, so that long rows lose no digits. */
INLINE double NAME(long_sums)(const int products, ptrdiff_t n, const R *x, const R *y, double *dot)
{
    double sum = 0, along = 0;
    for (ptrdiff_t k = 0; k < n; k += SHORT * VL) {
        const ptrdiff_t last = n - k < SHORT * VL ? n : k + SHORT * VL, whole = k + (last - k) / (2 * VL) * 2 * VL;
        V a = SET1((R)0), b = a, c = a, d = a;
        for (ptrdiff_t q = k; q < whole; q += 2 * VL) {
            const V u = LOAD(y + q), v = LOAD(y + q + VL);
            a += u;
            b += v;
            if (products) {
                c = FMA(u, LOAD(x + q), c);
                d = FMA(v, LOAD(x + q + VL), d);
            }
        }
        for (ptrdiff_t q = whole; q < last; q += VL) {
            const int some = last - q < VL ? (int)(last - q) : 0;
            const V u = some ? LOAD_SOME(y + q, some) : LOAD(y + q);
            a += u;
            if (products)
                c = FMA(u, some ? LOAD_SOME(x + q, some) : LOAD(x + q), c);
        }
        sum += SUM(a + b);
        if (products)
            along += SUM(c + d);
    }
    if (products)
        *dot = along;
    return sum;
}

/* out[i so + j to] = the sum of the n elements of row (i, j) of y. */
void NAME(row_sums)(int count, int rows, ptrdiff_t n, const R *y, R *out, ptrdiff_t so, ptrdiff_t to)
{
    for (int i = 0; i < count; i++)
        for (int j = 0; j < rows; j++, y += n)
            out[i * so + j * to] = (R)NAME(long_sums)(0, n, 0, y, 0);
}

/* out (rows, m) = (x - mean) scale, scale (rows,) = 1 / sqrt(variance + eps), for each row of x; out may be x. The mean
 * is rounded to the type; its error is computed together with the squares, so that a large mean loses few digits. */
void NAME(normalize)(int rows, ptrdiff_t m, const R *x, double eps, R *out, R *scale)
{
    for (int i = 0; i < rows; i++, x += m, out += m) {
        const R mean = (R)(NAME(long_sums)(0, m, 0, x, 0) / m);
        const V means = SET1(mean);
        double rest = 0, squares = 0;
        for (ptrdiff_t k = 0; k < m; k += SHORT * VL) {
            const ptrdiff_t last = m - k < SHORT * VL ? m : k + SHORT * VL, whole = k + (last - k) / VL * VL;
            V a = SET1((R)0), b = a;
            for (ptrdiff_t q = k; q < whole; q += VL) {
                const V d = LOAD(x + q) - means;
                a += d;
                b = FMA(d, d, b);
            }
            rest += SUM(a);
            squares += SUM(b);
            for (ptrdiff_t q = whole; q < last; q++) {
                const R d = x[q] - mean;
                rest += d;
                squares += d * d;
            }
        }
        const double off = rest / m;
        const R more = (R)off, factor = (R)(1 / __builtin_sqrt(squares / m - off * off + eps));
        for (ptrdiff_t k = 0; k < m; k++)
            out[k] = (x[k] - mean - more) * factor;
        scale[i] = factor;
    }
}

/* out (count, rows) = scale / sqrt(|row|^2 + eps) for rows of m elements at w + i sw + j tw; NaN if |row|^2
 * overflows. */
void NAME(row_factors)(int count, int rows, ptrdiff_t m, const R *w, ptrdiff_t sw, ptrdiff_t tw, double eps,
                       double scale, R *out)
{
    for (int i = 0; i < count; i++)
        for (int j = 0; j < rows; j++) {
            const R *row = w + i * sw + j * tw;
            double square;
            NAME(long_sums)(1, m, row, row, &square);
            *out++ = (R)(scale / __builtin_sqrt(square + eps) + (square - square));
        }
}

/* Project rows of m elements at g + k rg + i sg + j tg orthogonally to the rows at w + i sw + j tw: g -= f^2 <g, w> w
 * with f = factors (count, rows) / scale. */
void NAME(project_rows)(int many, int count, int rows, ptrdiff_t m, const R *w, ptrdiff_t sw, ptrdiff_t tw,
                        const R *factors, double scale, R *g, ptrdiff_t rg, ptrdiff_t sg, ptrdiff_t tg)
{
    for (int k = 0; k < many; k++)
        for (int i = 0; i < count; i++)
            for (int j = 0; j < rows; j++) {
                const R *restrict row = w + i * sw + j * tw;
                R *restrict out = g + k * rg + i * sg + j * tg;
                const double f = factors[i * rows + j] / scale;
                double dot;
                NAME(long_sums)(1, m, row, out, &dot);
                const R along = (R)(f * f * dot);
                for (ptrdiff_t q = 0; q < m; q++)
                    out[q] -= along * row[q];
            }
}

/* The adjoint of normalize followed by y = gamma x + beta: dy (rows, m) becomes the gradient of the input of normalize,
 * whose output is x. dgamma and dbeta (rows,) = the sums of dy x and of dy. */
void NAME(normalize_back)(int rows, ptrdiff_t m, const R *restrict x, const R *scale, const R *gamma, R *restrict dy,
                          R *dgamma, R *dbeta)
{
    for (int i = 0; i < rows; i++, x += m, dy += m) {
        double dot;
        const double sum = NAME(long_sums)(1, m, x, dy, &dot);
        const R along = (R)(dot / m), mean = (R)(sum / m), factor = gamma[i] * scale[i];
        for (ptrdiff_t k = 0; k < m; k++)
            dy[k] = factor * (dy[k] - x[k] * along - mean);
        dgamma[i] = (R)dot;
        dbeta[i] = (R)sum;
    }
}
