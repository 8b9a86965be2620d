"""Layouts: the places of parameters in the flat vector, ordered by which classes use them."""

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
    """A named tensor of the network; its leading axes count `units` rows that are used or unused as a whole."""

    name: str
    shape: tuple[int, ...]
    units: int

    @property
    def unit_size(self) -> int:
        return prod(self.shape) // self.units


@dataclass(frozen=True)
class Piece:
    """Units [first, last) of one parameter, in `count` equal pieces.

    Each is contiguous in the flat vector: the first from `offset` on, each of the others `step` elements behind the one
    before it.
    """

    parameter: int
    first: int
    last: int
    offset: int
    count: int = 1
    step: int = 0

    @property
    def units(self) -> int:
        """Units of each of the pieces."""
        return (self.last - self.first) // self.count

    def single(self, k: int) -> Piece:
        """The k-th of the pieces by itself."""
        first = self.first + k * self.units
        return Piece(self.parameter, first, first + self.units, self.offset + k * self.step)

    def singles(self) -> Iterator[Piece]:
        """Its pieces, an object each."""
        return map(self.single, range(self.count))

    def stretch(self, size: int) -> Stretch:
        """Where the elements of its parameter lie in the flat vector; size: elements of a unit."""
        return Stretch(self.first * size, self.units * size, self.offset, self.count, self.step)


@dataclass(frozen=True)
class Block:
    """The run [start, stop) of the flat vector that exactly `users` use.

    Of `Each` class its own: as many equal runs one after the other, in the order of the classes, where every piece has
    its share of each.
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
        """Elements from the run of a class to that of the next."""
        return (self.stop - self.start) // self.count

    def singles(self) -> Iterator[Block]:
        """The blocks of the single classes, an object each."""
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
    then their largest class, so that the part of neighbouring classes is a few runs. Blocks of neighbouring classes
    that are laid out alike are one object of `bands`, however many they are.
    """

    parameters: tuple[Parameter, ...]
    bands: tuple[Block, ...]
    classes: int

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of the bands, an object each."""
        return tuple(block for band in self.bands for block in band.singles())

    @property
    def size(self) -> int:
        return self.bands[-1].stop if self.bands else 0

    def part(self, classes: Iterable[int] | Classes) -> Runs:
        """The runs that the scores of `classes` depend on (V_i for one class, U_ij for two)."""
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
        """The runs that no score depends on."""
        return Runs.union((b.start, b.stop) for b in self.bands if not b.classes)

    @cached_property
    def _ranges(self) -> np.ndarray:
        """(5, ranges) int64: first class and class behind the last, start and stop of the block that they use.

        Last, elements from one class to the next, 0 where all of them use all of the block.
        """
        rows = [
            (first, last, b.start, b.stop, b.step if isinstance(b.users, Each) else 0)
            for b in self.bands
            for first, last in b.classes.ranges
        ]
        columns: np.ndarray = np.array(rows, np.int64).reshape(-1, 5).T
        return columns

    def runs_of_parameters(self, names: Collection[str]) -> Runs:
        """The runs that the parameters of these names are together."""
        own = {k for k, parameter in enumerate(self.parameters) if parameter.name in names}
        starts, stops = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for block in self.bands:
            mine = [piece for piece in block.pieces if piece.parameter in own]
            if len(mine) == len(block.pieces):
                begins, ends = np.array([block.start]), np.array([block.stop])
            else:
                first, last, begins = spelled([p.stretch(self.parameters[p.parameter].unit_size) for p in mine])
                ends = begins + last - first
            starts.append(begins)
            stops.append(ends)
        return Runs.covering(np.concatenate(starts), np.concatenate(stops))

    @cached_property
    def _elements(self) -> Mapping[str, tuple[Parameter, np.ndarray, np.ndarray, np.ndarray]]:
        """Of each parameter the spans [first, last) of its elements, in order, and where each lies."""
        return {
            parameter.name: (parameter, *spelled([piece.stretch(parameter.unit_size) for piece in pieces]))
            for parameter, pieces in zip(self.parameters, self.banded, strict=True)
        }

    def runs_of(self, boxes: Box | Iterable[Box]) -> Runs:
        """The runs that boxes of parameters are; ValueError names the parameter of one that is not in the layout."""
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
        """The pieces of each parameter in the bands, in the order of its units."""
        found: list[list[Piece]] = [[] for _ in self.parameters]
        for band in self.bands:
            for piece in band.pieces:
                found[piece.parameter].append(piece)
        return [sorted(pieces, key=lambda piece: piece.first) for pieces in found]

    @cached_property
    def by_parameter(self) -> list[list[Piece]]:
        """The pieces of each parameter, in the order of its units, an object each."""
        return [[one for piece in pieces for one in piece.singles()] for pieces in self.banded]

    def pieces(self) -> Iterator[Piece]:
        """The pieces of the blocks, an object each."""
        for block in self.blocks:
            yield from block.pieces


def make_layout(
    parameters: Sequence[Parameter], uses: Sequence[Iterable[tuple[int, int, Users | Collection[int]]]], classes: int
) -> Layout:
    """Lay out `parameters` by who uses them; `uses[k]` are runs (first unit, last unit, users) of parameter k.

    Units with the same set of using classes form one block (the general rule of partial separability: shared, private
    or dead coordinates), parameters in their given order inside a block.
    """
    shared: dict[Classes, list[tuple[int, int, int]]] = {}
    own: list[tuple[int, int, int, Each]] = []
    for k, runs in enumerate(uses):
        for first, last, given in runs:
            users = as_users(given)
            if isinstance(users, Each):
                own.append((k, first, (last - first) // users.count, users))
            else:
                shared.setdefault(users, []).append((k, first, last))
    # Between two of these edges the classes are laid out alike, and nothing that several share lies between them.
    edges = {edge for *_, each in own for edge in (each.first, each.last)}
    edges |= {some.ranges[0][0] + 1 for some in shared if 0 < len(some) < classes}
    order = sorted(edges)
    number = {edge: k for k, edge in enumerate(order)}
    alone: list[list[tuple[int, int, int]]] = [[] for _ in order]
    for k, first, units, each in own:
        for at in range(number[each.first], number[each.last]):
            a, b = (first + (order[edge] - each.first) * units for edge in (at, at + 1))
            alone[at].append((k, a, b))
    groups: list[tuple[Users, list[tuple[int, int, int]]]] = list(shared.items())
    groups += [(Each(a, b), some) for (a, b), some in zip(pairwise(order), alone, strict=False) if some]
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
    """The place of a block among the others: all classes first, none last, else by smallest, largest and then all."""
    ranges = (users.classes if isinstance(users, Each) else users).ranges
    if not ranges:
        return (2,)
    if ranges == ((0, classes),) and (classes == 1 or not isinstance(users, Each)):
        return (0,)
    if isinstance(users, Each):
        return (1, users.first, users.first, ())
    # As lists of all classes compare: of two that begin alike, the longer range has the smaller next class.
    return (1, ranges[0][0], ranges[-1][1] - 1, tuple((first, -last) for first, last in ranges))


def plain_layout(tensors: Mapping[str, tuple[int, ...]]) -> Layout:
    """The layout of named tensors that are no weights of classes, by shape: one after the other, in one block."""
    parameters = [Parameter(name, tuple(shape), shape[0]) for name, shape in tensors.items()]
    return make_layout(parameters, [[(0, p.units, Each(0, 1))] for p in parameters], 1)
