"""CuPy, loaded at first use, and the devices that this process sees."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from psmpi.errors import UserError

INSTALL = "pip install 'psmpi[cuda]' (CUDA 13), pip install 'cupy-cuda12x[ctk]' (CUDA 12)"


@cache
def load_cupy() -> Any:
    """Import CuPy. Unless CUPY_CACHE_DIR is set, it caches compiled kernels in a private folder on this host's disk."""
    if "CUPY_CACHE_DIR" not in os.environ:
        folder = Path(tempfile.gettempdir()) / f"psmpi-cupy-{os.getuid()}"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            # Kernels are loaded from this folder: no other user may write to it.
            status = folder.lstat()
            if status.st_uid == os.getuid() and not status.st_mode & 0o077:
                os.environ["CUPY_CACHE_DIR"] = str(folder)
        except OSError:
            # CuPy then uses its default folder, in the home directory.
            pass
    import cupy

    return cupy


def devices() -> int:
    """The number of devices that this process sees; UserError with the reason if there is none."""
    try:
        cupy = load_cupy()
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
            f"its driver supports CUDA {driver[0]}.{driver[1]}, but this CuPy is built for CUDA {built[0]}: install a "
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
def stream_of(cupy: Any, device: int) -> Any:
    """The stream of a device. All backends of this process use it, so that their operations are in order."""
    return cupy.cuda.Stream(non_blocking=True)
