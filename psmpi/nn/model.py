"""A network, or the subnetwork of some classes, over a local weight vector: forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from math import prod

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.layout import Layout, Runs, split_evenly
from psmpi.nn.linear import ConvPart, DensePart, LinearPart, Scratch, Sums, find_segments
from psmpi.nn.network import (
    Activation,
    BatchNorm,
    Conv,
    Dense,
    Flatten,
    Fork,
    Join,
    LayerSpec,
    Linear,
    Network,
    Pad,
    Pool,
    Scale,
)
from psmpi.nn.normalization import NormPart


class Step:
    """One layer of a part in place: `size` elements of output a sample, of the network's units those `kept`.

    A linear, a pooling or a normalizing layer makes the activation that follows it too.
    """

    def __init__(
        self,
        kind: str,
        spec: object,
        kept: np.ndarray,
        shape: tuple[int, ...] = (),
        linear: LinearPart | None = None,
        activation: str = "identity",
        norm: NormPart | None = None,
    ):
        self.kind, self.spec, self.kept, self.linear, self.activation = kind, spec, kept, linear, activation
        self.shape = (int(kept.sum()), *shape)
        self.norm = norm
        # Of a fork or a join, the number of its partner among the steps.
        self.partner = -1

    @property
    def size(self) -> int:
        return prod(self.shape)


class Model:
    """The scores of `classes` (all by default) as a function of the part's local weight vector.

    w, g: (part.size,) arrays of one dtype, the weights and (written by `backward`) their gradient; the part is
    `layout.part(classes)`. With g = None there is no backward. Activations put the minibatch last. Buffers are
    allocated by `reserve`, not by the step. With `fold`, mean pooling right after a convolution is folded into its
    kernel. With a `lender`, a model of these classes and others, `borrow` takes the place of `forward`: the outputs are
    the lender's, and so is the scratch (ValueError for a network with batch normalization). With `layers`, (first,
    behind the last), these alone: the part is of them, and the model goes from the outputs of the layer before the
    first to those of the last.
    """

    def __init__(
        self,
        network: Network,
        layout: Layout,
        w: np.ndarray,
        g: np.ndarray | None,
        ops: NumpyOps,
        classes: Sequence[int] | None = None,
        *,
        fold: bool = True,
        lender: Model | None = None,
        layers: tuple[int, int] | None = None,
    ):
        self.network, self.layout, self.ops = network, layout, ops
        self.classes = tuple(range(network.classes)) if classes is None else tuple(sorted(classes))
        self.part: Runs = layout.part(self.classes)
        self.layers = layers or (0, len(network.layers))
        if layers is not None:
            self.part = self.part & layer_runs(network, layout, *layers)
        for name, vector in (("w", w), ("g", g)):
            if vector is not None and (vector.shape, vector.dtype) != ((self.part.size,), w.dtype):
                raise ValueError(
                    f"the part of classes {self.classes} has {self.part.size} parameters; got {name} {vector.shape} "
                    f"{vector.dtype}"
                )
        self.w, self.g, self.dtype = w, g, w.dtype
        if lender is not None and network.normalized:
            raise ValueError("what batch normalization makes cannot be borrowed")
        self.lender = lender
        # Told the number of each step with weights when `backward` has made its gradient.
        self.finished: Callable[[int], None] | None = None
        self.scratch: Scratch = Scratch(ops, self.dtype) if lender is None else lender.scratch
        self.steps = self._make_steps(fold)
        self.capacity = 0
        if lender is not None:
            self.borrowed = [
                _positions(theirs.kept, mine.kept) for theirs, mine in zip(lender.steps, self.steps, strict=True)
            ]

    def _make_steps(self, fold: bool) -> list[Step]:
        steps: list[Step] = []
        open_forks: list[int] = []
        first, behind = self.layers
        masks = self.network.kept(self.classes)
        shape = self.network.layers[first].in_shape
        kept = masks[first - 1] if first else np.ones(shape[0], bool)
        if first and isinstance(self.network.layers[first - 1], Flatten):
            # Flattened, all of a unit is there, seen or not.
            flatten = self.network.layers[first - 1]
            channels = masks[first - 2] if first > 1 else np.ones(flatten.in_shape[0], bool)
            kept = np.repeat(channels, prod(flatten.in_shape[1:]))
        self.in_shape = (int(kept.sum()), *shape[1:])
        layers = list(zip(self.network.layers, masks, strict=True))[first:behind]
        while layers:
            layer, mine = layers.pop(0)
            if isinstance(layer, Linear):
                segments = find_segments(layer, self.layout, self.part, mine, np.cumsum(kept) - 1)
                inputs, units = int(kept.sum()), int(mine.sum())
                kept, pool, shape = mine, 1, layer.out_shape[1:]
                linear: LinearPart
                if isinstance(layer, Conv):
                    if fold and layers and isinstance(layers[0][0], Pool) and layers[0][0].kind == "mean":
                        folded = layers.pop(0)[0]
                        assert isinstance(folded, Pool)
                        pool, shape = folded.size, folded.out_shape[1:]
                    activation = _next_activation(layers)
                    linear = ConvPart(layer, segments, inputs, units, self.ops, self.scratch, activation, pool)
                else:
                    assert isinstance(layer, Dense)
                    activation = _next_activation(layers)
                    linear = DensePart(layer, segments, inputs, units, self.ops, self.scratch, activation)
                linear.bind(self.w, self.g)
                steps.append(Step("linear", layer, kept, shape, linear, activation))
            elif isinstance(layer, Flatten):
                kept = np.repeat(kept, prod(layer.in_shape[1:]))
                steps.append(Step("flatten", layer, kept))
            elif isinstance(layer, Pool):
                steps.append(Step("pool", layer, kept, layer.out_shape[1:], activation=_next_activation(layers)))
            elif isinstance(layer, BatchNorm):
                norm = NormPart(layer, self.layout, self.part, kept, self.ops, self.dtype)
                norm.bind(self.w, self.g)
                activation = _next_activation(layers)
                steps.append(Step("norm", layer, kept, layer.out_shape[1:], activation=activation, norm=norm))
            elif isinstance(layer, Pad):
                steps.append(Step("pad", layer, kept, layer.out_shape[1:]))
            elif isinstance(layer, Scale):
                steps.append(Step("scale", layer, kept, layer.out_shape[1:]))
            elif isinstance(layer, Fork):
                open_forks.append(len(steps))
                steps.append(Step("fork", layer, kept, layer.out_shape[1:]))
            elif isinstance(layer, Join):
                steps.append(Step("join", layer, kept, layer.out_shape[1:]))
                fork = open_forks.pop()
                steps[-1].partner, steps[fork].partner = fork, len(steps) - 1
            elif isinstance(layer, Activation) and layer.kind != "identity":
                steps.append(Step("activation", layer, kept, layer.out_shape[1:]))
        return steps

    def reserve(self, batch: int) -> None:
        """Make room for minibatches of up to `batch` samples."""
        if batch <= self.capacity:
            return
        self.capacity = batch
        # What the last forward left would keep the smaller buffers alive.
        self.outputs: list[np.ndarray] = []
        self.buffers: list[np.ndarray | None] = []
        # Flattening is a view, and activations work in place on the output before: but not on the minibatch, and not on
        # the output of another activation, which its backward pass needs, and not on what goes past a residual block.
        writable = False
        for k, step in enumerate(self.steps):
            in_place = step.kind in ("flatten", "fork") or (step.kind in ("activation", "join", "scale") and writable)
            fresh = step.kind in ("linear", "pool", "norm", "pad", "join", "scale") and step.activation == "identity"
            if step.norm is not None:
                step.norm.reserve(0 if writable else step.size * batch)
            writable = fresh or (step.kind == "flatten" and writable)
            if self.lender is not None:
                in_place = isinstance(self.borrowed[k], slice)
            self.buffers.append(None if in_place else self.ops.empty(step.size * batch, self.dtype))
            if step.linear is not None:
                step.linear.reserve(batch)  # type: ignore[attr-defined]
        if self.g is None and self.lender is None:
            return
        # A gradient lives until the layer below has made its own from it: two buffers take turns.
        for k, step in enumerate(self.steps):
            if k > self._lowest() and step.kind in ("linear", "pool", "pad"):
                for turn in (0, 1):
                    self.scratch.take(f"gradient {turn}", self.steps[k - 1].size, batch)
            if step.kind == "pool":
                self.scratch.take("pooled", step.size, batch)
            if step.kind == "join":
                self.scratch.take(f"past {step.partner}", step.size, batch)

    def _lowest(self) -> int:
        """The first layer with weights; below it no gradient is needed."""
        return next(k for k, step in enumerate(self.steps) if step.linear is not None or step.norm is not None)

    def filled(self) -> list[tuple[int, int, int]]:
        """(start, stop, step) of the runs of g that each step with weights fills in `backward`."""
        names = [p.name for p in self.layout.parameters]
        found = []
        for number, step in enumerate(self.steps):
            if step.linear is None and step.norm is None:
                continue
            assert isinstance(step.spec, LayerSpec)
            own = {names.index(parameter.name) for parameter in step.spec.parameters()}
            for piece in self.layout.pieces():
                if piece.parameter in own:
                    size = self.layout.parameters[piece.parameter].unit_size * (piece.last - piece.first)
                    runs = Runs(((piece.offset, piece.offset + size),)) & self.part
                    places = [self.part.local(a, b) for a, b in runs.intervals]
                    found += [(place.start, place.stop, number) for place in places]
        return found

    @property
    def activation_bytes(self) -> int:
        """Bytes of the layers' outputs."""
        return sum(b.nbytes for b in self.buffers if b is not None)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the outputs' gradients and of scratch, where they are not a lender's."""
        parts = [part for step in self.steps for part in (step.linear, step.norm) if part is not None]
        arrays = [a for part in parts for a in part.arrays()]
        return sum(a.nbytes for a in arrays) + (self.scratch.nbytes if self.lender is None else 0)

    def forward(self, x: np.ndarray) -> np.ndarray:
        """x (features, b), features in the order of the network's in_shape -> raw scores (len(classes), b).

        With `layers`, from the outputs of the one before them to those of the last, (elements, b) or images.
        """
        batch = x.shape[-1]
        self.reserve(batch)
        self.outputs = [x.reshape(*self.in_shape, batch)]
        for step, buffer in zip(self.steps, self.buffers, strict=True):
            previous = self.outputs[-1]
            if buffer is None:
                y = previous.reshape(*step.shape, batch)
            else:
                y = buffer[: step.size * batch].reshape(*step.shape, batch)
            if step.linear is not None:
                step.linear.forward(previous, y)  # type: ignore[attr-defined]
            elif step.kind == "pool":
                assert isinstance(step.spec, Pool)
                pool = self.ops.mean_pool if step.spec.kind == "mean" else self.ops.max_pool
                pool(previous, step.spec.size, y, step.activation)
            elif step.norm is not None:
                step.norm.forward(previous, y, step.activation)
            elif step.kind == "pad":
                y.fill(0)
                y[_inside(step)] = previous
            elif step.kind == "scale":
                assert isinstance(step.spec, Scale)
                if buffer is not None:
                    y[...] = previous
                self.ops.scale(y.reshape(-1), step.spec.factor)
            elif step.kind == "join":
                assert isinstance(step.spec, Join)
                if buffer is not None:
                    y[...] = previous
                if step.spec.scale != 1:
                    self.ops.scale(y.reshape(-1), step.spec.scale)
                y += self.outputs[step.partner]
            elif step.kind == "activation":
                assert isinstance(step.spec, Activation)
                if buffer is not None:
                    y[...] = previous
                self.ops.activate(step.spec.kind, y)
            self.outputs.append(y)
        return self.outputs[-1]

    def calibrate(self, minibatches: Iterable[np.ndarray]) -> None:
        """Normalize by the statistics of these minibatches (features, b) together from now on, not of each one.

        For forward passes alone.
        """
        norms = [step.norm for step in self.steps if step.norm is not None]
        for norm in norms:
            norm.fixed, norm.seen = None, []
        for x in minibatches:
            self.forward(x)
        for norm in norms:
            norm.fix()

    def borrow(self) -> None:
        """Take over what the lender's last forward computed."""
        assert self.lender is not None
        outputs = self.lender.outputs
        batch = outputs[0].shape[-1]
        self.reserve(batch)
        self.outputs = [outputs[0]]
        for theirs, step, rows, buffer in zip(outputs[1:], self.steps, self.borrowed, self.buffers, strict=True):
            if isinstance(rows, slice):
                self.outputs.append(theirs[rows])
            else:
                assert buffer is not None
                mine = buffer[: step.size * batch].reshape(*step.shape, batch)
                for at, (first, behind) in rows:
                    mine[at : at + behind - first] = theirs[first:behind]
                self.outputs.append(mine)
            if step.linear is not None:
                step.linear.prepare()  # type: ignore[attr-defined]

    def backward_through(self, dy: np.ndarray, first: int, last: int, dx: np.ndarray | None = None) -> None:
        """Write into g what the steps from `first` to `last` add to it, given the gradient dy of the last's output.

        dy is used up. dx, of the first's input, is filled with the gradient of that.
        """
        turn = 0
        for k in range(last, first - 1, -1):
            below = dx if k == first else None
            if k > first and self.steps[k].kind in ("linear", "pool", "pad"):
                below, turn = self.scratch.take(f"gradient {turn}", *self.outputs[k].shape), 1 - turn
            dy = self._step_back(k, dy, below, None)

    def backward(self, dscores: np.ndarray, sums: Sums | None = None) -> None:
        """Write the gradient of the last forward into g, given dscores (len(classes), b), which is used up.

        With `sums`, weights (k, b) and an array (k, part.size), the rows of that array are filled instead: with the
        sums of the gradients that the samples add, each times its weight.
        """
        dy, turn = dscores, 0
        lowest = self._lowest()
        for k in range(len(self.steps) - 1, lowest - 1, -1):
            dx = None
            if k > lowest and self.steps[k].kind in ("linear", "pool", "pad"):
                dx = self.scratch.take(f"gradient {turn}", *self.outputs[k].shape)
                turn = 1 - turn
            dy = self._step_back(k, dy, dx, sums)

    def _step_back(self, k: int, dy: np.ndarray, dx: np.ndarray | None, sums: Sums | None) -> np.ndarray:
        """One step of the backward pass; returns the gradient of its input where there is one, in dx or in dy."""
        step, x, y = self.steps[k], self.outputs[k], self.outputs[k + 1]
        if step.kind == "activation":
            assert isinstance(step.spec, Activation)
            self.ops.activate_back(step.spec.kind, y, dy)
            return dy
        if step.kind == "flatten":
            return dy.reshape(x.shape)
        if step.kind == "join":
            assert isinstance(step.spec, Join)
            self.scratch.take(f"past {step.partner}", *y.shape)[...] = dy
            if step.spec.scale != 1:
                self.ops.scale(dy.reshape(-1), step.spec.scale)
            return dy
        if step.kind == "scale":
            assert isinstance(step.spec, Scale)
            self.ops.scale(dy.reshape(-1), step.spec.factor)
            return dy
        if step.kind == "fork":
            dy += self.scratch.take(f"past {k}", *y.shape)
            return dy
        if step.norm is not None:
            step.norm.backward(x, y, dy, step.activation)
            if self.finished is not None:
                self.finished(k)
            return dy
        if step.kind == "pad":
            if dx is not None:
                dx[...] = dy[_inside(step)]
                return dx
            return dy
        if step.linear is not None:
            step.linear.backward(x, y, dy, dx, sums)  # type: ignore[attr-defined]
            if self.finished is not None:
                self.finished(k)
        elif dx is not None:
            assert isinstance(step.spec, Pool)
            self.ops.activate_back(step.activation, y, dy)
            if step.spec.kind == "mean":
                self.ops.mean_pool_back(dy, step.spec.size, dx)
            else:
                self.ops.max_pool_back(x, self.scratch.take("pooled", *y.shape), dy, step.spec.size, dx)
        return dy if dx is None else dx


