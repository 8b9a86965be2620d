"""The memory that ranks need at least: bytes by what for, from network, roles and minibatch alone, without arrays."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.backend.compiled import level
from psmpi.layout import Layout, Roles, Runs, Worker
from psmpi.nn.cut import has_head, tail_of
from psmpi.nn.layers.chain import output_numbers, plan_buffers, workspace_numbers
from psmpi.nn.losses import Loss
from psmpi.nn.network import Network
from psmpi.nn.private_layers import FEW, class_numbers, tile_of
from psmpi.training.context import configured_loss, configured_optimizer
from psmpi.training.element_worker import by_tiles

if TYPE_CHECKING:
    from psmpi.config import Config
    from psmpi.data import Dataset

# Bytes by what for, by the names of a method's account.
Need = dict[str, int]


def added(*several: Need) -> Need:
    """The sums of some needs."""
    return {what: sum(one.get(what, 0) for one in several) for what in dict.fromkeys(k for one in several for k in one)}


def vectors_needed(
    config: Config, layout: Layout, weights: int, gradients: int, shard: int, *, counted: bool = False
) -> Need:
    """Of so many weights and gradients, and of the optimizer's vectors of a shard; `counted` as in `make_optimizer`."""
    size = np.dtype(config.model.dtype).itemsize
    vectors = len(configured_optimizer(config, layout, Runs(), counted=counted).vectors)
    return {"weights": size * weights, "gradients": size * gradients, "optimizer": size * shard * vectors}


def pass_numbers(
    network: Network,
    classes: range | tuple[int, ...],
    batch: int,
    packed: bool,
    *,
    layers: tuple[int, int] | None = None,
    tiled: Loss | None = None,
) -> tuple[int, int]:
    """Numbers that the passes of the part of `classes` need for minibatches of `batch`: outputs, and all else.

    Outputs are those that are not written over their input; all else is what the layers say. packed: convolutions are
    computed without windows; layers: as of `Model`; tiled: the loss, where the last layers go by tiles of classes.
    """
    tail = tail_of(network) if tiled is not None else None
    if tail is not None:
        layers = layers[0] if layers else 0, tail[0]
    found = [_own_numbers(network, classes, batch, packed, layers)]
    if tiled is not None and tail is not None and not has_head(network):
        found.append(_private_numbers(network, tail, len(classes), batch, packed, tiled))
    return sum(one.outputs for one in found), sum(one.held + sum(one.shared.values()) for one in found)


@dataclass
class Numbers:
    """Numbers that passes need: outputs of layers, what is held besides, and arrays of the workspace by their names."""

    outputs: int
    held: int
    shared: dict[str, int]

    def beside(self, other: Numbers) -> Numbers:
        """Of both, with one workspace."""
        names = {*self.shared, *other.shared}
        shared = {name: max(self.shared.get(name, 0), other.shared.get(name, 0)) for name in names}
        return Numbers(self.outputs + other.outputs, self.held + other.held, shared)


def _own_numbers(
    network: Network, classes: range | tuple[int, ...], batch: int, packed: bool, layers: tuple[int, int] | None
) -> Numbers:
    """Of the passes of one model."""
    stages = network.stages(classes, layers=layers)
    pairs = list(zip(stages, plan_buffers(stages)[0], strict=True))
    held = sum(stage.layer.held(stage, batch, spot.writable, packed) for stage, spot in pairs)
    return Numbers(output_numbers(stages) * batch, held, workspace_numbers(stages, batch, packed))


