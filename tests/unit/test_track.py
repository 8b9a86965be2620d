"""Trackers record the rows of metrics.jsonl, over stops and starts; their errors do not end a training.

The records are read back by TensorBoard's and MLflow's packages where these are installed, else by stand-ins.
"""

import json
import os
import struct
import sys
from importlib.util import find_spec

import pytest
import tomllib

pytest.importorskip("mpi4py.MPI")

from helpers.paths import FAKE, ROOT
from helpers.runs import run as run_program

from psmpi import track
from psmpi.errors import UserError
from psmpi.methods.data_parallel import DataParallel
from psmpi.testing.poison import poisoned
from psmpi.track import TRACKERS, Run, Trackers, check_trackers
from psmpi.track.mlflow import store
from psmpi.track.record import numbers

REAL = {name: find_spec(package) is not None for name, (_, _, package, _) in TRACKERS.items()}
SHORT = ("--epochs", "4", "--batch-size", "500")


def row(step, **more):
    return {"epoch": step // 10, "step": step, "train_loss": 1 / step, "test_accuracy": 0.5, "list": [1, 2],
            "events": {"steps_skipped": 0}, **more}  # fmt: skip


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    """Use stand-ins for packages that are not installed; undo the variables that psmpi sets for MLflow."""
    for name in ("DISABLE_TELEMETRY", "ALLOW_FILE_STORE", "TRACKING_URI", "EXPERIMENT_NAME"):
        monkeypatch.setenv(f"MLFLOW_{name}", "")
        monkeypatch.delenv(f"MLFLOW_{name}")
    fakes = [package for name, (_, _, package, _) in TRACKERS.items() if not REAL[name]]
    monkeypatch.setattr(sys, "path", [*sys.path, str(FAKE / "trackers")] if fakes else sys.path)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in fakes]:
        del sys.modules[name]


# Reading records back.


def events(folder):
    """Events of TensorBoard's files, the oldest first: (step, start?, scalars, settings or None)."""
    all_events = []
    for path in sorted((folder / "tensorboard").glob("events.out.tfevents.*")):
        all_events += _real_events(path) if REAL["tensorboard"] else _fake_events(path)
    return all_events


def _fake_events(path):
    for line in path.read_text().splitlines():
        event = json.loads(line)
        content = event["summary"] or {}
        scalars = dict([content["scalar"]]) if "scalar" in content else {}
        yield event["step"], event["session_log"] is not None, scalars, content.get("settings")


def _real_events(path):
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    data, offset = path.read_bytes(), 0
    while offset < len(data):
        (size,) = struct.unpack_from("<Q", data, offset)
        event = Event.FromString(data[offset + 12 : offset + 12 + size])
        offset += 16 + size
        scalars, settings = {}, None
        for item in event.summary.value:
            if item.tag == "_hparams_/session_start_info":
                hparams = HParamsPluginData.FromString(item.metadata.plugin_data.content).session_start_info.hparams
                settings = {name: getattr(value, value.WhichOneof("kind")) for name, value in hparams.items()}
            elif item.WhichOneof("value") == "simple_value":
                scalars[item.tag] = item.simple_value
        yield event.step, event.session_log.status == SessionLog.START, scalars, settings


def curve(folder, tag):
    """[(step, value)] as TensorBoard shows it: a start hides the earlier points of its step and of later steps."""
    points = []
    for step, start, scalars, _ in events(folder):
        if start:
            points = [point for point in points if point[0] < step]
        if tag in scalars:
            points.append((step, scalars[tag]))
    return points


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def client(folder):
    """MLflow's client, and the number of the run that a run directory names."""
    import mlflow

    note = json.loads((folder / "mlflow.json").read_text())
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    return mlflow.MlflowClient(tracking_uri=note["store"]), note["run"]


def history(folder, key):
    mlflow_client, run = client(folder)
    return [
        (point.step, point.value)
        for point in sorted(mlflow_client.get_metric_history(run, key), key=lambda point: point.step)
    ]


def assert_same(folder, rows):
    """Both trackers have these rows, each step once."""
    for name, tag in (("train_loss", "train/loss"), ("test_accuracy", "test/accuracy"), ("epoch", "run/epoch")):
        expected = [(entry["step"], entry[name]) for entry in rows]
        assert curve(folder, tag) == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]
        assert history(folder, name) == expected


# Trainings.


