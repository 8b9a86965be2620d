"""The NumPy operations, written to be obviously right.

Activations keep the minibatch last: an image array is (channels, height, width, batch), a feature array (features,
batch). So a class's channels, features and scores are contiguous rows, flattening is a reshape, and every copy below
runs along the batch. All arrays of one call share one dtype, float32 or float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from psmpi.backend.convolution import Convolution, Im2col, Stripes
from psmpi.backend.moves import Mirror, Restriction, Samples, Transfer

# Elements that stay in the second-level cache.
CHUNK = 1 << 18
# Below the 10,000 from which OpenBLAS splits a dot product over threads, so that sums do not depend on their number.
DOT = 1 << 13


def exponent_of(peak: float) -> int:
    """The power of two by which derivatives of this size are too large for a backward pass; 0 where they are not."""
    return int(np.frexp(peak)[1]) if peak > 2.0**20 else 0


def _pieces(n: int) -> Iterator[slice]:
    """Slices of at most DOT elements that cover n elements, in order."""
    for start in range(0, n, DOT):
        yield slice(start, min(start + DOT, n))


class NumpyOps:
    name = "numpy"
    # Minibatches of a multiple of this are the fastest.
    line = 1
    # Whether arrays are in a device's memory, and only mirrors of them in the host's.
    on_device = False
    # Elements of the windows that a convolution makes at a time: they stay in the second-level cache.
    chunk = CHUNK
    # What a device does one after the other.
    stream: Any = None

    def __init__(self) -> None:
        self.slopes: dict[np.dtype, np.ndarray] = {}
        self.rooms: dict[np.dtype, np.ndarray] = {}

    @property
    def description(self) -> str:
        """What a person is told of it."""
        return self.name

    @property
    def place(self) -> str:
        """The device, for people; nothing where it is the host."""
        return ""

    @property
    def bus(self) -> str:
        """What tells the device from others of the host; nothing where it is the host."""
        return ""

    @property
    def choices(self) -> list[str]:
        """What it found out about the sizes it met, and does since, a line each."""
        return []

    def empty(self, size: int, dtype: np.dtype) -> np.ndarray:
        """(size,), its contents undefined, beginning at a cache line."""
        room = np.empty(size * np.dtype(dtype).itemsize + 64, np.uint8)
        first = -room.ctypes.data % 64
        found: np.ndarray = room[first : first + size * np.dtype(dtype).itemsize].view(dtype)
        return found

    def zeros(self, size: int, dtype: np.dtype) -> np.ndarray:
        """(size,) zeros."""
        return np.zeros(size, dtype)

    def view(self, array: np.ndarray, start: int, shape: Sequence[int], steps: Sequence[int]) -> np.ndarray:
        """The elements of a contiguous array from `start` on, in this shape and at these steps, in elements."""
        flat = array.reshape(-1)
        return as_strided(flat[start:], shape, [step * flat.itemsize for step in steps])

    def address(self, array: np.ndarray) -> int:
        """Where the array begins."""
        return array.ctypes.data

    def mirror(self, array: np.ndarray) -> Mirror:
        """The array's image in host memory."""
        return Mirror(array)

    def host(self, array: np.ndarray) -> np.ndarray:
        """The array's values in host memory, perhaps the array itself."""
        return array

    def put(self, values: np.ndarray) -> np.ndarray:
        """An array of the backend with these values, perhaps the array itself."""
        return values

    def synchronize(self) -> None:
        """Wait until everything that was begun is done."""

    def compile(self, dtype: np.dtype) -> None:
        """Get the operations for a dtype ready, where that takes time."""

    def record(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, to be called again and again with few different arguments, all hashable.

        It must do the same operations on the same arrays each time it is called with the same arguments, none of them
        with the host, and return the same: a backend may record them once and play them back.
        """
        return work

    def apart(self) -> NumpyOps:
        """The same operations for work beside what is recorded: what they allocate moves nothing of that."""
        return self

    def samples(self, values: np.ndarray, scale: float) -> Samples:
        """Samples (n, features) to take minibatches from, times `scale`.

        An array of the backend's own is not copied: minibatches are of what it holds by then.
        """
        return Samples(values, scale)

    def fused(self, name: str) -> Callable[..., None] | None:
        """The operation `name` in one pass where this backend has it; None where it has only the reference's steps."""
        return getattr(self, name, None)

    def matmul(self, a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
        """out = a @ b over the last two axes, the others batched."""
        np.matmul(a, b, out=out)

    def add_bias(self, y: np.ndarray, bias: np.ndarray) -> None:
        """y (count, n, anything) += bias (count, n), in place."""
        y += bias[:, :, None]

    def row_sums(self, y: np.ndarray, out: np.ndarray) -> None:
        """out (...,) = y (..., n) summed over its last axis."""
        np.sum(y, axis=-1, out=out)

    def finish(self, y: np.ndarray, bias: np.ndarray, kind: str) -> None:
        """y (count, n, anything) = activation(y + bias (count, n)), in place."""
        self.add_bias(y, bias)
        self.activate(kind, y)

    def finish_back(self, y: np.ndarray, dy: np.ndarray, kind: str, dbias: np.ndarray | None) -> None:
        """dy (count, n, anything) *= activation', from its output y, in place; dbias (count, n) = the sums of dy."""
        self.activate_back(kind, y, dy)
        if dbias is not None:
            self.row_sums(dy, dbias)

    def normalize(self, x: np.ndarray, eps: float, out: np.ndarray, scale: np.ndarray) -> None:
        """out (n, m) = the rows of x (n, m) less their means, times scale (n,) = 1 / sqrt(their variance + eps).

        out may be x. The variance is that of the m values, not an estimate of a larger population's.
        """
        m = x.shape[1]
        np.mean(x, axis=1, out=scale)
        np.subtract(x, scale[:, None], out=out)
        np.einsum("ij,ij->i", out, out, out=scale)
        scale /= m
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
        """The adjoint of `normalize` and `affine`, from their outputs x, scale and y: dy (n, m) becomes the gradient of
        what was normalized, dgamma and dbeta (n,) are those of gamma and beta. x is used up.
        """
        m = x.shape[1]
        self.activate_back(kind, y, dy)
        np.einsum("ij,ij->i", dy, x, out=dgamma)
        self.row_sums(dy[None], dbeta[None])
        x *= (dgamma / m)[:, None]
        dy -= x
        dy -= (dbeta / m)[:, None]
        dy *= (gamma * scale)[:, None]

    def transfer(self, table: np.ndarray) -> Transfer:
        """Copies of runs, table (runs, 3) int64 of from, to and length, to be made again and again."""
        return Transfer(table)

    def restriction(self, runs: Sequence[Sequence[tuple[int, int]]], size: int) -> Restriction:
        """U_e of elements whose variables are these (start, stop) of a vector, `size` at most."""
        return Restriction(runs, size, self.transfer)

    def row_dots(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Scalar products (count,) float64 of the rows of a and b (count, n), sums in float64."""
        found: np.ndarray = np.einsum("ei,ei->e", a, b, dtype=np.float64, casting="same_kind")
        return found

    def products(
        self,
        pairs: np.ndarray,
        middle: np.ndarray,
        sigma: np.ndarray,
        coefficients: np.ndarray,
        v: np.ndarray,
        out: np.ndarray,
    ) -> None:
        """out = sigma v + Z^T (middle Z v) and coefficients = Z v for each element.

        pairs: (count, rows, size), the Z; v, out: (count, size) of their dtype; middle (count, rows, rows), sigma
        (count,) and coefficients (count, rows) float64.
        """
        coefficients[...] = np.matmul(pairs, v[:, :, None])[:, :, 0]
        weights = np.matmul(middle, coefficients[:, :, None]).astype(pairs.dtype)
        np.matmul(weights.transpose(0, 2, 1), pairs, out=out[:, None, :])
        out += v * sigma.astype(pairs.dtype)[:, None]

    def pair_dots(self, pairs: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Z v (count, rows) float64 in host memory, of pairs (count, rows, size) and v (count, size)."""
        return np.matmul(pairs, v[:, :, None])[:, :, 0].astype(np.float64)

    def keep_pairs(
        self, pairs: np.ndarray, slots: np.ndarray, cleared: np.ndarray, s: np.ndarray, y: np.ndarray
    ) -> None:
        """Element e's row slots[e] of pairs (count, 2 memory, size) = s[e], the one `memory` further = y[e].

        slots (count,) int64 in host memory, -1 for none; where cleared (count,) bool, also there, the other rows become
        zeros. s, y: (count, size).
        """
        pairs[cleared] = 0
        taken = np.flatnonzero(slots >= 0)
        pairs[taken, slots[taken]] = s[taken]
        pairs[taken, pairs.shape[1] // 2 + slots[taken]] = y[taken]

    def mix_rows(self, a: np.ndarray, x: np.ndarray, b: np.ndarray, y: np.ndarray) -> None:
        """y (count, size) = a x + b y, with a, b (count,) float64 in host memory."""
        y *= b.astype(y.dtype)[:, None]
        y += a.astype(x.dtype)[:, None] * x

    def term_weights(
        self,
        grad: np.ndarray,
        labels: np.ndarray,
        report: np.ndarray,
        own: int,
        others: np.ndarray,
        lost: np.ndarray,
        won: np.ndarray,
        out: np.ndarray,
    ) -> None:
        """The derivatives of single terms of a pairwise loss with respect to the score of class number `own`.

        grad (classes, b) float64 and report as in `Loss.fused`, labels (b,). Row t of out (terms, at least b): over the
        samples of `own` lost[t] times the derivative with respect to the score of others[t], over those of others[t]
        won[t] times that with respect to the own, 0 elsewhere; scaled down as by `cast_scores`. others (terms,) int64;
        lost, won (terms,) of the dtype of out.
        """
        b = grad.shape[1]
        small = np.ldexp(grad, -exponent_of(report[3])).astype(out.dtype)
        np.multiply(small[others], labels == own, out=out[:, :b])
        out[:, :b] *= lost[:, None]
        out[:, :b] += small[own] * (labels == others[:, None]) * won[:, None]
        out[:, b:] = 0

    def scale_samples(self, y: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
        """out (k, count, n, b) = y (count, n, b), each sample times its weight in weights (k, b)."""
        np.multiply(weights[:, None, None], y, out=out)

    def weighted_sums(self, y: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
        """out (k, count, n) = the sums of y (count, n, b) over the samples, each times its weight in weights (k, b)."""
        out[...] = np.matmul(y, weights.T).transpose(2, 0, 1)

    def restricted_products(
        self,
        elements: Restriction,
        pairs: np.ndarray,
        middle: np.ndarray,
        sigma: np.ndarray,
        coefficients: np.ndarray,
        p: np.ndarray,
        q: np.ndarray,
    ) -> None:
        """q = sum_e U_e^T B_e U_e p; the rest as in `products`."""
        v = np.zeros((len(elements.sizes), elements.size), p.dtype)
        out = np.zeros_like(v)
        elements.restrict(p, v)
        self.products(pairs, middle, sigma, coefficients, v, out)
        elements.accumulate(out, q)

    def convolution(
        self,
        stripes: Sequence[Stripes],
        in_shape: tuple[int, int, int],
        out_shape: tuple[int, int, int],
        kernel: int,
        stride: int,
        dtype: np.dtype,
        activation: str = "identity",
    ) -> Convolution:
        """A convolution of (channels, height, width) to (units, rows, columns) images, to be used again and again."""
        return Im2col(stripes, in_shape, out_shape, kernel, stride, dtype, activation, ops=self)

    def im2col(self, x: np.ndarray, stride: int, first: int, cols: np.ndarray) -> None:
        """Windows of x (c, h, w, b) with the given stride, for the output rows from `first` on.

        cols: (c, k, k, rows, width, b); cols[:, i, j] are the inputs that kernel entry (i, j) meets.
        """
        k, rows, width = cols.shape[1], cols.shape[3], cols.shape[4]
        for i in range(k):
            top = first * stride + i
            for j in range(k):
                cols[:, i, j] = x[:, top : top + stride * rows : stride, j : j + stride * width : stride]

    def col2im(self, cols: np.ndarray, stride: int, first: int, dx: np.ndarray) -> None:
        """The adjoint of im2col: adds cols into dx."""
        k, rows, width = cols.shape[1], cols.shape[3], cols.shape[4]
        for i in range(k):
            top = first * stride + i
            for j in range(k):
                dx[:, top : top + stride * rows : stride, j : j + stride * width : stride] += cols[:, i, j]

    def fold(self, w: np.ndarray, pool: int, out: np.ndarray) -> None:
        """A kernel followed by pool x pool mean pooling as one kernel: w (..., k, k) -> out (..., k+pool-1, k+pool-1).

        The mean of `pool` x `pool` shifted correlations is the correlation with the kernel smoothed by a box.
        """
        k = w.shape[-1]
        if pool == 1:
            out[...] = w
            return
        out.fill(0)
        for i in range(pool):
            for j in range(pool):
                out[..., i : i + k, j : j + k] += w
        out *= 1 / pool**2

    def unfold(self, dfolded: np.ndarray, pool: int, out: np.ndarray) -> None:
        """The adjoint of fold."""
        k = out.shape[-1]
        if pool == 1:
            out[...] = dfolded
            return
        out.fill(0)
        for i in range(pool):
            for j in range(pool):
                out += dfolded[..., i : i + k, j : j + k]
        out *= 1 / pool**2

    def _windows(self, x: np.ndarray, size: int, like: np.ndarray) -> list[np.ndarray]:
        h, w = like.shape[1] * size, like.shape[2] * size
        return [x[:, i:h:size, j:w:size] for i in range(size) for j in range(size)]

    def mean_pool(self, x: np.ndarray, size: int, y: np.ndarray, activation: str = "identity") -> None:
        """y (c, h // size, w // size, b) = activation(mean of x (c, h, w, b) over size x size windows)."""
        first, *others = self._windows(x, size, y)
        y[...] = first
        for window in others:
            y += window
        y *= 1 / size**2
        self.activate(activation, y)

    def mean_pool_back(self, dy: np.ndarray, size: int, dx: np.ndarray) -> None:
        dx.fill(0)
        for window in self._windows(dx, size, dy):
            np.multiply(dy, 1 / size**2, out=window)

    def max_pool(self, x: np.ndarray, size: int, y: np.ndarray, activation: str = "identity") -> None:
        first, *others = self._windows(x, size, y)
        y[...] = first
        for window in others:
            np.maximum(y, window, out=y)
        self.activate(activation, y)

    def max_pool_back(self, x: np.ndarray, y: np.ndarray, dy: np.ndarray, size: int, dx: np.ndarray) -> None:
        """dx: dy where x is a window's first largest entry, 0 elsewhere. y, of the shape of dy, is scratch."""
        self.max_pool(x, size, y)
        dx.fill(0)
        for window, into in zip(self._windows(x, size, y), self._windows(dx, size, y), strict=True):
            hit = window == y
            np.copyto(into, dy, where=hit)
            # A later entry of the same window may tie with this one: NaN equals nothing, so it cannot win again.
            np.copyto(y, np.nan, where=hit)

    def activate(self, kind: str, y: np.ndarray) -> None:
        """y = activation(y), in place."""
        if kind == "sigmoid":
            # exp would overflow for very negative inputs; tanh does not.
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
        # In chunks that stay in the cache: the derivative needs room, and other layers need y.
        for first in range(0, ys.size, CHUNK):
            at = slice(first, min(first + CHUNK, ys.size))
            slope = self._scratch(at.stop - at.start, y.dtype)
            if kind == "sigmoid":
                np.subtract(1, ys[at], out=slope)
                slope *= ys[at]
            elif kind == "tanh":
                np.multiply(ys[at], ys[at], out=slope)
                np.subtract(1, slope, out=slope)
            elif kind == "relu":
                np.sign(ys[at], out=slope)
            ds[at] *= slope

    def _scratch(self, size: int, dtype: np.dtype) -> np.ndarray:
        if dtype not in self.slopes:
            self.slopes[dtype] = np.empty(CHUNK, dtype)
        return self.slopes[dtype][:size]

    def cast_scores(self, grad: np.ndarray, out: np.ndarray, report: np.ndarray) -> None:
        """out = grad, over the power of two by which the report says that derivatives are too large."""
        exponent = exponent_of(report[3])
        np.copyto(out, np.ldexp(grad, -exponent) if exponent else grad, casting="same_kind")

    def give_back(self, g: np.ndarray, report: np.ndarray, limit: float) -> None:
        """g times that power of two, in place, limited to `limit` in each component."""
        exponent = exponent_of(report[3])
        if exponent:
            np.copyto(g, np.clip(np.ldexp(g.astype(np.float64), exponent), -limit, limit), casting="same_kind")

    def squared_norm(self, g: np.ndarray) -> float:
        """The squared Euclidean norm of g (n,), accumulated in float64; 0.0 for an empty vector.

        Any finite float32 is squared without overflow; float64 components must be below 2^511.
        """
        total = 0.0
        for start in range(0, g.size, DOT):
            piece = g[start : start + DOT].astype(np.float64, copy=False)
            total += float(np.dot(piece, piece))
        return total

    def scale(self, g: np.ndarray, factor: float) -> None:
        """g *= factor, in place, in the dtype of g."""
        g *= factor

    # On a device too, what overflows does so in silence.
    @np.errstate(over="ignore", invalid="ignore")
    def combine(self, out: np.ndarray, *terms: tuple[float, np.ndarray]) -> None:
        """out (n,) = the sum of factor * array over the terms, one or more, in their order; all (n,) of one dtype.

        Factors, products and sums are each rounded to the dtype: the bits of an element depend neither on where it
        lies nor, but for float32 numbers too small to be normal, on the backend. `out` may be the array of the first
        term, and of no other.
        """
        (first, start), *others = ((out.dtype.type(factor), array) for factor, array in terms)
        room = self._rooms(out.dtype)[0]
        for at in _pieces(out.size):
            into, product = out[at], room[: at.stop - at.start]
            if first == 1:
                np.copyto(into, start[at])
            elif first == -1:
                np.negative(start[at], out=into)
            else:
                np.multiply(start[at], first, out=into)
            for factor, array in others:
                if factor == 1:
                    into += array[at]
                elif factor == -1:
                    into -= array[at]
                else:
                    into += np.multiply(array[at], factor, out=product)

    def dots(self, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """The scalar products of pairs of vectors, (k,) float64 in host memory, accumulated in float64.

        All vectors are (n,) of one dtype. Pairs that share their first array should follow each other: it is then
        brought to the cache once a piece.
        """
        found = np.zeros(len(pairs))
        rooms = self._rooms(np.dtype(np.float64))
        for at in _pieces(pairs[0][0].size if pairs else 0):
            left, right = rooms[:, : at.stop - at.start]
            last: np.ndarray | None = None
            for k, (a, b) in enumerate(pairs):
                if a.dtype == np.float64:
                    found[k] += np.dot(a[at], b[at])
                    continue
                if a is not last:
                    np.copyto(left, a[at])
                    last = a
                np.copyto(right, b[at])
                found[k] += np.dot(left, right)
        return found

    def abs_sum(self, x: np.ndarray) -> float:
        """The sum of |x|, x (n,), accumulated in float64."""
        total, room = 0.0, self._rooms(x.dtype)[0]
        for at in _pieces(x.size):
            total += float(np.abs(x[at], out=room[: at.stop - at.start]).sum(dtype=np.float64))
        return total

    @np.errstate(over="ignore", invalid="ignore")
    def multiply(self, x: np.ndarray, by: np.ndarray) -> None:
        """x *= by, element by element; both (n,) of one dtype."""
        np.multiply(x, by, out=x)

    def _rooms(self, dtype: np.dtype) -> np.ndarray:
        """Scratch for two pieces of vectors, (2, DOT)."""
        if dtype not in self.rooms:
            self.rooms[dtype] = np.empty((2, DOT), dtype)
        return self.rooms[dtype]

    def moment_scale(
        self, g: np.ndarray, squares: np.ndarray, root: np.ndarray, beta2: float, correction: float, eps: float
    ) -> None:
        """squares moves towards g^2 by 1 - beta2; root = 1 / sqrt(sqrt(squares / correction) + eps); all (n,)."""
        np.multiply(g, g, out=root)
        root *= 1 - beta2
        squares *= beta2
        squares += root
        np.divide(squares, root.dtype.type(correction), out=root)
        np.sqrt(root, out=root)
        root += eps
        np.sqrt(root, out=root)
        np.divide(1, root, out=root)

    def sgd(self, w: np.ndarray, g: np.ndarray, rate: float, l2: float) -> bool:
        """One pass of w -= rate d with d = g + l2 w; all are (n,) of one dtype.

        False where this backend has no such pass: the optimizer then makes it in chunks. So in the others.
        """
        return False

    def momentum(
        self, w: np.ndarray, g: np.ndarray, v: np.ndarray, rate: float, beta: float, l2: float, nesterov: bool
    ) -> bool:
        """One pass of v = beta v + d, w -= rate v, or with nesterov w -= rate (d + beta v)."""
        return False

    def rmsprop(
        self, w: np.ndarray, g: np.ndarray, v: np.ndarray, rate: float, alpha: float, eps: float, l2: float
    ) -> bool:
        """One pass of v = alpha v + (1 - alpha) d^2, w -= rate d / (sqrt(v) + eps)."""
        return False

    def adam(
        self, w: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray, rate: float, root: float, beta1: float,
        beta2: float, eps: float, l2: float, keep: float,
    ) -> bool:  # fmt: skip
        """One pass of w = keep w - rate m / (root sqrt(v) + eps) after m and v have moved towards d = g + l2 w and d^2.

        All are (n,) of one dtype. False where this backend has no such pass: the optimizer then makes it in chunks.
        """
        return False

    def counted_adam(
        self, w: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray, t: np.ndarray, rate: float, beta1: float,
        beta2: float, eps: float, l2: float, keep: float,
    ) -> bool:  # fmt: skip
        """One pass of `adam` with the number of steps t of each weight, which grow by 1: w = keep w - rate m' /
        (sqrt(v') + eps) with m' = m / (1 - beta1^t), v' = v / (1 - beta2^t).
        """
        return False
