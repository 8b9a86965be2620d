"""Operations of partitioned quasi-Newton methods in NumPy, written to be obviously right.

`pairs` are the matrices Z_e of `ElementOperators`, (count, rows, size). Vectors of the elements are (count, size) of
the same dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.backend.reference import exponent_of
from psmpi.optim.curvature.restriction import Restriction


class CurvatureOps:
    """Curvature operations on arrays of `ops`."""

    def __init__(self, ops: NumpyOps) -> None:
        self.ops = ops

    def restriction(self, runs: Sequence[Sequence[tuple[int, int]]], size: int) -> Restriction:
        """Return U_e of elements whose variables are `runs` (start, stop) of a vector; size: most variables of one."""
        return Restriction(runs, size, self.ops)

    def row_dots(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Return the scalar products (count,) float64 of the rows of a and b (count, n), summed in float64."""
        dots: np.ndarray = np.einsum("ei,ei->e", a, b, dtype=np.float64, casting="same_kind")
        return dots

    @np.errstate(all="ignore")
    def pair_dots(self, pairs: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Return Z v (count, rows) float64 in host memory; pairs: Z (count, rows, size), v: (count, size)."""
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
        """Compute out = sigma v + Z^T (middle Z v) and coefficients = Z v for each element.

        pairs: the matrices Z (count, rows, size); v, out: (count, size) of the same dtype; middle (count, rows, rows),
        sigma (count,) and coefficients (count, rows) float64.
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
        """Compute q = sum_e U_e^T B_e U_e p; `products` describes the other arguments."""
        v, out = elements.rows(p.dtype)
        elements.restrict(p, v)
        self.products(pairs, middle, sigma, coefficients, v, out)
        elements.accumulate(out, q)

    def keep_pairs(
        self, pairs: np.ndarray, slots: np.ndarray, cleared: np.ndarray, s: np.ndarray, y: np.ndarray
    ) -> None:
        """Store s[e] in row slots[e] and y[e] in row memory + slots[e] of each element e of pairs.

        pairs: (count, 2 memory, size); s, y: (count, size); slots: (count,) int64 in host memory, -1 to store nothing;
        cleared: (count,) bool in host memory, elements whose other rows become zeros.
        """
        pairs[cleared] = 0
        stored = np.flatnonzero(slots >= 0)
        pairs[stored, slots[stored]] = s[stored]
        pairs[stored, pairs.shape[1] // 2 + slots[stored]] = y[stored]

    def mix_rows(self, a: np.ndarray, x: np.ndarray, b: np.ndarray, y: np.ndarray) -> None:
        """Compute y = a x + b y in place; x, y: (count, size), a, b: (count,) float64 in host memory."""
        y *= b.astype(y.dtype)[:, None]
        y += a.astype(x.dtype)[:, None] * x

    def term_weights(
        self,
        grad: np.ndarray,
        labels: np.ndarray,
        report: np.ndarray,
        own: int,
        other_classes: np.ndarray,
        own_label_factors: np.ndarray,
        other_label_factors: np.ndarray,
        out: np.ndarray,
    ) -> None:
        """Compute derivatives of single terms of a pairwise loss with respect to the score of class number `own`.

        grad: (classes, b) float64 and report, both as in `Loss.fused`; labels: (b,); other_classes: (terms,) int64;
        own_label_factors, other_label_factors: (terms,) of the dtype of out. Row t of out (terms, at least b) has three
        kinds of columns. Samples of class `own`: own_label_factors[t] times the derivative with respect to the score of
        other_classes[t]. Samples of class other_classes[t]: other_label_factors[t] times the derivative with respect to
        the score of `own`. All other columns: 0. The derivatives are scaled down as in `cast_scores`.
        """
        b = grad.shape[1]
        small = np.ldexp(grad, -exponent_of(report[3])).astype(out.dtype)
        np.multiply(small[other_classes], labels == own, out=out[:, :b])
        out[:, :b] *= own_label_factors[:, None]
        out[:, :b] += small[own] * (labels == other_classes[:, None]) * other_label_factors[:, None]
        out[:, b:] = 0

    def moment_scale(
        self, g: np.ndarray, squares: np.ndarray, root: np.ndarray, beta2: float, correction: float, eps: float
    ) -> None:
        """Compute squares = beta2 squares + (1 - beta2) g^2, and root from it; g, squares, root: (n,).

        root = 1 / sqrt(sqrt(squares / correction) + eps).
        """
        np.multiply(g, g, out=root)
        root *= 1 - beta2
        squares *= beta2
        squares += root
        np.divide(squares, root.dtype.type(correction), out=root)
        np.sqrt(root, out=root)
        root += eps
        np.sqrt(root, out=root)
        np.divide(1, root, out=root)
