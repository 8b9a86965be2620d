"""Array operations behind one small set of names; a backend is chosen by name."""

from __future__ import annotations

from psmpi.backend.reference import NumpyOps
from psmpi.errors import UserError

BACKENDS: dict[str, type[NumpyOps]] = {"numpy": NumpyOps}


def make_backend(name: str) -> NumpyOps:
    """The operations called `name`; `auto` takes the best one present. UserError where the name is not known."""
    if name == "auto":
        name = "numpy"
    if name not in BACKENDS:
        raise UserError(f"--backend {name!r} is unknown: choose auto or one of {', '.join(BACKENDS)}")
    return BACKENDS[name]()
