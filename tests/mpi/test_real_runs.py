"""Trainings under mpirun leave the same tensors and metrics, bit for bit, as trainings on ranks that are threads.

MPICH adds arrays of less than some kilobytes in the order of psmpi.testing; another MPI may round otherwise.
"""

import json

import numpy as np
import pytest
from helpers.paths import TESTS
from helpers.processes import launch
from helpers.runs import Trained, default_options, distance

from psmpi.comm.world import library
from psmpi.testing import train

F64 = ("--dtype", "float64")
MLP = ("--model", "mlp", "--widths", "20", "12", "--loss", "nll")
PARTS = ("--epochs", "3", "--batch-size", "300")
DATA, LOCAL = ("--method", "data_parallel"), ("--method", "local_sgd", "--local-steps", "4")
IST, SIL = ("--method", "ist", *MLP, "--local-steps", "4"), ("--method", "sil", *MLP, *PARTS)
PAIRS = ("--partition", "pairs", *F64)
WARM = ("--levels", "3", "--coarsening", "2", "--warm-start", "both", "--adjoint-cycles", "2")
ROWS = ("--dataset", "digits:rows", "--model", "lstm", "--widths", "8", "8", "8", "8")
COPY = ("--dataset", "repeat_copy:2", "--model", "lstm", "--widths", "8", "--unroll", "4", "--loss", "nll")
ATTENTIVE = ("--dataset", "copying:2", "--model", "transformer", "--widths", "12", "--heads", "2", "--blocks", "1",
             "--loss", "nll")  # fmt: skip
TILES = ("--domains", "2", "2", "--scores", "distributed", "--epochs", "2")
SPARSE = (
    "--dataset",
    "sparse",
    "--model",
    "linear",
    "--loss",
    "logistic",
    "--optimizer",
    "sgd",
    "--batch-size",
    "1000",
)
RUNS = {
    "tensor": (4, ("--method", "tensor", *ATTENTIVE, "--grid", "2,2,1")),
    "psl of a master": (3, F64),
    "psl of owners, masters and replicas": (7, ("--replicas", "2", "--masters", "2", "--placement", "owner")),
    "plbfgs": (3, (*PAIRS, "--optimizer", "plbfgs", "--colocate")),
    "data_parallel by a ring": (3, (*DATA, "--allreduce", "ring", "--bucket-megabytes", "0.003")),
    "data_parallel, compressed": (4, (*DATA, "--compression", "topk")),
    "local_sgd with an outer optimizer": (4, (*LOCAL, "--outer-lr", "0.7", "--outer-momentum", "0.9")),
    "wavefront": (4, ("--method", "wavefront", *ROWS, "--clip", "0")),
    "bptt": (3, ("--method", "bptt", *COPY)),
    "dfa": (3, ("--method", "dfa", *MLP)),
    "dni": (3, ("--method", "dni", *MLP, "--layer-blocks", "3")),
    "sil": (3, (*SIL, "--parts", "3")),
    "next": (3, ("--method", "next", *MLP, "--graph", "erdos:0.5", "--link-probability", "0.7")),
    "spann": (4, ("--method", "spann", "--widths", "32", "32", "--epochs", "3")),
    "hogwild of components": (3, ("--method", "hogwild", "--updates", "cyclades", *SPARSE)),
}
SWEEP = {
    "ist of masters that compute": (3, (*IST, "--colocate")),
    "layer_parallel in rows": (4, ("--method", "layer_parallel", *WARM, "--layer-replicas", "2")),
    "plse": (4, (*PAIRS, "--optimizer", "plse")),
    "layer_parallel by lbfgs": (
        3,
        ("--method", "layer_parallel", *F64, "--depth", "24", "--optimizer", "lbfgs", "--lr", "1"),
    ),
    "bptt with synthetic gradients": (4, ("--method", "bptt", *COPY, "--future", "synthetic")),
    "ist of owners": (4, (*IST, "--placement", "owner")),
    "dni of inputs too": (2, ("--method", "dni", "--loss", "nll", "--synthetic-inputs", "--synthesizer-hidden", "20")),
    "sil by labels": (2, (*SIL, "--parts", "2", "--hand-over", "labels")),
    "wavefront in threads": (2, ("--method", "wavefront", *ROWS, "--skew", "2", "--chunk-steps", "3")),
    "next that sends little": (4, ("--method", "next", *MLP, "--rule", "choco", "--tracking", "minibatch")),
    "spann in place": (3, ("--method", "spann", *TILES, "--in-place", "--clip", "0")),
    "local_sgd": (3, LOCAL),
    "wavefront of each step": (
        2,
        (
            "--method",
            "wavefront",
            "--dataset",
            "repeat_copy:2",
            "--model",
            "gru",
            "--loss",
            "nll",
            "--widths",
            "8",
            "8",
        ),
    ),
    "tensor in one dimension": (3, ("--method", "tensor", *MLP, "--grid", "1d", "--saved", "gathered")),
    "tensor by panels": (4, ("--method", "tensor", *ATTENTIVE, "--grid", "2d")),
    "hogwild of networks": (4, ("--method", "hogwild", "--updates", "cyclades", *MLP)),
    "dfa with convolutions": (2, ("--method", "dfa", "--loss", "nll")),
    "dni by local losses": (3, ("--method", "dni", *MLP, "--local-loss", "predsim")),
    "layer_parallel": (4, ("--method", "layer_parallel")),
    "layer_parallel with warm starts": (2, ("--method", "layer_parallel", *WARM, "--gamma-ddt", "1e-6")),
    "psl of owners": (4, ("--placement", "owner", "--masters", "2")),
    "psl of pairs": (4, PAIRS),
    "psl by lbfgs": (3, ("--colocate", "--masters", "2", "--optimizer", "lbfgs", "--lr", "1")),
    "plsr1": (4, (*PAIRS, "--optimizer", "plsr1", "--globalization", "trust-region")),
    "data_parallel by mpi": (4, (*DATA, *F64, "--allreduce", "mpi")),
    "data_parallel by doubling": (4, (*DATA, "--allreduce", "doubling")),
    "data_parallel by halving": (4, (*DATA, "--allreduce", "halving")),
    **{f"data_parallel by {name}": (3, (*DATA, "--compression", name)) for name in ("dgc", "powersgd", "qsgd", "sign")},
}
STEPS = ("--epochs", "2", "--max-steps", "18")
# Curvature of elements multiplies rounding of another MPI: by a thousand in three steps, to 1e-11 after 12.
FEW = ("--epochs", "2", "--max-steps", "12")
# A step with a line search takes as long as 20 others, and layer_parallel has many messages in each.
SEARCHED = ("--epochs", "2", "--max-steps", "3")
MEASURED = {"seconds", "samples_per_second"}


