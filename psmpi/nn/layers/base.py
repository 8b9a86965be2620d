"""The base classes of layers: `Layer`, a layer of the network, and `Part`, one rank's share of its computations.

A layer says everything that the rest of psmpi needs to know of its kind: its parameters and their initial values, the
inputs that its units use, what it costs and holds, what it absorbs of the layers that follow, and how it is exported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, ClassVar

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.layout import Layout, Parameter, Runs
from psmpi.nn.layers.table import Table
from psmpi.nn.layers.uses import Uses
from psmpi.nn.layers.workspace import Workspace

# Where the output of a layer is: in an array of its own; in its input's where nobody else needs that; a view of its
# input; or in an array that the layer itself has made room for.
NEW, OVER, VIEW, OWN = "new", "over", "view", "own"


# Kinds of initial weights, see psmpi.nn.init.
INITS = ("xavier", "he", "pytorch")

# Sums an array (k,) float64 over some ranks, in place, on the host.
Total = Callable[[np.ndarray], object]


@dataclass(frozen=True)
class Initial:
    """Initial values of a parameter: all `value`, or independent draws of U(-value, value).

    units: (first, behind the last) of those that have the value, the others are 0; None: all. widths: (units,) float64
    factors on the draws of each unit; None: 1.
    """

    law: str
    value: float
    units: tuple[int, int] | None = None
    widths: np.ndarray | None = field(default=None, compare=False)


@dataclass(frozen=True)
class SampleSums:
    """Weights of the samples (k, b), and where the weighted sums of their gradients go, (k, part's weights)."""

    weights: np.ndarray
    into: np.ndarray


@dataclass(frozen=True)
class Layer:
    """One layer: `in_shape` and `out_shape` are per sample, (channels, height, width) or (features,).

    A *unit* is an output channel or feature. Layers without weights keep their units, unless they say otherwise.
    """

    name: str
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]

    # Weighted sums of several inputs: networks are cut before such layers, and their multiplications are counted.
    linear: ClassVar[bool] = False
    # Whether the outputs of a sample depend on the other samples of its minibatch.
    couples: ClassVar[bool] = False
    # Whether each unit depends on all units of the sample: where they are on several ranks, by sums over these.
    couples_units: ClassVar[bool] = False
    # Whether it computes with exactly the input units that its outputs use: else more may come with them.
    exact: ClassVar[bool] = False
    # Whether backward needs more of a pass than the input and the output.
    keeps: ClassVar[bool] = False
    # Whether the outputs of a step depend on those of the steps before.
    recurrent: ClassVar[bool] = False
    # Whether it takes sequences from their first step to the last at once, and no chunks of them.
    whole_sequences: ClassVar[bool] = False
    # Whether passes exchange something with other ranks: backward has to come to it, weights below or not.
    exchanges: ClassVar[bool] = False
    # Whether it goes with the layer that follows it where a network is cut.
    leads: ClassVar[bool] = False
    # Whether outputs lie in the range of the inputs.
    keeps_range: ClassVar[bool] = False
    place: ClassVar[str] = NEW
    # Whether the gradient of the input goes into another array than that of the output.
    moves_gradient: ClassVar[bool] = False

    @classmethod
    def read(cls, table: Table, label: str, shape: tuple[int, ...]) -> list[Layer]:
        """The layers that a table describes for inputs of `shape`; UserError where the settings do not fit."""
        raise NotImplementedError

    @property
    def activation(self) -> str:
        """The name of the function that the layer applies to each number; nothing where it does something else."""
        return ""

    @property
    def note(self) -> str:
        """What of its inputs it leaves unused, for people; nothing where it uses all."""
        return ""

    @property
    def inner(self) -> tuple[Layer, ...]:
        """The layers inside it."""
        return ()

    def with_inner(self, layers: tuple[Layer, ...], shape: tuple[int, ...], factor: float = 1.0) -> Layer:
        """The same layer with other layers inside it, on inputs of `shape`; what these make is times `factor`."""
        raise TypeError(f"{self.name} has no layers inside it")

    def with_steps(self, steps: int) -> Layer:
        """The same layer for sequences of so many steps."""
        shapes = [(shape[0], steps) if len(shape) == 2 else shape for shape in (self.in_shape, self.out_shape)]
        return replace(self, in_shape=shapes[0], out_shape=shapes[1])

    def parameters(self) -> tuple[Parameter, ...]:
        """Its parameters, in the order of the layout."""
        return ()

    def initial(self, kind: str, gain: float) -> dict[str, Initial]:
        """Initial values of its parameters by name, 0 for those not named.

        kind: one of psmpi.nn.init's; gain: factor of Xavier weights, by what follows the layer.
        """
        return {}

    def sources(self, uses: Uses) -> Uses:
        """The users of the input units, given those of the output units."""
        return uses

    def users(self, uses: Uses) -> list[tuple[Parameter, Uses]]:
        """Each parameter with who uses its units, given who uses the output units."""
        return [(parameter, uses) for parameter in self.parameters()]

    def present(self, inputs: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """The output units of a subnetwork, (units,) bool, given the inputs it has and the outputs it wants."""
        return inputs

    def restrict(self, units: int, in_shape: tuple[int, ...]) -> Layer:
        """The same layer with `units` output units, on inputs of `in_shape`."""
        return replace(self, in_shape=in_shape, out_shape=(units, *self.out_shape[1:]))

    def absorbs(self, following: Sequence[Layer], fold: bool) -> int:
        """The number of following layers computed together with this one; `fold`: convolutions take pooling."""
        return 0

    @property
    def rank_sums(self) -> tuple[int, ...]:
        """Numbers of each sum over the ranks that share a minibatch that forward and backward make, to be exact.

        They do so by the `total` of their site; without one, a rank takes its slice for the minibatch.
        """
        return ()

    @property
    def unit_sums(self) -> tuple[int, ...]:
        """Numbers a column of each sum over the ranks that have its other units that forward and backward make.

        They do so by the `across` of their site.
        """
        return ()

    @property
    def macs(self) -> int:
        """Multiply-accumulate operations a sample of the forward pass, biases and activations not counted."""
        return 0

    def held(self, stage: Stage, batch: int, writable: bool, packed: bool) -> int:
        """Numbers that a part holds for minibatches of `batch`, besides weights, outputs of layers and the workspace.

        writable: the input may be overwritten; packed: convolutions are computed without windows.
        """
        return 0

    def workspace_numbers(self, stage: Stage, batch: int, wanted: bool, packed: bool) -> dict[str, int]:
        """Numbers that backward needs of each array of the workspace; wanted: the gradient of the input is.

        packed: as in `held`.
        """
        if not (wanted and self.moves_gradient):
            return {}
        return dict.fromkeys(("gradient 0", "gradient 1"), stage.in_size * batch)

    def part(self, stage: Stage, site: Site) -> Part:
        """The layer's part in a subnetwork: computes it with the layers that it absorbs."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Stage:
    """A layer, and those that it absorbs, in a subnetwork: which of its input and output units are there.

    inputs, kept: (units,) bool; shape: of the outputs of a sample; users: the classes that use the units; inner: the
    stages of the layers inside it.
    """

    layer: Layer
    absorbed: tuple[Layer, ...]
    inputs: np.ndarray
    kept: np.ndarray
    shape: tuple[int, ...]
    users: Uses
    inner: tuple[Stage, ...] = ()

    @property
    def size(self) -> int:
        """Numbers that it puts out a sample."""
        return prod(self.shape)

    @property
    def in_size(self) -> int:
        """Numbers that go in a sample."""
        return int(self.inputs.sum()) * prod(self.layer.in_shape[1:])

    @property
    def activation(self) -> str:
        """The function that the outputs have gone through last: an absorbed one, or the layer itself."""
        return next((one.activation for one in (*self.absorbed, self.layer) if one.activation), "identity")

    @property
    def reads_output(self) -> bool:
        """Whether backward needs the output, which then must not be overwritten."""
        return self.activation != "identity"

    @property
    def weighted(self) -> bool:
        """Whether backward has to come here: for weights, for what normalizes below them, or to exchange."""
        layer = self.layer
        return layer.linear or layer.couples or layer.exchanges or bool(layer.parameters())


@dataclass(frozen=True, eq=False)
class Site:
    """The surroundings of a part: the layout of the network, the runs of its local vector, and what it shares.

    total: sums over the ranks that have the other slices of each minibatch; None where there are none. across: sums
    over the ranks that have the other units of the same samples; None where this one has all.
    """

    layout: Layout
    part: Runs
    ops: NumpyOps
    space: Workspace
    dtype: np.dtype
    total: Total | None = None
    across: Total | None = None


def place(site: Site, parameter: str) -> int:
    """Where a parameter, whose units all have the same users, begins in the local vector."""
    at = site.layout.runs_of_parameters({parameter}).inside(site.part)
    if at is None:
        raise ValueError(f"the part has not all of {parameter}")
    return int(at.start)


class Part:
    """A stage of a subnetwork at work: forward, backward, and the views of its weights in local vectors.

    Arrays put the minibatch last: x (inputs, ..., b), y (*shape, b). w, g: views of the weights and of their gradient,
    see `views`. number: its place among all parts of the model.
    """

    def __init__(self, stage: Stage, site: Site):
        self.stage, self.layer, self.shape = stage, stage.layer, stage.shape
        # Numbers that it puts out a sample, the function that they have gone through last, and whether g has a share.
        self.size, self.activation, self.weighted = stage.size, stage.activation, stage.weighted
        self.ops, self.space, self.dtype = site.ops, site.space, site.dtype
        self.w: Any = None
        self.g: Any = None
        self.number = 0

    @property
    def inner(self) -> Sequence[Part]:
        """The parts inside it."""
        return ()

    def walk(self) -> list[Part]:
        """This part and those inside it, in the order of forward."""
        return [self]

    def views(self, vector: np.ndarray) -> Any:
        """Views of the part's weights in a local vector (part's weights,)."""
        return None

    def bind(self, w: np.ndarray, g: np.ndarray | None) -> None:
        """Compute with these weights, and write their gradient into g."""
        self.w, self.g = self.views(w), None if g is None else self.views(g)

    def room(self, batch: int, writable: bool) -> Any:
        """Room for a pass of up to `batch` samples, besides its output; writable: it may overwrite its input."""
        return None

    def reserve(self, batch: int) -> None:
        """Make room for what all passes share, for up to `batch` samples."""

    def reserve_backward(self, batch: int, wanted: bool) -> None:
        """Make room for what backward passes share; wanted: that of the input's gradient too."""

    def prepare(self) -> None:
        """Get ready for a backward pass without a forward pass."""

    def forward(self, x: np.ndarray, y: np.ndarray | None, room: Any) -> tuple[np.ndarray, Any]:
        """Compute the outputs, in y where there is one; returns them, and what backward needs besides x and y."""
        raise NotImplementedError

    def backward(
        self, x: np.ndarray, y: np.ndarray, kept: Any, dy: np.ndarray, dx: np.ndarray | None, into: Any
    ) -> np.ndarray:
        """The gradient of x from that of y, dy, which is used up; in dx where the layer `moves_gradient`.

        With dx = None the gradient of x is not wanted. into: where the gradients of the weights are written (`views`),
        None where they are not wanted, or `SampleSums`.
        """
        raise NotImplementedError

    def gather_statistics(self) -> None:
        """From now on gather the statistics of the minibatches of forward passes."""

    def fix_statistics(self) -> None:
        """From now on use those gathered, each minibatch counting alike, in place of each minibatch's own."""

    def statistics(self) -> dict[str, np.ndarray]:
        """The fixed statistics by name, (units,) each: means, and variances, to which EPS is yet to be added."""
        return {}

    def arrays(self) -> list[Any]:
        """Arrays, and objects with `nbytes`, that it holds besides weights, what passes keep, and the workspace."""
        return []

    def export(self, graph: Any, value: str) -> str:
        """Add the layer without what it absorbs to an ONNX graph (psmpi.inspect.export); returns its output's name."""
        raise NotImplementedError
