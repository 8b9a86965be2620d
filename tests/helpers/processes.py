"""Run programs in separate processes, under mpirun if there are several ranks, with timeouts."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# psmpi's note at the start of a job, if a killed job, such as one of another test, left shared memory on this host.
NOTE = re.compile(r"^psmpi: note: removed \d+ segment\(s\) .* that killed jobs left on .*\n", re.MULTILINE)


def without_note(stderr):
    """Standard error without NOTE, for tests that compare the whole text."""
    return NOTE.sub("", stderr)


def launcher():
    """The path of mpirun: in the folder of this Python, else on PATH; None without one."""
    own_mpirun = Path(sys.executable).with_name("mpirun")
    return str(own_mpirun) if own_mpirun.exists() else shutil.which("mpirun")


def mpi_environment():
    return {
        **os.environ,
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "PYTHONUNBUFFERED": "1",
    }


def start(ranks, *arguments, cwd=None, **options):
    """Start Python with `arguments` in a new process group, under mpirun if ranks > 1."""
    command = [sys.executable, *map(str, arguments)]
    if ranks > 1:
        mpirun = launcher()
        if mpirun is None:
            pytest.skip("no mpirun: pip install 'psmpi[mpi]'")
        command = [mpirun, "-n", str(ranks), *command]
    return subprocess.Popen(
        command, cwd=cwd, env=mpi_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, stdin=subprocess.DEVNULL, **options,
    )  # fmt: skip


def finish(process, timeout):
    """Return (status, stdout, stderr) of a process. After `timeout` seconds kill its group, and fail the test."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"no end within {timeout} s\n{out}\n{err}")
    return process.returncode, out, err


def launch(ranks, *arguments, timeout=120, cwd=None):
    """Run Python with `arguments`, under mpirun if ranks > 1; return (status, stdout, stderr)."""
    return finish(start(ranks, *arguments, cwd=cwd), timeout)
