"""Users of a layer's units: runs of units, and the classes whose scores depend on them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from psmpi.layout import Classes, Each, Users

# Runs (first, last, users) of units [first, last). Users that are `Classes` all depend on all units of the run. Each
# class of an `Each` depends on its share of the run; shares have equal sizes and the order of the classes. A single
# class is always an `Each`.
Uses = tuple[tuple[int, int, Users], ...]


def joined(runs: Iterable[tuple[int, int, Users]]) -> Uses:
    """Return ordered runs with neighbours of the same users joined and empty runs dropped.

    Consecutive classes with equal numbers of units form one run, so that equal uses are equal tuples.
    """
    merged: list[tuple[int, int, Users]] = []
    for run in runs:
        _add(merged, *run)
    return tuple(merged)


def _add(merged: list[tuple[int, int, Users]], first: int, last: int, users: Users) -> None:
    """Append a run to the runs before it, and join it with the last one if possible."""
    if first >= last:
        return
    begin, _, before = merged[-1] if merged else (first, first, None)
    if isinstance(users, Classes):
        if before == users:
            merged.pop()
            first = begin
        merged.append((first, last, users))
        return
    if isinstance(before, Each):
        units, share = (last - first) // users.count, (first - begin) // before.count
        if before.last == users.first and units == share:
            merged[-1] = (begin, last, Each(before.first, users.last))
            return
        if before.last == users.first + 1:
            # The first class of the new run is the last class before it: the units of this class form one run.
            merged.pop()
            _add(merged, begin, first - share, Each(before.first, before.last - 1))
            _add(merged, first - share, first + units, Each(users.first, users.first + 1))
            _add(merged, first + units, last, Each(users.first + 1, users.last))
            return
    merged.append((first, last, users))


def _some(first: int, last: int, users: Users, a: int, b: int) -> Classes:
    """Return the classes that use units [a, b) of a run."""
    if isinstance(users, Classes):
        return users
    share = (last - first) // users.count
    return Classes(((users.first + (a - first) // share, users.first - (first - b) // share),))


def single(classes: Classes) -> Users:
    """Return the users of a run that all of `classes` use."""
    return Each(*classes.ranges[0]) if len(classes) == 1 else classes


def grouped(uses: Uses, size: int) -> Uses:
    """Return runs of groups of `size` consecutive units; the users of a group are the users of any of its units."""
    groups: list[tuple[int, int, Users]] = []
    # Classes of an unfinished group, so far.
    unfinished: list[Classes] = []
    for first, last, users in uses:
        at = first
        while at < last:
            group, inside = divmod(at, size)
            whole = last // size
            if inside or whole == group:
                end = min(last, (group + 1) * size)
                unfinished.append(_some(first, last, users, at, end))
                if end == (group + 1) * size:
                    _add(groups, group, group + 1, single(Classes.union(unfinished)))
                    unfinished = []
            elif isinstance(users, Classes):
                end = whole * size
                _add(groups, group, whole, users)
            elif at == first and (last - first) // users.count % size == 0:
                end = last
                _add(groups, group, whole, users)
            else:
                end = at + size
                _add(groups, group, group + 1, single(_some(first, last, users, at, end)))
            at = end
    return tuple(groups)


def stretched(uses: Uses, size: int) -> Uses:
    """Return the users after each unit has been replaced by `size` units."""
    return tuple((first * size, last * size, users) for first, last, users in uses)


def used(uses: Uses, classes: Classes, units: int) -> np.ndarray:
    """Return whether the scores of `classes` depend on each unit, (units,) bool."""
    mask = np.zeros(units, bool)
    for first, last, users in uses:
        if isinstance(users, Classes):
            mask[first:last] = users.meets(classes)
            continue
        share = (last - first) // users.count
        for a, b in classes.within(users.first, users.last):
            mask[first + (a - users.first) * share : first + (b - users.first) * share] = True
    return mask
