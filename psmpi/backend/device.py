"""The operations on a GPU: CuPy arrays, the kernels of cuda/ and cuBLAS.

Everything goes to one stream, in order. What waits for the device: a mirror's `wait` and `settle`, `host`, `put`, and
sums that are handed out as numbers.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from copy import copy
from functools import cache
from importlib.util import find_spec
from math import inf, log
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from psmpi.backend.blas import Blas, CublasError
from psmpi.backend.convolution import Convolution, Stripes
from psmpi.backend.cudnn import ChosenConvolution, Cudnn, groups
from psmpi.backend.device_convolution import ACTIVATIONS, DeviceConvolution, DeviceWindows
from psmpi.backend.device_moves import DeviceMirror, DeviceRestriction, DeviceSamples, DeviceTransfer
from psmpi.backend.grids import BLOCKS, blocks
from psmpi.backend.moves import Mirror, Restriction, Samples, Transfer
from psmpi.backend.recording import Recording
from psmpi.backend.reference import NumpyOps
from psmpi.backend.trial import Shape
from psmpi.errors import UserError

SOURCES = (
    "common.cuh", "conv.cu", "elements.cu", "layers.cu", "loss.cu", "norm.cu", "optim.cu", "samples.cu", "turn.cu",
    "vector.cu", "windows.cu",
)  # fmt: skip
REALS = {np.dtype(np.float32): "float", np.dtype(np.float64): "double"}
LOSSES = {"psl": 0, "logistic": 1, "nll": 2, "squared": 3}
INSTALL = "pip install 'psmpi[cuda]' (CUDA 13), pip install 'cupy-cuda12x[ctk]' (CUDA 12)"


@cache
def _cupy() -> Any:
    """CuPy, whose cache of compiled kernels is on this host's own disk unless CUPY_CACHE_DIR says otherwise."""
    if "CUPY_CACHE_DIR" not in os.environ:
        folder = Path(tempfile.gettempdir()) / f"psmpi-cupy-{os.getuid()}"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            # Kernels are loaded from there: nobody else may have put them there.
            found = folder.lstat()
            if found.st_uid == os.getuid() and not found.st_mode & 0o077:
                os.environ["CUPY_CACHE_DIR"] = str(folder)
        except OSError:
            # CuPy's own choice, in the home directory.
            pass
    import cupy

    return cupy


def devices() -> int:
    """The number of devices that this process sees, 1 or more; UserError that says why there is none."""
    try:
        cupy = _cupy()
    except ImportError as error:
        raise UserError(f"--backend cupy: CuPy does not load ({error}): {INSTALL}, or use --backend compiled") from None
    runtime = cupy.cuda.runtime
    try:
        count = int(runtime.getDeviceCount())
        why = "no device is visible"
    except runtime.CUDARuntimeError as error:
        count, why = 0, str(error)
    if count:
        return count
    driver, built = (_version(get) for get in (runtime.driverGetVersion, runtime.runtimeGetVersion))
    if driver == (0, 0):
        fix = "no NVIDIA driver is loaded on this host: run on a GPU node, or use --backend compiled"
    elif driver[0] < built[0]:
        fix = (
            f"its driver speaks CUDA {driver[0]}.{driver[1]} and this CuPy is built for CUDA {built[0]}: install a "
            f"CuPy for CUDA {driver[0]} (pip install cupy-cuda{driver[0]}x), or a newer driver"
        )
    else:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        fix = f"CUDA_VISIBLE_DEVICES is {seen!r}" if seen is not None else "nvidia-smi lists the devices"
        fix += "; ask the scheduler for a GPU (--gres=gpu:1), or use --backend compiled"
    raise UserError(f"--backend cupy: no GPU can be used on this host ({why}): {fix}")


def available() -> bool:
    """Whether this process sees a device and CuPy can use it."""
    if find_spec("cupy") is None:
        return False
    try:
        return devices() > 0
    except UserError:
        return False


