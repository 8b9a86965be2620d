"""Trainings under mpirun leave what the same trainings on ranks that are threads leave, bit for bit.

Sums are of numbers that MPICH adds in the order of psmpi.testing, as it does for less than some kilobytes; another MPI
may round otherwise.
"""

import numpy as np
import pytest
from helpers.runs import distance

from psmpi.comm.world import library

F64 = ("--dtype", "float64")
MLP = ("--model", "mlp", "--widths", "20", "12", "--loss", "nll")
PARTS = ("--epochs", "3", "--batch-size", "300")
DATA, LOCAL = ("--method", "data_parallel"), ("--method", "local_sgd", "--local-steps", "4")
IST, SIL = ("--method", "ist", *MLP, "--local-steps", "4"), ("--method", "sil", *MLP, *PARTS)
PAIRS = ("--partition", "pairs", *F64)
RUNS = {
    "psl of a master": (3, F64),
    "psl of owners, masters and replicas": (7, ("--replicas", "2", "--masters", "2", "--placement", "owner")),
    "plse": (4, (*PAIRS, "--optimizer", "plse")),
    "plbfgs": (3, (*PAIRS, "--optimizer", "plbfgs", "--colocate")),
    "data_parallel by a ring": (3, (*DATA, "--allreduce", "ring", "--bucket-megabytes", "0.003")),
    "data_parallel, compressed": (4, (*DATA, "--compression", "topk")),
    "local_sgd": (3, LOCAL),
    "local_sgd with an outer optimizer": (4, (*LOCAL, "--outer-lr", "0.7", "--outer-momentum", "0.9")),
    "dfa": (3, ("--method", "dfa", *MLP)),
    "dfa with convolutions": (2, ("--method", "dfa", "--loss", "nll")),
    "ist of masters that compute": (3, (*IST, "--colocate")),
    "ist of owners": (4, (*IST, "--placement", "owner")),
    "sil": (3, (*SIL, "--parts", "3")),
    "sil by labels": (2, (*SIL, "--parts", "2", "--hand-over", "labels")),
}
SWEEP = {
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
MEASURED = {"seconds", "samples_per_second"}


@pytest.mark.parametrize("name", [*RUNS, *(pytest.param(name, marks=pytest.mark.slow) for name in SWEEP)])
def test_processes_leave_what_threads_leave(train, mpi_train, tmp_path, name):
    ranks, options = {**RUNS, **SWEEP}[name]
    here = train(ranks, *STEPS, *options, out=tmp_path / "threads")
    there = mpi_train(ranks, *STEPS, *options, out=tmp_path / "processes")
    ours, theirs = here.tensors(), there.tensors()
    assert len(ours) > 1 and distance(ours, theirs) <= 1e-6
    if "MPICH" in library():
        assert all(np.array_equal(ours[k], theirs[k], equal_nan=True) for k in ours)
        rows = [[{k: v for k, v in row.items() if k not in MEASURED} for row in run.rows] for run in (here, there)]
        assert rows[0] == rows[1]
        # mpirun of Open MPI gives the first rank a terminal.
        shown = [
            [line for line in run.stdout.splitlines() if "samples/s" not in line and "run directory" not in line]
            for run in (here, there)
        ]
        assert shown[0] == shown[1]
