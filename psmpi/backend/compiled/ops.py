"""The backend `compiled`: operations that C does faster than NumPy.

Sums have another order than in NumPy, so results differ by rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from psmpi.backend.compiled.attention import CompiledAttention
from psmpi.backend.compiled.convolution import BATCH_MULTIPLE, DirectConvolution
from psmpi.backend.compiled.library import NAMES, function, level, pointers, steps, units_pointer
from psmpi.backend.compiled.losses import CompiledLosses
from psmpi.backend.compiled.recurrence import CompiledRecurrence
from psmpi.backend.compiled.shared import CompiledShared
from psmpi.backend.compiled.sparse import CompiledSparseProduct
from psmpi.backend.compiled.team import Team
from psmpi.backend.reference.convolution import Convolution, Stripes
from psmpi.backend.reference.moves import CompressedSamples, RowCopies, RowRuns, RunCopies
from psmpi.backend.reference.ops import NumpyOps
from psmpi.backend.reference.recurrence import Recurrence
from psmpi.backend.reference.sparse import SparseIndex, SparseProduct


class CompiledOps(CompiledAttention, CompiledLosses, CompiledShared, NumpyOps):
    name = "compiled"
    batch_multiple = BATCH_MULTIPLE

    def __init__(self, instructions: int | None = None, threads: int = 1) -> None:
        super().__init__()
        self.instructions = level() if instructions is None else instructions
        self.threads, self.team = threads, Team(threads)

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
        return DirectConvolution(stripes, *shapes, np.dtype(dtype), self.instructions, self.team, activate)

    def recurrence(self, kind: str, units: int, dtype: np.dtype) -> Recurrence:
        return CompiledRecurrence(kind, units, dtype, self.instructions, self.team, self)

    def sparse_product(self, index: SparseIndex, dtype: np.dtype) -> SparseProduct:
        return CompiledSparseProduct(index, dtype, self.instructions, self.team)

    def row_sums(self, y: np.ndarray, out: np.ndarray) -> None:
        call = function("row_sums", y.dtype, "iinppnn", self.instructions)
        call(*out.shape, y[0, 0].size, *pointers(out.dtype, y), out.ctypes.data, *steps(out))

    def add_bias(self, y: np.ndarray, bias: np.ndarray) -> None:
        call = function("add_bias", y.dtype, "iinppnn", self.instructions)
        call(*bias.shape, y[0, 0].size, *pointers(bias.dtype, y), bias.ctypes.data, *steps(bias))

    def normalize(self, x: np.ndarray, eps: float, out: np.ndarray, scale: np.ndarray) -> None:
        values, into, factors = pointers(x.dtype, x, out, scale)
        function("normalize", x.dtype, "inpdpp", self.instructions)(*x.shape, values, eps, into, factors)

    def normalize_back(
        self, x: np.ndarray, scale: np.ndarray, gamma: np.ndarray, y: np.ndarray, dy: np.ndarray, kind: str,
        dgamma: np.ndarray, dbeta: np.ndarray,
    ) -> None:  # fmt: skip
        self.activate_back(kind, y, dy)
        call = function("normalize_back", x.dtype, "inpppppp", self.instructions)
        call(*x.shape, *pointers(x.dtype, x, scale, gamma, dy, dgamma, dbeta))

    def layer_norm(
        self, x: np.ndarray, eps: float, gamma: np.ndarray, beta: np.ndarray, normal: np.ndarray, scale: np.ndarray,
        y: np.ndarray,
    ) -> None:  # fmt: skip
        values, *others = pointers(x.dtype, x, gamma, beta, normal, scale, y)
        function("layer_norm", x.dtype, "nnpdppppp", self.instructions)(*x.shape, values, eps, *others)

    def layer_norm_back(
        self, normal: np.ndarray, scale: np.ndarray, gamma: np.ndarray, dy: np.ndarray, dgamma: np.ndarray | None,
        dbeta: np.ndarray | None,
    ) -> None:  # fmt: skip
        wanted = (None, None) if dgamma is None or dbeta is None else pointers(dy.dtype, dgamma, dbeta)
        call = function("layer_norm_back", dy.dtype, "nnpppppp", self.instructions)
        call(*dy.shape, *pointers(dy.dtype, normal, scale, gamma, dy), *wanted)

    def gelu(self, x: np.ndarray, y: np.ndarray) -> None:
        function("gelu", x.dtype, "npp", self.instructions)(x.size, *pointers(x.dtype, x, y))

    def gelu_back(self, x: np.ndarray, dy: np.ndarray) -> None:
        function("gelu_back", x.dtype, "npp", self.instructions)(x.size, *pointers(x.dtype, x, dy))

    def row_factors(self, w: np.ndarray, eps: float, scale: float, out: np.ndarray) -> None:
        call = function("row_factors", w.dtype, "iinpnnddp", self.instructions)
        call(*w.shape, *_rows(out.dtype, w), eps, scale, *pointers(w.dtype, out))

    def project_rows(self, w: np.ndarray, factors: np.ndarray, scale: float, g: np.ndarray) -> None:
        call = function("project_rows", g.dtype, "iiinpnnpdpnnn", self.instructions)
        call(*g.shape, *_rows(g.dtype, w), *pointers(g.dtype, factors), scale, *_rows(w.dtype, g))

    def look_up(self, table: np.ndarray, tokens: np.ndarray, out: np.ndarray) -> None:
        call = function("look_up", out.dtype, "nnnppp", self.instructions)
        call(*out.shape, table.shape[1], *pointers(out.dtype, table, tokens, out))

    def add_up(self, tokens: np.ndarray, values: np.ndarray, out: np.ndarray) -> None:
        call = function("add_up", out.dtype, "nnnppp", self.instructions)
        call(*values.shape, out.shape[1], *pointers(out.dtype, tokens, values, out))

    def run_copies(self, table: np.ndarray) -> RunCopies:
        return CompiledRunCopies(table, self.instructions)

    def compressed_samples(
        self, starts: np.ndarray, columns: np.ndarray, values: np.ndarray, features: int
    ) -> CompressedSamples:
        return CompiledCompressedSamples(starts, columns, values, features, self.instructions)

    def row_copies(self, source: np.ndarray, target: np.ndarray) -> RowCopies:
        return RowRuns(source, target, self.run_copies)

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

    def move_images(self, x: np.ndarray, moves: np.ndarray, reflect: bool, out: np.ndarray) -> None:
        call = function("move_images", x.dtype, "iiiipipp", self.instructions)
        call(*x.shape, *pointers(np.dtype(np.int32), moves), reflect, *pointers(x.dtype, x, out))

    def adam(
        self, w: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray, rate: float, root: float, beta1: float,
        beta2: float, eps: float, l2: float, keep: float,
    ) -> None:  # fmt: skip
        """A step of Adam (Kingma & Ba 2015): w = keep w - rate m / (root sqrt(v) + eps).

        Before it, m = beta1 m + (1 - beta1) d and v = beta2 v + (1 - beta2) d^2 with d = g + l2 w. All arrays are (n,)
        of one dtype.
        """
        call = function("adam", w.dtype, "nppppddddddd", self.instructions)
        call(w.size, *pointers(w.dtype, w, g, m, v), rate, root, beta1, beta2, eps, l2, keep)


def _rows(dtype: np.dtype, w: np.ndarray) -> tuple[int, ...]:
    """The address of w (..., n, m) and its strides in elements but the last; ValueError unless rows are contiguous."""
    if w.dtype != dtype or w.strides[-1] != w.itemsize:
        raise ValueError(f"a kernel needs contiguous rows of {dtype}, not {w.dtype} with strides {w.strides}")
    return w.ctypes.data, *steps(w[..., 0])


class CompiledRunCopies(RunCopies):
    """`RunCopies` without index arrays."""

    def __init__(self, table: np.ndarray, instructions: int):
        self.table, self.instructions = np.ascontiguousarray(table, np.int64), instructions

    def copy(self, values: np.ndarray, out: np.ndarray) -> None:
        self._call(values, out, 0)

    def add(self, values: np.ndarray, out: np.ndarray) -> None:
        self._call(values, out, 1)

    def _call(self, values: np.ndarray, out: np.ndarray, add: int) -> None:
        call = function("transfer", out.dtype, "npppi", self.instructions)
        call(len(self.table), self.table.ctypes.data, *pointers(out.dtype, values, out), add)


class CompiledCompressedSamples(CompressedSamples):
    """`CompressedSamples` without a loop in Python."""

    def __init__(
        self, starts: np.ndarray, columns: np.ndarray, values: np.ndarray, features: int, instructions: int
    ) -> None:
        super().__init__(
            np.ascontiguousarray(starts), np.ascontiguousarray(columns), np.ascontiguousarray(values), features
        )
        pointers(np.dtype(np.int64), self.starts)
        pointers(np.dtype(np.int32), self.columns)
        self.instructions = instructions

    def fetch(self, at: np.ndarray, out: np.ndarray) -> None:
        call = function("fill_compressed", out.dtype, "nnppppp", self.instructions)
        places = *pointers(np.dtype(np.int64), at), self.starts.ctypes.data, self.columns.ctypes.data
        call(len(at), self.features, *places, *pointers(self.values.dtype, self.values, out))
