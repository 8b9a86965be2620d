"""The rehearsal of a method's steps on one rank: its program and its memory."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.cost.alone import Alone, Notebook
from psmpi.cost.program import Program
from psmpi.data import Batch, Dataset, Minibatches, Split

if TYPE_CHECKING:
    from psmpi.config import Config
    from psmpi.nn.network import Network
    from psmpi.training.method import Place

# Number of steps before the recorded ones.
WARM = 3


@dataclass(frozen=True, eq=False)
class Blank:
    """A source of samples that are zeros and never looked at."""

    n: int
    dtype: np.dtype[Any]
    card = None

    def read_into(self, rows: Any, where: Any, out: np.ndarray) -> None:
        """Do not write to a large `out`: memory that was never written reads as zeros, and is not allocated."""
        if out.dtype.kind == "f" or out.nbytes < 1 << 20:
            out[where] = 0

    def pieces(self, rows: Any, features: int) -> Iterator[tuple[int, np.ndarray]]:
        step = max(1, (1 << 20) // features)
        for i in range(0, len(rows), step):
            yield i, np.zeros((min(step, len(rows) - i), features), self.dtype)

    def glance(self, count: int) -> np.ndarray:
        return np.zeros((0, 1), self.dtype)

    def taken(self, rows: Any) -> None:
        return None

    def place(self, row: int) -> str:
        return f"sample {row}"


def blank(dataset: Dataset) -> Dataset:
    """The data set with its targets, and zeros in place of its samples.

    Sparse samples stay: they are in memory anyway, and their size depends on their values.
    """

    def emptied(split: Split) -> Split:
        if split.compressed is not None:
            return split
        return replace(split, source=Blank(split.source.n, split.dtype), index=None)

    return replace(dataset, train=emptied(dataset.train), test=emptied(dataset.test))


@dataclass(frozen=True)
class Rehearsal:
    """A rank's program, its line of the table of ranks, and its memory in bytes by purpose.

    sent: bytes a step, as the method's counter counts them; period: of the method.
    """

    rank: int
    program: Program
    place: Place
    memory: dict[str, int]
    sent: float
    period: int


def rehearse(
    kind: Any,
    rank: int,
    of_host: Sequence[int],
    network: Network,
    dataset: Dataset,
    config: Config,
    ops: NumpyOps,
    steps: int,
) -> Rehearsal:
    """Rehearse the steps of a rank with the method `kind` (a class), on len(of_host) ranks.

    dataset: best a `blank` one; steps: the least number of steps, rounded up to whole periods. Work between epochs is
    left out.
    """
    from psmpi.training.context import Context

    book = Notebook()
    world = Alone(book, "world", range(len(of_host)), rank, of_host)
    method = kind(Context(world, network, dataset, config, ops))
    steps = method.period * max(2, -(-steps // method.period))
    batches = Minibatches(dataset.train.n, config.data.batch_size, config.run.seed, config.data.shuffle)
    whole = dataset.train.n // config.data.batch_size or 1
    lr, sent = float(config.optimization.lr), 0.0

    warm = WARM + method.lead
    for number in range(warm + steps):
        # The last minibatch of an epoch may be smaller.
        batch = Batch(batches.ids(*divmod(number, whole)))
        if number == warm:
            book.clear()
            sent = method.counter.sent
        book.since = time.perf_counter()
        method.step(batch, lr)
        if number >= warm:
            book.end_step()
    sent = (method.counter.sent - sent) / steps
    return Rehearsal(rank, book.program, method.place(), method.memory(), sent, method.period)
