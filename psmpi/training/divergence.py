"""Whether the losses of an epoch are those of a training that has diverged, to finite numbers or not."""

from __future__ import annotations

from math import isfinite
from typing import Any

import numpy as np

from psmpi.config import Config
from psmpi.data import Dataset
from psmpi.training.context import configured_loss
from psmpi.training.numbers import ADVICE

# A mean loss so many times that of the first minibatch is not one of a training that may come down again.
WORSE = 100.0
# The event that the share of a loss's terms beyond its tangent is computed from.
CLIPPED = "psl_terms_past_exp_clip"


class Divergence:
    """What says whether an epoch's losses are those of a training that has diverged.

    begun: the mean loss of this start's first minibatch, 0 until it is known.
    """

    def __init__(self, config: Config, dataset: Dataset):
        self.loss, self.clipped, self.begun = configured_loss(config, dataset), 0, 0.0
        self.terms = max(1, dataset.outputs - 1)
        # The size of what is to be learnt.
        targets = dataset.train.targets if dataset.task == "regression" else None
        self.size = float(self.terms)
        if targets is not None:
            # Of sequences steps without a target are NaN.
            self.size = float(np.nansum(np.square(targets))) / max(1, int(dataset.train.counts.sum()))

    def count(self, events: dict[str, int]) -> int:
        """The terms beyond the tangent since the last call."""
        before, self.clipped = self.clipped, events.get(CLIPPED, 0)
        return self.clipped - before

    def find(self, row: dict[str, Any], trained: int) -> str:
        """What an epoch's row says of a divergence, "" where it says nothing; the same on all ranks.

        trained: samples since the start of this epoch, or of the run that goes on in it.
        """
        share = self.count(row["events"]) / max(1, trained * self.terms)
        for name in ("train_loss", "test_loss", "validation_loss"):
            if not isfinite(row.get(name, 0.0)):
                return f"the {name.replace('_', ' ')} of epoch {row['epoch']} is not a finite number: {ADVICE}"
        # Spikes of some minibatches pass, and so does what was as large from the beginning and may come down.
        mean, spike = row["train_loss"], row.get("test_loss", row.get("validation_loss", np.inf)) <= self.begun
        if not self.loss.diverged(mean, share, self.size) or mean <= WORSE * self.begun or spike:
            return ""
        beyond = f", with {100 * share:.0f} % of the terms of the loss beyond --exp-clip" if 0 < share <= 1 else ""
        return (
            f"the mean loss of epoch {row['epoch']} is {mean:.1e}{beyond}, at its beginning it was {self.begun:.1e}: "
            "the training diverged, and the end of the epoch is not saved; start again with a lower --lr, or clip "
            "gradients with --clip 1"
        )
