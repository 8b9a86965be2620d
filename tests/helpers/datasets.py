"""Data sets of tests: the real files, and synthetic ones in their formats."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from helpers.paths import ROOT

CIFAR_NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def make_cifar(folder: Path, counts: tuple[int, ...] = (3, 1, 4, 2, 5, 6)) -> list[np.ndarray]:
    rng = np.random.default_rng(2)
    batches = []
    for name, count in zip(CIFAR_NAMES, counts, strict=True):
        records = rng.integers(0, 256, (count, 3073)).astype(np.uint8)
        records[:, 0] %= 10
        write(folder / f"{name}.bin", records.tobytes())
        batches.append(records)
    return batches


def real(name: str) -> Path:
    """A directory with the real files of a data set; skip the test if there is none."""
    places = [ROOT.parent / "shared" / "data"]
    if "PSMPI_TEST_DATA" in os.environ:
        places.insert(0, Path(os.environ["PSMPI_TEST_DATA"]))
    for place in places:
        files = place.glob("mnist/train-images*" if name == "mnist" else "cifar-10-batches-bin/test_batch.bin")
        if any(files):
            return place
    pytest.skip(f"no {name} in {', '.join(map(str, places))}; name its directory in PSMPI_TEST_DATA")
