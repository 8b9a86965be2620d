"""Compare whole trainings by several methods, on this machine as it is and on hosts with slow links."""

from __future__ import annotations

import json as jsonlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from psmpi.bench.hosts import ENVIRONMENT, check_hosts, slow_hosts, wrapper
from psmpi.config import Choices
from psmpi.data import open_dataset
from psmpi.errors import UserError, counted
from psmpi.output import Screen, tell
from psmpi.training.checks import check_classes

Variant = Literal[
    "psl",
    "psl-owner",
    "data_parallel",
    "powersgd",
    "topk",
    "float16",
    "bptt",
    "bptt-synthetic",
    "local_sgd",
    "diloco",
    "dfa",
    "ist",
    "ist-master",
    "sil",
    "sil-stale",
    "dni",
    "dni-pipeline",
    "dni-predsim",
    "wavefront",
    "layer-parallel",
    "layer-parallel-exact",
    "tensor",
    "tensor-1d",
    "tensor-1d-sharded",
    "tensor-2d",
    "spann",
    "spann-slab",
    "spann-random",
    "spann-hypergraph",
    "next",
    "next-choco",
    "hogwild",
    "hogwild-server",
]

# The methods by the names in --methods, and their options of psmpi.train.
VARIANTS: dict[str, tuple[str, ...]] = {
    "psl": ("--colocate",),
    "psl-owner": ("--colocate", "--placement", "owner"),
    "data_parallel": ("--method", "data_parallel"),
    "powersgd": ("--method", "data_parallel", "--compression", "powersgd"),
    "topk": ("--method", "data_parallel", "--compression", "topk"),
    "float16": ("--method", "data_parallel", "--compression", "float16"),
    "bptt": ("--method", "bptt"),
    "bptt-synthetic": ("--method", "bptt", "--future", "synthetic"),
    "local_sgd": ("--method", "local_sgd"),
    "diloco": ("--method", "local_sgd", "--local-steps", "100", "--outer-lr", "0.7", "--outer-momentum", "0.9"),
    "dfa": ("--method", "dfa"),
    "ist": ("--method", "ist", "--placement", "owner"),
    "ist-master": ("--method", "ist", "--colocate"),
    "sil": ("--method", "sil", "--parts", "2"),
    "sil-stale": ("--method", "sil", "--parts", "2", "--hand-over", "stale"),
    "dni": ("--method", "dni"),
    "dni-pipeline": ("--method", "dni", "--ahead", "1", "--bp-lambda", "1"),
    "dni-predsim": ("--method", "dni", "--local-loss", "predsim"),
    "wavefront": ("--method", "wavefront"),
    "layer-parallel": ("--method", "layer_parallel"),
    "layer-parallel-exact": ("--method", "layer_parallel", "--levels", "1"),
    "tensor": ("--method", "tensor"),
    "tensor-1d": ("--method", "tensor", "--grid", "1d"),
    "tensor-1d-sharded": ("--method", "tensor", "--grid", "1d-sharded"),
    "tensor-2d": ("--method", "tensor", "--grid", "2d"),
    "spann": ("--method", "spann"),
    "spann-slab": ("--method", "spann", "--cut", "slab"),
    "spann-random": ("--method", "spann", "--cut", "random"),
    "spann-hypergraph": ("--method", "spann", "--cut", "hypergraph"),
    "next": ("--method", "next", "--tracking", "minibatch"),
    "next-choco": ("--method", "next", "--tracking", "minibatch", "--rule", "choco"),
    "hogwild": ("--method", "hogwild"),
    "hogwild-server": ("--method", "hogwild", "--updates", "server"),
}
OF_VARIANTS = Choices(lambda: {name: " ".join(words) for name, words in VARIANTS.items()})


