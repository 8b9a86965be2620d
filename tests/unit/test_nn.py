"""Layers, models and initial weights."""

import numpy as np
import pytest
from helpers.layer_examples import FLAT, INDEPENDENT, NETWORKS, dense, make, residual, separable
from helpers.problems import make_model, random_problem
from scipy.signal import correlate2d
from scipy.special import erf, softmax

from psmpi.backend import NumpyOps
from psmpi.errors import LayersError, UserError, layers_in
from psmpi.layout import Runs, radix_pattern, restrict
from psmpi.methods.psl.borrowed import Borrowed
from psmpi.nn.init import initial_values, initial_weights
from psmpi.nn.model import Model
from psmpi.nn.network import build
from psmpi.nn.zoo import make_network
from psmpi.testing.layers import (
    classes_are_rows_of_the_whole,
    gradients_match_differences,
    sample_gradients_are_weighed,
)


def plain_scores(network, layout, w, x):
    """The network sample by sample, written from the definitions with SciPy's correlation."""
    tensors = {}
    for k, p in enumerate(layout.parameters):
        rows = np.empty((p.units, p.unit_size))
        for piece in layout.pieces():
            if piece.parameter == k:
                count = piece.last - piece.first
                rows[piece.first : piece.last] = w[piece.offset : piece.offset + count * p.unit_size].reshape(count, -1)
        tensors[p.name] = rows.reshape(p.shape)
    outputs = plain_layers(network.layers, tensors, [sample.reshape(network.in_shape) for sample in x.T])
    return np.stack(outputs, axis=-1)


def plain_layers(layers, tensors, batch):
    for layer in layers:
        kind = type(layer).__name__
        if kind == "BatchNorm":
            # The mean and the variance of each unit are those of all samples.
            axes = (0, *range(2, 1 + len(layer.out_shape)))
            a = np.stack(batch)
            a = (a - a.mean(axis=axes, keepdims=True)) / np.sqrt(a.var(axis=axes, keepdims=True) + 1e-5)
            if layer.affine:
                shape = (-1, *(1,) * (len(layer.out_shape) - 1))
                a = a * tensors[f"{layer.name}.weight"].reshape(shape) + tensors[f"{layer.name}.bias"].reshape(shape)
            batch = list(a)
        elif kind == "Residual":
            branch = plain_layers(layer.layers, tensors, batch)
            batch = [layer.scale * a + b for a, b in zip(branch, batch, strict=True)]
        else:
            batch = [plain_layer(kind, layer, tensors, a) for a in batch]
    return batch


def plain_states(layer, p, x):
    """The states of a recurrent layer for one sequence (features, steps), by their definitions."""
    h = c = np.zeros(layer.units)
    states, none = [], np.zeros(layer.rows)

    def sig(v):
        return 1 / (1 + np.exp(-v))

    for t in range(x.shape[1]):
        a, u = p["weight"] @ x[:, t] + p.get("bias", none), p["recurrent"] @ h + p.get("recurrent_bias", none)
        if layer.kind == "rnn":
            h = np.tanh(a + u)
        elif layer.kind == "lstm":
            i, f, g, o = (a + u).reshape(4, -1)
            c = sig(f) * c + sig(i) * np.tanh(g)
            h = sig(o) * np.tanh(c)
        else:
            (ar, az, an), (ur, uz, un) = a.reshape(3, -1), u.reshape(3, -1)
            z = sig(az + uz)
            h = (1 - z) * np.tanh(an + sig(ar + ur) * un) + z * h
        states.append(h)
    return np.stack(states, axis=1)


