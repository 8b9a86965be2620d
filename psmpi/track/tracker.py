"""All trackers of a run. An error of a tracker does not end the training."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import TracebackType
from typing import Any

from psmpi.errors import UserError
from psmpi.track.mlflow import store
from psmpi.track.record import End, Run, Tracker

# Module and class of each tracker, the package that it needs, and the extra of psmpi that installs the package.
TRACKERS = {
    "tensorboard": ("psmpi.track.tensorboard", "TensorBoard", "tensorboardX", "track"),
    "mlflow": ("psmpi.track.mlflow", "MLflow", "mlflow", "mlflow"),
}


class Trackers:
    """The trackers of a run, on rank 0; without names the methods do nothing.

    An exception of a tracker prints a warning by `tell`, and the tracker is not called again. An exception that leaves
    the `with` block ends the records as failed.
    """

    def __init__(self, names: Sequence[str] = (), run: Run | None = None, tell: Callable[[str], None] = print):
        self.run, self.tell = run, tell
        self.open: dict[str, Tracker] = {}
        for name in dict.fromkeys(names):
            self._call(name, partial(self._open, name))

    def start(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Begin or continue the records after these rows, also when a run goes back to a checkpoint."""
        run = self.run
        if run is not None:
            self._each(lambda tracker: tracker.start(run, rows))

    def row(self, row: Mapping[str, Any]) -> None:
        """Write a row of metrics."""
        self._each(lambda tracker: tracker.row(row))

    def close(self, end: End) -> None:
        """End the records. Later calls do nothing."""
        self._each(lambda tracker: tracker.close(end))
        self.open = {}

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close("failed")

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.open.items()):
            self._call(name, partial(call, tracker))

    def _open(self, name: str) -> None:
        module, kind, _, _ = TRACKERS[name]
        self.open[name] = getattr(import_module(module), kind)()

    def _call(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        # The writer of another package may raise any exception.
        except Exception as error:
            self.open.pop(name, None)
            reason = " ".join(str(error).split()) or type(error).__name__
            self.tell(f"WARNING: --track {name} ends here: {reason}; training goes on, and metrics.jsonl has every row")


def check_trackers(names: Sequence[str], track_dir: str, environ: Mapping[str, str] = os.environ) -> None:
    """Raise UserError for an unknown tracker, for a missing package, and for a --track-dir without MLflow."""
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"--track {name}: choose from {', '.join(TRACKERS)}")
        _, _, package, extra = TRACKERS[name]
        if find_spec(package) is None:
            raise UserError(f"--track {name} needs {package}: pip install 'psmpi[{extra}]', or leave {name} out")
    if "mlflow" in names:
        store(track_dir, environ)
    elif track_dir:
        raise UserError(f"--track-dir {track_dir} is where MLflow's runs lie: add --track mlflow, or leave it out")
