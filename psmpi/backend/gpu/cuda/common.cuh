/* Functions that all kernels share. REAL is float or double. No host header is included, so that NVRTC compiles it.
 *
 * An image array is (channels, height, width, batch), contiguous: neighbouring threads take neighbouring samples. Every
 * sum is made in an order that the launch alone decides, so that two runs give the same bits.
 */
#pragma once

typedef REAL T;

/* Four numbers that are read at once, aligned to 16 bytes. */
struct __align__(16) Four {
    T at[4];
};

/* The first element of this thread in a one-dimensional launch; threads() is the step to its next element. */
__device__ __forceinline__ long long thread()
{
    return (long long)blockIdx.x * blockDim.x + threadIdx.x;
}

__device__ __forceinline__ long long threads()
{
    return (long long)gridDim.x * blockDim.x;
}

/* a / b for a >= 0 and b > 0. Division of 64 bits takes several times as long, and sizes rarely need it. */
__device__ __forceinline__ long long quotient(long long a, long long b)
{
    if (((a | b) >> 32) == 0)
        return (unsigned)a / (unsigned)b;
    return a / b;
}

/* Row, column and sample of a position p in (rows, columns, batch). */
struct Place {
    int row, column, sample;
};

__device__ __forceinline__ Place place(long long p, int columns, int batch)
{
    const long long image = quotient(p, batch), row = quotient(image, columns);
    return {(int)row, (int)(image - row * columns), (int)(p - image * batch)};
}

/* Whether a label, counted from the first of `classes` classes, is one of these. */
__device__ __forceinline__ bool here(long long y, long long classes)
{
    return y >= 0 && y < classes;
}

__device__ __forceinline__ float t_tanh(float a)
{
    return tanhf(a);
}

__device__ __forceinline__ double t_tanh(double a)
{
    return tanh(a);
}

__device__ __forceinline__ float t_sqrt(float a)
{
    return sqrtf(a);
}

__device__ __forceinline__ double t_sqrt(double a)
{
    return sqrt(a);
}

__device__ __forceinline__ float t_exp(float a)
{
    return expf(a);
}

__device__ __forceinline__ double t_exp(double a)
{
    return exp(a);
}

__device__ __forceinline__ float t_erfc(float a)
{
    return erfcf(a);
}

__device__ __forceinline__ double t_erfc(double a)
{
    return erfc(a);
}

__device__ __forceinline__ float t_expm1(float a)
{
    return expm1f(a);
}

__device__ __forceinline__ double t_expm1(double a)
{
    return expm1(a);
}

/* Products and sums that are rounded separately: nvcc would fuse a product and a sum into one operation. */
#ifdef __CUDACC__
__device__ __forceinline__ float t_mul(float a, float b)
{
    return __fmul_rn(a, b);
}

__device__ __forceinline__ double t_mul(double a, double b)
{
    return __dmul_rn(a, b);
}

__device__ __forceinline__ float t_add(float a, float b)
{
    return __fadd_rn(a, b);
}

__device__ __forceinline__ double t_add(double a, double b)
{
    return __dadd_rn(a, b);
}
#else
__device__ __forceinline__ T t_mul(T a, T b)
{
    return a * b;
}

__device__ __forceinline__ T t_add(T a, T b)
{
    return a + b;
}
#endif

/* A sum of many numbers: short sums in T, and their sum in double, which is slow on many devices. */
struct LongSum {
    T few = T(0);
    double total = 0;
    int count = 0;

    __device__ __forceinline__ void add(T value)
    {
        few += value;
        if (++count == 32) {
            total += (double)few;
            few = T(0);
            count = 0;
        }
    }

    __device__ __forceinline__ double value() const
    {
        return total + (double)few;
    }
};

/* Kinds of activations. */
#define SIGMOID 1
#define TANH 2
#define RELU 3

__device__ __forceinline__ T activation(T a, int kind)
{
    if (kind == SIGMOID)
        /* sigmoid(a) = (1 + tanh(a / 2)) / 2: exp would overflow for very negative inputs. */
        return T(0.5) * t_tanh(T(0.5) * a) + T(0.5);
    if (kind == TANH)
        return t_tanh(a);
    if (kind == RELU)
        /* Not fmax, which would turn NaN into 0. */
        return a < T(0) ? T(0) : a;
    return a;
}

/* The derivative of the activation, from its output y. */
__device__ __forceinline__ T slope(T y, int kind)
{
    if (kind == SIGMOID)
        return (T(1) - y) * y;
    if (kind == TANH)
        return T(1) - y * y;
    if (kind == RELU)
        /* The sign of y; NaN stays NaN. */
        return y > T(0) ? T(1) : y < T(0) ? T(-1) : y;
    return T(1);
}

/* The largest double. */
#define LARGEST 1.7976931348623157e308
/* Derivatives up to this size are not scaled for a backward pass. */
#define COMMON 1048576.0

/* The exponent of the power of two that divides derivatives for a backward pass; 0 if they are small enough or NaN. */
__device__ __forceinline__ int excess(const double *report)
{
    const double peak = report[3];
    int exponent = 0;
    if (peak > COMMON && peak <= LARGEST)
        frexp(peak, &exponent);
    return exponent;
}

/* The sum of `value` over the SIZE threads of a block, returned to all threads. SIZE: a power of two; room: (SIZE,) in
 * shared memory. */
template <int SIZE, typename S> __device__ __forceinline__ S block_sum(S value, S *room)
{
    const int t = threadIdx.x;
    /* Other threads may still read the room for an earlier sum. */
    __syncthreads();
    room[t] = value;
    __syncthreads();
    for (int half = SIZE / 2; half > 0; half /= 2) {
        if (t < half)
            room[t] += room[t + half];
        __syncthreads();
    }
    return room[0];
}

/* The larger of two numbers; NaN if one is NaN. */
__device__ __forceinline__ double larger(double a, double b)
{
    return b > a || b != b ? b : a;
}

/* The largest `value` of the threads of a block, as block_sum; NaN if one is NaN. */
template <int SIZE> __device__ __forceinline__ double block_max(double value, double *room)
{
    const int t = threadIdx.x;
    __syncthreads();
    room[t] = value;
    __syncthreads();
    for (int half = SIZE / 2; half > 0; half /= 2) {
        if (t < half)
            room[t] = larger(room[t], room[t + half]);
        __syncthreads();
    }
    return room[0];
}