def plain_slab(layer, a, tensors):
    """Compute a slab layer tile by tile of a field with zeros around it."""
    (rows, columns), halo, (_, height, width) = layer.inputs.grid, layer.halo, layer.outputs.field
    field, output = a.reshape(layer.inputs.field), np.empty(layer.outputs.field)
    down, right = halo * (rows > 1), halo * (columns > 1)
    padded = np.pad(field, [(0, 0), (down, down), (right, right)])
    h, w = field.shape[1] // rows, field.shape[2] // columns
    tile_shape = height // rows, width // columns
    for d in range(rows * columns):
        r, c = divmod(d, columns)
        window = padded[:, r * h : (r + 1) * h + 2 * down, c * w : (c + 1) * w + 2 * right]
        values = tensors[f"{layer.name}.weight"][d] @ window.reshape(-1) + tensors[f"{layer.name}.bias"][d]
        tile = output[:, r * tile_shape[0] : (r + 1) * tile_shape[0], c * tile_shape[1] : (c + 1) * tile_shape[1]]
        tile[...] = values.reshape(tile.shape)
    return output.reshape(layer.out_shape)


def plain_head(qkv, causal):
    """The outputs (units, steps) of a head for one sequence, step by step."""
    q, k, v = np.split(qkv, 3)
    outputs = []
    for t in range(q.shape[1]):
        visible = slice(0, t + 1 if causal else None)
        outputs.append(v[:, visible] @ softmax(q[:, t] @ k[:, visible] / np.sqrt(len(q))))
    return np.stack(outputs, axis=1)


