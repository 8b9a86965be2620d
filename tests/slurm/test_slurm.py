"""Jobs on a real SLURM: after stops and restarts they have the weights of an undisturbed run, bit for bit."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.paths import FAKE, ROOT
from helpers.runs import Trained
from helpers.slurm import Cluster, missing

from psmpi.comm.world import vendor

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(missing()), reason=missing()), pytest.mark.timeout(600)]

OPTIONS = ("--dtype", "float64", "--batch-size", "20", "--lr", "0.001", "--checkpoint-every", "100000")

# A start-up module of Python: a call of `Poll`, one a step, takes 50 ms more while the file exists.
SLOW = """
import os, time
import psmpi.comm.control as control
call = control.Poll.__call__
def slow(self, *questions):
    if os.path.exists({file!r}):
        time.sleep(0.05)
    return call(self, *questions)
control.Poll.__call__ = slow
"""

# A start-up module of Python: rank 1 ends a second after the others if the file exists at its start.
LATE = """
import signal
if os.path.exists({file!r}) and os.environ.get("SLURM_PROCID") == "1":
    child = os.fork()
    if child:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(1)
        os._exit(status)
"""


@pytest.fixture(scope="module")
def cluster():
    with Cluster() as running:
        yield running


@pytest.fixture
def place(tmp_path, cluster):
    """A folder to submit from, with a Python environment. Its files `slow` and `late` switch SLOW and LATE on."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        SLOW.format(file=str(tmp_path / "slow")) + LATE.format(file=str(tmp_path / "late"))
    )
    (tmp_path / ".venv" / "bin" / "activate").write_text(
        f"export PATH={shlex.quote(str(sys.prefix))}/bin:$PATH PYTHONPATH={shlex.quote(str(tmp_path / 'site'))}:"
        f"{shlex.quote(str(ROOT))}:$PYTHONPATH\n"
    )
    return tmp_path


