/* The last layer tile by tile of its classes: labels' scores, and what the tiles come to.
 *
 * Reports are those of loss.cu. A tile's report is of all tiles so far, and what is made of its derivatives is scaled by
 * the power of two that its `excess` says: the largest so far, which never shrinks. Rows of weights (classes, inputs)
 * are `row` elements apart, biases (classes,) `step`; a label that is not here is another rank's. */
#include "common.cuh"

/* out (batch,): the scores of the labels, from features (inputs, batch), rounded to the scores' type; 0 of others. */
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

/* What a tile has found goes to what those before have, none of the first one: report (4,), and the sums of terms
 * rest (batch,), if any, into rests. own (batch,): the labels, counted from class `next`. */
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

/* sum += part, a sum of tiles up to that of `before`, and the part of the next one, of `report`. */
extern "C" __global__ void add_part(long long size, const T *__restrict__ part, const double *__restrict__ before,
                                    const double *__restrict__ report, T *__restrict__ sum)
{
    const int shift = excess(before) - excess(report);
    for (long long i = thread(); i < size; i += threads())
        sum[i] = (shift ? (T)ldexp((double)sum[i], shift) : sum[i]) + part[i];
}

/* report (4,): that of the last tile, with the largest of the derivatives of own labels, rest (batch,) if any; where
 * one of these, or another rank's, is no number, the loss is none either. One block of 256. */
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

/* The gradients of weights and biases (if any), each tile's scaled as its own of `reports` (tiles, 4) says, are scaled
 * as `report` says. size: of all elements, row by row, with the biases behind. */
extern "C" __global__ void scale_rows(long long size, long long inputs, long long tile,
                                      const double *__restrict__ reports, const double *__restrict__ report,
                                      T *__restrict__ weights, long long row, T *__restrict__ biases, long long step)
{
    const int all = excess(report);
    /* The first is the smallest: most often nothing is to be done. */
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

/* What labels' scores add to the gradients of their rows: minus the sums of terms rest (batch,). One block for each
 * sample, of which the first of those with one label makes the sum of them all, in their order. */
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

/* The same for the gradient of the features, sum (inputs, batch), which was scaled as `last` says. */
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
