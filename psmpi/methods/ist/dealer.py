"""Random subnetworks: the units or residual blocks of a network that each worker trains in a round.

Yuan et al., "Distributed learning of fully connected neural networks using independent subnet training" (2022), deals
out units; Dun et al., "ResIST" (2022), residual blocks. A deal is a function of the network, the number of workers, a
seed and the number of the round: every rank computes it without a message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from psmpi.errors import UserError, unused_option
from psmpi.layout import Share, Shares, even_edges
from psmpi.nn.layers import Layer
from psmpi.nn.layers.cosine import Cosine
from psmpi.nn.layers.linear import Linear
from psmpi.nn.layers.scale import Scale
from psmpi.nn.network import Network


class Dealer:
    """Deal of a network to `workers` workers: networks[p] is the network that worker p trains in every round.

    deal: `units` deals out the units of every layer that the next layer reads as a whole; `blocks` deals out the
    residual blocks of the longest run of equal ones, without its first. strata: a layer's units form `workers` equal
    groups, and every worker gets an equal share of each. A layer that reads a part of its inputs multiplies them by
    all / part, unless their sum is normalized, so that the trained weights fit the whole network; the branches of dealt
    blocks are multiplied likewise.

    Raise UserError if the network has nothing to deal out, or too little for that many workers.
    """

    def __init__(
        self, network: Network, workers: int, seed: int, deal: str = "units", strata: bool = False, min_blocks: int = 1
    ):
        self.network, self.workers, self.seed, self.strata = network, workers, seed, strata
        self.parameters = {p.name: p for layer in network.layers for p in layer.parameters()}
        self.all_workers = tuple(range(workers))
        if deal == "blocks" and strata:
            raise unused_option("--strata", "--deal", ("units",), deal)
        if deal == "units" and min_blocks != 1:
            raise unused_option(f"--min-blocks {min_blocks}", "--deal", ("blocks",), deal)
        if deal == "blocks":
            self.blocks = find_blocks(network)
            if len(self.blocks) < 1:
                raise UserError(
                    f"--deal blocks: --model {network.name} has no two residual blocks of one kind in a row: use "
                    "--model resnet, or --deal units"
                )
            if not 1 <= min_blocks <= len(self.blocks):
                raise UserError(
                    f"--min-blocks {min_blocks}: expected 1 to {len(self.blocks)}, the number of dealt blocks"
                )
            self.counts = [max(min_blocks, b - a) for a, b in pairwise(even_edges(len(self.blocks), workers))]
            self.networks = [self._with_blocks(count) for count in self.counts]
            self.layouts = [network.layout() for network in self.networks]
            return
        self.blocks = []
        self.flat = flat(network.layers)
        self.layers = dealt_layers(network)
        if not self.layers:
            raise UserError(
                f"--deal units: --model {network.name} has no layer whose units the next layer reads as a whole: use "
                "--model mlp, or another network with dense layers or convolutions"
            )
        narrow = min((self._layer(k) for k in self.layers), key=lambda layer: layer.out_shape[0])
        # With strata, every worker needs a unit of each stratum.
        least = workers**2 if strata else workers
        if narrow.out_shape[0] < least:
            raise UserError(
                f"--deal units{' --strata' * strata}: layer {network.named(narrow.name)} of --model "
                f"{network.name} has {narrow.out_shape[0]} units, and {workers} workers need {least}: use fewer ranks, "
                "or a wider network"
            )
        self.networks = [self._with_units(worker) for worker in range(workers)]
        self.layouts = [network.layout() for network in self.networks]

    def _layer(self, k: int) -> Linear:
        """Return a dealt layer, or the reader of one, by its place in `flat`."""
        layer = self.flat[k]
        assert isinstance(layer, Linear)
        return layer

    def groups(self, number: int, layer: int) -> list[np.ndarray]:
        """Return the units of a dealt layer that each worker has in round `number`, increasing."""
        count = self._layer(layer).out_shape[0]
        rng = np.random.default_rng([self.seed, number, layer])
        edges = even_edges(count, self.workers)
        if not self.strata:
            order = rng.permutation(count)
            return [np.sort(order[a:b]) for a, b in pairwise(edges)]
        parts: list[list[np.ndarray]] = [[] for _ in range(self.workers)]
        # Workers take turns at the larger groups, so that a worker has equally many units in every round.
        for stratum in range(self.workers):
            order = edges[stratum] + rng.permutation(edges[stratum + 1] - edges[stratum])
            for k, group in enumerate(np.array_split(order, self.workers)):
                parts[(k + stratum) % self.workers].append(group)
        return [np.sort(np.concatenate(groups)) for groups in parts]

    def deal(self, number: int) -> list[Shares]:
        """Return each worker's shares in round `number`."""
        return self._deal_blocks(number) if self.blocks else self._deal_units(number)

    def _deal_units(self, number: int) -> list[Shares]:
        groups = {layer: self.groups(number, layer) for layer in self.layers}
        all_shares = []
        for worker in range(self.workers):
            rows: dict[str, np.ndarray] = {}
            columns: dict[str, np.ndarray] = {}
            for layer, dealt in groups.items():
                units, count = dealt[worker], self._layer(layer).out_shape[0]
                if len(units) == count:
                    continue
                # Between the layer and its reader, a flattened unit is a run of units.
                for between in self.flat[layer : self.layers[layer]]:
                    for p in between.parameters() if between is not None else ():
                        rows[p.name] = runs_of(units, p.units // count)
                reader = self._layer(self.layers[layer])
                # In the reader's weight, a unit is a kernel, or the pixels of an image.
                columns[f"{reader.name}.weight"] = runs_of(units, reader.unit_size // count)
            shares = {}
            for name in self.parameters:
                dealt_out = name in rows or name in columns or self.workers == 1
                owners = (worker,) if dealt_out else self.all_workers
                shares[name] = Share(name, rows.get(name), columns.get(name), owners)
            all_shares.append(shares)
        return all_shares

    def _deal_blocks(self, number: int) -> list[Shares]:
        count = len(self.blocks)
        order = np.random.default_rng([self.seed, number]).permutation(count)
        starts = even_edges(count, self.workers) if count >= self.workers else range(self.workers)
        dealt = [
            sorted(int(order[(starts[worker] + k) % count]) for k in range(n)) for worker, n in enumerate(self.counts)
        ]
        names = [self._names(at) for at in range(count)]
        owners = {
            name: tuple(worker for worker in self.all_workers if block in dealt[worker])
            for block in range(count)
            for name in names[block]
        }
        all_shares = []
        for worker in range(self.workers):
            shares = {}
            slots = {name: slot for slot in range(self.counts[worker]) for name in names[slot]}
            for name in (p.name for layer in self.networks[worker].layers for p in layer.parameters()):
                source = name
                if name in slots:
                    source = names[dealt[worker][slots[name]]][names[slots[name]].index(name)]
                shares[name] = Share(source, None, None, owners.get(source, self.all_workers))
            all_shares.append(shares)
        return all_shares

    def _names(self, block: int) -> list[str]:
        """Return the names of a dealt block's parameters, in order."""
        return [p.name for p in self.network.layers[self.blocks[block]].parameters()]

    def _with_blocks(self, count: int) -> Network:
        """Return the network with only the first `count` of the dealt blocks, their branches scaled up."""
        layers = []
        for k, layer in enumerate(self.network.layers):
            if k in self.blocks[count:]:
                continue
            if k in self.blocks:
                layer = layer.with_inner(layer.inner, layer.in_shape, len(self.blocks) / count)
            layers.append(layer)
        return replace(self.network, layers=tuple(layers))

    def _with_units(self, worker: int) -> Network:
        """Return the network with as many units in the dealt layers as a worker has."""
        layers, _, _ = self._narrowed(self.network.layers, self.network.in_shape, 0, worker)
        return replace(self.network, layers=layers)

    def _narrowed(
        self, layers: Sequence[Layer], shape: tuple[int, ...], at: int, worker: int
    ) -> tuple[tuple[Layer, ...], tuple[int, ...], int]:
        """Return a worker's narrow versions of `layers`, the shape of their outputs, and the place after them.

        at: place of the first layer in `flat`.
        """
        readers = {reader: layer for layer, reader in self.layers.items()}
        narrow: list[Layer] = []
        for layer in layers:
            if layer.inner:
                branch, _, at = self._narrowed(layer.inner, shape, at + 1, worker)
                narrow.append(layer.with_inner(branch, shape))
                at += 1
                continue
            units = layer.out_shape[0] if layer.linear else shape[0]
            if at in self.layers:
                units = len(self.groups(0, at)[worker])
            if at in readers and not isinstance(layer, Cosine) and not _normalized(self.flat[at + 1 :]):
                whole = self._layer(readers[at]).out_shape[0]
                ratio = whole / len(self.groups(0, readers[at])[worker])
                if ratio != 1:
                    narrow.append(Scale(f"{layer.name}.scale", shape, shape, ratio))
            narrow.append(layer.restrict(units, shape))
            shape = narrow[-1].out_shape
            at += 1
        return tuple(narrow), shape, at


def runs_of(units: np.ndarray, length: int) -> np.ndarray:
    """Return the indices (n * length,) of the elements of units (n,), each a run of `length` elements."""
    return (units[:, None] * length + np.arange(length)).reshape(-1)


def flat(layers: Sequence[Layer]) -> list[Layer | None]:
    """Return all layers in order, with None where a residual block begins and where it ends."""
    flattened: list[Layer | None] = []
    for layer in layers:
        flattened += [None, *flat(layer.inner), None] if layer.inner else [layer]
    return flattened


def dealt_layers(network: Network) -> dict[int, int]:
    """Return the layers whose units can be dealt out: their places in `flat`, and the places of their readers.

    Neither a layer nor its reader has groups. Between the two, no residual block begins or ends, and no layer couples
    units.
    """
    readers, last = {}, -1
    for k, layer in enumerate(flat(network.layers)):
        if layer is None or layer.couples_units or (layer.linear and not isinstance(layer, Linear)):
            last = -1
        elif isinstance(layer, Linear):
            if last >= 0 and layer.groups == 1:
                readers[last] = k
            last = k if layer.groups == 1 else -1
    return readers


def find_blocks(network: Network) -> list[int]:
    """Return the places of the residual blocks that can be dealt out, among the network's layers.

    These are all but the first of the longest run of equal blocks; of runs of the same length, the last run counts.
    """
    runs: list[list[int]] = []
    for k, layer in enumerate(network.layers):
        if not layer.inner:
            continue
        if runs and runs[-1][-1] == k - 1 and _nameless(network.layers[k - 1]) == _nameless(layer):
            runs[-1].append(k)
        else:
            runs.append([k])
    longest = max(reversed(runs), key=len, default=[])
    return longest[1:]


def _nameless(layer: Layer) -> Layer:
    """Return the layer, and the layers inside it, without names."""
    if layer.inner:
        layer = layer.with_inner(tuple(_nameless(one) for one in layer.inner), layer.in_shape)
    return replace(layer, name="")


def _normalized(following: Sequence[Layer | None]) -> bool:
    """Whether a normalization follows before any activation, layer with weights, or end of a residual block."""
    for layer in following:
        if layer is not None and layer.couples:
            return True
        if layer is None or layer.linear or layer.activation not in ("", "identity"):
            return False
    return False
