"""Cross-entropy."""

from __future__ import annotations

import numpy as np

from psmpi.nn.losses.base import Loss


class CrossEntropy(Loss):
    """-log softmax_y of the scores (NLL): the logarithm ties all scores, so it needs them all."""

    name, formula = "nll", "cross-entropy"
    # The label's for the value.
    sums = ("largest", "exponentials", "label")

    def __call__(
        self,
        scores: np.ndarray,
        labels: np.ndarray,
        scale: float,
        grad: np.ndarray | None = None,
        pairs: np.ndarray | None = None,
    ) -> float:
        z, e = self._buffers(scores, 2)
        np.copyto(z, scores)
        z -= z.max(axis=0)
        np.exp(z, out=e)
        total = e.sum(axis=0)
        own = labels * scores.shape[1] + np.arange(scores.shape[1])
        value = float((np.log(total) - z.ravel()[own]).sum())
        if grad is not None:
            np.divide(e, total, out=grad)
            grad.reshape(-1)[own] -= 1
            grad *= scale
        return value * scale
