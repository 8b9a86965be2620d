"""--on-nan: losses and gradients that are not finite are named, and their steps skipped or rolled back."""

from unittest import mock

import h5py
import numpy as np
import pytest
from helpers.runs import launch, run

from psmpi.checkpoint import available, newest
from psmpi.config import check
from psmpi.data import open_dataset
from psmpi.errors import UserError
from psmpi.testing.case import Case, rows, tensors
from psmpi.testing.poison import poisoned
from psmpi.testing.unsound import steps_that_are_not_sound_leave_no_trace
from psmpi.train import parse
from psmpi.training.element_worker import ElementWorker

MLP = ("--model", "mlp", "--widths", "12", "12", "--loss", "nll")
# Methods, and numbers of ranks that train this network.
METHODS = [
    *((name, ranks) for name in ("data_parallel", "local_sgd", "ist", "dfa", "sil") for ranks in (1, 3)),
    ("psl", 1),
]
BAD = 17


@pytest.fixture(scope="module")
def huge(tmp_path_factory):
    """A data set whose sample 17 overflows float32 in the first layer."""
    rng = np.random.default_rng(0)
    x, y = rng.random((200, 100)).astype(np.float32), rng.integers(0, 5, 200)
    x[BAD] = 3.3e38
    path = tmp_path_factory.mktemp("data") / "huge.npz"
    np.savez(path, x=x, y=y, x_test=x[20:60], y_test=y[20:60])
    return path


def train(ranks, out, *options, timeout=120):
    status, stdout, stderr = run(ranks, "-m", "psmpi.train", "--out", out, *options, timeout=timeout)
    assert "Traceback" not in stderr, stderr
    return status, " ".join(stdout.split()), " ".join(stderr.split())


def finite(out):
    """Return whether all weights in a run's checkpoints are finite."""
    return all(
        np.isfinite(weights).all() for path in available(out) for weights in tensors(path, ("weights",)).values()
    )


@pytest.mark.parametrize(("method", "ranks"), METHODS)
def test_a_huge_sample_is_named_with_layer_step_and_number(tmp_path, huge, method, ranks):
    options = ("--method", method, *MLP, "--dataset", huge, "--batch-size", "20", "--epochs", "3")
    status, _, message = train(ranks, tmp_path / "run", *options)
    assert status == 1 and message.count("error: the loss is not a finite number in step 7 of epoch 1: ") == 1, message
    assert f"(sample {BAD} of {huge})" in message and "look at such samples" in message
    if (method, ranks) != ("dfa", 3):
        assert "layer dense1 is the first to put out" in message
    assert not available(tmp_path / "run")


@pytest.mark.parametrize(("method", "ranks"), METHODS)
def test_a_huge_sample_is_skipped_in_each_epoch(tmp_path, huge, method, ranks):
    options = ("--method", method, *MLP, "--dataset", huge, "--batch-size", "20", "--epochs", "3")
    status, output, message = train(ranks, tmp_path / "run", *options, "--on-nan", "skip")
    assert status == 0, message
    metrics = rows(tmp_path / "run")
    # A subnet may have no path on which the sample overflows.
    assert metrics[-1]["events"]["steps_skipped"] in ((2, 3) if method == "ist" else (3,))
    assert all(0 < row["train_loss"] < 10 for row in metrics) and finite(tmp_path / "run")
    assert f"1 step skipped, 1 in all; the first: {'rank ' * (ranks > 1)}" in output and f"sample {BAD}" in output


