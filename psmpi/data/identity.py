"""The identity of a data set: digests and checksums that distinguish it from another one of the same name.

It covers all targets and all samples up to SEEN_BYTES; of larger splits, evenly spaced runs of samples of about
SEEN_BYTES in all. The choice of samples depends on their number and size only, not on how they are stored.
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

# Evenly spaced samples of a split whose values have a digest and a largest magnitude.
SAMPLES = 64
# Most bytes of samples with checksums, and the bytes that each sample counts at least: row numbers take memory too.
SEEN_BYTES, LEAST_BYTES = 256 << 20, 64
# Runs of samples with checksums in a split of more bytes.
RUNS = 1024
# Number of checksums of a split, each of an equal part of it, and the mark of a checksum that was not made.
SUMS, UNSEEN = 64, "-" * 8
# Values that are this many times larger or smaller than the training's are taken for another scale.
SCALE = 10.0


@dataclass(frozen=True)
class SplitIdentity:
    """Identity of one split. Digests are the first 128 bits of SHA-256 as hex, over little-endian arrays.

    samples: number of samples. dtype, scale: of the stored values; "sparse float32" for sparse samples. targets: digest
    of all labels (int64; of texts int8 or int16) or values (float64), then of the lengths, the characters of a text and
    the names of classes (UTF-8, separated by NULs), if there are any. values: digest of `SAMPLES` samples as stored; of
    sparse ones their lengths, columns and values; of generated ones the source's card. most: largest magnitude in these
    samples after scaling. seen: number of samples with checksums. sums: CRC-32 of these in each of the `SUMS` parts of
    the split, 8 hex digits a part, or UNSEEN. A checkpoint of an earlier version has no checksums: seen 0, sums "".
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
    """Identity of a data set: sample shape, task, classes or values (`outputs`), splits; numbering: see `Split`."""

    shape: tuple[int, ...]
    task: str
    outputs: int
    train: SplitIdentity
    test: SplitIdentity
    numbering: Numbering | None = None

    def table(self) -> dict[str, Any]:
        """The identity as plain data, for a checkpoint."""
        table = asdict(self)
        # Keep the checksums in a table of their own, which readers of earlier versions ignore.
        sums = {name: {key: table[name].pop(key) for key in ("seen", "sums")} for name in ("train", "test")}
        if table.pop("numbering") is not None and self.numbering is not None:
            table["numbering"] = {"first": self.numbering.first, "labels": list(self.numbering.labels)}
        return {**table, "sums": sums}

    @staticmethod
    def of(table: Mapping[str, Any]) -> Identity:
        """The inverse of `table`. Missing or wrong entries raise an exception, such as ValueError or KeyError."""
        splits = {}
        for name in ("train", "test"):
            fields = dict(table[name])
            if not all(isinstance(fields[key], kind) for key, kind in KINDS.items()) or len(fields) != len(KINDS):
                raise ValueError(f"data, {name}")
            sums = dict(table.get("sums", {}).get(name, {"seen": 0, "sums": ""}))
            if not (type(sums["seen"]) is int and isinstance(sums["sums"], str) and len(sums) == 2):
                raise ValueError(f"data, sums, {name}")
            splits[name] = SplitIdentity(**fields, **sums)
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
    """The identity of a data set; share, prints: see `identify_split`, which gets the training samples first."""
    train, test = (identify_split(split, share, prints) for split in (dataset.train, dataset.test))
    return Identity(tuple(dataset.shape), dataset.task, dataset.outputs, train, test, dataset.train.numbering)


