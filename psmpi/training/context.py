"""The context of a training method on one rank: world, network, data, configuration and backend, in one argument."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from functools import cached_property
from typing import TypeVar

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.comm.bridge import Bridge, Staged
from psmpi.comm.group import Counter, Group
from psmpi.comm.probe import make_bridge
from psmpi.comm.protocol import World
from psmpi.config import Config
from psmpi.data import Dataset
from psmpi.layout import Layout, Runs, whole_matrices
from psmpi.nn.init import initial_weights
from psmpi.nn.losses import LOSSES, Loss, make_loss
from psmpi.nn.margin import make_margin
from psmpi.nn.metric import Metric
from psmpi.nn.network import Network
from psmpi.optim import Hyper, Optimizer, find_optimizer, make_optimizer
from psmpi.training.class_weights import class_weights
from psmpi.training.numbers import Numbers

S = TypeVar("S")


class Context:
    """One rank's context; all ranks make theirs at the same point.

    layout: of the whole network; counter: of the bytes that the training sends; bridge: between arrays of this rank's
    backend and messages; host_bridge: the same for arrays that are in host memory in any case; numbers: the treatment
    of losses and gradients that are not finite. outer: the context of a larger network of which `network` is a part;
    messages of both count together.
    """

    def __init__(
        self,
        world: World,
        network: Network,
        dataset: Dataset,
        config: Config,
        ops: NumpyOps,
        outer: Context | None = None,
    ):
        self.world, self.network, self.dataset, self.config, self.ops = world, network, dataset, config, ops
        self.rank, self.size, self.dtype = world.rank, world.size, np.dtype(config.model.dtype)
        self.layout = network.layout()
        if outer is None:
            self.counter = Counter()
            self.bridge = make_bridge(world, ops, config.parallel.gpu_aware)
            self.host_bridge = Staged(ops) if ops.on_device else self.bridge
            self.numbers = Numbers(world, dataset, config.run.on_nan)
        else:
            self.numbers = outer.numbers
            self.counter, self.bridge, self.host_bridge = outer.counter, outer.bridge, outer.host_bridge

    def of_network(self, network: Network) -> Context:
        """Make the context of a network that is a part of this context's network; sends no message."""
        return type(self)(self.world, network, self.dataset, self.config, self.ops, self)

    def settings(self, kind: type[S]) -> S:
        """The method's settings of one class."""
        return self.config.of(kind)

    def group(self, ranks: Sequence[int] | None = None, *, nccl: bool = False, bridge: Bridge | None = None) -> Group:
        """Make a group of ranks (all if None) whose messages are counted; nccl: use NCCL if --nccl is given."""
        ranks = range(self.size) if ranks is None else ranks
        made = Group(self.world, ranks, self.counter, bridge or self.bridge)
        if nccl and self.config.parallel.nccl:
            made.use_nccl(self.ops.stream)
        return made

    def uncounted(self, ranks: Sequence[int] | None = None) -> Group:
        """Make a group of ranks (all if None) for messages outside the training, which are not counted."""
        return Group(self.world, range(self.size) if ranks is None else ranks, Counter(), self.host_bridge)

    def loss(self) -> Loss:
        """Make a loss; each caller gets its own, since a loss counts its clipped terms."""
        made, o = configured_loss(self.config, self.dataset), self.config.objective
        made.lenient, made.scale = self.numbers.lenient, self.network.scale
        made.margin = make_margin(o.margin_kind, o.margin, made.scale, self.dtype)
        made.class_weights = self.class_weights
        return made

    @cached_property
    def class_weights(self) -> np.ndarray | None:
        """The weight of each class by --class-weights, the same on all ranks; None without."""
        return class_weights(self.config.objective.class_weights, self.dataset)

    def metric(self) -> Metric:
        """Make the metric of the test split, with a loss of its own, whose counts are not the training's."""
        return Metric(self.loss(), self.dataset.outputs)

    def optimizer(self, runs: Runs, counted: bool = False) -> Optimizer:
        """Make the optimizer of the weights of `runs`; counted: see `make_optimizer`."""
        return configured_optimizer(self.config, self.layout, runs, self.ops, counted)

    def draw_weights(self, runs: Runs, out: np.ndarray) -> None:
        """Fill `out` (runs.size,), in host memory, with initial weights; their draws are keyed by unit, not by rank."""
        c = self.config
        initial_weights(
            self.network, self.layout, runs, out, seed=c.run.seed, kind=c.model.init, gain=c.model.init_gain
        )

    def put_weights(self, runs: Runs, w: np.ndarray) -> None:
        """Fill `w` (runs.size,), an array of the backend, with initial weights."""
        mirror = self.ops.mirror(w)
        self.draw_weights(runs, mirror.host)
        mirror.push()
        mirror.settle()


def configured_loss(config: Config, dataset: Dataset) -> Loss:
    """The loss of a configuration for a data set; UserError for settings that it cannot have."""
    c, dtype = config.objective, np.dtype(config.model.dtype)
    return make_loss(
        c.loss,
        dtype,
        kappa=c.kappa,
        exp_clip=c.exp_clip,
        task=dataset.task,
        outputs=dataset.outputs,
        weights=c.psl_weights,
        own=_own(config, LOSSES.find(c.loss).options),
    )


def configured_optimizer(
    config: Config, layout: Layout, runs: Runs, ops: NumpyOps | None = None, counted: bool = False
) -> Optimizer:
    """The optimizer of a configuration for the weights of `runs`."""
    o = config.optimization
    hyper = Hyper(**{f.name: getattr(o, f.name) for f in fields(Hyper)})
    kind, dtype = find_optimizer(o.optimizer), np.dtype(config.model.dtype)
    matrices = whole_matrices(layout, runs) if kind.needs_matrices else None
    own = _own(config, kind.options)
    return make_optimizer(o.optimizer, runs.size, dtype, hyper, ops, counted, matrices, own)


def _own(config: Config, options: type[S] | None) -> S | None:
    """The settings that a loss or an optimizer alone has; None where there are none."""
    return None if options is None else config.of(options)


def check_optimizer(config: Config, layout: Layout, shards: Iterable[Runs], counted: bool = False) -> None:
    """UserError for settings that an optimizer cannot have, and for shards that it cannot step."""
    o = config.optimization
    if find_optimizer(o.optimizer).needs_matrices:
        for runs in shards:
            whole_matrices(layout, runs)
    configured_optimizer(config, layout, Runs(), counted=counted)
