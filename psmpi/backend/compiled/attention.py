"""Attention in C."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from psmpi.backend.compiled.library import function, pointers
from psmpi.backend.compiled.team import Team
from psmpi.backend.reference.arrays import Arrays
from psmpi.backend.reference.attention import Take

# Bytes of a vector by the instructions, and steps whose probabilities are there at a time, see c/attention.h.
VECTORS, TALL = {1: 32, 2: 64}, {1: 12, 2: 16}
# Multiplications that are worth another thread.
WORK = 2_000_000
INT32 = np.dtype(np.int32)


class CompiledAttention(Arrays):
    """Samples side by side in vectors: no probabilities of all steps, and if causal about half of the products.

    Several threads share heads and vectors of samples; each number is computed as one thread alone would.
    """

    instructions: int
    team: Team

    def attention(
        self, x: np.ndarray, heads: int, causal: bool, lengths: np.ndarray | None, y: np.ndarray, take: Take
    ) -> None:
        call = function("attention", x.dtype, "ppppp", self.instructions)
        _check(x, y)
        self._share(call, x, heads, causal, lengths, (y,), (4, 1), take)

    def attention_back(
        self, x: np.ndarray, heads: int, causal: bool, lengths: np.ndarray | None, dy: np.ndarray, dx: np.ndarray,
        take: Take,
    ) -> None:  # fmt: skip
        call = function("attention_back", x.dtype, "pppppp", self.instructions)
        _check(x, dy)
        self._share(call, x, heads, causal, lengths, (dy, dx), (7, 2), take)

    def _share(
        self, call: Callable[..., None], x: np.ndarray, heads: int, causal: bool, lengths: np.ndarray | None,
        arrays: tuple[np.ndarray, ...], rooms: tuple[int, int], take: Take,
    ) -> None:  # fmt: skip
        """The call, by as many threads as it is worth; rooms: of each, so many packed parts, and rows of steps."""
        rows, steps, batch = x.shape
        size, lanes = rows // (3 * heads), VECTORS[self.instructions] // x.itemsize
        jobs = heads * -(-batch // lanes)
        room = (rooms[0] * size + rooms[1] * TALL[self.instructions]) * steps * lanes
        members = max(1, min(self.team.size, jobs, rows * steps * steps * batch // WORK))
        edges = [jobs * k // members for k in range(members + 1)]
        scratch = take("attention", members * room)
        ends = None if lengths is None else pointers(INT32, lengths)[0]
        values, *others = pointers(x.dtype, x, *arrays)

        def share(k: int) -> None:
            numbers = np.array([heads, size, steps, batch, causal, edges[k], edges[k + 1]], np.int32)
            own = scratch[k * room : (k + 1) * room].ctypes.data
            call(numbers.ctypes.data, values, ends, *others, own)

        self.team.run(share, members)


def _check(x: np.ndarray, y: np.ndarray) -> None:
    if x.shape != (3 * len(y), *y.shape[1:]):
        raise ValueError(f"attention makes {(len(x) // 3, *x.shape[1:])} of {x.shape}, not {y.shape}")
