/* Batch normalization: rows of (n, m), m being all values of a unit in a minibatch. */
#include "common.cuh"

#define NORM_THREADS 256

/* out = (x - its mean) scale with scale (n,) = 1 / sqrt(variance + eps), row by row; out may be x. Grid: (rows,). */
extern "C" __global__ void normalize(long long m, const T *x, double eps, T *out, T *__restrict__ scale)
{
    __shared__ T room[NORM_THREADS];
    const long long row = blockIdx.x * m;
    T sum = T(0);
    for (long long i = threadIdx.x; i < m; i += NORM_THREADS)
        sum += x[row + i];
    const T mean = block_sum<NORM_THREADS>(sum, room) / T(m);
    sum = T(0);
    for (long long i = threadIdx.x; i < m; i += NORM_THREADS) {
        const T d = x[row + i] - mean;
        sum += d * d;
    }
    const T factor = T(1) / t_sqrt(block_sum<NORM_THREADS>(sum, room) / T(m) + T(eps));
    for (long long i = threadIdx.x; i < m; i += NORM_THREADS)
        out[row + i] = (x[row + i] - mean) * factor;
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
    __shared__ T room[NORM_THREADS];
    const long long row = blockIdx.x * m;
    T first = T(0), second = T(0);
    for (long long i = threadIdx.x; i < m; i += NORM_THREADS) {
        const T d = dy[row + i] * slope(y[row + i], (int)kind);
        dy[row + i] = d;
        first += d * x[row + i];
        second += d;
    }
    first = block_sum<NORM_THREADS>(first, room);
    second = block_sum<NORM_THREADS>(second, room);
    const T factor = gamma[blockIdx.x] * scale[blockIdx.x], along = first / T(m), mean = second / T(m);
    for (long long i = threadIdx.x; i < m; i += NORM_THREADS)
        dy[row + i] = factor * (dy[row + i] - x[row + i] * along - mean);
    if (threadIdx.x == 0) {
        dgamma[blockIdx.x] = first;
        dbeta[blockIdx.x] = second;
    }
}
