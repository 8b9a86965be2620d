"""Cross-entropy loss."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from psmpi.nn.losses.base import Loss, own_labels

if TYPE_CHECKING:
    from psmpi.backend import NumpyOps


def add_normalizers(scores: np.ndarray, top: np.ndarray, sums: np.ndarray) -> None:
    """Update top and sums with the scores (classes, b) of further classes, in place.

    top: (b,) float64, largest scores so far, initially minus infinity; sums: (b,) float64, sums of exp(score - top) so
    far, initially 0.
    """
    largest = np.maximum(top, scores.max(axis=0))
    exponentials = np.exp(scores - largest, dtype=np.float64)
    np.copyto(sums, exponentials.sum(axis=0) + sums * np.exp(top - largest))
    np.copyto(top, largest)


class CrossEntropy(Loss):
    """Cross-entropy -log softmax_y of the scores (NLL), which depends on all scores through the logarithm.

    The summary of three or more classes is their largest score, the sum of exponentials relative to it, and the label's
    score (0 if another rank has it). The summary of fewer classes is their scores, which are fewer numbers.
    """

    name, formula = "nll", "cross-entropy of the softmax of the scores"
    # The value needs the label's score, the derivatives do not.
    sums = ("largest", "exponentials", "label")
    gathers = immediate = True

    def summary_size(self, classes: int) -> int:
        return min(classes, len(self.sums))

    def summarize(self, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
        if len(scores) < len(self.sums):
            return scores.astype(np.float64)
        return self._triple(scores, labels)

    def _triple(self, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
        (e,) = self._buffers(scores, 1)
        largest = scores.max(axis=0)
        np.subtract(scores, largest, out=e, dtype=np.float64)
        np.exp(e, out=e)
        return np.concatenate([largest[None], e.sum(axis=0)[None], super().summarize(scores, labels)])

    def merge(self, gathered: np.ndarray, starts: Sequence[int], labels: np.ndarray) -> np.ndarray:
        at, terms, factors = 0, [], []
        label = np.zeros(len(labels))
        for first, stop in pairwise(starts):
            summary = gathered[at : at + self.summary_size(stop - first)].astype(np.float64)
            at += len(summary)
            if stop - first >= len(self.sums):
                terms.append(summary[:1])
                factors.append(summary[1:2])
                label += summary[2]
            else:
                terms.append(summary)
                factors.append(np.ones_like(summary))
                own = own_labels(labels - first, stop - first)
                label[own] = summary[labels[own] - first, own]
        scores = np.concatenate(terms)
        largest = scores.max(axis=0)
        total = (np.exp(scores - largest) * np.concatenate(factors)).sum(axis=0)
        return np.stack([largest, total, label])

    def fused_summary(self, ops: NumpyOps, scores: np.ndarray, labels: np.ndarray, room: np.ndarray) -> np.ndarray:
        out = room[: self.summary_size(len(scores)) * scores.shape[1]].reshape(-1, scores.shape[1])
        if len(scores) < len(self.sums):
            out[...] = scores
        else:
            self._operation(ops, "normalizers")(scores, labels, out)
        return out

    def terms(
        self,
        scores: np.ndarray,
        targets: np.ndarray,
        scale: float,
        given: np.ndarray | None = None,
        grad: np.ndarray | None = None,
        rest: np.ndarray | None = None,
        pairs: np.ndarray | None = None,
    ) -> float:
        assert given is not None
        if len(given) != len(self.sums):
            # The summary of one or two classes is their scores.
            given = self._triple(scores, targets)
        largest, total, label = given
        own = own_labels(targets, len(scores))
        value = float((np.log(total[own]) - (label[own] - largest[own])).sum())
        if grad is not None:
            np.subtract(scores, largest, out=grad)
            np.exp(grad, out=grad)
            grad /= total
            grad[targets[own], own] -= 1
            grad *= scale
        return value * scale