def _version(get: Callable[[], int]) -> tuple[int, int]:
    try:
        number = int(get())
    except RuntimeError:
        number = 0
    return number // 1000, number % 1000 // 10


@cache
def _stream(cupy: Any, device: int) -> Any:
    """The stream of a device: one, so that operations of all that compute on it are in order."""
    return cupy.cuda.Stream(non_blocking=True)


class CupyOps(NumpyOps):
    """The operations on one device.

    compute: what the matrix products of float32 arrays, and convolutions by way of them, compute with: float32, tf32,
    float16 or bfloat16; sums and results stay float32. graphs: record repeated work as CUDA graphs. convolution: own,
    cudnn where it has the convolution and its values agree, or measured, where it is faster too.
    """

    name = "cupy"
    on_device = True
    line = 32
    chunk = 1 << 25

    def __init__(self, device: int = 0, compute: str = "float32", graphs: bool = True, convolution: str = "own"):
        self.cupy: Any = _cupy()
        self.device, self.compute, self.graphs = device, compute, graphs
        cuda = self.cupy.cuda
        cuda.Device(device).use()
        self.stream = _stream(self.cupy, device)
        self.stream.use()
        # CuPy raises the last of these for what it will not do while a stream is being recorded.
        self.failures = (cuda.runtime.CUDARuntimeError, cuda.driver.CUDADriverError, CublasError, NotImplementedError)
        self.allocations = 0
        # Scratch, and mirrors of small arrays, by what for.
        self.scratch: dict[tuple[str, np.dtype], Any] = {}
        self.mirrors: dict[tuple[str, np.dtype], Mirror] = {}
        self.functions: dict[tuple[str, np.dtype], Any] = {}
        self.modules: dict[np.dtype, Any] = {}
        self.blas = Blas(self.cupy, self.stream)
        # Sums over vectors that are waited for together.
        self.sums = self.mirror(self.zeros(64, np.dtype(np.float64)))
        self.cudnn: Cudnn | None = None
        self.told: list[str] = []
        if convolution != "own":
            if compute not in ("float32", "tf32"):
                raise UserError(
                    f"--convolution {convolution} computes with float32 and tf32, not --compute {compute}: leave one "
                    "out"
                )
            try:
                self.cudnn = Cudnn(self, convolution == "measured")
            except UserError as error:
                if convolution == "cudnn":
                    raise
                self.told = [str(error).replace("--convolution cudnn", "--convolution measured: psmpi's own alone")]

    @property
    def description(self) -> str:
        compute = "" if self.compute == "float32" else f", products in {self.compute}"
        cudnn = "" if self.cudnn is None else f", {self.cudnn.name}"
        return f"{self.name} ({self.place}{compute}{cudnn})"

    @property
    def choices(self) -> list[str]:
        """What was chosen of several ways to compute, for people."""
        return self.told if self.cudnn is None else self.cudnn.told

    @property
    def place(self) -> str:
        name = self.cupy.cuda.runtime.getDeviceProperties(self.device)["name"].decode()
        return f"{name}, device {self.device}"

    @property
    def bus(self) -> str:
        """What tells the device from others of the host, whatever number it has here."""
        return str(self.cupy.cuda.runtime.deviceGetPCIBusId(self.device))

    def compile(self, dtype: np.dtype) -> None:
        """Compile the kernels for a dtype, or find them compiled; UserError where a library for that is missing."""
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
                # The number is there for CuPy's cache, which does not look into included files.
                options = ("-std=c++17", f"-DREAL={REALS[dtype]}", f"-DPSMPI_SOURCE={number}", f"-I{folder}")
                self.modules[dtype] = self.cupy.RawModule(code=code, options=options)
            self.functions[name, dtype] = self.modules[dtype].get_function(name)
        return self.functions[name, dtype]

    def launch(self, name: str, dtype: np.dtype, grid: tuple[int, ...], block: tuple[int, ...], *args: Any) -> None:
        """Start a kernel; `args` are arrays, Python ints (64 bits, 0 for no array) and floats (64 bits)."""
        self._function(name, dtype)(grid, block, args)

    def spread(self, name: str, dtype: np.dtype, size: int, *args: Any) -> None:
        """Start a kernel that takes `size` elements one by one, however many threads there are."""
        if size:
            self.launch(name, dtype, (min(blocks(size, 256), 16 * BLOCKS),), (256,), *args)

    def partial(self, size: int, dtype: np.dtype) -> Any:
        """Scratch for the parts of a sum, valid until the next sum."""
        return self.room("partial", size, dtype)

    def room(self, name: str, size: int, dtype: np.dtype) -> Any:
        """Scratch (size or more,) of this name, valid until the next of the same."""
        if (name, dtype) not in self.scratch or self.scratch[name, dtype].size < size:
            self.scratch[name, dtype] = self.empty(size, dtype)
        return self.scratch[name, dtype]

    def _small(self, name: str, size: int, dtype: np.dtype) -> Mirror:
        """A mirror of (size or more,) of this name."""
        found = self.mirrors.get((name, dtype))
        if found is None or found.host.size < size:
            if found is not None:
                # Pinned memory is for others as soon as it is let go.
                found.settle()
            found = self.mirrors[name, dtype] = self.mirror(self.empty(size, dtype))
        return found

    def _there(self, name: str, values: np.ndarray) -> Any:
        """Values of host memory on the device, until the next of this name."""
        mirror = self._small(name, values.size, values.dtype)
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

    def address(self, array: Any) -> int:
        return int(array.data.ptr)

    def mirror(self, array: Any) -> Mirror:
        # What is in host memory already needs none.
        return Mirror(array) if isinstance(array, np.ndarray) else DeviceMirror(array, self)

    def host(self, array: Any) -> np.ndarray:
        found: np.ndarray = self.cupy.asnumpy(array)
        return found

    def put(self, values: np.ndarray) -> Any:
        mirror = self.mirror(self.empty(values.size, values.dtype).reshape(values.shape))
        mirror.host[...] = values
        mirror.push()
        mirror.settle()
        return mirror.array

    def synchronize(self) -> None:
        self.stream.synchronize()

    def record(self, work: Callable[..., Any]) -> Callable[..., Any]:
        return Recording(self, work)

    def apart(self) -> CupyOps:
        made = copy(self)
        # Scratch of recorded work stays where it is.
        made.scratch, made.mirrors = {}, {}
        return made

    def samples(self, values: np.ndarray, scale: float) -> Samples:
        return DeviceSamples(values, scale, self)

    def matmul(self, a: Any, b: Any, out: Any) -> None:
        if out.size == 0:
            return
        if out.ndim == 2:
            a, b, out = a[None], b[None], out[None]
        if out.ndim == 3:
            self.blas.product(a, b, out, self.compute)
            return
        # All of the first axis meet the same b: a step of 0 from one to the next.
        for k in range(out.shape[1]):
            same = self.cupy.lib.stride_tricks.as_strided(b[k], (len(out), *b.shape[1:]), (0, *b.strides[1:]))
            self.blas.product(a[:, k], same, out[:, k], self.compute)

    def add_bias(self, y: Any, bias: Any) -> None:
        self.finish(y, bias, "identity")

    def row_sums(self, y: Any, out: Any) -> None:
        self.finish_back(y, y, "identity", out)

    def finish(self, y: Any, bias: Any, kind: str) -> None:
        count, n = bias.shape
        steps = (stride // bias.itemsize for stride in bias.strides)
        self.spread("finish", y.dtype, y.size, count, n, y.size // (count * n), y, bias, *steps, ACTIVATIONS[kind])

    def finish_back(self, y: Any, dy: Any, kind: str, dbias: Any) -> None:
        if dbias is None:
            self.activate_back(kind, y, dy)
            return
        count, n = dbias.shape
        m = dy.size // (count * n)
        splits = max(1, min(blocks(BLOCKS, count * n), blocks(m, 2048)))
        partial = self.partial(count * n * splits, dy.dtype)
        shape, grid = (count, n, m), (count * n, splits)
        self.launch("finish_back", dy.dtype, grid, (256,), *shape, y, dy, partial, splits, ACTIVATIONS[kind])
        steps = (stride // dbias.itemsize for stride in dbias.strides)
        self.spread("row_sums", dy.dtype, count * n, count, n, splits, partial, dbias, *steps)

    def normalize(self, x: Any, eps: float, out: Any, scale: Any) -> None:
        n, m = x.shape
        self.launch("normalize", x.dtype, (n,), (256,), m, x, eps, out, scale)

    def affine(self, x: Any, gamma: Any, beta: Any, kind: str, y: Any) -> None:
        n, m = x.shape
        self.spread("affine", x.dtype, x.size, n, m, x, gamma, beta, ACTIVATIONS[kind], y)

    def normalize_back(
        self, x: Any, scale: Any, gamma: Any, y: Any, dy: Any, kind: str, dgamma: Any, dbeta: Any
    ) -> None:
        n, m = x.shape
        self.launch(
            "normalize_back", x.dtype, (n,), (256,), m, x, scale, gamma, y, dy, ACTIVATIONS[kind], dgamma, dbeta
        )

    def convolution(
        self,
        stripes: Sequence[Stripes],
        in_shape: tuple[int, int, int],
        out_shape: tuple[int, int, int],
        kernel: int,
        stride: int,
        dtype: np.dtype,
        activation: str = "identity",
    ) -> Convolution:
        own: Convolution
        if self.compute != "float32" and dtype == np.float32:
            # The tensor cores compute products of matrices.
            own = DeviceWindows(stripes, in_shape, out_shape, kernel, stride, dtype, activation, ops=self)
        else:
            own = DeviceConvolution(self, stripes, in_shape, out_shape, kernel, stride, dtype, activation)  # type: ignore[assignment]
        count = groups(stripes, in_shape[0], out_shape[0])
        if self.cudnn is None or not count:
            return own
        shape = Shape(in_shape, out_shape, count, kernel, stride, activation, np.dtype(dtype))
        return ChosenConvolution(own, self.cudnn, shape)  # type: ignore[return-value]

    def im2col(self, x: Any, stride: int, first: int, cols: Any) -> None:
        _, k, _, rows, width, b = cols.shape
        self.spread("im2col", x.dtype, cols.size, *x.shape[:3], b, k, stride, first, rows, width, x, cols)

    def col2im(self, cols: Any, stride: int, first: int, dx: Any) -> None:
        _, k, _, rows, width, b = cols.shape
        self.spread("col2im", dx.dtype, dx.size, *dx.shape[:3], b, k, stride, first, rows, width, cols, dx)

    def fold(self, w: Any, pool: int, out: Any) -> None:
        count, rows, n_in, k, _ = w.shape
        steps = (stride // w.itemsize for stride in w.strides[:2])
        self.spread("fold", w.dtype, out.size, count, rows, n_in, k, pool, w, *steps, out)

    def unfold(self, dfolded: Any, pool: int, out: Any) -> None:
        count, rows, n_in, k, _ = out.shape
        steps = (stride // out.itemsize for stride in out.strides[:2])
        self.spread("unfold", out.dtype, out.size, count, rows, n_in, k, pool, dfolded, out, *steps)

    def mean_pool(self, x: Any, size: int, y: Any, activation: str = "identity") -> None:
        self.spread("mean_pool", x.dtype, y.size, *x.shape, size, x, y, ACTIVATIONS[activation])

    def mean_pool_back(self, dy: Any, size: int, dx: Any) -> None:
        self.spread("mean_pool_back", dy.dtype, dx.size, *dx.shape, size, dy, dx)

    def max_pool(self, x: Any, size: int, y: Any, activation: str = "identity") -> None:
        self.spread("max_pool", x.dtype, y.size, *x.shape, size, x, y, ACTIVATIONS[activation])

    def max_pool_back(self, x: Any, y: Any, dy: Any, size: int, dx: Any) -> None:
        self.spread("max_pool_back", dy.dtype, dx.size, *x.shape, size, x, dy, dx)

    def activate(self, kind: str, y: Any) -> None:
        if kind != "identity":
            self.spread("activate", y.dtype, y.size, y.size, y, ACTIVATIONS[kind])

    def activate_back(self, kind: str, y: Any, dy: Any) -> None:
        if kind != "identity":
            self.spread("activate_back", y.dtype, y.size, y.size, y, dy, ACTIVATIONS[kind])

    def losses(
        self,
        name: str,
        scores: Any,
        labels: Any,
        scale: float,
        kappa: float,
        limit: float,
        pairs: Any,
        own: slice,
        grad: Any,
        report: Any,
    ) -> None:
        """One pass over a minibatch of the loss called `name`; grad and report as in `Loss.fused`."""
        classes, b = scores.shape
        each = self.partial(3 * b, np.dtype(np.float64))
        seen, into = (0 if array is None else array for array in (pairs, grad))
        settings = (LOSSES[name], classes, b, scores, labels, scale, kappa, limit, seen)
        self.spread("losses", scores.dtype, b, *settings, into, each)
        first, last, _ = own.indices(classes) if grad is not None else (0, 0, 1)
        self.launch("loss_report", scores.dtype, (1,), (256,), classes, b, first, last, each, into, scale, report)

    def distances(self, outputs: Any, targets: Any, labels: Any, scale: float, grad: Any, report: Any) -> None:
        """The same for the loss ||f - S_y||^2 of outputs f (units, b), the y-th column of targets S (units, classes)
        float64; of the report the second and the third number are 0.
        """
        count = min(blocks(outputs.size, 1024), BLOCKS)
        partial = self.partial(4 * count, np.dtype(np.float64))
        shape = (targets.shape[1], outputs.shape[1], outputs.size)
        self.launch(
            "distances", outputs.dtype, (count,), (256,), *shape, outputs, targets, labels, scale, grad, partial
        )
        # What blocks have found is added up as if they were samples with one score each.
        peaks = partial[3 * count :]
        self.launch("loss_report", outputs.dtype, (1,), (256,), 1, count, 0, 1, partial, peaks, scale, report)

    def psl_loss(self, *args: Any) -> None:
        self.losses("psl", *args)

    def logistic_loss(self, *args: Any) -> None:
        self.losses("logistic", *args)

    def nll_loss(self, *args: Any) -> None:
        self.losses("nll", *args)

    def squared_loss(self, *args: Any) -> None:
        self.losses("squared", *args)

    def cast_scores(self, grad: Any, out: Any, report: Any) -> None:
        self.spread("cast_scores", out.dtype, out.size, out.size, grad, out, report)

    def give_back(self, g: Any, report: Any, limit: float) -> None:
        self.spread("give_back", g.dtype, g.size, g.size, g, report, limit)

    def transfer(self, table: np.ndarray) -> Transfer:
        return DeviceTransfer(table, self)

    def restriction(self, runs: Sequence[Sequence[tuple[int, int]]], size: int) -> Restriction:
        return DeviceRestriction(runs, size, self)

    def _dots(self, pairs: Any, v: Any, out: Any) -> None:
        """out (count * rows,) float64 = Z v."""
        count, rows, size = pairs.shape
        # By the size alone: not by the number of elements, which is that of ranks.
        splits = min(BLOCKS, blocks(size, 2048))
        partial = self.partial(count * rows * splits, np.dtype(np.float64))
        self.launch("pair_dots", v.dtype, (count * rows, splits), (256,), rows, size, pairs, v, partial)
        self.spread("pair_sums", v.dtype, count * rows, count * rows, splits, partial, out)

    def pair_dots(self, pairs: Any, v: Any) -> np.ndarray:
        count, rows, size = pairs.shape
        if not count * size:
            return np.zeros((count, rows))
        found = self._small("dots", count * rows, np.dtype(np.float64))
        self._dots(pairs, v, found.array)
        found.fetch(slice(0, count * rows))
        found.wait()
        return found.host[: count * rows].reshape(count, rows).copy()

    def row_dots(self, a: Any, b: Any) -> np.ndarray:
        return self.pair_dots(a.reshape(len(a), 1, -1), b)[:, 0]

    def products(self, pairs: Any, middle: Any, sigma: Any, coefficients: Any, v: Any, out: Any) -> None:
        count, rows, size = pairs.shape
        if not count * size:
            return
        self._dots(pairs, v, coefficients)
        weights = self.room("weights", count * rows, np.dtype(np.float64))
        self.spread("pair_weights", v.dtype, count * rows, count, rows, middle, coefficients, weights)
        arrays = (pairs, sigma, weights, v, out)
        self.spread("pair_combine", v.dtype, count * size, count, rows, size, *arrays)

    def restricted_products(
        self, elements: Restriction, pairs: Any, middle: Any, sigma: Any, coefficients: Any, p: Any, q: Any
    ) -> None:
        v, out = elements.rows(p.dtype)  # type: ignore[attr-defined]
        elements.restrict(p, v)
        self.products(pairs, middle, sigma, coefficients, v, out)
        elements.accumulate(out, q)

    def keep_pairs(self, pairs: Any, slots: np.ndarray, cleared: np.ndarray, s: Any, y: Any) -> None:
        count, rows, size = pairs.shape
        where = (self._there("slots", slots), self._there("cleared", cleared.view(np.uint8)))
        self.spread("keep_pairs", s.dtype, count * size, count, rows // 2, size, *where, s, y, pairs)

    def mix_rows(self, a: np.ndarray, x: Any, b: np.ndarray, y: Any) -> None:
        first, second = self._there("factors of x", a), self._there("factors of y", b)
        self.spread("mix_rows", x.dtype, x.size, *x.shape, first, x, second, y)

    def term_weights(
        self, grad: Any, labels: Any, report: Any, own: int, others: Any, lost: Any, won: Any, out: Any
    ) -> None:
        shape = (len(others), grad.shape[1], out.shape[1])
        self.spread("term_weights", out.dtype, out.size, *shape, grad, labels, report, own, others, lost, won, out)

    def scale_samples(self, y: Any, weights: Any, out: Any) -> None:
        many, b = weights.shape
        self.spread("scale_samples", y.dtype, out.size, many, y.size // b, b, y, weights, out)

    def weighted_sums(self, y: Any, weights: Any, out: Any) -> None:
        (count, n, b), steps = y.shape, (stride // out.itemsize for stride in out.strides)
        self.launch("weighted_sums", y.dtype, (count * n, len(weights)), (256,), n, b, y, weights, out, *steps)

    def position_sums(self, y: Any, out: Any) -> None:
        """out (n, b) = y (n, rows, columns, b) summed over its positions."""
        n, b = out.shape
        self.spread("position_sums", y.dtype, out.size, n, y.shape[1] * y.shape[2], b, y, out)

    def moment_scale(self, g: Any, squares: Any, root: Any, beta2: float, correction: float, eps: float) -> None:
        self.spread("moment_scale", g.dtype, g.size, g.size, g, squares, root, beta2, correction, eps)

    def squared_norm(self, g: Any) -> float:
        return float(self.dots([(g, g)])[0])

    def combine(self, out: Any, *terms: tuple[float, Any]) -> None:
        # Up to four in a launch; the sum so far is the first of the next ones.
        for k in range(1, max(2, len(terms)), 3):
            some = [(1.0, out) if k > 1 else terms[0], *terms[k : k + 3]]
            some += [(0.0, 0)] * (4 - len(some))
            arrays, factors = [array for _, array in some], [float(factor) for factor, _ in some]
            self.spread("combine", out.dtype, out.size, out.size, out, *arrays, *factors)

    def dots(self, pairs: Sequence[tuple[Any, Any]]) -> np.ndarray:
        n = pairs[0][0].size if pairs else 0
        if not n:
            return np.zeros(len(pairs))
        each, partial = self._shares(len(pairs), n)
        for k in range(0, len(pairs), 4):
            some = [array for pair in pairs[k : k + 4] for array in pair]
            some += [0] * (8 - len(some))
            self.launch("dots", pairs[0][0].dtype, (each,), (256,), n, *some, partial[k * each :])
        return self._sums(len(pairs), each, partial, pairs[0][0].dtype)

    def abs_sum(self, x: Any) -> float:
        if not x.size:
            return 0.0
        each, partial = self._shares(1, x.size)
        self.launch("abs_sum", x.dtype, (each,), (256,), x.size, x, partial)
        return float(self._sums(1, each, partial, x.dtype)[0])

    def _shares(self, count: int, n: int) -> tuple[int, Any]:
        """The number of blocks that make a sum over n elements, and scratch for what they come to in `count` sums."""
        if count > self.sums.host.size:
            self.sums = self.mirror(self.zeros(count, np.dtype(np.float64)))
        each = min(blocks(n, 1024), BLOCKS)
        # For as many sums as there may be: a larger scratch would end the recordings.
        return each, self.partial(self.sums.host.size * each, np.dtype(np.float64))

    def _sums(self, count: int, each: int, partial: Any, dtype: np.dtype) -> np.ndarray:
        """What the shares of `each` blocks in `count` sums come to, by the kernels of `dtype`."""
        self.launch("sum_partials", dtype, (count,), (256,), each, partial, self.sums.array)
        self.sums.fetch(slice(count))
        self.sums.wait()
        return self.sums.host[:count].copy()

    def multiply(self, x: Any, by: Any) -> None:
        self.spread("multiply", x.dtype, x.size, x.size, x, by)

    def scale(self, g: Any, factor: float) -> None:
        self.spread("scale", g.dtype, g.size, g.size, g, factor)

    def sgd(self, w: Any, g: Any, rate: float, l2: float) -> bool:
        self.spread("sgd", w.dtype, w.size, w.size, w, g, rate, l2)
        return True

    def momentum(self, w: Any, g: Any, v: Any, rate: float, beta: float, l2: float, nesterov: bool) -> bool:
        self.spread("momentum", w.dtype, w.size, w.size, w, g, v, rate, beta, l2, int(nesterov))
        return True

    def rmsprop(self, w: Any, g: Any, v: Any, rate: float, alpha: float, eps: float, l2: float) -> bool:
        self.spread("rmsprop", w.dtype, w.size, w.size, w, g, v, rate, alpha, eps, l2)
        return True

    def adam(
        self, w: Any, g: Any, m: Any, v: Any, rate: float, root: float, beta1: float, beta2: float, eps: float,
        l2: float, keep: float,
    ) -> bool:  # fmt: skip
        self.spread("adam", w.dtype, w.size, w.size, w, g, m, v, rate, root, beta1, beta2, eps, l2, keep)
        return True

    def counted_adam(
        self, w: Any, g: Any, m: Any, v: Any, t: Any, rate: float, beta1: float, beta2: float, eps: float, l2: float,
        keep: float,
    ) -> bool:  # fmt: skip
        logs = [log(beta) if beta else -inf for beta in (beta1, beta2)]
        self.spread("counted_adam", w.dtype, w.size, w.size, w, g, m, v, t, rate, *logs, beta1, beta2, eps, l2, keep)
        return True