def submit(cluster, place, *words):
    """Write and submit a job by psmpi submit; return its number."""
    result = subprocess.run(
        [sys.executable, "-m", "psmpi.submit", "--activate", ".venv/bin/activate", *map(str, words)], cwd=place,
        env={**cluster.environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return re.search(r"Submitted batch job (\d+)", result.stdout)[1]


def printed(place):
    return "\n".join(path.read_text() for path in place.glob("*.out"))


def wait_for_metrics(cluster, place, job, out):
    """Wait until a job has written a row of metrics."""
    end = time.monotonic() + 60
    rows = place / out / "metrics.jsonl"
    while not (rows.exists() and rows.read_text().count("\n") >= 1):
        assert time.monotonic() < end, f"{cluster.show(job, 'JobState')}\n{printed(place)}"
        time.sleep(0.1)


def undisturbed(train, ranks, *options):
    return train(ranks, *OPTIONS, *options).tensors()


def same(run, expected):
    tensors = Trained(run, "").tensors()
    return all(np.array_equal(tensor, tensors[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("script", sorted((ROOT / "jobs").glob("*.sh")), ids=lambda path: path.stem)
def test_the_scripts_train(cluster, place, script):
    """Every script of jobs/, with other numbers of nodes and ranks and with another data set."""
    shutil.copytree(ROOT / "jobs", place / "jobs")
    result = cluster.run(
        "sbatch", "--nodes=1", "--ntasks=2", "--cpus-per-task=1", "--gpus-per-node=0", "--overcommit",
        *(["--array=1-2"] if script.stem == "array" else []), f"jobs/{script.name}", "--dataset", "digits",
        "--epochs", "1", "--batch-size", "32", "--threads", "1", cwd=place,
        PYTHONPATH=str(FAKE) if script.stem == "gpus" else "",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    job = result.stdout.split()[-1]
    assert cluster.wait(job, 120) == "COMPLETED", printed(place)
    runs = {"array": ["array/lr=0.01,seed=1", "array/lr=0.01,seed=2"]}.get(script.stem, [script.stem])
    for name in runs:
        end = time.monotonic() + 60
        while not (place / "runs" / name / "metrics.jsonl").exists():
            assert time.monotonic() < end, printed(place)
            time.sleep(0.1)


def test_a_job_goes_on_beyond_its_time_limit(cluster, place, train):
    """A job stops and saves before its limit, is requeued, and ends with the weights of an undisturbed run."""
    (place / "slow").touch()
    job = submit(
        cluster, place, "--name", "beyond", "--ranks", "2", "--time", "2", "--save-before", "50", "--requeue", "--",
        *OPTIONS, "--epochs", "40",
    )  # fmt: skip
    expected = undisturbed(train, 2, "--epochs", "40")
    cluster.wait(job, 60, ("RUNNING",))
    cluster.wait(job, 150, ("PENDING",))
    assert int(cluster.show(job, "Restarts")) == 1
    (place / "slow").unlink()
    cluster.again(job)
    assert cluster.wait(job, 120) == "COMPLETED", printed(place)
    text = printed(place)
    assert "stopped by SIGUSR1 after step" in text and "resumed from" in text
    assert same(place / "runs" / "beyond", expected)


def test_a_requeued_job_goes_on(cluster, place, train):
    """An administrator requeues a running job."""
    (place / "slow").touch()
    job = submit(cluster, place, "--name", "again", "--ranks", "2", "--", *OPTIONS, "--epochs", "6")
    wait_for_metrics(cluster, place, job, "runs/again")
    assert cluster.run("scontrol", "requeue", job).returncode == 0
    (place / "slow").unlink()
    cluster.again(job)
    assert cluster.wait(job, 120) == "COMPLETED", printed(place)
    text = printed(place)
    assert "stopped by SIGTERM after step" in text and "resumed from" in text
    assert same(place / "runs" / "again", undisturbed(train, 2, "--epochs", "6"))


def test_a_cancelled_job_is_saved_and_another_goes_on(cluster, place, train):
    (place / "slow").touch()
    words = ("--name", "later", "--ranks", "2", "--requeue", "--", *OPTIONS, "--epochs", "6")
    job = submit(cluster, place, *words)
    wait_for_metrics(cluster, place, job, "runs/later")
    cluster.run("scancel", job)
    assert cluster.wait(job, 60) == "CANCELLED"
    assert "stopped by SIGTERM after step" in printed(place)
    (place / "slow").unlink()
    assert cluster.wait(submit(cluster, place, *words), 120) == "COMPLETED", printed(place)
    assert same(place / "runs" / "later", undisturbed(train, 2, "--epochs", "6"))


def test_an_array_has_a_run_of_each_seed(cluster, place):
    job = submit(cluster, place, "--name", "seeds", "--ranks", "1", "--seeds", "4", "--", "--epochs", "1")
    end = time.monotonic() + 120
    while cluster.run("squeue", "-h", "-j", job).stdout.strip():
        assert time.monotonic() < end, printed(place)
        time.sleep(0.3)
    rows = {
        seed: json.loads((place / "runs" / "seeds" / f"seed={seed}" / "metrics.jsonl").read_text().splitlines()[0])
        for seed in range(4)
    }
    assert len({row["train_loss"] for row in rows.values()}) == 4
    assert len(list(place.glob("seeds-*_*.out"))) == 4


@pytest.mark.slow
def test_one_job_of_an_array_goes_on_and_disturbs_no_other(cluster, place, train):
    """The job is the last of the array, with the number of the array, and its ranks end at different times."""
    for name in ("slow", "late"):
        (place / name).touch()
    array = submit(
        cluster, place, "--name", "two", "--ranks", "2", "--seeds", "2", "--requeue", "--", *OPTIONS, "--epochs", "6"
    )
    for task in range(2):
        wait_for_metrics(cluster, place, f"{array}_{task}", f"runs/two/seed={task}")
    cluster.run("scancel", "--signal=USR1", f"{array}_1")
    cluster.wait(f"{array}_1", 60, ("PENDING",))
    assert (cluster.show(f"{array}_0", "JobState"), cluster.show(f"{array}_0", "Restarts")) == ("RUNNING", "0")
    (place / "slow").unlink()
    cluster.again(f"{array}_1")
    for task in range(2):
        assert cluster.wait(f"{array}_{task}", 120) == "COMPLETED", printed(place)
    assert "stopped by SIGUSR1 after step" in printed(place) and int(cluster.show(f"{array}_0", "Restarts")) == 0
    assert same(place / "runs" / "two" / "seed=1", undisturbed(train, 2, "--epochs", "6", "--seed", "1"))


@pytest.mark.parametrize(
    "times", [1, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.repeated, pytest.mark.timeout(1200)])]
)
def test_ranks_of_a_killed_job_leave_nothing_that_stops_the_next_start(cluster, place, times):
    """MPICH names shared memory by the numbers of job and step, which are the same when the job starts again."""
    (place / "slow").touch()
    epochs = ("--epochs", 2 * times + 2, "--checkpoint-every", "10")
    job = submit(cluster, place, "--name", "killed", "--ranks", "2", "--requeue", "--", *OPTIONS, *epochs)
    wait_for_metrics(cluster, place, job, "runs/killed")
    for start in range(times):
        cluster.run("scancel", "--signal=KILL", f"{job}.0")
        cluster.wait(job, 60, ("FAILED",))
        assert list(Path("/dev/shm").glob("mpich_shm_*")) or vendor() != "MPICH"
        cluster.run("scontrol", "requeue", job)
        cluster.again(job)
        end = time.monotonic() + 60
        while printed(place).count("resumed from") <= start:
            assert time.monotonic() < end and cluster.show(job, "JobState") == "RUNNING", printed(place)
            time.sleep(0.1)
    (place / "slow").unlink()
    assert cluster.wait(job, 120) == "COMPLETED", printed(place)


def test_ranks_see_each_other(cluster, place):
    """Started by srun, through the interface of this Python's MPI, ranks stop and save before a limit, and resume."""
    (place / "slow").touch()
    words = ("-m", "psmpi.train", *OPTIONS, "--epochs", "40", "--out", place / "run", "--resume", "auto")
    for limit in (["--signal=USR1@10", "--time=1"], []):
        # SLURM 22.05 fails to launch some steps by PMIx, with status 0, whatever the program.
        for _ in range(5):
            result = cluster.run(
                "srun", f"--mpi={'pmix' if vendor() == 'Open MPI' else 'pmi2'}", "-n", "2", "--overcommit", *limit,
                sys.executable, *words, cwd=place, timeout=120, PYTHONPATH=f"{place / 'site'}:{ROOT}",
            )  # fmt: skip
            if "launch failed: Unspecified error" not in result.stderr:
                break
        assert result.returncode == (85 if limit else 0), result.stderr
        assert "│ 1    │" in result.stdout, result.stderr
        (place / "slow").unlink(missing_ok=True)
    assert "resumed from" in result.stdout


@pytest.mark.skipif(vendor() != "MPICH", reason="the interfaces named here are MPICH's")
def test_the_doctor_knows_how_it_was_started(cluster, place):
    """Started by srun, by srun without an interface of MPI, and in an allocation without srun."""
    doctor = (sys.executable, "-m", "psmpi.doctor")
    for words, status, says in (
        (("srun", "--mpi=pmi2", "-n", "2", "--overcommit"), 0, ("MPI sees 2: it matches", "0 and 1")),
        (("srun", "--mpi=none", "-n", "2", "--overcommit"), 1, ("error    MPI", "sees 1: the launcher belongs")),
        (("salloc", "-n", "2", "--overcommit"), 0, ("warning  SLURM        the job has 2 tasks",)),
    ):
        result = cluster.run(*words, *doctor, cwd=place, timeout=120, PYTHONPATH=str(ROOT))
        assert result.returncode == status and all(text in result.stdout for text in says), (
            result.stdout + result.stderr
        )
