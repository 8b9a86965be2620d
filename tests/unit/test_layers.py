"""Every kind of layer, in example networks: exports, memory, simultaneous passes, sums over ranks."""

import threading
import tracemalloc
import warnings
import weakref
from dataclasses import replace

import numpy as np
import pytest
from helpers.layer_examples import NETWORKS, make
from helpers.problems import make_model, random_problem
from helpers.together import Together

from psmpi.backend import NumpyOps
from psmpi.inspect.export import build_onnx, onnx_inputs
from psmpi.layout import Each
from psmpi.nn.layers import LAYERS
from psmpi.nn.layers.chain import leaves, walk
from psmpi.nn.layers.workspace import Span
from psmpi.nn.model import Model
from psmpi.testing.layers import (
    gradients_are_added_or_left_out,
    input_gradient_matches_differences,
    memory_is_stated,
)


def types(tables):
    """The types of layer tables, and of the tables inside them."""
    for table in tables:
        yield table["type"]
        yield from types(table.get("layers", ()))


def test_every_kind_of_layer_has_an_example():
    kinds = {kind for _, layers, _ in NETWORKS.values() if layers is not None for kind in types(layers)}
    assert kinds == set(LAYERS)


@pytest.mark.parametrize("name", NETWORKS)
def test_initial_values_and_users_are_of_the_layer_s_own_parameters(name):
    network = make(name)
    for layer in leaves(network.layers):
        names = [p.name for p in layer.parameters()]
        assert len(set(names)) == len(names) and layer.initial("he", 1.0).keys() <= set(names)
        uses = ((0, layer.out_shape[0], Each(0, 1)),)
        assert [p.name for p, _ in layer.users(uses)] == names
        assert layer.restrict(layer.out_shape[0], layer.in_shape) == layer
        assert replace(layer, name="x").out_shape == layer.out_shape


@pytest.mark.parametrize("name", NETWORKS)
def test_an_exported_network_has_the_scores_of_the_model(name):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    network = make(name)
    layout, w, x, _ = random_problem(network, batch=5, dtype=np.float32)
    for classes in (None, [1], [0, 2]):
        model = make_model(network, layout, w, classes, fold=False)
        if network.normalized:
            with pytest.raises(ValueError, match="calibrate the model first"):
                build_onnx(model)
            model.calibrate([x.copy(), (0.7 * x + 0.2).astype(x.dtype)])
        proto = build_onnx(model)
        onnx.checker.check_model(proto, full_check=True)
        session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        samples = np.ascontiguousarray(x.T).reshape(5, *network.in_shape)
        for lengths in (None, np.array([1, 5, 3, 2, 4], np.int32)) if network.sequences else (None,):
            onnx_scores = session.run(None, onnx_inputs(network, samples, lengths))[0]
            own_scores = model.forward(x, None, Span(lengths)).scores.T
            if network.steps and lengths is not None:
                counted = np.arange(network.steps) < lengths[:, None]
                onnx_scores, own_scores = onnx_scores[counted], own_scores.transpose(0, 1, 2)[counted]
            assert abs(onnx_scores - own_scores).max() <= 2e-5 * max(1.0, abs(own_scores).max())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_model_holds_what_its_layers_say(name):
    memory_is_stated(make(name))


@pytest.mark.parametrize("name", NETWORKS)
def test_passes_that_are_open_at_once_keep_apart(name):
    """Three forward passes of different minibatches, then their backward passes in another order."""
    network = make(name)
    layout, w, x, d = random_problem(network, batch=9)
    slices, expected = [slice(0, 2), slice(2, 6), slice(4, 9)], []
    for columns in slices:
        model = make_model(network, layout, w)
        model.backward(model.forward(np.ascontiguousarray(x[:, columns])), d[..., columns].copy())
        expected.append(model.g)
    model = make_model(network, layout, w)
    tapes = [model.forward(np.ascontiguousarray(x[:, columns]), model.open(9)) for columns in slices]
    for k in (1, 0, 2):
        model.backward(tapes[k], d[..., slices[k]].copy())
        assert np.array_equal(model.g, expected[k])


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_added_where_that_is_wanted_and_left_out_where_not(name):
    gradients_are_added_or_left_out(make(name))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_gradient_of_the_inputs_matches_central_differences(name):
    input_gradient_matches_differences(make(name))


@pytest.mark.parametrize("name", [name for name in NETWORKS if make(name).normalized])
def test_with_the_sums_that_layers_state_slices_are_as_good_as_the_minibatch(name):
    network = make(name)
    layout, w, x, d = random_problem(network, batch=11)
    full_model = make_model(network, layout, w)
    tape = full_model.forward(x)
    scores = tape.scores.copy()
    full_model.backward(tape, d.copy())
    cuts, together = [slice(0, 3), slice(3, 4), slice(4, 11)], Together(3)
    models = [
        Model(network, layout, full_model.w, np.full_like(full_model.w, np.nan), NumpyOps(), total=together.total(k))
        for k in range(3)
    ]
    slice_scores = [None] * 3

    def work(k):
        tape = models[k].forward(np.ascontiguousarray(x[:, cuts[k]]))
        slice_scores[k] = tape.scores.copy()
        models[k].backward(tape, d[..., cuts[k]].copy())

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert np.allclose(np.concatenate(slice_scores, axis=1), scores, rtol=1e-10, atol=1e-11)
    total = sum(model.g for model in models)
    assert np.allclose(total, full_model.g, rtol=1e-9, atol=1e-10 * abs(full_model.g).max())
    stages = [leaf for stage in network.stages(range(network.classes)) for leaf in walk(stage)]
    # The model has only units that some score depends on.
    parts = [stage.layer.restrict(int(stage.kept.sum()), stage.layer.in_shape) for stage in stages]
    stated = sum(sum(layer.rank_sums) for layer in parts)
    assert together.numbers == [stated] * 3


def test_a_larger_minibatch_takes_the_place_of_smaller_ones():
    """This holds also while the last pass is kept."""
    network = make("dense")
    layout, w, x, _ = random_problem(network, batch=50_000)
    model = make_model(network, layout, w)
    tape = model.forward(np.ascontiguousarray(x[:, :40_000]))
    tracemalloc.start()
    model.reserve(50_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not tape.outputs and peak <= 1.05 * (model.activation_bytes + model.buffer_bytes)
    old_buffer = weakref.ref(model.room.buffers[0])
    new_tape = model.forward(x)
    model.reserve(60_000)
    assert old_buffer() is None and not new_tape.outputs


def test_products_of_what_is_not_finite_do_not_warn():
    """A BLAS may raise flags for finite products too, and the loss detects NaN."""
    out = np.empty((1, 1, 1), np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NumpyOps().matmul(np.float32([[[np.inf, 1]]]), np.float32([[[0], [1]]]), out)
    assert np.isnan(out).all()
