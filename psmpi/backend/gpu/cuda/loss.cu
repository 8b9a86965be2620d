/* Losses on raw scores (classes, batch), in double whatever the type of the scores, and their way into the backward
 * pass. */
#include "common.cuh"

#define PSL 0
#define LOGISTIC 1
#define NLL 2
#define REPORT_THREADS 256

/* What the loss of a sample comes to. */
struct Sample {
    double value, worst, clipped;
};

/* The pairwise losses: terms in z_j = kappa (c_j - c_y). Scores and grad are those of one sample, from a class to the
 * next is `step`; y: the label. */
__device__ __forceinline__ Sample pairwise(bool psl, long long classes, long long step, const T *scores, long long y,
                                           double scale, double kappa, double limit, double cap,
                                           const unsigned char *pairs, double *grad)
{
    Sample found = {0, 0, 0};
    const double own = (double)scores[y * step];
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
            /* Beyond the limit the exponential goes on as its tangent there; comparisons keep NaN, fmin would not. */
            const double e = kept ? exp(z > limit ? limit : z) : 0;
            const double tangent = kept && z > limit ? e * (1 + (z - limit)) : e;
            value = tangent > cap ? cap : tangent;
            d = e * kappa;
        } else {
            value = (z > 0 ? z : 0) + log1p(exp(-fabs(z)));
            /* The logistic function by tanh, which cannot overflow. */
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
    /* Every term sees c_j - c_y. */
    if (grad)
        grad[y * step] = -sum;
    /* The term j = y of psl is the constant 1, which belongs to no pair. */
    if (psl && !pairs)
        found.value += 1;
    return found;
}

/* Minus the logarithm of softmax. */
__device__ __forceinline__ double cross_entropy(long long classes, long long step, const T *scores, long long y,
                                                double scale, double *grad)
{
    double top = (double)scores[0], total = 0;
    for (long long j = 1; j < classes; j++)
        top = larger(top, (double)scores[j * step]);
    for (long long j = 0; j < classes; j++)
        total += exp((double)scores[j * step] - top);
    if (grad)
        for (long long j = 0; j < classes; j++)
            grad[j * step] = (exp((double)scores[j * step] - top) / total - (j == y ? 1 : 0)) * scale;
    return log(total) - ((double)scores[y * step] - top);
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

/* samples (3, batch): each sample's loss, its largest margin kappa (c_j - c_y), at least 0 and NaN where one is, and
 * how many margins exceed the limit (these two of psl only, else 0); grad (classes, batch), if any: d (scale loss) /
 * d scores. pairs (classes, classes), if any, keeps the terms of these pairs. */
extern "C" __global__ void losses(long long kind, long long classes, long long batch, const T *__restrict__ scores,
                                  const long long *__restrict__ labels, double scale, double kappa, double limit,
                                  const unsigned char *__restrict__ pairs, double *__restrict__ grad,
                                  double *__restrict__ samples)
{
    /* No sum of that many terms leaves double. */
    const double cap = LARGEST / (2.0 * (double)classes * (double)batch);
    for (long long b = thread(); b < batch; b += threads()) {
        const T *c = scores + b;
        double *into = grad ? grad + b : grad;
        const long long y = labels[b];
        Sample found = {0, 0, 0};
        if (kind == PSL || kind == LOGISTIC)
            found = pairwise(kind == PSL, classes, batch, c, y, scale, kappa, limit, cap, pairs, into);
        else if (kind == NLL)
            found.value = cross_entropy(classes, batch, c, y, scale, into);
        else
            found.value = squared_error(classes, batch, c, y, scale, into);
        samples[b] = found.value;
        samples[batch + b] = found.worst;
        samples[2 * batch + b] = found.clipped;
    }
}

/* Of outputs f (units, batch), `size` in all, and targets S (units, classes): grad = 2 scale (f - S_y), and in partial
 * (4, blocks) of each block the sum of (f - S_y)^2, 0, 0, and the largest derivative in magnitude. Blocks of 256. */
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

/* report (4,): the scaled sum of the losses, the largest margin, the terms past the limit, and the largest derivative
 * in magnitude with respect to the scores of classes `first` to `last` - 1. One block of 256. */
extern "C" __global__ void loss_report(long long classes, long long batch, long long first, long long last,
                                       const double *__restrict__ samples, const double *__restrict__ grad,
                                       double scale, double *__restrict__ report)
{
    __shared__ double room[REPORT_THREADS];
    double value = 0, worst = 0, clipped = 0, peak = 0;
    for (long long b = threadIdx.x; b < batch; b += REPORT_THREADS) {
        value += samples[b];
        worst = larger(worst, samples[batch + b]);
        clipped += samples[2 * batch + b];
    }
    for (long long i = first * batch + threadIdx.x; i < last * batch; i += REPORT_THREADS)
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

/* out = grad in the type of the scores, scaled down by a power of two where it is very large. */
extern "C" __global__ void cast_scores(long long size, const double *__restrict__ grad, T *__restrict__ out,
                                       const double *__restrict__ report)
{
    const int exponent = excess(report);
    for (long long i = thread(); i < size; i += threads())
        out[i] = (T)(exponent ? ldexp(grad[i], -exponent) : grad[i]);
}

/* g is scaled up by the same power again, in place, and limited in each component. */
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
