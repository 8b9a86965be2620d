"""Base classes of dense layers and convolutions: weights in groups, and segments of them in local vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod, sqrt
from typing import Any, ClassVar

import numpy as np

from psmpi.layout import Classes, Parameter
from psmpi.nn.layers.base import Initial, Layer, Part, Site, Stage
from psmpi.nn.layers.segments import Segment, find_segments
from psmpi.nn.layers.uses import Uses, grouped, joined, stretched

# Weights (count, n, unit size) and biases (count, n) of each segment.
Views = list[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Linear(Layer):
    """Layer of weighted sums in `groups` groups: each unit of group m uses the m-th block of `group_inputs` inputs."""

    groups: int
    bias: bool = field(default=True, kw_only=True)

    linear: ClassVar[bool] = True
    moves_gradient: ClassVar[bool] = True

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
        """Fan-in and fan-out of one group, for the initial weights."""
        return self.group_inputs, self.units // self.groups

    @property
    def macs(self) -> int:
        return self.units * self.unit_size * prod(self.out_shape[1:])

    def weight_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def parameters(self) -> tuple[Parameter, ...]:
        weight = Parameter(f"{self.name}.weight", self.weight_shape(), self.units)
        return (weight, Parameter(f"{self.name}.bias", (self.units,), self.units)) if self.bias else (weight,)

    def initial(self, kind: str, gain: float) -> dict[str, Initial]:
        fan_in, fan_out = self.fans
        xavier, he, pytorch = gain * sqrt(6 / (fan_in + fan_out)), sqrt(6 / fan_in), 1 / sqrt(fan_in)
        width = {"xavier": xavier, "he": he, "pytorch": pytorch}[kind]
        return {f"{self.name}.weight": Initial("uniform", width)}

    def sources(self, uses: Uses) -> Uses:
        input_users = stretched(grouped(uses, self.units // self.groups), self.group_inputs)
        return joined([*input_users, (self.groups * self.group_inputs, self.in_shape[0], Classes())])

    def present(self, inputs: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        return wanted

    def absorbs(self, following: Sequence[Layer], fold: bool) -> int:
        return int(bool(following and following[0].activation))


class LinearPart(Part):
    """Part of a linear layer, with the activation that follows it."""

    def __init__(self, stage: Stage, site: Site):
        super().__init__(stage, site)
        assert isinstance(self.layer, Linear)
        self.bias, self.group_inputs = self.layer.bias, self.layer.group_inputs
        self.inputs, self.units = int(stage.inputs.sum()), int(stage.outputs.sum())
        self.segments = find_segments(self.layer, site.layout, site.part, stage.outputs, np.cumsum(stage.inputs) - 1)
        # Zeros as biases of a layer without biases, and an unused array for their gradient.
        self.zero_biases = [self.ops.zeros(0 if self.bias else self.units, site.dtype) for _ in range(2)]
        # The array that `rows` was last called with, and its views.
        self.summed: tuple[np.ndarray | None, Views] = (None, [])
        # A product can write directly into dx if every input belongs to exactly one stripe.
        first = self.segments[0]
        self.covers = (
            len(self.segments) == 1
            and first.source == 0
            and (first.count == 1 or first.source_step == first.n_in)
            and first.count * first.n_in == self.inputs
        )

    def bind(self, w: np.ndarray, g: np.ndarray | None) -> None:
        zeros, unused = self.zero_biases
        self.w = self._views(w, zeros)
        self.g = None if g is None else self._views(g, unused)

    def views(self, vector: np.ndarray) -> Any:
        """Return weights (count, n, unit size) and biases (count, n) of each segment."""
        return self._views(vector, vector if self.bias else self.ops.zeros(self.units, vector.dtype))

    def _views(self, vector: np.ndarray, biases: np.ndarray) -> Views:
        biases = vector if self.bias else biases
        return [(s.weights(vector, self.ops), s.biases(biases, self.ops)) for s in self.segments]

    def rows(self, into: np.ndarray) -> Views:
        """Return views of the segments' weights and biases in `into` (k, part's weights)."""
        if self.summed[0] is not into:
            self.summed = into, [s.rows(into, self.ops) for s in self.segments]
        return self.summed[1]

    def source(self, s: Segment, x: np.ndarray) -> np.ndarray:
        """Return the inputs of a segment's stripes, (count, n_in, b), as a view of x (inputs, b)."""
        if s.count == 1 or s.source_step == s.n_in:
            return x[s.source : s.source + s.count * s.n_in].reshape(s.count, s.n_in, x.shape[1])
        b = x.shape[1]
        return self.ops.view(x, s.source * b, (s.count, s.n_in, b), (s.source_step * b, b, 1))

    @staticmethod
    def target(s: Segment, y: np.ndarray) -> np.ndarray:
        """Return a segment's output units, (count, n, b), as a view of y (units, b)."""
        return y[s.out : s.out + s.count * s.n].reshape(s.count, s.n, y.shape[1])

    def exported(self, s: Segment, weights: np.ndarray) -> np.ndarray:
        """Return the factors of a segment's inputs, computed from its weights, both (count, n, unit size)."""
        return weights

    def export_as_convolutions(self, graph: Any, value: str, kernel: int) -> str:
        """Add the layer to an ONNX graph as one grouped convolution for each set of stripes; return the output's name.

        kernel: width of the kernels, 1 for dense layers.
        """
        outputs, name = [], self.layer.name
        for k, (s, (weights, biases)) in enumerate(zip(self.segments, self.w, strict=True)):
            together = s.count == 1 or s.source_step == s.n_in or s.source_step == 0
            places = [(slice(0, s.count), s.source)] if together else _stripes(s)
            for j, (part, first) in enumerate(places):
                label = f"{name}.{k}.{j}" if len(self.segments) > 1 or not together else name
                groups = 1 if not together or s.source_step == 0 else s.count
                kernels = self.exported(s, weights)[part].reshape(-1, s.n_in, kernel, kernel)
                inputs = graph.some(value, first, groups * s.n_in, self.inputs, label)
                constants = [
                    graph.constant(f"{label}.weight", kernels),
                    graph.constant(f"{label}.bias", biases[part].reshape(-1)),
                ]
                outputs.append(graph.node("Conv", [inputs, *constants], f"{label}.out", group=groups))
        return str(outputs[0] if len(outputs) == 1 else graph.node("Concat", outputs, f"{name}.joined", axis=1))


def _stripes(s: Segment) -> list[tuple[slice, int]]:
    return [(slice(k, k + 1), s.source + k * s.source_step) for k in range(s.count)]
