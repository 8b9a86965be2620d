"""Sequences: files, views of images, generated tasks; passes over lengths and in chunks; losses of steps."""

from itertools import pairwise

import numpy as np
import pytest
from helpers.layer_examples import LAST, NETWORKS, dense, make, recurrent
from helpers.problems import make_model, random_problem

from psmpi.backend import NumpyOps
from psmpi.data import Resident, open_dataset, open_split
from psmpi.errors import UserError
from psmpi.nn.layers.workspace import Span
from psmpi.nn.losses import make_loss
from psmpi.nn.metric import Metric
from psmpi.nn.model import Model
from psmpi.nn.network import build
from psmpi.nn.objective import Objective
from psmpi.nn.sequences import find_padding
from psmpi.nn.zoo import make_network

STACKS = [
    name
    for name, (shape, layers, _) in NETWORKS.items()
    if len(shape) == 2 and any(layer.recurrent for layer in make(name).walk())
]
ATTENTIVE = [
    name for name in NETWORKS if any(layer.whole_sequences and len(layer.out_shape) == 2 for layer in make(name).walk())
]
N, T, F = 10, 5, 3
RNG = np.random.default_rng(0)
X, LENGTHS = RNG.standard_normal((N, T, F)).astype(np.float32), np.array([5, 1, 3, 2, 4, 5, 5, 2, 1, 3])
Y, STEPS = np.arange(N) % 3, RNG.integers(0, 4, (N, T))


def save(tmp_path, suffix=".npz", **arrays):
    path = tmp_path / f"own{suffix}"
    if suffix == ".npz":
        np.savez(path, **arrays)
    else:
        h5py = pytest.importorskip("h5py")
        with h5py.File(path, "w") as file:
            for name, values in arrays.items():
                file[name] = values
    return str(path)


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
def test_a_file_with_lengths_holds_sequences(tmp_path, suffix):
    path = save(
        tmp_path, suffix, x=X, y=STEPS, lengths=LENGTHS, x_test=X[:4], y_test=STEPS[:4], lengths_test=LENGTHS[:4]
    )
    dataset = open_dataset(path, None)
    assert dataset.shape == (F, T) and dataset.outputs == STEPS.max() + 1 and dataset.task == "classes"
    train = dataset.train
    assert train.by_step and train.steps == T and not train.tokens
    padding = np.arange(T) >= LENGTHS[:, None]
    np.testing.assert_array_equal(train.targets, np.where(padding, -1, STEPS))
    np.testing.assert_array_equal(train.counts, LENGTHS)
    assert train.count(np.array([0, 2])) == 8
    resident, buffer = Resident(train, np.arange(N), np.float64), np.empty(F * T * N)
    batch = resident.batch(np.array([7, 2]), buffer)
    expected = np.where((np.arange(T) < LENGTHS[[7, 2], None])[..., None], X[[7, 2]], 0)
    np.testing.assert_array_equal(batch.inputs.reshape(F, T, 2), expected.transpose(2, 1, 0))
    np.testing.assert_array_equal(batch.targets, train.targets[[7, 2]].T)
    np.testing.assert_array_equal(batch.lengths, [2, 3])
    assert dataset.test.n == 4 and dataset.test.lengths.tolist() == [5, 1, 3, 2]


def test_a_fifth_of_the_sequences_is_held_out_with_its_lengths(tmp_path):
    dataset = open_dataset(save(tmp_path, x=X, y=Y, lengths=LENGTHS), None)
    for split in (dataset.train, dataset.test):
        assert not split.by_step and split.count(np.arange(2)) == 2
        np.testing.assert_array_equal(split.lengths, LENGTHS[split.index])
        np.testing.assert_array_equal(split.targets, Y[split.index])
    assert dataset.test.n == 3 or dataset.test.n == 2


