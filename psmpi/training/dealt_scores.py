"""The loss and the metric on ranks that have some of the scores each, or the same scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.comm.group import Group
from psmpi.comm.transfers import Message, Step
from psmpi.data import Resident
from psmpi.nn.layers.chain import Tape
from psmpi.nn.metric import ScorePart
from psmpi.nn.model import Model
from psmpi.nn.objective import Objective
from psmpi.training.account import Account
from psmpi.training.class_sums import ClassSums
from psmpi.training.context import Context


class DealtScores:
    """The loss of the scores that `model` computes on this rank, and the sums of the metric.

    row: the ranks that share the scores of a sample, in the order of the scores; host: the same ranks, for sums in host
    memory. counts: number of scores of each of them; None: each has all scores, and the first rank counts the loss.
    world: all ranks, which scale very large derivatives by one common power of two, if they multiply them together.
    """

    def __init__(
        self,
        context: Context,
        model: Model,
        row: Group,
        host: Group,
        counts: Sequence[int] | None,
        world: Group | None = None,
    ):
        self.dataset, self.model, self.world = context.dataset, model, world
        self.loss, self.metric = context.loss(), context.metric()
        first = sum(counts[: row.rank]) if counts is not None else 0
        self.outputs = slice(first, first + model.network.classes)
        self.counts = counts is not None or row.rank == 0
        self.over_classes: ClassSums | None = None
        self.part: ScorePart | None = None
        if counts is not None and row.size > 1:
            # Sums are computed on the side of the loss: host or device.
            by_host = self.loss.fused(context.ops) is None
            sums = (host, NumpyOps()) if by_host else (row, context.ops)
            self.over_classes = ClassSums(sums[0], self.loss, counts, context.dtype, sums[1])
            tests = ClassSums(host, self.metric.loss, counts, context.dtype, NumpyOps())
            numbers = np.arange(self.dataset.outputs) - first
            own = np.arange(self.outputs.start, self.outputs.stop)
            self.part = ScorePart(own, numbers, tests, row.rank == 0)
        self.objective = Objective(self.loss, model, self.over_classes)
        self.objective.first = first
        context.numbers.watch(self.objective, row)

    def account(self, account: Account) -> None:
        """Declare the buffers to the account."""
        account.hold("buffers", self.objective, *([self.over_classes] if self.over_classes is not None else []))

    def reserve(self, batch: int) -> None:
        """Make room for minibatches of up to `batch` samples."""
        self.objective.reserve(self.outputs.stop - self.outputs.start, max(1, self.model.steps) * batch)

    def derivatives(self, tape: Tape, samples: Resident, ids: np.ndarray, scale: float) -> Any:
        """Derivatives of the scaled sum of losses of the samples `ids`, in the shape of the scores."""
        objective, scores = self.objective, tape.scores
        objective.ids = ids
        targets = samples.targets(ids)
        objective.bring(self._own_targets(targets), self.loss.sample_weights(targets))
        objective.losses(scores, objective.targets(len(ids)), scale)
        if not self.loss.immediate and self.world is not None and self.world.size > 1:
            report = objective.report
            objective.value()
            self.world.agree(report.host[3:4])
            report.push()
        return objective.derivatives(scores).reshape(scores.shape)

    def value(self) -> float:
        """This rank's share of the last minibatch's scaled loss."""
        return self.objective.value() * self.counts

    def _own_targets(self, targets: np.ndarray) -> np.ndarray:
        """Values of this rank's outputs; labels counted from its first class, labels of steps unchanged."""
        if self.dataset.task != "classes":
            return np.ascontiguousarray(targets[self.outputs])
        return targets if targets.ndim == 2 else targets - self.outputs.start

    def add_sums(self, totals: np.ndarray, scores: np.ndarray, samples: Resident, ids: np.ndarray) -> None:
        """Add this rank's share of the metric's sums over the samples `ids`; scores: in host memory."""
        targets = samples.targets(ids)
        if self.dataset.task != "classes":
            targets = targets[self.outputs]
        if self.counts:
            totals += self.metric.sums(scores, targets, self.part)

    def messages(self, samples: int) -> list[Message]:
        """The messages of the loss of so many samples, or steps of samples."""
        return self.over_classes.messages(Step(samples)) if self.over_classes is not None else []
