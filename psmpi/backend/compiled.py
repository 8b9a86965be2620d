"""The operations that C does faster than NumPy, for float32 and float64, on processors with AVX2 or AVX-512.

The library is built when psmpi is installed, where there is a C compiler; without it NumPy does everything. Sums are
made in another order than NumPy's, so results differ by rounding.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from psmpi.backend.convolution import Convolution, Stripes
from psmpi.backend.moves import Transfer
from psmpi.backend.reference import NumpyOps

NAMES = {0: "", 1: "AVX2", 2: "AVX-512"}
# Multiplications that are worth another thread.
WORK = 2_000_000
# Samples that a thread takes are a multiple of this: whole vectors.
BATCH_MULTIPLE = 16
TYPES = {np.dtype(np.float32): "float", np.dtype(np.float64): "double"}


@cache
def _library() -> tuple[Any, str]:
    """The shared library, or None and why there is none."""
    here = Path(__file__).parent
    text = b"".join((here / "c" / name).read_bytes() for name in ("kernels.c", "kernels.h"))
    why = "no C compiler for this processor (gcc or clang, x86-64) built them when psmpi was installed"
    for suffix in EXTENSION_SUFFIXES:
        path = here / f"_kernels{suffix}"
        if path.exists():
            try:
                found = ctypes.CDLL(str(path))
                found.psmpi_source.restype = ctypes.c_uint32
                if found.psmpi_source() == crc32(text):
                    return found, ""
                why = f"{path.name} was built from other sources: install psmpi again"
            except (OSError, AttributeError) as error:
                why = f"{path.name} does not load ({error}): install psmpi again"
    return None, why


@cache
def level() -> int:
    """2: AVX-512, 1: AVX2, 0: no kernels, or none for this processor."""
    library, _ = _library()
    return 0 if library is None else int(library.psmpi_level())


def missing() -> str:
    """Why there are no kernels."""
    library, why = _library()
    return why if library is None else "this processor lacks AVX2"


@cache
def function(name: str, dtype: np.dtype, arguments: str, instructions: int) -> Any:
    """A kernel for a dtype; `arguments` is a letter each: p pointer, i int, n size, d double."""
    types = {"p": ctypes.c_void_p, "i": ctypes.c_int, "n": ctypes.c_ssize_t, "d": ctypes.c_double}
    found = _library()[0][f"{name}_{TYPES[dtype]}_{instructions}"]
    found.argtypes, found.restype = [types[a] for a in arguments], None
    return found


def pointers(dtype: np.dtype, *arrays: np.ndarray) -> tuple[int, ...]:
    """The addresses of contiguous arrays of this dtype; ValueError for others: C would take them for such."""
    for array in arrays:
        if array.dtype != dtype or not array.flags.c_contiguous:
            raise ValueError(f"a kernel needs contiguous {dtype}, not {array.dtype} with strides {array.strides}")
    return tuple(array.ctypes.data for array in arrays)


def steps(array: np.ndarray) -> tuple[int, ...]:
    """The strides of an array in elements."""
    return tuple(stride // array.itemsize for stride in array.strides)


def units_pointer(dtype: np.dtype, kernels: np.ndarray) -> int:
    """The address of kernels (count, n, channels, k, k), of which those of one unit are contiguous."""
    return pointers(dtype, kernels[0, 0])[0]


class Direct:
    """Convolution without windows: register blocks along the batch, see c/kernels.h. Buffers: packed kernels.

    Several threads share the samples of a call or, for the gradient of the kernels, the units; each number is computed
    as one thread alone would.
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
        # The last three numbers, the batch and the samples of a thread, are those of the call.
        rest = (*in_shape[1:], *out_shape[1:], kernel, stride, 0, 0, 0)
        self.shapes = [[_shape(s, rest) for s in stripes] for _ in range(team.size)]
        self.unit_shapes = [
            [_shape(part, rest) for s in stripes if (part := _share(s, k, team.size)).count * part.n > 0]
            for k in range(team.size)
        ]
        # Made for a thread when it is first needed.
        self.packs: list[np.ndarray] = []
        self.pack_size = max(s.n * s.n_in for s in stripes) * kernel**2
        self.work = sum(s.count * s.n * s.n_in for s in stripes) * kernel**2 * out_shape[1] * out_shape[2]
        # Stripes that see the same channels add their gradients up; channels that none sees have the gradient 0.
        seen = np.zeros(in_shape[0], int)
        for s in stripes:
            for k in range(s.count):
                seen[s.source + k * s.source_step :][: s.n_in] += 1
        self.covers = bool((seen == 1).all())
        self._forward = function("conv_forward", dtype, "pppppp", instructions)
        self._input = function("conv_input", dtype, "pppppi", instructions)
        self._weight = function("conv_weight", dtype, "pppp", instructions)
        self._samples = function("conv_samples", dtype, "ppppp", instructions)

    def prepare(self, kernels: np.ndarray) -> None:
        """Packs the kernels in each call: a thread its own."""

    def reserve(self, batch: int) -> None:
        """Needs nothing that grows with the minibatch."""

    def arrays(self) -> list[np.ndarray]:
        return self.packs

    def _members(self, batch: int) -> int:
        """Threads that a call is worth."""
        return min(self.team.size, max(1, self.work * batch // WORK))

    def _samples_of(self, batch: int, members: int) -> None:
        """Tell each thread its samples."""
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
            # Threads that have no samples leave their units to the others.
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


class Runs(Transfer):
    """Copies of runs without index arrays."""

    def __init__(self, table: np.ndarray, instructions: int):
        self.table, self.instructions = np.ascontiguousarray(table, np.int64), instructions

    def copy(self, values: np.ndarray, out: np.ndarray) -> None:
        self._call(values, out, 0)

    def add(self, values: np.ndarray, out: np.ndarray) -> None:
        self._call(values, out, 1)

    def _call(self, values: np.ndarray, out: np.ndarray, add: int) -> None:
        call = function("transfer", out.dtype, "npppi", self.instructions)
        call(len(self.table), self.table.ctypes.data, *pointers(out.dtype, values, out), add)


def _shape(s: Stripes, rest: Sequence[int]) -> np.ndarray:
    """The `shape_t` of kernels.c."""
    return np.array([s.count, s.n, s.n_in, s.source, s.source_step, s.out, *rest], np.int32)


def _share(s: Stripes, k: int, members: int) -> Stripes:
    """The stripes, or the units of the only one, that thread k of `members` takes."""
    if s.count > 1:
        first, last = s.count * k // members, s.count * (k + 1) // members
        return replace(s, count=last - first, source=s.source + first * s.source_step, out=s.out + first * s.n)
    first, last = s.n * k // members, s.n * (k + 1) // members
    return replace(s, n=last - first, out=s.out + first)


class Team:
    """Threads that work on one call together; `size` counts the caller."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.others = ThreadPoolExecutor(size - 1, "psmpi-kernel") if size > 1 else None

    def run(self, share: Callable[[int], None], members: int) -> None:
        """share(0), ..., share(members - 1), side by side."""
        waiting = [self.others.submit(share, k) for k in range(1, members)] if self.others is not None else []
        share(0)
        for future in waiting:
            future.result()


class CompiledOps(NumpyOps):
    name = "compiled"
    batch_multiple = BATCH_MULTIPLE

    def __init__(self, instructions: int | None = None, threads: int = 1) -> None:
        super().__init__()
        self.instructions = level() if instructions is None else instructions
        self.team = Team(threads)

    @property
    def description(self) -> str:
        return f"{self.name} ({NAMES[self.instructions]})"

    def convolution(
        self,
        stripes: Sequence[Stripes],
        in_shape: tuple[int, int, int],
        out_shape: tuple[int, int, int],
        kernel: int,
        stride: int,
        dtype: np.dtype,
        activation: str = "identity",
    ) -> Convolution:
        activate = partial(self.activate, activation)
        shapes = (in_shape, out_shape, kernel, stride)
        return Direct(stripes, *shapes, np.dtype(dtype), self.instructions, self.team, activate)

    def row_sums(self, y: np.ndarray, out: np.ndarray) -> None:
        call = function("row_sums", y.dtype, "iinppnn", self.instructions)
        call(*out.shape, y[0, 0].size, *pointers(out.dtype, y), out.ctypes.data, *steps(out))

    def add_bias(self, y: np.ndarray, bias: np.ndarray) -> None:
        call = function("add_bias", y.dtype, "iinppnn", self.instructions)
        call(*bias.shape, y[0, 0].size, *pointers(bias.dtype, y), bias.ctypes.data, *steps(bias))

    def transfer(self, table: np.ndarray) -> Transfer:
        return Runs(table, self.instructions)

    def fold(self, w: np.ndarray, pool: int, out: np.ndarray) -> None:
        count, rows, n_in, k, _ = w.shape
        call = function("fold", w.dtype, "iiiiipnnp", self.instructions)
        place = units_pointer(out.dtype, w), *steps(w[:, :, 0, 0, 0])
        call(count, rows, n_in, k, pool, *place, *pointers(out.dtype, out))

    def unfold(self, dfolded: np.ndarray, pool: int, out: np.ndarray) -> None:
        count, rows, n_in, k, _ = out.shape
        call = function("unfold", out.dtype, "iiiiippnn", self.instructions)
        place = units_pointer(dfolded.dtype, out), *steps(out[:, :, 0, 0, 0])
        call(count, rows, n_in, k, pool, *pointers(out.dtype, dfolded), *place)

    def activate(self, kind: str, y: np.ndarray) -> None:
        if kind == "sigmoid":
            function("sigmoid", y.dtype, "np", self.instructions)(y.size, *pointers(y.dtype, y))
        else:
            super().activate(kind, y)

    def activate_back(self, kind: str, y: np.ndarray, dy: np.ndarray) -> None:
        if kind == "identity":
            return
        function(f"{kind}_back", y.dtype, "npp", self.instructions)(y.size, *pointers(y.dtype, y, dy))

    def max_pool(self, x: np.ndarray, size: int, y: np.ndarray, activation: str = "identity") -> None:
        function("max_pool", x.dtype, "iiiiipp", self.instructions)(*x.shape, size, *pointers(x.dtype, x, y))
        self.activate(activation, y)

    def max_pool_back(self, x: np.ndarray, y: np.ndarray, dy: np.ndarray, size: int, dx: np.ndarray) -> None:
        call = function("max_pool_back", x.dtype, "iiiiipppp", self.instructions)
        call(*x.shape, size, *pointers(x.dtype, x, y, dy, dx))

    def adam(
        self, w: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray, rate: float, root: float, beta1: float,
        beta2: float, eps: float, l2: float, keep: float,
    ) -> None:  # fmt: skip
        """w = keep w - rate m / (root sqrt(v) + eps) after m and v have moved towards d = g + l2 w and d^2.

        All are (n,) of one dtype.
        """
        call = function("adam", w.dtype, "nppppddddddd", self.instructions)
        call(w.size, *pointers(w.dtype, w, g, m, v), rate, root, beta1, beta2, eps, l2, keep)
