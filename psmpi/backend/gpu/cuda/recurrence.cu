/* Recurrent cells: the operations between two products with the recurrent weights. Arrays as in the reference's
 * Recurrence. */
#include "common.cuh"

#define RNN 0
#define GRU 1

/* Step t, from product (gates units, b), the recurrent weights times the previous states. */
extern "C" __global__ void cell_step(long long kind, long long units, long long steps, long long b, long long t,
                                     T *__restrict__ a, const T *__restrict__ bias, const T *__restrict__ product,
                                     const T *__restrict__ before, T *h, T *more, const int *__restrict__ lengths)
{
    const long long size = units * b, gate = units * steps * b;
    for (long long i = thread(); i < size; i += threads()) {
        const long long unit = quotient(i, b), s = i - unit * b, at = (unit * steps + t) * b + s;
        const bool live = !lengths || t < lengths[s];
        const T last = t ? h[at - b] : before[i];
        T u[4];
        for (int g = 0; g < (kind == RNN ? 1 : kind == GRU ? 3 : 4); g++)
            u[g] = product[g * size + i] + (bias ? bias[g * units + unit] : T(0));
        T next;
        if (kind == RNN) {
            next = t_tanh(a[at] + u[0]);
        } else if (kind == GRU) {
            const T r = activation(a[at] + u[0], SIGMOID), z = activation(a[gate + at] + u[1], SIGMOID);
            const T n = t_tanh(a[2 * gate + at] + r * u[2]);
            a[at] = r;
            a[gate + at] = z;
            a[2 * gate + at] = n;
            more[at] = u[2];
            next = (T(1) - z) * n + z * last;
        } else {
            const T in = activation(a[at] + u[0], SIGMOID), f = activation(a[gate + at] + u[1], SIGMOID);
            const T g = t_tanh(a[2 * gate + at] + u[2]), o = activation(a[3 * gate + at] + u[3], SIGMOID);
            const T old = t ? more[at - b] : before[size + i], c = f * old + in * g;
            a[at] = in;
            a[gate + at] = f;
            a[2 * gate + at] = g;
            a[3 * gate + at] = o;
            more[at] = live ? c : old;
            next = o * t_tanh(c);
        }
        h[at] = live ? next : last;
    }
}

/* The adjoint of step t. du (gates units, b) = the gradient of the product, whose share in carry[0] the caller adds. */
extern "C" __global__ void cell_step_back(long long kind, long long units, long long steps, long long b, long long t,
                                          T *__restrict__ a, const T *__restrict__ before, const T *__restrict__ h,
                                          T *more, const T *__restrict__ dh, T *__restrict__ carry,
                                          const int *__restrict__ lengths, T *__restrict__ du)
{
    const long long size = units * b, gate = units * steps * b;
    for (long long i = thread(); i < size; i += threads()) {
        const long long unit = quotient(i, b), s = i - unit * b, at = (unit * steps + t) * b + s;
        const bool live = !lengths || t < lengths[s];
        const T total = dh[at] + carry[i];
        carry[i] = live ? T(0) : total;
        if (kind == RNN) {
            a[at] = du[i] = live ? total * (T(1) - h[at] * h[at]) : T(0);
        } else if (kind == GRU) {
            const T r = a[at], z = a[gate + at], n = a[2 * gate + at], u = more[at], last = t ? h[at - b] : before[i];
            const T dn = live ? total * (T(1) - z) * (T(1) - n * n) : T(0);
            a[at] = du[i] = live ? dn * u * r * (T(1) - r) : T(0);
            a[gate + at] = du[size + i] = live ? total * (last - n) * z * (T(1) - z) : T(0);
            a[2 * gate + at] = dn;
            more[at] = du[2 * size + i] = live ? dn * r : T(0);
            if (live)
                carry[i] = total * z;
        } else {
            const T in = a[at], f = a[gate + at], g = a[2 * gate + at], o = a[3 * gate + at];
            const T old = t ? more[at - b] : before[size + i], y = t_tanh(more[at]);
            const T dc = carry[size + i] + total * o * (T(1) - y * y);
            if (live)
                carry[size + i] = dc * f;
            a[at] = du[i] = live ? dc * g * in * (T(1) - in) : T(0);
            a[gate + at] = du[size + i] = live ? dc * old * f * (T(1) - f) : T(0);
            a[2 * gate + at] = du[2 * size + i] = live ? dc * in * (T(1) - g * g) : T(0);
            a[3 * gate + at] = du[3 * size + i] = live ? total * y * o * (T(1) - o) : T(0);
        }
    }
}
#undef RNN
#undef GRU