def identify_split(split: Split, share: tuple[int, int] = (0, 1), prints: list[Prints] | None = None) -> SplitIdentity:
    """The identity of one split. share: (k, of), make every of-th checksum only, from the k-th on.

    prints: a list that gets the fingerprints of the samples that were read; generated samples are not read.
    """
    if split.source.card is not None:
        card_digest = hashlib.sha256(split.source.card).hexdigest()[:32]
        return SplitIdentity(split.n, str(split.dtype), split.scale, _digest(split.targets), card_digest, 1.0)
    count = min(SAMPLES, split.n)
    some = np.arange(count) * split.n // max(1, count)
    edges = np.arange(SUMS + 1) * split.n // SUMS
    sparse = split.compressed
    size = split.features * split.dtype.itemsize if sparse is None else -(-sparse.nbytes // max(1, split.n))
    seen = seen_rows(split.n, size, some)
    own_parts = np.arange(SUMS) % share[1] == share[0]
    part = np.searchsorted(edges, seen, "right") - 1
    rows = seen if own_parts.all() else np.union1d(seen[own_parts[part]], some)
    fingerprints_read = np.empty(len(rows) if prints is not None else 0, np.uint64)
    values, sums = (
        _dense(split, rows, some, edges, fingerprints_read)
        if sparse is None
        else _sparse(sparse, rows, some, edges, fingerprints_read)
    )
    if prints is not None:
        prints.append(fingerprints_read)
    # NaN is no error here: reading the samples for training reports it.
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
        "".join(f"{checksum:08x}" if is_own else UNSEEN for checksum, is_own in zip(sums, own_parts, strict=True)),
    )


Looked = tuple[tuple[np.ndarray, ...], list[int]]


def _dense(split: Split, rows: Rows, some: Rows, edges: Rows, prints: Prints) -> Looked:
    """Values of the samples `some`, and checksums of the `rows` in each part of the split.

    edges: (SUMS + 1,), the bounds of the parts. prints: (len(rows),), filled with fingerprints; empty: make none.
    """
    values, sums = np.empty((len(some), split.features), split.dtype), [0] * SUMS
    for first, piece in split.pieces(rows):
        numbers = rows[first : first + len(piece)]
        at, stop = np.searchsorted(some, (numbers[0], numbers[-1] + 1))
        values[at:stop] = piece[np.searchsorted(numbers, some[at:stop])]
        cuts = np.searchsorted(numbers, edges)
        for k in np.flatnonzero(cuts[1:] > cuts[:-1]):
            sums[k] = zlib.crc32(_little(piece[cuts[k] : cuts[k + 1]]).data, sums[k])
        if len(prints):
            prints[first : first + len(piece)] = fingerprints(piece)
    return (values,), sums


def _sparse(rows_of: Compressed, rows: Rows, some: Rows, edges: Rows, prints: Prints) -> Looked:
    """Values and checksums of compressed rows, as in `_dense`; both cover lengths, columns and values of the rows."""
    sums = [0] * SUMS
    cuts = np.searchsorted(rows, edges)
    for k in np.flatnonzero(cuts[1:] > cuts[:-1]):
        span = slice(int(cuts[k]), int(cuts[k + 1]))
        part = rows_of.take(rows[span])
        for array in _arrays(part):
            sums[k] = zlib.crc32(_little(array).data, sums[k])
        if len(prints):
            prints[span] = compressed_fingerprints(part)
    return _arrays(rows_of.take(some)), sums


def _arrays(rows: Compressed) -> tuple[np.ndarray, ...]:
    return np.diff(rows.starts), rows.columns, rows.values


def seen_rows(count: int, size: int, some: Rows) -> Rows:
    """Numbers of the samples with checksums, of `count` of `size` bytes: all up to SEEN_BYTES, else `some` and runs."""
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
    """A phrase for each difference of two data sets, such as "60,000 training samples, there 59,000" (first, other)."""
    phrases: list[str] = []
    pairs = (
        ("targets for", one.task, other.task),
        ("samples of shape", one.shape, other.shape),
        ("values a sample" if one.task == "regression" else "classes", one.outputs, other.outputs),
    )
    phrases += [f"{what} {own}, there {there}" for what, own, there in pairs if own != there]
    if one.numbering is not None and other.numbering is not None:
        (first, labels, _), (other_first, other_labels, _) = one.numbering, other.numbering
        if first != other_first:
            phrases.append(f"features numbered from {first}, there from {other_first}")
        if labels != other_labels:
            phrases.append(f"the labels {_labels(labels)}, there {_labels(other_labels)}")
    targets = "values" if one.task == "regression" else "labels"
    for kind, a, b in (("training", one.train, other.train), ("test", one.test, other.test)):
        phrases += split_differences(a, b, kind, targets)
    return phrases


