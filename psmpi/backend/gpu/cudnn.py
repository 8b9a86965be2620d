"""Convolutions by cuDNN on a GPU, which replace psmpi's own where their values agree and, optionally, are faster.

Each shape is tried with random data. psmpi's own convolution stays in use where cuDNN has no operation, cannot run
while a step is captured, or returns other values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from math import prod
from typing import Any

import numpy as np

from psmpi.backend.gpu.pointwise import DevicePointwise
from psmpi.backend.gpu.trial import ConvolutionShape, Trial, Work
from psmpi.backend.reference.convolution import Convolution, Stripes
from psmpi.errors import UserError

# Largest workspace of an operation of cuDNN, in bytes.
WORKSPACE = 1 << 28
# Alignment of arrays that cuDNN assumes, in bytes.
ALIGNED = 16
# Largest allowed difference from psmpi's own values, relative to the largest of them, by the precision of the products.
# Another order of sums stays far below it; operands rounded to fewer bits than asked for do not.
TOLERANCE = {"float32": 1e-4, "tf32": 5e-3, "float64": 1e-10}
INSTALL = (
    "pip install 'psmpi[cudnn]' (CUDA 13), pip install nvidia-cudnn-frontend nvidia-cudnn-cu12 (CUDA 12), or use "
    "--convolution own"
)

# Sizes of a tensor in cuDNN's order, samples and channels first, and its strides in elements.
Dims = tuple[tuple[int, ...], tuple[int, ...]]


def _packed(*dim: int) -> Dims:
    return dim, tuple(prod(dim[k + 1 :]) for k in range(len(dim)))


def groups(stripes: Sequence[Stripes], channels: int, units: int) -> int:
    """The number of groups if the stripes form a grouped convolution of all channels and units, else 0."""
    if len(stripes) != 1:
        return 0
    (s,) = stripes
    disjoint = s.count == 1 or s.source_step == s.n_in
    whole = (s.source, s.out, s.count * s.n_in, s.count * s.n) == (0, 0, channels, units)
    return s.count if disjoint and whole else 0


class Cudnn:
    """cuDNN on the stream of one device, and the choices between its convolutions and psmpi's own.

    measured: choose cuDNN only where it is faster. choices: messages about the choices, one for each. Raise UserError
    if cuDNN does not load.
    """

    def __init__(self, ops: DevicePointwise, measured: bool):
        self.ops, self.measured = ops, measured
        # cuDNN opens the CUDA runtime by file name only: load it first from the installed Python packages.
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
        self.chosen: dict[tuple[ConvolutionShape, int, Work], CudnnConvolution | None] = {}
        self.choices: list[str] = []

    @property
    def name(self) -> str:
        """The use of cuDNN and its version, for messages."""
        number = self.cudnn.backend_version()
        how = "the faster of psmpi and" if self.measured else "by"
        return f"convolutions {how} cuDNN {number // 10000}.{number // 100 % 100}"

    def precision(self, dtype: np.dtype) -> str:
        """The precision in which arrays of this dtype are multiplied: the backend's `compute`, or float64."""
        return self.ops.compute if dtype == np.float32 else "float64"

    def scratch(self, name: str, size: int, dtype: np.dtype) -> Any:
        """Return scratch (size,) that all convolutions share, valid until the next call with this name."""
        return self.ops.scratch(f"cuDNN {name}", size, dtype)[:size]

    def operation(
        self, name: str, inputs: dict[str, Dims], output: Dims, stride: int, dtype: np.dtype
    ) -> Callable[..., None]:
        """Build an operation of cuDNN with two input arrays and one output array.

        Only deterministic algorithms are allowed, and only those whose products have the precision of the backend's
        `compute`. Raises an error, such as RuntimeError, if cuDNN has none.
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
        fewer = {
            "float32": [notes.TENSOR_CORE, notes.DOWN_CONVERT_INPUTS], "float64": [notes.DOWN_CONVERT_INPUTS],
        }.get(self.precision(dtype), [])  # fmt: skip
        graph.deselect_numeric_notes([notes.NONDETERMINISTIC, notes.REDUCED_PRECISION_REDUCTION, *fewer])
        graph.deselect_workspace_greater_than(WORKSPACE)
        graph.check_support()
        graph.build_plans()
        size, keys = max(1, graph.get_workspace_size()), (*tensors.values(), out)

        def run(*arrays: Any) -> None:
            pointers = {key: array.data.ptr for key, array in zip(keys, arrays, strict=True)}
            graph.execute(pointers, self.scratch("work", size, np.dtype(np.uint8)).data.ptr, handle=self.handle)

        return run

    def choose(self, own: Convolution, shape: ConvolutionShape, batch: int, work: Work) -> CudnnConvolution | None:
        """Return cuDNN's convolution for minibatches of `batch` samples, or None to use `own`.

        A message with the reason is added to `choices`.
        """
        chosen: CudnnConvolution | None = None
        taken, said, best = "psmpi", [], np.inf
        try:
            trial = Trial(self.ops, shape, batch, work)
            expected, again = trial.value(own, reference=True)
            if self.measured:
                best = trial.time(again)
                said.append(f"psmpi {best:.3f} ms")
            for turned in (True, False):
                name = "cuDNN on turned images" if turned else "cuDNN"
                try:
                    candidate = CudnnConvolution(self, shape, batch, work, turned)
                    value, again = trial.value(candidate)
                    far = abs(value - expected).max() / abs(expected).max()
                    # The negation also rejects NaN.
                    if not far <= TOLERANCE[self.precision(shape.dtype)]:
                        said.append(f"{name} is wrong by {far:.1g}")
                        continue
                    time = trial.time(again) if self.measured else 0.0
                except Exception as error:
                    # cuDNN raises errors of many types: any error means that psmpi's own convolution is used.
                    said.append(f"{name} cannot: {(str(error).strip() or type(error).__name__).splitlines()[0][:80]}")
                    continue
                if self.measured:
                    said.append(f"{name} {time:.3f} ms")
                if time < best:
                    chosen, taken, best = candidate, name, time
                if not self.measured:
                    break
        except (MemoryError, *self.ops.failures) as error:
            said.append(f"not compared: {error}")
        why = f" ({'; '.join(said)})" if said else ""
        self.choices.append(f"{shape}, minibatch {batch}, {work}: {taken}{why}")
        return chosen


class CudnnConvolution:
    """One operation of a convolution (output or a gradient) by cuDNN, on minibatches of `batch` samples.

    turned: transpose images so that the minibatch is the first axis, as cuDNN's kernels expect; else cuDNN reads
    psmpi's images with their strides, and transposes them itself if it needs to.
    """

    def __init__(self, library: Cudnn, shape: ConvolutionShape, batch: int, work: Work, turned: bool):
        self.library, self.ops, self.shape, self.turned = library, library.ops, shape, turned
        x, y = (self._layout(batch, *image) for image in (shape.in_shape, shape.out_shape))
        w = _packed(*shape.kernels)
        operations: dict[Work, tuple[str, dict[str, Dims], Dims]] = {
            "output": ("conv_fprop", {"image": x, "weight": w}, y),
            "gradient of kernels": ("conv_wgrad", {"image": x, "loss": y}, w),
            "gradient of input": ("conv_dgrad", {"loss": y, "filter": w}, x),
        }
        self.run = library.operation(*operations[work], shape.stride, shape.dtype)

    def _layout(self, batch: int, channels: int, height: int, width: int) -> Dims:
        if self.turned:
            return _packed(batch, channels, height, width)
        return (batch, channels, height, width), (1, height * width * batch, width * batch, batch)

    def prepare(self, kernels: Any) -> None:
        """Do nothing: cuDNN reads the kernels without packing."""

    def forward(self, x: Any, kernels: Any, bias: Any, y: Any) -> None:
        into = self._place("y", y)
        self.run(self._given("x", x), kernels, into)
        self._back(into, y)
        self.ops.finish(y.reshape(1, y.shape[0], -1), bias.reshape(1, -1), self.shape.activation)

    def backward(self, x: Any, dy: Any, kernels: Any, dkernels: Any, dx: Any) -> None:
        """Compute one of the two gradients; the other must be None."""
        if dkernels is not None:
            self.run(self._given("x", x), self._given("y", dy), dkernels)
            return
        into = self._place("x", dx)
        self.run(self._given("y", dy), kernels, into)
        self._back(into, dx)

    def _place(self, name: str, images: Any) -> Any:
        """The array in which cuDNN reads or writes the images: scratch if they are transposed."""
        return self.library.scratch(name, images.size, images.dtype) if self.turned else images

    def _given(self, name: str, images: Any) -> Any:
        into = self._place(name, images)
        if self.turned:
            self.ops.turn(images.reshape(-1, images.shape[-1]), into.reshape(images.shape[-1], -1))
        return into

    def _back(self, values: Any, images: Any) -> None:
        if self.turned:
            self.ops.turn(values.reshape(images.shape[-1], -1), images.reshape(-1, images.shape[-1]))


class ChosenConvolution:
    """psmpi's own convolution, or cuDNN's instead.

    The choice is made at the first use, for each operation (output or a gradient) and size of minibatch.
    """

    def __init__(self, own: Convolution, library: Cudnn, shape: ConvolutionShape):
        self.own, self.library, self.shape = own, library, shape

    def reserve(self, batch: int) -> None:
        self.own.reserve(batch)

    def arrays(self) -> list[Any]:
        return self.own.arrays()

    def prepare(self, kernels: Any) -> None:
        # Always, even if cuDNN computes the output: a gradient may need the packed kernels, and a replayed graph does
        # not run this code again.
        self.own.prepare(kernels)

    def forward(self, x: Any, kernels: Any, bias: Any, y: Any) -> None:
        self._for("output", kernels, x, y).forward(x, kernels, bias, y)

    def backward(self, x: Any, dy: Any, kernels: Any, dkernels: Any, dx: Any) -> None:
        if dkernels is not None:
            chosen = self._for("gradient of kernels", kernels, x, dy, dkernels)
            chosen.backward(x, dy, kernels, dkernels, None)
        if dx is not None:
            self._for("gradient of input", kernels, x, dy, dx).backward(x, dy, kernels, None, dx)

    def samples(self, x: Any, dy: Any, dkernels: Any, dbias: Any) -> None:
        self.own.samples(x, dy, dkernels, dbias)

    def _for(self, work: Work, kernels: Any, x: Any, *arrays: Any) -> Any:
        library, key = self.library, (self.shape, x.shape[-1], work)
        aligned = not any(array.data.ptr % ALIGNED for array in (kernels, x, *arrays))
        # A trial waits and allocates, which is impossible while a step is captured.
        if aligned and key not in library.chosen and not library.ops.stream.is_capturing():
            library.chosen[key] = library.choose(self.own, *key)
            # The trial has packed random kernels.
            self.own.prepare(kernels)
        return (library.chosen.get(key) if aligned else None) or self.own
