"""Passes of a subnetwork whose outputs are taken from a pass of a larger one that has computed them already."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from psmpi.nn.layers import Part
from psmpi.nn.layers.chain import Tape
from psmpi.nn.model import Model

# Where units lie among another model's: a slice where they lie side by side; else of each run of them that does its
# place among the units, and its (first, behind the last) among the other's.
Positions = slice | list[tuple[int, tuple[int, int]]]


class Borrowed:
    """Tapes of `model` from tapes of `lender`, a model of its classes and others.

    ValueError for a network with layers of which backward needs more than inputs and outputs.
    """

    def __init__(self, model: Model, lender: Model):
        if any(layer.keeps for layer in model.network.walk()):
            raise ValueError("what normalization keeps of a pass cannot be borrowed")
        self.model, self.places = model, _places(model.parts, lender.parts)
        self.capacity = 0

    def reserve(self, batch: int) -> None:
        """Make room for minibatches of up to `batch` samples."""
        if batch > self.capacity:
            self.capacity = batch
            self.buffers = self._buffers(self.model.parts, self.places, batch)
            self.model.reserve_backward(batch)

    def _buffers(self, parts: Sequence[Part], places: Sequence[Any], batch: int) -> list[Any]:
        """For each part an array where its units do not lie side by side; of a part with others inside, theirs too."""
        found: list[Any] = []
        for part, (rows, inside) in zip(parts, places, strict=True):
            own = None if isinstance(rows, slice) else self.model.ops.empty(part.size * batch, self.model.dtype)
            found.append((own, self._buffers(part.inner, inside, batch)))
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of outputs that are copied."""
        return _nbytes(self.buffers) if self.capacity else 0

    def tape(self, theirs: Tape) -> Tape:
        """The tape of the lender's pass for the model's classes."""
        self.reserve(theirs.outputs[0].shape[-1])
        return self._take(theirs.outputs[0], theirs, self.model.parts, self.places, self.buffers)

    def _take(
        self, x: np.ndarray, theirs: Tape, parts: Sequence[Part], places: Sequence[Any], buffers: Sequence[Any]
    ) -> Tape:
        tape, batch = Tape([x], []), x.shape[-1]
        lists = zip(parts, theirs.outputs[1:], theirs.kept, places, buffers, strict=True)
        for part, output, kept, (rows, inside), (buffer, inner) in lists:
            if part.inner:
                kept = self._take(tape.outputs[-1], kept, part.inner, inside, inner)
            if isinstance(rows, slice):
                mine = output[rows]
            else:
                mine = buffer[: part.size * batch].reshape(*part.shape, batch)
                for at, (first, behind) in rows:
                    mine[at : at + behind - first] = output[first:behind]
            tape.outputs.append(mine)
            tape.kept.append(kept)
            if not part.inner:
                part.prepare()
        return tape


def _places(mine: Sequence[Part], theirs: Sequence[Part]) -> list[Any]:
    """For each part where its units lie among the lender's, and the same for the parts inside it."""
    found: list[Any] = []
    for own, other in zip(mine, theirs, strict=True):
        found.append((_positions(other.stage.kept, own.stage.kept), _places(own.inner, other.inner)))
    return found


def _nbytes(buffers: Sequence[Any]) -> int:
    return sum((0 if own is None else own.nbytes) + _nbytes(inside) for own, inside in buffers)


def _positions(theirs: np.ndarray, mine: np.ndarray) -> Positions:
    """The places of the units `mine` among `theirs`, both (units,) bool."""
    at = np.flatnonzero(mine[theirs])
    starts = np.flatnonzero(np.diff(at, prepend=-2) != 1).tolist()
    runs = [(a, (int(at[a]), int(at[b - 1]) + 1)) for a, b in pairwise([*starts, len(at)])]
    return slice(*runs[0][1]) if len(runs) == 1 else runs
