/* Losses of scores (classes, batch), in double for all types of scores, and scaling of derivatives for the backward
 * pass. */
#include "common.cuh"

#define PSL 0
#define LOGISTIC 1
#define NLL 2
#define SQUARED 3
#define SUMS 3
#define REPORT_THREADS 256

/* The loss of a sample, its largest margin, and the number of clipped margins. */
struct Sample {
    double value, worst, clipped;
};

/* The pairwise losses, with terms in z_j = kappa (c_j - c_y), for one sample. scores, grad: with stride `step` between
 * classes; y: the label, own: its score. rest: if not NULL, it gets the sum of the derivatives of the other scores, and
 * the derivative of the label's score, minus this sum, is left 0; infinity if a margin exceeds the limit and `strict`
 * makes this an error. */
__device__ __forceinline__ Sample pairwise(bool psl, long long classes, long long step, const T *scores, long long y,
                                           double own, double scale, double kappa, double limit, bool strict,
                                           double cap, const unsigned char *pairs, double *grad, double *rest)
{
    Sample found = {0, 0, 0};
    double sum = 0;
    for (long long j = 0; j < classes; j++) {
        const double z = ((double)scores[j * step] - own) * kappa;
        const bool kept = !pairs || pairs[j * classes + y];
        double value, d;
        if (psl) {
            if (kept) {
                found.worst = larger(found.worst, z);
                found.clipped += z > limit;
            }
            /* Beyond the limit its tangent continues the exponential. Comparisons keep NaN, unlike fmin. */
            const double e = kept ? exp(z > limit ? limit : z) : 0;
            const double tangent = kept && z > limit ? e * (1 + (z - limit)) : e;
            value = tangent > cap ? cap : tangent;
            d = e * kappa;
        } else {
            value = (z > 0 ? z : 0) + log1p(exp(-fabs(z)));
            /* The logistic function, by tanh, which cannot overflow. */
            d = (tanh(0.5 * z) + 1) * (0.5 * kappa);
            if (pairs) {
                value *= kept;
                d *= kept;
            }
        }
        if (j == y)
            continue;
        found.value += value;
        d *= scale;
        sum += d;
        if (grad)
            grad[j * step] = d;
    }
    /* rest is summed over ranks: it must not be finite if the loss is not, so that all ranks see it. */
    if (rest)
        *rest = strict && found.worst > limit ? exp(1e4) : sum + (found.value - found.value);
    /* Every term depends on c_j - c_y. */
    if (grad && here(y, classes))
        grad[y * step] = rest ? 0 : -sum;
    /* The term j = y of psl is the constant 1, and belongs to no pair of classes. */
    if (psl && !pairs && here(y, classes))
        found.value += 1;
    return found;
}

/* Update the largest score *top, and the sum *total of exponentials relative to it, with the scores of some classes.
 * Before the first class *total is 0 and *top is any of the scores. */
__device__ __forceinline__ void normalizer(long long classes, long long step, const T *scores, double *top,
                                           double *total)
{
    const double before = *top;
    for (long long j = 0; j < classes; j++)
        *top = larger(*top, (double)scores[j * step]);
    *total *= exp(before - *top);
    for (long long j = 0; j < classes; j++)
        *total += exp((double)scores[j * step] - *top);
}

/* Minus the logarithm of the softmax of the label. */
__device__ __forceinline__ double cross_entropy(long long classes, long long step, const T *scores, long long y,
                                                double top, double total, double scale, double *grad)
{
    if (grad)
        for (long long j = 0; j < classes; j++)
            grad[j * step] = (exp((double)scores[j * step] - top) / total - (j == y ? 1 : 0)) * scale;
    return here(y, classes) ? log(total) - ((double)scores[y * step] - top) : 0;
}

__device__ __forceinline__ double squared_error(long long classes, long long step, const T *scores, long long y,
                                                double scale, double *grad)
{
    double sum = 0;
    for (long long j = 0; j < classes; j++) {
        const double z = (double)scores[j * step] - (j == y ? 1 : 0);
        sum += z * z;
        if (grad)
            grad[j * step] = z * (2 * scale);
    }
    return sum;
}

