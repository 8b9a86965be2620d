"""Settings of the method `spann`, and its checks of a configuration, which use neither MPI nor arrays of weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar, Literal

import numpy as np

from psmpi.config import Config
from psmpi.data import Dataset
from psmpi.errors import UserError
from psmpi.layout import check_mode, partition
from psmpi.methods.spann.plan import Plan, chains, make_plan
from psmpi.nn.network import Network
from psmpi.optim import find_optimizer
from psmpi.training.checks import check_first_order, check_not_partitioned
from psmpi.training.context import check_optimizer, configured_loss


@dataclass(frozen=True)
class Settings:
    """Spatial domains, or parts of a sparse network, on ranks (spann)."""

    table: ClassVar[str] = "spann"
    results: ClassVar[bool] = False

    cut: Literal["auto", "slab", "random", "layered", "graph", "hypergraph"] = "auto"
    """Partition of the units of sparse layers. Layers of slabs are cut by their domains.

    auto: layered, or slab if Mt-KaHyPar is not installed (pip install 'psmpi[partition]')
    slab: neighbouring units of each layer
    random: random units of each layer
    layered: least communication, layer by layer (Mt-KaHyPar)
    graph: least communication over the whole network (METIS); layers may be unbalanced
    hypergraph: least communication over the whole network (Mt-KaHyPar); layers may be unbalanced
    """
    scores: Literal["reduced", "distributed"] = "reduced"
    """Partition of the layer of scores.

    reduced: by inputs; all ranks get the sums of all scores
    distributed: by scores, for very many classes; all ranks gather all inputs
    """
    in_place: bool = False
    """Step the weights of a layer as soon as its gradient is complete. Ranks then never hold the gradient of all
    weights. Needs --clip 0, since the norm of the gradient is not known."""


def plan_of(size: int, network: Network, config: Config, owners: Mapping[str, np.ndarray] | None = None) -> Plan:
    """Return the plan of the network on `size` ranks; raise UserError if the network cannot be cut.

    owners: of units of sparse layers, see `partitioned`; without owners, ranks have neighbouring units.
    """
    return make_plan(network, size, config.of(Settings).scores == "distributed", owners)


def mode_of(network: Network, config: Config) -> str:
    """Return how sparse layers are cut, "" without sparse layers."""
    mode = config.of(Settings).cut
    if not chains(network):
        return ""
    if mode == "auto":
        return "layered" if find_spec("mtkahypar") is not None else "slab"
    return mode


def partitioned(size: int, network: Network, config: Config) -> dict[str, np.ndarray]:
    """Return the rank of each unit of sparse layers, (units,) int32 by layer name.

    Raise UserError if the partitioner is not installed.
    """
    mode, owners_of = mode_of(network, config), {}
    for chain in chains(network) if mode and size > 1 else ():
        owners = partition([layer.pattern for layer in chain], size, mode)
        owners_of.update({layer.name: layer_owners for layer, layer_owners in zip(chain, owners, strict=True)})
    return owners_of


def spann_notes(size: int, network: Network, config: Config) -> Iterator[str]:
    """See `Method.notes`."""
    if size > 1 and config.of(Settings).cut == "auto" and mode_of(network, config) == "slab":
        yield (
            "--cut auto takes slab, as Mt-KaHyPar is not installed, whose parts exchange less: pip install "
            "'psmpi[partition]'"
        )


def check_spann(size: int, network: Network, dataset: Dataset, config: Config) -> None:
    """See `Method.check`."""
    check_not_partitioned(config)
    if config.data.augment:
        raise UserError(
            f"--augment {' '.join(config.data.augment)}: with --method spann a rank has parts of the images, which "
            "cannot be moved: leave it out, or use another method"
        )
    plan_of(size, network, config)
    cut, mode = config.of(Settings).cut, mode_of(network, config)
    if cut != "auto" and not mode:
        raise UserError(
            f"--cut {cut} is for sparse layers, and --model {network.name} has none before the scores: leave it out"
        )
    try:
        check_mode(mode or "slab")
    except UserError as error:
        raise UserError(f"--cut {mode}: {error}") from None
    check_first_order(config, "sums over all weights as one vector, which no rank has")
    if find_optimizer(config.optimization.optimizer).needs_matrices:
        raise UserError(
            f"--optimizer {config.optimization.optimizer} steps whole matrices, and --method spann has parts of "
            "them: use --optimizer adamw"
        )
    if config.of(Settings).in_place:
        if config.optimization.clip:
            raise UserError(
                f"--in-place steps layers before the norm of the whole gradient is known, which --clip "
                f"{config.optimization.clip:g} bounds: add --clip 0"
            )
        if config.run.on_nan == "skip":
            raise UserError(
                "--on-nan skip needs all gradients before a step, and --in-place steps layer by layer: use --on-nan "
                "stop, or rollback"
            )
    configured_loss(config, dataset)
    check_optimizer(config, network.layout(), ())
