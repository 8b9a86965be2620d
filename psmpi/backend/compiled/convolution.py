"""Convolutions in C."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from psmpi.backend.compiled.library import function, pointers
from psmpi.backend.compiled.team import Team
from psmpi.backend.reference.convolution import Stripes, seen_once

# Number of multiplications for each thread, below which fewer threads are used.
WORK = 2_000_000
# A thread takes a multiple of this number of samples: whole vectors.
BATCH_MULTIPLE = 16


class DirectConvolution:
    """Direct convolution with register blocks along the batch, without windows: see c/convolution.h.

    Its buffers are the packed kernels of each thread. Threads share the samples or, for the gradient of the kernels,
    the units. Results do not depend on the number of threads.
    """

    def __init__(
        self,
        stripes: Sequence[Stripes],
        in_shape: tuple[int, int, int],
        out_shape: tuple[int, int, int],
        kernel: int,
        stride: int,
        dtype: np.dtype,
        instructions: int,
        team: Team,
        activate: Callable[[np.ndarray], None],
    ):
        self.team, self.dtype, self.activate = team, np.dtype(dtype), activate
        # Each call fills in the last three numbers: the batch, and the first and last sample of a thread.
        rest = (*in_shape[1:], *out_shape[1:], kernel, stride, 0, 0, 0)
        self.shapes = [[_shape(s, rest) for s in stripes] for _ in range(team.size)]
        self.unit_shapes = [
            [_shape(part, rest) for s in stripes if (part := _share(s, k, team.size)).count * part.n > 0]
            for k in range(team.size)
        ]
        # Buffers for packed kernels, one for each thread, allocated when the thread is first used.
        self.packs: list[np.ndarray] = []
        self.pack_size = max(s.n * s.n_in for s in stripes) * kernel**2
        self.work = sum(s.count * s.n * s.n_in for s in stripes) * kernel**2 * out_shape[1] * out_shape[2]
        self.covers = seen_once(stripes, in_shape[0])
        self._forward = function("conv_forward", dtype, "pppppp", instructions)
        self._input = function("conv_input", dtype, "pppppi", instructions)
        self._weight = function("conv_weight", dtype, "pppp", instructions)
        self._samples = function("conv_samples", dtype, "ppppp", instructions)

    def prepare(self, kernels: np.ndarray) -> None:
        """Do nothing: each thread packs the kernels in each call."""

    def reserve(self, batch: int) -> None:
        """Do nothing: no buffer grows with the minibatch."""

    def arrays(self) -> list[np.ndarray]:
        return self.packs

    def _members(self, batch: int) -> int:
        """Number of threads for a call."""
        return min(self.team.size, max(1, self.work * batch // WORK))

    def _samples_of(self, batch: int, members: int) -> None:
        """Set the range of samples in the shapes of each thread."""
        edges = [min(batch, -(-batch * k // members // BATCH_MULTIPLE) * BATCH_MULTIPLE) for k in range(members)] + [
            batch
        ]
        while len(self.packs) < members:
            self.packs.append(np.empty(self.pack_size, self.dtype))
        for k in range(members):
            for shape in self.shapes[k]:
                shape[-3:] = batch, edges[k], edges[k + 1]

    def forward(self, x: np.ndarray, kernels: np.ndarray, bias: np.ndarray, y: np.ndarray) -> None:
        members = self._members(x.shape[-1])
        self._samples_of(x.shape[-1], members)

        def share(k: int) -> None:
            for shape in self.shapes[k]:
                self._forward(shape.ctypes.data, *pointers(self.dtype, x, kernels, bias, y, self.packs[k]))

        self.team.run(share, members)
        self.activate(y)

    def backward(
        self, x: np.ndarray, dy: np.ndarray, kernels: np.ndarray, dkernels: np.ndarray | None, dx: np.ndarray | None
    ) -> None:
        members = self._members(x.shape[-1])
        self._samples_of(x.shape[-1], members)
        if dx is not None and not self.covers:
            dx.fill(0)

        def share(k: int) -> None:
            # The units are divided by the size of the team: fewer threads take several shares each.
            for shapes in self.unit_shapes[k::members] if dkernels is not None else ():
                for shape in shapes:
                    shape[-3] = x.shape[-1]
                    assert dkernels is not None
                    self._weight(shape.ctypes.data, *pointers(self.dtype, x, dy, dkernels))
            for shape in self.shapes[k] if dx is not None else ():
                assert dx is not None
                addresses = pointers(self.dtype, dy, kernels, dx, self.packs[k])
                self._input(shape.ctypes.data, *addresses, not self.covers)

        self.team.run(share, members)

    def samples(self, x: np.ndarray, dy: np.ndarray, dkernels: np.ndarray, dbias: np.ndarray) -> None:
        members = self._members(x.shape[-1])
        self._samples_of(x.shape[-1], members)

        def share(k: int) -> None:
            for shape in self.shapes[k]:
                self._samples(shape.ctypes.data, *pointers(self.dtype, x, dy, dkernels, dbias))

        self.team.run(share, members)


def _shape(s: Stripes, rest: Sequence[int]) -> np.ndarray:
    """The struct `shape_t` of kernels.c as an int32 array."""
    return np.array([s.count, s.n, s.n_in, s.source, s.source_step, s.out, *rest], np.int32)


def _share(s: Stripes, k: int, members: int) -> Stripes:
    """The part of the stripes that thread k of `members` takes: whole stripes, or units of a single stripe."""
    if s.count > 1:
        first, last = s.count * k // members, s.count * (k + 1) // members
        return replace(s, count=last - first, source=s.source + first * s.source_step, out=s.out + first * s.n)
    first, last = s.n * k // members, s.n * (k + 1) // members
    return replace(s, n=last - first, out=s.out + first)