/* The sum of the binary cross-entropies of all classes, with an offset added to the scores. */
__device__ __forceinline__ double binary(long long classes, long long step, const T *scores, long long y, double offset,
                                         double scale, double *grad)
{
    double sum = 0;
    for (long long j = 0; j < classes; j++) {
        const double z = (double)scores[j * step] + offset, up = j == y ? -z : z;
        sum += (up > 0 ? up : 0) + log1p(exp(-fabs(z)));
        if (grad)
            grad[j * step] = ((tanh(0.5 * z) + 1) * 0.5 - (j == y ? 1 : 0)) * scale;
    }
    return sum;
}

/* out (batch,) = the labels' scores, 0 for labels of other ranks. */
extern "C" __global__ void label_scores(long long classes, long long batch, const T *__restrict__ scores,
                                        const long long *__restrict__ labels, double *__restrict__ out)
{
    for (long long b = thread(); b < batch; b += threads())
        out[b] = here(labels[b], classes) ? (double)scores[labels[b] * batch + b] : 0;
}

/* Apply the margin of psmpi.nn.margin to the labels' scores. slopes (batch,) = the derivatives of the new scores by the
 * old, 1 for labels of other ranks. */
extern "C" __global__ void add_margins(long long classes, long long batch, T *__restrict__ scores,
                                       const long long *__restrict__ labels, long long arc, double size, double scale,
                                       double least, double *__restrict__ slopes)
{
    for (long long b = thread(); b < batch; b += threads()) {
        slopes[b] = 1;
        if (!here(labels[b], classes))
            continue;
        T *at = scores + labels[b] * batch + b;
        const double score = (double)*at, ratio = score / scale;
        const double cosine = ratio > 1 ? 1 : ratio < -1 ? -1 : ratio, square = 1 - cosine * cosine;
        if (!arc)
            *at = (T)(score - scale * size);
        else if (cosine > -cos(size)) {
            const double sine = sqrt(square < least ? least : square);
            *at = (T)(scale * (cos(size) * cosine - sin(size) * sine));
            slopes[b] = cos(size) + sin(size) * cosine / sine;
        } else
            *at = (T)(scale * (cosine - size * sin(size)));
    }
}

/* Multiply the derivatives of the labels' scores, in grad (classes, batch), by slopes (batch,), and update the largest
 * derivative in the report. One block of 256. */
extern "C" __global__ void multiply_labels(long long classes, long long batch, const long long *__restrict__ labels,
                                           const double *__restrict__ slopes, double *__restrict__ grad,
                                           double *__restrict__ report)
{
    __shared__ double room[REPORT_THREADS];
    double peak = report[3];
    for (long long b = threadIdx.x; b < batch; b += REPORT_THREADS)
        if (here(labels[b], classes)) {
            double *at = grad + labels[b] * batch + b;
            *at *= slopes[b];
            peak = larger(peak, fabs(*at));
        }
    peak = block_max<REPORT_THREADS>(peak, room);
    if (threadIdx.x == 0)
        report[3] = peak;
}

/* out (3, batch) = the largest scores, the sums of exponentials relative to these, and the labels' scores (0 for labels
 * of other ranks). */
extern "C" __global__ void normalizers(long long classes, long long batch, const T *__restrict__ scores,
                                       const long long *__restrict__ labels, double *__restrict__ out)
{
    for (long long b = thread(); b < batch; b += threads()) {
        double top = (double)scores[b], total = 0;
        normalizer(classes, batch, scores + b, &top, &total);
        out[b] = top;
        out[batch + b] = total;
        out[2 * batch + b] = here(labels[b], classes) ? (double)scores[labels[b] * batch + b] : 0;
    }
}

/* Update out (3, batch), the normalizers of earlier tiles of classes, with the scores of one more tile, whose first
 * class has the number `first` in the labels. */
extern "C" __global__ void add_normalizers(long long first, long long classes, long long batch,
                                           const T *__restrict__ scores, const long long *__restrict__ labels,
                                           double *__restrict__ out)
{
    for (long long b = thread(); b < batch; b += threads()) {
        const long long y = labels[b] - first;
        double top = first > 0 ? out[b] : (double)scores[b], total = first > 0 ? out[batch + b] : 0;
        normalizer(classes, batch, scores + b, &top, &total);
        out[b] = top;
        out[batch + b] = total;
        if (first == 0 || here(y, classes))
            out[2 * batch + b] = here(y, classes) ? (double)scores[y * batch + b] : 0;
    }
}

/* out (3, batch) = the normalizers of all ranks' classes. Rank r has the classes [starts[r], starts[r + 1]) and three
 * rows of `gathered`, its normalizers, or its scores if it has fewer than three classes. */
