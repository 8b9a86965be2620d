"""Recurrent cells in C."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from psmpi.backend.compiled.convolution import BATCH_MULTIPLE
from psmpi.backend.compiled.library import function, pointers
from psmpi.backend.compiled.team import Team
from psmpi.backend.reference.recurrence import ProductOps, Recurrence

# Numbers of the kinds of cells in the C kernels.
KINDS = {"rnn": 0, "gru": 1, "lstm": 2}
# Number of multiplications for each thread, below which fewer threads are used.
WORK = 2_000_000


class CompiledRecurrence(Recurrence):
    """Products and cells in one pass over blocks of units: see c/recurrence.h.

    The buffers are the packed weights of the forward and the backward pass, and states. Threads share the samples;
    results do not depend on the number of threads.
    """

    def __init__(self, kind: str, units: int, dtype: np.dtype, instructions: int, team: Team, ops: ProductOps):
        super().__init__(kind, units, dtype, ops)
        self.team = team
        size = self.gates * units * units
        self.packed = ops.empty(size, self.dtype)
        # Packed weights of the backward pass, allocated when it is first used.
        self.back = ops.empty(0, self.dtype)
        self.packed_back = False
        self.state = ops.empty(0, self.dtype)
        self._pack = function("cells_pack", self.dtype, "iipp", instructions)
        self._pack_back = function("cells_pack_back", self.dtype, "iipp", instructions)
        self._forward = function("cells_forward", self.dtype, "ppppppppp", instructions)
        self._backward = function("cells_backward", self.dtype, "pppppppppp", instructions)

    def arrays(self) -> list[np.ndarray]:
        return [self.packed, self.back, self.state]

    def reserve(self, batch: int) -> None:
        size = (2 * self.gates + 1) * self.units * -(-batch // BATCH_MULTIPLE) * BATCH_MULTIPLE
        if self.state.size < size:
            self.state = self.ops.empty(size, self.dtype)

    def prepare(self, u: np.ndarray) -> None:
        """Pack the weights u (gates * units, units), which must not change until the last backward pass with them."""
        self._check(u, (self.gates * self.units, self.units))
        self.u, self.packed_back = u, False
        self._pack(self.gates, self.units, *pointers(self.dtype, u, self.packed))

    def forward(
        self, a: np.ndarray, bias: np.ndarray | None, before: np.ndarray, h: np.ndarray, more: np.ndarray,
        lengths: np.ndarray | None,
    ) -> None:  # fmt: skip
        self._check_all(a, before, h, more, lengths)
        if bias is not None:
            self._check(bias, (self.gates * self.units,))
        given = None if bias is None else pointers(self.dtype, bias)[0]
        arrays = given, *pointers(self.dtype, a, before, h, more), _pointer(lengths)
        self._share(self._forward, self.packed, arrays, h.shape)

    def backward(
        self, a: np.ndarray, before: np.ndarray, h: np.ndarray, more: np.ndarray, dh: np.ndarray, carry: np.ndarray,
        lengths: np.ndarray | None,
    ) -> None:  # fmt: skip
        self._check_all(a, before, h, more, lengths)
        self._check(dh, h.shape)
        self._check(carry, before.shape)
        if not self.packed_back:
            if not self.back.size:
                self.back = self.ops.empty(self.packed.size, self.dtype)
            self._pack_back(self.gates, self.units, *pointers(self.dtype, self.u, self.back))
            self.packed_back = True
        arrays = *pointers(self.dtype, a, before, h, more, dh, carry), _pointer(lengths)
        self._share(self._backward, self.back, arrays, h.shape)

    def _share(
        self, call: Callable[..., None], pack: np.ndarray, arrays: tuple[int | None, ...], shape: tuple[int, ...]
    ) -> None:
        """Call a kernel on as many threads as the work is worth."""
        _, steps, batch = shape
        padded = -(-batch // BATCH_MULTIPLE) * BATCH_MULTIPLE
        self.reserve(batch)
        members = min(self.team.size, max(1, pack.size * batch * steps // WORK), max(1, padded // BATCH_MULTIPLE))
        edges = [min(batch, padded * k // members // BATCH_MULTIPLE * BATCH_MULTIPLE) for k in range(members)] + [batch]
        addresses = pointers(self.dtype, pack)[0], *arrays, *pointers(self.dtype, self.state)

        def share(k: int) -> None:
            rest = (steps, batch, padded, edges[k], edges[k + 1])
            numbers = np.array([KINDS[self.kind], self.units, *rest], np.int32)
            call(numbers.ctypes.data, *addresses)

        self.team.run(share, members)

    def _check_all(
        self, a: np.ndarray, before: np.ndarray, h: np.ndarray, more: np.ndarray, lengths: np.ndarray | None
    ) -> None:
        steps, batch = h.shape[1:]
        self._check(h, (self.units, steps, batch))
        self._check(a, (self.gates * self.units, steps, batch))
        self._check(before, (self.carried, self.units, batch))
        self._check(more, (self.kept, self.units, steps, batch))
        if lengths is not None:
            self._check(lengths, (batch,))

    @staticmethod
    def _check(array: np.ndarray, shape: tuple[int, ...]) -> None:
        if array.shape != shape:
            raise ValueError(f"this recurrence needs an array of shape {shape}, not {array.shape}")


def _pointer(lengths: np.ndarray | None) -> int | None:
    return None if lengths is None else pointers(np.dtype(np.int32), lengths)[0]
