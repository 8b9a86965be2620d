"""Curves of runs: drawn lines and bands, and errors about runs that cannot be drawn."""

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


@pytest.fixture
def drawn(monkeypatch):
    """A function that returns the axes of the last saved figure."""
    from matplotlib.figure import Figure

    saved, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: saved.append(self) or savefig(self, *a, **k))
    return lambda: saved[-1].axes[0]


def test_one_epoch_is_a_point_that_is_seen(make_run, tmp_path, drawn):
    runs = [f"adam={make_run(name, [value])}" for name, value in (("a", 0.5), ("b", 0.75))]
    assert main([*runs, str(make_run("c", [0.25, 0.5])), "--out", str(tmp_path / "x.png")]) == 0
    point, line = drawn().lines
    assert (point.get_marker(), line.get_marker()) == ("o", "None")
    # The bar spans the lowest to the highest of several runs.
    assert drawn().collections[0].get_segments()[0].tolist() == [[1, 50], [1, 75]]


@pytest.mark.parametrize(
    ("accuracies", "words", "says"),
    [
        ([float("nan")], (), "nothing to draw of one: none of its test_accuracy is finite"),
        ([float("inf"), float("nan")], ("--y", "test_loss"), "none of its test_loss is finite"),
        ([0.5, 0.6], ("--low", "88"), "all of its test_accuracy lies from 50 to 60: change --low and --high"),
        ([0.5, 0.6], ("--low", "20", "--high", "20"), "--low 20 --high 20: expected a number and one above it"),
    ],
)
def test_an_empty_picture_is_refused(make_run, tmp_path, capsys, accuracies, words, says):
    assert main([str(make_run("one", accuracies)), "--out", str(tmp_path / "x.png"), *words]) == 1
    assert says in capsys.readouterr().err and not (tmp_path / "x.png").exists()


def test_points_without_neighbours_are_seen(make_run, tmp_path, drawn):
    run = make_run("one", [0.5, float("nan"), 0.6, float("nan"), 0.7, 0.8])
    assert main([str(run), "--out", str(tmp_path / "x.png")]) == 0
    (line,) = drawn().lines
    assert line.get_marker() == "o" and {0, 2} <= set(line.get_markevery()) and not {4, 5} & set(line.get_markevery())


@pytest.mark.parametrize("label", ["_mine", "a$b_$c", "$x^2$", "r\udcff"])
def test_labels_and_titles_are_drawn_as_they_are(make_run, tmp_path, drawn, label):
    run = make_run("one", [0.5, 0.6])
    assert main([f"{label}={run}", "--out", str(tmp_path / "x.png"), "--title", label]) == 0
    (text,) = drawn().get_legend().get_texts()
    # A byte that is not UTF-8 cannot be drawn.
    expected = label.replace("\udcff", "\ufffd")
    assert (text.get_text(), drawn().get_title()) == (expected, expected)


def test_rows_without_what_goes_along_are_named(make_run, tmp_path, capsys):
    run = make_run("one", [0.5])
    (run / "metrics.jsonl").write_text('{"epoch": 1, "test_accuracy": 0.5}\n')
    assert main([str(run), "--out", str(tmp_path / "x.png"), "--x", "megabytes"]) == 1
    assert "--x bytes_sent: the runs of one have not measured it" in capsys.readouterr().err


def test_a_picture_needs_an_ending(make_run, tmp_path, capsys):
    assert main([str(make_run("one", [0.5])), "--out", str(tmp_path / "x")]) == 1
    assert "expected a name that ends in .png" in capsys.readouterr().err and not [*tmp_path.glob("x*")]


def test_a_run_whose_name_has_an_equals_sign_is_found(make_run, tmp_path, drawn):
    run = make_run("lr=0.1", [0.5, 0.6])
    assert main([str(run), f"a={run}", "--out", str(tmp_path / "x.png")]) == 0
    assert [text.get_text() for text in drawn().get_legend().get_texts()] == ["lr=0.1", "a"]
