"""Hogwild: one rank, and components on any ranks, take the steps of serial descent to the bit; several ranks end near
its loss."""

import json
from itertools import combinations
from unittest import mock

import numpy as np
import pytest
from helpers.runs import run

from psmpi.backend import Descent, NumpyOps, Rows, compiled, make_backend
from psmpi.data import Batch
from psmpi.errors import UserError
from psmpi.methods.hogwild.elements import of_pairs
from psmpi.methods.hogwild.method import Hogwild
from psmpi.methods.hogwild.server import ServerStore
from psmpi.methods.hogwild.sparsity import of_rows
from psmpi.methods.hogwild.stores import WindowStore
from psmpi.nn.network import build
from psmpi.testing.conformance import CHECKS, Case, tensors
from psmpi.testing.windows import ThreadSharded, ThreadWindows
from psmpi.testing.world import run_ranks
from psmpi.training.context import Context
from psmpi.training.loop import plan_steps

KINDS = ("raw", "atomic", "accumulate", "server", "cyclades")
MLP = ("--dataset", "digits", "--model", "mlp", "--widths", "20", "--loss", "nll")
PLAIN = ("--optimizer", "sgd", "--lr", "0.1", "--dtype", "float64", "--batch-size", "50", "--threads", "1")
LINEAR = ("--dataset", "sparse", "--model", "linear", "--loss", "logistic", "--optimizer", "sgd", "--clip", "0", "--lr",
          "0.3", "--schedule", "step", "--step-size", "160", "--gamma", "0.8", "--batch-size", "50", "--epochs", "10",
          "--threads", "1")  # fmt: skip
# No bias, because all samples would share it.
UNBIASED = """
[model]
model = "custom"

[[model.layers]]
type = "dense"
units = 1
bias = false

[[model.layers]]
type = "binary"
"""

needs_kernels = pytest.mark.skipif(not compiled.level(), reason="no compiled kernels, or none for this processor")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
def test_one_rank_is_serial_descent_to_the_bit(train, kind, optimizer):
    options = (*MLP, *PLAIN, "--optimizer", optimizer, "--weight-decay", "1e-3", "--epochs", "2")
    tensors = train(1, "--method", "hogwild", "--updates", kind, *options).tensors()
    expected = train(1, "--method", "data_parallel", *options).tensors()
    for name, tensor in expected.items():
        if name.startswith("weights/"):
            assert np.array_equal(tensors[name], tensor), name


def serial(options, epochs, scale=1.0, kind="logistic", penalty=0.0):
    """Return (w, samples, dataset) after the sparse kernel's steps, sample after sample in the order of a run."""
    case = Case("hogwild", None)
    case.words = lambda *more: ["--method", "hogwild", *map(str, options), *more]
    network, dataset, config = case.problem()
    batches, _, rate = plan_steps(dataset, config)
    split = dataset.train
    rows, dtype = split.compressed, np.dtype(config.model.dtype)
    counts = np.bincount(rows.columns, minlength=rows.features)
    samples = Rows(rows.starts, rows.columns, rows.values.astype(dtype), (2 * split.labels - 1).astype(dtype),
                   (split.n / np.maximum(1, counts)).astype(dtype))  # fmt: skip
    layout = network.layout()
    w = np.zeros(layout.size, dtype)
    run_ranks(1, lambda world: Context(world, network, dataset, config, NumpyOps()).draw_weights(
        next(iter(Hogwild(Context(world, network, dataset, config, NumpyOps())).shards.runs)), w))  # fmt: skip
    ops, bias = make_backend("auto"), w[rows.features :]
    for step in range(epochs * batches.steps_per_epoch):
        ids = batches.ids(*divmod(step, batches.steps_per_epoch))
        descent = Descent(rate(step), penalty, config.optimization.clip, kind, scale)
        ops.sparse_steps(ids, samples, w[: rows.features], bias if bias.size else None, descent, False)
    return w, samples, dataset


def weights_of(trained):
    tensors = trained.tensors()
    names = sorted((name for name in tensors if name.startswith("weights/")), reverse=True)
    return np.concatenate([tensors[name].reshape(-1) for name in names])


