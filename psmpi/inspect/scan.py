"""Which data sets of a damaged HDF5 file can still be read: `python -m psmpi.inspect.scan FILE` prints a JSON list."""

from __future__ import annotations

import json
import sys

import h5py


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