def plain_layer(kind, layer, tensors, a):
    if kind in ("Dense", "Conv"):
        weight, bias = tensors[f"{layer.name}.weight"], tensors.get(f"{layer.name}.bias", np.zeros(layer.units))
    if kind == "Dense":
        blocks = weight.reshape(layer.groups, -1, layer.group_inputs)
        used = a[: layer.groups * layer.group_inputs].reshape(layer.groups, -1, *a.shape[1:])
        products = np.concatenate([m @ v for m, v in zip(blocks, used, strict=True)])
        return products + bias.reshape(-1, *(1,) * (a.ndim - 1))
    if kind == "Conv":
        outs = []
        for u in range(layer.units):
            first = u // (layer.units // layer.groups) * layer.group_inputs
            maps = [correlate2d(a[first + c], weight[u, c], "valid") for c in range(layer.group_inputs)]
            outs.append(sum(maps) + bias[u])
        return np.stack(outs)
    if kind == "Pool":
        c, h, width = layer.out_shape
        windows = a[:, : h * layer.size, : width * layer.size].reshape(c, h, layer.size, width, layer.size)
        return windows.mean(axis=(2, 4)) if layer.kind == "mean" else windows.max(axis=(2, 4))
    if kind == "GroupNorm":
        groups = a.reshape(layer.groups, -1)
        groups = (groups - groups.mean(axis=1, keepdims=True)) / np.sqrt(groups.var(axis=1, keepdims=True) + 1e-5)
        weight, bias = (tensors[f"{layer.name}.{k}"].reshape(-1, *(1,) * (a.ndim - 1)) for k in ("weight", "bias"))
        return groups.reshape(a.shape) * weight + bias
    if kind == "Cosine":
        return layer.scale * (weight := tensors[f"{layer.name}.weight"]) @ a / np.linalg.norm(weight, axis=1)
    if kind == "UnitLength":
        return a / np.linalg.norm(a)
    if kind == "Slab":
        return plain_slab(layer, a, tensors)
    if kind == "Recurrent":
        return plain_states(layer, {name.split(".")[1]: tensor for name, tensor in tensors.items() if
                                    name.startswith(f"{layer.name}.")}, a)  # fmt: skip
    if kind == "Embedding":
        return tensors[f"{layer.name}.weight"][:, a[0].astype(int)]
    if kind == "Last":
        return a[:, -1]
    if kind == "LayerNorm":
        centred, shape = a - a.mean(axis=0), (-1, *(1,) * (a.ndim - 1))
        weight, bias = (tensors[f"{layer.name}.{k}"].reshape(shape) for k in ("weight", "bias"))
        return weight * centred / np.sqrt((centred**2).mean(axis=0) + 1e-5) + bias
    if kind == "Gelu":
        return a * (1 + erf(a / np.sqrt(2))) / 2
    if kind == "Positions":
        return a + tensors[f"{layer.name}.weight"][:, : a.shape[1]]
    if kind == "Attention":
        return np.concatenate([plain_head(head, layer.causal) for head in np.split(a, layer.heads)])
    if kind == "Dot":
        return np.array([a[:, 0] @ a[:, 1]])
    if kind == "Binary":
        return np.stack([(1 - a[0]) / 2, (1 + a[0]) / 2])
    if kind == "Flatten":
        return a.reshape(-1)
    if kind == "Sparse":
        weight = np.zeros((layer.units, len(a)))
        weight[layer.pattern.row_numbers, layer.pattern.columns] = tensors[f"{layer.name}.weight"]
        return weight @ a + tensors.get(f"{layer.name}.bias", np.zeros(layer.units))
    if kind == "Pad":
        return np.pad(a, [(0, 0), (layer.size, layer.size), (layer.size, layer.size)])
    act = {"sigmoid": lambda v: 1 / (1 + np.exp(-v)), "tanh": np.tanh, "relu": lambda v: v * (v > 0)}
    return act.get(layer.kind, lambda v: v)(a)


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_scores_follow_the_definitions(name, fold):
    network = make(name)
    layout, w, x, _ = random_problem(network)
    model = make_model(network, layout, w, fold=fold)
    np.testing.assert_allclose(model.forward(x).scores, plain_scores(network, layout, w, x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_match_central_differences(name, fold):
    gradients_match_differences(make(name), fold)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_model_restricted_to_classes_is_the_same_model(name):
    classes_are_rows_of_the_whole(make(name))


@pytest.mark.parametrize("name", NETWORKS)
def test_float32_follows_float64(name):
    network = make(name)
    layout, w, x, d = random_problem(network)
    results = []
    for dtype in (np.float64, np.float32):
        model = make_model(network, layout, w.astype(dtype))
        tape = model.forward(x.astype(dtype))
        scores = tape.scores.copy()
        model.backward(tape, d.astype(dtype))
        assert scores.dtype == model.g.dtype == dtype
        results.append((scores, model.g))
    for double, single in zip(*results, strict=True):
        assert np.linalg.norm(single - double) <= 1e-5 * np.linalg.norm(double)


@pytest.mark.parametrize("name", INDEPENDENT)
def test_gradients_of_samples_are_those_of_minibatches_of_one(name):
    sample_gradients_are_weighed(make(name))


@pytest.mark.parametrize("name", [name for name in INDEPENDENT if not any(layer.keeps for layer in make(name).walk())])
def test_a_model_that_borrows_has_the_gradient_of_one_that_computes(name):
    """The units of the part may lie apart in the model of the lender."""
    network = make(name)
    layout, w, x, d = random_problem(network, batch=5)
    lender = make_model(network, layout, w)
    lender_tape = lender.forward(x)
    for classes in ((1,), (0, 2), tuple(range(network.classes))):
        part = layout.part(classes)
        part_weights = np.concatenate([w[a:b] for a, b in part.intervals])
        models = [
            Model(network, layout, part_weights, np.full_like(part_weights, np.nan), NumpyOps(), classes, space=space)
            for space in (None, lender.space)
        ]
        tapes = models[0].forward(x), Borrowed(models[1], lender).tape(lender_tape)
        for model, tape in zip(models, tapes, strict=True):
            model.backward(tape, d[list(classes)].copy())
        assert np.array_equal(tapes[1].scores, lender_tape.scores[list(classes)])
        assert np.linalg.norm(models[1].g - models[0].g) <= 1e-12 * np.linalg.norm(models[0].g)


def test_any_batch_size_uses_the_same_buffers():
    network = make("mean pooling")
    layout, w, x, d = random_problem(network, batch=9)
    model = make_model(network, layout, w)
    model.reserve(9)
    scores = model.forward(x).scores.copy()
    held_bytes = model.activation_bytes + model.buffer_bytes
    for batch in (1, 4, 9):
        tape = model.forward(np.ascontiguousarray(x[:, :batch]))
        np.testing.assert_allclose(tape.scores, scores[:, :batch], rtol=1e-12)
        model.backward(tape, d[:, :batch].copy())
    assert model.activation_bytes + model.buffer_bytes == held_bytes


def test_max_pooling_sends_a_tie_to_the_first_entry():
    ops, x = NumpyOps(), np.ones((1, 2, 2, 1))
    y, dx = np.empty((1, 1, 1, 1)), np.empty_like(x)
    ops.max_pool(x, 2, y)
    ops.max_pool_back(x, y, np.full((1, 1, 1, 1), 5.0), 2, dx)
    assert dx.ravel().tolist() == [5, 0, 0, 0]


@pytest.mark.parametrize(("forward", "back"), [("im2col", "col2im"), ("fold", "unfold")])
def test_data_movements_have_their_adjoints(forward, back):
    ops, rng = NumpyOps(), np.random.default_rng(0)
    if forward == "im2col":
        x, y = rng.normal(size=(2, 9, 8, 3)), rng.normal(size=(2, 3, 3, 3, 3, 3))
        moved, returned = np.empty_like(y), np.zeros_like(x)
        NumpyOps().im2col(x, 2, 0, moved)
        NumpyOps().col2im(y, 2, 0, returned)
    else:
        x, y = rng.normal(size=(4, 2, 5, 5)), rng.normal(size=(4, 2, 6, 6))
        moved, returned = np.empty_like(y), np.empty_like(x)
        ops.fold(x, 2, moved)
        ops.unfold(y, 2, returned)
    assert np.isclose((moved * y).sum(), (x * returned).sum())


def test_sigmoid_and_loss_do_not_overflow_for_large_inputs():
    ops, y = NumpyOps(), np.array([-1e30, -1e3, 0, 1e3, 1e30], np.float32)
    ops.activate("sigmoid", y)
    assert y.tolist() == [0, 0, 0.5, 1, 1]


def test_initial_weights_depend_on_seed_and_place_alone():
    network = make_network("psnet", (1, 28, 28), 10)
    layout = network.layout()
    full_w = np.empty(layout.size)
    initial_weights(network, layout, Runs(((0, layout.size),)), full_w, seed=3)
    for runs in (layout.part([2, 7]), Runs(((1000, 1100), (20001, 30003)))):
        part_w = np.empty(runs.size)
        initial_weights(network, layout, runs, part_w, seed=3)
        assert np.array_equal(part_w, restrict(full_w, runs))
    other_w = np.empty(layout.size)
    initial_weights(network, layout, Runs(((0, layout.size),)), other_w, seed=4)
    assert not np.array_equal(full_w, other_w)


def widths(network, kind, gain):
    return {name: law.value for name, law in initial_values(network, kind, gain).items() if law.law == "uniform"}


def test_initial_weights_fill_their_published_ranges():
    network = make_network("psnet", (1, 28, 28), 10)
    a = widths(network, "xavier", 1.0)
    assert a["conv1.weight"] == pytest.approx(np.sqrt(6 / (25 + 1000)))
    assert a["conv2.weight"] == pytest.approx(np.sqrt(6 / (1000 + 750)))
    assert a["dense1.weight"] == pytest.approx(np.sqrt(6 / (48 + 24)))
    assert a["dense3.weight"] == pytest.approx(np.sqrt(6 / (15 + 1)))
    assert widths(network, "he", 1.0)["dense1.weight"] == pytest.approx(np.sqrt(6 / 48))
    assert widths(network, "pytorch", 1.0)["dense1.weight"] == pytest.approx(1 / np.sqrt(48))
    gained = widths(network, "xavier", 4.0)
    assert gained["dense2.weight"] == 4 * a["dense2.weight"] and gained["dense3.weight"] == a["dense3.weight"]
    layout = network.layout()
    w = np.empty(layout.size)
    initial_weights(network, layout, Runs(((0, layout.size),)), w, seed=0)
    first = w[:1000]
    assert np.abs(first).max() <= a["conv1.weight"] and first.std() == pytest.approx(
        a["conv1.weight"] / np.sqrt(3), rel=0.1
    )
    assert (w[1000:1040] == 0).all(), "biases of the first convolution"


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ([{"type": "dens", "units": 3}], "unknown layer type 'dens'; did you mean dense\\?"),
        ([{"units": 3}], 'layer 1: no type is given: add, for instance, type = "dense"'),
        ([{"type": "dense", "unit": 4}], "needs 'units', and has 'unit'"),
        ([{"type": "dense", "units": 4, "biases": False}], "unknown setting\\(s\\) biases .*; did you mean bias\\?"),
        ([{"type": "dense"}], "needs 'units'"),
        ([{"type": "dense", "units": 0}], "whole number above 0"),
        ([{"type": "dense", "units": 4, "color": 1}], "unknown setting\\(s\\) color"),
        ([{"type": "conv", "channels": 3, "kernel": 3}], "needs \\(channels, height, width\\)"),
        ([dense(5)], "has 4 classes"),
        ([separable(10, 3)], "cannot be cut into 3 groups"),
    ],
)
def test_a_wrong_layer_table_is_named(layers, says):
    with pytest.raises(UserError, match=says):
        build("net", (7,), layers, 4)


