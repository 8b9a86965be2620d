/* Convolutions of small grouped networks: y (units, rows, columns, batch) from x (channels, height, width, batch).
 *
 * Stripe k of `count` stripes has the n units from out + k n on, connected to the n_in channels from
 * source + k source_step on; kernels: (units, n_in, kernel, kernel). Stripes of one launch share no channel. A thread
 * computes one position of four units (or channels): each input that it reads is multiplied by four weights, which all
 * threads of a warp read together.
 */
#include "common.cuh"

#define PER_THREAD 4
/* Number of columns of a kernel whose gradients a thread sums up together. */
#define TAPS 8
#define WEIGHT_THREADS 128
/* Number of threads that share the last part of a sum. */
#define LANES (WEIGHT_THREADS / TAPS)

__device__ __forceinline__ long long padded(long long n)
{
    return (n + PER_THREAD - 1) / PER_THREAD * PER_THREAD;
}

/* Weights in the order in which the convolutions read them: by_unit (count, n_in, kernel^2, n) and by_channel
 * (count, n, kernel^2, n_in), the last axis padded with zeros to a multiple of four. */
extern "C" __global__ void conv_pack(long long count, long long n, long long n_in, long long out, long long kernel,
                                     const T *__restrict__ kernels, T *__restrict__ by_unit, T *__restrict__ by_channel)
{
    const long long taps = kernel * kernel, wide = padded(n), deep = padded(n_in);
    for (long long e = thread(); e < count * n_in * taps * wide; e += threads()) {
        const long long row = quotient(e, wide), u = e - row * wide;
        const long long source = quotient(row, taps), tap = row - source * taps;
        const long long k = quotient(source, n_in), c = source - k * n_in;
        by_unit[e] = u < n ? kernels[((out + k * n + u) * n_in + c) * taps + tap] : T(0);
    }
    for (long long e = thread(); e < count * n * taps * deep; e += threads()) {
        const long long row = quotient(e, deep), c = e - row * deep;
        const long long unit = quotient(row, taps), tap = row - unit * taps;
        by_channel[e] = c < n_in ? kernels[((out + unit) * n_in + c) * taps + tap] : T(0);
    }
}

/* y = activation(bias + correlations). Grid: (positions / 128, units / 4, stripes). */
extern "C" __global__ void conv_forward(long long count, long long n, long long n_in, long long source,
                                        long long source_step, long long out, long long height, long long width,
                                        long long rows, long long columns, long long kernel, long long stride,
                                        long long batch, const T *__restrict__ x, const T *__restrict__ by_unit,
                                        const T *__restrict__ bias, T *__restrict__ y, long long kind)
{
    const long long positions = rows * columns * batch, p = thread();
    if (p >= positions)
        return;
    const long long k = blockIdx.z, first = (long long)PER_THREAD * blockIdx.y, unit = out + k * n + first;
    const long long line = width * batch, plane = height * line, step = padded(n);
    const Place at = place(p, (int)columns, (int)batch);
    const T *from = x + (source + k * source_step) * plane + at.row * stride * line;
    from += at.column * stride * batch + at.sample;
    const T *weights = by_unit + k * n_in * kernel * kernel * step + first;
    const int size = (int)kernel;
    T sum[PER_THREAD] = {T(0), T(0), T(0), T(0)};
    for (int c = 0; c < (int)n_in; c++, from += plane)
        for (int i = 0; i < size; i++) {
            const T *value = from + i * line;
            for (int j = 0; j < size; j++, value += batch, weights += step) {
                const Four w = *(const Four *)weights;
                const T seen = *value;
#pragma unroll
                for (int u = 0; u < PER_THREAD; u++)
                    sum[u] += w.at[u] * seen;
            }
        }
#pragma unroll
    for (int u = 0; u < PER_THREAD; u++)
        if (first + u < n)
            y[(unit + u) * positions + p] = activation(sum[u] + bias[unit + u], (int)kind);
}

/* dx = or, with `add`, += the gradient with respect to the channels of the stripes. Grid: (positions of the input /
 * 128, channels / 4, stripes). */
