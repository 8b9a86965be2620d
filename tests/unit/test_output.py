"""Printed output: full disks, closed pipes, encodings without Unicode, terminals and files."""

import errno
import io
import os
import shutil
import subprocess
import sys

import pytest
from helpers.processes import without_note
from helpers.terminal import on_terminal

from psmpi import command
from psmpi.checkpoint import read_contents
from psmpi.config import from_toml
from psmpi.errors import UserError
from psmpi.output import CLOSED, HELP_WIDTH, ClosedError, Screen, Stream, complain, finish, prepared, styled, tell
from psmpi.testing.program import TERMINAL, run_program

GOES_ON = "training goes on"


def unread():
    """The writing end of a pipe whose reader is closed."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def full():
    """A file on a full disk."""
    return open("/dev/full", "w")


class Filling(io.StringIO):
    """A file on a disk that is full for the first `failures` writes."""

    def __init__(self, failures):
        super().__init__()
        self.failures = failures

    def write(self, text):
        self.failures -= 1
        if self.failures >= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)


@pytest.mark.parametrize(("sink", "why"), [(unread, "Broken pipe"), (full, "No space left on device")])
def test_what_goes_on_says_once_why_its_lines_are_lost(sink, why, monkeypatch, capsys):
    file = sink()
    monkeypatch.setattr(sys, "stdout", file)
    screen = Screen(goes_on=GOES_ON)
    for _ in range(3):
        screen.tell("epoch")
        with screen.bar() as bar:
            bar.update(bar.add_task("", total=2), completed=1)
    assert finish(0) == 0
    file.close()
    assert capsys.readouterr().err == f"psmpi: warning: standard output: {why}; lines are lost, {GOES_ON}\n"


def test_lines_come_again_when_the_disk_has_room(monkeypatch, capsys):
    file = Filling(2)
    monkeypatch.setattr(sys, "stdout", file)
    screen = Screen(goes_on=GOES_ON)
    for k in range(4):
        screen.tell(f"line {k}")
    assert file.getvalue() == "line 2\nline 3\n" and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("show", [tell, lambda text: Screen().tell(text), lambda text: Screen().print(text)])
def test_other_commands_end_where_nobody_reads(show, monkeypatch):
    with unread() as file:
        monkeypatch.setattr(sys, "stdout", file)
        with pytest.raises(ClosedError):
            show("text")
    with full() as file:
        monkeypatch.setattr(sys, "stdout", file)
        with pytest.raises(UserError, match="standard output: No space left"):
            show("text")
        file = Stream(file)
        # Text in the buffer causes no second error at the end of the program.
        with pytest.raises(UserError):
            file.flush()
        assert finish(0) == 1
    monkeypatch.undo()


def test_nobody_left_to_complain_to_is_no_error(monkeypatch):
    for sink in (unread, full):
        with sink() as file:
            monkeypatch.setattr(sys, "stderr", file)
            complain("text")
            assert finish(0) == 0


TRAIN = [sys.executable, "-m", "psmpi.train", "--epochs", "2", "--batch-size", "500", "--threads", "1", "--out", "run"]


@pytest.mark.parametrize("sink", [full, *(pytest.param(sink, marks=pytest.mark.slow) for sink in (unread, None))])
def test_training_outlives_its_standard_output(sink, tmp_path):
    """Standard output is a pipe without a reader, a full disk, or closed together with standard error."""
    command = TRAIN if sink else ["sh", "-c", '"$@" >&- 2>&- <&-', "sh", *TRAIN]
    with sink() if sink else open(os.devnull) as file:
        process = subprocess.run(
            command, stdout=file if sink else None, stderr=subprocess.PIPE, text=True, cwd=tmp_path
        )
        assert process.returncode == 0 and without_note(process.stderr).count("\n") == bool(sink), process.stderr
        if sink is full:
            # The log of a job takes both streams.
            process = subprocess.run([*TRAIN, "--resume", "auto"], stdout=file, stderr=file, cwd=tmp_path)
            assert process.returncode == 0
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 2
    words = ["inspect", "verify", str(tmp_path / "run")]
    assert command_status(words) == (0, "")
    for words in (["inspect", "show", "run"], ["predict", "run"], ["--version"], ["plot", "run", "--out", "x.png"]):
        with unread() as file:
            command = [sys.executable, "-m", "psmpi", *words]
            process = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
        assert (process.returncode, without_note(process.stderr)) == (CLOSED, ""), words
        if sink:
            break


def command_status(words):
    """Exit status and standard error of a command."""
    process = subprocess.run([sys.executable, "-m", "psmpi", *words], capture_output=True, text=True)
    return process.returncode, without_note(process.stderr)


@pytest.fixture
def ascii_stdout(monkeypatch):
    """ascii_stdout() encodes standard output as the locale C does, and returns a function that returns its bytes."""

    def make():
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii", write_through=True))
        monkeypatch.setattr(sys, "argv", ["/opt/venv/bin/psmpi"])
        return raw.getvalue

    return make


HELP = ["", "train", "predict", "inspect", "plot", "bench"]
for group, names in (
    ("inspect", "show list stats diff verify export average cut join prune"),
    ("bench", "checkpoint compute kernels memory network optimizer published"),
):
    HELP += [f"{group} {name}" for name in names.split()]


@pytest.mark.parametrize("words", HELP)
def test_help_is_ascii_where_nothing_else_can_be_shown(words, ascii_stdout):
    printed = ascii_stdout()
    assert command.main([*words.split(), "--help"]) == 0
    out = printed().decode("ascii")
    assert "usage:" in out and "?" not in out and "\\" not in out


def test_tables_are_ascii_where_nothing_else_can_be_shown(ascii_stdout, train, tmp_path):
    run = train(2, "--max-steps", "2", "--epochs", "1").out
    checkpoint = str(next((run / "checkpoints").iterdir()))
    part, out = str(tmp_path / "part.h5"), str(tmp_path / "x.npz")
    printed = ascii_stdout()
    for words in (
        ["inspect", "show", str(run)], ["inspect", "list", str(run)], ["inspect", "stats", str(run)],
        ["inspect", "diff", str(run), checkpoint], ["inspect", "verify", str(run)],
        ["inspect", "export", str(run), "--out", out], ["inspect", "cut", str(run), "--classes", "1", "--out", part],
        ["predict", str(run)], ["plot", str(run), "--out", str(tmp_path / "x.png")],
    ):  # fmt: skip
        assert command.main(words) == 0, words
    out = printed().decode("ascii")
    assert "?" not in out and "\\" not in out and "+---" in out and "@" in out


def test_names_that_an_encoding_lacks_are_printed_as_they_can_be(ascii_stdout):
    printed = ascii_stdout()
    with prepared():
        print("• Σ naïve \udcff")
    assert printed() == b"- \\u03a3 na\\xefve \xff\n"


@pytest.mark.parametrize(
    ("name", "kept"),
    [("läufe", "läufe"), ("l\udcc3\udca4ufe", "läufe"), ("r\udcff", r"r\u0000ff"), ("[", "[")],
)
def test_run_directories_of_any_name_can_be_trained_in(name, kept, train, tmp_path):
    """Names are in UTF-8, undecoded in the locale C, in no encoding, or like rich's markup."""
    name, kept = (f"{part}/b]" if part == "[" else part for part in (name, kept))
    training = train(1, "--max-steps", "1", "--data-dir", tmp_path / name, out=tmp_path / name)
    config = (training.out / "config.toml").read_bytes().decode()
    assert f'{tmp_path / kept}"' in config
    named = tmp_path / ("läufe" if name.startswith("l") else name)
    assert from_toml(read_contents(training.checkpoint).config, "checkpoint").data.data_dir == str(named)