@pytest.mark.parametrize(
    ("method", "mode", "ranks"),
    [
        pytest.param(method, mode, ranks, marks=[] if (k + m) % 2 == (ranks > 1) else [pytest.mark.slow])
        for k, method in enumerate(("data_parallel", "psl", "local_sgd", "ist"))
        for m, mode in enumerate(("stop", "skip", "rollback"))
        for ranks in (1, 3)
    ],
)
def test_a_rate_beyond_all_bounds_ends_in_every_mode(tmp_path, method, mode, ranks):
    """The error names the update, checkpoints have finite weights only, and no rank hangs."""
    options = ("--method", method, "--lr", "1e38", "--optimizer", "sgd", "--clip", "0", "--epochs", "2")
    status, output, message = train(ranks, tmp_path / "run", *options, "--on-nan", mode, timeout=60)
    assert status == 1 and message.count("error: ") == 1 and "lower --lr" in message, message
    assert "layer dense" in message or "left weights that are not finite: " in message
    assert finite(tmp_path / "run")
    if mode == "rollback":
        assert output.count("back to the start, step 0, and on with 0.") == 3 and "went back 3 times" in message


def test_processes_go_back_together_too(tmp_path):
    """Ranks are processes, and messages are in flight when one of them finds numbers that are not finite."""
    options = ("--lr", "1e38", "--optimizer", "sgd", "--clip", "0", "--epochs", "2", "--batch-size", "100")
    words = ("-m", "psmpi.train", "--out", tmp_path / "run", *options, "--on-nan", "rollback")
    status, stdout, stderr = launch(3, *words, timeout=120)
    assert status == 1 and " ".join(stdout.split()).count("back to the start, step 0, and on with 0.") == 3
    assert "went back 3 times" in stderr and "Traceback" not in stderr


@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_the_rank_of_a_row_is_named_whose_scores_are_wrong(tmp_path, mode):
    """A weight of rank 2 becomes NaN; the error names rank 2 and the class, though rank 1 shares the row."""
    losses = ElementWorker.element_losses
    calls = []

    def losses_with_nan(self, batch, own=None):
        if 9 in self.place.classes:
            calls.append(1)
            if len(calls) == 3:
                self.model.w[-1] = np.nan
        return losses(self, batch, own)

    with mock.patch.object(ElementWorker, "element_losses", losses_with_nan):
        status, _, message = train(3, tmp_path / "run", "--epochs", "1", "--on-nan", mode)
    assert status == 1 and "in step 3 of epoch 1: on rank 2 the update of step 2 left weights that are not" in message
    assert "dense2.bias, unit 9 of 10 (class 9) (NaN)" in message


@pytest.mark.parametrize(
    ("method", "ranks", "options", "named"),
    [
        ("data_parallel", 3, (), "that of conv1.weight and"),
        ("data_parallel", 3, ("--no-overlap",), "that of conv1.weight and"),
        ("local_sgd", 3, (), "that of conv1.weight and"),
        ("psl", 3, (), "(classes 5-9)"),
        ("psl", 5, ("--replicas", "2"), "(classes "),
        ("psl", 3, ("--trunk", "split"), "(classes 5-9)"),
        ("psl", 4, ("--partition", "pairs"), "(classes "),
    ],
)
def test_a_gradient_of_one_rank_is_named_by_parameter_classes_and_rank(tmp_path, method, ranks, options, named):
    """In skip mode each rank computes its gradient again, so that the note also names the rank."""
    last, short = ranks - 1, ("--method", method, *options, "--max-steps", "5")
    for mode in ("stop", "skip"):
        with poisoned(lambda rank, step: (rank, step) == (last, 3)) as hit:
            status, output, message = train(ranks, tmp_path / mode, *short, "--on-nan", mode)
        assert hit == {(last, 3)} and status == (mode == "stop"), message
        text = message if mode == "stop" else output
        assert (
            "the gradient is not a finite number in step 3 of epoch 1: that of conv1.weight" in text and named in text
        )
        assert mode == "stop" or f"rank {last}: the gradient" in output


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("data_parallel", ("--compression", "topk")),
        ("data_parallel", ("--compression", "powersgd")),
        ("data_parallel", ("--compression", "qsgd")),
        ("data_parallel", ("--optimizer", "lbfgs")),
        ("data_parallel", ("--clip", "0")),
        ("psl", ("--optimizer", "lbfgs-tr")),
        ("psl", ("--optimizer", "plbfgs", "--partition", "pairs")),
        ("psl", ("--optimizer", "plse", "--partition", "pairs", "--scaling", "moments")),
        ("sil", ("--hand-over", "labels", "--labels-noise", "0")),
        ("ist", ("--optimizer-state", "travel")),
    ],
)
def test_what_is_remembered_is_left_alone_too(tmp_path, method, options):
    """A skipped step leaves residuals of compression, pairs of L-BFGS and the curvature of elements as they were."""
    steps_that_are_not_sound_leave_no_trace(Case(method, tmp_path, options))


