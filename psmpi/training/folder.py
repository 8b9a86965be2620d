"""The run directory: locked by one run; its text files are written whole or not at all, and through no link."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from psmpi import checkpoint
from psmpi.checkpoint import Lock
from psmpi.errors import UserError
from psmpi.files.whole import written
from psmpi.output import legible

CONFIG, METRICS = "config.toml", "metrics.jsonl"
# Seconds that a run waits for another one to leave the directory.
PATIENCE = 30.0


class RunFolder:
    """A run directory, locked by rank 0 until the end of its `with` block.

    `begin` is the first write: a start that is refused before leaves the directory unchanged. UserError if the
    directory cannot be made, another run has locked it, or there are symbolic links in it.
    """

    def __init__(self, out: Path, tell: Callable[[str], None], patience: float = PATIENCE):
        self.path, self.tell = out, tell
        self.config, self.rows, self.begun = "", "", False
        # Directories made for this run, innermost first.
        self.made: list[Path] = []
        try:
            self.made += (path for path in (out, *out.parents) if not path.exists())
            self.lock = self._take(patience)
        except BlockingIOError:
            raise UserError(f"--out {out}: another run is writing there; name another folder, or end it") from None
        except (OSError, ValueError) as error:
            raise _unwritable(out, error) from None
        try:
            self._look()
        except BaseException:
            self.close()
            raise

    def _look(self) -> None:
        """UserError for a path in the directory that cannot be written or is of the wrong kind."""
        out = self.path
        if out.name == checkpoint.folder(out).name and checkpoint.available(out):
            raise UserError(f"--out {out} is the folder of a run's checkpoints: name the run directory, {out.parent}")
        for path, there in (
            (out, Path.is_dir),
            (out / CONFIG, Path.is_file),
            (out / METRICS, Path.is_file),
            (checkpoint.folder(out), Path.is_dir),
        ):
            if path != out and path.is_symlink():
                raise UserError(
                    f"{path} is a symbolic link, and a run writes through none in its directory: remove it, or let the "
                    "directory itself be a link to where there is room"
                )
            if path.exists() and not (there(path) and os.access(path, os.W_OK)):
                raise UserError(f"{path} is in the way, or may not be written: move it, or name another --out")

    def check(self, source: Path | None) -> None:
        """UserError if the directory has checkpoints of another run than that of `source`."""
        there = checkpoint.available(self.path)
        if there and source is not None and source.parent.absolute() != there[-1].parent.absolute():
            raise UserError(
                f"--out {self.path} holds a run already, and {source} is not of it: name another folder, or go on with "
                "that run by --resume auto"
            )

    @staticmethod
    def unnamed(stem: str, tell: Callable[[str], None]) -> RunFolder:
        """Make a new folder under runs/, called by the time, `stem`, and a number if needed."""
        start = f"{time.strftime('%Y%m%d-%H%M%S')}-{stem}"
        for number in range(1, 10_000):
            out = Path("runs") / (start if number == 1 else f"{start}-{number}")
            above = [] if out.parent.exists() else [out.parent]
            try:
                out.parent.mkdir(exist_ok=True)
                # Of several runs that start at once, one makes it.
                out.mkdir()
            except FileExistsError:
                continue
            except OSError as error:
                raise _unwritable(out, error) from None
            folder = RunFolder(out, tell)
            folder.made = [out, *above]
            return folder
        raise UserError(f"runs/{start} and 9,999 more are there: name a run directory with --out")

    def _take(self, patience: float) -> Lock:
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = Lock(self.path, patience, self.tell)
            if lock.in_place:
                return lock
            # The directory was removed before the lock was taken.
            lock.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Unlock the directory; remove it if it was made for this run and `begin` was not called."""
        if self.made and not self.begun:
            with contextlib.suppress(OSError):
                (self.path / ".lock").unlink(missing_ok=True)
            for path in self.made:
                # rmdir removes empty directories only.
                with contextlib.suppress(OSError):
                    path.rmdir()
        self.lock.close()

    def begin(self, config: str, rows: Iterable[Mapping[str, Any]], step: int, *, damaged: bool) -> None:
        """Take the directory for a run with this configuration, a TOML text, and rows of metrics.

        step, damaged: as in `psmpi.checkpoint.clear`. UserError where it cannot be written.
        """
        self.config, self.rows = legible(config), "".join(json.dumps(row) + "\n" for row in rows)
        try:
            checkpoint.clear(self.path, step, damaged=damaged, tell=self.tell)
            if step < 0:
                self._put_aside()
            self._write_texts()
            self.begun = True
        except OSError as error:
            raise _unwritable(self.path, error) from None

    def _put_aside(self) -> None:
        """Rename text files that a fresh run finds: they belong to another run, or to the user."""
        for name in (CONFIG, METRICS):
            path = self.path / name
            if path.exists() and path.stat().st_size and (name == METRICS or path.read_bytes() != self.config.encode()):
                aside = path.with_name(f"{name}.before")
                os.replace(path, aside)
                self.tell(f"note: {path} was there already, and is {aside.name} now")

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row to the metrics. OSError where it cannot be written; the next row brings it too."""
        line = json.dumps(row) + "\n"
        self.rows += line
        path = self.path / METRICS
        try:
            file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            file = -1
        if file >= 0:
            with os.fdopen(file, "ab") as stream:
                # The file has all earlier rows; otherwise all rows are written anew.
                if os.fstat(file).st_size == len(self.rows.encode()) - len(line.encode()):
                    stream.write(line.encode())
                    return
        self._replace(path, self.rows)

    def rewind(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Let the metrics be these rows. OSError where they cannot be written; the next row brings them too."""
        self.rows = "".join(json.dumps(row) + "\n" for row in rows)
        self._replace(self.path / METRICS, self.rows)

    def keep(self) -> Lock | None:
        """Make sure that the directory and its text files are there, and this run's; a new lock where it is a new one.

        UserError where another run has it now. OSError where it cannot be made.
        """
        if self.lock.in_place and (self.path / CONFIG).is_file():
            return None
        if self.lock.in_place:
            # Removing a directory that is written to may leave it there, emptied.
            self._write_texts()
            self.tell(
                f"WARNING: files of the run directory {self.path} were removed while this run writes to it: its text "
                "files are written again; training goes on"
            )
            return None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = Lock(self.path)
        except BlockingIOError:
            raise self._replaced_folder() from None
        if checkpoint.available(self.path):
            lock.close()
            raise self._replaced_folder()
        self.lock.close()
        self.lock = lock
        self._write_texts()
        self.tell(
            f"WARNING: the run directory {self.path} was removed or moved while this run writes to it: it is made "
            "again with its text files, earlier checkpoints are gone; training goes on"
        )
        return lock

    def _replaced_folder(self) -> UserError:
        return UserError(
            f"the run directory {self.path} was removed or moved, and another run has written there since: this run "
            "ends; start it again with another --out"
        )

    def _write_texts(self) -> None:
        self._replace(self.path / CONFIG, self.config)
        self._replace(self.path / METRICS, self.rows)

    def _replace(self, path: Path, text: str) -> None:
        """Write a file whole or not at all; a link of its name is replaced, not followed."""
        with written(path) as file:
            file.write(text.encode())


def _unwritable(out: Path, error: Exception) -> UserError:
    return UserError(f"--out {out}: {error}; name a folder that can be made and written")
