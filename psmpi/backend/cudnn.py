"""Convolutions by cuDNN on a GPU, in place of psmpi's own where the values agree and, if wished, where it is faster.

cuDNN is found out about on the very shapes, with random data: what it refuses, cannot do while a step is recorded, or
does wrong costs nothing but its use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from psmpi.backend.convolution import Convolution, Stripes
from psmpi.errors import UserError

if TYPE_CHECKING:
    from psmpi.backend.device import CupyOps

# What an operation of cuDNN may use besides its arrays, in bytes.
WORKSPACE = 1 << 28
# How cuDNN takes for granted that arrays begin, in bytes.
ALIGNED = 16
# Of the tiles of cuda/turn.cu.
SIDE = 32
# Measurements of a candidate.
REPEATS = 5
# The largest distance from psmpi's own values, over the largest of these, by what is computed with. Sums in another
# order stay far below it; those of numbers that were rounded to fewer bits, where that was not asked for, do not.
TOLERANCE = {"float32": 1e-4, "tf32": 5e-3, "float64": 1e-10}
INSTALL = (
    "pip install 'psmpi[cudnn]' (CUDA 13), pip install nvidia-cudnn-frontend nvidia-cudnn-cu12 (CUDA 12), or use "
    "--convolution own"
)

# Sizes of a tensor as cuDNN orders them, samples and channels first, and the steps between its elements.
Layout = tuple[tuple[int, ...], tuple[int, ...]]


def _packed(*dim: int) -> Layout:
    return dim, tuple(prod(dim[k + 1 :]) for k in range(len(dim)))


@dataclass(frozen=True)
class Shape:
    """A convolution of one group of channels, or of equal groups side by side: what a choice depends on."""

    in_shape: tuple[int, int, int]
    out_shape: tuple[int, int, int]
    groups: int
    kernel: int
    stride: int
    activation: str
    dtype: np.dtype

    def __str__(self) -> str:
        x, y = ("x".join(map(str, shape)) for shape in (self.in_shape, self.out_shape))
        groups = f", {self.groups} groups" if self.groups > 1 else ""
        return f"convolution {x} -> {y}, kernel {self.kernel}, stride {self.stride}{groups}, {self.dtype}"

    @property
    def kernels(self) -> tuple[int, int, int, int]:
        return self.out_shape[0], self.in_shape[0] // self.groups, self.kernel, self.kernel


def groups(stripes: Sequence[Stripes], channels: int, units: int) -> int:
    """The number of equal groups of consecutive channels and units that the stripes are; 0 where they are none."""
    if len(stripes) != 1:
        return 0
    (s,) = stripes
    disjoint = s.count == 1 or s.source_step == s.n_in
    whole = (s.source, s.out, s.count * s.n_in, s.count * s.n) == (0, 0, channels, units)
    return s.count if disjoint and whole else 0


class Cudnn:
    """cuDNN on the stream of one device, what its operations share, and which convolutions it does.

    measured: only those in which it is faster. told: what was chosen, a line each. UserError where it does not load.
    """

    def __init__(self, ops: CupyOps, measured: bool):
        self.ops, self.measured = ops, measured
        # cuDNN opens the CUDA runtime by its name alone: this finds it among packages of Python, and loads it.
        with suppress(Exception):
            from cuda import pathfinder

            pathfinder.load_nvidia_dynamic_lib("cudart")
        try:
            import cudnn

            self.cudnn: Any = cudnn
            self.handle = cudnn.create_handle()
            cudnn.set_stream(handle=self.handle, stream=ops.stream.ptr)
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            raise UserError(f"--convolution cudnn: cuDNN does not load ({error}): {INSTALL}") from None
        self.rooms: dict[tuple[str, np.dtype], Any] = {}
        self.chosen: dict[tuple[Shape, int], CudnnConvolution | None] = {}
        self.told: list[str] = []

    @property
    def name(self) -> str:
        """What a person is told of it."""
        number = self.cudnn.backend_version()
        how = "the faster of psmpi and" if self.measured else "by"
        return f"convolutions {how} cuDNN {number // 10000}.{number // 100 % 100}"

    def computes(self, dtype: np.dtype) -> bool:
        """Whether it computes with what was asked for."""
        return self.precision(dtype) in TOLERANCE

    def precision(self, dtype: np.dtype) -> str:
        """What arrays of this dtype are multiplied as."""
        return self.ops.compute if dtype == np.float32 else "float64"

    def room(self, name: str, size: int, dtype: np.dtype) -> Any:
        """Scratch (size,) of all convolutions, valid until its next use."""
        if (name, dtype) not in self.rooms or self.rooms[name, dtype].size < size:
            self.rooms[name, dtype] = self.ops.empty(size, dtype)
        return self.rooms[name, dtype][:size]

    def operation(
        self, name: str, inputs: dict[str, Layout], output: Layout, stride: int, dtype: np.dtype
    ) -> Callable[..., None]:
        """An operation of cuDNN on two arrays, and into a third. RuntimeError, or another one, where it has none.

        Only such as give the same bits each time, and whose products are of all bits unless fewer are asked for.
        """
        cudnn = self.cudnn
        real = cudnn.data_type.FLOAT if dtype == np.float32 else cudnn.data_type.DOUBLE
        graph = cudnn.pygraph(
            io_data_type=real, intermediate_data_type=real, compute_data_type=real, handle=self.handle
        )
        tensors = {
            key: graph.tensor(dim=list(dim), stride=list(steps), data_type=real, name=key)
            for key, (dim, steps) in inputs.items()
        }
        out = getattr(graph, name)(**tensors, padding=[0, 0], stride=[stride, stride], dilation=[1, 1])
        out.set_output(True).set_dim(list(output[0])).set_stride(list(output[1])).set_data_type(real)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        notes = cudnn.numerical_note
        fewer = [] if self.precision(dtype) == "tf32" else [notes.TENSOR_CORE, notes.DOWN_CONVERT_INPUTS]
        graph.deselect_numeric_notes([notes.NONDETERMINISTIC, *fewer])
        graph.deselect_workspace_greater_than(WORKSPACE)
        graph.check_support()
        graph.build_plans()
        size, keys = max(1, graph.get_workspace_size()), (*tensors.values(), out)

        def run(*arrays: Any) -> None:
            pointers = {key: array.data.ptr for key, array in zip(keys, arrays, strict=True)}
            graph.execute(pointers, self.room("work", size, np.dtype(np.uint8)).data.ptr, handle=self.handle)

        return run

    def choose(self, own: Convolution, shape: Shape, batch: int) -> CudnnConvolution | None:
        """What computes minibatches of `batch` samples, None for psmpi's own; a line in `told` says why."""
        found: CudnnConvolution | None = None
        taken, said, best = "psmpi", [], np.inf
        try:
            trial = Trial(self.ops, shape, batch)
            expected, again = trial.values(own)
            if self.measured:
                best = trial.time(again)
                said.append(f"psmpi {best:.3f} ms")
            for turned in (True, False):
                name = "cuDNN on turned images" if turned else "cuDNN"
                try:
                    candidate = CudnnConvolution(self, shape, batch, turned)
                    values, again = trial.values(candidate)
                    far = np.max([abs(a - b).max() / abs(b).max() for a, b in zip(values, expected, strict=True)])
                    # What is not a number does not agree.
                    if not far <= TOLERANCE[self.precision(shape.dtype)]:
                        said.append(f"{name} is wrong by {far:.1g}")
                        continue
                    time = trial.time(again) if self.measured else 0.0
                except Exception as error:
                    # Whatever the library says: nothing depends on it.
                    said.append(f"{name} cannot: {(str(error).strip() or type(error).__name__).splitlines()[0][:80]}")
                    continue
                if self.measured:
                    said.append(f"{name} {time:.3f} ms")
                if time < best:
                    found, taken, best = candidate, name, time
                if not self.measured:
                    break
        except (MemoryError, *self.ops.failures) as error:
            said.append(f"not compared: {error}")
        self.told.append(f"{shape}, minibatch {batch}: {taken}" + (f" ({'; '.join(said)})" if said else ""))
        return found


