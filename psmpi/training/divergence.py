"""The test whether a training has diverged, by the losses of an epoch."""

from __future__ import annotations

from math import isfinite
from typing import Any

import numpy as np

from psmpi.config import Config
from psmpi.data import Dataset
from psmpi.training.context import configured_loss
from psmpi.training.numbers import ADVICE

# A mean loss so many times the first minibatch's counts as a divergence.
WORSE = 100.0
# The event that counts terms of the loss beyond --exp-clip, where an exponential continues as its tangent.
CLIPPED = "psl_terms_past_exp_clip"


class Divergence:
    """The state of the test. begun: the mean loss of the first minibatch since the start, 0 until it is known."""

    def __init__(self, config: Config, dataset: Dataset):
        self.loss, self.clipped, self.begun = configured_loss(config, dataset), 0, 0.0
        self.terms = max(1, dataset.outputs - 1)
        # The scale of the loss: number of terms, or mean square of the targets.
        targets = dataset.train.targets if dataset.task == "regression" else None
        self.size = float(self.terms)
        if targets is not None:
            # Steps of sequences without a target are NaN.
            self.size = float(np.nansum(np.square(targets))) / max(1, int(dataset.train.counts.sum()))

    def count(self, events: dict[str, int]) -> int:
        """Number of terms beyond --exp-clip since the last call."""
        before, self.clipped = self.clipped, events.get(CLIPPED, 0)
        return self.clipped - before

    def find(self, row: dict[str, Any], trained: int) -> str:
        """The message about a divergence in an epoch's row of metrics, "" without one; the same on all ranks.

        trained: samples since the start of this epoch, or since the resume within it.
        """
        share = self.count(row["events"]) / max(1, trained * self.terms)
        for name in ("train_loss", "test_loss", "validation_loss"):
            if not isfinite(row.get(name, 0.0)):
                return f"the {name.replace('_', ' ')} of epoch {row['epoch']} is not a finite number: {ADVICE}"
        # No divergence: a spike of some minibatches (the test loss is low), and a loss as large as at the beginning.
        mean, spike = row["train_loss"], row.get("test_loss", row.get("validation_loss", np.inf)) <= self.begun
        if not self.loss.diverged(mean, share, self.size) or mean <= WORSE * self.begun or spike:
            return ""
        beyond = f", with {100 * share:.0f} % of the terms of the loss beyond --exp-clip" if 0 < share <= 1 else ""
        return (
            f"the mean loss of epoch {row['epoch']} is {mean:.1e}{beyond}, at its beginning it was {self.begun:.1e}: "
            "the training diverged, and the end of the epoch is not saved; start again with a lower --lr, or clip "
            "gradients with --clip 1"
        )
