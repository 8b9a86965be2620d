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
    """A method's promise about the weights on other numbers of ranks (`ranks`) and after a resume (`resume`).

    exact: the same bits; rounding: the same up to the order of sums; statistical: the accuracy on a task is the same
    within `tolerance`. The conformance suite trains that task with `options`, and compares memory on a network with the
    options `wide`, whose weights are a good part of a rank's memory. every: steps between two points at which a stop
    and a resume keep the promise.
    """

    ranks: Literal["exact", "rounding", "statistical"] = "rounding"
    resume: Literal["exact", "rounding", "statistical"] = "exact"
    tolerance: float = 0.0
    options: tuple[str, ...] = ()
    wide: tuple[str, ...] = ("--model", "mlp", "--widths", "300", "300", "300")
    every: int = 1


class Method:
    """A training method on one rank. All ranks make the same calls in the same order.

    A constructor declares vectors, tables and scalars to `state`, which checkpoints hold; the weights are its vector
    "weights". loss_sum: this rank's share of the sum, over the minibatches of the epoch so far, of loss times size; the
    shares of all ranks add up to that sum.
    """

    # The method's name on the command line, and a phrase that follows it in the help.
    name: ClassVar[str]
    summary: ClassVar[str]
    # The classes of its settings, see `psmpi.config.Settings`.
    settings: ClassVar[tuple[type[Any], ...]] = ()
    # Options that psmpi.train puts before the given ones where no given option names a data set or a network.
    usual_options: ClassVar[tuple[str, ...]] = ()
    # Whether --nccl may send messages of this method.
    nccl: ClassVar[bool] = False
    # Whether partitioned quasi-Newton optimizers can step the weights.
    partitioned: ClassVar[bool] = False
    # Whether `step` asks `Numbers.sound` before it changes anything, so that --on-nan skip can leave a step out.
    skips: ClassVar[bool] = False
    # Whether the method can divide each sample's derivatives by its loss at its last visit.
    remembers: ClassVar[bool] = False
    # Whether --class-weights works: the method multiplies the derivatives of all losses by the weights of classes.
    weighs_classes: ClassVar[bool] = False
    # Sequences that the method trains on: "" none, "labels" those with one target each, "steps" also one at each step.
    sequences: ClassVar[Literal["", "labels", "steps"]] = ""
    # Seconds between two questions whether another rank was asked to stop; ranks that lag by less are not waited for.
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
        """The least host memory of each of `size` ranks, in bytes by purpose; empty where the method cannot say.

        The call needs no MPI and no arrays of weights. A start with more bytes than the hosts have is refused.
        """
        return ()

    @classmethod
    def private(cls, config: Config) -> bool:
        """Whether each rank has a data set of its own, which no other rank reads."""
        return False

    @classmethod
    def uses(cls, config: Config) -> frozenset[str]:
        """Names of optimizer settings that the method itself uses, with any optimizer."""
        return frozenset()

    @classmethod
    def arrangements(cls, config: Config) -> Iterable[tuple[str, Config]]:
        """Other arrangements of the same training, as (options, configuration); `psmpi plan` compares them."""
        return ()

    @staticmethod
    def notes(size: int, network: Network, config: Config) -> Iterable[str]:
        """Notes for the user about choices that the method has made by itself."""
        return ()

    @staticmethod
    def warnings(size: int, network: Network, config: Config) -> Iterable[str]:
        """Warnings for the user of this method on `size` ranks with this network."""
        return ()

    def run_notes(self) -> Iterable[str]:
        """Notes and warnings about this rank after its construction; rank 0 prints its own."""
        return ()

    def close(self) -> None:
        """Free resources that ranks can only free together, at the end of the run. All ranks call it."""

    def run_epoch(self, steps: Iterable[tuple[Batch, float]]) -> None:
        """Train on the minibatches of an epoch, each with its learning rate.

        The steps before a minibatch must be done when the method takes that minibatch from `steps`: the loop may save
        a checkpoint at this point.
        """
        for batch, lr in steps:
            self.step(batch, lr)

    def step(self, batch: Batch, lr: float) -> None:
        """Make one optimizer step. batch: ids of training samples; lr: the learning rate of this step."""
        raise NotImplementedError

    def drain(self) -> None:
        """Finish all messages under way, so that the state can be saved. All ranks call it together."""

    def collect(self) -> None:
        """Copy the state to host memory, from which checkpoints are written. All ranks call it together."""
        self.drain()
        self.state.collect()

    def restored(self, tables: bool, fresh: Set[str]) -> None:
        """Continue from a restored state. tables: whether the checkpoint had them; fresh: vectors that it had not."""

    def test(self) -> dict[str, float]:
        """The loss and the scores on the test split by name, see `Metric`; the same on all ranks."""
        raise NotImplementedError

    def diagnostics(self) -> dict[str, Any]:
        """Further entries of an epoch's row of metrics, the same on all ranks. All ranks call it."""
        return {}

    def work(self) -> tuple[str, str, int]:
        """This rank's role, its classes or layers, and the number of parameters that it computes with."""
        raise NotImplementedError

    def place(self) -> Place:
        """This rank's line of the placement table."""
        role, classes, held = self.work()
        owned = self.shards[self.rank].size
        return Place(role, classes, held, owned, sum(self.memory().values()), self.ops.place)

    def memory(self) -> dict[str, int]:
        """Bytes that this rank holds, by purpose: those of the state, and others that the method put to `account`."""
        return self.account.bytes()

    def messages(self, step: int, batch: int) -> list[Message] | None:
        """Messages of step number `step` (from 0) on `batch` samples, as far as this rank knows them.

        None where their number depends on the run, as with a line search.
        """
        raise NotImplementedError

    @property
    def period(self) -> int:
        """Number of steps after which the messages repeat, apart from messages between epochs."""
        return 1

    @property
    def lead(self) -> int:
        """Number of first steps that do less than a usual step, as with a pipeline that fills."""
        return 0

    def events(self) -> dict[str, int]:
        """Counts of unusual events on this rank since the start, by name. All ranks call it."""
        return {}
