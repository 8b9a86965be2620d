"""Help texts: two levels, options in groups, a line for each choice, lines within the terminal."""

import re
import subprocess
import sys
from dataclasses import dataclass, fields
from typing import Literal

import pytest

from psmpi import command
from psmpi.config import Config, kinds_of_settings, option
from psmpi.config.help import COLUMN, WIDEST, lines_of, training_page
from psmpi.config.options import settings_options
from psmpi.config.tasks import DESCRIBED, OF_METHODS, TASKS
from psmpi.config.unknown import tables_of
from psmpi.launcher import LAUNCHER_RANKS
from psmpi.registry import all_methods

COMMANDS = ["train", "plan", "predict", "plot", "doctor", "submit", "inspect", "bench"]
INSPECT = "show stats diff verify export average cut join prune sparsify flight list"
BENCH = (
    "characters checkpoint comm compute decoupled head hogwild kernels layers links memory network optimizer partition "
    "predict private published recorder recurrent scale sparse start step tensor transformer trunk wavefront"
)
ALL = [
    *COMMANDS, *(f"inspect {one}" for one in INSPECT.split()), *(f"bench {one}" for one in BENCH.split()),
    "train --help-all", "plan --help-all", "bench step --help-all",
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """Hide a launcher under which the tests themselves run."""
    for name in LAUNCHER_RANKS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["/opt/venv/bin/psmpi"])


@pytest.fixture
def shown(capsys):
    """A function that returns the help that a command line prints."""

    def show(words: str) -> str:
        words = words if "--help" in words else f"{words} --help"
        try:
            status = command.main(words.split())
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        assert (status, err) == (0, "")
        return out

    return show


def lines_with(text: str, name: str) -> list[str]:
    """The lines of a help text that begin with an option."""
    return [line for line in text.splitlines() if re.match(rf"  (-\w, )?{option(name)}(,| |$)", line)]


@pytest.mark.parametrize("words", ALL)
def test_lines_are_within_80_columns_and_every_option_has_a_text(words, shown):
    out = shown(words)
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert not re.search(r"\(default: ?(|None|False|'')\)", out)
    for line, next_line in zip(lines, [*lines[1:], ""], strict=True):
        if re.match(r"  --\w", line):
            # The text is beside the option, or below it.
            text = line[COLUMN:] if line[COLUMN:] and line[COLUMN - 1] == " " else next_line[COLUMN:]
            assert re.match(r"[A-Z0-9]", text), line


def test_the_short_help_is_short(shown):
    assert len(shown("train").splitlines()) < 110


def test_a_basic_option_is_in_both_helps(shown):
    short, long = shown("train"), shown("train --help-all")
    for name in [name for task in TASKS for name in task.basic]:
        assert len(lines_with(short, name)) == len(lines_with(long, name)) == 1, name


def test_every_option_is_in_the_long_help_once(shown):
    out = shown("train --help-all")
    known = [
        setting.name for table in tables_of(Config()).values() for setting in fields(table) if setting.name != "layers"
    ]
    for name in (*known, "config", "help", "help_all"):
        assert len(lines_with(out, name)) == 1, name
    assert f"all {len(known) + 3} options" in " ".join(shown("train").split())


def test_an_option_of_every_method_is_in_the_short_help_of_that_method(shown):
    for method, kind in all_methods().items():
        out = shown(f"train --method {method}")
        for settings in kind.settings:
            for setting in fields(settings):
                assert len(lines_with(out, setting.name)) == 1, (method, setting.name)
    ist_options = {setting.name for kind in all_methods()["ist"].settings for setting in fields(kind)}
    out = shown("train --method ist")
    assert not any(lines_with(out, name) for name in set(OF_METHODS) - ist_options)


def test_a_method_of_a_file_has_its_options_in_the_short_help(shown, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[parallel]\nmethod = "ist"\n[ist]\nsubnet_seed = 7\n')
    assert "(default: 7)" in lines_with(shown(f"train --config {path} --help"), "subnet_seed")[0]


@pytest.mark.parametrize("table", tables_of(Config()))
def test_every_choice_has_a_line(table):
    section = tables_of(Config())[table]
    for name, setting in settings_options(type(section), section).items():
        assert setting.text, name
        if setting.only or name == "method":
            assert setting.choices and all(setting.choices.values()), name
    if table in kinds_of_settings():
        return
    for name in set(DESCRIBED) & {setting.name for setting in fields(section)}:
        # The short help too has each choice on one line of 80 columns.
        assert all(len(text) <= 56 for text in settings_options(type(section))[name].choices.values())


def test_every_choice_of_a_setting_is_shown_beside_its_text(shown):
    lines = [" ".join(line.split()) for line in shown("train --help-all").splitlines()]
    for section in tables_of(Config()).values():
        for setting in settings_options(type(section), section).values():
            for choice, text in setting.choices.items():
                start = f"{choice} {' '.join(text.split()[:2])}"
                assert any(line.startswith(start) for line in lines), start


def test_defaults_are_those_of_the_file(shown, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[run]\nseed = 9\n[optimization]\nlr = 0.25\n")
    out = shown(f"train --config {path} --help")
    assert "(default: 9)" in lines_with(out, "seed")[0] and "(default: 0.25)" in " ".join(out.split())


def test_a_pipe_gets_100_columns_at_most():
    for columns, widest in (("200", WIDEST), ("90", 90)):
        process = subprocess.run(
            [sys.executable, "-m", "psmpi", "train", "--help-all"],
            capture_output=True, text=True, env={**ENVIRONMENT, "COLUMNS": columns}, check=True,
        )  # fmt: skip
        assert widest - 12 < max(map(len, process.stdout.splitlines())) <= widest
        assert "\x1b" not in process.stdout


ENVIRONMENT = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)}


def test_colours_change_no_line():
    page = training_page("psmpi train", config=Config(), long=True)
    plain = list(lines_of(page, 80))
    coloured = list(lines_of(page, 80, {"title": "\x1b[1m", "option": "\x1b[36m"}))
    assert coloured != plain and [re.sub("\x1b\\[\\d*m", "", line) for line in coloured] == plain


def test_help_starts_no_mpi():
    code = (
        "import sys; from psmpi import command; status = command.main(['train', '--help'])\n"
        "assert status == 0 and 'mpi4py' not in sys.modules"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert process.returncode == 0 and "--dataset" in process.stdout, process.stderr


@dataclass(frozen=True)
class Example:
    """Settings of an example."""

    kind: Literal["near", "far"] = "near"
    """Distance of the other one. It counts in steps.

    near: one step, or two
        in all
    far: more steps
    """
    silent: bool = True
    """Say nothing."""


def test_a_docstring_is_a_text_and_choices():
    options = settings_options(Example)
    assert options["kind"].text == "Distance of the other one. It counts in steps."
    assert options["kind"].choices == {"near": "one step, or two in all", "far": "more steps"}
    assert options["kind"].summary == "Distance of the other one." and options["kind"].default_text == "near"
    assert options["silent"].words == "--silent, --no-silent" and options["silent"].default_text == "--silent"
