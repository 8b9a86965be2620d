"""The search for data sets of a damaged HDF5 file that can no longer be read.

HDF5 is not made for damaged files and may crash or hang on them, so another process looks.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import h5py


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
    """A line for each data set whose checksum fails or that cannot be read."""
    found: list[str] = []

    def read(name: str, item: h5py.Dataset | h5py.Group) -> None:
        if isinstance(item, h5py.Dataset):
            try:
                item[...]
            except (OSError, RuntimeError) as error:
                found.append(f"{name}: {str(error).splitlines()[0]}")

    try:
        with h5py.File(path, "r", locking="best-effort") as file:
            file.visititems(read)
    except (OSError, RuntimeError) as error:
        found.append(f"HDF5 cannot open it: {str(error).splitlines()[0]}")
    return found


if __name__ == "__main__":
    print(json.dumps(scan(sys.argv[1])))