def test_values_and_tokens_of_sequences(tmp_path):
    values = RNG.standard_normal((N, T, 2))
    values[0, 1] = np.nan
    train = open_dataset(save(tmp_path, x=X, y=values, lengths=LENGTHS), None, -1).train
    assert train.by_step and train.task == "regression" and train.targets.shape[1:] == (T, 2)
    assert train.counts[0] == 4, "NaN marks a step that does not count"
    single_values = open_dataset(save(tmp_path, x=X, y=values[:, 2, 0], lengths=LENGTHS), None).train
    assert not single_values.by_step and single_values.targets.shape[1:] == (1,)
    tokens = RNG.integers(0, 50, (N, T))
    tokens[3, 1] = 77
    train = open_split(save(tmp_path, x=tokens, y=Y, lengths=LENGTHS), None, "all")
    assert train.tokens and train.shape == (1, T)
    resident = Resident(train, np.arange(N), np.float32)
    assert resident.largest == 77
    inputs = resident.batch(np.array([3]), np.empty(T, np.float32)).inputs[:, 0]
    np.testing.assert_array_equal(inputs, np.where(np.arange(T) < LENGTHS[3], tokens[3], 0))
    tokens[3, 1] = -1
    with pytest.raises(UserError, match="sample 3 has the token -1; expected 0 to"):
        Resident(open_split(save(tmp_path, x=tokens, y=Y, lengths=LENGTHS), None, "all"), np.arange(N), np.float32)


@pytest.mark.parametrize(
    "arrays, parts",
    [
        ({"lengths": LENGTHS[:4]}, ["lengths is int64 of shape (4,)", "integers (10,)"]),
        ({"lengths": LENGTHS * 1.0}, ["lengths is float64"]),
        ({"lengths": LENGTHS - 1}, ["lengths has 0 for sample 1", "remove empty sequences"]),
        ({"lengths": LENGTHS + 1}, ["lengths has 6 for sample 0", "expected 1 to 5"]),
        ({"x": X[:, :, :, None]}, ["(10, 5, 3, 1)", "samples are sequences"]),
        ({"x": X[:, :0]}, ["x is empty"]),
        ({"x": X.astype(complex)}, ["x is complex128", "expected uint8"]),
        ({"y": STEPS[:, :4]}, ["y is int64 of shape (10, 4)", "(10, 5)"]),
        ({"y": np.zeros((10, 4, 2))}, ["y is float64 of shape (10, 4, 2)", "(10, 5, outputs)"]),
        ({"y": np.full((10, 5), -1)}, ["all labels are -1"]),
        ({"y": np.full((10, 5), -2)}, ["negative label -2"]),
        ({"x_test": X, "y_test": Y}, ["no array 'lengths_test'"]),
        (
            {"y": STEPS, "x_test": X[:1], "y_test": np.full((1, 5), -1), "lengths_test": LENGTHS[:1]},
            ["all labels are -1"],
        ),
        ({"y": np.full((10, 5, 1), np.nan)}, ["no step of the 8 training sequences has a target"]),
        ({"x_test": X, "y_test": STEPS, "lengths_test": LENGTHS}, ["y has labels, y_test has labels a step"]),
    ],
)
def test_bad_sequences_are_refused(tmp_path, arrays, parts):
    with pytest.raises(UserError) as error:
        open_dataset(save(tmp_path, **{"x": X, "y": Y, "lengths": LENGTHS, **arrays}), None)
    for part in parts:
        assert part in str(error.value)


def test_what_lies_behind_the_ends_is_not_looked_at(tmp_path):
    """Padding of NaN, or of numbers that are no tokens, changes nothing."""
    nan_padded, padding = X.copy(), np.arange(T) >= LENGTHS[:, None]
    nan_padded[padding] = np.nan
    splits = [open_split(save(tmp_path, x=x, y=Y, lengths=LENGTHS), None, "all") for x in (nan_padded, X)]
    buffers = [np.empty((T * F, N), np.float32) for _ in splits]
    Resident(splits[1], np.arange(N), np.float32).fetch(np.arange(N), buffers[1])
    np.savez(tmp_path / "wild.npz", x=nan_padded, y=Y, lengths=LENGTHS)
    wild_split = open_split(str(tmp_path / "wild.npz"), None, "all")
    Resident(wild_split, np.arange(N), np.float32).fetch(np.arange(N), buffers[0])
    np.testing.assert_array_equal(buffers[0], buffers[1])
    tokens = np.where(padding, -1, 3)
    split = open_split(save(tmp_path, x=tokens, y=Y, lengths=LENGTHS), None, "all")
    assert Resident(split, np.arange(N), np.float32).largest == 3


