"""Data parallelism: every rank has the whole network and a slice of each minibatch, and gradients are summed.

Li et al., "PyTorch Distributed" (2020). One step: forward and backward on the rank's samples, buckets of the gradient
summed over ranks as backward fills them, the same optimizer step everywhere.
"""

from __future__ import annotations

from math import inf
from typing import Any

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.backend.reference import exponent_of
from psmpi.comm.allreduce import ALGORITHMS
from psmpi.comm.buckets import Buckets, plan_buckets
from psmpi.config import Config
from psmpi.data import Dataset
from psmpi.errors import UserError
from psmpi.methods.base import Score
from psmpi.methods.replica import Replica, alone
from psmpi.nn.network import Network
from psmpi.optim import clip_by_global_norm


class DataParallel(Replica):
    """The method `data_parallel` on one rank."""

    def __init__(self, world: Any, network: Network, dataset: Dataset, config: Config, ops: NumpyOps):
        super().__init__(world, network, dataset, config, ops)
        self._keep()
        o, model = config.replicated, self.worker.model
        room = max(1, int(o.bucket_megabytes * 1e6) // self.dtype.itemsize)
        plan = plan_buckets(model.filled(), self.layout.size, room)
        self.buckets = Buckets(self.world, self.g, plan, ALGORITHMS[o.allreduce])
        if o.overlap and not ops.on_device:
            model.finished = self._finished

    @classmethod
    def check(cls, size: int, network: Network, dataset: Dataset, config: Config) -> None:
        """UserError for a configuration that `size` ranks cannot train; needs no MPI and no arrays of weights."""
        super().check(size, network, dataset, config)
        o = config.replicated
        if not 1e-6 <= o.bucket_megabytes <= 1e6:
            raise UserError(f"--bucket-megabytes {o.bucket_megabytes}: expected 1e-6 to 1e6")
        if o.allreduce in ("doubling", "halving") and size & (size - 1):
            raise UserError(f"--allreduce {o.allreduce} pairs ranks, and {size} is no power of two: use ring or mpi")

    def step(self, ids: np.ndarray, lr: float) -> None:
        if self.optimizer.needs_closure:
            losses: list[float] = []

            def objective() -> float:
                losses.append(self.gradient(ids, trial=len(losses) > 0))
                return float(self.world.agree(np.array([losses[-1]]))[0])

            self.optimizer.step(self.w, self.g, lr, alone, objective)
            self.loss_sum += losses[0] * len(ids)
            return
        self.loss_sum += self.gradient(ids) * len(ids)
        if self.clip > 0:
            clip_by_global_norm(self.g, self.clip, alone, self.ops)
        self.optimizer.step(self.w, self.g, lr, alone)

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

    def test(self) -> Score:
        self.verify(self.w)
        return super().test()
