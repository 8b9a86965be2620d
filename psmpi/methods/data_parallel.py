"""Data parallelism: every rank has the whole network and a slice of each minibatch, and gradients are summed.

Li et al., "PyTorch Distributed" (2020). One step: forward and backward on the rank's samples, buckets of the gradient
summed over ranks as backward fills them, the same optimizer step everywhere.
"""

from __future__ import annotations

from math import inf
from typing import Any
from zlib import crc32

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.backend.reference import exponent_of
from psmpi.comm.allreduce import ALGORITHMS
from psmpi.comm.bridge import make_bridge
from psmpi.comm.buckets import Buckets, plan_buckets
from psmpi.comm.group import Counter, Group
from psmpi.config import Config, Parallel
from psmpi.data import Dataset
from psmpi.errors import UserError
from psmpi.methods.base import Place, Score
from psmpi.methods.element_worker import ElementWorker
from psmpi.methods.psl import hyperparameters
from psmpi.nn.init import initial_weights
from psmpi.nn.network import Network
from psmpi.optim import clip_by_global_norm, make_optimizer
from psmpi.optim.element_operators import RULES
from psmpi.partition import Rows, Runs, replicate

# What says who holds which part: here every rank holds all.
PARTITIONED = ("partition", "placement", "masters", "colocate", "replicas")