@pytest.fixture
def tracked(tmp_path, train):
    """tracked(ranks, *options): a training with both trackers in one run directory."""
    place = ("--track", "tensorboard", "mlflow", "--track-dir", tmp_path / "store")

    def call(ranks, *options):
        return train(ranks, *place, *options, out=tmp_path / "run")

    return call


def test_trackers_have_the_rows_of_the_metrics(tracked):
    training = tracked(2, *SHORT)
    assert len(training.rows) == 4
    assert_same(training.out, training.rows)
    mlflow_client, run = client(training.out)
    mlflow_run = mlflow_client.get_run(run)
    assert mlflow_run.info.status == "FINISHED" and mlflow_run.info.run_name == "run"
    settings = next(settings for *_, settings in events(training.out) if settings)
    for name, value in (("lr", 0.001), ("batch_size", 500), ("model", "psnet"), ("ranks", 2), ("epochs", 4)):
        assert settings[name] == value and mlflow_run.data.params[name] in (value, json.dumps(value)), name
    assert "out" not in settings and "WARNING" not in training.stdout


def test_a_run_that_goes_on_goes_on_in_its_records(tracked):
    tracked(1, *SHORT, "--max-steps", "6")
    training = tracked(2, "--resume", "auto", "--max-steps", "0", "--lr", "0.002")
    assert len(training.rows) == 4
    assert_same(training.out, training.rows)
    mlflow_client, run = client(training.out)
    params = mlflow_client.get_run(run).data.params
    assert params["lr"] == "0.001" and params["lr.from_step_6"] == "0.002" and params["ranks.from_step_6"] == "2"


def test_steps_that_are_trained_again_are_there_once(tracked, tmp_path):
    """The run is as after a kill between a row and its checkpoint."""
    tracked(1, *SHORT, "--max-steps", "6")
    straight = tracked(1, "--resume", "auto", "--max-steps", "0")
    newest = sorted((tmp_path / "run" / "checkpoints").glob("step-*.h5"))
    for path in newest[-1:]:
        path.unlink()
    repeated = tracked(1, "--resume", "auto", "--max-steps", "0")
    assert [entry["step"] for entry in repeated.rows] == [entry["step"] for entry in straight.rows]
    assert_same(repeated.out, repeated.rows)


def test_a_tracker_that_comes_later_gets_the_rows_before(train, tmp_path):
    first = train(1, *SHORT, "--max-steps", "6", out=tmp_path / "run")
    training = train(
        1, "--resume", "auto", "--max-steps", "0", "--track", "tensorboard", "mlflow", "--track-dir", tmp_path / "s",
        out=first.out,
    )  # fmt: skip
    assert_same(training.out, training.rows)


def test_a_run_that_goes_on_without_its_trackers_leaves_them(tracked, train):
    first = tracked(1, *SHORT, "--max-steps", "6")
    training = train(1, "--resume", "auto", "--max-steps", "0", "--track", out=first.out)
    assert len(training.rows) == 4 and len(history(training.out, "epoch")) == len(curve(training.out, "run/epoch")) == 2


def test_a_stopped_and_a_failed_run_are_told_apart(tracked, tmp_path, monkeypatch):
    tracked(1, *SHORT, "--max-steps", "6")
    mlflow_client, run = client(tmp_path / "run")
    assert mlflow_client.get_run(run).info.status == "FINISHED"
    with Trackers(("mlflow",), Run(tmp_path / "run", {}, str(tmp_path / "store"))) as trackers:
        trackers.start([])
        assert mlflow_client.get_run(run).info.status == "RUNNING"
        trackers.close("stopped")
    assert mlflow_client.get_run(run).info.status == "KILLED"
    with pytest.raises(KeyError), Trackers(("mlflow",), Run(tmp_path / "run", {}, str(tmp_path / "store"))) as trackers:
        trackers.start([])
        raise KeyError
    assert mlflow_client.get_run(run).info.status == "FAILED"


def test_going_back_to_a_checkpoint_goes_back_in_the_records(tmp_path):
    rows = [row(10), row(20), row(30)]
    again = [row(20, train_loss=7.0), row(30, train_loss=8.0)]
    with Trackers(("tensorboard", "mlflow"), Run(tmp_path, {"lr": 1.0}, str(tmp_path / "store"))) as trackers:
        trackers.start([])
        for entry in rows:
            trackers.row(entry)
        trackers.start(rows[:1])
        for entry in again:
            trackers.row(entry)
        trackers.close("done")
    assert curve(tmp_path, "train/loss") == [(10, pytest.approx(0.1)), (20, 7.0), (30, 8.0)]
    # MLflow deletes nothing: the later value of a step holds.
    assert history(tmp_path, "train_loss")[-1] == (30, 8.0)


