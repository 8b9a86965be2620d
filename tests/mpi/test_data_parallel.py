"""Data parallelism: buckets, sums over ranks, and trainings against the serial one."""

import json
import threading

import numpy as np
import pytest
from helpers import program_sums
from helpers.layer_examples import NETWORKS, make
from helpers.paths import TESTS
from helpers.problems import random_problem
from helpers.processes import launch
from helpers.runs import distance, run
from hypothesis import given
from hypothesis import strategies as st

from psmpi.backend import NumpyOps
from psmpi.backend.reference.vectors import Vectors
from psmpi.comm.allreduce import ALGORITHMS, Ring
from psmpi.comm.buckets import FIRST, NEVER, SEGMENT, Blocking, Bucket, Buckets, Whole, plan_buckets
from psmpi.errors import UserError
from psmpi.nn.model import Model
from psmpi.testing import run_ranks
from psmpi.testing.conformance import Case, counters_equal_messages

DATA = ("--method", "data_parallel")


@given(st.integers(1, 60), st.integers(1, 80), st.lists(st.integers(0, 4), min_size=1, max_size=8), st.data())
def test_buckets_cover_the_gradient_in_the_order_of_backward(size, room, layers, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, size), min_size=len(layers) - 1, max_size=len(layers) - 1)))
    edges = [0, *cuts, size]
    spans = [(a, b, layer) for a, b, layer in zip(edges, edges[1:], layers, strict=False) if a < b]
    buckets = plan_buckets(spans, size, room)
    assert sorted(k for b in buckets for k in range(b.start, b.stop)) == list(range(size))
    assert all(b.stop - b.start <= room for b in buckets)
    assert [b.last for b in buckets] == sorted((b.last for b in buckets), reverse=True)
    for bucket in buckets:
        assert bucket.last == min(layer for a, b, layer in spans if a < bucket.stop and bucket.start < b)


