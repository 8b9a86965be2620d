"""A world of threads: the calls of a communicator that psmpi's groups make, between threads of one process."""

import threading
from collections import defaultdict, deque
from types import SimpleNamespace

import numpy as np
from mpi4py import MPI

PATIENCE = 20


class Shared:
    """What the ranks of one communicator have in common."""

    def __init__(self, size):
        self.size, self.changed, self.broken = size, threading.Condition(), False
        self.posted, self.mail = defaultdict(dict), defaultdict(deque)
        self.made = {}

    def wait(self, ready):
        with self.changed:
            if not self.changed.wait_for(lambda: ready() or self.broken, PATIENCE) or self.broken:
                raise RuntimeError("a rank is gone, or waits for what nobody sends")


class Request:
    """Done, by `complete`, once `ready`."""

    def __init__(self, shared, ready, complete):
        self.shared, self.ready, self.complete, self.done = shared, ready, complete, False

    def Test(self):
        with self.shared.changed:
            if not self.done and self.ready():
                self.complete()
                self.done = True
        return self.done

    def Wait(self):
        self.shared.wait(self.Test)


def flat(array):
    return array.reshape(-1)


def runs(spec):
    """The runs that [array, counts, starts, type] names, as views."""
    array, counts, starts, kind = spec
    vector = flat(array).view(np.uint8) if kind is MPI.BYTE else flat(array)
    return [vector[a : a + n] for a, n in zip(starts, counts, strict=True)]


class Comm:
    """One rank's side. Sums are made in the order of the ranks."""

    def __init__(self, shared, rank, ranks=None):
        self.shared, self.rank, self.size, self.calls = shared, rank, shared.size, 0
        # Messages to single ranks.
        self.sent = 0
        self.ranks = ranks or list(range(shared.size))
        self.group = SimpleNamespace(Incl=lambda ranks: SimpleNamespace(ranks=ranks, Free=lambda: None))

    def Create_group(self, group):
        key = tuple(group.ranks)
        with self.shared.changed:
            # The same ranks may make several, one after the other.
            number = self.shared.made[key, self.rank] = self.shared.made.get((key, self.rank), -1) + 1
            inner = self.shared.made.setdefault((key, "shared", number), Shared(len(key)))
        return Comm(inner, key.index(self.rank))

    def _post(self, value, complete, needs=None):
        """Give a collective this rank's value; `complete` takes all of `needs` when they are there."""
        number, self.calls = self.calls, self.calls + 1
        needs = range(self.size) if needs is None else needs
        box = self.shared.posted[number]
        with self.shared.changed:
            box[self.rank] = value
            self.shared.changed.notify_all()
        return Request(
            self.shared, lambda: all(r in box for r in needs), lambda: complete([box.get(r) for r in range(self.size)])
        )

    def Isend(self, array, dest, tag=0):
        assert array.flags.c_contiguous
        with self.shared.changed:
            self.shared.mail[self.rank, dest, tag].append(array.copy())
            self.shared.changed.notify_all()
        self.sent += 1
        return Request(self.shared, lambda: True, lambda: None)

    def Irecv(self, array, source, tag=0):
        box = self.shared.mail[source, self.rank, tag]

        def complete():
            got = box.popleft()
            assert got.dtype == array.dtype
            array[...] = got.reshape(array.shape)

        return Request(self.shared, lambda: len(box) > 0, complete)

    def Send(self, array, dest, tag=0):
        self.Isend(array, dest, tag).Wait()

    def Recv(self, array, source, tag=0):
        self.Irecv(array, source, tag).Wait()

    def Ibcast(self, array, root):
        def complete(values):
            if self.rank != root:
                array[...] = values[root].reshape(array.shape)

        return self._post(array.copy() if self.rank == root else None, complete, [root])

    def Ireduce(self, sent, into, root):
        own = into if sent is MPI.IN_PLACE else sent

        def complete(values):
            if self.rank == root:
                into[...] = sum(values[1:], values[0])

        return self._post(own.copy(), complete, None if self.rank == root else [self.rank])

    def Bcast(self, array, root):
        self.Ibcast(array, root).Wait()

    def Reduce(self, sent, into, root):
        self.Ireduce(sent, into, root).Wait()

    def Allreduce(self, sent, into):
        own = into if sent is MPI.IN_PLACE else sent

        def complete(values):
            into[...] = sum(values[1:], values[0])

        self._post(own.copy(), complete).Wait()

    def Reduce_scatter(self, sent, into, counts):
        assert sent is MPI.IN_PLACE
        start, own = sum(counts[: self.rank]), counts[self.rank]

        def complete(values):
            # The rest of the buffer is anything.
            flat(into)[:] = np.nan
            flat(into)[:own] = sum(values[1:], values[0])[start : start + own]

        self._post(flat(into).copy(), complete).Wait()

    def Scatterv(self, sent, into, root):
        def complete(values):
            if self.rank != root:
                flat(into)[:] = values[root][self.rank]

        self._post([run.copy() for run in runs(sent)] if self.rank == root else None, complete, [root]).Wait()

    def Gatherv(self, sent, into, root):
        def complete(values):
            for rank, run in enumerate(runs(into)) if self.rank == root else ():
                if rank != root:
                    run[:] = flat(values[rank])

        self._post(None if self.rank == root else sent.copy(), complete, None if self.rank == root else []).Wait()

    def Allgatherv(self, sent, into):
        own = runs(into)[self.rank] if sent is MPI.IN_PLACE else flat(sent)

        def complete(values):
            for run, value in zip(runs(into), values, strict=True):
                run[:] = value

        self._post(own.copy(), complete).Wait()

    def Alltoallv(self, sent, into):
        def complete(values):
            for run, value in zip(runs(into), values, strict=True):
                run[:] = value[self.rank]

        self._post([run.copy() for run in runs(sent)], complete).Wait()

    def allgather(self, value):
        found = []
        self._post(value, found.extend).Wait()
        return found

    def allreduce(self, value):
        return sum(self.allgather(value))


def run_ranks(size, work):
    """work(world) on every rank of a world of threads; what each returns. What one raises, all do."""
    shared, found, errors = Shared(size), [None] * size, []

    def rank(k):
        try:
            found[k] = work(Comm(shared, k))
        except BaseException as error:
            errors.append(error)
            for one in (shared, *(s for key, s in shared.made.items() if "shared" in key)):
                with one.changed:
                    one.broken = True
                    one.changed.notify_all()

    threads = [threading.Thread(target=rank, args=(k,), daemon=True) for k in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found
