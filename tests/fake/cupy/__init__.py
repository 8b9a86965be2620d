"""A stand-in for CuPy on host memory, for machines without a GPU; it has only the names that psmpi uses.

It simulates the worst case of a device. Work runs as late as possible, only when something waits for it, so that a
missing wait shows. New memory holds NaN. NumPy arrays and device arrays do not mix. Captured work does not run. The
kernels are those of psmpi, compiled as C++ (cuda_host.py).
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from cupy import cuda, lib
from cupy.cuda import current

__version__ = "fake"


class ndarray:
    """A device array. _a: the NumPy array with its memory."""

    __array_ufunc__ = None

    def __init__(self, a):
        self._a = a

    def __array__(self, *args, **kwargs):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct one.")

    def __len__(self):
        return len(self._a)

    dtype, shape, strides = (property(lambda self, n=n: getattr(self._a, n)) for n in ("dtype", "shape", "strides"))
    size, ndim, nbytes = (property(lambda self, n=n: getattr(self._a, n)) for n in ("size", "ndim", "nbytes"))
    itemsize, flags = (property(lambda self, n=n: getattr(self._a, n)) for n in ("itemsize", "flags"))

    @property
    def data(self):
        return cuda.MemoryPointer(self._a.ctypes.data, self._a)

    @property
    def __cuda_array_interface__(self):
        interface = dict(self._a.__array_interface__)
        interface["version"] = 3
        interface["stream"] = None
        return interface

    @property
    def T(self):
        return ndarray(self._a.T)

    def transpose(self, *axes):
        return ndarray(self._a.transpose(*axes))

    def reshape(self, *shape):
        reshaped = self._a.reshape(*shape)
        if self._a.size and not np.shares_memory(reshaped, self._a):
            reshaped = np.empty(reshaped.shape, reshaped.dtype)
            source = self._a

            def copy():
                reshaped[...] = source.reshape(reshaped.shape)

            current().enqueue(copy)
        return ndarray(reshaped)

    def __getitem__(self, at):
        if isinstance(at, (np.ndarray, list)):
            raise NotImplementedError("the fake has basic indexing only")
        return ndarray(self._a[at])

    def __setitem__(self, at, value):
        target, source = self._a[at], _operand(value)
        current().enqueue(lambda: np.copyto(target, source, casting="same_kind"))

    def fill(self, value):
        target = self._a
        current().enqueue(lambda: target.fill(value))

    def __iadd__(self, other):
        target, source = self._a, _operand(other)
        current().enqueue(lambda: np.add(target, source, out=target))
        return self

    def __isub__(self, other):
        target, source = self._a, _operand(other)
        current().enqueue(lambda: np.subtract(target, source, out=target))
        return self


def _operand(value):
    if isinstance(value, ndarray):
        return value._a
    if isinstance(value, (int, float)):
        return value
    raise TypeError(f"Unsupported type {type(value)}")


# Keeps all memory alive: CuPy's pool, too, reuses freed memory only for later work on the stream.
_memory = []


def _poisoned(shape, dtype):
    array = np.empty(shape, dtype)
    array.reshape(-1).view(np.uint8)[:] = 0xFF
    _memory.append(array)
    return array


def empty(shape, dtype=float):
    if cuda.FAULT == "memory" and np.prod(shape) > 1000:
        raise cuda.OutOfMemoryError(f"Out of memory allocating {np.prod(shape)} elements")
    return ndarray(_poisoned(shape, dtype))


def zeros(shape, dtype=float):
    array = _poisoned(shape, dtype)
    current().enqueue(lambda: array.fill(0))
    return ndarray(array)


def asarray(values):
    array = np.array(values)
    _memory.append(array)
    return ndarray(array)


def asnumpy(array):
    if isinstance(array, np.ndarray):
        return array
    current().synchronize()
    return array._a.copy()


class _Pool:
    def free_all_blocks(self):
        assert not current().queue, "copies are still under way"


def get_default_pinned_memory_pool():
    return _Pool()


class RawModule:
    def __init__(self, *, code, options):
        from helpers import cuda_host

        if cuda.FAULT == "compiler":
            raise cuda.compiler.CompileException("nvrtc: error: failed to open libnvrtc-builtins.so")

        folder = next(o[2:] for o in options if o.startswith("-I"))
        assert all((Path(folder) / line.split('"')[1]).exists() for line in code.splitlines())
        (real,) = (o.split("=")[1] for o in options if o.startswith("-DREAL="))
        self.module, self.real = cuda_host.load(real), real

    def get_function(self, name):
        from helpers import cuda_host

        kinds = self.module.kernels[name]

        def start(grid, block, args):
            values = []
            for kind, arg in zip(kinds, args, strict=True):
                if "*" in kind and type(arg) is int and arg == 0:
                    values.append(None)
                elif "*" in kind:
                    _check(kind, arg, self.real)
                    values.append(cuda_host.Address(arg.data.ptr))
                else:
                    values.append(arg)

            # `held` keeps the arguments alive until the work has run.
            def work(held=args):
                cuda.clock.spend(name)
                self.module.launch(name, grid, block, tuple(values))

            current().enqueue(work)

        return start


def _check(kind, array, real):
    """Raise TypeError if an array does not have the parameter's type; a GPU would compute on it all the same."""
    types = {
        "float": ("float32",), "double": ("float64",), "int": ("int32",), "long long": ("int64",),
        "unsigned char": ("uint8", "bool"),
    }  # fmt: skip
    name = kind.replace("const", "").replace("*", "").strip()
    expected = types[real if name == "T" else name]
    if not isinstance(array, ndarray) or array.dtype.name not in expected:
        raise TypeError(f"a kernel wants {expected}, not {type(array)} {getattr(array, 'dtype', '')}")


__all__ = [
    "RawModule", "asarray", "asnumpy", "cuda", "empty", "get_default_pinned_memory_pool", "lib", "ndarray", "zeros",
]  # fmt: skip
