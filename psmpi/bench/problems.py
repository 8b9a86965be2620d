"""The networks of `bench compute`, the number of operations of their steps, and a minibatch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from psmpi.nn.network import Network, build
from psmpi.nn.zoo import make_network

# Learning rate of the measured steps.
LR = 1e-3


def _conv(channels: int, kernel: int, pool: str, activation: str, groups: int = 1) -> list[dict[str, Any]]:
    conv = {"type": "separable_conv", "channels": channels, "kernel": kernel, "groups": groups}
    return [conv, {"type": pool, "size": 2}, {"type": activation}]


def _separable(units: int, groups: int, *activation: str) -> list[dict[str, Any]]:
    return [{"type": "separable_dense", "units": units, "groups": groups}, *({"type": a} for a in activation)]


@dataclass(frozen=True)
class Problem:
    """A network and a loss. classes: the classes of the subnetwork that is measured, all or some."""

    network: Network
    loss: str
    classes: tuple[int, ...]


def problems() -> dict[str, Problem]:
    """All problems by name."""
    every = tuple(range(10))
    mnist = make_network("psnet", (1, 28, 28), 10)
    lenet = [
        *_conv(6, 5, "max_pool", "relu"),
        *_conv(16, 5, "max_pool", "relu"),
        {"type": "flatten"},
        *({"type": "dense", "units": 120}, {"type": "relu"}, {"type": "dense", "units": 84}, {"type": "relu"}),
        {"type": "dense", "units": 10},
    ]
    separable = [
        *_conv(100, 5, "mean_pool", "sigmoid"),
        *_conv(100, 5, "mean_pool", "sigmoid", groups=10),
        {"type": "flatten"},
        *_separable(240, 10, "sigmoid"),
        *_separable(150, 10, "sigmoid"),
        *_separable(10, 10),
    ]
    return {
        "mnist-psnet": Problem(mnist, "psl", every),
        "cifar10-psnet": Problem(make_network("psnet", (3, 32, 32), 10), "psl", every),
        "mnist-lenet": Problem(build("lenet", (1, 28, 28), lenet, 10), "nll", every),
        "separable-psnet": Problem(build("separable", (1, 28, 28), separable, 10), "psl", every),
        "mlp": Problem(make_network("mlp", (784,), 10), "nll", every),
        "one-class": Problem(mnist, "psl", (3,)),
    }


def operations(problem: Problem, batch: int) -> float:
    """Floating-point operations of a step of the network, without folded layers.

    A multiplication with its addition counts 2. They occur in the forward pass, in the gradient of the weights and,
    except in the first layer, in the gradient of the input.
    """
    total, first = 0.0, True
    for stage in problem.network.stages(problem.classes, fold=False):
        if stage.layer.linear:
            macs = stage.layer.macs // len(stage.outputs) * int(stage.outputs.sum()) * batch
            total += 2 * macs * (2 if first else 3)
            first = False
    return total


class Minibatch:
    """A random minibatch: x (batch, *shape) float32, labels (batch,) int64.

    other_scores: (classes, batch) float32, fixed scores for the classes that are not measured.
    """

    def __init__(self, problem: Problem, batch: int):
        rng = np.random.default_rng(0)
        shape = problem.network.in_shape
        self.x = rng.random((batch, *shape), np.float32)
        self.labels = rng.integers(0, problem.network.classes, batch)
        self.other_scores = rng.standard_normal((problem.network.classes, batch)).astype(np.float32)
