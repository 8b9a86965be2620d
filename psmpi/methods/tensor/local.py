"""The network of one rank's units on a grid, and the products that the rank makes with other ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.comm.group import Group
from psmpi.comm.transfers import RowExchange, Spread
from psmpi.layout import Layout, plain_layout
from psmpi.methods.tensor.plan import Plan, Tile
from psmpi.methods.tensor.products import Gathered, Panels, Products
from psmpi.methods.tensor.tile import TileLayer
from psmpi.methods.tensor.weights import Weights
from psmpi.nn.layers import Layer
from psmpi.nn.layers.embedding import Embedding
from psmpi.nn.layers.residual import Residual
from psmpi.nn.layers.workspace import Workspace
from psmpi.nn.network import Network


def local_network(plan: Plan, rank: int, keeps: bool, products: Mapping[str, Products] | None = None) -> Network:
    """Return the network of a rank's units; its classes are the rank's scores."""
    place, network = plan.grid.place(rank), plan.network
    shape: tuple[int, ...] = network.in_shape
    if plan.local_layers is not network.layers:
        # Without the leading flatten layer, samples are flat.
        shape = (prod(shape),)
    a, b = plan.start.piece(place)
    shape = (b - a, *shape[1:])

    def cut(layers: Sequence[Layer], shape: tuple[int, ...]) -> tuple[Layer, ...]:
        cut_layers: list[Layer] = []
        for layer in layers:
            a, b = plan.cuts[layer.name][1].piece(place)
            out = (b - a, *layer.out_shape[1:])
            if isinstance(layer, Residual):
                cut_layers.append(layer.with_inner(cut(layer.layers, shape), shape))
            elif layer.name in plan.tiles:
                tile = plan.tiles[layer.name]
                rows, columns = (d - c for c, d in tile.box(place).ranges)
                own = None if products is None else products[layer.name]
                cut_layers.append(TileLayer(layer.name, shape, out, (rows, columns), tile, rank, keeps, own))
            elif isinstance(layer, Embedding):
                cut_layers.append(replace(layer, out_shape=out))
            else:
                cut_layers.append(layer.restrict(b - a, shape))
            shape = cut_layers[-1].out_shape
        return tuple(cut_layers)

    return Network(network.name, shape, cut(plan.local_layers, shape))


def local_layout(plan: Plan, rank: int) -> Layout:
    """Return the layout of a rank's vectors: tiles of weights, then its units of the other parameters."""
    return plain_layout(plan.shapes(rank))


@dataclass
class RankProducts:
    """The products of a rank, by layer; weights: the gathered weights, None if panels are broadcast instead."""

    by_layer: dict[str, Products]
    weights: Weights | None


def make_products(
    plan: Plan,
    rank: int,
    group: Callable[[Sequence[int]], Group],
    ops: NumpyOps,
    space: Workspace,
    *,
    keeps: bool,
    ahead: bool,
) -> RankProducts:
    """Make the products of a rank's layers. group: makes a group of ranks; all ranks call it in the same order."""
    grid, place, dtype = plan.grid, plan.grid.place(rank), space.dtype
    groups = {axis: group(grid.members(rank, axis)) for axis in ("i", "j", "l")}
    tiles = list(plan.tiles.values())
    if grid.products == "panels":
        return RankProducts({tile.layer.name: _panels(tile, place, groups, ops, space, ahead) for tile in tiles}, None)
    exchanges, shapes = [], []
    for tile in tiles:
        edges, (rows, columns) = tile.rows(place), tile.product(place)
        exchanges.append(RowExchange(groups["i"], np.diff(edges).tolist(), dtype))
        shapes.append((rows, columns))
    weights = Weights(exchanges, shapes, ops, dtype, keeps, ahead)
    # Samples need no gradient, so backward ends at the second tile if the first one's inputs are samples.
    ends = len(tiles) - 1, int(tiles[0].reads_samples)
    by_layer: dict[str, Products] = {}
    for number, tile in enumerate(tiles):
        inputs = outputs = None
        if tile.input_axis:
            inputs = RowExchange(groups[tile.input_axis], tile.shares(tile.inputs, place), dtype)
        if tile.output_axis:
            outputs = RowExchange(groups[tile.output_axis], tile.shares(tile.outputs, place), dtype)
        whole = grid.products == "whole"
        by_layer[tile.layer.name] = Gathered(
            inputs, outputs, weights, number, ends, ops, space, whole=whole, keeps=keeps
        )
    return RankProducts(by_layer, weights)


def _panels(
    tile: Tile, place: dict[str, int], groups: Mapping[str, Group], ops: NumpyOps, space: Workspace, ahead: bool
) -> Panels:
    counts, (rows, _) = tile.inputs.counts, tile.product(place)
    inputs = [Spread(groups["j"], n, space.dtype, k, per_sample=True) for k, n in enumerate(counts)]
    weights = [Spread(groups["i"], rows * n, space.dtype, k) for k, n in enumerate(counts)]
    return Panels(inputs, weights, counts, rows, ops, space, reads_samples=tile.reads_samples, ahead=ahead)


def starts_of_vectors(plan: Plan, own: Layout) -> tuple[int, int]:
    """Return two places in a rank's vectors: of the first parameter that is no tile, and of the first whole one.

    Every rank has the whole parameters, which come last.
    """
    sizes = {p.name: prod(p.shape) for p in own.parameters}
    vectors = [(sizes[name], plan.whole(layer)) for layer, name in plan.vectors()]
    tiles = own.size - sum(size for size, _ in vectors)
    return tiles, tiles + sum(size for size, whole in vectors if not whole)
