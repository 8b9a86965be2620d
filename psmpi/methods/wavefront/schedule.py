"""The order in which layers go over chunks of time; pure functions.

With layers l and chunks c the cell (l, c) needs (l - 1, c) and (l, c - 1): all cells of a diagonal l + c are
independent (loop skewing; Appleyard, Kocisky, Blunsom, arXiv 1604.01946). Backward the same from the other corner.
"""

from __future__ import annotations

from collections.abc import Iterator

# Chunks that there are at least for each of the lanes that go over them, where nobody says: then lanes wait for at most
# a fifth of their time at both ends, and products are not much slower than those of whole sequences.
CHUNKS = 4
# Gradients of chunks that are on their way down at once, and buffers for those that come from above.
RING = 4


def usual_steps(steps: int, lanes: int) -> int:
    """The steps of a chunk where nobody says: all of them where there is one lane, else so that there are enough."""
    return steps if lanes == 1 else max(1, steps // (CHUNKS * lanes))


def diagonals(lanes: int, count: int) -> Iterator[list[tuple[int, int]]]:
    """The cells (lane, chunk) of each diagonal, one after the other, lanes in their order."""
    for d in range(lanes + count - 1):
        yield [(lane, d - lane) for lane in range(max(0, d - count + 1), min(lanes - 1, d) + 1)]


def back_diagonals(lanes: int, count: int) -> Iterator[list[tuple[int, int]]]:
    """The cells of each diagonal of the way back, the last lane and chunk first."""
    for cells in reversed(list(diagonals(lanes, count))):
        yield cells[::-1]
