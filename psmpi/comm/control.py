"""Control data among all ranks of a job, apart from the training's messages: sums, answers, texts, pieces."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from psmpi.comm.group import Counter
from psmpi.comm.protocol import Request, World
from psmpi.comm.watch.flight import flight_of
from psmpi.errors import UserError

Result = TypeVar("Result")
# Longest error in bytes that ranks exchange; elements of an array that are sent at a time.
TOLD, PIECE = 8000, 1 << 26


class Control:
    """Control messages of all ranks, on a communicator and a counter apart from those of the training.

    All ranks construct it, and make its calls, in the same order. flight: the recorder of this rank's operations.
    """

    def __init__(self, world: World):
        self.comm = world.Dup() if world.size > 1 else world
        self.rank, self.size, self.counter = world.rank, world.size, Counter()
        self.flight = flight_of(world)

    def _from_first(self, nbytes: int) -> None:
        """Count `nbytes` from rank 0 to each other rank."""
        first = self.rank == 0
        self.counter.add(nbytes * (self.size - 1) * first, nbytes * (not first))

    def total(self, values: np.ndarray) -> np.ndarray:
        """Sum `values` over all ranks; returns a new array."""
        total = np.empty_like(values)
        self.comm.Allreduce(values, total)
        moved = 2 * (self.size - 1) * values.nbytes // self.size
        self.counter.add(moved, moved)
        return total

    def rows(self, values: np.ndarray) -> np.ndarray:
        """Gather the `values` of all ranks, of one shape and dtype, as rows of a new array (ranks, ...)."""
        rows = np.empty((self.size, *values.shape), values.dtype)
        self.comm.Allgather(values, rows)
        self.counter.add(values.nbytes * (self.size - 1), values.nbytes * (self.size - 1))
        return rows

    def wait_for_all(self) -> None:
        """Wait until all ranks have made this call."""
        self.comm.Barrier()

    def share(self, text: str) -> str:
        """Send rank 0's text to all ranks; returns it."""
        data: np.ndarray = np.frombuffer(text.encode(), np.uint8).copy()
        size = np.array([data.size])
        self.comm.Bcast(size, 0)
        if self.rank != 0:
            data = np.empty(int(size[0]), np.uint8)
        self.comm.Bcast(data, 0)
        self._from_first(size.nbytes + data.nbytes)
        return data.tobytes().decode()

    def share_array(self, array: np.ndarray) -> None:
        """Fill the contiguous array (n,) of each rank with that of rank 0."""
        for first in range(0, array.size if self.size > 1 else 0, PIECE):
            piece = array[first : first + PIECE]
            self.comm.Bcast(piece, 0)
            self._from_first(piece.nbytes)

    def agreed(self, work: Callable[[], Result] | None) -> Result | None:
        """The result of work(), which sends no messages; None on ranks whose `work` is None.

        If it raises a UserError on some ranks, all ranks raise the error of the lowest of them.
        """
        if self.size == 1:
            return work() if work is not None else None
        result, failed = None, ""
        try:
            result = work() if work is not None else None
        except UserError as error:
            failed = str(error).encode()[:TOLD].decode(errors="ignore")
        message = self.share(next(filter(None, self.collect_texts(failed, TOLD)), ""))
        if message:
            raise UserError(message)
        return result

    def share_flag(self, flag: bool) -> bool:
        """Send rank 0's flag to all ranks; returns it."""
        if self.size == 1:
            return flag
        answer = np.array([float(flag)])
        self.comm.Bcast(answer, 0)
        self._from_first(answer.nbytes)
        return bool(answer[0])

    def collect_texts(self, text: str, most: int = 1000) -> list[str]:
        """Gather the texts of all ranks, cut at `most` bytes, on rank 0; [] on other ranks."""
        own = np.zeros(most, np.uint8)
        data = text.encode()[:most]
        own[: len(data)] = np.frombuffer(data, np.uint8)
        rows = np.empty((self.size, most), np.uint8) if self.rank == 0 else None
        self.comm.Gather(own, rows, root=0)
        first = self.rank == 0
        self.counter.add(most * (not first), most * (self.size - 1) * first)
        return [] if rows is None else [row.tobytes().rstrip(b"\0").decode() for row in rows]

    def send_to_first(self, piece: np.ndarray) -> None:
        """Send a contiguous array to rank 0, which calls `receive_from`."""
        self.comm.Send(piece, dest=0)
        self.counter.add(piece.nbytes, 0)

    def receive_from(self, piece: np.ndarray, rank: int) -> None:
        """Receive, on rank 0, an array that `rank` sends by `send_to_first`."""
        self.comm.Recv(piece, source=rank)
        self.counter.add(0, piece.nbytes)


class Poll:
    """Two yes-or-no questions to all ranks, answered in passing: has any rank said yes?

    All ranks call it once a step with their own two answers. A call begins a sum over ranks, and a later call fetches
    it, the same one on all ranks, so that ranks which lag by less than that are not waited for. Between two sums there
    are as many calls as rank 0 makes in about `seconds`.

    numbers: numbers that a rank sets before a call; number_sums: their sums over ranks, as of the last fetched sum.
    """

    def __init__(self, control: Control, seconds: float = 0.2, numbers: int = 0):
        self.control, self.seconds = control, seconds
        self.request: Request | None = None
        # Entries: yes to each question (0 or 1), calls until the sum after the next (rank 0 only), and `numbers`.
        self.contribution, self.sums = np.zeros(3 + numbers), np.zeros(3 + numbers)
        self.numbers, self.number_sums = np.zeros(numbers), np.zeros(numbers)
        self.calls, self.interval, self.begun = 0, 1, time.perf_counter()
        self.answers = [False, False]

    def __call__(self, first: bool, second: bool = False) -> tuple[bool, bool]:
        """Whether some rank has said yes, for each question. A yes is not taken back by later calls."""
        self.answers = [self.answers[0] or first, self.answers[1] or second]
        if self.control.size == 1:
            self.number_sums[:] = self.numbers
            return self.answers[0], self.answers[1]
        self.calls += 1
        if self.calls < self.interval:
            return False, False
        answer = self._fetch()
        now = time.perf_counter()
        # The number of calls that take `seconds`, but at most twice the last interval.
        rate = self.calls / max(1e-9, now - self.begun)
        interval = min(2 * self.interval, max(1, int(rate * self.seconds)))
        self.contribution[:3] = *self.answers, interval * (self.control.rank == 0)
        self.contribution[3:] = self.numbers
        self.calls, self.begun = 0, now
        self.request = self.control.comm.Iallreduce(self.contribution, self.sums)
        moved = 2 * (self.control.size - 1) * self.contribution.nbytes // self.control.size
        self.control.counter.add(moved, moved)
        return answer

    def _fetch(self) -> tuple[bool, bool]:
        """Finish the sum under way; returns its answers."""
        if self.request is None:
            return False, False
        self.request.Wait()
        self.request, self.interval = None, int(self.sums[2])
        self.number_sums[:] = self.sums[3:]
        return bool(self.sums[0] > 0), bool(self.sums[1] > 0)

    def forget(self) -> None:
        """Take back all answers to the second question, also those under way. All ranks call it at the same step."""
        self._fetch()
        self.answers[1] = False

    def close(self) -> None:
        """Finish the sum under way, which all ranks have begun."""
        self._fetch()