def agree(first, second):
    """Assert that two runs have equal tensors; with MPICH also equal bits, and equal metrics except measured ones."""
    first_tensors, second_tensors = first.tensors(), second.tensors()
    assert len(first_tensors) > 1 and distance(first_tensors, second_tensors) <= 1e-6
    if "MPICH" in library():
        assert all(np.array_equal(first_tensors[k], second_tensors[k], equal_nan=True) for k in first_tensors)
        rows = [[{k: v for k, v in row.items() if k not in MEASURED} for row in run.rows] for run in (first, second)]
        assert rows[0] == rows[1]


# First words of lines with measured times or names of folders.
APART = ("done in ", "predict: ", "inspect: ", "go on: ", "run directory ")


def shown(stdout):
    """Return the printed lines without measured times and names of folders."""
    return [line for line in stdout.splitlines() if not line.startswith(APART) and " MB sent" not in line]


def compare(ranks, runs, folder):
    """Train each of the runs on threads, and all runs in processes that mpirun starts once; assert that they agree."""
    words, threads = {}, []
    for name, options in runs.items():
        steps = FEW if "pairs" in options else SEARCHED if {"layer_parallel", "lbfgs"} <= {*options} else STEPS
        words[name] = [*map(str, default_options(options)), *steps, *options, "--out"]
        threads.append(train(ranks, [*words[name], folder / "threads" / name], cwd=folder))
        assert threads[-1].status == 0, f"{name}: {threads[-1].stderr}"
    arguments = [json.dumps([*options, str(folder / "processes" / name)]) for name, options in words.items()]
    status, stdout, stderr = launch(ranks, TESTS / "helpers" / "program_trainings.py", *arguments, cwd=folder)
    assert status == 0, stderr
    for name in runs:
        agree(*(Trained(folder / how / name, "") for how in ("threads", "processes")))
    if "MPICH" in library():
        # mpirun of Open MPI gives the first rank a terminal.
        assert shown(stdout) == shown("".join(result.stdout for result in threads))


@pytest.mark.parametrize("ranks", sorted({ranks for ranks, _ in RUNS.values()}))
def test_processes_leave_what_threads_leave(tmp_path, ranks):
    compare(ranks, {name: options for name, (size, options) in RUNS.items() if size == ranks}, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", sorted({ranks for ranks, _ in SWEEP.values()}))
def test_processes_leave_what_threads_leave_in_more_runs(tmp_path, ranks):
    compare(ranks, {name: options for name, (size, options) in SWEEP.items() if size == ranks}, tmp_path)
