/* Passes over layers: biases, activations, pooling, shifts of images, folded kernels, GELU, and last steps. */
#include "common.cuh"

#define ROW_THREADS 256

/* y (count, n, m) = activation(y + bias), in place; the bias of row (k, u) is bias[k bias_step + u bias_row_step]. */
extern "C" __global__ void finish(long long count, long long n, long long m, T *__restrict__ y,
                                  const T *__restrict__ bias, long long bias_step, long long bias_row_step,
                                  long long kind)
{
    for (long long i = thread(); i < count * n * m; i += threads()) {
        const long long row = quotient(i, m), k = quotient(row, n), u = row - k * n;
        y[i] = activation(y[i] + bias[k * bias_step + u * bias_row_step], (int)kind);
    }
}

/* dy (count, n, m) *= activation', in place, and partial (count n, splits) = partial sums of the rows. Grid: (rows,
 * splits), blocks of 256. */
extern "C" __global__ void finish_back(long long count, long long n, long long m, const T *__restrict__ y,
                                       T *__restrict__ dy, T *__restrict__ partial, long long splits, long long kind)
{
    __shared__ double room[ROW_THREADS];
    const long long share = (m + splits - 1) / splits, begin = blockIdx.y * share;
    const long long end = begin + share < m ? begin + share : m, row = blockIdx.x * m;
    LongSum sum;
    for (long long i = begin + threadIdx.x; i < end; i += ROW_THREADS) {
        T d = dy[row + i];
        if (kind) {
            d *= slope(y[row + i], (int)kind);
            dy[row + i] = d;
        }
        sum.add(d);
    }
    const double total = block_sum<ROW_THREADS>(sum.value(), room);
    if (threadIdx.x == 0)
        partial[blockIdx.x * splits + blockIdx.y] = (T)total;
}

/* db[k step + u row_step] = the sum of row (k, u) of partial (count, n, splits). */
extern "C" __global__ void row_sums(long long count, long long n, long long splits, const T *__restrict__ partial,
                                    T *__restrict__ db, long long step, long long row_step)
{
    for (long long row = thread(); row < count * n; row += threads()) {
        const long long k = quotient(row, n), u = row - k * n;
        double sum = 0;
        for (long long s = 0; s < splits; s++)
            sum += (double)partial[row * splits + s];
        db[k * step + u * row_step] = (T)sum;
    }
}

/* y = activation(y), in place. */
extern "C" __global__ void activate(long long size, T *__restrict__ y, long long kind)
{
    for (long long i = thread(); i < size; i += threads())
        y[i] = activation(y[i], (int)kind);
}

/* dy *= activation', in place, from the activation's output y. */
extern "C" __global__ void activate_back(long long size, const T *__restrict__ y, T *__restrict__ dy, long long kind)
{
    for (long long i = thread(); i < size; i += threads())
        dy[i] *= slope(y[i], (int)kind);
}

/* Square i of the `size` x `size` squares that cover an image. Squares at the lower and right edges may be cut off:
 * only whole ones are pooled. */
struct Square {
    /* Positions of its first pixel and of its pooled value. */
    long long pixel, value;
    int high, wide;
    bool whole;
};

__device__ __forceinline__ Square square(long long i, long long across, long long down, long long height,
                                         long long width, long long batch, long long size)
{
    const long long cell = quotient(i, batch), b = i - cell * batch, line = quotient(cell, across);
    const long long column = cell - line * across, channel = quotient(line, down), row = line - channel * down;
    const long long top = row * size, left = column * size;
    Square s;
    s.pixel = ((channel * height + top) * width + left) * batch + b;
    s.value = ((channel * (height / size) + row) * (width / size) + column) * batch + b;
    s.high = (int)(height - top < size ? height - top : size);
    s.wide = (int)(width - left < size ? width - left : size);
    s.whole = s.high == size && s.wide == size;
    return s;
}

/* y (channels, height / size, width / size, batch) = activation(mean of size x size windows of x). */
extern "C" __global__ void mean_pool(long long channels, long long height, long long width, long long batch,
                                     long long size, const T *__restrict__ x, T *__restrict__ y, long long kind)
{
    const long long down = height / size, across = width / size;
    const T weight = T(1.0 / (double)(size * size));
    for (long long i = thread(); i < channels * down * across * batch; i += threads()) {
        const T *from = x + square(i, across, down, height, width, batch, size).pixel;
        /* Sum row by row, so that no sum is long. */
        T sum = T(0);
        for (int r = 0; r < (int)size; r++) {
            T line = T(0);
            for (int c = 0; c < (int)size; c++)
                line += from[(r * width + c) * batch];
            sum += line;
        }
        y[i] = activation(sum * weight, (int)kind);
    }
}

