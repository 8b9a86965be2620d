"""Users of a layer's units: runs of units, and the classes whose scores depend on their values."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from psmpi.layout import Classes, Each, Users

# Runs (first, last, users) of units: exactly these classes depend on all of them, or each of the classes on its own
# share, which are of one size and in the order of the classes. One class is always an `Each`.
Uses = tuple[tuple[int, int, Users], ...]


def joined(runs: Iterable[tuple[int, int, Users]]) -> Uses:
    """Runs in order, neighbours of the same classes made one, empty ones left out.

    Classes that follow each other, with equally many units, are one run: equal uses are equal tuples.
    """
    found: list[tuple[int, int, Users]] = []
    for run in runs:
        _add(found, *run)
    return tuple(found)


def _add(found: list[tuple[int, int, Users]], first: int, last: int, users: Users) -> None:
    """Append a run to others that it follows."""
    if first >= last:
        return
    begin, _, before = found[-1] if found else (first, first, None)
    if isinstance(users, Classes):
        if before == users:
            found.pop()
            first = begin
        found.append((first, last, users))
        return
    if isinstance(before, Each):
        units, share = (last - first) // users.count, (first - begin) // before.count
        if before.last == users.first and units == share:
            found[-1] = (begin, last, Each(before.first, users.last))
            return
        if before.last == users.first + 1:
            # The first class is the last one before: its units are one run.
            found.pop()
            _add(found, begin, first - share, Each(before.first, before.last - 1))
            _add(found, first - share, first + units, Each(users.first, users.first + 1))
            _add(found, first + units, last, Each(users.first + 1, users.last))
            return
    found.append((first, last, users))


def _some(first: int, last: int, users: Users, a: int, b: int) -> Classes:
    """The classes that use units [a, b) of a run."""
    if isinstance(users, Classes):
        return users
    share = (last - first) // users.count
    return Classes(((users.first + (a - first) // share, users.first - (first - b) // share),))


def single(classes: Classes) -> Users:
    """The users of a run that all of `classes` use."""
    return Each(*classes.ranges[0]) if len(classes) == 1 else classes


def grouped(uses: Uses, size: int) -> Uses:
    """The users of groups of `size` consecutive units, the classes that use any of them: runs of groups."""
    found: list[tuple[int, int, Users]] = []
    # The classes of the group that a run ends in, as far as it is known.
    begun: list[Classes] = []
    for first, last, users in uses:
        at = first
        while at < last:
            group, inside = divmod(at, size)
            whole = last // size
            if inside or whole == group:
                end = min(last, (group + 1) * size)
                begun.append(_some(first, last, users, at, end))
                if end == (group + 1) * size:
                    _add(found, group, group + 1, single(Classes.union(begun)))
                    begun = []
            elif isinstance(users, Classes):
                end = whole * size
                _add(found, group, whole, users)
            elif at == first and (last - first) // users.count % size == 0:
                end = last
                _add(found, group, whole, users)
            else:
                end = at + size
                _add(found, group, group + 1, single(_some(first, last, users, at, end)))
            at = end
    return tuple(found)


def stretched(uses: Uses, size: int) -> Uses:
    """The users of `size` units for each unit."""
    return tuple((first * size, last * size, users) for first, last, users in uses)


def used(uses: Uses, classes: Classes, units: int) -> np.ndarray:
    """(units,) bool: which units the scores of `classes` depend on."""
    mask = np.zeros(units, bool)
    for first, last, users in uses:
        if isinstance(users, Classes):
            mask[first:last] = users.meets(classes)
            continue
        share = (last - first) // users.count
        for a, b in classes.within(users.first, users.last):
            mask[first + (a - users.first) * share : first + (b - users.first) * share] = True
    return mask
