"""Checks of the folder of runs (space, locks, HDF5) and of the folder of data."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from psmpi.doctor.report import Finding, error, good, warning
from psmpi.errors import UserError, counted, expanded

# Less free space, in bytes, gives a warning.
LITTLE = 1 << 30
# Most of the user's data files that are opened.
MOST = 20


def hdf5() -> Iterator[Finding]:
    """The HDF5 library, which writes checkpoints."""
    import h5py

    from psmpi import checkpoint

    parallel = "with" if checkpoint.supported() else "without"
    yield good("HDF5", f"{h5py.version.hdf5_version} of h5py {h5py.__version__}, {parallel} --checkpoint-parallel")


def runs(out: str) -> Iterator[Finding]:
    """The folder of runs: try to write and lock files in it. The trial files are removed."""
    wanted = expanded(out or "runs", "--out").absolute()
    folder = next(place for place in (wanted, *wanted.parents) if place.exists())
    where = f"{wanted}" if folder == wanted else f"{folder}, where {wanted} is not made yet"
    if not folder.is_dir():
        yield error("runs", f"{folder} is no folder: name one with --out")
        return
    try:
        trial = Path(tempfile.mkdtemp(prefix=".psmpi-doctor-", dir=folder))
    except OSError as trouble:
        yield error("runs", f"{where}: cannot be written ({trouble.strerror}): name a folder of yours with --out")
        return
    try:
        yield from _tried(trial, where)
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def _tried(trial: Path, where: str) -> Iterator[Finding]:
    space = os.statvfs(trial)
    free, kind = space.f_bavail * space.f_frsize, _kind(trial)
    text = f"{where}{f', on {kind}' if kind else ''}, {free / 1e9:.1f} GB free"
    if free < LITTLE:
        yield warning("runs", f"{text}: make room, or name another folder with --out")
    elif space.f_files and not space.f_favail:
        yield error("runs", f"{text}, and no further file can be made (df -i): remove files, or name another --out")
    else:
        yield good("runs", text)
    yield _written(trial)
    yield _locked(trial)


def _written(trial: Path) -> Finding:
    import h5py

    path, values = trial / "trial.h5", np.arange(1000.0)
    try:
        with h5py.File(path, "w", locking="best-effort") as file:
            file["values"] = values
        with h5py.File(path, "r", locking="best-effort") as file:
            same = np.array_equal(file["values"][:], values)
    except OSError as trouble:
        return error("runs", f"HDF5 cannot write and read a file there ({trouble}): name another folder with --out")
    if not same:
        return error("runs", "an HDF5 file there reads otherwise than it was written: name another folder with --out")
    return good("runs", "an HDF5 file there reads as it was written")


def _locked(trial: Path) -> Finding:
    from psmpi.checkpoint import Lock

    first = Lock(trial)
    try:
        Lock(trial).close()
    except BlockingIOError:
        return good("runs", "a second run would find a run directory there locked")
    finally:
        first.close()
    return warning(
        "runs",
        "this file system has no locks, and two runs would write into one run directory: give each run an --out of its "
        "own, or mount it with locks (Lustre: -o flock)",
    )


def _kind(path: Path, mounts: str = "/proc/self/mounts") -> str:
    """Type of the file system of a path; "" if it is not known."""
    try:
        lines = [line.split() for line in Path(mounts).read_text(errors="replace").splitlines()]
    except OSError:
        return ""
    real = path.resolve()
    at = [(len(line[1]), line[2]) for line in lines if len(line) > 2 and real.is_relative_to(line[1])]
    # The longest mount point contains the path; of several mounts at one point the last one is visible.
    return max(enumerate(at), key=lambda mount: (mount[1][0], mount[0]))[1][1] if at else ""


def data(data_dir: str) -> Iterator[Finding]:
    """Data sets in a folder: those that psmpi knows by name, and the user's files."""
    folder = expanded(data_dir or "data", "--data-dir").absolute()
    yield good("data", "digits come with psmpi; peaks, characters and tasks are generated")
    if not folder.is_dir():
        text = f"no folder {folder}"
        yield error("data", f"{text}: correct --data-dir") if data_dir else good("data", f"{text}, see --data-dir")
        return
    for name, files in (("mnist", "*ubyte*"), ("cifar10", "*batch*")):
        if any(any(folder.glob(f"{below}{files}")) for below in ("", "*/", "*/*/")):
            yield _opened(name, folder)
        else:
            yield good("data", f"{name}: not in {folder}")
    own = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".npz", ".h5", ".hdf5"))
    for path in own[:MOST]:
        yield _opened(path.name, folder)
    if len(own) > MOST:
        yield good("data", f"{len(own) - MOST} more files, not looked at")


def _opened(name: str, folder: Path) -> Finding:
    from psmpi.data import open_dataset

    try:
        dataset = open_dataset(name, folder, 0)
    except UserError as trouble:
        return warning("data", f"{name}: {trouble}")
    n, tests = dataset.train.n, dataset.test.n
    return good("data", f"{name}: {counted(n, 'sample')} to train on, {tests:,} to test on, opened in {folder}")
