"""Where every parameter lies in the flat vector, ordered by which classes use it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from psmpi.layout.runs import Runs


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
    """Where every parameter lies in the flat vector: [shared by all | shared by some and private, by class | dead].

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
        wanted = frozenset(classes)
        return Runs.union((b.start, b.stop) for b in self.blocks if b.classes & wanted)

    @cached_property
    def dead(self) -> Runs:
        """The runs that no score depends on."""
        return Runs.union((b.start, b.stop) for b in self.blocks if not b.classes)

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

    def order(signature: frozenset[int]) -> tuple:
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
