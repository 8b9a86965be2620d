"""Conformance checks of --on-nan: a method skips a step whose gradient is not finite, or rolls back."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np

from psmpi.backend import make_backend
from psmpi.checkpoint import newest
from psmpi.config import check
from psmpi.data import Batch
from psmpi.errors import UserError
from psmpi.testing.case import STEPS, Case, compare, rows, tensors
from psmpi.testing.poison import poisoned
from psmpi.testing.world import run_ranks
from psmpi.training.context import Context
from psmpi.training.loop import plan_steps
from psmpi.training.method import Method


def steps_that_are_not_sound_leave_no_trace(case: Case) -> None:
    """With --on-nan skip, a step whose gradient is not finite leaves the training state unchanged.

    A method that cannot skip steps must refuse the option.
    """
    if not case.method.skips:
        with suppress(UserError):
            check(case.config("--on-nan", "skip"))
            raise AssertionError("the method has skips = False, but --on-nan skip is not refused")
        return
    network, dataset, config = case.problem("--on-nan", "skip")
    batches, _, rate = plan_steps(dataset, config)

    def work(world: Any, steps: Sequence[int] = (0, 1, 2)) -> dict[str, Any]:
        kind: Any = case.method
        method: Method = kind(Context(world, network, dataset, config, make_backend("auto")))
        for step in steps:
            method.numbers.begin(step + 1, 1, 0)
            method.step(Batch(batches.ids(0, step)), rate(step))
        method.collect()
        state = method.state
        # Skipped steps advance the step count and the method's own scalars (positions in the epoch): leave both out.
        scalars = {name: value for name, value in state.scalars.items() if name not in {*state.own, "steps"}}
        return {**state.vectors, **{f"table {name}": table for name, table in state.tables.items()}, **scalars}

    # A method that is "statistical" over ranks may average the ranks' copies of the weights even in a skipped step, so
    # it is checked on the fewest ranks only.
    for ranks in case.ranks[:1] if case.method.exactness.ranks == "statistical" else (case.ranks[0], case.ranks[-1]):
        with poisoned(lambda rank, step: step == 2) as hit:
            poisoned_steps = run_ranks(ranks, work, timeout=60)
        assert hit, "the method never calls Model.backward, through which the check makes a gradient NaN"
        expected = run_ranks(ranks, partial(work, steps=(0, 2)), timeout=60)
        for rank, (one, other) in enumerate(zip(poisoned_steps, expected, strict=True)):
            for name, value in one.items():
                same = np.array_equal(value, other[name], equal_nan=True)
                assert same, f"{name} on rank {rank} of {ranks} was changed by a step that --on-nan skip leaves out"


def runs_go_back(case: Case) -> None:
    """With --on-nan rollback a run returns to its last checkpoint, or the start, and halves the learning rate.

    The run must end as one that trains with half the rate from there.
    """
    half = ("--lr", repr(case.config().optimization.lr / 2))
    first, every = case.ranks[0], ("--max-steps", str(STEPS), "--checkpoint-every", "4", "--checkpoint-keep", "0")
    for ranks, bad in ((first, 2), (case.ranks[-1], 6)):
        with poisoned(lambda rank, step, bad=bad: step == bad) as hit:  # type: ignore[misc]
            poisoned_steps = case.run(ranks, *every, "--on-nan", "rollback")
        assert hit and rows(poisoned_steps)[-1]["events"]["rollbacks"] == 1, "the run did not roll back exactly once"
        if bad < 4:
            expected = case.run(ranks, *every, *half)
        else:
            expected = case.run(ranks, "--max-steps", "4")
            case.run(ranks, *every, *half, "--resume", "auto", out=expected)
        exactness = case.method.exactness
        if exactness.resume == "statistical" and ranks != first:
            compare("statistical", exactness.tolerance, poisoned_steps, expected, f"{ranks} ranks, back from {bad}")
            continue
        one, other = tensors(newest(poisoned_steps)), tensors(newest(expected))
        for name, tensor in one.items():
            assert np.array_equal(tensor, other[name], equal_nan=True), f"{ranks} ranks, back from {bad}: {name}"
