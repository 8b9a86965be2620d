"""The least memory of ranks: bytes by purpose, computed from network, roles and minibatch without any array."""

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

# Bytes by purpose; purposes are those of a method's account.
Need = dict[str, int]


def added(*several: Need) -> Need:
    """Add needs, purpose by purpose."""
    return {what: sum(one.get(what, 0) for one in several) for what in dict.fromkeys(k for one in several for k in one)}


def vectors_needed(
    config: Config, layout: Layout, weights: int, gradients: int, shard: int, *, counted: bool = False
) -> Need:
    """Need of so many weights and gradients, and of the optimizer of `shard` weights; counted: see `make_optimizer`."""
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
    """Numbers in memory in passes of the part of `classes` with minibatches of `batch`: (outputs, all others).

    Outputs of layers that overwrite their input do not count; the layers state the others. packed: whether convolutions
    need no windows; layers: see `Model`; tiled: the loss, if the last layers are computed tile by tile.
    """
    tail = tail_of(network) if tiled is not None else None
    if tail is not None:
        layers = layers[0] if layers else 0, tail[0]
    numbers = [_own_numbers(network, classes, batch, packed, layers)]
    if tiled is not None and tail is not None and not has_head(network):
        numbers.append(_private_numbers(network, tail, len(classes), batch, packed, tiled))
    return sum(one.outputs for one in numbers), sum(one.buffers + sum(one.shared.values()) for one in numbers)


@dataclass
class Numbers:
    """Numbers in memory in passes: outputs of layers, other arrays, and arrays of the workspace by name."""

    outputs: int
    buffers: int
    shared: dict[str, int]

    def beside(self, other: Numbers) -> Numbers:
        """Add another model's numbers; both use one workspace."""
        names = {*self.shared, *other.shared}
        shared = {name: max(self.shared.get(name, 0), other.shared.get(name, 0)) for name in names}
        return Numbers(self.outputs + other.outputs, self.buffers + other.buffers, shared)


def _own_numbers(
    network: Network, classes: range | tuple[int, ...], batch: int, packed: bool, layers: tuple[int, int] | None
) -> Numbers:
    """Numbers of the passes of one model."""
    stages = network.stages(classes, layers=layers)
    pairs = list(zip(stages, plan_buffers(stages)[0], strict=True))
    buffers = sum(stage.layer.buffer_numbers(stage, batch, spot.writable, packed) for stage, spot in pairs)
    return Numbers(output_numbers(stages) * batch, buffers, workspace_numbers(stages, batch, packed))


def _private_numbers(
    network: Network, tail: tuple[int, int], classes: int, batch: int, packed: bool, loss: Loss
) -> Numbers:
    """Numbers of private layers by tiles: of a whole tile, the last tile, and the tile of the labels' classes."""
    tile, few = tile_of(classes, batch * class_numbers(network, tail)), min(FEW, classes)
    features = batch * prod(network.layers[tail[0]].in_shape)
    # The gradient of the inputs is summed over tiles, in a buffer of its own.
    numbers, sizes = Numbers(0, 2 * features, {}), [tile, classes % tile]
    if loss.sums and not loss.gathers:
        # The tile of the labels' classes has copies of their weights.
        numbers.buffers += features + 3 * few * (network.runs(network.layout(), *tail).size // network.classes)
        sizes.append(few)
    for size in sizes:
        if size:
            numbers = numbers.beside(_own_numbers(network, range(size), batch, packed, tail))
    return numbers


def passes_needed(
    config: Config,
    network: Network,
    batch: int,
    classes: range | tuple[int, ...] | None = None,
    layers: tuple[int, int] | None = None,
    tiled: Loss | None = None,
) -> Need:
    """Need of the passes of a part, or of some layers, with the inputs of a minibatch; see `pass_numbers`."""
    size, packed = np.dtype(config.model.dtype).itemsize, config.parallel.backend != "numpy" and level() > 0
    inputs = prod(network.layers[layers[0]].in_shape if layers else network.in_shape)
    outputs, besides = pass_numbers(
        network, range(network.classes) if classes is None else classes, batch, packed, layers=layers, tiled=tiled
    )
    return {"activations": size * (batch * inputs + outputs), "buffers": size * besides}


def derivatives_needed(config: Config, scores: int) -> Need:
    """Need of the derivatives of so many scores, in float64 and in the dtype of the weights."""
    return {"buffers": (8 + np.dtype(config.model.dtype).itemsize) * scores}


def samples_needed(dataset: Dataset, trained: int, tested: int, batch: int) -> Need:
    """Need of samples in memory with their ids, and of a minibatch of them as stored."""
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
    """Whether an `ElementWorker` on the host computes scores tile by tile; arguments: see there."""
    batches = network.evaluation_batches(dataset.test.n) if tests else []
    share = -(-config.data.batch_size // roles.rows)
    most = max(1, share, *(at.stop - at.start for at in batches))
    return by_tiles(config, network, configured_loss(config, dataset), place, most, NumpyOps())


def worker_needed(
    config: Config, network: Network, dataset: Dataset, place: Worker, roles: Roles, tests: bool = True, trunk: int = 0
) -> Need:
    """Need of an `ElementWorker` besides weights and gradients; arguments: see there."""
    own = place.classes
    share, trained = config.data.batch_size // roles.rows, dataset.train.n
    batches = network.evaluation_batches(dataset.test.n) if tests else []
    sizes = [batches[k].stop - batches[k].start for k in np.array_split(np.arange(len(batches)), roles.rows)[place.row]]
    tested = sum(sizes)
    if place.elements is not None:
        # The first worker of the row that has a class tests it; this one may have nothing to test.
        earlier = (w for w in roles.workers if w is not None and w.row == place.row and w.column < place.column)
        if set(own) <= {c for w in earlier for c in w.classes}:
            tested = 0
        trained = int(np.isin(dataset.train.labels, list(own)).sum())
        # A minibatch may have more samples of its classes than on average: this is a lower bound.
        share = share * trained // dataset.train.n
    batch = max(1, share, *sizes)
    tiled = configured_loss(config, dataset) if worker_tiles(config, network, dataset, place, roles, tests) else None
    derivatives = derivatives_needed(config, 0 if tiled is not None else batch * len(own))
    classes = own if isinstance(own, range) else tuple(own)
    peers = sum(w is not None and w.row == place.row for w in roles.workers)
    if not trunk or peers == 1:
        passes = passes_needed(config, network, batch, classes, tiled=tiled)
        return added(passes, derivatives, samples_needed(dataset, trained, tested, share))
    # The trunk: features and gradients of the whole minibatch, and three slices that are computed, sent and received.
    sliced = batch // peers
    units = prod(network.layers[trunk - 1].out_shape)
    tail = passes_needed(config, network, batch, classes, (trunk, len(network.layers)), tiled)
    before = passes_needed(config, network, sliced, classes, (0, trunk))
    exchanged = {"buffers": np.dtype(config.model.dtype).itemsize * units * (batch + 3 * sliced)}
    tested = sum(n // peers for n in sizes)
    return added(tail, before, exchanged, derivatives, samples_needed(dataset, trained, tested, share // peers))
