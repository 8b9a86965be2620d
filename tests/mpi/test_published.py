"""The benchmark of the published protocol: its floors, and a complete run on a small data set."""

import json

import pytest
from helpers.datasets import make_cifar
from helpers.runs import run

from psmpi.bench.published import EPOCHS, SETTINGS, read

# Figure labels and lower ends of the bands that `methods/psl.md` derives from the published runs, five seeds.
FLOORS = {
    "mnist-100-nll": {"10": 96.32, "20": 97.53, "41-50": 98.15},
    "mnist-100-psl": {"10": 93.78, "20": 96.94, "41-50": 97.91},
    "mnist-20-psl": {"41-50": 98.42},
    "mnist-20-nll": {"41-50": 98.45},
    "cifar10-100-psl": {"20": 48.34, "41-50": 53.10},
    "cifar10-100-nll": {"20": 51.52, "41-50": 55.80},
    "cifar10-20-psl": {"41-50": 54.75},
    "cifar10-20-nll": {"41-50": 58.05},
}


def test_floors_are_those_of_the_specification():
    for setting in SETTINGS:
        for label, floor in FLOORS[setting.name].items():
            assert setting.figures[label].floor(5) == pytest.approx(floor, abs=0.011)


def test_rows_give_their_figures():
    rows = [{"epoch": epoch, "test_accuracy": epoch / 100} for epoch in range(1, EPOCHS + 1)]
    assert read(rows) == pytest.approx({"10": 10, "20": 20, "41-50": 45.5})
    assert read(rows[:19]) == pytest.approx({"10": 10})
    assert read([]) == {}


def test_losses_over_pairs_have_the_published_factor():
    for setting in SETTINGS:
        words = setting.arguments()
        position = words.index("--kappa") if "--kappa" in words else -1
        assert words[position + 1] == "2" if setting.loss == "psl" else position == -1


def published(folder, *options):
    arguments = ("--settings", "cifar10-20-nll", "--seeds", "2", "--out", folder / "runs", *options)
    return run(1, "-m", "psmpi.bench", "published", *arguments, cwd=folder)


def test_it_trains_every_seed_and_reports(tmp_path):
    make_cifar(tmp_path / "data", counts=(20, 10, 4, 4, 2, 30))
    status, out, err = published(tmp_path, "--data-dir", tmp_path / "data", "--jobs", "2")
    # Noise cannot be learnt: every figure is below its floor.
    assert status == 1, err
    assert out.count("FAILS") == 3
    seeds = [tmp_path / "runs" / f"cifar10-20-nll-{seed}" for seed in (0, 1)]
    first = [(seed / "metrics.jsonl").read_text() for seed in seeds]
    assert [len(rows.splitlines()) for rows in first] == [EPOCHS, EPOCHS]
    assert first[0] != first[1]
    settings = (seeds[0] / "config.toml").read_text()
    for line in ("kappa = 1.0", "clip = 0.0", "init_gain = 1.0", "shuffle = false", 'model = "psnet"', "lr = 0.001"):
        assert line in settings

    status, report, _ = published(tmp_path, "--report")
    assert (status, report) == (1, out[out.index("test accuracy") :])
    assert json.loads(first[1].splitlines()[-1])["epoch"] == EPOCHS


def test_a_run_that_fails_is_reported(tmp_path):
    status, _, err = published(tmp_path, "--data-dir", tmp_path / "nowhere")
    assert status == 1
    assert "cifar10-20-nll-0 ended with exit status 1" in err
    assert "nowhere" in err
    assert "Traceback" not in err
