"""Array operations behind one small set of names; a backend is chosen by name."""

from __future__ import annotations

from psmpi.backend import compiled
from psmpi.backend.compiled import CompiledOps
from psmpi.backend.reference import Convolution, NumpyOps, Restriction, Stripes, Transfer
from psmpi.errors import UserError

__all__ = ["CompiledOps", "Convolution", "NumpyOps", "Restriction", "Stripes", "Transfer", "make_backend"]


def make_backend(name: str, threads: int = 1) -> NumpyOps:
    """The operations called `name`; `auto` takes the best one present. UserError where it is not known or not there.

    threads: those of the kernels; those of NumPy's linear algebra are set from outside (threadpoolctl).
    """
    if name == "compiled" and not compiled.level():
        raise UserError(f"--backend compiled: the kernels are not there: {compiled.missing()}; or use --backend numpy")
    if name not in ("auto", "numpy", "compiled"):
        raise UserError(f"--backend {name!r} is unknown: choose auto, numpy or compiled")
    return CompiledOps(threads=threads) if name != "numpy" and compiled.level() else NumpyOps()