BRANCH = "[[model.layers]] entry 2, entry 2 of its layers"


@pytest.mark.parametrize(
    ("inner", "says"),
    [
        ({"type": "dens"}, f"{BRANCH} (dens1): unknown layer type"),
        ({"units": 7}, f"{BRANCH}: no type is given"),
        (7, f"{BRANCH}: 7 is not a table"),
        ({"type": "dense", "unit": 7}, f"{BRANCH} (dense3): a dense layer needs 'units'"),
        ({"type": "residual", "layers": 3}, f"{BRANCH}: layers = 3; expected a list"),
        (residual(dense(7), dense(6)), f"{BRANCH} (residual2): its layers turn inputs of shape (7,) into (6,)"),
        (residual(dense(7), {"type": "dense"}), f"{BRANCH}, entry 2 of its layers (dense4): a dense layer needs"),
        (dense(8), "[[model.layers]] entry 2 (residual1): its layers turn inputs of shape (7,) into (8,)"),
    ],
)
def test_a_wrong_layer_of_a_file_is_told_by_its_place_there(inner, says):
    layers = [dense(7), {"type": "residual", "layers": [dense(7), inner]}, dense(4)]
    with pytest.raises(LayersError) as error:
        make_network("custom", (7,), 4, layers=layers)
    assert str(error.value).startswith(says)
    with pytest.raises(UserError) as error, layers_in("net.toml"):
        make_network("custom", (7,), 4, layers=layers)
    assert str(error.value).startswith(f"net.toml: {says}")


