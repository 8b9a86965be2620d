"""Backends: sets of array operations with one interface, in NumPy, in C and on a GPU."""

from __future__ import annotations

from psmpi.backend import compiled, gpu
from psmpi.backend.compiled import CompiledOps
from psmpi.backend.gpu import CupyOps
from psmpi.backend.reference import (
    CELLS,
    SLOPES,
    CompressedSamples,
    Convolution,
    Descent,
    Mirror,
    NumpyOps,
    Pairs,
    Recurrence,
    Room,
    Rows,
    RunCopies,
    Samples,
    SparseIndex,
    SparseProduct,
    Stripes,
)
from psmpi.errors import UserError

__all__ = [
    "CELLS",
    "SLOPES",
    "CompiledOps",
    "CompressedSamples",
    "Convolution",
    "CupyOps",
    "Descent",
    "Mirror",
    "NumpyOps",
    "Pairs",
    "Recurrence",
    "Room",
    "Rows",
    "RunCopies",
    "Samples",
    "SparseIndex",
    "SparseProduct",
    "Stripes",
    "make_backend",
]


def make_backend(
    name: str,
    threads: int = 1,
    local_rank: int | None = None,
    compute: str = "float32",
    graphs: bool = True,
    convolution: str = "own",
) -> NumpyOps:
    """Return the backend called `name`: numpy, compiled, cupy, or auto for the fastest one available.

    threads: number of threads of the C kernels; psmpi limits those of NumPy's linear algebra with threadpoolctl.
    local_rank: rank of this process on its host. Processes take the visible devices in turn by their local rank; with
    None, auto takes no device. compute, graphs, convolution: see `CupyOps`. Raise UserError if the backend is unknown
    or not available.
    """
    if name not in ("auto", "numpy", "compiled", "cupy"):
        raise UserError(f"--backend {name!r} is unknown: choose auto, numpy, compiled or cupy")
    if name == "cupy" or (name == "auto" and local_rank is not None and gpu.available()):
        return CupyOps((local_rank or 0) % gpu.devices(), compute, graphs, convolution)
    if name == "compiled" and not compiled.level():
        raise UserError(f"--backend compiled: no C kernels: {compiled.missing()}; or use --backend numpy")
    return CompiledOps(threads=threads) if name != "numpy" and compiled.level() else NumpyOps()
