"""Settings of the method `spann`, and what it cannot train; made without MPI and arrays of weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from psmpi.config import Config
from psmpi.data import Dataset
from psmpi.errors import UserError
from psmpi.methods.spann.plan import Plan, make_plan
from psmpi.nn.network import Network
from psmpi.optim import find_optimizer
from psmpi.training.checks import check_first_order, check_not_partitioned
from psmpi.training.context import check_optimizer, configured_loss


@dataclass(frozen=True)
class Settings:
    """Spatial domains, or parts of a sparse network, on ranks (spann)."""

    table: ClassVar[str] = "spann"
    results: ClassVar[bool] = False

    scores: Literal["reduced", "distributed"] = "reduced"
    """How the layer of scores is cut. reduced: by its inputs, and every rank has the sums of all scores; distributed:
    by scores, for very many classes, and every rank gathers all of its inputs."""
    in_place: bool = False
    """Step the weights of a layer as soon as its gradient is there, which then lasts no longer: ranks hold no gradient
    of all weights. Needs --clip 0, as the norm of the gradient is never known."""


def plan_of(size: int, network: Network, config: Config) -> Plan:
    """The network on so many ranks; UserError for one that cannot be."""
    return make_plan(network, size, config.of(Settings).scores == "distributed")


def check_spann(size: int, network: Network, dataset: Dataset, config: Config) -> None:
    """See `Method.check`."""
    check_not_partitioned(config)
    plan_of(size, network, config)
    check_first_order(config, "sums over all weights as one vector, which no rank has")
    if find_optimizer(config.optimization.optimizer).needs_matrices:
        raise UserError(
            f"--optimizer {config.optimization.optimizer} steps whole matrices, which ranks have parts of here: use "
            "--optimizer adamw"
        )
    if config.of(Settings).in_place:
        if config.optimization.clip:
            raise UserError(
                f"--in-place steps layers before the norm of the whole gradient is known, which --clip "
                f"{config.optimization.clip:g} bounds: add --clip 0"
            )
        if config.run.on_nan == "skip":
            raise UserError(
                "--in-place has stepped layers before others turn out not to be finite: use --on-nan stop, or rollback"
            )
    configured_loss(config, dataset)
    check_optimizer(config, network.layout(), ())
