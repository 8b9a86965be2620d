"""Stretches: equal runs of a tensor's elements at equal distances in a vector, without an object for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Stretch:
    """`count` runs of `length` elements: contiguous in a tensor from element `first` on, evenly spaced in a vector.

    The first run begins at place `offset` of the vector, and each next run begins `step` elements later.
    """

    first: int
    length: int
    offset: int
    count: int = 1
    step: int = 0

    @property
    def last(self) -> int:
        """Element after the last element."""
        return self.first + self.count * self.length

    @property
    def stop(self) -> int:
        """Place in the vector after the last element."""
        return self.offset + (self.count - 1) * self.step + self.length

    def elements(self, first: int, last: int) -> list[Stretch]:
        """Return the part of the stretch in elements [first, last) of the tensor, in order: up to three stretches."""
        first, last = max(first, self.first), min(last, self.last)
        if first >= last:
            return []
        (k, inner), (end, remainder) = divmod(first - self.first, self.length), divmod(last - self.first, self.length)
        if inner and k == end:
            return [Stretch(first, last - first, self.offset + k * self.step + inner)]
        stretches = []
        if inner:
            stretches.append(Stretch(first, self.length - inner, self.offset + k * self.step + inner))
            k += 1
        if k < end:
            count = end - k
            begin, at = self.first + k * self.length, self.offset + k * self.step
            stretches.append(Stretch(begin, self.length, at, count, self.step if count > 1 else 0))
        if remainder:
            stretches.append(Stretch(self.first + end * self.length, remainder, self.offset + end * self.step))
        return stretches

    def within(self, start: int, stop: int) -> list[Stretch]:
        """Return the part of the stretch in [start, stop) of the vector, in order: up to three stretches."""
        return self.elements(self._before(start), self._before(stop))

    def _before(self, place: int) -> int:
        """Return the first element that lies at or after a place of the vector."""
        if place <= self.offset:
            return self.first
        k, inner = divmod(place - self.offset, self.step) if self.count > 1 else (0, place - self.offset)
        return min(self.first + k * self.length + min(inner, self.length), self.last)

    def view(self, vector: np.ndarray, shift: int = 0) -> np.ndarray:
        """Return a (count, length) view of a contiguous vector whose first element is at place -shift."""
        some = vector[self.offset + shift : self.stop + shift]
        strides = (self.step * vector.itemsize, vector.itemsize)
        return np.lib.stride_tricks.as_strided(some, (self.count, self.length), strides)


def spelled(stretches: Sequence[Stretch]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return first element, element after the last, and offset of each run of the stretches, each (runs,) int64."""
    counts = np.array([s.count for s in stretches], np.int64)
    columns = np.array([(s.first, s.length, s.offset, s.step) for s in stretches], np.int64).reshape(-1, 4)
    first, length, offset, step = np.repeat(columns, counts, axis=0).T
    k = np.arange(len(first)) - np.repeat(np.cumsum(counts) - counts, counts)
    return first + k * length, first + (k + 1) * length, offset + k * step
