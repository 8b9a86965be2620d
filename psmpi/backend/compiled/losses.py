"""Losses of tiles of classes, in C: a tile is some of the classes."""

from __future__ import annotations

import numpy as np

from psmpi.backend.compiled.library import function, pointers
from psmpi.backend.reference.arrays import Arrays

# Numbers of the losses in the C kernel.
KINDS = {"psl": 0, "logistic": 1, "nll": 2, "squared": 3, "bce": 4}


class CompiledLosses(Arrays):
    """Passes over the scores (classes, b) of a tile of classes."""

    instructions: int

    def class_terms(
        self,
        name: str,
        scores: np.ndarray,
        labels: np.ndarray,
        scale: float,
        kappa: float,
        offset: float,
        given: np.ndarray | None,
        rest: np.ndarray,
    ) -> tuple[float, float] | None:
        """Return the scaled loss, and the largest margin (psl) or absolute score (squared); see `Loss.terms`.

        Return None for losses without a kernel. scores (classes, b) become derivatives. labels: (b,), counted from the
        first of these classes. rest: (b,) float64, filled for losses with a sum of terms. Terms have the dtype of the
        scores; sums over few classes in this dtype are summed in float64. psl has no tangent here.
        """
        if name not in KINDS:
            return None
        classes, b = scores.shape
        labels = np.ascontiguousarray(labels, np.int64)
        sums = np.empty(2)
        known = None if given is None else pointers(np.dtype(np.float64), given)[0]
        call = function("class_terms", scores.dtype, "iinpppdddpp", self.instructions)
        call(
            KINDS[name], classes, b, *pointers(scores.dtype, scores), labels.ctypes.data, known, scale, kappa, offset,
            *pointers(np.dtype(np.float64), rest, sums),
        )  # fmt: skip
        return float(sums[0]), float(sums[1])

    def class_normalizers(self, scores: np.ndarray, top: np.ndarray, sums: np.ndarray) -> None:
        """Update the normalizers of softmax with the scores (classes, b) of one more tile.

        top: (b,) float64, the largest scores. sums: (b,) float64, the sums of exponentials relative to them.
        """
        call = function("class_normalizers", scores.dtype, "inppp", self.instructions)
        call(*scores.shape, *pointers(scores.dtype, scores), *pointers(np.dtype(np.float64), top, sums))
