"""Writing of checkpoints during a training, which waits only while the ranks' shards are copied."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from psmpi.checkpoint.collect import Records, collect, row_pieces
from psmpi.checkpoint.contents import Contents, Progress
from psmpi.checkpoint.format import best as best_of
from psmpi.checkpoint.format import folder
from psmpi.checkpoint.lock import Lock
from psmpi.checkpoint.spool import Spool
from psmpi.comm.control import Control
from psmpi.files.whole import partial_of, partials_of
from psmpi.layout import Ownership, TableRows

# Seconds that training waits for a checkpoint that is still being written when the next one is due.
PATIENCE = 60.0
# Seconds that the end of a run waits for its last checkpoint.
LAST_PATIENCE = 600.0
# Name, in the flight recorder, of the operation that may wait for a disk.
HANDING_OVER = "handing over a checkpoint to the process that writes it"


class Writer:
    """Writer of a run's checkpoints. Training waits while the ranks' shards are copied to a spool file.

    Rank 0 receives the pieces of the other ranks through one small buffer and writes them to the spool, a file that
    mostly stays in the kernel's cache. Another process writes the checkpoint from the spool while training goes on.
    Errors with the file do not end the run: `troubles` returns them. With `parallel` all ranks write the file together
    instead, see psmpi.checkpoint.parallel; then an error of HDF5 ends the run.

    contents: contents of the checkpoints, without progress. shards: ownership of the weights and of the optimizer's
    vectors; spaces: ownership of each space of the contents; rows: which rank has which rows of the tables. The owner
    of record writes elements that several ranks have. out: run directory. keep: number of checkpoints that stay, 0:
    all. gzip: compression, 0 (none) to 9. lock: of the run directory.
    """

    def __init__(
        self,
        control: Control,
        contents: Contents,
        shards: Ownership,
        out: Path,
        *,
        keep: int = 0,
        gzip: int = 0,
        parallel: bool = False,
        lock: Lock | None = None,
        rows: TableRows | None = None,
        spaces: Mapping[str, Ownership] | None = None,
    ):
        self.control, self.contents, self.out, self.keep, self.gzip = control, contents, out, keep, gzip
        self.parallel, self.rows = parallel, rows or TableRows()
        # Seconds that the next checkpoint, and training with it, waits for the previous one.
        self.patience = PATIENCE
        self.shards, self.spaces = shards, dict(spaces or {})
        if self.spaces.keys() != contents.spaces.keys():
            raise ValueError(f"spaces of {sorted(self.spaces)}, the contents have {sorted(contents.spaces)}")
        self.shares = {name: Records(of, contents.spaces[name].size, control.rank) for name, of in self.spaces.items()}
        self.weights = Records(shards, contents.layout.size, control.rank)
        self.spool = Spool(lock)
        self.target: Path | None = None
        self.errors: list[str] = []
        self.last_good: Path | None = None
        self.last_failed = False
        # Seconds that training has waited for checkpoints.
        self.pause = 0.0

    def write(
        self,
        vectors: Mapping[str, np.ndarray],
        scalars: Mapping[str, float | int],
        progress: Progress,
        tables: Mapping[str, np.ndarray] | None = None,
        best: bool = False,
    ) -> None:
        """Write a checkpoint. All ranks call it, with vectors of the same names and dtypes.

        vectors: this rank's local vectors by name, and those of spaces. tables: this rank's rows of each table. best:
        whether the file also becomes the run's best one, see `psmpi.checkpoint.format.best`. The method returns when
        training may change the vectors.
        """
        tables = tables or {}
        start = time.perf_counter()
        target = folder(self.out) / f"step-{progress.step:09d}.h5"
        if not self.control.share_flag(self.control.rank != 0 or self._ready(target)):
            self.pause += time.perf_counter() - start
            return
        contents = self._contents(scalars, progress)
        job: dict[str, Any] = {"target": str(self.target), "keep": self.keep}
        job |= {"best": str(best_of(self.out))} if best else {}
        if self.parallel:
            job["partial"] = self._together(vectors, contents, tables)
        else:
            job |= {**self._copy(vectors, tables), "gzip": self.gzip}
            job["texts"] = contents.texts() if self.control.rank == 0 else {}
        if self.control.rank == 0 and self.target is not None:
            try:
                with self.control.flight.task(HANDING_OVER):
                    self.spool.submit(job)
            except OSError:
                self._answer()
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

    def _share(self, vector: str) -> Records:
        return self.shares.get(vector, self.weights)

    def _whole(self, table: np.ndarray) -> tuple[int, ...]:
        """The shape of a table with the rows of all ranks."""
        return (self.rows.total, *table.shape[1:])

    def _together(self, vectors: Mapping[str, np.ndarray], contents: Contents, tables: Mapping[str, np.ndarray]) -> str:
        """Write the file by all ranks together, unless rank 0 sees too little space; return the unsealed file's path.

        The path is "" if no file was written.
        """
        from psmpi.checkpoint.parallel import write_together

        if self.control.rank == 0 and self.target is not None:
            needed = sum(self._share(name).total * vector.itemsize for name, vector in vectors.items())
            needed += sum(prod(self._whole(table)) * table.itemsize for table in tables.values())
            try:
                free = shutil.disk_usage(self.target.parent).free
                if free < needed:
                    self._failed(f"No space left on device: {needed:,} bytes are needed, {free:,} are free")
            except OSError as error:
                self._failed(str(error))
        partial = str(partial_of(self.target)) if self.control.rank == 0 and self.target is not None else ""
        message = json.dumps([partial, contents.texts()]) if self.control.rank == 0 else ""
        partial, texts = json.loads(self.control.share(message))
        if partial:
            # All ranks use rank 0's texts, since they must make the same data sets.
            contents = Contents.of(texts)
            owned = {name: self.spaces.get(name, self.shards) for name in vectors}
            with self.control.flight.task(f"writing the checkpoint {partial} together"):
                write_together(self.control.comm, Path(partial), contents, vectors, owned, self.gzip, tables, self.rows)
        return str(partial)

    def _copy(self, vectors: Mapping[str, np.ndarray], tables: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Copy the elements of all ranks to the spool; return their places in it, for a job of the process.

        The spool has the vectors, each in the order of ranks, then the tables, then the maps of the runs, see
        `psmpi.checkpoint.build.SpoolSource`.
        """
        at, placed, shapes, maps = 0, [], {}, {}
        for name, vector in vectors.items():
            shares = self._share(name)

            def piece(first: int, last: int, vector: np.ndarray = vector, shares: Records = shares) -> np.ndarray:
                return shares.piece(vector, first, last)

            def keep(rank: int, first: int, elements: np.ndarray, base: int = at, shares: Records = shares) -> None:
                self._put(elements, base + (int(shares.starts[rank]) + first) * elements.itemsize)

            collect(self.control, shares.sizes, vector.dtype, piece, keep)
            placed.append([name, vector.dtype.str, at])
            at += shares.total * vector.itemsize
        tables_at = at
        for name, table in tables.items():
            at = self._copy_table(table, at)
            shapes[f"{self.rows.group}/{name}"] = [self._whole(table), table.dtype.str]
        if self.control.rank == 0:
            for name in ["weights", *self.spaces]:
                table = self._share(name).table
                maps[name] = [at, table.shape[1]]
                self._put(table, at)
                at += table.nbytes
        return {"vectors": placed, "tables_at": tables_at, "tables": shapes, "maps": maps}

    def _copy_table(self, table: np.ndarray, start: int) -> int:
        """Copy the rows of all ranks to the spool, from byte `start` on; return the next free byte."""
        row = prod(table.shape[1:]) * table.itemsize
        own_bytes = table.reshape(-1).view(np.uint8)

        def keep(rank: int, first: int, piece: np.ndarray) -> None:
            for a, b, at in row_pieces(self.rows, rank, row, first, first + len(piece)):
                self._put(piece[a - first : b - first], start + at)

        sizes = [len(numbers) * row for numbers in self.rows.of]
        collect(self.control, sizes, np.dtype(np.uint8), lambda first, last: own_bytes[first:last], keep)
        return start + self.rows.total * row

    def _put(self, elements: np.ndarray, at: int) -> None:
        """Write elements to byte `at` of the spool; an error gives up this checkpoint."""
        if self.target is not None:
            try:
                with self.control.flight.task(HANDING_OVER):
                    self.spool.put(elements, at)
            except OSError as error:
                self._failed(str(error))

    def _ready(self, target: Path) -> bool:
        """Make `target` the next checkpoint; return False if the previous one is still being written, else True."""
        self.finish(self.patience)
        if self.target is not None:
            self.errors.append(
                f"the checkpoint {target} is NOT written: {self.target} is still being written after "
                f"{self.patience:.0f} s; the disk is too slow for --checkpoint-every, or hangs"
            )
            # The next checkpoints do not wait for the same one again.
            self.patience, self.last_failed = 0.0, True
            return False
        self.target, self.patience = target, PATIENCE
        try:
            with self.control.flight.task(HANDING_OVER):
                self.spool.open(folder(self.out))
        except OSError as error:
            self._failed(str(error))
        return True

    def relock(self, lock: Lock) -> None:
        """Continue with the lock of a run directory that was made anew, and with a new spool file and process."""
        self.finish()
        self.spool.close()
        self.spool.lock, self.last_good = lock, None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is still being written; False except on rank 0. Does not wait."""
        self.finish(0)
        return self.target is not None

    def troubles(self) -> list[str]:
        """Return the errors of checkpoints since the last call. Does not wait."""
        _ = self.busy
        errors, self.errors = self.errors, []
        return errors

    def finish(self, patience: float | None = None) -> None:
        """Wait for the checkpoint that is being written, `patience` seconds at most; None: LAST_PATIENCE."""
        patience = LAST_PATIENCE if patience is None else patience
        if self.target is None or self.spool.process is None:
            return
        if not patience:
            answered = self.spool.answered(0)
        else:
            with self.control.flight.task(f"waiting for the process that writes the checkpoint {self.target}"):
                answered = self.spool.answered(patience)
        if answered:
            self._answer()

    def close(self) -> None:
        """Wait for the last checkpoint, LAST_PATIENCE seconds at most, and end the process."""
        self.finish()
        if self.spool.process is not None and self.target is not None:
            self.spool.kill()
            self._failed(f"it was not written within {LAST_PATIENCE:.0f} s")
        with self.control.flight.task("ending the process that writes checkpoints"):
            self.spool.close()

    def _answer(self) -> None:
        """Wait for the answer of the process, note an error, and free the spool."""
        error = self.spool.answer()
        if error:
            if self.target is not None:
                # A killed process leaves the unfinished file.
                with contextlib.suppress(OSError):
                    for partial in partials_of(self.target):
                        partial.unlink(missing_ok=True)
            self._failed(error)
        else:
            self.last_good, self.target, self.last_failed = self.target, None, False
            self.spool.free()

    def _failed(self, error: str) -> None:
        good = f"the last good one is {self.last_good}" if self.last_good else "there is no earlier one of this run"
        self.errors.append(f"the checkpoint {self.target} is NOT written: {error}; {good}; check space and rights")
        self.target, self.last_failed = None, True
        self.spool.free()


class Unsaved(Writer):
    """Writer of a training without a run directory, which writes nothing."""

    def write(
        self,
        vectors: Mapping[str, np.ndarray],
        scalars: Mapping[str, float | int],
        progress: Progress,
        tables: Mapping[str, np.ndarray] | None = None,
        best: bool = False,
    ) -> None:
        """Write nothing."""
