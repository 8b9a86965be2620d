"""The base class of methods in which every rank has the whole network: weights, optimizer, samples, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Any

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.comm.bridge import Staged
from psmpi.comm.group import Counter, Group
from psmpi.comm.probe import make_bridge
from psmpi.comm.transfers import Gather
from psmpi.config import Config
from psmpi.data import Dataset
from psmpi.errors import UserError
from psmpi.layout import Runs, TableRows, replicate
from psmpi.methods.base import Place, check_slices, configured_loss
from psmpi.methods.element_worker import ElementWorker
from psmpi.methods.psl import hyperparameters
from psmpi.nn.init import initial_weights
from psmpi.nn.network import Network
from psmpi.optim import make_optimizer
from psmpi.optim.curvature import RULES


class Replica:
    """One rank of such a method: w and g (all parameters,), a worker for its slice of each minibatch.

    Of what is the same on all ranks each writes an equal share into checkpoints, and reads it. `state` is what these
    hold, by name; subclasses may add to it before they call `_keep`.
    """

    lost = ""
    # Vectors that are the method's and not the optimizer's, and what helps where ranks do not sum alike.
    extras: frozenset[str] = frozenset()
    advice = "use another MPI library"

    def __init__(self, world: Any, network: Network, dataset: Dataset, config: Config, ops: NumpyOps):
        self.layout, self.ops, self.dtype = network.layout(), ops, np.dtype(config.model.dtype)
        self.roles = replicate(self.layout, world.size)
        self.shards, self.rank = self.roles.shards, world.rank
        self.counter, self.rows = Counter(), TableRows()
        self.tables: dict[str, np.ndarray] = {}
        bridge = make_bridge(world, ops, config.parallel.gpu_aware)
        self.world = Group(world, range(world.size), self.counter, bridge)
        if config.parallel.nccl:
            self.world.use_nccl(ops.stream)
        # What goes over the host in any case, and what is no part of the training and not counted.
        on_host = Staged(ops) if ops.on_device else bridge
        self.by_host = Group(world, range(world.size), self.counter, on_host)
        self.aside = Group(world, range(world.size), Counter(), on_host)
        whole = Runs(((0, self.layout.size),))
        self.whole = Gather(self.aside, self.shards.runs, whole, self.dtype)
        self.w, self.g = (ops.zeros(self.layout.size, self.dtype) for _ in range(2))
        # Units that no score depends on have weights too, which lie last; nobody computes with them.
        used = self.roles.parts[world.rank].inside(whole)
        place = self.roles.workers[world.rank]
        assert used is not None and place is not None
        self.unused = slice(used.stop, None)
        row = Group(world, [world.rank], self.counter, bridge)
        self.worker = ElementWorker(
            place, self.roles, row, network, self.layout, dataset, config, self.w[used], self.g[used], ops
        )
        o = config.optimization
        self.optimizer = make_optimizer(o.optimizer, self.layout.size, self.dtype, hyperparameters(config), ops)
        self.scalars, self.clip = self.optimizer.scalars, o.clip
        self.state = {"weights": self.w, **self.optimizer.vectors}
        # The same on every rank: drawn by unit, not by rank.
        weights = ops.mirror(self.w)
        initial_weights(
            network, self.layout, whole, weights.host,
            seed=config.run.seed, kind=config.model.init, gain=config.model.init_gain,
        )  # fmt: skip
        weights.push()
        weights.settle()
        self.loss_sum = 0.0

    def _share(self) -> tuple[int, int]:
        """[start, stop) of this rank's shard in the flat vector."""
        start, stop = next(iter(self.shards[self.rank].intervals), (0, 0))
        return start, stop

    def _keep(self) -> None:
        """Let checkpoints hold this rank's share of `state`."""
        start, stop = self._share()
        self.mirrors = {name: self.ops.mirror(vector[start:stop]) for name, vector in self.state.items()}
        self.vectors = {name: mirror.host for name, mirror in self.mirrors.items()}
        self.collect()

    @classmethod
    def check(cls, size: int, network: Network, dataset: Dataset, config: Config) -> None:
        """UserError for a configuration that `size` ranks cannot train; needs no MPI and no arrays of weights."""
        o = config.optimization
        if o.optimizer in RULES:
            raise UserError(f"--optimizer {o.optimizer} is of --method psl: choose another one")
        check_slices(network, config.data.batch_size, size, "ranks")
        configured_loss(config, dataset.task)
        make_optimizer(o.optimizer, 0, np.dtype(config.model.dtype), hyperparameters(config))

    @staticmethod
    def warnings(size: int, network: Network, config: Config) -> Iterator[str]:
        """Notes for the user on this method on `size` ranks with this network."""
        if network.normalized and size > 1:
            yield (
                "batch normalization takes the statistics of each rank's own slice of a minibatch: the result depends "
                "on the number of ranks"
            )

    def collect(self) -> None:
        for mirror in self.mirrors.values():
            mirror.fetch()
        for mirror in self.mirrors.values():
            mirror.wait()

    def resumed(self, tables: bool, fresh: Set[str]) -> None:
        start, stop = self._share()
        for name, vector in self.state.items():
            self.mirrors[name].push()
            self.whole.forward(vector[start:stop], vector)

    def test(self) -> dict[str, float]:
        return self.worker.metric.scores(self.world.agree(self.worker.test()))

    def verify(self, vector: np.ndarray) -> None:
        """RuntimeError unless all ranks hold the same bits of a vector, as they must after the same steps."""
        verify(self.world, self.ops.host(vector), self.advice)

    def diagnostics(self) -> dict[str, Any]:
        return {}

    def place(self) -> Place:
        nbytes = sum(self.memory().values())
        share = self.shards[self.rank].size
        return Place("replica", "all", self.layout.size, share, nbytes, self.ops.place)

    def memory(self) -> dict[str, int]:
        return {
            "weights": self.w.nbytes,
            "gradients": self.g.nbytes,
            "optimizer": self.optimizer.nbytes,
            **self.worker.memory(),
        }

    def events(self) -> dict[str, int]:
        return {"psl_terms_past_exp_clip": self.worker.loss.clipped}


def verify(group: Group, vector: np.ndarray, advice: str) -> None:
    """RuntimeError unless all ranks of a group hold the same bits of a vector."""
    if not group.same_bits(vector):
        raise RuntimeError(f"the ranks no longer hold the same weights: they were given different sums; {advice}")


def no_sum(values: np.ndarray) -> np.ndarray:
    """Sums over the shards of a vector that every rank has whole."""
    return values
