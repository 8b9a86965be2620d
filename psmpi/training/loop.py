"""The training loop of all methods: epochs, tests, metrics, checkpoints, and the lines on the screen."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from psmpi import checkpoint
from psmpi.checkpoint import Contents, Progress
from psmpi.comm.control import Control, Poll
from psmpi.comm.signals import StopSignals
from psmpi.config import Config
from psmpi.data import Batch, Dataset, Minibatches
from psmpi.errors import UserError, counted
from psmpi.optim import make_schedule
from psmpi.output import Screen
from psmpi.track import Trackers
from psmpi.training.best import Best
from psmpi.training.divergence import Divergence
from psmpi.training.folder import RunFolder
from psmpi.training.method import Method
from psmpi.training.report import NUMBERS, Report
from psmpi.training.resume import restore
from psmpi.training.rollback import LEFT_OUT, Rollback


def plan_steps(
    dataset: Dataset, config: Config, done: Progress | None = None
) -> tuple[Minibatches, int, Callable[[int], float]]:
    """The minibatches, the number of all steps, and the learning rate of each step. UserError for bad settings.

    done: the progress of a resumed run, whose epochs may have had other lengths; the run ends after --epochs.
    """
    batches = Minibatches(dataset.train.n, config.data.batch_size, config.run.seed, config.data.shuffle)
    done = done or Progress()
    # Learning rates do not depend on --max-steps, so that a run in two parts has those of the whole.
    total = done.step - done.cursor + max(0, config.run.epochs - done.epoch) * batches.steps_per_epoch
    optimization = config.optimization
    schedule = make_schedule(
        optimization.schedule,
        optimization.lr,
        total_steps=total,
        warmup_steps=optimization.warmup_steps,
        step_size=optimization.step_size,
        gamma=optimization.gamma,
        min_lr=optimization.min_lr,
    )
    return batches, min(total, config.run.max_steps or total), schedule


class Loop:
    """The training of a method on one rank, to the end of its epochs; only rank 0 prints and writes."""

    def __init__(
        self,
        control: Control,
        method: Method,
        dataset: Dataset,
        config: Config,
        out: Path,
        console: Screen,
        contents: Contents,
        folder: RunFolder | None = None,
        signals: StopSignals | None = None,
        trackers: Trackers | None = None,
        saves: bool = True,
    ):
        """saves: whether checkpoints are written."""
        self.control, self.method, self.config, self.out, self.console = control, method, config, out, console
        self.dataset, self.folder, self.trackers = dataset, folder, trackers or Trackers()
        if "weights" not in method.state.entries:
            raise UserError(
                f"--method {method.name} declares no vector weights to its state, so that no checkpoint could be read: "
                "its constructor is to call self.state.vector, or self.keep_state of a Replica"
            )
        self.batches, self.total, self.schedule = plan_steps(dataset, config)
        run = config.run
        make = checkpoint.Writer if saves else checkpoint.Unsaved
        self.writer = make(
            control, contents, method.shards, out,
            keep=run.checkpoint_keep, gzip=run.checkpoint_gzip, parallel=run.checkpoint_parallel,
            lock=None if folder is None else folder.lock, rows=method.state.rows,
            spaces={name: space.owned for name, space in method.state.spaces.items()},
        )  # fmt: skip
        self.progress = Progress()
        # The stop after a signal: all ranks learn of it after the same step.
        self.signals = StopSignals() if signals is None else signals
        self.poll, self.stopped = Poll(control, method.poll_seconds, NUMBERS), False
        self.report = Report(console, config, self.batches.batch_size, self.poll.number_sums, control.flight.spent)
        # Each rank's share of communication in the time of the last epoch.
        self.shares = np.zeros(control.size)
        # This rank's account of numbers that are not finite, and whether all ranks go back to a checkpoint.
        self.numbers, self.not_finite = method.numbers, False
        self.rollback = Rollback(control, method, config, self.writer, self.batches.steps_per_epoch)
        # Bytes sent and received before this start.
        self.before = np.zeros(2)
        # The row of an epoch that --max-steps cuts short.
        self.part: tuple[dict[str, Any], ...] = ()
        # Events that `Numbers` and `Rollback` report themselves.
        self.warned: set[str] = {"steps_skipped", "rollbacks"}
        self.divergence, self.best = Divergence(config, dataset), Best(config, dataset)
        # This rank's share of the mean loss of the first minibatch since the start.
        self.first = 0.0

    def resume(self, path: Path) -> list[str]:
        """Restore a checkpoint; returns notes for the user. UserError for one that does not fit the data set."""
        with self.control.flight.task(f"reading the checkpoint {path}"):
            contents = checkpoint.read_contents(path)
        progress = contents.progress
        self.batches, self.total, self.schedule = plan_steps(self.dataset, self.config, progress)
        self.rollback.declare(contents.scalars)
        notes = restore(self.method, path, contents, self.config, self.batches.steps_per_epoch)
        self.before[:] = progress.bytes_sent, progress.bytes_received
        self._take_up(progress)
        if progress.cursor >= self.batches.steps_per_epoch:
            raise UserError(
                f"checkpoint {path} is {counted(progress.cursor, 'step')} into an epoch, which here has "
                f"{self.batches.steps_per_epoch}: use the data set it was made with"
            )
        if path.parent.absolute() == checkpoint.folder(self.out).absolute():
            self.writer.last_good = path
        notes = [*(f"note: {note}" for note in notes), f"resumed from {path}, step {progress.step}"]
        if self.best.due(progress.rows):
            line = next(self.best.describe(progress.rows, ""))
            more = 2 * self.config.run.patience
            notes.append(f"nothing left to do: {line}; with --patience {more} it goes on")
        elif progress.step >= self.total:
            most = self.config.run.max_steps
            asked = counted(most, "step") if 0 < most <= progress.step else f"--epochs {self.config.run.epochs}"
            notes.append(
                f"nothing left to do: {asked} asked for, {counted(progress.step, 'step')} and "
                f"{counted(progress.epoch, 'epoch')} are done; raise "
                f"{'--epochs' if asked.startswith('--') else '--max-steps'}"
            )
        return notes

    @property
    def rows(self) -> tuple[dict[str, Any], ...]:
        """The rows of metrics so far, with the row of an unfinished epoch."""
        return (*self.progress.rows, *self.part)

    def _take_up(self, progress: Progress) -> None:
        """Continue from `progress`. Rank 0 takes all of its loss sum, since shares are summed over ranks."""
        first = self.control.rank == 0
        self.progress, self.method.loss_sum = progress, progress.loss_sum if first else 0.0
        self.numbers.left_out = int(self.method.scalars.get(LEFT_OUT, 0)) if first else 0

    def run(self) -> bool:
        """Train to the end, or until a signal stops a rank. Returns whether the training is done."""
        self.rollback.begin(self.progress)
        with self.report.showing(self.progress, self.total):
            while not self._is_done() and not self.stopped:
                self._epoch()
        self.poll.close()
        if self.control.rank == 0:
            self.writer.close()
            self._tell_troubles()
            if self.writer.last_failed:
                ended = "training is done" if self._is_done() else "the run was stopped"
                raise UserError(
                    f"{ended}, but its last checkpoint is not written, see above: make room and go on with --resume "
                    "auto"
                )
            if not self.config.terminal.quiet:
                for line in self.best.describe(self.progress.rows, str(checkpoint.best(self.out))):
                    self.console.tell(line)
        return self._is_done()

    def _is_done(self) -> bool:
        return self.progress.step >= self.total or self.best.due(self.progress.rows)

    def _steps(self, start: float) -> Iterator[tuple[Batch, float]]:
        """Yield the minibatches of the rest of an epoch with their learning rates; see `Method.run_epoch`.

        Checkpoints are written between two minibatches.
        """
        first, every, flight = self.progress, self.config.run.checkpoint_every, self.control.flight
        flight.step = first.step
        for cursor in range(first.cursor, self.batches.steps_per_epoch):
            if self.progress.step == self.total:
                break
            batch, past = Batch(self.batches.ids(first.epoch, cursor)), self.method.loss_sum
            self.numbers.begin(self.progress.step + 1, first.epoch + 1, len(batch))
            yield batch, self.schedule(self.progress.step) * self.rollback.rate()
            self.numbers.look(self.method.loss_sum)
            if cursor == first.cursor and not self.divergence.begun:
                self.first = (self.method.loss_sum - past) / len(batch)
            elapsed = first.seconds + time.perf_counter() - start
            self.progress = replace(self.progress, step=self.progress.step + 1, cursor=cursor + 1, seconds=elapsed)
            flight.step = self.progress.step
            self._tell_troubles()
            counted_samples = self._seen(self.progress) * (self.control.rank == 0) - self.numbers.left_out
            self.poll.numbers[:] = self.report.numbers(self.method.loss_sum, counted_samples)
            stopped, self.not_finite = self.poll(bool(self.signals), bool(self.numbers.first_finding))
            self.report.step(self.progress)
            if stopped or self.not_finite:
                self.stopped = stopped and not self.not_finite
                break
            whole = cursor + 1 == self.batches.steps_per_epoch
            if every and self.progress.step % every == 0 and not whole and self.progress.step < self.total:
                self._save()
            if self.not_finite:
                break

    def _epoch(self) -> None:
        method, every = self.method, self.config.run.checkpoint_every
        start, first, waited = time.perf_counter(), self.progress, self.control.flight.spent()
        if self.dataset.train.augmentation is not None:
            self.dataset.train.augmentation.epoch = first.epoch
        with self.numbers.naming():
            method.run_epoch(self._steps(start))
        if self.not_finite or self.rollback.due():
            self._go_back()
            return
        if self.stopped and self.progress.cursor < self.batches.steps_per_epoch and self.progress.step < self.total:
            # The row of metrics is written at the end of the epoch.
            self._save()
            if self.not_finite:
                self._go_back()
            return
        trained = self._seen(self.progress) - self._seen(first)
        seconds = time.perf_counter() - start
        rate, share = trained / seconds, (self.control.flight.spent() - waited) / seconds
        whole = self.progress.cursor == self.batches.steps_per_epoch
        row = self._measure(self._seen(self.progress), rate, share)
        diverged = self.divergence.find(row, trained)
        if self.rollback.due(diverged):
            self._go_back()
            return
        elapsed = first.seconds + time.perf_counter() - start
        row["seconds"] = round(elapsed, 3)
        if whole:
            rows = (*self.progress.rows, row)
            self.progress = replace(self.progress, epoch=first.epoch + 1, cursor=0, seconds=elapsed, rows=rows)
            method.loss_sum, self.numbers.left_out = 0.0, 0
        self.part = () if whole else (row,)
        if self.control.rank == 0:
            self._append(row)
            with self.control.flight.task("printing to standard output"):
                self.report.epoch(row, self.shares)
        if diverged:
            raise FloatingPointError(diverged)
        best = whole and self.best.is_last(self.progress.rows)
        if self.stopped or not every or best or self._is_done() or self.progress.step % every == 0:
            self._save(best)
        if self.not_finite:
            self._go_back()
        elif whole:
            self.rollback.passed(self.progress.step)

    def _go_back(self) -> None:
        """Go back to the last checkpoint, or the start, with half the learning rate. All ranks call it together."""
        self.poll.forget()
        progress, message = self.rollback.go(self.progress.step)
        self._take_up(progress)
        self.not_finite = False
        self.divergence.count(self._events())
        if self.control.rank == 0:
            self._warn_loudly(message)
            if self.folder is not None:
                try:
                    with self.control.flight.task("writing metrics.jsonl"):
                        self.folder.rewind(progress.rows)
                except OSError as error:
                    self._warn_loudly(f"metrics.jsonl has rows of epochs that are trained again: {error}")
            with self.control.flight.task("writing for --track"):
                self.trackers.start(progress.rows)

    def _append(self, row: dict[str, Any]) -> None:
        """Add a row to the metrics, in a run directory that is still there."""
        self._keep()
        if self.folder is not None:
            try:
                with self.control.flight.task("writing metrics.jsonl"):
                    self.folder.append(row)
            except OSError as error:
                self._warn_loudly(f"metrics.jsonl lacks the row of epoch {row['epoch']}: {error}")
        with self.control.flight.task("writing for --track"):
            self.trackers.row(row)

    def _keep(self) -> None:
        """On rank 0, make sure that the run directory is there, and this run's."""
        if self.folder is None:
            return
        try:
            with self.control.flight.task("looking into the run directory"):
                lock, last = self.folder.keep(), self.writer.last_good
            if lock is not None:
                self.writer.relock(lock)
            elif last is not None and not last.exists():
                self.writer.last_good = None
                self._warn_loudly(f"the checkpoint {last} was removed while this run writes to {self.out}")
        except OSError as error:
            trouble = f"the run directory {self.out} cannot be looked into or written: {error}"
            if trouble not in self.warned:
                self.warned.add(trouble)
                self._warn_loudly(trouble)

    def _seen(self, progress: Progress) -> int:
        """The training samples of the steps done in an epoch."""
        return min(progress.cursor * self.batches.batch_size, self.batches.n)

    def _measure(self, seen: int, rate: float, share: float) -> dict[str, Any]:
        """The row of metrics of the epoch so far; also warns of new unusual events.

        rate: samples a second; share: of this rank's time in communication.
        """
        method = self.method
        scores = method.test()
        (loss_sum, _, _, first), left_out = self._totals(), self._left_out()
        self.divergence.begun = self.divergence.begun or first
        # A rank that has nothing to do in some epochs is no measure of the rate.
        counts = np.zeros((self.control.size, 4))
        counts[self.control.rank] = method.counter.sent, method.counter.received, rate, share
        counts = self.control.total(counts)
        self.shares = counts[:, 3]
        events = self._events()
        return {
            "epoch": self.progress.epoch + 1,
            "step": self.progress.step,
            "seconds": 0.0,
            "train_loss": loss_sum / max(1, seen - left_out),
            **{f"{self.dataset.tested}_{name}": value for name, value in scores.items()},
            "samples_per_second": float(counts[:, 2].min()),
            "bytes_sent": int(self.before[0] + counts[:, 0].sum()),
            "bytes_received": int(self.before[1] + counts[:, 1].sum()),
            "bytes_sent_by_rank": counts[:, 0].astype(int).tolist(),
            "bytes_received_by_rank": counts[:, 1].astype(int).tolist(),
            "events": events,
            **method.diagnostics(),
        }

    def _totals(self) -> tuple[float, int, int, float]:
        """Sums over ranks: loss shares, bytes sent and received so far, and the mean loss of the first minibatch."""
        method = self.method
        shares = np.array([method.loss_sum, method.counter.sent, method.counter.received, self.first])
        loss_sum, sent, received, first = self.control.total(shares)
        return float(loss_sum), int(sent + self.before[0]), int(received + self.before[1]), float(first)

    def _left_out(self) -> int:
        """Number of samples of this epoch in skipped steps, summed over ranks and stored in the state."""
        if LEFT_OUT not in self.method.scalars:
            return 0
        (count,) = self.control.total(np.array([float(self.numbers.left_out)]))
        self.method.scalars[LEFT_OUT] = int(count)
        return int(count)

    def _events(self) -> dict[str, int]:
        """Counts of unusual events, summed over ranks; prints a warning when a kind first happens."""
        events = self.method.events() | self.numbers.events(self.rollback.count)
        counts = self.control.total(np.array([float(n) for n in events.values()]))
        totals = {name: int(count) for name, count in zip(events, counts, strict=True)}
        for name, count in totals.items():
            if count and name not in self.warned:
                self.warned.add(name)
                if self.control.rank == 0:
                    self.console.tell(f"warning: {name.replace('_', ' ')}: {count} so far")
        lines = self.numbers.report(self.control, totals)
        if lines:
            self.console.tell(lines)
        return totals

    def _save(self, best: bool = False) -> None:
        (loss_sum, sent, received, _), _ = self._totals(), self._left_out()
        progress = replace(self.progress, loss_sum=loss_sum, bytes_sent=sent, bytes_received=received)
        self._keep()
        self.method.collect()
        if not self.rollback.sound():
            self.not_finite = True
            return
        state = self.method.state
        self.writer.write(state.arrays, state.scalars, progress, state.tables, best)
        self.report.detail(f"  checkpoint of step {progress.step} handed over to be written")
        self._tell_troubles()

    def _tell_troubles(self) -> None:
        if self.control.rank == 0:
            for trouble in self.writer.troubles():
                self._warn_loudly(trouble)

    def _warn_loudly(self, trouble: str) -> None:
        self.console.tell(f"WARNING: {trouble}; training goes on", style="bold red")
