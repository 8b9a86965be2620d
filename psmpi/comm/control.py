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

Found = TypeVar("Found")
# Bytes of an error that ranks tell each other, and numbers of an array that they send at a time.
TOLD, PIECE = 8000, 1 << 26


class Control:
    """A communicator of its own, so that no message of the training is taken for one of these, and its own `counter`.

    All ranks make one, and its calls, in the same order. flight: the recorder of this rank's operations.
    """

    def __init__(self, world: World):
        self.comm = world.Dup() if world.size > 1 else world
        self.rank, self.size, self.counter = world.rank, world.size, Counter()
        self.flight = flight_of(world)

    def _from_first(self, nbytes: int) -> None:
        """Count what rank 0 sends to all others."""
        first = self.rank == 0
        self.counter.add(nbytes * (self.size - 1) * first, nbytes * (not first))

    def total(self, values: np.ndarray) -> np.ndarray:
        """`values` summed over all ranks, as a new array on each."""
        total = np.empty_like(values)
        self.comm.Allreduce(values, total)
        moved = 2 * (self.size - 1) * values.nbytes // self.size
        self.counter.add(moved, moved)
        return total

    def rows(self, values: np.ndarray) -> np.ndarray:
        """Every rank's `values`, of one shape and dtype, as the rows of a new array (ranks, ...) on each."""
        rows = np.empty((self.size, *values.shape), values.dtype)
        self.comm.Allgather(values, rows)
        self.counter.add(values.nbytes * (self.size - 1), values.nbytes * (self.size - 1))
        return rows

    def wait_for_all(self) -> None:
        """Return when all ranks have come here."""
        self.comm.Barrier()

    def share(self, text: str) -> str:
        """Rank 0's text on all ranks."""
        data: np.ndarray = np.frombuffer(text.encode(), np.uint8).copy()
        size = np.array([data.size])
        self.comm.Bcast(size, 0)
        if self.rank != 0:
            data = np.empty(int(size[0]), np.uint8)
        self.comm.Bcast(data, 0)
        self._from_first(size.nbytes + data.nbytes)
        return data.tobytes().decode()

    def share_array(self, array: np.ndarray) -> None:
        """Fill every rank's contiguous array (n,) with rank 0's."""
        for first in range(0, array.size if self.size > 1 else 0, PIECE):
            piece = array[first : first + PIECE]
            self.comm.Bcast(piece, 0)
            self._from_first(piece.nbytes)

    def agreed(self, work: Callable[[], Found] | None) -> Found | None:
        """The result of `work`, on the ranks that have some; it makes no messages.

        Where it raises a UserError on some rank, all ranks raise that of the lowest such rank.
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
        """Rank 0's answer to a question of yes or no on all ranks."""
        if self.size == 1:
            return flag
        answer = np.array([float(flag)])
        self.comm.Bcast(answer, 0)
        self._from_first(answer.nbytes)
        return bool(answer[0])

    def collect_texts(self, text: str, most: int = 1000) -> list[str]:
        """Every rank's text (cut at `most` bytes), on rank 0; none on the others."""
        own = np.zeros(most, np.uint8)
        data = text.encode()[:most]
        own[: len(data)] = np.frombuffer(data, np.uint8)
        rows = np.empty((self.size, most), np.uint8) if self.rank == 0 else None
        self.comm.Gather(own, rows, root=0)
        first = self.rank == 0
        self.counter.add(most * (not first), most * (self.size - 1) * first)
        return [] if rows is None else [row.tobytes().rstrip(b"\0").decode() for row in rows]

    def send_to_first(self, piece: np.ndarray) -> None:
        """Give rank 0 a contiguous piece, which it receives by `receive_from`."""
        self.comm.Send(piece, dest=0)
        self.counter.add(piece.nbytes, 0)

    def receive_from(self, piece: np.ndarray, rank: int) -> None:
        """Take what another rank gives rank 0, into a contiguous array of its size and dtype."""
        self.comm.Recv(piece, source=rank)
        self.counter.add(0, piece.nbytes)


class Poll:
    """Questions of yes or no that ranks ask in passing: whether any rank has said yes, told to all at the same call.

    All ranks call it equally often, once a step, with their answer to each of two questions. What is told is the sum of
    what ranks said some calls before, begun then and fetched now, so that no call waits for ranks that are no more than
    that behind. Between two of these sums there are as many calls as rank 0 makes in about `seconds`.

    given: numbers of this rank, which it sets before a call; heard: their sums over ranks as of the last sum fetched.
    """

    def __init__(self, control: Control, seconds: float = 0.2, numbers: int = 0):
        self.control, self.seconds = control, seconds
        self.request: Request | None = None
        # Ranks that say yes to each question; calls to the sum after the next one, by rank 0 alone; what they give.
        self.said, self.sums = np.zeros(3 + numbers), np.zeros(3 + numbers)
        self.given, self.heard = np.zeros(numbers), np.zeros(numbers)
        self.calls, self.interval, self.begun = 0, 1, time.perf_counter()
        self.yes = [False, False]

    def __call__(self, first: bool, second: bool = False) -> tuple[bool, bool]:
        """Whether some rank has said yes, to each question; a rank's own yes holds once it was said."""
        self.yes = [self.yes[0] or first, self.yes[1] or second]
        if self.control.size == 1:
            self.heard[:] = self.given
            return self.yes[0], self.yes[1]
        self.calls += 1
        if self.calls < self.interval:
            return False, False
        answer = self._fetch()
        now = time.perf_counter()
        # Towards the number of calls that takes `seconds`, at most twice as many as before.
        rate = self.calls / max(1e-9, now - self.begun)
        interval = min(2 * self.interval, max(1, int(rate * self.seconds)))
        self.said[:3] = *self.yes, interval * (self.control.rank == 0)
        self.said[3:] = self.given
        self.calls, self.begun = 0, now
        self.request = self.control.comm.Iallreduce(self.said, self.sums)
        moved = 2 * (self.control.size - 1) * self.said.nbytes // self.control.size
        self.control.counter.add(moved, moved)
        return answer

    def _fetch(self) -> tuple[bool, bool]:
        """The answers of the sum that is under way."""
        if self.request is None:
            return False, False
        self.request.Wait()
        self.request, self.interval = None, int(self.sums[2])
        self.heard[:] = self.sums[3:]
        return bool(self.sums[0] > 0), bool(self.sums[1] > 0)

    def forget(self) -> None:
        """Take back all answers to the second question, those under way too; all ranks call it after the same call."""
        self._fetch()
        self.yes[1] = False

    def close(self) -> None:
        """End the sum that is under way: all ranks have begun it."""
        self._fetch()
