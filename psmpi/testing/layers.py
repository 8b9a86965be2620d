"""Checks of layers in small networks: gradients, parts of some classes, memory (docs/own_layer.md).

Each check raises an AssertionError that names the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.errors import UserError
from psmpi.layout import Classes, Each, Layout, restrict
from psmpi.nn.layers import Layer, SampleSums
from psmpi.nn.layers.embedding import Embedding
from psmpi.nn.layers.uses import Uses, used
from psmpi.nn.model import Model
from psmpi.nn.network import Network, TableReader, build
from psmpi.training.need import pass_numbers

# Step of central differences; largest number of elements of a vector that are tried.
STEP, MOVED = 1e-6, 60


def check_layer(table: Mapping[str, Any], in_shape: tuple[int, ...], classes: int = 4) -> None:
    """AssertionError unless a layer agrees with its definition: gradients, units, parts of some classes, memory.

    table: the layer's table of a configuration file; in_shape: of a sample. The layer is checked in networks of
    `classes` scores: as the first layer and, for flat samples, behind a dense layer of as many units.
    """
    layers, shape = TableReader("checked").read([table], in_shape)
    end = {1: (), 2: ({"type": "last"},), 3: ({"type": "flatten"},)}[len(shape)]
    scores = [{"type": "dense", "units": classes}]
    units = int(np.prod(shape)) if len(shape) != 2 else shape[0]
    if units >= classes:
        scores.append({"type": "separable_dense", "units": classes, "groups": classes})
    before: tuple[list[dict[str, Any]], ...] = ([],)
    if len(in_shape) == 1:
        before += ([{"type": "dense", "units": in_shape[0]}],)
    for opening in before:
        for closing in scores:
            network = build("checked", in_shape, [*opening, table, *end, closing], classes)
            for check in NETWORK_CHECKS:
                check(network)
            if not opening and closing is scores[0]:
                # The dense layer behind it needs all units.
                units_depend_as_declared(network, len(layers))
            if not any(layer.couples or layer.recurrent for layer in network.walk()):
                sample_gradients_are_weighed(network)


def random_problem(
    network: Network, batch: int = 3, dtype: Any = np.float64, seed: int = 0
) -> tuple[Layout, np.ndarray, np.ndarray, np.ndarray]:
    """The layout, weights (parameters,), samples (features, batch) and derivatives of scores (classes, ..., batch)."""
    layout = network.layout()
    rng = np.random.default_rng(seed)
    w = rng.normal(size=layout.size).astype(dtype)
    x = rng.normal(size=(int(np.prod(network.in_shape)), batch)).astype(dtype)
    if isinstance(network.layers[0], Embedding):
        x = rng.integers(0, network.layers[0].vocabulary, x.shape).astype(dtype)
    steps = [network.steps] if network.steps else []
    d = rng.normal(size=(network.classes, *steps, batch)).astype(dtype)
    return layout, w, x, d


def make_model(network: Network, layout: Layout, w: np.ndarray, classes: Any = None, fold: bool = True) -> Model:
    """A model of `classes` on a copy of its part of w, with a gradient that is not filled."""
    part = layout.part(range(network.classes) if classes is None else classes)
    g = np.full(part.size, np.nan, w.dtype)
    return Model(network, layout, restrict(w, part), g, NumpyOps(), classes, fold=fold)


def _close(value: np.ndarray, expected: np.ndarray, tolerance: float, what: str) -> None:
    far = np.linalg.norm(value - expected) / max(1e-300, float(np.linalg.norm(expected)))
    assert far <= tolerance, f"{what}: they differ by {far:.1e} of their length, {tolerance:.0e} is allowed"


def _moved(values: np.ndarray, value: Callable[[], float], g: np.ndarray, tolerance: float, what: str) -> None:
    """Compare some elements of a gradient with central differences of `value` by elements of `values`, both (n,)."""
    most = max(1.0, float(np.abs(g).max(initial=0)))
    for i in np.random.default_rng(1).permutation(values.size)[:MOVED]:
        sums = []
        for step in (STEP, -2 * STEP):
            values[i] += step
            sums.append(value())
        values[i] += STEP
        moved = (sums[0] - sums[1]) / (2 * STEP)
        assert abs(moved - g[i]) <= tolerance * most, f"{what}: element {i} is {g[i]:.9g}, by differences {moved:.9g}"


def gradients_match_differences(network: Network, fold: bool = True) -> None:
    """Gradients of the weights are central differences of the scores, in float64."""
    layout, w, x, d = random_problem(network)
    model = make_model(network, layout, w, fold=fold)
    model.backward(model.forward(x), d.copy())
    assert model.g is not None
    _moved(model.w, lambda: float((model.forward(x).scores * d).sum()), model.g, 1e-7, "gradient of the weights")


def input_gradient_matches_differences(network: Network) -> None:
    """The gradient of the samples is one of central differences, in float64."""
    layout, w, x, d = random_problem(network)
    model = make_model(network, layout, w)
    dx = np.empty((*model.in_shape, 3))
    model.backward(model.forward(x), d.copy(), dx=dx)
    value = lambda: float((model.forward(x).scores * d).sum())  # noqa: E731
    _moved(x.reshape(-1), value, dx.reshape(-1), 1e-6, "gradient of the inputs")


def units_depend_as_declared(network: Network, count: int) -> None:
    """The output units of the first `count` layers depend on the input units that the layers declare, and no others.

    A layer without `couples_units` depends on the units that `sources` states. If its units may be dealt out, because
    `restrict` accepts fewer units, then unit k depends on input unit k alone, unless the layer is `linear`. Layers with
    layers inside are not checked.
    """
    layers = network.layers[:count]
    if any(layer.couples_units or layer.inner for layer in layers):
        return
    actual, stated = _dependence(network, count), _stated(network, count)
    undeclared = np.argwhere(actual & ~stated)
    assert not len(undeclared), (
        f"output unit {undeclared[0, 0]} depends on input unit {undeclared[0, 1]}, and `sources` does not state so: "
        "let `sources` state it, and set couples_units = True if each unit depends on all units of its sample"
    )
    numbers = np.indices(actual.shape)
    mixed = np.argwhere(actual & (numbers[0] != numbers[1]))
    exempt = layers[0].in_shape[0] != layers[-1].out_shape[0] or any(layer.linear for layer in layers)
    assert exempt or not len(mixed) or not _deals(layers), (
        f"output unit {mixed[0, 0]} depends on input unit {mixed[0, 1]}, and `restrict` deals the units out: set "
        "couples_units = True, or let `restrict` raise UserError for fewer units"
    )


def _dependence(network: Network, count: int) -> np.ndarray:
    """Return which input units change each output unit of the first layers, (output units, input units) bool."""
    layout, w, x, _ = random_problem(network, batch=8)
    other, units = random_problem(network, batch=8, seed=1)[2], network.in_shape[0]
    part = layout.part(range(network.classes)) & network.runs(layout, 0, count)
    model = Model(network, layout, restrict(w, part), None, NumpyOps(), layers=(0, count))
    before: np.ndarray = model.forward(x.copy()).outputs[-1].copy()
    changes = np.zeros((len(before), units), bool)
    for unit in range(units):
        changed = x.reshape(units, -1).copy()
        changed[unit] = other.reshape(units, -1)[unit]
        after = model.forward(changed.reshape(x.shape)).outputs[-1]
        far = np.abs(after - before).reshape(len(before), -1).max(axis=1)
        changes[:, unit] = far > 1e-10 * np.abs(before).max()
    return changes


def _stated(network: Network, count: int) -> np.ndarray:
    """Return which input units each output unit of the first layers needs by `sources`; shape as `_dependence`."""
    layers, units = network.layers[:count], network.layers[count - 1].out_shape[0]
    # Each output unit counts as a class.
    uses: Uses = ((0, units, Each(0, units)),)
    for layer in reversed(layers):
        uses = layer.sources(uses)
    return np.array([used(uses, Classes.of([unit]), network.in_shape[0]) for unit in range(units)])


def _deals(layers: Sequence[Layer]) -> bool:
    """Return whether all of the layers may have fewer units."""
    try:
        for layer in layers:
            layer.restrict(layer.out_shape[0] - 1, (layer.in_shape[0] - 1, *layer.in_shape[1:]))
    except UserError:
        return False
    return True


def classes_are_rows_of_the_whole(network: Network) -> None:
    """Scores and gradients of the subnetworks of some classes add up to those of the whole network."""
    layout, w, x, d = random_problem(network)
    whole = make_model(network, layout, w)
    tape = whole.forward(x)
    scores = tape.scores.copy()
    whole.backward(tape, d.copy())
    total, g = np.zeros_like(w), np.zeros_like(w)
    _add(g, whole)
    every = list(range(network.classes))
    for classes in ([every[0], every[-1]], every[1:-1]):
        model = make_model(network, layout, w, classes)
        tape = model.forward(x)
        _close(tape.scores, scores[classes], 1e-11, f"scores of the classes {classes} alone and among all")
        model.backward(tape, d[classes])
        _add(total, model)
    _close(total, g, 1e-11, "sum of the gradients of subnetworks, and the gradient of all")


def _add(total: np.ndarray, model: Model) -> None:
    """Add a model's gradient to one of all parameters."""
    at, g = 0, model.g
    assert g is not None
    for start, stop in model.part.intervals:
        total[start:stop] += g[at : at + stop - start]
        at += stop - start