def test_the_first_bucket_is_small_and_what_nobody_fills_is_ready():
    buckets = plan_buckets([(10, 100, 2), (100, 200, 5)], 200, 50)
    assert (buckets[0].start, buckets[0].stop, buckets[0].last) == (200 - 50 // FIRST, 200, 5)
    assert plan_buckets([(4, 8, 0)], 8, 4 * FIRST)[-1].last == 0 and plan_buckets([], 3, 100)[0].last == NEVER


@pytest.mark.parametrize("name", NETWORKS)
def test_a_bucket_is_whole_when_it_is_said_to_be(name):
    network = make(name)
    layout, w, x, d = random_problem(network)
    part = layout.part(range(network.classes))
    g = np.full(part.size, np.nan)
    model = Model(network, layout, np.concatenate([w[a:b] for a, b in part.intervals]), g, NumpyOps())
    buckets = plan_buckets(model.filled(), part.size, 5)
    assert not any(b.last == NEVER for b in buckets)
    copies, order = {}, []

    def finished(step):
        order.append(step)
        for bucket in buckets:
            if bucket.last >= step and bucket not in copies:
                copies[bucket] = g[bucket.start : bucket.stop].copy()

    model.finished = finished
    model.backward(model.forward(x), d)
    assert order == sorted(order, reverse=True) and len(copies) == len(buckets)
    for bucket, values in copies.items():
        assert np.array_equal(values, g[bucket.start : bucket.stop]) and np.isfinite(values).all()


@pytest.mark.parametrize(
    ("kind", "ranks"), [*(("threads", ranks) for ranks in (1, 2, 3, 5, 8)), ("mpirun", 3), ("mpirun", 4)]
)
def test_our_own_sums_are_sums_and_send_what_the_formulas_say(kind, ranks):
    names = ["ring"] if ranks in (3, 5) else ["ring", "doubling", "halving"]
    if kind == "threads":
        rows = run_ranks(ranks, lambda world: program_sums.sums(world, names))[0]
    else:
        status, out, err = launch(ranks, TESTS / "helpers" / "program_sums.py", *names)
        assert status == 0, err
        rows = json.loads(out)
    for name, size, error, distinct_results, sent in rows:
        assert error <= 1e-13 * ranks
        assert distinct_results == 1, (name, size)
        if size % ranks == 0:
            words = size * int(np.log2(ranks)) if name == "doubling" else 2 * size * (ranks - 1) // ranks
            assert sent == [words] * ranks, (name, size)


def test_pairing_algorithms_need_a_power_of_two():
    class Three:
        size, rank = 3, 0

    for name in ("doubling", "halving"):
        with pytest.raises(UserError, match="no power of two"):
            ALGORITHMS[name](Three(), np.zeros(3))


@pytest.mark.parametrize(
    ("dtype", "tolerance", "ranks", "optimizer"),
    [
        *(("float64", 1e-12, ranks, name) for ranks in (3, 4) for name in ("sgd", "momentum", "adam")),
        *(("float64", 1e-12, 1, "adam"), ("float32", 3e-5, 3, "adam"), ("float32", 3e-5, 4, "momentum")),
    ],
)
def test_weights_are_those_of_the_serial_run(train, serial, ranks, optimizer, dtype, tolerance):
    options = ("--dtype", dtype, "--max-steps", "50", "--epochs", "10", "--batch-size", "128", "--optimizer", optimizer,
               "--lr", "0.01")  # fmt: skip
    result = train(ranks, *DATA, *options)
    assert distance(serial(*options).tensors(), result.tensors()) <= tolerance
    expected = serial(*options).rows[-1]
    assert result.rows[-1]["test_accuracy"] == pytest.approx(expected["test_accuracy"], abs=1e-2)
    assert result.rows[-1]["train_loss"] == pytest.approx(expected["train_loss"], rel=10 * tolerance)


def test_a_last_minibatch_with_fewer_samples_than_ranks(train, serial):
    # 1,437 samples: four minibatches of 359 and one of a single sample.
    options = ("--dtype", "float64", "--epochs", "2", "--batch-size", "359")
    assert distance(serial(*options).tensors(), train(3, *DATA, *options).tensors()) <= 1e-12


@pytest.mark.parametrize("loss", ["nll", "squared"])
def test_networks_that_cannot_be_partitioned_are_replicated(train, serial, loss):
    options = ("--dtype", "float64", "--max-steps", "20", "--model", "mlp", "--widths", "30", "20", "--loss", loss)
    assert distance(serial(*options).tensors(), train(3, *DATA, *options).tensors()) <= 1e-12


@pytest.fixture
def another_processor(monkeypatch):
    """another_processor(*names): multiply rank 1's results of these methods of `Vectors` by 1 + 1e-10."""

    def change(*names):
        for name in names:
            original = getattr(Vectors, name)

            def changed(self, first, *rest, original=original):
                returned = original(self, first, *rest)
                factor = 1 + 1e-10 * (threading.current_thread().name == "rank 1")
                if returned is None:
                    first *= factor
                    return None
                return returned * factor

            monkeypatch.setattr(Vectors, name, changed)

    return change


@pytest.mark.parametrize("optimizer", ["lbfgs", "lbfgs-tr", "adam"])
def test_ranks_of_different_processors_take_the_same_steps(train, another_processor, optimizer):
    options = (*DATA, "--dtype", "float64", "--epochs", "2", "--batch-size", "240", "--optimizer", optimizer)
    options += ("--lr", "1" if optimizer == "lbfgs" else "0.01", "--backend", "numpy")
    plain = train(3, *options)
    another_processor("dots", "abs_sum", "squared_norm")
    mixed = train(3, *options)
    assert distance(plain.tensors(), mixed.tensors()) == 0


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (
            ("combine",),
            "were given different sums, or do not compute alike: use --allreduce ring, and no --compression",
        ),
        (("combine", "dots"), "do not compute alike, as their processors or libraries"),
    ],
)
def test_ranks_that_part_are_told_why_and_what_helps(another_processor, tmp_path, changed, says):
    another_processor(*changed)
    options = ("--dtype", "float64", "--epochs", "1", "--optimizer", "lbfgs", "--lr", "1", "--backend", "numpy")
    status, _, err = run(2, "-m", "psmpi.train", *DATA, *options, "--out", tmp_path / "run")
    assert status == 1 and f"the ranks no longer hold the same weights: they {says}" in err and "Traceback" not in err
    if len(changed) > 1:
        # The message offers processors of one kind, or copies that may differ: --method local_sgd.
        options = ("--method", "local_sgd", "--dtype", "float64", "--epochs", "1", "--backend", "numpy")
        assert run(2, "-m", "psmpi.train", *options, "--out", tmp_path / "other")[0] == 0


@pytest.mark.slow
def test_overlap_and_buckets_change_rounding_only(train):
    options = (*DATA, "--dtype", "float64", "--max-steps", "20", "--model", "mlp", "--widths", "60", "40")
    small = ("--bucket-megabytes", "0.005")
    large_buckets = train(4, *options)
    for algorithm in ("mpi", "ring", "halving"):
        overlapped, in_turn = (
            train(4, *options, *small, "--allreduce", algorithm, *more) for more in ((), ("--no-overlap",))
        )
        assert distance(overlapped.tensors(), in_turn.tensors()) == 0
        assert distance(overlapped.tensors(), large_buckets.tensors()) <= 1e-12