extern "C" __global__ void conv_input(long long count, long long n, long long n_in, long long source,
                                      long long source_step, long long out, long long height, long long width,
                                      long long rows, long long columns, long long kernel, long long stride,
                                      long long batch, const T *__restrict__ dy, const T *__restrict__ by_channel,
                                      T *__restrict__ dx, long long accumulate)
{
    const long long plane = height * width * batch, p = thread();
    if (p >= plane)
        return;
    const long long k = blockIdx.z, first = (long long)PER_THREAD * blockIdx.y;
    const long long line = columns * batch, positions = rows * line, step = padded(n_in);
    const Place at = place(p, (int)width, (int)batch);
    const int size = (int)kernel, apart = (int)stride;
    /* The outputs (r, c) whose windows contain this position: entry (row - r stride, column - c stride) of the kernel
     * multiplies it. */
    const int r0 = at.row < size ? 0 : (at.row - size) / apart + 1;
    const int c0 = at.column < size ? 0 : (at.column - size) / apart + 1;
    const int r1 = at.row / apart < (int)rows ? at.row / apart + 1 : (int)rows;
    const int c1 = at.column / apart < (int)columns ? at.column / apart + 1 : (int)columns;
    const T *from = dy + (out + k * n) * positions + at.sample;
    const T *weights = by_channel + k * n * kernel * kernel * step + first;
    T sum[PER_THREAD] = {T(0), T(0), T(0), T(0)};
    for (int u = 0; u < (int)n; u++, from += positions, weights += kernel * kernel * step)
        for (int r = r0; r < r1; r++)
            for (int c = c0; c < c1; c++) {
                const int tap = (at.row - r * apart) * size + at.column - c * apart;
                const Four w = *(const Four *)(weights + tap * step);
                const T seen = from[r * line + c * batch];
#pragma unroll
                for (int q = 0; q < PER_THREAD; q++)
                    sum[q] += w.at[q] * seen;
            }
    T *into = dx + (source + k * source_step + first) * plane + p;
#pragma unroll
    for (int q = 0; q < PER_THREAD; q++)
        if (first + q < n_in)
            into[q * plane] = accumulate ? into[q * plane] + sum[q] : sum[q];
}

/* The positions of a thread of conv_weight: every WEIGHT_THREADS-th from `p` to `end`. */
struct Walk {
    long long p, end, positions, line, batch, columns, stride;
};

/* Sums over the walk for four units and WIDTH columns of a kernel row. x: the input that the first of these columns
 * multiplies at position 0; dy: gradient of the first unit. into: the first sum; next: stride between units there. */
template <int WIDTH>
__device__ __forceinline__ void weight_columns(Walk walk, int units, const T *__restrict__ x, const T *__restrict__ dy,
                                               T *__restrict__ into, long long next, T (*all)[WEIGHT_THREADS + 1],
                                               T (*some)[LANES + 1])
{
    const int t = threadIdx.x, batch = (int)walk.batch, columns = (int)walk.columns;
    /* Steps from one position to the next, to avoid divisions. */
    const int images = WEIGHT_THREADS / batch, d_row = images / columns;
    const int d_column = images - d_row * columns, d_sample = WEIGHT_THREADS - images * batch;
    Place at = place(walk.p, columns, batch);
    T sum[PER_THREAD][WIDTH];
#pragma unroll
    for (int u = 0; u < PER_THREAD; u++)
#pragma unroll
        for (int j = 0; j < WIDTH; j++)
            sum[u][j] = T(0);
    for (long long p = walk.p; p < walk.end; p += WEIGHT_THREADS) {
        const T *from = x + at.row * walk.stride * walk.line + at.column * walk.stride * batch + at.sample;
        T seen[WIDTH], d[PER_THREAD];
#pragma unroll
        for (int j = 0; j < WIDTH; j++)
            seen[j] = from[(long long)j * batch];
#pragma unroll
        for (int u = 0; u < PER_THREAD; u++)
            d[u] = u < units ? dy[u * walk.positions + p] : T(0);
#pragma unroll
        for (int u = 0; u < PER_THREAD; u++)
#pragma unroll
            for (int j = 0; j < WIDTH; j++)
                sum[u][j] += d[u] * seen[j];
        at.sample += d_sample;
        at.column += d_column;
        at.row += d_row;
        if (at.sample >= batch) {
            at.sample -= batch;
            at.column++;
        }
        if (at.column >= columns) {
            at.column -= columns;
            at.row++;
        }
    }
#pragma unroll
    for (int u = 0; u < PER_THREAD; u++) {
#pragma unroll
        for (int j = 0; j < WIDTH; j++)
            all[j][t] = sum[u][j];
        __syncthreads();
        const int j = t / LANES, lane = t - j * LANES;
        if (j < WIDTH) {
            T share = T(0);
            for (int k = lane; k < WEIGHT_THREADS; k += LANES)
                share += all[j][k];
            some[j][lane] = share;
        }
        __syncthreads();
        if (t < WIDTH && u < units) {
            T total = T(0);
            for (int k = 0; k < LANES; k++)
                total += some[t][k];
            into[u * next + t] = total;
        }
    }
}

/* partial (splits, count n, n_in, kernel, kernel) = partial sums of the gradient of the kernels. Grid: (stripes *
 * units / 4, n_in * kernel, splits), blocks of 128. */
