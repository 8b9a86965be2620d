"""Units, samples and tiles of weights of each rank of a grid; made without MPI and arrays of weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod

from psmpi.errors import UserError
from psmpi.layout import Box, even_edges
from psmpi.methods.tensor.grid import Cut, Grid, cut
from psmpi.nn.layers import Layer
from psmpi.nn.layers.attention import Attention
from psmpi.nn.layers.chain import leaves
from psmpi.nn.layers.dense import Dense
from psmpi.nn.layers.embedding import Embedding
from psmpi.nn.layers.flatten import Flatten
from psmpi.nn.layers.layer_norm import LayerNorm
from psmpi.nn.layers.residual import Residual
from psmpi.nn.network import Network
from psmpi.registry import WHOLE


@dataclass(frozen=True)
class Tile:
    """One dense layer on the grid: the cuts of its inputs and outputs.

    reads_samples: whether the inputs are the samples, of which each rank fetches what its product needs without a
    message.
    """

    layer: Dense
    inputs: Cut
    outputs: Cut
    reads_samples: bool = False

    @property
    def grid(self) -> Grid:
        return self.inputs.grid

    @property
    def gathers(self) -> str:
        """The axis along which pieces of inputs are gathered; "" if each rank has what its product needs."""
        if self.reads_samples or self.grid.products != "gathered":
            return ""
        return self.inputs.axes[1] if self.grid.size(self.inputs.axes[1]) > 1 else ""

    @property
    def input_axis(self) -> str:
        """The axis along which gradients of inputs are summed; "" if none are, or by panels."""
        if self.grid.products == "whole":
            return "" if self.reads_samples or self.inputs.axes or self.grid.size("j") == 1 else "j"
        return self.gathers

    @property
    def output_axis(self) -> str:
        """The axis along which products are summed; "" if none are, or by panels."""
        if self.grid.products == "whole":
            return "" if self.outputs.axes or self.grid.size("j") == 1 else "j"
        if self.grid.products == "panels":
            return ""
        return self.outputs.axes[1] if self.grid.size(self.outputs.axes[1]) > 1 else ""

    def shares(self, units_cut: Cut, place: dict[str, int]) -> list[int]:
        """Return the units of each rank along `input_axis` or `output_axis`, of a product's inputs or outputs."""
        if self.grid.products == "whole":
            edges = even_edges(units_cut.units, self.grid.size("j"))
            return [b - a for a, b in pairwise(edges)]
        return units_cut.fine(place)

    def product(self, place: dict[str, int]) -> tuple[int, int]:
        """Return (outputs, inputs) of a rank's product, or of all of its panels together."""
        (a, b), (c, d) = self.outputs.block(place), self.inputs.block(place)
        return b - a, self.inputs.units if self.grid.products == "panels" else d - c

    def room(self, place: dict[str, int], keeps: bool) -> int:
        """Return the numbers a column that a pass keeps besides inputs and outputs.

        keeps: whether gathered inputs are kept.
        """
        return self.product(place)[1] if keeps and self.gathers else 0

    def workspace(self, place: dict[str, int], columns: int, wanted: bool, keeps: bool) -> dict[str, int]:
        """Return the numbers of each temporary array. wanted: whether the gradient of the inputs is computed."""
        rows, inputs = self.product(place)
        if self.grid.products == "panels":
            most = max(self.inputs.counts)
            numbers = {"products": rows * columns}
            for k in range(2):
                numbers[f"panel of weights {k}"] = rows * most
                numbers[f"sums {k}"] = max(rows * most, most * columns * wanted)
                if not self.reads_samples:
                    numbers[f"panel of inputs {k}"] = most * columns
            return numbers
        numbers = {}
        if self.gathers and not keeps:
            numbers["gathered inputs"] = inputs * columns
        if self.output_axis:
            numbers["products"] = rows * columns
            if self.grid.products == "gathered":
                numbers["gathered gradients"] = rows * columns
        if wanted and self.input_axis:
            numbers["products"] = max(numbers.get("products", 0), inputs * columns)
        return numbers

    def rows(self, place: dict[str, int]) -> list[int]:
        """Return the edges of the weight's rows that the places along i have, in output units."""
        first, stop = self.outputs.block(place)
        if self.grid.products == "panels":
            return [first, stop]
        return [first + edge for edge in even_edges(stop - first, self.grid.size("i"))]

    def box(self, place: dict[str, int]) -> Box:
        """Return the place's tile of the weight (outputs, inputs)."""
        edges = self.rows(place)
        if self.grid.products == "panels":
            # Place (i, j) has the columns of the i-th piece of inputs, and of activations the j-th piece.
            columns = self.inputs.edges[place["i"]], self.inputs.edges[place["i"] + 1]
            return Box(f"{self.layer.name}.weight", ((edges[0], edges[1]), columns))
        at = place["i"]
        return Box(f"{self.layer.name}.weight", ((edges[at], edges[at + 1]), self.inputs.block(place)))


