"""Causes of values that are not finite: samples, parameters by unit and class, or the first layer of a pass."""

import numpy as np
import pytest
from helpers.problems import make_model, random_problem

from psmpi.layout import Runs
from psmpi.nn.finite import find_cause, find_parameters, spans
from psmpi.nn.zoo import make_network


def mlp():
    return make_network("mlp", (1, 8, 8), 10, widths=(6, 5))


def test_numbers_are_told_as_spans():
    assert spans((0, 1, 2, 5, 7, 8)) == "0-2 5 7-8" and spans(()) == ""


def test_parameters_are_named_with_units_and_classes():
    """Names agree with the layout; each later layer of psnet has blocks of some classes."""
    layout = make_network("psnet", (1, 8, 8), 10).layout()
    all_runs = Runs(((0, layout.size),))
    for block in layout.blocks:
        for piece in block.pieces:
            p = layout.parameters[piece.parameter]
            w = np.zeros(layout.size)
            w[piece.offset] = np.nan
            text = find_parameters(layout, all_runs, w)
            assert text.startswith(p.name) and text.endswith("(NaN)")
            assert p.units == 1 or f"unit {piece.first} of {p.units}" in text
            classes = sorted(block.classes)
            assert len(classes) == 10 or f"(class{'es' * (len(classes) > 1)} {spans(classes)})" in text
    assert find_parameters(layout, all_runs, np.zeros(layout.size)) == ""


def test_parameters_of_a_part_are_those_of_the_whole():
    """An infinite value has the same name in a local vector of some classes and in the flat vector."""
    layout = make_network("psnet", (1, 8, 8), 10).layout()
    part = layout.part((3, 4))
    for at in range(0, part.size, 97):
        local, flat = np.zeros(part.size), np.zeros(layout.size)
        local[at] = np.inf
        flat[part.cut(at, at + 1).starts[0]] = np.inf
        assert find_parameters(layout, part, local) == find_parameters(layout, Runs(((0, layout.size),)), flat)


def test_the_rest_of_many_parameters_is_counted():
    layout = mlp().layout()
    text = find_parameters(layout, Runs(((0, layout.size),)), np.full(layout.size, np.inf))
    assert text == "dense1.weight and dense1.bias and dense2.weight and 3 more (inf)"


def test_samples_come_before_weights_and_weights_before_layers():
    layout, w, x, _ = random_problem(mlp(), batch=4)
    model = make_model(mlp(), layout, w)
    x[3, 2] = np.nan
    model.forward(x)
    cause = find_cause(model)
    assert (cause.kind, cause.columns, cause.few) == ("inputs", (2,), True) and "NaN" in cause.text
    x[3, 2] = 0
    model.w[-1] = np.inf
    model.forward(x)
    cause = find_cause(model)
    assert cause.kind == "weights" and cause.text == "dense3.bias, unit 9 of 10 (class 9) (inf)"


@pytest.mark.parametrize(("layer", "huge"), [("dense1", 0), ("dense2", 1), ("dense3", 2)])
def test_the_first_layer_that_is_not_finite_is_named(layer, huge):
    """One layer alone has weights that are finite and too large."""
    layout, w, x, _ = random_problem(mlp(), batch=4)
    x[:, 1] = 0
    model = make_model(mlp(), layout, w)
    weighted = [part for part in model.parts if part.layer.linear]
    names = [p.name for p in layout.parameters]
    for piece in layout.pieces():
        if names[piece.parameter] == f"{layer}.weight":
            size = layout.parameters[piece.parameter].unit_size * (piece.last - piece.first)
            model.w[piece.offset : piece.offset + size] = 1e308
    assert weighted[huge].layer.name == layer
    with np.errstate(all="ignore"):
        model.forward(np.abs(x) * 10)
        cause = find_cause(model)
    assert cause.kind == "layer" and cause.text.startswith(f"layer {layer} is the first to put out inf, in ")
    # A sample of zeros, through biases of random signs, may not overflow in the first layer.
    assert huge > 0 or 1 not in cause.columns


def test_finite_passes_have_no_layer_to_name():
    layout, w, x, _ = random_problem(mlp(), batch=4)
    model = make_model(mlp(), layout, w)
    before = model.forward(x).scores.copy()
    assert find_cause(model).kind == "loss"
    # find_cause leaves the pass unchanged.
    assert np.array_equal(model.last.scores, before)


def test_a_look_at_a_small_pass_leaves_room_for_large_ones():
    """Buffers that all passes share, also windows of convolutions, keep the size of the largest minibatch."""
    net = make_network("lenet", (1, 28, 28), 10)
    layout, w, x, _ = random_problem(net, batch=9)
    model = make_model(net, layout, w)
    expected = model.forward(x).scores.copy()
    model.forward(x[:, :2].copy())
    find_cause(model)
    assert np.array_equal(model.forward(x).scores, expected)
