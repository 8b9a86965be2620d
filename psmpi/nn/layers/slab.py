"""Slabs: layers cut into domains; each domain is densely connected to its inputs and to a halo of inputs around them.

Source: Long and Gupta, "Scalable massively parallel artificial neural networks" (2008). Connections stay inside a
domain and a thin halo, as in stencils.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod, sqrt
from typing import Any, ClassVar

import numpy as np

from psmpi.errors import UserError
from psmpi.layout import Domains, Parameter
from psmpi.nn.layers.base import Initial, Layer, Part, SampleSums, Site, Stage, place
from psmpi.nn.layers.table import Table
from psmpi.nn.layers.uses import Uses, grouped, stretched


@dataclass(frozen=True)
class Slab(Layer):
    """Layer with a matrix (outputs, window) for each domain; a window has the domain's inputs and a `halo` of inputs.

    inputs, outputs: fields of neurons, cut by the same grid. numbers: domains of the layer; the network's layer has all
    domains. A layer of some domains (`of`) has the inputs of their windows and their outputs, in the order of the
    fields. Inputs beyond the edges of a field are 0.
    """

    inputs: Domains
    outputs: Domains
    halo: int
    numbers: tuple[int, ...]
    bias: bool = field(default=True, kw_only=True)

    linear: ClassVar[bool] = True
    moves_gradient: ClassVar[bool] = True

    @classmethod
    def read(cls, table: Table, label: str, shape: tuple[int, ...]) -> list[Layer]:
        domains = table.take("domains", 4)
        if isinstance(domains, Sequence) and not isinstance(domains, str):
            return [_plane(table, label, shape, domains)]
        count = domains
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise UserError(
                f"{table.where}: domains = {domains!r}; expected a whole number above 0, or [rows, columns]"
            )
        table.flat(shape)
        units = table.whole("units")
        for side, size in (("inputs", shape[0]), ("units", units)):
            if size % count:
                raise UserError(
                    f"{table.where}: {size} {side} are not a multiple of {count} domains: use "
                    f"{max(count, size - size % count)} or {size + count - size % count}, or other domains"
                )
        fields = Domains((1, 1, shape[0]), (1, count)), Domains((1, 1, units), (1, count))
        halo = _halo(table, fields[0])
        return [cls(label, shape, (units,), *fields, halo, tuple(range(count)), bias=table.flag("bias"))]

    @property
    def shapes(self) -> tuple[int, int, int]:
        """Shape of the weights: (domains, outputs of a domain, inputs of a window)."""
        return len(self.numbers), self.outputs.size, self.inputs.window_size(self.halo)

    @property
    def macs(self) -> int:
        return prod(self.shapes)

    def parameters(self) -> tuple[Parameter, ...]:
        count, rows, _ = self.shapes
        weight = Parameter(f"{self.name}.weight", self.shapes, count * rows)
        return (weight, Parameter(f"{self.name}.bias", (count, rows), count * rows)) if self.bias else (weight,)

    def initial(self, kind: str, gain: float) -> dict[str, Initial]:
        _, rows, window = self.shapes
        width = {"xavier": gain * sqrt(6 / (window + rows)), "he": sqrt(6 / window), "pytorch": 1 / sqrt(window)}[kind]
        return {f"{self.name}.weight": Initial("uniform", width)}

    def sources(self, uses: Uses) -> Uses:
        return stretched(grouped(uses, self.out_shape[0]), self.in_shape[0])

    def users(self, uses: Uses) -> list[tuple[Parameter, Uses]]:
        every = grouped(uses, self.out_shape[0])
        return [(parameter, stretched(every, parameter.units)) for parameter in self.parameters()]

    def present(self, inputs: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        return np.full(self.out_shape[0], wanted.any())

    def restrict(self, units: int, in_shape: tuple[int, ...]) -> Layer:
        if (units, in_shape) != (self.out_shape[0], self.in_shape):
            raise UserError(f"the units of {self.name} form whole domains and cannot be dealt out one by one")
        return self

    def absorbs(self, following: Sequence[Layer], fold: bool) -> int:
        return int(bool(following and following[0].activation))

    def of(self, numbers: Sequence[int]) -> Slab:
        """Return the layer of the domains `numbers`."""
        some = replace(self, numbers=tuple(numbers))
        return replace(some, in_shape=(len(some.needs),), out_shape=(len(some.all_outputs),))

    @cached_property
    def windows(self) -> np.ndarray:
        """Inputs of each domain's window, (domains, window) int64, -1 beyond the edges."""
        return np.stack([self.inputs.window(number, self.halo) for number in self.numbers])

    @cached_property
    def cells(self) -> np.ndarray:
        """Outputs of each domain, (domains, outputs) int64."""
        return np.stack([self.outputs.cells(number) for number in self.numbers])

    @cached_property
    def needs(self) -> np.ndarray:
        """Inputs of all windows, (inputs,) int64, increasing."""
        numbers = np.unique(self.windows)
        return numbers[numbers >= 0]

    @cached_property
    def all_outputs(self) -> np.ndarray:
        """Outputs of all domains, (outputs,) int64, increasing."""
        return np.sort(self.cells, axis=None)

    @cached_property
    def in_order(self) -> bool:
        """Whether the outputs lie in memory domain by domain."""
        return bool((self.cells.reshape(-1) == self.all_outputs).all())

    @cached_property
    def spans(self) -> list[tuple[slice, slice, int, int]]:
        """Runs of domains whose windows are views of the inputs: (domains, columns of the window, first input, step).

        The list is empty if a window is not a view of the inputs: windows are then copied.
        """
        spans: list[tuple[slice, slice, int, int]] = []
        local = np.where(self.windows < 0, -1, np.searchsorted(self.needs, self.windows))
        for k, row in enumerate(local):
            inside = np.flatnonzero(row >= 0)
            first, source = int(inside[0]), int(row[inside[0]])
            columns = slice(first, first + len(inside))
            if (row[columns] != np.arange(source, source + len(inside))).any():
                return []
            if spans and spans[-1][1] == columns:
                ds, _, begin, step = spans[-1]
                count = k - ds.start
                gap = source - begin - (count - 1) * step
                if count == 1 or gap == step:
                    spans[-1] = (slice(ds.start, k + 1), columns, begin, gap)
                    continue
            spans.append((slice(k, k + 1), columns, source, 0))
        return spans if self.in_order else []

    def workspace_numbers(self, stage: Stage, batch: int, wanted: bool, packed: bool) -> dict[str, int]:
        numbers = super().workspace_numbers(stage, batch, wanted, packed)
        if wanted:
            numbers["product"] = self.shapes[0] * self.shapes[2] * batch
        return numbers | self.copied(batch, back=True)

    def copied(self, batch: int, back: bool) -> dict[str, int]:
        """Return the sizes of the workspace arrays for copies of windows and tiles; back: include a backward pass."""
        count, rows, window = self.shapes
        numbers = {} if self.spans else {"windows": count * window * batch}
        if not self.in_order:
            numbers |= {"tiles": count * rows * batch} | ({"tiles back": count * rows * batch} if back else {})
        return numbers

    def part(self, stage: Stage, site: Site) -> Part:
        return SlabPart(stage, site)


