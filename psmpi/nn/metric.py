"""Metrics: sums over samples, which ranks add up, and the scores that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

import numpy as np

from psmpi.nn.losses import Loss, OverClasses

if TYPE_CHECKING:
    from psmpi.nn.tail import Tail

# With more classes than this, samples are counted too whose label is among so many largest scores.
TOP = 5


@dataclass(frozen=True)
class ScorePart:
    """Scores of some classes, of which ranks have different ones.

    classes: (n,) their numbers; numbers: (all classes,) the place of each among them, that of another outside, see
    `Loss.summarize`; others: sums over
    the ranks, of arrays in host memory; counts: whether this rank counts what all of them know.
    """

    classes: np.ndarray
    numbers: np.ndarray
    others: OverClasses
    counts: bool


class Metric:
    """The loss of a test and the scores that are shown, from sums over samples.

    names: of what `scores` returns. loss: the mean over samples. Of classes, accuracy: the share of samples whose
    largest score is the label's; with more than 5 classes top5: of those whose label's score is among the 5 largest. Of
    equal scores the one of the lowest class counts as the largest. Of a regression, rmse: the root of the mean squared
    error over samples and outputs. Of sequences with a target at each step, steps stand for samples.
    """

    def __init__(self, loss: Loss, outputs: int):
        self.loss, self.outputs = loss, outputs
        self.names: tuple[str, ...] = ("loss", "rmse")
        if loss.task == "classes":
            self.names = ("loss", "accuracy", *(("top5",) if outputs > TOP else ()))

    def zeros(self) -> np.ndarray:
        """Sums over no samples, (names + 1,) float64."""
        return np.zeros(len(self.names) + 1)

    def sums(self, scores: np.ndarray, targets: np.ndarray, part: ScorePart | None = None) -> np.ndarray:
        """The sums over some samples: of their losses, of what is shown, and of the samples themselves.

        scores (outputs, b), and targets (b,) int64 or (outputs, b) float64, in host memory. With `part` scores
        are those of some outputs, and so are the values to learn: the share of this rank, which ranks add up. Of each
        step of sequences scores are (outputs, steps, b), and the steps whose targets count are samples.
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
            given = part.others.summed(self.loss.summarize(scores, labels), labels)
            above = count_above(scores, targets, given[-1], part.classes)
            value = self.loss.value(scores, labels, 1.0, given=given, others=part.others)
        return self._found(value, above, part)

    def _found(self, value: float, above: np.ndarray, part: ScorePart | None) -> np.ndarray:
        """The sums, from that of losses and of each sample the number of classes before the label's (b,)."""
        above = above.astype(np.float64)
        if part is not None:
            part.others.add(above)
        counts = part is None or part.counts
        places = [np.count_nonzero(above < most) * counts for most in (1, TOP)][: len(self.names) - 1]
        return np.array([value, *places, len(above) * counts], np.float64)

    def sums_by_tiles(
        self, tail: Tail, features: np.ndarray, labels: np.ndarray, classes: np.ndarray, part: ScorePart | None = None
    ) -> np.ndarray:
        """`sums` of scores that `tail` makes tile by tile from features (inputs, b).

        Tiles are made twice: what is known of all classes comes first.

        classes: (n,) the numbers of the tail's, consecutive.
        """
        own = labels - classes[0]
        summary = tail.normalizers(features, own)
        if not self.loss.gathers:
            summary = summary[-1:]
        given = summary if part is None else part.others.summed(summary, own)
        value, above = 0.0, np.zeros(len(labels))
        for first, scores in tail.tiles(features):
            value += self.loss.value(scores, own - first, 1.0, given=given)
            above += count_above(scores, labels, given[-1], classes[first : first + len(scores)])
        return self._found(value, above, part)

    def scores(self, sums: np.ndarray) -> dict[str, float]:
        """The scores by name, from sums over one sample or more."""
        found = {name: float(value / sums[-1]) for name, value in zip(self.names, sums, strict=False)}
        if "rmse" in found:
            found["rmse"] = sqrt(found["rmse"] / self.outputs)
        return found


def counted_steps(scores: np.ndarray, targets: np.ndarray, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Scores (outputs, n) and targets (n,) or (outputs, n) of the steps of sequences that count.

    scores: (outputs, steps, b); targets: (steps, b), below 0 where none counts, or (outputs, steps, b), NaN there.
    """
    scores = scores.reshape(len(scores), -1)
    targets = targets.reshape(-1) if task == "classes" else targets.reshape(len(targets), -1)
    counts = targets >= 0 if task == "classes" else ~np.isnan(targets[0])
    return (scores, targets) if counts.all() else (scores[:, counts], targets[..., counts])


def sequences_right(scores: np.ndarray, labels: np.ndarray) -> int:
    """The number of sequences all of whose counted steps have the label's score as the largest.

    scores: (classes, steps, b); labels: (steps, b), below 0 where none counts.
    """
    return int(((scores.argmax(axis=0) == labels) | (labels < 0)).all(axis=0).sum())


def largest(scores: np.ndarray, count: int, classes: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest of scores (rows, b), or all of fewer, and their classes, (count, b) each, the largest first.

    classes: (rows, b) int64; by default the numbers of the rows. Of equal scores the first row counts as the largest;
    those that are no numbers come first of all.
    """
    count, b = min(count, len(scores)), np.arange(scores.shape[1])
    # A sample's scores lie together; those that are taken are put below what is left.
    left = np.maximum(scores.T, np.finfo(scores.dtype).min, order="C")
    at = np.empty((count, len(b)), np.int64)
    for k in range(count):
        left.argmax(axis=1, out=at[k])
        left[b, at[k]] = -np.inf
    return scores[at, b], at if classes is None else classes[at, b]


def count_above(
    scores: np.ndarray, labels: np.ndarray, own: np.ndarray | None = None, classes: np.ndarray | None = None
) -> np.ndarray:
    """The number of classes before the label's in the order of scores (classes, b), for each of the labels (b,).

    Scores that are not numbers come first. Where scores are those of some classes alone, `classes` (n,) are their
    numbers, and `own` (b,) the labels' scores.
    """
    numbers = np.arange(len(scores)) if classes is None else classes
    if own is None:
        own = np.take_along_axis(scores, labels[None], axis=0)
    before = numbers[:, None] < labels
    found: np.ndarray = np.count_nonzero(~(scores <= own) | ((scores == own) & before), axis=0)
    return found
