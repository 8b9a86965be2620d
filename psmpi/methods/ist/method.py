"""Independent subnet training: in each round every worker trains a random subnetwork, independently of the others.

Yuan et al., "Distributed learning of fully connected neural networks using independent subnet training" (2022); by
residual blocks it is ResIST (Dun et al. 2022). One round: the ranks that hold the network send the weights of the
subnets; every worker makes local steps on its slices of the minibatches, without messages; the weights go back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np

from psmpi.comm.transfers import Message, Step, Subnets
from psmpi.config import Config, Least
from psmpi.data import Batch, Dataset
from psmpi.errors import UserError
from psmpi.layout import Runs, even_edges, replicate
from psmpi.methods.ist.dealer import Dealer
from psmpi.nn.network import Network
from psmpi.training.checks import check_first_order, check_slices
from psmpi.training.context import Context, check_optimizer, configured_loss
from psmpi.training.descent import Descent
from psmpi.training.element_worker import ElementWorker
from psmpi.training.evaluator import Evaluator
from psmpi.training.masters import Masters
from psmpi.training.method import Exactness, Method
from psmpi.training.need import Need, added, vectors_needed, worker_needed
from psmpi.training.rounds import Rounds, check_rounds
from psmpi.training.state import fetch


@dataclass(frozen=True)
class Settings:
    """Independent subnetworks (ist)."""

    table: ClassVar[str] = "ist"
    results: ClassVar[bool] = True

    deal: Literal["units", "blocks"] = "units"
    """Units that are dealt to the workers in each round.

    units: neurons and channels of each layer
    blocks: residual blocks (ResIST)
    """
    strata: bool = False
    """Split the units into as many equal groups as workers, and deal each group separately. All messages then have the
    same size."""
    subnet_seed: Annotated[int, Least(0)] = 0
    """Seed of the deals."""
    min_blocks: int = 1
    """Least number of residual blocks of a worker. Where there are fewer, workers share blocks, which are averaged."""
    optimizer_state: Literal["reset", "travel"] = "reset"
    """Optimizer state of a dealt weight.

    reset: fresh in each round
    travel: moves with the weight; Adam counts the steps of each weight
    """


# A task for tests: a network that is wide enough for five workers.
OPTIONS = (
    "--model", "mlp", "--widths", "80", "--batch-norm", "--loss", "nll", "--lr", "0.01", "--local-steps", "4"
)  # fmt: skip


class IndependentSubnets(Method):
    """Independent subnet training on one rank: a shard of the network, a subnet to train, or both.

    A round ends after --local-steps, at the end of an epoch and before a checkpoint. With --optimizer-state travel the
    optimizer's vectors go out and back with the weights; else each round begins with a fresh optimizer.
    """

    name = "ist"
    summary = "random subnetworks on workers, new in each round"
    settings = (Settings, Rounds, Masters)
    skips = weighs_classes = True
    exactness = Exactness("statistical", "exact", 0.05, OPTIONS, every=4)

    def __init__(self, context: Context):
        config, ops, self.options = context.config, context.ops, context.settings(Settings)
        self.holders, self.workers = find_roles(context.size, config)
        self.dealer = make_dealer(context.network, len(self.workers), config)
        self.world = context.group()
        self.subnets = Subnets(
            self.world, self.holders, self.workers, context.layout, self.dealer.layouts, self.dealer.deal, context.dtype
        )
        super().__init__(context, self.subnets.shards)
        self.every = context.settings(Rounds).local_steps
        shard = self.shards[self.rank]
        # A rank that holds the whole network evaluates it in place, so the weights are on the device.
        sole_holder = len(self.holders) == 1 and self.rank in self.holders
        self.w = ops.mirror((ops.zeros if sole_holder else np.zeros)(shard.size, self.dtype))
        context.draw_weights(shard, self.w.host)
        self.travel = self.options.optimizer_state == "travel"
        self.account.hold("buffers", self.subnets)
        self.state.vector("weights", self.w.host)
        for name in context.optimizer(Runs(), counted=True).vectors if self.travel else ():
            self.state.vector(name, np.zeros(shard.size, self.dtype))
        self.state.scalar("rounds", 0)
        self.number = self.workers.index(self.rank) if self.rank in self.workers else -1
        self.worker: ElementWorker | None = None
        if self.number >= 0:
            self._make_subnet(context)
        self.evaluator: Evaluator | None = None
        group = context.uncounted(self.holders)
        self.metric = context.metric()
        if self.rank in self.holders:
            held = [self.shards[rank] for rank in self.holders]
            self.evaluator = Evaluator(self.network, group, held, self.w, self.dataset.test, self.metric, ops)
            self.account.hold("tests", self.evaluator)
        # Steps of the present round; 0 between two rounds.
        self.steps = 0

    def _make_subnet(self, context: Context) -> None:
        """Make the network that this worker trains; it has the same shape in every round."""
        inner, ops = context.of_network(self.dealer.networks[self.number]), self.ops
        size, roles = inner.layout.size, replicate(inner.layout, len(self.workers))
        all_weights = Runs(((0, size),))
        place, used = roles.workers[self.number], roles.parts[self.number].inside(all_weights)
        assert place is not None and used is not None
        self.part, self.g = (ops.zeros(size, self.dtype) for _ in range(2))
        self.unused = slice(used.stop, None)
        row = inner.group([self.rank])
        self.worker = ElementWorker(inner, place, roles, row, self.part[used], self.g[used], tests=False)
        self.descent = Descent(inner, all_weights, counted=self.travel)
        self.optimizer = self.descent.optimizer
        self.account.hold("weights", self.part)
        self.account.hold("gradients", self.g)
        self.account.ask("optimizer", lambda: self.optimizer.arrays)
        self.account.include(self.worker.memory)
        self.fresh = dict(self.optimizer.scalars)
        own = {"weights": self.part, **self.optimizer.vectors}
        self.mirrors = {name: ops.mirror(own[name]) for name in self.state.entries}

    @classmethod
    def check(cls, size: int, network: Network, dataset: Dataset, config: Config) -> None:
        _, workers = find_roles(size, config)
        make_dealer(network, len(workers), config)
        check_first_order(config, "has line searches and curvature pairs, which do not outlive a round")
        check_optimizer(config, network.layout(), (), counted=config.of(Settings).optimizer_state == "travel")
        check_rounds(config, "in a round")
        check_slices(network, config.data.batch_size, len(workers), "workers")
        configured_loss(config, dataset)

    @classmethod
    def needed(cls, size: int, network: Network, dataset: Dataset, config: Config) -> list[Need]:
        holders, workers = find_roles(size, config)
        dealer = make_dealer(network, len(workers), config)
        layout, travel = network.layout(), config.of(Settings).optimizer_state == "travel"
        needs: list[Need] = [{} for _ in range(size)]
        edges = [(p.unit_size, even_edges(p.units, len(holders))) for p in layout.parameters]
        for number, rank in enumerate(holders):
            # The rank's shard, as `shard_rows` deals it.
            shard = sum(size * (rows[number + 1] - rows[number]) for size, rows in edges)
            needs[rank] = vectors_needed(config, layout, shard, 0, shard * travel, counted=True)
        for number, rank in enumerate(workers):
            subnet, inner = dealer.networks[number], dealer.layouts[number]
            roles = replicate(inner, len(workers))
            place = roles.workers[number]
            assert place is not None
            own = vectors_needed(config, inner, *[inner.size] * 3, counted=travel)
            needs[rank] = added(needs[rank], own, worker_needed(config, subnet, dataset, place, roles, tests=False))
        return needs

    @staticmethod
    def warnings(size: int, network: Network, config: Config) -> Iterator[str]:
        _, workers = find_roles(size, config)
        if config.of(Settings).deal == "units" and not network.normalized and len(workers) > 1:
            yield (
                "without batch normalization, the layers of a subnet scale up their inputs for the missing units: "
                "--batch-norm learns better with this method"
            )

    def step(self, batch: Batch, lr: float) -> None:
        if self.steps == 0:
            self._begin()
        if self.worker is not None:
            share = batch.share(self.number, len(self.workers))
            # A last minibatch may leave some workers without a sample: they take all of it, and every one steps alike.
            own = share if len(share) else batch
            self.g[self.unused].fill(0)
            loss = self.worker.element_losses(own, own)
            if self.descent.sound(loss, self.g, len(share)):
                self.loss_sum += loss * len(share)
                self.descent.step(self.part, self.g, lr)
        self.steps += 1
        if self.steps == self.every:
            self.drain()

    def _begin(self) -> None:
        """Deal out the network: each worker gets its subnet's weights, and the optimizer vectors that travel."""
        self.subnets.plan(int(self.scalars["rounds"]))
        if self.worker is not None:
            for vector in self.optimizer.vectors.values():
                vector.fill(0)
            self.optimizer.scalars.update(self.fresh)
        for name, shard in self.state.vectors.items():
            self.subnets.forward(shard, self._own(name))
            if self.worker is not None:
                self.mirrors[name].push()
        if self.worker is not None:
            for mirror in self.mirrors.values():
                mirror.settle()

    def drain(self) -> None:
        """End the round: put the subnets back. Weights that several workers have trained become their mean."""
        if self.steps == 0:
            return
        if self.worker is not None:
            fetch(self.mirrors.values())
        for name, shard in self.state.vectors.items():
            self.subnets.average(self._own(name), shard)
        self.steps = 0
        self.scalars["rounds"] += 1

    def _own(self, name: str) -> np.ndarray | None:
        """Return this worker's vector of its subnet in host memory; None on a rank that is no worker."""
        return self.mirrors[name].host if self.worker is not None else None

    def test(self) -> dict[str, float]:
        self.drain()
        totals = self.metric.zeros()
        if self.evaluator is not None:
            self.w.push()
            totals = self.evaluator.run()
            self.w.settle()
        return self.metric.scores(self.world.agree(totals))

    def diagnostics(self) -> dict[str, Any]:
        return {"rounds": int(self.scalars["rounds"])}

    @property
    def period(self) -> int:
        return self.every

    def messages(self, step: int, batch: int) -> list[Message]:
        number, within = divmod(step, self.every)
        out = self.subnets.messages(Step(batch, number)) if within == 0 else []
        back = self.subnets.messages(Step(batch, number), back=True) if within == self.every - 1 else []
        return (out + back) * len(self.state.entries)

    def work(self) -> tuple[str, str, int]:
        names = [
            name for name, active in (("master", self.rank in self.holders), ("worker", self.number >= 0)) if active
        ]
        return "+".join(names), "all", self.part.size if self.worker is not None else 0

    def events(self) -> dict[str, int]:
        return {"psl_terms_past_exp_clip": self.worker.loss.clipped if self.worker is not None else 0}


def make_dealer(network: Network, workers: int, config: Config) -> Dealer:
    """Return the dealer of the network; raise UserError if the network cannot be dealt out."""
    o = config.of(Settings)
    return Dealer(network, workers, o.subnet_seed, o.deal, o.strata, o.min_blocks)


def find_roles(size: int, config: Config) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ranks that hold the network, and those that train subnets; with --placement owner both are all ranks.

    Raise UserError for --masters, --colocate and --placement that do not fit together.
    """
    o, every = config.of(Masters), tuple(range(size))
    if o.placement == "owner" and (o.masters != 1 or o.colocate):
        raise UserError(
            "--placement owner: with --method ist every rank holds a part of the network and trains: leave --masters "
            "and --colocate out"
        )
    if o.placement == "owner":
        return every, every
    if not 1 <= o.masters <= size:
        raise UserError(f"--masters {o.masters} with {size} rank(s): expected 1 to {size}")
    colocate = o.colocate or size == o.masters
    return every[: o.masters], every if colocate else every[o.masters :]
