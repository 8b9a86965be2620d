/* Windows of images (channels, height, width, batch), for convolutions as products of matrices. */
#include "common.cuh"

/* columns (channels, kernel, kernel, rows, width_out, batch) = the inputs that each entry of the kernel multiplies, for
 * the output rows from `first` on. */
extern "C" __global__ void im2col(long long channels, long long height, long long width, long long batch,
                                  long long kernel, long long stride, long long first, long long rows,
                                  long long width_out, const T *__restrict__ x, T *__restrict__ columns)
{
    const long long positions = rows * width_out * batch, taps = kernel * kernel;
    for (long long e = thread(); e < channels * taps * positions; e += threads()) {
        const long long window = quotient(e, positions), p = e - window * positions;
        const long long c = quotient(window, taps);
        const int tap = (int)(window - c * taps), i = tap / (int)kernel, j = tap - i * (int)kernel;
        const Place at = place(p, (int)width_out, (int)batch);
        const long long row = (first + at.row) * stride + i, column = at.column * stride + j;
        columns[e] = x[((c * height + row) * width + column) * batch + at.sample];
    }
}

/* The adjoint of im2col: add the columns to the gradient of x. One thread adds up all terms of an element. */
extern "C" __global__ void col2im(long long channels, long long height, long long width, long long batch,
                                  long long kernel, long long stride, long long first, long long rows,
                                  long long width_out, const T *__restrict__ columns, T *__restrict__ dx)
{
    const long long plane = height * width * batch;
    const int size = (int)kernel, pace = (int)stride;
    for (long long e = thread(); e < channels * plane; e += threads()) {
        const long long c = quotient(e, plane);
        const Place at = place(e - c * plane, (int)width, (int)batch);
        T sum = dx[e];
        for (int i = 0; i < size; i++) {
            const int down = (int)at.row - i, row = down / pace - (int)first;
            if (down < 0 || down % pace || row < 0 || row >= (int)rows)
                continue;
            for (int j = 0; j < size; j++) {
                const int across = (int)at.column - j, column = across / pace;
                if (across < 0 || across % pace || column >= (int)width_out)
                    continue;
                const long long window = (c * size + i) * size + j;
                sum += columns[((window * rows + row) * width_out + column) * batch + at.sample];
            }
        }
        dx[e] = sum;
    }
}