class DataParallel:
    """The method `data_parallel` on one rank; of the checkpoints it writes and reads an equal share."""

    def __init__(self, world: Any, network: Network, dataset: Dataset, config: Config, ops: NumpyOps):
        self.layout, self.ops = network.layout(), ops
        self.roles = replicate(self.layout, world.size)
        self.shards, self.rank = self.roles.shards, world.rank
        self.counter, self.rows = Counter(), Rows()
        self.tables: dict[str, np.ndarray] = {}
        bridge = make_bridge(world, ops, config.parallel.gpu_aware)
        self.world = Group(world, range(world.size), self.counter, bridge)
        dtype, whole = np.dtype(config.model.dtype), Runs(((0, self.layout.size),))
        self.w, self.g = (ops.zeros(self.layout.size, dtype) for _ in range(2))
        # Units that no score depends on have weights too, which lie last; nobody computes with them.
        used = self.roles.parts[world.rank].inside(whole)
        assert used is not None
        place = self.roles.workers[world.rank]
        assert place is not None
        row = Group(world, [world.rank], self.counter, bridge)
        self.worker = ElementWorker(
            place, self.roles, row, network, self.layout, dataset, config, self.w[used], self.g[used], ops
        )
        self.optimizer = make_optimizer(
            config.optimization.optimizer, self.layout.size, dtype, hyperparameters(config), ops
        )
        self.scalars, self.clip = self.optimizer.scalars, config.optimization.clip
        self.state = {"weights": self.w, **self.optimizer.vectors}
        start, stop = self.shards[world.rank].intervals[0] if self.shards[world.rank].size else (0, 0)
        self.mirrors = {name: ops.mirror(vector[start:stop]) for name, vector in self.state.items()}
        self.vectors = {name: mirror.host for name, mirror in self.mirrors.items()}
        # The same on every rank: drawn by unit, not by rank.
        weights = ops.mirror(self.w)
        initial_weights(
            network, self.layout, whole, weights.host,
            seed=config.run.seed, kind=config.model.init, gain=config.model.init_gain,
        )  # fmt: skip
        weights.push()
        weights.settle()
        self.collect()
        o, model = config.replicated, self.worker.model
        room = max(1, int(o.bucket_megabytes * 1e6) // dtype.itemsize)
        plan = plan_buckets(model.filled(), self.layout.size, room)
        self.buckets = Buckets(self.world, self.g, plan, ALGORITHMS[o.allreduce])
        if o.overlap and not ops.on_device:
            model.finished = self._finished
        self.loss_sum = 0.0

    @classmethod
    def check(cls, size: int, network: Network, dataset: Dataset, config: Config) -> None:
        """UserError for a configuration that `size` ranks cannot train; needs no MPI and no arrays of weights."""
        for name in PARTITIONED:
            if getattr(config.parallel, name) != getattr(Parallel(), name):
                raise UserError(
                    f"--{name} says who holds which part of the network, and with --method {config.parallel.method} "
                    "every rank holds all of it: leave it out"
                )
        o = config.optimization
        if o.optimizer in RULES:
            raise UserError(f"--optimizer {o.optimizer} is of --method psl: choose another one")
        if config.data.batch_size < size:
            raise UserError(
                f"--batch-size {config.data.batch_size} leaves some of {size} ranks without a sample: use --batch-size "
                f"{size} or more, or fewer ranks"
            )
        if not 1e-6 <= config.replicated.bucket_megabytes <= 1e6:
            raise UserError(f"--bucket-megabytes {config.replicated.bucket_megabytes}: expected 1e-6 to 1e6")
        if config.replicated.allreduce in ("doubling", "halving") and size & (size - 1):
            raise UserError(
                f"--allreduce {config.replicated.allreduce} pairs ranks, and {size} is no power of two: use ring or mpi"
            )
        make_optimizer(o.optimizer, 0, np.dtype(config.model.dtype), hyperparameters(config))

    def step(self, ids: np.ndarray, lr: float) -> None:
        if self.optimizer.needs_closure:
            losses: list[float] = []

            def objective() -> float:
                losses.append(self.gradient(ids, trial=len(losses) > 0))
                return float(self.world.agree(np.array([losses[-1]]))[0])

            self.optimizer.step(self.w, self.g, lr, _alone, objective)
            self.loss_sum += losses[0] * len(ids)
            return
        self.loss_sum += self.gradient(ids) * len(ids)
        if self.clip > 0:
            clip_by_global_norm(self.g, self.clip, _alone, self.ops)
        self.optimizer.step(self.w, self.g, lr, _alone)

    def gradient(self, ids: np.ndarray, trial: bool = False) -> float:
        """Fill g with the gradient of the mean loss over the samples `ids` (b,); returns this rank's share of the loss.

        A loss that is not finite is a FloatingPointError, in a `trial` of a line search infinity.
        """
        try:
            loss = self.worker.element_losses(ids)
        except FloatingPointError:
            if not trial:
                raise
            loss = inf
        self.buckets.finish()
        return loss

    def _finished(self, step: int) -> None:
        # What is to be scaled up again when all of it is there cannot be sent before.
        if not exponent_of(self.worker.objective.report.array[3]):
            self.buckets.finished(step)

    def collect(self) -> None:
        for mirror in self.mirrors.values():
            mirror.fetch()
        for mirror in self.mirrors.values():
            mirror.wait()

    def resumed(self) -> None:
        counts = [shard.size for shard in self.shards]
        for name, vector in self.state.items():
            self.mirrors[name].push()
            self.world.gather_all(vector, counts)

    def test(self) -> Score:
        self.verify()
        loss, right, samples = self.world.agree(self.worker.test())
        return Score(float(loss / samples), float(right / samples))

    def verify(self) -> None:
        """RuntimeError unless all ranks hold the same bits of the weights, as they must after the same steps."""
        sums = np.zeros(self.world.size)
        sums[self.rank] = crc32(np.ascontiguousarray(self.ops.host(self.w)).data)
        if len(set(self.world.agree(sums).tolist())) > 1:
            raise RuntimeError(
                "the ranks no longer hold the same weights: this MPI's Allreduce gives them different sums; use "
                "--allreduce ring"
            )

    def place(self) -> Place:
        nbytes = sum(self.memory().values())
        share = self.shards[self.rank].size
        return Place("replica", "all", self.layout.size, share, nbytes, self.ops.place)

    def memory(self) -> dict[str, int]:
        return {
            "weights": self.w.nbytes,
            "gradients": self.g.nbytes,
            "optimizer": sum(v.nbytes for v in self.optimizer.vectors.values()) + self.optimizer.scratch.nbytes,
            **self.worker.memory(),
        }

    def events(self) -> dict[str, int]:
        return {"psl_terms_past_exp_clip": self.worker.loss.clipped}


def _alone(values: np.ndarray) -> np.ndarray:
    """Sums over the shards of a vector that every rank has whole."""
    return values
