"""Networks as data: what the layers are, what shapes they give, and which inputs and weights each score depends on."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from psmpi.errors import UserError
from psmpi.layout import Layout, Parameter, make_layout

ACTIVATIONS = ("sigmoid", "tanh", "relu", "identity")
POOLS = ("mean", "max")

# Which classes' scores depend on a layer's units: runs (first, last, classes) of units with the same classes.
Uses = tuple[tuple[int, int, frozenset[int]], ...]


def _joined(runs: Iterable[tuple[int, int, frozenset[int]]]) -> Uses:
    """Runs in order, neighbours of the same classes made one."""
    joined: list[tuple[int, int, frozenset[int]]] = []
    for first, last, classes in runs:
        if joined and joined[-1][2] == classes:
            joined[-1] = (joined[-1][0], last, classes)
        elif first < last:
            joined.append((first, last, classes))
    return tuple(joined)


def _grouped(uses: Uses, size: int, count: int) -> list[frozenset[int]]:
    """For each of `count` groups of `size` consecutive units, the classes that use any of them."""
    members: list[list[frozenset[int]]] = [[] for _ in range(count)]
    for first, last, classes in uses:
        for group in range(first // size, -(-last // size)):
            members[group].append(classes)
    return [one[0] if len(one) == 1 else frozenset().union(*one) for one in members]


@dataclass(frozen=True)
class LayerSpec:
    """One layer: `in_shape` and `out_shape` are per sample, (channels, height, width) or (features,).

    A *unit* is an output channel or feature. Layers without weights keep their units; Flatten turns each into
    height x width of them.
    """

    name: str
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]

    def sources(self, uses: Uses) -> Uses:
        """Who uses the input units, given who uses the output units."""
        return uses

    def parameters(self) -> tuple[Parameter, ...]:
        return ()


@dataclass(frozen=True)
class Linear(LayerSpec):
    """Weights in `groups` groups: output unit u of group m sees the `group_inputs` consecutive inputs of block m."""

    groups: int
    bias: bool = field(default=True, kw_only=True)

    @property
    def units(self) -> int:
        return self.out_shape[0]

    @property
    def group_inputs(self) -> int:
        return self.in_shape[0] // self.groups

    @property
    def unit_size(self) -> int:
        """Weights of one output unit."""
        return self.group_inputs

    @property
    def fans(self) -> tuple[int, int]:
        """(fan_in, fan_out) of one group, for the initialisation."""
        return self.group_inputs, self.units // self.groups

    def _bias(self) -> tuple[Parameter, ...]:
        return (Parameter(f"{self.name}.bias", (self.units,), self.units),) if self.bias else ()

    def sources(self, uses: Uses) -> Uses:
        n = self.group_inputs
        groups = enumerate(_grouped(uses, self.units // self.groups, self.groups))
        seen = [(g * n, (g + 1) * n, classes) for g, classes in groups]
        return _joined([*seen, (self.groups * n, self.in_shape[0], frozenset())])


@dataclass(frozen=True)
class Dense(Linear):
    """y = W x + b; with groups > 1 block-diagonal, inputs beyond groups x group_inputs ignored (psl paper's SL)."""

    def parameters(self) -> tuple[Parameter, ...]:
        size = (self.units, self.group_inputs)
        shape = size if self.groups == 1 else (self.groups, self.units // self.groups, self.group_inputs)
        return Parameter(f"{self.name}.weight", shape, self.units), *self._bias()


@dataclass(frozen=True)
class Conv(Linear):
    """Valid cross-correlation with stride 1 and bias, kernel x kernel; with groups > 1 a separable convolution."""

    kernel: int

    @property
    def unit_size(self) -> int:
        return self.group_inputs * self.kernel**2

    @property
    def fans(self) -> tuple[int, int]:
        return self.unit_size, self.units // self.groups * self.kernel**2

    def parameters(self) -> tuple[Parameter, ...]:
        shape = (self.units, self.group_inputs, self.kernel, self.kernel)
        return Parameter(f"{self.name}.weight", shape, self.units), *self._bias()


@dataclass(frozen=True)
class BatchNorm(LayerSpec):
    """Each unit's values over the minibatch less their mean, over their standard deviation; then scaled and shifted.

    Ioffe and Szegedy (2015), with the statistics of the minibatch in evaluations too: none are kept. With `affine`, the
    scale and the shift are parameters; else there are none.
    """

    affine: bool

    def parameters(self) -> tuple[Parameter, ...]:
        units = self.out_shape[0]
        names = ("weight", "bias") if self.affine else ()
        return tuple(Parameter(f"{self.name}.{name}", (units,), units) for name in names)


@dataclass(frozen=True)
class Pad(LayerSpec):
    """`size` rows and columns of zeros around each image."""

    size: int


@dataclass(frozen=True)
class Scale(LayerSpec):
    """Everything times one number."""

    factor: float


@dataclass(frozen=True)
class Fork(LayerSpec):
    """Where a residual block begins: what comes in goes into the branch and past it, to the Join of the same block."""


@dataclass(frozen=True)
class Join(LayerSpec):
    """Where a residual block ends: `scale` times what comes out of the branch, plus what went past it."""

    scale: float


@dataclass(frozen=True)
class Pool(LayerSpec):
    """Mean or max over size x size windows with stride `size`; rows and columns that do not fill one are dropped."""

    kind: str
    size: int


@dataclass(frozen=True)
class Activation(LayerSpec):
    kind: str


@dataclass(frozen=True)
class Flatten(LayerSpec):
    """Channel-major: feature f belongs to channel f // (height x width)."""

    def sources(self, uses: Uses) -> Uses:
        channels = _grouped(uses, prod(self.in_shape[1:]), self.in_shape[0])
        return _joined((c, c + 1, classes) for c, classes in enumerate(channels))


@dataclass(frozen=True)
class Network:
    """Layers from `in_shape` to one raw score a class."""

    name: str
    in_shape: tuple[int, ...]
    layers: tuple[LayerSpec, ...]

    @property
    def classes(self) -> int:
        return self.layers[-1].out_shape[0]

    @property
    def linear(self) -> tuple[Linear, ...]:
        return tuple(layer for layer in self.layers if isinstance(layer, Linear))

    @property
    def normalized(self) -> bool:
        """Whether scores of a sample depend on the others of its minibatch, through batch normalization."""
        return any(isinstance(layer, BatchNorm) for layer in self.layers)

    @property
    def residual(self) -> bool:
        return any(isinstance(layer, Fork) for layer in self.layers)

    def evaluation_batches(self, samples: int) -> list[slice]:
        """The minibatches that an evaluation of `samples` samples takes, in their order, whoever takes them.

        They stay in the cache; with batch normalization they are large, for the sake of its statistics, and no last one
        is much smaller.
        """
        if not self.normalized:
            return [slice(k, min(k + 100, samples)) for k in range(0, samples, 100)]
        edges = np.linspace(0, samples, 1 + max(1, round(samples / 1000))).astype(int).tolist()
        return [slice(a, b) for a, b in itertools.pairwise(edges) if a < b]

    def uses(self) -> list[Uses]:
        """For each layer, which classes' scores depend on its output units."""
        uses: Uses = tuple((c, c + 1, frozenset([c])) for c in range(self.classes))
        found, past = [], []
        for layer in reversed(self.layers):
            found.append(uses)
            if isinstance(layer, Join):
                past.append(uses)
            uses = layer.sources(uses)
            if isinstance(layer, Fork) and uses != past.pop():
                raise UserError(
                    f"model {self.name!r}, {layer.name}: the units that go past this residual block are not of the "
                    "same classes as those that its branch reads: use as many groups in all of its layers"
                )
        return found[::-1]

    def kept(self, classes: Sequence[int]) -> list[np.ndarray]:
        """For each layer, which of its output units, (units,) bool, the scores of `classes` depend on."""
        wanted, masks = frozenset(classes), []
        for layer, uses in zip(self.layers, self.uses(), strict=True):
            mask = np.zeros(layer.out_shape[0], bool)
            for first, last, users in uses:
                mask[first:last] = not wanted.isdisjoint(users)
            masks.append(mask)
        return masks

    def layout(self) -> Layout:
        """The flat vector of this network, ordered by which scores use what."""
        parameters, uses = [], []
        for layer, users in zip(self.layers, self.uses(), strict=True):
            for parameter in layer.parameters():
                parameters.append(parameter)
                uses.append(users)
        return make_layout(parameters, uses, self.classes)

    def tie(self) -> str | None:
        """The name of the last layer with weights, before the scores' own rows, that makes every score see all of it.

        None where the network can be partitioned: where some layer before has units that not all classes use, or where
        there is no layer before.
        """
        weighted = [(layer, users) for layer, users in zip(self.layers, self.uses(), strict=True)
                    if isinstance(layer, Linear)][:-1]  # fmt: skip
        if not weighted or any(0 < len(users) < self.classes for _, runs in weighted for _, _, users in runs):
            return None
        return weighted[-1][0].name


def build(name: str, in_shape: tuple[int, ...], layers: Sequence[Mapping[str, Any]], classes: int) -> Network:
    """A network from layer tables, the form of a configuration file's [[model.layers]].

    Each table has `type` (dense, separable_dense, conv, separable_conv, mean_pool, max_pool, sigmoid, tanh, relu,
    identity, flatten, batch_norm, residual) and that type's settings: `units`, `groups`, `channels`, `kernel`, `pad`,
    `size`, `bias` (true), `affine` (true), and of residual `layers` and `scale` (1.0). UserError names the layer and
    what does not fit.
    """
    specs: list[LayerSpec] = []
    shape = _append(specs, layers, tuple(in_shape), name, {})
    network = Network(name, tuple(in_shape), tuple(specs))
    if not specs or not network.linear:
        raise UserError(f"model {name!r} has no layer with weights")
    if shape != (classes,):
        raise UserError(
            f"model {name!r} ends in shape {shape}; the data set has {classes} classes: expected ({classes},)"
        )
    network.uses()
    return network


def _append(
    specs: list[LayerSpec], layers: Any, shape: tuple[int, ...], name: str, counts: dict[str, int]
) -> tuple[int, ...]:
    """Append the layers of these tables to `specs`; returns the shape that they end in."""
    if not isinstance(layers, Sequence) or isinstance(layers, str):
        raise UserError(f"model {name!r}: layers = {layers!r}; expected a list of tables")
    for table in layers:
        if not isinstance(table, Mapping):
            raise UserError(
                f'model {name!r}, layer {len(specs) + 1}: {table!r} is not a table like {{type = "dense", units = 10}}'
            )
        settings = dict(table)
        kind = str(settings.pop("type", "(none)"))
        base = {"separable_conv": "conv", "separable_dense": "dense"}.get(kind, kind)
        counts[base] = counts.get(base, 0) + 1
        label = f"{base}{counts[base]}"
        where = f"model {name!r}, layer {len(specs) + 1} ({label})"
        try:
            if kind == "residual":
                scale = settings.pop("scale", 1.0)
                if not isinstance(scale, float | int) or isinstance(scale, bool) or not 0 < abs(scale) <= 1e6:
                    raise UserError(f"{where}: scale = {scale!r}; expected a number other than 0")
                specs.append(Fork(label, shape, shape))
                behind = _append(specs, settings.pop("layers"), shape, name, counts)
                if behind != shape:
                    raise UserError(f"{where}: its layers make {behind} of {shape}, and the two are to be added")
                specs.append(Join(label, shape, shape, float(scale)))
            else:
                pad = settings.pop("pad", 0) if base == "conv" else 0
                if not isinstance(pad, int) or isinstance(pad, bool) or pad < 0:
                    raise UserError(f"{where}: pad = {pad!r}; expected a whole number")
                if pad and len(shape) == 3:
                    padded = (shape[0], shape[1] + 2 * pad, shape[2] + 2 * pad)
                    specs.append(Pad(f"{label}.pad", shape, padded, pad))
                    shape = padded
                specs.append(_layer(kind, label, shape, settings, where))
        except KeyError as missing:
            raise UserError(f"{where}: a {kind} layer needs {missing}") from None
        if settings:
            raise UserError(f"{where}: unknown setting(s) {', '.join(settings)} for a {kind} layer")
        shape = specs[-1].out_shape
    return shape


def _layer(kind: str, label: str, shape: tuple[int, ...], settings: dict[str, Any], where: str) -> LayerSpec:
    def take(key: str) -> int:
        value = settings.pop(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{where}: {key} = {value!r}; expected a whole number above 0")
        return value

    def flag(key: str) -> bool:
        value = settings.pop(key, True)
        if not isinstance(value, bool):
            raise UserError(f"{where}: {key} = {value!r}; expected true or false")
        return value

    def image() -> tuple[int, int, int]:
        if len(shape) != 3:
            raise UserError(f"{where}: {kind} needs (channels, height, width), its input has shape {shape}")
        return shape[0], shape[1], shape[2]

    if kind in ACTIVATIONS:
        return Activation(label, shape, shape, kind)
    if kind == "flatten":
        return Flatten(label, shape, (prod(shape),))
    if kind in ("mean_pool", "max_pool"):
        c, h, w = image()
        size = take("size") if "size" in settings else 2
        if min(h, w) < size:
            raise UserError(f"{where}: a window of {size} x {size} does not fit in {h} x {w}")
        return Pool(label, shape, (c, h // size, w // size), kind.split("_")[0], size)
    if kind in ("conv", "separable_conv"):
        c, h, w = image()
        units, kernel = take("channels"), take("kernel")
        groups = take("groups") if kind == "separable_conv" else 1
        if min(h, w) < kernel:
            raise UserError(f"{where}: a kernel of {kernel} x {kernel} does not fit in {h} x {w}")
        if units % groups or c % groups:
            raise UserError(f"{where}: {c} input and {units} output channels do not divide into {groups} groups")
        return Conv(label, shape, (units, h - kernel + 1, w - kernel + 1), groups, kernel, bias=flag("bias"))
    if kind in ("dense", "separable_dense"):
        if len(shape) != 1:
            raise UserError(
                f"{where}: {kind} needs a flat input, its input has shape {shape}; add a flatten layer before"
            )
        units = take("units")
        groups = take("groups") if kind == "separable_dense" else 1
        if units % groups or shape[0] < groups:
            raise UserError(f"{where}: {shape[0]} inputs and {units} units cannot be cut into {groups} groups")
        return Dense(label, shape, (units,), groups, bias=flag("bias"))
    if kind == "batch_norm":
        return BatchNorm(label, shape, shape, flag("affine"))
    known = (
        "dense, separable_dense, conv, separable_conv, mean_pool, max_pool, flatten, batch_norm, residual, "
        + ", ".join(ACTIVATIONS)
    )
    raise UserError(f"{where}: unknown layer type {kind!r}; known are {known}")
