"""Compile the CUDA kernels with g++ and run them on the CPU, for tests without a GPU; needs NumPy and g++ only.

`load("float")` or `load("double")` compiles all kernels for this REAL, once for each version of their sources, and
returns `Kernels`. Its method `launch` checks arguments that CUDA would accept silently or crash on. For the order of
threads see cuda_host.h.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import tempfile
from functools import cache
from math import prod
from pathlib import Path
from threading import Lock
from zlib import crc32

from helpers.paths import ROOT

HERE = Path(__file__).parent
SOURCES = ROOT / "psmpi" / "backend" / "gpu" / "cuda"
FLAGS = ("-O2", "-std=c++17", "-fPIC", "-shared", "-Wall", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE")
KERNEL = re.compile(r'extern\s+"C"\s+__global__\s+void\s+(\w+)\s*\(([^)]*)\)\s*\{')
COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)


class Address(int):
    """The address of an array, the argument for a pointer parameter."""


class CompileError(RuntimeError):
    """g++ is missing or refuses the source; the message has its output."""


def compiler() -> str | None:
    """The path of g++, or None."""
    return shutil.which("g++")


def signatures(text: str) -> dict[str, list[str]]:
    """The types of the parameters of each kernel in a source, such as `const long long*`."""
    types_by_kernel = {}
    for name, parameters in KERNEL.findall(COMMENT.sub(" ", text)):
        types = []
        for parameter in filter(str.strip, parameters.split(",")):
            words = parameter.replace("__restrict__", " ").replace("*", " * ").split()
            # The last word is the parameter's name.
            types.append(" ".join(words[:-1]).replace(" *", "*"))
        types_by_kernel[name] = types
    return types_by_kernel


class Kernels:
    """Compiled kernels.

    kernels: the parameter types of each kernel by its name. reverse: run the blocks of a launch, and the threads of a
    block, from the last to the first. A kernel whose result depends on `reverse` has a race.
    """

    def __init__(self, path: Path, kernels: dict[str, list[str]]):
        self.kernels, self.reverse = kernels, False
        self._library, self._lock = ctypes.CDLL(str(path)), Lock()

    def launch(self, name: str, grid: tuple[int, ...], block: tuple[int, ...], args: tuple) -> None:
        """Run a kernel. Arguments are int for `long long`, float for `double`, and `Address` or None for a pointer.

        Raise KeyError for an unknown kernel, TypeError for other arguments or a wrong number of them, ValueError for a
        grid or block that no GPU accepts, RuntimeError if the threads of a block wait at different barriers.
        """
        types = self.kernels[name]
        if len(args) != len(types):
            raise TypeError(f"{name} takes {len(types)} arguments, not {len(args)}")
        values = [_value(name, k, kind, a) for k, (kind, a) in enumerate(zip(types, args, strict=True))]
        shape = (ctypes.c_uint * 6)(*_shape(name, "grid", grid), *_shape(name, "block", block))
        pointers = (ctypes.c_void_p * max(1, len(values)))(*(ctypes.addressof(v) for v in values))
        # The state of a launch is in static memory: one launch at a time.
        with self._lock:
            status = self._library[f"launch_{name}"](shape, pointers, ctypes.c_int(self.reverse))
        if status:
            raise RuntimeError(
                f"{name}: " + ("no memory", "threads of a block wait at different barriers")[status == 1]
            )


def _value(name: str, position: int, kind: str, value: object) -> ctypes._SimpleCData:
    """Convert an argument to the C type `kind`; raise TypeError or ValueError if it does not fit."""
    if kind.endswith("*"):
        if value is None or type(value) is Address:
            return ctypes.c_void_p(value)
    elif kind == "double":
        if type(value) is float:
            return ctypes.c_double(value)
    elif kind == "long long":
        if type(value) is int:
            if not -(2**63) <= value < 2**63:
                raise ValueError(f"{name}: argument {position} = {value} is no 64-bit integer")
            return ctypes.c_longlong(value)
    else:
        raise TypeError(f"{name}: parameter {position} is {kind}, none of long long, double and pointers")
    raise TypeError(f"{name}: argument {position} must be {kind}, not {type(value).__name__}")


LIMITS = {"grid": (2**31 - 1, 65535, 65535), "block": (1024, 1024, 64)}
THREADS = 1024


def _shape(name: str, what: str, dimensions: tuple[int, ...]) -> tuple[int, ...]:
    """Check a grid or block (`what`), and return it with three dimensions."""
    if (
        not isinstance(dimensions, tuple)
        or not 1 <= len(dimensions) <= 3
        or any(type(d) is not int for d in dimensions)
    ):
        raise TypeError(f"{name}: {what} {dimensions!r} is no tuple of one to three integers")
    full = dimensions + (1,) * (3 - len(dimensions))
    if any(not 1 <= d <= limit for d, limit in zip(full, LIMITS[what], strict=True)):
        raise ValueError(f"{name}: {what} {dimensions} is not within 1 and {LIMITS[what]}")
    if what == "block" and prod(full) > THREADS:
        raise ValueError(f"{name}: block {dimensions} has more than {THREADS} threads")
    return full


def _launchers(names: list[str], kernels: dict[str, list[str]]) -> str:
    """C++ source that includes all kernels and defines a function to launch each."""
    parts = [f'#include "{name}"' for name in names]
    for name, types in kernels.items():
        values = ", ".join(f"*({kind} *)args[{k}]" for k, kind in enumerate(types))
        parts += [
            f"static void call_{name}(void **args) {{ (void)args; {name}({values}); }}",
            f'extern "C" int launch_{name}(const unsigned *shape, void **args, int reverse)'
            f" {{ return host::launch(call_{name}, shape, args, reverse); }}",
        ]
    return "\n".join(parts) + "\n"


def _directory() -> Path:
    """The folder of compiled libraries, which all processes of this user share."""
    path = Path(tempfile.gettempdir()) / f"psmpi-cuda-host-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    if path.stat().st_uid != os.getuid():
        raise CompileError(f"{path} belongs to another user")
    return path


def library(name: str, source: str) -> str:
    """Compile C++ `source` to a library, once for each version; return its path.

    Raise CompileError if g++ is missing or refuses the source.
    """
    tool = compiler()
    if tool is None:
        raise CompileError("there is no g++")
    directory = _directory()
    path = directory / f"{name}-{crc32(source.encode()):08x}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=directory) as folder:
            main, shared_object = Path(folder) / "main.cpp", Path(folder) / "made.so"
            main.write_text(source)
            result = subprocess.run([tool, *FLAGS, str(main), "-o", str(shared_object)], capture_output=True, text=True)
            if result.returncode:
                raise CompileError(f"g++ on {name}:\n{result.stderr}")
            os.replace(shared_object, path)
    return str(path)


@cache
def load(real: str) -> Kernels:
    """Compile the kernels for REAL `real`, float or double. Raise CompileError if g++ is missing or refuses them."""
    if real not in ("float", "double"):
        raise ValueError(f"REAL is float or double, not {real}")
    tool = compiler()
    if tool is None:
        raise CompileError("there is no g++ to compile the CUDA kernels for the CPU")
    paths = sorted(SOURCES.glob("*.cu"))
    texts = {path.name: path.read_text() for path in [*paths, *sorted(SOURCES.glob("*.cuh"))]}
    kernels: dict[str, list[str]] = {}
    for path in paths:
        kernels.update(signatures(texts[path.name]))
    source = _launchers([path.name for path in paths], kernels)
    shim = HERE / "cuda_host.h"
    key = crc32("\0".join([*FLAGS, tool, source, *texts.values(), shim.read_text()]).encode())
    directory = _directory()
    library_path = directory / f"kernels-{real}-{key:08x}.so"
    if not library_path.exists():
        # Several processes may compile this: each uses its own folder, and os.replace is atomic.
        with tempfile.TemporaryDirectory(dir=directory) as folder:
            main, shared_object = Path(folder) / "kernels.cpp", Path(folder) / "kernels.so"
            main.write_text(source)
            command = [tool, *FLAGS, f"-DREAL={real}", f"-I{SOURCES}", "-include", str(shim), "-x", "c++", str(main)]
            result = subprocess.run([*command, "-o", str(shared_object), "-lm"], capture_output=True, text=True)
            if result.returncode or "warning" in result.stderr:
                raise CompileError(f"g++ on the CUDA kernels:\n{result.stderr}")
            os.replace(shared_object, library_path)
    return Kernels(library_path, kernels)
