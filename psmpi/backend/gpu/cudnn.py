"""Convolutions by cuDNN on a GPU, in place of psmpi's own where the values agree and, if wished, where it is faster.

cuDNN is found out about on the very shapes, with random data: what it refuses, cannot do while a step is recorded, or
does wrong costs nothing but its use.
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

# What an operation of cuDNN may use besides its arrays, in bytes.
WORKSPACE = 1 << 28
# How cuDNN takes for granted that arrays begin, in bytes.
ALIGNED = 16
# The largest distance from psmpi's own values, over the largest of these, by what is computed with. Sums in another
# order stay far below it; those of numbers that were rounded to fewer bits, where that was not asked for, do not.
TOLERANCE = {"float32": 1e-4, "tf32": 5e-3, "float64": 1e-10}
INSTALL = (
    "pip install 'psmpi[cudnn]' (CUDA 13), pip install nvidia-cudnn-frontend nvidia-cudnn-cu12 (CUDA 12), or use "
    "--convolution own"
)

# Sizes of a tensor as cuDNN orders them, samples and channels first, and the steps between its elements.
Dims = tuple[tuple[int, ...], tuple[int, ...]]


def _packed(*dim: int) -> Dims:
    return dim, tuple(prod(dim[k + 1 :]) for k in range(len(dim)))


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

    measured: only those in which it is faster. choices: what was chosen, a line each. UserError where it does not load.
    """

    def __init__(self, ops: DevicePointwise, measured: bool):
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
        self.chosen: dict[tuple[ConvolutionShape, int, Work], CudnnConvolution | None] = {}
        self.choices: list[str] = []

    @property
    def name(self) -> str:
        """The library and how it is used, for people."""
        number = self.cudnn.backend_version()
        how = "the faster of psmpi and" if self.measured else "by"
        return f"convolutions {how} cuDNN {number // 10000}.{number // 100 % 100}"

    def precision(self, dtype: np.dtype) -> str:
        """The type in which arrays of this dtype are multiplied."""
        return self.ops.compute if dtype == np.float32 else "float64"

    def scratch(self, name: str, size: int, dtype: np.dtype) -> Any:
        """Scratch (size,) of all convolutions, valid until its next use."""
        return self.ops.scratch(f"cuDNN {name}", size, dtype)[:size]

    def operation(
        self, name: str, inputs: dict[str, Dims], output: Dims, stride: int, dtype: np.dtype
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
        """cuDNN's convolution for minibatches of `batch` samples, or None; a line in `choices` says why."""
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
                    chosen, taken, best = candidate, name, time
                if not self.measured:
                    break
        except (MemoryError, *self.ops.failures) as error:
            said.append(f"not compared: {error}")
        why = f" ({'; '.join(said)})" if said else ""
        self.choices.append(f"{shape}, minibatch {batch}, {work}: {taken}{why}")
        return chosen


class CudnnConvolution:
    """One kind of work of a convolution by cuDNN, on minibatches of `batch` samples.

    turned: of images turned to have the minibatch first, as cuDNN's kernels want them; else cuDNN reads ours as they
    lie, and turns them itself where it has to.
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
        """Uses the kernels as they are."""

    def forward(self, x: Any, kernels: Any, bias: Any, y: Any) -> None:
        into = self._place("y", y)
        self.run(self._given("x", x), kernels, into)
        self._back(into, y)
        self.ops.finish(y.reshape(1, y.shape[0], -1), bias.reshape(1, -1), self.shape.activation)

    def backward(self, x: Any, dy: Any, kernels: Any, dkernels: Any, dx: Any) -> None:
        """One of the two gradients, the other being None."""
        if dkernels is not None:
            self.run(self._given("x", x), self._given("y", dy), dkernels)
            return
        into = self._place("x", dx)
        self.run(self._given("y", dy), kernels, into)
        self._back(into, dx)

    def _place(self, name: str, images: Any) -> Any:
        """The array from which cuDNN reads, or into which it writes, the images."""
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
    """psmpi's own convolution, or cuDNN's in its place, chosen for each kind of work and size of minibatch when it
    comes for the first time.
    """

    def __init__(self, own: Convolution, library: Cudnn, shape: ConvolutionShape):
        self.own, self.library, self.shape = own, library, shape

    def reserve(self, batch: int) -> None:
        self.own.reserve(batch)

    def arrays(self) -> list[Any]:
        return self.own.arrays()

    def prepare(self, kernels: Any) -> None:
        # Whatever is chosen for the output: with that played back, nobody would know that a gradient needs it.
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
        # A step that is being recorded can neither wait nor allocate.
        if aligned and key not in library.chosen and not library.ops.stream.is_capturing():
            library.chosen[key] = library.choose(self.own, *key)
            # It was tried with other kernels.
            self.own.prepare(kernels)
        return (library.chosen.get(key) if aligned else None) or self.own