/* dx (channels, height, width, batch) = the gradient with respect to x, 0 outside all windows. */
extern "C" __global__ void mean_pool_back(long long channels, long long height, long long width, long long batch,
                                          long long size, const T *__restrict__ dy, T *__restrict__ dx)
{
    const long long down = (height + size - 1) / size, across = (width + size - 1) / size;
    const T weight = T(1.0 / (double)(size * size));
    for (long long i = thread(); i < channels * down * across * batch; i += threads()) {
        const Square s = square(i, across, down, height, width, batch, size);
        const T d = s.whole ? dy[s.value] * weight : T(0);
        for (int r = 0; r < s.high; r++)
            for (int c = 0; c < s.wide; c++)
                dx[s.pixel + (r * width + c) * batch] = d;
    }
}

/* y = activation(largest entry of size x size windows of x), NaN if an entry is NaN. */
extern "C" __global__ void max_pool(long long channels, long long height, long long width, long long batch,
                                    long long size, const T *__restrict__ x, T *__restrict__ y, long long kind)
{
    const long long down = height / size, across = width / size;
    for (long long i = thread(); i < channels * down * across * batch; i += threads()) {
        const T *from = x + square(i, across, down, height, width, batch, size).pixel;
        T best = *from;
        for (int r = 0; r < (int)size; r++)
            for (int c = 0; c < (int)size; c++) {
                const T value = from[(r * width + c) * batch];
                if (value > best || value != value)
                    best = value;
            }
        y[i] = activation(best, (int)kind);
    }
}

/* out = the images x, each flipped left to right if moves[2] is 1, then shifted by moves[0] rows down and moves[1]
 * columns to the right. Pixels from outside the image are 0, or with `reflect` mirrored at the edge. moves: (3,
 * batch). */
extern "C" __global__ void move_images(long long channels, long long height, long long width, long long batch,
                                       const int *__restrict__ moves, long long reflect, const T *__restrict__ x,
                                       T *__restrict__ out)
{
    const long long image = height * width * batch;
    for (long long i = thread(); i < channels * image; i += threads()) {
        const long long s = i % batch;
        long long row = i % image / (width * batch) - moves[s], column = i / batch % width - moves[batch + s];
        const bool inside = row >= 0 && row < height && column >= 0 && column < width;
        if (!inside && !reflect) {
            out[i] = T(0);
            continue;
        }
        row = row < 0 ? -row : row >= height ? 2 * (height - 1) - row : row;
        column = column < 0 ? -column : column >= width ? 2 * (width - 1) - column : column;
        if (moves[2 * batch + s])
            column = width - 1 - column;
        out[i] = x[i / image * image + (row * width + column) * batch + s];
    }
}

/* dx = dy where x is the first largest entry of its window, 0 elsewhere and in windows with NaN. */
extern "C" __global__ void max_pool_back(long long channels, long long height, long long width, long long batch,
                                         long long size, const T *__restrict__ x, const T *__restrict__ dy,
                                         T *__restrict__ dx)
{
    const long long down = (height + size - 1) / size, across = (width + size - 1) / size;
    for (long long i = thread(); i < channels * down * across * batch; i += threads()) {
        const Square s = square(i, across, down, height, width, batch, size);
        int row = -1, column = -1;
        T d = T(0);
        if (s.whole) {
            T best = x[s.pixel];
            bool number = true;
            row = column = 0;
            for (int r = 0; r < s.high; r++)
                for (int c = 0; c < s.wide; c++) {
                    const T value = x[s.pixel + (r * width + c) * batch];
                    number = number && value == value;
                    if (value > best) {
                        best = value;
                        row = r;
                        column = c;
                    }
                }
            if (number)
                d = dy[s.value];
        }
        for (int r = 0; r < s.high; r++)
            for (int c = 0; c < s.wide; c++)
                dx[s.pixel + (r * width + c) * batch] = r == row && c == column ? d : T(0);
    }
}

/* Stripe, row, channel and entry (i, j) of an element, from its position in a contiguous (count, rows, n_in, k, k). */
struct Entry {
    long long stripe, row, channel;
    int i, j;
};

