"""Data parallelism: every rank has the whole network and a slice of each minibatch, and gradients are summed.

Li et al., "PyTorch Distributed" (2020). One step: forward and backward on the rank's samples, buckets of the gradient
summed over ranks as backward fills them, the same optimizer step everywhere.
"""

from __future__ import annotations

from collections.abc import Set
from math import inf
from typing import Any

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.backend.reference import exponent_of
from psmpi.comm.buckets import Buckets, check_allreduce, plan_buckets
from psmpi.comm.compression import Compressor, check_compression, make_compressor
from psmpi.comm.world import several_hosts
from psmpi.config import Config
from psmpi.data import Batch, Dataset
from psmpi.errors import UserError
from psmpi.layout import TableRows
from psmpi.methods.replica import Replica, no_sum
from psmpi.nn.network import Network
from psmpi.optim import FIRST_ORDER, clip_by_global_norm


class DataParallel(Replica):
    """The method `data_parallel` on one rank.

    What compression has left out is this rank's own: a row of the tables, and for other numbers of ranks its mean.
    """

    lost = "what compression left out on this many ranks: all start from its mean"
    extras = frozenset({"left", "moving"})
    advice = "use --allreduce ring, and no --compression"

    def __init__(self, world: Any, network: Network, dataset: Dataset, config: Config, ops: NumpyOps):
        super().__init__(world, network, dataset, config, ops)
        o, model = config.replicated, self.worker.model
        self.compressor: Compressor | None = None
        self.means: dict[str, np.ndarray] = {}
        if o.compression != "none":
            self.compressor = make_compressor(
                o.compression, self.by_host, self.layout, self.dtype, o.error_feedback, density=o.density,
                rank=o.powersgd_rank, levels=o.qsgd_levels, momentum=config.optimization.momentum, seed=config.run.seed,
            )  # fmt: skip
            self.tables = self.compressor.tables
            self.rows = TableRows.one_each(world.size) if self.tables else self.rows
            self.means = {name: np.zeros_like(vector) for name, vector in self.compressor.vectors.items()}
            self.state |= self.means
            if o.compression == "qsgd":
                self.lost = "the random numbers of this many ranks: they begin anew"
        self._keep()
        room = max(1, int(o.bucket_megabytes * 1e6) // self.dtype.itemsize)
        plan = plan_buckets(model.filled(), self.layout.size, room)
        across = o.allreduce == "auto" and world.size > 1 and several_hosts(world)
        self.buckets = Buckets(self.world, self.by_host, self.g, plan, o.allreduce, across)
        if o.overlap and not ops.on_device and self.compressor is None:
            model.finished = self._finished

    @classmethod
    def check(cls, size: int, network: Network, dataset: Dataset, config: Config) -> None:
        """UserError for a configuration that `size` ranks cannot train; needs no MPI and no arrays of weights."""
        super().check(size, network, dataset, config)
        o = config.replicated
        if not 1e-3 <= o.bucket_megabytes <= 1e6:
            raise UserError(f"--bucket-megabytes {o.bucket_megabytes}: expected 0.001 to 1e6")
        check_allreduce(o.allreduce, size)
        if o.compression != "none" and config.optimization.optimizer not in FIRST_ORDER:
            raise UserError(
                f"--compression {o.compression} makes gradients that fit no loss, and --optimizer "
                f"{config.optimization.optimizer} searches: use a first-order one (sgd, momentum, adam, ...)"
            )
        check_compression(o.density, o.powersgd_rank, o.qsgd_levels)

    def step(self, batch: Batch, lr: float) -> None:
        if self.optimizer.needs_closure:
            losses: list[float] = []

            def objective() -> float:
                losses.append(self.gradient(batch, trial=len(losses) > 0))
                return float(self.world.agree(np.array([losses[-1]]))[0])

            self.optimizer.step(self.w, self.g, lr, no_sum, objective)
            self.loss_sum += losses[0] * len(batch)
            return
        self.loss_sum += self.gradient(batch) * len(batch)
        if self.clip > 0:
            clip_by_global_norm(self.g, self.clip, no_sum, self.ops)
        self.optimizer.step(self.w, self.g, lr, no_sum)

    def gradient(self, batch: Batch, trial: bool = False) -> float:
        """Fill g with the gradient of the mean loss over the samples; returns this rank's share of the loss.

        A loss that is not finite is a FloatingPointError, in a `trial` of a line search infinity.
        """
        # Before backward begins to send what it fills.
        self.g[self.unused].fill(0)
        try:
            loss = self.worker.element_losses(batch)
        except FloatingPointError:
            if not trial:
                raise
            loss = inf
        if self.compressor is not None:
            self.compressor.reduce(self.g)
            # A sign is never nothing.
            self.g[self.unused].fill(0)
        else:
            self.buckets.finish()
        return loss

    def _finished(self, step: int) -> None:
        # What is to be scaled up again when all of it is there cannot be sent before.
        if not exponent_of(self.worker.objective.report.array[3]):
            self.buckets.finished(step)

    def collect(self) -> None:
        for name, mean in self.means.items():
            assert self.compressor is not None
            np.divide(self.compressor.vectors[name], self.world.size, out=mean)
            self.aside.allreduce(mean)
        super().collect()

    def memory(self) -> dict[str, int]:
        found = super().memory()
        more = self.compressor.nbytes if self.compressor is not None else self.buckets.nbytes
        return {**found, "buffers": found["buffers"] + more + sum(mean.nbytes for mean in self.means.values())}

    def resumed(self, tables: bool, fresh: Set[str]) -> None:
        super().resumed(tables, fresh)
        if not tables:
            for name, mean in self.means.items():
                assert self.compressor is not None
                self.compressor.vectors[name][...] = mean

    def test(self) -> dict[str, float]:
        self.verify(self.w)
        return super().test()
