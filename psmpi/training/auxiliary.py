"""Auxiliary networks, which exist during training only (as synthesizers of gradients), and their state on a rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any
from zlib import crc32

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.config import Config
from psmpi.layout import Each, Runs
from psmpi.nn.init import initial_weights
from psmpi.nn.layers.uses import Uses
from psmpi.nn.model import Model
from psmpi.nn.network import Network, TableReader
from psmpi.optim import AllSum
from psmpi.training.context import configured_optimizer
from psmpi.training.descent import no_sum

# Optimizers whose steps are proportional to the gradient.
GRADIENT_RULES = ("sgd", "momentum", "nesterov")


@dataclass(frozen=True)
class AuxiliaryNetwork(Network):
    """A network whose outputs belong to one class, so that its parameters lie in the order of their declaration."""

    @property
    def classes(self) -> int:
        return 1

    def score_uses(self) -> Uses:
        return ((0, self.layers[-1].out_shape[0], Each(0, 1)),)


def make_auxiliary(name: str, in_shape: tuple[int, ...], tables: Sequence[Mapping[str, Any]]) -> AuxiliaryNetwork:
    """The network of some layer tables, see psmpi.nn.network.build, with outputs of any shape."""
    layers, _ = TableReader(name).read(tables, in_shape)
    return AuxiliaryNetwork(name, in_shape, layers)


def dense(units: int) -> Mapping[str, Any]:
    """The table of a dense layer."""
    return {"type": "dense", "units": units}


class Auxiliary:
    """An auxiliary network on a rank: weights w and gradient g (size,), model and optimizer.

    key: part of the seed of the initial weights. zero: fill the last layer with zeros, so that the first outputs are 0.
    """

    def __init__(
        self,
        config: Config,
        network: AuxiliaryNetwork,
        w: np.ndarray,
        g: np.ndarray,
        ops: NumpyOps,
        key: str,
        zero: bool,
    ):
        self.network, self.layout, self.w, self.g, self.ops = network, network.layout(), w, g, ops
        self.config, self.key, self.zero = config, key, zero
        self.model = Model(network, self.layout, w, g, ops)
        self.inputs, self.outputs = prod(network.in_shape), self.model.size
        self.optimizer = configured_optimizer(config, self.layout, Runs(((0, self.layout.size),)), ops)
        self.forward_pass, self.backward_pass = ops.record(self.model.forward), ops.record(self._take_back)
        self.begin()

    def begin(self, weights: bool = True) -> None:
        """Initialize the optimizer, and the weights if `weights`."""
        for vector in self.optimizer.vectors.values():
            vector.fill(0)
        if not weights:
            return
        c, mirror = self.config, self.ops.mirror(self.w)
        seed = crc32(f"{c.run.seed} {self.key}".encode())
        runs = Runs(((0, self.layout.size),))
        initial_weights(
            self.network, self.layout, runs, mirror.host, seed=seed, kind=c.model.init, gain=c.model.init_gain
        )
        if self.zero:
            names = {one.name for one in self.network.layers[-1].parameters()}
            for start, stop in self.layout.runs_of_parameters(names).intervals:
                mirror.host[start:stop] = 0
        mirror.push()
        mirror.settle()

    def reserve(self, batch: int) -> None:
        """Make room for minibatches of up to `batch` samples."""
        self.model.reserve(batch)
        self.room = self.ops.empty(self.inputs * batch, self.w.dtype)

    def x(self, b: int) -> np.ndarray:
        """Room for inputs (inputs, b)."""
        return self.room[: self.inputs * b].reshape(self.inputs, b)

    def forward(self, x: np.ndarray) -> np.ndarray:
        """Outputs (outputs, b) of inputs (inputs, b)."""
        self.seen, self.tape = x, self.forward_pass(x)
        outputs: np.ndarray = self.tape.scores.reshape(self.outputs, -1)
        return outputs

    def backward(self, dy: np.ndarray, dx: np.ndarray | None = None) -> None:
        """Fill g, and dx (inputs, b) if given, from dy, the gradient of the last outputs, which is overwritten."""
        self.backward_pass(self.seen, dy, None if dx is None else dx.reshape(*self.model.in_shape, -1))

    def _take_back(self, x: np.ndarray, dy: np.ndarray, dx: np.ndarray | None) -> None:
        """Backward pass of the last tape. x: its inputs, an argument only so that recordings depend on it."""
        self.model.backward(self.tape, dy.reshape(self.tape.scores.shape), dx=dx)

    def bearable(self, lr: float) -> float:
        """The learning rate `lr`; for optimizers in GRADIENT_RULES at most 0.5 / (n p), which is stable (derived).

        The squared error of n inputs within [-1, 1] at p places has second derivatives up to 2 n p, the trace, and
        gradient descent is stable at rates below 2 over the largest.
        """
        first = next(layer for layer in self.network.walk() if layer.linear)
        weight = first.parameters()[0]
        inputs = weight.unit_size * prod(first.out_shape[1:])
        return min(lr, 0.5 / inputs) if self.config.optimization.optimizer in GRADIENT_RULES else lr

    def step(self, lr: float, scale: float, done: int, allsum: AllSum = no_sum) -> None:
        """Step along `scale` times g, after `done` steps; allsum: of copies on several ranks, see `Optimizer.step`."""
        self.ops.scale(self.g, scale)
        if "t" in self.optimizer.scalars:
            self.optimizer.scalars["t"] = done
        self.optimizer.step(self.w, self.g, lr, allsum)

    @property
    def nbytes(self) -> int:
        """Bytes of all but its weights, gradient and optimizer's vectors."""
        return int(self.model.activation_bytes + self.model.buffer_bytes + self.room.nbytes)
