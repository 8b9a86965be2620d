"""Operations of partitioned quasi-Newton methods that C computes faster than NumPy."""

from __future__ import annotations

import numpy as np

from psmpi.backend import CompiledOps
from psmpi.backend.compiled import function, pointers
from psmpi.optim.curvature.reference import CurvatureOps
from psmpi.optim.curvature.restriction import Restriction


class CompiledCurvature(CurvatureOps):
    """Curvature operations in C, with scratch memory for products."""

    def __init__(self, ops: CompiledOps) -> None:
        super().__init__(ops)
        self.instructions = ops.instructions
        self.scratch: dict[np.dtype, np.ndarray] = {}

    def row_dots(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        out = np.empty(len(a))
        function("row_dots", a.dtype, "nnppp", self.instructions)(*a.shape, *pointers(a.dtype, a, b), out.ctypes.data)
        return out

    def products(
        self,
        pairs: np.ndarray,
        middle: np.ndarray,
        sigma: np.ndarray,
        coefficients: np.ndarray,
        v: np.ndarray,
        out: np.ndarray,
    ) -> None:
        call = function("element_products", pairs.dtype, "nnnppppppp", self.instructions)
        weights = self._scratch(pairs.shape[1], pairs.dtype)
        numbers = pointers(np.dtype(np.float64), middle, sigma, coefficients)
        call(*pairs.shape, *pointers(pairs.dtype, pairs), *numbers, *pointers(pairs.dtype, weights, v, out))

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
        call = function("restricted_products", pairs.dtype, "nnnpppppppppp", self.instructions)
        work = self._scratch(2 * pairs.shape[2] + pairs.shape[1], pairs.dtype)
        where = pointers(np.dtype(np.int64), elements.sizes, elements.starts, elements.down.table)
        numbers = pointers(np.dtype(np.float64), middle, sigma, coefficients)
        q.fill(0)
        call(*pairs.shape, *where, *pointers(pairs.dtype, pairs), *numbers, *pointers(pairs.dtype, work, p, q))

    def _scratch(self, size: int, dtype: np.dtype) -> np.ndarray:
        """Return scratch memory (at least size,) for products, which grows as needed."""
        if self.scratch.get(dtype, np.empty(0)).size < size:
            self.scratch[dtype] = np.empty(size, dtype)
        return self.scratch[dtype]