def test_layers_are_named_with_their_place_in_a_file_and_built_in_ones_without():
    table = [{"type": "residual", "layers": [dense(7), dense(7)]}, dense(4)]
    own = make_network("custom", (7,), 4, layers=table)
    assert own.named("dense2") == f"dense2 ({BRANCH.replace('entry 2,', 'entry 1,')})"
    assert own.named("dense3") == "dense3 ([[model.layers]] entry 2)" and own.tie() == "dense2"
    assert make_network("mlp", (7,), 4).named("dense2") == "dense2"
    pool = [{"type": "conv", "channels": 2, "kernel": 3}, {"type": "max_pool"}, FLAT, dense(4)]
    (note,) = make_network("custom", (1, 7, 7), 4, layers=pool).notes
    assert note.startswith("max_pool1 ([[model.layers]] entry 2) of --model custom")


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [("lenet", (1, 9, 9), "use --model psnet"), ("alexnet", (1, 28, 28), "choose one of"), ("custom", (4,), "layers")],
)
def test_a_model_that_does_not_fit_says_what_to_use(name, shape, says):
    with pytest.raises(UserError, match=says):
        make_network(name, shape, 10)


def test_a_head_has_rows_of_its_own_for_each_class_behind_a_trunk_of_widths_or_layers():
    by_widths = make_network("head", (2, 3, 3), 6, widths=(5,))
    by_layers = make_network("head", (2, 3, 3), 6, layers=[FLAT, dense(5), {"type": "relu"}])
    assert by_widths == by_layers and by_widths.tie() is None
    layout = by_widths.layout()
    trunk = 5 * 18 + 5
    assert layout.part([3]).size == trunk + 6 and layout.part([1, 4]).size == trunk + 2 * 6
    assert make_network("head", (4,), 6).layers[0].units == 512
    for wrong, says in (
        ({"layers": [dense(5)], "widths": (3,)}, "leave one of the two out"),
        ({"layers": [dense(5)], "batch_norm": True}, "--batch-norm is not for --model"),
        ({"layers": [{"type": "conv", "channels": 2, "kernel": 3}]}, "needs a flat input"),
    ):
        with pytest.raises(UserError, match=says):
            make_network("head", (2, 3, 3) if "conv" in str(wrong) else (4,), 6, **wrong)


