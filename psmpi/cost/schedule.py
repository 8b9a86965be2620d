"""Schedules: the tasks of all ranks, which are computing and messages between two ranks, and their dependences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from psmpi.cost.collectives import Part, Round, rounds
from psmpi.cost.program import Call, Program, common_steps

COMPUTE, SEND, RECEIVE, STEP = range(4)


class Task(NamedTuple):
    """A task of one rank.

    seconds: of computing; peer: the other rank of a message; tag: of a message, to match sends and receives; pieces:
    number of consecutive pieces of a message; after: indices of the rank's tasks that must be done before.
    """

    kind: int
    seconds: float
    peer: int
    nbytes: int
    pieces: int
    tag: str
    after: tuple[int, ...]


@dataclass
class Schedule:
    """The tasks of each rank in some steps; a task of kind STEP is the end of a step."""

    ranks: list[list[Task]]
    steps: int

    def goal(self) -> Iterable[str]:
        """Lines of the schedule in the GOAL format (group operation assembly language), seconds as nanoseconds."""
        tags: dict[str, int] = {}
        yield f"num_ranks {len(self.ranks)}"
        for rank, tasks in enumerate(self.ranks):
            yield f"rank {rank} {{"
            for number, task in enumerate(tasks):
                if task.kind in (COMPUTE, STEP):
                    yield f"l{number}: calc {round(task.seconds * 1e9)}"
                else:
                    way = "send" if task.kind == SEND else "recv"
                    to = "to" if task.kind == SEND else "from"
                    tag = tags.setdefault(task.tag, len(tags))
                    yield f"l{number}: {way} {max(1, task.nbytes)}b {to} {task.peer} tag {tag}"
                for before in task.after:
                    yield f"l{number} requires l{before}"
            yield "}"


@dataclass
class _Builder:
    """The tasks of a rank, added in the order of its program."""

    tasks: list[Task] = field(default_factory=list)
    # Tasks that precede the next call; and the final tasks of calls under way, by their index in the program.
    chain: tuple[int, ...] = ()
    begun: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def add(self, task: Task) -> int:
        self.tasks.append(task)
        return len(self.tasks) - 1

    def compute(self, seconds: float) -> None:
        if seconds > 0:
            self.chain = (self.add(Task(COMPUTE, seconds, -1, 0, 1, "", self.chain)),)

    def message(self, out: bool, peer: int, nbytes: int, tag: str, after: tuple[int, ...], pieces: int = 1) -> int:
        return self.add(Task(SEND if out else RECEIVE, 0.0, peer, nbytes, pieces, tag, after))

    def collective(self, call: Call, steps: Sequence[Round]) -> tuple[int, ...]:
        """Add the rounds of a collective; returns its final tasks. Messages between two ranks keep their order."""
        after, tag = self.chain, f"{call.group} call {call.number}"
        for one in steps:
            after = tuple(
                self.message(part.out, call.ranks[part.peer], part.nbytes, tag, after, part.pieces) for part in one
            )
        return after


def make_schedule(programs: Sequence[Program]) -> Schedule:
    """The schedule of the programs of all ranks. ValueError if their numbers of steps differ."""
    steps = common_steps(programs)
    spread = _alltoall_sizes(programs)
    calls = []
    for rank, program in enumerate(programs):
        builder = _Builder()
        for begin, end, rest in zip([0, *program.ends], program.ends, program.rest, strict=False):
            for place in range(begin, end):
                _add(builder, rank, place, program.calls[place], spread)
            builder.compute(rest)
            builder.chain = (builder.add(Task(STEP, 0.0, -1, 0, 1, "", builder.chain)),)
        calls.append(builder.tasks)
    return Schedule(calls, steps)


def _add(builder: _Builder, rank: int, place: int, call: Call, spread: dict[tuple[str, int], dict[int, Call]]) -> None:
    builder.compute(call.seconds)
    if call.name == "Wait":
        builder.chain = tuple(sorted({*builder.chain, *builder.begun.pop(call.number)}))
        return
    ends: tuple[int, ...]
    if call.name in ("Send", "Recv", "Isend", "Irecv"):
        out = call.name.endswith("end")
        ends = (
            builder.message(
                out, call.ranks[call.peer], call.sizes[0], f"{call.group} tag {call.number}", builder.chain
            ),
        )
    elif call.name == "Alltoallv":
        ends = builder.collective(call, _alltoall(call, rank, spread))
    else:
        name = call.name[1:].capitalize() if call.name.startswith("I") else call.name
        me = call.ranks.index(rank)
        ends = builder.collective(call, rounds(name, len(call.ranks), me, call.peer, call.sizes))
    if call.name.startswith("I"):
        builder.begun[place] = ends
    else:
        builder.chain = ends or builder.chain


def _alltoall_sizes(programs: Sequence[Program]) -> dict[tuple[str, int], dict[int, Call]]:
    """The all-to-all calls of all ranks, by group and number, since only the senders know the sizes."""
    sizes: dict[tuple[str, int], dict[int, Call]] = {}
    for rank, program in enumerate(programs):
        for call in program.calls:
            if call.name == "Alltoallv":
                sizes.setdefault((call.group, call.number), {})[rank] = call
    return sizes


def _alltoall(call: Call, rank: int, spread: dict[tuple[str, int], dict[int, Call]]) -> list[Round]:
    calls, me = spread[call.group, call.number], call.ranks.index(rank)
    one = []
    for other, peer in enumerate(call.ranks):
        if other == me:
            continue
        if calls[peer].sizes[me]:
            one.append(Part(False, other, calls[peer].sizes[me]))
        if call.sizes[other]:
            one.append(Part(True, other, call.sizes[other]))
    return [one] if one else []
