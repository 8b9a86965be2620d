"""The backend for GPUs, with CuPy, CUDA kernels, cuBLAS and cuDNN."""

from psmpi.backend.gpu.ops import CupyOps
from psmpi.backend.gpu.runtime import available, devices

__all__ = ["CupyOps", "available", "devices"]
