"""psl with samples weighed by their loss, that of the step or a remembered one, in trainings on several ranks."""

import numpy as np
import pytest

pytest.importorskip("mpi4py.MPI")

from helpers.runs import distance, run

from psmpi.backend import NumpyOps
from psmpi.comm.group import Counter, Group
from psmpi.comm.transfers import totals
from psmpi.data import Batch
from psmpi.layout import Runs
from psmpi.methods.psl.method import PartiallySeparable
from psmpi.nn.init import initial_weights
from psmpi.nn.losses import make_loss
from psmpi.nn.network import build
from psmpi.nn.objective import Objective
from psmpi.testing import run_ranks
from psmpi.testing.conformance import Case
from psmpi.testing.unsound import runs_go_back, steps_that_are_not_sound_leave_no_trace
from psmpi.training.class_sums import ClassSums
from psmpi.training.context import Context
from psmpi.training.loop import plan_steps

REMEMBERED = ("--psl-weights", "remembered")
PAIRS = (*REMEMBERED, "--partition", "pairs")
# Ranks and options.
PLACES = [(1, REMEMBERED), (3, REMEMBERED), (1, PAIRS), (4, PAIRS), (4, (*REMEMBERED, "--colocate", "--replicas", "2"))]
# Three and a half epochs of four steps.
SHORT = ("--dtype", "float64", "--batch-size", "400", "--epochs", "4", "--max-steps", "14", "--lr", "0.01")


@pytest.mark.parametrize("ranks", [1, 3])
def test_with_the_sums_of_the_step_a_training_is_that_of_cross_entropy(ranks, train):
    options = ("--dtype", "float64", "--max-steps", "20", "--colocate")
    weighed, expected = train(ranks, *options, "--psl-weights", "current"), train(ranks, *options, "--loss", "nll")
    assert distance(expected.tensors(), weighed.tensors()) <= 1e-11
    for key in ("train_loss", "test_loss", "test_accuracy", "test_top5"):
        assert weighed.rows[-1][key] == pytest.approx(expected.rows[-1][key], rel=1e-11)


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """The folder, x and y of a linear network of 5 classes on 50 samples, in minibatches of 12 with plain descent."""
    folder, rng = tmp_path_factory.mktemp("linear"), np.random.default_rng(0)
    x, y = rng.normal(size=(50, 6)), np.arange(50) % 5
    np.savez(folder / "data.npz", x=x, y=y, x_test=x, y_test=y)
    (folder / "linear.toml").write_text(
        '[model]\nmodel = "custom"\ndtype = "float64"\n[[model.layers]]\ntype = "dense"\nunits = 5\n'
        '[data]\nbatch_size = 12\nshuffle = false\n[optimization]\nlr = 0.5\nclip = 0.0\noptimizer = "sgd"\n'
        '[run]\nepochs = 4\n[objective]\nkappa = 1.5\npsl_weights = "remembered"\n'
    )
    return folder, x, y


def reference(x, y, steps):
    """Return weights (5, 6), biases (5,), remembered divisors (50,) and the mean loss of the last epoch's steps, by
    NumPy."""
    network = build("custom", (6,), [{"type": "dense", "units": 5}], 5)
    layout = network.layout()
    start = np.empty(layout.size)
    initial_weights(network, layout, Runs(((0, layout.size),)), start, seed=0)
    w, b = (np.empty(p.shape) for p in layout.parameters)
    for piece in layout.pieces():
        into = (w, b)[piece.parameter].reshape(5, -1)[piece.first : piece.last]
        into[...] = start[piece.offset : piece.offset + into.size].reshape(into.shape)
    r, new_divisors, losses = np.ones(50), np.zeros(50), []
    for step in range(steps):
        ids = np.arange(50)[12 * (step % 5) :][:12]
        scores, own = x[ids] @ w.T + b, np.eye(5, dtype=bool)[y[ids]]
        e = np.where(own, 0, np.exp(1.5 * (scores - scores[own][:, None])))
        divisors = np.maximum(1 + e, r[ids, None])
        d = 1.5 * e / divisors
        d[own] = -d.sum(axis=1)
        # The integral of e / max(1 + e, r) over the logarithm of e, from minus infinity.
        integral = np.minimum(e, r[ids, None] - 1) / r[ids, None] + np.log(divisors / r[ids, None])
        losses = losses if step % 5 else []
        losses.append(integral.sum() + (np.log(r[ids]) + 1 / r[ids] - 1).sum())
        new_divisors[ids] = 1 + e.sum(axis=1)
        w -= 0.5 * d.T @ x[ids] / len(ids)
        b -= 0.5 * d.sum(axis=0) / len(ids)
        if step % 5 == 4:
            r = new_divisors.copy()
    r[: min(50, 12 * (steps % 5))] = new_divisors[: min(50, 12 * (steps % 5))]
    return w, b, r, sum(losses) / min(50, 12 * (steps % 5 or 5))


