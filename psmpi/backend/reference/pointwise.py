"""Bias, activation, normalization, pooling, image moves, and weights of samples."""

from __future__ import annotations

import numpy as np

from psmpi.backend.reference.arrays import CHUNK, Arrays
from psmpi.backend.reference.gelu import FAR, normal_law

# Length of a float32 sum that loses few digits; longer sums accumulate such sums in float64.
SHORT = 1 << 10
# Pooling sums windows of more rows than this in float64.
FEW_ROWS = 8


class Pointwise(Arrays):
    """Operations on elements, rows and windows. `kind` and `activation`: identity, sigmoid, tanh or relu."""

    def add_bias(self, y: np.ndarray, bias: np.ndarray) -> None:
        """y (count, n, m) += bias (count, n), in place."""
        y += bias[:, :, None]

    def row_sums(self, y: np.ndarray, out: np.ndarray) -> None:
        """out (...,) = y (..., n) summed over its last axis."""
        np.sum(y, axis=-1, out=out)

    def finish(self, y: np.ndarray, bias: np.ndarray, kind: str) -> None:
        """y (count, n, m) = activation(y + bias (count, n)), in place."""
        self.add_bias(y, bias)
        self.activate(kind, y)

    def finish_back(self, y: np.ndarray, dy: np.ndarray, kind: str, dbias: np.ndarray | None) -> None:
        """dy (count, n, m) *= activation', in place, from the activation's output y.

        dbias: (count, n), filled with the sums of the new dy over m; None: no sums.
        """
        self.activate_back(kind, y, dy)
        if dbias is not None:
            self.row_sums(dy, dbias)

    def activate(self, kind: str, y: np.ndarray) -> None:
        """y = activation(y), in place."""
        if kind == "sigmoid":
            # sigmoid(y) = (1 + tanh(y / 2)) / 2: exp would overflow for very negative inputs.
            y *= 0.5
            np.tanh(y, out=y)
            y *= 0.5
            y += 0.5
        elif kind == "tanh":
            np.tanh(y, out=y)
        elif kind == "relu":
            np.maximum(y, 0, out=y)

    def activate_back(self, kind: str, y: np.ndarray, dy: np.ndarray) -> None:
        """dy *= activation'(x), in place, from the activation's output y; both contiguous."""
        if kind == "identity":
            return
        ys, ds = y.reshape(-1), dy.reshape(-1)
        # The derivative needs scratch, since y is kept for other layers; chunks of it stay in the cache.
        for first in range(0, ys.size, CHUNK):
            at = slice(first, min(first + CHUNK, ys.size))
            slope = self.scratch("slope", CHUNK, y.dtype)[: at.stop - at.start]
            if kind == "sigmoid":
                np.subtract(1, ys[at], out=slope)
                slope *= ys[at]
            elif kind == "tanh":
                np.multiply(ys[at], ys[at], out=slope)
                np.subtract(1, slope, out=slope)
            elif kind == "relu":
                np.sign(ys[at], out=slope)
            ds[at] *= slope

    def normalize(self, x: np.ndarray, eps: float, out: np.ndarray, scale: np.ndarray) -> None:
        """out (n, m) = (x - mean) scale, scale (n,) = 1 / sqrt(variance + eps), for each row of x (n, m).

        out may be x. The variance divides by m, not by m - 1. Batch normalization (Ioffe & Szegedy 2015).
        """
        m = x.shape[1]
        np.subtract(x, np.mean(x, axis=1)[:, None], out=out)
        # Subtract the mean again: its rounding error may be large compared with a small deviation.
        out -= np.mean(out, axis=1)[:, None]
        np.copyto(scale, row_dots(out, out) / m)
        scale += eps
        np.sqrt(scale, out=scale)
        np.divide(1, scale, out=scale)
        out *= scale[:, None]

    def affine(self, x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, kind: str, y: np.ndarray) -> None:
        """y (n, m) = activation(gamma (n,) x + beta (n,))."""
        np.multiply(x, gamma[:, None], out=y)
        y += beta[:, None]
        self.activate(kind, y)

    def normalize_back(
        self,
        x: np.ndarray,
        scale: np.ndarray,
        gamma: np.ndarray,
        y: np.ndarray,
        dy: np.ndarray,
        kind: str,
        dgamma: np.ndarray,
        dbeta: np.ndarray,
    ) -> None:
        """The adjoint of `normalize` followed by `affine`.

        x, scale, y: their outputs; x is overwritten. dy (n, m), the gradient of y, becomes the gradient of the input of
        `normalize`. dgamma, dbeta: (n,), filled with the gradients of gamma and beta.
        """
        m = x.shape[1]
        self.activate_back(kind, y, dy)
        np.copyto(dgamma, row_dots(dy, x))
        self.row_sums(dy[None], dbeta[None])
        x *= (dgamma / m)[:, None]
        dy -= x
        dy -= (dbeta / m)[:, None]
        dy *= (gamma * scale)[:, None]

    def layer_norm(
        self,
        x: np.ndarray,
        eps: float,
        gamma: np.ndarray,
        beta: np.ndarray,
        normal: np.ndarray,
        scale: np.ndarray,
        y: np.ndarray,
    ) -> None:
        """normal (n, m) = (x - mean) scale, scale (m,) = 1 / sqrt(variance + eps), for each column of x (n, m).

        y (n, m) = gamma (n,) normal + beta (n,). normal may be x. Layer normalization (Ba et al. 2016).
        """
        np.subtract(x, x.mean(axis=0), out=normal)
        # Subtract the mean again, because of its rounding error.
        normal -= normal.mean(axis=0)
        np.einsum("ij,ij->j", normal, normal, out=scale)
        scale /= len(x)
        scale += eps
        np.sqrt(scale, out=scale)
        np.divide(1, scale, out=scale)
        normal *= scale
        self.affine(normal, gamma, beta, "identity", y)

    def layer_norm_back(
        self,
        normal: np.ndarray,
        scale: np.ndarray,
        gamma: np.ndarray,
        dy: np.ndarray,
        dgamma: np.ndarray | None,
        dbeta: np.ndarray | None,
    ) -> None:
        """The adjoint of `layer_norm`: dy (n, m) becomes the gradient of x, in place.

        dgamma, dbeta: (n,), filled with the gradients of gamma and beta; both None if these are not wanted. Derived:
        dx = scale (d - mean(d) - normal mean(d normal)) with d = gamma dy.
        """
        if dgamma is not None and dbeta is not None:
            np.copyto(dgamma, row_dots(dy, normal))
            self.row_sums(dy[None], dbeta[None])
        dy *= gamma[:, None]
        along = np.einsum("ij,ij->j", dy, normal)
        along /= len(dy)
        dy -= dy.mean(axis=0)
        each = max(1, CHUNK // dy.shape[1])
        for first in range(0, len(dy), each):
            rows = slice(first, first + each)
            dy[rows] -= normal[rows] * along
        dy *= scale

    def gelu(self, x: np.ndarray, y: np.ndarray) -> None:
        """y = x Phi(x), with Phi the distribution function of the standard normal; x, y contiguous, of one shape.

        Hendrycks & Gimpel 2016.
        """
        xs, ys = x.reshape(-1), y.reshape(-1)
        for first in range(0, xs.size, SHORT):
            at = slice(first, first + SHORT)
            np.multiply(np.maximum(xs[at], -FAR[x.dtype]), normal_law(xs[at])[0], out=ys[at])

    def gelu_back(self, x: np.ndarray, dy: np.ndarray) -> None:
        """dy *= Phi(x) + x phi(x), in place, with phi the density of the standard normal; x, dy contiguous."""
        xs, ds = x.reshape(-1), dy.reshape(-1)
        for first in range(0, xs.size, SHORT):
            at = slice(first, first + SHORT)
            below, density = normal_law(xs[at])
            density *= np.clip(xs[at], -FAR[x.dtype], FAR[x.dtype])
            density += below
            ds[at] *= density

    def last_steps(self, x: np.ndarray, lengths: np.ndarray, y: np.ndarray) -> None:
        """y (units, b) = the last step of each sequence in x (units, steps, b). lengths: (b,) int32."""
        np.take(x.reshape(len(x), -1), _ends(lengths), axis=1, out=y, mode="clip")

    def last_steps_back(self, dy: np.ndarray, lengths: np.ndarray, dx: np.ndarray) -> None:
        """The adjoint of `last_steps`: dx (units, steps, b) = dy at the last steps, 0 elsewhere."""
        dx.fill(0)
        dx.reshape(len(dx), -1)[:, _ends(lengths)] = dy

    def row_factors(self, w: np.ndarray, eps: float, scale: float, out: np.ndarray) -> None:
        """out (count, n) = scale / sqrt(|row|^2 + eps) for the rows of w (count, n, m); NaN if |row|^2 overflows."""
        np.einsum("...j,...j->...", w, w, out=out)
        lost = np.isinf(out)
        out += eps
        np.sqrt(out, out=out)
        np.divide(scale, out, out=out)
        out[lost] = np.nan

    def project_rows(self, w: np.ndarray, factors: np.ndarray, scale: float, g: np.ndarray) -> None:
        """Project the rows of g (k, count, n, m) orthogonally to those of w (count, n, m), in place.

        g -= f^2 <g, w> w for each row, f = factors / scale, with factors (count, n) from `row_factors`. If g is the
        gradient of scale w / |w|, factors times the projected g is the gradient of w.
        """
        along = np.einsum("...j,...j->...", g, w)
        along *= (factors / scale) ** 2
        product = self.scratch("along", g.size, g.dtype)[: g.size].reshape(g.shape)
        np.multiply(along[..., None], w, out=product)
        g -= product

    def mean_pool(self, x: np.ndarray, size: int, y: np.ndarray, activation: str = "identity") -> None:
        """y (c, h // size, w // size, b) = activation(mean of x (c, h, w, b) over size x size windows)."""
        if size > FEW_ROWS:
            channels, rows, columns, batch = y.shape
            windows = x[:, : rows * size, : columns * size].reshape(channels, rows, size, columns, size, batch)
            np.mean(windows, axis=(2, 4), dtype=np.float64, out=y)
        else:
            first, *others = _windows(x, size, y)
            y[...] = first
            for window in others:
                y += window
            y *= 1 / size**2
        self.activate(activation, y)

    def mean_pool_back(self, dy: np.ndarray, size: int, dx: np.ndarray) -> None:
        dx.fill(0)
        for window in _windows(dx, size, dy):
            np.multiply(dy, 1 / size**2, out=window)

    def move_images(self, x: np.ndarray, moves: np.ndarray, reflect: bool, out: np.ndarray) -> None:
        """out (c, h, w, b) = the images x, flipped and shifted.

        moves: (3, b) int32 in host memory, for each image the rows to shift down, the columns to shift right (fewer
        than the image has), and 1 to flip it left to right first. Pixels from outside the image are 0, or with
        `reflect` mirrored at the edge without repeating the row or column at the edge.
        """
        _, height, width, batch = x.shape
        rows, columns = (np.arange(n)[:, None] - move for n, move in ((height, moves[0]), (width, moves[1])))
        inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))
        # Reflection: positions -1, 0, 1, ..., n - 1, n become 1, 0, 1, ..., n - 1, n - 2.
        rows, columns = (n - 1 - abs(n - 1 - abs(at)) for n, at in ((height, rows), (width, columns)))
        columns = np.where(moves[2], width - 1 - columns, columns)
        out[...] = x[:, rows[:, None], columns[None], np.arange(batch)]
        if not reflect:
            out *= inside

    def max_pool(self, x: np.ndarray, size: int, y: np.ndarray, activation: str = "identity") -> None:
        first, *others = _windows(x, size, y)
        y[...] = first
        for window in others:
            np.maximum(y, window, out=y)
        self.activate(activation, y)

    def max_pool_back(self, x: np.ndarray, y: np.ndarray, dy: np.ndarray, size: int, dx: np.ndarray) -> None:
        """dx = dy where x is the first largest entry of its window, 0 elsewhere. y, of the shape of dy, is scratch."""
        self.max_pool(x, size, y)
        dx.fill(0)
        for window, into in zip(_windows(x, size, y), _windows(dx, size, y), strict=True):
            hit = window == y
            np.copyto(into, dy, where=hit)
            # Later entries of the window that tie get no gradient: NaN is equal to nothing.
            np.copyto(y, np.nan, where=hit)

    def scale_samples(self, y: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
        """out (k, count, n, b) = y (count, n, b), each sample times its weight in weights (k, b)."""
        np.multiply(weights[:, None, None], y, out=out)

    @np.errstate(all="ignore")
    def weighted_sums(self, y: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
        """out (k, count, n) = the sums of y (count, n, b) over the samples, each times its weight in weights (k, b)."""
        out[...] = np.matmul(y, weights.T).transpose(2, 0, 1)


def row_dots(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The scalar products (n,) float64 of the rows of a and b (n, m): pieces in their dtype, their sum in float64."""
    dots = np.zeros(len(a))
    for first in range(0, a.shape[1], SHORT):
        at = slice(first, first + SHORT)
        dots += np.einsum("ij,ij->i", a[:, at], b[:, at])
    return dots


def _ends(lengths: np.ndarray) -> np.ndarray:
    """Positions (b,) of the sequences' last steps in the flattened axes (steps, b)."""
    return (lengths - 1) * len(lengths) + np.arange(len(lengths))


def _windows(x: np.ndarray, size: int, like: np.ndarray) -> list[np.ndarray]:
    h, w = like.shape[1] * size, like.shape[2] * size
    return [x[:, i:h:size, j:w:size] for i in range(size) for j in range(size)]
