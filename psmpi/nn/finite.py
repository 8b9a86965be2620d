"""The place where numbers stop being finite: samples, weights or gradients by parameter, or the first layer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from psmpi.layout import Classes, Layout, Runs

if TYPE_CHECKING:
    from psmpi.nn.model import Model
    from psmpi.nn.tail import Tail

# Parameters that a message names, and runs of their units; the rest are counted.
MOST, RUNS = 3, 4
# One sample in so many, at most, is to be looked at before the weights are.
FEW = 4
# What a cause is of, the most telling first: samples, weights, a layer's outputs, what comes from another rank's
# layers, the loss of finite scores, a rank's own gradient, and sums of these.
KINDS = ("inputs", "weights", "layer", "handed", "loss", "gradient", "sum")


@dataclass(frozen=True)
class Cause:
    """The first thing that is not finite, for people: `text` is a clause, of weights their names; kind one of KINDS.

    columns: the samples of the pass that it is of; few: they are a small part of it; rank: whose pass it is, -1: not
    said; place: the number of the layer, where ranks have some units of each and find different ones.
    """

    kind: str
    text: str
    columns: tuple[int, ...] = ()
    few: bool = False
    rank: int = -1
    place: int = 0


def spans(numbers: Collection[int]) -> str:
    """(0, 1, 2, 5) -> "0-2 5"."""
    return " ".join(str(a) if a + 1 == b else f"{a}-{b - 1}" for a, b in Classes.of(numbers).ranges)


def of_classes(classes: Collection[int], all_of: int) -> str:
    """Some of the network's classes in brackets; nothing where it is all of them, or none."""
    plural = "es" if len(classes) > 1 else ""
    return f" (class{plural} {spans(classes)})" if 0 < len(classes) < all_of else ""


def kind_of(values: np.ndarray) -> str:
    """The kind of the values that are not finite: "NaN", "inf" or both."""
    kinds = (("NaN", np.isnan(values).any()), ("inf", np.isinf(values).any()))
    return " and ".join(name for name, there in kinds if there)


