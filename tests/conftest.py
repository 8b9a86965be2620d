"""Helpers shared by the tests: programs under mpirun, in subprocesses with timeouts, and small data sets."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

HERE = Path(__file__).parent


def launcher():
    """The mpirun beside this Python, else the one on the path."""
    beside = Path(sys.executable).with_name("mpirun")
    return str(beside) if beside.exists() else shutil.which("mpirun")


def mpi_environment():
    return {
        **os.environ,
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "PYTHONUNBUFFERED": "1",
    }


def start(ranks, *arguments, cwd=None, **options):
    """A process group that runs Python with `arguments`, under mpirun where ranks > 1."""
    command = [sys.executable, *map(str, arguments)]
    if ranks > 1:
        found = launcher()
        if found is None:
            pytest.skip("no mpirun: pip install 'psmpi[mpi]'")
        command = [found, "-n", str(ranks), *command]
    return subprocess.Popen(
        command, cwd=cwd, env=mpi_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, stdin=subprocess.DEVNULL, **options,
    )  # fmt: skip


def finish(process, timeout):
    """Its (status, stdout, stderr); ends the group it started, and fails the test, where it takes longer."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"no end within {timeout} s\n{out}\n{err}")
    return process.returncode, out, err


def run(ranks, *arguments, timeout=120, cwd=None):
    return finish(start(ranks, *arguments, cwd=cwd), timeout)


class Trained:
    """A finished run directory."""

    def __init__(self, out, stdout):
        self.out, self.stdout = out, stdout
        self.checkpoint = max((out / "checkpoints").glob("step-*.h5"))
        self.rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    def tensors(self):
        """Weights, optimizer vectors and tables by name."""
        found = {}

        def keep(name, item):
            if isinstance(item, h5py.Dataset) and name.startswith(("weights/", "optimizer/", "elements/", "rank/")):
                found[name] = item[...]

        with h5py.File(self.checkpoint) as file:
            file.visititems(keep)
        return found


@pytest.fixture
def train(tmp_path):
    """train(ranks, *options) runs psmpi.train to its end and returns what it left."""
    count = iter(range(1000))

    def call(ranks, *options, out=None, timeout=120):
        out = out or tmp_path / f"run{next(count)}"
        status, stdout, stderr = run(ranks, "-m", "psmpi.train", "--out", out, *options, timeout=timeout, cwd=tmp_path)
        assert status == 0, stderr + stdout
        return Trained(out, stdout)

    return call


def distance(first, second):
    """The largest relative distance between tensors of the same name."""
    assert first.keys() == second.keys()
    return max(float(np.linalg.norm(first[k] - second[k])) / max(1e-300, np.linalg.norm(first[k])) for k in first)
