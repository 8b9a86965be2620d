"""Dense and convolution layers of a part: where their weights lie in the local vector, forward and backward.

A layer of a part keeps some of the network's output units. Units of one group that lie side by side in the flat vector
form a *stripe*; stripes of equal shape at equal distances form a *segment*, which one (batched) matrix product handles.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from psmpi.backend import NumpyOps, Stripes
from psmpi.layout import Layout, Runs
from psmpi.nn.network import Conv, Linear


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


class Scratch:
    """Memory that layers use one after the other, by name; it grows to the largest use."""

    def __init__(self, ops: NumpyOps, dtype: np.dtype):
        self.ops, self.dtype = ops, dtype
        self.arrays: dict[str, np.ndarray] = {}

    def take(self, name: str, *shape: int) -> np.ndarray:
        """An array of this shape, its contents undefined; it is valid until the next of this name."""
        size = prod(shape)
        if name not in self.arrays or self.arrays[name].size < size:
            self.arrays[name] = self.ops.empty(size, self.dtype)
        return self.arrays[name][:size].reshape(shape)

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays.values())


# Of `sums`: weights of the samples (k, b) and where the k weighted sums of their gradients go, (k, part's weights).
Sums = tuple[np.ndarray, np.ndarray]


def find_segments(layer: Linear, layout: Layout, part: Runs, kept: np.ndarray, positions: np.ndarray) -> list[Segment]:
    """The segments of `layer` in a part.

    kept: (units,) bool, the output units that the part computes; positions: (inputs,) local index of each kept input.
    """
    names = [p.name for p in layout.parameters]
    weight = names.index(f"{layer.name}.weight")
    bias = names.index(f"{layer.name}.bias") if layer.bias else -1
    local = np.cumsum(kept) - 1
    per_group = layer.units // layer.groups
    biases = {p.first: p.offset for p in layout.pieces() if p.parameter == bias}
    stripes = []
    for piece in layout.pieces():
        if piece.parameter != weight or not kept[piece.first]:
            continue
        edges = sorted(
            {piece.first, piece.last, *range(-(-piece.first // per_group) * per_group, piece.last, per_group)}
        )
        for a, b in itertools.pairwise(edges):
            w_at = piece.offset + (a - piece.first) * layer.unit_size
            b_at = biases[piece.first] + a - piece.first if layer.bias else -1
            stripes.append(
                Segment(
                    count=1,
                    n=b - a,
                    n_in=layer.group_inputs,
                    out=int(local[a]),
                    source=int(positions[a // per_group * layer.group_inputs]),
                    source_step=0,
                    weight=part.local(w_at, w_at + 1).start,
                    weight_step=0,
                    # Without biases a place in zeros, one for each unit.
                    bias=part.local(b_at, b_at + 1).start if layer.bias else int(local[a]),
                    bias_step=0,
                    row_step=layer.unit_size,
                    row_length=layer.unit_size,
                )
            )
    return [_as_rows(s) for s in _merge(sorted(stripes, key=lambda s: s.out))]


def _merge(stripes: list[Segment]) -> list[Segment]:
    """Join consecutive stripes of one shape whose starts advance in equal steps."""
    merged: list[Segment] = []
    for s in stripes:
        last = merged[-1] if merged else None
        if last is not None and (last.n, last.out + last.count * last.n) == (s.n, s.out):
            k = last.count
            steps = (
                s.source - last.source - (k - 1) * last.source_step,
                s.weight - last.weight - (k - 1) * last.weight_step,
                s.bias - last.bias - (k - 1) * last.bias_step,
            )
            if k == 1 or steps == (last.source_step, last.weight_step, last.bias_step):
                merged[-1] = replace(last, count=k + 1, source_step=steps[0], weight_step=steps[1], bias_step=steps[2])
                continue
        merged.append(s)
    return merged


def _as_rows(s: Segment) -> Segment:
    """Stripes of one unit that all see the same inputs are the rows of a single matrix."""
    if s.count > 1 and s.source_step == 0 and s.n == 1:
        return replace(s, count=1, n=s.count, row_step=s.weight_step, row_bias_step=s.bias_step)
    return s


class LinearPart:
    """What dense and convolution layers share: segments bound to a weight and a gradient vector."""

    def __init__(
        self,
        layer: Linear,
        segments: list[Segment],
        inputs: int,
        units: int,
        ops: NumpyOps,
        scratch: Scratch,
        activation: str = "identity",
    ):
        self.layer, self.segments, self.inputs, self.units, self.ops = layer, segments, inputs, units, ops
        self.scratch, self.activation = scratch, activation
        self.w: list[tuple[np.ndarray, np.ndarray]] = []
        self.g: list[tuple[np.ndarray, np.ndarray]] = []
        # The array that sums went into last, and its views.
        self.into: tuple[np.ndarray | None, list[tuple[np.ndarray, np.ndarray]]] = (None, [])
        # A product can write straight into dx where every input belongs to exactly one stripe.
        one = segments[0]
        self.covers = (
            len(segments) == 1
            and one.source == 0
            and (one.count == 1 or one.source_step == one.n_in)
            and one.count * one.n_in == inputs
        )

    def bind(self, w: np.ndarray, g: np.ndarray | None) -> None:
        # What stands for biases that the layer has not: they are 0, and their gradients go nowhere.
        biases, dbiases = w, g
        if not self.layer.bias:
            biases, dbiases = (self.ops.zeros(self.units, w.dtype) for _ in range(2))
        self.w = [(s.weights(w, self.ops), s.biases(biases, self.ops)) for s in self.segments]
        if g is not None:
            assert dbiases is not None
            self.g = [(s.weights(g, self.ops), s.biases(dbiases, self.ops)) for s in self.segments]

    def arrays(self) -> list[np.ndarray]:
        """What it holds besides weights, activations, their gradients and scratch."""
        return []

    def _rows(self, into: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """The segments' weights and biases in `into` (k, part's weights)."""
        if self.into[0] is not into:
            self.into = into, [s.rows(into, self.ops) for s in self.segments]
        return self.into[1]

    def source(self, s: Segment, x: np.ndarray) -> np.ndarray:
        """The inputs of a segment's stripes, (count, n_in, b), as a view of x (inputs, b)."""
        if s.count == 1 or s.source_step == s.n_in:
            return x[s.source : s.source + s.count * s.n_in].reshape(s.count, s.n_in, x.shape[1])
        b = x.shape[1]
        return self.ops.view(x, s.source * b, (s.count, s.n_in, b), (s.source_step * b, b, 1))

    @staticmethod
    def target(s: Segment, y: np.ndarray) -> np.ndarray:
        """A segment's output units, (count, n, b), as a view of y (units, b)."""
        return y[s.out : s.out + s.count * s.n].reshape(s.count, s.n, y.shape[1])


