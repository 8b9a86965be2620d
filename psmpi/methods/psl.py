"""Partially-separable training: each worker computes its element losses, the owners of the weights step them.

Raynaud, Orban, Bigeon, "Partially-separable loss to parallelize partitioned neural network training" (G-2023-36). One
step: weights out to the parts, forward, scores along the replica row (partition `scores` only), backward, gradients
back to the shards, optimizer.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import fields
from math import inf
from typing import Any

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.comm.group import Counter, Group
from psmpi.comm.probe import make_bridge
from psmpi.comm.transfers import Exchange
from psmpi.config import Config
from psmpi.data import Batch, Dataset
from psmpi.errors import UserError
from psmpi.layout import Layout, Roles, TableRows, assign_roles
from psmpi.methods.base import Place, check_classes, check_slices, configured_loss, make_metric
from psmpi.methods.element_worker import ElementWorker
from psmpi.methods.quasi_newton import PartitionedNewton, check_newton, element_rows
from psmpi.nn.init import initial_weights
from psmpi.nn.losses import LOSSES
from psmpi.nn.network import Network
from psmpi.optim import Hyper, clip_by_global_norm, make_optimizer
from psmpi.optim.curvature import RULES

# Scalars of optimizers that count steps in which the weights stayed.
FAILURES = ("failed_searches", "failed_steps")


class PartiallySeparable:
    """The method `psl` on one rank: a shard to optimize, a part to compute with, and the exchange between the two."""

    lost = "the curvature of these elements: it starts afresh"
    extras: frozenset[str] = frozenset()

    def __init__(self, world: Any, network: Network, dataset: Dataset, config: Config, ops: NumpyOps):
        self.layout = network.layout()
        optimization = config.optimization
        self.roles = plan_roles(self.layout, world.size, config)
        self.shards, self.rank, self.clip = self.roles.shards, world.rank, optimization.clip
        self.counter = Counter()
        bridge, dtype = make_bridge(world, ops, config.parallel.gpu_aware), np.dtype(config.model.dtype)
        self.ops, self.exchange = ops, Exchange(world, self.roles, self.counter, dtype, ops, bridge)
        self.w_part, self.w = self.exchange.make_vectors()
        self.g_part, self.g = self.exchange.make_vectors()
        shard = self.shards[world.rank]
        self.optimizer = make_optimizer(optimization.optimizer, shard.size, dtype, hyperparameters(config), ops)
        state = {"weights": self.w, **self.optimizer.vectors}
        self.mirrors = {name: ops.mirror(vector) for name, vector in state.items()}
        self.vectors = {name: mirror.host for name, mirror in self.mirrors.items()}
        self.collect()
        self.scalars = self.optimizer.scalars
        initial_weights(
            network, self.layout, shard, self.vectors["weights"],
            seed=config.run.seed, kind=config.model.init, gain=config.model.init_gain,
        )  # fmt: skip
        self.mirrors["weights"].push()
        self.world = Group(world, range(world.size), self.counter)
        # The global sums concern the ranks that hold weights; with a line search, all ranks follow its decisions.
        holders = [r for r, s in enumerate(self.shards) if s.size]
        self.deciders = self.world if self.optimizer.needs_closure else Group(world, holders, self.counter)
        place = self.roles.workers[world.rank]
        # Replicas of a private block all hold it: in a global sum it counts once, at its owner of record.
        self.counts = self.shards.record[world.rank] == shard
        self.metric = make_metric(config, dataset)
        self.worker: ElementWorker | None = None
        if place is not None:
            row = Group(world, self.roles.row(world.rank), self.counter, bridge)
            if config.parallel.nccl:
                row.use_nccl(ops.stream)
            self.worker = ElementWorker(
                place, self.roles, row, network, self.layout, dataset, config, self.w_part, self.g_part, ops
            )
        if config.parallel.nccl:
            self.exchange.use_nccl(ops.stream)
        self.newton: PartitionedNewton | None = None
        self.tables: dict[str, np.ndarray] = {}
        self.rows = TableRows()
        if optimization.optimizer in RULES:
            self.newton = PartitionedNewton(
                self.world, self.exchange, self.worker, network, self.layout, config, self.w_part, self.w, ops,
                self.scalars,
            )  # fmt: skip
            self.vectors.update(self.newton.vectors)
            self.mirrors.update(self.newton.mirrors)
            self.collect()
            self.tables, self.rows = self.newton.tables, element_rows(self.roles, optimization.merge_pairs)
            # From here on the workers make the steps of the owners themselves.
            self.exchange.forward(self.w, self.w_part)
        self.failed_before: dict[str, float | int] = {}
        self.loss_sum = 0.0

    @classmethod
    def check(cls, size: int, network: Network, dataset: Dataset, config: Config) -> None:
        """UserError for a configuration that `size` ranks cannot train; needs no MPI and no arrays of weights."""
        check_roles(network, plan_roles(network.layout(), size, config), dataset, config)
        make_optimizer(config.optimization.optimizer, 0, np.dtype(config.model.dtype), hyperparameters(config))

    @staticmethod
    def warnings(size: int, network: Network, config: Config) -> tuple[str, ...]:
        """None."""
        return ()

    def allsum(self, values: np.ndarray) -> np.ndarray:
        """`values` (k,) float64 summed over the shards, in place, the same on every rank that takes part."""
        if not self.counts:
            values.fill(0)
        return self.deciders.agree(values)

    def step(self, batch: Batch, lr: float) -> None:
        if self.newton is not None:
            self.loss_sum += self.newton.step(batch, lr) * len(batch)
            return
        if self.optimizer.needs_closure:
            losses: list[float] = []

            def objective() -> float:
                losses.append(self.gradient(batch, trial=len(losses) > 0))
                return float(self.world.agree(np.array([losses[-1]]))[0])

            self.optimizer.step(self.w, self.g, lr, self.allsum, objective)
            self.loss_sum += losses[0] * len(batch)
            return
        self.loss_sum += self.gradient(batch) * len(batch)
        if self.w.size and self.clip > 0:
            clip_by_global_norm(self.g, self.clip, self.allsum, self.ops)
        # With an empty shard too: the optimizer's scalars stay the same on all ranks.
        self.optimizer.step(self.w, self.g, lr, self.allsum)

    def gradient(self, batch: Batch, trial: bool = False) -> float:
        """Fill the shards' gradient of the mean loss over the samples; returns this rank's share of that loss.

        A loss that is not finite is a FloatingPointError, in a `trial` of a line search infinity.
        """
        self.exchange.forward(self.w, self.w_part)
        loss = 0.0
        if self.worker is not None:
            try:
                loss = self.worker.element_losses(batch)
            except FloatingPointError:
                if not trial:
                    raise
                # The others of the row may be fine with their own elements, and wait for this rank's share.
                self.g_part.fill(0)
                loss = inf
        self.exchange.backward(self.g_part, self.g)
        return loss

    def collect(self) -> None:
        for mirror in self.mirrors.values():
            mirror.fetch()
        for mirror in self.mirrors.values():
            mirror.wait()

    def resumed(self, tables: bool, fresh: Set[str]) -> None:
        for mirror in self.mirrors.values():
            mirror.push()
        self.failed_before = {name: self.scalars[name] for name in FAILURES if name in self.scalars}
        if self.newton is not None:
            self.newton.resumed()

    def test(self) -> dict[str, float]:
        # The weights that other ranks own have moved since they were last sent.
        self.exchange.forward(self.w, self.w_part)
        self.exchange.verify(self.w)
        share = self.worker.test() if self.worker is not None else self.metric.zeros()
        return self.metric.scores(self.world.agree(share))

    def diagnostics(self) -> dict[str, Any]:
        return {}

    def place(self) -> Place:
        worker = self.roles.workers[self.rank]
        roles = ["master"] * (self.rank < self.roles.masters) + ["worker"] * (worker is not None)
        nbytes = sum(self.memory().values())
        classes = "" if worker is None else _ranges(worker.classes)
        if worker is not None and self.roles.rows > 1:
            classes += f" (row {worker.row})"
        return Place("+".join(roles), classes, self.w_part.size, self.w.size, nbytes, self.ops.place)

    def memory(self) -> dict[str, int]:
        # Where the shard is a slice of the part, it has no memory of its own.
        apart = self.exchange.inside is None
        return {
            "weights": self.w_part.nbytes + (self.w.nbytes if apart else 0),
            "gradients": self.g_part.nbytes + (self.g.nbytes if apart else 0),
            "optimizer": self.optimizer.nbytes,
            **(self.worker.memory() if self.worker is not None else {}),
            **({"curvature": self.newton.nbytes} if self.newton is not None else {}),
        }

    def events(self) -> dict[str, int]:
        # With the score partition every worker of a row sees the same terms: the first counts them.
        counts = self.worker is not None and (self.worker.pairs is not None or self.worker.place.column == 0)
        clipped = self.worker.loss.clipped if self.worker is not None and counts else 0
        # Scalars are the same everywhere: the first rank counts them, from where a resumed run began.
        failed = {
            f"optimizer_{name}": int(self.scalars[name] - self.failed_before.get(name, 0)) * (self.rank == 0)
            for name in FAILURES
            if name in self.scalars
        }
        return {
            "psl_terms_past_exp_clip": clipped,
            **failed,
            **(self.newton.events() if self.newton is not None else {}),
        }


def plan_roles(layout: Layout, size: int, config: Config) -> Roles:
    """The roles of `size` ranks."""
    parallel = config.parallel
    return assign_roles(
        layout,
        size,
        partition=parallel.partition,
        placement=parallel.placement,
        masters=parallel.masters,
        colocate=parallel.colocate,
        replicas=parallel.replicas,
    )


def hyperparameters(config: Config) -> Hyper:
    """The optimizers' settings in a configuration."""
    return Hyper(**{f.name: getattr(config.optimization, f.name) for f in fields(Hyper)})


