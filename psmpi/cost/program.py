"""Programs of ranks: computing times and MPI calls, in the order of the code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple


class Call(NamedTuple):
    """A call of a communicator.

    seconds: of computing before it. name: of the MPI call, or "Wait". group: name of the communicator, the same on all
    its ranks. ranks: its members, as ranks of the job. number: for a collective its number in the group, for a message
    its tag, for a Wait the index of the call that it finishes. peer: the root or the other rank, by its number in the
    group, or -1. sizes: bytes; for collectives with counts one number for each rank of the group.
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
        """The properties of this call that are the same in each step."""
        number = 0 if self.name == "Wait" or not self.name.endswith(("end", "ecv")) else self.number
        return self.name, self.group, self.ranks, number, self.peer, self.sizes


@dataclass
class Program:
    """The calls of a rank in some steps. rest: seconds of computing after the last call of each step."""

    calls: list[Call] = field(default_factory=list)
    # Number of calls at the end of each step, and seconds of computing after the last of them.
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
        """The program in which each step has the median seconds of all steps, if all make the same calls.

        Other work of the machine makes single steps longer, never shorter.
        """
        if not self.alike:
            return self
        steps = self.steps()
        seconds = [median(column) for column in zip(*([call.seconds for call in step] for step in steps), strict=True)]
        calls = [call._replace(seconds=own) for step in steps for call, own in zip(step, seconds, strict=True)]
        return Program(calls, list(self.ends), [median(self.rest)] * len(self.rest))

    def table(self) -> list[Any]:
        """The program in the form of JSON."""
        return [[list(call) for call in self.calls], self.ends, self.rest]

    @staticmethod
    def of(table: list[Any]) -> Program:
        """The program in a result of `table`."""
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
    """The number of steps of all programs. ValueError if it differs."""
    counts = {len(program.ends) for program in programs}
    if len(counts) != 1:
        raise ValueError(f"programs of {sorted(counts)} steps")
    return counts.pop()
