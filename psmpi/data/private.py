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

from psmpi.data.compressed import Compressed
from psmpi.data.identity import Identity, SplitIdentity
from psmpi.data.split import Dataset, Split
from psmpi.errors import UserError

# Stands for a rank's number in the name of a data set.
RANK = "{rank}"


def of_rank(name: str, rank: int) -> str:
    """The name of a rank's data set."""
    return name.replace(RANK, str(rank))


@dataclass(frozen=True)
class OwnRows:
    """`n` rows, of which [first, first + own.n) are the samples `own`, and the others those of other ranks."""

    own: Split
    first: int
    n: int

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.own.dtype

    @property
    def card(self) -> bytes | None:
        return None

    def _rows(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The rows of the source of `own` that these ascending rows are."""
        found = rows - self.first
        if len(rows) and (found[0] < 0 or found[-1] >= self.own.n):
            raise UserError("samples of another rank's private data set were asked for: report it as a bug")
        return found if self.own.index is None else self.own.index[found]

    def read_into(self, rows: npt.NDArray[np.int64], where: npt.NDArray[np.int64], out: npt.NDArray[Any]) -> None:
        self.own.source.read_into(self._rows(rows), where, out)

    def pieces(self, rows: npt.NDArray[np.int64], features: int) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        yield from self.own.source.pieces(self._rows(rows), features)

    def glance(self, count: int) -> npt.NDArray[Any]:
        return self.own.source.glance(count)

    def taken(self, rows: npt.NDArray[np.int64]) -> Compressed | None:
        # Of dense samples all rows may be asked about.
        return self.own.source.taken(self._rows(rows)) if self.own.compressed is not None else None

    def place(self, row: int) -> str:
        return self.own.source.place(int(self._rows(np.array([row]))[0]))


def card(identity: Identity) -> str:
    """All that a rank tells of its data set."""
    return json.dumps(identity.table())


def alike(cards: Sequence[str]) -> tuple[int, int] | None:
    """Two ranks with the same training samples, if there are such."""
    seen: dict[tuple[str, str], int] = {}
    for rank, text in enumerate(cards):
        train = Identity.of(json.loads(text)).train
        first = seen.setdefault((train.targets, train.values), rank)
        if first != rank:
            return first, rank
    return None


def together(dataset: Dataset, cards: Sequence[str], rank: int) -> tuple[Dataset, Identity]:
    """The data set of all ranks as one of them has it, and its identity, from the `card` of each.

    UserError where their samples are not of one shape and kind.
    """
    everyone = [Identity.of(json.loads(text)) for text in cards]
    first = everyone[0]
    if any(one.numbering is not None for one in everyone):
        raise UserError(
            "--private-data: in a text of sparse samples features and labels are numbered by what is in it, of each "
            "rank otherwise: save an .npz file, with x_data, x_indices, x_indptr, x_shape and y"
        )
    for other, one in enumerate(everyone):
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
    outputs = max(one.outputs for one in everyone)
    counts = [one.train.samples for one in everyone]
    start, n = sum(counts[:rank]), sum(counts)
    own = dataset.train
    targets = np.zeros((n, *own.targets.shape[1:]), own.targets.dtype)
    targets[start : start + own.n] = own.targets
    targets.flags.writeable = False
    train = Split(targets, own.shape, own.scale, OwnRows(own, start, n))
    made = replace(dataset, train=train, outputs=outputs, own=range(start, start + own.n))
    splits = [_joined([getattr(one, name) for one in everyone]) for name in ("train", "test")]
    return made, Identity(first.shape, first.task, outputs, splits[0], splits[1])


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
