"""Collectives as rounds of messages between two ranks: the algorithms of MPICH.

Thakur, Rabenseifner, Gropp, "Optimization of collective communication operations in MPICH" (2005); the sizes at which
an algorithm is replaced by another are MPICH's. Other libraries have others, of the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Part(NamedTuple):
    """A message of a round: whether it is sent, the other rank's place in the group, bytes, and in how many pieces."""

    out: bool
    peer: int
    nbytes: int
    pieces: int = 1


# Concurrent messages of a rank; the next round begins when all of them are done.
Round = list[Part]
# Number of rounds of a ring that are simulated one by one; further rounds are joined.
RING = 32


def rounds(name: str, size: int, me: int, root: int, sizes: Sequence[int]) -> list[Round]:
    """The rounds of rank `me` in a collective of `size` ranks; name: of MPI's blocking call.

    sizes: as of `Call`: bytes of the vector, or of each rank's run. ValueError for other names.
    """
    if size == 1:
        return []
    if name in ("Scatterv", "Gatherv", "Gather"):
        return _linear(name == "Scatterv", size, me, root, sizes)
    if name == "Bcast":
        return _bcast(size, me, root, sizes[0])
    if name == "Reduce":
        return _reduce(size, me, root, sizes[0])
    if name == "Allreduce":
        return _allreduce(size, me, sizes[0])
    if name in ("Allgather", "Allgatherv"):
        return _allgather(size, me, sizes)
    if name == "Reduce_scatter":
        return _reduce_scatter(size, me, sizes)
    if name == "Barrier":
        return _barrier(size, me)
    raise ValueError(f"no rounds are known of {name}")


def _barrier(size: int, me: int) -> list[Round]:
    """Dissemination: messages to the rank at distance 1, 2, 4, ..., and from the rank on the other side."""
    distances = [1 << k for k in range((size - 1).bit_length())]
    return [[Part(False, (me - d) % size, 0), Part(True, (me + d) % size, 0)] for d in distances]


def _linear(out: bool, size: int, me: int, root: int, sizes: Sequence[int]) -> list[Round]:
    """Messages between the root and each other rank. The root knows all sizes, another rank its own."""
    if me != root:
        return [[Part(not out, root, sizes[-1])]]
    own = sizes if len(sizes) == size else [sizes[0]] * size
    return [[Part(out, other, own[other]) for other in range(size) if other != root]]


def _binomial(size: int, me: int, root: int, nbytes: int) -> list[Round]:
    """A broadcast down a tree: at distances of powers of two."""
    place, rounds, distance = (me - root) % size, [], 1
    while distance < size and not place & distance:
        distance *= 2
    if place:
        rounds.append([Part(False, (me - distance) % size, nbytes)])
    while distance > 1:
        distance //= 2
        if place + distance < size:
            rounds.append([Part(True, (me + distance) % size, nbytes)])
    return rounds


def _turned(steps: list[Round]) -> list[Round]:
    """The rounds in reverse order, with sends and receives exchanged."""
    return [[Part(not part.out, part.peer, part.nbytes, part.pieces) for part in one] for one in reversed(steps)]


def _bcast(size: int, me: int, root: int, nbytes: int) -> list[Round]:
    if nbytes < 12288 or size < 8:
        return _binomial(size, me, root, nbytes)
    # Scattered down a tree, each branch its share, then gathered on all.
    share = nbytes // size
    return _scattered(size, me, root, share) + _allgather(size, me, [share] * size)


def _scattered(size: int, me: int, root: int, share: int) -> list[Round]:
    place, rounds, distance = (me - root) % size, [], 1
    while distance < size and not place & distance:
        distance *= 2
    if place:
        rounds.append([Part(False, (me - distance) % size, share * min(distance, size - place))])
    while distance > 1:
        distance //= 2
        if place + distance < size:
            rounds.append([Part(True, (me + distance) % size, share * min(distance, size - place - distance))])
    return rounds


def _reduce(size: int, me: int, root: int, nbytes: int) -> list[Round]:
    if nbytes <= 2048 or nbytes < 8 * _power(size):
        return _turned(_binomial(size, me, root, nbytes))
    # Summed in shares among a power of two of ranks, then gathered the same way back. Of two that become one the even
    # rank goes on; where the odd one is the root, it is given the sum at the end.
    left = size - _power(size)
    if me < 2 * left and me % 2:
        return [[Part(True, me - 1, nbytes)], *([[Part(False, me - 1, nbytes)]] if me == root else [])]

    ranks = [rank for rank in range(size) if rank >= 2 * left or rank % 2 == 0]
    own, top = (ranks.index(rank if rank >= 2 * left else rank - rank % 2) for rank in (me, root))
    rounds: list[Round] = [[Part(False, me + 1, nbytes)]] if me < 2 * left else []
    halvings = range(len(ranks).bit_length() - 1)
    rounds += [_both(ranks[own ^ 1 << k], nbytes >> (k + 1)) for k in halvings]
    apart = own ^ top
    for k in reversed(halvings):
        if apart < 2 << k:
            rounds.append([Part(apart >= 1 << k, ranks[own ^ 1 << k], nbytes >> (k + 1))])
    if own == top and me != root:
        rounds.append([Part(True, root, nbytes)])
    return rounds


