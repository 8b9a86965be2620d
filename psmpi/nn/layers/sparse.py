"""Sparse layers: each unit uses some of the inputs, by a fixed pattern."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import sqrt
from typing import Any, ClassVar
from zlib import crc32

import numpy as np

from psmpi.backend import SparseIndex
from psmpi.errors import UserError
from psmpi.layout import (
    PACKED,
    Classes,
    Each,
    Layout,
    Parameter,
    Pattern,
    radix_pattern,
    random_pattern,
    spelled,
    unpack,
)
from psmpi.nn.layers.base import INITS, Initial, Layer, Part, SampleSums, Site, Stage
from psmpi.nn.layers.pattern_file import read_pattern
from psmpi.nn.layers.table import Table
from psmpi.nn.layers.uses import Uses, joined, single


@dataclass(frozen=True)
class Sparse(Layer):
    """Sparse layer y = W x + b with a fixed pattern of W; weights: the entries of W, (entries,) in compressed rows."""

    pattern: Pattern
    bias: bool = field(default=True, kw_only=True)
    # Kind of the initial weights; "" stands for the kind that the run uses.
    init: str = field(default="", kw_only=True)

    linear: ClassVar[bool] = True
    moves_gradient: ClassVar[bool] = True

    @classmethod
    def read(cls, table: Table, label: str, shape: tuple[int, ...]) -> list[Layer]:
        table.flat(shape)
        units = table.whole("units")
        pattern = _read_pattern(table, label, units, shape[0])
        if (pattern.rows, pattern.inputs) != (units, shape[0]):
            raise UserError(
                f"{table.where}: the pattern is {pattern.rows} x {pattern.inputs}, but the layer has {units} units and "
                f"{shape[0]} inputs: use a pattern of {units} x {shape[0]}"
            )
        init = table.take("init", "")
        if init not in ("", *INITS):
            raise UserError(f"{table.where}: init = {init!r}; choose one of {', '.join(INITS)}")
        return [cls(label, shape, (units,), pattern, bias=table.flag("bias"), init=init)]

    @property
    def units(self) -> int:
        return self.out_shape[0]

    @property
    def macs(self) -> int:
        return self.pattern.size

    def parameters(self) -> tuple[Parameter, ...]:
        size = self.pattern.size
        weight = Parameter(f"{self.name}.weight", (size,), size)
        return (weight, Parameter(f"{self.name}.bias", (self.units,), self.units)) if self.bias else (weight,)

    def initial(self, kind: str, gain: float) -> dict[str, Initial]:
        """Return draws scaled for each weight by the entries in its row, and for xavier also in its column."""
        kind, fan_in = self.init or kind, np.repeat(self.pattern.fan_in, self.pattern.fan_in)
        fans = fan_in + self.pattern.fan_out[self.pattern.columns] if kind == "xavier" else fan_in
        value = {"xavier": gain * sqrt(6), "he": sqrt(6), "pytorch": 1.0}[kind]
        return {f"{self.name}.weight": Initial("uniform", value, widths=1 / np.sqrt(fans))}

    def sources(self, uses: Uses) -> Uses:
        runs = list(_of_single_classes(uses))
        # For each column, the runs of rows in which it has an entry.
        run_of_row = np.repeat(np.arange(len(runs)), [last - first for first, last, _ in runs])
        back = self.pattern.transposed
        column = np.repeat(np.arange(self.pattern.inputs), np.diff(back.starts))
        pairs = np.unique(column * len(runs) + run_of_row[back.rows])
        edges = np.searchsorted(pairs, np.arange(self.pattern.inputs + 1) * len(runs)).tolist()
        numbers = pairs % len(runs)
        users_of_runs: dict[bytes, Any] = {}
        column_users = []
        for c, (a, b) in enumerate(pairwise(edges)):
            run_numbers = numbers[a:b]
            key = run_numbers.tobytes()
            if key not in users_of_runs:
                users_of_runs[key] = single(Classes.union(runs[k][2] for k in run_numbers))
            column_users.append((c, c + 1, users_of_runs[key]))
        return joined(column_users)

    def users(self, uses: Uses) -> list[tuple[Parameter, Uses]]:
        weight, *bias = self.parameters()
        return [(weight, joined(self._entries(uses))), *((one, uses) for one in bias)]

    def _entries(self, uses: Uses) -> list[tuple[int, int, Any]]:
        """Return runs of entries with their users, given the users of the rows."""
        entries, starts = [], self.pattern.starts
        for first, last, users in uses:
            edges = starts[first : last + 1 : (last - first) // users.count if isinstance(users, Each) else 1]
            if not isinstance(users, Each) or len(set(np.diff(edges).tolist())) == 1:
                entries.append((int(starts[first]), int(starts[last]), users))
                continue
            for k, (a, b) in enumerate(pairwise(edges.tolist()), users.first):
                entries.append((a, b, Each(k, k + 1)))
        return entries

    def present(self, inputs: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        return wanted

    def restrict(self, units: int, in_shape: tuple[int, ...]) -> Layer:
        if (units, in_shape) != (self.units, self.in_shape):
            raise UserError(f"each unit of {self.name} uses other inputs, so units cannot be dealt out by number")
        return self

    def absorbs(self, following: Sequence[Layer], fold: bool) -> int:
        return int(bool(following and following[0].activation))

    def buffer_numbers(self, stage: Stage, batch: int, writable: bool, packed: bool) -> int:
        """Return the numbers of the biases, and of the index unless it is the pattern's, in units of 32 bits."""
        rows, biases = int(stage.outputs.sum()), 2 * int(stage.outputs.sum()) * self.bias
        if stage.outputs.all() and stage.inputs.all() and len(stage.users) == 1:
            return biases
        return biases + 4 * rows + 2 * int(stage.inputs.sum()) + 3 * int(self.pattern.fan_in[stage.outputs].sum())

    def part(self, stage: Stage, site: Site) -> Part:
        return SparsePart(stage, site)


