"""Losses and gradients that are not finite: an error names their place, or the step is skipped or undone (--on-nan)."""

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

# Steps that may be skipped in a row. If one minibatch in four is bad, eleven in a row have probability 0.25^11 = 2e-7:
# then the weights are bad, or most of the data.
MOST = 10
# Number of samples that a message names; characters of it that other ranks receive; bytes of these in JSON.
NAMED, TOLD, TEXT = 5, 400, 2600
# The advice if the cause is not known.
ADVICE, MEANS = DIVERGED.partition(": ")[2], "the training diverged; "


class NotFiniteError(FloatingPointError):
    """A loss or gradient that is not finite; the message names its place."""


@dataclass(frozen=True)
class Finding:
    """A loss or gradient that is not finite: the text and the advice of a message.

    Among several findings the one of the first step counts, and of these the one with the least order, the index of its
    cause in KINDS. rank: the rank that `text` is about, -1 for the rank of the finding.
    """

    order: int
    text: str
    advice: str = ADVICE
    rank: int = -1
    step: int = 0


class Numbers:
    """One rank's account of numbers that are not finite, under --on-nan (`mode`).

    stop: they are errors. skip: all ranks agree on a step before any weight changes, and leave out one with such a
    number. skipped: number of steps left out, counted by rank 0 alone if all ranks skip together; left_out: samples of
    this epoch that are missing in this rank's loss_sum. rollback: no rank raises; the first finding is kept, and the
    loop goes back.

    step, epoch: of the minibatch under way, from 1; samples: its size.
    """

    def __init__(self, world: World, dataset: Dataset, mode: str):
        self.mode, self.dataset, self.rank = mode, dataset, world.rank
        # A communicator of its own, apart from messages of the training that are under way.
        self.control = Control(world) if mode == "skip" else None
        self.step = self.epoch = self.samples = 0
        self.skipped = self.in_row = self.left_out = self.reported = 0
        self.first_finding: Finding | None = None
        self.unreported: Finding | None = None
        # Each objective of this rank, the ranks that share its scores, and the function that makes its gradient again.
        self.watched: list[tuple[Objective, Group | None, Callable[[], np.ndarray] | None]] = []

    @property
    def lenient(self) -> bool:
        """Whether losses may be infinite or NaN without an error until `sound` has judged the step."""
        return self.mode != "stop"

    def watch(
        self, objective: Objective, row: Group | None = None, again: Callable[[], np.ndarray] | None = None
    ) -> None:
        """Look into this objective when a loss or gradient is not finite.

        row: ranks that share its scores. again: recomputes the gradient of the last minibatch, over the model's part,
        if sums over ranks may have overwritten it.
        """
        self.watched.append((objective, row, again))

    def begin(self, step: int, epoch: int, samples: int) -> None:
        """Begin a minibatch."""
        for objective, *_ in self.watched:
            # The last trial of a line search may have had an infinite loss.
            objective.finite = True
        self.step, self.epoch, self.samples = step, epoch, samples

    # Calls of methods.

    def sound(
        self,
        ops: NumpyOps,
        loss: float,
        gradients: Sequence[tuple[np.ndarray, Runs]],
        layout: Layout,
        share: int | None = None,
    ) -> bool:
        """Whether to make a step along these gradients. Call it before the step changes anything.

        loss: this rank's share; gradients: each with its runs of the flat vector of `layout`. After False the caller
        changes nothing and does not count the loss. All ranks call it together and get the same answer; a rank that
        steps its own weights gives `share`, its number of samples, and decides by itself.
        """
        if self.mode == "stop":
            return True
        # The share of this rank may be finite where that of another rank with other classes is not.
        fine = isfinite(loss) and all(objective.finite for objective, *_ in self.watched)
        if self.mode == "rollback":
            if not fine:
                self.note(self._finding("loss", self._cause()))
            return True
        sound = fine and all(isfinite(ops.squared_norm(g)) for g, _ in gradients)
        if sound if share is not None else self.agree(sound):
            self.in_row = 0
            return True
        finding = self._gradient(ops, gradients, layout) if fine else self._finding("loss", self._cause())
        self._skip(finding, share)
        return False

    def agree(self, fine: bool) -> bool:
        """Whether `fine` holds on all ranks, under --on-nan skip; else `fine` itself."""
        if self.control is None:
            return fine
        return bool(self.control.total(np.array([float(not fine)]))[0] == 0)

    def clip(self, g: np.ndarray, most: float, allsum: AllSum, ops: NumpyOps, layout: Layout, runs: Runs) -> None:
        """Clip g (runs.size,) by `clip_by_global_norm`; treat a norm that is not finite as --on-nan says.

        layout, runs: the parameters of g, to name them in messages. Raises NotFiniteError under --on-nan stop.
        """
        if isfinite(clip_by_global_norm(g, most, allsum, ops)) or self.mode == "skip":
            return
        finding = self._gradient(ops, [(g, runs)], layout) or self._finding("gradient of another rank", None)
        if self.mode == "stop":
            raise NotFiniteError(f"{finding.text}: {finding.advice}")
        self.note(finding)

    def note(self, finding: Finding) -> None:
        """Keep the first finding until the ranks go back."""
        self.first_finding = self.first_finding or finding

    def _skip(self, finding: Finding | None, share: int | None) -> None:
        """Count a step that is left out. NotFiniteError after more than MOST in a row, or if weights are not finite."""
        self.in_row += 1
        self.skipped += share is not None or self.rank == 0
        self.left_out += (self.samples * (self.rank == 0)) if share is None else share
        if share is None and self.control is not None:
            finding = first_of(self.control, finding)
        self.unreported = self.unreported or finding
        hopeless = finding is not None and finding.order == KINDS.index("weights")
        if finding is not None and (hopeless or self.in_row > MOST):
            why = "no later step mends weights" if hopeless else f"the {MOST} steps before were skipped too"
            raise NotFiniteError(f"{finding.text}, and {why}: {finding.advice}")

    # Calls of the loop.

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Turn a FloatingPointError of the block into a NotFiniteError with place and step."""
        try:
            yield
        except FloatingPointError as error:
            if isinstance(error, NotFiniteError):
                raise
            what, _, advice = str(error).partition(": ")
            finding = self._finding(what, self._cause(), advice or ADVICE)
            raise NotFiniteError(f"{finding.text}: {finding.advice}") from None

    def look(self, loss_sum: float) -> None:
        """Under --on-nan rollback, note a sum of losses that is not finite."""
        if self.mode == "rollback" and not isfinite(loss_sum):
            self.note(self._finding("loss", None))

    def events(self, rollbacks: int) -> dict[str, int]:
        """This rank's counts for the metrics, which are summed over ranks; rollbacks: so far, the same on all ranks."""
        counts = {"skip": {"steps_skipped": self.skipped}, "rollback": {"rollbacks": rollbacks * (self.rank == 0)}}
        return counts.get(self.mode, {})

    def report(self, control: Control, events: dict[str, int]) -> str:
        """The warning about steps skipped since the last call, "" if none. events: counts summed over ranks."""
        skipped = events.get("steps_skipped", 0)
        more, self.reported = skipped - self.reported, skipped
        if not more:
            return ""
        finding, self.unreported = first_of(control, self.unreported), None
        what = f"; the first: {finding.text}" if finding is not None else ""
        return f"warning: {more} step{'s' * (more > 1)} skipped, {skipped} in all{what}"

    def _finding(self, what: str, cause: Cause | None, advice: str = ADVICE) -> Finding:
        """Make the finding of a cause; what: the name of the number, or a whole sentence."""
        text = f"the {what} is not a finite number" if what.startswith(("loss", "gradient")) else what
        order = len(KINDS) if cause is None else KINDS.index(cause.kind)
        if cause is not None and cause.kind == "inputs":
            advice = "correct or remove such samples"
        elif cause is not None and cause.few:
            advice = f"look at such samples; where they are right, {advice.removeprefix(MEANS)}"
        return Finding(order, text + self._where(cause), advice, -1 if cause is None else cause.rank, self.step)

    def _gradient(self, ops: NumpyOps, gradients: Sequence[tuple[np.ndarray, Runs]], layout: Layout) -> Finding | None:
        """The finding of a gradient that is not finite: a layer or parameters; None if this rank sees none.

        This rank's own share, which is recomputed, comes first; then the sums over ranks that this rank holds.
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
        # The own share is finite, so the number arose in the sum.
        where = ", in the sum over ranks" if any(again is not None for *_, again in self.watched) else ""
        return self._finding("gradient", Cause("sum", f"that of {sums}{where}")) if sums else None

    def _where(self, cause: Cause | None) -> str:
        """The end of a message: step, epoch and place."""
        text = f" in step {self.step} of epoch {self.epoch}" if self.step else ""
        if cause is None or not cause.text:
            return text
        rank = f"on rank {cause.rank} " if cause.rank >= 0 else ""
        if cause.kind == "weights":
            left = f"the update of step {self.step - 1} left weights that are" if self.step > 1 else "weights are"
            return f"{text}: {rank}{left} not finite: {cause.text}"
        return f"{text}: {rank}{cause.text}"

    def _cause(self) -> Cause | None:
        """The cause of a loss of this rank's objectives that is not finite; None if all losses are finite.

        Ranks that share scores have the same sums, and call it together.
        """
        for objective, row, _ in self.watched:
            if not objective.finite:
                cause = self._look(objective)
                return cause if row is None or row.size == 1 else share_cause(row, cause)
        return None

    def _look(self, objective: Objective) -> Cause:
        """The cause of an objective's loss that is not finite; layers of the trunk are looked at first."""
        if objective.trunk is not None:
            model, at = objective.trunk
            cause = find_cause(model)
            if cause.kind != "loss":
                return self._named(cause, None if objective.ids is None else objective.ids[at])
        return self._named(find_cause(objective.model, objective.tail), objective.ids)

    def _named(self, cause: Cause, ids: np.ndarray | None) -> Cause:
        """Add the numbers of the samples in the data set to the text of a cause."""
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
    """The cause of least order among the ranks of a row; the same on all of them."""
    fields = [KINDS.index(own.kind), own.place, row.ranks[row.rank], own.text[:TOLD], own.few]
    text = json.dumps(fields).encode()
    padded = np.zeros(TEXT, np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    everyone = np.zeros((row.size, TEXT), np.uint8)
    with row.counter.paused():
        row.allgather(padded, everyone)
    order, _, rank, said, few = min(json.loads(line.tobytes().rstrip(b"\0")) for line in everyone)
    return Cause(KINDS[order], said, few=few, rank=rank if KINDS[order] != "loss" else -1)


def first_of(control: Control, own: Finding | None) -> Finding | None:
    """The finding of the first step and least order among all ranks, with its rank. All ranks call it."""
    fields: list[Any] = []
    if own is not None:
        fields = [own.step, own.order, control.rank, own.rank, own.text[:TOLD], own.advice[: TOLD // 2]]
    texts = control.collect_texts(json.dumps(fields), most=2 * TEXT)
    first = json.loads(control.share(json.dumps(min(filter(None, map(json.loads, texts)), default=[]))))
    if not first:
        return None
    step, order, at, rank, text, advice = first
    if rank < 0 and control.size > 1:
        rank, text = at, f"rank {at}: {text}"
    return Finding(order, text, advice, rank, step)