def gradients_are_added_or_left_out(network: Network) -> None:
    """Gradients are added on request, and those of the weights stay unchanged if they are not wanted."""
    layout, w, x, d = random_problem(network, batch=6)
    model = make_model(network, layout, w)
    model.backward(model.forward(x), d.copy())
    assert model.g is not None
    assert np.isfinite(model.g).all(), "backward leaves elements of the gradient as they were"
    once = model.g.copy()
    model.backward(model.forward(x), 2 * d, add=True)
    _close(model.g, 3 * once, 1e-11, "a gradient that is added to another one")
    before, dx, again = model.g.copy(), np.full((*model.in_shape, 6), np.nan), np.full((*model.in_shape, 6), np.nan)
    model.backward(model.forward(x), d.copy(), weights=False, dx=dx)
    assert np.array_equal(model.g, before), "backward writes gradients of weights that are not wanted"
    model.backward(model.forward(x), d.copy(), dx=again)
    assert np.array_equal(dx, again), "the gradient of the inputs depends on whether that of the weights is wanted"
    assert np.array_equal(model.g, once), "a second backward pass has another gradient than the first"


def memory_is_stated(network: Network) -> None:
    """A model holds the bytes that its layers state, within a tenth."""
    layout, w, x, d = random_problem(network, batch=400)
    for classes in (tuple(range(network.classes)), (1,)):
        model = make_model(network, layout, w, classes)
        model.backward(model.forward(x), d[list(classes)].copy())
        outputs, besides = pass_numbers(network, classes, 400, packed=False)
        held, needed = model.activation_bytes + model.buffer_bytes, 8 * (outputs + besides)
        assert held <= 1.1 * needed + 4096 and needed <= 1.1 * held + 4096, (
            f"classes {classes}: {held:,} bytes are held, and the layers state {needed:,} (`buffer_numbers`, "
            "`workspace_numbers`)"
        )


