/* Transposes of matrices: they move the minibatch of images from the last axis to the first, and back. */
#include "common.cuh"

#define SIDE 32
#define SIDE_ROWS 8

/* out (columns, rows) = the transpose of values (rows, columns). Grid: one block of (32, 8) for each tile of 32 x 32.
 * Both arrays are accessed along their rows. The rows of a tile are one longer than its side, so that the elements of a
 * column lie in different banks. */
extern "C" __global__ void turn(long long rows, long long columns, const T *__restrict__ values, T *__restrict__ out)
{
    __shared__ T tile[SIDE][SIDE + 1];
    const long long across = (columns + SIDE - 1) / SIDE, down = quotient(blockIdx.x, across);
    const long long row = SIDE * down, column = SIDE * (blockIdx.x - down * across);
    const int x = threadIdx.x;
    for (int k = threadIdx.y; k < SIDE; k += SIDE_ROWS)
        if (row + k < rows && column + x < columns)
            tile[k][x] = values[(row + k) * columns + column + x];
    __syncthreads();
    for (int k = threadIdx.y; k < SIDE; k += SIDE_ROWS)
        if (row + x < rows && column + k < columns)
            out[(column + k) * rows + row + x] = tile[x][k];
}
