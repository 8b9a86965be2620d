"""The backend `cupy`: CuPy arrays, the kernels of cuda/, cuBLAS and, optionally, cuDNN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from psmpi.backend.gpu.blas import Blas
from psmpi.backend.gpu.cudnn import Cudnn
from psmpi.backend.gpu.losses import DeviceLosses
from psmpi.backend.gpu.moves import DeviceCompressedSamples, DeviceRunCopies, DeviceSamples
from psmpi.backend.gpu.optim import DeviceSteps
from psmpi.backend.gpu.products import DeviceProducts
from psmpi.backend.gpu.recording import Recording
from psmpi.backend.gpu.tiles import DeviceTiles
from psmpi.backend.gpu.vectors import DeviceVectors
from psmpi.backend.reference.moves import CompressedSamples, RowCopies, RowRuns, RunCopies, Samples
from psmpi.backend.reference.ops import NumpyOps
from psmpi.errors import UserError


class CupyOps(DeviceProducts, DeviceLosses, DeviceTiles, DeviceVectors, DeviceSteps, NumpyOps):
    """The operations on one device.

    compute: precision of the factors in matrix products, and convolutions by them, of float32 arrays: float32, tf32,
    float16 or bfloat16; sums and results are float32. graphs: record repeated work as CUDA graphs. convolution: own
    (psmpi's kernels), cudnn (cuDNN where it has the convolution and its values agree), or measured (cuDNN where it is
    faster too). Raise UserError for a combination that does not exist, or if a library does not load.
    """

    def __init__(self, device: int = 0, compute: str = "float32", graphs: bool = True, convolution: str = "own"):
        super().__init__(device, compute, graphs)
        self.blas = Blas(self.cupy, self.stream)
        # Results of scalar products, which are copied to the host together.
        self.sums = self.mirror(self.zeros(64, np.dtype(np.float64)))
        self.cudnn: Cudnn | None = None
        self._choices: list[str] = []
        if convolution != "own":
            if compute not in ("float32", "tf32"):
                raise UserError(
                    f"--convolution {convolution} computes with float32 and tf32, not --compute {compute}: leave one "
                    "of the options out"
                )
            try:
                self.cudnn = Cudnn(self, convolution == "measured")
            except UserError as error:
                if convolution == "cudnn":
                    raise
                self._choices = [str(error).replace("--convolution cudnn", "--convolution measured: psmpi's own alone")]

    @property
    def description(self) -> str:
        compute = "" if self.compute == "float32" else f", products in {self.compute}"
        cudnn = "" if self.cudnn is None else f", {self.cudnn.name}"
        return f"{self.name} ({self.place}{compute}{cudnn})"

    @property
    def choices(self) -> list[str]:
        return self._choices if self.cudnn is None else self.cudnn.choices

    def record(self, work: Callable[..., Any]) -> Callable[..., Any]:
        return Recording(self, work)

    def samples(self, values: np.ndarray, scale: float) -> Samples:
        return DeviceSamples(values, scale, self)

    def compressed_samples(
        self, starts: np.ndarray, columns: np.ndarray, values: np.ndarray, features: int
    ) -> CompressedSamples:
        return DeviceCompressedSamples(starts, columns, values, features, self)

    def run_copies(self, table: np.ndarray) -> RunCopies:
        return DeviceRunCopies(table, self)

    def row_copies(self, source: np.ndarray, target: np.ndarray) -> RowCopies:
        return RowRuns(source, target, self.run_copies)