def loss_of(w, samples):
    """Return the mean logistic loss over compressed rows by its definition, in float64."""
    margins = np.add.reduceat(samples.values.astype(np.float64) * w[samples.columns], samples.starts[:-1])
    return float(np.logaddexp(0, -samples.targets * (margins + w[-1])).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_takes_sparse_samples_one_after_the_other(train, kind):
    expected, _, _ = serial((*LINEAR, "--epochs", "2"), 2)
    trained = train(1, "--method", "hogwild", "--updates", kind, *LINEAR, "--epochs", "2")
    assert np.array_equal(weights_of(trained), expected)


@pytest.mark.parametrize(("loss", "kind", "scale"), [("hinge", "hinge", 1), ("squared", "squared", 0.5)])
def test_other_losses_and_the_penalty_of_support_vector_machines(train, loss, kind, scale):
    options = (*LINEAR, "--loss", loss, "--weight-decay", "1e-4", "--epochs", "1", "--lr", "0.05", "--clip", "1")
    expected, _, _ = serial(options, 1, scale, kind, 1e-4)
    assert np.array_equal(weights_of(train(1, "--method", "hogwild", *options)), expected)


@pytest.mark.parametrize("loss", ["logistic", "hinge", "squared", "nll"])
def test_kernels_and_networks_make_the_same_steps(train, loss):
    """In minibatches of one sample, the kernel steps as the network's forward and backward passes do."""
    options = (*LINEAR, "--loss", loss, "--batch-size", "1", "--max-steps", "300", "--dtype", "float64", "--lr", "0.05")
    trained = train(1, "--method", "hogwild", *options)
    expected = train(1, "--method", "data_parallel", *options)
    assert np.allclose(weights_of(trained), weights_of(expected), rtol=0, atol=1e-12)
    assert trained.rows[-1]["train_loss"] == pytest.approx(expected.rows[-1]["train_loss"], rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_four_ranks_end_as_one_does_on_sparse_samples(train, kind):
    w, samples, _ = serial(LINEAR, 10)
    best = loss_of(w, samples)
    loss = loss_of(weights_of(train(4, "--method", "hogwild", "--updates", kind, *LINEAR)), samples)
    print(f"{kind}: {loss:.5f}, serial {best:.5f}")
    assert loss <= 1.01 * best


@pytest.mark.parametrize("kind", ["raw", "accumulate", "server"])
def test_blocks_of_samples_end_as_one_rank_does(train, kind):
    w, samples, _ = serial(LINEAR, 10)
    trained = train(4, "--method", "hogwild", "--updates", kind, "--update-samples", "20", *LINEAR)
    assert loss_of(weights_of(trained), samples) <= 1.01 * loss_of(w, samples)


@needs_kernels
@pytest.mark.parametrize("model", ["unbiased", "biased", "mlp"])
def test_components_make_the_weights_of_one_rank_to_the_bit(train, tmp_path, model):
    (tmp_path / "one.toml").write_text(UNBIASED)
    linear = ("--config", tmp_path / "one.toml", *LINEAR[:2], *LINEAR[4:], "--epochs", "2")
    options = {"unbiased": linear, "biased": (*LINEAR, "--epochs", "2"), "mlp": (*MLP, *PLAIN, "--epochs", "2")}[model]
    options = (*options, "--batch-size", "12") if model == "unbiased" else options
    one_rank = weights_of(train(1, "--method", "hogwild", *options))
    for ranks in (1, 2, 4):
        trained = train(ranks, "--method", "hogwild", "--updates", "cyclades", *options)
        assert np.array_equal(weights_of(trained), one_rank), ranks
    if model == "unbiased":
        expected, _, _ = serial(options, 2)
        assert np.array_equal(one_rank, expected)


def problem(*options):
    case = Case("hogwild", None)
    case.words = lambda *more: ["--method", "hogwild", *map(str, options), *more]
    return case.problem()


def test_one_clock_at_a_time_is_synchronous_descent():
    """A barrier separates a clock's reads from its additions: weights move along the sum of all ranks' gradients."""
    ranks, rounds = 3, 4
    network, dataset, config = problem(
        *MLP, *PLAIN, "--updates", "accumulate", "--staleness", "0", "--epochs", "1", "--clip", "0"
    )
    batches, _, _ = plan_steps(dataset, config)
    read = WindowStore.read

    def reads(self):
        read(self)
        self.group.comm.Barrier()

    def work(world):
        method = Hogwild(Context(world, network, dataset, config, NumpyOps()))
        for step in range(rounds * ranks):
            method.step(Batch(batches.ids(0, step)), 0.1)
        method.store.settle()
        return method.store.w.copy()

    def serial_descent(world):
        method = Hogwild(Context(world, network, dataset, config, NumpyOps()))
        w, updates = method.store.w, method.updates
        for first in range(0, rounds * ranks, ranks):
            total = np.zeros_like(w)
            for step in range(first, first + ranks):
                updates.gradient(Batch(batches.ids(0, step)))
                total += updates.g
            w -= 0.1 * total
        return w.copy()

    # The ranks are threads, so one patch of the class is for all of them.
    with mock.patch.object(WindowStore, "read", reads):
        by_rank = run_ranks(ranks, work, timeout=60)
    (expected,) = run_ranks(1, serial_descent, timeout=60)
    for w in by_rank:
        assert np.linalg.norm(w - expected) <= 1e-12 * np.linalg.norm(expected)


@pytest.mark.parametrize("ranks", [2, 3, 5, 9])
def test_the_server_adds_all_that_is_sent(tmp_path, ranks):
    sent = [0] * ranks
    add = ServerStore.add

    def adds(self, change, factor):
        sent[self.group.rank] += 1
        add(self, change, factor)

    with mock.patch.object(ServerStore, "add", adds):
        options = (
            "--method",
            "hogwild",
            "--updates",
            "server",
            *MLP,
            *PLAIN,
            "--update-samples",
            "20",
            "--epochs",
            "2",
        )
        status, _, err = run(ranks, "-m", "psmpi.train", *options, "--out", tmp_path / "run")
    assert status == 0, err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    histogram = rows[-1]["staleness"]
    assert sum(histogram) == sum(sent) > 0 and not sent[0]
    assert all(n > 0 for n in sent[1:])
    # A rank is at most 4 minibatches, of 3 updates each, ahead of the slowest.
    assert len(histogram) - 1 <= 3 * (2 * 4 + 2) * (ranks - 2) or ranks == 2
    if ranks == 2:
        assert len(histogram) == 1


def broken(self, values):
    """Lose the addition."""


def fails(self, number, by=1):
    raise RuntimeError("MPI_ERR_RMA_SYNC")


@pytest.mark.parametrize(
    ("place", "name", "how", "told"),
    [
        (ThreadSharded, "add", broken, "additions of int64 to windows get lost"),
        ("psmpi.testing.windows.ThreadCounters", "count", fails, "one-sided calls fail (MPI_ERR_RMA_SYNC)"),
    ],
)
def test_windows_that_do_not_work_are_told_of_and_a_server_takes_over(tmp_path, place, name, how, told):
    patch = mock.patch.object(place, name, how) if not isinstance(place, str) else mock.patch(f"{place}.{name}", how)
    with patch:
        options = ("--method", "hogwild", *MLP, *PLAIN, "--epochs", "1", "--updates", "accumulate")
        status, out, err = run(3, "-m", "psmpi.train", *options, "--out", tmp_path / "run")
    assert status == 0, err
    assert f"warning: MPI's windows do not work here, {told}" in " ".join(out.split())
    assert "server" in out


def test_ranks_of_several_hosts_use_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(ThreadWindows, "one_host", False)
    options = ("-m", "psmpi.train", "--method", "hogwild", *MLP, *PLAIN, "--epochs", "1")
    status, out, err = run(3, *options, "--out", tmp_path / "run")
    assert status == 0 and "(--updates accumulate): the ranks are on several hosts" in " ".join(out.split()), err
    for kind in ("raw", "atomic", "cyclades"):
        status, _, err = run(3, *options, "--updates", kind, "--out", tmp_path / kind)
        assert status == 1 and f"--updates {kind} needs all ranks on one host" in err


@needs_kernels
@pytest.mark.parametrize(
    ("options", "kind"), [(MLP, "atomic"), (LINEAR[:6], "raw"), ((*LINEAR[:6], "--update-samples", "5"), "raw")]
)
def test_auto_says_what_it_takes_and_why(tmp_path, options, kind):
    status, out, err = run(
        2, "-m", "psmpi.train", "--method", "hogwild", *options, *PLAIN, "--max-steps", "3", "--out", tmp_path / "run"
    )
    assert status == 0, err
    assert f"(--updates {kind}): all ranks are on one host" in " ".join(out.split())


def test_without_kernels_updates_go_by_windows(tmp_path):
    options = ("-m", "psmpi.train", "--method", "hogwild", *MLP, *PLAIN, "--backend", "numpy", "--epochs", "1")
    status, out, err = run(2, *options, "--out", tmp_path / "run")
    assert status == 0 and "there are no compiled kernels" in " ".join(out.split()), err
    status, _, err = run(2, *options, "--updates", "atomic", "--out", tmp_path / "atomic")
    assert status == 1 and "--updates atomic needs the compiled kernels" in err


def test_tickets_train_every_minibatch_once(tmp_path):
    network, dataset, config = problem(*MLP, *PLAIN, "--hand-out", "tickets", "--epochs", "2")
    batches, steps, rate = plan_steps(dataset, config)

    def work(world):
        method = Hogwild(Context(world, network, dataset, config, make_backend("auto")))
        trained, update = [], method.updates.run
        method.updates.run = lambda ids, lr: (trained.append(int(ids[0])), update(ids, lr))[1]
        for step in range(steps):
            method.step(Batch(batches.ids(*divmod(step, batches.steps_per_epoch))), rate(step))
        return trained

    first_ids = sorted(first for trained in run_ranks(4, work, timeout=60) for first in trained)
    steps_per_epoch = batches.steps_per_epoch
    assert first_ids == sorted(
        int(batches.ids(*divmod(step, steps_per_epoch))[0]) for step in range(2 * steps_per_epoch)
    )


def test_with_nothing_said_it_trains_on_generated_data(tmp_path):
    status, out, err = run(2, "-m", "psmpi.train", "--method", "hogwild", "--out", tmp_path / "run")
    assert status == 0, err
    message = " ".join(out.split())
    assert "--dataset sparse" in message and "give --dataset and --model for your own" in message
    assert "Omega 10, Delta 0.1" in message
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["test_accuracy"] > 0.75


def test_omega_delta_and_rho_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    sets = [set(rng.choice(25, rng.integers(1, 5), replace=False).tolist()) for _ in range(60)]
    starts = np.cumsum([0, *map(len, sets)])
    columns = np.concatenate([sorted(row) for row in sets])
    sparsity = of_rows(starts, columns, 25, 0)
    assert sparsity.omega == max(map(len, sets)) and sparsity.sampled == 0
    assert sparsity.delta == max(sum(v in row for row in sets) for v in range(25)) / 60
    assert sparsity.rho == max(sum(bool(row & other_row) for other_row in sets) for row in sets) / 60
    sampled = of_rows(starts, columns, 25, 0, most=20)
    assert sampled.sampled == 20 and sampled.rho <= sparsity.rho


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--staleness", "-1"), "--staleness -1: expected auto, none, or a whole number"),
        (("--staleness", "1.5"), "--staleness 1.5: expected"),
        (("--flush-every", "0"), "--flush-every 0: expected a whole number from 1 up"),
        (("--flush-every", "2", "--updates", "raw"), "--flush-every is an option of --updates accumulate"),
        (("--updates", "cyclades", "--staleness", "2"), "is not for --updates cyclades"),
        (("--hand-out", "tickets", "--staleness", "2"), "counts turns"),
        (("--hand-out", "tickets", "--updates", "server"), "--hand-out tickets is not for --updates server"),
        (("--update-samples", "60"), "--update-samples 60 with 50 samples a minibatch"),
        (("--optimizer", "lbfgs"), "--optimizer lbfgs"),
        (("--optimizer", "muon"), "whole matrices"),
        (("--optimizer", "adamw", "--weight-decay", "0.1"), "whose decay is part of the gradient"),
        (("--batch-norm", "--update-samples", "1"), "makes the outputs of one sample 0"),
        (("--dtype", "float16"), "float16"),
        (("--on-nan", "skip"), "--on-nan skip"),
    ],
)
def test_what_cannot_be_is_refused_once(tmp_path, options, told):
    status, out, err = run(
        3, "-m", "psmpi.train", "--method", "hogwild", *MLP, *PLAIN, *options, "--out", tmp_path / "run"
    )
    assert status != 0
    assert told in " ".join((out + err).replace("│", " ").split())
    assert "Traceback" not in err