def _plane(table: Table, label: str, shape: tuple[int, ...], grid: Sequence[Any]) -> Slab:
    """Read a layer whose domains are tiles of images."""
    sizes = table.image(shape)
    if len(grid) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in grid):
        raise UserError(f"{table.where}: domains = {list(grid)!r}; expected [rows, columns], whole numbers above 0")
    units = table.take("units")
    good = isinstance(units, Sequence) and not isinstance(units, str) and len(units) in (2, 3)
    if not good or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in units):
        raise UserError(
            f"{table.where}: units = {units!r}; with domains = {list(grid)!r} expected [height, width] or [channels, "
            "height, width], whole numbers above 0"
        )
    out_field = (1, *units) if len(units) == 2 else tuple(units)
    cut = int(grid[0]), int(grid[1])
    for side, field_ in (("input", sizes), ("units", out_field)):
        if field_[1] % cut[0] or field_[2] % cut[1]:
            raise UserError(
                f"{table.where}: a field of {field_[1]} x {field_[2]} ({side}) is not cut by {cut[0]} x {cut[1]} "
                "domains into equal tiles: use sizes that are multiples, or other domains"
            )
    fields = Domains(sizes, cut), Domains((out_field[0], out_field[1], out_field[2]), cut)
    numbers = tuple(range(prod(cut)))
    return Slab(label, shape, out_field, *fields, _halo(table, fields[0]), numbers, bias=table.flag("bias"))