def test_layers_that_would_take_padding_are_found():
    lstm, dense_, last, flat = recurrent("lstm", 3), dense(3), LAST, {"type": "flatten"}
    residual_ = {"type": "residual", "layers": [lstm]}
    for layers, accepted in (
        ([lstm, last], True), ([lstm, dense_, flat], True), ([lstm, residual_, last], True),
        ([dense_, lstm, last], True),
        ([residual_, last], False), ([dense_, last], False), ([flat], False), ([residual_, lstm, last], True),
        ([lstm, {"type": "residual", "layers": [dense_]}, last], True),
    ):  # fmt: skip
        network = build("net", (3, 5), [*layers, dense(2)], 2)
        assert (find_padding(network, chunked=True) is None) == accepted, layers
        # The ends of whole sequences are known.
        assert (find_padding(network) is None) == (accepted or last in layers), layers


def test_images_are_sequences_of_rows_or_pixels(tmp_path):
    images = open_dataset("digits", None).train.read(np.arange(5)).reshape(5, 8, 8)
    rows, pixels = (open_dataset(f"digits:{view}", None).train for view in ("rows", "pixels"))
    assert rows.shape == (8, 8) and pixels.shape == (1, 64)
    np.testing.assert_array_equal(rows.read(np.arange(5)).reshape(5, 8, 8), images.transpose(0, 2, 1))
    np.testing.assert_array_equal(pixels.read(np.arange(5)).reshape(5, 8, 8), images)
    colours = RNG.integers(0, 255, (10, 3, 4, 6)).astype(np.uint8)
    path = save(tmp_path, x=colours, y=Y)
    train = open_split(f"{path}:rows", None, "all")
    assert train.shape == (18, 4)
    step = train.read([2]).reshape(18, 4)[:, 1]
    np.testing.assert_array_equal(step, colours[2, :, 1].reshape(-1))
    for _, piece in train.pieces(np.array([2])):
        np.testing.assert_array_equal(piece.reshape(18, 4)[:, 1], step)
    for name, message in (("digits:columns", "digits:rows or digits:pixels"), (f"{path}:rows:rows", "are no images")):
        with pytest.raises(UserError, match=message):
            open_dataset(name, None)


def test_generated_tasks_can_be_solved_from_what_is_in_them():
    adding = open_dataset("adding:30", None, 3).train
    x = adding.read(np.arange(100)).reshape(100, 2, 30)
    assert (x[:, 1].sum(axis=1) == 2).all() and (x[:, 1, :15].sum(axis=1) == 1).all()
    np.testing.assert_allclose((x[:, 0] * x[:, 1]).sum(axis=1), adding.targets[:100, 0], rtol=1e-6)
    copying = open_dataset("copying:7", None).train
    x, labels = copying.read(np.arange(100)).reshape(100, 10, 27), copying.targets[:100]
    assert (x.sum(axis=1) == 1).all() and (labels[:, :17] == -1).all()
    np.testing.assert_array_equal(x[:, :, :10].argmax(axis=1) - 1, labels[:, 17:])
    assert (x[:, 9, 16] == 1).all() and x[:, 9].sum() == 100
    repeat = open_dataset("repeat_copy:4", None).test
    for sample, targets, length in zip(repeat.read(np.arange(50)), repeat.targets, repeat.lengths, strict=False):
        channels = sample.reshape(5, 18)
        size = int(np.flatnonzero(channels[4])[0])
        letters, times = channels[:4, :size].argmax(axis=0), round(3 * channels[4, size])
        assert length == size + 2 + times * size
        np.testing.assert_array_equal(targets[size + 1 : length], [*np.tile(letters, times), 4])
        assert (targets[: size + 1] == -1).all() and (targets[length:] == -1).all()
    assert not np.array_equal(
        open_dataset("adding", None, 1).train.targets, open_dataset("adding", None, 2).train.targets
    )
    for name in ("adding:1", "copying:x", "repeat_copy:501", "modular_addition:4", "modular_addition:1001"):
        with pytest.raises(UserError, match="expected"):
            open_dataset(name, None)


