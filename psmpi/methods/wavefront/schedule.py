"""The order in which lanes of layers process chunks of time.

With layers l and chunks c the cell (l, c) needs (l - 1, c) and (l, c - 1): all cells of a diagonal l + c are
independent (loop skewing; Appleyard, Kocisky, Blunsom, arXiv 1604.01946). Backward begins at the opposite corner.
"""

from __future__ import annotations

from collections.abc import Iterator

# Default number of chunks for each lane: lanes then wait at both ends for at most a fifth of their time, and matrix
# products are not much slower than those of whole sequences.
CHUNKS = 4
# Gradients of chunks that are sent down at the same time, and buffers for gradients from above.
RING = 4


def usual_steps(steps: int, lanes: int) -> int:
    """Return the default steps of a chunk: all steps with one lane, else for at least CHUNKS chunks a lane."""
    return steps if lanes == 1 else max(1, steps // (CHUNKS * lanes))


def diagonals(lanes: int, count: int) -> Iterator[list[tuple[int, int]]]:
    """Yield the cells (lane, chunk) of each diagonal, in the order of lanes."""
    for d in range(lanes + count - 1):
        yield [(lane, d - lane) for lane in range(max(0, d - count + 1), min(lanes - 1, d) + 1)]


def back_diagonals(lanes: int, count: int) -> Iterator[list[tuple[int, int]]]:
    """Yield the cells of each diagonal of the backward pass, the last lane and chunk first."""
    for cells in reversed(list(diagonals(lanes, count))):
        yield cells[::-1]