def test_more_ranks_than_weights_are_refused():
    network, dataset, config = problem(*LINEAR)
    with pytest.raises(UserError, match=r"2,001 weights for 2,002 ranks"):
        Hogwild.check(2002, network, dataset, config)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("kind", ["raw", "server"])
def test_other_updates_pass_the_suite(kind, check, tmp_path):
    if check.__name__ == "counters_equal_messages":
        pytest.skip("the shared memory has no messages; a server's counts are of all that came while it waited")
    if kind == "raw" and not compiled.level():
        pytest.skip("no compiled kernels, or none for this processor")
    check(Case("hogwild", tmp_path, ("--updates", kind)))


def test_resumed_on_one_rank_it_goes_on_to_the_bit(train, tmp_path):
    options = ("--method", "hogwild", *MLP, *PLAIN, "--optimizer", "adam", "--lr", "0.01", "--epochs", "2")
    full_run = train(1, *options, "--max-steps", "40")
    cut_run = train(1, *options, "--max-steps", "17", out=tmp_path / "part")
    train(1, *options, "--max-steps", "40", "--resume", "auto", out=tmp_path / "part")
    full_tensors, resumed_tensors = full_run.tensors(), tensors(max((cut_run.out / "checkpoints").glob("step-*.h5")))
    assert full_tensors.keys() == resumed_tensors.keys() and all(
        np.array_equal(full_tensors[k], resumed_tensors[k]) for k in full_tensors
    )