@pytest.mark.parametrize(("ranks", "options"), PLACES, ids=str)
@pytest.mark.parametrize("steps", [pytest.param(5, marks=pytest.mark.slow), 18])
def test_what_is_remembered_weighs_the_next_visit(steps, ranks, options, linear, train):
    folder, x, y = linear
    w, b, r, loss = reference(x, y, steps)
    fixed = ("--dataset", folder / "data.npz", "--config", folder / "linear.toml", "--max-steps", str(steps))
    trained = train(ranks, *fixed, *options)
    tensors = trained.tensors()
    names = [name for name in tensors if name.startswith("weights/")]
    np.testing.assert_allclose(tensors[names[1]].reshape(w.shape), w, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(tensors[names[0]], b, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(tensors["elements/remembered"][:, 0], r, rtol=1e-10)
    assert trained.rows[-1]["train_loss"] == pytest.approx(loss, rel=1e-10)


def test_weighed_samples_have_all_scores_where_others_have_tiles_of_them(linear, train, monkeypatch):
    folder, x, y = linear
    fixed = ("--dataset", folder / "data.npz", "--config", folder / "linear.toml", "--max-steps", "10")
    untiled = train(1, *fixed, "--psl-weights", "current")
    monkeypatch.setattr("psmpi.nn.tail.tile_size", lambda batch: 2)
    assert distance(untiled.tensors(), train(1, *fixed, "--psl-weights", "current").tensors()) == 0
    np.testing.assert_allclose(train(1, *fixed).tensors()["elements/remembered"][:, 0], reference(x, y, 10)[2])


@pytest.mark.parametrize(
    ("ranks", "options"),
    [pytest.param(*place, marks=[pytest.mark.slow] * (place[0] == 1)) for place in PLACES],
    ids=str,
)
def test_a_run_that_goes_on_within_an_epoch_ends_in_the_same_bits(ranks, options, train):
    full_run = train(ranks, *SHORT, *options)
    # A checkpoint at any step collects the divisors of all workers.
    cut_run = train(ranks, *SHORT, *options, "--max-steps", "6", "--checkpoint-every", "3")
    resumed = train(ranks, *SHORT, *options, "--resume", "auto", out=cut_run.out)
    full_tensors, resumed_tensors = full_run.tensors(), resumed.tensors()
    assert full_tensors.keys() == resumed_tensors.keys() and "elements/remembered" in full_tensors
    assert all(np.array_equal(full_tensors[name], resumed_tensors[name]) for name in full_tensors)
    assert np.ptp(full_tensors["elements/remembered"]) > 0.1


def test_a_run_goes_on_elsewhere_with_what_was_remembered(train):
    full_tensors = train(1, *SHORT, *REMEMBERED).tensors()
    for before, after in (((3, PAIRS), (1, REMEMBERED)), ((1, REMEMBERED), (4, PAIRS))):
        cut_run = train(before[0], *SHORT, *before[1], "--max-steps", "6")
        resumed = train(after[0], *SHORT, *after[1], "--resume", "auto", out=cut_run.out)
        assert distance(full_tensors, resumed.tensors()) <= 1e-9


def test_a_checkpoint_of_other_weights_is_gone_on_with(train):
    first_run = train(1, *SHORT, "--max-steps", "6")
    resumed = train(1, *SHORT, *REMEMBERED, "--resume", "auto", out=first_run.out)
    assert "the divisors of these samples" in resumed.stdout


@pytest.mark.parametrize("options", [REMEMBERED, PAIRS], ids=str)
def test_steps_that_are_left_out_or_gone_back_from_are_not_remembered(options, tmp_path):
    steps_that_are_not_sound_leave_no_trace(Case("psl", tmp_path, options))
    if options == PAIRS:
        runs_go_back(Case("psl", tmp_path, options))


@pytest.mark.parametrize("options", [REMEMBERED, PAIRS], ids=str)
def test_ranks_exchange_what_they_have_found_at_the_end_of_an_epoch_alone(options, tmp_path):
    def counted(world, network, dataset, config):
        """Return the bytes sent and received in each step of three epochs, the declared bytes, and the number of
        samples."""
        method = PartiallySeparable(Context(world, network, dataset, config, NumpyOps()))
        batches, steps, rate = plan_steps(dataset, config)
        counts, declared = [(0, 0)], []
        for step in range(steps):
            batch = Batch(batches.ids(*divmod(step, batches.steps_per_epoch)))
            declared.append(totals(method.messages(step, len(batch)), world.rank))
            method.step(batch, rate(step))
            counts.append((method.counter.sent, method.counter.received))
        return np.diff(counts, axis=0), declared, dataset.train.n

    cases = [
        Case("psl", tmp_path, case_options).problem("--batch-size", "400") for case_options in (options, options[2:])
    ]
    remembered, plain = (run_ranks(3, lambda world, case=case: counted(world, *case)) for case in cases)
    for rank, ((with_exchange, declared, n), (without, *_)) in enumerate(zip(remembered, plain, strict=True)):
        assert np.array_equal(with_exchange, declared)
        # The two workers all-reduce 8 bytes a sample, 8 n bytes each way; rank 0 is no worker.
        extra = np.zeros((12, 2), int)
        extra[3::4] = 8 * n * (rank > 0)
        assert np.array_equal(with_exchange - without, extra)


@pytest.mark.parametrize("lenient", [False, True])
def test_all_ranks_learn_of_a_score_that_is_no_number(lenient):
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(9, 30)), rng.integers(0, 9, 30)
    scores[(labels[4] + 1) % 9, 4] = np.nan

    class Scores:
        ops, size, steps, dtype, w, g = NumpyOps(), 3, 0, np.dtype(float), None, None

    def work(world):
        loss = make_loss("psl", np.dtype(float), weights="current")
        loss.lenient = lenient
        sums = ClassSums(Group(world, range(3), Counter()), loss, [3] * 3, np.dtype(float), NumpyOps())
        objective = Objective(loss, Scores(), sums)
        objective.reserve(3, 30)
        first = 3 * world.rank
        try:
            objective.losses(scores[first : first + 3], labels - first, 1.0)
        except FloatingPointError:
            return True
        return not np.isfinite(objective.value())

    assert run_ranks(3, work) == [True] * 3


REFUSED = [
    (1, ("--loss", "logistic", "--psl-weights", "current"), "--psl-weights is of --loss psl"),
    (3, ("--psl-weights", "current", "--partition", "pairs"), "use --psl-weights remembered, or --partition scores"),
    (1, ("--psl-weights", "current", "--optimizer", "lbfgs"), "use another optimizer (adam, sgd, ...), or --loss nll"),
    (3, (*PAIRS, "--optimizer", "plbfgs"), "use another optimizer (adam, sgd, ...), or --loss nll"),
    (2, (*REMEMBERED, "--method", "data_parallel"), "use --psl-weights current, or --loss nll"),
    (1, ("--psl-weights", "old"), "remembered"),
]


@pytest.mark.parametrize(("ranks", "options", "says"), REFUSED)
def test_weights_that_cannot_be_are_refused_with_what_can(ranks, options, says, tmp_path):
    status, stdout, stderr = run(ranks, "-m", "psmpi.train", "--out", tmp_path / "run", *options)
    assert status != 0 and says in " ".join((stdout + stderr).split()) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["data_parallel", "ist"])
def test_other_methods_have_the_sums_of_the_step_too(method, train):
    options = ("--method", method, "--dtype", "float64", "--max-steps", "10")
    weighed, expected = train(2, *options, "--psl-weights", "current"), train(2, *options, "--loss", "nll")
    assert distance(expected.tensors(), weighed.tensors()) <= 1e-11
