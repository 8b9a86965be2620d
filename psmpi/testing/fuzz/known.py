"""Hostile files of public data sets: IDX (MNIST), and CIFAR-10 in its binary and its pickled version."""

from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np

from psmpi.testing.fuzz.base import put
from psmpi.testing.fuzz.mutations import VALUES, Rng, mutate, mutate_near


def idx(rng: Rng, folder: Path) -> Path:
    place = folder / "mnist"
    place.mkdir()
    packed, odd = rng.random() < 0.5, int(rng.integers(4))
    number = 0
    for part, count in (("train", 20), ("t10k", 10)):
        for kind, head, size in (
            ("images-idx3", struct.pack(">IIII", 0x803, count, 3, 3), 9 * count),
            ("labels-idx1", struct.pack(">II", 0x801, count), count),
        ):
            data = head + bytes(i % 10 for i in range(size))
            if number == odd and rng.random() < 0.7:
                data = mutate_near(rng, data, [(0, len(head))]) if rng.random() < 0.6 else mutate(rng, data)
            end = data if not packed else gzip.compress(data, 1, mtime=0)
            if number == odd and packed and rng.random() < 0.5:
                end = mutate(rng, end)
            put(place, f"{part}-{kind}-ubyte" + (".gz" if packed else ""), end)
            number += 1
    return place


BATCHES = (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch")


def cifar(rng: Rng, folder: Path) -> Path:
    place = folder / "cifar"
    place.mkdir()
    odd = BATCHES[rng.integers(6)]
    images = np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072)
    if rng.random() < 0.3:
        for name in BATCHES:
            record = b"".join(bytes([k]) + images[k].tobytes() for k in range(2))
            put(place, f"{name}.bin", mutate(rng, record) if name == odd else record)
        return place
    place = place / "cifar-10-batches-py"
    place.mkdir()
    for name in BATCHES:
        data = pickle.dumps(
            {"data": images, "labels": [1, 2], "filenames": ["a", "b"]}, protocol=int(rng.integers(1, 5))
        )
        if name == odd:
            data = _odd_pickle(rng, data)
        put(place, name, data)
    return place.parent


def _odd_pickle(rng: Rng, data: bytes) -> bytes:
    """A pickle with changed bytes, or a short one that unpickles to a large object."""
    kind = int(rng.integers(8))
    if kind == 0:
        # Many objects of one byte each in the file.
        return (
            b"\x80\x04" + (b"]", b"}", b"\x8f", b")", b"N")[rng.integers(5)] * int(rng.choice([1000, 3_000_000])) + b"."
        )
    if kind == 1:
        # Each tuple holds the previous one twice: the object grows exponentially.
        end = (b".", b"K\x01s.", b"\x85.")[rng.integers(3)]
        return b"\x80\x02}K\x01" + b"2\x86" * int(rng.integers(1, 64)) + end
    if kind == 2:
        made = pickle.dumps({"data": VALUES[rng.integers(len(VALUES))], "labels": VALUES[rng.integers(len(VALUES))]})
        return made if rng.random() < 0.5 else mutate(rng, made)
    if kind == 3:
        head = data.index(b"(") if b"(" in data else 2
        return mutate_near(
            rng, data, [(0, min(200, len(data))), (head, head + 60), (max(0, len(data) - 200), len(data))]
        )
    return mutate_near(rng, data, [(0, 200), (len(data) - 120, len(data))]) if rng.random() < 0.7 else mutate(rng, data)