class DensePart(LinearPart):
    """x (inputs, b) -> y (units, b)."""

    def reserve(self, batch: int) -> None:
        if not self.covers:
            self.scratch.take("product", max(s.n_in for s in self.segments), batch)

    def prepare(self) -> None:
        """Get ready for a backward pass without a forward pass."""

    def forward(self, x: np.ndarray, y: np.ndarray) -> None:
        for s, (w, b) in zip(self.segments, self.w, strict=True):
            out = self.target(s, y)
            self.ops.matmul(w, self.source(s, x), out)
            self.ops.finish(out, b, self.activation)

    def backward(
        self, x: np.ndarray, y: np.ndarray, dy: np.ndarray, dx: np.ndarray | None, sums: Sums | None = None
    ) -> None:
        for k, s in enumerate(self.segments):
            out, across = self.target(s, dy), self.source(s, x).transpose(0, 2, 1)
            if sums is None:
                gw, gb = self.g[k]
                self.ops.finish_back(self.target(s, y), out, self.activation, gb)
                self.ops.matmul(out, across, gw)
            else:
                self.ops.finish_back(self.target(s, y), out, self.activation, None)
                weights, into = sums
                gw, gb = self._rows(into)[k]
                if self.layer.bias:
                    self.ops.weighted_sums(out, weights, gb)
                scaled = self.scratch.take("scaled", len(weights), *out.shape)
                self.ops.scale_samples(out, weights, scaled)
                self.ops.matmul(scaled, across, gw)
        if dx is None:
            return
        if self.covers:
            (s,), ((w, _),) = self.segments, self.w
            self.ops.matmul(w.transpose(0, 2, 1), self.target(s, dy), self.source(s, dx))
            return
        dx.fill(0)
        for s, (w, _) in zip(self.segments, self.w, strict=True):
            product = self.scratch.take("product", s.n_in, dx.shape[1])
            sources, out = self.source(s, dx), self.target(s, dy)
            for k in range(s.count):
                self.ops.matmul(w[k].T, out[k], product)
                source = sources[k]
                source += product