PAIRS = ("--dataset", "digits", "--model", "psnet", "--loss", "logistic", "--elements", *PLAIN, "--clip", "0")


@pytest.mark.parametrize("loss", ["psl", "logistic"])
def test_updates_of_elements_are_the_gradient_and_of_two_classes_each(loss):
    """The updates of all pairs, at the same weights, add up to the minibatch's gradient; each changes weights of its
    element only."""
    network, dataset, config = problem(*PAIRS, "--loss", loss)
    batches, _, _ = plan_steps(dataset, config)

    def work(world):
        method = Hogwild(Context(world, network, dataset, config, NumpyOps()))
        ids, w = batches.ids(0, 0), method.store.w
        expected = method.worker.element_losses(Batch(ids), Batch(ids))
        full_gradient, summed, updates = method.g.copy(), np.zeros_like(w), []

        def keep(part, g, factor):
            change = np.zeros_like(w)
            position = 0
            for start, stop in part.intervals:
                change[start:stop] = g[position : position + stop - start]
                position += stop - start
            summed[...] += change
            updates.append(np.flatnonzero(change))

        method.updates._add = keep
        total = method.updates.run(ids, 1.0)
        return total / len(ids), expected, summed, full_gradient, updates, method.updates.parts

    ((total, expected, summed, full_gradient, updates, parts),) = run_ranks(1, work)
    assert total == pytest.approx(expected, rel=1e-12)
    assert np.abs(summed - full_gradient).max() <= 1e-12 * np.abs(full_gradient).max()
    assert len(updates) == len(parts) == 45
    for places, part in zip(updates, parts, strict=True):
        inside = np.zeros(full_gradient.size, bool)
        for start, stop in part.intervals:
            inside[start:stop] = True
        assert inside[places].all() and not inside.all()


