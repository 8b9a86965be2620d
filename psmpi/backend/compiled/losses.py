"""Losses of tiles of classes, in C."""

from __future__ import annotations

import numpy as np

from psmpi.backend.compiled.library import function, pointers
from psmpi.backend.reference.arrays import Arrays

# The losses with a kernel, by their numbers there.
KINDS = {"psl": 0, "logistic": 1, "nll": 2, "squared": 3, "bce": 4}


class CompiledLosses(Arrays):
    """Passes over scores (classes, b) of some classes; arrays (b,) are of the samples."""

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
        """The scaled loss, and the largest margin of psl or score of squared; scores become derivatives.

        See `Loss.terms`. None where there is no kernel.

        Terms are of the scores' dtype, summed over few classes in it and then in float64; psl has no tangent here. rest
        (b,) float64 is filled for losses with a sum of terms.
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
        """Take up scores (classes, b) into the largest (b,) and the sums of exponentials relative to these (b,)."""
        call = function("class_normalizers", scores.dtype, "inppp", self.instructions)
        call(*scores.shape, *pointers(scores.dtype, scores), *pointers(np.dtype(np.float64), top, sums))