@pytest.mark.parametrize(
    ("environ", "on_terminal", "in_file"),
    [
        ({"TERM": "xterm"}, True, False),
        ({}, False, False),
        ({"TERM": "dumb"}, False, False),
        ({"TERM": "xterm", "OMPI_COMM_WORLD_SIZE": "1"}, False, False),
        ({"TERM": "xterm", "PMI_SIZE": "4"}, False, False),
        ({"TERM": "xterm", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, False, False),
        # The shell of an interactive job.
        ({"TERM": "xterm", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, True, False),
        ({"TERM": "xterm", "OMPI_COMM_WORLD_SIZE": "4", "FORCE_COLOR": "1"}, True, True),
        ({"TERM": "dumb", "FORCE_COLOR": "1"}, False, False),
    ],
)
def test_colours_are_for_terminals_that_a_person_reads(environ, on_terminal, in_file):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    assert styled(Terminal(), environ) is on_terminal
    assert styled(io.StringIO(), environ) is in_file


def shown_on_terminal(words, cwd, **environ):
    """Run a command on a pseudo-terminal; return its output."""
    status, output = on_terminal(words, cwd, **environ)
    assert status == 0, output
    return output


def test_a_launchers_terminal_gets_no_escape_codes(tmp_path):
    """Open MPI gives its ranks a terminal, and their output may end in a file."""
    assert b"\x1b[" in shown_on_terminal([*TRAIN, "--max-steps", "1"], tmp_path, TERM="xterm")
    # MPICH does not start under Open MPI's launcher unless it is told not to look for it.
    one_rank = {"TERM": "xterm", "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "MPIR_CVAR_PMI_VERSION": "1"}
    assert b"\x1b" not in shown_on_terminal([*TRAIN, "--resume", "auto"], tmp_path, **one_rank)
    assert b"\x1b" not in shown_on_terminal([*TRAIN[:3], "--help"], tmp_path, **one_rank)
    assert b"\x1b" not in shown_on_terminal([*TRAIN[:3], "--help"], tmp_path, TERM="xterm", NO_COLOR="1")


@pytest.mark.parametrize("columns", ["1", *(pytest.param(c, marks=pytest.mark.slow) for c in ("20", "0")), "x"])
def test_a_terminal_of_few_columns_still_shows_the_table(columns, tmp_path):
    out = shown_on_terminal([*TRAIN, "--max-steps", "1"], tmp_path, TERM="xterm", COLUMNS=columns, NO_COLOR="1")
    assert b"rank" in out and b"epoch 1/2" in out


@pytest.mark.parametrize("module", ["train", "predict", "inspect", "inspect show", "plot", "bench", "bench compute"])
def test_help_is_as_wide_on_a_terminal_of_few_columns(module, monkeypatch):
    """Lines have HELP_WIDTH columns at least, so that no word is broken."""
    original, (name, *words) = shutil.get_terminal_size, module.split()
    help_text = ""
    for columns in (str(HELP_WIDTH), "20", "1"):
        monkeypatch.setitem(TERMINAL, "COLUMNS", columns)
        process = run_program(1, f"psmpi.{name}", [*words, "--help"])
        help_text = help_text or process.stdout
        assert process.status == 0 and process.stdout == help_text and "--help " in help_text
    assert shutil.get_terminal_size is original
    monkeypatch.setitem(TERMINAL, "COLUMNS", "100")
    assert max(map(len, run_program(1, "psmpi.train", ["--help"]).stdout.splitlines())) > HELP_WIDTH


def test_what_is_wrong_with_an_option_is_said_in_whole_words_on_a_terminal_of_few_columns(monkeypatch):
    monkeypatch.setitem(TERMINAL, "COLUMNS", "20")
    process = run_program(1, "psmpi.train", ["--learning-rate", "1"])
    assert process.status == 1 and "Unrecognized options" in process.stderr
