"""Independent subnet training: each round every worker trains a random subnetwork of its own, and no two share weights.

Yuan et al., "Distributed learning of fully connected neural networks using independent subnet training" (2022); by
residual blocks it is ResIST (Dun et al. 2022). One round: weights of the subnets from the ranks that hold the network,
local steps on each worker's own slices of the minibatches without a message, weights back.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Any

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.comm.group import Counter, Group
from psmpi.comm.transfers import Subnets
from psmpi.config import Config
from psmpi.data import Batch, Dataset
from psmpi.errors import UserError
from psmpi.layout import Runs, TableRows, replicate
from psmpi.methods.base import Place, check_first_order, check_slices, configured_loss, make_metric
from psmpi.methods.dealer import Dealer
from psmpi.methods.element_worker import ElementWorker
from psmpi.methods.evaluator import Evaluator
from psmpi.methods.psl import hyperparameters
from psmpi.methods.replica import no_sum
from psmpi.nn.init import initial_weights
from psmpi.nn.network import Network
from psmpi.optim import clip_by_global_norm, make_optimizer


class IndependentSubnets:
    """The method `ist` on one rank: a shard of the network, a subnet to train, or both.

    A round ends after --local-steps, at the end of an epoch and before a checkpoint. With travelling state what the
    optimizer knows of a weight is held and goes out and back with it; else each round begins with a fresh optimizer.
    """

    lost = ""
    extras = frozenset({"rounds"})

    def __init__(self, world: Any, network: Network, dataset: Dataset, config: Config, ops: NumpyOps):
        self.layout, self.ops, self.dtype, self.rank = network.layout(), ops, np.dtype(config.model.dtype), world.rank
        self.counter, self.rows = Counter(), TableRows()
        self.tables: dict[str, np.ndarray] = {}
        self.world = Group(world, range(world.size), self.counter)
        o = config.optimization
        self.clip, self.every = o.clip, config.replicated.local_steps
        self.holders, self.workers = find_roles(world.size, config)
        self.dealer = make_dealer(network, len(self.workers), config)
        self.subnets = Subnets(
            self.world, self.holders, self.workers, self.layout, self.dealer.layouts, self.dealer.deal, self.dtype
        )
        self.shards = self.subnets.shards
        shard = self.shards[world.rank]
        # One that holds all of it tests with it where it is.
        on_device = ops.zeros if len(self.holders) == 1 and world.rank in self.holders else np.zeros
        self.w = ops.mirror(on_device(shard.size, self.dtype))
        initial_weights(
            network, self.layout, shard, self.w.host,
            seed=config.run.seed, kind=config.model.init, gain=config.model.init_gain,
        )  # fmt: skip
        self.travel = config.subnets.optimizer_state == "travel"
        known = make_optimizer(o.optimizer, 0, self.dtype, hyperparameters(config), counted=self.travel).vectors
        travels = known if self.travel else {}
        self.vectors = {"weights": self.w.host, **{name: np.zeros(shard.size, self.dtype) for name in travels}}
        self.scalars: dict[str, float | int] = {"rounds": 0}
        self.number = self.workers.index(world.rank) if world.rank in self.workers else -1
        self.worker: ElementWorker | None = None
        if self.number >= 0:
            self._make_subnet(world, dataset, config)
        self.evaluator: Evaluator | None = None
        group = Group(world, self.holders, Counter())
        self.metric = make_metric(config, dataset)
        if world.rank in self.holders:
            held = [self.shards[rank] for rank in self.holders]
            self.evaluator = Evaluator(group, network, self.layout, held, self.w, dataset.test, self.metric, ops)
        # Steps of the present round; between two rounds none.
        self.steps = 0
        self.loss_sum = 0.0

    def _make_subnet(self, world: Any, dataset: Dataset, config: Config) -> None:
        """The network that a worker trains: it has the same shape in every round."""
        subnet, ops = self.dealer.networks[self.number], self.ops
        self.own = subnet.layout()
        roles = replicate(self.own, len(self.workers))
        place = roles.workers[self.number]
        used = roles.parts[self.number].inside(Runs(((0, self.own.size),)))
        assert place is not None and used is not None
        self.part, self.g = (ops.zeros(self.own.size, self.dtype) for _ in range(2))
        self.unused = slice(used.stop, None)
        self.worker = ElementWorker(
            place, roles, Group(world, [world.rank], self.counter), subnet, self.own, dataset, config, self.part[used],
            self.g[used], ops, tests=False,
        )  # fmt: skip
        o = config.optimization
        self.optimizer = make_optimizer(
            o.optimizer, self.own.size, self.dtype, hyperparameters(config), ops, counted=self.travel
        )
        self.fresh = dict(self.optimizer.scalars)
        state = {"weights": self.part, **self.optimizer.vectors}
        self.mirrors = {name: ops.mirror(state[name]) for name in self.vectors}

    @classmethod
    def check(cls, size: int, network: Network, dataset: Dataset, config: Config) -> None:
        """UserError for a configuration that `size` ranks cannot train; needs no MPI and no arrays of weights."""
        o, dtype = config.optimization, np.dtype(config.model.dtype)
        _, workers = find_roles(size, config)
        make_dealer(network, len(workers), config)
        check_first_order(config, "has searches and pairs that would not outlive a round")
        make_optimizer(o.optimizer, 0, dtype, hyperparameters(config))
        if config.replicated.local_steps < 1:
            raise UserError(f"--local-steps {config.replicated.local_steps}: expected 1 or more steps in a round")
        check_slices(network, config.data.batch_size, len(workers), "workers")
        configured_loss(config, dataset.task)

    @staticmethod
    def warnings(size: int, network: Network, config: Config) -> Iterator[str]:
        """Notes for the user on this method on `size` ranks with this network."""
        _, workers = find_roles(size, config)
        if config.subnets.deal == "units" and not network.normalized and len(workers) > 1:
            yield (
                "without batch normalization the inputs of a subnet's layers are scaled up for the units that are "
                "elsewhere: --batch-norm learns better with this method"
            )

    def step(self, batch: Batch, lr: float) -> None:
        if self.steps == 0:
            self._begin()
        if self.worker is not None:
            share = batch.share(self.number, len(self.workers))
            # A last minibatch may leave some workers without a sample: they take all of it, and every one steps alike.
            own = share if len(share) else batch
            self.g[self.unused].fill(0)
            self.loss_sum += self.worker.element_losses(own, own) * len(share)
            if self.clip > 0:
                clip_by_global_norm(self.g, self.clip, no_sum, self.ops)
            self.optimizer.step(self.part, self.g, lr, no_sum)
        self.steps += 1
        if self.steps == self.every:
            self._end()

    def _begin(self) -> None:
        """Deal out the network: each worker gets its subnet's weights, and what travels with them."""
        self.subnets.plan(int(self.scalars["rounds"]))
        if self.worker is not None:
            for vector in self.optimizer.vectors.values():
                vector.fill(0)
            self.optimizer.scalars.update(self.fresh)
        for name, shard in self.vectors.items():
            self.subnets.forward(shard, self._own(name))
            if self.worker is not None:
                self.mirrors[name].push()
        if self.worker is not None:
            for mirror in self.mirrors.values():
                mirror.settle()

    def _end(self) -> None:
        """Put the subnets back: what one worker has trained as it is, of what all have the mean."""
        if self.steps == 0:
            return
        if self.worker is not None:
            for mirror in self.mirrors.values():
                mirror.fetch()
            for mirror in self.mirrors.values():
                mirror.wait()
        for name, shard in self.vectors.items():
            self.subnets.average(self._own(name), shard)
        self.steps = 0
        self.scalars["rounds"] += 1

    def _own(self, name: str) -> np.ndarray | None:
        """A worker's vector of its subnet, in host memory."""
        return self.mirrors[name].host if self.worker is not None else None

    def collect(self) -> None:
        """Bring the vectors up to date: that ends a round."""
        self._end()

    def resumed(self, tables: bool, fresh: Set[str]) -> None:
        """The vectors are used as they are."""

    def test(self) -> dict[str, float]:
        self._end()
        totals = self.metric.zeros()
        if self.evaluator is not None:
            self.w.push()
            totals = self.evaluator.run()
            self.w.settle()
        return self.metric.scores(self.world.agree(totals))

    def diagnostics(self) -> dict[str, Any]:
        return {"rounds": int(self.scalars["rounds"])}

    def place(self) -> Place:
        names = [name for name, mine in (("master", self.rank in self.holders), ("worker", self.number >= 0)) if mine]
        held = self.own.size if self.number >= 0 else 0
        return Place(
            "+".join(names), "all", held, self.shards[self.rank].size, sum(self.memory().values()), self.ops.place
        )

    def memory(self) -> dict[str, int]:
        shard = sum(vector.nbytes for vector in self.vectors.values())
        found = {"weights": shard, "buffers": self.subnets.nbytes}
        if self.evaluator is not None:
            found["tests"] = self.evaluator.nbytes
        if self.worker is not None:
            more = self.worker.memory()
            found["weights"] += self.part.nbytes
            found["gradients"] = self.g.nbytes
            found["optimizer"] = self.optimizer.nbytes
            found["buffers"] += more.pop("buffers")
            found |= more
        return found

    def events(self) -> dict[str, int]:
        return {"psl_terms_past_exp_clip": self.worker.loss.clipped if self.worker is not None else 0}


def make_dealer(network: Network, workers: int, config: Config) -> Dealer:
    """The ranks that deal out the network; UserError where that cannot be."""
    o = config.subnets
    return Dealer(network, workers, o.subnet_seed, o.deal, o.strata, o.min_blocks)


def find_roles(size: int, config: Config) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ranks that hold the network, and those that train subnets: both of them all ranks with --placement owner."""
    parallel, every = config.parallel, tuple(range(size))
    if parallel.placement == "owner" and (parallel.masters != 1 or parallel.colocate):
        raise UserError(
            "--placement owner: with --method ist every rank holds a part of the network and trains: leave --masters "
            "and --colocate out"
        )
    if parallel.placement == "owner":
        return every, every
    if not 1 <= parallel.masters <= size:
        raise UserError(f"--masters {parallel.masters} with {size} rank(s): expected 1 to {size}")
    colocate = parallel.colocate or size == parallel.masters
    return every[: parallel.masters], every if colocate else every[parallel.masters :]
