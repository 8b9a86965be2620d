"""The rollback of --on-nan: back to the last checkpoint, and on with half the learning rate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from psmpi import checkpoint
from psmpi.checkpoint import Progress, Writer
from psmpi.comm.control import Control
from psmpi.config import Config
from psmpi.nn.finite import find_parameters
from psmpi.training.method import Method
from psmpi.training.numbers import ADVICE, Finding, NotFiniteError, first_of
from psmpi.training.resume import restore

# Scalars of the state: the factor of all learning rates, and the samples missing in an epoch's loss.
FACTOR, LEFT_OUT = "lr_factor", "left_out_samples"
# Rollbacks without a finished epoch between them, after which a run ends.
MOST = 3


class Rollback:
    """The return of all ranks to the last good checkpoint of this start, or to its initial state.

    The initial state is kept in memory until a checkpoint is on disk. count: rollbacks so far; tries: rollbacks since
    an epoch ended beyond the furthest step reached before.
    """

    def __init__(self, control: Control, method: Method, config: Config, writer: Writer, steps_per_epoch: int):
        self.control, self.method, self.config, self.writer = control, method, config, writer
        self.steps_per_epoch, self.numbers = steps_per_epoch, method.numbers
        self.on = self.numbers.mode == "rollback"
        self.count = self.tries = self.furthest = 0
        self.initial_state: tuple[dict[str, np.ndarray], dict[str, float | int], Progress] | None = None
        self.declare({})

    def declare(self, scalars: Mapping[str, float | int]) -> None:
        """Declare FACTOR and LEFT_OUT to the state, if they are used or among `scalars`, those of a checkpoint."""
        own: tuple[tuple[str, float | int, bool], ...] = (
            (FACTOR, 1.0, self.on),
            (LEFT_OUT, 0, self.numbers.mode == "skip"),
        )
        for name, value, used in own:
            if used or name in scalars:
                self.method.state.scalar(name, value)

    def begin(self, progress: Progress) -> None:
        """Keep the initial state in memory, unless it is a checkpoint of the run directory."""
        if self.on and self.writer.last_good is None:
            self.method.collect()
            self.initial_state = (
                {name: array.copy() for name, array in self._arrays()},
                dict(self.method.scalars),
                progress,
            )

    def _arrays(self) -> list[tuple[str, np.ndarray]]:
        state = self.method.state
        return [*state.arrays.items(), *((f"table {name}", table) for name, table in state.tables.items())]

    def rate(self) -> float:
        """The factor of the learning rate."""
        return float(self.method.scalars.get(FACTOR, 1.0))

    def passed(self, step: int) -> None:
        """Reset `tries` after an epoch that ended at a new furthest `step`."""
        self.tries = 0 if step > self.furthest else self.tries

    def due(self, trouble: str = "") -> bool:
        """Whether to go back, because a rank noted a number that is not finite, or has a `trouble`.

        The answer is the same on all ranks, by one sum; without --on-nan rollback False, without a message.
        """
        if not self.on:
            return False
        if trouble:
            text, _, advice = trouble.partition(": ")
            self.numbers.note(Finding(0, text, advice or ADVICE))
        good = self.control.rank == 0 and self.writer.last_good is not None
        wrong, saved = self.control.total(np.array([float(bool(self.numbers.first_finding)), float(good)]))
        if saved:
            self.initial_state = None
        return bool(wrong > 0)

    def sound(self) -> bool:
        """Whether the vectors collected for a checkpoint are finite on all ranks.

        NotFiniteError for one that is not, unless --on-nan rollback is given, under which it is noted.
        """
        state, shard = self.method.state, self.method.shards[self.control.rank]
        places = dict.fromkeys(state.vectors, (self.method.layout, shard))
        places |= {name: (space.layout, space.owned[self.control.rank]) for name, space in state.spaces.items()}
        for name, vector in state.arrays.items():
            if not np.isfinite(vector).all():
                text = f"not finite, and not saved, of {name}: {find_parameters(*places[name], vector)}"
                if not self.on:
                    raise NotFiniteError(f"{text}: {ADVICE}")
                self.numbers.note(Finding(0, text))
        return not self.due()

    def go(self, step: int) -> tuple[Progress, str]:
        """Go back after `step` steps, on all ranks. Returns the progress to continue from, and a message.

        NotFiniteError after MOST tries, and if there is no state to go back to.
        """
        factor, self.furthest = self.rate() / 2, max(self.furthest, step)
        first = first_of(self.control, self.numbers.first_finding) or Finding(0, "a loss is not a finite number")
        if self.control.rank == 0:
            self.writer.finish()
        good = self.writer.last_good if self.control.rank == 0 else None
        path: str = str(good.absolute()) if good is not None and good.exists() else ""
        path = json.loads(self.control.share(json.dumps(path)))
        if self.tries == MOST:
            raise NotFiniteError(
                f"{first.text}; the run went back {MOST} times without an epoch between them, the last time to go on "
                f"with {2 * factor:g} times the learning rate: {first.advice}"
            )
        if not path and self.initial_state is None:
            raise NotFiniteError(
                f"{first.text}, and no checkpoint of this run is there any more to go back to: {first.advice}"
            )
        self.count, self.tries, self.numbers.first_finding = self.count + 1, self.tries + 1, None
        progress = self._restore(Path(path)) if path else self._begin_again()
        self.method.scalars[FACTOR] = factor
        return progress, (
            f"{first.text}; back to {path or 'the start'}, step {progress.step}, and on with {factor:g} times the "
            f"learning rate (time {self.tries} of {MOST} before an epoch ends)"
        )

    def _restore(self, path: Path) -> Progress:
        with self.control.flight.task(f"reading the checkpoint {path}"):
            contents = checkpoint.read_contents(path)
        restore(self.method, path, contents, self.config, self.steps_per_epoch)
        return contents.progress

    def _begin_again(self) -> Progress:
        assert self.initial_state is not None
        arrays, scalars, progress = self.initial_state
        # Finishes messages under way.
        self.method.collect()
        for name, array in self._arrays():
            array[...] = arrays[name]
        self.method.scalars.update(scalars)
        self.method.state.restore()
        self.method.restored(True, frozenset())
        return progress
