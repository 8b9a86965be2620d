"""Chains of layers: the stages that a subnetwork computes, the memory of their outputs, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from math import prod
from typing import Any

import numpy as np

from psmpi.layout import Classes, Runs
from psmpi.nn.layers.activation import export_activation
from psmpi.nn.layers.base import NEW, OVER, VIEW, Layer, Part, Site, Stage
from psmpi.nn.layers.select import Select
from psmpi.nn.layers.uses import Uses, used


def uses_of(layers: Sequence[Layer], uses: Uses) -> list[Uses]:
    """Return the users of each layer's output units, given the users of the last layer's units."""
    layer_uses = []
    for layer in reversed(layers):
        layer_uses.append(uses)
        uses = layer.sources(uses)
    return layer_uses[::-1]


def make_stages(
    layers: Sequence[Layer],
    uses: Uses,
    classes: Classes,
    inputs: np.ndarray,
    *,
    fold: bool = True,
    some: slice = slice(None),
) -> list[Stage]:
    """Return the stages of the subnetwork of `classes`.

    uses: users of the last layer's units; inputs: (units,) bool, input units of the first layer that are present; fold:
    convolutions absorb mean pooling; some: layers whose stages are returned.
    """
    places: list[list[tuple[Layer, Uses, np.ndarray, np.ndarray]]] = []
    for layer, users in zip(layers, uses_of(layers, uses), strict=True):
        places.append([])
        if layer.exact:
            input_users = layer.sources(users)
            wanted = used(input_users, classes, layer.in_shape[0])
            if (inputs & ~wanted).any():
                select = Select(f"{layer.name}.units", layer.in_shape, layer.in_shape)
                places[-1].append((select, input_users, inputs, wanted))
                inputs = wanted
        kept = layer.present(inputs, used(users, classes, layer.out_shape[0]))
        places[-1].append((layer, users, inputs, kept))
        inputs = kept
    stages, rows = [], [row for place in places[some] for row in place]
    while rows:
        layer, users, into, kept = rows.pop(0)
        if layer.activation == "identity":
            continue
        count = layer.absorbs([row[0] for row in rows], fold)
        absorbed = tuple(row[0] for row in rows[:count])
        rows = rows[count:]
        shape = (int(kept.sum()), *(absorbed[-1] if absorbed else layer).out_shape[1:])
        inner = tuple(make_stages(layer.inner, users, classes, into, fold=fold)) if layer.inner else ()
        stages.append(Stage(layer, absorbed, into, kept, shape, users, inner))
    return stages


@dataclass(frozen=True)
class Spot:
    """Memory of a stage's output: whether it needs a new array, and whether the stage may overwrite its input."""

    new: bool
    writable: bool


def plan_buffers(stages: Sequence[Stage]) -> tuple[list[Spot], bool]:
    """Return the spots of the outputs of a chain's stages, and whether the last output may be overwritten.

    The input of the chain and outputs that backward needs are never overwritten.
    """
    spots, writable = [], False
    for stage in stages:
        place = stage.layer.place
        spots.append(Spot(place == NEW or (place == OVER and not writable), writable))
        writable = writable if place == VIEW else not stage.reads_output
    return spots, writable


def output_numbers(stages: Sequence[Stage]) -> int:
    """Return the numbers per sample of all outputs with new arrays, including outputs of inner stages."""
    spots, _ = plan_buffers(stages)
    own = sum(stage.size for stage, spot in zip(stages, spots, strict=True) if spot.new)
    return own + sum(output_numbers(stage.inner) for stage in stages)


def lowest(stages: Sequence[Stage]) -> int:
    """Return the index of the first stage that backward must reach; no gradient is needed below it."""
    return next((k for k, stage in enumerate(stages) if any(one.weighted for one in walk(stage))), len(stages))