@dataclass(frozen=True)
class Plan:
    """A network on a grid. start: the cut of the samples' features that the first layer reads.

    cuts: for each layer, the cuts of its inputs and of its outputs; tiles: by layer.
    """

    network: Network
    grid: Grid
    start: Cut
    cuts: dict[str, tuple[Cut, Cut]] = field(default_factory=dict)
    tiles: dict[str, Tile] = field(default_factory=dict)

    @property
    def dealt(self) -> bool:
        """Whether the outputs of some layer are dealt to ranks so far."""
        return bool(self.tiles) or any(isinstance(layer, Embedding) for layer in self.network.layers[:1])

    @property
    def scores(self) -> Cut:
        return self.cuts[self.network.layers[-1].name][1]

    def whole(self, layer: Layer) -> bool:
        """Whether each rank has all output units of a layer, which ranks then compute redundantly."""
        return not self.cuts[layer.name][1].axes

    def vectors(self) -> list[tuple[Layer, str]]:
        """Return the parameters that are dealt by units, each with its layer; those that ranks have whole come last."""
        parameters = []
        for layer in leaves(self.network.layers):
            for p in layer.parameters():
                if layer.name not in self.tiles or p.name.endswith(".bias"):
                    parameters.append((layer, p.name))
        return sorted(parameters, key=lambda one: self.whole(one[0]))

    def boxes(self, rank: int) -> list[Box]:
        """Return a rank's boxes: tiles of weights, then its units of all other parameters, see `vectors`.

        A rank has no box of a weight with fewer rows than places along i, if none of them is the rank's.
        """
        place = self.grid.place(rank)
        tiles = [
            box for box in (tile.box(place) for tile in self.tiles.values()) if box.ranges[0][0] < box.ranges[0][1]
        ]
        return tiles + [Box(name, (self.cuts[layer.name][1].piece(place),)) for layer, name in self.vectors()]

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a rank's boxes by parameter."""
        whole = {p.name: p.shape for p in self.network.layout().parameters}
        return {box.parameter: tuple(b - a for a, b in box.of(whole[box.parameter])) for box in self.boxes(rank)}

    @property
    def local_layers(self) -> tuple[Layer, ...]:
        """The layers that ranks compute with: all but a leading flatten layer, as samples are read flat."""
        layers = self.network.layers
        return layers[1:] if isinstance(layers[0], Flatten) else layers


def make_plan(network: Network, grid: Grid) -> Plan:
    """Return the plan of a network; raise UserError for layers that cannot be cut, and for too few units."""
    first = network.layers[0]
    units = prod(network.in_shape) if isinstance(first, Flatten) else network.in_shape[0]
    start = Cut(grid, (), (0, units))
    images = len(network.in_shape) == 3 and not isinstance(first, Flatten)
    if grid.products == "gathered" and not images and not isinstance(first, Embedding):
        start = _samples(grid, 0, units, f"--model {network.name}")
    plan = Plan(network, grid, start)
    scores = _walk(plan, plan.local_layers, start, 0)
    if not plan.tiles:
        raise UserError(f"--model {network.name} has no dense layer, and --method tensor cuts those: use --model mlp")
    assert scores.units == network.classes
    return plan