def _read_pattern(table: Table, label: str, units: int, inputs: int) -> Pattern:
    """Return the pattern that a table describes; raise UserError for settings that do not fit."""
    kind = table.take("pattern")
    if kind == "random":
        fan_in, seed = table.whole("fan_in"), table.take("seed", 0)
        if fan_in > inputs:
            raise UserError(f"{table.where}: fan_in = {fan_in} is more than the layer's {inputs} inputs")
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
            raise UserError(f"{table.where}: seed = {seed!r}; expected a whole number from 0 up")
        return random_pattern(units, inputs, fan_in, (seed, crc32(label.encode())))
    if kind == "radix":
        radix, stride, copies = (
            table.whole(name, usual) for name, usual in (("radix", 32), ("stride", 1), ("copies", 1))
        )
        if units != inputs:
            raise UserError(
                f"{table.where}: a radix pattern needs as many inputs as units, but has {inputs} inputs and {units} "
                f"units: put a layer of {units} units before it"
            )
        try:
            return radix_pattern(units, radix, stride, copies)
        except UserError as error:
            raise UserError(f"{table.where}: {error}") from None
    if isinstance(kind, str) and kind.startswith(PACKED):
        try:
            return unpack(kind)
        except ValueError as error:
            raise UserError(f"{table.where}: the pattern {kind[:40]}... is not valid: {error}") from None
    if not isinstance(kind, str) or not kind.endswith(".npz"):
        shown = kind if not isinstance(kind, str) or len(kind) < 80 else f"{kind[:80]}..."
        raise UserError(
            f'{table.where}: pattern = {shown!r}; expected "random" (with fan_in), "radix" (with radix, stride, '
            'copies), or "FILE.npz" as scipy.sparse.save_npz writes it'
        )
    try:
        return read_pattern(kind)
    except UserError as error:
        raise UserError(f"{table.where}: {error}") from None


def _of_single_classes(uses: Uses) -> list[tuple[int, int, Classes]]:
    """Return runs of rows with the classes that use all rows of the run."""
    runs = []
    for first, last, users in uses:
        if isinstance(users, Classes):
            runs.append((first, last, users))
            continue
        share = (last - first) // users.count
        runs += [
            (first + k * share, first + (k + 1) * share, Classes(((users.first + k, users.first + k + 1),)))
            for k in range(users.count)
        ]
    return runs


def _places(layout: Layout, site: Site, name: str, units: np.ndarray) -> np.ndarray:
    """Return the places of units of a parameter in the local vector, (units,) int64; each unit has one element."""
    number = [p.name for p in layout.parameters].index(name)
    first, _, offsets = spelled([piece.stretch(1) for piece in layout.banded[number]])
    at = np.searchsorted(first, units, side="right") - 1
    flat = offsets[at] + units - first[at]
    return site.part.places(flat, flat + 1)


