"""Search for the data sets of a damaged HDF5 file that cannot be read.

HDF5 may crash or hang on damaged files, so another process makes the search.
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

# Most characters of HDF5's message that are shown.
SHOWN = 200


def damaged_parts(path: Path) -> list[str]:
    """Lines about the data sets of a damaged file that cannot be read, as far as the search gets; runs `scan`."""
    if not path.is_file():
        return []
    command = [sys.executable, "-m", "psmpi.checkpoint.scan", str(path)]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return [str(line) for line in json.loads(process.stdout)]
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return ["its tables of contents cannot be read"]


def scan(path: str) -> list[str]:
    """A line for each data set that cannot be read or whose checksum fails; links are not followed."""
    lines: list[str] = []
    try:
        with h5py.File(path, "r", locking="best-effort") as file:
            waiting: list[tuple[str, h5py.Group]] = [("", file)]
            visited = {h5py.h5o.get_info(file.id).addr}
            while waiting:
                above, group = waiting.pop()
                for name in group:
                    full = f"{above}{name}"
                    try:
                        if not is_hard(group, name):
                            continue
                        item = group[name]
                        address = h5py.h5o.get_info(item.id).addr
                        if isinstance(item, h5py.Group) and address not in visited:
                            waiting.append((f"{full}/", item))
                        elif isinstance(item, h5py.Dataset):
                            _read(item)
                        visited.add(address)
                    except ERRORS as error:
                        lines.append(f"{full}: {_brief(error)}")
    except ERRORS as error:
        lines.append(f"HDF5 cannot open it: {_brief(error)}")
    return lines


# Exceptions that h5py raises for damaged files.
ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, ForeignError)


def _brief(error: Exception) -> str:
    return str(error).splitlines()[0][:SHOWN] if str(error) else type(error).__name__


def _read(dataset: h5py.Dataset) -> None:
    """Read a data set chunk by chunk, so that HDF5 compares all checksums."""
    check_own(dataset)
    if dataset.chunks is None:
        dataset[...]
        return
    wanted, present = prod(grid_of(dataset)), dataset.id.get_num_chunks()
    if present != wanted:
        raise ForeignError(f"{present:,} of its {wanted:,} chunks are there")
    for at in product(*map(range, grid_of(dataset))):
        dataset[tuple(slice(k * step, (k + 1) * step) for k, step in zip(at, dataset.chunks, strict=True))]


if __name__ == "__main__":
    with limited(size_of(Path(sys.argv[1]))):
        print(json.dumps(scan(sys.argv[1])))