extern "C" __global__ void merge_normalizers(long long ranks, long long batch, const T *__restrict__ gathered,
                                             const long long *__restrict__ starts, const long long *__restrict__ labels,
                                             double *__restrict__ out)
{
    for (long long b = thread(); b < batch; b += threads()) {
        double top = (double)gathered[b], total = 0, label = 0;
        for (int pass = 0; pass < 2; pass++) {
            const T *at = gathered + b;
            for (long long r = 0; r < ranks; r++) {
                const long long size = starts[r + 1] - starts[r], y = labels[b] - starts[r];
                const long long terms = size < SUMS ? size : 1, rows = size < SUMS ? size : SUMS;
                for (long long j = 0; j < terms; j++) {
                    const double score = (double)at[j * batch];
                    if (pass == 0)
                        top = larger(top, score);
                    else
                        total += exp(score - top) * (size < SUMS ? 1 : (double)at[batch]);
                }
                if (pass == 1)
                    label += size >= SUMS ? (double)at[2 * batch] : here(y, size) ? (double)at[y * batch] : 0;
                at += rows * batch;
            }
        }
        out[b] = top;
        out[batch + b] = total;
        out[2 * batch + b] = label;
    }
}

/* Complete the labels' rows of grad (classes, batch), the derivatives of a pairwise loss. */
extern "C" __global__ void close_losses(long long classes, long long batch, const long long *__restrict__ labels,
                                        const double *__restrict__ rest, double *__restrict__ grad)
{
    for (long long b = thread(); b < batch; b += threads())
        if (here(labels[b], classes))
            grad[labels[b] * batch + b] = -rest[b];
}

/* samples (3, batch) = the loss of each sample, its largest margin kappa (c_j - c_y), at least 0, and its number of
 * margins beyond the limit; the last two are 0 except for psl. grad (classes, batch), if not NULL, = d (scale loss) /
 * d scores. pairs (classes, classes), if not NULL, selects the terms of pairs of classes. given (sums, batch), if other
 * ranks have other classes: the labels' scores, or the merged normalizers. rest: as in `pairwise`. */
extern "C" __global__ void losses(long long kind, long long classes, long long batch, const T *__restrict__ scores,
                                  const long long *__restrict__ labels, double scale, double kappa, double limit,
                                  long long strict, double offset, const unsigned char *__restrict__ pairs,
                                  const double *__restrict__ given, double *__restrict__ grad,
                                  double *__restrict__ rest, double *__restrict__ samples)
{
    /* Terms are limited so that their sum cannot overflow. */
    const double cap = LARGEST / (2.0 * (double)classes * (double)batch);
    for (long long b = thread(); b < batch; b += threads()) {
        const T *c = scores + b;
        double *into = grad ? grad + b : grad;
        const long long y = labels[b];
        Sample found = {0, 0, 0};
        if (kind == PSL || kind == LOGISTIC) {
            const double own = given ? given[b] : (double)c[y * batch];
            found = pairwise(kind == PSL, classes, batch, c, y, own, scale, kappa, limit, strict != 0, cap, pairs, into,
                             rest ? rest + b : rest);
        } else if (kind == NLL) {
            double top = given ? given[b] : (double)c[0], total = given ? given[batch + b] : 0;
            if (!given)
                normalizer(classes, batch, c, &top, &total);
            found.value = cross_entropy(classes, batch, c, y, top, total, scale, into);
            /* Add NaN if a normalizer is not finite, so that all ranks see it. */
            if (given)
                found.value += (top - top) + (total - total) + (given[2 * batch + b] - given[2 * batch + b]);
        } else if (kind == SQUARED)
            found.value = squared_error(classes, batch, c, y, scale, into);
        else
            found.value = binary(classes, batch, c, y, offset, scale, into);
        samples[b] = found.value;
        samples[batch + b] = found.worst;
        samples[2 * batch + b] = found.clipped;
    }
}

/* The loss ||f - S_y||^2 of outputs f (units, batch), `size` elements in all, and targets S (units, classes): grad = 2
 * scale (f - S_y), and partial (4, blocks) = for each block the sum of (f - S_y)^2, 0, 0, and the largest absolute
 * derivative. Blocks of 256. */