def workspace_numbers(stages: Sequence[Stage], batch: int, packed: bool, wanted: bool = False) -> dict[str, int]:
    """Return the size of each workspace array that backward passes of a chain need; see `Layer.workspace_numbers`."""
    numbers: dict[str, int] = {}
    for k, stage in enumerate(stages):
        for name, size in stage.layer.workspace_numbers(stage, batch, wanted or k > lowest(stages), packed).items():
            numbers[name] = max(numbers.get(name, 0), size)
    return numbers


@dataclass(eq=False)
class Room:
    """Arrays of one pass through a chain, for up to `batch` samples: `buffers` for outputs, `rooms` of `Part.room`."""

    batch: int
    buffers: list[np.ndarray | None] = field(default_factory=list)
    rooms: list[Any] = field(default_factory=list)


@dataclass(eq=False)
class Tape:
    """Arrays that one forward pass keeps for its backward pass.

    outputs: the input, then the output of each part; kept: the other results of `Part.forward`, for each part. The
    arrays belong to a room: the next pass through the same room overwrites them.
    """

    outputs: list[np.ndarray]
    kept: list[Any]

    @property
    def scores(self) -> np.ndarray:
        """Output of the last part."""
        return self.outputs[-1]


class Chain:
    """Parts of consecutive stages, with forward and backward through all of them."""

    def __init__(self, stages: Sequence[Stage], site: Site, in_shape: tuple[int, ...], apart: bool = False):
        """apart: each part writes its gradient to the start of one shared vector, which the next part overwrites."""
        self.ops, self.space, self.dtype, self.in_shape = site.ops, site.space, site.dtype, in_shape
        # With `apart`, the slice of each part's weights in the local vector.
        self.slices = [_slice(stage, site) for stage in stages] if apart else None
        sites = [site] * len(stages)
        if self.slices is not None:
            sites = [replace(site, part=_runs(stage, site)) for stage in stages]
        self.parts = [stage.layer.part(stage, one) for stage, one in zip(stages, sites, strict=True)]
        self.spots, self.writable = plan_buffers(stages)
        self.lowest = lowest(stages)

    def walk(self) -> Iterator[Part]:
        """Iterate over all parts, including inner parts, in the order of forward."""
        for part in self.parts:
            yield from part.walk()

    def bind(self, w: np.ndarray, g: np.ndarray | None) -> None:
        for part, at in zip(self.parts, self.slices or repeat(None), strict=self.slices is not None):
            if at is None:
                part.bind(w, g)
            else:
                part.bind(w[at], None if g is None else g[: at.stop - at.start])

    def views(self, vector: np.ndarray) -> list[Any]:
        """Return the views of each part in a local vector, for gradients that do not go into g."""
        return [part.views(vector) for part in self.parts]

    def room(self, batch: int) -> Room:
        """Return the arrays for a pass of up to `batch` samples."""
        room = Room(batch)
        for part, spot in zip(self.parts, self.spots, strict=True):
            room.rooms.append(part.room(batch, spot.writable))
            room.buffers.append(self.ops.empty(part.size * batch, self.dtype) if spot.new else None)
        return room

    def reserve(self, batch: int) -> None:
        for part in self.parts:
            part.reserve(batch)

    def reserve_backward(self, batch: int, wanted: bool = False) -> None:
        """Allocate the memory that backward passes share; wanted: the gradient of the chain's input is needed."""
        first = 0 if wanted else self.lowest
        for k, part in enumerate(self.parts):
            if k > first and part.layer.moves_gradient:
                self.space.reserve_gradient(self.parts[k - 1].size * batch)
            part.reserve_backward(batch, wanted or k > first)

    def forward(self, x: np.ndarray, room: Room) -> Tape:
        """Return the tape of a forward pass of x (*in_shape, b); sequences may have fewer steps than in_shape."""
        tape = Tape([x], [])
        for part, buffer, own in zip(self.parts, room.buffers, room.rooms, strict=True):
            y = _output(part, buffer, tape.outputs[-1])
            y, kept = part.forward(tape.outputs[-1], y, own)
            tape.outputs.append(y)
            tape.kept.append(kept)
        return tape

    def trace(self, x: np.ndarray, room: Room) -> Iterator[tuple[Part, np.ndarray]]:
        """Iterate over the parts with their outputs for x; the next part may overwrite an output."""
        for part, buffer, own in zip(self.parts, room.buffers, room.rooms, strict=True):
            y = _output(part, buffer, x)
            x, _ = part.forward(x, y, own)
            yield part, x

    def backward(
        self,
        tape: Tape,
        dy: np.ndarray,
        into: Any,
        *,
        first: int = 0,
        last: int | None = None,
        dx: np.ndarray | None = None,
        wanted: bool = False,
    ) -> np.ndarray:
        """Write the gradients of parts `first` to `last`, given the gradient dy of the last output; dy is overwritten.

        into: list with the views of each part, `SampleSums`, or None if gradients of weights are not needed. dx: array
        to fill with the gradient of the input of part `first`; wanted: return that gradient, in any array.
        """
        last = len(self.parts) - 1 if last is None else last
        wanted = wanted or dx is not None
        if not wanted:
            first = max(first, self.lowest)
        several = isinstance(into, list)
        for k in range(last, first - 1, -1):
            part, x = self.parts[k], tape.outputs[k]
            below = dy if k > first or wanted else None
            if below is not None and part.layer.moves_gradient:
                below = dx if k == first and dx is not None else self.space.gradient(*x.shape)
            dy = part.backward(x, tape.outputs[k + 1], tape.kept[k], dy, below, into[k] if several else into)
            if part.weighted and self.space.finished is not None:
                self.space.finished(part.number)
        if dx is not None and dy is not dx:
            dx[...] = dy.reshape(dx.shape)
        return dy


