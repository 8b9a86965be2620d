"""Segments: the weights of a subnetwork's dense layers and convolutions in its local vector.

A layer of a subnetwork keeps some of the network's output units. Units of one group that lie side by side in the flat
vector form a *stripe*; stripes of equal shape at equal distances form a *segment*, which one (batched) matrix product
handles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise, repeat
from typing import Any

import numpy as np

from psmpi.backend import NumpyOps, Stripes
from psmpi.layout import Layout, Piece, Runs


@dataclass(frozen=True)
class Segment:
    """`count` stripes of n units that see n_in inputs each; starts and steps are in units, inputs and elements."""

    count: int
    n: int
    n_in: int
    out: int
    source: int
    source_step: int
    weight: int
    weight_step: int
    bias: int
    bias_step: int
    row_length: int
    row_step: int
    row_bias_step: int = 1

    def weights(self, vector: np.ndarray, ops: NumpyOps) -> np.ndarray:
        """The weights in `vector` as a (count, n, unit size) view."""
        shape = (self.count, self.n, self.row_length)
        return ops.view(vector, self.weight, shape, (self.weight_step, self.row_step, 1))

    def biases(self, vector: np.ndarray, ops: NumpyOps) -> np.ndarray:
        """The biases in `vector` as a (count, n) view."""
        return ops.view(vector, self.bias, (self.count, self.n), (self.bias_step, self.row_bias_step))

    def rows(self, vectors: np.ndarray, ops: NumpyOps) -> tuple[np.ndarray, np.ndarray]:
        """Weights (k, count, n, unit size) and biases (k, count, n) in `vectors` (k, part's weights), as views."""
        many, size = vectors.shape
        shape = (many, self.count, self.n)
        weights = ops.view(vectors, self.weight, (*shape, self.row_length), (size, self.weight_step, self.row_step, 1))
        return weights, ops.view(vectors, self.bias, shape, (size, self.bias_step, self.row_bias_step))


def find_segments(layer: Any, layout: Layout, part: Runs, kept: np.ndarray, positions: np.ndarray) -> list[Segment]:
    """The segments of `layer` in a part.

    kept: (units,) bool, the output units that the part computes; positions: (inputs,) local index of each kept input.
    """
    names = [p.name for p in layout.parameters]
    weights = layout.banded[names.index(f"{layer.name}.weight")]
    biases = layout.banded[names.index(f"{layer.name}.bias")] if layer.bias else [None] * len(weights)
    local = np.cumsum(kept) - 1
    stripes: list[Segment] = []
    for piece, bias in zip(weights, biases, strict=True):
        if _whole_stripes(layer, piece):
            stripes += _stripes_of_classes(layer, part, kept, positions, local, piece, bias)
            continue
        ones = piece.singles(), bias.singles() if bias else repeat(None)
        for one, shifts in zip(*ones, strict=False):
            if kept[one.first]:
                stripes += _stripes(layer, part, positions, local, one, shifts)
    return [_as_rows(s) for s in _merge(sorted(stripes, key=lambda s: s.out))]


def _stripes(
    layer: Any, part: Runs, positions: np.ndarray, local: np.ndarray, piece: Piece, bias: Piece | None
) -> Iterator[Segment]:
    """The stripes of units that are contiguous in the flat vector: one of each group that they are in."""
    per_group = layer.units // layer.groups
    inside = range(-(-piece.first // per_group) * per_group, piece.last, per_group)
    for a, b in pairwise(sorted({piece.first, piece.last, *inside})):
        w_at = piece.offset + (a - piece.first) * layer.unit_size
        b_at = bias.offset + a - piece.first if bias else -1
        yield Segment(
            count=1,
            n=b - a,
            n_in=layer.group_inputs,
            out=int(local[a]),
            source=int(positions[a // per_group * layer.group_inputs]),
            source_step=0,
            weight=part.local(w_at, w_at + 1).start,
            weight_step=0,
            # Without biases a place in zeros, one for each unit.
            bias=part.local(b_at, b_at + 1).start if bias else int(local[a]),
            bias_step=0,
            row_step=layer.unit_size,
            row_length=layer.unit_size,
        )


def _whole_stripes(layer: Any, piece: Piece) -> bool:
    """Whether the units of each of several classes are one stripe: in a group that is theirs, or all classes'."""
    per_group = layer.units // layer.groups
    return piece.count > 1 and (layer.groups == 1 or (piece.units == per_group and piece.first % per_group == 0))


def _stripes_of_classes(
    layer: Any, part: Runs, kept: np.ndarray, positions: np.ndarray, local: np.ndarray, piece: Piece, bias: Piece | None
) -> Iterator[Segment]:
    """The stripes of the classes that are kept, those of neighbours together."""
    there = np.concatenate([[False], kept[piece.first : piece.last : piece.units], [False]])
    for k, end in np.flatnonzero(there[1:] != there[:-1]).reshape(-1, 2).tolist():
        one, *others = (
            stripe
            for at in range(k, min(k + 2, end))
            for stripe in _stripes(layer, part, positions, local, piece.single(at), bias.single(at) if bias else None)
        )
        # The part has the same of each class: in its vector neighbours are at equal distances too.
        for second in others:
            steps = second.source - one.source, second.weight - one.weight, second.bias - one.bias
            one = replace(one, count=end - k, source_step=steps[0], weight_step=steps[1], bias_step=steps[2])
        yield one


def _merge(stripes: list[Segment]) -> list[Segment]:
    """Join consecutive stripes of one shape whose starts advance in equal steps."""
    merged: list[Segment] = []
    todo = stripes[::-1]
    while todo:
        s, last = todo.pop(), merged[-1] if merged else None
        if last is None or (last.n, last.out + last.count * last.n) != (s.n, s.out):
            merged.append(s)
            continue
        k = last.count
        steps = (
            s.source - last.source - (k - 1) * last.source_step,
            s.weight - last.weight - (k - 1) * last.weight_step,
            s.bias - last.bias - (k - 1) * last.bias_step,
        )
        own = (s.source_step, s.weight_step, s.bias_step)
        if k > 1 and steps != (last.source_step, last.weight_step, last.bias_step):
            merged.append(s)
            continue
        joins = s.count if s.count == 1 or own == steps else 1
        merged[-1] = replace(last, count=k + joins, source_step=steps[0], weight_step=steps[1], bias_step=steps[2])
        if joins < s.count:
            todo.append(_without_first(s))
    return merged


def _without_first(s: Segment) -> Segment:
    """All stripes of a segment but the first."""
    steps = (s.source_step, s.weight_step, s.bias_step) if s.count > 2 else (0, 0, 0)
    return replace(
        s,
        count=s.count - 1,
        out=s.out + s.n,
        source=s.source + s.source_step,
        weight=s.weight + s.weight_step,
        bias=s.bias + s.bias_step,
        source_step=steps[0],
        weight_step=steps[1],
        bias_step=steps[2],
    )


def _as_rows(s: Segment) -> Segment:
    """Stripes of one unit that all see the same inputs are the rows of a single matrix."""
    if s.count > 1 and s.source_step == 0 and s.n == 1:
        return replace(s, count=1, n=s.count, row_step=s.weight_step, row_bias_step=s.bias_step)
    return s


def same_source(segments: list[Segment]) -> list[Stripes]:
    """Stripes of a packed layer: one for each group of inputs, groups of equal size and distance together."""
    stripes: list[Stripes] = []
    for s in segments:
        for k in range(s.count):
            source, out = s.source + k * s.source_step, s.out + k * s.n
            if stripes and stripes[-1].source == source:
                stripes[-1] = replace(stripes[-1], n=stripes[-1].n + s.n)
            else:
                stripes.append(Stripes(1, s.n, s.n_in, source, 0, out))
    joined: list[Stripes] = []
    for one in stripes:
        last = joined[-1] if joined else None
        if last is not None and (last.n, last.out + last.count * last.n) == (one.n, one.out):
            step = one.source - last.source - (last.count - 1) * last.source_step
            if last.count == 1 or step == last.source_step:
                joined[-1] = replace(last, count=last.count + 1, source_step=step)
                continue
        joined.append(one)
    return joined
