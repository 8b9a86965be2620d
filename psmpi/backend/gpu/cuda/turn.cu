/* Matrices turned over their diagonal: images with the minibatch last become images with the minibatch first, and back. */
#include "common.cuh"

#define SIDE 32
#define SIDE_ROWS 8

/* out (columns, rows) = the transpose of values (rows, columns). Grid: a block of (32, 8) for each tile of 32 x 32. Both
 * sides are read and written along their rows; the rows of the tile are one longer so that its columns lie in different
 * banks. */
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
