/* Normalization of rows (batch normalization), of columns (layer normalization), and of rows of weights to unit
 * length. */
#include "common.cuh"

#define NORM_THREADS 256

/* out = (x - mean) scale with scale (n,) = 1 / sqrt(variance + eps), for each row; out may be x. The mean is rounded to
 * T; its error is computed together with the squares, so that a large mean loses few digits. Grid: (rows,). */
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

/* The adjoint of normalize and affine: dy becomes the gradient of the input of normalize, whose output is x. dgamma and
 * dbeta (n,) = the gradients of gamma and beta. Grid: (rows,). */
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

/* out (count, n) = scale / sqrt(|row|^2 + eps) for rows of m elements at w + i sw + j tw; NaN if |row|^2 overflows.
 * Grid: (count n,). */
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

/* Project rows of m elements at g + k rg + i sg + j tg orthogonally to the rows at w + i sw + j tw: g -= f^2 <g, w> w
 * with f = factors (count, n) / scale. Grid: (count n, k). */
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

#define NORM_COLUMNS 32
#define NORM_ROWS 8

/* The sum of `value` over the threads of a column, returned to all of them. */
__device__ __forceinline__ T column_sum(T value, T room[NORM_ROWS][NORM_COLUMNS])
{
    __syncthreads();
    room[threadIdx.y][threadIdx.x] = value;
    __syncthreads();
    T sum = T(0);
    for (int k = 0; k < NORM_ROWS; k++)
        sum += room[k][threadIdx.x];
    return sum;
}

/* normal (n, m) = (x - mean) scale with scale (m,) = 1 / sqrt(variance + eps), for each column; y = gamma normal +
 * beta. normal may be x. Grid: one block of (32, 8) for 32 columns. */
extern "C" __global__ void layer_norm(long long n, long long m, const T *x, double eps, const T *__restrict__ gamma,
                                      const T *__restrict__ beta, T *normal, T *__restrict__ scale, T *__restrict__ y)
{
    __shared__ T room[NORM_ROWS][NORM_COLUMNS];
    const long long j = (long long)blockIdx.x * NORM_COLUMNS + threadIdx.x;
    const long long rows = j < m ? n : 0;
    T sum = T(0), rest = T(0), squares = T(0);
    for (long long i = threadIdx.y; i < rows; i += NORM_ROWS)
        sum += x[i * m + j];
    const T mean = column_sum(sum, room) / (T)n;
    for (long long i = threadIdx.y; i < rows; i += NORM_ROWS) {
        const T d = x[i * m + j] - mean;
        rest += d;
        squares += d * d;
    }
    const T off = column_sum(rest, room) / (T)n;
    const T factor = T(1) / t_sqrt(column_sum(squares, room) / (T)n - off * off + (T)eps);
    for (long long i = threadIdx.y; i < rows; i += NORM_ROWS) {
        const T v = (x[i * m + j] - mean - off) * factor;
        normal[i * m + j] = v;
        y[i * m + j] = gamma[i] * v + beta[i];
    }
    if (rows && threadIdx.y == 0)
        scale[j] = factor;
}

/* dgamma and dbeta (n,) = the sums of the rows of dy times normal, and of dy. Grid: (n,). */
extern "C" __global__ void layer_norm_sums(long long m, const T *__restrict__ normal, const T *__restrict__ dy,
                                           T *__restrict__ dgamma, T *__restrict__ dbeta)
{
    __shared__ double room[NORM_THREADS];
    const long long row = blockIdx.x * m;
    LongSum products, gradients;
    for (long long i = threadIdx.x; i < m; i += NORM_THREADS) {
        products.add(dy[row + i] * normal[row + i]);
        gradients.add(dy[row + i]);
    }
    const double first = block_sum<NORM_THREADS>(products.value(), room);
    const double second = block_sum<NORM_THREADS>(gradients.value(), room);
    if (threadIdx.x == 0) {
        dgamma[blockIdx.x] = (T)first;
        dbeta[blockIdx.x] = (T)second;
    }
}

/* The adjoint of layer_norm: dy (n, m) becomes the gradient of x. Grid as for layer_norm. */
extern "C" __global__ void layer_norm_back(long long n, long long m, const T *__restrict__ normal,
                                           const T *__restrict__ scale, const T *__restrict__ gamma,
                                           T *__restrict__ dy)
{
    __shared__ T room[NORM_ROWS][NORM_COLUMNS];
    const long long j = (long long)blockIdx.x * NORM_COLUMNS + threadIdx.x;
    const long long rows = j < m ? n : 0;
    T sum = T(0), dot = T(0);
    for (long long i = threadIdx.y; i < rows; i += NORM_ROWS) {
        const T d = gamma[i] * dy[i * m + j];
        sum += d;
        dot += d * normal[i * m + j];
    }
    const T mean = column_sum(sum, room) / (T)n, along = column_sum(dot, room) / (T)n;
    for (long long i = threadIdx.y; i < rows; i += NORM_ROWS)
        dy[i * m + j] = scale[j] * (gamma[i] * dy[i * m + j] - mean - normal[i * m + j] * along);
}
