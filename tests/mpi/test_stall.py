"""Ranks whose processes stop: a warning names them and the calls of the waiting ranks, and then every process ends."""

import contextlib
import json
import os
import random
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.processes import finish, start

from psmpi.bench.hosts import ENVIRONMENT, slow_hosts
from psmpi.errors import UserError
from psmpi.inspect.flight import read_flights

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks' processes in /proc")

MLP = ("--model", "mlp", "--widths", "64", "64", "--loss", "nll")
METHODS = {
    "psl": ("--colocate",),
    "data_parallel": MLP,
    "bptt": ("--dataset", "digits:rows", "--model", "lstm", "--widths", "32", "--unroll", "3", "--future", "synthetic"),
    "local_sgd": (*MLP, "--local-steps", "5"),
    "hogwild": (*MLP, "--updates", "accumulate"),
    "ist": ("--colocate", *MLP, "--local-steps", "5"),
    "sil": (*MLP, "--parts", "3", "--hand-over", "stale"),
    "dfa": MLP,
    "dni": (*MLP, "--layer-blocks", "3"),
    "layer_parallel": ("--model", "deep", "--depth", "24", "--loss", "nll"),
    "next": (*MLP, "--tracking", "minibatch"),
    "spann": ("--model", "slabs", "--loss", "nll"),
    "tensor": MLP,
    "wavefront": ("--dataset", "digits:rows", "--model", "lstm", "--widths", "16", "16", "16", "16", "--loss", "nll"),
}
# A user's own method, whose rank 1 is stuck in a step.
PROGRAM = """
import os, time
import numpy as np
import psmpi.train
from psmpi.methods.data_parallel import DataParallel
from psmpi.registry import register

@register
class Own(DataParallel):
    name, summary, done = "own", "one whose rank 1 stands still", 0

    def step(self, batch, lr):
        super().step(batch, lr)
        self.done += 1
        if self.rank == 1 and self.done == 20:
            getattr(self, os.environ["OWN_STEP"])()

    def turn_round(self):
        while True:
            self.done += 1

    def read_for_ever(self):
        type(self.dataset.train.source.source).read_into = lambda *arguments: time.sleep(3600)
        self.dataset.train.read([0])

    def take_what_nobody_sends(self):
        self.context.world.Recv(np.zeros(1), 0)

raise SystemExit(psmpi.train.main())
"""


def ranks_of(out):
    """Return the process id of each rank of the run with this directory."""
    rank_by_pid, parents = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            variables = dict(
                variable.split(b"=", 1)
                for variable in (folder / "environ").read_bytes().split(b"\0")
                if b"=" in variable
            )
        except OSError:
            continue
        rank = variables.get(b"PMI_RANK", variables.get(b"OMPI_COMM_WORLD_RANK"))
        # Leave out the launcher and the processes between it and the ranks.
        if rank is not None and str(out).encode() in words and b"python" in Path(os.fsdecode(words[0])).name.encode():
            rank_by_pid[int(folder.name)] = int(rank)
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    # A process that a rank has just started looks like the rank.
    return {rank: number for number, rank in rank_by_pid.items() if parents[number] not in rank_by_pid}


def builder_of(number):
    """Return the id of the process that writes a rank's checkpoints, or 0."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == number and b"psmpi.checkpoint.build" in (folder / "cmdline").read_bytes():
                return int(folder.name)
    return 0


def begin(out, *options, warn=1, abort=3, program=("-m", "psmpi.train")):
    """Start a training of three ranks without end, wait for its first row of metrics, and return its process and the
    ids of its ranks by rank."""
    process = start(
        3, *program, "--out", out, "--threads", "1", "--epochs", "5000", "--batch-size", "100", "--lr", "0.001",
        "--stall-warn", warn, "--stall-abort", abort, *options,
    )  # fmt: skip
    rows, start_time = out / "metrics.jsonl", time.monotonic()
    while not (rows.exists() and rows.read_text()) and "OWN_STEP" not in os.environ:
        if process.poll() is not None or time.monotonic() - start_time > 120:
            pytest.fail(f"no first epoch: {finish(process, 1)}")
        time.sleep(0.02)
    return process, ranks_of(out)


def gone(numbers, patience=10.0):
    """Return whether all processes end within `patience` seconds; a zombie has ended."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        states = []
        for number in numbers:
            try:
                states.append(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0])
            except OSError:
                continue
        if set(states) <= {"Z", "X"}:
            return True
        time.sleep(0.05)
    return False


def culprits(err):
    """Return the ranks that the first warning names."""
    first = next((line for line in err.splitlines() if "psmpi: WARNING: no progress" in line), "")
    return [int(rank) for rank in re.findall(r"rank (\d+) on ", first)]


def stopped(out, rank, wait, *options, **times):
    """Stop a rank `wait` seconds after the first epoch; return (status, standard error, whether all processes ended,
    named ranks)."""
    process, ranks = begin(out, *options, **times)
    assert sorted(ranks) == [0, 1, 2], ranks
    time.sleep(wait)
    os.kill(ranks[rank], signal.SIGSTOP)
    status, _, err = finish(process, 90)
    return status, err, gone(ranks.values()), culprits(err)


