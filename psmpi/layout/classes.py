"""Sets of classes as ranges, so that a million classes are few objects."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Set
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Classes(Set[int]):
    """A set of classes: ranges [first, last), sorted, with gaps between them."""

    ranges: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def of(classes: Iterable[int] | Classes) -> Classes:
        """Return the set of `classes`, given in any order; a range of step 1 takes constant time."""
        if isinstance(classes, Classes):
            return classes
        if isinstance(classes, range) and classes.step == 1:
            return Classes(((classes.start, classes.stop),) if classes else ())
        numbers = np.unique(np.array(list(classes), np.int64))
        cuts = np.flatnonzero(np.diff(numbers) > 1) + 1
        runs = np.split(numbers, cuts) if len(numbers) else []
        return Classes(tuple((int(run[0]), int(run[-1]) + 1) for run in runs))

    @classmethod
    def _from_iterable(cls, it: Iterable[Any]) -> Any:
        return cls.of(it)

    @staticmethod
    def union(sets: Iterable[Classes]) -> Classes:
        """Return the union of the sets."""
        merged: list[tuple[int, int]] = []
        for first, last in sorted(chain.from_iterable(one.ranges for one in sets)):
            if merged and first <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
            else:
                merged.append((first, last))
        return Classes(tuple(merged))

    def __len__(self) -> int:
        return sum(last - first for first, last in self.ranges)

    def __iter__(self) -> Iterator[int]:
        return chain.from_iterable(range(first, last) for first, last in self.ranges)

    def __contains__(self, c: object) -> bool:
        return any(c in range(first, last) for first, last in self.ranges)

    def within(self, first: int, last: int) -> list[tuple[int, int]]:
        """Return the ranges of the set's classes inside [first, last)."""
        return [(max(a, first), min(b, last)) for a, b in self.ranges if a < last and first < b]

    def meets(self, other: Classes) -> bool:
        """Return whether the two sets have a class in common."""
        return any(self.within(first, last) for first, last in other.ranges)


@dataclass(frozen=True)
class Each:
    """Classes [first, last) with private runs of equal length: class first + k uses the k-th run."""

    first: int
    last: int

    @property
    def count(self) -> int:
        return self.last - self.first

    @property
    def classes(self) -> Classes:
        return Classes(((self.first, self.last),))


# Users of a run of units: classes that all use the whole run, or classes that each use an equal share of the run.
Users = Classes | Each


def as_users(classes: Users | Collection[int]) -> Users:
    """Return one class as an `Each`, and any other number of classes as a set."""
    if isinstance(classes, Each):
        return classes
    some = Classes.of(classes)
    return Each(*some.ranges[0]) if len(some) == 1 else some