def _halo(table: Table, inputs: Domains) -> int:
    """Read the width of the halo: by default an eighth of a domain's shorter cut side, at least 1; 0 without cuts."""
    sides = [n for n, many in zip(inputs.tile, inputs.grid, strict=True) if many > 1]
    most = min(sides, default=0)
    halo = table.take("halo", max(1, most // 8))
    if not isinstance(halo, int) or isinstance(halo, bool) or halo < 0:
        raise UserError(f"{table.where}: halo = {halo!r}; expected a whole number, 0 or above")
    if sides and halo > most:
        raise UserError(
            f"{table.where}: halo = {halo} goes beyond the neighbouring domain, which has {most} inputs across: use "
            f"halo = {most} at most, or fewer domains"
        )
    return halo if sides else 0


class SlabPart(Part):
    """Part of a slab, with the activation that follows: x (inputs, b), or images, -> y (outputs, b), or images."""

    def __init__(self, stage: Stage, site: Site):
        super().__init__(stage, site)
        layer = self.layer
        assert isinstance(layer, Slab)
        self.slab, self.bias = layer, layer.bias
        self.counts = count, rows, _ = layer.shapes
        self.at = place(site, f"{layer.name}.weight")
        self.biases = place(site, f"{layer.name}.bias") if layer.bias else -1
        # Zeros as biases of a layer without biases, and an unused array for their gradient.
        missing = 0 if layer.bias else count * rows
        self.zeros, self.unused = (self.ops.zeros(missing, site.dtype).reshape(-1, rows) for _ in range(2))
        neurons = layer.windows.reshape(-1)
        inside = np.flatnonzero(neurons >= 0)
        local = np.searchsorted(layer.needs, neurons[inside])
        self.gather = self.ops.row_copies(local, inside)
        self.spread = self.ops.row_copies(inside, local)
        edges = np.flatnonzero(np.diff(neurons >= 0, prepend=True, append=True))
        # Runs of window rows beyond the edges of the field, which are 0.
        self.beyond = [slice(int(a), int(b)) for a, b in edges.reshape(-1, 2)]
        # Permutations between the order of the outputs and the order of the domains.
        cells = order = np.empty(0, np.int64)
        if not layer.in_order:
            cells = np.searchsorted(layer.all_outputs, layer.cells.reshape(-1))
            order = np.arange(len(cells))
        self.untile, self.tile = self.ops.row_copies(order, cells), self.ops.row_copies(cells, order)

    def arrays(self) -> list[Any]:
        return [self.zeros, self.unused, self.gather, self.spread, self.tile, self.untile]

    def views(self, vector: np.ndarray) -> Any:
        """Return weights (domains, outputs, window) and biases (domains, outputs)."""
        return self._views(vector, self.zeros)

    def bind(self, w: np.ndarray, g: np.ndarray | None) -> None:
        self.w, self.g = self._views(w, self.zeros), None if g is None else self._views(g, self.unused)

    def _views(self, vector: np.ndarray, biases: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        count, rows, _ = self.counts
        weights = vector[self.at : self.at + prod(self.counts)].reshape(self.counts)
        return weights, (vector[self.biases : self.biases + count * rows].reshape(count, rows) if self.bias else biases)

    def reserve(self, batch: int) -> None:
        for name, numbers in self.slab.copied(batch, back=False).items():
            self.space.take(name, numbers)

    def reserve_backward(self, batch: int, wanted: bool) -> None:
        for name, numbers in self.slab.copied(batch, back=True).items():
            self.space.take(name, numbers)
        if wanted:
            self.space.take("product", self.counts[0], self.counts[2], batch)

    def _windows(self, x: np.ndarray) -> np.ndarray:
        """Return a copy of the inputs of all windows, (domains, window, b)."""
        count, _, window = self.counts
        windows = self.space.take("windows", count * window, x.shape[-1])
        for rows in self.beyond:
            windows[rows] = 0
        self.gather.copy(x, windows)
        return windows.reshape(count, window, -1)

    def _source(self, x: np.ndarray, span: tuple[slice, slice, int, int]) -> np.ndarray:
        """Return the inputs of a run of windows as a view, (domains, columns, b)."""
        domains, columns, first, step = span
        b = x.shape[-1]
        shape = domains.stop - domains.start, columns.stop - columns.start, b
        return self.ops.view(x, first * b, shape, (step * b, b, 1))

    def _tiles(self, name: str, values: np.ndarray) -> np.ndarray:
        """Return outputs (units, b) in the order of the domains, (domains, outputs, b)."""
        count, rows, _ = self.counts
        if self.slab.in_order:
            return values.reshape(count, rows, -1)
        tiles = self.space.take(name, count * rows, values.shape[-1])
        self.tile.copy(values, tiles)
        return tiles.reshape(count, rows, -1)

    def forward(self, x: np.ndarray, y: np.ndarray | None, room: Any) -> tuple[np.ndarray, Any]:
        assert y is not None
        (count, rows, _), b = self.counts, x.shape[-1]
        inputs, (w, bias) = x.reshape(-1, b), self.w
        ordered = self.slab.in_order
        out = y.reshape(count, rows, b) if ordered else self.space.take("tiles", count, rows, b)
        for span in self.slab.spans:
            domains, columns = span[:2]
            self.ops.matmul(w[domains, :, columns], self._source(inputs, span), out[domains])
        if not self.slab.spans:
            self.ops.matmul(w, self._windows(inputs), out)
        self.ops.finish(out, bias, self.activation)
        if not ordered:
            self.untile.copy(out.reshape(-1, b), y.reshape(-1, b))
        return y, None

    def backward(
        self, x: np.ndarray, y: np.ndarray, kept: Any, dy: np.ndarray, dx: np.ndarray | None, into: Any
    ) -> np.ndarray:
        b = x.shape[-1]
        inputs, (w, _) = x.reshape(-1, b), self.w
        out = self._tiles("tiles", y.reshape(-1, b)) if self.activation != "identity" else y
        back = self._tiles("tiles back", dy.reshape(-1, b))
        written = into is not None and not isinstance(into, SampleSums)
        self.ops.finish_back(out, back, self.activation, into[1] if written else None)
        if isinstance(into, SampleSums):
            self._sums(inputs, back, into)
        elif written:
            self._gradient(inputs, back, into[0])
        if dx is None:
            return dy
        product = self.space.take("product", self.counts[0], self.counts[2], b)
        self.ops.matmul(w.transpose(0, 2, 1), back, product)
        dx.fill(0)
        self.spread.add(product.reshape(-1, b), dx.reshape(-1, b))
        return dx

    def _gradient(self, x: np.ndarray, dy: np.ndarray, g: np.ndarray) -> None:
        """Fill g with the gradient of the weights; weights of inputs beyond the edges have gradient 0."""
        for span in self.slab.spans:
            domains, columns = span[:2]
            self.ops.matmul(dy[domains], self._source(x, span).transpose(0, 2, 1), g[domains, :, columns])
            g[domains, :, : columns.start] = 0
            g[domains, :, columns.stop :] = 0
        if not self.slab.spans:
            self.ops.matmul(dy, self._windows(x).transpose(0, 2, 1), g)

    def _sums(self, x: np.ndarray, dy: np.ndarray, sums: SampleSums) -> None:
        """Write the weighted sums of the samples' gradients."""
        (count, rows, window), (many, size) = self.counts, sums.into.shape
        weights = self.ops.view(sums.into, self.at, (many, *self.counts), (size, rows * window, window, 1))
        if self.bias:
            biases = self.ops.view(sums.into, self.biases, (many, count, rows), (size, rows, 1))
            self.ops.weighted_sums(dy, sums.weights, biases)
        scaled = self.space.take("scaled", many, *dy.shape)
        self.ops.scale_samples(dy, sums.weights, scaled)
        self.ops.matmul(scaled, self._windows(x).transpose(0, 2, 1), weights)

    def export(self, graph: Any, value: str) -> str:
        name, (count, rows, window) = self.layer.name, self.counts

        def constant(what: str, values: Any) -> str:
            return str(graph.constant(f"{name}.{what}", np.asarray(values)))

        def node(kind: str, what: str, *values: str, **settings: int) -> str:
            return str(graph.node(kind, list(values), f"{name}.{what}", **settings))

        flat = node("Flatten", "in", value)
        pads = constant("pads", [0, 0, 0, 1])
        # One additional input of 0 stands for all inputs beyond the edges.
        padded = node("Pad", "padded", flat, pads)
        neurons = self.slab.windows.reshape(-1)
        local = np.where(neurons < 0, len(self.slab.needs), np.searchsorted(self.slab.needs, neurons))
        seen = node("Gather", "seen", padded, constant("at", local), axis=1)
        shaped = node("Reshape", "windows", seen, constant("shape", [0, count, 1, window]))
        weights, biases = (np.asarray(self.ops.host(values)) for values in self.w)
        product = node("MatMul", "product", shaped, constant("weight", weights.transpose(0, 2, 1)))
        added = node("Add", "added", product, constant("bias", biases[:, None]))
        joined = node("Reshape", "joined", added, constant("joined.shape", [0, count * rows]))
        cells = np.argsort(self.slab.cells.reshape(-1), kind="stable")
        ordered = node("Gather", "ordered", joined, constant("order", cells), axis=1)
        shape = graph.constant(f"{name}.out", np.array([0, *self.layer.out_shape]))
        return str(graph.node("Reshape", [ordered, shape], name))
