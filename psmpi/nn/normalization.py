"""Batch normalization of a part: where its scales and shifts lie in the local vector, forward and backward."""

from __future__ import annotations

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.layout import Layout, Runs
from psmpi.nn.network import BatchNorm

# Added to a variance: Ioffe and Szegedy's epsilon, with the value that most libraries give it.
EPS = 1e-5


class NormPart:
    """x (units, ..., b) -> y = activation(gamma (x - mean) / sqrt(variance + EPS) + beta), unit by unit.

    The normalized values take the place of x where the model says that nobody else needs it, else a buffer's.
    """

    def __init__(self, layer: BatchNorm, layout: Layout, part: Runs, kept: np.ndarray, ops: NumpyOps, dtype: np.dtype):
        self.layer, self.ops, self.units = layer, ops, int(kept.sum())
        # (units, where their gammas begin, where their betas do): runs of units that lie side by side in both.
        self.runs: list[tuple[slice, int, int]] = []
        if layer.affine:
            names = [p.name for p in layout.parameters]
            local = np.cumsum(kept) - 1
            weight, bias = (names.index(f"{layer.name}.{kind}") for kind in ("weight", "bias"))
            betas = {p.first: p.offset for p in layout.pieces() if p.parameter == bias}
            for piece in layout.pieces():
                if piece.parameter == weight and kept[piece.first]:
                    first, count = int(local[piece.first]), piece.last - piece.first
                    starts = (part.local(at, at + count).start for at in (piece.offset, betas[piece.first]))
                    self.runs.append((slice(first, first + count), *starts))
        else:
            self.runs.append((slice(0, self.units), 0, 0))
        self.scale = ops.empty(self.units, dtype)
        self.own = ops.empty(0, dtype)
        # Statistics to be used instead of the minibatch's: means and scales (units,) each. While these are found, means
        # and variances (2, units) of each minibatch seen.
        self.fixed: tuple[np.ndarray, np.ndarray] | None = None
        self.seen: list[np.ndarray] | None = None
        # What stands for scales and shifts that the layer has not: 1 and 0, whose gradients go nowhere.
        count = 0 if layer.affine else self.units
        self.ones, self.zeros, self.dones, self.dzeros = (ops.zeros(count, dtype) for _ in range(4))
        self.ones += 1

    def arrays(self) -> list[np.ndarray]:
        """What it holds besides weights and the model's activations."""
        return [self.scale, self.own, self.ones, self.zeros, self.dones, self.dzeros]

    def bind(self, w: np.ndarray, g: np.ndarray | None) -> None:
        self.w = [self._pair(w, run, self.ones, self.zeros) for run in self.runs]
        self.g = [] if g is None else [self._pair(g, run, self.dones, self.dzeros) for run in self.runs]

    def _pair(
        self, vector: np.ndarray, run: tuple[slice, int, int], one: np.ndarray, zero: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        if not self.layer.affine:
            return one, zero
        units, gamma, beta = run
        count = units.stop - units.start
        return vector[gamma : gamma + count], vector[beta : beta + count]

    def reserve(self, size: int) -> None:
        """Make room for `size` normalized values; 0 where they take the place of x."""
        if size != self.own.size:
            self.own = self.ops.empty(size, self.scale.dtype)

    def forward(self, x: np.ndarray, y: np.ndarray, activation: str) -> None:
        normal = self._normal(x)
        if self.fixed is not None:
            mean, scale = self.fixed
            normal[...] = x.reshape(normal.shape)
            normal -= mean[:, None]
            normal *= scale[:, None]
        else:
            # They may take the place of x.
            means = self.ops.host(x.reshape(normal.shape).mean(axis=1)) if self.seen is not None else None
            self.ops.normalize(x.reshape(normal.shape), EPS, normal, self.scale)
            if self.seen is not None and means is not None:
                self.seen.append(np.stack([means, self.ops.host(self.scale) ** -2.0 - EPS]))
        rows = y.reshape(normal.shape)
        for (units, *_), (gamma, beta) in zip(self.runs, self.w, strict=True):
            self.ops.affine(normal[units], gamma, beta, activation, rows[units])

    def backward(self, x: np.ndarray, y: np.ndarray, dy: np.ndarray, activation: str) -> None:
        """dy, of y, becomes the gradient of the x of the last forward, whose normalized values are used up."""
        normal, rows = self._normal(x), (self.units, -1)
        ys, ds = y.reshape(rows), dy.reshape(rows)
        for (units, *_), (gamma, _), (dgamma, dbeta) in zip(self.runs, self.w, self.g, strict=True):
            self.ops.normalize_back(
                normal[units], self.scale[units], gamma, ys[units], ds[units], activation, dgamma, dbeta
            )

    def fix(self) -> None:
        """From now on use the statistics of all minibatches seen together, each counting alike."""
        assert self.seen
        means, variances = np.stack(self.seen, axis=1)
        mean, variance = means.mean(axis=0), variances.mean(axis=0) + means.var(axis=0)
        mean, scale = (values.astype(self.scale.dtype) for values in (mean, 1 / np.sqrt(variance + EPS)))
        self.fixed, self.seen = (self.ops.put(mean), self.ops.put(scale)), None

    def _normal(self, x: np.ndarray) -> np.ndarray:
        """Where the normalized values of x are, (units, ...)."""
        return (self.own[: x.size] if self.own.size else x).reshape(self.units, -1)
