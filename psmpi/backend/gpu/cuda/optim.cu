/* Steps of the optimizers over whole shards, and scaling for clipping. Scalars are cast to the type of the arrays, as
 * in NumPy. CuPy compiles with subnormal floats flushed to 0. */
#include "common.cuh"

/* The gradient with the L2 penalty. Without a penalty w is not used: 0 times infinity would be NaN. */
__device__ __forceinline__ T decayed(T g, T w, T l2)
{
    return l2 == T(0) ? g : g + l2 * w;
}

/* w -= rate g. */
extern "C" __global__ void sgd(long long size, T *__restrict__ w, const T *__restrict__ g, double rate, double l2)
{
    for (long long i = thread(); i < size; i += threads())
        w[i] -= (T)rate * decayed(g[i], w[i], (T)l2);
}

/* v = beta v + g; w -= rate v, or rate (g + beta v). */
extern "C" __global__ void momentum(long long size, T *__restrict__ w, const T *__restrict__ g, T *__restrict__ v,
                                    double rate, double beta, double l2, long long nesterov)
{
    for (long long i = thread(); i < size; i += threads()) {
        const T d = decayed(g[i], w[i], (T)l2), moved = (T)beta * v[i] + d;
        v[i] = moved;
        w[i] -= (T)rate * (nesterov ? d + (T)beta * moved : moved);
    }
}

/* A step of Adam with d = g + l2 w: m = beta1 m + (1 - beta1) d, v = beta2 v + (1 - beta2) d^2, w = keep w - rate m /
 * (root sqrt(v) + eps). */
extern "C" __global__ void adam(long long size, T *__restrict__ w, const T *__restrict__ g, T *__restrict__ m,
                                T *__restrict__ v, double rate, double root, double beta1, double beta2, double eps,
                                double l2, double keep)
{
    const T towards = (T)(1 - beta1), fresh = (T)(1 - beta2);
    for (long long i = thread(); i < size; i += threads()) {
        const T d = decayed(g[i], w[i], (T)l2), first = m[i] + towards * (d - m[i]);
        const T second = (T)beta2 * v[i] + fresh * (d * d);
        m[i] = first;
        v[i] = second;
        w[i] = (T)keep * w[i] - (T)rate * (first / ((T)root * t_sqrt(second) + (T)eps));
    }
}

/* A step of Adam with a step count t for each weight, which grows by 1. log1, log2: the logarithms of the betas. */
extern "C" __global__ void counted_adam(long long size, T *__restrict__ w, const T *__restrict__ g, T *__restrict__ m,
                                        T *__restrict__ v, T *__restrict__ t, double rate, double log1, double log2,
                                        double beta1, double beta2, double eps, double l2, double keep)
{
    const T towards = (T)(1 - beta1), fresh = (T)(1 - beta2);
    for (long long i = thread(); i < size; i += threads()) {
        const T d = decayed(g[i], w[i], (T)l2), first = m[i] + towards * (d - m[i]);
        const T second = (T)beta2 * v[i] + fresh * (d * d), steps = t[i] + T(1);
        m[i] = first;
        v[i] = second;
        t[i] = steps;
        /* -(1 - beta^t) for both betas. */
        const T one = t_expm1(steps * (T)log1), two = t_expm1(steps * (T)log2);
        w[i] = (T)keep * w[i] + (T)rate * (first / one / (t_sqrt(-second / two) + (T)eps));
    }
}

/* v = alpha v + (1 - alpha) g^2; w -= rate g / (sqrt(v) + eps). */
extern "C" __global__ void rmsprop(long long size, T *__restrict__ w, const T *__restrict__ g, T *__restrict__ v,
                                   double rate, double alpha, double eps, double l2)
{
    const T fresh = (T)(1 - alpha);
    for (long long i = thread(); i < size; i += threads()) {
        const T d = decayed(g[i], w[i], (T)l2), moved = (T)alpha * v[i] + fresh * (d * d);
        v[i] = moved;
        w[i] -= (T)rate * (d / (t_sqrt(moved) + (T)eps));
    }
}

/* w = keep w - rate sign(beta1 m + (1 - beta1) d) with d = g + l2 w, then m = beta2 m + (1 - beta2) d. */
extern "C" __global__ void lion(long long size, T *__restrict__ w, const T *__restrict__ g, T *__restrict__ m,
                                double rate, double beta1, double beta2, double l2, double keep)
{
    const T towards = (T)(1 - beta1), fresh = (T)(1 - beta2);
    for (long long i = thread(); i < size; i += threads()) {
        const T d = decayed(g[i], w[i], (T)l2), c = (T)beta1 * m[i] + towards * d;
        m[i] = (T)beta2 * m[i] + fresh * d;
        /* The sign of c; NaN stays NaN. */
        w[i] = (T)keep * w[i] - (T)rate * (c > T(0) ? T(1) : c < T(0) ? T(-1) : c);
    }
}

/* g *= factor. */
extern "C" __global__ void scale(long long size, T *__restrict__ g, double factor)
{
    for (long long i = thread(); i < size; i += threads())
        g[i] *= (T)factor;
}