def test_a_rollback_makes_rows_again_in_the_records(tracked):
    """With epochs of 3 steps and checkpoints every 4, row 2 comes after the checkpoint that step 8 goes back to."""
    rollback = ("--on-nan", "rollback", "--batch-size", "480", "--checkpoint-every", "4", "--epochs", "4")
    with poisoned(lambda rank, step: step == 7) as hit:
        training = tracked(2, *rollback)
    assert (
        hit
        and [entry["step"] for entry in training.rows] == [3, 6, 9, 12]
        and training.rows[1]["events"]["rollbacks"] == 1
    )
    assert curve(training.out, "train/loss") == [
        (entry["step"], pytest.approx(entry["train_loss"])) for entry in training.rows
    ]
    assert curve(training.out, "events/rollbacks") == [(3, 0), (6, 1), (9, 1), (12, 1)]
    assert dict(history(training.out, "train_loss")) == {entry["step"]: entry["train_loss"] for entry in training.rows}


def test_only_the_first_rank_writes(tracked, monkeypatch):
    imported = []
    monkeypatch.setattr(track.tracker, "import_module", lambda name: imported.append(name) or __import__("json"))
    tracked(3, *SHORT, "--max-steps", "3")
    assert sorted(imported) == sorted(module for module, *_ in TRACKERS.values())


# Errors.


class Broken:
    def __init__(self, at):
        self.at, self.calls = at, []

    def __getattr__(self, name):
        def call(*_):
            self.calls.append(name)
            if name == self.at:
                raise RuntimeError("no space\nleft")

        return call


@pytest.mark.parametrize("at", ["start", "row", "close"])
def test_a_tracker_that_fails_is_told_of_once_and_left(at, tmp_path):
    messages, broken, sound = [], Broken(at), Broken("")
    trackers = Trackers((), Run(tmp_path), messages.append)
    trackers.open = {"tensorboard": broken, "mlflow": sound}
    with trackers:
        trackers.start([])
        trackers.row(row(10))
        trackers.row(row(20))
        trackers.close("done")
    assert sound.calls == ["start", "row", "row", "close"] and broken.calls[-1] == at
    assert messages == [
        "WARNING: --track tensorboard ends here: no space left; training goes on, and metrics.jsonl has every row"
    ]


