"""Settings of the method `layer_parallel`, and its checks of a configuration; neither uses MPI or arrays of weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from typing import Annotated, ClassVar, Literal

from psmpi.config import Config, Least
from psmpi.data import Dataset
from psmpi.errors import UserError, counted
from psmpi.methods.layer_parallel.cycle import exact_cycles
from psmpi.methods.layer_parallel.plan import Plan, inside, make_plan, residual_run
from psmpi.nn.layers.chain import leaves
from psmpi.nn.layers.residual import Residual
from psmpi.nn.network import Network
from psmpi.optim import is_first_order
from psmpi.training.checks import check_not_partitioned, check_slices
from psmpi.training.context import check_optimizer, configured_loss


@dataclass(frozen=True)
class Settings:
    """Layer-parallel training (layer_parallel)."""

    table: ClassVar[str] = "layer_parallel"
    results: ClassVar[bool] = True

    levels: Annotated[int, Least(1)] = 2
    """Levels of the multigrid in layer time. 1 gives exact passes, one rank after the other."""
    coarsening: Annotated[int, Least(2)] = 4
    """Layers of a level for each layer of the next level. Its power (levels - 1) divides the layers of a rank."""
    relaxations: Annotated[int, Least(0)] = 1
    """C-relaxations of a cycle, each followed by an F-relaxation. 0 is F-relaxation alone, 1 is FCF."""
    forward_cycles: Annotated[int, Least(1)] = 2
    """Cycles of a forward pass."""
    adjoint_cycles: Annotated[int, Least(1)] = 1
    """Cycles of an adjoint pass."""
    warm_start: Literal["auto", "none", "states", "both"] = "auto"
    """Initial values of the passes.

    auto: states where a minibatch is all samples, else none
    none: copies of the first state
    states: forward passes start from the values of the last step
    both: adjoint passes too
    """
    serial_ends: Annotated[int, Least(0)] = 0
    """Residual layers at each end that the first and the last rank compute one after the other; 0: none."""
    layer_replicas: Annotated[int, Least(1)] = 1
    """Rows of ranks, each with all layers and a slice of each minibatch. Must divide the ranks."""
    gamma_tik: float = 0.0
    """Factor of a penalty in the loss: half the squared weights of the residual layers."""
    gamma_ddt: float = 0.0
    """Factor of a penalty in the loss: half the squared change of these weights from layer to layer, over the step
    size."""
    adapt_every: Annotated[int, Least(0)] = 0
    """Steps between two comparisons of the gradient with that of one more cycle. 0: never."""
    adapt_bound: float = 0.05
    """Relative difference above which passes take one more cycle from then on, up to exact passes."""
    nested_depths: tuple[int, ...] = ()
    """Depths of nested iteration, from few layers to many, each a divisor of the next. A shallow network is trained
    first, with a larger step between its layers. Its weights then start the layers between."""
    nested_epochs: tuple[int, ...] = ()
    """Epochs of each of --nested-depths. The rest of --epochs trains all layers."""

    @property
    def factors(self) -> tuple[int, ...]:
        return (self.coarsening,) * (self.levels - 1)

    @property
    def span(self) -> int:
        """The number of layers of the finest level that are one step of the coarsest."""
        spans: int = self.coarsening ** (self.levels - 1)
        return spans

    def stride(self, epoch: int, depth: int) -> int:
        """Return the distance between trained layers among `depth` layers in an epoch, from 0."""
        for layers, epochs in zip(self.nested_depths, self.nested_epochs, strict=True):
            if epoch < epochs:
                return depth // layers
            epoch -= epochs
        return 1


def keeps(s: Settings, config: Config, dataset: Dataset) -> tuple[bool, bool]:
    """Return whether states, and whether adjoints, are kept for the next step."""
    whole = config.data.batch_size >= dataset.train.n
    return s.warm_start in ("states", "both") or (s.warm_start == "auto" and whole), s.warm_start == "both"


def plan_of(size: int, network: Network, s: Settings) -> Plan:
    return make_plan(size, network, s.serial_ends, s.layer_replicas)


def check_layer_parallel(size: int, network: Network, dataset: Dataset, config: Config) -> None:
    """See `Method.check`."""
    s = config.of(Settings)
    plan, layout = plan_of(size, network, s), network.layout()
    check_not_partitioned(config)
    if layout.dead.size:
        raise UserError(
            f"--model {network.name} has units that no score depends on, and --method layer_parallel would train them "
            "for nothing: use a network without such units"
        )
    _check_layers(network, plan, s)
    _check_levels(plan.depth, plan.ranks, s)
    _check_nested(plan, config, s)
    for name, value in (("gamma-tik", s.gamma_tik), ("gamma-ddt", s.gamma_ddt)):
        if not (isfinite(value) and 0 <= value <= 1e9):
            raise UserError(f"--{name} {value:g}: expected a number from 0 to 1e9")
    if not (isfinite(s.adapt_bound) and 0 < s.adapt_bound <= 1e9):
        raise UserError(f"--adapt-bound {s.adapt_bound:g}: expected a number above 0, up to 1e9")
    if s.adapt_every and not is_first_order(config.optimization.optimizer):
        raise UserError(
            f"--adapt-every {s.adapt_every} would change the gradient within a line search of --optimizer "
            f"{config.optimization.optimizer}: use a first-order one (sgd, momentum, adam, ...)"
        )
    check_slices(network, config.data.batch_size, plan.rows, "rows of ranks", "--layer-replicas")
    configured_loss(config, dataset)
    shards = [plan.runs(layout, position) for position in range(plan.ranks)]
    check_optimizer(config, layout, shards)
    for position, shard in enumerate(shards):
        for stage in plan.stages(position).values():
            inside(network, layout, stage, shard)


def _check_layers(network: Network, plan: Plan, s: Settings) -> None:
    """Raise UserError for layers that cannot be solved or penalized."""
    if network.normalized:
        raise UserError(
            f"--model {network.name} has batch normalization, whose statistics would come from states that are not "
            "exact yet: use a network without it, or with group normalization (group_norm)"
        )
    if not any(layer.linear for layer in leaves(network.layers[plan.stop :])):
        raise UserError(
            f"--model {network.name} ends in a residual layer, and --method layer_parallel needs a layer with weights "
            "after the residual ones: add one"
        )
    first, stop = residual_run(network)
    layers = [layer for layer in network.layers[first:stop] if isinstance(layer, Residual)]
    if any(not layer.parameters() for layer in layers):
        raise UserError(f"--model {network.name} has residual layers without weights: leave them out")
    if s.gamma_ddt:
        shapes = {tuple(p.shape for p in layer.parameters()) for layer in layers}
        if len(shapes) > 1 or len({layer.scale for layer in layers}) > 1:
            raise UserError(
                f"--gamma-ddt compares each residual layer with the one before, and the layers of --model "
                f"{network.name} differ in kind or step size: leave the option out"
            )


def _check_levels(depth: int, ranks: int, s: Settings, suffix: str = "") -> None:
    """Raise UserError unless ranks own whole intervals on every level, and the coarsest level has two steps."""
    per_rank = depth // ranks
    if s.levels > 1 and (per_rank % s.span or depth // s.span < 2):
        fit = [
            (levels, m)
            for levels in range(2, s.levels + 1)
            for m in range(2, s.coarsening + 1)
            if per_rank % m ** (levels - 1) == 0 and depth // m ** (levels - 1) >= 2
        ]
        fix = f"use --levels {fit[-1][0]} --coarsening {fit[-1][1]}" if fit else "use --levels 1"
        raise UserError(
            f"--levels {s.levels} --coarsening {s.coarsening} needs layers of each rank in multiples of {s.span} and "
            f"two on the coarsest level, and there are {counted(per_rank, 'layer')} on each of {counted(ranks, 'rank')}"
            f"{suffix}: {fix}, or another depth"
        )


def _check_nested(plan: Plan, config: Config, s: Settings) -> None:
    depths, epochs = s.nested_depths, s.nested_epochs
    if len(depths) != len(epochs):
        raise UserError(
            f"--nested-depths {' '.join(map(str, depths))} and --nested-epochs {' '.join(map(str, epochs))}: expected "
            "as many numbers of both"
        )
    if not depths:
        return
    typed = f"--nested-depths {' '.join(map(str, depths))}"
    chain = (*depths, plan.depth)
    if min(depths) < 1 or any(b % a or a == b for a, b in pairwise(chain)):
        raise UserError(f"{typed}: expected numbers each of which is a divisor of the next, and of {plan.depth} layers")
    if min(epochs) < 1 or sum(epochs) >= config.run.epochs:
        raise UserError(
            f"--nested-epochs {' '.join(map(str, epochs))} with --epochs {config.run.epochs}: expected numbers from "
            "1 up that leave some epochs for all layers"
        )
    if s.serial_ends:
        raise UserError(
            f"{typed} leaves out layers evenly, and --serial-ends {s.serial_ends} keeps some: use one option"
        )
    for depth in depths:
        if depth % plan.ranks:
            raise UserError(
                f"{typed}: {depth} layers cannot be dealt evenly to {plan.ranks} ranks: use multiples of {plan.ranks}"
            )
        _check_levels(depth, plan.ranks, s, f" with {typed}")


def layer_parallel_notes(size: int, network: Network, config: Config) -> Iterator[str]:
    """See `Method.notes`."""
    s = config.of(Settings)
    plan = plan_of(size, network, s)
    exact = exact_cycles(plan.depth, s.factors, s.relaxations)
    if s.levels == 1:
        yield f"{plan.depth} residual layers, {plan.steps} a rank, one after the other: --levels 1 is exact"
        return
    yield (
        f"{plan.depth} residual layers, {plan.steps} a rank; {counted(s.forward_cycles, 'forward cycle')} and "
        f"{counted(s.adjoint_cycles, 'adjoint cycle')} a step, of which {exact} would be exact; evaluations are exact"
    )


def layer_parallel_warnings(size: int, network: Network, config: Config) -> Iterator[str]:
    """See `Method.warnings`."""
    s = config.of(Settings)
    plan = plan_of(size, network, s)
    exact = exact_cycles(plan.depth, s.factors, s.relaxations)
    if s.levels > 1 and min(s.forward_cycles, s.adjoint_cycles) > exact:
        yield f"{exact} cycles make passes exact: further cycles change nothing"
    if s.warm_start == "both" and s.adjoint_cycles == 1:
        yield (
            "adjoints of the step before are far from those of this one unless weights change slowly: use "
            "--adjoint-cycles 2 with --warm-start both"
        )
