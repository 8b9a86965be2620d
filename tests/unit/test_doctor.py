"""psmpi doctor: findings on sound and faulty machines, launchers and ranks, and an end within bounded time."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from importlib import metadata

import numpy as np
import pytest

pytest.importorskip("mpi4py.MPI")

from helpers.processes import finish, launch, start

from psmpi.backend.compiled import library as kernels
from psmpi.comm import installed, pingpong
from psmpi.comm import world as mpi_world
from psmpi.comm.control import Control
from psmpi.comm.installed import Launcher, Library, started_by
from psmpi.comm.leftovers import Leftovers
from psmpi.comm.memory import Limit
from psmpi.comm.pingpong import SIZES, ping_pong
from psmpi.doctor import __main__ as doctor
from psmpi.doctor import folders, machine, mpi, ranks, software
from psmpi.doctor.ranks import Pair, Place
from psmpi.doctor.report import Report
from psmpi.errors import UserError
from psmpi.launcher import LAUNCHER_RANKS, LAUNCHER_SIZES
from psmpi.testing import run_ranks

MPICH = Library("MPICH", "5.0.2", "/opt/lib/libmpi.so.12", "mpich")
HERE = Place(0, "a", "0-3", 4, "psmpi 1", "AVX2", True, 0, 0, 0)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """Hide a launcher and a SLURM under which the tests themselves run."""
    for name in (*LAUNCHER_RANKS, *LAUNCHER_SIZES, *(name for name in os.environ if name.startswith("SLURM_"))):
        monkeypatch.delenv(name, raising=False)


def levels(findings):
    return [finding.level for finding in findings]


def texts(findings):
    return " | ".join(finding.text for finding in findings)


def lines(stdout, level):
    return [line for line in stdout.splitlines() if line.startswith(level)]


# One process, several processes, and starts that fail.


def test_one_process_is_looked_at_and_left_as_it_was(tmp_path):
    status, out, err = launch(1, "-m", "psmpi", "doctor", "--data-dir", tmp_path, cwd=tmp_path)
    assert status == 0 and not lines(out, "error"), out + err
    for subject in ("psmpi", "Python", "packages", "CPU", "kernels", "HDF5", "runs", "data", "MPI", "launcher"):
        assert any(line.split()[1] == subject for line in out.splitlines()), subject
    assert os.listdir(tmp_path) == []


def test_ranks_are_measured_in_pairs(tmp_path):
    status, out, err = launch(4, "-m", "psmpi", "doctor", "--json", cwd=tmp_path)
    assert status == 0, out + err
    report = json.loads(out)
    assert report["status"] == 0 and [row["rank"] for row in report["ranks"]] == [0, 1, 2, 3]
    assert {(row["a"], row["b"]) for row in report["pairs"]} == {(a, b) for a in range(4) for b in range(a + 1, 4)}
    for row in report["pairs"]:
        assert row["same_host"] and 0 < row["latency_us"] < 1e6 and row["gigabytes_per_second"] > 0
    assert "started 4 processes" in texts_of(report, "launcher")


def texts_of(report, subject):
    return " | ".join(finding["text"] for finding in report["findings"] if finding["subject"] == subject)


def test_a_start_by_another_mpi_s_launcher_is_an_error(monkeypatch, tmp_path):
    """The launcher started 4 processes and MPI sees 1: each rank would be alone."""
    monkeypatch.setenv("PALS_SIZE", "4")
    monkeypatch.setenv("PALS_RANKID", "0")
    status, out, _ = launch(1, "-m", "psmpi", "doctor", cwd=tmp_path)
    (error_line,) = lines(out, "error")
    assert (
        status == 1
        and "started 4 processes (PALS_SIZE=4)" in error_line
        and "sees 1" in error_line
        and "Use the mpirun" in error_line
    )


def test_a_rank_without_mpi_lets_the_first_one_speak(monkeypatch, capsys):
    def lacking():
        raise UserError("cannot load MPI: install one")

    sleeps = []
    monkeypatch.setattr(mpi_world, "start", lacking)
    monkeypatch.setattr(doctor.time, "sleep", sleeps.append)
    assert doctor.examine(doctor.Options(), first=False) == 1 and sleeps == [doctor.LATE]
    out, err = capsys.readouterr()
    assert not out and err.endswith(": cannot load MPI: install one\n") and socket.gethostname() in err


def test_a_machine_without_mpi_is_looked_at_all_the_same(monkeypatch, tmp_path):
    monkeypatch.setenv("MPI4PY_LIBMPI", "/nonexistent/libmpi.so")
    status, out, _ = launch(1, "-m", "psmpi", "doctor", cwd=tmp_path)
    (error_line,) = lines(out, "error")
    assert status == 1 and "cannot load MPI" in error_line and "pip install 'psmpi[mpi]'" in error_line
    assert any("kernels" in line for line in out.splitlines())


def test_an_unknown_option_is_told_once():
    status, out, err = launch(2, "-m", "psmpi", "doctor", "--jso")
    assert status != 0 and (out + err).count("Unrecognized options: --jso") == 1


def test_a_rank_that_does_not_answer_ends_the_job_with_a_word(tmp_path):
    code = (
        "import sys, time; from psmpi.doctor import __main__ as doctor, ranks; doctor.LIMIT = 3\n"
        "own = ranks.own_place\n"
        "ranks.own_place = lambda rank, *args: time.sleep(100) if rank == 1 else own(rank, *args)\n"
        "sys.exit(doctor.main(sys.argv[1:]))"
    )
    status, out, _ = finish(start(2, "-c", code, "--json", cwd=tmp_path), timeout=60)
    assert status != 0
    assert "word from all ranks did not end within 3 s" in out


@pytest.mark.parametrize("json_too", [False, True])
def test_a_start_of_mpi_that_hangs_is_given_up(json_too, monkeypatch, capsys):
    ended = threading.Event()
    monkeypatch.setattr(mpi_world, "abort", lambda status: ended.set())
    with doctor.bounded(Report(shown=not json_too), ["the start of MPI"], 0.01, json=json_too):
        assert ended.wait(20)
    out = capsys.readouterr().out
    assert "the start of MPI did not end within 0 s: use the launcher" in out
    assert not json_too or json.loads(out)["status"] == 1


# Launchers.


def fake_launcher(folder, says):
    folder.mkdir(exist_ok=True)
    path = folder / "mpirun"
    path.write_text(f"#!/bin/sh\n{says}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("says", "vendors"),
    [
        ("echo 'mpirun (Open MPI) 5.0.8'", ("Open MPI",)),
        ("printf 'HYDRA build details:\\n    Version:   4.3.1\\n'", ("MPICH",)),
        ("echo 'Intel(R) MPI Library for Linux* OS, Version 2021.13 Build'", ("Intel MPI",)),
        ("echo hello 1.0", ()),
        ("exec sleep 60", ()),
    ],
)
def test_launchers_are_known_by_what_they_say(says, vendors, tmp_path, monkeypatch):
    path = fake_launcher(tmp_path / "bin", says)
    monkeypatch.setattr(installed, "PATIENCE", 1.0)
    monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")
    first = installed.launchers()[0]
    assert first.path == str(path) and first.vendors[:1] == vendors


def test_one_that_fits_is_good_and_another_one_is_not(monkeypatch):
    fits, other = Launcher("/a/mpirun", "Hydra 5", ("MPICH",)), Launcher("/b/mpirun", "Open MPI 5", ("Open MPI",))
    unknown = Launcher("/c/mpirun", "of an unknown MPI", ())
    assert mpi.lone(MPICH, [fits]).level == "good"
    assert mpi.lone(MPICH, [other, fits])[::2] == (
        "warning",
        "mpirun on the PATH, /b/mpirun (Open MPI 5), is of another MPI than MPICH 5.0.2, under it each rank would be "
        "alone: type /a/mpirun",
    )
    assert "pip install 'psmpi[mpi]'" in mpi.lone(MPICH, [other]).text
    assert mpi.lone(MPICH, [unknown]).level == "warning" and "not known to fit" in mpi.lone(MPICH, [unknown]).text
    monkeypatch.setattr(mpi.shutil, "which", lambda name: None)
    assert mpi.lone(MPICH, []).level == "warning"
    monkeypatch.setattr(mpi.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert mpi.lone(MPICH, []).level == "good"


def test_a_launcher_is_found_above_its_ranks(tmp_path):
    for pid, parent, program in ((40, 30, "python3"), (30, 20, "bash"), (20, 10, "hydra_pmi_proxy"), (10, 1, "mpirun")):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "stat").write_text(f"{pid} (a name) with) S {parent} 1 1")
        (tmp_path / str(pid) / "exe").symlink_to(f"/opt/bin/{program}")
    assert started_by(40, str(tmp_path)) == "/opt/bin/hydra_pmi_proxy"
    assert started_by(10, str(tmp_path)) == ""
    # Another user's program.
    (tmp_path / "20" / "exe").unlink()
    (tmp_path / "20" / "comm").write_text("slurmstepd-wlm\n")
    assert started_by(40, str(tmp_path)) == "slurmstepd-wlm"


def test_ranks_of_a_start_are_counted():
    assert mpi.launched({"PMI_SIZE": "4"}, 4).level == "good"
    assert mpi.launched({"PMI_SIZE": "4"}, 2).level == "warning"
    assert mpi.launched({}, 2).level == "good"


# Ranks.


def test_messages_are_timed_one_way():
    """The simulated network has 2 us, 10 GB/s and a clock of its own."""
    pace, spent, sent = simulated(latency=2e-6, bandwidth=1e10, seconds=0.3)
    assert pace.latency_us == pytest.approx(2.0, rel=1e-3)
    assert pace.nbytes == SIZES[-1] and pace.gigabytes == pytest.approx(10.0, rel=0.01)
    assert spent < 0.3 and sent <= 56_000_000


@pytest.mark.parametrize(("latency", "bandwidth"), [(1e-3, 1e8), (1e-2, 1e7), (0.1, 1e6)])
def test_a_slow_network_ends_the_messages_early(latency, bandwidth):
    pace, spent, _ = simulated(latency, bandwidth, seconds=0.3)
    least_seconds = 3 * 2 * (2 * latency + (1 << 16) / bandwidth + 8 / bandwidth)
    assert pace.nbytes < SIZES[-1] and spent < max(0.6, 2 * least_seconds)
    assert pace.latency_us == pytest.approx(1e6 * latency, rel=0.2)


def simulated(latency, bandwidth, seconds):
    """(pace, seconds that pass, bytes sent) of rank 0 on a network of `latency` and `bandwidth`."""
    now, sent = [0.0], [0]

    class Network:
        rank = 0

        def Send(self, buffer, dest):
            now[0] += latency + buffer.nbytes / bandwidth
            sent[0] += buffer.nbytes

        def Recv(self, buffer, source):
            now[0] += latency + buffer.nbytes / bandwidth

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pingpong.time, "perf_counter", lambda: now[0])
        return ping_pong(Network(), 0, 1, seconds), now[0], sent[0]


def test_few_ranks_are_measured_in_all_pairs_and_many_beside_each_other():
    assert ranks.pairs_of(1) == [] and ranks.pairs_of(3) == [(0, 1), (0, 2), (1, 2)] and len(ranks.pairs_of(8)) == 28
    assert ranks.pairs_of(9) == [(k, k + 1) for k in range(8)]
    pairs = ranks.pairs_of(5000)
    assert len(set(pairs)) == ranks.PAIRS and all(b == a + 1 for a, b in pairs) and pairs[-1][0] > 4900


@pytest.mark.parametrize("size", [2, 3, 9])
def test_every_rank_has_what_was_measured(size):
    hosts = [0] * (size - 1) + [size - 1]
    measured = run_ranks(size, lambda world: ranks.measure(Control(world), hosts, [""]))
    assert [(pair.a, pair.b) for pair in measured[0]] == ranks.pairs_of(size)
    assert all(pairs == measured[0] for pairs in measured)
    assert all(pair.same_host == (pair.b < size - 1) and pair.nbytes >= SIZES[1] for pair in measured[0])


def test_pairs_are_left_out_when_the_time_is_up(monkeypatch):
    monkeypatch.setattr(ranks, "BOUND", -1.0)
    measured = run_ranks(3, lambda world: ranks.measure(Control(world), [0, 0, 0], [""]))
    assert measured == [[], [], []]
    (finding,) = ranks.links([], 3, False)
    assert finding.level == "warning" and "0 of 3 pairs" in finding.text


def test_a_pair_that_is_far_slower_is_named():
    pairs = [Pair(a, b, True, 1.0, 8.0, 1 << 22) for a, b in ranks.pairs_of(4)]
    assert levels(ranks.links(pairs, 4, False)) == ["good", "good"]
    for slow in (replace(pairs[4], latency_us=9.0), replace(pairs[4], gigabytes_per_second=1.0)):
        findings = list(ranks.links([*pairs[:4], slow, pairs[5]], 4, False))
        assert levels(findings) == ["good", "good", "warning"] and "ranks 1 and 3" in findings[2].text
    # Pairs between hosts are compared with each other.
    between_hosts = [replace(pair, same_host=False, latency_us=50.0) for pair in pairs]
    assert levels(ranks.links([*pairs, *between_hosts], 4, False)) == ["good"] * 4


def test_tables_stay_short():
    places = [replace(HERE, rank=k, host="ab"[k > 499]) for k in range(1000)]
    pairs = [Pair(a, b, True, 1.0, 8.0, 1 << 22) for a, b in ranks.pairs_of(1000)]
    (table,) = ranks.tables(places, pairs)
    assert [list(column.cells) for column in table.columns] == [["0-499", "500-999"], ["a", "b"], ["0-3", "0-3"]]
    assert [one.row_count for one in ranks.tables(places[:3], pairs[:3])] == [1, 3]


def at(rank, cores, host="a", share=64):
    return replace(HERE, rank=rank, cores=cores, host=host, share=share)


@pytest.mark.parametrize(
    ("places", "says"),
    [
        ([at(0, "0-1"), at(1, "0-1")], ["good"]),
        ([at(0, "0"), at(1, "1")], ["good"]),
        ([at(0, "0-1"), at(1, "0-1"), at(2, "0-1")], ["3 ranks (0-2) on a share 2 cores (0-1)"]),
        ([at(0, "0-3", share=2), at(1, "0-3", share=2), at(2, "0-3", share=2)], ["3 ranks (0-2) on a share 2 cores"]),
        ([at(0, "3"), at(1, "3"), at(2, "0-2")], ["ranks 0-1 on a are bound to the same 1 core (3)"]),
        ([at(0, "0"), at(1, "0", host="b")], ["good", "good"]),
    ],
)
def test_ranks_that_share_cores_are_named(places, says):
    findings = list(ranks.placement(places))
    assert len(findings) == len(says)
    for finding, expected in zip(findings, says, strict=True):
        assert (
            finding.level == expected
            if expected == "good"
            else (finding.level == "warning" and expected in finding.text)
        )


def test_hosts_that_differ_are_told():
    assert levels(ranks.alike([HERE, replace(HERE, rank=1)], "")) == ["good"] * 3
    for name, value, level in (
        ("versions", "psmpi 2", "error"),
        ("kernels", "AVX-512", "warning"),
        ("data", False, "error"),
    ):
        findings = list(ranks.alike([HERE, replace(HERE, rank=1, host="b", **{name: value})], ""))
        bad = [finding for finding in findings if finding.level != "good"]
        assert levels(bad) == [level] and "1" in bad[0].text, name


def test_what_killed_jobs_left_is_told_of_each_host():
    """A rank that looks later sees fewer leftovers, since another rank has removed them."""
    left = replace(HERE, segments=2, nbytes=4_000_000, sessions=1)
    findings = list(ranks.leftovers([replace(HERE, rank=1), left, replace(HERE, rank=2, host="b")]))
    assert levels(findings) == ["warning", "good"]
    assert "2 segments of shared memory, 4 MB and 1 session folder of Open MPI" in findings[0].text
    assert "has removed them" in findings[0].text
    later = machine.leftovers(2, 4_000_000, 0, started=False)
    assert later.text.endswith("the next start of psmpi removes them")


def test_a_rank_s_word_is_whole():
    own = ranks.own_place(3, "/nonexistent", Leftovers([], [], []))
    assert not own.data and own.rank == 3 and own.host == socket.gethostname() and own.share >= 1
    assert own.numbers() == frozenset(mpi_world.cores())
    (gathered, *_), *other_ranks = run_ranks(2, lambda world: ranks.gather(Control(world), own) or [None])
    assert gathered == own and other_ranks == [[None]]


# The machine.


def test_numbers_are_told_as_ranges():
    assert machine.ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8" and machine.ranges([4]) == "4"


def test_little_memory_is_a_warning():
    assert levels(machine.memory([Limit("", "host a", 10 << 30)]))[0] == "good"
    assert levels(machine.memory([Limit("", "host a", 10 << 20)]))[0] == "warning"
    assert levels(machine.memory([]))[0] == "warning"


def test_limits_that_are_in_the_way_are_told():
    code = "from psmpi.doctor import machine; print([one.text for one in machine.memory() if one.subject == 'limits'])"
    process = subprocess.run(
        ["sh", "-c", f'ulimit -S -n 100; exec {sys.executable} -c "{code}"'], capture_output=True, text=True, check=True
    )
    assert "100 open files (ulimit -n): ulimit -n" in process.stdout
    assert levels(machine.memory([Limit("", "", 1 << 40)]))[0] == "good"


SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_JOB_NUM_NODES": "2"}


def test_slurm_s_word_is_compared_with_what_is_there():
    assert levels(machine.slurm({})) == ["good"]
    (job, warning) = machine.slurm(SLURM)
    assert (
        "job 7: 2 node(s), 4 task(s)" in job.text and warning.level == "warning" and "srun --mpi=pmi2" in warning.text
    )
    assert levels(machine.slurm({**SLURM, "PMI_SIZE": "4"})) == ["good"]
    assert levels(machine.slurm({**SLURM, "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"})) == ["good"]
    findings = list(machine.slurm({**SLURM, "PMI_SIZE": "4", "SLURM_CPUS_PER_TASK": "5000"}))
    assert levels(findings) == ["good", "warning"] and "SRUN_CPUS_PER_TASK" in findings[1].text


# Folders.


def test_a_run_folder_is_tried_and_left_as_it_was(tmp_path):
    findings = list(folders.runs(str(tmp_path / "new" / "run")))
    assert levels(findings) == ["good"] * 3 and "is not made yet" in findings[0].text
    assert "locked" in findings[2].text and os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("")
    assert levels(folders.runs(str(tmp_path / "file"))) == ["error"]
    assert levels(folders.runs(str(tmp_path / "file" / "run"))) == ["error"]


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", none)
    findings = list(folders.runs(str(tmp_path)))
    assert levels(findings) == ["good", "good", "warning"] and "has no locks" in findings[2].text
    assert os.listdir(tmp_path) == []


def test_a_folder_that_hdf5_cannot_write_to_is_an_error(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise OSError("unable to lock file")

    monkeypatch.setattr("h5py.File", fails)
    findings = list(folders.runs(str(tmp_path)))
    assert [finding.level for finding in findings if "HDF5" in finding.text] == ["error"] and os.listdir(tmp_path) == []


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    real = os.statvfs(tmp_path)
    free = Counter(f_bavail=10, f_frsize=4096, f_files=real.f_files, f_favail=real.f_favail)
    monkeypatch.setattr(folders.os, "statvfs", lambda path: type("Space", (), dict(free)))
    assert levels(folders.runs(str(tmp_path)))[0] == "warning"


def test_data_are_opened(tmp_path):
    assert levels(folders.data(str(tmp_path / "none"))) == ["good", "error"]
    np.savez(tmp_path / "mine.npz", x=np.zeros((50, 3)), y=np.arange(50) % 2)
    (tmp_path / "bad.npz").write_bytes(b"PK nothing")
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"\0" * 16)
    findings = list(folders.data(str(tmp_path)))
    by_name = {finding.text.partition(":")[0]: finding for finding in findings}
    assert by_name["mine.npz"].level == "good" and "40 samples to train on, 10 to test on" in by_name["mine.npz"].text
    assert (
        by_name["bad.npz"].level == "warning"
        and by_name["mnist"].level == "warning"
        and "not in" in by_name["cifar10"].text
    )


# Software.


def test_kernels_that_are_not_there_are_told(monkeypatch):
    assert levels(software.kernels()) in (["good"], ["warning"])
    kernels.level.cache_clear()
    monkeypatch.setattr(kernels, "_library", lambda: (None, "_kernels.so was built from other sources: install again"))
    try:
        (finding,) = software.kernels()
    finally:
        kernels.level.cache_clear()
    assert (
        finding.level == "warning" and "built from other sources" in finding.text and "NumPy computes" in finding.text
    )


def test_packages_are_compared_with_what_psmpi_asks_for(monkeypatch):
    requirements = [
        "numpy>=1.26", "h5py>=99", "nonesuch>=2", "tomli>=2; python_version < '3.11'", "onnx>=1; extra == 'export'",
        "nonesuch; extra == 'cuda'", "psmpi[cuda]; extra == 'cudnn'", "pytest; extra == 'test'",
    ]  # fmt: skip
    monkeypatch.setattr(metadata, "requires", lambda name: requirements)
    monkeypatch.setattr(software, "_version", lambda name: "" if name == "nonesuch" else "3.4.1")
    findings = list(software.packages())
    assert levels(findings) == ["error", "error", "good", "good"]
    assert "h5py is 3.4.1, and psmpi needs 99: pip install 'h5py>=99'" in findings[0].text
    assert "nonesuch is not installed" in findings[1].text and "tomli" not in texts(findings)
    assert findings[3].text == "installed: export; not: cuda (nonesuch)"


def test_psmpi_that_is_not_installed_is_told(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert levels(software.packages()) == ["warning"]


def test_devices_are_looked_at(stand_in, monkeypatch):
    findings = list(software.gpus())
    assert levels(findings) == ["good", "good"] and "3.0 of 4.0 GB free" in findings[1].text
    assert "driver's 13.2" in findings[0].text
    monkeypatch.setattr(stand_in, "asnumpy", lambda array: np.zeros(1000, np.float32))
    assert levels(software.gpus()) == ["good", "error"]


@pytest.mark.parametrize(("nodes", "level"), [([], "warning"), (["/dev/nvidia0"], "error")])
def test_a_gpu_that_cannot_be_used_is_told(nodes, level, stand_in, monkeypatch):
    monkeypatch.setattr(software.glob, "glob", lambda pattern: nodes)
    monkeypatch.setattr(stand_in.cuda, "FAULT", "old driver")
    (finding,) = software.gpus()
    assert finding.level == level and "its driver supports CUDA 12.4" in finding.text


@pytest.mark.parametrize(("nodes", "level"), [([], "good"), (["/dev/nvidia0"], "warning")])
def test_a_gpu_without_cupy_is_told(nodes, level, monkeypatch):
    monkeypatch.setattr(software, "find_spec", lambda name: None)
    monkeypatch.setattr(software.glob, "glob", lambda pattern: nodes)
    (finding,) = software.gpus()
    assert finding.level == level


def test_a_check_that_cannot_look_is_an_error_and_others_go_on():
    def failing(error):
        yield software.good("a", "b")
        raise error

    from psmpi.doctor.report import guarded

    for trouble in (UserError("what: do this"), PermissionError(13, "denied", "/x"), ImportError("no h5py")):
        report = Report(shown=False)
        report.add(guarded("a", failing(trouble)))
        assert levels(report.findings) == ["good", "error"] and report.status == 1
        assert report.summary() == "1 good, 0 warnings, 1 error"
