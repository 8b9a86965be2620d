"""Batch normalization (Ioffe and Szegedy 2015)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from psmpi.layout import Layout, Parameter, Runs
from psmpi.nn.layers.base import Initial, Layer, Part, Site, Stage
from psmpi.nn.layers.table import Table

# Added to a variance: Ioffe and Szegedy's epsilon, with the value that most libraries give it.
EPS = 1e-5


@dataclass(frozen=True)
class BatchNorm(Layer):
    """Batch normalization: each unit's values over the minibatch, normalized to mean 0 and variance 1, then affine.

    Evaluations normalize by the statistics of their minibatch too: the layer keeps no running statistics. affine: scale
    and shift of each unit are parameters; otherwise the layer has no parameters.
    """

    affine: bool

    couples = True
    exact = True
    keeps = True

    @classmethod
    def read(cls, table: Table, label: str, shape: tuple[int, ...]) -> list[Layer]:
        table.no_sequence(shape)
        return [cls(label, shape, shape, table.flag("affine"))]

    def parameters(self) -> tuple[Parameter, ...]:
        units = self.out_shape[0]
        names = ("weight", "bias") if self.affine else ()
        return tuple(Parameter(f"{self.name}.{name}", (units,), units) for name in names)

    def initial(self, kind: str, gain: float) -> dict[str, Initial]:
        return {f"{self.name}.weight": Initial("constant", 1.0)} if self.affine else {}

    def absorbs(self, following: Sequence[Layer], fold: bool) -> int:
        return int(bool(following and following[0].activation))

    @property
    def rank_sums(self) -> tuple[int, ...]:
        # Sums of the values, and their number; of the squared distances from the mean; of the gradients, and of the
        # gradients times the normalized values.
        units = self.out_shape[0]
        return units + 1, units, 2 * units

    def buffer_numbers(self, stage: Stage, batch: int, writable: bool, packed: bool) -> int:
        units = int(stage.outputs.sum())
        return units * (1 if self.affine else 5) + (0 if writable else stage.size * batch)

    def part(self, stage: Stage, site: Site) -> Part:
        return BatchNormPart(stage, site)


class BatchNormPart(Part):
    """Part of batch normalization: x -> y = activation(gamma (x - mean) / sqrt(variance + EPS) + beta), unit by unit.

    x, y: (units, ..., b). The normalized values overwrite x if nothing else needs x; otherwise they take an array of
    the pass.
    """

    def __init__(self, stage: Stage, site: Site):
        super().__init__(stage, site)
        assert isinstance(self.layer, BatchNorm)
        self.units, self.affine, self.total = int(stage.outputs.sum()), self.layer.affine, site.total
        self.runs = affine_runs(self.layer, site.layout, site.part, stage.outputs)
        # fixed: means and scales (units,) to use instead of the minibatch's. gathered: means and variances (2, units)
        # of each minibatch, while statistics are gathered.
        self.fixed: tuple[np.ndarray, np.ndarray] | None = None
        self.gathered: list[np.ndarray] | None = None
        # Scales 1 and shifts 0 of a layer without parameters, and unused arrays for their gradients.
        count = 0 if self.affine else self.units
        self.ones, self.zeros, self.dones, self.dzeros = (self.ops.zeros(count, self.dtype) for _ in range(4))
        self.ones += 1

    def arrays(self) -> list[np.ndarray]:
        return [self.ones, self.zeros, self.dones, self.dzeros]

    def bind(self, w: np.ndarray, g: np.ndarray | None) -> None:
        self.w = self.views(w) if self.affine else [(self.ones, self.zeros)]
        self.g = None if g is None else self.views(g)

    def views(self, vector: np.ndarray) -> Any:
        """Return scales and shifts of each run of units, (units of the run,) each."""
        if not self.affine:
            return [(self.dones, self.dzeros)]
        counts = [units.stop - units.start for units, _, _ in self.runs]
        return [
            (vector[gamma : gamma + n], vector[beta : beta + n])
            for (_, gamma, beta), n in zip(self.runs, counts, strict=True)
        ]

    def room(self, batch: int, writable: bool) -> Any:
        """Return arrays for 1 / sqrt(variance + EPS) (units,), and for the normalized values unless in x."""
        own = self.ops.empty(0 if writable else self.size * batch, self.dtype)
        return self.ops.empty(self.units, self.dtype), own

    def forward(self, x: np.ndarray, y: np.ndarray | None, room: Any) -> tuple[np.ndarray, Any]:
        assert y is not None
        scale, own = room
        normal = (own[: x.size] if own.size else x).reshape(self.units, -1)
        count = 0
        if self.fixed is not None:
            mean, factor = self.fixed
            normal[...] = x.reshape(normal.shape)
            normal -= mean[:, None]
            normal *= factor[:, None]
        else:
            # The normalized values may overwrite x, so its means are computed first.
            means = None
            if self.gathered is not None:
                means = self.ops.host(x.reshape(normal.shape).mean(axis=1, dtype=np.float64))
            if self.total is None:
                self.ops.normalize(x.reshape(normal.shape), EPS, normal, scale)
            else:
                count = self._normalize_together(x.reshape(normal.shape), normal, scale)
            if self.gathered is not None and means is not None:
                self.gathered.append(np.stack([means, self.ops.host(scale).astype(np.float64) ** -2.0 - EPS]))
        rows = y.reshape(normal.shape)
        for (units, *_), (gamma, beta) in zip(self.runs, self.w, strict=True):
            self.ops.affine(normal[units], gamma, beta, self.activation, rows[units])
        return y, (scale, normal, count)

    def _normalize_together(self, x: np.ndarray, out: np.ndarray, scale: np.ndarray) -> int:
        """Normalize as `ops.normalize`, by statistics of all ranks' slices; return their number of values per unit."""
        assert self.total is not None
        sums = np.append(x.sum(axis=1, dtype=np.float64), x.shape[1])
        self.total(sums)
        count = sums[-1]
        np.subtract(x, (sums[:-1] / count)[:, None], out=out, casting="same_kind")
        squares = np.einsum("ij,ij->i", out, out, dtype=np.float64)
        self.total(squares)
        scale[...] = 1 / np.sqrt(squares / count + EPS)
        out *= scale[:, None]
        return int(count)

    def backward(
        self, x: np.ndarray, y: np.ndarray, kept: Any, dy: np.ndarray, dx: np.ndarray | None, into: Any
    ) -> np.ndarray:
        # Backward overwrites the normalized values.
        (scale, normal, count), rows = kept, (self.units, -1)
        ys, ds = y.reshape(rows), dy.reshape(rows)
        into = self._unwanted() if into is None else into
        if self.total is not None:
            self._back_together(normal, scale, count, ys, ds, into)
            return dy
        for (units, *_), (gamma, _), (dgamma, dbeta) in zip(self.runs, self.w, into, strict=True):
            self.ops.normalize_back(
                normal[units], scale[units], gamma, ys[units], ds[units], self.activation, dgamma, dbeta
            )
        return dy

    def _back_together(
        self, normal: np.ndarray, scale: np.ndarray, count: int, y: np.ndarray, dy: np.ndarray, into: Any
    ) -> None:
        """Compute `ops.normalize_back` with sums over all ranks; dgamma and dbeta get the shares of this slice."""
        assert self.total is not None
        self.ops.activate_back(self.activation, y, dy)
        sums = np.concatenate(
            [np.einsum("ij,ij->i", dy, normal, dtype=np.float64), dy.sum(axis=1, dtype=np.float64)]
        ).reshape(2, -1)
        for (units, *_), pair in zip(self.runs, into, strict=True):
            for sum_of_units, gradient in zip(sums, pair, strict=True):
                gradient[...] = sum_of_units[units]
        self.total(sums.reshape(-1))
        dgamma, dbeta = (sums / count).astype(self.dtype)
        normal *= dgamma[:, None]
        dy -= normal
        dy -= dbeta[:, None]
        for (units, *_), (gamma, _) in zip(self.runs, self.w, strict=True):
            dy[units] *= (gamma * scale[units])[:, None]

    def _unwanted(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return workspace arrays for gradients of scales and shifts that are not needed."""
        return [(self.space.take("dgamma", len(gamma)), self.space.take("dbeta", len(gamma))) for gamma, _ in self.w]

    def gather_statistics(self) -> None:
        self.fixed, self.gathered = None, []

    def fix_statistics(self) -> None:
        assert self.gathered
        means, variances = np.stack(self.gathered, axis=1)
        mean, variance = means.mean(axis=0), variances.mean(axis=0) + means.var(axis=0)
        mean, scale = (values.astype(self.dtype) for values in (mean, 1 / np.sqrt(variance + EPS)))
        self.fixed, self.gathered = (self.ops.put(mean), self.ops.put(scale)), None

    def statistics(self) -> dict[str, np.ndarray]:
        if self.fixed is None:
            return {}
        mean, scale = (self.ops.host(values) for values in self.fixed)
        variance = (scale.astype(np.float64) ** -2.0 - EPS).astype(self.dtype)
        return {f"{self.layer.name}.mean": mean, f"{self.layer.name}.variance": variance}

    def export(self, graph: Any, value: str) -> str:
        """Add the layer with fixed statistics to an ONNX graph; raise ValueError if the statistics are not fixed."""
        if self.fixed is None:
            raise ValueError(f"{self.layer.name} has no fixed statistics: calibrate the model first")
        name, shape = self.layer.name, (-1, *(1,) * (len(self.shape) - 1))
        mean, scale = (self.ops.host(values).reshape(shape) for values in self.fixed)
        apart = graph.node("Sub", [value, graph.constant(f"{name}.mean", mean)], f"{name}.apart")
        return export_affine(
            graph, self, graph.node("Mul", [apart, graph.constant(f"{name}.scale", scale)], f"{name}.normal")
        )


def affine_runs(layer: Layer, layout: Layout, part: Runs, kept: np.ndarray) -> list[tuple[slice, int, int]]:
    """Return runs of units that are contiguous in both parameters: (units, start of scales, start of shifts), in order.

    units: a slice that counts the units `kept` only. Starts are places in the local vector. A layer without parameters
    has one run of all its units.
    """
    if not layer.parameters():
        return [(slice(0, int(kept.sum())), 0, 0)]
    names, local = [p.name for p in layout.parameters], np.cumsum(kept) - 1
    weight, bias = (names.index(f"{layer.name}.{kind}") for kind in ("weight", "bias"))
    shifts = {p.first: p.offset for p in layout.by_parameter[bias]}
    runs = []
    for piece in layout.pieces():
        if piece.parameter == weight and kept[piece.first]:
            first, count = int(local[piece.first]), piece.last - piece.first
            gamma, beta = (part.local(at, at + count).start for at in (piece.offset, shifts[piece.first]))
            runs.append((slice(first, first + count), gamma, beta))
    return sorted(runs, key=lambda run: run[0].start)


def export_affine(graph: Any, part: Part, value: str) -> str:
    """Add the scales and shifts of a normalization to an ONNX graph; return the name of the output."""
    name, shape = part.layer.name, (-1, *(1,) * (len(part.shape) - 1))
    gamma, beta = (np.concatenate([pair[k] for pair in part.w]).reshape(shape) for k in (0, 1))
    scaled = graph.node("Mul", [value, graph.constant(f"{name}.gamma", gamma)], f"{name}.scaled")
    return str(graph.node("Add", [scaled, graph.constant(f"{name}.beta", beta)], name))
