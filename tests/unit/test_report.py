"""Lines of a training: their times, their texts, and the lines at the end."""

import shlex
import sys
from dataclasses import replace

import numpy as np
import pytest

from psmpi import metrics
from psmpi.checkpoint import Progress
from psmpi.command import typed
from psmpi.config import Config
from psmpi.config.terminal import Terminal
from psmpi.output import Screen
from psmpi.training.closing import at_signal, ended, scores, stopped
from psmpi.training.report import LINE, NUMBERS, Report


def config(**terminal):
    plain = Config(terminal=Terminal(**terminal))
    return replace(plain, run=replace(plain.run, epochs=4, out="runs/a b"))


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def progress_lines(capsys, steps, seconds, sums_at=None, **terminal):
    """The lines printed for steps of `seconds` each; sums_at(step) gives the sums over ranks."""
    clock, sums = Clock(), np.zeros(NUMBERS)
    report = Report(Screen(), config(**terminal), 50, sums, lambda: 0.0, clock)
    clock.now += 1000.0
    with report.showing(Progress(step=10), 10 + steps):
        for step in range(11, 11 + steps):
            clock.now += seconds
            if sums_at is not None:
                sums[:] = sums_at(step)
            report.step(Progress(step=step, epoch=step // 100))
    return capsys.readouterr().out.splitlines()


def test_a_line_comes_every_30_seconds_with_rate_and_time_left(capsys):
    lines = progress_lines(capsys, 100, 1.0)
    assert LINE == 30.0
    assert lines == [
        "epoch 1/4  step 40  50 samples/s  1:10 min left",
        "epoch 1/4  step 70  50 samples/s  40 s left",
        "epoch 2/4  step 100  50 samples/s  10 s left",
    ]
    assert progress_lines(capsys, 100, 0.1) == []
    # A step that takes longer is told when it is done.
    assert [line.split("  ")[1] for line in progress_lines(capsys, 2, 3600.0)] == ["step 11", "step 12"]


def test_a_line_has_the_mean_loss_and_the_share_of_all_ranks_time_in_communication(capsys):
    # Two ranks: 3 + 4 s of 10 + 10 s; a loss of 90 over 60 samples.
    (line,) = progress_lines(capsys, 40, 1.0, lambda step: (90.0, 7.0, 20.0, 60.0))
    assert line == "epoch 1/4  step 40  loss 1.5  50 samples/s  10 s left  comm 35 %" and len(line) <= 80


def test_quiet_prints_none(capsys):
    assert progress_lines(capsys, 100, 60.0, quiet=True) == []


def test_an_epoch_is_told_in_80_columns_and_in_more_lines_if_asked_for(capsys):
    row = {
        "epoch": 7, "step": 315, "seconds": 75.2, "train_loss": 1.00951, "test_loss": 2.47261, "test_accuracy": 0.97214,
        "test_top5": 0.99721, "samples_per_second": 9320.4, "bytes_sent": 12_340_000,
    }  # fmt: skip
    for verbose in (False, True):
        report = Report(Screen(), config(verbose=verbose), 50, np.zeros(NUMBERS), lambda: 0.0)
        report.epoch(row, np.array([0.123, 0.579]))
        out = capsys.readouterr().out.splitlines()
        assert out[0] == "epoch 7/4  loss 1.0095  test loss 2.4726  accuracy 97.21 %  top 5 99.72 %"
        assert out[1:] == ["  step 315  1:15 min  9320 samples/s  12.3 MB sent  comm 12-58 %"] * verbose
        assert report.rows(Progress(epoch=6)) == (row,) and report.rows(Progress(epoch=7)) == ()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (12.4, "12 s"), (59.7, "1:00 min"), (185, "3:05 min"), (7385, "2:03:05 h")],
)
def test_seconds_in_few_characters(seconds, text):
    assert metrics.duration(seconds) == text


def rows(key, values):
    return [{"epoch": k + 1, key: value, "bytes_sent": 5_000_000} for k, value in enumerate(values)]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ([], ""),
        (rows("test_accuracy", [0.5, 0.75, 0.7]), "best test accuracy 75.00 % (epoch 2), last 70.00 % (epoch 3)"),
        (rows("test_accuracy", [0.5, 0.75]), "best and last test accuracy 75.00 % (epoch 2)"),
        (rows("test_rmse", [2.0, 1.5, 1.75]), "best test RMSE 1.5 (epoch 2), last 1.75 (epoch 3)"),
        # NaN is not the best.
        (rows("test_rmse", [2.0, float("nan")]), "best test RMSE 2 (epoch 1), last nan (epoch 2)"),
        (rows("test_rmse", [float("nan")]), ""),
    ],
)
def test_the_best_and_the_last_score_are_named_with_their_epochs(given, text):
    assert scores(given) == text


def words(command, all_ranks, options):
    return shlex.join([command, str(all_ranks), *options])


def test_the_end_says_where_things_are_and_what_to_type_next():
    progress = Progress(step=180, epoch=4, seconds=61.0)
    epochs = rows("test_accuracy", [0.5, 0.75, 0.7, 0.7])
    first, summary, *typed = ended(config(), progress, epochs, 0.251, words)
    assert first == "done in 1:01 min: best test accuracy 75.00 % (epoch 2), last 70.00 % (epoch 4)"
    assert summary == "180 steps, 5.0 MB sent, 25 % communication; in runs/a b"
    assert typed == [
        "predict: predict False 'runs/a b'",
        "inspect: inspect False show 'runs/a b'",
        "go on:   train True --resume auto --out 'runs/a b' --epochs 8",
    ]
    assert ended(config(quiet=True), progress, epochs, 0.251, words) == [f"{first}; in runs/a b"]
    # A run cut short by --max-steps goes on with the rest of its epochs.
    short = config()
    short = replace(short, run=replace(short.run, max_steps=90))
    last = ended(short, Progress(step=90, epoch=2), epochs[:2], 0.0, words)[-1]
    assert last == "go on:   train True --resume auto --out 'runs/a b' --max-steps 0"


def test_a_stopped_run_says_by_what_and_how_to_go_on():
    progress = Progress(step=77, epoch=1, rows=tuple(rows("test_accuracy", [0.5])))
    for signal, reason in (("SIGINT", " by SIGINT"), ("", "")):
        assert stopped(config(), progress, signal, words) == [
            f"stopped{reason} after step 77, and saved in runs/a b",
            "best and last test accuracy 50.00 % (epoch 1)",
            "go on:   train True --resume auto --out 'runs/a b'",
        ]
    assert "another signal ends it" in at_signal("out", False, words)
    assert at_signal("out", True, words).endswith("go on:\ntrain True --resume auto --out out")


@pytest.mark.parametrize(
    ("environ", "ranks", "launcher"),
    [({}, 1, ""), ({"PMI_SIZE": "3"}, 3, "mpirun -n 3 "),
     ({"SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "0"}, 3, "srun -n 3 ")],
)  # fmt: skip
def test_a_command_is_typed_as_this_one_was(monkeypatch, environ, ranks, launcher):
    for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["/opt/venv/bin/psmpi"])
    assert typed("train", ["--out", "a b"], ranks) == f"{launcher}psmpi train --out 'a b'"
    monkeypatch.setattr(sys, "argv", ["/src/psmpi/train.py"])
    assert typed("predict", ["a"], 1) == "python -m psmpi.predict a"
