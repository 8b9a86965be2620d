"""Control data among all ranks of a job: sums, answers, texts and pieces for rank 0. None of it is counted."""

from __future__ import annotations

import numpy as np

from psmpi.comm.protocol import Communicator


def total(world: Communicator, values: np.ndarray) -> np.ndarray:
    """`values` summed over all ranks, as a new array on each."""
    found = np.empty_like(values)
    world.Allreduce(values, found)
    return found


def rows(world: Communicator, values: np.ndarray) -> np.ndarray:
    """Every rank's `values`, of one shape and dtype, as the rows of a new array (ranks, ...) on each."""
    found = np.empty((world.size, *values.shape), values.dtype)
    world.Allgather(values, found)
    return found


def wait_for_all(world: Communicator) -> None:
    """Return when all ranks have come here."""
    world.Barrier()


def share(world: Communicator, text: str) -> str:
    """Rank 0's text on all ranks."""
    data: np.ndarray = np.frombuffer(text.encode(), np.uint8).copy()
    size = np.array([data.size])
    world.Bcast(size, 0)
    if world.rank != 0:
        data = np.empty(int(size[0]), np.uint8)
    world.Bcast(data, 0)
    return data.tobytes().decode()


def share_flag(world: Communicator, flag: bool) -> bool:
    """Rank 0's answer to a question of yes or no on all ranks."""
    if world.size == 1:
        return flag
    answer = np.array([float(flag)])
    world.Bcast(answer, 0)
    return bool(answer[0])


def collect_texts(world: Communicator, text: str, most: int = 1000) -> list[str]:
    """Every rank's text (cut at `most` bytes), on rank 0; none on the others."""
    own = np.zeros(most, np.uint8)
    data = text.encode()[:most]
    own[: len(data)] = np.frombuffer(data, np.uint8)
    rows = np.empty((world.size, most), np.uint8) if world.rank == 0 else None
    world.Gather(own, rows, root=0)
    return [] if rows is None else [row.tobytes().rstrip(b"\0").decode() for row in rows]


def send_to_first(world: Communicator, piece: np.ndarray) -> None:
    """Give rank 0 a contiguous piece, which it receives by `receive_from`."""
    world.Send(piece, dest=0)


def receive_from(world: Communicator, piece: np.ndarray, rank: int) -> None:
    """Take what another rank gives rank 0, into a contiguous array of its size and dtype."""
    world.Recv(piece, source=rank)