class ConvPart(LinearPart):
    """x (channels, h, w, b) -> y (units, rows, width, b), with `pool` x `pool` mean pooling folded into the kernel.

    The pooled layer is one convolution with a (k + pool - 1)-wide kernel and stride `pool`: for a 5 x 5 kernel and
    2 x 2 pooling, 36 multiplications an output instead of 100.
    """

    def __init__(
        self,
        layer: Conv,
        segments: list[Segment],
        inputs: int,
        units: int,
        ops: NumpyOps,
        scratch: Scratch,
        activation: str,
        pool: int,
    ):
        super().__init__(layer, segments, inputs, units, ops, scratch, activation)
        dtype = scratch.dtype
        self.k, self.pool = layer.kernel, pool
        self.wide = layer.kernel + pool - 1
        fan = layer.group_inputs * self.wide**2
        self.folded = ops.empty(units * fan, dtype).reshape(units, layer.group_inputs, self.wide, self.wide)
        self.dfolded = ops.empty(units * fan, dtype).reshape(self.folded.shape)
        self.bias = ops.empty(units, dtype)
        # The kernels are packed, so stripes apart in the flat vector join wherever they see the same inputs.
        (_, height, width), (_, rows, columns) = layer.in_shape, layer.out_shape
        self.plan = ops.convolution(
            _same_source(segments),
            (inputs, height, width),
            (units, rows // pool, columns // pool),
            self.wide,
            pool,
            dtype,
            activation,
        )

    def reserve(self, batch: int) -> None:
        self.plan.reserve(batch)

    def arrays(self) -> list[np.ndarray]:
        return [self.folded, self.dfolded, self.bias, *self.plan.arrays()]

    def _images(self, s: Segment, rows: np.ndarray, k: int) -> np.ndarray:
        return rows.reshape(s.count, s.n, self.layer.group_inputs, k, k)

    def prepare(self) -> None:
        """Get ready for a backward pass without a forward pass."""
        for s, (w, b) in zip(self.segments, self.w, strict=True):
            units = slice(s.out, s.out + s.count * s.n)
            self.ops.fold(self._images(s, w, self.k), self.pool, self._images(s, self.folded[units], self.wide))
            self.bias[units].reshape(b.shape)[...] = b
        self.plan.prepare(self.folded)

    def forward(self, x: np.ndarray, y: np.ndarray) -> None:
        self.prepare()
        self.plan.forward(x, self.folded, self.bias, y)

    def backward(
        self, x: np.ndarray, y: np.ndarray, dy: np.ndarray, dx: np.ndarray | None, sums: Sums | None = None
    ) -> None:
        flat_y, flat_dy = y.reshape(self.units, -1), dy.reshape(self.units, -1)
        for k, s in enumerate(self.segments):
            dbias = self.g[k][1] if sums is None else None
            self.ops.finish_back(self.target(s, flat_y), self.target(s, flat_dy), self.activation, dbias)
        self.plan.backward(x, dy, self.folded, self.dfolded if sums is None else None, dx)
        if sums is not None:
            self._backward_sums(x, dy, *sums)
            return
        for s, (gw, _) in zip(self.segments, self.g, strict=True):
            dfolded = self._images(s, self.dfolded[s.out : s.out + s.count * s.n], self.wide)
            self.ops.unfold(dfolded, self.pool, self._images(s, gw, self.k))

    def _backward_sums(self, x: np.ndarray, dy: np.ndarray, weights: np.ndarray, sums: np.ndarray) -> None:
        many, batch = weights.shape
        apart = self.scratch.take("apart", *self.folded.shape, batch)
        dbias = self.scratch.take("dbias", self.units, batch)
        self.plan.samples(x, dy, apart, dbias)
        for s, (gw, gb) in zip(self.segments, self._rows(sums), strict=True):
            if self.layer.bias:
                self.ops.weighted_sums(self.target(s, dbias), weights, gb)
            # Unfolding is linear: the sums over samples first, there are fewer of them.
            folded = self.scratch.take("folded", many, s.n, *self.folded.shape[1:])
            for k in range(s.count):
                first = s.out + k * s.n
                self.ops.matmul(weights, apart[first : first + s.n].reshape(-1, batch).T, folded.reshape(many, -1))
                into = gw[:, k].reshape(many, s.n, self.layer.group_inputs, self.k, self.k)
                self.ops.unfold(folded, self.pool, into)


def _same_source(segments: list[Segment]) -> list[Stripes]:
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
