"""Training and prediction on arrays equal those on files, errors name Python arguments, the process is unchanged."""

import json
import os
import pickle
import signal
import warnings
from functools import partial

import numpy as np
import pytest
import scipy.sparse
from helpers.arrays import on_ranks, ranks_are_threads
from helpers.processes import launch
from helpers.runs import run

import psmpi
from psmpi.arrays.fitted import flat_weights
from psmpi.checkpoint import Contents, read_contents
from psmpi.config import Config, changes
from psmpi.registry import BUILTIN, DEFAULT
from psmpi.testing.conformance import tensors
from psmpi.train import parse

SMALL = {"widths": (16,), "epochs": 5, "batch_size": 20, "lr": 0.01}


@pytest.fixture(autouse=True)
def threads():
    with ranks_are_threads():
        yield


def samples(n=200, features=4, seed=0):
    return np.random.default_rng(seed).normal(size=(n, features)).astype(np.float32)


X = samples()
TRUE = X[:, 0] + X[:, 1] > 0
LABELS = {
    "integers": np.where(TRUE, 7, -3),
    "strings": np.where(TRUE, "yes", "no"),
    "booleans": TRUE,
    "objects": np.where(TRUE, "yes", "no").astype(object),
    "bytes": np.where(TRUE, b"yes", b"no"),
    "a list": np.where(TRUE, "yes", "no").tolist(),
}


@pytest.mark.parametrize("y", LABELS.values(), ids=LABELS)
def test_labels_are_those_that_were_given(y):
    training = psmpi.fit(X, y, **{**SMALL, "epochs": 30})
    classes = np.unique(np.array(y).astype(str) if isinstance(y, list) else y.astype(str) if y.dtype == object else y)
    assert training.network.classes.tolist() == classes.tolist()
    assert (training.predict(X) == np.asarray(y)).mean() > 0.95
    proba = training.network.predict_proba(X)
    assert proba.shape == (200, 2) and np.allclose(proba.sum(axis=1), 1)
    assert (training.network.classes[proba.argmax(axis=1)] == training.predict(X)).all()
    assert len(training.metrics) == 30 and training.scores["test_accuracy"] > 0.9


def test_a_linear_regression_ends_at_the_least_squares():
    y = X @ np.array([[1.0, 2], [-1, 0], [0.5, 1], [3, 0]]) + samples(200, 2, 1) + 2
    layers = [{"type": "dense", "units": 2}]
    training = psmpi.fit(
        X, y, X, y, model="custom", layers=layers, optimizer="lbfgs", batch_size=200, epochs=60, dtype="float64"
    )
    ones = np.column_stack([X, np.ones(len(X))]).astype(float)
    expected = ones @ np.linalg.lstsq(ones, y, rcond=None)[0]
    assert training.predict(X) == pytest.approx(expected, abs=1e-4)
    assert training.network.classes is None
    single_target = psmpi.fit(X, y[:, 0], **SMALL)
    assert single_target.predict(X[:3]).shape == (3,)


@pytest.mark.parametrize("ranks", [1, 3])
def test_it_is_the_training_of_the_command_line(ranks, tmp_path):
    y = TRUE.astype(int)
    np.savez(tmp_path / "data.npz", x=X, y=y)
    options = "--model mlp --method data_parallel --widths 16 --epochs 5 --batch-size 20 --lr 0.01 --dataset"
    status, out, err = run(
        ranks, "-m", "psmpi.train", *options.split(), tmp_path / "data.npz", "--out", tmp_path / "run", cwd=tmp_path
    )
    assert status == 0, err + out
    (file,) = (tmp_path / "run" / "checkpoints").glob("step-*40.h5")
    trainings = on_ranks(ranks, lambda rank: psmpi.fit(X, y, **SMALL))
    for training in trainings:
        for name, values in training.network.weights.items():
            np.testing.assert_array_equal(values, tensors(file)[f"weights/{name}"])
    assert (psmpi.load(tmp_path / "run").predict(X) == trainings[0].predict(X)).all()


