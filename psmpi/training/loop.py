"""The training loop of every method: epochs, evaluation, metrics, checkpoints, and what a person sees."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress as Bar
from rich.table import Table

from psmpi import checkpoint, metrics
from psmpi.checkpoint import Contents, Progress
from psmpi.comm.control import Control, Poll
from psmpi.comm.signals import StopSignals
from psmpi.config import Config
from psmpi.data import Batch, Dataset, Minibatches
from psmpi.errors import UserError, counted
from psmpi.optim import make_schedule
from psmpi.output import Screen
from psmpi.training.context import configured_loss
from psmpi.training.folder import RunFolder
from psmpi.training.method import Method, Place
from psmpi.training.resume import restore

# A mean loss so many times that of the first minibatch is not one of a training that may come down again.
WORSE = 100.0


def show_places(console: Screen, places: list[tuple[int, str, Place]]) -> None:
    """Print the placement table: what each rank does and holds."""
    table = Table(title="placement", title_justify="left")
    devices = any(place.device for _, _, place in places)
    for name in ("rank", "host", *(("device",) if devices else ()), "role", "classes"):
        table.add_column(name)
    for name in ("computes with", "optimizes", "memory"):
        table.add_column(name, justify="right")
    for rank, host, place in places:
        memory = f"{place.nbytes / 1e6:.1f} MB"
        where = (host, place.device) if devices else (host,)
        table.add_row(str(rank), *where, place.role, place.classes, f"{place.held:,}", f"{place.owned:,}", memory)
    console.print(table)


def plan_steps(
    dataset: Dataset, config: Config, done: Progress | None = None
) -> tuple[Minibatches, int, Callable[[int], float]]:
    """The minibatches, how many steps in all, and the learning rate of each; UserError for settings that make none.

    done: what a run that goes on has done, perhaps in epochs of other lengths. It ends after --epochs in any case.
    """
    batches = Minibatches(dataset.train.n, config.data.batch_size, config.run.seed, config.data.shuffle)
    done = done or Progress()
    # A run cut short by --max-steps, and gone on with later, has the learning rates of the whole.
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
    """Runs a method to the end of its epochs on all ranks; only rank 0 prints and writes."""

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
    ):
        self.control, self.method, self.config, self.out, self.console = control, method, config, out, console
        self.dataset, self.folder = dataset, folder
        self.batches, self.total, self.schedule = plan_steps(dataset, config)
        run = config.run
        self.writer = checkpoint.Writer(
            control, contents, method.shards, out,
            keep=run.checkpoint_keep, gzip=run.checkpoint_gzip, parallel=run.checkpoint_parallel,
            lock=None if folder is None else folder.lock, rows=method.state.rows,
        )  # fmt: skip
        self.progress = Progress()
        # Whether to stop, which all ranks find after the same step.
        self.signals = StopSignals() if signals is None else signals
        self.poll, self.stopped = Poll(control), False
        # Bytes sent and received before this start.
        self.before = np.zeros(2)
        self.warned: set[str] = set()
        # What says whether an epoch's loss is one of a training that has diverged: the loss, the terms beyond the
        # tangent that were counted before, the terms of a sample, and the size of what is to be learnt.
        self.loss, self.clipped = configured_loss(config, dataset.task), 0
        self.terms = max(1, dataset.outputs - 1)
        # The mean loss of this start's first minibatch: this rank's share, and the sum over ranks once it is known.
        self.first = self.begun = 0.0
        targets = dataset.train.targets if dataset.task == "regression" else None
        self.size = float(self.terms) if targets is None else float(np.vdot(targets, targets)) / len(targets)

    def resume(self, path: Path) -> list[str]:
        """Take up a checkpoint; returns notes for the user."""
        with self.control.flight.task(f"reading the checkpoint {path}"):
            contents = checkpoint.read_contents(path)
        progress = contents.progress
        self.batches, self.total, self.schedule = plan_steps(self.dataset, self.config, progress)
        notes = restore(self.method, path, contents, self.config, self.batches.steps_per_epoch)
        # The shares of the loss are summed over ranks: the past is rank 0's.
        if self.control.rank == 0:
            self.method.loss_sum = progress.loss_sum
        self.before[:] = progress.bytes_sent, progress.bytes_received
        self.progress = progress
        if progress.cursor >= self.batches.steps_per_epoch:
            raise UserError(
                f"checkpoint {path} is {counted(progress.cursor, 'step')} into an epoch, which here has "
                f"{self.batches.steps_per_epoch}: use the data set it was made with"
            )
        if path.parent.absolute() == checkpoint.folder(self.out).absolute():
            self.writer.last_good = path
        notes = [*(f"note: {note}" for note in notes), f"resumed from {path}, step {progress.step}"]
        if progress.step >= self.total:
            most = self.config.run.max_steps
            asked = counted(most, "step") if 0 < most <= progress.step else f"--epochs {self.config.run.epochs}"
            notes.append(
                f"nothing left to do: {asked} asked for, {counted(progress.step, 'step')} and "
                f"{counted(progress.epoch, 'epoch')} are done; raise "
                f"{'--epochs' if asked.startswith('--') else '--max-steps'}"
            )
        return notes

    def run(self) -> bool:
        """Train to the end, or until a rank is asked to stop by a signal; whether all is done."""
        with self.console.bar() as bar:
            task = bar.add_task("", total=self.total, completed=self.progress.step)
            while self.progress.step < self.total and not self.stopped:
                self._epoch(bar, task)
        self.poll.close()
        if self.control.rank == 0:
            with self.control.flight.task("ending the last checkpoint"):
                self.writer.close()
            self._tell_troubles()
            if self.writer.last_failed:
                ended = "training is done" if self.progress.step >= self.total else "the run was stopped"
                raise UserError(
                    f"{ended}, but its last checkpoint is not written, see above: make room and go on with --resume "
                    "auto"
                )
        done = self.progress.step >= self.total
        if not done:
            by = f"by {self.signals.name} " if self.signals else ""
            self.console.tell(
                f"stopped {by}after step {self.progress.step}, and saved: go on with --resume auto --out {self.out}"
            )
        return done

    def _steps(self, bar: Bar, task: Any, start: float) -> Iterator[tuple[Batch, float]]:
        """The minibatches of the rest of an epoch with their learning rates; whoever takes one has done those before.

        Between two of them checkpoints are written.
        """
        first, every, flight = self.progress, self.config.run.checkpoint_every, self.control.flight
        flight.step = first.step
        for cursor in range(first.cursor, self.batches.steps_per_epoch):
            if self.progress.step == self.total:
                break
            batch, past = Batch(self.batches.ids(first.epoch, cursor)), self.method.loss_sum
            yield batch, self.schedule(self.progress.step)
            if cursor == first.cursor and not self.begun:
                self.first = (self.method.loss_sum - past) / len(batch)
            elapsed = first.seconds + time.perf_counter() - start
            self.progress = replace(self.progress, step=self.progress.step + 1, cursor=cursor + 1, seconds=elapsed)
            flight.step = self.progress.step
            bar.update(task, completed=self.progress.step)
            self._tell_troubles()
            if self.poll(bool(self.signals)):
                self.stopped = True
                break
            whole = cursor + 1 == self.batches.steps_per_epoch
            if every and self.progress.step % every == 0 and not whole and self.progress.step < self.total:
                self._save()

    def _epoch(self, bar: Bar, task: Any) -> None:
        method, every = self.method, self.config.run.checkpoint_every
        start, first = time.perf_counter(), self.progress
        method.run_epoch(self._steps(bar, task, start))
        if self.stopped and self.progress.cursor < self.batches.steps_per_epoch and self.progress.step < self.total:
            # The epoch's row is written when it is whole.
            self._save()
            return
        trained = self._seen(self.progress) - self._seen(first)
        rate = trained / (time.perf_counter() - start)
        whole = self.progress.cursor == self.batches.steps_per_epoch
        row = self._measure(self._seen(self.progress), rate)
        elapsed = first.seconds + time.perf_counter() - start
        row["seconds"] = round(elapsed, 3)
        if whole:
            rows = (*self.progress.rows, row)
            self.progress = replace(self.progress, epoch=first.epoch + 1, cursor=0, seconds=elapsed, rows=rows)
            method.loss_sum = 0.0
        if self.control.rank == 0:
            self._append(row)
            with self.control.flight.task("printing to standard output"):
                self.console.tell(metrics.describe(row, self.config.run.epochs))
        self._check(row, trained)
        if self.stopped or not every or self.progress.step == self.total or self.progress.step % every == 0:
            self._save()

    def _append(self, row: dict[str, Any]) -> None:
        """Add a row to the metrics, in a run directory that is still there."""
        self._keep()
        if self.folder is not None:
            try:
                with self.control.flight.task("writing metrics.jsonl"):
                    self.folder.append(row)
            except OSError as error:
                self._warn_loudly(f"metrics.jsonl lacks the row of epoch {row['epoch']}: {error}")

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

    def _check(self, row: dict[str, Any], trained: int) -> None:
        """FloatingPointError, on all ranks, where the epoch's row is one of a training that has diverged.

        trained: samples since the start of this epoch, or of the run that goes on in it.
        """
        count = row["events"].get("psl_terms_past_exp_clip", 0)
        share, self.clipped = (count - self.clipped) / max(1, trained * self.terms), count
        # Spikes of some minibatches pass, and so does what was as large from the beginning and may come down.
        mean, spike = row["train_loss"], row.get("test_loss", np.inf) <= self.begun
        if self.loss.diverged(mean, share, self.size) and mean > WORSE * self.begun and not spike:
            beyond = f", with {100 * share:.0f} % of the terms of the loss beyond --exp-clip" if 0 < share <= 1 else ""
            raise FloatingPointError(
                f"the mean loss of epoch {row['epoch']} is {row['train_loss']:.1e}{beyond}, at its beginning it was "
                f"{self.begun:.1e}: the training diverged, and the end of the epoch is not saved; start again with a "
                "lower --lr, or clip gradients with --clip 1"
            )

    def _seen(self, progress: Progress) -> int:
        """The training samples of the steps done in an epoch."""
        return min(progress.cursor * self.batches.batch_size, self.batches.n)

    def _measure(self, seen: int, rate: float) -> dict[str, Any]:
        """The row of metrics of the epoch so far; also warns of new unusual events."""
        method = self.method
        scores = method.test()
        loss_sum, _, _, first = self._totals()
        self.begun = self.begun or first
        # A rank that has nothing to do in some epochs is no measure of the rate.
        counts = np.zeros((self.control.size, 3))
        counts[self.control.rank] = method.counter.sent, method.counter.received, rate
        counts = self.control.total(counts)
        events = self._events()
        return {
            "epoch": self.progress.epoch + 1,
            "step": self.progress.step,
            "seconds": 0.0,
            "train_loss": loss_sum / max(1, seen),
            **{f"test_{name}": value for name, value in scores.items()},
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

    def _events(self) -> dict[str, int]:
        """The ranks' counts of unusual events together; warns of each kind when it first happens."""
        events = self.method.events()
        counts = self.control.total(np.array([float(n) for n in events.values()]))
        found = {name: int(count) for name, count in zip(events, counts, strict=True)}
        for name, count in found.items():
            if count and name not in self.warned:
                self.warned.add(name)
                if self.control.rank == 0:
                    self.console.tell(f"warning: {name.replace('_', ' ')}: {count} so far")
        return found

    def _save(self) -> None:
        loss_sum, sent, received, _ = self._totals()
        progress = replace(self.progress, loss_sum=loss_sum, bytes_sent=sent, bytes_received=received)
        self._keep()
        self.method.collect()
        state = self.method.state
        self.writer.write(state.vectors, state.scalars, progress, state.tables)
        self._tell_troubles()

    def _tell_troubles(self) -> None:
        if self.control.rank == 0:
            for trouble in self.writer.troubles():
                self._warn_loudly(trouble)

    def _warn_loudly(self, trouble: str) -> None:
        self.console.tell(f"WARNING: {trouble}; training goes on", style="bold red")
