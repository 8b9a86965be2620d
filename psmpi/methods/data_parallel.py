"""Data parallelism: every rank has the whole network and a slice of each minibatch; an all-reduce sums the gradients.

Li et al., "PyTorch Distributed" (2020). One step: forward and backward on the rank's samples, buckets of the gradient
summed over ranks as backward fills them, the same optimizer step everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass, replace
from math import inf, isfinite, nan
from typing import ClassVar, Literal

import numpy as np

from psmpi.backend.reference import exponent_of
from psmpi.comm.buckets import Buckets, plan_buckets
from psmpi.comm.compression import Compressor, check_compression, make_compressor
from psmpi.comm.transfers import Message
from psmpi.config import Config, option
from psmpi.data import Batch, Dataset
from psmpi.errors import UserError, unused_option
from psmpi.layout import TableRows
from psmpi.nn.network import Network
from psmpi.optim import given, is_first_order
from psmpi.training.context import Context
from psmpi.training.replica import Replica, Sums


@dataclass(frozen=True)
class Settings:
    """Data parallelism (data_parallel)."""

    table: ClassVar[str] = "data_parallel"
    results: ClassVar[bool] = True

    bucket_megabytes: float = 25.0
    """Size of the buckets in which a gradient is summed, in MB. The first bucket has a 25th of it."""
    overlap: bool = True
    """Start the all-reduce of a bucket as soon as the backward pass has filled it. It needs gradients on the host, and
    another --allreduce than doubling and halving."""
    compression: Literal["none", "float16", "topk", "dgc", "sign", "qsgd", "powersgd"] = "none"
    """Compression of the gradients that ranks send.

    none: no compression
    float16: half precision
    topk: the largest components
    dgc: the largest components, after local accumulation with --momentum
    sign: the sign of each component
    qsgd: random multiples of a fraction of the norm
    powersgd: two thin matrices for each weight matrix
    """
    error_feedback: bool = True
    """Add the error of the compression to the next gradient."""
    density: float = 0.01
    """Share of the components that topk and dgc send."""
    powersgd_rank: int = 2
    """Columns of the matrices of powersgd."""
    qsgd_levels: int = 15
    """Levels that qsgd rounds to, 1 to 127."""


# Kinds of compression that use a setting, by setting.
USERS = {"density": ("topk", "dgc"), "powersgd_rank": ("powersgd",), "qsgd_levels": ("qsgd",)}


class DataParallel(Replica):
    """Data parallelism on one rank.

    Checkpoints hold each rank's compression residual as a row of the tables, and the mean of the residuals. On another
    number of ranks, all ranks start from that mean.
    """

    name = "data_parallel"
    summary = "whole network on every rank, gradients summed"
    settings = (Settings, Sums)
    skips = weighs_classes = True
    advice = "use --allreduce ring, and no --compression"

    @classmethod
    def arrangements(cls, config: Config) -> Iterable[tuple[str, Config]]:
        return ((f"--method {cls.name}", replace(config, parallel=replace(config.parallel, method=cls.name))),)

    def __init__(self, context: Context):
        super().__init__(context)
        o, model = context.settings(Settings), self.worker.model
        self.keep_state()
        self.compressor: Compressor | None = None
        self.means: dict[str, np.ndarray] = {}
        if o.compression != "none":
            self.compressor = make_compressor(
                o.compression, self.by_host, self.layout, self.dtype, o.error_feedback, density=o.density,
                rank=o.powersgd_rank, levels=o.qsgd_levels, momentum=given(context.config.optimization, "momentum"),
                seed=context.config.run.seed,
            )  # fmt: skip
            for name, vector in self.compressor.vectors.items():
                self.means[name] = np.zeros_like(vector)
                self.keep(name, self.means[name], own=True)
            for name, table in self.compressor.tables.items():
                self.state.table(name, table)
                self.state.rows = TableRows.one_each(context.size)
            self.state.not_restored = (
                "the random numbers of this many ranks: they begin anew"
                if o.compression == "qsgd"
                else "the compression residuals of this many ranks: all ranks start from the mean"
            )
        room = max(1, int(o.bucket_megabytes * 1e6) // self.dtype.itemsize)
        plan = plan_buckets(model.filled(), self.layout.size, room)
        how = context.settings(Sums).allreduce
        self.buckets = Buckets(self.world, self.by_host, self.g, plan, how, self.own_sums)
        self.account.ask("buffers", lambda: (self.buckets,) if self.compressor is None else self.compressor.arrays)
        if o.overlap and not self.ops.on_device and self.compressor is None:
            model.finished = self._finished

    @classmethod
    def check(cls, size: int, network: Network, dataset: Dataset, config: Config) -> None:
        super().check(size, network, dataset, config)
        o = config.of(Settings)
        if not 1e-3 <= o.bucket_megabytes <= 1e6:
            raise UserError(f"--bucket-megabytes {o.bucket_megabytes}: expected 0.001 to 1e6")
        if o.compression != "none" and not is_first_order(config.optimization.optimizer):
            raise UserError(
                f"--compression {o.compression} changes the gradient, and --optimizer {config.optimization.optimizer} "
                "needs the exact one: use a first-order optimizer (sgd, momentum, adam, ...)"
            )
        check_compression(o.density, o.powersgd_rank, o.qsgd_levels)
        for name, kinds in USERS.items():
            if getattr(o, name) != getattr(Settings(), name) and o.compression not in kinds:
                raise unused_option(option(name), "--compression", kinds, o.compression)

    @classmethod
    def uses(cls, config: Config) -> frozenset[str]:
        return frozenset({"momentum"} if config.of(Settings).compression == "dgc" else ())

    def step(self, batch: Batch, lr: float) -> None:
        loss = self.descent.search(self.w, self.g, lr, lambda trial: self.gradient(batch, trial))
        self.loss_sum += loss * len(batch)

    def gradient(self, batch: Batch, trial: bool = False) -> float:
        """Fill g (all parameters,) with the gradient of the mean loss over `batch`; return this rank's share of it.

        Raise FloatingPointError for a loss that is not finite; a `trial` of a line search returns infinity instead. NaN
        means that --on-nan skip drops the step.
        """
        # Backward sends each bucket as soon as it is full, so the unused entries are cleared first.
        self.g[self.unused].fill(0)
        try:
            loss = self.worker.element_losses(batch)
        except FloatingPointError:
            if not trial:
                raise
            loss = inf
        if trial and not isfinite(loss):
            loss = inf
        if self.compressor is not None:
            if self.numbers.mode == "skip" and not self.numbers.agree(isfinite(self.ops.squared_norm(self.g) + loss)):
                # A gradient that is not finite must not enter the compression residual.
                return nan
            self.compressor.reduce(self.g)
            # sign(0) is ±1, so unused entries are cleared again.
            self.g[self.unused].fill(0)
        else:
            self.buckets.finish()
        return loss

    def _finished(self, step: int) -> None:
        # A scaled gradient is unscaled after the whole backward pass, so no bucket can be sent before that.
        if not exponent_of(self.worker.objective.report.array[3]):
            self.buckets.finished(step)

    def drain(self) -> None:
        for name, mean in self.means.items():
            assert self.compressor is not None
            np.divide(self.compressor.vectors[name], self.world.size, out=mean)
            self.uncounted.allreduce(mean)

    def restored(self, tables: bool, fresh: Set[str]) -> None:
        if not tables:
            for name, mean in self.means.items():
                assert self.compressor is not None
                self.compressor.vectors[name][...] = mean

    def test(self) -> dict[str, float]:
        self.verify(self.w)
        return super().test()

    def messages(self, step: int, batch: int) -> list[Message] | None:
        fixed = self.compressor is None and not self.optimizer.needs_closure and self.same_sums
        return self.buckets.messages() if fixed else None
