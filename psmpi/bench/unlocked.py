"""Count updates a second of shared weights, in several ways in turn; a program under mpirun that prints JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from psmpi.backend import CompiledOps, Descent, Pairs, Room, Rows
from psmpi.backend.compiled.shared import lock_bytes, make_lock
from psmpi.comm.control import Control
from psmpi.comm.windows import MpiLock, windows_of
from psmpi.comm.world import start
from psmpi.data.planted import distinct

LOCKS = ("ticket", "mutex", "mpi")
WAYS = ("raw", "atomic", "blocks", *LOCKS, "cyclades")
# Bytes between a lock and other data: a cache line.
LINE = 64
# The MPI lock, with a Python call for each update, makes 1 / SLOWER of the updates. MINIBATCH: samples of a minibatch
# of cyclades; BLOCK: samples of a block of the way `blocks`.
SLOWER, MINIBATCH, BLOCK = 20, 1000, 4000


class Task(NamedTuple):
    """A problem on shared weights w. step(order, atomic, lock) updates them by samples and returns the sum of losses.

    starts, columns: the compressed rows of the samples.
    """

    samples: int
    w: np.ndarray
    step: Callable[[np.ndarray, bool, Any], float]
    starts: np.ndarray
    columns: np.ndarray
    features: int
    # Returns the mean loss, and the accuracy (sparse) or the root mean square error (ratings).
    score: Callable[[], tuple[float, float]]


class Shared:
    """Allocates arrays that all ranks of the host share; its methods are collective."""

    def __init__(self, world: Any):
        self.world, self.control, self.windows = world, Control(world), windows_of(world)
        self.memories: list[Any] = []

    def array(self, shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
        kind = np.dtype(dtype)
        memory = self.windows.memory(int(np.prod(shape)) * kind.itemsize)
        self.memories.append(memory)
        view: np.ndarray = memory.bytes.view(kind).reshape(shape)
        return view

    def put(self, made: np.ndarray | None, shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
        """Copy an array of rank 0 (None elsewhere) to a shared array."""
        out = self.array(shape, dtype)
        if made is not None:
            out[...] = made
        self.barrier()
        return out

    def barrier(self) -> None:
        for memory in self.memories[-1:]:
            memory.sync()
        self.control.wait_for_all()
        for memory in self.memories[-1:]:
            memory.sync()


def sparse_task(shared: Shared, ops: CompiledOps, samples: int, features: int, entries: int, lr: float) -> Task:
    """Logistic regression without a bias on random sparse rows of `entries` entries.

    The frequencies of the features follow a power law.
    """
    first = shared.world.rank == 0
    columns = values = labels = None
    if first:
        rng = np.random.default_rng(0)
        columns = np.sort(rng.permutation(features)[distinct(samples, entries, features, rng)], axis=1)
        drawn = rng.standard_normal((samples, entries)).astype(np.float32) / np.float32(np.sqrt(entries))
        planted = 3 * rng.standard_normal(features)
        labels = np.where((planted[columns] * drawn).sum(axis=1) > 0, 1, -1)
        columns, values = columns.reshape(-1), drawn.reshape(-1)
    rows = Rows(
        np.arange(samples + 1, dtype=np.int64) * entries,
        shared.put(columns, samples * entries, np.int32),
        shared.put(values, samples * entries, np.float32),
        shared.put(labels, samples, np.float32),
        np.ones(features, np.float32),
    )
    w, how = shared.array(features, np.float32), Descent(lr)

    def step(order: np.ndarray, atomic: bool, lock: Any) -> float:
        if isinstance(lock, Room):
            return ops.sparse_blocks(order, rows, w, None, how, atomic, BLOCK, lock)
        return ops.locked_steps(order, rows, w, None, how, atomic, lock)

    def score() -> tuple[float, float]:
        margins = (rows.values.reshape(samples, entries) * w[rows.columns.reshape(samples, entries)]).sum(axis=1)
        margins = margins * rows.targets
        return float(np.logaddexp(0, -margins).mean()), float((margins > 0).mean())

    return Task(samples, w, step, rows.starts, rows.columns, features, score)


def rating_task(shared: Shared, ops: CompiledOps, samples: int, size: int, units: int, lr: float) -> Task:
    """Completion of a matrix (size / 2, size / 2) of rank `units` from `samples` entries."""
    first, half = shared.world.rank == 0, size // 2
    rng = np.random.default_rng(0)
    tokens = values = begin = None
    if first:
        tokens = np.stack([rng.integers(0, half, samples), half + rng.integers(0, half, samples)], axis=1)
        planted = rng.standard_normal((size, units)) / np.sqrt(np.sqrt(units))
        values = (planted[tokens[:, 0]] * planted[tokens[:, 1]]).sum(axis=1)
        begin = rng.standard_normal((units, size)) / np.sqrt(units)
    pairs = Pairs(
        shared.put(tokens, (samples, 2), np.int32), shared.put(values, samples, np.float32), np.ones(size, np.float32)
    )
    origin, w, how = shared.put(begin, (units, size), np.float32), shared.array((units, size), np.float32), Descent(lr)

    def step(order: np.ndarray, atomic: bool, lock: Any) -> float:
        if lock is not None:
            raise NotImplementedError("only the task of sparse rows supports locks")
        return ops.factor_steps(order, pairs, w, how, atomic)

    def score() -> tuple[float, float]:
        errors = (w[:, pairs.tokens[:, 0]] * w[:, pairs.tokens[:, 1]]).sum(axis=0) - pairs.targets
        mean = float(np.square(errors).mean())
        return mean, mean**0.5

    task = Task(samples, w, step, np.arange(samples + 1, dtype=np.int64) * 2, pairs.tokens.reshape(-1), size, score)
    task.w[...] = origin
    return task


class Meter:
    """Updates the weights of a task in several ways, and times the updates."""

    def __init__(self, shared: Shared, ops: CompiledOps, task: Task):
        self.shared, self.ops, self.task = shared, ops, task
        self.control, self.rank, self.size = shared.control, shared.control.rank, shared.control.size
        self.rooms = {kind: shared.array(LINE * -(-lock_bytes() // LINE) + LINE, np.uint8) for kind in LOCKS}
        if self.rank == 0:
            for kind in ("ticket", "mutex"):
                make_lock(kind, self.rooms[kind])
        self.lock = MpiLock(shared.world)
        self.room = Room.of(task.features, np.dtype(np.float32))
        self.seen = np.full(task.features, -1, np.int32)
        self.components: list[int] = []
        shared.barrier()

    def make(self, way: str, order: np.ndarray) -> None:
        """Make the updates of the samples `order` on this rank, in any way but cyclades, see `deal`."""
        if way in ("raw", "atomic"):
            self.task.step(order, way == "atomic", None)
        elif way == "blocks":
            self.task.step(order, False, self.room)
        elif way == "mpi":
            for k in range(len(order)):
                self.lock.acquire()
                self.task.step(order[k : k + 1], False, None)
                self.lock.release()
        elif way != "cyclades":
            self.task.step(order, False, (way, self.rooms[way]))

    def deal(self, order: np.ndarray, workers: int) -> None:
        """Make the updates of `order` by cyclades: minibatches whose components are assigned to the workers."""
        for at in range(0, len(order), MINIBATCH):
            some = order[at : at + MINIBATCH]
            owner, count, _ = self.ops.deal_components(some, self.task.starts, self.task.columns, workers, self.seen)
            self.components.append(count)
            self.task.step(some[owner == self.rank], False, None)
            if workers > 1:
                self.shared.barrier()

    def rate(self, way: str, workers: int, order: np.ndarray) -> float:
        """Updates a second of the first `workers` ranks, which share the samples `order` equally; collective."""
        if way == "mpi":
            order = order[::SLOWER]
        self.shared.barrier()
        begun = time.perf_counter()
        if self.rank < workers:
            if way == "cyclades":
                self.deal(order, workers)
            else:
                self.make(way, np.ascontiguousarray(order[self.rank :: workers]))
        # Processes of one host have the same clock.
        everyone = self.control.rows(np.array([begun, time.perf_counter()]))
        return len(order) / float(everyone[:workers, 1].max() - everyone[:workers, 0].min())

    def lost_shares(self, order: np.ndarray) -> dict[str, float]:
        """The shares of increments that plain stores lose: on counters for the rows' columns, and on 16 counters."""
        losses = {}
        ones = Rows(self.task.starts, self.task.columns, *[np.empty(0, np.float32)] * 3)
        few = Rows(np.array([0, 16]), np.arange(16, dtype=np.int32), *[np.empty(0, np.float32)] * 3)
        for name, rows, own in (
            ("of rows", ones, np.ascontiguousarray(order[self.rank :: self.size])),
            ("of 16 numbers", few, np.zeros(len(order) // self.size, np.int64)),
        ):
            counts = self.shared.array(self.task.features if name == "of rows" else 16, np.int64)
            self.shared.barrier()
            self.ops.count_rows(own, rows, counts, False)
            self.shared.barrier()
            made = np.array([int(np.diff(rows.starts)[own].sum())])
            everyone = self.control.rows(made)
            losses[name] = 1 - float(counts.sum()) / int(everyone.sum())
        return losses

    def train(self, way: str, workers: int, epochs: int, begin: np.ndarray) -> tuple[float, float]:
        """The scores after `epochs` epochs that start from the weights `begin`; collective."""
        if self.rank == 0:
            self.task.w[...] = begin
        self.shared.barrier()
        for epoch in range(epochs):
            order = np.random.default_rng(epoch).permutation(self.task.samples)
            if way == "cyclades" and self.rank < workers:
                self.deal(order, workers)
            elif self.rank < workers:
                self.make(way, np.ascontiguousarray(order[self.rank :: workers]))
            self.shared.barrier()
        return self.task.score()


def measure(world: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Measure all figures of the task in `options`; collective."""
    ops, shared = CompiledOps(), Shared(world)
    make = {"sparse": sparse_task, "ratings": rating_task}[options["task"]]
    task = make(shared, ops, options["samples"], options["features"], options["entries"], options["lr"])
    begin = task.w.copy()
    shared.barrier()
    meter = Meter(shared, ops, task)
    ways = [way for way in WAYS if options["task"] == "sparse" or way in ("raw", "atomic", "cyclades")]
    rng = np.random.default_rng(1)
    order = np.concatenate([rng.permutation(task.samples) for _ in range(-(-options["updates"] // task.samples))])
    numbers = list(dict.fromkeys((1, world.size)))
    rates: dict[str, list[float]] = {f"{way} {workers}": [] for way in ways for workers in numbers}
    for number in range(options["rounds"] + 1):
        for name, measured in rates.items():
            way, workers = name.split()
            rate = meter.rate(way, int(workers), order[: options["updates"]])
            # Discard the first round, which touches all memory for the first time.
            if number:
                measured.append(rate)
    scores = {
        f"{way} {workers}": meter.train(way, workers, options["epochs"], begin)
        for way in ways
        for workers in numbers
        if way not in LOCKS and options["epochs"]
    }
    figures = {
        "rates": rates,
        "scores": scores,
        "components": float(np.mean(meter.components or [0])),
        "ranks": world.size,
    }
    if world.size > 1 and options["task"] == "sparse":
        figures["lost"] = meter.lost_shares(order)
    shared.barrier()
    meter.lock.free()
    return figures


if __name__ == "__main__":
    ranks = start()
    figures = measure(ranks, json.loads(sys.argv[1]))
    if ranks.rank == 0:
        print(json.dumps(figures))
