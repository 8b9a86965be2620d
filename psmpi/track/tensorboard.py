"""Tracker for TensorBoard: event files in the folder `tensorboard` of a run directory, written by tensorboardX."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from psmpi.track.record import End, Run, numbers

FOLDER = "tensorboard"


class TensorBoard:
    """Tracker that writes the numbers of each row as scalars by step, and settings as hyperparameters.

    The metrics of the hyperparameters are the scores of tests. Each start writes a new file, which begins with a mark:
    TensorBoard then ignores later steps of earlier files. A row is on the disk when `row` returns.
    """

    def __init__(self) -> None:
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self.summary, self.writer_of, self.event, self.log = summary, EventsWriter, Event, SessionLog
        self.writer: Any = None
        self.settings: dict[str, Any] = {}
        self.step = 0
        self.end: Any = None

    def start(self, run: Run, rows: Sequence[Mapping[str, Any]]) -> None:
        folder = run.folder / FOLDER
        if folder.is_symlink():
            raise OSError(f"{folder} is a symbolic link, and a run writes through none in its directory")
        folder.mkdir(exist_ok=True)
        before = sum(1 for _ in folder.glob("events.out.tfevents.*"))
        self.settings = {name: _plain(value) for name, value in run.settings.items()}
        if self.writer is not None:
            self.writer.close()
        self.end = None
        # TensorBoard reads files in the order of their names, which have the time in seconds, so add a number.
        self.writer = self.writer_of(str(folder / "events"), f".{before:04d}")
        self.step = int(rows[-1]["step"]) if rows else 0
        self._write(self.step + 1 if rows else 0, session_log=self.log(status=self.log.START))
        self._write(self.step, self.summary.text("configuration", _table(self.settings)))
        for row in () if before else rows:
            self._row(row)
        self.writer.flush()

    def row(self, row: Mapping[str, Any]) -> None:
        self._row(row)
        self.writer.flush()

    def close(self, end: End) -> None:
        if self.writer is not None:
            if end == "done" and self.end is not None:
                self._write(self.step, self.end)
            self.writer.close()

    def _row(self, row: Mapping[str, Any]) -> None:
        scalars = {_tag(name): number for name, number in numbers(row, "/").items()}
        self.step = int(row["step"])
        if self.end is None:
            # The first row tells which scores the run has.
            scores = {tag: number for tag, number in scalars.items() if tag.startswith(("test/", "train/"))}
            *begin, self.end = self.summary.hparams(self.settings, scores)
            for summary in begin:
                self._write(self.step, summary)
        for tag, number in scalars.items():
            self._write(self.step, self.summary.scalar(tag, number))

    def _write(self, step: int, summary: Any = None, **more: Any) -> None:
        content = {**more, **({} if summary is None else {"summary": summary})}
        self.writer.write_event(self.event(wall_time=time.time(), step=step, **content))


def _tag(name: str) -> str:
    """Tag of a curve with its group before the slash, such as test/accuracy, run/seconds and events/steps_skipped."""
    for group in ("test", "train"):
        if name.startswith(f"{group}_"):
            return f"{group}/{name.removeprefix(f'{group}_')}"
    return name if "/" in name else f"run/{name}"


def _plain(value: Any) -> str | float | bool:
    """A setting as a hyperparameter: a number, a truth value or a text."""
    return value if isinstance(value, (bool, int, float, str)) else json.dumps(value, default=str)


def _table(settings: Mapping[str, Any]) -> str:
    """Settings as a table in Markdown."""
    rows = (f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in settings.items())
    return "\n".join(["| setting | value |", "|---|---|", *rows])
