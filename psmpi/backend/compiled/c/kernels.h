/* The template: included once for each type and instruction set, see kernels.c for the macros. */

#if DOUBLE
#define R double
#define INTEGER uint64_t
#define MANTISSA 52
#define SHIFT 6755399441055744.0
#define TERMS 13
#define SERIES 16
#define LARGE 708.0
#define LOG2_HIGH 6.93145751953125e-1
#define LOG2_LOW 1.42860682030941723212e-6
#define ROOT(a) __builtin_sqrt(a)
#else
#define R float
#define INTEGER uint32_t
#define MANTISSA 23
#define SHIFT 12582912.0
#define TERMS 7
#define SERIES 7
#define LARGE 87.0
#define LOG2_HIGH 0.693359375
#define LOG2_LOW -2.12194440054690583e-4
#define ROOT(a) __builtin_sqrtf(a)
#endif

#include "convolution.h"
#include "samples.h"
#include "pointwise.h"
#include "rows.h"
#include "vectors.h"
#include "elements.h"
#include "losses.h"
#include "recurrence.h"
#include "columns.h"
#include "attention.h"
#include "shared.h"
#include "compressed.h"
#include "images.h"
#include "sparse.h"

#undef R
#undef V
#undef VL
#undef UNITS
#undef ROWS
#undef TAPS
#undef NAME
#undef LOAD
#undef STORE
#undef LOAD_SOME
#undef LOAD_CUT
#undef STORE_SOME
#undef SET1
#undef FMA
#undef SUM
#undef MIN
#undef MAX
#undef WHERE
#undef BITS
#undef POWER
#undef MASK
#undef REST
#undef ROOT
#undef INTEGER
#undef MANTISSA
#undef SHIFT
#undef TERMS
#undef SERIES
#undef LARGE
#undef LOG2_HIGH
#undef LOG2_LOW
#undef DOUBLE
