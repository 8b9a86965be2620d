/* Losses of a tile of classes: scores become derivatives. Part of the template kernels.h. */

/* Number of samples that go through all classes of a tile together, so that their sums stay in registers or the
 * cache. */
#define SAMPLES 64

/* Number of classes whose terms are summed in the type of the scores; these sums are summed in double. */
#define CLASSES 16

#define PSL 0
#define LOGISTIC 1
#define NLL 2
#define SQUARED 3
#define BCE 4

/* x limited to the range of `exponential`; NaN stays NaN. */
INLINE R NAME(clamped)(R x)
{
    return x > (R)LARGE ? (R)LARGE : x < -(R)LARGE ? -(R)LARGE : x;
}

/* log(1 + a) for 0 <= a <= 1, exact to rounding: twice the series of artanh(z), z = a / (2 + a) <= 1 / 3. */
INLINE R NAME(log_of_more)(R a)
{
    const R s = a / ((R)2 + a), square = s * s;
    R sum = 0;
#pragma GCC unroll 32
    for (int k = SERIES; k > 0; k--)
        sum = (sum + (R)(1.0 / (2 * k + 1))) * square;
    return (R)2 * s * (sum + (R)1);
}

/* Terms of a loss of this kind, for `samples` samples and `classes` classes with stride b. own: the labels' scores, or
 * the largest scores; inverse: scale / sums of exponentials. value, worst and rest (samples,) are updated. */
INLINE void NAME(terms)(const int kind, int classes, ptrdiff_t b, int samples, R *c, const R *restrict own,
                        const R *restrict inverse, R kappa, R scale, R offset, double *restrict value,
                        R *restrict worst, double *restrict rest)
{
    for (int first = 0; first < classes; first += CLASSES) {
        const int last = first + CLASSES < classes ? first + CLASSES : classes;
        R values[SAMPLES], slopes[SAMPLES];
        for (int s = 0; s < samples; s++)
            values[s] = slopes[s] = 0;
        for (int j = first; j < last; j++) {
            R *restrict row = c + j * b;
            for (int s = 0; s < samples; s++) {
                R v = 0, d;
                if (kind == PSL) {
                    const R z = (row[s] - own[s]) * kappa;
                    worst[s] = z > worst[s] ? z : worst[s];
                    v = NAME(exponential)(NAME(clamped)(z));
                    d = v;
                } else if (kind == NLL) {
                    d = NAME(exponential)(NAME(clamped)(row[s] - own[s])) * inverse[s];
                } else if (kind == SQUARED) {
                    const R size = row[s] < 0 ? -row[s] : row[s];
                    worst[s] = size > worst[s] ? size : worst[s];
                    v = row[s] * row[s];
                    d = row[s];
                } else {
                    const R z = kind == BCE ? row[s] + offset : (row[s] - own[s]) * kappa;
                    const R e = NAME(exponential)(NAME(clamped)(z > 0 ? -z : z)), share = (R)1 / ((R)1 + e);
                    v = (z > 0 ? z : 0) + NAME(log_of_more)(e);
                    d = z > 0 ? share : e * share;
                }
                values[s] += v;
                slopes[s] += d;
                row[s] = kind == NLL ? d : d * scale;
            }
        }
        for (int s = 0; s < samples; s++) {
            value[s] += values[s];
            rest[s] += slopes[s];
        }
    }
}

/* The loss of the classes of a tile: scores c (classes, b) become d loss / d c. psl is without its tangent. labels (b,)
 * count from the first of these classes. In a loss with a sum of terms (psl, logistic) the derivative of the label's
 * score is left 0. given: (b,) labels' scores; for nll (2, b) largest scores and sums of exponentials. rest (b,) = the
 * sums of the derivatives of the other classes. found (2,) = the scaled loss, and for psl the largest margin, at least
 * 0, for squared the largest absolute score. */
