"""Output of a training in a file, on a terminal, under mpirun, and at Ctrl-C."""

import json
import re
import shlex
import subprocess
import sys

import pytest
from helpers.processes import launch, launcher, mpi_environment
from helpers.terminal import CTRL_C, lines, on_terminal

from psmpi.launcher import ends_ranks, process_number
from psmpi.testing import run_program
from psmpi.training import report

TRAIN = [sys.executable, "-m", "psmpi.train", "--threads", "1", "--batch-size", "100", "--lr", "0.01", "--out", "run"]
LONG = ("--epochs", "2000")
SCORES = r"best test accuracy \d+\.\d\d % \(epoch \d+\), last \d+\.\d\d % \(epoch \d+\)"


def under_mpirun(ranks, words):
    if launcher() is None:
        pytest.skip("no mpirun: pip install 'psmpi[mpi]'")
    return [launcher(), "-n", str(ranks), *words] if ranks > 1 else words


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_file_gets_lines_and_no_escape_codes(tmp_path, ranks):
    status, out, err = launch(ranks, *TRAIN[1:], "--epochs", "3", cwd=tmp_path)
    assert status == 0 and "\x1b" not in out + err and "\r" not in out, err
    printed = out.splitlines()
    plural = "s" * (ranks > 1)
    assert printed[0] == f"psmpi: psnet on digits, method psl, on {ranks} rank{plural}"
    assert f"training 45 steps, to epoch 3, on {ranks} rank{plural}; Ctrl-C stops and saves" in printed
    assert "run directory run" in printed
    assert [line[:9] for line in printed if line.startswith("epoch ")] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert max(map(len, printed[2:])) <= 80 + 30 * (ranks > 1), "but for the note that ranks share cores"
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    best = max(range(3), key=lambda k: rows[k]["test_accuracy"])
    (last_line,) = (line for line in printed if line.startswith("done in "))
    assert f"{100 * rows[best]['test_accuracy']:.2f} % (epoch {best + 1})" in last_line
    assert f"{100 * rows[-1]['test_accuracy']:.2f} % " in last_line
    resume_command = "mpirun -n 3 " * (ranks > 1) + "python -m psmpi.train --resume auto --out run --epochs 6"
    assert printed[-3:] == [
        "predict: python -m psmpi.predict run",
        "inspect: python -m psmpi.inspect show run",
        f"go on:   {resume_command}",
    ]


