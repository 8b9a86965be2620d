/* Steps of the optimizers over whole shards, and what clipping needs. Scalars are cast to the type of the arrays, as
 * NumPy does; but CuPy has floats below the normal ones taken for 0. */
#include "common.cuh"

#define NORM_THREADS 256

/* The gradient with the L2 penalty; without one, w has no influence, not even as infinity. */
__device__ __forceinline__ T decayed(T g, T w, T l2)
{
    return l2 == T(0) ? g : g + l2 * w;
}

/* w -= rate g. */
extern "C" __global__ void sgd(long long size, T *__restrict__ w, const T *__restrict__ g, double rate, double l2)
{
    for (long long i = thread(); i < size; i += threads())
        w[i] -= (T)rate * decayed(g[i], w[i], (T)l2);
}

/* v = beta v + g; w -= rate v, or rate (g + beta v). */
extern "C" __global__ void momentum(long long size, T *__restrict__ w, const T *__restrict__ g, T *__restrict__ v,
                                    double rate, double beta, double l2, long long nesterov)
{
    for (long long i = thread(); i < size; i += threads()) {
        const T d = decayed(g[i], w[i], (T)l2), moved = (T)beta * v[i] + d;
        v[i] = moved;
        w[i] -= (T)rate * (nesterov ? d + (T)beta * moved : moved);
    }
}

/* w = keep w - rate m / (root sqrt(v) + eps) after m and v have moved towards d = g + l2 w and d^2. */
extern "C" __global__ void adam(long long size, T *__restrict__ w, const T *__restrict__ g, T *__restrict__ m,
                                T *__restrict__ v, double rate, double root, double beta1, double beta2, double eps,
                                double l2, double keep)
{
    const T towards = (T)(1 - beta1), fresh = (T)(1 - beta2);
    for (long long i = thread(); i < size; i += threads()) {
        const T d = decayed(g[i], w[i], (T)l2), first = m[i] + towards * (d - m[i]);
        const T second = (T)beta2 * v[i] + fresh * (d * d);
        m[i] = first;
        v[i] = second;
        w[i] = (T)keep * w[i] - (T)rate * (first / ((T)root * t_sqrt(second) + (T)eps));
    }
}

/* v = alpha v + (1 - alpha) g^2; w -= rate g / (sqrt(v) + eps). */
extern "C" __global__ void rmsprop(long long size, T *__restrict__ w, const T *__restrict__ g, T *__restrict__ v,
                                   double rate, double alpha, double eps, double l2)
{
    const T fresh = (T)(1 - alpha);
    for (long long i = thread(); i < size; i += threads()) {
        const T d = decayed(g[i], w[i], (T)l2), moved = (T)alpha * v[i] + fresh * (d * d);
        v[i] = moved;
        w[i] -= (T)rate * (d / (t_sqrt(moved) + (T)eps));
    }
}

/* partial (blocks,): shares of the sum of squares. Blocks of 256. */
extern "C" __global__ void squared_norm(long long size, const T *__restrict__ g, double *__restrict__ partial)
{
    __shared__ double room[NORM_THREADS];
    double sum = 0;
    for (long long i = thread(); i < size; i += threads())
        sum += (double)g[i] * (double)g[i];
    sum = block_sum<NORM_THREADS>(sum, room);
    if (threadIdx.x == 0)
        partial[blockIdx.x] = sum;
}

/* out[0] = the sum of partial (count,). One block of 256. */
extern "C" __global__ void sum_partials(long long count, const double *__restrict__ partial, double *__restrict__ out)
{
    __shared__ double room[NORM_THREADS];
    double sum = 0;
    for (long long i = threadIdx.x; i < count; i += NORM_THREADS)
        sum += partial[i];
    sum = block_sum<NORM_THREADS>(sum, room);
    if (threadIdx.x == 0)
        out[0] = sum;
}

/* g *= factor. */
extern "C" __global__ void scale(long long size, T *__restrict__ g, double factor)
{
    for (long long i = thread(); i < size; i += threads())
        g[i] *= (T)factor;
}
