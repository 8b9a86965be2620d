"""Resumed runs: their settings and data, other folders, and counted epochs; a refusal changes no file."""

import json
import os
import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers.runs import run

from psmpi import data
from psmpi.config import read_file
from psmpi.config.text import tomllib
from psmpi.training.loop import Loop

MLP = ("--model", "mlp", "--widths", "12")
FEW = ("--batch-size", "60", "--lr", "0.01", "--optimizer", "momentum", "--momentum", "0.8", *MLP)
RNG = np.random.default_rng(0)
X, Y = RNG.normal(0, 1, (300, 20)), np.arange(300) % 4
X += RNG.normal(0, 2, (4, 20))[Y]


def start(folder, *options, ranks=1, ok=True, out="run"):
    status, stdout, err = run(ranks, "-m", "psmpi.train", "--out", folder / out, *options, cwd=folder)
    assert (status == 0) is ok and "Traceback" not in err, err + stdout
    return " ".join(stdout.split()) if ok else " ".join(err.split())


def save(path, x=X, y=Y):
    np.savez(path, x=x, y=y)


def snapshot(folder):
    """Return the bytes and times of all files in a folder."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_goes_on_with_its_own_settings(train, ranks):
    full_run = train(ranks, *FEW, "--epochs", "3")
    first = train(ranks, *FEW, "--epochs", "3", "--max-steps", "30")
    resumed = train(ranks, "--resume", "auto", out=first.out)
    assert "note:" not in resumed.stdout.replace("note: 2 rank(s)", "").replace("note: 1 rank(s)", "")
    assert all(np.array_equal(value, resumed.tensors()[name]) for name, value in full_run.tensors().items())
    assert [row["epoch"] for row in resumed.rows] == [1, 2, 3]


@pytest.mark.parametrize("text", [None, "", "[optimization]\nlr = 0.5\n"])
def test_the_settings_are_those_of_the_checkpoint_and_not_of_config_toml(train, text):
    first = train(1, *FEW, "--epochs", "1")
    (first.out / "config.toml").unlink() if text is None else (first.out / "config.toml").write_text(text)
    resumed = train(1, "--resume", "auto", "--epochs", "2", out=first.out)
    assert resumed.rows[-1]["step"] == 48 and read_file(str(first.out / "config.toml")).optimization.momentum == 0.8


@pytest.mark.parametrize("text", [b"epochs = ", b"\xff\xfe", b"[run]\nepoch = 3\n"])
def test_a_config_toml_that_is_none_is_named(train, tmp_path, text):
    train(1, *FEW, "--epochs", "1", out=tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "config.toml").write_bytes(text)
    before = snapshot(tmp_path / "run")
    assert "config.toml" in start(tmp_path, "--resume", "auto", "--epochs", "2", ok=False)
    assert snapshot(tmp_path / "run") == before


def test_a_run_killed_before_its_first_checkpoint_starts_afresh_with_its_own_settings(train, tmp_path):
    first = train(1, *FEW, "--epochs", "2")
    shutil.rmtree(first.out / "checkpoints")
    restarted = train(1, "--resume", "auto", out=first.out)
    assert restarted.rows[-1]["train_loss"] == first.rows[-1]["train_loss"]
    assert "note: there is no checkpoint in" in restarted.stdout and "this is a fresh start" in restarted.stdout
    assert "metrics.jsonl was there already, and is metrics.jsonl.before now" in restarted.stdout
    before = [json.loads(line) for line in (first.out / "metrics.jsonl.before").read_text().splitlines()]
    assert before == first.rows


def test_the_checkpoint_that_is_named_has_the_settings_too(train):
    first = train(1, *FEW, "--epochs", "1")
    resumed = train(1, "--resume", first.checkpoint, "--epochs", "2")
    assert resumed.rows[-1]["step"] == 48


def test_a_file_and_the_command_line_change_them_and_that_is_told(train, tmp_path):
    first = train(1, *FEW, "--epochs", "1")
    (tmp_path / "more.toml").write_text("[run]\nepochs = 2\n[optimization]\nlr = 0.02\n")
    resumed = train(1, "--resume", "auto", "--config", tmp_path / "more.toml", "--lr", "0.03", out=first.out)
    assert "note: lr is 0.03, in the checkpoint it was 0.01" in resumed.stdout
    assert "note: epochs is 2, in the checkpoint it was 1" in resumed.stdout
    assert "momentum" not in resumed.stdout
    # The run keeps the changed settings.
    assert "note: lr is" not in train(1, "--resume", "auto", "--epochs", "3", out=first.out).stdout


def test_settings_that_the_new_choice_does_not_use_are_left_behind(train):
    first = train(1, "--method", "local_sgd", "--local-steps", "5", *FEW, "--epochs", "1")
    resumed = train(
        1, "--resume", first.checkpoint, "--epochs", "2", "--method", "data_parallel", "--optimizer", "adam"
    )
    assert "the optimizer starts afresh" in resumed.stdout
    config = read_file(str(resumed.out / "config.toml"))
    assert config.optimization.momentum is None and config.data.batch_size == 60


def test_settings_that_are_given_and_not_used_are_refused_as_ever(train, tmp_path):
    train(1, *FEW, "--epochs", "1", out=tmp_path / "run")
    message = start(tmp_path, "--resume", "auto", "--optimizer", "adam", "--momentum", "0.7", ok=False)
    assert "--momentum is of --optimizer" in message


@pytest.mark.parametrize("method", ["psl", "data_parallel", "sil", "ist"])
def test_another_minibatch_is_taken_up_at_the_end_of_an_epoch_and_the_run_ends_after_its_epochs(train, method):
    options = ("--method", method, "--model", "mlp", "--widths", "12", "12", "--epochs", "4")
    first = train(1, *options, "--max-steps", "30")
    resumed = train(1, "--resume", "auto", "--batch-size", "40", out=first.out)
    assert "note: batch_size is 40, in the checkpoint it was 100" in resumed.stdout
    assert [(row["epoch"], row["step"]) for row in resumed.rows] == [(1, 15), (2, 30), (3, 66), (4, 102)]
    # A method with phases is in the phase of its epoch.
    full_run = train(1, *options)
    assert [row.get("phase") for row in resumed.rows] == [row.get("phase") for row in full_run.rows]
    finished = train(1, "--resume", "auto", out=first.out)
    assert "nothing left to do: --epochs 4 asked for" in finished.stdout and finished.rows == resumed.rows


CHANGES = {
    "reorder": lambda: (X[::-1], Y[::-1]),
    "append": lambda: (np.concatenate([X, X[:50]]), np.concatenate([Y, Y[:50]])),
    "shrink": lambda: (X[:250], Y[:250]),
    "relabel": lambda: (X, (Y + 1) % 4),
    "rescale": lambda: (X * 16, Y),
    "convert": lambda: (X.astype(np.float32), Y),
    "pixel": lambda: (np.where(np.arange(X.size).reshape(X.shape) == 7 * X[0].size + 3, X + 1, X), Y),
    "classes": lambda: (X, np.where(np.arange(300) % 7 == 0, 4, Y)),
    "values": lambda: (X, Y.astype(float)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_data_than_before_are_refused_and_nothing_is_changed(tmp_path, change):
    save(tmp_path / "d.npz")
    start(tmp_path, "--dataset", "d.npz", *MLP, "--epochs", "1")
    save(tmp_path / "d.npz", *CHANGES[change]())
    before = snapshot(tmp_path / "run")
    message = start(tmp_path, "--resume", "auto", "--epochs", "2", ok=False)
    other_targets = "has learnt labels, and the targets of --dataset"
    assert ("d.npz is not the data set that checkpoint" if change != "values" else other_targets) in message
    assert snapshot(tmp_path / "run") == before


@pytest.mark.parametrize("change", ["append", "rescale", "reorder", "pixel"])
def test_other_data_are_taken_up_where_that_is_asked_for(tmp_path, change):
    save(tmp_path / "d.npz")
    start(tmp_path, "--dataset", "d.npz", *MLP, "--epochs", "1", "--batch-size", "50")
    save(tmp_path / "d.npz", *CHANGES[change]())
    output = start(tmp_path, "--resume", "auto", "--epochs", "3", "--new-data")
    assert "note: other data than in the checkpoint: " in output
    steps = {"append": [5, 11, 17]}.get(change, [5, 10, 15])
    assert [row["step"] for row in rows(tmp_path / "run")] == steps
    # The note comes once: the next checkpoint is of the new data.
    assert "other data" not in start(tmp_path, "--resume", "auto", "--epochs", "4")


def test_new_data_are_not_taken_up_inside_an_epoch_nor_without_a_checkpoint(tmp_path):
    save(tmp_path / "d.npz")
    assert "add --resume" in start(tmp_path, "--dataset", "d.npz", *MLP, "--new-data", ok=False)
    start(tmp_path, "--dataset", "d.npz", *MLP, "--max-steps", "2")
    save(tmp_path / "d.npz", *CHANGES["reorder"]())
    message = start(tmp_path, "--resume", "auto", "--new-data", ok=False)
    assert "an epoch is to be ended with the same data (it is 2 steps into epoch 1)" in message


@pytest.mark.parametrize(
    "options",
    [
        ("--model", "mlp", "--widths", "7"),
        ("--dataset", "none.npz"),
        ("--masters", "5"),
        ("--dtype", "float64", "--lr", "-1"),
    ],
)
def test_a_resume_that_is_refused_changes_nothing(train, tmp_path, options):
    train(1, *MLP, "--epochs", "1", out=tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / ".step-000000099.h5.part").write_bytes(b"half")
    before = snapshot(tmp_path / "run")
    start(tmp_path, "--resume", "auto", "--epochs", "2", *options, ok=False)
    assert snapshot(tmp_path / "run") == before


def test_a_start_that_is_refused_leaves_no_folder(tmp_path):
    start(tmp_path, "--dataset", "none.npz", ok=False)
    start(tmp_path, "--masters", "5", ok=False)
    assert list(tmp_path.iterdir()) == []


def test_a_fresh_start_does_not_take_a_folder_with_a_run(train, tmp_path, monkeypatch):
    """The start also finds checkpoints that come while it waits for the lock."""
    out = train(1, *MLP, "--epochs", "1", out=tmp_path / "run").out
    assert "holds a run already" in start(tmp_path, *MLP, ok=False)
    listings = iter([[], []])
    monkeypatch.setattr("psmpi.checkpoint.available", lambda _: next(listings))
    before = snapshot(out)
    message = start(tmp_path, *MLP, ok=False)
    assert "holds a run already: add --resume auto" in message and "damaged" not in message
    assert snapshot(out) == before


def test_paths_of_data_hold_in_other_folders(tmp_path):
    work, other_folder = tmp_path / "work", tmp_path / "other"
    (work / "sets").mkdir(parents=True)
    other_folder.mkdir()
    save(work / "sets" / "d.npz")
    start(work, "--dataset", "d.npz", "--data-dir", "sets", *MLP, "--epochs", "1")
    status, _, err = run(
        1, "-m", "psmpi.train", "--resume", "auto", "--out", "../work/run", "--epochs", "2", cwd=other_folder
    )
    assert status == 0, err
    status, out, err = run(1, "-m", "psmpi.predict", "../work/run", "--json", cwd=other_folder)
    assert status == 0 and json.loads(out)["samples"] == 60, err


@pytest.mark.parametrize("end", [".npz", ".h5"])
@pytest.mark.parametrize("folder", [b"d\xff", b"l\xe4ufe \xc3\xa4 \xc3", b"\xe4\xe4", b"0ff"])
def test_data_in_folders_whose_names_are_not_utf8_are_found_again(tmp_path, end, folder):
    sets = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + folder))
    sets.mkdir()
    if end == ".npz":
        save(sets / "d.npz")
    else:
        with h5py.File(sets / "d.h5", "w") as file:
            file["x"], file["y"] = X, Y
    start(tmp_path, "--dataset", f"d{end}", "--data-dir", sets, *MLP, "--epochs", "1")
    start(tmp_path, "--resume", "auto", "--epochs", "2", ranks=2)
    assert rows(tmp_path / "run")[-1]["epoch"] == 2
    status, out, err = run(1, "-m", "psmpi.predict", tmp_path / "run", "--json", cwd=tmp_path)
    assert status == 0 and json.loads(out)["samples"] == 60, err
    start(tmp_path, "--config", "run/config.toml", out="again")
    # Any reader of TOML reads the name: a byte that is not UTF-8 is NUL, which no name has, and its digits.
    saved_name = tomllib.loads((tmp_path / "run" / "config.toml").read_text("utf-8"))["data"]["data_dir"]
    raw = re.sub(rb"\0(..)", lambda byte: bytes.fromhex(byte[1].decode()), saved_name.encode())
    assert raw == os.fsencode(sets)
    status, out, err = run(1, "-m", "psmpi.inspect", "show", tmp_path / "run", "--json", cwd=tmp_path)
    assert status == 0 and json.loads(out)["config"]["data.data_dir"] == str(sets)


def test_a_home_folder_in_a_file_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "d.npz")
    (tmp_path / "c.toml").write_text('[data]\ndataset = "~/d.npz"\n[run]\nout = "~/deep/run"\nepochs = 1\n')
    status, _, err = run(1, "-m", "psmpi.train", "--config", "~/c.toml", *MLP, cwd=tmp_path)
    assert status == 0 and rows(tmp_path / "deep" / "run"), err
    (tmp_path / "sets").mkdir()
    (tmp_path / "d.npz").rename(tmp_path / "sets" / "e.npz")
    (tmp_path / "c.toml").write_text('[data]\ndataset = "e.npz"\ndata_dir = "~/sets"\n[run]\nepochs = 1\n')
    start(tmp_path, "--config", "c.toml", *MLP)


def stale(monkeypatch, **arrays):
    """Make all ranks but the first open other data, those at `path`."""
    opened, original_open = [], data.open_dataset

    def open_other(*arguments, **keywords):
        opened.append(1)
        return original_open(arrays["path"] if len(opened) > 1 else arguments[0], *arguments[1:], **keywords)

    monkeypatch.setattr("psmpi.training.start.open_dataset", open_other)


@pytest.mark.parametrize("change", ["reorder", "shrink", "relabel", "rescale", "classes", "convert", "pixel"])
def test_ranks_that_see_other_data_are_named(tmp_path, monkeypatch, change):
    save(tmp_path / "d.npz")
    save(tmp_path / "stale.npz", *CHANGES[change]())
    stale(monkeypatch, path=str(tmp_path / "stale.npz"))
    message = start(tmp_path, "--dataset", "d.npz", *MLP, "--method", "data_parallel", ranks=3, ok=False)
    assert "the data set on rank 1, host" in message and "is not that of rank 0" in message
    assert not (tmp_path / "run").exists()


def test_a_run_whose_folder_is_removed_goes_on_and_says_so(train, tmp_path, monkeypatch):
    append = Loop._append

    def remove(self, row):
        if row["epoch"] == 2 and self.folder is not None:
            shutil.rmtree(self.out)
        append(self, row)

    monkeypatch.setattr(Loop, "_append", remove)
    finished = train(2, *MLP, "--epochs", "4", out=tmp_path / "run")
    assert finished.stdout.count("was removed or moved while this run writes to it") == 1
    assert [row["epoch"] for row in finished.rows] == [1, 2, 3, 4]
    assert len(list((finished.out / "checkpoints").glob("step-*.h5"))) == 3 and (finished.out / "config.toml").exists()
    monkeypatch.undo()
    assert train(2, "--resume", "auto", "--epochs", "5", out=finished.out).rows[-1]["epoch"] == 5


def test_predictions_are_of_the_data_of_the_training(tmp_path):
    save(tmp_path / "d.npz")
    start(tmp_path, "--dataset", "d.npz", *MLP, "--epochs", "1")
    save(tmp_path / "d.npz", *CHANGES["relabel"]())
    status, _, err = run(1, "-m", "psmpi.predict", tmp_path / "run", cwd=tmp_path)
    assert status == 1 and "is not what checkpoint" in err and "other labels of the training samples" in err
    # --dataset names the file with its present contents.
    status, _, err = run(1, "-m", "psmpi.predict", tmp_path / "run", "--dataset", "d.npz", cwd=tmp_path)
    assert status == 0 and "warning" not in err
    save(tmp_path / "large.npz", X * 255)
    status, _, err = run(1, "-m", "psmpi.predict", tmp_path / "run", "--dataset", "large.npz", cwd=tmp_path)
    assert status == 0 and "bring them to one scale" in " ".join(err.split())


@pytest.mark.parametrize("change", ["reorder", "pixel"])
def test_ranks_that_predict_other_data_are_named(tmp_path, monkeypatch, change):
    save(tmp_path / "d.npz")
    start(tmp_path, "--dataset", "d.npz", *MLP, "--epochs", "1")
    save(tmp_path / "stale.npz", *CHANGES[change]())
    opened, original_open = [], data.open_split

    def open_other(name, *arguments, **keywords):
        opened.append(1)
        return original_open(str(tmp_path / "stale.npz") if len(opened) > 1 else name, *arguments, **keywords)

    monkeypatch.setattr("psmpi.data.open_split", open_other)
    options = ("--dataset", "d.npz", "--split", "train")
    status, _, err = run(2, "-m", "psmpi.predict", tmp_path / "run", *options, cwd=tmp_path)
    assert status == 1 and "are not those of rank 0" in " ".join(err.split())


def test_what_is_given_is_taken_though_the_run_had_the_same(train, tmp_path):
    first = train(1, *MLP, "--optimizer", "sgd", "--lr", "0.02", "--weight-decay", "0.3", "--epochs", "1")
    (tmp_path / "c.toml").write_text("[optimization]\nweight_decay = 0.3\n")
    options = ("--optimizer", "adam", "--lr", "0.02", "--config", tmp_path / "c.toml", "--epochs", "2")
    config = read_file(str(train(1, "--resume", first.checkpoint, *options).out / "config.toml"))
    assert (config.optimization.lr, config.optimization.weight_decay) == (0.02, 0.3)
    config = read_file(
        str(train(1, "--resume", first.checkpoint, "--optimizer", "adam", "--epochs", "2").out / "config.toml")
    )
    # Settings of the run's optimizer are not those of another one.
    assert (config.optimization.lr, config.optimization.weight_decay) == (0.001, 0.0)


def test_a_setting_that_is_given_and_not_used_is_refused_though_the_run_had_the_same(train, tmp_path):
    schedule = ("--schedule", "cosine", "--min-lr", "0.0001")
    train(1, *MLP, *schedule, "--epochs", "1", out=tmp_path / "run")
    resume_options = ("--resume", "auto", "--epochs", "2", "--schedule", "step", "--step-size", "1")
    assert "--min-lr" in start(tmp_path, *resume_options, "--min-lr", "0.0001", ok=False)
    assert "schedule is step" in start(tmp_path, *resume_options)


def test_a_run_does_not_go_on_in_the_directory_of_another(train, tmp_path):
    """Older checkpoints in the directory would be mistaken for those of this run."""
    long, short = train(1, *MLP, "--epochs", "3"), train(1, *MLP, "--epochs", "1", "--seed", "5", out=tmp_path / "run")
    before = snapshot(short.out)
    message = start(tmp_path, "--resume", long.checkpoint, "--epochs", "4", ok=False)
    assert "holds a run already, and" in message and "is not of it" in message and snapshot(short.out) == before


def test_texts_of_a_user_s_own_are_put_aside(tmp_path):
    text = "# mine\n[model]\nmodel = 'mlp'\nwidths = [12]\n[run]\nepochs = 1\n"
    (tmp_path / "config.toml").write_text(text)
    output = start(tmp_path, "--config", "config.toml", out=".")
    assert "config.toml was there already, and is config.toml.before now" in output
    assert (tmp_path / "config.toml.before").read_text() == text and rows(tmp_path)


def test_a_start_with_nothing_left_to_do_changes_no_later_one(train, tmp_path):
    save(tmp_path / "d.npz")
    save(tmp_path / "e.npz", *CHANGES["reorder"]())
    start(tmp_path, "--dataset", "d.npz", *MLP, "--epochs", "1")
    assert "nothing left to do" in start(
        tmp_path, "--resume", "auto", "--dataset", "e.npz", "--new-data", "--lr", "0.5"
    )
    assert "note: lr" not in start(tmp_path, "--resume", "auto", "--epochs", "2")


def test_the_checkpoints_folder_is_no_run_directory(train, tmp_path):
    out = train(1, *MLP, "--epochs", "1", out=tmp_path / "run").out
    before = snapshot(out)
    for options in ((), ("--resume", "auto", "--epochs", "2")):
        message = start(tmp_path, *MLP, *options, ok=False, out="run/checkpoints")
        assert "is the folder of a run's checkpoints" in message or "holds a run already" in message
    assert snapshot(out) == before


def test_a_run_s_configuration_starts_a_run_of_its_own(train, tmp_path):
    first = train(1, *MLP, "--epochs", "1")
    resumed = train(1, "--resume", first.checkpoint, "--epochs", "2")
    fresh_run = train(1, "--config", resumed.out / "config.toml", "--seed", "7")
    assert "resumed" not in fresh_run.stdout and [row["epoch"] for row in fresh_run.rows] == [1, 2]


def test_a_waiting_start_does_not_go_on_with_other_settings(train, tmp_path, monkeypatch):
    """The start read its settings before the run that it waited for wrote any."""
    out = train(1, *FEW, "--epochs", "1", out=tmp_path / "run").out
    monkeypatch.setattr("psmpi.training.resume.own_settings", lambda *_: None)
    before = snapshot(out)
    assert "while this one waited: start this one again" in start(tmp_path, "--resume", "auto", ok=False)
    assert snapshot(out) == before


def test_a_file_that_has_moved_is_found_by_its_folder(tmp_path):
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
    save(tmp_path / "one" / "d.npz")
    start(tmp_path, "--dataset", "one/d.npz", *MLP, "--epochs", "1")
    (tmp_path / "one" / "d.npz").rename(tmp_path / "two" / "d.npz")
    start(tmp_path, "--resume", "auto", "--epochs", "2", "--data-dir", "two")
    (tmp_path / "two" / "d.npz").rename(tmp_path / "one" / "d.npz")
    status, _, err = run(1, "-m", "psmpi.predict", tmp_path / "run", "--data-dir", tmp_path / "one", cwd=tmp_path)
    assert status == 0, err


def test_settings_that_nobody_gave_here_are_told_as_the_run_s(train, tmp_path):
    train(3, "--masters", "2", "--epochs", "1", out=tmp_path / "run")
    message = start(tmp_path, "--resume", "auto", "--epochs", "2", ok=False)
    assert "--masters 2" in message and "settings that are not given are those in" in message


def test_test_samples_that_may_have_been_trained_on_are_told(tmp_path):
    save(tmp_path / "d.npz")
    start(tmp_path, "--dataset", "d.npz", *MLP, "--epochs", "1")
    save(tmp_path / "d.npz", *CHANGES["append"]())
    output = start(tmp_path, "--resume", "auto", "--epochs", "2", "--new-data")
    assert "some may be ones that were trained on" in output


def test_checkpoints_that_are_removed_under_a_run_are_told(train, tmp_path, monkeypatch):
    append = Loop._append

    def remove(self, row):
        if row["epoch"] == 3 and self.folder is not None:
            self.writer.finish()
            shutil.rmtree(self.out / "checkpoints")
        append(self, row)

    monkeypatch.setattr(Loop, "_append", remove)
    finished = train(1, *MLP, "--epochs", "4")
    assert finished.stdout.count("was removed while this run writes to") == 1


@pytest.mark.parametrize("option", ["--out", "--resume", "--dataset", "--data-dir", "--config"])
def test_homes_of_nobody_are_named(tmp_path, option):
    more = ("--dataset", "d.npz") if option == "--data-dir" else ()
    status, _, err = run(1, "-m", "psmpi.train", option, "~nobody-of-this-name/x.npz", *more, cwd=tmp_path)
    assert status == 1 and "there is no user of that name" in err and "Traceback" not in err


def test_places_in_the_way_are_named_before_training(tmp_path):
    for name in ("config.toml", "metrics.jsonl"):
        (tmp_path / "run" / name).mkdir(parents=True)
        assert f"{name} is in the way" in start(tmp_path, *MLP, ok=False)
        (tmp_path / "run" / name).rmdir()
    (tmp_path / "run" / "checkpoints").write_text("")
    assert "checkpoints is in the way" in start(tmp_path, *MLP, ok=False)


def test_folders_above_one_that_is_refused_are_removed_too(tmp_path):
    start(tmp_path, "--backend", "cupy", *MLP, ok=False, out="a/b/c")
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_optimizer_does_not_give_its_rate(train, tmp_path):
    first = train(1, *MLP, "--epochs", "1")
    config = read_file(str(first.out / "config.toml"))
    assert config.optimization.lr == 0.001
    usual_rate = train(1, "--config", first.out / "config.toml", "--optimizer", "sgd")
    assert "learning rate 0.1" in usual_rate.stdout
    given_rate = train(1, "--config", first.out / "config.toml", "--optimizer", "sgd", "--lr", "0.001")
    assert read_file(str(given_rate.out / "config.toml")).optimization.lr == 0.001


def test_a_start_with_nothing_left_to_do_writes_nothing(train, tmp_path):
    out = train(1, *MLP, "--epochs", "2", out=tmp_path / "run").out
    before = snapshot(out)
    assert "nothing left to do" in start(tmp_path, "--resume", "auto", "--epochs", "1", "--lr", "5")
    assert snapshot(out) == before
    assert "nothing left to do" in start(tmp_path, "--resume", out, out="other") and not (tmp_path / "other").exists()
