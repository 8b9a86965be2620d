"""Checks of Python, packages, kernels in C, linear algebra and GPUs."""

from __future__ import annotations

import glob
import platform
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from psmpi.doctor.report import Finding, error, good, warning
from psmpi.errors import UserError

# Extras for developers of psmpi.
DEVELOPERS = ("test",)


class Requirement(NamedTuple):
    """A required package, its least version, and the extra of psmpi that needs it; "": psmpi itself."""

    name: str
    least: str
    extra: str


def python() -> Iterator[Finding]:
    """Versions of psmpi and Python."""
    import psmpi

    yield good("psmpi", f"{psmpi.__version__}, {Path(psmpi.__file__).parent}")
    yield good("Python", f"{platform.python_version()}, {sys.executable}, on {platform.platform()}")


def packages() -> Iterator[Finding]:
    """The packages that psmpi and its extras need, from the metadata of the installation."""
    try:
        needed = [package for text in metadata.requires("psmpi") or [] for package in _requirement(text)]
    except metadata.PackageNotFoundError:
        yield warning(
            "packages", "psmpi is not installed here, so it is not known what it needs: pip install -e . in its folder"
        )
        return
    versions = {package.name: _version(package.name) for package in needed}
    always = [package for package in needed if not package.extra]
    for name, least, _ in always:
        if not _enough(versions[name], least):
            has = f"is {versions[name]}" if versions[name] else "is not installed"
            yield error("packages", f"{name} {has}, and psmpi needs {least}: pip install '{name}>={least}'")
    yield good("packages", ", ".join(f"{name} {versions[name]}" for name, _, _ in always if versions[name]))
    extras = dict.fromkeys(package.extra for package in needed if package.extra and package.extra not in DEVELOPERS)
    lacking = {
        extra: [name for name, least, of in needed if of == extra and not _enough(versions[name], least)]
        for extra in extras
    }
    complete = [extra for extra, lacks in lacking.items() if not lacks]
    absent = [f"{extra} ({', '.join(lacks)})" for extra, lacks in lacking.items() if lacks]
    text = f"installed: {', '.join(complete) or 'none'}"
    yield good("extras", f"{text}; not: {', '.join(absent)}" if absent else text)


def _requirement(text: str) -> Iterator[Requirement]:
    """The package that a line of metadata requires; none for other versions of Python and for psmpi's own extras."""
    package, _, marker = text.partition(";")
    name = re.match(r"[\w.-]+", package)
    extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", marker)
    if name is None or name[0] == "psmpi" or "python_version" in marker:
        return
    least = re.search(r">=\s*([\w.]+)", package)
    yield Requirement(name[0], least[1] if least else "0", extra[1] if extra else "")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _enough(version: str, least: str) -> bool:
    """Whether a version, "" if not installed, is at least `least`; only the numbers in them are compared."""
    installed, wanted = (tuple(int(part) for part in re.findall(r"\d+", text)) for text in (version, least))
    return bool(version) and installed >= wanted


def kernels() -> Iterator[Finding]:
    """The compiled kernels in C."""
    from psmpi.backend import compiled
    from psmpi.backend.compiled.library import NAMES

    level = compiled.level()
    if level:
        yield good("kernels", f"in C, for {NAMES[level]}: loaded, and built from the sources beside them")
        return
    why = compiled.missing()
    # An installation does not help if the processor lacks instructions.
    fix = (
        "" if "processor lacks" in why else ": with gcc or clang at hand, pip install psmpi again (-e . in a checkout)"
    )
    yield warning("kernels", f"none in C, NumPy computes in their place: {why}{fix or '; use another host if you can'}")


def linear_algebra() -> Iterator[Finding]:
    """The BLAS library, which computes matrix products."""
    import numpy as np
    from threadpoolctl import threadpool_info

    libraries = [library for library in threadpool_info() if library["user_api"] == "blas"]
    for library in libraries:
        kind = f", for {library['architecture']}" if library.get("architecture") else ""
        name = f"{library['internal_api']} {library['version'] or ''}"
        yield good("BLAS", f"{name}{kind}: psmpi says how many threads it makes")
    if not libraries:
        yield warning(
            "BLAS",
            f"that of NumPy {np.__version__} is of an unknown kind, and psmpi cannot say how many threads it makes: "
            "set OMP_NUM_THREADS to the cores of a rank, or use a NumPy with OpenBLAS, BLIS or MKL",
        )


def gpus() -> Iterator[Finding]:
    """NVIDIA's devices and CuPy."""
    from psmpi.backend.gpu.runtime import INSTALL, devices, load_cupy

    nodes = sorted(glob.glob("/dev/nvidia[0-9]*"))
    if find_spec("cupy") is None:
        if nodes:
            yield warning(
                "GPU", f"{', '.join(nodes)} and no CuPy: to compute there {INSTALL}; the processor computes else"
            )
        else:
            yield good("GPU", "no /dev/nvidia0, and no CuPy: the processor computes")
        return
    try:
        count = devices()
    except UserError as trouble:
        text = str(trouble).removeprefix("--backend cupy: ")
        yield (error if nodes else warning)("GPU", text)
        return
    cupy = load_cupy()
    runtime = cupy.cuda.runtime
    driver = runtime.driverGetVersion()
    yield good(
        "CUDA", f"CuPy {cupy.__version__}, its CUDA {_cuda(runtime.runtimeGetVersion())}, the driver's {_cuda(driver)}"
    )
    for number in range(count):
        yield _device(cupy, number)


def _device(cupy: Any, number: int) -> Finding:
    """A device: name, free memory, and a test copy to the device and back."""
    import numpy as np

    cuda = cupy.cuda
    try:
        cuda.Device(number).use()
        name = cuda.runtime.getDeviceProperties(number)["name"].decode()
        free, total = cuda.runtime.memGetInfo()
        sent = np.arange(1000, dtype=np.float32)
        right = np.array_equal(cupy.asnumpy(cupy.asarray(sent)), sent)
    except (cuda.runtime.CUDARuntimeError, MemoryError) as trouble:
        return error("GPU", f"device {number}: {trouble}: see who uses it (nvidia-smi), or use --backend compiled")
    if not right:
        return error("GPU", f"device {number}, {name}, gives back other bytes than it was given: use another one")
    return good(
        "GPU", f"device {number}, {name}: {free / 1e9:.1f} of {total / 1e9:.1f} GB free, gives back what is sent"
    )


def _cuda(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
