/* The last layer, computed tile by tile of its classes: labels' scores, and sums over the tiles.
 *
 * Reports are those of loss.cu. The report of a tile covers all tiles so far. Gradients from the derivatives of a tile
 * are scaled by the power of two of the report's `excess`, which never shrinks from tile to tile. Rows of weights
 * (classes, inputs) have the stride `row`, biases (classes,) the stride `step`. Labels of other classes are those of
 * other ranks. */
#include "common.cuh"

/* out (batch,) = the labels' scores, from features (inputs, batch), rounded to the type of the scores; 0 for labels of
 * other ranks. */
extern "C" __global__ void head_labels(long long classes, long long inputs, long long batch,
                                       const T *__restrict__ features, const long long *__restrict__ labels,
                                       const T *__restrict__ weights, long long row, const T *__restrict__ biases,
                                       long long step, double *__restrict__ out)
{
    for (long long b = thread(); b < batch; b += threads()) {
        const long long y = labels[b];
        double sum = 0;
        if (here(y, classes)) {
            for (long long i = 0; i < inputs; i++)
                sum += (double)weights[y * row + i] * (double)features[i * batch + b];
            sum = (double)(T)(sum + (double)biases[y * step]);
        }
        out[b] = sum;
    }
}

/* Combine the results of a tile with those of earlier tiles, if any: report (4,) with `before`, and the sums of terms
 * rest (batch,), if any, into rests. own (batch,) = the labels, counted from class `next`. */
extern "C" __global__ void next_tile(long long next, long long batch, const long long *__restrict__ labels,
                                     const double *__restrict__ before, const double *__restrict__ rest,
                                     double *__restrict__ report, double *__restrict__ rests,
                                     long long *__restrict__ own)
{
    for (long long b = thread(); b < batch; b += threads()) {
        own[b] = labels[b] - next;
        if (rest)
            rests[b] = before ? rests[b] + rest[b] : rest[b];
        if (b == 0 && before) {
            report[0] += before[0];
            report[1] = larger(before[1], report[1]);
            report[2] += before[2];
            report[3] = larger(before[3], report[3]);
        }
    }
}

/* sum += part, after scaling sum from the report `before` to `report`, which part is scaled by. */
extern "C" __global__ void add_part(long long size, const T *__restrict__ part, const double *__restrict__ before,
                                    const double *__restrict__ report, T *__restrict__ sum)
{
    const int shift = excess(before) - excess(report);
    for (long long i = thread(); i < size; i += threads())
        sum[i] = (shift ? (T)ldexp((double)sum[i], shift) : sum[i]) + part[i];
}

/* report (4,) = the report of the last tile, with the largest of the derivatives of this rank's labels, rest (batch,),
 * if any. If an element of rest is not finite, on any rank, the loss becomes NaN. One block of 256. */
extern "C" __global__ void head_report(long long classes, long long batch, const long long *__restrict__ labels,
                                       const double *__restrict__ rest, const double *__restrict__ last,
                                       double *__restrict__ report)
{
    __shared__ double room[256];
    double peak = last[3], wrong = 0;
    for (long long b = threadIdx.x; rest && b < batch; b += 256) {
        wrong += rest[b] - rest[b];
        if (here(labels[b], classes))
            peak = larger(peak, fabs(rest[b]));
    }
    peak = block_max<256>(peak, room);
    wrong = block_sum<256>(wrong, room);
    if (threadIdx.x == 0) {
        report[0] = last[0] + wrong;
        report[1] = last[1];
        report[2] = last[2];
        report[3] = peak;
    }
}

/* Scale the gradients of weights and biases (if any) from the report of each tile, in `reports` (tiles, 4), to
 * `report`. size: number of all elements, where each row is followed by its bias. */
extern "C" __global__ void scale_rows(long long size, long long inputs, long long tile,
                                      const double *__restrict__ reports, const double *__restrict__ report,
                                      T *__restrict__ weights, long long row, T *__restrict__ biases, long long step)
{
    const int all = excess(report);
    /* The first tile has the smallest excess: usually no gradient has to be scaled. */
    if (excess(reports) == all)
        return;
    for (long long i = thread(); i < size; i += threads()) {
        const long long c = quotient(i, inputs + 1), k = i - c * (inputs + 1);
        const int shift = excess(reports + 4 * quotient(c, tile)) - all;
        if (!shift || (k == inputs && !biases))
            continue;
        T *at = k < inputs ? weights + c * row + k : biases + c * step;
        *at = (T)ldexp((double)*at, shift);
    }
}

/* Add the shares of the labels' scores, whose derivatives are minus the sums of terms rest (batch,), to the gradients
 * of the labels' rows. One block for each sample: the first sample with a label adds those of all samples with this
 * label, in their order. */
extern "C" __global__ void close_rows(long long classes, long long inputs, long long batch,
                                      const T *__restrict__ features, const long long *__restrict__ labels,
                                      const double *__restrict__ rest, const double *__restrict__ report,
                                      T *__restrict__ weights, long long row, T *__restrict__ biases, long long step)
{
    const long long b = blockIdx.x, y = labels[b];
    if (!here(y, classes))
        return;
    for (long long s = 0; s < b; s++)
        if (labels[s] == y)
            return;
    const int exponent = excess(report);
    for (long long i = threadIdx.x; i < inputs + (biases ? 1 : 0); i += blockDim.x) {
        double sum = 0;
        for (long long s = b; s < batch; s++)
            if (labels[s] == y)
                sum += ldexp(rest[s], -exponent) * (i < inputs ? (double)features[i * batch + s] : 1);
        T *at = i < inputs ? weights + y * row + i : biases + y * step;
        *at = (T)((double)*at - sum);
    }
}

/* Add the shares of the labels' scores to the gradient of the features, sum (inputs, batch), and scale it from the
 * report `last` to `report`. */
extern "C" __global__ void close_features(long long classes, long long inputs, long long batch,
                                          const long long *__restrict__ labels, const double *__restrict__ rest,
                                          const T *__restrict__ weights, long long row,
                                          const double *__restrict__ last, const double *__restrict__ report,
                                          T *__restrict__ sum)
{
    const int exponent = excess(report), shift = excess(last) - exponent;
    for (long long i = thread(); i < inputs * batch; i += threads()) {
        const long long k = quotient(i, batch), b = i - k * batch, y = labels[b];
        const double found = ldexp((double)sum[i], shift);
        sum[i] = (T)(here(y, classes) ? found - (double)weights[y * row + k] * ldexp(rest[b], -exponent) : found);
    }
}
