"""Collecting a checkpoint from the ranks that own its pieces, while training waits no longer than it must."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np

from psmpi.checkpoint.format import Contents, Progress, folder, partial_of
from psmpi.checkpoint.lock import inherit
from psmpi.comm.control import receive_from, send_to_first, share, share_flag
from psmpi.layout import Rows, Runs

# Seconds that training waits for a checkpoint that is still being written when the next is due.
PATIENCE = 60.0
# Seconds that the end of a run waits for its last one.
LAST_PATIENCE = 600.0
# Elements that rank 0 takes from another rank at a time.
BUFFER = 1 << 20


def _environment() -> dict[str, str]:
    """What the process sees: nothing of the launcher, as it is no rank, and one thread.

    An h5py built with parallel HDF5 imports mpi4py, which must not start MPI there.
    """
    launcher = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "MPI_LOCAL", "HYDI_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(launcher)}
    return {**kept, "MPI4PY_RC_INITIALIZE": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class Writer:
    """Writes checkpoints of a method's shards. Training waits while the shards are copied to a spool file.

    Rank 0 receives the pieces of the other ranks through one small buffer and appends them to the spool, a file that
    mostly stays in the kernel's cache; a process beside it makes the checkpoint from the spool while training goes on.
    Nothing that goes wrong with the file ends the run: `troubles` returns it. With `parallel` all ranks write the file
    together instead, see psmpi.checkpoint.parallel; then an error of HDF5 ends the run.
    """

    def __init__(
        self,
        world: Any,
        contents: Contents,
        shards: Sequence[Runs],
        out: Path,
        *,
        keep: int = 0,
        gzip: int = 0,
        parallel: bool = False,
        lock: IO[bytes] | None = None,
        rows: Rows | None = None,
    ):
        self.world, self.contents, self.out, self.keep, self.gzip = world, contents, out, keep, gzip
        self.parallel, self.lock = parallel, lock
        self.rows = rows or Rows()
        # Seconds that the next checkpoint waits for the one before, while training waits too.
        self.patience = PATIENCE
        # A run that several ranks own is written by the first of them.
        self.writes, claimed = [], Runs()
        for shard in shards:
            self.writes.append(shard - claimed)
            claimed = Runs.union(claimed.intervals + shard.intervals)
        self.shard = shards[world.rank]
        self.spool: IO[bytes] | None = None
        self.helper: subprocess.Popen[str] | None = None
        self.noise: IO[bytes] | None = None
        self.target: Path | None = None
        self.found: list[str] = []
        self.last_good: Path | None = None
        self.last_failed = False
        # Seconds that training waited.
        self.pause = 0.0

    def write(
        self,
        vectors: Mapping[str, np.ndarray],
        scalars: Mapping[str, float | int],
        progress: Progress,
        tables: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Save this rank's `vectors`, (shard.size,) each, and of `tables` its rows. All ranks call it.

        Returns when training may change them.
        """
        tables = tables or {}
        start = time.perf_counter()
        dtype = next(iter(vectors.values())).dtype
        target = folder(self.out) / f"step-{progress.step:09d}.h5"
        if not share_flag(self.world, self.world.rank != 0 or self._ready(target)):
            self.pause += time.perf_counter() - start
            return
        contents = self._contents(scalars, progress)
        if self.parallel:
            self._together(vectors, contents, tables)
            job = {"target": str(self.target), "keep": self.keep}
        else:
            self._copy(vectors, dtype)
            self._copy_tables(tables, len(vectors) * self.contents.layout.size * dtype.itemsize)
            job = {
                "target": str(self.target),
                "keep": self.keep,
                "vectors": list(vectors),
                "dtype": dtype.str,
                "gzip": self.gzip,
                "tables": {name: (self._whole(table), table.dtype.str) for name, table in tables.items()},
                "texts": contents.texts() if self.world.rank == 0 else {},
            }
        if self.world.rank == 0:
            self._hand_over(job)
        self.pause += time.perf_counter() - start

    def _contents(self, scalars: Mapping[str, float | int], progress: Progress) -> Contents:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return replace(
            self.contents,
            progress=progress,
            scalars=scalars,
            random={**self.contents.random, "epoch": progress.epoch, "cursor": progress.cursor},
            provenance={**self.contents.provenance, "created": now},
        )

    def _together(
        self, vectors: Mapping[str, np.ndarray], contents: Contents, tables: Mapping[str, np.ndarray]
    ) -> None:
        """All ranks write the file, if rank 0 could make the folder and sees room."""
        from psmpi.checkpoint.parallel import write_together

        if self.world.rank == 0 and self.target is not None:
            needed = len(vectors) * contents.layout.size * next(iter(vectors.values())).itemsize
            needed += sum(prod(self._whole(table)) * table.itemsize for table in tables.values())
            try:
                free = shutil.disk_usage(self.target.parent).free
                if free < needed:
                    self._failed(f"No space left on device: {needed:,} bytes are needed, {free:,} are free")
            except OSError as error:
                self._failed(str(error))
        said = json.dumps([str(self.target or ""), contents.texts()]) if self.world.rank == 0 else ""
        target, told = json.loads(share(self.world, said))
        if target:
            # Every rank must make the same data sets: the texts are rank 0's.
            contents = Contents.of(told)
            write_together(
                self.world, Path(target), contents, vectors, self.writes, self.shard, self.gzip, tables, self.rows
            )

    def _copy(self, vectors: Mapping[str, np.ndarray], dtype: np.dtype) -> None:
        """All ranks' pieces into the spool."""
        buffer = np.empty(0, dtype)
        for number, vector in enumerate(vectors.values()):
            for rank, runs in enumerate(self.writes):
                if self.world.rank not in (0, rank):
                    continue
                for first, last in runs.intervals:
                    for a in range(first, last, BUFFER):
                        b = min(a + BUFFER, last)
                        if rank == self.world.rank:
                            piece = vector[self.shard.local(a, b)]
                        else:
                            if len(buffer) < b - a:
                                buffer = np.empty(min(BUFFER, max(b - a, runs.size)), dtype)
                            piece = buffer[: b - a]
                            receive_from(self.world, piece, rank)
                        if self.world.rank != 0:
                            send_to_first(self.world, piece)
                        else:
                            self._keep(piece, (number * self.contents.layout.size + a) * dtype.itemsize)

    def _whole(self, table: np.ndarray) -> tuple[int, ...]:
        """The shape of a table with the rows of all ranks."""
        return (self.rows.total, *table.shape[1:])

    def _copy_tables(self, tables: Mapping[str, np.ndarray], start: int) -> None:
        """All ranks' rows into the spool, from byte `start` on."""
        buffer = np.empty(0, np.uint8)
        for table in tables.values():
            row = prod(table.shape[1:]) * table.itemsize
            mine = table.reshape(-1).view(np.uint8)
            for rank in range(self.world.size):
                if self.world.rank not in (0, rank):
                    continue
                for first, local, count in self.rows.runs(rank):
                    for a in range(0, count * row, BUFFER):
                        b = min(a + BUFFER, count * row)
                        if rank == self.world.rank:
                            piece = mine[local * row + a : local * row + b]
                        else:
                            if len(buffer) < b - a:
                                buffer = np.empty(b - a, np.uint8)
                            piece = buffer[: b - a]
                            receive_from(self.world, piece, rank)
                        if self.world.rank != 0:
                            send_to_first(self.world, piece)
                        else:
                            self._keep(piece, start + first * row + a)
            start += self.rows.total * row

    def _ready(self, target: Path) -> bool:
        """Take up `target` as the next checkpoint, unless the one before is still not written."""
        self.finish(self.patience)
        if self.target is not None:
            self.found.append(
                f"the checkpoint {target} is NOT written: {self.target} is still being written after "
                f"{self.patience:.0f} s; the disk is too slow for --checkpoint-every, or hangs"
            )
            # It had its chance: the next ones do not wait for it again.
            self.patience, self.last_failed = 0.0, True
            return False
        self.target, self.patience = target, PATIENCE
        self._open()
        return True

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is still being written, on rank 0; does not wait."""
        self.finish(0)
        return self.target is not None

    def troubles(self) -> list[str]:
        """What went wrong with checkpoints since the last call; does not wait."""
        _ = self.busy
        found, self.found = self.found, []
        return found

    def finish(self, patience: float | None = None) -> None:
        """Wait until the checkpoint being written is done, but no longer than `patience` seconds (LAST_PATIENCE)."""
        if self.target is None or self.helper is None or self.helper.stdout is None:
            return
        # Not select: it cannot take the large descriptors that a rank with many connections has.
        waiting = select.poll()
        waiting.register(self.helper.stdout, select.POLLIN)
        if waiting.poll(1000 * (LAST_PATIENCE if patience is None else patience)):
            self._answer()

    def close(self) -> None:
        """Wait, and end the process."""
        self.finish()
        if self.helper is not None and self.target is not None:
            self.helper.kill()
            self._failed(f"it was not written within {LAST_PATIENCE:.0f} s")
        if self.helper is not None:
            assert self.helper.stdin is not None
            # The end of its input ends it.
            with contextlib.suppress(OSError):
                self.helper.stdin.close()
            self._forget()
        for file in (self.spool, self.noise):
            if file is not None:
                file.close()
        self.spool = self.noise = None

    def _open(self) -> None:
        """Spool file and process, if they are not there already."""
        try:
            place = folder(self.out)
            place.mkdir(parents=True, exist_ok=True)
            if self.helper is not None and self.helper.poll() is not None:
                self._forget()
            if self.helper is None:
                if self.spool is None:
                    # Without a name: it goes away with its last user, however this run ends.
                    self.spool = tempfile.TemporaryFile(dir=place, buffering=0)  # noqa: SIM115
                if self.noise is None:
                    self.noise = tempfile.TemporaryFile()  # noqa: SIM115
                self.noise.seek(0)
                self.noise.truncate()
                number = self.spool.fileno()
                self.helper = subprocess.Popen(
                    [sys.executable, "-m", "psmpi.checkpoint.build", str(number)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self.noise,
                    pass_fds=(number, *inherit(self.lock)),
                    text=True,
                    env=_environment(),
                )
        except OSError as error:
            self._failed(str(error))

    def _keep(self, piece: np.ndarray, at: int) -> None:
        """Put elements at byte `at` of the spool; after an error, nothing more of this checkpoint."""
        if self.target is None or self.spool is None:
            return
        view = memoryview(piece.data).cast("B")
        try:
            while view:
                done = os.pwrite(self.spool.fileno(), view, at)
                view, at = view[done:], at + done
        except OSError as error:
            self._failed(str(error))

    def _hand_over(self, job: Mapping[str, Any]) -> None:
        if self.target is None or self.helper is None:
            return
        assert self.helper.stdin is not None
        try:
            self.helper.stdin.write(json.dumps(job) + "\n")
            self.helper.stdin.flush()
        except OSError:
            self._answer()

    def _answer(self) -> None:
        """Take the process's answer, waiting for it, and free the spool."""
        assert self.helper is not None and self.helper.stdout is not None
        line = self.helper.stdout.readline()
        if line:
            try:
                error = str(json.loads(line))
            except ValueError:
                error = f"the process that writes it says {line[:200]!r}"
        else:
            status = self._forget()
            if self.target is not None:
                partial_of(self.target).unlink(missing_ok=True)
            end = signal.Signals(-status).name if status < 0 else f"status {status}"
            error = f"the process that writes it ended with {end}{self._reason()}"
        if error:
            self._failed(error)
        else:
            self.last_good, self.target, self.last_failed = self.target, None, False
            self._free()

    def _free(self) -> None:
        """Give back the disk space of the spool."""
        with contextlib.suppress(OSError):
            if self.spool is not None:
                self.spool.truncate(0)

    def _forget(self) -> int:
        """Wait for the end of the process; its exit status."""
        assert self.helper is not None and self.helper.stdin is not None and self.helper.stdout is not None
        status = self.helper.wait()
        # What was written to a process that is gone cannot be flushed.
        with contextlib.suppress(OSError):
            self.helper.stdin.close()
        self.helper.stdout.close()
        self.helper = None
        return status

    def _reason(self) -> str:
        """What the process said of errors of the operating system."""
        if self.noise is None:
            return ""
        self.noise.seek(0)
        text = self.noise.read().decode(errors="replace")
        for mark in ("error message = '", "Error: "):
            _, found, rest = text.partition(mark)
            if found:
                return ": " + rest.splitlines()[0].split("'")[0]
        return ""

    def _failed(self, error: str) -> None:
        kept = f"the last good one is {self.last_good}" if self.last_good else "there is no earlier one of this run"
        self.found.append(f"the checkpoint {self.target} is NOT written: {error}; {kept}; check space and rights")
        self.target, self.last_failed = None, True
        self._free()
