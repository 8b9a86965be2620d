"""The shared library of C kernels, for float32 and float64, on processors with AVX2 or AVX-512.

Installing psmpi builds the library if there is a C compiler. Without it psmpi uses NumPy.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

NAMES = {0: "", 1: "AVX2", 2: "AVX-512"}
TYPES = {np.dtype(np.float32): "float", np.dtype(np.float64): "double"}


@cache
def _library() -> tuple[Any, str]:
    """Return the shared library and "", or None and the reason why there is none."""
    here = Path(__file__).parent
    text = b"".join(source.read_bytes() for source in sorted((here / "c").glob("*.[ch]")))
    why = "no C compiler for this processor (gcc or clang, x86-64) built them when psmpi was installed"
    for suffix in EXTENSION_SUFFIXES:
        path = here / f"_kernels{suffix}"
        if path.exists():
            try:
                library = ctypes.CDLL(str(path))
                library.psmpi_source.restype = ctypes.c_uint32
                if library.psmpi_source() == crc32(text):
                    return library, ""
                why = f"{path.name} was built from other sources: install psmpi again"
            except (OSError, AttributeError) as error:
                why = f"{path.name} does not load ({error}): install psmpi again"
    return None, why


@cache
def level() -> int:
    """The instruction set of the kernels: 2 AVX-512, 1 AVX2, 0 no kernels for this processor."""
    library, _ = _library()
    return 0 if library is None else int(library.psmpi_level())


def missing() -> str:
    """The reason why there are no kernels."""
    library, why = _library()
    return why if library is None else "this processor lacks AVX2"


@cache
def function(name: str, dtype: np.dtype, arguments: str, instructions: int) -> Any:
    """Return the kernel for a dtype and a level of instructions.

    arguments: one letter for each argument: p pointer, i int, n ssize_t, d double.
    """
    types = {"p": ctypes.c_void_p, "i": ctypes.c_int, "n": ctypes.c_ssize_t, "d": ctypes.c_double}
    kernel = _library()[0][f"{name}_{TYPES[dtype]}_{instructions}"]
    kernel.argtypes, kernel.restype = [types[a] for a in arguments], None
    return kernel


@cache
def plain(name: str, arguments: str) -> Any:
    """Return a kernel without floating point types, which returns an int; arguments as in `function`."""
    types = {"p": ctypes.c_void_p, "i": ctypes.c_int, "n": ctypes.c_ssize_t}
    kernel = _library()[0][f"psmpi_{name}"]
    kernel.argtypes, kernel.restype = [types[a] for a in arguments], ctypes.c_int
    return kernel


def pointers(dtype: np.dtype, *arrays: np.ndarray) -> tuple[int, ...]:
    """The addresses of contiguous arrays of this dtype; ValueError for other arrays, which C would misread."""
    for array in arrays:
        if array.dtype != dtype or not array.flags.c_contiguous:
            raise ValueError(f"a kernel needs contiguous {dtype}, not {array.dtype} with strides {array.strides}")
    return tuple(array.ctypes.data for array in arrays)


def steps(array: np.ndarray) -> tuple[int, ...]:
    """The strides of an array in elements."""
    return tuple(stride // array.itemsize for stride in array.strides)


def units_pointer(dtype: np.dtype, kernels: np.ndarray) -> int:
    """The address of kernels (count, n, channels, k, k); ValueError unless the kernels of a unit are contiguous."""
    return pointers(dtype, kernels[0, 0])[0]
