"""Curvature operations by backend."""

from __future__ import annotations

from typing import Any

from psmpi.backend import NumpyOps
from psmpi.optim.curvature.compiled import CompiledCurvature
from psmpi.optim.curvature.gpu import CupyCurvature
from psmpi.optim.curvature.reference import CurvatureOps

# Curvature operations by the name of the backend; other backends use the reference.
KINDS: dict[str, Any] = {"compiled": CompiledCurvature, "cupy": CupyCurvature}


def curvature_ops(ops: NumpyOps) -> CurvatureOps:
    """Return the operations of partitioned quasi-Newton methods on arrays of `ops`."""
    kind: type[CurvatureOps] = KINDS.get(ops.name, CurvatureOps)
    return kind(ops)
