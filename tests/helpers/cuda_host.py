"""The CUDA kernels compiled by g++ and run on the CPU, for machines without a GPU; needs NumPy and g++ only.

`load("float")` or `load("double")` compiles all kernels for that REAL, once for each version of their sources, and
returns a `Kernels`, whose `launch` checks what CUDA would not forgive. See cuda_host.h for how threads run.
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
    """Where an array begins, for a pointer parameter."""


class CompileError(RuntimeError):
    """What g++ says about the kernels."""


def compiler() -> str | None:
    """The g++ that compiles the kernels, if there is one."""
    return shutil.which("g++")


def signatures(text: str) -> dict[str, list[str]]:
    """The types of the parameters of each kernel in a source, as in `const long long*`."""
    found = {}
    for name, parameters in KERNEL.findall(COMMENT.sub(" ", text)):
        types = []
        for parameter in filter(str.strip, parameters.split(",")):
            words = parameter.replace("__restrict__", " ").replace("*", " * ").split()
            # The last word is the parameter's name.
            types.append(" ".join(words[:-1]).replace(" *", "*"))
        found[name] = types
    return found


class Kernels:
    """Compiled kernels.

    kernels: the parameter types of each, by name. reverse: run the blocks of a launch, and the threads of each, from
    the last to the first; a result that depends on it has a race.
    """

    def __init__(self, path: Path, kernels: dict[str, list[str]]):
        self.kernels, self.reverse = kernels, False
        self._library, self._lock = ctypes.CDLL(str(path)), Lock()

    def launch(self, name: str, grid: tuple[int, ...], block: tuple[int, ...], args: tuple) -> None:
        """Run a kernel: int for `long long`, float for `double`, `Address` or None for a pointer, and nothing else.

        KeyError for an unknown kernel, TypeError for other arguments or a wrong number of them, ValueError for a
        launch that no GPU accepts, RuntimeError where the threads of a block wait at different barriers.
        """
        types = self.kernels[name]
        if len(args) != len(types):
            raise TypeError(f"{name} takes {len(types)} arguments, not {len(args)}")
        values = [_value(name, k, kind, a) for k, (kind, a) in enumerate(zip(types, args, strict=True))]
        shape = (ctypes.c_uint * 6)(*_shape(name, "grid", grid), *_shape(name, "block", block))
        pointers = (ctypes.c_void_p * max(1, len(values)))(*(ctypes.addressof(v) for v in values))
        # The threads of a launch live in static memory.
        with self._lock:
            status = self._library[f"launch_{name}"](shape, pointers, ctypes.c_int(self.reverse))
        if status:
            raise RuntimeError(
                f"{name}: " + ("no memory", "threads of a block wait at different barriers")[status == 1]
            )


def _value(name: str, position: int, kind: str, value: object) -> ctypes._SimpleCData:
    """An argument as C takes it."""
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
    """A grid or block with all three dimensions."""
    if (
        not isinstance(dimensions, tuple)
        or not 1 <= len(dimensions) <= 3
        or any(type(d) is not int for d in dimensions)
    ):
        raise TypeError(f"{name}: {what} {dimensions!r} is no tuple of one to three integers")
    full = dimensions + (1,) * (3 - len(dimensions))
    if any(not 1 <= d <= most for d, most in zip(full, LIMITS[what], strict=True)):
        raise ValueError(f"{name}: {what} {dimensions} is not within 1 and {LIMITS[what]}")
    if what == "block" and prod(full) > THREADS:
        raise ValueError(f"{name}: block {dimensions} has more than {THREADS} threads")
    return full


def _launchers(names: list[str], kernels: dict[str, list[str]]) -> str:
    """One source of all kernels, and a function that launches each."""
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
    """Where libraries are kept for all processes of this user."""
    path = Path(tempfile.gettempdir()) / f"psmpi-cuda-host-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    if path.stat().st_uid != os.getuid():
        raise CompileError(f"{path} belongs to another user")
    return path


def library(name: str, source: str) -> str:
    """The path of a library made of C++ `source`, once for each version of it. CompileError where g++ refuses it."""
    tool = compiler()
    if tool is None:
        raise CompileError("there is no g++")
    directory = _directory()
    path = directory / f"{name}-{crc32(source.encode()):08x}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=directory) as mine:
            main, made = Path(mine) / "main.cpp", Path(mine) / "made.so"
            main.write_text(source)
            done = subprocess.run([tool, *FLAGS, str(main), "-o", str(made)], capture_output=True, text=True)
            if done.returncode:
                raise CompileError(f"g++ on {name}:\n{done.stderr}")
            os.replace(made, path)
    return str(path)


@cache
def load(real: str) -> Kernels:
    """The kernels for REAL `real`, float or double. CompileError where there is no g++, or it refuses them."""
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
    library = directory / f"kernels-{real}-{key:08x}.so"
    if not library.exists():
        # Others may compile the same: each under a name of its own, and whoever comes last replaces the rest.
        with tempfile.TemporaryDirectory(dir=directory) as mine:
            main, made = Path(mine) / "kernels.cpp", Path(mine) / "kernels.so"
            main.write_text(source)
            command = [tool, *FLAGS, f"-DREAL={real}", f"-I{SOURCES}", "-include", str(shim), "-x", "c++", str(main)]
            done = subprocess.run([*command, "-o", str(made), "-lm"], capture_output=True, text=True)
            if done.returncode or "warning" in done.stderr:
                raise CompileError(f"g++ on the CUDA kernels:\n{done.stderr}")
            os.replace(made, library)
    return Kernels(library, kernels)
