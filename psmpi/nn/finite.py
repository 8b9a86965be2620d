"""Search for the first numbers that are not finite: samples, weights or gradients by parameter, or the first layer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from psmpi.layout import Classes, Layout, Runs

if TYPE_CHECKING:
    from psmpi.nn.model import Model
    from psmpi.nn.tail import Tail

# Most parameters, and runs of units of one parameter, that a message names; further ones are counted.
MOST, RUNS = 3, 4
# Samples are a likely cause if at most one sample in FEW is not finite.
FEW = 4
# Kinds of causes, the most specific first: samples, weights, a layer's outputs, inputs from another rank's layers, the
# loss of finite scores, a rank's gradient, and sums of gradients.
KINDS = ("inputs", "weights", "layer", "handed", "loss", "gradient", "sum")


@dataclass(frozen=True)
class Cause:
    """First non-finite numbers, as a message: `text` is a clause, or names of weights; kind: one of KINDS.

    columns: samples of the pass that are affected; few: whether they are a small part of the minibatch; rank: rank of
    the pass, -1 if unknown; place: number of the layer, by which causes are compared if ranks share layers.
    """

    kind: str
    text: str
    columns: tuple[int, ...] = ()
    few: bool = False
    rank: int = -1
    place: int = 0


def spans(numbers: Collection[int]) -> str:
    """Return numbers as text with ranges: (0, 1, 2, 5) -> "0-2 5"."""
    return " ".join(str(a) if a + 1 == b else f"{a}-{b - 1}" for a, b in Classes.of(numbers).ranges)


def of_classes(classes: Collection[int], all_of: int) -> str:
    """Return classes as text in brackets, or "" for no classes and for all `all_of` classes."""
    plural = "es" if len(classes) > 1 else ""
    return f" (class{plural} {spans(classes)})" if 0 < len(classes) < all_of else ""


def kind_of(values: np.ndarray) -> str:
    """Return the kind of the values that are not finite: "NaN", "inf" or "NaN and inf"."""
    kinds = (("NaN", np.isnan(values).any()), ("inf", np.isinf(values).any()))
    return " and ".join(name for name, present in kinds if present)


def find_parameters(layout: Layout, runs: Runs, vector: np.ndarray) -> str:
    """Return a text of the parameters with non-finite values: names, units and their classes; "" if there are none.

    vector: (runs.size,) in host memory, the elements of the flat vector that `runs` names.
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
            within = inside < piece.units * size
            if within.any():
                own = np.unique(piece.first + k[within] * piece.units + inside[within] // size)
                units.setdefault(piece.parameter, set()).update(own.tolist())
                # The k-th piece belongs to the k-th class of the block.
                users = block.classes if piece.count == 1 else Classes.of(k[within] + block.classes.ranges[0][0])
                classes.setdefault(piece.parameter, []).append(users)
    texts = []
    for number in sorted(units)[:MOST]:
        p, some = layout.parameters[number], units[number]
        numbers = spans(some)
        of = f", unit{'s' * (len(some) > 1)} {numbers} of {p.units}" if len(some) < p.units else ""
        of = f", {len(some)} of {p.units} units" if of and numbers.count(" ") >= RUNS else of
        texts.append(f"{p.name}{of}{of_classes(Classes.union(classes[number]), layout.classes)}")
    more = len(units) - len(texts)
    return f"{' and '.join(texts)}{f' and {more} more' if more else ''} ({kind_of(vector)})"


def find_cause(model: Model, tail: Tail | None = None) -> Cause:
    """Return the cause of a loss that is not finite, from the model's last pass.

    The search checks samples, then weights, then the outputs of each layer in order. The outputs are computed again in
    other arrays, because later layers may have overwritten them. tail: the tail of a model that is `tiled`.
    """
    tape, ops = model.last, model.ops
    if tape is None or not tape.outputs:
        return Cause("loss", "")
    x = tape.outputs[0]
    inputs = ops.host(x)
    columns, kinds = _columns(inputs), kind_of(inputs)
    few = FEW * len(columns) <= x.shape[-1]
    if columns and model.begins:
        return Cause("inputs", f"the inputs have {kinds}", columns, True)
    if columns:
        first = model.parts[0].layer.name
        return Cause("handed", f"the inputs of layer {first}, from the layers before it, have {kinds}", columns, few)
    weights = find_parameters(model.layout, model.part, ops.host(model.w))
    if weights:
        return Cause("weights", weights)
    if model.no_sums:
        everyone = model.classes if model.ends or not model.begins else ()
        features = x
        for part, features in model.trace(x):
            scores = part is model.parts[-1] and model.ends and len(features) == len(model.classes)
            nonfinite = NonFinite.of(ops.host(features), everyone, scores)
            if nonfinite is not None:
                return nonfinite.cause(part.layer.name, model.layout.classes)
        if tail is not None:
            cause = _first_of_tiles(model, tail, features.reshape(-1, x.shape[-1]))
            if cause is not None:
                return cause
    else:
        # A new pass would need the other ranks, so the arrays of the last pass are checked.
        for part, output in zip(model.parts, tape.outputs[1:], strict=True):
            nonfinite = NonFinite.of(ops.host(output), (), False)
            if nonfinite is not None:
                return replace(nonfinite.cause(part.layer.name, model.layout.classes), place=part.number)
        return Cause("loss", "")
    return Cause("loss", "all weights and outputs of layers are finite, but their loss is beyond float64")


@dataclass
class NonFinite:
    """Non-finite outputs of a layer: kinds, samples (columns) and classes.

    rows: number of units with non-finite outputs; units: number of units; samples: number of samples of the pass; one:
    whether each class has one unit.
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
        """Return the non-finite outputs among y (units, ..., b), or None if all are finite.

        classes: classes that use the units; apart: whether each class has equally many private units, in the order of
        the classes.
        """
        columns = _columns(y)
        if not columns:
            return None
        rows = np.flatnonzero(~np.isfinite(y).reshape(len(y), -1).all(axis=1))
        each = max(1, len(y) // max(1, len(classes))) if apart else 0
        named = [classes[k] for k in np.unique(rows // each).tolist()] if apart else list(classes)
        return cls(kind_of(y), set(columns), named, len(rows), len(y), y.shape[-1], each == 1)

    def join(self, other: NonFinite) -> None:
        """Add non-finite outputs of other classes' units of the same layer; `units` stays unchanged."""
        both = {*self.kinds.split(" and "), *other.kinds.split(" and ")}
        self.kinds = " and ".join(sorted(both, reverse=True))
        self.columns |= other.columns
        self.classes += other.classes
        self.rows += other.rows

    def cause(self, layer: str, all_of: int) -> Cause:
        """Return the cause for a message; layer: name of the layer; all_of: number of classes."""
        count = f"{self.rows} of {self.units} units, " if self.rows < self.units and not self.one else ""
        text = f"layer {layer}{of_classes(self.classes, all_of)} is the first to put out {self.kinds}, in {count}"
        columns = tuple(sorted(self.columns))
        few = FEW * len(columns) <= self.samples
        return Cause("layer", f"{text}{len(columns)} of {self.samples} samples", columns, few)


def _first_of_tiles(model: Model, tail: Tail, features: np.ndarray) -> Cause | None:
    """Return the cause of the first layer of a tail with non-finite outputs, over all tiles; None if there is none."""
    layers: dict[int, tuple[str, int, NonFinite | None]] = {}
    for at, part, output in tail.trace(features):
        y = model.ops.host(output)
        nonfinite = NonFinite.of(y, model.classes[at], True)
        name, units, before = layers.get(part.number, (part.layer.name, 0, None))
        if before is not None and nonfinite is not None:
            before.join(nonfinite)
        layers[part.number] = name, units + len(y), before or nonfinite
    for _, (name, units, bad) in sorted(layers.items()):
        if bad is not None:
            bad.units = units
            return bad.cause(name, model.layout.classes)
    return None


def _columns(values: np.ndarray) -> tuple[int, ...]:
    """Return the samples with values that are not finite; the last axis of `values` counts samples."""
    return tuple(np.flatnonzero(~np.isfinite(values).reshape(-1, values.shape[-1]).all(axis=0)).tolist())