extern "C" __global__ void conv_weight(long long count, long long n, long long n_in, long long source,
                                       long long source_step, long long out, long long height, long long width,
                                       long long rows, long long columns, long long kernel, long long stride,
                                       long long batch, const T *__restrict__ x, const T *__restrict__ dy,
                                       T *__restrict__ partial, long long splits)
{
    __shared__ T all[TAPS][WEIGHT_THREADS + 1];
    __shared__ T some[TAPS][LANES + 1];
    const long long blocks = padded(n) / PER_THREAD, k = blockIdx.x / blocks;
    const long long first = (blockIdx.x - k * blocks) * PER_THREAD;
    const long long c = blockIdx.y / kernel, i = blockIdx.y - c * kernel;
    const long long positions = rows * columns * batch, share = (positions + splits - 1) / splits;
    const long long begin = blockIdx.z * share, end = begin + share < positions ? begin + share : positions;
    const long long line = width * batch;
    const Walk walk = {begin + threadIdx.x, end, positions, line, batch, columns, stride};
    const int units = n - first < PER_THREAD ? (int)(n - first) : PER_THREAD;
    const T *from = x + ((source + k * source_step + c) * height + i) * line;
    const T *d = dy + (out + k * n + first) * positions;
    const long long next = n_in * kernel * kernel;
    T *into = partial + ((blockIdx.z * count + k) * n + first) * next + (c * kernel + i) * kernel;
    for (int j = 0; j < (int)kernel; j += TAPS, from += TAPS * batch, into += TAPS) {
        switch ((int)kernel - j) {
        case 1:
            weight_columns<1>(walk, units, from, d, into, next, all, some);
            break;
        case 2:
            weight_columns<2>(walk, units, from, d, into, next, all, some);
            break;
        case 3:
            weight_columns<3>(walk, units, from, d, into, next, all, some);
            break;
        case 4:
            weight_columns<4>(walk, units, from, d, into, next, all, some);
            break;
        case 5:
            weight_columns<5>(walk, units, from, d, into, next, all, some);
            break;
        case 6:
            weight_columns<6>(walk, units, from, d, into, next, all, some);
            break;
        case 7:
            weight_columns<7>(walk, units, from, d, into, next, all, some);
            break;
        default:
            weight_columns<8>(walk, units, from, d, into, next, all, some);
        }
    }
}

/* dkernels (size,) = partial (splits, size) summed over the splits. */
extern "C" __global__ void conv_weight_sum(long long size, long long splits, const T *__restrict__ partial,
                                           T *__restrict__ dkernels)
{
    for (long long i = thread(); i < size; i += threads()) {
        double sum = (double)partial[i];
        for (long long s = 1; s < splits; s++)
            sum += (double)partial[s * size + i];
        dkernels[i] = (T)sum;
    }
}

/* dkernels (units, n_in, kernel, kernel, batch) = the gradient of the kernels for each sample. Grid: (n_in * kernel^2 *
 * batch / 128, units / 4, stripes). */
extern "C" __global__ void conv_samples(long long count, long long n, long long n_in, long long source,
                                        long long source_step, long long out, long long height, long long width,
                                        long long rows, long long columns, long long kernel, long long stride,
                                        long long batch, const T *__restrict__ x, const T *__restrict__ dy,
                                        T *__restrict__ dkernels)
{
    const long long taps = n_in * kernel * kernel, p = thread();
    if (p >= taps * batch)
        return;
    const long long k = blockIdx.z, first = (long long)PER_THREAD * blockIdx.y, unit = out + k * n + first;
    /* A thread has one tap, an entry of the kernel of one channel, and one sample. */
    const long long tap = quotient(p, batch), sample = p - tap * batch;
    const long long c = quotient(tap, kernel * kernel), entry = tap - c * kernel * kernel;
    const long long i = quotient(entry, kernel), j = entry - i * kernel, line = width * batch;
    const long long positions = rows * columns * batch;
    const T *from = x + (source + k * source_step + c) * height * line + i * line + j * batch + sample;
    const T *d = dy + unit * positions + sample;
    const int units = n - first < PER_THREAD ? (int)(n - first) : PER_THREAD;
    /* Sum row by row, so that no sum is long. */
    T sum[PER_THREAD] = {T(0), T(0), T(0), T(0)};
    for (long long r = 0; r < rows; r++) {
        T some[PER_THREAD] = {T(0), T(0), T(0), T(0)};
        for (long long q = 0; q < columns; q++) {
            const T seen = from[r * stride * line + q * stride * batch];
#pragma unroll
            for (int u = 0; u < PER_THREAD; u++)
                if (u < units)
                    some[u] += d[u * positions + (r * columns + q) * batch] * seen;
        }
#pragma unroll
        for (int u = 0; u < PER_THREAD; u++)
            sum[u] += some[u];
    }
#pragma unroll
    for (int u = 0; u < PER_THREAD; u++)
        if (u < units)
            dkernels[(unit + u) * taps * batch + p] = sum[u];
}
