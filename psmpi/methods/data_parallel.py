"""Data parallelism: every rank has the whole network and a slice of each minibatch, and gradients are summed.

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
from psmpi.config import Config, listed, option
from psmpi.data import Batch, Dataset
from psmpi.errors import UserError
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
    """Size of the pieces in which a gradient is summed, the first one a 25th of it."""
    overlap: bool = True
    """Begin to sum a piece as soon as backward has filled it (on the host; not by doubling and halving)."""
    compression: Literal["none", "float16", "topk", "dgc", "sign", "qsgd", "powersgd"] = "none"
    """Part of a gradient that is sent: all; half the bits; the largest components, plain or summed up with --momentum
    (dgc); a bit each; random multiples of a fraction of the norm; two thin matrices for each matrix."""
    error_feedback: bool = True
    """Remember what compression left out, and add it to the next gradient."""
    density: float = 0.01
    """Share of the components that topk and dgc send."""
    powersgd_rank: int = 2
    """Columns of powersgd's matrices."""
    qsgd_levels: int = 15
    """Multiples that qsgd rounds to, 1 to 127."""


# The kinds of compression that use a setting.
USERS = {"density": ("topk", "dgc"), "powersgd_rank": ("powersgd",), "qsgd_levels": ("qsgd",)}


class DataParallel(Replica):
    """The method on one rank. What compression has left out is a row of the tables, for other ranks its mean."""

    name = "data_parallel"
    summary = "each rank the whole network and a slice of each minibatch"
    settings = (Settings, Sums)
    skips = weighs_classes = True
    advice = "use --allreduce ring, and no --compression"

    @classmethod
    def arrangements(cls, config: Config) -> Iterable[tuple[str, Config]]:
        return ((f"--method {cls.name}", replace(config, parallel=replace(config.parallel, method=cls.name))),)

    def __init__(self, context: Context):
        super().__init__(context)
        o, model = context.settings(Settings), self.worker.model
        self.keep("weights", self.w)
        for name, vector in self.optimizer.vectors.items():
            self.keep(name, vector)
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
            self.state.lost = (
                "the random numbers of this many ranks: they begin anew"
                if o.compression == "qsgd"
                else "what compression left out on this many ranks: all start from its mean"
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
                f"--compression {o.compression} makes gradients that fit no loss, and --optimizer "
                f"{config.optimization.optimizer} searches: use a first-order one (sgd, momentum, adam, ...)"
            )
        check_compression(o.density, o.powersgd_rank, o.qsgd_levels)
        for name, kinds in USERS.items():
            if getattr(o, name) != getattr(Settings(), name) and o.compression not in kinds:
                raise UserError(
                    f"{option(name)} is of --compression {listed(kinds)}, not of {o.compression}: leave it out"
                )

    @classmethod
    def uses(cls, config: Config) -> frozenset[str]:
        return frozenset({"momentum"} if config.of(Settings).compression == "dgc" else ())

    def step(self, batch: Batch, lr: float) -> None:
        loss = self.descent.search(self.w, self.g, lr, lambda trial: self.gradient(batch, trial))
        self.loss_sum += loss * len(batch)

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
        if trial and not isfinite(loss):
            loss = inf
        if self.compressor is not None:
            if self.numbers.mode == "skip" and not self.numbers.agree(isfinite(self.ops.squared_norm(self.g) + loss)):
                # What was left out before is not to be made up for by what is no number.
                return nan
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

    def drain(self) -> None:
        for name, mean in self.means.items():
            assert self.compressor is not None
            np.divide(self.compressor.vectors[name], self.world.size, out=mean)
            self.aside.allreduce(mean)

    def restored(self, tables: bool, fresh: Set[str]) -> None:
        if not tables:
            for name, mean in self.means.items():
                assert self.compressor is not None
                self.compressor.vectors[name][...] = mean

    def test(self) -> dict[str, float]:
        self.verify(self.w)
        return super().test()

    def messages(self, step: int, batch: int) -> list[Message] | None:
        known = self.compressor is None and not self.optimizer.needs_closure and self.alike
        return self.buckets.messages() if known else None
