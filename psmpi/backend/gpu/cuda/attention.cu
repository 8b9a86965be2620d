/* Softmax of rows, and its adjoint. Grid: one block of 128 for each row. */
#include "common.cuh"

#define SOFTMAX_THREADS 128

/* s (samples heads, steps, steps): each row becomes softmax(scale s) over the steps that it attends to, and 0
 * elsewhere. */
extern "C" __global__ void softmax(long long steps, long long heads, long long causal, double scale,
                                   const int *__restrict__ lengths, T *__restrict__ s)
{
    __shared__ double peaks[SOFTMAX_THREADS];
    __shared__ T room[SOFTMAX_THREADS];
    const long long matrix = quotient(blockIdx.x, steps), t = blockIdx.x - matrix * steps;
    T *row = s + blockIdx.x * steps;
    long long last = causal ? t + 1 : steps;
    if (lengths && lengths[quotient(matrix, heads)] < last)
        last = lengths[quotient(matrix, heads)];
    double peak = -LARGEST;
    for (long long u = threadIdx.x; u < last; u += SOFTMAX_THREADS)
        peak = larger(peak, (double)row[u]);
    const T most = (T)block_max<SOFTMAX_THREADS>(peak, peaks);
    T sum = T(0);
    for (long long u = threadIdx.x; u < steps; u += SOFTMAX_THREADS) {
        const T e = u < last ? t_exp((row[u] - most) * (T)scale) : T(0);
        row[u] = e;
        sum += e;
    }
    sum = block_sum<SOFTMAX_THREADS>(sum, room);
    for (long long u = threadIdx.x; u < last; u += SOFTMAX_THREADS)
        row[u] /= sum;
}

/* dp (rows, steps), the gradient of p = softmax(scale s), becomes the gradient of s. */
extern "C" __global__ void softmax_back(long long steps, double scale, const T *__restrict__ p, T *__restrict__ dp)
{
    __shared__ T room[SOFTMAX_THREADS];
    const long long row = blockIdx.x * steps;
    T sum = T(0);
    for (long long u = threadIdx.x; u < steps; u += SOFTMAX_THREADS)
        sum += p[row + u] * dp[row + u];
    sum = block_sum<SOFTMAX_THREADS>(sum, room);
    for (long long u = threadIdx.x; u < steps; u += SOFTMAX_THREADS)
        dp[row + u] = p[row + u] * (dp[row + u] - sum) * (T)scale;
}