def test_lines_say_where_the_run_is_when_it_is_time(tmp_path, monkeypatch):
    """A line comes after each step here, with sums over ranks of an earlier step."""
    monkeypatch.setattr(report, "LINE", 0.0)
    words = ["--out", "run", "--epochs", "20", "--batch-size", "100", "--lr", "0.01"]
    result = run_program(3, "psmpi.train", words, cwd=tmp_path)
    assert result.status == 0, result.stderr
    progress_lines = [line for line in result.stdout.splitlines() if "samples/s" in line]
    assert len(progress_lines) == 20 * 15
    shape = r"epoch (\d+)/20  step (\d+)(  loss [\d.]+)?  \d+ samples/s  [\d.:]+( s| min| h) left(  comm \d+ %)?"
    matches = [re.fullmatch(shape, line) for line in progress_lines]
    assert all(matches) and [int(match[2]) for match in matches] == list(range(1, 301))
    assert [int(match[1]) for match in matches] == [k // 15 + 1 for k in range(300)]
    assert matches[-1][3] and matches[-1][5] and "  0.0 s left" in progress_lines[-1]
    # Mean losses of an epoch so far are near those of whole epochs.
    rows = [json.loads(line)["train_loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [float(match[3].split()[1]) for match in matches if match[3]]
    assert min(rows) * 0.9 <= min(losses) and max(losses) <= 2 * max(rows)


def test_quiet_prints_one_line_and_verbose_more(tmp_path):
    words = ["--epochs", "2", "--batch-size", "100", "--lr", "0.01", "--out"]
    quiet = run_program(2, "psmpi.train", [*words, "quiet", "--quiet"], cwd=tmp_path)
    assert quiet.status == 0
    assert re.fullmatch(r"done in [\d.]+ s: .* test accuracy .*; in quiet\n", quiet.stdout), quiet.stdout
    plain, verbose = (
        run_program(2, "psmpi.train", [*words, name, *options], cwd=tmp_path).stdout.splitlines()
        for name, options in (("plain", ()), ("more", ("--verbose",)))
    )
    assert len(verbose) > len(plain)
    assert sum(" MB sent  comm " in line for line in verbose) == 2 and not any("  comm " in line for line in plain)
    assert any(line.startswith("memory of rank 0 in MB: ") for line in verbose)
    # --quiet and --verbose hold for one start, not for the run.
    resumed = run_program(1, "psmpi.train", ["--resume", "auto", "--out", "quiet", "--epochs", "3"], cwd=tmp_path)
    assert "epoch 3/3" in resumed.stdout and "quiet" not in resumed.stdout.replace(" quiet", "").replace("quiet/", "")


@pytest.mark.parametrize("options", [("--quiet", "--verbose"), ("--quiet", "--progress", "bar")])
def test_quiet_and_its_opposite_are_refused(tmp_path, options):
    result = run_program(1, "psmpi.train", [*options], cwd=tmp_path)
    assert result.status == 1 and "cannot both be: leave out one of them" in result.stderr


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_ctrl_c_on_a_terminal_saves_and_says_how_to_go_on(tmp_path, ranks):
    """The bar shows although rank 0 writes to a pipe under mpirun, and the printed command resumes the run."""
    words = under_mpirun(ranks, [*TRAIN, *LONG])
    environ = {k: v for k, v in mpi_environment().items() if k != "PYTHONUNBUFFERED"}
    keys = [(rb"epoch +9/2000", CTRL_C, 0.0)]
    status, raw = on_terminal(words, tmp_path, keys=keys, **{**environ, "TERM": "xterm"})
    printed = lines(raw)
    assert status == 85 and b"\x1b[2K" in raw, printed
    assert any(re.search(r"epoch \d+/2000 .*━.* left" + r"  comm \d+ %" * (ranks > 1), line) for line in printed)
    assert (
        sum("the run stops after the next step, and is saved; another signal ends it" in line for line in printed) == 1
    )
    assert re.fullmatch(r"stopped by SIGINT after step \d+, and saved in run", printed[-3])
    assert re.fullmatch(rf"{SCORES}|best and last .*", printed[-2])
    assert printed[-1].startswith("go on:   ") and b"\x1b[?25" not in raw
    step = int(re.search(r"step (\d+)", printed[-3])[1])
    printed_command = shlex.split(printed[-1].removeprefix("go on:   "))
    assert printed_command[: 3 * (ranks > 1)] == (["mpirun", "-n", str(ranks)] if ranks > 1 else [])
    printed_command[printed_command.index("python")] = sys.executable
    command = under_mpirun(ranks, printed_command[printed_command.index(sys.executable) :])
    one_more_step = [*command, "--max-steps", str(step + 1)]
    completed = subprocess.run(one_more_step, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=90)
    assert completed.returncode == 0 and f"step {step}\n" in completed.stdout, completed.stderr


SLOW = """
import sys, time
from psmpi import train
from psmpi.training.loop import Loop

def save(self, best=False):
    print("saving", flush=True)
    time.sleep(60)

Loop._save = save
sys.exit(train.main(sys.argv[1:]))
"""


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    """Half a second after the first is enough, because no launcher is there that may pass on one signal twice."""
    keys = [(b"saving", CTRL_C, 0.1), (b"another signal ends it at once", CTRL_C, 0.5)]
    words = [sys.executable, "-c", SLOW, *TRAIN[3:], *LONG]
    status, raw = on_terminal(words, tmp_path, keys=keys, timeout=30, TERM="xterm")
    assert status == 1 and lines(raw)[-1] == "psmpi: interrupted"


@pytest.mark.parametrize("progress", ["bar", "lines"])
def test_the_bar_can_be_chosen(tmp_path, progress):
    result = run_program(1, "psmpi.train", ["--epochs", "2", "--progress", progress, "--out", "run"], cwd=tmp_path)
    assert result.status == 0 and ("\x1b[2K" in result.stdout.split("run directory")[1]) == (progress == "bar")
    words = [*TRAIN, "--epochs", "4", "--progress", progress, "--resume", "auto"]
    status, raw = on_terminal(words, tmp_path, TERM="xterm")
    assert status == 0 and (b"\x1b[2K" in raw) == (progress == "bar")


SEEN = "from psmpi.launcher import shown_on; print(bool(shown_on(1)), flush=True)"


@pytest.mark.parametrize(
    ("redirected", "found"),
    [
        ("{}", True),
        ("sh -c '{0}; true'", True),
        ("sh -c '{0} | cat'", False),
        ("{} | cat", False),
        ("{} > file; cat file", False),
    ],
)
def test_a_terminal_behind_mpirun_is_found_where_it_shows_what_is_printed(tmp_path, redirected, found):
    if launcher() is None:
        pytest.skip("no mpirun: pip install 'psmpi[mpi]'")
    (tmp_path / "seen.py").write_text(SEEN)
    start, inner = f"{launcher()} -n 2 ", f"{sys.executable} seen.py"
    words = redirected.format(inner)
    command = start + words if words.startswith(("sh", inner)) else words
    status, raw = on_terminal(["sh", "-c", command], tmp_path, **mpi_environment())
    # A rank may write between another rank's word and its end of line.
    assert status == 0 and re.findall(r"True|False", raw.decode()) == [str(found)] * 2


# A launcher that reads what its process prints through a pseudo-terminal, as Open MPI's does.
RELAY = """
import os, pty, subprocess, sys
reader, writer = pty.openpty()
process = subprocess.Popen([sys.executable, "seen.py"], stdout=writer)
os.close(writer)
print(os.read(reader, 1000).decode().strip(), flush=True)
process.wait()
"""


@pytest.mark.parametrize(("redirected", "found"), [("{}", True), ("{} | cat", False), ("{} > file; cat file", False)])
def test_a_terminal_is_found_behind_a_launchers_pseudo_terminal(tmp_path, redirected, found):
    (tmp_path / "seen.py").write_text(SEEN)
    (tmp_path / "relay.py").write_text(RELAY)
    words = ["sh", "-c", redirected.format(f"{sys.executable} relay.py")]
    status, raw = on_terminal(words, tmp_path)
    assert status == 0 and lines(raw) == [str(found)]


def test_open_mpis_launcher_is_known_to_end_its_ranks():
    assert ends_ranks({"OMPI_COMM_WORLD_SIZE": "2"})
    assert not ends_ranks({"PMI_SIZE": "2"}) and not ends_ranks({})
    # The tests were started by no launcher, or by one of another name.
    assert process_number() == "PROCESS-OF-MPIRUN" or process_number().isdigit()
