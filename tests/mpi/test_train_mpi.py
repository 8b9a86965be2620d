"""Complete trainings: the same weights on any ranks, placements and partitions; bytes, memory and divergence."""

import json
import re

import numpy as np
import pytest
from helpers import program_counts
from helpers.paths import TESTS
from helpers.processes import launch
from helpers.runs import distance, run

from psmpi.nn.losses import LOSSES
from psmpi.testing import run_ranks

EXACT = ("--dtype", "float64", "--max-steps", "50", "--epochs", "10")


@pytest.mark.parametrize("masters", [1, 3])
@pytest.mark.parametrize("placement", ["master", "owner"])
@pytest.mark.parametrize(
    "ranks", [2, pytest.param(3, marks=pytest.mark.slow), 4, 7, pytest.param(11, marks=pytest.mark.slow)]
)
def test_weights_after_fifty_steps_do_not_depend_on_ranks_or_placement(train, serial, ranks, placement, masters):
    if masters >= ranks:
        pytest.skip("every rank would be a master: covered by the colocated runs")
    result = train(ranks, *EXACT, "--placement", placement, "--masters", masters)
    assert distance(serial(*EXACT).tensors(), result.tensors()) <= 1e-9
    assert result.rows[-1]["test_accuracy"] == serial(*EXACT).rows[-1]["test_accuracy"]
    assert result.rows[-1]["train_loss"] == pytest.approx(serial(*EXACT).rows[-1]["train_loss"], rel=1e-12)


@pytest.mark.parametrize("placement", ["master", "owner"])
@pytest.mark.parametrize(("ranks", "masters"), [(2, 2), (3, 3), (3, 1), pytest.param(11, 3, marks=pytest.mark.slow)])
def test_colocated_masters_give_the_same_weights(train, serial, ranks, masters, placement):
    options = ("--colocate", "--masters", masters, "--placement", placement)
    assert distance(serial(*EXACT).tensors(), train(ranks, *EXACT, *options).tensors()) <= 1e-9


@pytest.mark.parametrize("masters", [1, 3])
@pytest.mark.parametrize(
    "ranks", [1, pytest.param(2, marks=pytest.mark.slow), 4, pytest.param(7, marks=pytest.mark.slow), 11]
)
def test_the_pair_partition_gives_the_same_weights(train, serial, ranks, masters):
    if masters >= ranks > 1:
        pytest.skip("every rank would be a master")
    options = ("--partition", "pairs", "--masters", masters if ranks > 1 else 1)
    result = train(ranks, *EXACT, *options)
    assert distance(serial(*EXACT).tensors(), result.tensors()) <= 1e-9
    assert result.rows[-1]["test_accuracy"] == serial(*EXACT).rows[-1]["test_accuracy"]


@pytest.mark.parametrize("placement", ["master", "owner"])
@pytest.mark.parametrize(
    ("columns", "rows", "loss"),
    [
        pytest.param(*grid, loss, marks=[pytest.mark.slow] * (grid[0] > 2 and loss in ("logistic", "squared")))
        for grid in ((2, 1), (10, 1), (5, 2), (2, 3))
        for loss in ("psl", "logistic", "nll", "squared")
    ],
)
def test_grids_of_columns_and_replica_rows_follow_the_serial_run(train, serial, columns, rows, placement, loss):
    if loss in ("logistic", "squared") and (columns, rows) != (5, 2):
        pytest.skip("one grid is enough for this loss")
    options = ("--dtype", "float64", "--max-steps", "20", "--batch-size", "32", "--loss", loss)
    result = train(columns * rows + 1, *options, "--replicas", rows, "--placement", placement)
    assert distance(serial(*options).tensors(), result.tensors()) <= 1e-12


@pytest.mark.parametrize("placement", ["master", "owner"])
def test_float32_runs_agree_within_rounding(train, serial, placement):
    options = ("--max-steps", "20", "--batch-size", "32")
    assert distance(serial(*options).tensors(), train(8, *options, "--placement", placement).tensors()) <= 1e-5


@pytest.mark.parametrize(
    ("optimizer", "placement"),
    [
        *(("sgd", "master"), ("momentum", "owner"), ("nesterov", "master"), ("adamw", "owner"), ("rmsprop", "owner")),
        *(("lbfgs", "master"), ("lbfgs", "owner")),
    ],
)
def test_every_optimizer_gives_the_same_weights_on_many_ranks(train, serial, optimizer, placement):
    options = (
        "--dtype", "float64", "--max-steps", "20", "--optimizer", optimizer, "--weight-decay", "0.001",
        "--lr", "1" if optimizer == "lbfgs" else "0.01", "--schedule", "cosine", "--warmup-steps", "5",
    )  # fmt: skip
    result = train(7, *options, "--placement", placement, "--masters", "2", "--replicas", "2")
    tolerance = 1e-7 if optimizer == "lbfgs" else 1e-9
    assert distance(serial(*options).tensors(), result.tensors()) <= tolerance


