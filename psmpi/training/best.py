"""The best epoch of a run, and the end of a run that has had no better epoch for a while.

Both follow from the rows of the epochs, which a checkpoint holds, so that a resumed run decides alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf, isfinite
from typing import Any

from psmpi.config import Config
from psmpi.data import Dataset
from psmpi.errors import UserError, counted
from psmpi.metrics import SCORES
from psmpi.nn.metric import TOP

# Scores of which larger values are better.
LARGER = ("accuracy", "top5")


class Best:
    """The rules of --patience, --monitor and --keep-best, on the rows of the epochs done."""

    def __init__(self, config: Config, dataset: Dataset):
        run = config.run
        self.patience, self.keep = run.patience, run.keep_best
        self.name = run.monitor if run.monitor == "train_loss" else f"{dataset.tested}_{run.monitor}"
        self.sign = -1.0 if run.monitor in LARGER else 1.0

    def number(self, rows: Sequence[dict[str, Any]]) -> int:
        """Index of the first row with the best value; -1 if no row has a finite one."""
        values = [self.sign * float(row[self.name]) if self.name in row else inf for row in rows]
        finite = [k for k, value in enumerate(values) if isfinite(value)]
        return min(finite, key=lambda k: values[k], default=-1)

    def is_last(self, rows: Sequence[dict[str, Any]]) -> bool:
        """Whether --keep-best keeps the checkpoint of the last epoch, which is the best so far."""
        return self.keep and self.number(rows) == len(rows) - 1 >= 0

    def due(self, rows: Sequence[dict[str, Any]]) -> bool:
        """Whether --patience ends the run: so many epochs have passed without a better one."""
        return 0 < self.patience <= len(rows) - 1 - self.number(rows)

    def describe(self, rows: Sequence[dict[str, Any]], path: str) -> Iterator[str]:
        """Lines for the end of a run; path: of the checkpoint that is kept."""
        at, what = self.number(rows), self.name.replace("_", " ")
        if self.due(rows):
            yield f"no better {what} for {counted(self.patience, 'epoch')}: the run ends (--patience)"
        if at >= 0 and (self.patience or self.keep):
            kept = f", kept as {path}" if self.keep else ""
            value = float(rows[at][self.name])
            score = SCORES[self.name](value) if self.name in SCORES else f"{what} {value:.5g}"
            yield f"best {score}, after epoch {rows[at]['epoch']}{kept}"


def check_monitor(config: Config, dataset: Dataset) -> Iterator[str]:
    """Warn if --patience or --keep-best use the test samples. UserError for a --monitor that is not measured."""
    run = config.run
    if not (run.patience or run.keep_best):
        return
    known = ["loss", "accuracy", *(["top5"] if dataset.outputs > TOP else [])]
    known = [*(known if dataset.task == "classes" else ["loss", "rmse"]), "train_loss"]
    if run.monitor not in known:
        raise UserError(f"--monitor {run.monitor}: what is measured of these data is {', '.join(known)}: name one")
    if run.monitor != "train_loss" and dataset.unseen is None:
        asked = "--patience" if run.patience else "--keep-best"
        yield f"{asked} goes by the test samples, which then say less of others: add --validation 0.1"
