"""Sums over the threads of a test, as layers state them of ranks."""

import threading


class Together:
    """Sums of arrays over threads, each of which calls `total` in turn with the others."""

    def __init__(self, count):
        self.barrier, self.arrays, self.numbers = threading.Barrier(count), [None] * count, [0] * count

    def total(self, k):
        def call(values):
            self.numbers[k] += values.size
            self.arrays[k] = values
            self.barrier.wait(30)
            found = sum(array.copy() for array in self.arrays)
            self.barrier.wait(30)
            values[...] = found

        return call