def test_training_goes_on_without_a_tracker(tracked, tmp_path, monkeypatch):
    """A file is in the place of the folder of events, and a malformed one in that of MLflow's note."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("")
    (tmp_path / "run" / "mlflow.json").write_text("{")
    training = tracked(1, *SHORT)
    assert len(training.rows) == 4
    assert (
        training.stdout.count("WARNING: --track tensorboard") == 1
        and training.stdout.count("WARNING: --track mlflow") == 1
    )


@pytest.mark.parametrize("text", ["{", "[]", '{"run": "a"}', '{"store": 1}', "\xff"])
def test_a_malformed_note_of_the_run_is_told(text, tmp_path):
    (tmp_path / "mlflow.json").write_bytes(text.encode("latin-1"))
    messages = []
    with Trackers(("mlflow",), Run(tmp_path, {}, str(tmp_path / "store")), messages.append) as trackers:
        trackers.start([])
    if text == '{"store": 1}':
        assert not messages
    else:
        assert (
            len(messages) == 1 and "mlflow.json is not what psmpi wrote" in messages[0] and "remove it" in messages[0]
        )


def test_a_run_that_mlflow_has_no_more_begins_anew(tmp_path):
    run = Run(tmp_path, {}, str(tmp_path / "store"))
    with Trackers(("mlflow",), run) as trackers:
        trackers.start([])
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    before = client(tmp_path)[1]
    note = json.loads((tmp_path / "mlflow.json").read_text())
    (tmp_path / "mlflow.json").write_text(json.dumps({**note, "run": "0123456789abcdef0123456789abcdef"}))
    messages = []
    with Trackers(("mlflow",), run, messages.append) as trackers:
        trackers.start([row(10)])
    assert not messages and client(tmp_path)[1] not in (before, "0123456789abcdef0123456789abcdef")
    assert history(tmp_path, "epoch") == [(10, 1)]


def test_events_go_through_no_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "tensorboard").symlink_to(tmp_path / "elsewhere")
    messages = []
    with Trackers(("tensorboard",), Run(tmp_path), messages.append) as trackers:
        trackers.start([])
    assert "symbolic link" in messages[0] and not os.listdir(tmp_path / "elsewhere")


def test_refusals_name_the_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(track.tracker, "find_spec", lambda name: None)
    with open(ROOT / "pyproject.toml", "rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    for name, (_, _, package, extra) in TRACKERS.items():
        with pytest.raises(UserError, match=rf"--track {name} needs {package}: pip install 'psmpi\[{extra}\]'"):
            check_trackers((name,), "")
        assert any(requirement.startswith(package) for requirement in extras[extra])
    status, out, err = run_program(2, "-m", "psmpi.train", "--track", "mlflow", "--out", tmp_path / "run")
    assert status == 1 and (out + err).count("pip install 'psmpi[mlflow]'") == 1 and not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_refused(tmp_path):
    with pytest.raises(UserError, match="--track wandb: choose from tensorboard, mlflow"):
        check_trackers(("wandb",), "")
    (tmp_path / "a.toml").write_text('[run]\ntrack = ["wandb"]\n')
    status, out, err = run_program(1, "-m", "psmpi.train", "--config", tmp_path / "a.toml")
    assert status == 1 and "tensorboard" in out + err
    with pytest.raises(UserError, match="add --track mlflow"):
        check_trackers(("tensorboard",), "x")


def test_mlflow_s_runs_lie_in_a_folder_and_on_no_server(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert store("", {}) == (tmp_path / "mlruns").as_uri()
    assert store("", {"MLFLOW_TRACKING_URI": str(tmp_path / "a b")}) == (tmp_path / "a b").as_uri()
    assert store("c", {"MLFLOW_TRACKING_URI": "http://host"}) == (tmp_path / "c").as_uri()
    assert store(store("a b", {}), {}) == (tmp_path / "a b").as_uri()
    assert store("sqlite:///x.db", {}) == "sqlite:///x.db"
    for server in ("http://host:5000", "databricks", "databricks://profile", "file://host/x", "s3://b/c"):
        with pytest.raises(UserError, match=r"MLFLOW_TRACKING_URI.*connects to no server"):
            store("", {"MLFLOW_TRACKING_URI": server})
        with pytest.raises(UserError, match="--track-dir"):
            store(server, {})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="this is a file"):
        store("file", {})


def test_numbers_of_a_row_are_told_by_name():
    named_numbers = numbers({**row(10), "text": "a", "truth": True, "deep": {"a": {"b": 2}}})
    of_row = {"epoch": 1, "train_loss": 0.1, "test_accuracy": 0.5, "events.steps_skipped": 0}
    assert named_numbers == {**of_row, "truth": 1, "deep.a.b": 2}


def test_diagnostics_of_methods_are_numbers_with_names_that_mlflow_takes(tmp_path, monkeypatch, train):
    """Any method may add to a row."""
    named_values = {"a b": 1.0, "loss, in %": 2.0, "nan": float("nan")}
    monkeypatch.setattr(DataParallel, "diagnostics", lambda self: named_values)
    training = train(
        1, "--method", "data_parallel", *SHORT, "--max-steps", "3", "--track", "tensorboard", "mlflow", "--track-dir",
        tmp_path / "store",
    )  # fmt: skip
    assert "WARNING" not in training.stdout and history(training.out, "loss_ in _") == [(3, 2.0)]


@pytest.mark.skipif(not REAL["mlflow"], reason="no MLflow: pip install 'psmpi[mlflow]'")
def test_mlflow_itself_finds_the_run(tracked, tmp_path):
    training = tracked(1, *SHORT)
    import mlflow

    assert "site-packages" in mlflow.__file__
    mlflow_client = mlflow.MlflowClient(tracking_uri=(tmp_path / "store").as_uri())
    (experiment,) = [candidate for candidate in mlflow_client.search_experiments() if candidate.name == "psmpi"]
    (mlflow_run,) = mlflow_client.search_runs([experiment.experiment_id])
    assert mlflow_run.data.metrics["test_accuracy"] == training.rows[-1]["test_accuracy"]
