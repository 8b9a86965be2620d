"""Reading and writing of any elements of a data set by few HDF5 selections.

Elements are cut into boxes. A box that is not a slice of the local vector is cut into slabs, whose values are copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import h5py
import numpy as np

from psmpi.checkpoint.format import CHUNK
from psmpi.layout import Runs, box_runs, copy_runs, cross

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Slab:
    """A box of a data set, and the places of its elements in a local vector.

    ranges: (start, stop) along each axis. at, places, sizes: (runs,) each; elements [at, at + size) of the box, in C
    order, are [place, place + size) of the vector.
    """

    ranges: Ranges
    at: np.ndarray
    places: np.ndarray
    sizes: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in self.ranges)

    @property
    def selection(self) -> tuple[slice, ...]:
        return tuple(slice(a, b) for a, b in self.ranges)

    @property
    def run(self) -> slice | None:
        """The slice of the local vector with the box's elements; None if they are several runs."""
        if len(self.sizes) > 1:
            return None
        return slice(int(self.places[0]), int(self.places[0] + self.sizes[0]))


def find_boxes(shape: Sequence[int], first: np.ndarray, last: np.ndarray) -> list[Ranges]:
    """Cut elements [first[k], last[k]) of a tensor, in C order, sorted and disjoint, into boxes, in any order."""
    runs = Runs.covering(first, last)
    return _boxes(tuple(shape), runs.starts, runs.stops)


def _boxes(shape: tuple[int, ...], first: np.ndarray, last: np.ndarray) -> list[Ranges]:
    """As `find_boxes`, for intervals with gaps between them."""
    if len(shape) == 1:
        return [((a, b),) for a, b in zip(first.tolist(), last.tolist(), strict=True)]
    row, inner_shape = prod(shape[1:]), shape[1:]
    # An interval covers rows [top, bottom) whole; an interval inside a single row has bottom < top.
    top, bottom = -(-first // row), last // row
    whole, inner = top < bottom, bottom < top
    full = tuple((0, n) for n in inner_shape)
    boxes = [((a, b), *full) for a, b in zip(top[whole].tolist(), bottom[whole].tolist(), strict=True)]
    head, tail = ~inner & (first < top * row), ~inner & (bottom * row < last)
    starts = np.concatenate([first[inner], first[head], (bottom * row)[tail]])
    stops = np.concatenate([last[inner], (top * row)[head], last[tail]])
    if not len(starts):
        return boxes
    order = np.argsort(starts)
    starts, stops = starts[order], stops[order]
    rows = starts // row
    a, b = starts - rows * row, stops - rows * row
    # Consecutive rows with the same columns form one box for each of their column ranges.
    begins = np.append(0, np.flatnonzero(np.diff(rows)) + 1)
    counts = np.diff(np.append(begins, len(rows)))
    above = np.maximum(np.arange(len(rows)) - np.repeat(counts, counts), 0)
    alike = np.logical_and.reduceat((a == a[above]) & (b == b[above]), begins)
    alike &= (counts == np.roll(counts, 1)) & (rows[begins] == np.roll(rows[begins], 1) + 1)
    alike[0] = False
    groups = np.flatnonzero(~alike)
    for k, stop in zip(groups, np.append(groups[1:], len(begins)), strict=True):
        columns = slice(begins[k], begins[k] + counts[k])
        down = int(rows[begins[k]]), int(rows[begins[stop - 1]]) + 1
        boxes += [(down, *ranges) for ranges in _boxes(inner_shape, a[columns], b[columns])]
    return boxes


def find_parts(
    shape: Sequence[int], chunks: Sequence[int], first: np.ndarray, last: np.ndarray, places: np.ndarray
) -> Iterator[Slab]:
    """Cut elements [first[k], last[k]) of a data set, at places[k] of a local vector, into few parts.

    The intervals are sorted and disjoint. A part that is not a slice of the local vector has about `CHUNK` elements at
    most, in whole chunks of the shape `chunks` if possible.
    """
    for ranges in find_boxes(shape, first, last):
        part = _part(shape, ranges, first, last, places)
        if part.run is not None:
            yield part
        else:
            for slab in _slabs(ranges, chunks):
                yield _part(shape, slab, first, last, places)


def _part(shape: Sequence[int], ranges: Ranges, first: np.ndarray, last: np.ndarray, places: np.ndarray) -> Slab:
    starts, length = box_runs(shape, ranges)
    run, interval, a, b = cross(starts, starts + length, first, last)
    at, to, sizes = run * length + a - starts[run], places[interval] + a - first[interval], b - a
    # The intervals cover the whole box, so a new run begins only where places in the vector jump.
    begins = np.append(0, np.flatnonzero(to[1:] != (to + sizes)[:-1]) + 1)
    return Slab(ranges, at[begins], to[begins], np.add.reduceat(sizes, begins))


def _slabs(ranges: Ranges, chunks: Sequence[int]) -> Iterator[Ranges]:
    """Cut a box along its first axes into boxes of about `CHUNK` elements."""
    lengths = [b - a for a, b in ranges]
    each, (first, last), inner = prod(lengths[1:]), ranges[0], ranges[1:]
    if prod(lengths) <= CHUNK:
        yield ranges
    elif each > CHUNK:
        for k in range(first, last):
            yield from (((k, k + 1), *slab) for slab in _slabs(inner, chunks[1:]))
    else:
        step = max(chunks[0], CHUNK // each // chunks[0] * chunks[0])
        edges = [first, *range((first // step + 1) * step, last, step), last]
        for k, a in enumerate(edges[:-1]):
            yield ((a, edges[k + 1]), *inner)


def read_runs(dataset: h5py.Dataset, first: np.ndarray, last: np.ndarray, places: np.ndarray, into: np.ndarray) -> None:
    """Fill `into`, a vector, from places[k] on with elements [first[k], last[k]) of a data set, sorted and disjoint."""
    for part in find_parts(dataset.shape, dataset.chunks or dataset.shape, first, last, places):
        if part.run is not None:
            dataset.read_direct(into[part.run].reshape(part.shape), part.selection)
        else:
            values = dataset[part.selection].reshape(-1).astype(into.dtype, copy=False)
            copy_runs(values, part.at, into, part.places, part.sizes)


def read_elements(dataset: h5py.Dataset, first: int, last: int, into: np.ndarray) -> None:
    """Fill `into` (last - first,) with elements [first, last) of the flattened data set."""
    read_runs(dataset, np.array([first]), np.array([last]), np.array([0]), into)
