"""Settings of the method `hogwild`, and its checks of a configuration, which use neither MPI nor arrays of weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from psmpi.config import Config, Least
from psmpi.data import Dataset
from psmpi.errors import UserError, counted, unused_option
from psmpi.methods.hogwild.elements import check_elements
from psmpi.nn.network import Network
from psmpi.optim import find_optimizer
from psmpi.optim.decay import Coupled
from psmpi.optim.first_order import FirstOrder
from psmpi.training.checks import check_first_order, check_not_partitioned
from psmpi.training.context import check_optimizer, configured_loss

# --staleness auto with MPI windows or a server: most minibatches that a worker may be ahead of the slowest one.
USUAL_STALENESS = 4
# Kinds of updates in memory that ranks share.
SHARED = ("raw", "atomic", "cyclades")


@dataclass(frozen=True)
class Settings:
    """Asynchronous updates of shared weights (hogwild)."""

    table: ClassVar[str] = "hogwild"
    results: ClassVar[bool] = True

    updates: Literal["auto", "raw", "atomic", "accumulate", "server", "cyclades"] = "auto"
    """Updates of the weights.

    auto: on one host raw for sparse samples and atomic for others; on several hosts accumulate, or server where MPI's
        windows fail
    raw: plain stores to shared memory of a host; a few get lost
    atomic: atomic additions to shared memory of a host
    accumulate: additions to MPI windows, on any hosts
    server: messages to rank 0, which only adds them
    cyclades: raw, with samples that share no weights; equals the updates of one rank in turn
    """
    staleness: str = "auto"
    """Minibatches that a rank may be ahead of the slowest rank: a number, or a word below. 0 makes all ranks wait for
    each other.

    auto: none on one host, 4 on several
    none: any number
    """
    hand_out: Literal["turns", "tickets"] = "turns"
    """Order in which ranks take minibatches.

    turns: ranks in turn
    tickets: first come, first served, by a counter in a window
    """
    update_samples: Annotated[int, Least(0)] = 0
    """Samples of an update. 0: the whole minibatch, but 1 for sparse samples of a linear model in shared memory.
    Several of these samples are stepped on a copy of their weights, which separates the caches of processors."""
    elements: bool = False
    """Update once for each element of the loss, a pair of classes. In partially-separable networks an update then reads
    and changes the weights of two classes only."""
    flush_every: Annotated[int, Least(1)] = 1
    """Minibatches after which a rank waits for the completion of its additions to MPI windows."""

    @property
    def bound(self) -> int | None:
        """The number of `staleness`, None for none and auto. Raise UserError for anything else."""
        if self.staleness in ("auto", "none"):
            return None
        if not (self.staleness.isascii() and self.staleness.isdigit()) or len(self.staleness) > 9:
            raise UserError(f"--staleness {self.staleness}: expected auto, none, or a whole number from 0 up")
        return int(self.staleness)


def check_hogwild(size: int, network: Network, dataset: Dataset, config: Config) -> None:
    """See `Method.check`."""
    s, o = config.of(Settings), config.optimization
    check_not_partitioned(config)
    check_first_order(config, "has line searches and curvature pairs, and other ranks change the weights meanwhile")
    kind = find_optimizer(o.optimizer)
    if kind.needs_matrices:
        raise UserError(f"--optimizer {o.optimizer} steps whole matrices at once: use sgd, momentum or adam")
    if o.weight_decay and issubclass(kind, FirstOrder) and kind.decay is not Coupled:
        raise UserError(
            f"--weight-decay with --optimizer {o.optimizer} multiplies weights, and updates of shared weights are "
            "added: use --optimizer sgd, momentum or adam, whose decay is part of the gradient"
        )
    configured_loss(config, dataset)
    check_optimizer(config, network.layout(), ())
    if network.layout().size < size:
        raise UserError(
            f"--model {network.name} has {counted(network.layout().size, 'weight')} for {counted(size, 'rank')}, and "
            "each rank holds a part: use fewer ranks"
        )
    if s.hand_out == "tickets":
        if s.updates in ("server", "cyclades"):
            raise UserError(f"--hand-out tickets is not for --updates {s.updates}: use --hand-out turns")
        if s.bound is not None:
            raise UserError(
                f"--staleness {s.staleness} counts turns, and with --hand-out tickets there are none: use --hand-out "
                "turns, or --staleness none"
            )
    if s.bound is not None and s.updates == "cyclades":
        raise UserError("--staleness is not for --updates cyclades, which ends each minibatch together: leave it out")
    if s.flush_every != Settings().flush_every and s.updates not in ("auto", "accumulate"):
        raise unused_option("--flush-every", "--updates", ("accumulate",), s.updates)
    if s.update_samples > config.data.batch_size:
        raise UserError(
            f"--update-samples {s.update_samples} with {counted(config.data.batch_size, 'sample')} a minibatch: an "
            "update cannot have more samples than a minibatch; use a larger --batch-size"
        )
    if s.elements:
        check_elements(network, dataset, config)
        if s.update_samples or s.updates == "cyclades":
            raise UserError(
                "--elements makes updates of pairs of classes, each over a minibatch: leave --update-samples and "
                "--updates cyclades out"
            )
    if network.normalized and s.update_samples == 1:
        raise UserError(
            "--update-samples 1: batch normalization makes the outputs of one sample 0; use 2 or more, or 0"
        )


def hogwild_warnings(size: int, network: Network, config: Config) -> Iterator[str]:
    """See `Method.warnings`."""
    steps = config.data.batch_size
    if network.normalized and config.of(Settings).update_samples:
        yield (
            "batch normalization takes the statistics of the samples of an update, "
            f"{config.of(Settings).update_samples} of the {steps} of a minibatch"
        )