class SparsePart(Part):
    """Part of a sparse layer, with the activation that follows: x (inputs, b) -> y (units, b)."""

    def __init__(self, stage: Stage, site: Site):
        super().__init__(stage, site)
        assert isinstance(self.layer, Sparse)
        layer, whole = self.layer, bool(stage.outputs.all() and stage.inputs.all())
        self.pattern, firsts = layer.pattern, layer.pattern.starts[:-1]
        if not whole:
            self.pattern, firsts = self.pattern.restricted(stage.outputs, stage.inputs)
        places = np.zeros(self.pattern.rows, np.int64)
        some = self.pattern.fan_in > 0
        places[some] = _places(site.layout, site, f"{layer.name}.weight", firsts[some])
        biases = None
        if layer.bias:
            biases = _places(site.layout, site, f"{layer.name}.bias", np.flatnonzero(stage.outputs))
        # The run of the local vector that has all weights and biases.
        self.first = min(
            int(places[some].min(initial=2**62)), 2**62 if biases is None else int(biases.min(initial=2**62))
        )
        self.stop = int((places + self.pattern.fan_in)[some].max(initial=self.first))
        if biases is not None:
            self.stop = max(self.stop, int(biases.max(initial=0)) + 1)
            biases -= self.first
        places[some] -= self.first
        if self.stop - self.first >= 2**31:
            raise UserError(
                f"{layer.name}: its weights lie too far apart: a rank may have up to 2^31 weights of a sparse network"
            )
        back, starts = self.pattern.transposed, self.pattern.starts
        back_places = back.entries
        if np.array_equal(places[some], starts[:-1][some]):
            places = starts[:-1]
        else:
            back_places = (places - starts[:-1]).astype(np.int32)[back.rows] + back.entries
        self.index = SparseIndex(
            self.pattern.inputs, starts, self.pattern.columns, places, biases, back.starts, back.rows, back_places
        )
        self.product = self.ops.sparse_product(self.index, self.dtype)
        own = (layer.pattern.starts, layer.pattern.columns, *layer.pattern.transposed) if whole else ()
        self.own = [a for a in self.index.arrays if not any(a is one or a.base is one for one in own)]

    def views(self, vector: np.ndarray) -> Any:
        """Return the run of the vector that has the weights and biases."""
        return vector[self.first : self.stop]

    def arrays(self) -> list[np.ndarray]:
        return [*self.own, *self.product.arrays()]

    def forward(self, x: np.ndarray, y: np.ndarray | None, room: Any) -> tuple[np.ndarray, Any]:
        assert y is not None
        self.product.forward(self.w, x, y)
        self.ops.activate(self.activation, y)
        return y, None

    def backward(
        self, x: np.ndarray, y: np.ndarray, kept: Any, dy: np.ndarray, dx: np.ndarray | None, into: Any
    ) -> np.ndarray:
        self.ops.activate_back(self.activation, y, dy)
        if isinstance(into, SampleSums):
            scaled = self.space.take("scaled", len(into.weights), *dy.shape)
            self.ops.scale_samples(dy[None], into.weights, scaled.reshape(len(scaled), 1, *dy.shape))
            for gradient, row in zip(scaled, into.into, strict=True):
                self.product.backward(self.w, x, gradient, None, self.views(row))
            into = None
        self.product.backward(self.w, x, dy, dx, into)
        return dy if dx is None else dx

    def export(self, graph: Any, value: str) -> str:
        """Add the layer to an ONNX graph: gathered inputs times weights, summed; rows are padded with zeros."""
        name, index, w = self.layer.name, self.index, np.asarray(self.w)
        most = max(1, int(self.pattern.fan_in.max()))
        columns = np.zeros((self.pattern.rows, most), np.int64)
        weights = np.zeros((self.pattern.rows, most), w.dtype)
        at = np.arange(most) < self.pattern.fan_in[:, None]
        columns[at] = self.pattern.columns
        weights[at] = w[(index.places[:, None] + np.arange(most))[at]]
        seen = graph.node(
            "Gather", [value, graph.constant(f"{name}.columns", columns.reshape(-1))], f"{name}.seen", axis=1
        )
        shape = graph.constant(f"{name}.rows", np.array([-1, *columns.shape]))
        rows = graph.node("Reshape", [seen, shape], f"{name}.in")
        terms = graph.node("Mul", [rows, graph.constant(f"{name}.weight", weights)], f"{name}.terms")
        axis = graph.constant(f"{name}.axis", np.array([2]))
        if index.biases is None:
            return str(graph.node("ReduceSum", [terms, axis], name, keepdims=0))
        total = graph.node("ReduceSum", [terms, axis], f"{name}.sums", keepdims=0)
        return str(graph.node("Add", [total, graph.constant(f"{name}.bias", w[index.biases])], name))