__device__ __forceinline__ Entry entry(long long e, long long rows, long long n_in, long long k)
{
    const long long line = quotient(e, k), image = quotient(line, k), unit = quotient(image, n_in);
    Entry found;
    found.stripe = quotient(unit, rows);
    found.row = unit - found.stripe * rows;
    found.channel = image - unit * n_in;
    found.i = (int)(line - image * k);
    found.j = (int)(e - line * k);
    return found;
}

/* Fold pool x pool mean pooling into kernels: out (count, rows, n_in, k + pool - 1, k + pool - 1). Entry (s, u, c, i,
 * j) of the kernels is w[s step + u row_step + (c k + i) k + j]. */
extern "C" __global__ void fold(long long count, long long rows, long long n_in, long long k, long long pool,
                                const T *__restrict__ w, long long step, long long row_step, T *__restrict__ out)
{
    const long long wide = k + pool - 1;
    const T weight = T(1.0 / (double)(pool * pool));
    for (long long e = thread(); e < count * rows * n_in * wide * wide; e += threads()) {
        const Entry at = entry(e, rows, n_in, wide);
        const T *from = w + at.stripe * step + at.row * row_step + at.channel * k * k;
        T sum = T(0);
        for (int a = 0; a < (int)pool; a++)
            for (int b = 0; b < (int)pool; b++) {
                const int i = at.i - a, j = at.j - b;
                if (i >= 0 && i < (int)k && j >= 0 && j < (int)k)
                    sum += from[i * k + j];
            }
        out[e] = sum * weight;
    }
}

/* The adjoint of fold, from dfolded (count, rows, n_in, k + pool - 1, k + pool - 1); out has the layout of w there. */
extern "C" __global__ void unfold(long long count, long long rows, long long n_in, long long k, long long pool,
                                  const T *__restrict__ dfolded, T *__restrict__ out, long long step,
                                  long long row_step)
{
    const long long wide = k + pool - 1;
    const T weight = T(1.0 / (double)(pool * pool));
    for (long long e = thread(); e < count * rows * n_in * k * k; e += threads()) {
        const Entry at = entry(e, rows, n_in, k);
        const T *from = dfolded + ((at.stripe * rows + at.row) * n_in + at.channel) * wide * wide;
        T sum = T(0);
        for (int a = 0; a < (int)pool; a++)
            for (int b = 0; b < (int)pool; b++)
                sum += from[(at.i + a) * wide + at.j + b];
        out[at.stripe * step + at.row * row_step + (at.channel * k + at.i) * k + at.j] = sum * weight;
    }
}

/* Phi(x), the distribution function of the standard normal. */
__device__ __forceinline__ T normal_law(T x)
{
    return T(0.5) * t_erfc(x * T(-0.70710678118654752440));
}

/* y = x Phi(x). */
extern "C" __global__ void gelu(long long size, const T *__restrict__ x, T *__restrict__ y)
{
    for (long long i = thread(); i < size; i += threads())
        y[i] = x[i] * normal_law(x[i]);
}

/* dy *= Phi(x) + x phi(x), with phi the density of the standard normal. */
extern "C" __global__ void gelu_back(long long size, const T *__restrict__ x, T *__restrict__ dy)
{
    for (long long i = thread(); i < size; i += threads())
        dy[i] *= normal_law(x[i]) + x[i] * (T(0.39894228040143267794) * t_exp(T(-0.5) * x[i] * x[i]));
}

/* y (units, b) = the last steps of sequences x (units, steps, b). */
extern "C" __global__ void last_steps(long long units, long long steps, long long b, const T *__restrict__ x,
                                      const int *__restrict__ lengths, T *__restrict__ y)
{
    for (long long i = thread(); i < units * b; i += threads()) {
        const long long unit = quotient(i, b), s = i - unit * b;
        y[i] = x[(unit * steps + lengths[s] - 1) * b + s];
    }
}

/* dx (units, steps, b) = dy (units, b) at the last steps, 0 elsewhere. */
extern "C" __global__ void last_steps_back(long long units, long long steps, long long b, const T *__restrict__ dy,
                                           const int *__restrict__ lengths, T *__restrict__ dx)
{
    for (long long i = thread(); i < units * steps * b; i += threads()) {
        const long long row = quotient(i, b), s = i - row * b, unit = quotient(row, steps);
        dx[i] = row - unit * steps == lengths[s] - 1 ? dy[unit * b + s] : T(0);
    }
}