def find_parameters(layout: Layout, runs: Runs, vector: np.ndarray) -> str:
    """The parameters with values that are not finite: names, units, and the classes that use these; "" if all are.

    vector: (runs.size,) in host memory, of the elements of the flat vector that `runs` names.
    """
    bad = np.flatnonzero(~np.isfinite(vector))
    if not bad.size:
        return ""
    run = runs.offsets.searchsorted(bad, side="right") - 1
    places = bad - runs.offsets[run] + runs.starts[run]
    units: dict[int, set[int]] = {}
    classes: dict[int, list[Classes]] = {}
    for block in layout.bands:
        for piece in block.pieces:
            size = layout.parameters[piece.parameter].unit_size
            first, last = places.searchsorted((piece.offset, piece.stretch(size).stop))
            k, inside = np.divmod(places[first:last] - piece.offset, piece.step or layout.size)
            there = inside < piece.units * size
            if there.any():
                own = np.unique(piece.first + k[there] * piece.units + inside[there] // size)
                units.setdefault(piece.parameter, set()).update(own.tolist())
                # Of each class its own, the k-th.
                users = block.classes if piece.count == 1 else Classes.of(k[there] + block.classes.ranges[0][0])
                classes.setdefault(piece.parameter, []).append(users)
    found = []
    for number in sorted(units)[:MOST]:
        p, some = layout.parameters[number], units[number]
        which = spans(some)
        of = f", unit{'s' * (len(some) > 1)} {which} of {p.units}" if len(some) < p.units else ""
        of = f", {len(some)} of {p.units} units" if of and which.count(" ") >= RUNS else of
        found.append(f"{p.name}{of}{of_classes(Classes.union(classes[number]), layout.classes)}")
    more = len(units) - len(found)
    return f"{' and '.join(found)}{f' and {more} more' if more else ''} ({kind_of(vector)})"


def find_cause(model: Model, tail: Tail | None = None) -> Cause:
    """The cause of a loss that is not finite: the model's last pass, looked at again from the samples on.

    Samples, then weights, then the outputs of one layer after the other, which are computed anew in arrays of their
    own: what a later layer has overwritten is seen too. tail: of a model that is `tiled`.
    """
    tape, ops = model.last, model.ops
    if tape is None or not tape.outputs:
        return Cause("loss", "")
    x = tape.outputs[0]
    given = ops.host(x)
    columns, kinds = _columns(given), kind_of(given)
    few = FEW * len(columns) <= x.shape[-1]
    if columns and model.begins:
        return Cause("inputs", f"the inputs have {kinds}", columns, True)
    if columns:
        first = model.parts[0].layer.name
        return Cause("handed", f"what comes to layer {first} from those before it has {kinds}", columns, few)
    weights = find_parameters(model.layout, model.part, ops.host(model.w))
    if weights:
        return Cause("weights", weights)
    if model.alone:
        everyone = model.classes if model.ends or not model.begins else ()
        features = x
        for part, features in model.trace(x):
            scores = part is model.parts[-1] and model.ends and len(features) == len(model.classes)
            found = NonFinite.of(ops.host(features), everyone, scores)
            if found is not None:
                return found.cause(part.layer.name, model.layout.classes)
        if tail is not None:
            cause = _first_of_tiles(model, tail, features.reshape(-1, x.shape[-1]))
            if cause is not None:
                return cause
    else:
        # A pass would need the other ranks: what the last one has left is looked at.
        for part, output in zip(model.parts, tape.outputs[1:], strict=True):
            found = NonFinite.of(ops.host(output), (), False)
            if found is not None:
                return replace(found.cause(part.layer.name, model.layout.classes), place=part.number)
        return Cause("loss", "")
    return Cause("loss", "all weights and the outputs of all layers are finite, the loss of these is beyond float64")


@dataclass
class NonFinite:
    """What is not finite among the outputs of a layer: of which kinds, in which samples, of which classes.

    rows, units: of the layer's units how many are not finite; one: whether each of the classes has one unit.
    """

    kinds: str
    columns: set[int]
    classes: list[int]
    rows: int
    units: int
    samples: int
    one: bool

    @classmethod
    def of(cls, y: np.ndarray, classes: Sequence[int], apart: bool) -> NonFinite | None:
        """Of outputs y (units, ..., b), if there is something.

        classes: those that use the units, `apart`: each its own, as many as any other, one after the other.
        """
        columns = _columns(y)
        if not columns:
            return None
        rows = np.flatnonzero(~np.isfinite(y).reshape(len(y), -1).all(axis=1))
        each = max(1, len(y) // max(1, len(classes))) if apart else 0
        named = [classes[k] for k in np.unique(rows // each).tolist()] if apart else list(classes)
        return cls(kind_of(y), set(columns), named, len(rows), len(y), y.shape[-1], each == 1)

    def join(self, other: NonFinite) -> None:
        """Add what is not finite of the same layer among other classes' units, all but the number of units."""
        both = {*self.kinds.split(" and "), *other.kinds.split(" and ")}
        self.kinds = " and ".join(sorted(both, reverse=True))
        self.columns |= other.columns
        self.classes += other.classes
        self.rows += other.rows

    def cause(self, layer: str, all_of: int) -> Cause:
        """The cause that this is."""
        count = f"{self.rows} of {self.units} units, " if self.rows < self.units and not self.one else ""
        text = f"layer {layer}{of_classes(self.classes, all_of)} is the first to put out {self.kinds}, in {count}"
        columns = tuple(sorted(self.columns))
        few = FEW * len(columns) <= self.samples
        return Cause("layer", f"{text}{len(columns)} of {self.samples} samples", columns, few)


def _first_of_tiles(model: Model, tail: Tail, features: np.ndarray) -> Cause | None:
    """The first layer of a tail that puts out what is not finite, in all tiles together."""
    layers: dict[int, tuple[str, int, NonFinite | None]] = {}
    for at, part, output in tail.trace(features):
        y = model.ops.host(output)
        found = NonFinite.of(y, model.classes[at], True)
        name, units, before = layers.get(part.number, (part.layer.name, 0, None))
        if before is not None and found is not None:
            before.join(found)
        layers[part.number] = name, units + len(y), before or found
    for _, (name, units, bad) in sorted(layers.items()):
        if bad is not None:
            bad.units = units
            return bad.cause(name, model.layout.classes)
    return None


def _columns(values: np.ndarray) -> tuple[int, ...]:
    """The samples with values that are not finite, of an array that puts the samples last."""
    return tuple(np.flatnonzero(~np.isfinite(values).reshape(-1, values.shape[-1]).all(axis=0)).tolist())
