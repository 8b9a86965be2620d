"""Runs: sets of intervals of the flat vector, and the local vectors that hold their elements."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.lib.stride_tricks import as_strided

# Average length below which intervals are copied by index arrays; longer intervals are copied one by one.
SHORT = 256


class Runs:
    """Sorted intervals of the flat vector with gaps between them, consecutive in a local vector of `size` elements.

    starts, stops: (intervals,) int64, not to be changed. ValueError for intervals that are unsorted, empty, touch or
    overlap; `union` takes any intervals.
    """

    starts: np.ndarray
    stops: np.ndarray

    def __init__(self, intervals: Iterable[tuple[int, int]] = ()):
        self.starts, self.stops = _columns(intervals)
        if (self.starts >= self.stops).any() or (self.starts[1:] <= self.stops[:-1]).any():
            raise ValueError("intervals are not sorted with gaps between them: use Runs.union")

    @staticmethod
    def of(starts: np.ndarray, stops: np.ndarray) -> Runs:
        """Return the runs of two int64 arrays; the caller guarantees sorted intervals with gaps between them."""
        runs = object.__new__(Runs)
        runs.starts, runs.stops = starts, stops
        return runs

    @staticmethod
    def union(intervals: Iterable[tuple[int, int]]) -> Runs:
        """Return the smallest set of runs that covers `intervals`, which may touch or overlap."""
        return Runs.covering(*_columns(intervals))

    @staticmethod
    def covering(starts: np.ndarray, stops: np.ndarray) -> Runs:
        """Return the smallest set of runs that covers the intervals of two int64 arrays, which may touch or overlap."""
        some = starts < stops
        starts, stops = starts[some], stops[some]
        if not len(starts):
            return Runs()
        order = np.argsort(starts, kind="stable")
        starts, reach = starts[order], np.maximum.accumulate(stops[order])
        first = np.flatnonzero(starts[1:] > reach[:-1]) + 1
        return Runs.of(starts[np.append(0, first)], reach[np.append(first, len(reach)) - 1])

    @cached_property
    def intervals(self) -> tuple[tuple[int, int], ...]:
        """(start, stop) of each interval, as Python integers."""
        return tuple(zip(self.starts.tolist(), self.stops.tolist(), strict=True))

    @cached_property
    def offsets(self) -> np.ndarray:
        """Local offset of each interval, and `size`: (intervals + 1,) int64."""
        return np.concatenate([[0], np.cumsum(self.stops - self.starts)])

    @property
    def size(self) -> int:
        return int(self.offsets[-1])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Runs):
            return NotImplemented
        return np.array_equal(self.starts, other.starts) and np.array_equal(self.stops, other.stops)

    def __hash__(self) -> int:
        return hash((self.starts.tobytes(), self.stops.tobytes()))

    def __repr__(self) -> str:
        return f"Runs({self.intervals})"

    def local(self, start: int, stop: int) -> slice:
        """Return the slice of the local vector that holds [start, stop); ValueError unless one interval contains it."""
        k = int(self.starts.searchsorted(start, side="right")) - 1
        if k < 0 or stop > self.stops[k]:
            raise ValueError(f"[{start}, {stop}) is not inside one of the {len(self.starts)} runs")
        at = int(self.offsets[k] - self.starts[k]) + start
        return slice(at, at + stop - start)

    def places(self, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """Return the local offset of each interval, (intervals,) int64; ValueError for one that no run contains."""
        k = self.starts.searchsorted(starts, side="right") - 1
        if (k < 0).any() or (stops > self.stops[k]).any():
            raise ValueError(f"some of {len(starts)} intervals are not inside one of the {len(self.starts)} runs")
        offsets: np.ndarray = self.offsets[k] + starts - self.starts[k]
        return offsets

    def __and__(self, other: Runs) -> Runs:
        if len(self.starts) == 1:
            return other._within(self.starts[0], self.stops[0])
        if len(other.starts) == 1:
            return self._within(other.starts[0], other.stops[0])
        return Runs.of(*cross(self.starts, self.stops, other.starts, other.stops)[2:])

    def _within(self, start: int, stop: int) -> Runs:
        first, last = self.stops.searchsorted(start, side="right"), self.starts.searchsorted(stop)
        starts, stops = self.starts[first:last].copy(), self.stops[first:last].copy()
        if len(starts):
            starts[0], stops[-1] = max(starts[0], start), min(stops[-1], stop)
        return Runs.of(starts, stops)

    def __sub__(self, other: Runs) -> Runs:
        if not len(other.starts):
            return self
        # The complement of `other`: before it, in its gaps, and after it.
        ends = np.iinfo(np.int64)
        starts, stops = np.append(ends.min, other.stops), np.append(other.starts, ends.max)
        return Runs.of(*cross(self.starts, self.stops, starts, stops)[2:])

    def split(self, pieces: int) -> list[Runs]:
        """Cut into `pieces` consecutive sets of runs whose sizes differ by at most one element."""
        sizes = [self.size // pieces + (k < self.size % pieces) for k in range(pieces)]
        edges = np.cumsum([0, *sizes]).tolist()
        return [self.cut(a, b) for a, b in pairwise(edges)]

    def cut(self, first: int, last: int) -> Runs:
        """Return the runs of the flat vector that elements [first, last) of the local vector hold."""
        inside = Runs.of(self.offsets[:-1], self.offsets[1:])._within(first, last)
        k = self.offsets.searchsorted(inside.starts, side="right") - 1
        shift = self.starts[k] - self.offsets[k]
        return Runs.of(inside.starts + shift, inside.stops + shift)

    def inside(self, outer: Runs) -> slice | None:
        """Return the slice of `outer`'s local vector that holds this local vector, or None if no slice does."""
        try:
            located = self.located(outer)
        except ValueError:
            return None
        if len(located.starts) > 1:
            return None
        return slice(*located.intervals[0]) if located.size else slice(0, 0)

    def located(self, outer: Runs) -> Runs:
        """Return the runs of `outer`'s local vector that hold this local vector; ValueError if `outer` lacks a run."""
        places = outer.places(self.starts, self.stops)
        return Runs.covering(places, places + self.stops - self.starts)


