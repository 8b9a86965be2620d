"""Names and settings of the partitioned quasi-Newton optimizers."""

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
    """Partitioned quasi-Newton optimizer: it holds settings and scalars only.

    The training method computes the steps, and the workers hold the elements' curvature. momentum: for --extrapolation
    constant; beta2, eps: for --scaling moments. The method reads the other settings from `NewtonSettings`.
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
    """Partitioned quasi-Newton with L-BFGS for each element."""

    summary = "partitioned L-BFGS of each element, for --partition pairs"
    settings = (*COMMON, "curvature", "damping")


class PLSR1(Partitioned):
    """Partitioned quasi-Newton with L-SR1 for each element."""

    summary = "partitioned L-SR1 of each element, for --partition pairs"


class PLSE(Partitioned):
    """Partitioned quasi-Newton with L-BFGS for each element, or L-SR1 if the element's curvature is not positive."""

    summary = "L-BFGS of each element, L-SR1 where curvature is not positive"
    settings = (*COMMON, "curvature")