def test_backward_through_some_steps_is_that_of_all():
    tanh = {"type": "tanh"}
    layers = [
        {"type": "conv", "channels": 4, "kernel": 3}, {"type": "max_pool"}, tanh, tanh, {"type": "max_pool"}, FLAT,
        dense(4),
    ]  # fmt: skip
    network = build("pools", (1, 14, 14), layers, 4)
    layout, w, x, d = random_problem(network)
    models = [make_model(network, layout, w) for _ in range(2)]
    tapes = [model.forward(x) for model in models]
    models[0].backward(tapes[0], d.copy())
    top = next(k for k, part in enumerate(models[1].parts) if part.layer.linear and k > 0)
    cut_gradient = np.full(tapes[1].outputs[top].shape, np.nan)
    models[1].backward(tapes[1], d.copy(), first=top, dx=cut_gradient)
    models[1].backward(tapes[1], cut_gradient, last=top - 1)
    np.testing.assert_array_equal(models[1].g, models[0].g)


def test_batch_normalization_takes_the_place_of_biases():
    plain, normalized = (make_network("lenet", (1, 28, 28), 10, batch_norm=on) for on in (False, True))
    kinds = [type(layer).__name__ for layer in normalized.layers]
    # The normalization is before the activation, and after the pooling that is folded into the convolution.
    assert kinds[:4] == ["Conv", "Pool", "BatchNorm", "Activation"] and kinds[-1] == "BatchNorm"
    names = {p.name for p in normalized.layout().parameters}
    assert "conv1.bias" not in names and {"batch_norm1.weight", "batch_norm1.bias"} <= names
    # The normalization of the scores has no parameters.
    assert "batch_norm5.weight" not in names and "batch_norm4.weight" in names
    assert normalized.layout().size == plain.layout().size + 6 + 16 + 120 + 84 - 10


def test_resnet_has_sections_of_residual_blocks():
    network = make_network("resnet", (3, 32, 32), 10, widths=(8, 16), blocks=(2, 1))
    kinds = [type(layer).__name__ for layer in network.layers]
    assert kinds.count("Residual") == 3
    convolutions = 3 * 8 * 9 + 2 * 2 * 8 * 8 * 9 + 8 * 16 * 9 + 2 * 16 * 16 * 9
    assert network.layout().size == convolutions + 2 * (2 * 2 * 8 + 2 * 16 + 16) + 16 * 10 + 10
    for settings, says in (
        ({"widths": (8, 8), "blocks": (2,)}, "as many numbers"),
        ({"widths": (8,) * 7}, "too often"),
        ({"batch_norm": True}, "--batch-norm is not for --model resnet"),
    ):
        with pytest.raises(UserError, match=says):
            make_network("resnet", (3, 32, 32), 10, **settings)
    with pytest.raises(UserError, match="--blocks"):
        make_network("lenet", (1, 28, 28), 10, blocks=(2,))


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (residual(dense(5)), "but the two are added"),
        (residual(dense(7), scale=0), "scale"),
        ({"type": "residual"}, "layers"),
        ({"type": "residual", "layers": 3}, "list of tables"),
        ({"type": "batch_norm", "affine": 1}, "true or false"),
        ({**dense(3), "bias": 0}, "true or false"),
        ({"type": "batch_norm", "units": 3}, "unknown setting"),
    ],
)
def test_blocks_that_do_not_fit_are_named(table, says):
    with pytest.raises(UserError, match=says):
        build("it", (7,), [table, dense(4)], 4)
    with pytest.raises(UserError, match="groups in all"):
        build("it", (8,), [separable(8, 4), residual(separable(8, 2)), separable(4, 4)], 4)


