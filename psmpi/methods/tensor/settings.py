"""Settings of the method `tensor`, and its checks of a configuration, which use neither MPI nor arrays of weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from psmpi.config import Config
from psmpi.data import Dataset
from psmpi.errors import UserError
from psmpi.methods.tensor.cost import cheapest
from psmpi.methods.tensor.grid import read_grid
from psmpi.methods.tensor.plan import Plan, make_plan
from psmpi.nn.network import Network
from psmpi.optim import find_optimizer
from psmpi.training.checks import check_first_order, check_not_partitioned
from psmpi.training.context import check_optimizer, configured_loss


@dataclass(frozen=True)
class Settings:
    """Tensor parallelism (tensor)."""

    table: ClassVar[str] = "tensor"
    results: ClassVar[bool] = True

    grid: str = "auto"
    """Numbers I,J,L of ranks along three axes, or a name below. Samples are split over I, units over J and L or L and J
    in turn.

    auto: the grid of least communication
    1d: one axis; every other activation is whole on all ranks
    1d-sharded: one axis; no activation is whole
    2d: a square of ranks; products by broadcasts
    3d: a cube of ranks
    """
    saved: Literal["shards", "gathered"] = "shards"
    """Tensors that a forward pass keeps for the backward pass.

    shards: the shards of each rank, to be gathered again
    gathered: the gathered tensors, which take more memory
    """
    prefetch: bool = True
    """Gather the next layer's weights or panels, and sum the last layer's, during a product."""


def plan_of(size: int, network: Network, config: Config) -> Plan:
    """Return the plan of the network on the configured grid; raise UserError if the network cannot be cut so."""
    s = config.of(Settings)
    grid = read_grid(s.grid, size)
    if grid is None:
        return cheapest(size, network, config.data.batch_size, s.saved == "gathered")
    if config.data.batch_size < grid.size("i"):
        raise UserError(
            f"--batch-size {config.data.batch_size} is dealt to {grid.size('i')} ranks along the first axis of --grid "
            f"{s.grid}: use --batch-size {grid.size('i')} or more, or --grid auto"
        )
    return make_plan(network, grid)


def check_tensor(size: int, network: Network, dataset: Dataset, config: Config) -> None:
    """See `Method.check`."""
    check_not_partitioned(config)
    if network.layout().dead.size:
        raise UserError(
            f"--model {network.name} has units that no score depends on, and --method tensor would train them for "
            "nothing: use a network without such units"
        )
    rows, batch = plan_of(size, network, config).grid.size("i"), config.data.batch_size
    tests = min((at.stop - at.start for at in network.evaluation_batches(dataset.test.n)), default=rows)
    if network.normalized and tests < rows:
        raise UserError(
            f"batch normalization needs a sample on each of {rows} ranks in tests too, and a test minibatch has "
            f"{tests}: use --grid 1,{size},1"
        )
    if network.normalized and 0 < dataset.train.n % batch < rows:
        raise UserError(
            f"--batch-size {batch} leaves {dataset.train.n % batch} samples for an epoch's last minibatch, and batch "
            f"normalization needs one on each of {rows} ranks: use another --batch-size, or --grid 1,{size},1"
        )
    check_first_order(config, "sums over all weights as one vector, which no rank has")
    if find_optimizer(config.optimization.optimizer).needs_matrices:
        raise UserError(
            f"--optimizer {config.optimization.optimizer} steps whole matrices, and --method tensor has tiles of them: "
            "use --optimizer adamw"
        )
    configured_loss(config, dataset)
    check_optimizer(config, network.layout(), ())


def tensor_notes(size: int, network: Network, config: Config) -> Iterator[str]:
    """See `Method.notes`."""
    if size > 1 and config.of(Settings).grid == "auto":
        i, j, k = plan_of(size, network, config).grid.sizes
        yield f"--grid auto takes {i},{j},{k}: samples are dealt over {i}, units over {j} and {k}, in turn"
