"""A stand-in for MLflow's client; its store is a folder with a JSON file for each run."""

import itertools
import json
import os
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

from mlflow import entities


class MlflowException(Exception):
    pass


class MlflowClient:
    def __init__(self, tracking_uri):
        assert tracking_uri.startswith("file:///")
        self.folder = Path(unquote(urlsplit(tracking_uri).path))
        if os.environ.get("MLFLOW_ALLOW_FILE_STORE") != "true":
            raise MlflowException("the store is in maintenance mode")
        self.folder.mkdir(parents=True, exist_ok=True)

    def _load(self, run_id):
        try:
            return json.loads((self.folder / run_id).read_text())
        except FileNotFoundError:
            raise MlflowException(f"no run {run_id}") from None

    def _save(self, run_id, run):
        (self.folder / run_id).write_text(json.dumps(run))

    def get_experiment_by_name(self, name):
        exists = (self.folder / f"experiment-{name}").exists()
        return SimpleNamespace(experiment_id=name) if exists else None

    def create_experiment(self, name):
        (self.folder / f"experiment-{name}").touch(exist_ok=False)
        return name

    def create_run(self, experiment_id, tags, run_name):
        run_id = next(f"run{k}" for k in itertools.count() if not (self.folder / f"run{k}").exists())
        run = {"experiment": experiment_id, "name": run_name, "tags": tags, "status": "RUNNING"}
        self._save(run_id, {**run, "params": {}, "metrics": {}})
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def get_run(self, run_id):
        run = self._load(run_id)
        info = SimpleNamespace(run_id=run_id, status=run["status"], run_name=run["name"])
        return SimpleNamespace(info=info, data=SimpleNamespace(params=run["params"], tags=run["tags"]))

    def update_run(self, run_id, status):
        self._save(run_id, {**self._load(run_id), "status": status})

    set_terminated = update_run

    def get_metric_history(self, run_id, key):
        return [entities.Metric(key, *one) for one in self._load(run_id)["metrics"].get(key, [])]

    def log_batch(self, run_id, metrics=(), params=()):
        run = self._load(run_id)
        assert len(metrics) + len(params) <= 100
        for entry in params:
            if run["params"].setdefault(entry.key, entry.value) != entry.value:
                raise MlflowException(f"parameter {entry.key} is there with another value")
        for entry in metrics:
            run["metrics"].setdefault(entry.key, []).append([entry.value, entry.timestamp, entry.step])
        self._save(run_id, run)