def sample_gradients_are_weighed(network: Network) -> None:
    """Weighted sums of the samples' gradients are sums of the gradients of minibatches of one sample."""
    layout, w, x, d = random_problem(network, batch=5)
    for classes in (None, (1,)):
        model = make_model(network, layout, w, classes)
        rows = slice(None) if classes is None else slice(1, 2)
        assert model.g is not None
        apart, sums = np.full((5, model.part.size), np.nan), np.full((3, model.part.size), np.nan)
        weights = np.random.default_rng(1).standard_normal((3, 5))
        tape = model.forward(x)
        model.backward(tape, d[rows].copy(), sums=SampleSums(np.eye(5), apart))
        model.backward(tape, d[rows].copy(), sums=SampleSums(weights, sums))
        assert np.isnan(model.g).all(), "backward writes the gradient of the minibatch where sums are wanted"
        _close(sums, weights @ apart, 1e-12, "weighted sums of samples' gradients")
        for k in range(5):
            tape = model.forward(np.ascontiguousarray(x[:, k : k + 1]))
            model.backward(tape, np.ascontiguousarray(d[rows, ..., k : k + 1]))
            _close(apart[k], model.g, 1e-12, f"the gradient of sample {k}, and of a minibatch of it alone")
            model.g.fill(np.nan)


NETWORK_CHECKS: tuple[Callable[[Network], None], ...] = (
    gradients_match_differences,
    input_gradient_matches_differences,
    classes_are_rows_of_the_whole,
    gradients_are_added_or_left_out,
    memory_is_stated,
)
