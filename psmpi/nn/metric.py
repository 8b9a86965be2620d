"""Metrics: sums over samples, which ranks add up, and the scores that follow from them."""

from __future__ import annotations

from math import sqrt

import numpy as np

from psmpi.nn.losses import Loss

# With more classes than this, samples are counted too whose label is among so many largest scores.
TOP = 5


class Metric:
    """The loss of a test and the scores that are shown, from sums over samples.

    names: of what `scores` returns. loss: the mean over samples. Of classes, accuracy: the share of samples whose
    largest score is the label's; with more than 5 classes top5: of those whose label's score is among the 5 largest. Of
    equal scores the one of the lowest class counts as the largest. Of a regression, rmse: the root of the mean squared
    error over samples and outputs.
    """

    def __init__(self, loss: Loss, outputs: int):
        self.loss, self.outputs = loss, outputs
        self.names: tuple[str, ...] = ("loss", "rmse")
        if loss.task == "classes":
            self.names = ("loss", "accuracy", *(("top5",) if outputs > TOP else ()))

    def zeros(self) -> np.ndarray:
        """Sums over no samples, (names + 1,) float64."""
        return np.zeros(len(self.names) + 1)

    def sums(self, scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """The sums over some samples: of their losses, of what is shown, and of the samples themselves.

        scores (outputs, b), and targets (b,) int64 or (outputs, b) float64, in host memory.
        """
        if self.loss.task != "classes":
            off = scores - targets
            return np.array([self.loss.value(scores, targets, 1.0), np.vdot(off, off), targets.shape[-1]])
        found = [self.loss.value(scores, targets, 1.0), np.count_nonzero(scores.argmax(axis=0) == targets)]
        if "top5" in self.names:
            found.append(np.count_nonzero(count_above(scores, targets) < TOP))
        return np.array([*found, len(targets)], np.float64)

    def scores(self, sums: np.ndarray) -> dict[str, float]:
        """The scores by name, from sums over one sample or more."""
        found = {name: float(value / sums[-1]) for name, value in zip(self.names, sums, strict=False)}
        if "rmse" in found:
            found["rmse"] = sqrt(found["rmse"] / self.outputs)
        return found


def count_above(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The number of classes before the label's in the order of scores (classes, b), for each of the labels (b,).

    Scores that are not numbers come first.
    """
    own = np.take_along_axis(scores, labels[None], axis=0)
    before = np.arange(len(scores))[:, None] < labels
    found: np.ndarray = np.count_nonzero(~(scores <= own) | ((scores == own) & before), axis=0)
    return found