def test_pairs_without_shared_weights_meet_where_they_have_a_class_in_common():
    tables = [{"type": "flatten"}, {"type": "dense", "units": 10}]
    layout = build("rows", (1, 8, 8), tables, 10).layout()
    sparsity = of_pairs(layout, list(combinations(range(10), 2)))
    assert sparsity.omega == 2 * 65 and sparsity.sampled == 0
    # 9 of the 45 pairs have a given class, and 17 have one of two given classes.
    assert sparsity.delta == 9 / 45 and sparsity.rho == 17 / 45


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["raw", "accumulate", "server"])
def test_elements_train_as_whole_minibatches_do(train, kind):
    options = (*PAIRS, "--lr", "0.3", "--epochs", "8", "--clip", "1")
    elements = train(3, "--method", "hogwild", "--updates", kind, *options)
    one_rank = train(1, "--method", "hogwild", *options)
    assert "Omega 1,056, Delta 1, rho 1" in " ".join(elements.stdout.split())
    assert elements.rows[-1]["test_accuracy"] >= one_rank.rows[-1]["test_accuracy"] - 0.05
    assert one_rank.rows[-1]["test_accuracy"] > 0.5


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--loss", "nll"), "--elements needs a loss that is a sum over pairs"),
        (("--optimizer", "adam"), "--elements steps one element at a time"),
        (("--update-samples", "5"), "--elements makes updates of pairs of classes"),
        (("--dataset", "adding", "--model", "lstm", "--loss", "squared"), "--elements is for classes"),
    ],
)
def test_elements_that_cannot_be_are_refused(tmp_path, options, told):
    status, _, err = run(2, "-m", "psmpi.train", "--method", "hogwild", *PAIRS, *options, "--out", tmp_path / "run")
    assert status == 1 and told in " ".join(err.split())