def test_a_stopped_rank_is_named_and_the_job_ends(tmp_path):
    draw = random.Random(os.urandom(8))
    rank, wait = draw.randrange(3), draw.random()
    status, err, all_gone, named = stopped(tmp_path / "run", rank, wait)
    assert named == [rank] and status == 1 and all_gone, (rank, wait, err)
    assert re.search(rf"rank {rank} on \S+ is silent since [0-9:]+, stopped by a signal \(kill -CONT \d+", err), err
    # All ranks print their stacks; the stopped rank is woken for it.
    for printing_rank in range(3):
        assert f"psmpi, rank {printing_rank} of 3 on " in err
    assert "in run_epoch" in err or "in run" in err
    ranks, _, _ = read_flights(tmp_path / "run" / "flight.jsonl")
    assert [record.state == "silent" for record in ranks] == [k == rank for k in range(3)]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("turn_round", r"rank 1 on \S+ computes since .*perhaps in an endless loop"),
        ("read_for_ever", r"rank 1 on \S+ is in reading samples from \S+mine.npz"),
        ("take_what_nobody_sends", r"ranks wait for each other"),
    ],
)
def test_a_rank_that_gets_no_further_in_a_method_of_ones_own(tmp_path, monkeypatch, what, said):
    (tmp_path / "own.py").write_text(PROGRAM)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "mine.npz", x=rng.random((3000, 8), np.float32), y=rng.integers(0, 3, 3000))
    monkeypatch.setenv("OWN_STEP", what)
    process, _ = begin(
        tmp_path / "run", "--method", "own", *MLP, "--dataset", tmp_path / "mine.npz", program=(tmp_path / "own.py",)
    )
    status, _, err = finish(process, 90)
    assert status == 1, err
    first = next(line for line in err.splitlines() if "no progress" in line)
    assert re.search(said, first), err
    assert f"in {what}" in err and gone(ranks_of(tmp_path / "run").values())
    if what == "take_what_nobody_sends":
        assert "rank 1 is in Recv from rank 0: the Send of rank 0 for it is missing" in err
    else:
        assert re.search(r"ranks? (0, 2 wait|[02] waits) in Wait\(Iallreduce\), call \d+ among ranks 0-2", err), err
        assert re.search(r"missing: Iallreduce, call \d+ among ranks 0-2 \(\w+\): not made by rank 1", err), err


@pytest.mark.slow
def test_a_stopped_writer_of_checkpoints_is_named_and_does_not_outlive_the_job(tmp_path):
    process, ranks = begin(tmp_path / "run", warn=1, abort=3)
    builder, end = 0, time.monotonic() + 30
    while not builder and time.monotonic() < end:
        builder = builder_of(ranks[0])
    os.kill(builder, signal.SIGSTOP)
    status, _, err = finish(process, 90)
    assert status == 1 and culprits(err) == [0], err
    assert re.search(r"rank 0 on \S+ is in waiting for the process that writes the checkpoint", err), err
    assert gone([builder, *ranks.values()], 30)


@pytest.mark.slow
def test_a_stopped_rank_that_goes_on_costs_a_warning(tmp_path):
    process, ranks = begin(tmp_path / "run", abort=0, warn=1)
    os.kill(ranks[1], signal.SIGSTOP)
    flight, end = tmp_path / "run" / "flight.jsonl", time.monotonic() + 60
    while not flight.exists() and time.monotonic() < end:
        time.sleep(0.05)
    os.kill(ranks[1], signal.SIGCONT)
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().count("\n")
    while (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") < rows + 5 and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(1.5)
    process.send_signal(signal.SIGUSR1)
    status, out, err = finish(process, 60)
    assert status == 85 and "and saved in" in out and "--resume auto" in out, err + out
    assert culprits(err) == [1] and "training goes on, after a stall of about" in err


@pytest.mark.slow
def test_ranks_of_several_hosts_are_watched(tmp_path, monkeypatch):
    """Hosts have addresses and loopbacks of their own, so datagrams go over the link between them, not by files."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with contextlib.ExitStack() as stack:
        try:
            hub = stack.enter_context(slow_hosts(3, 1000.0))[0].rpartition("-")[0]
        except UserError as error:
            pytest.skip(f"no network namespaces here: {error}")
        in_namespace = f"import os, sys; name = '{hub}-' + os.environ['PMI_RANK']; "
        in_namespace += "os.execvp('ip', ['ip', 'netns', 'exec', name, sys.executable, *sys.argv[1:]])"
        out = tmp_path / "run"
        status, err, all_gone, named = stopped(
            out,
            2,
            4.0,
            "--method",
            "data_parallel",
            *MLP,
            program=("-c", in_namespace, "-m", "psmpi.train"),
            warn=2,
            abort=6,
        )
        assert named == [2] and status == 1 and all_gone, err
        assert "cannot be watched" not in err and not (out / ".watch").exists()


@pytest.mark.slow
@pytest.mark.repeated
@pytest.mark.timeout(1800)
def test_twenty_stopped_ranks_are_named(tmp_path):
    """Over methods, ranks and moments, 19 of 20 warnings name the stopped rank and no other; failures are printed."""
    draw, outcomes = random.Random(20), []
    for k in range(20):
        method, rank, wait = list(METHODS)[k % len(METHODS)], draw.randrange(3), 3 * draw.random()
        options = ("--method", method, *METHODS[method])
        status, err, all_gone, named = stopped(tmp_path / str(k), rank, wait, *options, warn=2, abort=4)
        outcomes.append((named == [rank], status == 1, all_gone))
        print(json.dumps([method, rank, round(wait, 2), named, status, all_gone]))
        if not all(outcomes[-1]):
            print(err)
    named, status_1, all_ended = (sum(column) for column in zip(*outcomes, strict=True))
    print(f"named {named}, status 1 {status_1}, all gone {all_ended}, of {len(outcomes)}")
    assert named >= 19 and status_1 >= 19 and all_ended == 20
