"""One device: its arrays, the kernels of cuda/, and scratch.

All work goes to one stream, in order. Only these calls wait for the device: `wait` and `settle` of a mirror, `host`,
`put`, `synchronize`, and operations that return numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any, TypeVar
from zlib import crc32

import numpy as np

from psmpi.backend.gpu.blas import CublasError
from psmpi.backend.gpu.grids import BLOCKS, blocks
from psmpi.backend.gpu.mirror import DeviceMirror
from psmpi.backend.gpu.runtime import INSTALL, load_cupy, stream_of
from psmpi.backend.reference.arrays import Arrays
from psmpi.backend.reference.moves import Mirror
from psmpi.errors import UserError

SOURCES = (
    "common.cuh", "attention.cu", "conv.cu", "elements.cu", "layers.cu", "loss.cu", "norm.cu", "optim.cu",
    "recurrence.cu", "samples.cu", "sparse.cu", "tiles.cu", "turn.cu", "vector.cu", "windows.cu",
)  # fmt: skip
REALS = {np.dtype(np.float32): "float", np.dtype(np.float64): "double"}

Ops = TypeVar("Ops", bound="Device")


class Device(Arrays):
    """CuPy arrays and kernels on one device. compute, graphs: see `CupyOps`."""

    name = "cupy"
    on_device = True
    batch_multiple = 32
    chunk = 1 << 25

    def __init__(self, device: int, compute: str, graphs: bool) -> None:
        super().__init__()
        self.cupy: Any = load_cupy()
        self.device, self.compute, self.graphs = device, compute, graphs
        cuda = self.cupy.cuda
        cuda.Device(device).use()
        self.stream = stream_of(self.cupy, device)
        self.stream.use()
        # Errors of work that cannot be captured. CuPy raises NotImplementedError for calls that it refuses.
        self.failures = (cuda.runtime.CUDARuntimeError, cuda.driver.CUDADriverError, CublasError, NotImplementedError)
        self.allocations = 0
        # Mirrors of small arrays, by name and dtype.
        self.mirrors: dict[tuple[str, np.dtype], Mirror] = {}
        self.functions: dict[tuple[str, np.dtype], Any] = {}
        self.modules: dict[np.dtype, Any] = {}

    @property
    def place(self) -> str:
        name = self.cupy.cuda.runtime.getDeviceProperties(self.device)["name"].decode()
        return f"{name}, device {self.device}"

    @property
    def pci_id(self) -> str:
        return str(self.cupy.cuda.runtime.deviceGetPCIBusId(self.device))

    def compile(self, dtype: np.dtype) -> None:
        """Compile the kernels for a dtype, or load them from CuPy's cache; UserError if a library is missing."""
        try:
            self._function("activate", np.dtype(dtype))
        except (self.cupy.cuda.compiler.CompileException, ImportError, OSError, RuntimeError) as error:
            raise UserError(
                f"--backend cupy: the kernels cannot be compiled ({str(error).strip().splitlines()[0]}): CuPy needs "
                f"NVRTC and the CUDA headers: {INSTALL}, or use --backend compiled"
            ) from None

    def _function(self, name: str, dtype: np.dtype) -> Any:
        if (name, dtype) not in self.functions:
            if dtype not in self.modules:
                folder = Path(__file__).parent / "cuda"
                number = crc32(b"".join((folder / source).read_bytes() for source in SOURCES))
                code = "".join(f'#include "{source}"\n' for source in SOURCES)
                # CuPy's cache depends on the options but not on included files: the checksum stands for these.
                options = ("-std=c++17", f"-DREAL={REALS[dtype]}", f"-DPSMPI_SOURCE={number}", f"-I{folder}")
                self.modules[dtype] = self.cupy.RawModule(code=code, options=options)
            self.functions[name, dtype] = self.modules[dtype].get_function(name)
        return self.functions[name, dtype]

    def launch(self, name: str, dtype: np.dtype, grid: tuple[int, ...], block: tuple[int, ...], *args: Any) -> None:
        """Start a kernel. args: arrays, Python ints (passed as 64 bits; 0 stands for no array) and floats (64 bits)."""
        self._function(name, dtype)(grid, block, args)

    def spread(self, name: str, dtype: np.dtype, size: int, *args: Any) -> None:
        """Start a kernel over `size` elements, whose threads each loop over some of them."""
        if size:
            self.launch(name, dtype, (min(blocks(size, 256), 16 * BLOCKS),), (256,), *args)

    def partial(self, size: int, dtype: np.dtype) -> Any:
        """Return scratch for partial sums, valid until the next sum."""
        return self.scratch("partial", size, dtype)

    def small_mirror(self, name: str, size: int, dtype: np.dtype) -> Mirror:
        """Return the mirror (size or more,) with this name and dtype."""
        mirror = self.mirrors.get((name, dtype))
        if mirror is None or mirror.host.size < size:
            if mirror is not None:
                # CuPy reuses pinned memory as soon as it is freed: the last copy must have ended.
                mirror.settle()
            mirror = self.mirrors[name, dtype] = self.mirror(self.empty(size, dtype))
        return mirror

    def upload(self, name: str, values: np.ndarray) -> Any:
        """Copy values to the device; the array is valid until the next call with this name."""
        mirror = self.small_mirror(name, values.size, values.dtype)
        mirror.settle()
        mirror.host[: values.size] = values.reshape(-1)
        mirror.push(slice(0, values.size))
        return mirror.array

    def empty(self, size: int, dtype: np.dtype) -> Any:
        self.allocations += 1
        return self.cupy.empty(size, dtype)

    def zeros(self, size: int, dtype: np.dtype) -> Any:
        self.allocations += 1
        return self.cupy.zeros(size, dtype)

    def view(self, array: Any, start: int, shape: Sequence[int], steps: Sequence[int]) -> Any:
        flat = array.reshape(-1)
        strides = tuple(step * flat.itemsize for step in steps)
        return self.cupy.lib.stride_tricks.as_strided(flat[start:], tuple(shape), strides)

    def mirror(self, array: Any) -> Mirror:
        # An array in host memory is its own mirror.
        return Mirror(array) if isinstance(array, np.ndarray) else DeviceMirror(array, self.cupy, self.stream)

    def host(self, array: Any) -> np.ndarray:
        values: np.ndarray = self.cupy.asnumpy(array)
        return values

    def put(self, values: np.ndarray) -> Any:
        mirror = self.mirror(self.empty(values.size, values.dtype).reshape(values.shape))
        mirror.host[...] = values
        mirror.push()
        mirror.settle()
        return mirror.array

    def synchronize(self) -> None:
        self.stream.synchronize()

    def separate(self: Ops) -> Ops:
        made = copy(self)
        # Recorded work uses the scratch of `self`, which must not move.
        made.buffers, made.mirrors = {}, {}
        return made