class CudnnConvolution:
    """A convolution by cuDNN, of minibatches of `batch` samples.

    turned: of images turned to have the minibatch first, as cuDNN's kernels want them; else cuDNN reads ours as they
    lie, and turns them itself where it has to.
    """

    def __init__(self, library: Cudnn, shape: Shape, batch: int, turned: bool):
        self.library, self.ops, self.shape, self.turned = library, library.ops, shape, turned
        x, y = (self._layout(batch, *image) for image in (shape.in_shape, shape.out_shape))
        w = _packed(*shape.kernels)
        operation, rest = library.operation, (shape.stride, shape.dtype)
        self.correlate = operation("conv_fprop", {"image": x, "weight": w}, y, *rest)
        self.kernel_gradient = operation("conv_wgrad", {"image": x, "loss": y}, w, *rest)
        self.input_gradient = operation("conv_dgrad", {"loss": y, "filter": w}, x, *rest)

    def _layout(self, batch: int, channels: int, height: int, width: int) -> Layout:
        if self.turned:
            return _packed(batch, channels, height, width)
        return (batch, channels, height, width), (1, height * width * batch, width * batch, batch)

    def prepare(self, kernels: Any) -> None:
        """Uses the kernels as they are."""

    def forward(self, x: Any, kernels: Any, bias: Any, y: Any) -> None:
        into = self._place("y", y)
        self.correlate(self._there("x", x), kernels, into)
        self._back(into, y)
        self.ops.finish(y.reshape(1, y.shape[0], -1), bias.reshape(1, -1), self.shape.activation)

    def backward(self, x: Any, dy: Any, kernels: Any, dkernels: Any, dx: Any) -> None:
        dy = self._there("y", dy)
        if dkernels is not None:
            self.kernel_gradient(self._there("x", x), dy, dkernels)
        if dx is not None:
            into = self._place("x", dx)
            self.input_gradient(dy, kernels, into)
            self._back(into, dx)

    def _place(self, name: str, images: Any) -> Any:
        """Where cuDNN reads or writes the images."""
        return self.library.room(name, images.size, images.dtype) if self.turned else images

    def _there(self, name: str, images: Any) -> Any:
        into = self._place(name, images)
        if self.turned:
            self._turn(images, into, images.size // images.shape[-1], images.shape[-1])
        return into

    def _back(self, values: Any, images: Any) -> None:
        if self.turned:
            self._turn(values, images, images.shape[-1], images.size // images.shape[-1])

    def _turn(self, values: Any, into: Any, rows: int, columns: int) -> None:
        grid = (-(-rows // SIDE) * -(-columns // SIDE),)
        self.ops.launch("turn", into.dtype, grid, (SIDE, 8), rows, columns, values, into)


class ChosenConvolution:
    """psmpi's own convolution, or cuDNN's in its place, chosen when a size of minibatch comes for the first time."""

    def __init__(self, own: Convolution, library: Cudnn, shape: Shape):
        self.own, self.library, self.shape = own, library, shape

    def reserve(self, batch: int) -> None:
        self.own.reserve(batch)

    def arrays(self) -> list[Any]:
        return self.own.arrays()

    def prepare(self, kernels: Any) -> None:
        self.own.prepare(kernels)

    def forward(self, x: Any, kernels: Any, bias: Any, y: Any) -> None:
        self._for(kernels, x, y).forward(x, kernels, bias, y)

    def backward(self, x: Any, dy: Any, kernels: Any, dkernels: Any, dx: Any) -> None:
        given = [array for array in (dkernels, dx) if array is not None]
        self._for(kernels, x, dy, *given).backward(x, dy, kernels, dkernels, dx)

    def samples(self, x: Any, dy: Any, dkernels: Any, dbias: Any) -> None:
        self.own.samples(x, dy, dkernels, dbias)

    def _for(self, kernels: Any, x: Any, *arrays: Any) -> Any:
        library, key = self.library, (self.shape, x.shape[-1])
        if any(array.data.ptr % ALIGNED for array in (kernels, x, *arrays)):
            return self.own
        if key not in library.chosen:
            # A step that is being recorded can neither wait nor allocate.
            if library.ops.stream.is_capturing():
                return self.own
            library.chosen[key] = library.choose(self.own, *key)
            # It was tried with other kernels.
            self.own.prepare(kernels)
        return library.chosen[key] or self.own


class Trial:
    """Random data of one convolution, and what is done with it."""

    def __init__(self, ops: CupyOps, shape: Shape, batch: int):
        rng, cupy, dtype = np.random.default_rng(0), ops.cupy, shape.dtype
        self.ops, units = ops, shape.out_shape[0]
        x, y = (*shape.in_shape, batch), (*shape.out_shape, batch)
        # Sums of order 1 are where activations bend.
        scale = prod(shape.kernels[1:]) ** -0.5
        self.x, self.dy = (cupy.asarray(rng.standard_normal(size, np.float32).astype(dtype)) for size in (x, y))
        self.kernels = cupy.asarray((scale * rng.standard_normal(shape.kernels)).astype(dtype))
        self.bias = cupy.asarray(rng.standard_normal(units).astype(dtype))
        ops.synchronize()
        # They went through pinned memory, which CuPy would keep.
        cupy.get_default_pinned_memory_pool().free_all_blocks()
        self.results = tuple(ops.empty(prod(size), dtype).reshape(size) for size in (y, shape.kernels, x))

    def values(self, convolution: Any) -> tuple[list[np.ndarray], Callable[[], None]]:
        """The output and both gradients, and what computes them again: recorded, where steps are."""
        ops, (y, dkernels, dx) = self.ops, self.results
        convolution.prepare(self.kernels)

        def work() -> None:
            convolution.forward(self.x, self.kernels, self.bias, y)
            convolution.backward(self.x, self.dy, self.kernels, dkernels, dx)

        work()
        again = work
        if ops.graphs:
            graph = None
            ops.stream.begin_capture()
            try:
                work()
            finally:
                graph = ops.stream.end_capture()

            def again() -> None:
                graph.launch(ops.stream)

        for array in self.results:
            array.fill(np.nan)
        again()
        return [ops.host(array) for array in self.results], again

    def time(self, work: Callable[[], None]) -> float:
        """The median of some measurements, in milliseconds."""
        cuda, stream, times = self.ops.cupy.cuda, self.ops.stream, []
        for _ in range(REPEATS):
            begin, end = cuda.Event(), cuda.Event()
            begin.record(stream)
            work()
            end.record(stream)
            end.synchronize()
            times.append(cuda.get_elapsed_time(begin, end))
        return float(median(times))
