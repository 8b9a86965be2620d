"""The recorded figures: their file, the page made of it, pages that name them, and one figure made again."""

import inspect
import re
import shlex
from dataclasses import fields, replace

import pytest
from helpers.paths import ROOT
from helpers.runs import run

from psmpi.bench import recorded, remake
from psmpi.bench.figures import figures
from psmpi.config import Config, given_names
from psmpi.config.unknown import tables_of
from psmpi.errors import UserError

KNOWN = recorded.load(recorded.FILE)
TRAINING = {field.name for table in tables_of(Config()).values() for field in fields(table)} | {"config", "resume"}
# Commands of psmpi.bench that take the options of training too.
TRAINS = ("memory", "optimizer", "recorder", "scale", "step")


def options_of(words):
    """Return the names of the options of a psmpi command."""
    if words[0] == "train":
        return TRAINING
    if words[0] == "plan":
        from psmpi.plan import plan

        return TRAINING | set(inspect.signature(plan).parameters)
    if words[:2] == ["inspect", "sparsify"]:
        from psmpi.inspect.sparsify import sparsify

        return set(inspect.signature(sparsify).parameters)
    assert words[0] == "bench", words
    module = __import__(f"psmpi.bench.{words[1]}", fromlist=[words[1]])
    own = set(inspect.signature(getattr(module, words[1])).parameters)
    return own | (TRAINING if words[1] in TRAINS else set())


def test_every_command_has_options_that_exist():
    for figure in KNOWN.figures:
        for words in remake.programs(figure.command):
            if words[:2] == ["mpirun", "-n"]:
                words = words[3:]
            if words[0] == "psmpi":
                known = options_of(words[1:])
                used = {name.removeprefix("no_") for name in given_names(words[1:], file=False)}
                assert used - known == set(), figure.id
            else:
                assert words[0] in ("python", "chrt", "/usr/bin/python3"), figure.id


def test_files_that_commands_name_exist():
    for figure in KNOWN.figures:
        for word in shlex.split(figure.command):
            if word.startswith(("tests/", "examples/")):
                assert (ROOT / word).is_file(), figure.id


def test_pages_exist():
    pages = {figure.page for figure in KNOWN.figures}
    existing = {page for page in pages if (ROOT / ("" if page == "README.md" else "docs") / page).is_file()}
    assert pages - existing == set()


def test_the_page_of_figures_is_current():
    """If this fails, run psmpi bench figures --write docs/figures.md."""
    assert (ROOT / "docs" / "figures.md").read_text(encoding="utf-8") == recorded.page(KNOWN)


def test_the_page_of_published_figures_names_figures_that_exist():
    ids, named, last = {figure.id for figure in KNOWN.figures}, set(), ""
    for line in (ROOT / "docs" / "published.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        last = cells[-1] if line.startswith("|") and last == "" else last if line.startswith("|") else ""
        if last == "command":
            named |= set(re.findall(r"`([^`]+)`", cells[-1]))
    assert len(named) > 40 and named - ids == set()


def test_the_file_is_as_the_command_writes_it(tmp_path):
    file = tmp_path / "figures.toml"
    file.write_text(recorded.FILE.read_text(encoding="utf-8"), encoding="utf-8")
    recorded.save(file, KNOWN)
    assert file.read_text(encoding="utf-8") == recorded.FILE.read_text(encoding="utf-8")


@pytest.fixture
def small(tmp_path):
    """A file with two figures of the first epoch on the embedded digits: as recorded, and with an accuracy 5 points
    lower."""
    first_epoch = next(figure for figure in KNOWN.figures if figure.id == "digits-first-epoch")
    low = replace(first_epoch, id="low", value=(first_epoch.value[0] - 5, first_epoch.value[1]))
    file = tmp_path / "figures.toml"
    recorded.save(file, replace(KNOWN, figures=(first_epoch, low)))
    return file


def test_a_figure_is_made_again_and_recorded(small, capsys):
    assert figures(file=str(small), record=True) == 1
    out = capsys.readouterr().out
    assert "digits-first-epoch: held" in out and "low: MOVED" in out and "1 of 2 figures held" in out
    first, low = recorded.load(small).figures
    assert first.value == low.value == pytest.approx((54.32, 95.26), abs=0.3)
    assert first.seconds > 0 and recorded.load(small).machines[first.machine] == remake.machine()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('id = "low"', 'id = "digits-first-epoch"', "another figure's too"),
        ('unit = "%"', 'unit = "m"', "unit 'm'"),
        ("quick = true", "quik = true", "did you mean quick?"),
        ('tolerance = "digits"', 'tolerance = "digit"', "no tolerance has the name 'digit'"),
        ('read = ["test_accuracy", "test_top5"]', 'read = ["test_accuracy"]', "as many numbers"),
    ],
)
def test_mistakes_in_the_file_are_named(small, old, new, says):
    small.write_text(small.read_text().replace(old, new))
    with pytest.raises(UserError, match=re.escape(says)):
        recorded.load(small)


def test_figures_without_their_data_are_left_out(tmp_path):
    status, out, err = run(
        1, "-m", "psmpi.bench", "figures", "--only", "mnist-psl-first-0", "--data-dir", tmp_path, cwd=tmp_path
    )
    assert status == 0 and "mnist-psl-first-0: left out, mnist is not in --data-dir" in out, err


def test_a_command_that_fails_is_told(small, capsys):
    small.write_text(small.read_text().replace("--epochs 1", "--epochs none"))
    assert figures(only=("low",), file=str(small)) == 1
    out = capsys.readouterr().out
    assert "low: FAILED" in out and "--epochs" in out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--only", "digits-defauts"), "did you mean digits-defaults?"),
        (("--page", "results"), "choose one of"),
        (("--limit", "0"), "--limit 0"),
        (("--file", "nowhere.toml"), "nowhere.toml"),
    ],
)
def test_mistakes_of_the_command_are_named(tmp_path, options, says):
    status, _, err = run(1, "-m", "psmpi.bench", "figures", *options, cwd=tmp_path)
    assert status == 1 and says in err and "Traceback" not in err
