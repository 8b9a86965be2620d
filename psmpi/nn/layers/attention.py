"""Multi-head attention (Vaswani et al. 2017) on given queries, keys and values: a layer without weights."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar

import numpy as np

from psmpi.backend.reference import CHUNK
from psmpi.errors import UserError
from psmpi.nn.layers.base import Layer, Part, Site, Stage
from psmpi.nn.layers.table import Table
from psmpi.nn.layers.uses import Uses, grouped, stretched

# Score that gives a step the attention probability 0.
LOW = -1e30
# Samples in the largest vectors, and steps whose probabilities the kernels in C compute at a time.
LANES, TALL = 16, 16


@dataclass(frozen=True)
class Attention(Layer):
    """Attention softmax(q k^T / sqrt(size)) v of each of `heads` heads; `causal`: no step attends to later steps.

    Inputs (3 width, steps) have, head by head, the rows of the head's queries, keys and values; outputs are (width,
    steps). A subnetwork takes whole heads. Outputs after the end of a sequence are meaningless. Backward computes the
    probabilities again from the input instead of keeping them.
    """

    heads: int
    causal: bool

    exact: ClassVar[bool] = True
    moves_gradient: ClassVar[bool] = True
    whole_sequences: ClassVar[bool] = True

    @classmethod
    def read(cls, table: Table, label: str, shape: tuple[int, ...]) -> list[Layer]:
        inputs, steps = table.sequence(shape)
        heads, causal = table.whole("heads"), table.flag("causal")
        if inputs % (3 * heads):
            fix = 3 * heads * max(1, round(inputs / (3 * heads)))
            raise UserError(
                f"{table.where}: {inputs} inputs are not queries, keys and values of {heads} heads, 3 x heads x units "
                f"of a head: let the layer before have {fix} units, or choose other heads"
            )
        return [cls(label, shape, (inputs // 3, steps), heads, causal)]

    @property
    def size(self) -> int:
        """Number of output units of a head."""
        return self.out_shape[0] // self.heads

    @property
    def macs(self) -> int:
        units, steps = self.out_shape
        return units * steps * (steps + 1 if self.causal else 2 * steps)

    def sources(self, uses: Uses) -> Uses:
        return stretched(grouped(uses, self.size), 3 * self.size)

    def present(self, inputs: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        return np.repeat(inputs.reshape(self.heads, -1).all(axis=1), self.size)

    def restrict(self, units: int, in_shape: tuple[int, ...]) -> Layer:
        if units % self.size or in_shape[0] != 3 * units:
            raise UserError(
                f"the units of {self.name} form heads of {self.size} and can only be dealt out in whole heads: "
                f"{units} units with {in_shape[0]} inputs are not whole heads"
            )
        return Attention(self.name, in_shape, (units, *self.out_shape[1:]), units // self.size, self.causal)

    def workspace_numbers(self, stage: Stage, batch: int, wanted: bool, packed: bool) -> dict[str, int]:
        numbers, (units, steps) = super().workspace_numbers(stage, batch, wanted, packed), stage.shape
        if packed:
            # Arrays of one head and one vector of samples, for one thread.
            return {**numbers, "attention": (7 * self.size + 2 * TALL) * steps * LANES}
        # Arrays with the samples first, and the probabilities of some samples at a time.
        matrices = units // self.size * steps**2
        some = matrices * min(batch, max(1, CHUNK // matrices)) if matrices else 0
        large = {"attention x": 3, "attention y": 1, "attention dx": 3}
        return {
            **numbers,
            **{name: count * units * steps * batch for name, count in large.items()},
            **dict.fromkeys(("attention p", "attention dp"), some),
        }

    def part(self, stage: Stage, site: Site) -> Part:
        return AttentionPart(stage, site)


class AttentionPart(Part):
    """Part of attention: x (3 units, steps, b) -> y (units, steps, b)."""

    def __init__(self, stage: Stage, site: Site):
        super().__init__(stage, site)
        assert isinstance(self.layer, Attention)
        self.causal = self.layer.causal
        self.heads = int(stage.outputs.sum()) // self.layer.size

    @property
    def lengths(self) -> np.ndarray | None:
        """Lengths of the sequences, (b,); None for causal attention, in which no step of a sequence sees padding."""
        return None if self.causal else self.space.span.lengths

    def forward(self, x: np.ndarray, y: np.ndarray | None, room: Any) -> tuple[np.ndarray, Any]:
        assert y is not None
        self.ops.attention(x, self.heads, self.causal, self.lengths, y, self.space.take)
        return y, self.lengths

    def backward(
        self, x: np.ndarray, y: np.ndarray, kept: Any, dy: np.ndarray, dx: np.ndarray | None, into: Any
    ) -> np.ndarray:
        if dx is None:
            return dy
        self.ops.attention_back(x, self.heads, self.causal, kept, dy, dx, self.space.take)
        return dx

    def export(self, graph: Any, value: str) -> str:
        name, (units, steps) = self.layer.name, self.shape
        size = units // self.heads
        apart = graph.constant(f"{name}.shape", np.array([0, self.heads, 3 * size, steps]))
        split = graph.node("Reshape", [value, apart], f"{name}.apart")
        queries, keys, values = (
            graph.node("Gather", [split, graph.constant(f"{name}.{k}", rows)], f"{name}.{operand}", axis=2)
            for k, (operand, rows) in enumerate(
                zip(("queries", "keys", "values"), np.arange(3 * size).reshape(3, -1), strict=True)
            )
        )
        turned = graph.node("Transpose", [queries], f"{name}.turned", perm=[0, 1, 3, 2])
        product = graph.node("MatMul", [turned, keys], f"{name}.product")
        scale = graph.constant(f"{name}.scale", np.array(1 / sqrt(size), np.float32))
        scores = graph.node("Mul", [product, scale], f"{name}.scores")
        if self.causal:
            off = np.where(np.tri(steps, dtype=bool), 0, LOW).astype(np.float32)
            scores = graph.node("Add", [scores, graph.constant(f"{name}.off", off)], f"{name}.seen")
        elif graph.lengths:
            at = graph.constant(f"{name}.steps", np.arange(steps, dtype=np.int32))
            axes = graph.constant(f"{name}.axes", np.array([1, 2, 3]))
            ends = graph.node("Unsqueeze", [graph.lengths, axes], f"{name}.ends")
            there = graph.node("Less", [at, ends], f"{name}.there")
            low = graph.constant(f"{name}.low", np.array(LOW, np.float32))
            scores = graph.node("Where", [there, scores, low], f"{name}.seen")
        chances = graph.node("Softmax", [scores], f"{name}.chances", axis=-1)
        looked = graph.node("Transpose", [chances], f"{name}.looked", perm=[0, 1, 3, 2])
        out = graph.node("MatMul", [values, looked], f"{name}.out")
        return str(graph.node("Reshape", [out, graph.constant(f"{name}.flat", np.array([0, units, steps]))], name))
