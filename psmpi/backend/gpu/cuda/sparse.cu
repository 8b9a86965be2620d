/* Products with sparse matrices in compressed rows, minibatch last. */
#include "common.cuh"

#define SPARSE_THREADS 32

/* y (rows, b) = for each row its bias plus the sum of w_k x[columns_k] over its entries k. */
extern "C" __global__ void sparse_forward(long long rows, long long b, const long long *__restrict__ starts,
                                          const int *__restrict__ columns, const long long *__restrict__ places,
                                          const long long *__restrict__ biases, const T *__restrict__ w,
                                          const T *__restrict__ x, T *__restrict__ y)
{
    for (long long i = thread(); i < rows * b; i += threads()) {
        const long long r = quotient(i, b), s = i - r * b, first = starts[r], n = starts[r + 1] - first;
        const T *weights = w + places[r];
        T sum = biases ? w[biases[r]] : T(0);
        for (long long k = 0; k < n; k++)
            sum += weights[k] * x[columns[first + k] * b + s];
        y[i] = sum;
    }
}

/* dx (inputs, b) = for each column the sum over its entries of w_k dy[rows_k]. */
extern "C" __global__ void sparse_inputs(long long inputs, long long b, const long long *__restrict__ starts,
                                         const int *__restrict__ rows, const int *__restrict__ places,
                                         const T *__restrict__ w, const T *__restrict__ dy, T *__restrict__ dx)
{
    for (long long i = thread(); i < inputs * b; i += threads()) {
        const long long c = quotient(i, b), s = i - c * b;
        T sum = T(0);
        for (long long k = starts[c]; k < starts[c + 1]; k++)
            sum += w[places[k]] * dy[rows[k] * b + s];
        dx[i] = sum;
    }
}

/* g at the position of each entry k of a column = <dy[rows_k], x[column]>. A block starts with the column of its number
 * and steps by the number of blocks; blocks of SPARSE_THREADS. */
extern "C" __global__ void sparse_weights(long long inputs, long long b, const long long *__restrict__ starts,
                                          const int *__restrict__ rows, const int *__restrict__ places,
                                          const T *__restrict__ x, const T *__restrict__ dy, T *__restrict__ g)
{
    __shared__ double room[SPARSE_THREADS];
    for (long long c = blockIdx.x; c < inputs; c += gridDim.x) {
        const T *seen = x + c * b;
        for (long long k = starts[c] + blockIdx.y; k < starts[c + 1]; k += gridDim.y) {
            const T *d = dy + rows[k] * b;
            LongSum sum;
            for (long long s = threadIdx.x; s < b; s += SPARSE_THREADS)
                sum.add(d[s] * seen[s]);
            const double total = block_sum<SPARSE_THREADS>(sum.value(), room);
            if (threadIdx.x == 0)
                g[places[k]] = (T)total;
        }
    }
}

/* g at the position of each row's bias = the sum of dy[r]. One block of SPARSE_THREADS for each row. */
extern "C" __global__ void sparse_biases(long long rows, long long b, const long long *__restrict__ places,
                                         const T *__restrict__ dy, T *__restrict__ g)
{
    __shared__ double room[SPARSE_THREADS];
    for (long long r = blockIdx.x; r < rows; r += gridDim.x) {
        LongSum sum;
        for (long long s = threadIdx.x; s < b; s += SPARSE_THREADS)
            sum.add(dy[r * b + s]);
        const double total = block_sum<SPARSE_THREADS>(sum.value(), room);
        if (threadIdx.x == 0)
            g[places[r]] = (T)total;
    }
}
