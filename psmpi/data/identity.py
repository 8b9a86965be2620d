"""The identity of a data set: what tells it from another one of the same name, by reading a bounded part of it.

All targets are looked at, and all samples up to SEEN_BYTES; of more, runs of samples from all over, of about as many
bytes. Which samples these are depends on their number and size alone, and not on how they are stored.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from psmpi.data.compressed import Compressed
from psmpi.data.copies import Prints, compressed_fingerprints, fingerprints
from psmpi.data.split import Dataset, Numbering, Rows, Split
from psmpi.errors import UserError, counted

# Samples of a split whose values have a digest and a largest magnitude, from all over it.
SAMPLES = 64
# Bytes of samples that have checksums, and what each sample counts for at least: row numbers take memory too.
SEEN_BYTES, LEAST_BYTES = 256 << 20, 64
# Runs of samples that have checksums where there are more bytes.
RUNS = 1024
# Checksums of a split, each of so large a part of it, and one that was not made.
SUMS, UNSEEN = 64, "-" * 8
# Values that are so many times larger, or smaller, than those trained on are taken for another scale.
SCALE = 10.0


@dataclass(frozen=True)
class SplitIdentity:
    """One split: its number of samples, their stored dtype and scale, SHA-256 digests (first 128 bits, hex), checksums.

    dtype: of sparse samples "sparse float32"; targets: of all labels (int64; of texts int8 or int16, and the characters
    behind them; or the names of classes, UTF-8 with NULs between) or values (float64); values: of `SAMPLES` samples as
    they are stored, little-endian, of sparse ones lengths, columns and values, of generated ones what they follow from;
    most: the largest magnitude in these after scaling; seen: how many samples have checksums; sums: CRC-32 of those in
    each of the `SUMS` parts of the split, 8 hex digits a part, or UNSEEN. Earlier checkpoints have no checksums: 0, "".
    """

    samples: int
    dtype: str
    scale: float
    targets: str
    values: str
    most: float
    seen: int = 0
    sums: str = ""


@dataclass(frozen=True)
class Identity:
    """A data set: shape of a sample, task, classes or values of a sample, the splits train and test, and numbering.

    numbering: see `Split`.
    """

    shape: tuple[int, ...]
    task: str
    outputs: int
    train: SplitIdentity
    test: SplitIdentity
    numbering: Numbering | None = None

    def table(self) -> dict[str, Any]:
        """The identity as plain data, for a checkpoint."""
        table = asdict(self)
        # Apart, where readers of earlier versions pass over them.
        sums = {name: {key: table[name].pop(key) for key in ("seen", "sums")} for name in ("train", "test")}
        if table.pop("numbering") is not None and self.numbering is not None:
            table["numbering"] = {"first": self.numbering.first, "labels": list(self.numbering.labels)}
        return {**table, "sums": sums}

    @staticmethod
    def of(table: Mapping[str, Any]) -> Identity:
        """The reverse of `table`. An exception of some kind where something is missing or wrong."""
        splits = {}
        for name in ("train", "test"):
            found = dict(table[name])
            if not all(isinstance(found[key], kind) for key, kind in KINDS.items()) or len(found) != len(KINDS):
                raise ValueError(f"data, {name}")
            sums = dict(table.get("sums", {}).get(name, {"seen": 0, "sums": ""}))
            if not (type(sums["seen"]) is int and isinstance(sums["sums"], str) and len(sums) == 2):
                raise ValueError(f"data, sums, {name}")
            splits[name] = SplitIdentity(**found, **sums)
        shape = tuple(table["shape"])
        for number in (*shape, table["outputs"], splits["train"].samples, splits["test"].samples):
            if type(number) is not int or not 0 <= number < 2**53:
                raise ValueError(f"data, {number!r}")
        if table["task"] not in ("classes", "regression"):
            raise ValueError("data, task")
        numbering = None
        if "numbering" in table:
            first, labels = table["numbering"]["first"], tuple(table["numbering"]["labels"])
            if first not in (0, 1) or len(labels) > 2 or not all(type(label) is int for label in labels):
                raise ValueError("data, numbering")
            numbering = Numbering(first, labels, shape[0])
        return Identity(shape, table["task"], table["outputs"], **splits, numbering=numbering)


KINDS: dict[str, Any] = {
    "samples": int, "dtype": str, "scale": (int, float), "targets": str, "values": str, "most": (int, float),
}  # fmt: skip


def identify(dataset: Dataset, share: tuple[int, int] = (0, 1), prints: list[Prints] | None = None) -> Identity:
    """The identity of a data set; share, prints: see `identify_split`, of the training and then of the test samples."""
    train, test = (identify_split(split, share, prints) for split in (dataset.train, dataset.test))
    return Identity(tuple(dataset.shape), dataset.task, dataset.outputs, train, test, dataset.train.numbering)


def identify_split(split: Split, share: tuple[int, int] = (0, 1), prints: list[Prints] | None = None) -> SplitIdentity:
    """The identity of one split, with all checksums, or with `share` (k, of) every of-th only, from the k-th on.

    Fingerprints of the samples that were read are appended to `prints`; none of generated ones, which are not read.
    """
    if split.source.card is not None:
        made = hashlib.sha256(split.source.card).hexdigest()[:32]
        return SplitIdentity(split.n, str(split.dtype), split.scale, _digest(split.targets), made, 1.0)
    count = min(SAMPLES, split.n)
    some = np.arange(count) * split.n // max(1, count)
    edges = np.arange(SUMS + 1) * split.n // SUMS
    sparse = split.compressed
    size = split.features * split.dtype.itemsize if sparse is None else -(-sparse.nbytes // max(1, split.n))
    seen = seen_rows(split.n, size, some)
    mine = np.arange(SUMS) % share[1] == share[0]
    part = np.searchsorted(edges, seen, "right") - 1
    rows = seen if mine.all() else np.union1d(seen[mine[part]], some)
    found = np.empty(len(rows) if prints is not None else 0, np.uint64)
    values, sums = (
        _dense(split, rows, some, edges, found) if sparse is None else _sparse(sparse, rows, some, edges, found)
    )
    if prints is not None:
        prints.append(found)
    # A value that is no number is an error where samples are read to be learnt.
    with np.errstate(invalid="ignore"):
        most = float(np.abs(values[-1], dtype=np.float64).max(initial=0.0)) * split.scale
    return SplitIdentity(
        split.n,
        str(split.dtype) if sparse is None else f"sparse {split.dtype}",
        split.scale,
        _digest(
            split.targets,
            *(() if split.lengths is None else (split.lengths,)),
            *([np.array(list(map(ord, split.characters)))] if split.characters else ()),
            *([np.frombuffer("\0".join(split.names).encode(), np.uint8)] if split.names else ()),
        ),
        _digest(*values),
        most if np.isfinite(most) else 0.0,
        len(seen),
        "".join(f"{one:08x}" if looked else UNSEEN for one, looked in zip(sums, mine, strict=True)),
    )


Looked = tuple[tuple[np.ndarray, ...], list[int]]


def _dense(split: Split, rows: Rows, some: Rows, edges: Rows, found: Prints) -> Looked:
    """The values of the samples `some`, and checksums of the `rows` in each part; fingerprints of these go to `found`.

    found: (len(rows),), or empty where none are wanted.
    """
    values, sums = np.empty((len(some), split.features), split.dtype), [0] * SUMS
    for first, piece in split.pieces(rows):
        here = rows[first : first + len(piece)]
        at, behind = np.searchsorted(some, (here[0], here[-1] + 1))
        values[at:behind] = piece[np.searchsorted(here, some[at:behind])]
        cuts = np.searchsorted(here, edges)
        for k in np.flatnonzero(cuts[1:] > cuts[:-1]):
            sums[k] = zlib.crc32(_little(piece[cuts[k] : cuts[k + 1]]).data, sums[k])
        if len(found):
            found[first : first + len(piece)] = fingerprints(piece)
    return (values,), sums


def _sparse(rows_of: Compressed, rows: Rows, some: Rows, edges: Rows, found: Prints) -> Looked:
    """`_dense` of compressed rows: lengths, columns and values of the samples `some`, and checksums of such."""
    sums = [0] * SUMS
    cuts = np.searchsorted(rows, edges)
    for k in np.flatnonzero(cuts[1:] > cuts[:-1]):
        here = slice(int(cuts[k]), int(cuts[k + 1]))
        part = rows_of.take(rows[here])
        for array in _arrays(part):
            sums[k] = zlib.crc32(_little(array).data, sums[k])
        if len(found):
            found[here] = compressed_fingerprints(part)
    return _arrays(rows_of.take(some)), sums


def _arrays(rows: Compressed) -> tuple[np.ndarray, ...]:
    return np.diff(rows.starts), rows.columns, rows.values


def seen_rows(count: int, size: int, some: Rows) -> Rows:
    """The samples, of `count` of `size` bytes, that have checksums: all up to SEEN_BYTES, else `some` and runs."""
    size = max(size, LEAST_BYTES)
    if count * size <= SEEN_BYTES:
        return np.arange(count)
    runs = min(count, max(len(some), min(RUNS, SEEN_BYTES // size)))
    each = max(1, SEEN_BYTES // (runs * size))
    starts = np.arange(runs) * count // runs
    # Runs do not overlap. np.union1d takes seconds for four million.
    rows = np.sort(np.concatenate([(starts[:, None] + np.arange(each)).ravel(), some]))
    return rows[np.diff(rows, prepend=-1) > 0]


def _little(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, values.dtype.newbyteorder("<"))


def _digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(_little(values).tobytes() for values in arrays)).hexdigest()[:32]


def differences(one: Identity, other: Identity) -> list[str]:
    """What differs from `one` data set to the `other`, a phrase each, as "60,000 training samples, there 59,000"."""
    found: list[str] = []
    pairs = (
        ("targets for", one.task, other.task),
        ("samples of shape", one.shape, other.shape),
        ("values a sample" if one.task == "regression" else "classes", one.outputs, other.outputs),
    )
    found += [f"{what} {here}, there {there}" for what, here, there in pairs if here != there]
    if one.numbering is not None and other.numbering is not None:
        (first, labels, _), (other_first, others, _) = one.numbering, other.numbering
        if first != other_first:
            found.append(f"features numbered from {first}, there from {other_first}")
        if labels != others:
            found.append(f"the labels {_labels(labels)}, there {_labels(others)}")
    targets = "values" if one.task == "regression" else "labels"
    for kind, a, b in (("training", one.train, other.train), ("test", one.test, other.test)):
        found += split_differences(a, b, kind, targets)
    return found


def _labels(labels: tuple[int, ...]) -> str:
    return " and ".join(map(str, labels)) if len(labels) == 2 else f"from {labels[0]} on" if labels else "of values"


def split_differences(a: SplitIdentity, b: SplitIdentity, kind: str, targets: str = "labels") -> list[str]:
    """What differs from one split to another, as far as both have been looked at, a phrase each; kind: "training"."""
    found: list[str] = []
    if a.samples != b.samples:
        found.append(f"{counted(a.samples, f'{kind} sample')}, there {b.samples:,}")
    if (a.dtype, a.scale) != (b.dtype, b.scale):
        found.append(f"{kind} samples of {_stored(a)}, there {_stored(b)}")
    if a.samples == b.samples and a.targets != b.targets:
        found.append(f"other {targets} of the {kind} samples, or in another order")
    elif a.samples == b.samples and (a.dtype, a.scale) == (b.dtype, b.scale):
        parts = _other_parts(a, b)
        largest = f" (up to {a.most:.4g}, there {b.most:.4g})" if a.values != b.values else ""
        if largest or parts:
            found.append(f"other values in the {kind} samples{_named(parts, a.samples)}{largest}")
    return found


def _other_parts(a: SplitIdentity, b: SplitIdentity) -> list[tuple[int, int]]:
    """Parts of a split, first and behind the last sample, whose checksums differ where both have them."""
    # Of another version of psmpi, which may look at others.
    if a.seen != b.seen or len(a.sums) != len(b.sums):
        return []
    size = len(UNSEEN)
    pairs = [(a.sums[k : k + size], b.sums[k : k + size]) for k in range(0, len(a.sums), size)]
    merged: list[tuple[int, int]] = []
    for k, pair in enumerate(pairs):
        if UNSEEN in pair or pair[0] == pair[1]:
            continue
        first, behind = (at * a.samples // len(pairs) for at in (k, k + 1))
        if merged and merged[-1][1] == first:
            first = merged.pop()[0]
        merged.append((first, behind))
    return merged


def _named(parts: list[tuple[int, int]], samples: int) -> str:
    """Samples by their numbers, " 100-199, 350 and others"; "" where these are all, or none."""
    if parts in ([], [(0, samples)]):
        return ""
    named = [f"{first:,}" if behind - first == 1 else f"{first:,}-{behind - 1:,}" for first, behind in parts[:3]]
    return f" {', '.join(named)}{' and others' if len(parts) > 3 else ''}"


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