def _inside(step: Step) -> tuple[slice, ...]:
    """Where the image lies that a step has padded."""
    assert isinstance(step.spec, Pad)
    margin = slice(step.spec.size, -step.spec.size)
    return slice(None), margin, margin


def split_layers(network: Network, parts: int) -> list[tuple[int, int]]:
    """(first, behind the last) layer of each part: whole layers with weights, with those without that follow them.

    Only the padding of a convolution's images goes with the convolution.
    """
    layers = network.layers
    starts = [
        k - (k > 0 and isinstance(layers[k - 1], Pad)) for k, layer in enumerate(layers) if isinstance(layer, Linear)
    ]
    groups = split_evenly(range(len(starts)), parts)
    # What comes before the first layer with weights goes with it.
    edges = [0, *(starts[group[0]] for group in groups[1:]), len(network.layers)]
    return list(pairwise(edges))


def layer_runs(network: Network, layout: Layout, first: int, behind: int) -> Runs:
    """The runs of the flat vector that the parameters of the layers [first, behind) are."""
    names = {p.name for layer in network.layers[first:behind] for p in layer.parameters()}
    found = []
    for piece in layout.pieces():
        parameter = layout.parameters[piece.parameter]
        if parameter.name in names:
            found.append((piece.offset, piece.offset + (piece.last - piece.first) * parameter.unit_size))
    return Runs.union(found)


def _next_activation(layers: list[tuple[LayerSpec, np.ndarray]]) -> str:
    """Take the activation that comes next from `layers`; identity where there is none."""
    if layers and isinstance(layers[0][0], Activation):
        layer, _ = layers.pop(0)
        assert isinstance(layer, Activation)
        return layer.kind
    return "identity"


def _positions(theirs: np.ndarray, mine: np.ndarray) -> slice | list[tuple[int, tuple[int, int]]]:
    """Where the units `mine` lie among `theirs`, both (units,) bool: a slice where they lie side by side.

    Else each run of them that does: its place among `mine`, and the (first, behind the last) among `theirs`.
    """
    at = np.flatnonzero(mine[theirs])
    starts = np.flatnonzero(np.diff(at, prepend=-2) != 1).tolist()
    runs = [(a, (int(at[a]), int(at[b - 1]) + 1)) for a, b in pairwise([*starts, len(at)])]
    return slice(*runs[0][1]) if len(runs) == 1 else runs