@pytest.mark.parametrize("partition", [pytest.param("scores", marks=pytest.mark.slow), "pairs"])
def test_networks_whose_blocks_cut_channels_give_the_same_weights(train, serial, tmp_path_factory, partition):
    path = tmp_path_factory.mktemp("config") / "cut.toml"
    path.write_text(
        """
[model]
model = "custom"
dtype = "float64"
[[model.layers]]
type = "conv"
channels = 13
kernel = 3
[[model.layers]]
type = "mean_pool"
[[model.layers]]
type = "sigmoid"
[[model.layers]]
type = "flatten"
[[model.layers]]
type = "separable_dense"
units = 40
groups = 10
[[model.layers]]
type = "tanh"
[[model.layers]]
type = "separable_dense"
units = 10
groups = 10
"""
    )
    options = ("--config", path, "--max-steps", "20")
    for extra in (("--placement", "owner", "--masters", "2"), ("--placement", "master", "--replicas", "2")):
        result = train(8, *options, "--partition", partition, *extra)
        assert distance(serial(*options).tensors(), result.tensors()) <= 1e-9


def test_dense_networks_train_in_replica_rows(train, serial):
    options = ("--dtype", "float64", "--model", "mlp", "--widths", "20", "12", "--max-steps", "20", "--loss", "nll")
    assert distance(serial(*options).tensors(), train(4, *options, "--replicas", "3").tensors()) <= 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [6, 9, 12, 13, 22, 40])
def test_any_number_of_ranks_up_to_forty_trains(train, serial, ranks):
    """Groups of classes are uneven and replica rows ragged; test_partition plans every number of ranks from 1 to 40."""
    options = ("--max-steps", "3", "--dtype", "float64")
    result = train(ranks, *options, timeout=280)
    assert distance(serial(*options).tensors(), result.tensors()) <= 1e-9


def counted(ranks, *options):
    """Return the counts of program_counts.py on ranks that are threads, or in processes of their own where memory is
    traced."""
    if not any(option.startswith("--trace") for option in options):
        return run_ranks(ranks, lambda world: program_counts.count(world, options))[0]
    status, out, err = launch(ranks, TESTS / "helpers" / "program_counts.py", *options)
    assert status == 0, err
    return json.loads(out)


PSNETS = {"mnist": (1040, 4570), "cifar": (4560, 7719)}