def _private_numbers(
    network: Network, tail: tuple[int, int], classes: int, batch: int, packed: bool, loss: Loss
) -> Numbers:
    """Of private layers by tiles: models of a tile, of the classes left over, and of those of labels."""
    tile, few = tile_of(classes, batch * class_numbers(network, tail)), min(FEW, classes)
    features = batch * prod(network.layers[tail[0]].in_shape)
    # The gradient of what goes in is summed over tiles.
    found, sizes = Numbers(0, 2 * features, {}), [tile, classes % tile]
    if loss.sums and not loss.gathers:
        # The labels' classes, with weights of their own.
        found.held += features + 3 * few * (network.runs(network.layout(), *tail).size // network.classes)
        sizes.append(few)
    for size in sizes:
        if size:
            found = found.beside(_own_numbers(network, range(size), batch, packed, tail))
    return found


def passes_needed(
    config: Config,
    network: Network,
    batch: int,
    classes: range | tuple[int, ...] | None = None,
    layers: tuple[int, int] | None = None,
    tiled: Loss | None = None,
) -> Need:
    """Of the passes of a part, or of some layers, with the inputs of a minibatch; arguments as in `pass_numbers`."""
    size, packed = np.dtype(config.model.dtype).itemsize, config.parallel.backend != "numpy" and level() > 0
    inputs = prod(network.layers[layers[0]].in_shape if layers else network.in_shape)
    outputs, besides = pass_numbers(
        network, range(network.classes) if classes is None else classes, batch, packed, layers=layers, tiled=tiled
    )
    return {"activations": size * (batch * inputs + outputs), "buffers": size * besides}


def derivatives_needed(config: Config, scores: int) -> Need:
    """Of the derivatives of so many scores, in float64 and in the dtype."""
    return {"buffers": (8 + np.dtype(config.model.dtype).itemsize) * scores}


def samples_needed(dataset: Dataset, trained: int, tested: int, batch: int) -> Need:
    """Of samples in memory, each with its number, and of those of a minibatch as they are stored."""
    own = dataset.own or range(dataset.train.n)
    sparse = dataset.train.taken(np.arange(own.start, own.stop))
    if sparse is not None:
        return {"samples": (sparse.nbytes // sparse.n + 8) * (trained + tested)}
    sample = dataset.train.dtype.itemsize * dataset.train.features
    kept = sum(
        min(sample * count, split.memory) if split.memory >= 0 else sample * count
        for split, count in ((dataset.train, trained), (dataset.test, tested))
    )
    return {"samples": kept + 8 * (trained + tested) + sample * min(trained, batch)}


def worker_tiles(
    config: Config, network: Network, dataset: Dataset, place: Worker, roles: Roles, tests: bool = True
) -> bool:
    """Whether an `ElementWorker` on the host goes by tiles of classes; arguments as its own."""
    batches = network.evaluation_batches(dataset.test.n) if tests else []
    share = -(-config.data.batch_size // roles.rows)
    most = max(1, share, *(at.stop - at.start for at in batches))
    return by_tiles(config, network, configured_loss(config, dataset), place, most, NumpyOps())


def worker_needed(
    config: Config, network: Network, dataset: Dataset, place: Worker, roles: Roles, tests: bool = True, trunk: int = 0
) -> Need:
    """Of an `ElementWorker`, besides weights and gradients; arguments as its own."""
    own = place.classes
    share, trained = config.data.batch_size // roles.rows, dataset.train.n
    batches = network.evaluation_batches(dataset.test.n) if tests else []
    sizes = [batches[k].stop - batches[k].start for k in np.array_split(np.arange(len(batches)), roles.rows)[place.row]]
    tested = sum(sizes)
    if place.elements is not None:
        # Of the test samples, a class's first worker of a row takes care.
        earlier = (w for w in roles.workers if w is not None and w.row == place.row and w.column < place.column)
        if set(own) <= {c for w in earlier for c in w.classes}:
            tested = 0
        trained = int(np.isin(dataset.train.labels, list(own)).sum())
        # There may come more of its classes.
        share = share * trained // dataset.train.n
    batch = max(1, share, *sizes)
    tiled = configured_loss(config, dataset) if worker_tiles(config, network, dataset, place, roles, tests) else None
    derivatives = derivatives_needed(config, 0 if tiled is not None else batch * len(own))
    classes = own if isinstance(own, range) else tuple(own)
    peers = sum(w is not None and w.row == place.row for w in roles.workers)
    if not trunk or peers == 1:
        passes = passes_needed(config, network, batch, classes, tiled=tiled)
        return added(passes, derivatives, samples_needed(dataset, trained, tested, share))
    # A slice of each minibatch in the trunk, with what it gets back, and a slice to send and one that comes.
    sliced = batch // peers
    units = prod(network.layers[trunk - 1].out_shape)
    tail = passes_needed(config, network, batch, classes, (trunk, len(network.layers)), tiled)
    before = passes_needed(config, network, sliced, classes, (0, trunk))
    exchanged = {"buffers": np.dtype(config.model.dtype).itemsize * units * (batch + 3 * sliced)}
    tested = sum(n // peers for n in sizes)
    return added(tail, before, exchanged, derivatives, samples_needed(dataset, trained, tested, share // peers))
