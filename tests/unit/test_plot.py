"""Curves of runs: what is drawn, and what is said of runs that cannot be."""

import json

import pytest

from psmpi.plot import main


@pytest.fixture
def make_run(tmp_path):
    def make(name, accuracies):
        place = tmp_path / name
        place.mkdir()
        rows = (
            {"epoch": k + 1, "step": 10 * (k + 1), "seconds": 2.0 * k, "bytes_sent": 10**6 * k, "test_accuracy": a,
             "test_loss": 1 - a, "train_loss": 2 - a}
            for k, a in enumerate(accuracies)
        )  # fmt: skip
        (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return place

    return make


def test_runs_of_one_label_are_a_curve_with_its_band(make_run, tmp_path, monkeypatch, capsys):
    from matplotlib.axes import Axes

    drawn, bands = [], []
    plot, fill = Axes.plot, Axes.fill_between
    monkeypatch.setattr(Axes, "plot", lambda self, *a, **k: drawn.append((*a, k["label"])) or plot(self, *a, **k))
    monkeypatch.setattr(Axes, "fill_between", lambda self, *a, **k: bands.append(a) or fill(self, *a, **k))
    first, second = make_run("one", [0.5, 0.75, 0.875]), make_run("two", [0.25, 0.5])
    out = tmp_path / "curves.png"
    assert main([f"adam={first}", f"adam={second}", str(first), "--out", str(out), "--x", "megabytes"]) == 0
    assert drawn == [([0, 1], [37.5, 62.5], "adam"), ([0, 1, 2], [50, 75, 87.5], "one")]
    assert bands == [([0, 1], [25, 50], [50, 75])]
    assert out.read_bytes().startswith(b"\x89PNG") and str(out) in capsys.readouterr().out


def test_what_a_run_has_not_measured_is_named(make_run, tmp_path, capsys):
    assert main([f"small={make_run('one', [0.5])}", "--out", str(tmp_path / "x.png"), "--y", "test_top5"]) == 1
    assert "the runs of small have not measured it: choose one of test_accuracy" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [((), "give run directories"), (("nowhere",), "give a run directory"), (("empty",), "the first epoch is not done")],
)
def test_what_cannot_be_drawn_is_named(make_run, tmp_path, monkeypatch, capsys, words, says):
    make_run("empty", [])
    monkeypatch.chdir(tmp_path)
    assert main([*words, "--out", "x.png"]) == 1
    assert says in capsys.readouterr().err


def test_a_picture_that_cannot_be_written_is_named(make_run, tmp_path, capsys):
    run = make_run("one", [0.5])
    assert main([str(run), "--out", str(tmp_path / "x.nothing")]) == 1
    assert "x.nothing" in capsys.readouterr().err
