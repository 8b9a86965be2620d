"""Settings of the method `hogwild`, and its checks of a configuration, which use neither MPI nor arrays of weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from psmpi.config import Config, Least
from psmpi.data import Dataset
from psmpi.errors import UserError, counted
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
    """Updates of shared weights that nobody waits for (hogwild)."""

    table: ClassVar[str] = "hogwild"
    results: ClassVar[bool] = True

    updates: Literal["auto", "raw", "atomic", "accumulate", "server", "cyclades"] = "auto"
    """How ranks add to the weights. raw: plain stores to memory that the ranks of a host share, of which a few get
    lost; atomic: additions there; accumulate: additions to MPI windows, on any hosts; server: messages to rank 0, which
    only adds; cyclades: raw, of samples that have no weights in common, as one rank would one after the other. auto: on
    one host raw for sparse samples and else atomic, on several accumulate, or server where MPI's windows fail."""
    staleness: str = "auto"
    """Minibatches that a rank may begin ahead of the slowest one: none, for any number, or a number; 0: all wait for
    each other. auto: none on one host, else 4."""
    hand_out: Literal["turns", "tickets"] = "turns"
    """Who takes a minibatch: the ranks in turn, or whoever comes first (by a counter in a window)."""
    update_samples: Annotated[int, Least(0)] = 0
    """Samples of an update; 0: the whole minibatch, but one of sparse samples of a linear model in shared memory. More
    of these are stepped on a copy of their weights, which keeps caches of processors apart."""
    elements: bool = False
    """Make an update of each element of the loss, a pair of classes: of partially-separable networks it reads and
    changes the weights of two classes alone."""
    flush_every: Annotated[int, Least(1)] = 1
    """Minibatches after which a rank waits until its additions to MPI windows are there."""

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
        raise UserError(f"--flush-every is for --updates accumulate, not for {s.updates}: leave it out")
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
