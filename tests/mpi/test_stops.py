"""Ranks killed, or asked to stop, at random moments: the resumed run ends with the bits of an undisturbed one."""

import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.processes import finish, launch, start
from helpers.runs import Trained

# These tests take minutes: the README's test command and the sweeps leave them out.
pytestmark = [pytest.mark.slow, pytest.mark.repeated]

RANKS = 3
OPTIONS = ("--threads", "1", "--batch-size", "20", "--epochs", "12", "--lr", "0.001", "--checkpoint-every", "25")
ROWS = ("--dataset", "digits:rows", "--model", "lstm")
METHODS = {
    "psl": ("--masters", "2"),
    "owner": ("--placement", "owner"),
    "data_parallel": ("--method", "data_parallel"),
    "bptt": ("--method", "bptt", *ROWS, "--widths", "9", "--unroll", "3", "--future", "synthetic"),
    "local_sgd": ("--method", "local_sgd", "--local-steps", "5"),
    "hogwild": ("--method", "hogwild", "--updates", "cyclades"),
    "dni": ("--method", "dni", "--model", "mlp", "--widths", "40", "40", "--loss", "nll"),
    "layer_parallel": ("--method", "layer_parallel", "--depth", "24", "--warm-start", "both", "--loss", "nll"),
    "wavefront": ("--method", "wavefront", *ROWS, "--widths", "9", "9", "9"),
    "tensor": ("--method", "tensor", "--model", "mlp", "--widths", "40", "40", "--grid", "auto"),
    "spann": ("--method", "spann", "--model", "slabs", "--widths", "40", "40"),
    "next": ("--method", "next", "--agents", "5", "--tracking", "minibatch"),
}
TIMES = range(20)


def descendants(pid):
    """Return the ids of all descendants of a process."""
    parents = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            text = Path(f"/proc/{entry}/stat").read_text()
        except OSError:
            continue
        parents.setdefault(int(text.rpartition(")")[2].split()[1]), []).append(int(entry))
    pids = list(parents.get(pid, []))
    for child in pids:
        pids += parents.get(child, [])
    return pids


def command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def gone(pids, patience=20.0):
    """Return the processes that do not end within `patience` seconds."""
    end = time.monotonic() + patience
    while remaining := [pid for pid in pids if b"psmpi" in command(pid)]:
        if time.monotonic() > end:
            return remaining
        time.sleep(0.05)
    return []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """undisturbed(method): the tensors of a run that nothing stopped, made once."""
    tensors = {}

    def call(method):
        if method not in tensors:
            out = tmp_path_factory.mktemp("whole") / "run"
            status, stdout, err = launch(RANKS, "-m", "psmpi.train", "--out", out, *OPTIONS, *METHODS[method])
            assert status == 0, err
            tensors[method] = Trained(out, stdout).tensors()
        return tensors[method]

    return call


def begin(out, method, rng):
    """Start a run and wait for a random moment of its training; return its process, its ranks and its descendants."""
    process = start(RANKS, "-m", "psmpi.train", "--out", out, *OPTIONS, *METHODS[method])
    end = time.monotonic() + 60
    rows = out / "metrics.jsonl"
    while not (rows.exists() and rows.read_text()):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 1.0))
    started = descendants(process.pid)
    return process, [pid for pid in started if b"psmpi.train" in command(pid) and b"mpi" not in exe(pid)], started


def exe(pid):
    try:
        return os.path.basename(os.readlink(f"/proc/{pid}/exe")).encode()
    except OSError:
        return b""


def goes_on(out, method, expected):
    """Resume the run, compare its tensors with `expected`, and check that no temporary files are left."""
    status, stdout, err = launch(RANKS, "-m", "psmpi.train", "--out", out, "--resume", "auto")
    assert status == 0, err
    tensors = Trained(out, stdout).tensors()
    for name, tensor in expected.items():
        assert np.array_equal(tensor, tensors[name]), name
    assert [path.name for path in (out / "checkpoints").iterdir() if not path.name.endswith(".h5")] == []


@pytest.mark.parametrize("seed", TIMES)
def test_a_killed_rank_ends_the_job_and_the_run_goes_on(tmp_path, undisturbed, seed):
    rng = random.Random(seed)
    method = rng.choice(list(METHODS))
    process, ranks, started = begin(tmp_path / "run", method, rng)
    finished = process.poll() is not None
    if not finished:
        assert len(ranks) == RANKS
        os.kill(rng.choice(ranks), signal.SIGKILL)
    status, _, _ = finish(process, 60)
    assert finished or status != 0
    assert gone(started) == []
    goes_on(tmp_path / "run", method, undisturbed(method))


@pytest.mark.parametrize("seed", TIMES)
def test_a_rank_asked_to_stop_stops_all_and_the_run_goes_on(tmp_path, undisturbed, seed):
    rng = random.Random(100 + seed)
    method = rng.choice(list(METHODS))
    process, ranks, started = begin(tmp_path / "run", method, rng)
    number = rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
    finished = process.poll() is not None
    if not finished:
        assert len(ranks) == RANKS
        os.kill(rng.choice(ranks), number)
    status, stdout, err = finish(process, 60)
    assert status in ((0, 85) if finished or "epoch 12/12" in stdout else (85,)), (number, err)
    assert gone(started) == []
    goes_on(tmp_path / "run", method, undisturbed(method))