def test_a_replica_leaves_out_its_own_step_alone(tmp_path):
    """The other ranks make their steps, and the average has all copies."""
    short = ("--method", "local_sgd", "--local-steps", "4", "--max-steps", "3", "--on-nan", "skip", "--lr", "0.01")
    copies = []
    for bad in (None, 2):
        with poisoned(lambda rank, step, bad=bad: rank == bad and step == 2):
            assert train(3, tmp_path / str(bad), *short)[0] == 0
        with h5py.File(newest(tmp_path / str(bad))) as file:
            copies.append(file["rank/weights"][...])
    assert np.array_equal(copies[0][:2], copies[1][:2]) and not np.array_equal(copies[0][2], copies[1][2])
    assert rows(tmp_path / "2")[-1]["events"]["steps_skipped"] == 1


def test_losses_of_steps_that_are_left_out_are_not_in_the_mean(tmp_path):
    """At this rate weights do not move: the losses of runs that skip complementary minibatches add up to the loss of
    all three."""
    n, b = open_dataset("digits", "").train.n, 480
    options = ("--batch-size", b, "--epochs", "1", "--lr", "1e-30", "--dtype", "float64", "--on-nan", "skip")
    means = []
    for number, bad in enumerate(((), (2,), (1, 3))):
        with poisoned(lambda rank, step, bad=bad: step in bad):
            assert train(2, tmp_path / str(number), *options)[0] == 0
        means.append(rows(tmp_path / str(number))[-1]["train_loss"])
    assert n * means[0] == pytest.approx((n - b) * means[1] + b * means[2], rel=1e-12) and means[1] != means[2]
    # The mean is the same in a run that stops after two steps and is resumed.
    with poisoned(lambda rank, step: step == 1):
        assert train(2, tmp_path / "part", *options, "--max-steps", "2")[0] == 0
    with poisoned(lambda rank, step: step == 3):
        assert train(2, tmp_path / "part", *options, "--max-steps", "0", "--resume", "auto")[0] == 0
    assert rows(tmp_path / "part")[-1]["train_loss"] == pytest.approx(means[2], rel=1e-12)


@pytest.mark.parametrize(("method", "ranks"), [("psl", 1), ("psl", 3), ("local_sgd", 3)])
def test_more_than_ten_steps_in_a_row_are_an_error(tmp_path, method, ranks):
    short = ("--method", method, "--on-nan", "skip", "--epochs", "1", "--batch-size", "30")
    with poisoned(lambda rank, step: 5 <= step < 15):
        assert train(ranks, tmp_path / "ten", *short)[0] == 0
    assert rows(tmp_path / "ten")[-1]["events"]["steps_skipped"] == 10 * (ranks if method == "local_sgd" else 1)
    with poisoned(lambda rank, step: step >= 5):
        status, _, message = train(ranks, tmp_path / "more", *short)
    assert status == 1 and message.count("in step 15 of epoch 1") == 1 and "10 steps before were skipped too" in message


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_run_that_went_back_goes_on_with_its_rate_after_a_resume(tmp_path, ranks):
    options = ("--on-nan", "rollback", "--checkpoint-every", "4")
    with poisoned(lambda rank, step: step == 6):
        assert train(ranks, tmp_path / "whole", *options, "--max-steps", "14")[0] == 0
    with poisoned(lambda rank, step: step == 6):
        assert train(ranks, tmp_path / "part", *options, "--max-steps", "9")[0] == 0
    # The lower rate holds in another mode too.
    assert train(ranks, tmp_path / "part", "--on-nan", "stop", "--resume", "auto", "--max-steps", "14")[0] == 0
    full_tensors, resumed_tensors = tensors(newest(tmp_path / "whole")), tensors(newest(tmp_path / "part"))
    assert all(np.array_equal(full_tensors[name], resumed_tensors[name]) for name in full_tensors)
    with h5py.File(newest(tmp_path / "part")) as file:
        assert '"lr_factor": 0.5' in str(file["scalars"].asstr()[0])


