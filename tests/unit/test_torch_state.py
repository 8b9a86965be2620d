"""Networks between psmpi and PyTorch: names and shapes without it, and equal scores with it."""

import json

import numpy as np
import pytest
from helpers.arrays import ranks_are_threads
from helpers.layer_examples import NETWORKS, make
from helpers.runs import run

import psmpi
from psmpi.backend import NumpyOps
from psmpi.checkpoint import read_contents
from psmpi.layout import restrict
from psmpi.nn.layers.workspace import Span
from psmpi.nn.model import Model
from psmpi.testing.conformance import tensors
from psmpi.torch import import_state, module_of

SMALL = {"epochs": 2, "batch_size": 20, "lr": 0.01}


@pytest.fixture(autouse=True)
def threads():
    with ranks_are_threads():
        yield


@pytest.fixture
def trained(tmp_path):
    x = np.random.default_rng(0).random((60, 1, 8, 8)).astype(np.float32)
    return psmpi.fit(x, x.mean(axis=(1, 2, 3)) > 0.5, **SMALL, model="psnet", out=tmp_path / "run"), x


def test_weights_go_into_a_checkpoint_and_training_goes_on(trained, tmp_path):
    training, x = trained
    state = {name: values + 1 for name, values in training.network.weights.items()}
    path = import_state(state, tmp_path / "run", tmp_path / "other.h5")
    loaded = psmpi.load(path)
    for name, values in loaded.weights.items():
        np.testing.assert_array_equal(values, state[name])
    assert set(tensors(path)) == {f"weights/{name}" for name in state}
    contents = read_contents(path)
    assert contents.progress.epoch == 2 and contents.names == (False, True)
    y = x.mean(axis=(1, 2, 3)) > 0.5
    resumed = psmpi.fit(x, y, resume=path, out=tmp_path / "after", epochs=3)
    assert len(resumed.metrics) == 3 and any("optimizer" in note for note in resumed.notes)
    back = import_state(training.network.weights, path, tmp_path / "back.h5")
    np.testing.assert_array_equal(psmpi.load(back).scores(x), training.network.scores(x))


class Like:
    """An object with the methods of a PyTorch tensor that the import calls."""

    def __init__(self, values):
        self.values = values

    def __getattr__(self, name):
        return lambda: self.values if name == "numpy" else self


def test_a_state_that_does_not_fit_is_refused(trained, tmp_path):
    training, _ = trained
    good = {name: Like(values) for name, values in training.network.weights.items()}
    first = next(iter(good))
    wrong = [
        ({name: tensor for name, tensor in good.items() if name != first}, f"state has no {first}, one of 1 missing"),
        ({**{f"module.{k}": v for k, v in good.items()}}, f"did you mean module.{first}?"),
        ({**good, "more.weight": Like(np.zeros(3))}, "state has more.weight, one of 1 parameters that"),
        ({**good, first: Like(np.zeros((3, 3)))}, r"its shape is \(3, 3\), and"),
        ({**good, first: Like(np.full_like(training.network.weights[first], np.nan))}, "not finite"),
        ({**good, first: Like(training.network.weights[first].astype(str))}, "not finite"),
    ]
    for state, message in wrong:
        with pytest.raises(psmpi.UserError, match=message):
            import_state(state, tmp_path / "run", tmp_path / "other.h5")
    assert not (tmp_path / "other.h5").exists()
    import_state(good, tmp_path / "run", tmp_path / "other.h5")
    with pytest.raises(psmpi.UserError, match=r"out .* is there already"):
        import_state(good, tmp_path / "run", tmp_path / "other.h5")
    cut = "-m", "psmpi.inspect", "cut", tmp_path / "run", "--classes", "0", "--out", tmp_path / "part.h5"
    assert run(1, *cut)[0] == 0
    with pytest.raises(psmpi.UserError, match="is a part of a network"):
        import_state(good, tmp_path / "part.h5", tmp_path / "more.h5")


# Kinds of layers without a module of PyTorch.
REFUSED = ("sparse", "slab")


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_gives_the_same_scores_or_is_refused(name):
    torch = pytest.importorskip("torch", reason="PyTorch, in psmpi[torch]")
    from psmpi.torch.modules import Scores

    network = make(name)
    if any(kind in json.dumps(network.tables) for kind in REFUSED):
        with pytest.raises(psmpi.UserError, match=r"which psmpi\.torch does not have"):
            Scores(network)
        return
    layout, rng = network.layout(), np.random.default_rng(0)
    w = rng.uniform(-1, 1, layout.size).astype(np.float32)
    from psmpi.arrays.fitted import named_weights

    module = Scores(network).filled(named_weights(layout, w))
    assert {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()} == {
        parameter.name: parameter.shape for parameter in layout.parameters
    }
    x = rng.random((6, *network.in_shape), np.float32)
    if module.tokens:
        x = np.floor(x * network.layers[0].vocabulary).astype(np.float32)
    all_lengths = [None]
    if network.sequences:
        all_lengths.append(1 + np.arange(6, dtype=np.int32) * network.in_shape[1] // 6)
        if "side by side" in name:
            all_lengths.pop()
    for lengths in all_lengths:
        model = Model(network, layout, restrict(w, layout.part(range(network.classes))), None, NumpyOps())
        own_scores = model.forward(np.ascontiguousarray(x.reshape(6, -1).T), None, Span(lengths)).scores
        inputs = torch.from_numpy(x[:, 0].astype(np.int64) if module.tokens else x)
        if network.sequences and not module.tokens:
            inputs = inputs.movedim(2, 1)
        torch_scores = module(inputs, None if lengths is None else torch.from_numpy(lengths)).detach().numpy()
        own_scores = own_scores.transpose(2, 1, 0) if own_scores.ndim == 3 else own_scores.T
        if own_scores.ndim == 3 and lengths is not None:
            counted = np.arange(own_scores.shape[1]) < lengths[:, None]
            own_scores, torch_scores = own_scores[counted], torch_scores[counted]
        np.testing.assert_allclose(torch_scores, own_scores, atol=1e-5 * max(1, abs(own_scores).max()), rtol=0)


@pytest.mark.parametrize(("model", "size"), [("psnet", 8), ("lenet", 28), ("resnet", 12)])
def test_a_trained_network_goes_to_torch_is_trained_there_and_comes_back(model, size, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch, in psmpi[torch]")
    x = np.random.default_rng(0).random((60, 1, size, size)).astype(np.float32)
    y = x.mean(axis=(1, 2, 3)) > 0.5
    options = {"widths": (4, 8), "blocks": (1, 1)} if model == "resnet" else {}
    training = psmpi.fit(x, y, **SMALL, model=model, out=tmp_path / "run", **options)
    module = module_of(tmp_path / "run")
    scores = module(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(scores, training.network.scores(x), atol=1e-5 * max(1, abs(scores).max()))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    loss = torch.nn.functional.cross_entropy(module(torch.from_numpy(x)), torch.from_numpy(y.astype(int)))
    loss.backward()
    optimizer.step()
    path = import_state(module.state_dict(), tmp_path / "run", tmp_path / "back.h5")
    back = psmpi.load(path)
    assert any((back.weights[name] != values).any() for name, values in training.network.weights.items())
    scores = module(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(back.scores(x), scores, atol=1e-5 * max(1, abs(scores).max()))


def test_without_torch_it_is_said_what_to_install(trained, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "psmpi.torch.modules", raising=False)
    with pytest.raises(psmpi.UserError, match=r"pip install 'psmpi\[torch\]'"):
        module_of(trained[0].network)
