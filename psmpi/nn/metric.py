"""Metrics: sums over samples, which ranks add up, and the displayed scores that follow from the sums."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

import numpy as np

from psmpi.nn.losses import Loss, OverClasses

if TYPE_CHECKING:
    from psmpi.nn.tail import Tail

# Number of largest scores of the top-5 score, which is computed for more classes than this.
TOP = 5


@dataclass(frozen=True)
class ScorePart:
    """Share of the classes whose scores this rank has, while other ranks have the other classes.

    classes: (n,) numbers of the rank's classes; numbers: (all classes,) the place of each class among them, or a place
    outside for other ranks' classes, see `Loss.summarize`; over_classes: sums over the ranks, of arrays in host memory;
    counts: whether this rank counts samples and hits, which all these ranks know.
    """

    classes: np.ndarray
    numbers: np.ndarray
    over_classes: OverClasses
    counts: bool


class Metric:
    """Loss and displayed scores of a test, from sums over samples.

    names: names of the values that `scores` returns. loss: mean loss of a sample. For classes, accuracy: fraction of
    samples whose label has the largest score; with more than 5 classes top5: fraction of samples whose label has one of
    the 5 largest scores. Among equal scores, the lowest class counts as the largest. For a regression, rmse: root of
    the mean squared error over samples and outputs. For sequences with a target at each step, steps count as samples.
    """

    def __init__(self, loss: Loss, outputs: int):
        self.loss, self.outputs = loss, outputs
        self.names: tuple[str, ...] = ("loss", "rmse")
        if loss.task == "classes":
            self.names = ("loss", "accuracy", *(("top5",) if outputs > TOP else ()))

    def zeros(self) -> np.ndarray:
        """Return the sums over no samples, (names + 1,) float64."""
        return np.zeros(len(self.names) + 1)

    def sums(self, scores: np.ndarray, targets: np.ndarray, part: ScorePart | None = None) -> np.ndarray:
        """Return sums over samples, (names + 1,) float64: losses, displayed scores, and the number of samples.

        scores: (outputs, b), targets: (b,) int64 or (outputs, b) float64, in host memory. With `part`, scores (and
        target values) are of some outputs, and the sums are this rank's share. Scores at each step of sequences are
        (outputs, steps, b), and the steps whose targets count are the samples.
        """
        if scores.ndim == 3:
            scores, targets = counted_steps(scores, targets, self.loss.task)
        if self.loss.task != "classes":
            count, off = targets.shape[-1] * (part is None or part.counts), scores - targets
            return np.array([self.loss.value(scores, targets, 1.0), np.vdot(off, off), count])
        if part is None:
            value, above = self.loss.value(scores, targets, 1.0), count_above(scores, targets)
        else:
            labels = part.numbers[targets]
            given = part.over_classes.summed(self.loss.summarize(scores, labels), labels)
            above = count_above(scores, targets, given[-1], part.classes)
            value = self.loss.value(scores, labels, 1.0, given=given, over_classes=part.over_classes)
        return self._all_sums(value, above, part)

    def _all_sums(self, value: float, above: np.ndarray, part: ScorePart | None) -> np.ndarray:
        """Return the sums, given the sum of losses and each sample's number of classes above the label's, (b,)."""
        above = above.astype(np.float64)
        if part is not None:
            part.over_classes.add(above)
        counts = part is None or part.counts
        places = [np.count_nonzero(above < most) * counts for most in (1, TOP)][: len(self.names) - 1]
        return np.array([value, *places, len(above) * counts], np.float64)

    def sums_by_tiles(
        self, tail: Tail, features: np.ndarray, labels: np.ndarray, classes: np.ndarray, part: ScorePart | None = None
    ) -> np.ndarray:
        """Return `sums` of scores that `tail` computes tile by tile from features (inputs, b).

        Scores are computed twice: the first time for the sums over all classes. labels: (b,); classes: (n,) the numbers
        of the tail's classes, consecutive.
        """
        own = labels - classes[0]
        summary = tail.normalizers(features, own)
        if not self.loss.gathers:
            summary = summary[-1:]
        given = summary if part is None else part.over_classes.summed(summary, own)
        value, above = 0.0, np.zeros(len(labels))
        for first, scores in tail.tiles(features):
            value += self.loss.value(scores, own - first, 1.0, given=given)
            above += count_above(scores, labels, given[-1], classes[first : first + len(scores)])
        return self._all_sums(value, above, part)

    def scores(self, sums: np.ndarray) -> dict[str, float]:
        """Return the displayed scores by name, from sums over one or more samples."""
        scores = {name: float(value / sums[-1]) for name, value in zip(self.names, sums, strict=False)}
        if "rmse" in scores:
            scores["rmse"] = sqrt(scores["rmse"] / self.outputs)
        return scores


def counted_steps(scores: np.ndarray, targets: np.ndarray, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Return scores (outputs, n) and targets (n,) or (outputs, n) of the steps of sequences that count.

    scores: (outputs, steps, b); targets: (steps, b), below 0 for steps that do not count, or (outputs, steps, b), NaN
    for these steps.
    """
    scores = scores.reshape(len(scores), -1)
    targets = targets.reshape(-1) if task == "classes" else targets.reshape(len(targets), -1)
    counts = targets >= 0 if task == "classes" else ~np.isnan(targets[0])
    return (scores, targets) if counts.all() else (scores[:, counts], targets[..., counts])


def sequences_right(scores: np.ndarray, labels: np.ndarray) -> int:
    """Return the number of sequences in which the label has the largest score at every step that counts.

    scores: (classes, steps, b); labels: (steps, b), below 0 for steps that do not count.
    """
    return int(((scores.argmax(axis=0) == labels) | (labels < 0)).all(axis=0).sum())


def largest(scores: np.ndarray, count: int, classes: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the `count` largest scores of each column and their classes, (count, b) each, the largest first.

    scores: (rows, b); with fewer rows than `count`, all are returned. classes: (rows, b) int64, by default the row
    numbers. Among equal scores, the first row counts as the largest. NaN counts as larger than any number.
    """
    count, b = min(count, len(scores)), np.arange(scores.shape[1])
    # Transposed, the scores of a sample are contiguous. Scores already taken become -inf, below all that are left.
    left = np.maximum(scores.T, np.finfo(scores.dtype).min, order="C")
    at = np.empty((count, len(b)), np.int64)
    for k in range(count):
        left.argmax(axis=1, out=at[k])
        left[b, at[k]] = -np.inf
    return scores[at, b], at if classes is None else classes[at, b]


def count_above(
    scores: np.ndarray, labels: np.ndarray, own: np.ndarray | None = None, classes: np.ndarray | None = None
) -> np.ndarray:
    """Return for each label (b,) the number of classes above the label's in the order of scores (classes, b).

    NaN is above any number. If scores are of some classes only, `classes` (n,) are their numbers, and `own` (b,) are
    the labels' scores.
    """
    numbers = np.arange(len(scores)) if classes is None else classes
    if own is None:
        own = np.take_along_axis(scores, labels[None], axis=0)
    before = numbers[:, None] < labels
    counts: np.ndarray = np.count_nonzero(~(scores <= own) | ((scores == own) & before), axis=0)
    return counts
