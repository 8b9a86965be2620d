"""Steps on weights that other processes may update at the same time, in C."""

from __future__ import annotations

import ctypes

import numpy as np

from psmpi.backend.compiled.library import function, plain, pointers
from psmpi.backend.reference.shared import LOCKS, SLOPES, Descent, Pairs, Room, Rows, SharedUpdates

COUNTS, TOKENS, MARKS = np.dtype(np.int64), np.dtype(np.int32), np.dtype(np.uint8)


def lock_bytes() -> int:
    """Size of a lock in bytes."""
    return int(plain("lock_bytes", "")())


def make_lock(kind: str, room: np.ndarray) -> None:
    """Initialize a lock in memory that processes share; exactly one of them calls it.

    kind: a key of LOCKS. room: (lock_bytes(),) uint8.
    """
    plain("lock_begin", "ip")(LOCKS[kind], room.ctypes.data)


class CompiledShared(SharedUpdates):
    """Steps in C. With `atomic`, additions are atomic between all processes that share the weights."""

    instructions: int
    atomics = True

    def add_shared(self, w: np.ndarray, g: np.ndarray, factor: float, atomic: bool) -> None:
        call = function("add_shared", w.dtype, "nppdi", self.instructions)
        call(w.size, *pointers(w.dtype, w, g), factor, atomic)

    def sparse_steps(
        self, order: np.ndarray, rows: Rows, w: np.ndarray, bias: np.ndarray | None, how: Descent, atomic: bool
    ) -> float:
        return self.locked_steps(order, rows, w, bias, how, atomic, None)

    def locked_steps(
        self, order: np.ndarray, rows: Rows, w: np.ndarray, bias: np.ndarray | None, how: Descent, atomic: bool,
        lock: tuple[str, np.ndarray] | None,
    ) -> float:  # fmt: skip
        """Take `sparse_steps`, each under a lock. lock: kind and memory of a lock of `make_lock`; None: no lock."""
        call = function("sparse_steps", w.dtype, "nppppppppiddddiipp", self.instructions)
        kind, room = lock or ("none", None)
        loss = ctypes.c_double(0)
        values, targets, weights, often = pointers(w.dtype, rows.values, rows.targets, w, rows.often)
        call(
            len(order), *pointers(COUNTS, order, rows.starts), *pointers(TOKENS, rows.columns), values, targets,
            weights, None if bias is None else pointers(w.dtype, bias)[0], often, SLOPES[how.loss], how.scale,
            how.lr, how.penalty, how.clip, atomic, LOCKS[kind], None if room is None else room.ctypes.data,
            ctypes.addressof(loss),
        )  # fmt: skip
        return how.scale * loss.value

    def sparse_blocks(
        self, order: np.ndarray, rows: Rows, w: np.ndarray, bias: np.ndarray | None, how: Descent, atomic: bool,
        block: int, room: Room,
    ) -> float:  # fmt: skip
        call = function("sparse_blocks", w.dtype, "nppppppppiddddinppppp", self.instructions)
        loss = ctypes.c_double(0)
        values, targets, weights, often, own, base = pointers(
            w.dtype, rows.values, rows.targets, w, rows.often, room.own, room.base
        )
        (columns, touched), (mark,) = pointers(TOKENS, rows.columns, room.touched), pointers(MARKS, room.mark)
        call(
            len(order), *pointers(COUNTS, order, rows.starts), columns, values, targets, weights,
            None if bias is None else pointers(w.dtype, bias)[0], often, SLOPES[how.loss], how.scale, how.lr,
            how.penalty, how.clip, atomic, block, own, base, mark, touched, ctypes.addressof(loss),
        )  # fmt: skip
        return how.scale * loss.value

    def factor_steps(self, order: np.ndarray, pairs: Pairs, w: np.ndarray, how: Descent, atomic: bool) -> float:
        call = function("factor_steps", w.dtype, "nppppnnpdddip", self.instructions)
        loss = ctypes.c_double(0)
        targets, weights, often = pointers(w.dtype, pairs.targets, w, pairs.often)
        call(
            len(order), *pointers(COUNTS, order), *pointers(TOKENS, pairs.tokens), targets, weights, *w.shape, often,
            how.lr, how.penalty, how.clip, atomic, ctypes.addressof(loss),
        )  # fmt: skip
        return loss.value

    def count_rows(self, order: np.ndarray, rows: Rows, counts: np.ndarray, atomic: bool) -> None:
        call = plain("count_rows", "nppppi")
        addresses = pointers(COUNTS, order, rows.starts), pointers(TOKENS, rows.columns), pointers(COUNTS, counts)
        call(len(order), *addresses[0], *addresses[1], *addresses[2], atomic)

    def deal_components(
        self, order: np.ndarray, starts: np.ndarray, columns: np.ndarray, workers: int, seen: np.ndarray
    ) -> tuple[np.ndarray, int, int]:
        n = len(order)
        owner, parent = np.empty(n, np.int32), np.empty(n, np.int32)
        load, totals = np.empty(n + workers, np.int64), np.empty(2, np.int64)
        call = plain("deal_components", "npppippppp")
        ids, begins, sums, counts = pointers(COUNTS, order, starts, load, totals)
        places, marks, parents, owners = pointers(TOKENS, columns, seen, parent, owner)
        call(n, ids, begins, places, workers, marks, parents, sums, owners, counts)
        return owner, int(totals[0]), int(totals[1])
