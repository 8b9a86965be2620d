/* CUDA's device language as C++, included before the kernels, for tests on a machine without a GPU.
 *
 * The blocks of a launch run one after the other. A thread of a block runs until it ends or reaches __syncthreads. Its
 * stack is then kept, and other threads run until all of them wait or have ended. Threads that never wait share one
 * stack, so that kernels without barriers cost no more than a loop. Shared memory is filled with NaN before each block.
 */
#pragma once
#include <math.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

/* Hidden symbols, since a kernel may have the name of a function in another library of this process. */
#define __global__ __attribute__((visibility("hidden")))
#define __device__
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
/* Shared memory is a section of its own. The linker defines symbols for its start and its end. */
#define __shared__ static __attribute__((section("cuda_shared")))
#define __syncthreads() host::barrier(__FILE__, __LINE__)

extern "C" char __start_cuda_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_cuda_shared[] __attribute__((weak, visibility("hidden")));

struct host_index {
    unsigned x, y, z;
};
static host_index threadIdx, blockIdx, blockDim, gridDim;

namespace host {

enum { STACK = 1 << 17, MAX_THREADS = 1024 };

struct Fiber {
    jmp_buf context;
    host_index thread;
    /* The barrier at which the thread waits. */
    const char *file;
    int line;
    char *stack;
    bool started;
    ucontext_t first;
};

static Fiber fibers[MAX_THREADS];
static Fiber *current, *waiting[MAX_THREADS], *idle[MAX_THREADS];
static int waiters, idlers, next_thread, thread_count;
static bool backwards;
static jmp_buf scheduler;
static ucontext_t entrance;
static void (*body)(void **);
static void **arguments;

/* Run threads one after the other until none is left, then return to the scheduler, which may resume this fiber. */
static void work()
{
    for (;;) {
        while (next_thread < thread_count) {
            const unsigned t = backwards ? thread_count - 1 - next_thread : next_thread;
            next_thread++;
            threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
            body(arguments);
        }
        idle[idlers++] = current;
        if (!_setjmp(current->context))
            _longjmp(scheduler, 1);
    }
}

/* Not inlined, since setjmp may lose values that callers keep in registers. */
__attribute__((noinline)) static void barrier(const char *file, int line)
{
    Fiber *self = current;
    self->thread = threadIdx;
    self->file = file;
    self->line = line;
    waiting[waiters++] = self;
    if (!_setjmp(self->context))
        _longjmp(scheduler, 1);
    threadIdx = self->thread;
}

/* Run a fiber until it waits or no thread is left. */
static void resume(Fiber *fiber)
{
    current = fiber;
    if (_setjmp(scheduler))
        return;
    if (fiber->started)
        _longjmp(fiber->context, 1);
    fiber->started = true;
    getcontext(&fiber->first);
    fiber->first.uc_stack.ss_sp = fiber->stack;
    fiber->first.uc_stack.ss_size = STACK;
    fiber->first.uc_link = &entrance;
    makecontext(&fiber->first, work, 0);
    setcontext(&fiber->first);
    abort();
}

/* Run one block; false if its threads wait at different barriers. */
static bool block(char *stacks, int &used)
{
    memset(__start_cuda_shared, 0xff, __stop_cuda_shared - __start_cuda_shared);
    next_thread = 0;
    waiters = 0;
    while (next_thread < thread_count) {
        if (!idlers) {
            fibers[used].stack = stacks + (size_t)used * STACK;
            idle[idlers++] = &fibers[used++];
        }
        resume(idle[--idlers]);
    }
    static Fiber *released[MAX_THREADS];
    while (waiters) {
        const int count = waiters;
        waiters = 0;
        for (int k = 0; k < count; k++) {
            released[k] = waiting[k];
            if (released[k]->file != released[0]->file || released[k]->line != released[0]->line)
                return false;
        }
        for (int k = 0; k < count; k++)
            resume(released[k]);
    }
    return true;
}

/* Run a kernel. Returns 0, 1 if threads of a block wait at different barriers, or 2 without memory for the stacks. */
static int launch(void (*kernel)(void **), const unsigned *shape, void **args, int reverse)
{
    static char *stacks;
    static int used;
    if (!stacks) {
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        void *memory = mmap(0, (size_t)MAX_THREADS * STACK, PROT_READ | PROT_WRITE, flags, -1, 0);
        if (memory == MAP_FAILED)
            return 2;
        stacks = (char *)memory;
    }
    gridDim = {shape[0], shape[1], shape[2]};
    blockDim = {shape[3], shape[4], shape[5]};
    thread_count = shape[3] * shape[4] * shape[5];
    body = kernel;
    arguments = args;
    backwards = reverse;
    const unsigned long long blocks = (unsigned long long)shape[0] * shape[1] * shape[2];
    for (unsigned long long k = 0; k < blocks; k++) {
        const unsigned long long b = reverse ? blocks - 1 - k : k;
        blockIdx = {(unsigned)(b % shape[0]), (unsigned)(b / shape[0] % shape[1]), (unsigned)(b / shape[0] / shape[1])};
        if (!block(stacks, used)) {
            /* Forget the fibers that still wait. */
            memset(fibers, 0, sizeof fibers);
            used = idlers = 0;
            return 1;
        }
    }
    return 0;
}

} // namespace host