void NAME(class_terms)(int kind, int classes, ptrdiff_t b, R *c, const int64_t *labels, const double *given,
                       double scale, double kappa, double offset, double *rest, double *found)
{
    /* The constant factor of the derivatives of all terms. */
    const R factor = (R)(kind == SQUARED ? 2 * scale : kind == BCE ? scale : scale * kappa);
    double total = 0, most = 0;
    for (ptrdiff_t at = 0; at < b; at += SAMPLES) {
        const int samples = b - at < SAMPLES ? (int)(b - at) : SAMPLES;
        R own[SAMPLES], inverse[SAMPLES], worst[SAMPLES];
        double value[SAMPLES], mine[SAMPLES];
        for (int s = 0; s < samples; s++) {
            const int64_t y = labels[at + s];
            own[s] = given ? (R)given[at + s] : 0;
            inverse[s] = kind == NLL ? (R)(scale / given[b + at + s]) : 0;
            worst[s] = value[s] = rest[at + s] = 0;
            if (y >= 0 && y < classes) {
                R *score = c + y * b + at + s;
                mine[s] = *score;
                /* Scores for which the label's own term is 0. */
                if (kind != NLL)
                    *score = kind == SQUARED ? 0 : -INFINITY;
            }
        }
#define CALL(kind) \
    NAME(terms)(kind, classes, b, samples, c + at, own, inverse, (R)kappa, factor, (R)offset, value, worst, rest + at)
        if (kind == PSL)
            CALL(PSL);
        else if (kind == LOGISTIC)
            CALL(LOGISTIC);
        else if (kind == NLL)
            CALL(NLL);
        else if (kind == SQUARED)
            CALL(SQUARED);
        else
            CALL(BCE);
#undef CALL
        for (int s = 0; s < samples; s++) {
            const int64_t y = labels[at + s];
            if (kind == NLL)
                value[s] = 0;
            rest[at + s] *= kind == NLL ? 1 : factor;
            if (y >= 0 && y < classes) {
                R *slope = c + y * b + at + s;
                const double score = mine[s] + offset;
                if (kind == PSL)
                    value[s] += 1;
                if (kind == PSL || kind == LOGISTIC)
                    *slope = 0;
                else if (kind == NLL) {
                    value[s] = log(given[b + at + s]) - (mine[s] - given[at + s]);
                    *slope -= (R)scale;
                } else if (kind == SQUARED) {
                    worst[s] = fabs(mine[s]) > worst[s] ? (R)fabs(mine[s]) : worst[s];
                    value[s] += (mine[s] - 1) * (mine[s] - 1);
                    *slope = (R)(2 * scale * (mine[s] - 1));
                } else {
                    const double e = exp(-fabs(score));
                    value[s] += (score > 0 ? 0 : -score) + log1p(e);
                    *slope = (R)(scale * (score > 0 ? -e / (1 + e) : -1 / (1 + e)));
                }
            }
            total += value[s];
            most = worst[s] > most ? worst[s] : most;
        }
    }
    found[0] = scale * total;
    found[1] = most;
}

/* Update top (b,), the largest scores, and sums (b,), the sums of exponentials relative to them, with the scores c
 * (classes, b) of a tile. */
void NAME(class_normalizers)(int classes, ptrdiff_t b, const R *c, double *top, double *sums)
{
    for (ptrdiff_t at = 0; at < b; at += SAMPLES) {
        const int samples = b - at < SAMPLES ? (int)(b - at) : SAMPLES;
        R largest[SAMPLES];
        double total[SAMPLES];
        for (int s = 0; s < samples; s++)
            largest[s] = c[at + s];
        for (int j = 1; j < classes; j++)
            for (int s = 0; s < samples; s++) {
                const R score = c[j * b + at + s];
                /* NaN stays NaN. */
                largest[s] = score > largest[s] || score != score ? score : largest[s];
            }
        for (int s = 0; s < samples; s++) {
            const R before = (R)top[at + s];
            largest[s] = before > largest[s] || before != before ? before : largest[s];
            total[s] = 0;
        }
        for (int first = 0; first < classes; first += CLASSES) {
            const int last = first + CLASSES < classes ? first + CLASSES : classes;
            R some[SAMPLES];
            for (int s = 0; s < samples; s++)
                some[s] = 0;
            for (int j = first; j < last; j++)
                for (int s = 0; s < samples; s++)
                    some[s] += NAME(exponential)(NAME(clamped)(c[j * b + at + s] - largest[s]));
            for (int s = 0; s < samples; s++)
                total[s] += some[s];
        }
        for (int s = 0; s < samples; s++) {
            /* Before the first tile top is minus infinity, whose exponential is 0. */
            sums[at + s] = total[s] + sums[at + s] * exp(top[at + s] - largest[s]);
            top[at + s] = largest[s];
        }
    }
}

#undef PSL
#undef LOGISTIC
#undef NLL
#undef SQUARED
#undef BCE
#undef SAMPLES
#undef CLASSES
