"""The provenance of a checkpoint: versions, host, command, revision."""

from __future__ import annotations

import platform
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import h5py

import psmpi

PACKAGES = ("numpy", "h5py", "mpi4py", "cupy", "cupy-cuda12x", "cupy-cuda13x")


def provenance(ranks: int, library: str) -> dict[str, Any]:
    """Plain data for a checkpoint; `library` is the name of the MPI library."""
    versions = {"psmpi": psmpi.__version__, "python": platform.python_version(), "hdf5": h5py.version.hdf5_version}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    found = {
        "versions": versions,
        "mpi": library,
        "ranks": ranks,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "command": [sys.executable, *sys.argv],
    }
    revision = _revision()
    return {**found, "git": revision} if revision else found


def _revision() -> str:
    """The git revision of psmpi's own source tree, `+` behind it where files have changed; empty where not known."""
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
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=5, check=True, cwd=top)
    return done.stdout.strip()
