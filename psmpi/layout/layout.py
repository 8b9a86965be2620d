"""Layouts: the places of parameters in the flat vector, ordered by the classes that use them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from math import prod

import numpy as np

from psmpi.layout.box import Box, box_runs
from psmpi.layout.classes import Classes, Each, Users, as_users
from psmpi.layout.runs import Runs, cross
from psmpi.layout.stretch import Stretch, spelled


@dataclass(frozen=True)
class Parameter:
    """A named tensor of the network; its leading axes number `units` rows, each used or unused as a whole."""

    name: str
    shape: tuple[int, ...]
    units: int

    @property
    def unit_size(self) -> int:
        return prod(self.shape) // self.units


@dataclass(frozen=True)
class Piece:
    """Units [first, last) of one parameter, in `count` equal pieces.

    Each piece is contiguous in the flat vector. The first one starts at `offset`, each next one `step` elements later.
    """

    parameter: int
    first: int
    last: int
    offset: int
    count: int = 1
    step: int = 0

    @property
    def units(self) -> int:
        """Number of units of each piece."""
        return (self.last - self.first) // self.count

    def single(self, k: int) -> Piece:
        """Return the k-th piece as an object with count 1."""
        first = self.first + k * self.units
        return Piece(self.parameter, first, first + self.units, self.offset + k * self.step)

    def singles(self) -> Iterator[Piece]:
        """Iterate over the pieces, one object each."""
        return map(self.single, range(self.count))

    def stretch(self, size: int) -> Stretch:
        """Return the places of the piece's elements in the flat vector; size: elements of a unit."""
        return Stretch(self.first * size, self.units * size, self.offset, self.count, self.step)


@dataclass(frozen=True)
class Block:
    """The run [start, stop) of the flat vector that exactly `users` use.

    If `users` are an `Each`, the block is one run of equal length for each class, in the order of the classes. The run
    of class first + k consists of the k-th single of every piece.
    """

    users: Users
    start: int
    stop: int
    pieces: tuple[Piece, ...]

    @property
    def classes(self) -> Classes:
        return self.users.classes if isinstance(self.users, Each) else self.users

    @property
    def count(self) -> int:
        return self.users.count if isinstance(self.users, Each) else 1

    @property
    def step(self) -> int:
        """Elements from the start of one class's run to the start of the next class's run."""
        return (self.stop - self.start) // self.count

    def singles(self) -> Iterator[Block]:
        """Iterate over the blocks of the single classes, one object each."""
        if not isinstance(self.users, Each) or self.count == 1:
            yield self
            return
        for k, pieces in enumerate(zip(*(piece.singles() for piece in self.pieces), strict=True)):
            start, c = self.start + k * self.step, self.users.first + k
            yield Block(Each(c, c + 1), start, start + self.step, pieces)


