/* Shifts and flips of images. Part of the template kernels.h. */

/* out (channels, height, width, batch) = images x, each flipped left to right if moves[2] is 1, then shifted by
 * moves[0] rows down and moves[1] columns to the right. Pixels from outside the image are 0, or with `reflect` mirrored
 * at the edge. moves: (3, batch), smaller than the sides of the image. */
void NAME(move_images)(int channels, int height, int width, int batch, const int32_t *moves, int reflect, const R *x,
                       R *out)
{
    for (int c = 0; c < channels; c++)
        for (int i = 0; i < height; i++)
            for (int j = 0; j < width; j++)
                for (int s = 0; s < batch; s++, out++) {
                    int row = i - moves[s], column = j - moves[batch + s];
                    if (reflect) {
                        row = row < 0 ? -row : row >= height ? 2 * (height - 1) - row : row;
                        column = column < 0 ? -column : column >= width ? 2 * (width - 1) - column : column;
                    } else if (row < 0 || row >= height || column < 0 || column >= width) {
                        *out = 0;
                        continue;
                    }
                    if (moves[2 * batch + s])
                        column = width - 1 - column;
                    *out = x[(((ptrdiff_t)c * height + row) * width + column) * batch + s];
                }
}
