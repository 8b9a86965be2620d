"""Trials of convolutions on a GPU with random data: their values and times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from statistics import median
from typing import Any, Literal

import numpy as np

from psmpi.backend.gpu.device import Device

# The operations of a convolution, for each of which an implementation is chosen.
Work = Literal["output", "gradient of kernels", "gradient of input"]

# Number of measurements of a candidate.
REPEATS = 5


@dataclass(frozen=True)
class ConvolutionShape:
    """Shape, activation and dtype of a convolution with one or more equal groups: the key of a choice."""

    in_shape: tuple[int, int, int]
    out_shape: tuple[int, int, int]
    groups: int
    kernel: int
    stride: int
    activation: str
    dtype: np.dtype

    def __str__(self) -> str:
        x, y = ("x".join(map(str, shape)) for shape in (self.in_shape, self.out_shape))
        groups = f", {self.groups} groups" if self.groups > 1 else ""
        kind = f", {self.activation}" if self.activation != "identity" else ""
        return f"convolution {x} -> {y}, kernel {self.kernel}, stride {self.stride}{groups}{kind}, {self.dtype}"

    @property
    def kernels(self) -> tuple[int, int, int, int]:
        return self.out_shape[0], self.in_shape[0] // self.groups, self.kernel, self.kernel


class Trial:
    """Random data of one operation of a convolution, to compare and time implementations."""

    def __init__(self, ops: Device, shape: ConvolutionShape, batch: int, work: Work):
        rng, dtype = np.random.default_rng(0), shape.dtype
        self.ops, self.work, self.records = ops, work, ops.graphs
        x, y = (*shape.in_shape, batch), (*shape.out_shape, batch)
        # Sums of order 1, where activations are not linear.
        scale = prod(shape.kernels[1:]) ** -0.5
        self.x, self.dy = (ops.put(rng.standard_normal(size, np.float32).astype(dtype)) for size in (x, y))
        self.kernels = ops.put((scale * rng.standard_normal(shape.kernels)).astype(dtype))
        self.bias = ops.put(rng.standard_normal(shape.out_shape[0]).astype(dtype))
        sizes: dict[Work, tuple[int, ...]] = {
            "output": y, "gradient of kernels": shape.kernels, "gradient of input": x,
        }  # fmt: skip
        self.result = ops.empty(prod(sizes[work]), dtype).reshape(sizes[work])

    def value(self, convolution: Any, reference: bool = False) -> tuple[np.ndarray, Callable[[], None]]:
        """Return the values of a convolution, and a function that computes them again.

        That function replays a CUDA graph if steps are recorded. If the `reference` cannot be recorded, no step will
        be, and later convolutions are not recorded either. Else an error of recording is raised.
        """
        ops = self.ops
        convolution.prepare(self.kernels)

        def work() -> None:
            if self.work == "output":
                convolution.prepare(self.kernels)
                convolution.forward(self.x, self.kernels, self.bias, self.result)
            else:
                given = (self.result, None) if self.work == "gradient of kernels" else (None, self.result)
                convolution.backward(self.x, self.dy, self.kernels, *given)

        work()
        again = work
        if self.records:
            try:
                again = self._record(work)
            except ops.failures:
                if not reference:
                    raise
                self.records = False
        self.result.fill(np.nan)
        again()
        return ops.host(self.result), again

    def _record(self, work: Callable[[], None]) -> Callable[[], None]:
        stream, graph = self.ops.stream, None
        stream.begin_capture()
        try:
            work()
        finally:
            graph = stream.end_capture()

        def again() -> None:
            graph.launch(stream)

        return again

    def time(self, work: Callable[[], None]) -> float:
        """The median time of `work` in milliseconds."""
        cuda, stream, times = self.ops.cupy.cuda, self.ops.stream, []
        for _ in range(REPEATS):
            begin, end = cuda.Event(), cuda.Event()
            begin.record(stream)
            work()
            end.record(stream)
            end.synchronize()
            times.append(cuda.get_elapsed_time(begin, end))
        return float(median(times))
