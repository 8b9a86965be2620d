"""Bias, activation, normalization, pooling, and weights of samples on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from psmpi.backend.gpu.device import Device
from psmpi.backend.gpu.grids import BLOCKS, SIDE, SIDE_ROWS, blocks

# Numbers of the activations in the kernels.
ACTIVATIONS = {"identity": 0, "sigmoid": 1, "tanh": 2, "relu": 3}


class DevicePointwise(Device):
    """Operations by the kernels of layers.cu, norm.cu, attention.cu and turn.cu."""

    def add_bias(self, y: Any, bias: Any) -> None:
        self.finish(y, bias, "identity")

    def row_sums(self, y: Any, out: Any) -> None:
        self.finish_back(y, y, "identity", out)

    def finish(self, y: Any, bias: Any, kind: str) -> None:
        count, n = bias.shape
        steps = (stride // bias.itemsize for stride in bias.strides)
        self.spread("finish", y.dtype, y.size, count, n, y.size // (count * n), y, bias, *steps, ACTIVATIONS[kind])

    def finish_back(self, y: Any, dy: Any, kind: str, dbias: Any) -> None:
        if dbias is None:
            self.activate_back(kind, y, dy)
            return
        count, n = dbias.shape
        m = dy.size // (count * n)
        splits = max(1, min(blocks(BLOCKS, count * n), blocks(m, 2048)))
        partial = self.partial(count * n * splits, dy.dtype)
        shape, grid = (count, n, m), (count * n, splits)
        self.launch("finish_back", dy.dtype, grid, (256,), *shape, y, dy, partial, splits, ACTIVATIONS[kind])
        steps = (stride // dbias.itemsize for stride in dbias.strides)
        self.spread("row_sums", dy.dtype, count * n, count, n, splits, partial, dbias, *steps)

    def activate(self, kind: str, y: Any) -> None:
        if kind != "identity":
            self.spread("activate", y.dtype, y.size, y.size, y, ACTIVATIONS[kind])

    def activate_back(self, kind: str, y: Any, dy: Any) -> None:
        if kind != "identity":
            self.spread("activate_back", y.dtype, y.size, y.size, y, dy, ACTIVATIONS[kind])

    def normalize(self, x: Any, eps: float, out: Any, scale: Any) -> None:
        n, m = x.shape
        self.launch("normalize", x.dtype, (n,), (256,), m, x, eps, out, scale)

    def affine(self, x: Any, gamma: Any, beta: Any, kind: str, y: Any) -> None:
        n, m = x.shape
        self.spread("affine", x.dtype, x.size, n, m, x, gamma, beta, ACTIVATIONS[kind], y)

    def normalize_back(
        self, x: Any, scale: Any, gamma: Any, y: Any, dy: Any, kind: str, dgamma: Any, dbeta: Any
    ) -> None:
        n, m = x.shape
        self.launch(
            "normalize_back", x.dtype, (n,), (256,), m, x, scale, gamma, y, dy, ACTIVATIONS[kind], dgamma, dbeta
        )

    def layer_norm(self, x: Any, eps: float, gamma: Any, beta: Any, normal: Any, scale: Any, y: Any) -> None:
        n, m = x.shape
        self.launch("layer_norm", x.dtype, (blocks(m, 32),), (32, 8), n, m, x, eps, gamma, beta, normal, scale, y)

    def layer_norm_back(self, normal: Any, scale: Any, gamma: Any, dy: Any, dgamma: Any, dbeta: Any) -> None:
        n, m = dy.shape
        if dgamma is not None:
            self.launch("layer_norm_sums", dy.dtype, (n,), (256,), m, normal, dy, dgamma, dbeta)
        self.launch("layer_norm_back", dy.dtype, (blocks(m, 32),), (32, 8), n, m, normal, scale, gamma, dy)

    def gelu(self, x: Any, y: Any) -> None:
        self.spread("gelu", x.dtype, x.size, x.size, x, y)

    def gelu_back(self, x: Any, dy: Any) -> None:
        self.spread("gelu_back", x.dtype, x.size, x.size, x, dy)

    def turn(self, values: Any, out: Any) -> None:
        rows, columns = values.shape
        grid = (blocks(rows, SIDE) * blocks(columns, SIDE),)
        self.launch("turn", values.dtype, grid, (SIDE, SIDE_ROWS), rows, columns, values, out)

    def softmax(self, s: Any, scale: float, causal: bool, heads: int, lengths: Any) -> None:
        count, steps, _ = s.shape
        given = 0 if lengths is None else lengths
        self.launch("softmax", s.dtype, (count * steps,), (128,), steps, heads, int(causal), scale, given, s)

    def softmax_back(self, p: Any, scale: float, dp: Any) -> None:
        count, steps, _ = p.shape
        self.launch("softmax_back", p.dtype, (count * steps,), (128,), steps, scale, p, dp)

    def last_steps(self, x: Any, lengths: Any, y: Any) -> None:
        units, steps, b = x.shape
        self.spread("last_steps", x.dtype, y.size, units, steps, b, x, lengths, y)

    def last_steps_back(self, dy: Any, lengths: Any, dx: Any) -> None:
        units, steps, b = dx.shape
        self.spread("last_steps_back", dx.dtype, dx.size, units, steps, b, dy, lengths, dx)

    def row_factors(self, w: Any, eps: float, scale: float, out: Any) -> None:
        count, n, m = w.shape
        steps = [stride // w.itemsize for stride in w.strides[:-1]]
        self.launch("row_factors", w.dtype, (count * n,), (256,), n, m, w, *steps, eps, scale, out)

    def project_rows(self, w: Any, factors: Any, scale: float, g: Any) -> None:
        many, count, n, m = g.shape
        own, its = ([stride // g.itemsize for stride in array.strides[:-1]] for array in (w, g))
        grid = (count * n, many)
        self.launch("project_rows", g.dtype, grid, (256,), n, m, w, *own, factors, scale, g, *its)

    def mean_pool(self, x: Any, size: int, y: Any, activation: str = "identity") -> None:
        self.spread("mean_pool", x.dtype, y.size, *x.shape, size, x, y, ACTIVATIONS[activation])

    def mean_pool_back(self, dy: Any, size: int, dx: Any) -> None:
        self.spread("mean_pool_back", dy.dtype, dx.size, *dx.shape, size, dy, dx)

    def move_images(self, x: Any, moves: np.ndarray, reflect: bool, out: Any) -> None:
        self.spread("move_images", x.dtype, x.size, *x.shape, self.put(moves), int(reflect), x, out)

    def max_pool(self, x: Any, size: int, y: Any, activation: str = "identity") -> None:
        self.spread("max_pool", x.dtype, y.size, *x.shape, size, x, y, ACTIVATIONS[activation])

    def max_pool_back(self, x: Any, y: Any, dy: Any, size: int, dx: Any) -> None:
        self.spread("max_pool_back", dy.dtype, dx.size, *x.shape, size, x, dy, dx)

    def scale_samples(self, y: Any, weights: Any, out: Any) -> None:
        many, b = weights.shape
        self.spread("scale_samples", y.dtype, out.size, many, y.size // b, b, y, weights, out)

    def weighted_sums(self, y: Any, weights: Any, out: Any) -> None:
        (count, n, b), steps = y.shape, (stride // out.itemsize for stride in out.strides)
        self.launch("weighted_sums", y.dtype, (count * n, len(weights)), (256,), n, b, y, weights, out, *steps)

    def position_sums(self, y: Any, out: Any) -> None:
        """out (n, b) = y (n, rows, columns, b) summed over its positions."""
        n, b = out.shape
        self.spread("position_sums", y.dtype, out.size, n, y.shape[1] * y.shape[2], b, y, out)
