"""The measurement of Hogwild's update rates: the report has every way to update, and losses near a single process's."""

import json

import pytest
from helpers.processes import launch

from psmpi.backend import compiled

pytestmark = pytest.mark.skipif(not compiled.level(), reason="no compiled kernels, or none for this processor")

SMALL = (
    "--samples",
    "400",
    "--features",
    "200",
    "--entries",
    "5",
    "--updates",
    "2000",
    "--rounds",
    "2",
    "--epochs",
    "3",
)


def test_updates_are_counted_in_all_ways(tmp_path):
    path = tmp_path / "found.json"
    status, out, err = launch(1, "-m", "psmpi.bench", "hogwild", *SMALL, "--json", path, "--plot", tmp_path / "a.png")
    assert status == 0, err
    report = json.loads(path.read_text())
    ways = ("raw", "atomic", "blocks", "ticket", "mutex", "mpi", "cyclades")
    assert list(report["rates"]) == [f"{way} {workers}" for way in ways for workers in (1, 2)]
    assert all(len(rates) == 2 and min(rates) > 0 for rates in report["rates"].values())
    losses = {name: loss for name, (loss, _) in report["scores"].items()}
    for name in ("atomic 1", "cyclades 1", "cyclades 2"):
        assert losses[name] == losses["raw 1"]
    assert all(loss <= 1.05 * losses["raw 1"] for loss in losses.values())
    assert all(0 <= share < 1 for share in report["lost"].values())
    assert "ticket lock" in out and "lost by plain stores of 2 workers" in out


def test_ratings_are_counted_too(tmp_path):
    path = tmp_path / "found.json"
    options = ("--task", "ratings", *SMALL, "--lr", "0.02", "--json", path)
    status, _, err = launch(1, "-m", "psmpi.bench", "hogwild", *options)
    assert status == 0, err
    scores = json.loads(path.read_text())["scores"]
    assert scores["cyclades 2"] == scores["raw 1"]


@pytest.mark.parametrize(("option", "value"), [("--samples", "0"), ("--entries", "150"), ("--lr", "0")])
def test_sizes_that_cannot_be_are_refused(option, value):
    status, _, err = launch(1, "-m", "psmpi.bench", "hogwild", *SMALL, option, value)
    assert status == 1 and option in err and "Traceback" not in err