extern "C" __global__ void distances(long long classes, long long batch, long long size, const T *__restrict__ outputs,
                                     const double *__restrict__ targets, const long long *__restrict__ labels,
                                     double scale, double *__restrict__ grad, double *__restrict__ partial)
{
    __shared__ double room[REPORT_THREADS];
    double sum = 0, peak = 0;
    for (long long i = thread(); i < size; i += threads()) {
        const long long unit = quotient(i, batch);
        const double z = (double)outputs[i] - targets[unit * classes + labels[i - unit * batch]], d = z * (2 * scale);
        sum += z * z;
        peak = larger(peak, fabs(d));
        grad[i] = d;
    }
    sum = block_sum<REPORT_THREADS>(sum, room);
    peak = block_max<REPORT_THREADS>(peak, room);
    if (threadIdx.x == 0) {
        const long long blocks = gridDim.x;
        partial[blockIdx.x] = sum;
        partial[blocks + blockIdx.x] = 0;
        partial[2 * blocks + blockIdx.x] = 0;
        partial[3 * blocks + blockIdx.x] = peak;
    }
}

/* report (4,) = the scaled sum of the losses, the largest margin, the number of terms beyond the limit, and the largest
 * absolute derivative in grad (classes, batch), if any. One block of 256. */
extern "C" __global__ void loss_report(long long classes, long long batch, const double *__restrict__ samples,
                                       const double *__restrict__ grad, double scale, double *__restrict__ report)
{
    __shared__ double room[REPORT_THREADS];
    double value = 0, worst = 0, clipped = 0, peak = 0;
    for (long long b = threadIdx.x; b < batch; b += REPORT_THREADS) {
        value += samples[b];
        worst = larger(worst, samples[batch + b]);
        clipped += samples[2 * batch + b];
    }
    for (long long i = threadIdx.x; grad && i < classes * batch; i += REPORT_THREADS)
        peak = larger(peak, fabs(grad[i]));
    value = block_sum<REPORT_THREADS>(value, room);
    worst = block_max<REPORT_THREADS>(worst, room);
    clipped = block_sum<REPORT_THREADS>(clipped, room);
    peak = block_max<REPORT_THREADS>(peak, room);
    if (threadIdx.x == 0) {
        report[0] = scale * value;
        report[1] = worst;
        report[2] = clipped;
        report[3] = peak;
    }
}

/* Update the largest absolute derivative in the report after the derivatives are complete. The loss becomes NaN if a
 * sum of terms in rest, over all ranks, is not finite. One block of 256. */
extern "C" __global__ void close_report(long long size, long long batch, const double *__restrict__ grad,
                                        const double *__restrict__ rest, double *__restrict__ report)
{
    __shared__ double room[REPORT_THREADS];
    double peak = 0, wrong = 0;
    for (long long i = threadIdx.x; i < size; i += REPORT_THREADS)
        peak = larger(peak, fabs(grad[i]));
    for (long long b = threadIdx.x; b < batch; b += REPORT_THREADS)
        wrong += rest[b] - rest[b];
    peak = block_max<REPORT_THREADS>(peak, room);
    wrong = block_sum<REPORT_THREADS>(wrong, room);
    if (threadIdx.x == 0) {
        report[3] = peak;
        report[0] += wrong;
    }
}

/* out = grad in the type of the scores, divided by the power of two that the report states. */
extern "C" __global__ void cast_scores(long long size, const double *__restrict__ grad, T *__restrict__ out,
                                       const double *__restrict__ report)
{
    const int exponent = excess(report);
    for (long long i = thread(); i < size; i += threads())
        out[i] = (T)(exponent ? ldexp(grad[i], -exponent) : grad[i]);
}

/* Multiply g by the power of two of cast_scores, in place, and limit each component. */
extern "C" __global__ void unscale(long long size, T *__restrict__ g, const double *__restrict__ report, double limit)
{
    const int exponent = excess(report);
    if (!exponent)
        return;
    for (long long i = thread(); i < size; i += threads()) {
        const double value = ldexp((double)g[i], exponent);
        g[i] = (T)(value > limit ? limit : value < -limit ? -limit : value);
    }
}

/* Limit each component of g, in place; NaN stays NaN. */
extern "C" __global__ void bound(long long size, T *__restrict__ g, double limit)
{
    for (long long i = thread(); i < size; i += threads())
        g[i] = (T)(g[i] > limit ? limit : g[i] < -limit ? -limit : g[i]);
}
