"""Private data sets: each rank has samples of its own, in a file that no other rank reads.

Ranks tell each other how many samples they have, of which shape and kind, and a digest of them, and nothing else. Each
then has a data set of all training samples, of which it can read its own rows; its test samples are its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from psmpi.data.identity import Identity, SplitIdentity
from psmpi.data.rows import RowSource
from psmpi.data.split import Dataset, Split
from psmpi.errors import UserError

# Stands for a rank's number in the name of a data set.
RANK = "{rank}"


def of_rank(name: str, rank: int) -> str:
    """The name of a rank's data set."""
    return name.replace(RANK, str(rank))


@dataclass(frozen=True)
class OwnRows:
    """The rows [first, first + source.n) of a source of `n` rows, which are those of another source."""

    source: RowSource
    first: int
    n: int

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.source.dtype

    def _own(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        found = rows - self.first
        if len(rows) and (found[0] < 0 or found[-1] >= self.source.n):
            raise UserError("samples of another rank's private data set were asked for: report it as a bug")
        return found

    def read_into(self, rows: npt.NDArray[np.int64], where: npt.NDArray[np.int64], out: npt.NDArray[Any]) -> None:
        self.source.read_into(self._own(rows), where, out)

    def pieces(self, rows: npt.NDArray[np.int64], features: int) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        yield from self.source.pieces(self._own(rows), features)

    def glance(self, count: int) -> npt.NDArray[Any]:
        return self.source.glance(count)

    def place(self, row: int) -> str:
        return self.source.place(row - self.first)


@dataclass(frozen=True)
class Indexed:
    """Some rows of a source, as a source: row i is row index[i] of it."""

    source: RowSource
    index: npt.NDArray[np.int64]

    @property
    def n(self) -> int:
        return len(self.index)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.source.dtype

    def read_into(self, rows: npt.NDArray[np.int64], where: npt.NDArray[np.int64], out: npt.NDArray[Any]) -> None:
        self.source.read_into(self.index[rows], where, out)

    def pieces(self, rows: npt.NDArray[np.int64], features: int) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        yield from self.source.pieces(self.index[rows], features)

    def glance(self, count: int) -> npt.NDArray[Any]:
        return self.source.glance(count)

    def place(self, row: int) -> str:
        return self.source.place(int(self.index[row]))


def card(dataset: Dataset, identity: Identity) -> str:
    """All that a rank tells of its data set."""
    return json.dumps({"identity": identity.table(), "outputs": dataset.outputs})


def alike(cards: Sequence[str]) -> tuple[int, int] | None:
    """Two ranks with the same training samples, if there are such."""
    seen: dict[tuple[str, str], int] = {}
    for rank, text in enumerate(cards):
        train = Identity.of(json.loads(text)["identity"]).train
        first = seen.setdefault((train.targets, train.values), rank)
        if first != rank:
            return first, rank
    return None


def together(dataset: Dataset, cards: Sequence[str], rank: int) -> tuple[Dataset, Identity]:
    """The data set of all ranks as one of them has it, and its identity, from the `card` of each.

    UserError where their samples are not of one shape and kind.
    """
    told = [json.loads(text) for text in cards]
    everyone = [Identity.of(one["identity"]) for one in told]
    for other, one in enumerate(everyone):
        first = everyone[0]
        for what, here, there in (
            ("samples of shape", first.shape, one.shape),
            ("targets that are", first.task, one.task),
            ("stored values that scale by", first.train.scale, one.train.scale),
            ("targets of so many values:", first.outputs, one.outputs if one.task == "regression" else first.outputs),
        ):
            if here != there:
                raise UserError(
                    f"--private-data: rank 0 has {what} {here}, rank {other} {there}: all ranks need data sets of one "
                    "shape and kind"
                )
    outputs = max(one["outputs"] for one in told)
    counts = [one.train.samples for one in everyone]
    start, n = sum(counts[:rank]), sum(counts)
    own = dataset.train
    targets = np.zeros((n, *own.targets.shape[1:]), own.targets.dtype)
    targets[start : start + own.n] = own.targets
    targets.flags.writeable = False
    source = own.source if own.index is None else Indexed(own.source, own.index)
    train = Split(targets, own.shape, own.scale, OwnRows(source, start, n))
    made = replace(dataset, train=train, outputs=outputs, own=range(start, start + own.n))
    splits = [_joined([getattr(one, name) for one in everyone]) for name in ("train", "test")]
    return made, Identity(everyone[0].shape, everyone[0].task, outputs, *splits)


def _joined(several: Sequence[SplitIdentity]) -> SplitIdentity:
    """The identity of the samples of all ranks, in the order of the ranks."""

    def digest(values: Sequence[str]) -> str:
        return hashlib.sha256("".join(values).encode()).hexdigest()[:32]

    return SplitIdentity(
        sum(one.samples for one in several),
        several[0].dtype,
        several[0].scale,
        digest([one.targets for one in several]),
        digest([one.values for one in several]),
        max(one.most for one in several),
    )
