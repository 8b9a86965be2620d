"""Base classes of layers: `Layer`, a layer of the network, and `Part`, one rank's share of the layer's computations.

A kind of layer is a pair of subclasses, which state all that the rest of psmpi needs to know: parameters and initial
values, inputs that each unit uses, operations and memory, following layers that the layer absorbs, and its ONNX export.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, ClassVar

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.errors import UserError
from psmpi.layout import Layout, Parameter, Runs
from psmpi.nn.layers.table import Table
from psmpi.nn.layers.uses import Uses
from psmpi.nn.layers.workspace import Workspace

# Memory of a layer's output: a separate array; the input's array, if nothing else needs the input; a view of the input;
# or an array that the layer allocates itself.
NEW, OVER, VIEW, OWN = "new", "over", "view", "own"


# Kinds of initial weights, see psmpi.nn.init.
INITS = ("xavier", "he", "pytorch")

# Function that sums an array (k,) float64 over some ranks, in place, on the host.
Total = Callable[[np.ndarray], object]


@dataclass(frozen=True)
class Initial:
    """Initial values of a parameter: all `value`, or independent draws from U(-value, value).

    law: "constant" or "uniform". units: units [first, last) with these values, all other units are 0; None: all units.
    widths: (units,) float64 factors on the draws of each unit; None: 1.
    """

    law: str
    value: float
    units: tuple[int, int] | None = None
    widths: np.ndarray | None = field(default=None, compare=False)


@dataclass(frozen=True)
class SampleSums:
    """Weights of the samples (k, b), and the array for the weighted sums of their gradients, (k, part's weights)."""

    weights: np.ndarray
    into: np.ndarray


@dataclass(frozen=True)
class Layer:
    """One layer; `in_shape` and `out_shape`: shapes of a sample.

    Shapes are (channels, height, width), (features, steps) or (features,). A *unit* is an output channel or feature.
    A layer without weights keeps the units of its input, unless its class overrides this.
    """

    name: str
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]

    # Whether units are weighted sums of several inputs: networks are cut before such layers, and their multiplications
    # are counted.
    linear: ClassVar[bool] = False
    # Whether the outputs of a sample depend on the other samples of its minibatch.
    couples: ClassVar[bool] = False
    # Whether each unit depends on all units of the sample: ranks that share the units need sums over these ranks.
    couples_units: ClassVar[bool] = False
    # Whether the layer takes exactly the input units that its outputs use; other layers accept additional input units.
    exact: ClassVar[bool] = False
    # Whether backward needs more arrays of the forward pass than the input and the output.
    keeps: ClassVar[bool] = False
    # Whether the outputs of a step depend on the outputs of earlier steps.
    recurrent: ClassVar[bool] = False
    # Whether the layer needs whole sequences, and cannot compute them in chunks.
    whole_sequences: ClassVar[bool] = False
    # Whether passes communicate with other ranks: backward must then reach the layer, even without weights below it.
    exchanges: ClassVar[bool] = False
    # Whether a cut of the network keeps the layer together with the layer after it.
    leads: ClassVar[bool] = False
    # Whether outputs lie in the range of the inputs.
    keeps_range: ClassVar[bool] = False
    place: ClassVar[str] = NEW
    # Whether the gradient of the input needs another array than the gradient of the output.
    moves_gradient: ClassVar[bool] = False

    @classmethod
    def read(cls, table: Table, label: str, shape: tuple[int, ...]) -> list[Layer]:
        """Return the layers that a table describes for inputs of `shape`; raise UserError for settings that do not fit.

        label: name of the layer.
        """
        raise NotImplementedError

    @property
    def activation(self) -> str:
        """Name of the function that an activation layer applies to each number; "" for other layers."""
        return ""

    @property
    def note(self) -> str:
        """Message about inputs that the layer does not use; "" if it uses all of them."""
        return ""

    @property
    def inner(self) -> tuple[Layer, ...]:
        """Layers inside this layer."""
        return ()

    def with_inner(self, layers: tuple[Layer, ...], shape: tuple[int, ...], factor: float = 1.0) -> Layer:
        """Return the layer with other inner layers, on inputs of `shape`; their output is multiplied by `factor`."""
        raise TypeError(f"{self.name} has no layers inside it")

    def with_steps(self, steps: int) -> Layer:
        """Return the same layer for sequences of `steps` steps."""
        shapes = [(shape[0], steps) if len(shape) == 2 else shape for shape in (self.in_shape, self.out_shape)]
        return replace(self, in_shape=shapes[0], out_shape=shapes[1])

    def parameters(self) -> tuple[Parameter, ...]:
        """Return the layer's parameters, in the order of the layout."""
        return ()

    def initial(self, kind: str, gain: float) -> dict[str, Initial]:
        """Return initial values of the layer's parameters, by name; parameters that are not named start at 0.

        kind: one of INITS; gain: factor of Xavier weights, which depends on the layer that follows.
        """
        return {}

    def sources(self, uses: Uses) -> Uses:
        """Return the users of the input units, given the users of the output units."""
        return uses

    def users(self, uses: Uses) -> list[tuple[Parameter, Uses]]:
        """Return each parameter with the users of its units, given the users of the output units."""
        return [(parameter, uses) for parameter in self.parameters()]

    def present(self, inputs: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Return the output units of a subnetwork, (units,) bool, given its input units and the output units it wants.

        inputs: (input units,) bool; wanted: (units,) bool.
        """
        return inputs

    def restrict(self, units: int, in_shape: tuple[int, ...]) -> Layer:
        """Return the same layer with `units` output units, on inputs of `in_shape`."""
        return replace(self, in_shape=in_shape, out_shape=(units, *self.out_shape[1:]))

    def absorbs(self, following: Sequence[Layer], fold: bool) -> int:
        """Return how many following layers this layer computes as well; fold: convolutions absorb mean pooling."""
        return 0

    @property
    def rank_sums(self) -> tuple[int, ...]:
        """Length of each sum over the ranks that share a minibatch, in forward and backward.

        The layer's part calls `Site.total` for these sums. Without `total`, a rank treats its slice as the minibatch.
        """
        return ()

    @property
    def unit_sums(self) -> tuple[int, ...]:
        """Numbers per column of each sum over the ranks that have the layer's other units, in forward and backward.

        The layer's part calls `Site.across` for these sums.
        """
        return ()

    @property
    def macs(self) -> int:
        """Multiply-accumulate operations per sample in the forward pass, without biases and activations."""
        return 0

    def buffer_numbers(self, stage: Stage, batch: int, writable: bool, packed: bool) -> int:
        """Return how many numbers a part holds for minibatches of `batch`, besides weights, outputs and the workspace.

        writable: the input may be overwritten; packed: convolutions are computed without windows.
        """
        return 0

    def workspace_numbers(self, stage: Stage, batch: int, wanted: bool, packed: bool) -> dict[str, int]:
        """Return how many numbers backward needs of each array of the workspace, by the array's name.

        wanted: the gradient of the input is needed; packed: as in `buffer_numbers`.
        """
        if not (wanted and self.moves_gradient):
            return {}
        return dict.fromkeys(("gradient 0", "gradient 1"), stage.in_size * batch)

    def part(self, stage: Stage, site: Site) -> Part:
        """Return the part that computes the layer, and the layers that it absorbs, in a subnetwork."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Stage:
    """A layer of a subnetwork, with the layers that it absorbs, and the input and output units that are present.

    inputs: (input units,) bool; outputs: (units,) bool; shape: shape of a sample's outputs; users: users of all output
    units; inner: stages of the layers inside this layer.
    """

    layer: Layer
    absorbed: tuple[Layer, ...]
    inputs: np.ndarray
    outputs: np.ndarray
    shape: tuple[int, ...]
    users: Uses
    inner: tuple[Stage, ...] = ()

    @property
    def size(self) -> int:
        """Output numbers per sample."""
        return prod(self.shape)

    @property
    def in_size(self) -> int:
        """Input numbers per sample."""
        return int(self.inputs.sum()) * prod(self.layer.in_shape[1:])

    @property
    def activation(self) -> str:
        """Activation that the stage applies last: an absorbed one or the layer's; "identity" if there is none."""
        return next((one.activation for one in (*self.absorbed, self.layer) if one.activation), "identity")

    @property
    def reads_output(self) -> bool:
        """Whether backward needs the output, which must then not be overwritten."""
        return self.activation != "identity"

    @property
    def weighted(self) -> bool:
        """Whether backward must reach this stage: it has weights, couples samples or communicates."""
        layer = self.layer
        return layer.linear or layer.couples or layer.exchanges or bool(layer.parameters())


@dataclass(frozen=True, eq=False)
class Site:
    """Surroundings of a part: layout of the network, runs of the local vector, operations, workspace and dtype.

    total: sums over the ranks that have the other slices of each minibatch; None without such ranks. across: sums over
    the ranks that have the other units of the same samples; None if this rank has all units.
    """

    layout: Layout
    part: Runs
    ops: NumpyOps
    space: Workspace
    dtype: np.dtype
    total: Total | None = None
    across: Total | None = None


def place(site: Site, parameter: str) -> int:
    """Return where a parameter begins in the local vector; raise ValueError unless it is contiguous there."""
    at = site.layout.runs_of_parameters({parameter}).inside(site.part)
    if at is None:
        raise ValueError(f"the part does not have all of {parameter} in one run")
    return int(at.start)


class Part:
    """A stage with its arrays: forward, backward, and views of the stage's weights in local vectors.

    The minibatch is the last axis of arrays: x (inputs, ..., b), y (*shape, b). w, g: views of the weights and of their
    gradient, see `views`. number: index among all parts of the model.
    """

    def __init__(self, stage: Stage, site: Site):
        self.stage, self.layer, self.shape = stage, stage.layer, stage.shape
        # See the properties of `Stage`.
        self.size, self.activation, self.weighted = stage.size, stage.activation, stage.weighted
        self.ops, self.space, self.dtype = site.ops, site.space, site.dtype
        self.w: Any = None
        self.g: Any = None
        self.number = 0

    @property
    def inner(self) -> Sequence[Part]:
        """Parts inside this part."""
        return ()

    def walk(self) -> list[Part]:
        """Return this part and the parts inside it, in the order of forward."""
        return [self]

    def views(self, vector: np.ndarray) -> Any:
        """Return views of the part's weights in a local vector (local size,)."""
        return None

    def bind(self, w: np.ndarray, g: np.ndarray | None) -> None:
        """Compute with the weights in w from now on, and write their gradient into g; w, g: local vectors."""
        self.w, self.g = self.views(w), None if g is None else self.views(g)

    def room(self, batch: int, writable: bool) -> Any:
        """Return arrays for a pass of up to `batch` samples, besides the output; writable: the input may be changed."""
        return None

    def reserve(self, batch: int) -> None:
        """Allocate the memory that all passes share, for up to `batch` samples."""

    def reserve_backward(self, batch: int, wanted: bool) -> None:
        """Allocate the memory that backward passes share; wanted: the gradient of the input is needed."""

    def prepare(self) -> None:
        """Prepare a backward pass that follows no forward pass."""

    def forward(self, x: np.ndarray, y: np.ndarray | None, room: Any) -> tuple[np.ndarray, Any]:
        """Compute the outputs, in y unless it is None; return them, and what backward needs besides x and y.

        room: result of `self.room`.
        """
        raise NotImplementedError

    def backward(
        self, x: np.ndarray, y: np.ndarray, kept: Any, dy: np.ndarray, dx: np.ndarray | None, into: Any
    ) -> np.ndarray:
        """Return the gradient of x, given the gradient dy of y, which is overwritten.

        dx: array for the gradient of x if the layer `moves_gradient`; None: the gradient of x is not needed. into:
        views for the gradients of the weights, `SampleSums` for weighted sums of them, or None if they are not needed.
        """
        raise NotImplementedError

    def gather_statistics(self) -> None:
        """Gather the statistics of each minibatch of forward passes from now on."""

    def fix_statistics(self) -> None:
        """Use the joint statistics of the gathered minibatches, with equal weights, instead of each minibatch's."""

    def statistics(self) -> dict[str, np.ndarray]:
        """Return the fixed statistics by name, (units,) each: means, and variances without EPS."""
        return {}

    def arrays(self) -> list[Any]:
        """Return arrays, and objects with `nbytes`, that the part holds besides weights, passes and the workspace."""
        return []

    def export(self, graph: Any, value: str) -> str:
        """Add the layer without absorbed layers to an ONNX graph (psmpi.inspect.export); return its output's name.

        UserError if the layer has no export.
        """
        raise UserError(
            f"layer {self.layer.name} has no ONNX export: write Part.export of it, or export .safetensors or .npz"
        )
