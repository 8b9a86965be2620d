"""Hogwild: every rank takes minibatches of its own, and adds its updates to shared weights without waiting.

Niu, Recht, Re and Wright, "Hogwild!" (2011). Between updates there is neither lock nor barrier; an epoch ends with a
barrier. With --updates cyclades the ranks update disjoint weights only, and the result is that of one rank (Pan et al.,
"CYCLADES", 2016).
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import Any

import numpy as np

from psmpi.comm.transfers import Gather, Message
from psmpi.comm.windows import Windows, windows_of
from psmpi.config import Config
from psmpi.data import Batch, Dataset
from psmpi.errors import UserError
from psmpi.layout import Runs, TableRows, replicate
from psmpi.methods.hogwild.clocks import Tickets, Turns
from psmpi.methods.hogwild.elements import ElementUpdates
from psmpi.methods.hogwild.factors import FactorUpdates, is_factors
from psmpi.methods.hogwild.server import ServerStore
from psmpi.methods.hogwild.settings import SHARED, USUAL_STALENESS, Settings, check_hogwild, hogwild_warnings
from psmpi.methods.hogwild.sparse import SparseUpdates, is_sparse
from psmpi.methods.hogwild.stores import SharedStore, Store, WindowStore, edges_of
from psmpi.methods.hogwild.updates import NetworkUpdates
from psmpi.nn.network import Network
from psmpi.training.context import Context
from psmpi.training.element_worker import ElementWorker
from psmpi.training.method import Exactness, Method
from psmpi.training.need import Need, added, vectors_needed, worker_needed


class Hogwild(Method):
    """Hogwild on one rank: the store of the shared weights, and the updates that this rank makes."""

    name = "hogwild"
    summary = "asynchronous updates of shared weights"
    settings = (Settings,)
    sequences = "steps"
    usual_options = (
        "--dataset", "sparse", "--model", "linear", "--loss", "logistic", "--optimizer", "sgd", "--lr", "0.3",
        "--epochs", "20", "--batch-size", "400", "--schedule", "step", "--step-size", "20", "--gamma", "0.9",
    )  # fmt: skip
    poll_seconds = 2.0
    exactness = Exactness(
        "statistical",
        "statistical",
        0.1,
        ("--updates", "accumulate", "--model", "mlp", "--widths", "40", "--loss", "nll", "--optimizer", "sgd", "--lr",
         "0.1"),
    )  # fmt: skip

    check, warnings = staticmethod(check_hogwild), staticmethod(hogwild_warnings)

    def __init__(self, context: Context):
        roles = replicate(context.layout, context.size)
        super().__init__(context, roles.shards)
        if self.ops.on_device:
            raise UserError(
                "--method hogwild shares weights in the memory of hosts, and a GPU has its own: add --backend compiled"
            )
        self.s, self.size = context.settings(Settings), context.size
        self.group, self.uncounted = context.group(), context.uncounted()
        all_weights = Runs(((0, self.layout.size),))
        self.sparse = not context.settings(Settings).elements and is_sparse(
            context.network, context.dataset, context.config
        )
        self.factors = not self.s.elements and is_factors(
            context.network, context.dataset, context.config, self.s.update_samples
        )
        windows = self._choose()
        self.store = self._store(windows, all_weights)
        self.turns = self._turns(windows)
        self.g = self.ops.zeros(self.layout.size, self.dtype)
        used, place = roles.parts[self.rank].inside(all_weights), roles.workers[self.rank]
        assert used is not None and place is not None
        own_group = context.group([self.rank])
        self.worker = ElementWorker(context, place, roles, own_group, self.store.w[used], self.g[used])
        self.updates = self._updates(all_weights)
        self._declare(all_weights)

    def _choose(self) -> Windows | None:
        """Set `kind`, `reason` and `bound`, which resolve --updates auto; return the MPI windows, None on one rank."""
        self.reason, self.bound = "", self.s.bound
        self.kind: str = self.s.updates
        if self.size == 1:
            self.kind, self.reason = "raw" if self.kind == "auto" else self.kind, "there is one rank"
            return None
        windows = windows_of(self.context.world)
        if self.kind == "auto":
            self.kind = self._usual(windows)
        if self.kind in SHARED and not windows.one_host:
            raise UserError(
                f"--updates {self.kind} needs all ranks on one host, which share memory, and these are on several: use "
                "--updates accumulate, or auto"
            )
        if self.kind == "atomic" and not self.ops.atomics:
            raise UserError(
                "--updates atomic needs the compiled kernels, which are not built: use --updates accumulate, or raw"
            )
        fault = "" if self.kind == "server" else windows.fault()
        if fault:
            if self.kind in SHARED and self.s.updates != "auto":
                raise UserError(f"--updates {self.kind}: MPI's windows do not work here: {fault}; use --updates server")
            self.kind, self.reason = "server", f"warning: MPI's windows do not work here, {fault}: rank 0 is a server"
        if self.s.staleness == "auto" and self.kind in ("accumulate", "server"):
            self.bound = USUAL_STALENESS
        return windows

    def _usual(self, windows: Windows) -> str:
        if not windows.one_host:
            self.reason = "the ranks are on several hosts"
            return "accumulate"
        if not self.ops.atomics:
            self.reason = "there are no compiled kernels"
            return "accumulate"
        if self.sparse or self.factors:
            self.reason = "all ranks are on one host, and samples of few weights rarely meet"
            return "raw"
        self.reason = "all ranks are on one host"
        return "atomic"

    def _store(self, windows: Windows | None, all_weights: Runs) -> Store:
        n, shards = self.layout.size, self.shards.runs
        start, stop = next(iter(self.shards[self.rank].intervals), (0, 0))
        share = slice(start, stop)
        if windows is None or self.kind in SHARED:
            return SharedStore(windows, n, share, self.uncounted, self.dtype, self.ops, self.kind == "atomic")
        if self.kind == "accumulate":
            return WindowStore(windows, edges_of(shards, n), self.uncounted, self.dtype, self.counter)
        whole = Gather(self.uncounted, shards, all_weights, self.dtype)
        return ServerStore(n, share, self.group, self.uncounted, whole, self.bound, self.dtype)

    def _turns(self, windows: Windows | None) -> Turns:
        if windows is not None and self.s.hand_out == "tickets" and self.kind not in ("server", "cyclades"):
            return Tickets(self.rank, self.size, windows.counters(1), self.context.world)
        if self.kind == "server" and self.size > 1:
            # The server itself counts the minibatches of workers.
            return Turns(self.rank - 1, self.size - 1, None, None, self.context.world)
        counters = None if windows is None or self.bound is None else windows.counters(self.size)
        return Turns(self.rank, self.size, self.bound, counters, self.context.world)

    def _updates(self, all_weights: Runs) -> NetworkUpdates | SparseUpdates | ElementUpdates | FactorUpdates:
        if self.s.elements:
            updates = ElementUpdates(self.context, self.worker, self.store)
            self.account.include(updates.memory)
            return updates
        if self.factors and isinstance(self.store, SharedStore):
            return FactorUpdates(self.context, self.store)
        if self.sparse:
            return SparseUpdates(self.context, self.worker, self.store, self.s.update_samples)
        return NetworkUpdates(self.context, self.worker, self.store, self.g, all_weights, self.s.update_samples)

    def _declare(self, all_weights: Runs) -> None:
        """Declare the state: this rank's share of the weights, and its optimizer's vectors as rows of tables."""
        self.state.scalars = self.updates.optimizer.scalars
        # Steps of the whole run: the number of a minibatch decides which rank takes it.
        self.state.scalars["steps"] = 0
        # Copy for checkpoints, which does not change while other ranks go on.
        self.saved = np.zeros_like(self.store.share)
        self.state.vector("weights", self.saved, after=self._load)
        for name, vector in self.updates.optimizer.vectors.items():
            self.state.table(name, vector.reshape(1, -1))
        if self.updates.optimizer.vectors:
            self.state.rows = TableRows.one_each(self.size)
            self.state.not_restored = "the optimizer states of this many ranks: all start from zeros"
        self.account.hold("weights", *self.store.owned)
        self.account.hold("gradients", self.g)
        self.account.hold("buffers", *self.updates.owned)
        self.account.ask("optimizer", lambda: self.updates.optimizer.arrays)
        self.account.include(self.worker.memory)
        self.context.draw_weights(self.shards[self.rank], self.saved)
        self._load()

    def _load(self) -> None:
        """Set the shared weights from `saved` of all ranks."""
        self.store.share[...] = self.saved
        self.store.loaded()

    @classmethod
    def needed(cls, size: int, network: Network, dataset: Dataset, config: Config) -> list[Need]:
        layout = network.layout()
        roles, whole = replicate(layout, size), layout.size
        shared = config.of(Settings).updates in SHARED
        need = []
        for rank, worker in enumerate(roles.workers):
            assert worker is not None
            weights = whole if not shared or rank == 0 else 0
            need.append(
                added(
                    vectors_needed(config, layout, weights, whole, whole),
                    worker_needed(config, network, dataset, worker, roles),
                )
            )
        return need

    def run_notes(self) -> Iterable[str]:
        kind = {
            "raw": "plain stores to memory that all ranks share",
            "atomic": "atomic additions to memory that all ranks share",
            "cyclades": "plain stores to memory that all ranks share, of samples without common weights",
            "accumulate": "additions to MPI windows",
            "server": "messages to rank 0, which adds them",
        }[self.kind]
        if self.reason.startswith("warning: "):
            yield self.reason
        elif self.s.updates == "auto":
            yield f"note: updates are {kind} (--updates {self.kind}): {self.reason}"
        else:
            yield f"note: updates are {kind}"
        if self.rank == 0:
            yield f"note: an update is of {self.updates.scope}: {self.updates.sparsity()}"

    def run_epoch(self, steps: Iterable[tuple[Batch, float]]) -> None:
        for batch, lr in steps:
            self.step(batch, lr)
        self.store.settle()

    def step(self, batch: Batch, lr: float) -> None:
        if self.kind == "cyclades" and isinstance(self.updates, (SparseUpdates, FactorUpdates)):
            owner, _, _ = self.updates.deal(batch.ids, self.size)
            self.loss_sum += self.updates.one_by_one(batch.ids[owner == self.rank], lr)
            self.store.settle()
            return
        turn = int(self.scalars["steps"])
        self.scalars["steps"] = turn + 1
        if self.turns.takes(turn):
            self.turns.begin()
            self.loss_sum += self.updates.run(batch.ids, lr)
            if self.kind == "accumulate" and (self.bound is not None or self.turns.clock % self.s.flush_every == 0):
                self.store.flush()
            self.store.end()
            self.turns.end()
        elif isinstance(self.store, ServerStore) and self.store.server:
            self.store.serve(turn % self.turns.size, turn // self.turns.size + 1)
        if self.kind == "cyclades":
            self.store.settle()

    def drain(self) -> None:
        self.store.settle()
        self.saved[...] = self.store.share
        # No rank adds before all ranks have their copy.
        self.uncounted.comm.Barrier()

    def restored(self, tables: bool, fresh: Set[str]) -> None:
        if not tables:
            for vector in self.updates.optimizer.vectors.values():
                vector.fill(0)
        turn = int(self.scalars["steps"])
        self.turns.restart(turn, self.uncounted.comm.Barrier)
        if isinstance(self.store, ServerStore):
            self.store.restart(turn)

    def test(self) -> dict[str, float]:
        self.store.settle()
        scores = self.worker.metric.scores(self.uncounted.agree(self.worker.test()))
        self.store.settle()
        return scores

    def diagnostics(self) -> dict[str, Any]:
        """Return "staleness" with --updates server: counts of changes by their staleness.

        The staleness of a change is the number of other changes that the server added since the weights were read.
        """
        if not isinstance(self.store, ServerStore):
            return {}
        counts = np.zeros(1, np.int64)
        counts[0] = len(self.store.histogram)
        self.uncounted.bcast(counts, 0)
        histogram = np.zeros(int(counts[0]), np.int64)
        if self.store.server:
            histogram[...] = self.store.histogram
        self.uncounted.bcast(histogram, 0)
        return {"staleness": histogram.tolist()}

    def work(self) -> tuple[str, str, int]:
        if isinstance(self.store, ServerStore) and self.store.server:
            return "server", "none", self.layout.size
        return "worker", "all", self.layout.size

    def messages(self, step: int, batch: int) -> list[Message] | None:
        rank, size = self.rank, self.size
        if self.kind in SHARED or size == 1:
            return []
        if self.s.hand_out == "tickets":
            return None
        if not isinstance(self.updates, NetworkUpdates):
            return None
        worker, updates = step % self.turns.size, self.updates.count(batch)
        if isinstance(self.store, ServerStore):
            return self.store.messages(worker, updates)
        if worker != rank:
            # A rank knows only of its own one-sided reads and additions.
            return []
        others = [(other, self.shards[other].size * self.dtype.itemsize) for other in range(size) if other != rank]
        return [m for other, nbytes in others for m in ((other, rank, nbytes), (rank, other, nbytes))] * updates

    @property
    def period(self) -> int:
        return max(1, self.turns.size)

    def events(self) -> dict[str, int]:
        return {"psl_terms_past_exp_clip": self.worker.loss.clipped}

    def close(self) -> None:
        self.store.close()
        if self.turns.counters is not None:
            self.turns.counters.free()
