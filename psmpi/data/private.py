"""Private data sets: each rank has its own samples, in a file that no other rank reads.

Ranks exchange the number, shape and kind of their samples and a digest of them, and nothing else. Each rank then has a
data set of all training samples, of which it can read its own rows only; its test samples are its own.
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

# Placeholder of the rank's number in the name of a data set.
RANK = "{rank}"


def of_rank(name: str, rank: int) -> str:
    """The name of a rank's data set."""
    return name.replace(RANK, str(rank))


@dataclass(frozen=True)
class OwnRows:
    """Source of the `n` rows of all ranks. Rows [first, first + own.n) are this rank's; others raise UserError."""

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
        """Rows of the source of `own` for ascending rows (k,) of all ranks; UserError for other ranks' rows."""
        own_rows = rows - self.first
        if len(rows) and (own_rows[0] < 0 or own_rows[-1] >= self.own.n):
            raise UserError("a rank tried to read samples of another rank's private data set: report it as a bug")
        return own_rows if self.own.index is None else self.own.index[own_rows]

    def read_into(self, rows: npt.NDArray[np.int64], where: npt.NDArray[np.int64], out: npt.NDArray[Any]) -> None:
        self.own.source.read_into(self._rows(rows), where, out)

    def pieces(self, rows: npt.NDArray[np.int64], features: int) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        yield from self.own.source.pieces(self._rows(rows), features)

    def glance(self, count: int) -> npt.NDArray[Any]:
        return self.own.source.glance(count)

    def taken(self, rows: npt.NDArray[np.int64]) -> Compressed | None:
        # A caller may pass the rows of all ranks here to learn whether samples are sparse; dense ones return None.
        return self.own.source.taken(self._rows(rows)) if self.own.compressed is not None else None

    def place(self, row: int) -> str:
        return self.own.source.place(int(self._rows(np.array([row]))[0]))


def card(identity: Identity) -> str:
    """The identity of a rank's data set as JSON: all that other ranks get to know of it."""
    return json.dumps(identity.table())


def alike(cards: Sequence[str]) -> tuple[int, int] | None:
    """Two ranks with the same training samples; None if there are none."""
    first_ranks: dict[tuple[str, str], int] = {}
    for rank, text in enumerate(cards):
        train = Identity.of(json.loads(text)).train
        first = first_ranks.setdefault((train.targets, train.values), rank)
        if first != rank:
            return first, rank
    return None


def together(dataset: Dataset, cards: Sequence[str], rank: int) -> tuple[Dataset, Identity]:
    """The data set of all ranks as rank `rank` has it, and its identity; cards: the `card` of each rank.

    dataset: the rank's own data set. UserError unless all ranks have samples of one shape and kind.
    """
    identities = [Identity.of(json.loads(text)) for text in cards]
    first = identities[0]
    if any(identity.numbering is not None for identity in identities):
        raise UserError(
            "--private-data: a text of sparse samples numbers features and labels by its own contents, which differ "
            "between ranks: save an .npz file, with x_data, x_indices, x_indptr, x_shape and y"
        )
    for other, identity in enumerate(identities):
        for quality, first_has, has in (
            ("samples of shape", first.shape, identity.shape),
            ("targets that are", first.task, identity.task),
            ("stored values that scale by", first.train.scale, identity.train.scale),
            (
                "targets of so many values:",
                first.outputs,
                identity.outputs if identity.task == "regression" else first.outputs,
            ),
        ):
            if first_has != has:
                raise UserError(
                    f"--private-data: rank 0 has {quality} {first_has}, rank {other} {has}: all ranks need data sets "
                    "of one shape and kind"
                )
    outputs = max(identity.outputs for identity in identities)
    counts = [identity.train.samples for identity in identities]
    start, n = sum(counts[:rank]), sum(counts)
    own = dataset.train
    targets = np.zeros((n, *own.targets.shape[1:]), own.targets.dtype)
    targets[start : start + own.n] = own.targets
    targets.flags.writeable = False
    train = Split(targets, own.shape, own.scale, OwnRows(own, start, n))
    joined = replace(dataset, train=train, outputs=outputs, own=range(start, start + own.n))
    splits = [_joined([getattr(identity, name) for identity in identities]) for name in ("train", "test")]
    return joined, Identity(first.shape, first.task, outputs, splits[0], splits[1])


def _joined(several: Sequence[SplitIdentity]) -> SplitIdentity:
    """The identity of the samples of all ranks, in the order of the ranks."""

    def digest(values: Sequence[str]) -> str:
        return hashlib.sha256("".join(values).encode()).hexdigest()[:32]

    return SplitIdentity(
        sum(identity.samples for identity in several),
        several[0].dtype,
        several[0].scale,
        digest([identity.targets for identity in several]),
        digest([identity.values for identity in several]),
        max(identity.most for identity in several),
    )