def _labels(labels: tuple[int, ...]) -> str:
    return " and ".join(map(str, labels)) if len(labels) == 2 else f"from {labels[0]} on" if labels else "of values"


def split_differences(a: SplitIdentity, b: SplitIdentity, kind: str, targets: str = "labels") -> list[str]:
    """A phrase for each difference of two splits, as far as both have checksums; kind: such as "training"."""
    phrases: list[str] = []
    if a.samples != b.samples:
        phrases.append(f"{counted(a.samples, f'{kind} sample')}, there {b.samples:,}")
    if (a.dtype, a.scale) != (b.dtype, b.scale):
        phrases.append(f"{kind} samples of {_stored(a)}, there {_stored(b)}")
    if a.samples == b.samples and a.targets != b.targets:
        phrases.append(f"other {targets} of the {kind} samples, or in another order")
    elif a.samples == b.samples and (a.dtype, a.scale) == (b.dtype, b.scale):
        parts = _other_parts(a, b)
        largest = f" (up to {a.most:.4g}, there {b.most:.4g})" if a.values != b.values else ""
        if largest or parts:
            phrases.append(f"other values in the {kind} samples{_named(parts, a.samples)}{largest}")
    return phrases


def _other_parts(a: SplitIdentity, b: SplitIdentity) -> list[tuple[int, int]]:
    """Parts (first, stop) of a split whose checksums differ; parts without a checksum in `a` or `b` are left out."""
    # Another version of psmpi may make checksums of other samples.
    if a.seen != b.seen or len(a.sums) != len(b.sums):
        return []
    size = len(UNSEEN)
    pairs = [(a.sums[k : k + size], b.sums[k : k + size]) for k in range(0, len(a.sums), size)]
    merged: list[tuple[int, int]] = []
    for k, pair in enumerate(pairs):
        if UNSEEN in pair or pair[0] == pair[1]:
            continue
        first, stop = (at * a.samples // len(pairs) for at in (k, k + 1))
        if merged and merged[-1][1] == first:
            first = merged.pop()[0]
        merged.append((first, stop))
    return merged


def _named(parts: list[tuple[int, int]], samples: int) -> str:
    """Text that lists the samples of parts, such as " 100-199, 350 and others"; "" for none or all samples."""
    if parts in ([], [(0, samples)]):
        return ""
    named = [f"{first:,}" if stop - first == 1 else f"{first:,}-{stop - 1:,}" for first, stop in parts[:3]]
    return f" {', '.join(named)}{' and others' if len(parts) > 3 else ''}"


def _stored(split: SplitIdentity) -> str:
    return split.dtype if split.scale == 1 else f"{split.dtype} times {split.scale:.4g}"


def check_same(first: Identity, everyone: Mapping[str, Identity]) -> None:
    """Raise UserError unless all ranks have the data of rank 0, `first`. everyone: identities by rank and host."""
    for where, identity in everyone.items():
        phrases = differences(first, identity)
        if phrases:
            raise UserError(
                f"the data set on {where} is not that of rank 0: here {'; '.join(phrases)}: give all hosts the same "
                "files"
            )


def other_scale(trained: SplitIdentity, given: SplitIdentity) -> bool:
    """Whether the largest magnitude of samples differs from the training's by a factor of SCALE or more."""
    return min(trained.most, given.most) > 0 and not 1 / SCALE < given.most / trained.most < SCALE
