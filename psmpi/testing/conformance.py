"""Conformance checks that every registered training method must pass.

The author of a method outside the package runs all checks with this test:

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_method(check, tmp_path):
        check(Case("name", tmp_path))

The attribute `exactness` of the method states how closely runs on different numbers of ranks, and resumed runs, must
agree. Each check trains small networks on threads of this process and raises AssertionError if the method fails.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from math import isfinite
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints
from unittest import mock

import h5py
import numpy as np

from psmpi.backend import NumpyOps, make_backend
from psmpi.checkpoint import newest
from psmpi.comm.transfers import totals
from psmpi.config import Config, check, from_toml, option
from psmpi.data import Batch, Dataset
from psmpi.errors import UserError
from psmpi.nn.network import Network
from psmpi.testing.case import RANKS, ROUNDING, STEPS, Case, compare, rows, tensors
from psmpi.testing.unsound import runs_go_back, steps_that_are_not_sound_leave_no_trace
from psmpi.testing.world import run_ranks
from psmpi.training.context import Context
from psmpi.training.loop import plan_steps
from psmpi.training.method import Method

# Largest relative difference between the bytes that Method.memory() states and the bytes allocated.
MEMORY = 0.1

__all__ = ["CHECKS", "Case", "compare", "rows", "tensors"]


def other_ranks_give_the_same(case: Case) -> None:
    """Runs on other numbers of ranks end with the weights, or the accuracy, of the run on the fewest ranks."""
    exactness, sizes = case.method.exactness, case.ranks
    assert len(sizes) > 1, (
        f"of {RANKS} ranks the method accepts only {sizes}: give options in its `exactness` that allow more"
    )
    long = ("--epochs", "8") if exactness.ranks == "statistical" else ("--max-steps", str(STEPS))
    single = case.run(sizes[0], *long)
    for ranks in sizes[1:]:
        compare(exactness.ranks, exactness.tolerance, single, case.run(ranks, *long), f"{ranks} ranks")


def resumed_runs_end_the_same(case: Case) -> None:
    """A run that stops within an epoch and resumes ends as an uninterrupted run, on the fewest and the most ranks."""
    exactness = case.method.exactness
    stop = STEPS // 2 + 1
    stop += -stop % exactness.every
    for ranks in (case.ranks[0], case.ranks[-1]):
        whole = case.run(ranks, "--max-steps", str(STEPS))
        part = case.run(ranks, "--max-steps", str(stop))
        case.run(ranks, "--max-steps", str(STEPS), "--resume", "auto", out=part)
        compare(exactness.resume, exactness.tolerance, whole, part, f"resumed on {ranks} rank(s)")
        if exactness.resume == "exact":
            # Equal weights are not enough: other optimizer state would change the next step.
            first, second = tensors(newest(whole)), tensors(newest(part))
            assert first.keys() == second.keys()
            assert all(np.array_equal(first[name], second[name], equal_nan=True) for name in first)


def other_ranks_go_on(case: Case) -> None:
    """A checkpoint resumes on another number of ranks: its weights survive one step with a negligible learning rate."""
    first, last = case.ranks[0], case.ranks[-1]
    for before, after in ((first, last), (last, first)):
        part = case.run(before, "--max-steps", str(STEPS))
        saved = tensors(newest(part), ("weights",))
        case.run(after, "--max-steps", str(STEPS + 1), "--lr", "1e-14", "--resume", "auto", out=part)
        assert rows(part)[-1]["step"] == STEPS + 1
        for name, tensor in tensors(newest(part), ("weights",)).items():
            distance = np.linalg.norm(tensor - saved[name]) / max(1e-300, float(np.linalg.norm(saved[name])))
            assert distance <= ROUNDING, f"{before} rank(s), then {after}: {name} differs by {distance:.1e}"


def counters_equal_messages(case: Case) -> None:
    """In every step each rank sends and receives exactly the bytes that Method.messages states."""
    network, dataset, config = case.problem("--batch-size", "400")
    batches, steps, rate = plan_steps(dataset, config)

    def work(world: Any) -> int:
        kind: Any = case.method
        method: Method = kind(Context(world, network, dataset, config, make_backend("auto")))
        for step in range(steps):
            batch = Batch(batches.ids(*divmod(step, batches.steps_per_epoch)))
            stated = method.messages(step, len(batch))
            assert stated is not None, "Method.messages returns None, though these options fix the messages in advance"
            before = method.counter.sent, method.counter.received
            method.step(batch, rate(step))
            counted = method.counter.sent - before[0], method.counter.received - before[1]
            expected = totals(stated, world.rank)
            assert counted == expected, f"step {step}, rank {world.rank} of {world.size}: {counted}, not {expected}"
        return method.counter.sent

    for ranks in case.ranks:
        sent = run_ranks(ranks, work, timeout=120)
        assert sum(sent) > 0 or ranks == 1, f"{ranks} ranks sent no bytes"


def steps_are_clipped(case: Case) -> None:
    """--clip limits the length of a step of plain gradient descent.

    Clipping to norm 1e-3 with learning rate 1 gives a step of at most 1e-3 in each part of the weights that the method
    clips separately. The check allows 10 such parts, and expects a longer step without clipping.
    """
    lengths = []
    for clip in ("1e-3", "0"):
        network, dataset, config = case.problem("--optimizer", "sgd", "--lr", "1", "--clip", clip)
        batches, _, rate = plan_steps(dataset, config)

        def work(
            world: Any, network: Network = network, dataset: Dataset = dataset, config: Config = config,
            batches: Any = batches, rate: Callable[[int], float] = rate,
        ) -> float:  # fmt: skip
            kind: Any = case.method
            method: Method = kind(Context(world, network, dataset, config, make_backend("auto")))
            method.collect()
            before = method.state.vectors["weights"].copy()
            method.step(Batch(batches.ids(0, 0)), rate(0))
            method.collect()
            return float(np.linalg.norm(method.state.vectors["weights"] - before))

        lengths += run_ranks(case.ranks[0], work, timeout=60)
    parts = 10
    assert 0 < lengths[0] <= 1e-3 * parts**0.5 < lengths[-1], (
        f"lengths of steps on each rank, first with --clip 1e-3, then without: {lengths}"
    )


def memory_is_accounted_for(case: Case) -> None:
    """Method.memory() summed over all ranks equals the allocated bytes within a tenth.

    On each rank the least memory that Method.needed states is at most what Method.memory() states.
    """
    wide = ("--dtype", "float32", "--backend", "numpy", *case.method.exactness.wide)
    network, dataset, config = case.problem(*wide)
    batches, _, rate = plan_steps(dataset, config)
    tried = 0
    for ranks in (1, 2):
        with suppress(UserError):
            case.method.check(ranks, network, dataset, config)
            tried += 1
            _compare_memory(case, ranks, network, dataset, config, batches, rate)
    assert tried, f"the method accepts {' '.join(wide)} neither on 1 nor on 2 ranks: change `exactness.wide`"


def _compare_memory(
    case: Case, ranks: int, network: Network, dataset: Dataset, config: Config, batches: Any, rate: Any
) -> None:
    made: list[list[Any]] = [[] for _ in range(ranks)]

    needed = case.method.needed(ranks, network, dataset, config)

    def work(world: Any) -> int:
        kind: Any = case.method
        ops = NumpyOps()
        method: Method = kind(Context(world, network, dataset, config, ops))
        made[world.rank] = [method, ops]
        for step in range(2):
            method.step(Batch(batches.ids(0, step)), rate(step))
        method.test()
        stated = sum(method.memory().values())
        if needed:
            # psmpi.train refuses to start where memory is short of `needed`, which must not be too large.
            least = sum(needed[world.rank].values())
            assert least <= stated, (
                f"rank {world.rank} of {ranks}: memory() states {stated:,} bytes, but needed() {least:,}"
            )
        return stated

    # The first run imports modules and fills caches, whose memory must not count.
    run_ranks(ranks, work, timeout=60)
    made = [[] for _ in range(ranks)]
    tracemalloc.start()
    try:
        stated = sum(run_ranks(ranks, work, timeout=60))
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Leave out the backend's scratch: its size depends neither on the method nor on the network.
    held -= sum(array.nbytes for _, ops in made for array in ops.buffers.values())
    # memory() includes the buffers of a test, which are freed afterwards: compare it with the peak as well.
    assert (1 - MEMORY) * held <= stated <= (1 + MEMORY) * peak, (
        f"{ranks} rank(s): memory() states {stated:,} bytes, {held:,} are allocated, {peak:,} at the peak"
    )


def bad_settings_are_refused_once(case: Case) -> None:
    """A method's own setting that is out of range or NaN ends the job with one message that names the option."""
    bad: list[tuple[str, ...]] = []
    for kind in case.method.settings:
        hints = get_type_hints(kind, include_extras=True)
        for one in fields(kind):
            plain = get_args(hints[one.name])[0] if get_origin(hints[one.name]) is Annotated else hints[one.name]
            if get_origin(plain) is Literal:
                bad.append((option(one.name), "-".join(map(str, get_args(plain)))))
            elif plain is float:
                bad += [(option(one.name), "nan"), (option(one.name), "-5.0")]
            elif plain is int:
                bad.append((option(one.name), "-5"))
    ranks = case.ranks[-1]
    for words in bad:
        ended = case.end(ranks, *words, out=case.folder / "refused")
        output = ended.stdout + ended.stderr
        assert ended.status != 0, f"{' '.join(words)} is accepted"
        assert words[0] in output and "Traceback" not in output, f"{' '.join(words)}: {output}"