@pytest.mark.parametrize(("name", "modulus"), [("modular_addition", 97), ("modular_addition:12", 12)])
def test_sums_modulo_a_number_are_of_each_pair_once(name, modulus):
    dataset = open_dataset(name, None)
    assert dataset.shape == (1, 3) and dataset.outputs == modulus and dataset.train.n == -(-(modulus**2) // 2)
    pairs = []
    for split in (dataset.train, dataset.test):
        assert split.tokens and not split.by_step and split.vocabulary == modulus + 1
        x = split.read(np.arange(split.n)).astype(int)
        assert (x[:, 2] == modulus).all()
        np.testing.assert_array_equal(x[:, :2].sum(axis=1) % modulus, split.targets)
        pairs.append(x[:, 0] * modulus + x[:, 1])
    np.testing.assert_array_equal(np.sort(np.concatenate(pairs)), np.arange(modulus**2))
    assert (np.diff(pairs[0]) < 0).any(), "in an order that is drawn"
    np.testing.assert_array_equal(open_dataset(name, None).train.targets, dataset.train.targets)
    assert not np.array_equal(open_dataset(name, None, 1).train.targets, dataset.train.targets)


@pytest.mark.parametrize("name", [*STACKS, *ATTENTIVE])
def test_what_is_padded_changes_nothing(name):
    """Scores, and gradients of the weights and of the inputs, are those of each sequence alone, without padding."""
    network = make(name)
    layout, w, x, d = random_problem(network, batch=4)
    lengths, x = np.array([5, 2, 1, 4], np.int32), x.reshape(*network.in_shape, 4)
    if network.steps:
        d = d * (np.arange(network.steps)[:, None] < lengths)
    model, dx = make_model(network, layout, w), np.full(x.shape, np.nan)
    tape = model.forward(x, None, Span(lengths))
    scores = tape.scores.copy()
    model.backward(tape, d.copy(), dx=dx)
    total = np.zeros_like(model.g)
    for k, steps in enumerate(lengths):
        single_model = make_model(network, layout, w)
        sequence = np.ascontiguousarray(x[:, :steps, k : k + 1])
        tape, single_dx = single_model.forward(sequence), np.empty(sequence.shape)
        last = (slice(None), slice(0, steps)) if network.steps else (slice(None),)
        np.testing.assert_allclose(tape.scores[..., 0], scores[..., k][last], rtol=1e-12, atol=1e-14)
        single_model.backward(tape, np.ascontiguousarray(d[..., k : k + 1][last]), dx=single_dx)
        np.testing.assert_allclose(single_dx[..., 0], dx[:, :steps, k], rtol=1e-11, atol=1e-13)
        assert (dx[:, steps:, k] == 0).all()
        total += single_model.g
    np.testing.assert_allclose(total, model.g, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("edges", [(0, 1, 2, 3, 4, 5), (0, 2, 4, 5), (0, 3, 5)])
@pytest.mark.parametrize("kind", ["rnn", "gru", "lstm"])
def test_chunks_of_sequences_are_as_good_as_all_their_steps(kind, edges):
    network = build("stack", (3, 5), [recurrent(kind, 4), dense(6), recurrent(kind, 5), dense(2)], 2, True)
    layout, w, x, d = random_problem(network, batch=6)
    x, lengths = x.reshape(3, 5, 6), np.array([5, 1, 2, 3, 4, 5], np.int32)
    for batch_lengths in (None, lengths):
        full_model, dx = make_model(network, layout, w), np.empty(x.shape)
        tape = full_model.forward(x, None, Span(batch_lengths))
        scores = tape.scores.copy()
        full_model.backward(tape, d.copy(), dx=dx)
        model = make_model(network, layout, w)
        model.reserve(6)
        model.g.fill(0)
        spans = list(pairwise(edges))
        tapes = []
        for a, b in spans:
            chunk_lengths = None if batch_lengths is None else np.clip(batch_lengths - a, 0, b - a).astype(np.int32)
            span = Span(chunk_lengths, begins=a == 0, ends=b == 5)
            tapes.append(model.forward(np.ascontiguousarray(x[:, a:b]), model.open(6), span))
            np.testing.assert_allclose(tapes[-1].scores, scores[:, a:b], rtol=1e-13, atol=1e-14)
        for (a, b), tape in zip(reversed(spans), reversed(tapes), strict=True):
            into = np.empty((3, b - a, 6))
            model.backward(tape, np.ascontiguousarray(d[:, a:b]), dx=into, add=True)
            np.testing.assert_allclose(into, dx[:, a:b], rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(model.g, full_model.g, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("task, name", [("classes", "nll"), ("classes", "psl"), ("regression", "squared")])
def test_the_loss_of_steps_is_that_of_the_steps_that_count(task, name):
    """Value and derivatives are those of the counted steps alone, as samples; so are the sums of the metric."""
    network = make("scores of each step")
    layout, w, x, _ = random_problem(network, batch=6)
    loss = make_loss(name, np.dtype(np.float64), task=task, outputs=4)
    targets = RNG.integers(0, 4, (5, 6)) if task == "classes" else RNG.standard_normal((4, 5, 6))
    ignored = RNG.random((5, 6)) < 0.4
    targets[..., ignored] = -1 if task == "classes" else np.nan
    for step_targets in (targets, np.where(targets < 0, 1, targets) if task == "classes" else np.nan_to_num(targets)):
        model = make_model(network, layout, w)
        objective = Objective(loss, model)
        objective.reserve(4, 30)
        model.reserve(6)
        objective.bring(step_targets)
        tape = model.forward(x)
        scores = tape.scores.copy()
        objective.derive(tape, tape.scores, objective.targets(6), 0.1)
        counts = (step_targets >= 0) if task == "classes" else ~np.isnan(step_targets[0])
        plain, flat = scores[:, counts], step_targets[..., counts]
        grad, reference_model = np.zeros(plain.shape), make_model(network, layout, w)
        assert objective.value() == pytest.approx(loss(plain, flat, 0.1, grad), rel=1e-12)
        full = np.zeros(scores.shape)
        full[:, counts] = grad
        reference_model.backward(reference_model.forward(x), full)
        np.testing.assert_allclose(model.g, reference_model.g, rtol=1e-11, atol=1e-13)
        metric = Metric(loss, 4)
        np.testing.assert_allclose(metric.sums(scores, step_targets), metric.sums(plain, flat), rtol=1e-12)
        assert metric.sums(scores, step_targets)[-1] == counts.sum()


def test_networks_of_sequences_say_what_does_not_fit():
    bad = [
        (lambda: make_network("lstm", (1, 8, 8), 3), "make sequences of images"),
        (lambda: make_network("lstm", (3, 5), 3, vocabulary=9), "have 3 features per step"),
        (lambda: make_network("mlp", (3, 5), 3, vocabulary=9), "--vocabulary is for --model rnn"),
        (lambda: make_network("mlp", (3, 5), 3, by_step=True), "each step of a sequence has a target"),
        (lambda: make_network("lenet", (3, 5), 3), "use --model rnn, gru, lstm"),
        (lambda: make_network("gru", (3, 5), 3, batch_norm=True), "would mix the steps of sequences"),
        (lambda: build("custom", (3, 5), [recurrent("gru", 4), dense(3)], 3), 'add a layer {type = "last"}'),
        (lambda: build("custom", (3, 5), [recurrent("gru", 4), LAST, dense(3)], 3, True), "at each step"),
        (lambda: build("custom", (7,), [recurrent("gru", 4), dense(3)], 3), "needs a sequence"),
        (lambda: build("custom", (3, 5), [{"type": "batch_norm"}, LAST, dense(3)], 3), "normalize over the steps"),
        (lambda: build("custom", (3, 5), [recurrent("rnn", 1), {"type": "embedding", "vocabulary": 3, "units": 2}, LAST,
                                          dense(3)], 3), "let it be the first layer"),
        (lambda: build("custom", (3, 5), [{"type": "embedding", "vocabulary": 3, "units": 2}, LAST, dense(3)], 3),
         "needs tokens"),
    ]  # fmt: skip
    for make_it, message in bad:
        with pytest.raises(UserError, match=message.replace("{", r"\{").replace("}", r"\}")):
            make_it()


def test_a_forget_gate_begins_open():
    from psmpi.layout import Runs
    from psmpi.nn.init import initial_weights

    network = make_network("lstm", (3, 5), 4, widths=(6,))
    layout = network.layout()
    w = np.full(layout.size, np.nan)
    initial_weights(network, layout, Runs(((0, layout.size),)), w, seed=1)
    bias = Model(network, layout, w, None, NumpyOps()).parts[0].w["bias"].reshape(4, 6)
    assert (bias[1] == 1).all() and (bias[[0, 2, 3]] == 0).all()
