/* Linear combinations and scalar products of vectors. Arrays need no alignment beyond that of an element. */
#include "common.cuh"

#define VECTOR_THREADS 256

/* out = factor0 a0 + factor1 a1 + ..., in this order, with every operation rounded separately. CuPy compiles with
 * subnormal floats flushed to 0. out may be a0. Terms other than the first may have no array: they are left out. */
extern "C" __global__ void combine(long long size, T *out, const T *a0, const T *__restrict__ a1,
                                   const T *__restrict__ a2, const T *__restrict__ a3, double factor0, double factor1,
                                   double factor2, double factor3)
{
    for (long long i = thread(); i < size; i += threads()) {
        T sum = t_mul((T)factor0, a0[i]);
        if (a1)
            sum = t_add(sum, t_mul((T)factor1, a1[i]));
        if (a2)
            sum = t_add(sum, t_mul((T)factor2, a2[i]));
        if (a3)
            sum = t_add(sum, t_mul((T)factor3, a3[i]));
        out[i] = sum;
    }
}

/* x *= by. */
extern "C" __global__ void multiply(long long size, T *__restrict__ x, const T *__restrict__ by)
{
    for (long long i = thread(); i < size; i += threads())
        x[i] *= by[i];
}

/* partial (pairs, blocks) = partial scalar products of up to four pairs. An array in several pairs is read from memory
 * once. Blocks of 256. */
extern "C" __global__ void dots(long long size, const T *__restrict__ a0, const T *__restrict__ b0,
                                const T *__restrict__ a1, const T *__restrict__ b1, const T *__restrict__ a2,
                                const T *__restrict__ b2, const T *__restrict__ a3, const T *__restrict__ b3,
                                double *__restrict__ partial)
{
    __shared__ double room[VECTOR_THREADS];
    double sums[4] = {0, 0, 0, 0};
    for (long long i = thread(); i < size; i += threads()) {
        sums[0] += (double)a0[i] * (double)b0[i];
        if (a1)
            sums[1] += (double)a1[i] * (double)b1[i];
        if (a2)
            sums[2] += (double)a2[i] * (double)b2[i];
        if (a3)
            sums[3] += (double)a3[i] * (double)b3[i];
    }
    const int pairs = a3 ? 4 : a2 ? 3 : a1 ? 2 : 1;
#pragma unroll
    for (int k = 0; k < 4; k++)
        if (k < pairs) {
            const double sum = block_sum<VECTOR_THREADS>(sums[k], room);
            if (threadIdx.x == 0)
                partial[(long long)k * gridDim.x + blockIdx.x] = sum;
        }
}

/* partial (blocks,) = partial sums of |x|. Blocks of 256. */
extern "C" __global__ void abs_sum(long long size, const T *__restrict__ x, double *__restrict__ partial)
{
    __shared__ double room[VECTOR_THREADS];
    double sum = 0;
    for (long long i = thread(); i < size; i += threads())
        sum += fabs((double)x[i]);
    sum = block_sum<VECTOR_THREADS>(sum, room);
    if (threadIdx.x == 0)
        partial[blockIdx.x] = sum;
}

/* out (rows,) = the sums of the rows of partial (rows, count). One block of 256 for each row. */
extern "C" __global__ void sum_partials(long long count, const double *__restrict__ partial, double *__restrict__ out)
{
    __shared__ double room[VECTOR_THREADS];
    double sum = 0;
    for (long long i = threadIdx.x; i < count; i += VECTOR_THREADS)
        sum += partial[blockIdx.x * count + i];
    sum = block_sum<VECTOR_THREADS>(sum, room);
    if (threadIdx.x == 0)
        out[blockIdx.x] = sum;
}
