"""Tapes of a subnetwork, whose outputs come from the tape of a larger network that has computed them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from psmpi.nn.layers import Part
from psmpi.nn.layers.chain import Tape
from psmpi.nn.model import Model

# Positions of a model's units among the lender's: a slice if they are contiguous, else for each run of them its place
# among the model's units, and its (first, stop) among the lender's.
Positions = slice | list[tuple[int, tuple[int, int]]]


class Borrowed:
    """Tapes of `model`, made from tapes of `lender`, a model of the same classes and others.

    Raise ValueError for a network with layers whose backward needs more than inputs and outputs.
    """

    def __init__(self, model: Model, lender: Model):
        if any(layer.keeps for layer in model.network.walk()):
            raise ValueError("the tape of a normalization cannot be borrowed: use a network without normalization")
        self.model, self.places = model, _places(model.parts, lender.parts)
        self.capacity = 0

    def reserve(self, batch: int) -> None:
        """Make room for minibatches of up to `batch` samples."""
        if batch > self.capacity:
            self.capacity = batch
            self.buffers = self._buffers(self.model.parts, self.places, batch)
            self.model.reserve_backward(batch)

    def _buffers(self, parts: Sequence[Part], places: Sequence[Any], batch: int) -> list[Any]:
        """Return for each part an array if its units are not contiguous, and the same for the parts inside it."""
        buffers: list[Any] = []
        for part, (rows, inside) in zip(parts, places, strict=True):
            own = None if isinstance(rows, slice) else self.model.ops.empty(part.size * batch, self.model.dtype)
            buffers.append((own, self._buffers(part.inner, inside, batch)))
        return buffers

    @property
    def nbytes(self) -> int:
        """Bytes of the copied outputs."""
        return _nbytes(self.buffers) if self.capacity else 0

    def tape(self, lender_tape: Tape) -> Tape:
        """Return the tape of the lender's pass for the model's classes."""
        self.reserve(lender_tape.outputs[0].shape[-1])
        return self._take(lender_tape.outputs[0], lender_tape, self.model.parts, self.places, self.buffers)

    def _take(
        self, x: np.ndarray, lender_tape: Tape, parts: Sequence[Part], places: Sequence[Any], buffers: Sequence[Any]
    ) -> Tape:
        tape, batch = Tape([x], []), x.shape[-1]
        lists = zip(parts, lender_tape.outputs[1:], lender_tape.kept, places, buffers, strict=True)
        for part, output, kept, (rows, inside), (buffer, inner) in lists:
            if part.inner:
                kept = self._take(tape.outputs[-1], kept, part.inner, inside, inner)
            if isinstance(rows, slice):
                own_output = output[rows]
            else:
                own_output = buffer[: part.size * batch].reshape(*part.shape, batch)
                for at, (first, stop) in rows:
                    own_output[at : at + stop - first] = output[first:stop]
            tape.outputs.append(own_output)
            tape.kept.append(kept)
            if not part.inner:
                part.prepare()
        return tape


def _places(own_parts: Sequence[Part], lender_parts: Sequence[Part]) -> list[Any]:
    """Return for each part the positions of its units among the lender's, and the same for the parts inside it."""
    places: list[Any] = []
    for own, other in zip(own_parts, lender_parts, strict=True):
        places.append((_positions(other.stage.outputs, own.stage.outputs), _places(own.inner, other.inner)))
    return places


def _nbytes(buffers: Sequence[Any]) -> int:
    return sum((0 if own is None else own.nbytes) + _nbytes(inside) for own, inside in buffers)


def _positions(lender_units: np.ndarray, own_units: np.ndarray) -> Positions:
    """Return the positions of the units `own_units` among `lender_units`, both (units,) bool."""
    at = np.flatnonzero(own_units[lender_units])
    starts = np.flatnonzero(np.diff(at, prepend=-2) != 1).tolist()
    runs = [(a, (int(at[a]), int(at[b - 1]) + 1)) for a, b in pairwise([*starts, len(at)])]
    return slice(*runs[0][1]) if len(runs) == 1 else runs
