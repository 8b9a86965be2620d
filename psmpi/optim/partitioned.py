"""Partitioned quasi-Newton methods as optimizers: names, and the settings that each uses."""

from __future__ import annotations

from typing import ClassVar

from numpy.typing import DTypeLike

from psmpi.backend import NumpyOps
from psmpi.optim.base import Optimizer

COMMON = (
    "globalization", "line_search", "first_step", "extrapolation", "memory", "merge_pairs", "initial", "sigma",
    "scaling", "cg_tolerance", "cg_iterations", "momentum", "beta2", "eps",
)  # fmt: skip


class Partitioned(Optimizer):
    """Partitioned quasi-Newton: holds scalars only, the method steps; the elements' curvature is on the workers.

    momentum: of --extrapolation constant; beta2, eps: of --scaling moments. The other settings are the method's, from
    `NewtonSettings`.
    """

    needs_closure = True
    rated = False
    settings: ClassVar[tuple[str, ...]] = COMMON

    def __init__(
        self,
        n: int,
        dtype: DTypeLike,
        *,
        momentum: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        ops: NumpyOps | None = None,
    ) -> None:
        super().__init__(n, dtype, ops=ops)
        self.momentum, self.beta2, self.eps = momentum, beta2, eps


class PLBFGS(Partitioned):
    """L-BFGS of each element."""

    settings = (*COMMON, "curvature", "damping")


class PLSR1(Partitioned):
    """L-SR1 of each element."""


class PLSE(Partitioned):
    """L-BFGS of each element, and L-SR1 where its curvature is not positive."""

    settings = (*COMMON, "curvature")
