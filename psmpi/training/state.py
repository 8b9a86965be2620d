"""The state of a training on one rank: vectors, tables and scalars that checkpoints hold, declared once by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from psmpi.backend import Mirror, NumpyOps
from psmpi.layout import Layout, Ownership, Runs, TableRows
from psmpi.optim import Optimizer
from psmpi.training.account import Account

# Slices of this rank's shard, and of an array whose values these are.
Places = list[tuple[slice, slice]]


@dataclass
class Entry:
    """A vector of the state: `saved` (shard's size,) in host memory is what checkpoints hold and restore.

    mirrors: of the arrays that it is the image of; places: where each array's values lie, None where `saved` is the
    image itself; after: what a restored array needs besides.
    """

    saved: np.ndarray
    mirrors: list[Mirror]
    places: list[Places | None]
    after: Callable[[], None] | None = None

    def merge(self) -> None:
        """Bring `saved` up to date with the images."""
        for mirror, places in zip(self.mirrors, self.places, strict=True):
            for there, here in places or ():
                self.saved[there] = mirror.host[here]

    def spread(self) -> None:
        """Bring the images up to date with `saved`."""
        for mirror, places in zip(self.mirrors, self.places, strict=True):
            for there, here in places or ():
                mirror.host[here] = self.saved[there]


@dataclass
class Space:
    """Tensors that are no parameters of the network, by their layout, and who has which of them.

    `saved`, in host memory, is this rank's local vector, and what checkpoints hold and restore. lost: as of `State`;
    of_optimizer: starts afresh with another optimizer.
    """

    saved: np.ndarray
    mirrors: list[Mirror]
    layout: Layout
    owned: Ownership
    lost: str
    of_optimizer: bool = False

    def merge(self) -> None:
        """Bring `saved` up to date with the images."""
        at = 0
        for mirror in self.mirrors:
            if mirror.host is not self.saved:
                self.saved[at : at + mirror.host.size] = mirror.host
            at += mirror.host.size

    def spread(self) -> None:
        """Bring the images up to date with `saved`."""
        at = 0
        for mirror in self.mirrors:
            if mirror.host is not self.saved:
                mirror.host[...] = self.saved[at : at + mirror.host.size]
            at += mirror.host.size


class State:
    """What a rank has that outlives a step, beside what it computes anew.

    shards: every rank's; the vectors of the state are local vectors of this rank's. own: the names of vectors and
    scalars that are the method's and not the optimizer's; rows: which rows of the tables each rank has; lost: what is
    said where a checkpoint has no such tables: "the checkpoint does not hold ...". spaces: tensors besides the
    network's, by name. account: the memory of what is declared, to which a method adds what it keeps besides.
    """

    def __init__(self, ops: NumpyOps, shards: Ownership, rank: int):
        self.ops, self.shards, self.rank = ops, shards, rank
        self.entries: dict[str, Entry] = {}
        self.table_mirrors: list[Mirror] = []
        self.spaces: dict[str, Space] = {}
        self.scalars: dict[str, float | int] = {}
        self.ranges: dict[str, tuple[float, float]] = {}
        self.tables: dict[str, np.ndarray] = {}
        self.rows, self.lost = TableRows(), ""
        self.own: set[str] = set()
        self.account = Account()

    @property
    def vectors(self) -> dict[str, np.ndarray]:
        """This rank's shard of each vector by name, in host memory, as `collect` finds it and `restore` takes it up."""
        return {name: entry.saved for name, entry in self.entries.items()}

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """`vectors`, and this rank's local vector of each space by name."""
        return {**self.vectors, **{name: space.saved for name, space in self.spaces.items()}}

    def vector(
        self, name: str, array: np.ndarray, *, own: bool = False, after: Callable[[], None] | None = None
    ) -> None:
        """Declare an array of the backend, or of host memory, over this rank's shard.

        own: it is the method's, not the optimizer's. after: called when the array has been restored.
        """
        mirror = self.ops.mirror(array) if not isinstance(array, np.ndarray) else Mirror(array)
        self._add(name, Entry(mirror.host, [mirror], [None], after), own)

    def pieces(self, name: str, arrays: list[tuple[np.ndarray, Places]], *, own: bool = False) -> None:
        """Declare arrays of the backend whose values lie at some places of this rank's shard."""
        mirrors = [self.ops.mirror(array) for array, _ in arrays]
        if len(arrays) == 1 and all(there == here for there, here in arrays[0][1]):
            self._add(name, Entry(mirrors[0].host, mirrors, [None]), own)
            return
        saved = np.empty(self.shards[self.rank].size, mirrors[0].host.dtype)
        self.account.hold("buffers", saved)
        self._add(name, Entry(saved, mirrors, [places for _, places in arrays]), own)

    def _add(self, name: str, entry: Entry, own: bool) -> None:
        if name in self.entries:
            raise ValueError(f"the state has a vector called {name} already")
        self.entries[name] = entry
        if own:
            self.own.add(name)
        optimizers = name != "weights" and not own
        self.account.hold("optimizer" if optimizers else "weights", *(mirror.array for mirror in entry.mirrors))

    def optimizer(self, optimizer: Optimizer) -> None:
        """Declare the vectors and the scalars of an optimizer of this rank's shard; scalars are shared with it."""
        if self.scalars:
            raise ValueError(f"the optimizer is to be declared before {', '.join(self.scalars)}")
        for name, vector in optimizer.vectors.items():
            self.vector(name, vector)
        self.account.ask("optimizer", lambda: optimizer.arrays)
        self.scalars, self.ranges = optimizer.scalars, optimizer.ranges

    def scalar(self, name: str, value: float | int) -> None:
        """Declare a number of the method's, the same on every rank."""
        self.scalars[name] = value
        self.own.add(name)

    def table(self, name: str, array: np.ndarray) -> None:
        """Declare this rank's rows of a table, an array of the backend or of host memory: (rows, any)."""
        mirror = self.ops.mirror(array) if not isinstance(array, np.ndarray) else Mirror(array)
        self.table_mirrors.append(mirror)
        self.tables[name] = mirror.host
        self.account.hold("optimizer", mirror.array)

    def space(
        self,
        name: str,
        arrays: Sequence[np.ndarray],
        dtype: np.dtype,
        layout: Layout,
        owned: Sequence[Runs],
        what: str,
        lost: str,
        *,
        of_optimizer: bool = False,
    ) -> None:
        """Declare arrays that are, one after the other, this rank's local vector of a space, all of one dtype.

        owned: for each rank, the elements of the layout that it has; what: of the account; lost, of_optimizer: see
        `Space`.
        """
        mirrors = [Mirror(a) if isinstance(a, np.ndarray) else self.ops.mirror(a) for a in arrays]
        size = owned[self.rank].size
        if sum(mirror.host.size for mirror in mirrors) != size:
            raise ValueError(f"the arrays of {name} are not of {size} elements")
        saved = mirrors[0].host if len(mirrors) == 1 else np.empty(size, dtype)
        if len(mirrors) > 1:
            self.account.hold("buffers", saved)
        self.spaces[name] = Space(saved, mirrors, layout, Ownership(tuple(owned)), lost, of_optimizer)
        self.account.hold(what, *(mirror.array for mirror in mirrors))

    def _mirrors(self) -> Iterator[Mirror]:
        for entry in self.entries.values():
            yield from entry.mirrors
        for space in self.spaces.values():
            yield from space.mirrors
        yield from self.table_mirrors

    def collect(self) -> None:
        """Bring `vectors` and `tables` up to date with the backend's arrays."""
        fetch(list(self._mirrors()))
        for entry in self.entries.values():
            entry.merge()
        for space in self.spaces.values():
            space.merge()

    def restore(self) -> None:
        """Bring the backend's arrays up to date with `vectors` and `tables`."""
        for entry in self.entries.values():
            entry.spread()
        for space in self.spaces.values():
            space.spread()
        for mirror in self._mirrors():
            mirror.push()
        for entry in self.entries.values():
            if entry.after is not None:
                entry.after()

    def update(self, scalars: Mapping[str, float | int], names: Collection[str]) -> None:
        """Take the scalars of some names from a checkpoint, as far as both have them.

        ValueError for one that cannot be what it is called: a count that is not whole, or a number out of its range.
        """
        for name in names:
            if name in scalars and name in self.scalars:
                value, (low, high) = scalars[name], self.ranges.get(name, (0, inf))
                counts = isinstance(self.scalars[name], int)
                if not low <= value <= high or (counts and not isinstance(value, int)):
                    kind = "a whole number" if counts else "a number"
                    raise ValueError(f"{name} is {value}, and should be {kind} from {low:g} to {high:g}")
                self.scalars[name] = value


def fetch(mirrors: Collection[Mirror]) -> None:
    """Bring images in host memory up to date, all of them under way at once."""
    for mirror in mirrors:
        mirror.fetch()
    for mirror in mirrors:
        mirror.wait()
