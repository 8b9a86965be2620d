"""The provenance of a checkpoint: versions, host, command, revision."""

from __future__ import annotations

import platform
import socket
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import h5py

import psmpi

PACKAGES = ("numpy", "h5py", "mpi4py", "cupy", "cupy-cuda12x", "cupy-cuda13x")


def provenance(ranks: int, library: str) -> dict[str, Any]:
    """Provenance as plain data for a checkpoint. ranks: number of ranks; library: name of the MPI library."""
    origin = {
        "versions": dict(_versions()),
        "mpi": library,
        "ranks": ranks,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "command": [sys.executable, *sys.argv],
    }
    revision = _revision()
    return {**origin, "git": revision} if revision else origin


@cache
def _versions() -> dict[str, str]:
    versions = {"psmpi": psmpi.__version__, "python": platform.python_version(), "hdf5": h5py.version.hdf5_version}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


# The code of a process stays the same, whatever becomes of its files.
@cache
def _revision() -> str:
    """Git revision of psmpi's source tree, with a `+` if files have changed; "" if it is not known."""
    top = Path(psmpi.__file__).parent.parent
    if not (top / ".git").exists():
        return ""
    try:
        revision = _git(top, "rev-parse", "HEAD")
        changed = _git(top, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return ""
    return revision + ("+" if changed else "")


def _git(top: Path, *arguments: str) -> str:
    process = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=5, check=True, cwd=top)
    return process.stdout.strip()
