"""The base class of methods in which each rank has the whole network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import numpy as np

from psmpi.comm.buckets import check_allreduce
from psmpi.comm.group import Group
from psmpi.comm.transfers import Gather
from psmpi.comm.world import several_hosts
from psmpi.config import Config
from psmpi.data import Dataset
from psmpi.errors import UserError
from psmpi.layout import Runs, replicate
from psmpi.nn.network import Network
from psmpi.training.checks import check_not_partitioned, check_slices, slices_are_normalized
from psmpi.training.context import Context, check_optimizer, configured_loss
from psmpi.training.descent import Descent
from psmpi.training.element_worker import ElementWorker
from psmpi.training.method import Method
from psmpi.training.need import Need, added, vectors_needed, worker_needed


@dataclass(frozen=True)
class Sums:
    """All-reduce over ranks that hold the whole network."""

    table: ClassVar[str] = "sums"
    results: ClassVar[bool] = False

    allreduce: Literal["auto", "mpi", "ring", "doubling", "halving"] = "auto"
    """Algorithm of the all-reduce of gradients or weights.

    auto: ring for large buckets between hosts, else mpi
    mpi: MPI's choice
    ring: ring, by messages of psmpi
    doubling: recursive doubling, by messages of psmpi
    halving: recursive halving, by messages of psmpi
    """


class Replica(Method):
    """One rank of such a method: w and g (all parameters,), a worker for its slice of each minibatch.

    Each rank writes and reads an equal share of vectors that are the same on all ranks, see `keep`. A subclass calls
    `keep_state`, or declares a vector "weights" itself. beside: how many
    other numbers are summed over ranks together with the gradient; they follow it in `summed`.
    """

    nccl = True
    sequences = "steps"
    # The advice for ranks that compute alike and receive different sums.
    advice: ClassVar[str] = "use another MPI library"
    # Whether scores of many classes may be computed tile by tile.
    tiles: ClassVar[bool] = True

    def __init__(self, context: Context, beside: int = 0):
        roles = replicate(context.layout, context.size)
        super().__init__(context, roles.shards)
        self.world, self.uncounted = context.group(nccl=True), context.uncounted()
        # Messages that go through host memory in any case.
        self.by_host = context.group(bridge=context.host_bridge)
        whole = Runs(((0, self.layout.size),))
        self.whole = Gather(self.uncounted, self.shards.runs, whole, self.dtype)
        start, stop = next(iter(self.shards[self.rank].intervals), (0, 0))
        self.share = slice(start, stop)
        self.w = self.ops.zeros(self.layout.size, self.dtype)
        self.summed = self.ops.zeros(self.layout.size + beside, self.dtype)
        self.g = self.summed[: self.layout.size]
        # Weights of units that no score depends on lie at the end; no rank computes with them.
        used, place = roles.parts[self.rank].inside(whole), roles.workers[self.rank]
        assert used is not None and place is not None
        self.unused = slice(used.stop, None)
        single = context.group([self.rank])
        self.worker = ElementWorker(context, place, roles, single, self.w[used], self.g[used], tiles=self.tiles)
        self.descent = Descent(context, whole, world=self.world)
        self.optimizer = self.descent.optimizer
        self.state.scalars = self.optimizer.scalars
        self.account.hold("weights", self.w)
        self.account.hold("gradients", self.summed)
        self.account.ask("optimizer", lambda: self.optimizer.arrays)
        self.account.include(self.worker.memory)
        context.put_weights(whole, self.w)
        # Processors of different kinds sum in different orders: then all ranks use the sums of rank 0.
        self.same_sums = self._has_same_sums()
        if not self.same_sums:
            self.descent.allsum = self._of_first

    def _has_same_sums(self) -> bool:
        """Whether scalar products of the same vectors have the same bits on all ranks."""
        sizes = [self.w.size - self.w.size * k // 16 for k in range(16)]
        sums = [(float(self.ops.dots([(self.w[:n], self.w[:n])])[0]), self.ops.abs_sum(self.w[:n])) for n in sizes]
        return self.by_host.same_bits(np.array(sums))

    def _of_first(self, values: np.ndarray) -> np.ndarray:
        """Replace `values` by those of rank 0: the sums over shards of a vector that all ranks have."""
        self.by_host.bcast(values)
        return values

    def keep(self, name: str, vector: np.ndarray, *, own: bool = False) -> None:
        """Declare a vector (all parameters,) that is the same on all ranks: each saves a share, and restores all."""
        self.account.hold("weights", vector)
        share = vector[self.share]
        self.state.vector(name, share, own=own, after=partial(self.whole.forward, share, vector))

    def keep_state(self) -> None:
        """Declare the weights and the optimizer's vectors, which are the same on all ranks, to the state."""
        self.keep("weights", self.w)
        for name, vector in self.optimizer.vectors.items():
            self.keep(name, vector)

    @property
    def own_sums(self) -> bool:
        """Whether psmpi's ring sums large pieces: under --allreduce auto on several hosts."""
        kind = self.context.settings(Sums).allreduce
        return kind == "auto" and self.context.size > 1 and several_hosts(self.context.world)

    @classmethod
    def check(cls, size: int, network: Network, dataset: Dataset, config: Config) -> None:
        check_not_partitioned(config)
        check_slices(network, config.data.batch_size, size, "ranks")
        configured_loss(config, dataset)
        check_optimizer(config, network.layout(), ())
        check_allreduce(config.of(Sums).allreduce, size)

    @classmethod
    def needed(cls, size: int, network: Network, dataset: Dataset, config: Config) -> list[Need]:
        layout = network.layout()
        roles, whole = replicate(layout, size), layout.size
        need = vectors_needed(config, layout, whole, whole, whole)
        workers = (worker for worker in roles.workers if worker is not None)
        return [added(need, worker_needed(config, network, dataset, worker, roles)) for worker in workers]

    @staticmethod
    def warnings(size: int, network: Network, config: Config) -> Iterator[str]:
        if network.normalized and size > 1:
            yield slices_are_normalized("")

    def test(self) -> dict[str, float]:
        return self.worker.metric.scores(self.world.agree(self.worker.test()))

    def verify(self, vector: np.ndarray) -> None:
        """UserError unless all ranks hold the same bits of a vector, as they must after the same steps."""
        verify(self.world, self.ops.host(vector), self.advice, self.same_sums)

    def work(self) -> tuple[str, str, int]:
        return "replica", "all", self.layout.size

    def events(self) -> dict[str, int]:
        return {"psl_terms_past_exp_clip": self.worker.loss.clipped}


def verify(group: Group, vector: np.ndarray, advice: str, alike: bool = True) -> None:
    """UserError unless all ranks of a group hold the same bits of a vector.

    advice: for ranks that received different sums; alike: whether the ranks' own scalar products are the same.
    """
    if group.same_bits(vector):
        return
    if alike:
        why = f"were given different sums, or do not compute alike: {advice}, or hosts of one kind of processor"
    else:
        why = (
            "do not compute alike, as their processors or libraries of linear algebra are of different kinds: use "
            "hosts of one kind, which OPENBLAS_CORETYPE=HASWELL makes them for OpenBLAS, an optimizer without "
            "products of matrices (not muon) and no --compression powersgd, or a method that averages weights"
        )
    raise UserError(f"the ranks no longer hold the same weights: they {why}")
