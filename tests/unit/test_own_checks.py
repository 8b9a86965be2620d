"""Checks for user classes: the examples pass them, and faulty variants fail."""

import importlib
from unittest import mock

import numpy as np
import pytest
from helpers.paths import ROOT

import psmpi
from psmpi.nn.layers import LAYERS
from psmpi.nn.losses import LOSSES
from psmpi.optim import OPTIMIZERS
from psmpi.testing import check_layer, check_loss, check_optimizer


@pytest.fixture
def example(monkeypatch):
    """A function that imports an example module and registers its class for the test."""
    for registry in (LAYERS, LOSSES, OPTIMIZERS):
        monkeypatch.setattr(registry, "registered", {})
    monkeypatch.syspath_prepend(ROOT / "examples")

    def load(name):
        monkeypatch.delitem(importlib.sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load


def test_the_example_s_layer_passes(example):
    example("own_layer")
    check_layer({"type": "prelu", "slope": 0.3}, (6,))
    check_layer({"type": "prelu"}, (4, 3, 3))


@pytest.mark.parametrize(
    ("method", "wrong", "says"),
    [
        ("backward", lambda self, x, y, kept, dy, dx, into: dy, "backward leaves elements|gradient of the weights"),
        ("forward", lambda self, x, y, room: (np.copyto(y, x + x.sum(axis=0)), (y, None))[1], "gradient"),
    ],
)
def test_a_layer_that_is_wrong_is_found(example, method, wrong, says):
    part = example("own_layer").PReLUPart
    with mock.patch.object(part, method, wrong), pytest.raises(AssertionError, match=says):
        check_layer({"type": "prelu"}, (6,))


def test_the_example_s_loss_passes(example):
    module = example("own_loss")
    check_loss("squared_hinge")
    check_loss("squared_hinge", own=module.Settings(gap=2.0), kappa=1.5)


def test_a_loss_that_is_wrong_is_found(example):
    module = example("own_loss")
    original = module.SquaredHinge.of_margins

    def wrong(self, z, values, grad, own, pairs):
        value = original(self, z, values, grad, own, pairs)
        if grad is not None:
            grad *= 0.5
        return value

    says = r"the derivative by score \d of sample \d"
    with mock.patch.object(module.SquaredHinge, "of_margins", wrong), pytest.raises(AssertionError, match=says):
        check_loss("squared_hinge")


def test_the_example_s_optimizer_passes(example):
    module = example("own_optimizer")
    check_optimizer("adagrad")
    check_optimizer("adagrad", own=module.Settings(start=0.5))


def test_an_optimizer_with_state_that_is_not_saved_is_found(example):
    kind = example("own_optimizer").Adagrad
    original = kind.update

    def wrong(self, w, g, lr, state, a, b):
        self.count = getattr(self, "count", 0) + 1
        original(self, w, g, lr / self.count, state, a, b)

    with mock.patch.object(kind, "update", wrong), pytest.raises(AssertionError, match="its state is not all in"):
        check_optimizer("adagrad")


def test_fit_takes_a_loss_of_one_s_own_and_its_settings(example):
    x = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
    y = (x[:, 0] > 0).astype(int)
    with pytest.raises(psmpi.UserError, match="unknown setting 'gap'"):
        psmpi.fit(x, y, gap=2.0)
    example("own_loss")
    run = psmpi.fit(x, y, loss="squared_hinge", gap=2.0, widths=(4,), epochs=2)
    settings = run.network.settings
    assert (settings["gap"], settings["loss"]) == (2.0, "squared_hinge")