@pytest.mark.parametrize(
    ("name", "columns", "rows"),
    [
        ("mnist", 10, 1),
        pytest.param("cifar", 10, 1, marks=pytest.mark.slow),
        ("mnist", 2, 1),
        ("cifar", 2, 1),
        pytest.param("mnist", 10, 2, marks=pytest.mark.slow),
    ],
)
def test_bytes_a_step_are_those_of_the_formulas(name, columns, rows):
    """Bytes sent by one worker, and in one direction at the master's link, with b = 100 and float32."""
    shared, private = PSNETS[name]
    batch, classes = 100 // rows, 10 // columns
    # The label's score and the sum of terms of each sample, in float32 and float64, around rings.
    sums = sum(2 * (columns - 1) * itemsize * batch // columns for itemsize in (4, 8))
    master = counted(columns * rows + 1, name, "--placement", "master", "--replicas", str(rows))
    assert master["sent"][1:] == [4 * (shared + classes * private) + sums] * (columns * rows)
    assert master["sent"][0] == master["received"][0] == 4 * rows * (columns * shared + 10 * private)
    owner = counted(columns * rows + 1, name, "--placement", "owner", "--replicas", str(rows))
    ring = 2 * (rows - 1) * 4 * classes * private // rows
    assert owner["sent"][1:] == [4 * shared + sums + ring] * (columns * rows)
    assert owner["sent"][0] == owner["received"][0] == 4 * columns * rows * shared
    if (name, columns, rows) == ("mnist", 10, 1):
        assert master["sent"][1] == 24600 and owner["sent"][1] == 6320


def test_bytes_of_the_pair_partition_are_those_of_its_table():
    result = counted(11, "mnist", "--partition", "pairs")
    assert result["sent"][0] == result["received"][0] == 772_800
    assert max(result["sent"][1:]) == 4 * 19_320


@pytest.mark.parametrize("scaling", ["none", pytest.param("moments", marks=pytest.mark.slow)])
def test_a_quasi_newton_step_moves_a_slice_a_product(scaling):
    """A step moves gradients once, and a slice each way for each product of conjugate gradients; no weights or
    curvature."""
    steps = 2
    result = counted(11, "mnist", "--partition", "pairs", "--optimizer", "plse", "--scaling", scaling, "--steps", "2")
    products, calls = result["products"], result["calls"]
    assert products > 2 * steps
    scatters = products + steps * (scaling == "moments")
    assert (calls["forward"], calls["backward"]) == (scatters, products + steps)
    assert result["sent"][0] == 772_800 * scatters and max(result["received"][1:]) == 4 * 19_320 * scatters
    assert result["received"][0] == 772_800 * (products + steps)
    assert max(result["sent"][1:]) == 4 * 19_320 * (products + steps)
    # Sums of a few numbers: the loss, the gradient's norm, one a product, the step's measures, the loss of each trial.
    assert calls["agree"] == products + 3 * steps + result["trials"]


def test_workers_never_hold_the_flat_vector():
    """Check the bytes of weights, gradient and optimizer state on each rank."""
    flat_size = 10 * 4570 + 1040
    owner = counted(11, "mnist", "--placement", "owner")
    assert owner["vectors"] == [4 * 1040 * 4] + [5610 * 4 * 2 + 4570 * 4 * 2] * 10
    master = counted(11, "mnist", "--placement", "master", "--masters", "1")
    assert master["vectors"] == [4 * flat_size * 4] + [5610 * 4 * 2] * 10
    pairs = counted(11, "mnist", "--partition", "pairs")
    assert max(pairs["vectors"][1:]) == 19_320 * 4 * 2


def test_no_owner_allocates_anything_of_the_size_of_the_flat_vector():
    """The traced memory of each rank peaks below one flat vector, which has over 10 MB."""
    result = counted(12, "wide", "--placement", "owner", "--trace", "--masters", "2")
    assert result["size"] * 4 > 10_000_000
    assert max(result["peak"]) < result["size"] * 4


@pytest.mark.slow
def test_no_worker_of_a_master_allocates_anything_of_the_size_of_the_flat_vector():
    result = counted(11, "wide", "--placement", "master", "--trace")
    assert max(result["peak"][1:]) < result["size"] * 4 < result["peak"][0]


def test_replicas_of_a_private_block_stay_bit_identical():
    result = counted(7, "mnist", "--placement", "owner", "--replicas", "3", "--steps", "5")
    digests = result["private"][1:]
    assert digests[0] == digests[2] == digests[4] != digests[1] == digests[3] == digests[5]


def test_a_step_allocates_nothing_that_grows_with_the_network():
    result = counted(1, "wide", "--trace-step")
    assert result["step_peak"] < 0.05 * result["size"] * 4


def test_metrics_hold_a_row_an_epoch(train):
    rows = train(3, "--epochs", "2").rows
    keys = {"epoch", "step", "seconds", "train_loss", "test_loss", "test_accuracy", "samples_per_second",
            "bytes_sent", "bytes_received"}  # fmt: skip
    assert [r["epoch"] for r in rows] == [1, 2] and all(keys <= r.keys() for r in rows)
    assert rows[1]["step"] == 30 and rows[1]["seconds"] > rows[0]["seconds"]
    for row in rows:
        assert row["bytes_sent"] == sum(row["bytes_sent_by_rank"]) > 0
        assert row["bytes_received"] == sum(row["bytes_received_by_rank"]) > 0
        assert np.isfinite([row["train_loss"], row["test_loss"]]).all()


def test_psl_in_float32_survives_margins_beyond_the_dtype(train):
    """Margins far beyond the largest float32 exponential give no NaN and no infinity, and a note counts them."""
    result = train(3, "--lr", "10", "--epochs", "2")
    assert all(np.isfinite(tensor).all() for tensor in result.tensors().values())
    assert all(np.isfinite([row["train_loss"], row["test_loss"]]).all() for row in result.rows)
    assert result.rows[0]["train_loss"] > 1e38, "margins were to be large"
    assert result.stdout.count("psl terms past exp clip") == 1


def test_a_loss_that_is_huge_from_the_beginning_is_no_divergence(tmp_path):
    """A warning says that samples are not scaled, and the loss falls."""
    rng = np.random.default_rng(0)
    y = np.arange(400) % 4
    x = 1e4 * (rng.normal(0, 2, (4, 20))[y] + rng.normal(0, 1, (400, 20)))
    np.savez(tmp_path / "x.npz", x=x.astype(np.float32), y=y)
    options = ("--dataset", "x.npz", "--model", "mlp", "--widths", "16", "--epochs", "12", "--out", "run")
    status, out, err = run(1, "-m", "psmpi.train", *options, cwd=tmp_path)
    assert status == 0 and "warning: x has values up to" in out, err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["train_loss"] > 1e38 and rows[-1]["train_loss"] < 1e-3 * rows[0]["train_loss"]


WIDE = ("--model", "mlp", "--widths", "64", "64")


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        *(
            pytest.param(ranks, ("--lr", "1e30", "--loss", loss), marks=[pytest.mark.slow] * (k % 2 == (ranks > 1)))
            for ranks in (1, 3)
            for k, loss in enumerate(LOSSES)
        ),
        # The rate is not huge, but most terms are past the dtype.
        (3, ("--lr", "100", "--kappa", "2")),
        (4, ("--lr", "1e30", "--partition", "pairs")),
        (4, ("--lr", "1e30", "--replicas", "2", "--colocate")),
        (1, ("--lr", "1e30", "--exp-clip", "3")),
        *((2, ("--lr", "1e30", "--method", method)) for method in ("data_parallel", "local_sgd", "ist")),
        (2, ("--lr", "1e30", "--method", "dfa", "--model", "mlp", "--widths", "32")),
        (2, ("--lr", "1e30", "--method", "sil", "--model", "mlp", "--widths", "32")),
        # The loss grows to 1e9 at most.
        (2, ("--lr", "10", "--optimizer", "sgd", "--loss", "nll", "--method", "dfa", *WIDE)),
    ],
)
def test_a_training_that_diverges_to_finite_numbers_is_an_error(tmp_path, ranks, options):
    out = tmp_path / "run"
    status, _, err = run(ranks, "-m", "psmpi.train", *options, "--clip", "0", "--epochs", "3", "--out", out)
    message = " ".join(err.split())
    assert status == 1 and "the training diverged" in message and "lower --lr" in message and "Traceback" not in message
    assert not list((out / "checkpoints").glob("*.h5"))


