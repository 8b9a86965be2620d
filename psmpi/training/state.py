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

    mirrors: host images of the arrays of the vector; places: where the values of each array lie in `saved`, None if
    `saved` is the image itself; after: called when the arrays have been restored.
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
    """Tensors that are no parameters of the network: their layout, and the ownership of their elements.

    saved: this rank's local vector, in host memory, which checkpoints hold and restore. not_restored: see `State`.
    of_optimizer: whether the tensors start afresh with another optimizer.
    """

    saved: np.ndarray
    mirrors: list[Mirror]
    layout: Layout
    owned: Ownership
    not_restored: str
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
    """Everything of a rank that outlives a step and cannot be computed anew.

    shards: of all ranks; each vector of the state is a local vector of this rank's shard. own: names of vectors and
    scalars of the method, not of the optimizer; rows: the rows of the tables that each rank has; not_restored: the end
    of the note "the checkpoint does not hold ..." for checkpoints without these tables. spaces: other tensors than
    parameters, by name. account: memory of all that is declared; a method adds its other arrays.
    """

    def __init__(self, ops: NumpyOps, shards: Ownership, rank: int):
        self.ops, self.shards, self.rank = ops, shards, rank
        self.entries: dict[str, Entry] = {}
        self.table_mirrors: list[Mirror] = []
        self.spaces: dict[str, Space] = {}
        self.scalars: dict[str, float | int] = {}
        self.ranges: dict[str, tuple[float, float]] = {}
        self.tables: dict[str, np.ndarray] = {}
        self.rows, self.not_restored = TableRows(), ""
        self.own: set[str] = set()
        self.account = Account()

    @property
    def vectors(self) -> dict[str, np.ndarray]:
        """This rank's shard of each vector by name, in host memory: filled by `collect`, used by `restore`."""
        return {name: entry.saved for name, entry in self.entries.items()}

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """`vectors`, and this rank's local vector of each space by name."""
        return {**self.vectors, **{name: space.saved for name, space in self.spaces.items()}}

    def vector(
        self, name: str, array: np.ndarray, *, own: bool = False, after: Callable[[], None] | None = None
    ) -> None:
        """Declare an array of the backend, or of host memory, over this rank's shard.

        own: whether the vector belongs to the method, not to the optimizer. after: called after the array is restored.
        """
        mirror = self.ops.mirror(array) if not isinstance(array, np.ndarray) else Mirror(array)
        self._add(name, Entry(mirror.host, [mirror], [None], after), own)

    def pieces(self, name: str, arrays: list[tuple[np.ndarray, Places]], *, own: bool = False) -> None:
        """Declare arrays of the backend that together are a vector; places: (slices of the shard, of the array)."""
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
        """Declare the vectors and scalars of the optimizer of this rank's shard; both share the scalars."""
        if self.scalars:
            raise ValueError(f"the optimizer is to be declared before {', '.join(self.scalars)}")
        for name, vector in optimizer.vectors.items():
            self.vector(name, vector)
        self.account.ask("optimizer", lambda: optimizer.arrays)
        self.scalars, self.ranges = optimizer.scalars, optimizer.ranges

    def scalar(self, name: str, value: float | int) -> None:
        """Declare a number of the method that is the same on every rank."""
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
        not_restored: str,
        *,
        of_optimizer: bool = False,
    ) -> None:
        """Declare arrays of one dtype whose concatenation is this rank's local vector of a space.

        owned: for each rank, its elements of the layout; what: the purpose in the account; not_restored, of_optimizer:
        see `Space`. ValueError for arrays of another total size.
        """
        mirrors = [Mirror(a) if isinstance(a, np.ndarray) else self.ops.mirror(a) for a in arrays]
        size = owned[self.rank].size
        if sum(mirror.host.size for mirror in mirrors) != size:
            raise ValueError(f"the arrays of {name} are not of {size} elements")
        saved = mirrors[0].host if len(mirrors) == 1 else np.empty(size, dtype)
        if len(mirrors) > 1:
            self.account.hold("buffers", saved)
        self.spaces[name] = Space(saved, mirrors, layout, Ownership(tuple(owned)), not_restored, of_optimizer)
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
        """Take the scalars called `names` from a checkpoint, as far as both sides have them.

        ValueError for a count that is no whole number, and for a number out of its range.
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
    """Bring images in host memory up to date; all copies are under way at once."""
    for mirror in mirrors:
        mirror.fetch()
    for mirror in mirrors:
        mirror.wait()