def test_all_ranks_get_what_one_process_gets():
    for extra in ({"model": "mlp"}, {"model": "head"}, {"method": "tensor"}):
        options = {**SMALL, "dtype": "float64", **extra}
        call = partial(psmpi.fit, X, LABELS["strings"], **options)
        (serial,), parallel = (on_ranks(ranks, lambda rank, call=call: call()) for ranks in (1, 3))
        for training in parallel:
            np.testing.assert_array_equal(training.network.vector, parallel[0].network.vector)
            np.testing.assert_allclose(training.network.vector, serial.network.vector, rtol=1e-9, atol=1e-12)
            assert training.scores == parallel[0].scores and training.folder is None


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda rank: psmpi.fit(X + (rank == 1), TRUE, **SMALL), "the data set on rank 1"),
        (
            lambda rank: psmpi.fit(X, TRUE, **{**SMALL, "epochs": 5 + rank}),
            "rank 1 calls psmpi.fit with other settings",
        ),
        (lambda rank: psmpi.fit(X[:, : 4 - rank // 2], TRUE, **SMALL), "the data set on rank 2"),
        (lambda rank: psmpi.fit(X if rank else X[0], TRUE, **SMALL), "x has the shape (4,)"),
        (lambda rank: psmpi.fit(X, TRUE, lr=-1.0), "lr -1.0: expected a number above 0"),
        (lambda rank: psmpi.fit(X, TRUE, partition="scores", widths=(16,)), "cannot be partitioned"),
    ],
)
def test_an_error_is_raised_on_all_ranks(call, said):
    errors = on_ranks(3, call)
    assert len({str(error) for error in errors}) == 1
    assert all(isinstance(error, psmpi.UserError) and said in str(error) for error in errors), errors


WRONG = [
    ({"lerning_rate": 1}, "unknown setting 'lerning_rate'; did you mean lr?"),
    ({"optimiser": "sgd"}, "did you mean optimizer?"),
    ({"dataset": "digits"}, "the samples here are arrays"),
    ({"private_data": True}, "the samples here are arrays"),
    ({"lr": "fast"}, "lr = 'fast': expected float"),
    ({"batch_size": 0}, "batch_size 0: expected a whole number"),
    ({"epochs": 2.5}, "epochs = 2.5: expected int"),
    ({"method": "foo"}, "method foo is unknown"),
    ({"resume": "auto"}, "resume auto needs out"),
    ({"kappa": 2.0, "loss": "nll"}, "kappa is an option of loss psl, logistic and hinge"),
    ({"lr": 1e30, "optimizer": "sgd", "clip": 0.0}, "the training diverged"),
    ({"out": "/proc/psmpi"}, "name a folder that can be made"),
]


@pytest.mark.parametrize(("settings", "said"), WRONG)
def test_a_wrong_setting_is_raised_in_words_for_python(settings, said, capfd):
    with pytest.raises(psmpi.UserError) as error:
        psmpi.fit(X, TRUE, **{"widths": (16,), **settings})
    assert said in str(error.value) and "--" not in str(error.value)
    assert capfd.readouterr() == ("", "")


ONES = np.ones(200)
BAD = [
    (X[:, 0], TRUE, "x has the shape (200,)"),
    (X, TRUE[:50], "50 labels in y for 200 samples"),
    (X, TRUE[:, None], "give y.ravel()"),
    (X, ["a", 1] * 100, "UserError"),
    (X, np.array(["a", 1] * 100, object), "labels of several types, int and str"),
    (X.astype(complex), TRUE, "x is complex128"),
    (X.astype(str), TRUE, "x holds strings"),
    ([[1, 2], [3]], [0, 1], "x is no array of numbers"),
    (np.where(X > 2, np.nan, X), TRUE, "not finite numbers"),
    (X, np.where(TRUE, np.nan, 1.0), "values that are not finite"),
    (X, ONES + 1j, "y is complex128"),
    (np.ma.masked_array(X, X > 1), TRUE, "masked values"),
    (X[:0], TRUE[:0], "x is empty"),
    (X, np.zeros((200, 3), int), "expected (200,), one label a sample"),
]


@pytest.mark.parametrize(("x", "y", "said"), BAD)
def test_wrong_arrays_are_named(x, y, said):
    if said == "UserError":
        # NumPy makes strings of both.
        assert psmpi.fit(x, y, **SMALL).network.classes.tolist() == ["1", "a"]
        return
    with pytest.raises(psmpi.UserError) as error:
        psmpi.fit(x, y, **SMALL)
    assert said in str(error.value)


def test_test_labels_that_cannot_be_learnt_are_refused():
    y = LABELS["strings"]
    with pytest.raises(psmpi.UserError, match="y_test has the label perhaps of 1 sample"):
        psmpi.fit(X, y, X[:3], ["yes", "no", "perhaps"], **SMALL)
    with pytest.raises(psmpi.UserError, match="labels of one type"):
        psmpi.fit(X, y, X[:3], [0, 1, 1], **SMALL)
    with pytest.raises(psmpi.UserError, match="one of x_test and y_test"):
        psmpi.fit(X, y, X[:3], **SMALL)
    training = psmpi.fit(X, y, X[:3], y[:3], **SMALL)
    assert training.scores["test_accuracy"] in (0, 1 / 3, 2 / 3, 1)


def test_pixels_are_divided_and_other_integers_are_not():
    images = np.random.default_rng(0).integers(0, 256, (200, 6, 6))
    y = images.mean(axis=(1, 2)) > 127
    pixels, floats = (psmpi.fit(x, y, **SMALL) for x in (images.astype(np.uint8), (images / 255).astype(np.float32)))
    np.testing.assert_allclose(pixels.network.vector, floats.network.vector, rtol=1e-3, atol=1e-5)
    from_int16, from_float32 = (psmpi.fit(x, y, **SMALL) for x in (images.astype(np.int16), images.astype(np.float32)))
    np.testing.assert_array_equal(from_int16.network.vector, from_float32.network.vector)
    assert np.allclose(pixels.network.scores(images.astype(np.uint8)), pixels.network.scores(images / 255), atol=1e-5)


def test_sparse_samples_are_those_of_a_dense_array():
    x = np.where(np.random.default_rng(0).random((200, 30)) < 0.2, samples(200, 30), 0).astype(np.float32)
    y = x.sum(axis=1) > 0
    sparse, dense = (psmpi.fit(array, y, **SMALL) for array in (scipy.sparse.csr_matrix(x), x))
    np.testing.assert_allclose(sparse.network.vector, dense.network.vector, rtol=1e-4, atol=1e-6)
    rows = scipy.sparse.csr_matrix(x)
    # Each entry in two halves, which is the same matrix.
    halves = np.repeat(rows.data / 2, 2), np.repeat(rows.indices, 2), 2 * rows.indptr
    twice = scipy.sparse.csr_matrix(halves, shape=x.shape)
    twice.has_canonical_format = False
    assert (sparse.predict(twice) == dense.predict(x)).all()
    assert len(twice.data) == 2 * len(rows.data), "what is given is not changed"


def test_sequences_have_lengths():
    rng = np.random.default_rng(0)
    x, lengths = rng.normal(size=(60, 7, 2)).astype(np.float32), rng.integers(2, 8, 60)
    y = np.array([sequence[:n].sum() > 0 for sequence, n in zip(x, lengths, strict=True)])
    training = psmpi.fit(x, y, model="rnn", widths=(8,), epochs=2, lengths=lengths)
    padded = np.where(np.arange(7)[:, None] < lengths[:, None, None], x, 99).astype(np.float32)
    np.testing.assert_array_equal(training.network.scores(x, lengths), training.network.scores(padded, lengths))
    tokens, steps = rng.integers(0, 5, (40, 6)), np.full(40, 6)
    token_training = psmpi.fit(
        tokens, (tokens + 1) % 5, model="gru", vocabulary=5, widths=(8,), epochs=1, lengths=steps
    )
    assert token_training.predict(tokens, steps).shape == (40, 6)


@pytest.mark.parametrize("method", BUILTIN)
def test_the_network_of_every_method_is_that_of_its_checkpoint(method, tmp_path):
    """Each method trains with the settings that it has by default."""
    defaults = {name: value for name, _, value in changes(Config(), parse(["--method", method]))}
    defaults |= {"model": "head"} if method == DEFAULT else {}
    small_training = {"method": method, "epochs": 2, "batch_size": 20, "lr": 0.01}
    options = {name: value for name, value in defaults.items() if name != "dataset"} | small_training
    rng, lengths = np.random.default_rng(0), None
    x = rng.random((80, 8, 8)).astype(np.float32)
    if options.get("model") in ("rnn", "lstm", "gru", "transformer"):
        lengths = np.full(80, 8)
    y = x.mean(axis=(1, 2)) > 0.5
    out = tmp_path / "run"
    for training in on_ranks(2, lambda rank: psmpi.fit(x, y, lengths=lengths, out=out, **options)):
        assert isinstance(training, psmpi.Training), training
        np.testing.assert_array_equal(training.network.vector, psmpi.load(out).vector)
        assert training.predict(x, lengths).shape == (80,) and training.network.settings["method"] == method


def test_without_out_nothing_is_written(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    psmpi.fit(X, TRUE, **SMALL)
    psmpi.fit(X, TRUE, **SMALL, on_nan="rollback", checkpoint_every=3)
    assert list(tmp_path.iterdir()) == [] and capfd.readouterr() == ("", "")
    psmpi.fit(X, TRUE, **SMALL, verbose=True)
    assert "epoch 5/5" in capfd.readouterr().out


def test_notes_are_in_the_result():
    training = psmpi.fit(X * 1000, TRUE, widths=(16,), epochs=1)
    assert any("divide it by a number" in note for note in training.notes)


def test_a_run_is_loaded_and_gone_on_with(tmp_path):
    y, straight_folder = LABELS["strings"], tmp_path / "whole"
    straight = psmpi.fit(X, y, **SMALL, out=straight_folder)
    psmpi.fit(X, y, **{**SMALL, "epochs": 2}, out=tmp_path / "run")
    resumed = psmpi.fit(X, y, epochs=5, out=tmp_path / "run", resume="auto")
    np.testing.assert_array_equal(resumed.network.vector, straight.network.vector)
    assert resumed.folder == tmp_path / "run" and len(resumed.metrics) == 5
    loaded = psmpi.load(tmp_path / "run")
    assert (loaded.predict(X) == straight.predict(X)).all() and loaded.classes.tolist() == ["no", "yes"]
    assert loaded.settings["widths"] == (16,) and loaded.settings["batch_size"] == 20
    with pytest.raises(psmpi.UserError, match="holds a run already"):
        psmpi.fit(X, y, out=straight_folder)
    with pytest.raises(psmpi.UserError, match="is not the data set"):
        psmpi.fit(X + 1, y, out=straight_folder, resume="auto", epochs=6)
    status, _, err = run(1, "-m", "psmpi.train", "--out", straight_folder, "--resume", "auto")
    assert status == 1 and "were arrays in memory: go on with psmpi.fit" in err
    with pytest.raises(psmpi.UserError, match="no checkpoint"):
        psmpi.load(tmp_path)


def test_labels_of_a_checkpoint_are_checked(tmp_path):
    psmpi.fit(X, LABELS["integers"], **SMALL, out=tmp_path / "run")
    (*_, path) = sorted((tmp_path / "run" / "checkpoints").iterdir())
    texts = read_contents(path).texts()
    assert texts["names"] == "[-3, 7]" and Contents.of(texts).names == (-3, 7)
    for wrong in ("[7, -3]", "[1]", '[1, "a"]', "[1, 1]", "3", "[null, null]", "[true, 2]"):
        with pytest.raises((ValueError, TypeError), match="name"):
            Contents.of({**texts, "names": wrong})


def test_a_network_is_pickled_and_its_weights_have_names():
    network = psmpi.fit(X, TRUE, model="head", **SMALL).network
    unpickled = pickle.loads(pickle.dumps(network))
    np.testing.assert_array_equal(unpickled.scores(X), network.scores(X))
    weights = network.weights
    assert {name: values.shape for name, values in weights.items()} == {
        "dense1.weight": (16, 4),
        "dense1.bias": (16,),
        "dense2.weight": (2, 16),
        "dense2.bias": (2,),
    }
    np.testing.assert_array_equal(flat_weights(network.contents.layout, weights, np.float32), network.vector)
    hidden = np.maximum(X @ weights["dense1.weight"].T + weights["dense1.bias"], 0)
    expected = hidden @ weights["dense2.weight"].T + weights["dense2.bias"]
    np.testing.assert_allclose(network.scores(X), expected, atol=1e-5)


def test_predictions_say_what_does_not_fit():
    network = psmpi.fit(X, TRUE, **SMALL).network
    with pytest.raises(psmpi.UserError, match="samples of shape \\(3,\\), and the network was trained on \\(4,\\)"):
        network.predict(X[:, :3])
    with pytest.raises(psmpi.UserError, match="no batch normalization"):
        network.predict(X, calibrate=X)
    regression = psmpi.fit(X, X[:, 0], **SMALL).network
    with pytest.raises(psmpi.UserError, match="predicts values"):
        regression.predict_proba(X)


def test_batch_normalization_takes_statistics_of_other_samples():
    network = psmpi.fit(X, TRUE, **SMALL, batch_norm=True).network
    single_scores = np.concatenate([network.scores(X[k : k + 1], calibrate=X) for k in range(5)])
    np.testing.assert_allclose(single_scores, network.scores(X[:5], calibrate=X), atol=1e-5)
    np.testing.assert_allclose(network.scores(X, calibrate=X), network.scores(X), atol=1e-4)
    with pytest.raises(psmpi.UserError, match="add calibrate=x"):
        network.predict(X[:1])


def test_a_start_cut_short_has_its_row():
    training = psmpi.fit(X, TRUE, **SMALL, max_steps=3)
    assert len(training.metrics) == 1 and training.network.contents.progress.step == 3


def test_the_process_is_as_it_was():
    before = dict(os.environ), list(warnings.filters), [signal.getsignal(number) for number in signal.valid_signals()]
    psmpi.fit(X, TRUE, **SMALL)
    after = dict(os.environ), list(warnings.filters), [signal.getsignal(number) for number in signal.valid_signals()]
    assert before == after


INTERRUPTED = """
import os, signal, threading, time
from pathlib import Path
import numpy as np
import psmpi
x = np.random.default_rng(0).normal(size=(2000, 4))
# An import of the parent process has set this.
os.environ.pop("KMP_DUPLICATE_LIB_OK", None)
before = dict(os.environ), [signal.getsignal(one) for one in signal.valid_signals()]
signal.signal(signal.SIGTERM, lambda *_: print("own handler"))
def stop(name):
    while not Path(f"run-{name}", "config.toml").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(os.getpid(), getattr(signal, name))
for name in ("SIGINT", "SIGTERM"):
    threading.Thread(target=stop, args=(name,)).start()
    try:
        psmpi.fit(x, x[:, 0] > 0, widths=(64,), epochs=100000, out=f"run-{name}", checkpoint_every=10**9)
    except KeyboardInterrupt as end:
        print(name, end, psmpi.load(f"run-{name}").contents.progress.step > 0)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
print(before == (dict(os.environ), [signal.getsignal(one) for one in signal.valid_signals()]))
"""


def test_an_interruption_comes_through_when_all_is_saved(tmp_path):
    status, out, err = launch(1, "-c", INTERRUPTED, cwd=tmp_path)
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "SIGINT the training was stopped; the run is saved: go on with resume='auto', out='run-SIGINT' True",
        "own handler",
        "SIGTERM the training was stopped; the run is saved: go on with resume='auto', out='run-SIGTERM' True",
        "True",
    ]


LAUNCHED = """
import numpy as np
import psmpi
from mpi4py import MPI
x = np.random.default_rng(0).normal(size=(100, 4))
training = psmpi.fit(x, x[:, 0] > 0, widths=(8,), epochs=2, dtype="float64")
print(f"{training.scores['test_loss']:.12f}", flush=True)
try:
    psmpi.fit(x, x[:, 0] > 0, lr=-1.0)
except psmpi.UserError as error:
    print(error, flush=True)
if MPI.COMM_WORLD.size > 1:
    psmpi.comm.failure.PATIENCE = 0.2
    original = psmpi.arrays.fitting.train
    def broken(world, *args, **options):
        if world.rank == 1:
            raise RuntimeError("a bug of one rank")
        return original(world, *args, **options)
    psmpi.arrays.fitting.train = broken
    psmpi.fit(x, x[:, 0] > 0, widths=(8,), epochs=2)
"""


def test_it_runs_under_mpirun_and_nobody_hangs(tmp_path):
    status, serial_out, err = launch(1, "-c", LAUNCHED, cwd=tmp_path)
    assert (status, err) == (0, "")
    status, out, err = launch(2, "-c", LAUNCHED, cwd=tmp_path)
    assert status != 0 and "a bug of one rank" in err
    # Lines of two ranks may be interleaved.
    assert len(serial_out.split()) > 2 and all(out.count(line) == 2 for line in serial_out.splitlines())


def test_importing_the_package_imports_little():
    code = "import sys, psmpi; print({'numpy', 'mpi4py', 'h5py', 'rich'} & set(sys.modules), 'fit' in dir(psmpi))"
    status, out, err = launch(1, "-c", code)
    assert (status, out) == (0, "set() True\n"), err
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        psmpi.fitt  # noqa: B018


def test_validation_layout_and_augmentation_are_those_of_the_command_line(tmp_path):
    """The rows of metrics equal those of the command on the same arrays in a file."""
    rng = np.random.default_rng(3)
    x, y = rng.integers(0, 255, (60, 8, 8, 3), np.uint8), np.arange(60) % 3
    np.savez(tmp_path / "own.npz", x=x, y=y)
    training = psmpi.fit(
        x, y, model="psnet", epochs=2, batch_size=10, lr=0.01, layout="nhwc", validation=0.2, augment=["flip"]
    )
    assert {"validation_loss", "validation_accuracy"} <= set(
        training.metrics[-1]
    ) and "test_loss" not in training.metrics[-1]
    shape = ("--dataset", tmp_path / "own.npz", "--model", "psnet", "--layout", "nhwc", "--augment", "flip")
    options = ("--epochs", 2, "--batch-size", 10, "--lr", 0.01, "--validation", 0.2, "--out", tmp_path / "run")
    words = ("-m", "psmpi.train", *shape, *options)
    status, _, err = run(1, *words)
    assert status == 0, err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    names = ("train_loss", "validation_loss", "validation_accuracy")
    assert [[row[name] for name in names] for row in rows] == [
        [row[name] for name in names] for row in training.metrics
    ]
    assert training.network.contents.in_shape == (3, 8, 8) and training.predict(x[:5]).shape == (5,)
    with pytest.raises(psmpi.UserError, match="validation"):
        psmpi.fit(x, y, validation=1.5)
