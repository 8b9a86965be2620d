"""Array operations behind one small set of names; a backend is chosen by name."""

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
    """The operations called `name`; `auto` takes the best one present. UserError where it is not known or not there.

    threads: those of the kernels; those of NumPy's linear algebra are set from outside (threadpoolctl). local_rank:
    this process's number on its host, which is dealt to the devices that it sees in turn; None: no device unless it is
    asked for by name. compute, graphs, convolution: as in `CupyOps`.
    """
    if name not in ("auto", "numpy", "compiled", "cupy"):
        raise UserError(f"--backend {name!r} is unknown: choose auto, numpy, compiled or cupy")
    if name == "cupy" or (name == "auto" and local_rank is not None and gpu.available()):
        return CupyOps((local_rank or 0) % gpu.devices(), compute, graphs, convolution)
    if name == "compiled" and not compiled.level():
        raise UserError(f"--backend compiled: the kernels are not there: {compiled.missing()}; or use --backend numpy")
    return CompiledOps(threads=threads) if name != "numpy" and compiled.level() else NumpyOps()
