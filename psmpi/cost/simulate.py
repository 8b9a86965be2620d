"""The simulated time of a schedule on a network: each message occupies the links of its two hosts.

The model is LogGP (Alexandrov and others, 1995): a latency, during which the link is free, and a time a byte, during
which it is busy. A rank computes one task at a time. A message between hosts leaves when it is sent, as with TCP,
and so does one of up to EAGER bytes within a host; a longer one leaves when both ranks have reached it.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass
from heapq import heappop, heappush

from psmpi.cost.link import Network
from psmpi.cost.schedule import COMPUTE, SEND, STEP, Schedule

EAGER = 16384
# Kinds of events: a task may begin, a message may leave, a task is done.
BEGIN, LEAVE, END = range(3)


@dataclass(frozen=True)
class Times:
    """The time at which each rank ended each step, in seconds from the start, and its total computing."""

    ends: list[list[float]]
    computing: list[float]

    def step(self, period: int = 1) -> float:
        """Seconds of a step of the slowest rank in steady state; the first `period` of steps is left out."""
        whole = [max(rank[k] for rank in self.ends) for k in range(len(self.ends[0]))]
        left = period if len(whole) > period else 0
        return (whole[-1] - (whole[left - 1] if left else 0.0)) / (len(whole) - left)


class _Run:
    """A simulation under way. Tasks are numbered rank by rank."""

    def __init__(self, schedule: Schedule, network: Network):
        self.network = network
        self.tasks = [task for tasks in schedule.ranks for task in tasks]
        self.rank = [rank for rank, tasks in enumerate(schedule.ranks) for _ in tasks]
        self.first = [0]
        for tasks in schedule.ranks:
            self.first.append(self.first[-1] + len(tasks))
        self.open_inputs = [len(task.after) for task in self.tasks]
        self.followers: list[list[int]] = [[] for _ in self.tasks]
        for number, task in enumerate(self.tasks):
            for before in task.after:
                self.followers[self.first[self.rank[number]] + before].append(number)
        self.heap: list[tuple[float, int, int]] = []
        self.receive_begun = [0.0] * len(self.tasks)
        # Times at which the outgoing and incoming links of hosts are free.
        self.outgoing_free: defaultdict[int, float] = defaultdict(float)
        self.incoming_free: defaultdict[int, float] = defaultdict(float)
        # Sends and receives whose other side has not reached the message.
        self.waiting_sends: defaultdict[tuple[int, int, str], deque[int]] = defaultdict(deque)
        self.waiting_receives: defaultdict[tuple[int, int, str], deque[int]] = defaultdict(deque)
        self.partner: dict[int, int] = {}
        self.arrival: dict[int, float] = {}
        self.ends: list[list[float]] = [[] for _ in schedule.ranks]
        self.computing = [0.0] * len(schedule.ranks)
        self.unfinished = len(self.tasks)

    def run(self) -> Times:
        for number, missing in enumerate(self.open_inputs):
            if not missing:
                heappush(self.heap, (0.0, BEGIN, number))
        while self.heap:
            now, what, number = heappop(self.heap)
            if what == BEGIN:
                self._begin(now, number)
            elif what == LEAVE:
                self._leave(now, number)
            else:
                self._end(now, number)
        if self.unfinished:
            stuck = next(n for n in range(len(self.tasks)) if self.open_inputs[n] > 0)
            raise ValueError(f"rank {self.rank[stuck]} waits for a message that nobody sends or takes")
        return Times(self.ends, self.computing)

    def _begin(self, now: float, number: int) -> None:
        task, rank = self.tasks[number], self.rank[number]
        if task.kind == COMPUTE:
            self.computing[rank] += task.seconds
            heappush(self.heap, (now + task.seconds, END, number))
        elif task.kind == STEP:
            self.ends[rank].append(now)
            self._end(now, number)
        elif task.kind == SEND:
            key = rank, task.peer, task.tag
            at_once = self._eager(number)
            if self.waiting_receives[key]:
                receive = self.waiting_receives[key].popleft()
                self.partner[number], self.partner[receive] = receive, number
                heappush(self.heap, (now, LEAVE, number))
            else:
                self.waiting_sends[key].append(number)
                if at_once:
                    heappush(self.heap, (now, LEAVE, number))
        else:
            key = task.peer, rank, task.tag
            self.receive_begun[number] = now
            if not self.waiting_sends[key]:
                self.waiting_receives[key].append(number)
                return
            send = self.waiting_sends[key].popleft()
            self.partner[send], self.partner[number] = number, send
            if send in self.arrival:
                heappush(self.heap, (max(now, self.arrival[send]), END, number))
            elif not self._eager(send):
                heappush(self.heap, (now, LEAVE, send))

    def _eager(self, send: int) -> bool:
        """Whether a message leaves when it is sent."""
        task, of_host = self.tasks[send], self.network.of_host
        return task.nbytes <= EAGER or of_host[self.rank[send]] != of_host[task.peer]

    def _leave(self, now: float, number: int) -> None:
        """Occupy the links of a message, in the order in which messages leave."""
        task, rank = self.tasks[number], self.rank[number]
        link = self.network.link(rank, task.peer)
        latency, busy = link.parts(task.nbytes)
        if task.pieces > 1:
            latency, busy = link.parts(task.nbytes // task.pieces)
            latency, busy = latency * task.pieces, busy * task.pieces
        a, b = self.network.of_host[rank], self.network.of_host[task.peer]
        if a == b:
            gone = arrival = now + latency + busy
        else:
            begun = max(now, self.outgoing_free[a])
            gone = self.outgoing_free[a] = begun + busy
            arrival = self.incoming_free[b] = max(begun + latency, self.incoming_free[b]) + busy
        self.arrival[number] = arrival
        heappush(self.heap, (gone if self._eager(number) else arrival, END, number))
        receive = self.partner.get(number)
        if receive is not None:
            heappush(self.heap, (max(arrival, self.receive_begun[receive]), END, receive))

    def _end(self, now: float, number: int) -> None:
        self.unfinished -= 1
        for after in self.followers[number]:
            self.open_inputs[after] -= 1
            if not self.open_inputs[after]:
                heappush(self.heap, (now, BEGIN, after))


def simulate(schedule: Schedule, network: Network) -> Times:
    """Simulate a schedule; returns the times of steps. ValueError for a send without a receive, or the reverse."""
    return _Run(schedule, network).run()
