"""What a rank does about losses and gradients that are not finite: the place is named, the step skipped, or noted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np

from psmpi.comm.control import Control
from psmpi.comm.group import Group
from psmpi.comm.protocol import World
from psmpi.data import Dataset
from psmpi.layout import Layout, Runs
from psmpi.nn.finite import KINDS, Cause, find_cause, find_parameters
from psmpi.nn.objective import DIVERGED, Objective
from psmpi.optim import AllSum, clip_by_global_norm

if TYPE_CHECKING:
    from psmpi.backend import NumpyOps

# Steps that may be skipped in a row. Where one minibatch in four is bad, one more than that in a row have a chance of
# 0.25^11, 2e-7: it is the weights then, or most of the data.
MOST = 10
# Samples that a message names, characters of it that other ranks are told, and bytes that these take in JSON.
NAMED, TOLD, TEXT = 5, 400, 2600
# What helps, where no more is known.
ADVICE, MEANS = DIVERGED.partition(": ")[2], "the training diverged; "


class NotFiniteError(FloatingPointError):
    """A number that is not finite, and what is known of its place."""


@dataclass(frozen=True)
class Finding:
    """A loss or gradient that is not finite: what of it people are told, and what helps.

    Of several the one of the first step counts, and of these that of the least order: the place of its cause among
    KINDS, behind which are others. rank: that of which `text` speaks, -1: its own.
    """

    order: int
    text: str
    advice: str = ADVICE
    rank: int = -1
    step: int = 0


class Numbers:
    """One rank's account of numbers that are not finite, by --on-nan (`mode`).

    stop: they are errors. skip: ranks agree on each step before any weight moves, and leave out those that are not
    sound; `skipped` counts these, where all ranks skip them together on rank 0 alone, left_out the samples of this
    epoch that this rank's loss_sum lacks. rollback: nobody raises, the first thing found is `noted`, and the loop goes
    back.

    step, epoch, samples: of the minibatch under way, from 1.
    """

    def __init__(self, world: World, dataset: Dataset, mode: str):
        self.mode, self.dataset, self.rank = mode, dataset, world.rank
        # Apart from messages of the training, which may be under way.
        self.control = Control(world) if mode == "skip" else None
        self.step = self.epoch = self.samples = 0
        self.skipped = self.in_row = self.left_out = self.reported = 0
        self.noted: Finding | None = None
        self.told: Finding | None = None
        # Of each objective of this rank, the ranks that share its scores, and what makes its gradient again.
        self.watched: list[tuple[Objective, Group | None, Callable[[], np.ndarray] | None]] = []

    @property
    def lenient(self) -> bool:
        """Whether losses that are not finite are numbers like others, until a step has been judged."""
        return self.mode != "stop"

    def watch(
        self, objective: Objective, row: Group | None = None, again: Callable[[], np.ndarray] | None = None
    ) -> None:
        """Name the place from now on where this objective's losses are not finite.

        row: ranks that share its scores. again: makes the gradient of its last minibatch once more, where sums over
        ranks may have taken its place, and returns it, over the model's part.
        """
        self.watched.append((objective, row, again))

    def begin(self, step: int, epoch: int, samples: int) -> None:
        """Take up the next minibatch."""
        for objective, *_ in self.watched:
            # The last trial of a search may have been too far.
            objective.finite = True
        self.step, self.epoch, self.samples = step, epoch, samples

    # What methods call.

    def sound(
        self,
        ops: NumpyOps,
        loss: float,
        gradients: Sequence[tuple[np.ndarray, Runs]],
        layout: Layout,
        share: int | None = None,
    ) -> bool:
        """Whether a step is to be made along these gradients; called before anything that outlives the step changes.

        loss: this rank's share; gradients: each with the elements of the flat vector of `layout` that it is of. Where
        the answer is no, nothing is to be changed, the loss not counted. All ranks make the call together, and hear the
        same; but one that steps weights of its own, on `share` samples, decides alone.
        """
        if self.mode == "stop":
            return True
        # Of ranks with different classes each has its share of the loss.
        fine = isfinite(loss) and all(objective.finite for objective, *_ in self.watched)
        if self.mode == "rollback":
            if not fine:
                self.note(self._finding("loss", self._cause()))
            return True
        sound = fine and all(isfinite(ops.squared_norm(g)) for g, _ in gradients)
        if sound if share is not None else self.agree(sound):
            self.in_row = 0
            return True
        found = self._gradient(ops, gradients, layout) if fine else self._finding("loss", self._cause())
        self._skip(found, share)
        return False

    def agree(self, fine: bool) -> bool:
        """Whether all ranks say so. In `skip` alone: elsewhere what this rank says."""
        if self.control is None:
            return fine
        return bool(self.control.total(np.array([float(not fine)]))[0] == 0)

    def clip(self, g: np.ndarray, most: float, allsum: AllSum, ops: NumpyOps, layout: Layout, runs: Runs) -> None:
        """`clip_by_global_norm`; a norm that is not finite is found on all ranks that sum it, and is not passed over.

        layout, runs: of g (runs.size,), to name its parameters.
        """
        if isfinite(clip_by_global_norm(g, most, allsum, ops)) or self.mode == "skip":
            return
        found = self._gradient(ops, [(g, runs)], layout) or self._finding("gradient of another rank", None)
        if self.mode == "stop":
            raise NotFiniteError(f"{found.text}: {found.advice}")
        self.note(found)

    def note(self, found: Finding) -> None:
        """Keep what was found first for when the ranks go back."""
        self.noted = self.noted or found

    def _skip(self, found: Finding | None, share: int | None) -> None:
        """Account for a step that is left out. NotFiniteError after too many in a row, and where all would be."""
        self.in_row += 1
        self.skipped += share is not None or self.rank == 0
        self.left_out += (self.samples * (self.rank == 0)) if share is None else share
        if share is None and self.control is not None:
            found = first_of(self.control, found)
        self.told = self.told or found
        hopeless = found is not None and found.order == KINDS.index("weights")
        if found is not None and (hopeless or self.in_row > MOST):
            why = "no later step mends weights" if hopeless else f"the {MOST} steps before were skipped too"
            raise NotFiniteError(f"{found.text}, and {why}: {found.advice}")

    # What the loop calls.

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Name place and step in a FloatingPointError of the training's own."""
        try:
            yield
        except FloatingPointError as error:
            if isinstance(error, NotFiniteError):
                raise
            what, _, advice = str(error).partition(": ")
            found = self._finding(what, self._cause(), advice or ADVICE)
            raise NotFiniteError(f"{found.text}: {found.advice}") from None

    def look(self, loss_sum: float) -> None:
        """Note, where ranks go back, that this rank's losses so far are not finite."""
        if self.mode == "rollback" and not isfinite(loss_sum):
            self.note(self._finding("loss", None))

    def events(self, rollbacks: int) -> dict[str, int]:
        """Counts for the metrics, whose sums over the ranks are the run's; rollbacks: of each rank."""
        counts = {"skip": {"steps_skipped": self.skipped}, "rollback": {"rollbacks": rollbacks * (self.rank == 0)}}
        return counts.get(self.mode, {})

    def report(self, control: Control, events: dict[str, int]) -> str:
        """What rank 0 tells of steps that were skipped since the last call, given the events of all ranks."""
        skipped = events.get("steps_skipped", 0)
        more, self.reported = skipped - self.reported, skipped
        if not more:
            return ""
        found, self.told = first_of(control, self.told), None
        what = f"; the first: {found.text}" if found is not None else ""
        return f"warning: {more} step{'s' * (more > 1)} skipped, {skipped} in all{what}"

    def _finding(self, what: str, cause: Cause | None, advice: str = ADVICE) -> Finding:
        """Of a cause; what: the number that is not finite, or a sentence that says so."""
        text = f"the {what} is not a finite number" if what.startswith(("loss", "gradient")) else what
        order = len(KINDS) if cause is None else KINDS.index(cause.kind)
        if cause is not None and cause.kind == "inputs":
            advice = "correct or remove such samples"
        elif cause is not None and cause.few:
            advice = f"look at such samples; where they are right, {advice.removeprefix(MEANS)}"
        return Finding(order, text + self._where(cause), advice, -1 if cause is None else cause.rank, self.step)

    def _gradient(self, ops: NumpyOps, gradients: Sequence[tuple[np.ndarray, Runs]], layout: Layout) -> Finding | None:
        """What this rank finds of a gradient that is not finite: layers whose outputs are not, or parameters.

        First those of its own share, which is made again; of sums over ranks that it has where that is finite.
        """
        sums = " and ".join(filter(None, (find_parameters(layout, runs, ops.host(g)) for g, runs in gradients)))
        for objective, _, again in self.watched:
            model = objective.model
            cause = self._look(objective)
            if cause.kind not in ("loss", "gradient"):
                return self._finding("gradient", cause)
            own = find_parameters(model.layout, model.part, ops.host(again())) if again is not None else ""
            if own:
                return self._finding("gradient", Cause("gradient", f"that of {own}"))
        # A rank that has looked at its own share knows that it is not there.
        where = ", in the sum over ranks" if any(again is not None for *_, again in self.watched) else ""
        return self._finding("gradient", Cause("sum", f"that of {sums}{where}")) if sums else None

    def _where(self, cause: Cause | None) -> str:
        """Step, epoch and place, to follow what is not finite."""
        text = f" in step {self.step} of epoch {self.epoch}" if self.step else ""
        if cause is None or not cause.text:
            return text
        rank = f"on rank {cause.rank} " if cause.rank >= 0 else ""
        if cause.kind == "weights":
            left = f"the update of step {self.step - 1} left weights that are" if self.step > 1 else "weights are"
            return f"{text}: {rank}{left} not finite: {cause.text}"
        return f"{text}: {rank}{cause.text}"

    def _cause(self) -> Cause | None:
        """The cause of the losses of this rank's objectives that are not finite; None where they are, or say nothing.

        Ranks that share scores, and see all of them the same, come here together where some are not finite.
        """
        for objective, row, _ in self.watched:
            if not objective.finite:
                found = self._look(objective)
                return found if row is None or row.size == 1 else share_cause(row, found)
        return None

    def _look(self, objective: Objective) -> Cause:
        """The cause of an objective's loss that is not finite: the layers that all classes share come first."""
        if objective.trunk is not None:
            model, at = objective.trunk
            found = find_cause(model)
            if found.kind != "loss":
                return self._named(found, None if objective.ids is None else objective.ids[at])
        return self._named(find_cause(objective.model, objective.tail), objective.ids)

    def _named(self, cause: Cause, ids: np.ndarray | None) -> Cause:
        """With the numbers of samples in the data set."""
        columns = [k for k in cause.columns if ids is not None and k < len(ids)]
        if not columns or ids is None or len(columns) == len(ids) > 1:
            return cause
        index, given = self.dataset.train.index, ids[columns]
        numbers = sorted((given if index is None else index[given]).tolist())
        more = f" and {len(numbers) - NAMED} more" if len(numbers) > NAMED else ""
        named = ", ".join(map(str, numbers[:NAMED]))
        plural = "s" if len(numbers) > 1 else ""
        return replace(cause, text=f"{cause.text} (sample{plural} {named}{more} of {self.dataset.name})")