@dataclass(frozen=True)
class Layout:
    """The places of parameters in the flat vector: [shared by all | shared by some and private, by class | dead].

    A block that all classes use comes first, blocks of no class last; in between, blocks follow their smallest and
    then their largest class, so that the part of neighbouring classes is a few runs. Equally laid-out blocks of
    neighbouring classes form a single object of `bands`, however many classes there are.
    """

    parameters: tuple[Parameter, ...]
    bands: tuple[Block, ...]
    classes: int

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Blocks of the bands, with one object for each class of an `Each`."""
        return tuple(block for band in self.bands for block in band.singles())

    @property
    def size(self) -> int:
        return self.bands[-1].stop if self.bands else 0

    def part(self, classes: Iterable[int] | Classes) -> Runs:
        """Return the runs that the scores of `classes` depend on (V_i for one class, U_ij for two)."""
        firsts, lasts, starts, stops, steps = self._ranges
        begins, ends = [starts[:0]], [starts[:0]]
        for first, last in Classes.of(classes).ranges:
            low, high = np.maximum(firsts, first), np.minimum(lasts, last)
            some = low < high
            begins.append((starts + (low - firsts) * steps)[some])
            ends.append(np.where(steps > 0, starts + (high - firsts) * steps, stops)[some])
        return Runs.covering(np.concatenate(begins), np.concatenate(ends))

    @cached_property
    def dead(self) -> Runs:
        """Runs that no score depends on."""
        return Runs.union((b.start, b.stop) for b in self.bands if not b.classes)

    @cached_property
    def _ranges(self) -> np.ndarray:
        """Bands as (5, ranges) int64, one column for each range of classes of a band.

        Rows: first class, class after the last, start and stop of the band, and elements from one class to the next
        (0 if all classes use the whole band).
        """
        rows = [
            (first, last, b.start, b.stop, b.step if isinstance(b.users, Each) else 0)
            for b in self.bands
            for first, last in b.classes.ranges
        ]
        columns: np.ndarray = np.array(rows, np.int64).reshape(-1, 5).T
        return columns

    def runs_of_parameters(self, names: Collection[str]) -> Runs:
        """Return the runs of the parameters in `names`."""
        own = {k for k, parameter in enumerate(self.parameters) if parameter.name in names}
        starts, stops = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for block in self.bands:
            named = [piece for piece in block.pieces if piece.parameter in own]
            if len(named) == len(block.pieces):
                begins, ends = np.array([block.start]), np.array([block.stop])
            else:
                first, last, begins = spelled([p.stretch(self.parameters[p.parameter].unit_size) for p in named])
                ends = begins + last - first
            starts.append(begins)
            stops.append(ends)
        return Runs.covering(np.concatenate(starts), np.concatenate(stops))

    @cached_property
    def _elements(self) -> Mapping[str, tuple[Parameter, np.ndarray, np.ndarray, np.ndarray]]:
        """By parameter name: the parameter, and its spans of elements, in order: first, last (exclusive), offset."""
        return {
            parameter.name: (parameter, *spelled([piece.stretch(parameter.unit_size) for piece in pieces]))
            for parameter, pieces in zip(self.parameters, self.banded, strict=True)
        }

    def runs_of(self, boxes: Box | Iterable[Box]) -> Runs:
        """Return the runs of boxes of parameters; raise ValueError for a parameter that the layout does not have."""
        starts, stops = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for box in [boxes] if isinstance(boxes, Box) else boxes:
            if box.parameter not in self._elements:
                raise ValueError(f"the layout has no {box.parameter!r}: it has {', '.join(self._elements)}")
            parameter, first, last, offsets = self._elements[box.parameter]
            begins, length = box_runs(parameter.shape, box.of(parameter.shape))
            _, piece, start, stop = cross(begins, begins + length, first, last)
            shift = offsets[piece] - first[piece]
            starts.append(start + shift)
            stops.append(stop + shift)
        return Runs.covering(np.concatenate(starts), np.concatenate(stops))

    @cached_property
    def banded(self) -> list[list[Piece]]:
        """Pieces of each parameter in the bands, in the order of its units."""
        grouped: list[list[Piece]] = [[] for _ in self.parameters]
        for band in self.bands:
            for piece in band.pieces:
                grouped[piece.parameter].append(piece)
        return [sorted(pieces, key=lambda piece: piece.first) for pieces in grouped]

    @cached_property
    def by_parameter(self) -> list[list[Piece]]:
        """Pieces of each parameter, in the order of its units, each with count 1."""
        return [[one for piece in pieces for one in piece.singles()] for pieces in self.banded]

    def pieces(self) -> Iterator[Piece]:
        """Iterate over the pieces of all blocks, each with count 1."""
        for block in self.blocks:
            yield from block.pieces


def make_layout(
    parameters: Sequence[Parameter], uses: Sequence[Iterable[tuple[int, int, Users | Collection[int]]]], classes: int
) -> Layout:
    """Lay out `parameters` by their users; `uses[k]` are runs (first unit, unit after the last, users) of parameter k.

    Units with the same set of using classes form one block (the general rule of partial separability: shared, private
    or dead coordinates). Inside a block, parameters keep their given order.
    """
    shared: dict[Classes, list[tuple[int, int, int]]] = {}
    own: list[tuple[int, int, int, Each]] = []
    for k, runs in enumerate(uses):
        for first, last, run_users in runs:
            users = as_users(run_users)
            if isinstance(users, Each):
                own.append((k, first, (last - first) // users.count, users))
            else:
                shared.setdefault(users, []).append((k, first, last))
    # Classes between two consecutive edges have the same layout, and no shared block lies between their blocks.
    edges = {edge for *_, each in own for edge in (each.first, each.last)}
    edges |= {some.ranges[0][0] + 1 for some in shared if 0 < len(some) < classes}
    order = sorted(edges)
    number = {edge: k for k, edge in enumerate(order)}
    private: list[list[tuple[int, int, int]]] = [[] for _ in order]
    for k, first, units, each in own:
        for at in range(number[each.first], number[each.last]):
            a, b = (first + (order[edge] - each.first) * units for edge in (at, at + 1))
            private[at].append((k, a, b))
    groups: list[tuple[Users, list[tuple[int, int, int]]]] = list(shared.items())
    groups += [(Each(a, b), some) for (a, b), some in zip(pairwise(order), private, strict=False) if some]
    bands, offset = [], 0
    for users, members in sorted(groups, key=lambda group: _order(group[0], classes)):
        count = users.count if isinstance(users, Each) else 1
        sizes = [(last - first) // count * parameters[k].unit_size for k, first, last in members]
        places, step = accumulate(sizes, initial=offset), sum(sizes)
        pieces = tuple(
            Piece(k, first, last, at, count, step if count > 1 else 0)
            for (k, first, last), at in zip(members, places, strict=False)
        )
        bands.append(Block(users, offset, offset + count * step, pieces))
        offset += count * step
    return Layout(tuple(parameters), tuple(bands), classes)


def _order(users: Users, classes: int) -> tuple[int | tuple[tuple[int, int], ...], ...]:
    """Return a block's sort key: all classes first, no class last, others by smallest, largest, then all classes."""
    ranges = (users.classes if isinstance(users, Each) else users).ranges
    if not ranges:
        return (2,)
    if ranges == ((0, classes),) and (classes == 1 or not isinstance(users, Each)):
        return (0,)
    if isinstance(users, Each):
        return (1, users.first, users.first, ())
    # The order of the full lists of classes: of two ranges with the same first class, the longer one comes first.
    return (1, ranges[0][0], ranges[-1][1] - 1, tuple((first, -last) for first, last in ranges))


def plain_layout(tensors: Mapping[str, tuple[int, ...]]) -> Layout:
    """Return the layout of tensors that belong to no class: consecutive, in one block; tensors: shape by name."""
    parameters = [Parameter(name, tuple(shape), shape[0]) for name, shape in tensors.items()]
    return make_layout(parameters, [[(0, p.units, Each(0, 1))] for p in parameters], 1)
