/* Normalization: of rows (n, m), m being all values of a unit in a minibatch, and of rows of weights to unit length. */
#include "common.cuh"

#define NORM_THREADS 256

/* out = (x - its mean) scale with scale (n,) = 1 / sqrt(variance + eps), row by row; out may be x. What a mean in T is
 * off by is found with the squares, so that little is lost where a mean is large. Grid: (rows,). */
extern "C" __global__ void normalize(long long m, const T *x, double eps, T *out, T *__restrict__ scale)
{
    __shared__ double room[NORM_THREADS];
    const long long row = blockIdx.x * m;
    LongSum sum, rest, squares;
    for (long long i = threadIdx.x; i < m; i += NORM_THREADS)
        sum.add(x[row + i]);
    const T mean = (T)(block_sum<NORM_THREADS>(sum.value(), room) / (double)m);
    for (long long i = threadIdx.x; i < m; i += NORM_THREADS) {
        const T d = x[row + i] - mean;
        rest.add(d);
        squares.add(d * d);
    }
    const double off = block_sum<NORM_THREADS>(rest.value(), room) / (double)m;
    const double square = block_sum<NORM_THREADS>(squares.value(), room) / (double)m;
    const T more = (T)off, factor = (T)(1 / sqrt(square - off * off + eps));
    for (long long i = threadIdx.x; i < m; i += NORM_THREADS)
        out[row + i] = (x[row + i] - mean - more) * factor;
    if (threadIdx.x == 0)
        scale[blockIdx.x] = factor;
}

/* y (n, m) = activation(gamma (n,) x + beta (n,)). */
extern "C" __global__ void affine(long long n, long long m, const T *__restrict__ x, const T *__restrict__ gamma,
                                  const T *__restrict__ beta, long long kind, T *__restrict__ y)
{
    for (long long i = thread(); i < n * m; i += threads()) {
        const long long row = quotient(i, m);
        y[i] = activation(gamma[row] * x[i] + beta[row], (int)kind);
    }
}

/* dy becomes the gradient of what was normalized to x by `scale`; dgamma and dbeta (n,) get theirs. Grid: (rows,). */
extern "C" __global__ void normalize_back(long long m, const T *__restrict__ x, const T *__restrict__ scale,
                                          const T *__restrict__ gamma, const T *__restrict__ y, T *__restrict__ dy,
                                          long long kind, T *__restrict__ dgamma, T *__restrict__ dbeta)
{
    __shared__ double room[NORM_THREADS];
    const long long row = blockIdx.x * m;
    LongSum products, gradients;
    for (long long i = threadIdx.x; i < m; i += NORM_THREADS) {
        const T d = dy[row + i] * slope(y[row + i], (int)kind);
        dy[row + i] = d;
        products.add(d * x[row + i]);
        gradients.add(d);
    }
    const double first = block_sum<NORM_THREADS>(products.value(), room);
    const double second = block_sum<NORM_THREADS>(gradients.value(), room);
    const T factor = gamma[blockIdx.x] * scale[blockIdx.x], along = (T)(first / (double)m);
    const T mean = (T)(second / (double)m);
    for (long long i = threadIdx.x; i < m; i += NORM_THREADS)
        dy[row + i] = factor * (dy[row + i] - x[row + i] * along - mean);
    if (threadIdx.x == 0) {
        dgamma[blockIdx.x] = (T)first;
        dbeta[blockIdx.x] = (T)second;
    }
}

/* out (count, n) = scale / sqrt(|row|^2 + eps) of rows of m at w + i sw + j tw; NaN where the square overflows. Grid:
 * (count n,). */
extern "C" __global__ void row_factors(long long n, long long m, const T *__restrict__ w, long long sw, long long tw,
                                       double eps, double scale, T *__restrict__ out)
{
    __shared__ double room[NORM_THREADS];
    const long long i = quotient(blockIdx.x, n), j = blockIdx.x - i * n;
    const T *row = w + i * sw + j * tw;
    LongSum squares;
    for (long long q = threadIdx.x; q < m; q += NORM_THREADS)
        squares.add(row[q] * row[q]);
    const double square = block_sum<NORM_THREADS>(squares.value(), room);
    if (threadIdx.x == 0)
        out[blockIdx.x] = (T)(scale / sqrt(square + eps) + (square - square));
}

/* Rows of m at g + k rg + i sg + j tg lose their share along those at w + i sw + j tw: g -= f^2 <g, w> w with f =
 * factors (count, n) / scale. Grid: (count n, k). */
extern "C" __global__ void project_rows(long long n, long long m, const T *__restrict__ w, long long sw, long long tw,
                                        const T *__restrict__ factors, double scale, T *__restrict__ g, long long rg,
                                        long long sg, long long tg)
{
    __shared__ double room[NORM_THREADS];
    const long long i = quotient(blockIdx.x, n), j = blockIdx.x - i * n;
    const T *row = w + i * sw + j * tw;
    T *out = g + blockIdx.y * rg + i * sg + j * tg;
    LongSum products;
    for (long long q = threadIdx.x; q < m; q += NORM_THREADS)
        products.add(out[q] * row[q]);
    const double f = (double)factors[blockIdx.x] / scale;
    const T along = (T)(f * f * block_sum<NORM_THREADS>(products.value(), room));
    for (long long q = threadIdx.x; q < m; q += NORM_THREADS)
        out[q] -= along * row[q];
}
