"""Segments: views of the weights of a subnetwork's dense layers and convolutions in its local vector.

A layer of a subnetwork keeps some of the network's output units. Units of one group that are contiguous in the flat
vector form a *stripe*. Stripes of equal shape at equal distances form a *segment*, which takes one (batched) matrix
product.
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
    """`count` stripes of n units that use n_in inputs each; starts and steps count units, inputs or elements.

    out: first output unit; source, source_step: first input, and distance between stripes' inputs; weight, weight_step,
    bias, bias_step: places in the local vector, and distance between stripes; row_length, row_step: weights of a unit,
    and distance between units; row_bias_step: distance between the biases of units.
    """

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
        """Return the weights in `vector` as a (count, n, unit size) view."""
        shape = (self.count, self.n, self.row_length)
        return ops.view(vector, self.weight, shape, (self.weight_step, self.row_step, 1))

    def biases(self, vector: np.ndarray, ops: NumpyOps) -> np.ndarray:
        """Return the biases in `vector` as a (count, n) view."""
        return ops.view(vector, self.bias, (self.count, self.n), (self.bias_step, self.row_bias_step))

    def rows(self, vectors: np.ndarray, ops: NumpyOps) -> tuple[np.ndarray, np.ndarray]:
        """Return views of weights (k, count, n, unit size), biases (k, count, n) in `vectors` (k, part's weights)."""
        many, size = vectors.shape
        shape = (many, self.count, self.n)
        weights = ops.view(vectors, self.weight, (*shape, self.row_length), (size, self.weight_step, self.row_step, 1))
        return weights, ops.view(vectors, self.bias, shape, (size, self.bias_step, self.row_bias_step))


def find_segments(layer: Any, layout: Layout, part: Runs, kept: np.ndarray, positions: np.ndarray) -> list[Segment]:
    """Return the segments of `layer` in a part, by output unit.

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
        singles = piece.singles(), bias.singles() if bias else repeat(None)
        for single, shifts in zip(*singles, strict=False):
            if kept[single.first]:
                stripes += _stripes(layer, part, positions, local, single, shifts)
    return [_as_rows(s) for s in _merge(sorted(stripes, key=lambda s: s.out))]


def _stripes(
    layer: Any, part: Runs, positions: np.ndarray, local: np.ndarray, piece: Piece, bias: Piece | None
) -> Iterator[Segment]:
    """Iterate over the stripes of units that are contiguous in the flat vector: one for each group of the units."""
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
            # Without biases, the place is one in an array of zeros, one zero for each unit.
            bias=part.local(b_at, b_at + 1).start if bias else int(local[a]),
            bias_step=0,
            row_step=layer.unit_size,
            row_length=layer.unit_size,
        )


def _whole_stripes(layer: Any, piece: Piece) -> bool:
    """Return whether the units of each of several classes form one stripe: a whole group, or part of a single group."""
    per_group = layer.units // layer.groups
    return piece.count > 1 and (layer.groups == 1 or (piece.units == per_group and piece.first % per_group == 0))


def _stripes_of_classes(
    layer: Any, part: Runs, kept: np.ndarray, positions: np.ndarray, local: np.ndarray, piece: Piece, bias: Piece | None
) -> Iterator[Segment]:
    """Iterate over the stripes of the classes that are kept, with neighbouring classes in one segment."""
    present = np.concatenate([[False], kept[piece.first : piece.last : piece.units], [False]])
    for k, end in np.flatnonzero(present[1:] != present[:-1]).reshape(-1, 2).tolist():
        segment, *following = (
            stripe
            for at in range(k, min(k + 2, end))
            for stripe in _stripes(layer, part, positions, local, piece.single(at), bias.single(at) if bias else None)
        )
        # The part holds equally much of each class, so neighbours are at equal distances in its local vector too.
        for second in following:
            steps = second.source - segment.source, second.weight - segment.weight, second.bias - segment.bias
            segment = replace(segment, count=end - k, source_step=steps[0], weight_step=steps[1], bias_step=steps[2])
        yield segment


def _merge(stripes: list[Segment]) -> list[Segment]:
    """Join consecutive stripes of one shape whose starts advance in equal steps; return the segments."""
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
    """Return all stripes of a segment except the first."""
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
    """Return a segment of one-unit stripes with the same inputs as one stripe of many units; others unchanged."""
    if s.count > 1 and s.source_step == 0 and s.n == 1:
        return replace(s, count=1, n=s.count, row_step=s.weight_step, row_bias_step=s.bias_step)
    return s


def same_source(segments: list[Segment]) -> list[Stripes]:
    """Return the stripes of a packed layer: one for each group of inputs; groups at equal distances are joined."""
    stripes: list[Stripes] = []
    for s in segments:
        for k in range(s.count):
            source, out = s.source + k * s.source_step, s.out + k * s.n
            if stripes and stripes[-1].source == source:
                stripes[-1] = replace(stripes[-1], n=stripes[-1].n + s.n)
            else:
                stripes.append(Stripes(1, s.n, s.n_in, source, 0, out))
    joined: list[Stripes] = []
    for stripe in stripes:
        last = joined[-1] if joined else None
        if last is not None and (last.n, last.out + last.count * last.n) == (stripe.n, stripe.out):
            step = stripe.source - last.source - (last.count - 1) * last.source_step
            if last.count == 1 or step == last.source_step:
                joined[-1] = replace(last, count=last.count + 1, source_step=step)
                continue
        joined.append(stripe)
    return joined
