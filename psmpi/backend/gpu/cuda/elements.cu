/* Elements of a partially separable loss: runs of their variables, their curvature pairs, and their gradients. */
#include "common.cuh"

#define SUM_THREADS 256

/* Copy runs of `values` to `out`, or add them. A block takes one entry of the table (entries, 5): its position in out,
 * its length, its range [first, last) in `sources`, and its offset from the positions there. The sources of an entry
 * are added in their order; of copies the last one counts. */
extern "C" __global__ void transfer(const long long *__restrict__ table, const long long *__restrict__ sources,
                                    const T *__restrict__ values, T *__restrict__ out, long long add)
{
    const long long *entry = table + 5 * blockIdx.x;
    T *into = out + entry[0];
    const long long first = add ? entry[2] : entry[3] - 1;
    for (long long i = threadIdx.x; i < entry[1]; i += blockDim.x) {
        T sum = add ? into[i] : T(0);
        for (long long s = first; s < entry[3]; s++)
            sum += values[sources[s] + entry[4] + i];
        into[i] = sum;
    }
}

/* partial (count rows, splits) = partial scalar products of pairs (count, rows, size) and v (count, size). Grid:
 * (count rows, splits), blocks of 256. */
extern "C" __global__ void pair_dots(long long rows, long long size, const T *__restrict__ pairs,
                                     const T *__restrict__ v, double *__restrict__ partial)
{
    __shared__ double room[SUM_THREADS];
    const long long row = blockIdx.x, step = (long long)gridDim.y * SUM_THREADS;
    const T *a = pairs + row * size, *b = v + quotient(row, rows) * size;
    double sum = 0;
    for (long long i = (long long)blockIdx.y * SUM_THREADS + threadIdx.x; i < size; i += step)
        sum += (double)a[i] * (double)b[i];
    sum = block_sum<SUM_THREADS>(sum, room);
    if (threadIdx.x == 0)
        partial[row * gridDim.y + blockIdx.y] = sum;
}

/* out (rows,) = the sums of partial (rows, splits). */
extern "C" __global__ void pair_sums(long long rows, long long splits, const double *__restrict__ partial,
                                     double *__restrict__ out)
{
    for (long long r = thread(); r < rows; r += threads()) {
        double sum = 0;
        for (long long s = 0; s < splits; s++)
            sum += partial[r * splits + s];
        out[r] = sum;
    }
}

/* weights (count, rows) = middle (count, rows, rows) times coefficients (count, rows). */
extern "C" __global__ void pair_weights(long long count, long long rows, const double *__restrict__ middle,
                                        const double *__restrict__ coefficients, double *__restrict__ weights)
{
    for (long long k = thread(); k < count * rows; k += threads()) {
        const double *c = coefficients + quotient(k, rows) * rows;
        double sum = 0;
        for (long long r = 0; r < rows; r++)
            sum += middle[k * rows + r] * c[r];
        weights[k] = sum;
    }
}

/* out (count, size) = sigma v + the sums of the rows of pairs (count, rows, size), each times its weight. */
extern "C" __global__ void pair_combine(long long count, long long rows, long long size, const T *__restrict__ pairs,
                                        const double *__restrict__ sigma, const double *__restrict__ weights,
                                        const T *__restrict__ v, T *__restrict__ out)
{
    for (long long k = thread(); k < count * size; k += threads()) {
        const long long e = quotient(k, size);
        const T *row = pairs + e * rows * size + (k - e * size);
        T sum = (T)sigma[e] * v[k];
        for (long long r = 0; r < rows; r++)
            sum += (T)weights[e * rows + r] * row[r * size];
        out[k] = sum;
    }
}

/* For each element e, row slots[e] of pairs (count, 2 memory, size) = s, and row slots[e] + memory = y; nothing if the
 * slot is -1. The other rows of a cleared element become 0. */
extern "C" __global__ void keep_pairs(long long count, long long memory, long long size,
                                      const long long *__restrict__ slots, const unsigned char *__restrict__ cleared,
                                      const T *__restrict__ s, const T *__restrict__ y, T *__restrict__ pairs)
{
    for (long long k = thread(); k < count * size; k += threads()) {
        const long long e = quotient(k, size), slot = slots[e];
        T *into = pairs + 2 * memory * e * size + (k - e * size);
        if (cleared[e])
            for (long long r = 0; r < 2 * memory; r++)
                into[r * size] = T(0);
        if (slot >= 0) {
            into[slot * size] = s[k];
            into[(memory + slot) * size] = y[k];
        }
    }
}