def a_rank_that_raises_ends_the_job(case: Case) -> None:
    """An error on one rank ends the job with that rank's message, and no other rank is left waiting."""
    ranks, kind = case.ranks[-1], case.method
    step: Any = kind.step

    def broken(self: Method, batch: Batch, lr: float) -> None:
        if self.context.world.rank == ranks - 1:
            raise UserError("this rank has had enough")
        step(self, batch, lr)

    with mock.patch.object(kind, "step", broken):
        ended = case.end(ranks, "--max-steps", str(STEPS), out=case.folder / "broken")
    assert ended.status != 0 and "this rank has had enough" in ended.stderr, ended.stderr
    assert f"rank {ranks - 1} of {ranks}" in ended.stderr or ranks == 1


def weights_that_are_no_numbers_end_it(case: Case) -> None:
    """Weights of NaN end the run with a FloatingPointError that has a message."""
    network, dataset, config = case.problem()
    batches, _, rate = plan_steps(dataset, config)

    def work(world: Any) -> None:
        kind: Any = case.method
        method: Method = kind(Context(world, network, dataset, config, make_backend("auto")))
        method.collect()
        method.state.vectors["weights"].fill(np.nan)
        method.state.restore()
        method.restored(False, frozenset())
        for step in range(3):
            method.step(Batch(batches.ids(0, step)), rate(step))

    for ranks in (case.ranks[0], case.ranks[-1]):
        try:
            run_ranks(ranks, work, timeout=60)
        except FloatingPointError as error:
            assert str(error), "the FloatingPointError has no message"
        else:
            raise AssertionError(f"on {ranks} rank(s) the method trains weights of NaN without an error")


