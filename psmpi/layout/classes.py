"""Sets of classes as ranges, so that a million classes are few objects."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Set
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Classes(Set[int]):
    """A set of classes: ranges (first, behind the last), sorted, with gaps between them."""

    ranges: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def of(classes: Iterable[int] | Classes) -> Classes:
        """The set of some classes, in any order; a range of step 1 takes no time."""
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
        """The classes that are in any of the sets."""
        found: list[tuple[int, int]] = []
        for first, last in sorted(chain.from_iterable(one.ranges for one in sets)):
            if found and first <= found[-1][1]:
                found[-1] = (found[-1][0], max(last, found[-1][1]))
            else:
                found.append((first, last))
        return Classes(tuple(found))

    def __len__(self) -> int:
        return sum(last - first for first, last in self.ranges)

    def __iter__(self) -> Iterator[int]:
        return chain.from_iterable(range(first, last) for first, last in self.ranges)

    def __contains__(self, c: object) -> bool:
        return any(c in range(first, last) for first, last in self.ranges)

    def within(self, first: int, last: int) -> list[tuple[int, int]]:
        """The ranges of its classes that are in [first, last)."""
        return [(max(a, first), min(b, last)) for a, b in self.ranges if a < last and first < b]

    def meets(self, other: Classes) -> bool:
        """Whether the two have a class in common."""
        return any(self.within(first, last) for first, last in other.ranges)


@dataclass(frozen=True)
class Each:
    """The classes [first, last), each of which is by itself: the k-th uses the k-th of as many equal runs."""

    first: int
    last: int

    @property
    def count(self) -> int:
        return self.last - self.first

    @property
    def classes(self) -> Classes:
        return Classes(((self.first, self.last),))


# Users of a run of units: all of these classes, or each of them its own share.
Users = Classes | Each


def as_users(classes: Users | Collection[int]) -> Users:
    """One class is by itself, several are a set."""
    if isinstance(classes, Each):
        return classes
    some = Classes.of(classes)
    return Each(*some.ranges[0]) if len(some) == 1 else some