def _power(size: int) -> int:
    """The largest power of two that is at most `size`."""
    return 1 << (size.bit_length() - 1)


def _folded(size: int, me: int, nbytes: int, inner: list[Round], back: bool) -> list[Round]:
    """Rounds of `inner` among a power of two of ranks; the other ranks are folded into them first."""
    left = size - _power(size)
    if me >= 2 * left:
        return inner
    other = me ^ 1
    if me % 2:
        return [[Part(False, other, nbytes)], *inner, *([[Part(True, other, nbytes)]] if back else [])]
    return [[Part(True, other, nbytes)], *([[Part(False, other, nbytes)]] if back else [])]


def _inner(size: int, me: int) -> int:
    """A rank's number among the ranks after folding; -1 for a rank that is folded into another."""
    left = size - _power(size)
    if me >= 2 * left:
        return me - left
    return me // 2 if me % 2 else -1


def _outer(size: int, number: int) -> int:
    left = size - _power(size)
    return 2 * number + 1 if number < left else number + left


def _pairs(size: int, me: int) -> list[int]:
    """Partners of a rank at distances 1, 2, 4, ... after folding."""
    number, rounds, distance = _inner(size, me), [], 1
    while number >= 0 and distance < _power(size):
        rounds.append(_outer(size, number ^ distance))
        distance *= 2
    return rounds


def _both(peer: int, nbytes: int, back: int | None = None) -> Round:
    return [Part(False, peer, nbytes if back is None else back), Part(True, peer, nbytes)]


def _doubling(size: int, me: int, nbytes: int) -> list[Round]:
    """Recursive doubling: all of the vector is exchanged at each distance."""
    return _folded(size, me, nbytes, [_both(peer, nbytes) for peer in _pairs(size, me)], back=True)


def _halved(size: int, me: int, nbytes: int) -> list[Round]:
    """Recursive halving: halves, quarters, ... are exchanged and summed, until each rank has a share."""
    inner = [_both(peer, nbytes >> (k + 1)) for k, peer in enumerate(_pairs(size, me))]
    return _folded(size, me, nbytes, inner, back=False)


def _allreduce(size: int, me: int, nbytes: int) -> list[Round]:
    if nbytes <= 8 or nbytes < 8 * _power(size):
        return _doubling(size, me, nbytes)
    pairs = _pairs(size, me)
    down = [_both(peer, nbytes >> (k + 1)) for k, peer in enumerate(pairs)]
    return _folded(size, me, nbytes, [*down, *reversed(down)], back=True)


def _allgather(size: int, me: int, sizes: Sequence[int]) -> list[Round]:
    total = sum(sizes)
    if size == _power(size) and total < 524288:
        return [_both(peer, (total // size) << k) for k, peer in enumerate(_pairs(size, me))]
    if total < 81920:
        rounds, have = [], 1
        while have < size:
            count = min(have, size - have)
            rounds.append([Part(False, (me + have) % size, total // size * count),
                          Part(True, (me - have) % size, total // size * count)])  # fmt: skip
            have *= 2
        return rounds
    return _ring(size, me, total // size, size - 1)


def _ring(size: int, me: int, share: int, count: int) -> list[Round]:
    """A ring: `count` rounds in which each rank sends a share to the next one."""
    rounds = []
    for k in range(min(RING, count)):
        pieces = count * (k + 1) // min(RING, count) - count * k // min(RING, count)
        rounds.append([Part(False, (me - 1) % size, share * pieces, pieces),
                      Part(True, (me + 1) % size, share * pieces, pieces)])  # fmt: skip
    return rounds


def _reduce_scatter(size: int, me: int, sizes: Sequence[int]) -> list[Round]:
    total = sum(sizes)
    if total < 524288:
        return _halved(size, me, total) + ([] if size == _power(size) else _unfolded(size, me, total // size))
    rounds = []
    count = min(RING, size - 1)
    for k in range(count):
        first, last = (size - 1) * k // count, (size - 1) * (k + 1) // count
        distance, pieces = first + 1, last - first
        share = total // size * pieces
        rounds.append([Part(False, (me - distance) % size, share, pieces),
                      Part(True, (me + distance) % size, share, pieces)])  # fmt: skip
    return rounds


def _unfolded(size: int, me: int, share: int) -> list[Round]:
    """The last messages to ranks that were folded into others."""
    left = size - _power(size)
    if me >= 2 * left:
        return []
    return [[Part(bool(me % 2), me ^ 1, share)]]
