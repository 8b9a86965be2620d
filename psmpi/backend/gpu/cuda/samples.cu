/* Minibatches of a data set on the device, (samples, features) or compressed rows. */
#include "common.cuh"

#define TILE 32
#define TILE_ROWS 8

/* Transpose tiles in shared memory, so that both arrays are accessed along their rows. The rows of a tile are one
 * longer than its side, so that the elements of a column lie in different banks. */
template <typename S>
__device__ __forceinline__ void gather(T (*tile)[TILE + 1], long long batch, long long features,
                                       const long long *__restrict__ at, const S *__restrict__ values,
                                       const T *__restrict__ scale, T *__restrict__ out)
{
    const long long sample = (long long)TILE * blockIdx.x, feature = (long long)TILE * blockIdx.y;
    const int x = threadIdx.x;
    for (int k = threadIdx.y; k < TILE; k += TILE_ROWS)
        if (sample + k < batch && feature + x < features)
            tile[k][x] = (T)values[at[sample + k] * features + feature + x];
    __syncthreads();
    for (int k = threadIdx.y; k < TILE; k += TILE_ROWS)
        if (sample + x < batch && feature + k < features)
            out[(feature + k) * batch + sample + x] = tile[x][k] * scale[feature + k];
}

/* out (features, batch) = rows `at` (batch,) of values, times scale (features,). Grid: (batch / 32, features / 32),
 * blocks of (32, 8). */
extern "C" __global__ void gather_u8(long long batch, long long features, const long long *__restrict__ at,
                                     const unsigned char *__restrict__ values, const T *__restrict__ scale,
                                     T *__restrict__ out)
{
    __shared__ T tile[TILE][TILE + 1];
    gather(tile, batch, features, at, values, scale, out);
}

extern "C" __global__ void gather_f32(long long batch, long long features, const long long *__restrict__ at,
                                      const float *__restrict__ values, const T *__restrict__ scale,
                                      T *__restrict__ out)
{
    __shared__ T tile[TILE][TILE + 1];
    gather(tile, batch, features, at, values, scale, out);
}

extern "C" __global__ void gather_f64(long long batch, long long features, const long long *__restrict__ at,
                                      const double *__restrict__ values, const T *__restrict__ scale,
                                      T *__restrict__ out)
{
    __shared__ T tile[TILE][TILE + 1];
    gather(tile, batch, features, at, values, scale, out);
}

/* Write the entries of the compressed rows `at` (batch,) to out (features, batch), which is 0 before. Row r has the
 * entries [starts[r], starts[r + 1]). One block for each row of the minibatch. */
extern "C" __global__ void fill_compressed(long long batch, const long long *__restrict__ at,
                                           const long long *__restrict__ starts, const int *__restrict__ columns,
                                           const T *__restrict__ values, T *__restrict__ out)
{
    for (long long i = blockIdx.x; i < batch; i += gridDim.x) {
        const long long end = starts[at[i] + 1];
        for (long long k = starts[at[i]] + threadIdx.x; k < end; k += blockDim.x)
            out[columns[k] * batch + i] = values[k];
    }
}
