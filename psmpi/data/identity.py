"""The identity of a data set: what tells it from another one of the same name, without reading all of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from psmpi.data.split import Dataset, Split
from psmpi.errors import UserError

# Samples of a split whose values are looked at, from all over it.
SAMPLES = 64
# Values that are so many times larger, or smaller, than those trained on are taken for another scale.
SCALE = 10.0


@dataclass(frozen=True)
class SplitIdentity:
    """One split: its number of samples, their stored dtype and scale, and SHA-256 digests (first 128 bits, hex).

    targets: of all labels (int64) or values (float64); values: of `SAMPLES` samples as they are stored, little-endian;
    most: the largest magnitude in these after scaling.
    """

    samples: int
    dtype: str
    scale: float
    targets: str
    values: str
    most: float


@dataclass(frozen=True)
class Identity:
    """A data set: shape of a sample, task, classes or values of a sample, and the splits train and test."""

    shape: tuple[int, ...]
    task: str
    outputs: int
    train: SplitIdentity
    test: SplitIdentity

    def table(self) -> dict[str, Any]:
        """The identity as plain data, for a checkpoint."""
        return asdict(self)

    @staticmethod
    def of(table: Mapping[str, Any]) -> Identity:
        """The reverse of `table`. An exception of some kind where something is missing or wrong."""
        splits = {}
        for name in ("train", "test"):
            found = dict(table[name])
            if not all(isinstance(found[key], kind) for key, kind in KINDS.items()) or len(found) != len(KINDS):
                raise ValueError(f"data, {name}")
            splits[name] = SplitIdentity(**found)
        shape = tuple(int(size) for size in table["shape"])
        return Identity(shape, str(table["task"]), int(table["outputs"]), **splits)


KINDS: dict[str, Any] = {
    "samples": int, "dtype": str, "scale": (int, float), "targets": str, "values": str, "most": (int, float),
}  # fmt: skip


def identify(dataset: Dataset) -> Identity:
    """The identity of a data set; reads a few samples of each split."""
    return Identity(
        tuple(dataset.shape), dataset.task, dataset.outputs, identify_split(dataset.train), identify_split(dataset.test)
    )


def identify_split(split: Split) -> SplitIdentity:
    """The identity of one split."""
    count = min(SAMPLES, split.n)
    values = split.read(np.arange(count) * split.n // max(1, count))
    # A value that is no number is an error where samples are read to be learnt.
    with np.errstate(invalid="ignore"):
        most = float(np.abs(values, dtype=np.float64).max(initial=0.0)) * split.scale
    return SplitIdentity(
        split.n,
        str(split.dtype),
        split.scale,
        _digest(split.targets),
        _digest(values),
        most if np.isfinite(most) else 0.0,
    )


def _digest(values: np.ndarray) -> str:
    little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    return hashlib.sha256(little.tobytes()).hexdigest()[:32]


def differences(one: Identity, other: Identity) -> list[str]:
    """What differs from `one` data set to the `other`, a phrase each, as "60,000 training samples, there 59,000"."""
    found: list[str] = []
    pairs = (
        ("targets for", one.task, other.task),
        ("samples of shape", one.shape, other.shape),
        ("values a sample" if one.task == "regression" else "classes", one.outputs, other.outputs),
    )
    found += [f"{what} {here}, there {there}" for what, here, there in pairs if here != there]
    targets = "values" if one.task == "regression" else "labels"
    for kind, a, b in (("training", one.train, other.train), ("test", one.test, other.test)):
        if a.samples != b.samples:
            found.append(f"{a.samples:,} {kind} samples, there {b.samples:,}")
        if (a.dtype, a.scale) != (b.dtype, b.scale):
            found.append(f"{kind} samples of {_stored(a)}, there {_stored(b)}")
        if a.samples == b.samples and a.targets != b.targets:
            found.append(f"other {targets} of the {kind} samples, or in another order")
        elif a.samples == b.samples and a.values != b.values and (a.dtype, a.scale) == (b.dtype, b.scale):
            found.append(f"other values in the {kind} samples (up to {a.most:.4g}, there {b.most:.4g})")
    return found


def _stored(split: SplitIdentity) -> str:
    return split.dtype if split.scale == 1 else f"{split.dtype} times {split.scale:.4g}"


def check_same(here: Identity, everyone: Mapping[str, Identity]) -> None:
    """UserError unless all have the data of rank 0, which are `here`; everyone: identities by rank and host."""
    for where, theirs in everyone.items():
        found = differences(here, theirs)
        if found:
            raise UserError(
                f"the data set on {where} is not that of rank 0: here {'; '.join(found)}: give all hosts the same files"
            )


def other_scale(trained: SplitIdentity, given: SplitIdentity) -> bool:
    """Whether the values of samples look as if they were of another scale than those trained on."""
    return min(trained.most, given.most) > 0 and not 1 / SCALE < given.most / trained.most < SCALE
