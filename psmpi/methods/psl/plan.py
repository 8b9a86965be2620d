"""The plan of the method `psl`: settings, roles and checks; made without MPI and arrays of weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from math import inf
from typing import Annotated, Any, ClassVar, Literal

import numpy as np

from psmpi.config import Config, Least, option
from psmpi.data import Dataset
from psmpi.errors import UserError, unused_option
from psmpi.layout import Layout, Roles, Runs, TableRows, assign_roles
from psmpi.methods.psl.arrangement import Arrangement, Cost, arrangements, cost
from psmpi.methods.psl.element_set import elements_of
from psmpi.nn.cut import tail_of, trunk_length
from psmpi.nn.losses import LOSSES
from psmpi.nn.network import Network
from psmpi.optim import NewtonSettings, find_optimizer, is_first_order
from psmpi.optim.base import check_eps
from psmpi.optim.curvature import RULES
from psmpi.registry import WHOLE
from psmpi.training.checks import check_classes, check_slices
from psmpi.training.context import check_optimizer, configured_loss
from psmpi.training.masters import Masters
from psmpi.training.need import Need, added, vectors_needed, worker_needed, worker_tiles


@dataclass(frozen=True)
class Settings:
    """Partially-separable loss (psl)."""

    table: ClassVar[str] = "psl"
    results: ClassVar[bool] = False

    partition: Literal["scores", "pairs"] = "scores"
    """Work of a worker.

    scores: scores of some classes, by their subnetworks
    pairs: element losses of some pairs of classes
    """
    replicas: Annotated[int, Least(0)] = 0
    """Rows of workers that split each minibatch; 0: as few as give every worker work, or the choice of --trunk auto."""
    trunk: Literal["replicated", "split", "auto"] = "replicated"
    """Computation of the first layers, which all classes share.

    replicated: every worker of a row computes them on all samples of the row
    split: every worker computes them on a slice of the samples; the row exchanges the outputs
    auto: the cheapest of both by counted operations and bytes, and the cheapest --replicas if these are not given
    """


@dataclass(frozen=True)
class Plan:
    """The roles of all ranks, and the number of first layers that the workers of a row compute on slices of samples.

    costs: of the arrangements that --trunk auto compares, the cheapest first.
    """

    roles: Roles
    trunk: int
    costs: tuple[tuple[Arrangement, Cost], ...] = ()


def make_plan(network: Network, size: int, config: Config) -> Plan:
    """Return the plan of `size` ranks; raise UserError if there is none."""
    masters, itemsize = config.of(Masters), np.dtype(config.model.dtype).itemsize
    return _planned(network, size, config.of(Settings), masters, config.data.batch_size, itemsize)


@lru_cache(maxsize=16)
def _planned(network: Network, size: int, settings: Settings, masters: Masters, batch: int, itemsize: int) -> Plan:
    """Return the plan, from the parts of the configuration that it depends on."""
    layout = network.layout()

    def roles(rows: int) -> Roles:
        return assign_roles(layout, size, partition=settings.partition, replicas=rows, **asdict(masters))

    first = roles(settings.replicas)
    if settings.trunk == "replicated" or settings.partition == "pairs":
        return Plan(first, 0)
    length = trunk_length(network)
    if settings.trunk == "split":
        return Plan(first, length)
    workers, candidates = sum(w is not None for w in first.workers), []
    for one in arrangements(network, workers, first.rows, settings.replicas):
        try:
            planned = roles(one.rows)
            _check_cut(network, planned, settings.partition, batch)
            if one.split:
                _check_trunk_slices(planned, batch)
        except UserError:
            # The masters, the network or the minibatch do not allow this arrangement.
            continue
        candidates.append((one, planned, cost(network, planned, one.split, batch, itemsize)))
    if not candidates:
        return Plan(first, 0)
    candidates.sort(key=lambda each: each[2].time)
    best, chosen, _ = candidates[0]
    return Plan(chosen, length * best.split, tuple((one, spent) for one, _, spent in candidates))


def trunk_notes(size: int, network: Network, config: Config) -> Iterator[str]:
    """Yield notes on the choice of --trunk auto and the costs of its alternatives, or on a --trunk without effect."""
    plan, settings = make_plan(network, size, config), config.of(Settings)
    if len(plan.costs) > 1:
        (best, least), *alternatives = plan.costs
        other_costs = "; ".join(f"{one}: {spent}" for one, spent in alternatives[:3])
        yield f"--trunk auto takes {best}: at most {least} for a rank and step ({other_costs})"
    elif settings.trunk == "auto" and settings.partition == "pairs":
        yield "--trunk auto changes nothing: with --partition pairs a worker has the samples of its own classes alone"
    elif settings.trunk == "split" and max(_columns(plan.roles).values()) == 1:
        yield "--trunk split changes nothing: each row has one worker, which computes all layers"


def other_placements(kind: Any, config: Config) -> Iterator[tuple[str, Config]]:
    """Yield other placements of the same training, also with a split trunk, see `Method.arrangements`."""
    psl_config = replace(config, parallel=replace(config.parallel, method=kind.name))
    split, owners = replace(config.of(Settings), trunk="split"), Masters(colocate=True, placement="owner")
    for options, changed in (
        ("", [Masters()]),
        ("--colocate", [Masters(colocate=True)]),
        ("--colocate --masters 2", [Masters(colocate=True, masters=2)]),
        ("--colocate --trunk split", [Masters(colocate=True), split]),
        ("--colocate --placement owner", [owners]),
        ("--colocate --placement owner --trunk split", [owners, split]),
    ):
        yield f"--method {kind.name} {options}".rstrip(), psl_config.having(changed)


def _columns(roles: Roles) -> Counter[int]:
    """Return the number of workers of each row."""
    return Counter(w.row for w in roles.workers if w is not None)


def check_psl(size: int, network: Network, dataset: Dataset, config: Config) -> None:
    """See `Method.check`."""
    plan = make_plan(network, size, config)
    _check_roles(network, plan.roles, dataset, config)
    _check_trunk(network, plan, config)
    check_optimizer(config, network.layout(), plan.roles.shards)


def _check_trunk(network: Network, plan: Plan, config: Config) -> None:
    """Raise UserError if no layers can be computed on slices, or the slices would be too small."""
    if config.of(Settings).trunk != "split":
        return
    if config.of(Settings).partition == "pairs":
        raise UserError(
            "--trunk split: a worker of --partition pairs sees the samples of its own classes only; leave it out, or "
            "use --partition scores"
        )
    if max(_columns(plan.roles).values()) == 1:
        return
    if not plan.trunk:
        raise UserError(
            f"--trunk split: --model {network.name} has no layers with weights that all classes share before layers "
            "that they do not share; leave it out"
        )
    _check_trunk_slices(plan.roles, config.data.batch_size)


def _check_trunk_slices(roles: Roles, batch: int) -> None:
    """Raise UserError for a minibatch that does not give each worker of a row a sample."""
    workers, rows = max(_columns(roles).values()), roles.rows
    if batch // rows < workers:
        raise UserError(
            f"--batch-size {batch} with --trunk split leaves some of {workers} workers of a row without a sample: use "
            f"--batch-size {workers * rows} or more, or --trunk replicated"
        )


def _check_roles(network: Network, roles: Roles, dataset: Dataset, config: Config) -> None:
    """Raise UserError if the network, the loss or the minibatch does not allow these roles."""
    loss, partition = configured_loss(config, dataset), config.of(Settings).partition
    if partition == "pairs":
        check_classes(dataset, "--partition pairs", "leave it out")
    _check_cut(network, roles, partition, config.data.batch_size)
    if config.optimization.optimizer in RULES:
        check_classes(dataset, f"--optimizer {config.optimization.optimizer}", "use another one (adam, lbfgs, ...)")
    if partition == "pairs" and not loss.pairwise:
        raise UserError(
            f"--partition pairs needs a loss that is a sum over pairs of classes, and --loss {loss.name} is not: use "
            f"{' or '.join(f'--loss {name}' for name, kind in LOSSES.items() if kind.pairwise)}, or --partition scores"
        )
    if partition == "pairs" and loss.weights == "current":
        raise UserError(
            "--psl-weights current needs a sum over all classes in each step, and a worker of --partition pairs has "
            "only the sum over its own pairs: use --psl-weights remembered, or --partition scores"
        )
    _check_newton(network, roles, config)


def _check_cut(network: Network, roles: Roles, partition: str, batch: int) -> None:
    """Raise UserError if the layers or the size of a minibatch do not allow these roles."""
    workers = [w for w in roles.workers if w is not None]
    tie = network.tie()
    if tie is not None and any(w.column > 0 for w in workers):
        raise UserError(
            f"--model {network.name} cannot be partitioned: layer {network.named(tie)} ties the classes, every score "
            "depends on all of its weights. Use a network that ends in separable layers (--model psnet), or --model "
            "head, which is cut by classes, or give each worker the whole network and "
            f"a slice of the minibatch with {_sliced(network, len(workers))}"
        )
    if network.normalized and (roles.rows > 1 or partition == "pairs"):
        fix = f"use --partition scores with --replicas 1 and no more workers than classes, or --method {WHOLE}"
        raise UserError(
            "with batch normalization, every worker of --method psl needs whole minibatches: "
            + (fix if tie is None else f"use --method {WHOLE}")
        )
    check_slices(network, batch, roles.rows, "replica rows")


def _sliced(network: Network, workers: int) -> str:
    """Return the option that gives each worker a slice of the minibatch; layers may rule out --replicas."""
    return f"--method {WHOLE}" if network.normalized else f"--replicas {workers}"


def psl_needed(size: int, network: Network, dataset: Dataset, config: Config) -> list[Need]:
    """See `Method.needed`."""
    layout = network.layout()
    plan, needs = make_plan(network, size, config), []
    roles = plan.roles
    for part, shard, worker in zip(roles.parts, roles.shards, roles.workers, strict=True):
        separate = shard.inside(part) is None
        vector = part.size + separate * shard.size
        tiled = not separate and worker is not None and worker_tiles(config, network, dataset, worker, roles)
        rows = _stepped_at_once(network, layout, roles, dataset, config, shard) if tiled else 0
        need = vectors_needed(config, layout, vector, vector - rows, shard.size)
        if worker is not None:
            need = added(need, worker_needed(config, network, dataset, worker, roles, trunk=plan.trunk))
        needs.append(need)
    return needs


def _stepped_at_once(
    network: Network, layout: Layout, roles: Roles, dataset: Dataset, config: Config, shard: Runs
) -> int:
    """Return the number of weights that may be stepped tile by tile, without an array for their gradient."""
    o, needs_no_sum = (
        config.optimization,
        roles.rows == 1 and config.optimization.clip == 0 and config.run.on_nan == "stop",
    )
    one_by_one = is_first_order(o.optimizer) and not find_optimizer(o.optimizer).needs_matrices
    tail = tail_of(network)
    if not (needs_no_sum and one_by_one and configured_loss(config, dataset).immediate and tail is not None):
        return 0
    return (network.runs(layout, *tail) & shard).size


def element_rows(roles: Roles, merged: bool) -> TableRows:
    """Return the elements of each rank, as rows of the table of all elements."""
    held = [() if w is None or w.elements is None else w.elements for w in roles.workers]
    number = {e: k for k, e in enumerate(elements_of((pair for pairs in held for pair in pairs), merged))}
    return TableRows(tuple(tuple(number[e] for e in elements_of(pairs, merged)) for pairs in held))


def _check_newton(network: Network, roles: Roles, config: Config) -> None:
    """Raise UserError for settings that partitioned quasi-Newton training cannot have."""
    o, masters = config.optimization, config.of(Masters)
    if not 1 <= o.memory <= 100:
        raise UserError(f"--memory {o.memory}: expected 1 to 100 pairs")
    if not 0 < o.cg_tolerance < 1:
        raise UserError(f"--cg-tolerance {o.cg_tolerance}: expected a number between 0 and 1")
    if not 0 <= o.sigma < inf:
        raise UserError(f"--sigma {o.sigma}: expected a number, 0 or more")
    if o.cg_iterations < 1:
        raise UserError(f"--cg-iterations {o.cg_iterations}: expected 1 or more")
    if o.optimizer not in RULES:
        return
    name = f"--optimizer {o.optimizer}"
    if config.of(Settings).partition != "pairs":
        raise UserError(
            f"{name} needs --partition pairs: an element is a pair of classes, and a worker of --partition scores does "
            "not have both"
        )
    keeping = [layer.name for layer in network.walk() if layer.keeps]
    if keeping:
        raise UserError(
            f"{name} shares one forward pass among the elements, and what {network.named(keeping[0])} of --model "
            f"{network.name} keeps belongs to all units at once: use a network without normalization, or another "
            "--optimizer"
        )
    if roles.rows > 1:
        workers = [w for w in roles.workers if w is not None]
        pairs = {pair for w in workers for pair in w.elements or ()}
        most = masters.masters * (not masters.colocate) + min(len(workers), len(pairs))
        raise UserError(
            f"{name} keeps each element on one worker, and each replica would keep its own: use --replicas 1 and "
            f"{most} ranks or fewer"
        )
    if config.run.on_nan == "skip" and o.extrapolation != "none":
        raise UserError(
            f"--on-nan skip: --extrapolation {o.extrapolation} moves the weights before a step's loss is known; use "
            "--extrapolation none, or --on-nan stop"
        )
    if o.scaling == "moments":
        check_eps(o.eps, np.dtype(config.model.dtype))
    usual = NewtonSettings()
    for setting in ("extrapolation", "line_search", "first_step"):
        value = getattr(o, setting)
        if value != getattr(usual, setting) and o.globalization != "line-search":
            raise unused_option(f"{option(setting)} {value}", "--globalization", ("line-search",), o.globalization)
