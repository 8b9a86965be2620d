"""The base class of methods: the calls of the training loop."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from psmpi.comm.group import Counter
from psmpi.config import Config
from psmpi.data import Batch, Dataset
from psmpi.errors import UserError
from psmpi.layout import Layout, Ownership, TableRows
from psmpi.nn.losses import Loss, make_loss
from psmpi.nn.metric import Metric
from psmpi.nn.network import Network
from psmpi.optim import FIRST_ORDER


@dataclass(frozen=True)
class Place:
    """One rank's work, for the placement table; parameters and bytes are counts."""

    role: str
    classes: str
    held: int
    owned: int
    nbytes: int
    device: str = ""


def configured_loss(config: Config, task: str) -> Loss:
    """The loss of a configuration for a data set's task; UserError for settings that it cannot have."""
    c = config.objective
    return make_loss(c.loss, np.dtype(config.model.dtype), kappa=c.kappa, exp_clip=c.exp_clip, task=task)


def check_classes(dataset: Dataset, what: str, fix: str) -> None:
    """UserError for a regression, which `what` cannot learn."""
    if dataset.task != "classes":
        raise UserError(f"{what} is for classes, and {dataset.name} has values to learn: {fix}")


def make_metric(config: Config, dataset: Dataset) -> Metric:
    """Tests on the test split, by a loss of its own: what that counts is not of the training."""
    return Metric(configured_loss(config, dataset.task), dataset.outputs)


def check_slices(network: Network, batch: int, slices: int, of: str) -> None:
    """UserError for minibatches that do not give each of so many ranks, or whatever they are `of`, samples enough."""
    least = 2 if network.normalized else 1
    if batch < least * slices:
        lacks = "with a single sample, which batch normalization makes 0" if batch >= slices else "without a sample"
        raise UserError(
            f"--batch-size {batch} leaves some of {slices} {of} {lacks}: use --batch-size {least * slices} or more, or "
            "fewer ranks"
        )


def check_first_order(config: Config, why: str) -> None:
    """UserError for an optimizer that is more than one of first order, which cannot be used because it ... (why)."""
    if config.optimization.optimizer not in FIRST_ORDER:
        raise UserError(
            f"--optimizer {config.optimization.optimizer} {why}: with --method {config.parallel.method} use a "
            "first-order one (sgd, momentum, adam, ...)"
        )


def check_layers(network: Network, config: Config, parts: int = 2) -> None:
    """UserError where a network's layers cannot be dealt to ranks, or cut into `parts`."""
    method = config.parallel.method
    if network.residual and parts > 1:
        raise UserError(
            f"--model {network.name} has residual blocks, and --method {method} takes single layers apart: use a "
            "network without them, or another method"
        )
    layout = network.layout()
    if layout.dead.size:
        raise UserError(
            f"--model {network.name} has units that no score depends on, and --method {method} would train them for "
            "nothing: use a network without such units"
        )


class Method(Protocol):
    """A training method on one rank. All ranks make the same calls in the same order.

    layout and shards (every rank's) say where the weights lie; `vectors` are this rank's shard of the weights and of
    the optimizer's state by name, in host memory, as `collect` finds them and `resumed` takes them up; `tables` its
    rows of what belongs to no weight, such as an element's curvature (`rows`: every rank's, and whether they mean
    anything on another number of ranks), `scalars` the rest of its state; of these "steps", where a method has it, is
    the number of steps of the run.
    """

    layout: Layout
    shards: Ownership
    counter: Counter
    vectors: dict[str, np.ndarray]
    scalars: dict[str, float | int]
    tables: dict[str, np.ndarray]
    rows: TableRows
    # What is said where a checkpoint does not hold these tables: "the checkpoint does not hold ...".
    lost: str
    # Names of vectors and scalars that are the method's own and not the optimizer's.
    extras: frozenset[str]
    # This rank's share of the sum of the minibatch losses times their sizes; the shares of all ranks add up to it.
    loss_sum: float

    @staticmethod
    def warnings(size: int, network: Network, config: Config) -> Iterable[str]:
        """Notes for the user on this method on `size` ranks with this network."""

    def step(self, batch: Batch, lr: float) -> None:
        """One optimizer step on training samples, of which the batch has the ids."""

    def collect(self) -> None:
        """Bring `vectors` up to date."""

    def resumed(self, tables: bool, fresh: Set[str]) -> None:
        """Take up vectors, scalars and, where the checkpoint had them, tables that were restored from it.

        fresh: names of vectors that were not.
        """

    def test(self) -> dict[str, float]:
        """The loss and the scores on the test split by name, see `Metric`; the same on all ranks."""

    def diagnostics(self) -> dict[str, Any]:
        """Further measurements after an epoch, for the metrics, the same on all ranks; all ranks call it."""

    def place(self) -> Place:
        """This rank's work."""

    def memory(self) -> dict[str, int]:
        """Bytes that this rank holds, by what for."""

    def events(self) -> dict[str, int]:
        """Counts of unusual events on this rank since the start, by name."""