/* y (count, size) = a x + b y, with one a and b (count,) for each row. */
extern "C" __global__ void mix_rows(long long count, long long size, const double *__restrict__ a,
                                    const T *__restrict__ x, const double *__restrict__ b, T *__restrict__ y)
{
    for (long long k = thread(); k < count * size; k += threads()) {
        const long long e = quotient(k, size);
        y[k] = (T)b[e] * y[k] + (T)a[e] * x[k];
    }
}

/* out (terms, wide) = the derivatives of single terms, from grad (classes, batch), scaled down as the report states.
 * Term t has the derivatives of the scores of others[t] for samples of class `own`, times lost[t], and those of the
 * scores of `own` for samples of class others[t], times won[t]; else 0. */
extern "C" __global__ void term_weights(long long terms, long long batch, long long wide,
                                        const double *__restrict__ grad, const long long *__restrict__ labels,
                                        const double *__restrict__ report, long long own,
                                        const long long *__restrict__ others, const T *__restrict__ lost,
                                        const T *__restrict__ won, T *__restrict__ out)
{
    const int exponent = excess(report);
    for (long long k = thread(); k < terms * wide; k += threads()) {
        const long long t = quotient(k, wide), i = k - t * wide, other = others[t];
        T found = T(0);
        if (i < batch && labels[i] == own)
            found = (T)ldexp(grad[other * batch + i], -exponent) * lost[t];
        else if (i < batch && labels[i] == other)
            found = (T)ldexp(grad[own * batch + i], -exponent) * won[t];
        out[k] = found;
    }
}

/* out (many, size, batch) = y (size, batch), with each sample times its weight in weights (many, batch). */
extern "C" __global__ void scale_samples(long long many, long long size, long long batch, const T *__restrict__ y,
                                         const T *__restrict__ weights, T *__restrict__ out)
{
    for (long long k = thread(); k < many * size * batch; k += threads()) {
        const long long row = quotient(k, batch), t = quotient(row, size), i = k - row * batch;
        out[k] = y[(row - t * size) * batch + i] * weights[t * batch + i];
    }
}

/* out (many, count, n), with the given strides, = the sums of y (count, n, batch) over the samples, each times its
 * weight in weights (many, batch). Grid: (count n, many), blocks of 256. */
extern "C" __global__ void weighted_sums(long long n, long long batch, const T *__restrict__ y,
                                         const T *__restrict__ weights, T *__restrict__ out, long long many_step,
                                         long long count_step, long long n_step)
{
    __shared__ T room[SUM_THREADS];
    const T *from = y + blockIdx.x * batch, *by = weights + blockIdx.y * batch;
    T sum = T(0);
    for (long long i = threadIdx.x; i < batch; i += SUM_THREADS)
        sum += from[i] * by[i];
    sum = block_sum<SUM_THREADS>(sum, room);
    const long long k = quotient(blockIdx.x, n);
    if (threadIdx.x == 0)
        out[blockIdx.y * many_step + k * count_step + (blockIdx.x - k * n) * n_step] = sum;
}

/* out (size, batch) = y (size, positions, batch) summed over the positions. */
extern "C" __global__ void position_sums(long long size, long long positions, long long batch, const T *__restrict__ y,
                                         T *__restrict__ out)
{
    for (long long k = thread(); k < size * batch; k += threads()) {
        const long long row = quotient(k, batch);
        const T *from = y + row * positions * batch + (k - row * batch);
        LongSum sum;
        for (long long p = 0; p < positions; p++)
            sum.add(from[p * batch]);
        out[k] = (T)sum.value();
    }
}

/* squares move towards g^2 by 1 - beta2; root = 1 / sqrt(sqrt(squares / correction) + eps). */
extern "C" __global__ void moment_scale(long long size, const T *__restrict__ g, T *__restrict__ squares,
                                        T *__restrict__ root, double beta2, double correction, double eps)
{
    for (long long i = thread(); i < size; i += threads()) {
        const T moved = (T)beta2 * squares[i] + (T)(1 - beta2) * (g[i] * g[i]);
        squares[i] = moved;
        root[i] = T(1) / t_sqrt(t_sqrt(moved / (T)correction) + (T)eps);
    }
}