def test_large_losses_of_a_training_that_learns_are_no_divergence(train):
    """The weights are large, and the share of misclassified samples is small."""
    options = ("--method", "dfa", *WIDE, "--loss", "hinge", "--lr", "1", "--clip", "0", "--batch-size", "32")
    rows = train(2, *options, "--epochs", "6").rows
    assert rows[-1]["test_accuracy"] > 0.85 and max(row["train_loss"] for row in rows) > 1e4


def test_large_values_to_learn_are_no_divergence(train, tmp_path):
    rng = np.random.default_rng(0)
    x = rng.random((60, 4))
    np.savez(tmp_path / "large.npz", x=x, y=1e9 * x.sum(axis=1), x_test=x, y_test=1e9 * x.sum(axis=1))
    options = ("--dataset", tmp_path / "large.npz", "--loss", "squared", "--model", "mlp", "--widths", "5")
    assert train(1, *options, "--epochs", "2", "--batch-size", "20").rows[-1]["train_loss"] > 1e17


@pytest.mark.parametrize(
    ("ranks", "clip"),
    [(1, "off"), (3, "auto"), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, "auto"), (3, "off")))],
)
def test_a_line_search_survives_trials_that_overflow(train, ranks, clip):
    """A trial step of length 1e30 overflows and is shortened."""
    options = ("--optimizer", "lbfgs", "--lr", "1e30", "--exp-clip", clip, "--epochs", "1")
    assert train(ranks, *options).rows[-1]["train_loss"] < 20


def test_terms_past_the_clip_are_counted_once(train):
    counts = [
        re.search(r"psl terms past exp clip: (\d+)", train(n, "--exp-clip", "0.5", "--max-steps", "3", *more).stdout)[1]
        for n, more in ((1, ()), (3, ()), (4, ()), (4, ("--partition", "pairs")), (7, ("--replicas", "2")))
    ]
    assert len(set(counts)) == 1 and int(counts[0]) > 0


def test_replica_rows_may_be_without_test_samples(train, tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "x.npz", x=rng.random((40, 8, 8)), y=np.arange(40) % 10,
             x_test=rng.random((1, 8, 8)), y_test=np.array([3]))  # fmt: skip
    options = ("--dataset", tmp_path / "x.npz", "--batch-size", "10", "--epochs", "1", "--replicas", "2")
    assert train(3, *options).rows[-1]["test_accuracy"] in (0.0, 1.0)


def test_the_placement_table_appears_once(train):
    stdout = train(4, "--epochs", "1").stdout
    assert stdout.count("computes with") == 1 and stdout.count("\nepoch ") == 1
    assert "master" in stdout and stdout.count("worker") == 3
