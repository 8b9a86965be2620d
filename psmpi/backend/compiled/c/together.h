/* Operations without floating point types for processes that share memory: locks, counts and components. */

#include <pthread.h>
#include <sched.h>

/* Number of attempts to take a lock before the process yields its core. */
#define SPINS 2000

/* Kinds of locks: none, a ticket lock, which is served in order, or a mutex of the operating system. */
enum { FREE, TICKET, MUTEX };

typedef struct {
    uint32_t next, pad[15], serving;
} ticket_t;

/* Size of a lock in bytes. A lock must be 64 bytes apart from other data, so that it has a cache line to itself. */
int psmpi_lock_bytes(void)
{
    return sizeof(ticket_t) > sizeof(pthread_mutex_t) ? sizeof(ticket_t) : sizeof(pthread_mutex_t);
}

/* Initialize a lock in memory that processes share. One process calls this. */
void psmpi_lock_begin(int kind, void *at)
{
    if (kind == TICKET)
        memset(at, 0, sizeof(ticket_t));
    if (kind == MUTEX) {
        pthread_mutexattr_t how;
        pthread_mutexattr_init(&how);
        pthread_mutexattr_setpshared(&how, PTHREAD_PROCESS_SHARED);
        pthread_mutex_init(at, &how);
        pthread_mutexattr_destroy(&how);
    }
}

INLINE void take(int kind, void *at)
{
    if (kind == MUTEX)
        pthread_mutex_lock(at);
    if (kind == TICKET) {
        ticket_t *lock = at;
        const uint32_t own = __atomic_fetch_add(&lock->next, 1, __ATOMIC_RELAXED);
        for (int looks = 0; __atomic_load_n(&lock->serving, __ATOMIC_ACQUIRE) != own; looks++) {
            __builtin_ia32_pause();
            if (looks > SPINS)
                sched_yield();
        }
    }
}

INLINE void give(int kind, void *at)
{
    if (kind == MUTEX)
        pthread_mutex_unlock(at);
    if (kind == TICKET) {
        ticket_t *lock = at;
        __atomic_store_n(&lock->serving, lock->serving + 1, __ATOMIC_RELEASE);
    }
}

/* counts[column] += 1 for each column of `count` samples. Without `atomic` additions of several processes may be
 * lost. */
void psmpi_count_rows(ptrdiff_t count, const int64_t *order, const int64_t *starts, const int32_t *columns,
                      int64_t *counts, int atomic)
{
    for (ptrdiff_t s = 0; s < count; s++)
        for (int64_t k = starts[order[s]]; k < starts[order[s] + 1]; k++) {
            volatile int64_t *at = counts + columns[k];
            if (atomic)
                __atomic_fetch_add(at, 1, __ATOMIC_RELAXED);
            else
                *at = *at + 1;
        }
}

static int32_t root_of(int32_t *parent, int32_t s)
{
    while (parent[s] != s) {
        parent[s] = parent[parent[s]];
        s = parent[s];
    }
    return s;
}

/* Assign components of the graph that joins samples with a common column to workers (CYCLADES, Pan et al. 2016). In the
 * order of their first samples, components go to the worker with the fewest columns to update. owner (count) = the
 * worker of each sample. found (2) = the number of components, and the number of samples of the largest. Scratch: seen
 * (features), -1 before and after; parent (count); load (count + workers). */
void psmpi_deal_components(ptrdiff_t count, const int64_t *order, const int64_t *starts, const int32_t *columns,
                           int workers, int32_t *seen, int32_t *parent, int64_t *load, int32_t *owner, int64_t *found)
{
    int64_t *size = load, *each = load + count;
    for (ptrdiff_t s = 0; s < count; s++) {
        parent[s] = s;
        for (int64_t k = starts[order[s]]; k < starts[order[s] + 1]; k++) {
            int32_t *first = seen + columns[k];
            if (*first < 0) {
                *first = s;
            } else {
                /* The earliest sample becomes the root. */
                const int32_t a = root_of(parent, *first), b = root_of(parent, s);
                if (a < b)
                    parent[b] = a;
                else
                    parent[a] = b;
            }
        }
    }
    memset(size, 0, (count + workers) * sizeof(int64_t));
    for (ptrdiff_t s = 0; s < count; s++) {
        size[root_of(parent, s)] += starts[order[s] + 1] - starts[order[s]] + 1;
        for (int64_t k = starts[order[s]]; k < starts[order[s] + 1]; k++)
            seen[columns[k]] = -1;
    }
    found[0] = 0;
    for (ptrdiff_t s = 0; s < count; s++) {
        const int32_t root = root_of(parent, s);
        if (root != s) {
            owner[s] = owner[root];
            continue;
        }
        int least = 0;
        for (int w = 1; w < workers; w++)
            if (each[w] < each[least])
                least = w;
        each[least] += size[s];
        owner[s] = least;
        found[0]++;
    }
    memset(size, 0, count * sizeof(int64_t));
    found[1] = 0;
    for (ptrdiff_t s = 0; s < count; s++) {
        const int64_t samples = ++size[root_of(parent, s)];
        if (samples > found[1])
            found[1] = samples;
    }
}
