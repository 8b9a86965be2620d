"""Recording of work on a GPU as CUDA graphs."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from psmpi.backend.gpu.device import Device

# Largest number of graphs, for calls with different arguments, that are kept.
KEPT = 256


class Recording:
    """A function whose work on the device is captured as a CUDA graph at the second call with equal arguments.

    Arrays are equal if they have the same memory, shape, strides and dtype. The first call allocates buffers, which
    must not move afterwards. An allocation by the backend therefore discards all earlier graphs. If the device cannot
    capture the work, a warning is given and graphs are turned off.
    """

    def __init__(self, ops: Device, work: Callable[..., Any]):
        self.ops, self.work, self.array = ops, work, ops.cupy.ndarray
        self.made: OrderedDict[tuple[Any, ...], tuple[Any, Any] | None] = OrderedDict()
        self.allocations = -1

    def __call__(self, *args: Any) -> Any:
        ops = self.ops
        if self.allocations != ops.allocations:
            self.made.clear()
            self.allocations = ops.allocations
        key = tuple(self._key(argument) for argument in args)
        recorded = self.made.get(key)
        if recorded is None:
            return self._first(key, args)
        self.made.move_to_end(key)
        graph, result = recorded
        graph.launch(ops.stream)
        return result

    def _key(self, argument: Any) -> Any:
        """The key of an argument: address, shape, strides and dtype of an array, else the argument itself."""
        if isinstance(argument, self.array):
            return argument.data.ptr, argument.shape, argument.strides, argument.dtype
        return argument

    def _first(self, key: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
        ops = self.ops
        if key not in self.made or not ops.graphs:
            result = self.work(*args)
            self.made[key] = None
            if len(self.made) > KEPT:
                self.made.popitem(last=False)
            return result
        graph, result = None, None
        try:
            ops.stream.begin_capture()
            try:
                result = self.work(*args)
            finally:
                graph = ops.stream.end_capture()
        except ops.failures as error:
            ops.graphs = False
            warnings.warn(f"CUDA graphs are not used: this device cannot record the step: {error}", stacklevel=2)
            return self.work(*args)
        self.made[key] = graph, result
        graph.launch(ops.stream)
        return result
