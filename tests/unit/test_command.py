"""The command `psmpi`: its subcommands, its help under several names, its exit status, and its few imports."""

import inspect
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from helpers.processes import launch

import psmpi
from psmpi import command, train
from psmpi.config import Config, command_line, defaults, few_options, from_command_line, from_few_options, given_names
from psmpi.launcher import LAUNCHER_RANKS
from psmpi.methods.local_sgd import Settings as LocalSettings

SCRIPT, PACKAGE, MODULE = "/opt/venv/bin/psmpi", "/opt/psmpi/__main__.py", "/opt/psmpi/train.py"


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """Hide a launcher under which the tests themselves run."""
    for name in LAUNCHER_RANKS:
        monkeypatch.delenv(name, raising=False)


def test_help_has_one_line_a_command(capsys):
    assert command.main(["--help"]) == 0
    out = capsys.readouterr().out
    for name, (_, description) in command.COMMANDS.items():
        assert sum(line.split()[:1] == [name] and line.endswith(description) for line in out.splitlines()) == 1


def test_version_is_that_of_the_package(capsys):
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out == f"psmpi {psmpi.__version__}\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [(["trian"], "unknown command 'trian': did you mean train?"), (["--lr", "1"], "'--lr': choose"), ([], "name a c")],
)
def test_an_unknown_command_names_the_known_ones(words, says, capsys):
    assert command.main(words) == 1
    out, err = capsys.readouterr()
    assert not out and says in err and "train, plan, predict, inspect, plot, doctor, submit, bench" in err


@pytest.mark.parametrize("variable", LAUNCHER_RANKS)
@pytest.mark.parametrize("words", [["--help"], ["trian"]])
def test_only_the_launchers_first_rank_prints(variable, words, monkeypatch, capsys):
    monkeypatch.setenv(variable, "0")
    status = command.main(words)
    assert any(capsys.readouterr())
    monkeypatch.setenv(variable, "2")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert command.main(words) == status
    assert not any(capsys.readouterr())


@pytest.mark.parametrize("status", [0, 1, 3])
def test_a_command_gets_its_words_and_gives_its_status(status, monkeypatch):
    calls = []
    fake = SimpleNamespace(main=lambda words: calls.append(words) or status)
    monkeypatch.setattr(command, "import_module", lambda name: fake)
    assert command.main(["train", "--lr", "1"]) == status and calls == [["--lr", "1"]]


@pytest.mark.parametrize("name", command.COMMANDS)
@pytest.mark.parametrize(
    ("started", "typed"),
    [(SCRIPT, "psmpi {}"), (PACKAGE, "python -m psmpi {}"), (MODULE, "python -m psmpi.{}")],
)
def test_help_says_what_was_typed(name, started, typed, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [started])
    try:
        status = command.main([name, "--help"])
    except SystemExit as end:
        status = end.code
    assert status == 0
    assert f"usage: {typed.format(name)} " in " ".join(capsys.readouterr().out.split())


def test_a_command_is_known_before_anything_large_is_imported():
    large = {"numpy", "mpi4py", "tyro", "h5py", "rich"}
    code = f"import sys; from psmpi.command import main; main(['trian']); print({large} & set(sys.modules))"
    status, out, err = launch(1, "-c", code)
    assert (status, out) == (0, "set()\n"), err


def test_options_are_parsed_without_a_look_into_the_source(monkeypatch):
    def read(target):
        raise AssertionError(f"reads the source of {target}")

    monkeypatch.setattr(inspect, "getsource", read)
    assert train.parse(["--lr", "0.5"]).optimization.lr == 0.5


def test_an_unknown_command_under_mpirun_is_told_once():
    status, out, err = launch(3, "-m", "psmpi", "trian")
    assert status != 0 and (out + err).count("unknown command 'trian'") == 1


def test_train_runs_by_the_command(tmp_path):
    status, out, err = launch(2, "-m", "psmpi", "train", "--max-steps", "3", "--out", tmp_path / "run")
    assert status == 0 and "model psnet" in out and (tmp_path / "run" / "config.toml").exists(), err


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--epochs=3", "--batch_size", "7", "--colocate", "--no-batch-norm", "--widths", "3", "4"],
        ["--method", "local_sgd", "--local-steps", "5", "--loss", "nll", "--optimizer", "momentum", "--lr", "1e-3"],
        ["--no-cuda-graphs", "--clip", "0", "--out", "-", "--epochs", "None", "--method", "dfa"],
    ],
    ids=" ".join,
)
def test_a_parser_of_the_named_options_reads_what_the_parser_of_all_reads(words):
    start = defaults([])
    start = replace(start, model=replace(start.model, layers=({"type": "flatten"},))).changed(
        LocalSettings, outer_lr=0.5
    )
    every = from_command_line(command.parsed(command_line(start), words, "train"))
    few = command.parsed(few_options(start, given_names(words, file=False)), words, "train", quiet=True)
    assert from_few_options(few, start) == command.training_options(start, words) == every
    assert (every != start) == bool(words)


@pytest.mark.parametrize(
    "words",
    [["--epochs", "many"], ["--loss", "nil"], ["--method", "psll"], ["--epoch", "3"], ["--layers", "1"]],
    ids=str,
)
def test_a_wrong_option_has_the_message_of_the_parser_of_all(words, capsys):
    with pytest.raises(SystemExit):
        command.parsed(command_line(Config()), words, "train")
    expected = capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.training_options(Config(), words)
    assert expected and capsys.readouterr().err.startswith(expected)
