"""Programs of ranks: what one computes and which calls of MPI it makes, in the order of its code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple


class Call(NamedTuple):
    """A call of a communicator.

    seconds: that the rank computes before it. name: of MPI's, or "Wait". group: the communicator's name, the same on
    all of its ranks. ranks: these, as ranks of the job. number: of a collective among those of its group, of a message
    its tag, of a Wait the place of the call in the program that has begun what it waits for. peer: the root or the
    other rank, its place in the group, or -1. sizes: bytes, of collectives with counts one number a rank of the group.
    """

    seconds: float
    name: str
    group: str
    ranks: tuple[int, ...]
    number: int
    peer: int
    sizes: tuple[int, ...]

    @property
    def kind(self) -> tuple[object, ...]:
        """What is the same of this call in every step."""
        number = 0 if self.name == "Wait" or not self.name.endswith(("end", "ecv")) else self.number
        return self.name, self.group, self.ranks, number, self.peer, self.sizes


@dataclass
class Program:
    """The calls of a rank in some steps; `rest`: seconds that it computes after the last one, of each step."""

    calls: list[Call] = field(default_factory=list)
    # The number of calls at the end of each step, and the seconds computed after the last of them.
    ends: list[int] = field(default_factory=list)
    rest: list[float] = field(default_factory=list)

    def steps(self) -> list[list[Call]]:
        """The calls of each step."""
        starts = [0, *self.ends[:-1]]
        return [self.calls[a:b] for a, b in zip(starts, self.ends, strict=True)]

    @property
    def alike(self) -> bool:
        """Whether all steps make the same calls."""
        first, *others = ([call.kind for call in step] for step in self.steps())
        return all(step == first for step in others)

    def typical(self) -> Program:
        """The program with the medians over all steps as the seconds of each, where these make the same calls.

        A machine that does something else for a while makes single steps longer, never shorter.
        """
        if not self.alike:
            return self
        steps = self.steps()
        seconds = [median(column) for column in zip(*([call.seconds for call in step] for step in steps), strict=True)]
        calls = [call._replace(seconds=own) for step in steps for call, own in zip(step, seconds, strict=True)]
        return Program(calls, list(self.ends), [median(self.rest)] * len(self.rest))

    def table(self) -> list[Any]:
        """The program as JSON has it."""
        return [[list(call) for call in self.calls], self.ends, self.rest]

    @staticmethod
    def of(table: list[Any]) -> Program:
        """The program that `table` gave."""
        calls, ends, rest = table
        return Program(
            [
                Call(s, name, group, tuple(ranks), n, peer, tuple(sizes))
                for s, name, group, ranks, n, peer, sizes in calls
            ],
            ends,
            rest,
        )

    @property
    def computing(self) -> float:
        """Seconds of computing a step."""
        return (sum(call.seconds for call in self.calls) + sum(self.rest)) / max(1, len(self.ends))


def common_steps(programs: Sequence[Program]) -> int:
    """The number of steps of all programs; ValueError where it differs."""
    counts = {len(program.ends) for program in programs}
    if len(counts) != 1:
        raise ValueError(f"programs of {sorted(counts)} steps")
    return counts.pop()
