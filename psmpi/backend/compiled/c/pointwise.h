/* Passes over activations: pooling, bias, sigmoid and derivatives; folded kernels. Part of the template kernels.h. */

/* y (channels, height / size, width / size, batch) = maxima of size x size windows of x. */
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

/* dx = dy where x is the first maximum of its window, 0 elsewhere. y is scratch. */
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
                        /* Later entries of the window that tie get no gradient: NaN is equal to nothing. */
                        const int hit = v[b] == m[b];
                        into[b] = hit ? d[b] : (R)0;
                        m[b] = hit ? (R)NAN : m[b];
                    }
                }
            }
}

/* Row (i, j) of y, of n contiguous elements, += bias[i sb + j tb]. */
void NAME(add_bias)(int count, int rows, ptrdiff_t n, R *restrict y, const R *restrict bias, ptrdiff_t sb, ptrdiff_t tb)
{
    for (int i = 0; i < count; i++)
        for (int j = 0; j < rows; j++, y += n) {
            const R b = bias[i * sb + j * tb];
            for (ptrdiff_t k = 0; k < n; k++)
                y[k] += b;
        }
}

/* For each of count x rows units, out (n_in, k + pool - 1, k + pool - 1) = w (n_in, k, k), at i sw + j tw, convolved
 * with a pool x pool box. */
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

/* The adjoint of fold: out (n_in, k, k) at i sw + j tw, for each unit. */
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

/* exp(x) = 2^n exp(r) for |x| <= LARGE, with a Taylor polynomial for exp(r), |r| <= log(2) / 2, that is exact to
 * rounding. Adding SHIFT rounds to an integer, which is then in the lowest bits. */
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

/* y = 1 / (1 + exp(-y)) */
void NAME(sigmoid)(ptrdiff_t n, R *y)
{
    for (ptrdiff_t k = 0; k < n; k++) {
        /* NaN stays NaN, since comparisons with it are false. */
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

/* dy = 0 where y <= 0; NaN in y makes dy NaN. */
void NAME(relu_back)(ptrdiff_t n, const R *restrict y, R *restrict dy)
{
    for (ptrdiff_t k = 0; k < n; k++)
        dy[k] = y[k] > (R)0 ? dy[k] : y[k] * (R)0;
}