def check_roles(network: Network, roles: Roles, dataset: Dataset, config: Config) -> None:
    """UserError where the network, the loss or the minibatch does not allow these roles."""
    workers = [w for w in roles.workers if w is not None]
    tie = network.tie()
    if tie is not None and any(w.column > 0 for w in workers):
        raise UserError(
            f"--model {network.name} cannot be partitioned: layer {tie!r} ties the classes, every score depends on all "
            "of its weights. Use a network that ends in separable layers (--model psnet), or give each worker the "
            f"whole network and a slice of the minibatch with --replicas {len(workers)}"
        )
    loss = configured_loss(config, dataset.task)
    if config.parallel.partition == "pairs":
        check_classes(dataset, "--partition pairs", "leave it out")
    if config.optimization.optimizer in RULES:
        check_classes(dataset, f"--optimizer {config.optimization.optimizer}", "use another one (adam, lbfgs, ...)")
    if config.parallel.partition == "pairs" and not loss.pairwise:
        raise UserError(
            f"--partition pairs needs a loss that is a sum over pairs of classes, and --loss {loss.name} is not: use "
            f"{' or '.join(f'--loss {name}' for name, kind in LOSSES.items() if kind.pairwise)}, or --partition scores"
        )
    if network.normalized and (roles.rows > 1 or config.parallel.partition == "pairs"):
        raise UserError(
            "with batch normalization every worker of --method psl has to see whole minibatches: use --partition "
            "scores with --replicas 1 and no more workers than classes, or --method data_parallel"
        )
    check_newton(network, roles, config)
    check_slices(network, config.data.batch_size, roles.rows, "replica rows")


def _ranges(numbers: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) -> '0-2 5'."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