def test_rows_beyond_the_checkpoint_are_made_again(tmp_path):
    """Epochs have 3 steps and checkpoints come every 4, so going back to step 4 drops row 2, of step 6."""
    options = ("--on-nan", "rollback", "--batch-size", "480", "--checkpoint-every", "4", "--epochs", "4")
    with poisoned(lambda rank, step: step == 7) as hit:
        status, output, _ = train(2, tmp_path / "run", *options)
    metrics = rows(tmp_path / "run")
    assert (
        status == 0 and hit and output.count("step-000000004.h5, step 4, and on with 0.5 times the learning rate") == 1
    )
    assert [row["epoch"] for row in metrics] == [1, 2, 3, 4] and [row["step"] for row in metrics] == [3, 6, 9, 12]
    assert [row["events"]["rollbacks"] for row in metrics] == [0, 1, 1, 1]


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("mode", ["stop", "skip", "rollback"])
def test_no_checkpoint_holds_what_is_not_finite(tmp_path, ranks, mode):
    """Without clipping no norm shows a bad gradient; in the step before a checkpoint it leaves weights that no loss has
    used."""
    options = ("--clip", "0", "--checkpoint-every", "4", "--checkpoint-keep", "0", "--max-steps", "9")
    with poisoned(lambda rank, step: step == 8) as hit:
        status, output, message = train(ranks, tmp_path / "run", *options, "--on-nan", mode)
    assert (
        hit
        and finite(tmp_path / "run")
        and newest(tmp_path / "run").name.endswith("4.h5" if mode == "stop" else "9.h5")
    )
    assert status == (mode == "stop") and (mode != "stop" or "not finite, and not saved, of weights: conv1" in message)
    assert mode != "rollback" or "step-000000004.h5, step 4" in output


def test_epochs_that_end_only_to_go_back_count_as_tries(tmp_path):
    """Step 7 always fails, one epoch after the last checkpoint."""

    def always(rank, step):
        hits.clear()
        return step == 7

    options = ("--on-nan", "rollback", "--batch-size", "480", "--checkpoint-every", "4", "--epochs", "4")
    with poisoned(always) as hits:
        status, output, message = train(1, tmp_path / "run", *options, timeout=60)
    assert status == 1 and "went back 3 times" in message and output.count("step-000000004.h5, step 4") == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--on-nan", "rollback", "--optimizer", "lbfgs-tr"), "--optimizer lbfgs-tr has none; use --on-nan skip"),
        (("--on-nan", "never"), "invalid choice"),
        (
            ("--on-nan", "skip", "--optimizer", "plbfgs", "--partition", "pairs", "--extrapolation", "constant"),
            "use --extrapolation none",
        ),
    ],
)
def test_what_cannot_be_is_said(tmp_path, options, says):
    status, _, message = train(1, tmp_path / "run", *options)
    assert status != 0 and says in message, message


def test_a_method_that_cannot_leave_out_a_step_says_what_can(monkeypatch):
    config = parse(["--on-nan", "skip"])
    check(config)
    monkeypatch.setattr(Case("psl", None).method, "skips", False)
    with pytest.raises(UserError, match="use --on-nan rollback, or stop"):
        check(config)
