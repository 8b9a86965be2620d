"""Attention in C."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from psmpi.backend.compiled.library import function, pointers
from psmpi.backend.compiled.team import Team
from psmpi.backend.reference.arrays import Arrays
from psmpi.backend.reference.attention import Take

# Bytes of a vector, and number of steps whose probabilities are computed at a time (c/attention.h), by `level()`.
VECTORS, TALL = {1: 32, 2: 64}, {1: 12, 2: 16}
# Number of multiplications for each thread, below which fewer threads are used.
WORK = 2_000_000
INT32 = np.dtype(np.int32)


class CompiledAttention(Arrays):
    """Attention with samples side by side in vectors.

    The kernel never stores the probabilities of all steps, and computes about half of the products if causal. Threads
    share heads and vectors of samples; results do not depend on the number of threads.
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
        """Call a kernel on as many threads as the work is worth.

        rooms: scratch of a thread, in packed parts of a head and in rows of probabilities.
        """
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
        raise ValueError(f"attention of x {x.shape} needs y of shape {(len(x) // 3, *x.shape[1:])}, not {y.shape}")
