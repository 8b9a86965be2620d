"""The base class of training methods: what the training loop calls, and what a method declares."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from psmpi.comm.transfers import Message
from psmpi.config import Config
from psmpi.data import Batch, Dataset
from psmpi.layout import Ownership
from psmpi.nn.network import Network
from psmpi.training.context import Context
from psmpi.training.need import Need
from psmpi.training.state import State


@dataclass(frozen=True)
class Place:
    """One rank's work, for the placement table; parameters and bytes are counts."""

    role: str
    classes: str
    held: int
    owned: int
    nbytes: int
    device: str = ""


@dataclass(frozen=True)
class Exactness:
    """How far the weights of a training are the same on other numbers of ranks, and when it is resumed.

    exact: to the bit; rounding: but for the order of sums; statistical: the accuracy of a task is, within `tolerance`.
    options: of the command line, for that task; wide: those of a network whose weights are a good part of what ranks
    hold. every: the steps after which a run may be stopped and be resumed so.
    """

    ranks: Literal["exact", "rounding", "statistical"] = "rounding"
    resume: Literal["exact", "rounding", "statistical"] = "exact"
    tolerance: float = 0.0
    options: tuple[str, ...] = ()
    wide: tuple[str, ...] = ("--model", "mlp", "--widths", "300", "300", "300")
    every: int = 1


class Method:
    """A training method on one rank. All ranks make the same calls in the same order.

    A constructor declares vectors, tables and scalars to `state`, which is saved and restored; the weights are its
    vector "weights". loss_sum: this rank's share of the sum of the minibatch losses times their sizes, of the epoch so
    far; the shares of all ranks add up to it.
    """

    # The method's name on the command line, and a phrase that follows it in the help.
    name: ClassVar[str]
    summary: ClassVar[str]
    # The classes of its settings, see `psmpi.config.Settings`.
    settings: ClassVar[tuple[type[Any], ...]] = ()
    # Options of psmpi.train that go before those given, where these say nothing of the network.
    usual_options: ClassVar[tuple[str, ...]] = ()
    # Whether messages may go by NCCL.
    nccl: ClassVar[bool] = False
    # Whether partitioned quasi-Newton optimizers step here.
    partitioned: ClassVar[bool] = False
    # Whether `step` asks `Numbers.sound` before it changes anything, so that --on-nan skip can leave a step out.
    skips: ClassVar[bool] = False
    # Whether losses can remember samples here.
    remembers: ClassVar[bool] = False
    # Whether the derivatives of all its losses are multiplied by the weights of classes.
    weighs_classes: ClassVar[bool] = False
    # Whether samples may be sequences: "" no, "labels" with a target each, "steps" also with one at each step.
    sequences: ClassVar[Literal["", "labels", "steps"]] = ""
    # Seconds within which ranks hear that one of them is asked to stop; none waits for one that is less behind.
    poll_seconds: ClassVar[float] = 0.2
    exactness: ClassVar[Exactness] = Exactness()

    def __init__(self, context: Context, shards: Ownership):
        self.context, self.network, self.layout = context, context.network, context.layout
        self.dataset, self.ops, self.dtype, self.rank = context.dataset, context.ops, context.dtype, context.rank
        self.counter, self.shards = context.counter, shards
        self.state, self.numbers = State(context.ops, shards, context.rank), context.numbers
        self.account = self.state.account
        self.loss_sum = 0.0

    @property
    def scalars(self) -> dict[str, float | int]:
        return self.state.scalars

    @classmethod
    def check(cls, size: int, network: Network, dataset: Dataset, config: Config) -> None:
        """UserError for a configuration that `size` ranks cannot train; needs no MPI and no arrays of weights."""

    @classmethod
    def needed(cls, size: int, network: Network, dataset: Dataset, config: Config) -> Sequence[Need]:
        """The bytes that each of `size` ranks needs at least by what for, in host memory; none where that is not known.

        As `check`, it needs no MPI and no arrays of weights. A start is refused where it is more than there is.
        """
        return ()

    @classmethod
    def private(cls, config: Config) -> bool:
        """Whether each rank has a data set of its own, that no other rank reads."""
        return False

    @classmethod
    def uses(cls, config: Config) -> frozenset[str]:
        """Settings of optimizers that the method itself uses, whatever the optimizer."""
        return frozenset()

    @classmethod
    def arrangements(cls, config: Config) -> Iterable[tuple[str, Config]]:
        """Other ways of this method to train the same as `config` says: their options, and the configurations."""
        return ()

    @staticmethod
    def notes(size: int, network: Network, config: Config) -> Iterable[str]:
        """What the user should know of what the method has chosen itself."""
        return ()

    @staticmethod
    def warnings(size: int, network: Network, config: Config) -> Iterable[str]:
        """Warnings for the user of this method on `size` ranks with this network."""
        return ()

    def told(self) -> Iterable[str]:
        """Notes and warnings of what this rank has found when it was made; those of rank 0 are told."""
        return ()

    def close(self) -> None:
        """Free what only all ranks together can, when all is done. All ranks call it."""

    def run_epoch(self, steps: Iterable[tuple[Batch, float]]) -> None:
        """Train on the minibatches of an epoch, each with its learning rate; whoever takes one has done those before.

        Between two of them the loop may save.
        """
        for batch, lr in steps:
            self.step(batch, lr)

    def step(self, batch: Batch, lr: float) -> None:
        """One optimizer step on training samples, of which the batch has the ids."""
        raise NotImplementedError

    def drain(self) -> None:
        """Bring the state to where it can be saved: nothing is on its way. All ranks call it together."""

    def collect(self) -> None:
        """Bring the state up to date in host memory, where it is saved from. All ranks call it together."""
        self.drain()
        self.state.collect()

    def restored(self, tables: bool, fresh: Set[str]) -> None:
        """Go on from a restored state. tables: whether these were in the checkpoint; fresh: vectors that were not."""

    def test(self) -> dict[str, float]:
        """The loss and the scores on the test split by name, see `Metric`; the same on all ranks."""
        raise NotImplementedError

    def diagnostics(self) -> dict[str, Any]:
        """Further measurements after an epoch, for the metrics, the same on all ranks; all ranks call it."""
        return {}

    def work(self) -> tuple[str, str, int]:
        """This rank's work: its role, of which classes or layers, and how many parameters it computes with."""
        raise NotImplementedError

    def place(self) -> Place:
        """This rank's line of the placement table."""
        role, classes, held = self.work()
        owned = self.shards[self.rank].size
        return Place(role, classes, held, owned, sum(self.memory().values()), self.ops.place)

    def memory(self) -> dict[str, int]:
        """Bytes that this rank holds, by what for: the state's, and what else the method has put to `account`."""
        return self.account.bytes()

    def messages(self, step: int, batch: int) -> list[Message] | None:
        """The messages of step number `step`, from 0, on `batch` samples: those of this rank, and others it knows.

        None where their number depends on the run, as that of a line search does.
        """
        raise NotImplementedError

    @property
    def period(self) -> int:
        """Steps after which messages repeat, the steps between epochs left out."""
        return 1

    @property
    def lead(self) -> int:
        """Steps after which those that follow do all that a step does."""
        return 0

    def events(self) -> dict[str, int]:
        """Counts of unusual events on this rank since the start, by name. All ranks call it."""
        return {}
