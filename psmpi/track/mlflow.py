"""Tracker for MLflow's store, a folder or an SQLite file; it uses no server and no network."""

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

# File in a run directory with the id of the run in MLflow, and the store of that run.
NAME = "mlflow.json"
# Default store and experiment.
FOLDER, EXPERIMENT = "mlruns", "psmpi"
# Most parameters and metrics of one call of MLflow, and characters that MLflow allows in no name.
MOST, OTHERS = 100, re.compile(r"[^\w .:/-]", re.ASCII)
ENDS: dict[End, str] = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MLflow:
    """Tracker that writes settings as parameters and rows as metrics by step. `mlflow.json` keeps the run's id.

    A resumed run continues the same MLflow run if the present store has it. Steps that MLflow has already are not
    written again, unless this process went back to a checkpoint before them.
    """

    def __init__(self) -> None:
        # Send no usage data, and allow a folder as a store.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient, entities

        self.client_of, self.entities = MlflowClient, entities
        self.client: Any = None
        self.id, self.last = "", -1

    def start(self, run: Run, rows: Sequence[Mapping[str, Any]]) -> None:
        if self.client is not None:
            # The run went back to a checkpoint.
            self.last = int(rows[-1]["step"]) if rows else -1
            return
        where = store(run.track_dir)
        self.client = self.client_of(tracking_uri=where)
        self.id = self._known(run.folder, where)
        if self.id:
            self.client.update_run(self.id, status="RUNNING")
        else:
            tags = {"psmpi.run": str(run.folder.absolute())}
            new = self.client.create_run(self._experiment(), tags=tags, run_name=run.folder.name)
            self.id = str(new.info.run_id)
            _remember(run.folder, self.id, where)
        self._settings(run.settings, int(rows[-1]["step"]) if rows else 0)
        history = self.client.get_metric_history(self.id, "epoch")
        self.last = max((int(metric.step) for metric in history), default=-1)
        for row in rows:
            self.row(row)

    def row(self, row: Mapping[str, Any]) -> None:
        step, now = int(row["step"]), int(1000 * time.time())
        if step <= self.last:
            return
        metrics = [
            self.entities.Metric(OTHERS.sub("_", name), number, now, step) for name, number in numbers(row).items()
        ]
        for k in range(0, len(metrics), MOST):
            self.client.log_batch(self.id, metrics=metrics[k : k + MOST])
        self.last = step

    def close(self, end: End) -> None:
        if self.id:
            self.client.set_terminated(self.id, ENDS[end])

    def _known(self, folder: Path, where: str) -> str:
        """Id of the MLflow run that this run continues; "" if the store `where` has none."""
        try:
            table = json.loads((folder / NAME).read_text())
            if table["store"] != where:
                return ""
            run_id = str(self.client.get_run(str(table["run"])).info.run_id)
        except FileNotFoundError:
            return ""
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{folder / NAME} is not what psmpi wrote ({error}): remove it for a new run") from None
        except Exception as error:
            # MLflow's exception is recognized by name, since its module differs between versions.
            if type(error).__name__ != "MlflowException":
                raise
            return ""
        return run_id

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        for _ in range(2):
            experiment = self.client.get_experiment_by_name(name)
            if experiment is not None:
                return str(experiment.experiment_id)
            try:
                return str(self.client.create_experiment(name))
            except Exception as error:
                # Another run may have made the experiment meanwhile.
                failed = error
        raise failed

    def _settings(self, settings: Mapping[str, Any], step: int) -> None:
        """Write settings as parameters. MLflow changes none, so a new value gets a name with .from_step_N."""
        before = self.client.get_run(self.id).data.params
        parameters = {}
        for name, value in settings.items():
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            if name not in before:
                parameters[name] = text
            elif before[name] != text:
                parameters[f"{name}.from_step_{step}"] = text
        new = [self.entities.Param(name, text) for name, text in parameters.items() if name not in before]
        for k in range(0, len(new), MOST):
            self.client.log_batch(self.id, params=new[k : k + MOST])


def store(track_dir: str, environ: Mapping[str, str] = os.environ) -> str:
    """URI of MLflow's store: --track-dir if given, else MLFLOW_TRACKING_URI, else ./mlruns.

    UserError for a place that is neither a folder nor an SQLite file.
    """
    place = track_dir or environ.get("MLFLOW_TRACKING_URI", "") or FOLDER
    option = "--track-dir" if track_dir else "MLFLOW_TRACKING_URI"
    if place.startswith("sqlite:///"):
        return place
    parts = urlsplit(place)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        place = unquote(parts.path)
    elif "://" in place or parts.scheme == "file" or place.startswith("databricks"):
        raise UserError(
            f"{option} {place}: psmpi writes into a folder or an SQLite file, and connects to no server: name a folder "
            "with --track-dir, or sqlite:///FILE"
        )
    path = expanded(place, option).absolute()
    if path.exists() and not path.is_dir():
        raise UserError(f"{option} {place}: this is a file: name a folder, or sqlite:///FILE")
    return path.as_uri()


def _remember(folder: Path, run: str, where: str) -> None:
    """Write the id and the store of an MLflow run into the run directory, complete or not at all."""
    part = folder / f".{NAME}.part"
    part.write_text(json.dumps({"run": run, "store": where}) + "\n")
    os.replace(part, folder / NAME)
