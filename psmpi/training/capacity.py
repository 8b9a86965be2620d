"""The check before a training that the hosts have the memory that it needs, and advice if they have not."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from psmpi.comm.memory import Limit
from psmpi.config import option
from psmpi.errors import UserError, counted, listed
from psmpi.training.masters import Masters
from psmpi.training.need import Need

if TYPE_CHECKING:
    from psmpi.comm.control import Control
    from psmpi.config import Config
    from psmpi.data import Dataset
    from psmpi.nn.network import Network

# Advice tries numbers of ranks up to FEW one by one, larger ones up to MOST by bisection. Messages name NAMED ranks.
FEW, MOST, NAMED = 16, 512, 3


class Room(NamedTuple):
    """Memory that some ranks share, in bytes."""

    what: str
    ranks: tuple[int, ...]
    nbytes: int

    def lacks(self, needs: Sequence[Need]) -> int:
        """Bytes that the ranks of this room need beyond its memory."""
        return sum(_total(needs[rank]) for rank in self.ranks) - self.nbytes


def check_capacity(
    control: Control, kind: Any, network: Network, dataset: Dataset, config: Config, own: Sequence[Limit]
) -> None:
    """UserError on rank 0 where ranks need more memory than their hosts have; all ranks make this call.

    kind: the method's class; own: this rank's limits. Ranks without limits, and methods that do not state their needs,
    pass the check.
    """
    texts = control.collect_texts(json.dumps(own), most=4000)
    if control.rank == 0:
        Candidate(kind, network, dataset).check(config, find_rooms([json.loads(text) for text in texts]), len(texts))


def find_rooms(everyone: Sequence[Sequence[Sequence[Any]]]) -> list[Room]:
    """Group the limits of all ranks into rooms, each with the ranks that share it."""
    rooms: dict[str, Room] = {}
    for rank, limits in enumerate(everyone):
        for key, what, nbytes in limits:
            before = rooms.get(key, Room(what, (), 0))
            # Ranks read the free memory at different times: the largest reading counts.
            rooms[key] = Room(what, (*before.ranks, rank), max(before.nbytes, nbytes))
    return list(rooms.values())


@dataclass(frozen=True)
class Candidate:
    """A method, by its class, with a network and its data, on any number of ranks."""

    kind: Any
    network: Network
    dataset: Dataset

    def check(self, config: Config, rooms: Sequence[Room], size: int) -> None:
        """UserError if the ranks of a room need more memory than it has."""
        needs = self.kind.needed(size, self.network, self.dataset, config)
        if not needs or not rooms:
            return
        worst = max(rooms, key=lambda room: room.lacks(needs))
        if worst.lacks(needs) <= 0:
            return
        most = sorted(worst.ranks, key=lambda rank: -_total(needs[rank]))
        demands = [f"{_size(_total(needs[rank]))} on rank {rank} ({_uses(needs[rank])})" for rank in most[:NAMED]]
        if len(most) > NAMED:
            demands.append(f"up to {_size(_total(needs[most[NAMED]]))} on each of {len(most) - NAMED} more")
        raise UserError(
            f"{worst.what} has {_size(worst.nbytes)} of memory left, and this training needs "
            f"{_size(worst.lacks(needs) + worst.nbytes)} there at least: {listed(demands)}; "
            f"{self._advice(config, rooms, worst, size)}"
        )

    def fits(self, config: Config, rooms: Sequence[Room], size: int) -> bool:
        """Whether the method takes `size` ranks and their memory suffices."""
        try:
            self.kind.check(size, self.network, self.dataset, config)
            return not self.lacks(config, rooms, size)
        except UserError:
            return False

    def lacks(self, config: Config, rooms: Sequence[Room], size: int) -> bool:
        """Whether `size` ranks need more memory than there is; UserError if the method does not take `size` ranks."""
        needs = self.kind.needed(size, self.network, self.dataset, config)
        return any(room.lacks(needs) > 0 for room in rooms)

    def least(self, placed: Callable[[int], Config], like: Room) -> int:
        """The least number of ranks that fit on hosts like this one, with as many ranks a host; 0 if no number fits.

        placed(size): the configuration for `size` ranks.
        """
        each = len(like.ranks)

        def hosts(size: int) -> list[Room]:
            return [Room("", tuple(range(a, min(a + each, size))), like.nbytes) for a in range(0, size, each)]

        def fits(size: int) -> bool:
            return self.fits(placed(size), hosts(size), size)

        for size in range(1, FEW + 1):
            if size == each + 1:
                with suppress(UserError):
                    # If even MOST ranks lack memory, fewer ranks on full hosts lack it too.
                    self.kind.check(MOST, self.network, self.dataset, placed(MOST))
                    if self.lacks(placed(MOST), hosts(MOST), MOST):
                        return 0
            if fits(size):
                return size
        low, high = FEW, 2 * FEW
        while not fits(high):
            low, high = high, 2 * high
            if high > MOST:
                return 0
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle, high)
        return high

    def _advice(self, config: Config, rooms: Sequence[Room], worst: Room, size: int) -> str:
        """The advice: another placement of weights, another number of ranks, or both."""
        own, each, said = config.of(Masters), len(worst.ranks), []
        others = [place for place in PLACEMENTS if Masters in self.kind.settings and place(size) != own]
        here = next(
            (one for one in (place(size) for place in others) if self.fits(config.having([one]), rooms, size)), own
        )
        if here != own:
            said.append(f"use {_words(here, own)}")
        ranks = self.least(lambda _: config, worst)
        if ranks:
            said.append(f"start {_start(ranks, each)}")
        if not said:
            tried = [(self.least(_placed(config, place), worst), place) for place in others]
            ranks, best = min((one for one in tried if one[0]), key=lambda one: one[0], default=(0, PLACEMENTS[0]))
            said += [f"start {_start(ranks, each)}, and use {_words(best(ranks), own)}"] if ranks else []
        return " or ".join(said) or "use hosts with more memory, a smaller network, or a smaller --batch-size"


# Placements of the weights on so many ranks, the simplest first.
PLACEMENTS: tuple[Callable[[int], Masters], ...] = (
    lambda size: Masters("owner"),
    lambda size: Masters(colocate=True),
    lambda size: Masters("owner", colocate=True),
    lambda size: Masters(masters=size, colocate=True),
)


def _placed(config: Config, place: Callable[[int], Masters]) -> Callable[[int], Config]:
    """The configuration of so many ranks with a placement."""
    return lambda size: config.having([place(size)])


def _words(new: Masters, old: Masters) -> str:
    """The options that ask for a placement, and those that they replace."""
    before = _options(old)
    return _options(new) + (f" in place of {before}" if before else "")


def _options(masters: Masters) -> str:
    usual, words = Masters(), []
    for one in fields(masters):
        value = getattr(masters, one.name)
        if value != getattr(usual, one.name):
            words.append(option(one.name) if value is True else f"{option(one.name)} {value}")
    return " ".join(words)


def _start(ranks: int, each: int) -> str:
    """So many ranks, `each` of them a host."""
    many = counted(ranks, "rank")
    if ranks <= each:
        return many
    return f"{many}, {f'{each} on each host' if each > 1 else 'each on a host'} with as much memory"


def _total(need: Need) -> int:
    return sum(need.values())


def _uses(need: Need) -> str:
    """The largest purposes of a rank's need, each more than a hundredth of it, as text."""
    largest = sorted(need, key=lambda what: -need[what])[:NAMED]
    return ", ".join(f"{what} {_size(need[what])}" for what in largest if 100 * need[what] > _total(need))


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"
