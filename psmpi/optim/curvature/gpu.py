"""Operations of partitioned quasi-Newton methods on a GPU: kernels of elements.cu and optim.cu."""

from __future__ import annotations

from typing import Any

import numpy as np

from psmpi.backend import CupyOps
from psmpi.backend.gpu.grids import BLOCKS, blocks
from psmpi.optim.curvature.reference import CurvatureOps


class CupyCurvature(CurvatureOps):
    """Curvature operations on a GPU; `ops` provides the scratch memory."""

    ops: CupyOps

    def pair_dots(self, pairs: Any, v: Any) -> np.ndarray:
        count, rows, size = pairs.shape
        if not count * size:
            return np.zeros((count, rows))
        dots = self.ops.small_mirror("dots", count * rows, np.dtype(np.float64))
        self._dots(pairs, v, dots.array)
        dots.fetch(slice(0, count * rows))
        dots.wait()
        products: np.ndarray = dots.host[: count * rows].reshape(count, rows).copy()
        return products

    def row_dots(self, a: Any, b: Any) -> np.ndarray:
        return self.pair_dots(a.reshape(len(a), 1, -1), b)[:, 0]

    def _dots(self, pairs: Any, v: Any, out: Any) -> None:
        """Compute out (count * rows,) float64 = Z v."""
        count, rows, size = pairs.shape
        # The number of splits depends on `size` only: the number of elements depends on the number of ranks, and sums
        # must not.
        splits = min(BLOCKS, blocks(size, 2048))
        partial = self.ops.partial(count * rows * splits, np.dtype(np.float64))
        self.ops.launch("pair_dots", v.dtype, (count * rows, splits), (256,), rows, size, pairs, v, partial)
        self.ops.spread("pair_sums", v.dtype, count * rows, count * rows, splits, partial, out)

    def products(self, pairs: Any, middle: Any, sigma: Any, coefficients: Any, v: Any, out: Any) -> None:
        count, rows, size = pairs.shape
        if not count * size:
            return
        self._dots(pairs, v, coefficients)
        weights = self.ops.scratch("weights", count * rows, np.dtype(np.float64))
        self.ops.spread("pair_weights", v.dtype, count * rows, count, rows, middle, coefficients, weights)
        arrays = (pairs, sigma, weights, v, out)
        self.ops.spread("pair_combine", v.dtype, count * size, count, rows, size, *arrays)

    def keep_pairs(self, pairs: Any, slots: np.ndarray, cleared: np.ndarray, s: Any, y: Any) -> None:
        count, rows, size = pairs.shape
        where = (self.ops.upload("slots", slots), self.ops.upload("cleared", cleared.view(np.uint8)))
        self.ops.spread("keep_pairs", s.dtype, count * size, count, rows // 2, size, *where, s, y, pairs)

    def mix_rows(self, a: np.ndarray, x: Any, b: np.ndarray, y: Any) -> None:
        first, second = self.ops.upload("factors of x", a), self.ops.upload("factors of y", b)
        self.ops.spread("mix_rows", x.dtype, x.size, *x.shape, first, x, second, y)

    def term_weights(
        self,
        grad: Any,
        labels: Any,
        report: Any,
        own: int,
        other_classes: Any,
        own_label_factors: Any,
        other_label_factors: Any,
        out: Any,
    ) -> None:
        shape = (len(other_classes), grad.shape[1], out.shape[1])
        self.ops.spread(
            "term_weights",
            out.dtype,
            out.size,
            *shape,
            grad,
            labels,
            report,
            own,
            other_classes,
            own_label_factors,
            other_label_factors,
            out,
        )

    def moment_scale(self, g: Any, squares: Any, root: Any, beta2: float, correction: float, eps: float) -> None:
        self.ops.spread("moment_scale", g.dtype, g.size, g.size, g, squares, root, beta2, correction, eps)
