"""Recurrent layers: tanh networks (Elman 1990), LSTM (Hochreiter and Schmidhuber 1997), GRU (Cho et al. 2014)."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod, sqrt
from typing import Any, ClassVar

import numpy as np

from psmpi.backend import CELLS
from psmpi.errors import UserError
from psmpi.layout import Parameter
from psmpi.nn.layers.base import Initial, Layer, Part, Site, Stage, place
from psmpi.nn.layers.table import Table
from psmpi.nn.layers.uses import Uses, grouped, stretched

# By kind: the ONNX operator, and the index here of each gate in ONNX order.
ONNX = {"rnn": ("RNN", (0,)), "gru": ("GRU", (1, 0, 2)), "lstm": ("LSTM", (0, 3, 1, 2))}


@dataclass(frozen=True)
class Recurrent(Layer):
    """Recurrent layer: states h_t from h_{t-1} and x_t, which are the outputs of each step; h_0 = 0.

    rnn: h = tanh(W x + U h' + b). lstm: [i f g o] = W x + U h' + b, c = sig(f) c' + sig(i) tanh(g), h = sig(o) tanh(c).
    gru, with the reset after the product as in cuDNN: [r z] = sig(W x + b + U h' + b_u) in the first two thirds of the
    rows, n = tanh(W x + b + r (U h' + b_u)) in the last third, h = (1 - z) n + z h'. States stay constant after the end
    of a sequence.
    """

    kind: str
    bias: bool = field(default=True, kw_only=True)

    linear: ClassVar[bool] = True
    keeps: ClassVar[bool] = True
    moves_gradient: ClassVar[bool] = True
    recurrent: ClassVar[bool] = True

    @classmethod
    def read(cls, table: Table, label: str, shape: tuple[int, ...]) -> list[Layer]:
        _, steps = table.sequence(shape)
        return [cls(label, shape, (table.whole("units"), steps), table.kind, bias=table.flag("bias"))]

    @property
    def units(self) -> int:
        return self.out_shape[0]

    @property
    def rows(self) -> int:
        """Rows of the layer's matrices, over all gates."""
        return CELLS[self.kind][0] * self.units

    @property
    def macs(self) -> int:
        return self.out_shape[1] * self.rows * (self.in_shape[0] + self.units)

    def parameters(self) -> tuple[Parameter, ...]:
        rows = self.rows
        shapes: dict[str, tuple[int, ...]] = {"weight": (rows, self.in_shape[0]), "recurrent": (rows, self.units)}
        if self.bias:
            shapes["bias"] = (rows,)
        if self.bias and self.kind == "gru":
            shapes["recurrent_bias"] = (rows,)
        return tuple(Parameter(f"{self.name}.{name}", shape, rows) for name, shape in shapes.items())

    def initial(self, kind: str, gain: float) -> dict[str, Initial]:
        """Return draws for the matrices, and 1 for the biases of an lstm's forget gate (Jozefowicz et al. 2015)."""
        initials, inputs = {}, self.in_shape[0]
        for name, fan_in in (("weight", inputs), ("recurrent", self.units)):
            xavier, he, pytorch = sqrt(6 / (fan_in + self.units)), sqrt(6 / fan_in), 1 / sqrt(self.units)
            width = {"xavier": xavier, "he": he, "pytorch": pytorch}[kind]
            initials[f"{self.name}.{name}"] = Initial("uniform", width)
        if self.bias and self.kind == "lstm":
            initials[f"{self.name}.bias"] = Initial("constant", 1.0, (self.units, 2 * self.units))
        return initials

    def sources(self, uses: Uses) -> Uses:
        return stretched(grouped(uses, self.units), self.in_shape[0])

    def users(self, uses: Uses) -> list[tuple[Parameter, Uses]]:
        # Each unit depends on all units of the step before, so its users are those of any unit.
        return [(parameter, stretched(grouped(uses, self.units), self.rows)) for parameter in self.parameters()]

    def present(self, inputs: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        return np.full(self.units, wanted.any())

    def restrict(self, units: int, in_shape: tuple[int, ...]) -> Layer:
        if units != self.units or in_shape[0] != self.in_shape[0]:
            raise UserError(f"the units of {self.name} depend on each other and cannot be dealt out one by one")
        return super().restrict(units, in_shape)

    def buffer_numbers(self, stage: Stage, batch: int, writable: bool, packed: bool) -> int:
        gates, carried, kept = CELLS[self.kind]
        # Gates and other arrays of each step for backward; states before and after a pass, and their gradient.
        numbers = ((gates + kept) * self.out_shape[1] + 3 * carried) * self.units * batch
        # Packed weights for forward and for backward, and states in whole vectors.
        return numbers + (2 * gates * self.units + (2 * gates + 1) * (batch + 15)) * self.units * packed

    def workspace_numbers(self, stage: Stage, batch: int, wanted: bool, packed: bool) -> dict[str, int]:
        return {
            **super().workspace_numbers(stage, batch, wanted, packed),
            "states before": prod(self.out_shape) * batch,
        }

    def part(self, stage: Stage, site: Site) -> Part:
        return RecurrentPart(stage, site)


class RecurrentPart(Part):
    """Part of a recurrent layer: x (inputs, steps, b) -> h (units, steps, b)."""

    def __init__(self, stage: Stage, site: Site):
        super().__init__(stage, site)
        assert isinstance(self.layer, Recurrent)
        self.recurrence = self.ops.recurrence(self.layer.kind, self.layer.units, site.dtype)
        self.shapes = {p.name: p.shape for p in self.layer.parameters()}
        self.places = {name: place(site, name) for name in self.shapes}
        self.rows, self.inputs = self.layer.rows, self.layer.in_shape[0]
        self.units, self.steps = self.layer.out_shape
        # States after the latest chunk of a forward pass, and gradient of the states before the latest chunk of a
        # backward pass.
        self.state = self.carry = self.ops.empty(0, site.dtype)
        self.zeros = self.ops.zeros(self.rows, site.dtype)

    def views(self, vector: np.ndarray) -> Any:
        """Return the layer's parameters, by name without the layer's name."""
        return {
            name.rpartition(".")[2]: vector[at : at + prod(self.shapes[name])].reshape(self.shapes[name])
            for name, at in self.places.items()
        }

    def room(self, batch: int, writable: bool) -> Any:
        """Return arrays for the gates, for other values that backward needs, and for the states before the pass."""
        r, size = self.recurrence, self.units * batch
        return tuple(
            self.ops.empty(count * size, self.dtype) for count in (r.gates * self.steps, r.kept * self.steps, r.carried)
        )

    def reserve(self, batch: int) -> None:
        self.recurrence.reserve(batch)
        size = self.recurrence.carried * self.units * batch
        if self.state.size < size:
            self.state, self.carry = (self.ops.empty(size, self.dtype) for _ in range(2))

    def arrays(self) -> list[np.ndarray]:
        return [self.state, self.carry, *self.recurrence.arrays()]

    def reserve_backward(self, batch: int, wanted: bool) -> None:
        self.space.take("states before", self.units * self.steps * batch)

    def prepare(self) -> None:
        self.recurrence.prepare(self.w["recurrent"])

    def forward(self, x: np.ndarray, y: np.ndarray | None, room: Any) -> tuple[np.ndarray, Any]:
        assert y is not None
        k, b = x.shape[1:]
        span, r, n = self.space.span, self.recurrence, self.units * b
        a = room[0][: r.gates * n * k].reshape(self.rows, k, b)
        more = room[1][: r.kept * n * k].reshape(r.kept, self.units, k, b)
        before, state = (array[: r.carried * n].reshape(r.carried, self.units, b) for array in (room[2], self.state))
        if span.begins:
            before.fill(0)
            self.prepare()
        else:
            before[...] = state
        flat = a.reshape(self.rows, k * b)
        self.ops.matmul(self.w["weight"], x.reshape(self.inputs, k * b), flat)
        if "bias" in self.w:
            self.ops.add_bias(flat[None], self.w["bias"][None])
        r.forward(a, self.w.get("recurrent_bias"), before, y, more, span.lengths)
        if not span.ends:
            state[0] = y[:, -1]
            if r.carried > 1:
                state[1:] = more[:, :, -1]
        return y, (a, more, before, span)

    def backward(
        self, x: np.ndarray, y: np.ndarray, kept: Any, dy: np.ndarray, dx: np.ndarray | None, into: Any
    ) -> np.ndarray:
        (k, b), r = x.shape[1:], self.recurrence
        # Backward overwrites these arrays.
        a, more, before, span = kept
        carry = self.carry[: r.carried * self.units * b].reshape(before.shape)
        if span.ends:
            carry.fill(0)
        r.backward(a, before, y, more, dy, carry, span.lengths)
        flat = a.reshape(self.rows, k * b)
        if into is not None:
            self._gradient(x, y, before, a, more, into)
        if dx is None:
            return dy
        self.ops.matmul(self.w["weight"].T, flat, dx.reshape(self.inputs, k * b))
        return dx

    def _gradient(
        self, x: np.ndarray, y: np.ndarray, before: np.ndarray, a: np.ndarray, more: np.ndarray, g: Any
    ) -> None:
        """Write the gradients of the parameters into g, given the gradients a of the gates."""
        (k, b), matmul = x.shape[1:], self.ops.matmul
        flat = a.reshape(self.rows, k * b)
        matmul(flat, x.reshape(self.inputs, k * b).T, g["weight"])
        # Copy the states before each step: one product over all steps is then faster than two without the copy.
        last = self.space.take("states before", self.units, k, b)
        last[:, 0], last[:, 1:] = before[0], y[:, :-1]
        # Rows of the recurrent product with their gradients: the gates' gradients, except for the last gate of a gru.
        parts = [(slice(0, self.rows), a)]
        if self.layer.kind == "gru":  # type: ignore[attr-defined]
            parts = [(slice(0, 2 * self.units), a[: 2 * self.units]), (slice(2 * self.units, None), more[0])]
        for rows, da in parts:
            matmul(da.reshape(len(da), k * b), last.reshape(self.units, k * b).T, g["recurrent"][rows])
            if "recurrent_bias" in g:
                self.ops.row_sums(da.reshape(1, len(da), k * b), g["recurrent_bias"][None, rows])
        if "bias" in g:
            self.ops.row_sums(flat[None], g["bias"][None])

    def export(self, graph: Any, value: str) -> str:
        name, layer = self.layer.name, self.layer
        assert isinstance(layer, Recurrent)
        operator, order = ONNX[layer.kind]
        gates, units = self.recurrence.gates, self.units

        def turned(parameter: str, *shape: int) -> np.ndarray:
            """Return a parameter with its gates in the order of ONNX."""
            values = self.w.get(parameter, self.zeros)
            return np.asarray(values).reshape(gates, units, *shape)[list(order)].reshape(1, gates * units, *shape)

        biases = np.concatenate([turned("bias"), turned("recurrent_bias")], axis=1)
        constants = [
            graph.constant(f"{name}.{kind}", values)
            for kind, values in (
                ("W", turned("weight", self.inputs)), ("R", turned("recurrent", units)), ("B", biases)
            )
        ]  # fmt: skip
        steps = graph.node("Transpose", [value], f"{name}.steps", perm=[2, 0, 1])
        more = {"linear_before_reset": 1} if layer.kind == "gru" else {}
        states = graph.node(operator, [steps, *constants, graph.lengths], f"{name}.states", hidden_size=units, **more)
        flat = graph.node("Squeeze", [states, graph.constant(f"{name}.axis", np.array([1]))], f"{name}.flat")
        return str(graph.node("Transpose", [flat], name, perm=[1, 2, 0]))
