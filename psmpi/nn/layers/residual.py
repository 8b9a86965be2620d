"""Residual blocks: a branch of layers whose output is added to its input (He et al. 2016)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from psmpi.errors import UserError
from psmpi.layout import Parameter
from psmpi.nn.layers.base import OWN, Layer, Part, Site, Stage
from psmpi.nn.layers.chain import Chain, export_chain, leaves, plan_buffers, uses_of, workspace_numbers
from psmpi.nn.layers.table import Table
from psmpi.nn.layers.uses import Uses


@dataclass(frozen=True)
class Residual(Layer):
    """Residual block: x -> x + scale branch(x), where branch is the chain of `layers`."""

    layers: tuple[Layer, ...]
    scale: float

    place = OWN

    @classmethod
    def read(cls, table: Table, label: str, shape: tuple[int, ...]) -> list[Layer]:
        scale: Any = table.take("scale", 1.0)
        if not isinstance(scale, float | int) or isinstance(scale, bool) or not 0 < abs(scale) <= 1e6:
            raise UserError(f"{table.where}: scale = {scale!r}; expected a number other than 0")
        branch, out = table.layers("layers", shape)
        if out != shape:
            raise UserError(
                f"{table.where}: its layers turn inputs of shape {shape} into {out}, but the two are added: let the "
                "last layer give the shape of the input"
            )
        return [cls(label, shape, shape, branch, float(scale))]

    @property
    def inner(self) -> tuple[Layer, ...]:
        return self.layers

    def with_inner(self, layers: tuple[Layer, ...], shape: tuple[int, ...], factor: float = 1.0) -> Layer:
        return replace(self, layers=layers, in_shape=shape, out_shape=shape, scale=self.scale * factor)

    def with_steps(self, steps: int) -> Layer:
        block = super().with_steps(steps)
        return replace(block, layers=tuple(layer.with_steps(steps) for layer in self.layers))  # type: ignore[call-arg]

    def parameters(self) -> tuple[Parameter, ...]:
        return tuple(parameter for layer in self.layers for parameter in layer.parameters())

    def users(self, uses: Uses) -> list[tuple[Parameter, Uses]]:
        branch = zip(self.layers, uses_of(self.layers, uses), strict=True)
        return [pair for layer, users in branch for pair in layer.users(users)]

    def sources(self, uses: Uses) -> Uses:
        before = uses
        for layer in reversed(self.layers):
            before = layer.sources(before)
        if before != uses:
            raise UserError(
                f"{self.name}: the input and the output of this residual block belong to different classes: use the "
                "same number of groups in all of its layers"
            )
        return uses

    def present(self, inputs: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        return wanted if any(layer.linear for layer in leaves(self.layers)) else inputs

    def buffer_numbers(self, stage: Stage, batch: int, writable: bool, packed: bool) -> int:
        # The block's output, unless it may overwrite the branch's output.
        spots, free = plan_buffers(stage.inner)
        numbers = 0 if free else stage.size * batch
        for stage_inside, spot in zip(stage.inner, spots, strict=True):
            numbers += stage_inside.layer.buffer_numbers(stage_inside, batch, spot.writable, packed)
        return numbers

    def workspace_numbers(self, stage: Stage, batch: int, wanted: bool, packed: bool) -> dict[str, int]:
        return {
            **workspace_numbers(stage.inner, batch, packed, wanted),
            **({f"past {self.name}": stage.size * batch} if wanted else {}),
        }

    def part(self, stage: Stage, site: Site) -> Part:
        return ResidualPart(stage, site)


class ResidualPart(Part):
    """Part of a residual block: the parts of the branch, and the sum; x, y: (units, ..., b).

    A pass multiplies the layer's scale by `factor`; the steps of a coarser multigrid level use a factor above 1.
    """

    def __init__(self, stage: Stage, site: Site):
        super().__init__(stage, site)
        assert isinstance(self.layer, Residual)
        self.scale = self.layer.scale
        self.chain = Chain(stage.inner, site, (int(stage.inputs.sum()), *self.layer.in_shape[1:]))

    @property
    def inner(self) -> Sequence[Part]:
        return self.chain.parts

    def walk(self) -> list[Part]:
        return [self, *self.chain.walk()]

    def views(self, vector: np.ndarray) -> Any:
        return self.chain.views(vector)

    def bind(self, w: np.ndarray, g: np.ndarray | None) -> None:
        self.chain.bind(w, g)
        self.g = None if g is None else [part.g for part in self.chain.parts]

    def room(self, batch: int, writable: bool) -> Any:
        """Return the room of the branch, and an array for the sum unless it overwrites the branch's output."""
        own = self.ops.empty(0 if self.chain.writable else self.size * batch, self.dtype)
        return self.chain.room(batch), own

    def reserve(self, batch: int) -> None:
        self.chain.reserve(batch)

    def reserve_backward(self, batch: int, wanted: bool) -> None:
        self.chain.reserve_backward(batch, wanted)
        if wanted:
            self.space.take(f"past {self.layer.name}", self.size, batch)

    def prepare(self) -> None:
        for part in self.chain.parts:
            part.prepare()

    def forward(self, x: np.ndarray, y: np.ndarray | None, room: Any, factor: float = 1.0) -> tuple[np.ndarray, Any]:
        inside, own = room
        tape = self.chain.forward(x, inside)
        branch = tape.scores
        if y is None and own.size:
            y = own[: branch.size].reshape(branch.shape)
        if y is None:
            y = branch
        else:
            y[...] = branch
        if self.scale * factor != 1:
            self.ops.scale(y.reshape(-1), self.scale * factor)
        y += x
        return y, tape

    def backward(
        self,
        x: np.ndarray,
        y: np.ndarray,
        kept: Any,
        dy: np.ndarray,
        dx: np.ndarray | None,
        into: Any,
        factor: float = 1.0,
    ) -> np.ndarray:
        past = None
        if dx is not None:
            past = self.space.take(f"past {self.layer.name}", *dy.shape)
            past[...] = dy
        if self.scale * factor != 1:
            self.ops.scale(dy.reshape(-1), self.scale * factor)
        dy = self.chain.backward(kept, dy, into, wanted=dx is not None)
        if past is not None:
            dy += past
        return dy

    def gather_statistics(self) -> None:
        for part in self.chain.parts:
            part.gather_statistics()

    def fix_statistics(self) -> None:
        for part in self.chain.parts:
            part.fix_statistics()

    def statistics(self) -> dict[str, np.ndarray]:
        return {name: values for part in self.chain.parts for name, values in part.statistics().items()}

    def arrays(self) -> list[np.ndarray]:
        return [array for part in self.chain.parts for array in part.arrays()]

    def export(self, graph: Any, value: str) -> str:
        name = self.layer.name
        branch = export_chain(graph, value, self.chain)
        scale = graph.constant(f"{name}.scale", np.array(self.scale, np.float32))
        return str(graph.node("Add", [graph.node("Mul", [branch, scale], f"{name}.scaled"), value], name))
