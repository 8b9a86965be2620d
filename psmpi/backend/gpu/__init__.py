"""Everything that knows CuPy and CUDA."""

from psmpi.backend.gpu.ops import CupyOps
from psmpi.backend.gpu.runtime import available, devices

__all__ = ["CupyOps", "available", "devices"]