def _axes(grid: Grid, turn: int) -> tuple[str, ...]:
    """Return the axes over which activations are dealt after `turn` dense layers; two choices alternate."""
    if grid.products == "panels":
        return ("j",)
    if grid.products == "whole":
        return ("j",) if turn % 2 else ()
    return ("j", "l") if turn % 2 else ("l", "j")


def _walk(plan: Plan, layers: Sequence[Layer], inputs: Cut, turn: int) -> Cut:
    """Cut some layers, given the cut of their inputs; return the cut of their outputs."""
    network, grid = plan.network, plan.grid
    for k, layer in enumerate(layers):
        label = f"{network.named(layer.name)} of --model {network.name}"
        outputs = inputs
        known = isinstance(layer, LayerNorm) or type(layer).sources is Layer.sources
        mixes = isinstance(layer, Attention) or any(one.linear for one in leaves(layer.inner))
        if not plan.dealt and (mixes or (known and layer.parameters())):
            raise UserError(
                f"{label} is before all dense layers, and --method tensor deals units from the first one on: put a "
                "dense layer before it"
            )
        if isinstance(layer, Residual):
            outputs = _walk(plan, layer.layers, inputs, turn)
            if not outputs.matches(inputs):
                raise UserError(
                    f"{label}: the branch of a residual block must deal its outputs to ranks as its inputs, which "
                    "takes an even number of dense layers: add one to the branch, or use --grid "
                    f"{grid.ranks},1,1"
                )
            outputs = inputs
        elif isinstance(layer, Dense):
            if layer.groups > 1:
                raise UserError(f"{label} is cut into groups already: use --model mlp, or another method")
            turn += 1
            grain, grain_name = _grain(layers[k + 1 :])
            message = f"{label} has {layer.units // grain} {grain_name}"
            outputs = cut(grid, _axes(grid, turn), layer.units, grain, message, "another --grid, or fewer ranks")
            reads_samples = not plan.tiles and not plan.dealt
            if reads_samples:
                inputs = _samples(grid, turn - 1, inputs.units, label)
            plan.tiles[layer.name] = Tile(layer, inputs, outputs, reads_samples)
        elif isinstance(layer, Embedding):
            units = layer.out_shape[0]
            message = f"{label} has {units} units"
            outputs = cut(grid, _axes(grid, turn), units, 1, message, "another --grid, or fewer ranks")
        elif isinstance(layer, Attention):
            if any(edge % (3 * layer.size) for edge in inputs.edges):
                raise UserError(
                    f"{label} is dealt by whole heads, and its inputs are not: put a dense layer of "
                    f"{layer.in_shape[0]} units right before it"
                )
            outputs = inputs.scaled(1, 3)
        elif not known:
            raise UserError(
                f"{label} is none of the layers that --method tensor cuts (dense, attention, layer_norm, gelu, "
                f"embedding, activations, residual): use --model mlp or transformer, or --method {WHOLE}"
            )
        plan.cuts[layer.name] = (inputs, outputs)
        inputs = outputs
    return inputs


def _samples(grid: Grid, turn: int, units: int, label: str) -> Cut:
    """Return the cut of the samples' features for the first dense layer: each rank reads those of its product."""
    return cut(grid, _axes(grid, turn)[:1], units, 1, f"{label} has {units} inputs", "another --grid, or fewer ranks")


def _grain(following: Sequence[Layer]) -> tuple[int, str]:
    """Return the grain in whose multiples a dense layer's units are dealt, and its name; following: the next layers."""
    for layer in following:
        if isinstance(layer, Attention):
            return layer.in_shape[0] // layer.heads, "heads"
        if layer.linear or layer.inner:
            break
    return 1, "units"