RATINGS = ("--dataset", "ratings:200", "--model", "factors", "--widths", "5", "--loss", "squared", "--optimizer", "sgd",
           "--lr", "0.05", "--clip", "0", "--threads", "1", "--init-gain", "1")  # fmt: skip


def test_kernels_of_factors_and_networks_make_the_same_steps(train):
    options = (*RATINGS, "--batch-size", "1", "--max-steps", "400", "--dtype", "float64")
    trained = train(1, "--method", "hogwild", *options)
    expected = train(1, "--method", "data_parallel", *options)
    assert np.allclose(weights_of(trained), weights_of(expected), rtol=0, atol=1e-12)
    assert trained.rows[-1]["train_loss"] == pytest.approx(expected.rows[-1]["train_loss"], rel=1e-9)


@needs_kernels
def test_factors_in_components_are_those_of_one_rank_and_learn_the_matrix(train, tmp_path):
    options = (*RATINGS, "--batch-size", "50", "--epochs", "30")
    one_rank = train(1, "--method", "hogwild", *options)
    components = train(4, "--method", "hogwild", "--updates", "cyclades", *options)
    assert np.array_equal(weights_of(components), weights_of(one_rank))
    raw = train(4, "--method", "hogwild", *options)
    assert "(--updates raw)" in " ".join(raw.stdout.split())
    # The values have variance 1.
    assert one_rank.rows[-1]["test_rmse"] < 0.6 and raw.rows[-1]["test_rmse"] <= 1.05 * one_rank.rows[-1]["test_rmse"]
    windows = train(3, "--method", "hogwild", "--updates", "accumulate", *options, "--epochs", "2")
    assert windows.rows[-1]["train_loss"] < 1.2
    status, out, err = run(1, "-m", "psmpi.inspect", "export", one_rank.checkpoint, "--out", tmp_path / "factors.onnx")
    assert status == 0 and "onnxruntime's scores differ" in out, err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--dataset", "digits", "--loss", "nll"), "--model factors learns entries of a matrix"),
        (("--widths", "5", "6"), "--model factors has one rank"),
    ],
)
def test_what_factors_are_not_of_is_refused(tmp_path, options, told):
    status, _, err = run(1, "-m", "psmpi.train", *RATINGS, *options, "--method", "hogwild", "--out", tmp_path / "run")
    assert status == 1 and told in " ".join(err.split())
