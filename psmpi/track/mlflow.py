"""A run in MLflow's store: a folder, or an SQLite file; no server, no network."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from psmpi.errors import UserError, expanded
from psmpi.track.record import End, Run, numbers

# The file in a run directory that has the number of the run in MLflow, and where that is.
NAME = "mlflow.json"
# Where runs lie and what they are part of, if nothing else is said.
FOLDER, EXPERIMENT = "mlruns", "psmpi"
# Parameters and metrics that MLflow takes in one call, and characters that it takes in no name.
MOST, OTHERS = 100, re.compile(r"[^\w .:/-]", re.ASCII)
ENDS: dict[End, str] = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MLflow:
    """Settings as parameters, rows as metrics by step, of a run whose number is in `mlflow.json` of the run directory.

    A run that goes on is the same one, as long as MLflow has it where runs lie now; a step that it has already is not
    written a second time, unless this process went back to before it.
    """

    def __init__(self) -> None:
        # Neither does this package send word of its use, nor is there another store that is a folder.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient, entities

        self.client_of, self.entities = MlflowClient, entities
        self.client: Any = None
        self.id, self.last = "", -1

    def start(self, run: Run, rows: Sequence[Mapping[str, Any]]) -> None:
        if self.client is not None:
            # Back to a checkpoint of this run.
            self.last = int(rows[-1]["step"]) if rows else -1
            return
        where = store(run.track_dir)
        self.client = self.client_of(tracking_uri=where)
        self.id = self._known(run.folder, where)
        if self.id:
            self.client.update_run(self.id, status="RUNNING")
        else:
            tags = {"psmpi.run": str(run.folder.absolute())}
            made = self.client.create_run(self._experiment(), tags=tags, run_name=run.folder.name)
            self.id = str(made.info.run_id)
            _remember(run.folder, self.id, where)
        self._settings(run.settings, int(rows[-1]["step"]) if rows else 0)
        history = self.client.get_metric_history(self.id, "epoch")
        self.last = max((int(one.step) for one in history), default=-1)
        for row in rows:
            self.row(row)

    def row(self, row: Mapping[str, Any]) -> None:
        step, now = int(row["step"]), int(1000 * time.time())
        if step <= self.last:
            return
        found = [
            self.entities.Metric(OTHERS.sub("_", name), number, now, step) for name, number in numbers(row).items()
        ]
        for k in range(0, len(found), MOST):
            self.client.log_batch(self.id, metrics=found[k : k + MOST])
        self.last = step

    def close(self, end: End) -> None:
        if self.id:
            self.client.set_terminated(self.id, ENDS[end])

    def _known(self, folder: Path, where: str) -> str:
        """The number of the run that this one goes on with, "" where there is none in this store."""
        try:
            said = json.loads((folder / NAME).read_text())
            if said["store"] != where:
                return ""
            found = str(self.client.get_run(str(said["run"])).info.run_id)
        except FileNotFoundError:
            return ""
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{folder / NAME} is not what psmpi wrote ({error}): remove it for a new run") from None
        except Exception as error:
            # MLflow's own, of a module that is another one from version to version.
            if type(error).__name__ != "MlflowException":
                raise
            return ""
        return found

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        for _ in range(2):
            found = self.client.get_experiment_by_name(name)
            if found is not None:
                return str(found.experiment_id)
            try:
                return str(self.client.create_experiment(name))
            except Exception as error:
                # Another run has made it in between.
                failed = error
        raise failed

    def _settings(self, settings: Mapping[str, Any], step: int) -> None:
        """Parameters, which MLflow never changes: another value than before is one of the step that it is from."""
        before = self.client.get_run(self.id).data.params
        found = {}
        for name, value in settings.items():
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            if name not in before:
                found[name] = text
            elif before[name] != text:
                found[f"{name}.from_step_{step}"] = text
        new = [self.entities.Param(name, text) for name, text in found.items() if name not in before]
        for k in range(0, len(new), MOST):
            self.client.log_batch(self.id, params=new[k : k + MOST])


def store(track_dir: str, environ: Mapping[str, str] = os.environ) -> str:
    """The place of MLflow's runs, as it writes that: by --track-dir, else MLFLOW_TRACKING_URI, else ./mlruns.

    UserError for what is neither a folder nor an SQLite file.
    """
    said = track_dir or environ.get("MLFLOW_TRACKING_URI", "") or FOLDER
    option = "--track-dir" if track_dir else "MLFLOW_TRACKING_URI"
    if said.startswith("sqlite:///"):
        return said
    parts = urlsplit(said)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        said = unquote(parts.path)
    elif "://" in said or parts.scheme == "file" or said.startswith("databricks"):
        raise UserError(
            f"{option} {said}: psmpi writes into a folder or an SQLite file, and speaks to no server: name a folder "
            "with --track-dir, or sqlite:///FILE"
        )
    path = expanded(said, option).absolute()
    if path.exists() and not path.is_dir():
        raise UserError(f"{option} {said}: this is a file: name a folder, or sqlite:///FILE")
    return path.as_uri()


def _remember(folder: Path, run: str, where: str) -> None:
    """Write the number of a run into the run directory, whole or not at all."""
    part = folder / f".{NAME}.part"
    part.write_text(json.dumps({"run": run, "store": where}) + "\n")
    os.replace(part, folder / NAME)
