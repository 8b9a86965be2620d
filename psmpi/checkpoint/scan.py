"""The search for data sets of a damaged HDF5 file that can no longer be read.

HDF5 is not made for damaged files and may crash or hang on them, so another process looks.
"""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from math import prod
from pathlib import Path

import h5py

from psmpi.files.examining import limited, size_of
from psmpi.files.hdf5 import ForeignError, check_own, grid_of, is_hard

# Characters of a message of HDF5.
SHOWN = 200


def damaged_parts(path: Path) -> list[str]:
    """The data of a damaged file that cannot be read any more, a line each, as far as can be told."""
    if not path.is_file():
        return []
    command = [sys.executable, "-m", "psmpi.checkpoint.scan", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return [str(line) for line in json.loads(done.stdout)]
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return ["its tables of contents cannot be read"]


def scan(path: str) -> list[str]:
    """A line for each data set whose checksum fails or that cannot be read; links are not followed."""
    found: list[str] = []
    try:
        with h5py.File(path, "r", locking="best-effort") as file:
            waiting: list[tuple[str, h5py.Group]] = [("", file)]
            seen = {h5py.h5o.get_info(file.id).addr}
            while waiting:
                above, group = waiting.pop()
                for name in group:
                    full = f"{above}{name}"
                    try:
                        if not is_hard(group, name):
                            continue
                        one = group[name]
                        address = h5py.h5o.get_info(one.id).addr
                        if isinstance(one, h5py.Group) and address not in seen:
                            waiting.append((f"{full}/", one))
                        elif isinstance(one, h5py.Dataset):
                            _read(one)
                        seen.add(address)
                    except ERRORS as error:
                        found.append(f"{full}: {_brief(error)}")
    except ERRORS as error:
        found.append(f"HDF5 cannot open it: {_brief(error)}")
    return found


# What h5py raises for damaged files.
ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, ForeignError)


def _brief(error: Exception) -> str:
    return str(error).splitlines()[0][:SHOWN] if str(error) else type(error).__name__


def _read(dataset: h5py.Dataset) -> None:
    """Read a data set chunk by chunk."""
    check_own(dataset)
    if dataset.chunks is None:
        dataset[...]
        return
    wanted, there = prod(grid_of(dataset)), dataset.id.get_num_chunks()
    if there != wanted:
        raise ForeignError(f"{there:,} of its {wanted:,} chunks are there")
    for at in product(*map(range, grid_of(dataset))):
        dataset[tuple(slice(k * step, (k + 1) * step) for k, step in zip(at, dataset.chunks, strict=True))]


if __name__ == "__main__":
    with limited(size_of(Path(sys.argv[1]))):
        print(json.dumps(scan(sys.argv[1])))