def metrics_are_complete(case: Case) -> None:
    """Every epoch has a row of metrics with losses, accuracy, times and bytes, and as many bytes received as sent."""
    ranks = case.ranks[-1]
    metrics = rows(case.run(ranks, "--batch-size", "100"))
    assert [row["epoch"] for row in metrics] == list(range(1, case.config().run.epochs + 1))
    for row in metrics:
        for key in ("train_loss", "test_loss", "test_accuracy", "seconds", "samples_per_second"):
            assert isfinite(row[key]), key
        assert len(row["bytes_sent_by_rank"]) == len(row["bytes_received_by_rank"]) == ranks
        assert row["bytes_sent"] == row["bytes_received"]
        assert row.keys() >= {"step", "events"} and set(row) == set(metrics[0])


def settings_are_in_help_and_checkpoint(case: Case) -> None:
    """Each of the method's settings has an option in the help, and a checkpoint stores the settings unchanged."""
    text = case.end(1, "--help-all", out=case.folder / "none").stdout
    out = case.run(case.ranks[0], "--max-steps", "1")
    with h5py.File(newest(out)) as file:
        saved = from_toml(str(file["config"].asstr()[0]), "checkpoint")
    check(saved)
    for kind in case.method.settings:
        assert kind.__doc__ and saved.of(kind) == case.config().of(kind)
        assert all(option(one.name) in text for one in fields(kind))


CHECKS: tuple[Callable[[Case], None], ...] = (
    other_ranks_give_the_same,
    resumed_runs_end_the_same,
    other_ranks_go_on,
    counters_equal_messages,
    steps_are_clipped,
    memory_is_accounted_for,
    bad_settings_are_refused_once,
    a_rank_that_raises_ends_the_job,
    weights_that_are_no_numbers_end_it,
    steps_that_are_not_sound_leave_no_trace,
    runs_go_back,
    metrics_are_complete,
    settings_are_in_help_and_checkpoint,
)