def _columns(intervals: Iterable[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    pairs = np.array(list(intervals), np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def cross(
    starts: np.ndarray, stops: np.ndarray, others: np.ndarray, ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Intersect two lists of sorted disjoint intervals: number in the first list, number in the second, start, stop.

    Intervals of one list may touch. The four arrays (intersections,) int64 are in the order of the flat vector.
    """
    first = ends.searchsorted(starts, side="right")
    counts = others.searchsorted(stops) - first
    first_numbers = np.repeat(np.arange(len(starts)), counts)
    second_numbers = np.arange(len(first_numbers)) + np.repeat(first - (np.cumsum(counts) - counts), counts)
    return (
        first_numbers,
        second_numbers,
        np.maximum(starts[first_numbers], others[second_numbers]),
        np.minimum(stops[first_numbers], ends[second_numbers]),
    )


def copy_runs(
    source: np.ndarray, starts: np.ndarray, target: np.ndarray, places: np.ndarray, sizes: np.ndarray
) -> None:
    """Copy target[places[k] + i] = source[starts[k] + i] for all k and i in range(sizes[k]).

    source, target: vectors; starts, places, sizes (runs,) int64.
    """
    total = int(sizes.sum())
    if len(sizes) > 1 and (sizes == sizes[0]).all() and (steps := _steps(starts, places)):
        shape = len(sizes), int(sizes[0])
        from_, into = (
            as_strided(vector[int(at[0]) :], shape, (step * vector.itemsize, vector.itemsize))
            for vector, at, step in zip((source, target), (starts, places), steps, strict=True)
        )
        into[...] = from_
    elif total >= SHORT * len(sizes):
        for a, b, n in zip(starts.tolist(), places.tolist(), sizes.tolist(), strict=True):
            target[b : b + n] = source[a : a + n]
    else:
        within = np.arange(total) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        target[np.repeat(places, sizes) + within] = source[np.repeat(starts, sizes) + within]


def _steps(*several: np.ndarray) -> list[int]:
    """Return the step of each array of two or more numbers, or [] if one does not increase in equal steps."""
    steps = [np.diff(numbers) for numbers in several]
    equal = all(differences[0] > 0 and (differences == differences[0]).all() for differences in steps)
    return [int(differences[0]) for differences in steps] if equal else []


def restrict(w: np.ndarray, runs: Runs) -> np.ndarray:
    """Return U_e w: the elements of the flat vector `w` (n,) that `runs` names, as a new (runs.size,) array.

    This is the definition of U_e. Tests compare transfers and elements with it.
    """
    return np.concatenate([w[a:b] for a, b in runs.intervals]) if runs.intervals else w[:0].copy()


def accumulate(g: np.ndarray, runs: Runs, g_e: np.ndarray) -> None:
    """Add U_e^T g_e to g in place: `g` (n,), `g_e` (runs.size,). This defines the adjoint of `restrict`."""
    for (a, b), at in zip(runs.intervals, runs.offsets.tolist(), strict=False):
        g[a:b] += g_e[at : at + b - a]
