"""Programs in processes of their own, under mpirun where there are several ranks, with timeouts."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# What a start of MPI says where a job that was killed, such as another test's, has left something on this host.
NOTE = re.compile(r"^psmpi: note: removed \d+ segment\(s\) .* that killed jobs left on .*\n", re.MULTILINE)


def without_note(stderr):
    """Standard error without the note of what killed jobs had left: what a test says of all of it is of the rest."""
    return NOTE.sub("", stderr)


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


def launch(ranks, *arguments, timeout=120, cwd=None):
    """(status, stdout, stderr) of Python with `arguments`, under mpirun where ranks > 1."""
    return finish(start(ranks, *arguments, cwd=cwd), timeout)
