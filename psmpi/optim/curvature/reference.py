"""The operations of partitioned quasi-Newton methods in NumPy, written to be obviously right.

`pairs` are the Z_e of `ElementOperators`, (count, rows, size), its elements' vectors (count, size) of the same dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.backend.reference import exponent_of
from psmpi.optim.curvature.restriction import Restriction


class CurvatureOps:
    """Beside the operations `ops`, on arrays of these."""

    def __init__(self, ops: NumpyOps) -> None:
        self.ops = ops

    def restriction(self, runs: Sequence[Sequence[tuple[int, int]]], size: int) -> Restriction:
        """U_e of elements whose variables are these (start, stop) of a vector, `size` at most."""
        return Restriction(runs, size, self.ops)

    def row_dots(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Scalar products (count,) float64 of the rows of a and b (count, n), sums in float64."""
        found: np.ndarray = np.einsum("ei,ei->e", a, b, dtype=np.float64, casting="same_kind")
        return found

    @np.errstate(all="ignore")
    def pair_dots(self, pairs: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Z v (count, rows) float64 in host memory, of pairs (count, rows, size) and v (count, size)."""
        products: np.ndarray = np.matmul(pairs, v[:, :, None])[:, :, 0].astype(np.float64)
        return products

    @np.errstate(all="ignore")
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
        v, out = elements.rows(p.dtype)
        elements.restrict(p, v)
        self.products(pairs, middle, sigma, coefficients, v, out)
        elements.accumulate(out, q)

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
