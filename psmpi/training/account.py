"""The account of a rank's memory: bytes by purpose; memory that several arrays share counts once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np


class Account:
    """Arrays, and objects with `nbytes`, that a rank keeps; their sizes are read when the bytes are asked for.

    Overlapping arrays, such as a shard inside a part, count once, under the purpose of the array declared first.
    """

    def __init__(self) -> None:
        self._held: list[tuple[str, Callable[[], Iterable[Any]]]] = []
        self._accounts: list[Callable[[], dict[str, int]]] = []

    def hold(self, what: str, *things: Any) -> None:
        """Count things: arrays of the backend or of host memory, or objects with `nbytes`."""
        self._held.append((what, lambda: things))

    def ask(self, what: str, things: Callable[[], Iterable[Any]]) -> None:
        """Count the things that `things()` returns when the bytes are asked for; numbers are bytes."""
        self._held.append((what, things))

    def include(self, account: Callable[[], dict[str, int]]) -> None:
        """Count the bytes by purpose that `account()` returns at the time of the question."""
        self._accounts.append(account)

    def bytes(self) -> dict[str, int]:
        """Bytes by purpose."""
        total: dict[str, int] = {}
        seen: list[tuple[int, int]] = []
        for what, things in self._held:
            total[what] = total.get(what, 0) + sum(_fresh(one, seen) for one in things())
        for account in self._accounts:
            for what, count in account().items():
                total[what] = total.get(what, 0) + count
        return total


def _fresh(thing: Any, seen: list[tuple[int, int]]) -> int:
    """Bytes of `thing` outside the `seen` pieces of memory (first, last + 1), to which an array is added."""
    if isinstance(thing, int):
        return thing
    address = _address(thing)
    if address is None:
        return int(thing.nbytes)
    start, stop = address, address + int(thing.nbytes)
    known, at = 0, start
    for first, last in sorted(seen):
        known += max(0, min(stop, last) - max(at, first))
        at = max(at, min(stop, last))
    seen.append((start, stop))
    return stop - start - known


def _address(thing: Any) -> int | None:
    """Address of a contiguous array in host or device memory; None for other objects."""
    if isinstance(thing, np.ndarray):
        return int(thing.ctypes.data)
    device = getattr(thing, "__cuda_array_interface__", None)
    return None if device is None else int(device["data"][0])


def nbytes(*held: Any) -> int:
    """The bytes of arrays and of objects with `nbytes`, and numbers of bytes, together."""
    return sum(one if isinstance(one, int) else int(one.nbytes) for one in held)