def _runs(stage: Stage, site: Site) -> Runs:
    """Return the runs of the flat vector of a stage's parameters, including inner stages."""
    names = {p.name for one in walk(stage) for layer in (one.layer, *one.absorbed) for p in layer.parameters()}
    return site.layout.runs_of_parameters(names) & site.part


def _slice(stage: Stage, site: Site) -> slice:
    """Return the slice of the local vector that holds a stage's parameters; raise ValueError if no slice does."""
    at = _runs(stage, site).inside(site.part)
    if at is None:
        raise ValueError(f"the weights of {stage.layer.name} are not contiguous in the local vector")
    return at


def _output(part: Part, buffer: np.ndarray | None, x: np.ndarray) -> np.ndarray | None:
    """Return the view of `buffer` for a part's output for x; a chunk of sequences has fewer steps than the shape."""
    if buffer is None:
        return None
    shape = part.shape
    if len(shape) == 2:
        shape = shape[0], x.shape[1]
    return buffer[: prod(shape) * x.shape[-1]].reshape(*shape, x.shape[-1])


def export_chain(graph: Any, value: str, chain: Chain) -> str:
    """Add the parts of a chain, and the activations that they have absorbed, to an ONNX graph; return the output."""
    for part in chain.parts:
        value = part.export(graph, value)
        if part.activation != "identity" and not part.layer.activation:
            value = export_activation(graph, value, part.activation, part.layer.name)
    return value


def leaves(layers: Sequence[Layer]) -> Iterator[Layer]:
    """Iterate over all layers in the order of forward; a layer with inner layers is replaced by these."""
    for layer in layers:
        if layer.inner:
            yield from leaves(layer.inner)
        else:
            yield layer


def walk(stage: Stage) -> Iterator[Stage]:
    """Iterate over a stage and the stages inside it."""
    yield stage
    for one in stage.inner:
        yield from walk(one)


def room_bytes(room: Room) -> tuple[int, int]:
    """Return the bytes of the outputs in a room, and the bytes of its other arrays."""
    outputs = sum(b.nbytes for b in room.buffers if b is not None)
    more = 0
    for one in room.rooms:
        for item in one if isinstance(one, tuple) else (one,):
            if isinstance(item, Room):
                inner, kept = room_bytes(item)
                outputs, more = outputs + inner, more + kept
            elif item is not None:
                more += item.nbytes
    return outputs, more