def network(
    methods: Annotated[tuple[Variant, ...], OF_VARIANTS] = ("psl", "psl-owner", "data_parallel", "local_sgd"),
    ranks: int = 4,
    rates: tuple[float, ...] = (0.0, 100.0),
    delay_ms: float = 0.0,
    dataset: str = "digits",
    data_dir: str = "",
    model: str = "psnet",
    widths: tuple[int, ...] = (),
    loss: str = "psl",
    epochs: int = 2,
    batch_size: int = 100,
    lr: float = 1e-3,
    target: float = 0.0,
    options: str = "",
    repeats: int = 1,
    limit: int = 3600,
    pytorch: bool = False,
    json: str = "",
) -> int:
    """Train with several methods in turn, and compare accuracy, time, bytes and memory.

    Times are those of training and testing, without the start. Bytes and memory are those of the rank that sends or
    holds most.

    Args:
        methods: Methods to compare.
        ranks: Number of ranks, each a host of its own where the rate is limited.
        rates: Bandwidths of each host's link in Mbit/s, 0 for this machine as it is. Others need root, iproute2 and
            MPICH.
        delay_ms: Additional latency of messages between hosts, in ms.
        dataset: Data set, as in psmpi train.
        data_dir: Folder of the data set's files.
        model: Network, as in psmpi train. spann needs slabs, radix or mlp.
        widths: Widths of the model, as in psmpi train.
        loss: Loss, as in psmpi train.
        epochs: Passes over the training samples.
        batch_size: Samples of a minibatch, over all ranks.
        lr: Learning rate of Adam.
        target: Accuracy from 0 to 1. The table shows the time until the end of the first epoch that reaches it.
        options: Further options of psmpi train for all methods, in one word: --options="--batch-norm --init pytorch".
        repeats: Runs of each method; the median of their times counts.
        limit: Seconds after which a run is ended.
        pytorch: Time PyTorch's DistributedDataParallel (gloo) too. Needs psmpi[torch].
        json: File for the figures, in JSON.
    """
    for option, value, least in (("--ranks", ranks, 1), ("--epochs", epochs, 1), ("--repeats", repeats, 1)):
        if value < least:
            raise UserError(f"{option} {value}: expected a whole number from {least} up")
    check_hosts(rates, delay_ms)
    if not 0 <= target < 1:
        raise UserError(f"--target {target}: expected an accuracy from 0 up to, not including, 1")
    check_classes(open_dataset(dataset, data_dir), "bench network", "use a data set with labels")
    if pytorch and find_spec("torch") is None:
        raise UserError("--pytorch needs PyTorch: pip install 'psmpi[torch]'")
    if not 1 <= ranks <= 250:
        raise UserError(f"--ranks {ranks}: expected 1 to 250")
    # psmpi.train runs in another folder: make paths absolute.
    data_dir = str(Path(data_dir).absolute()) if data_dir else ""
    dataset = str(Path(dataset).absolute()) if Path(dataset).is_file() else dataset
    given = ["--dataset", dataset, "--model", model, "--loss", loss, "--epochs", str(epochs), "--threads", "1"]
    given += ["--batch-size", str(batch_size), "--lr", str(lr), *(("--data-dir", data_dir) if data_dir else ())]
    given += [*(["--widths", *map(str, widths)] if widths else []), *shlex.split(options)]
    rows: list[dict[str, Any]] = []
    for rate in rates:
        with slow_hosts(ranks, rate, delay_ms=delay_ms) as hosts:
            for name in methods:
                runs = [_train(ranks, hosts, [*given, *VARIANTS[name]], limit, target) for _ in range(repeats)]
                runs.sort(key=lambda run: run["seconds"])
                rows.append({"method": name, "megabits": rate, **runs[len(runs) // 2]})
                rows[-1]["seconds_of_all"] = [run["seconds"] for run in runs]
                tell(_line(rows[-1]))
            if pytorch:
                rows.append({"method": "PyTorch DDP", "megabits": rate, **_ddp(ranks, hosts, given, limit)})
                tell(_line(rows[-1]))
    _show(rows, ranks, epochs, target)
    if json:
        Path(json).write_text(jsonlib.dumps({"options": given, "ranks": ranks, "rows": rows}) + "\n")
    return 0


def launcher() -> str:
    """The path of mpirun: the one beside this Python, or that of the system; UserError if there is none."""
    beside = Path(sys.executable).with_name("mpirun")
    path = str(beside) if beside.exists() else shutil.which("mpirun")
    if path is None:
        raise UserError("mpirun is not installed: pip install 'psmpi[mpi]', or load your site's MPI module")
    return path


def run_program(command: Sequence[str], slow: bool = False, limit: int = 600, cwd: Path | None = None) -> str:
    """Run a command and return its output.

    slow: use the environment of hosts with slow links. Raise UserError if the command fails or does not end within
    `limit` seconds; it and its child processes are then killed.
    """
    environment = {**os.environ, **(ENVIRONMENT if slow else {}), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, cwd=cwd,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=limit)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise UserError(f"{' '.join(command)}: not done after {limit} s; raise --limit, or measure less") from None
        raise
    if process.returncode:
        raise UserError(f"{' '.join(command)} failed: {err.strip() or out.strip()}")
    return out


def _train(ranks: int, hosts: list[str], options: Sequence[str], limit: int, target: float) -> dict[str, Any]:
    from psmpi import checkpoint

    before = wrapper(hosts) if hosts else []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        program = [sys.executable, "-m", "psmpi.train", "--out", str(out), *options]
        run_program([launcher(), "-n", str(ranks), *before, *program], bool(hosts), limit)
        rows = [jsonlib.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        held = checkpoint.read_contents(checkpoint.newest(out)).placement["ranks"]
    last = rows[-1]
    return {
        "accuracy": last["test_accuracy"],
        "accuracies": [row["test_accuracy"] for row in rows],
        "seconds": last["seconds"],
        # None if no epoch reached the target.
        "seconds_to_target": next((row["seconds"] for row in rows if row["test_accuracy"] >= target > 0), None),
        "ms_per_step": 1e3 * last["seconds"] / last["step"],
        "megabytes_sent": max(last["bytes_sent_by_rank"]) / 1e6,
        # Columns of the placement table: host, role, classes, held, owned, bytes, device.
        "megabytes_held": max(rank[5] for rank in held) / 1e6,
    }


def _ddp(ranks: int, hosts: list[str], options: Sequence[str], limit: int) -> dict[str, Any]:
    """Time a step of PyTorch's DistributedDataParallel with the same network and minibatch, on random samples."""
    before = wrapper(hosts) if hosts else []
    program = [sys.executable, "-m", "psmpi.bench.ddp", *options]
    row = jsonlib.loads(
        run_program([launcher(), "-n", str(ranks), *before, *program], bool(hosts), limit).splitlines()[-1]
    )
    return {"ms_per_step": row["ms_per_step"]}


def _line(row: dict[str, Any]) -> str:
    rate = f"{row['megabits']:g} Mbit/s" if row["megabits"] else "unlimited"
    if "accuracy" not in row:
        return f"{row['method']}, {rate}: {row['ms_per_step']:.2f} ms a step"
    return (
        f"{row['method']}, {rate}: accuracy {100 * row['accuracy']:.2f} %, {row['seconds']:.1f} s, "
        f"{row['ms_per_step']:.2f} ms a step, {row['megabytes_sent']:.1f} MB sent"
    )


def _show(rows: list[dict[str, Any]], ranks: int, epochs: int, target: float) -> None:
    from rich.table import Table

    table = Table(title=f"{counted(ranks, 'rank')}, {counted(epochs, 'epoch')}", title_justify="left")
    table.add_column("method")
    reached = (f"s to {100 * target:g} %",) if target else ()
    for name in ("Mbit/s", "accuracy %", "s", *reached, "ms a step", "MB sent by a rank", "MB held by a rank"):
        table.add_column(name, justify="right")
    for row in rows:
        rate = f"{row['megabits']:g}" if row["megabits"] else "unlimited"
        if "accuracy" not in row:
            table.add_row(row["method"], rate, "", "", *("" for _ in reached), f"{row['ms_per_step']:.2f}", "", "")
            continue
        until = ("never" if row["seconds_to_target"] is None else f"{row['seconds_to_target']:.1f}",) if target else ()
        table.add_row(
            row["method"], rate, f"{100 * row['accuracy']:.2f}", f"{row['seconds']:.1f}", *until,
            f"{row['ms_per_step']:.2f}", f"{row['megabytes_sent']:.1f}", f"{row['megabytes_held']:.1f}",
        )  # fmt: skip
    Screen().print(table)