def share_cause(row: Group, own: Cause) -> Cause:
    """The most telling cause of the ranks of a row, whose scores are the same on all of them."""
    told = [KINDS.index(own.kind), own.place, row.ranks[row.rank], own.text[:TOLD], own.few]
    text = json.dumps(told).encode()
    mine = np.zeros(TEXT, np.uint8)
    mine[: len(text)] = np.frombuffer(text, np.uint8)
    everyone = np.zeros((row.size, TEXT), np.uint8)
    with row.counter.paused():
        row.allgather(mine, everyone)
    order, _, rank, said, few = min(json.loads(line.tobytes().rstrip(b"\0")) for line in everyone)
    return Cause(KINDS[order], said, few=few, rank=rank if KINDS[order] != "loss" else -1)


def first_of(control: Control, own: Finding | None) -> Finding | None:
    """The most telling finding of all ranks, with its rank, on all of them; all call it."""
    told: list[Any] = []
    if own is not None:
        told = [own.step, own.order, control.rank, own.rank, own.text[:TOLD], own.advice[: TOLD // 2]]
    texts = control.collect_texts(json.dumps(told), most=2 * TEXT)
    found = json.loads(control.share(json.dumps(min(filter(None, map(json.loads, texts)), default=[]))))
    if not found:
        return None
    step, order, at, rank, text, advice = found
    if rank < 0 and control.size > 1:
        rank, text = at, f"rank {at}: {text}"
    return Finding(order, text, advice, rank, step)