def test_large_buckets_go_round_in_rings_between_hosts():
    class Four:
        size, rank, nccl = 4, 1, None

    vector = np.zeros(4 * SEGMENT // 4 + 5, np.float32)
    buckets = [Bucket(5, len(vector), 1), Bucket(0, 5, 0)]
    for how, across, expected in (
        ("auto", True, [Ring, Whole]), ("auto", False, [Whole] * 2), ("mpi", True, [Whole] * 2),
        ("ring", False, [Ring] * 2), ("halving", True, [Blocking] * 2),
    ):  # fmt: skip
        assert [
            type(bucket_sum) for bucket_sum in Buckets(Four(), Four(), vector, buckets, how, across).sums
        ] == expected


@pytest.mark.parametrize("allreduce", ["auto", "mpi", "ring", "doubling", "halving"])
def test_a_step_sends_what_a_ring_sends(train, allreduce):
    # Sums of control data are not counted.
    result = train(4, *DATA, "--epochs", "1", "--max-steps", "5", "--allreduce", allreduce)
    size = sum(np.prod(t.shape, dtype=int) for name, t in result.tensors().items() if name.startswith("weights/"))
    words = size * 2 if allreduce == "doubling" else 2 * size * 3 // 4
    for sent in result.rows[-1]["bytes_sent_by_rank"]:
        assert abs(sent - 5 * 4 * words) <= 5 * 4 * 4


@pytest.mark.parametrize(
    ("first", "then", "optimizer"),
    [
        *((3, 3, "adam"), (3, 2, "adam"), (1, 4, "adam"), (1, 4, "lbfgs")),
        *(pytest.param(3, then, "lbfgs", marks=pytest.mark.slow) for then in (3, 2)),
    ],
)
def test_a_run_goes_on_on_any_number_of_ranks(train, serial, tmp_path, optimizer, first, then):
    options = ("--dtype", "float64", "--epochs", "10", "--optimizer", optimizer,
               "--lr", "1" if optimizer == "lbfgs" else "0.001")  # fmt: skip
    out = tmp_path / "begun"
    train(first, *DATA, *options, "--max-steps", "7", out=out)
    result = train(then, *DATA, *options, "--max-steps", "12", "--resume", "auto", out=out)
    serial_run = serial(*options, "--max-steps", "12")
    assert distance(serial_run.tensors(), result.tensors()) <= (1e-6 if optimizer == "lbfgs" else 1e-11)
    if first == then:
        full_run = train(first, *DATA, *options, "--max-steps", "12")
        assert distance(full_run.tensors(), result.tensors()) == 0


DEAD = """
[model]
model = "custom"
[[model.layers]]
type = "flatten"
[[model.layers]]
type = "dense"
units = 13
[[model.layers]]
type = "sigmoid"
[[model.layers]]
type = "separable_dense"
units = 10
groups = 10
"""


def test_units_that_no_score_depends_on_change_nothing(train, serial, tmp_path_factory):
    # No score depends on three of the thirteen units; only weight decay changes their weights.
    config = tmp_path_factory.mktemp("dead") / "net.toml"
    config.write_text(DEAD)
    options = ("--config", config, "--backend", "numpy", "--dtype", "float64", "--optimizer", "sgd", "--lr", "0.1",
               "--weight-decay", "0.001", "--max-steps", "60", "--epochs", "10")  # fmt: skip
    assert distance(serial(*options).tensors(), train(3, *DATA, *options).tensors()) <= 1e-12


@pytest.mark.parametrize("how", ["mpi", "ring", "doubling", "halving"])
def test_bytes_are_those_of_the_messages(tmp_path, how):
    """The number of weights is no multiple of the number of ranks."""
    counters_equal_messages(Case("data_parallel", tmp_path, ("--allreduce", how, "--model", "mlp", "--widths", "7")))


def test_compression_may_be_turned_on_and_off(train, tmp_path):
    options = (*DATA, "--epochs", "10")
    out = tmp_path / "begun"
    train(3, *options, "--max-steps", "5", out=out)
    topk = ("--compression", "topk", "--density", "0.05")
    compressed = train(3, *options, *topk, "--max-steps", "9", "--resume", "auto", out=out)
    assert "the checkpoint has no left: these start afresh" in compressed.stdout
    uncompressed = train(3, *options, "--max-steps", "12", "--resume", "auto", out=out)
    assert "afresh" not in uncompressed.stdout and "the optimizer starts" not in compressed.stdout


def test_methods_take_up_each_other_s_checkpoints(train, serial, tmp_path):
    options = ("--dtype", "float64", "--epochs", "10")
    for first, then in ((DATA, ()), ((), DATA)):
        out = tmp_path / str(len(first))
        train(3, *first, *options, "--max-steps", "7", out=out)
        result = train(2, *then, *options, "--max-steps", "12", "--resume", "auto", out=out)
        assert distance(serial(*options, "--max-steps", "12").tensors(), result.tensors()) <= 1e-10


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--masters", "2"), "--masters is of --method psl and ist, and the method here is data_parallel"),
        (("--local-steps", "5"), "--local-steps is of --method local_sgd"),
        (("--batch-size", "2"), "use --batch-size 3 or more"),
        (("--allreduce", "halving"), "3 is no power of two"),
        (("--bucket-megabytes", "0"), "expected 0.001 to 1e6"),
        (("--optimizer", "plbfgs"), "is of --method psl"),
    ],
)
def test_what_cannot_be_is_said(tmp_path, options, says):
    status, _, err = run(3, "-m", "psmpi.train", "--out", tmp_path / "run", *DATA, *options)
    assert status != 0 and err.count(says) == 1 and "Traceback" not in err, err


def test_a_run_that_diverges_ends_the_job(tmp_path):
    options = ("--optimizer", "sgd", "--lr", "1e38", "--clip", "0")
    status, _, err = run(3, "-m", "psmpi.train", "--out", tmp_path / "run", *DATA, *options, timeout=30)
    assert status != 0 and err.count("a score is not a finite number") == 1 and "Traceback" not in err, err