def test_evaluations_take_the_same_minibatches_on_any_number_of_ranks():
    plain, normalized = (make_network("mlp", (1, 8, 8), 10, batch_norm=on) for on in (False, True))
    assert [batch.stop - batch.start for batch in plain.evaluation_batches(250)] == [100, 100, 50]
    for n, count in ((1, 1), (999, 1), (1500, 2), (10_000, 10), (10_001, 10)):
        batches = normalized.evaluation_batches(n)
        sizes = [batch.stop - batch.start for batch in batches]
        assert len(sizes) == count and sum(sizes) == n and max(sizes) - min(sizes) <= 1
        assert [batch.start for batch in batches[1:]] == [batch.stop for batch in batches[:-1]]


def test_radix_networks_are_mixed_radix_systems_behind_a_random_layer():
    network = make_network("radix", (1, 28, 28), 10, depth=4)
    first, *mixed_radix = [layer for layer in network.layers if layer.name.startswith("sparse")]
    assert first.pattern.inputs == 784 and (first.pattern.fan_in == 32).all() and first.init == "he"
    assert [sparse.pattern for sparse in mixed_radix] == [radix_pattern(1024, 32, stride) for stride in (1, 32, 1)]
    assert network.layout().size == 4 * 33 * 1024 + 10 * 1025
    small = make_network("radix", (5,), 3, widths=(64,), depth=2, batch_norm=True)
    assert small.layers[0].pattern.size == 64 * 5 and not small.layers[0].bias and small.normalized
    for options, says in (
        ({"widths": (64, 64)}, "has one width"),
        ({"widths": (16,)}, "of 32 or more"),
        ({"final_time": 2.0}, "--final-time is for --model deep, deep-conv,"),
    ):
        with pytest.raises(UserError, match=says):
            make_network(**{"name": "radix", "in_shape": (3,), "classes": 4, **options})


@pytest.mark.parametrize("classes", [1, 2, 5, 300])
@pytest.mark.parametrize(
    "shape",
    [(1,), (4,), (500,), (3, 7), (1, 1, 1), (2, 3, 40), (1, 5, 5), (3, 6, 9), (1, 11, 90), (3, 12, 12), (1, 16, 16),
     (4, 17, 31), (1, 28, 28), (3, 64, 64), (1, 224, 96)],
)  # fmt: skip
def test_psnets_fit_samples_of_any_shape(shape, classes):
    """Each class has weights of its own, which no other class's score depends on."""
    network = make_network("psnet", shape, classes)
    layout = network.layout()
    assert network.in_shape == shape and network.classes == classes
    if classes > 1:
        assert network.tie() is None
        assert layout.part([0]).size < layout.part(range(classes)).size == layout.size - layout.dead.size
    assert network.layers[-1].out_shape == (classes,)


def test_deep_networks_are_steps_of_a_march():
    """u + T/N act(K u + b), N times, between an opening and a closing layer."""
    network = make_network("deep", (3,), 4, widths=(5,), depth=6, final_time=3.0, activation="relu")
    opening, act, *march, closing = network.layers
    assert (opening.out_shape, act.activation, closing.out_shape) == ((5,), "relu", (4,))
    assert len(march) == 6 and all(step.scale == 0.5 and len(step.inner) == 2 for step in march)
    assert network.layout().size == 5 * 4 + 6 * 5 * 6 + 4 * 6
    images = make_network("deep-conv", (1, 7, 7), 4, depth=2)
    assert images.layout().size == 4 * 10 + 2 * 4 * 37 + 4 * (4 * 49 + 1)
    for options, says in (
        ({"widths": (5, 6)}, "has one width"),
        ({"batch_norm": True}, "cannot be normalized"),
        ({"name": "deep-conv"}, "is not made for samples of shape"),
        ({"name": "mlp", "depth": 8}, "--depth is for --model deep"),
        ({"name": "mlp", "final_time": 2.0}, "--final-time is for --model deep"),
    ):
        with pytest.raises(UserError, match=says):
            make_network(**{"name": "deep", "in_shape": (3,), "classes": 4, **options})
