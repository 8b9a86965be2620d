"""What a tracker is, and those of one run together: what goes wrong with one ends no training."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from psmpi.errors import UserError

# How a run ends: all of it is done, it was stopped and can be gone on with, or an error ended it.
End = Literal["done", "stopped", "failed"]

# Module and class of each tracker, the package that it needs, and the extra of psmpi that brings this.
TRACKERS = {
    "tensorboard": ("psmpi.track.tensorboard", "TensorBoard", "tensorboardX", "track"),
    "mlflow": ("psmpi.track.mlflow", "MLflow", "mlflow", "mlflow"),
}


@dataclass(frozen=True)
class Run:
    """A run that is tracked: its directory, its settings by name, and the --track-dir."""

    folder: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    track_dir: str = ""


class Tracker(Protocol):
    """A record of a run in another format. Its methods may raise anything; then it is called no more."""

    def start(self, run: Run, rows: Sequence[Mapping[str, Any]]) -> None:
        """Begin, or go on, after these rows of metrics: later ones of an earlier start are void.

        It is called again where a run goes back to a checkpoint.
        """

    def row(self, row: Mapping[str, Any]) -> None:
        """Write a row of metrics.jsonl, to be there when this returns."""

    def close(self, end: End) -> None:
        """End the record."""


class Trackers:
    """The trackers of a run, on rank 0; without names it does nothing.

    What a tracker raises is told once, by `tell`, and that tracker is left. Leaving the block that it manages by an
    error ends the records as failed.
    """

    def __init__(self, names: Sequence[str] = (), run: Run | None = None, tell: Callable[[str], None] = print):
        self.run, self.tell = run, tell
        self.open: dict[str, Tracker] = {}
        for name in dict.fromkeys(names):
            self._call(name, partial(self._open, name))

    def start(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Begin, go on, or go back, after these rows."""
        run = self.run
        if run is not None:
            self._each(lambda one: one.start(run, rows))

    def row(self, row: Mapping[str, Any]) -> None:
        """Write a row of metrics."""
        self._each(lambda one: one.row(row))

    def close(self, end: End) -> None:
        """End the records, once."""
        self._each(lambda one: one.close(end))
        self.open = {}

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close("failed")

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, one in list(self.open.items()):
            self._call(name, partial(call, one))

    def _open(self, name: str) -> None:
        module, kind, _, _ = TRACKERS[name]
        self.open[name] = getattr(import_module(module), kind)()

    def _call(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        # Another package's writer, whose errors are of any kind.
        except Exception as error:
            self.open.pop(name, None)
            reason = " ".join(str(error).split()) or type(error).__name__
            self.tell(f"WARNING: --track {name} ends here: {reason}; training goes on, and metrics.jsonl has every row")


def check_trackers(names: Sequence[str], track_dir: str, environ: Mapping[str, str] = os.environ) -> None:
    """UserError for a tracker that is unknown or whose package is not there, and for a --track-dir of no use."""
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"--track {name}: choose from {', '.join(TRACKERS)}")
        _, _, package, extra = TRACKERS[name]
        if find_spec(package) is None:
            raise UserError(f"--track {name} needs {package}: pip install 'psmpi[{extra}]', or leave {name} out")
    if "mlflow" in names:
        from psmpi.track.mlflow import store

        store(track_dir, environ)
    elif track_dir:
        raise UserError(f"--track-dir {track_dir} is where MLflow's runs lie: add --track mlflow, or leave it out")


def numbers(row: Mapping[str, Any], between: str = ".") -> dict[str, float]:
    """The numbers of a row of metrics by name, but for its step; those of a table in it as TABLE.NAME.

    Lists, such as bytes by rank, are left out.
    """
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= {f"{name}{between}{below}": number for below, number in numbers(value, between).items()}
        elif isinstance(value, (int, float)) and name != "step":
            found[name] = float(value)
    return found
