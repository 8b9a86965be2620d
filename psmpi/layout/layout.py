"""Layouts: the places of parameters in the flat vector, ordered by which classes use them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from math import prod

import numpy as np

from psmpi.layout.box import Box, box_runs
from psmpi.layout.runs import Runs, cross


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
    """Units [first, last) of one parameter, contiguous in the flat vector from `offset` on."""

    parameter: int
    first: int
    last: int
    offset: int


@dataclass(frozen=True)
class Block:
    """The run [start, stop) of the flat vector that exactly `classes` use."""

    classes: frozenset[int]
    start: int
    stop: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Layout:
    """The places of parameters in the flat vector: [shared by all | shared by some and private, by class | dead].

    A block that all classes use comes first, blocks of no class last; in between, blocks follow their smallest and
    then their largest class, so that the part of neighbouring classes is a few runs.
    """

    parameters: tuple[Parameter, ...]
    blocks: tuple[Block, ...]
    classes: int

    @property
    def size(self) -> int:
        return self.blocks[-1].stop if self.blocks else 0

    def part(self, classes: Iterable[int]) -> Runs:
        """The runs that the scores of `classes` depend on (V_i for one class, U_ij for two)."""
        return self.runs_of_blocks(self.blocks_of(classes))

    @cached_property
    def dead(self) -> Runs:
        """The runs that no score depends on."""
        return Runs.union((b.start, b.stop) for b in self.blocks if not b.classes)

    @cached_property
    def _spans(self) -> tuple[np.ndarray, np.ndarray]:
        """Start and stop of each block."""
        edges = np.array([(b.start, b.stop) for b in self.blocks], np.int64).reshape(-1, 2)
        return edges[:, 0], edges[:, 1]

    @cached_property
    def _users(self) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of the blocks that each class uses, one class after the other, and where each class begins."""
        counts = [len(b.classes) for b in self.blocks]
        classes = np.fromiter(chain.from_iterable(b.classes for b in self.blocks), np.int64, sum(counts))
        order = np.argsort(classes, kind="stable")
        begins = classes[order].searchsorted(np.arange(self.classes + 1))
        return np.repeat(np.arange(len(self.blocks)), counts)[order], begins

    def blocks_of(self, classes: Iterable[int]) -> np.ndarray:
        """The numbers, (blocks,) in order, of the blocks that some of `classes` use."""
        blocks, begins = self._users
        wanted = sorted({c for c in classes if 0 <= c < self.classes})
        return np.unique(np.concatenate([blocks[:0], *(blocks[begins[c] : begins[c + 1]] for c in wanted)]))

    def runs_of_blocks(self, numbers: np.ndarray) -> Runs:
        """The runs that the blocks of these numbers are together."""
        starts, stops = self._spans
        return Runs.covering(starts[numbers], stops[numbers])

    @cached_property
    def _elements(self) -> Mapping[str, tuple[Parameter, np.ndarray, np.ndarray, np.ndarray]]:
        """Of each parameter the spans [first, last) of its elements, in order, and where each lies."""
        found = {}
        for parameter, pieces in zip(self.parameters, self.by_parameter, strict=True):
            units = np.array([(p.first, p.last) for p in pieces], np.int64).reshape(-1, 2) * parameter.unit_size
            offsets = np.array([p.offset for p in pieces], np.int64)
            found[parameter.name] = parameter, units[:, 0], units[:, 1], offsets
        return found

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
    def by_parameter(self) -> list[list[Piece]]:
        """The pieces of each parameter, in the order of its units."""
        found: list[list[Piece]] = [[] for _ in self.parameters]
        for piece in self.pieces():
            found[piece.parameter].append(piece)
        return [sorted(pieces, key=lambda piece: piece.first) for pieces in found]

    def pieces(self) -> Iterator[Piece]:
        for block in self.blocks:
            yield from block.pieces


def make_layout(
    parameters: Sequence[Parameter], uses: Sequence[Iterable[tuple[int, int, frozenset[int]]]], classes: int
) -> Layout:
    """Lay out `parameters` by who uses them; `uses[k]` are runs (first unit, last unit, classes) of parameter k.

    Units with the same set of using classes form one block (the general rule of partial separability: shared, private
    or dead coordinates), parameters in their given order inside a block.
    """
    members: dict[frozenset[int], list[tuple[int, int, int]]] = {}
    for k, runs in enumerate(uses):
        for first, last, signature in runs:
            members.setdefault(signature, []).append((k, first, last))

    def order(signature: frozenset[int]) -> tuple[int | list[int], ...]:
        if not signature:
            return (2,)
        if len(signature) == classes:
            return (0,)
        return (1, min(signature), max(signature), sorted(signature))

    blocks, offset = [], 0
    for signature in sorted(members, key=order):
        start, pieces = offset, []
        for k, first, last in members[signature]:
            pieces.append(Piece(k, first, last, offset))
            offset += (last - first) * parameters[k].unit_size
        blocks.append(Block(signature, start, offset, tuple(pieces)))
    return Layout(tuple(parameters), tuple(blocks), classes)


def plain_layout(tensors: Mapping[str, tuple[int, ...]]) -> Layout:
    """The layout of named tensors that are no weights of classes, by shape: one after the other, in one block."""
    parameters = [Parameter(name, tuple(shape), shape[0]) for name, shape in tensors.items()]
    return make_layout(parameters, [[(0, p.units, frozenset({0}))] for p in parameters], 1)
