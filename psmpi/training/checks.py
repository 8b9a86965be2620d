"""Checks of configurations that several methods make, without MPI and arrays of weights."""

from __future__ import annotations

from psmpi.config import Config
from psmpi.data import Dataset
from psmpi.errors import UserError
from psmpi.nn.network import Network
from psmpi.optim import FIRST_ORDER
from psmpi.optim.curvature import RULES
from psmpi.registry import WHOLE, all_methods


def check_classes(dataset: Dataset, what: str, fix: str) -> None:
    """UserError for a regression, which `what` cannot learn."""
    if dataset.task != "classes":
        raise UserError(f"{what} is for classes, and {dataset.name} has values to learn: {fix}")


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


def check_not_partitioned(config: Config) -> None:
    """UserError for an optimizer whose curvature is that of elements."""
    if config.optimization.optimizer in RULES:
        others = " and ".join(name for name, method in all_methods().items() if method.partitioned)
        raise UserError(f"--optimizer {config.optimization.optimizer} is of --method {others}: choose another one")


def check_layers(network: Network, config: Config, parts: int = 2) -> None:
    """UserError where a network's layers cannot be dealt to ranks, or cut into `parts`."""
    method = config.parallel.method
    if network.residual and parts > 1:
        raise UserError(
            f"--model {network.name} has residual blocks, and --method {method} takes single layers apart: use "
            f"--model mlp or another network without them, or --method {WHOLE}"
        )
    layout = network.layout()
    if layout.dead.size:
        raise UserError(
            f"--model {network.name} has units that no score depends on, and --method {method} would train them for "
            "nothing: use a network without such units"
        )


def slices_are_normalized(of: str) -> str:
    """The warning that statistics are those of each rank's own slice, and so depend on the number of ranks `of` ..."""
    return (
        "batch normalization takes the statistics of each rank's own slice of a minibatch: the result depends on the "
        f"number of ranks{of}"
    )
