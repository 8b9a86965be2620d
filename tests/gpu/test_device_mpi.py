"""Trainings with the GPU backend on a stand-in for CuPy: they end with the weights of trainings on the host."""

import json
import os
import re

import pytest
from helpers import cuda_host
from helpers.paths import FAKE
from helpers.processes import launch
from helpers.runs import Trained, distance, once, run

from psmpi.methods.psl.method import PartiallySeparable

pytestmark = pytest.mark.skipif(cuda_host.compiler() is None, reason="no g++ to compile the CUDA kernels as C++")

EXACT = ("--dtype", "float64", "--max-steps", "8", "--epochs", "10", "--batch-size", "32", "--lr", "0.001")


@pytest.fixture(autouse=True)
def fake(monkeypatch, stand_in):
    """The stand-in for CuPy in this process, and in the processes that it starts."""
    for real in ("float", "double"):
        cuda_host.load(real)
    monkeypatch.setenv("PYTHONPATH", str(FAKE), prepend=os.pathsep)


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """host(*options): train on one rank on the host, once for each `options`, and return a `Trained`."""
    return once(tmp_path_factory.mktemp("host"), "--backend", "numpy")


GRIDS = {
    "one process": (1, ()),
    "a master and two workers": (3, ()),
    "owners": (3, ("--placement", "owner")),
    "several masters": (5, ("--masters", "2", "--placement", "owner")),
    "masters that compute": (3, ("--colocate", "--masters", "2")),
    "replicas": (5, ("--replicas", "2", "--placement", "owner", "--colocate")),
    "split trunk": (3, ("--trunk", "split")),
    "split trunk of replicas": (5, ("--trunk", "split", "--replicas", "2", "--placement", "owner", "--colocate")),
    "pairs": (4, ("--partition", "pairs")),
    "pairs of owners": (3, ("--partition", "pairs", "--placement", "owner", "--colocate")),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            n, marks=[pytest.mark.slow] * (n in ("owners", "split trunk", "pairs", "replicas", "several masters"))
        )
        for n in GRIDS
    ],
)
def test_weights_and_bytes_are_those_of_the_host(train, host, name):
    ranks, options = GRIDS[name]
    host_run = train(ranks, "--backend", "numpy", *EXACT, *options)
    device_run = train(ranks, "--backend", "cupy", *EXACT, *options)
    assert distance(host(*EXACT).tensors(), device_run.tensors()) <= 1e-10
    for key in ("test_accuracy", "bytes_sent_by_rank", "bytes_received_by_rank"):
        assert device_run.rows[-1][key] == host_run.rows[-1][key]
    assert device_run.rows[-1]["train_loss"] == pytest.approx(host_run.rows[-1]["train_loss"], rel=1e-10)
    assert "backend cupy (host memory as a device, device 0)" in device_run.stdout


def test_statistics_of_slices_are_not_summed_from_a_device():
    status, _, err = run(3, "-m", "psmpi.train", "--backend", "cupy", "--batch-norm", "--trunk", "split", "--colocate")
    assert status == 1 and "use --trunk replicated, or --backend compiled" in " ".join(err.split())


@pytest.mark.parametrize(
    ("kind", "loss"),
    [("arcface", "nll"), ("cosface", "psl"), pytest.param("arcface", "hinge", marks=pytest.mark.slow)],
)
def test_cosines_with_margins_on_devices_have_the_weights_of_the_host(train, kind, loss):
    options = (*EXACT, "--model", "head", "--widths", "20", "--scale", "8", "--loss", loss, "--margin", "0.4")
    options = (*options, "--margin-kind", kind)
    host_run = train(1, "--backend", "numpy", *options)
    for ranks in (1, 3):
        device_run = train(ranks, "--backend", "cupy", *options, "--colocate")
        assert distance(host_run.tensors(), device_run.tensors()) <= 1e-10
        assert device_run.rows[-1]["test_accuracy"] == host_run.rows[-1]["test_accuracy"]


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "data_parallel"),
        ("--method", "data_parallel", "--allreduce", "ring", "--bucket-megabytes", "0.01"),
        ("--method", "data_parallel", "--compression", "topk"),
        pytest.param(("--method", "data_parallel", "--nccl"), marks=pytest.mark.slow),
        pytest.param(("--method", "data_parallel", "--optimizer", "lbfgs", "--lr", "1"), marks=pytest.mark.slow),
        ("--method", "local_sgd", "--local-steps", "6", "--outer-lr", "0.7", "--outer-momentum", "0.9"),
        ("--method", "ist", "--local-steps", "6", "--colocate", "--loss", "nll"),
        (
            "--method",
            "ist",
            "--local-steps",
            "6",
            "--placement",
            "owner",
            "--model",
            "mlp",
            "--widths",
            "16",
            "12",
            "--batch-norm",
            "--loss",
            "nll",
            "--optimizer",
            "adam",
            "--optimizer-state",
            "travel",
        ),
        (
            "--method",
            "ist",
            "--model",
            "resnet",
            "--widths",
            "4",
            "6",
            "--blocks",
            "1",
            "3",
            "--deal",
            "blocks",
            "--loss",
            "nll",
            "--optimizer",
            "sgd",
            "--max-steps",
            "6",
        ),
    ],
    ids=str,
)
def test_replicas_on_devices_have_the_weights_of_the_host(train, mpi_train, options, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA", "alone")
    device_tensors = (mpi_train if "--nccl" in options else train)(3, "--backend", "cupy", *EXACT, *options).tensors()
    host_tensors = train(3, "--backend", "numpy", *EXACT, *(o for o in options if o != "--nccl")).tensors()
    assert distance(host_tensors, device_tensors) <= 1e-9


SPANN = (*EXACT, "--max-steps", "3", "--method", "spann", "--loss", "nll", "--optimizer", "momentum", "--clip", "0")


@pytest.mark.parametrize(
    "options",
    [
        ("--model", "slabs", "--widths", "24", "16"),
        ("--model", "slabs", "--widths", "36", "16", "--domains", "2", "2", "--in-place", "--scores", "distributed"),
        ("--model", "radix", "--widths", "64", "--depth", "3", "--cut", "random"),
    ],
)
def test_parts_of_layers_train_on_the_device_as_on_the_host(train, options):
    """Kernels pack and add the halos, which move through pinned memory."""
    host_run, device_run = (train(3, "--backend", backend, *SPANN, *options) for backend in ("numpy", "cupy"))
    assert distance(host_run.tensors(), device_run.tensors()) <= 1e-10


# The gradients of biases of keys are 0 up to rounding, which Adam would scale up to steps.
TENSOR = (*EXACT, "--max-steps", "3", "--method", "tensor", "--loss", "nll", "--optimizer", "momentum")
ATTENTIVE = ("--dataset", "digits:rows", "--model", "transformer", "--widths", "12", "--heads", "4", "--blocks", "1")


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        pytest.param(4, (*ATTENTIVE, "--grid", "1,2,2"), marks=pytest.mark.slow),
        pytest.param(4, (*ATTENTIVE, "--grid", "2d"), marks=pytest.mark.slow),
        (6, ("--model", "mlp", "--widths", "14", "13", "--grid", "3,1,2", "--saved", "gathered")),
        (3, ("--model", "mlp", "--widths", "14", "13", "--grid", "1d")),
    ],
    ids=str,
)
def test_tiles_on_devices_have_the_weights_and_bytes_of_the_host(train, ranks, options):
    host_run, device_run = (train(ranks, "--backend", backend, *TENSOR, *options) for backend in ("numpy", "cupy"))
    assert distance(host_run.tensors(), device_run.tensors()) <= 1e-10
    for key in ("test_accuracy", "bytes_sent_by_rank", "bytes_received_by_rank"):
        assert device_run.rows[-1][key] == host_run.rows[-1][key]


DFA = (*EXACT, "--method", "dfa", "--loss", "nll")
MLP = ("--model", "mlp", "--widths", "24", "16")
# Six epochs of three steps.
SIL = ("--method", "sil", "--dtype", "float64", "--batch-size", "500", "--epochs", "6", "--loss", "nll", "--lr", "0.01")
DEEP = ("--model", "mlp", "--widths", "24", "20", "16")
SWEEP = ("sil alone", "sil stored, three parts", "sil stale")
PARTS = {
    "dfa alone": (1, (*DFA, *MLP)),
    "dfa": (3, (*DFA, *MLP, "--optimizer", "adam", "--clip", "0.5")),
    "dfa of psl, clipped": (3, (*DFA, *MLP, "--loss", "psl", "--kappa", "200", "--optimizer", "sgd", "--lr", "1e-9")),
    "dfa with convolutions": (3, DFA),
    "sil alone": (1, (*SIL, *DEEP, "--parts", "4", "--recovery-epochs", "1")),
    "sil stored": (2, (*SIL, *DEEP, "--recovery-epochs", "2", "--clip", "0.05")),
    "sil stored, three parts": (3, (*SIL, "--recovery-epochs", "1")),
    "sil stored, two rows": (4, (*SIL, *DEEP, "--parts", "2", "--recovery-epochs", "2")),
    "sil recompute": (3, (*SIL, *DEEP, "--hand-over", "recompute")),
    "sil stale": (2, (*SIL, "--hand-over", "stale", "--recovery-epochs", "1")),
    "sil labels, two rows": (4, (*SIL, *DEEP, "--parts", "2", "--hand-over", "labels", "--labels-noise", "0.3")),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in SWEEP)) for n in PARTS],
)
def test_parts_of_layers_on_devices_have_the_weights_and_bytes_of_the_host(train, name):
    ranks, options = PARTS[name]
    host_run, device_run = (train(ranks, "--backend", backend, *options) for backend in ("numpy", "cupy"))
    assert distance(host_run.tensors(), device_run.tensors()) <= 1e-9
    assert "backend cupy" in device_run.stdout
    for row, expected in zip(device_run.rows, host_run.rows, strict=True):
        for key in ("test_accuracy", "bytes_sent_by_rank", "bytes_received_by_rank", "macs", "dead_units"):
            assert row.get(key) == expected.get(key)
        for key in expected.keys() & {"train_loss", "test_loss", "target_distance", "nearest_accuracy", "alignment"}:
            # Rows have rounded cosines.
            assert row[key] == pytest.approx(expected[key], rel=1e-9, abs=2e-6 if key == "alignment" else 0)


@pytest.mark.slow
def test_the_rows_of_a_part_sum_by_nccl(mpi_train, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA", "alone")
    ranks, options = PARTS["sil stored, two rows"]
    host_run, device_run = (mpi_train(ranks, *options, "--backend", *way) for way in (("numpy",), ("cupy", "--nccl")))
    assert distance(host_run.tensors(), device_run.tensors()) <= 1e-9


@pytest.mark.slow
def test_what_was_handed_over_is_made_anew_on_the_other_kind_of_memory(train, tmp_path):
    """The run changes its backend at the hand-over, twice in the part after it, and in the recovery."""
    folder, options = tmp_path / "begun", (*SIL, *DEEP, "--recovery-epochs", "2", "--max-steps")
    train(2, "--backend", "numpy", *options, "6", out=folder)
    for backend, end in (("cupy", "8"), ("numpy", "10"), ("cupy", "14"), ("numpy", "18")):
        result = train(2, "--backend", backend, *options, end, "--resume", "auto", out=folder)
    assert distance(train(2, "--backend", "numpy", *options, "18").tensors(), result.tensors()) <= 1e-9


@pytest.mark.parametrize(
    ("ranks", "end", "options"),
    [
        (2, "7", (*DFA, *MLP)),
        pytest.param(3, "13", (*SIL, "--parts", "3", "--recovery-epochs", "1"), marks=pytest.mark.slow),
        pytest.param(2, "7", (*SIL, *DEEP, "--parts", "4", "--hand-over", "stale"), marks=pytest.mark.slow),
    ],
    ids=["dfa", "sil stored", "sil stale"],
)
def test_parts_go_on_on_a_device_bit_for_bit(train, tmp_path, ranks, end, options):
    folder, options = tmp_path / "begun", ("--backend", "cupy", *options, "--max-steps")
    train(ranks, *options, end, out=folder)
    result = train(ranks, *options, "18", "--resume", "auto", out=folder)
    assert distance(train(ranks, *options, "18").tensors(), result.tensors()) == 0


OPTIMIZERS = [pytest.param("lbfgs", "1", marks=pytest.mark.slow), ("lsr1-tr", "1"), ("rmsprop", "0.01")]


@pytest.mark.parametrize(("optimizer", "lr"), OPTIMIZERS)
def test_optimizers_step_on_the_device(train, host, monkeypatch, stand_in, optimizer, lr):
    options = (*EXACT, "--optimizer", optimizer, "--lr", lr, "--weight-decay", "0.001")
    expected, step, checks = host(*options).tensors(), PartiallySeparable.step, []

    def checked(self, ids, lr):
        assert self.optimizer.vectors
        for array in (*vars(self.optimizer).values(), *self.optimizer.vectors.values()):
            assert getattr(array, "shape", ()) != self.w.shape or isinstance(array, stand_in.ndarray)
        checks.append(ids)
        step(self, ids, lr)

    monkeypatch.setattr(PartiallySeparable, "step", checked)
    assert distance(expected, train(3, "--backend", "cupy", *options).tensors()) <= 1e-6
    assert len(checks) == 3 * 8


def test_float32_and_without_graphs_too(train, host):
    options = ("--max-steps", "8", "--batch-size", "32")
    for extra_options in (("--no-cuda-graphs",), ("--compute", "bfloat16")):
        device_run = train(2, "--backend", "cupy", *options, *extra_options)
        assert distance(host(*options).tensors(), device_run.tensors()) <= 1e-5
    for method in ("dfa", "sil"):
        extra_options = (*options, "--method", method, "--optimizer", "momentum", "--epochs", "4")
        device_run = train(2, "--backend", "cupy", "--compute", "tf32", *extra_options)
        assert distance(host(*extra_options).tensors(), device_run.tensors()) <= 1e-5


NEWTON = ("--partition", "pairs", "--dtype", "float64", "--batch-size", "50")
RULES = {
    "plbfgs": (1, ("--optimizer", "plbfgs", "--damping")),
    "plsr1": (3, ("--optimizer", "plsr1", "--globalization", "trust-region")),
    # Minibatches in which most workers have no sample.
    "plse": (4, ("--optimizer", "plse", "--placement", "owner", "--extrapolation", "constant", "--batch-size", "1")),
    "merged": (3, ("--optimizer", "plse", "--merge-pairs", "--scaling", "moments", "--colocate", "--masters", "2")),
}


def pair_distance(first, second):
    """The distance of weights and pairs. Other tensors are ill-conditioned functions of these, and amplify rounding."""
    tensors = [{k: v for k, v in run.tensors().items() if "weights/" in k or "pairs" in k} for run in (first, second)]
    assert len(tensors[0]) > 8
    return distance(*tensors)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "plse")) for n in RULES])
def test_partitioned_quasi_newton_on_devices_has_the_weights_of_the_host(train, name):
    ranks, options = RULES[name]
    host_run, device_run = (
        train(ranks, "--backend", b, *NEWTON, "--max-steps", "2", *options) for b in ("numpy", "cupy")
    )
    assert pair_distance(host_run, device_run) <= 1e-9
    assert "backend cupy (host memory as a device, device 0)" in device_run.stdout
    assert device_run.rows[-1]["bytes_sent_by_rank"] == host_run.rows[-1]["bytes_sent_by_rank"]


@pytest.mark.slow
def test_curvature_goes_on_on_the_other_kind_of_memory(train, tmp_path):
    options = (*NEWTON, "--scaling", "moments", "--optimizer", "plse", "--extrapolation", "adaptive")
    host_run = train(1, "--backend", "numpy", *options, "--max-steps", "2")
    for first, then in (("cupy", "numpy"), ("numpy", "cupy")):
        folder = tmp_path / first
        train(3, "--backend", first, *options, "--max-steps", "1", out=folder)
        result = train(2, "--backend", then, *options, "--max-steps", "2", "--resume", "auto", out=folder)
        assert pair_distance(host_run, result) <= 1e-9


@pytest.mark.parametrize("ranks", [1, 3])
def test_convolutions_by_cudnn_give_the_weights_of_the_host(train, host, ranks):
    result = train(ranks, "--backend", "cupy", "--convolution", "cudnn", *EXACT)
    assert distance(host(*EXACT).tensors(), result.tensors()) <= 1e-10
    assert "convolutions by cuDNN 9.12)" in result.stdout
    # Each size is reported once, whichever ranks compute it.
    reports = [line for line in result.stdout.splitlines() if line.startswith("convolution ")]
    assert reports and len(reports) == len(set(reports))
    assert all(line.endswith(": cuDNN on turned images") for line in reports)


def test_without_cudnn_nothing_is_measured(mpi_train, host, monkeypatch):
    monkeypatch.setenv("FAKE_CUDNN", "import")
    result = mpi_train(2, "--backend", "cupy", "--convolution", "measured", *EXACT)
    assert distance(host(*EXACT).tensors(), result.tensors()) <= 1e-10
    assert result.stdout.count("psmpi's own alone: cuDNN does not load") == 1


RECORDED = """
import sys
import cupy
from psmpi.backend.gpu.runtime import stream_of
from psmpi.train import main

status = main()
print("graphs", stream_of(cupy, 0).launches)
sys.exit(status)
"""


@pytest.mark.parametrize("way", ["stored", "labels"])
def test_the_passes_of_parts_are_recorded(tmp_path, way):
    program = tmp_path / "recorded.py"
    program.write_text(RECORDED)
    options = (*SIL, *DEEP, "--parts", "4", "--backend", "cupy", "--hand-over", way, "--out", tmp_path / "run")
    status, stdout, stderr = launch(1, program, *options)
    assert status == 0, stderr
    # 18 steps of one part after the other (stored), or of all four parts (labels). The first steps of each part and of
    # each size of minibatches launch no graph.
    assert int(stdout.split()[-1]) >= (18 - 4 * 4 if way == "stored" else 4 * (18 - 6))


LBFGS = ("--optimizer", "lbfgs", "--lr", "1", "--history", "4")


@pytest.mark.parametrize(("first", "then"), [("cupy", "numpy"), ("numpy", "cupy")])
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [((), 1e-10), (LBFGS, 1e-6)],
    ids=str,
)
def test_a_run_goes_on_on_the_other_kind_of_memory(train, host, tmp_path, first, then, options, tolerance):
    folder, options = tmp_path / "begun", (*EXACT, *options)
    train(3, "--backend", first, *options[:3], "4", *options[4:], out=folder)
    result = train(2, "--backend", then, *options, "--resume", "auto", out=folder)
    assert distance(host(*options).tensors(), result.tensors()) <= tolerance


@pytest.mark.parametrize(
    "then", [("--optimizer", "adam"), pytest.param(("--optimizer", "lbfgs", "--lr", "1"), marks=pytest.mark.slow)]
)
def test_an_optimizer_that_starts_afresh_starts_from_nothing(train, tmp_path, then):
    runs = []
    for backend in ("numpy", "cupy"):
        out = tmp_path / backend
        train(2, "--backend", backend, *EXACT, "--optimizer", "sgd", "--max-steps", "3", out=out)
        runs.append(train(2, "--backend", backend, *EXACT, *then, "--resume", "auto", out=out))
    assert distance(runs[0].tensors(), runs[1].tensors()) <= 1e-6


def test_without_a_compiler_auto_computes_on_the_host(mpi_train, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA", "compiler")
    result = mpi_train(2, *EXACT)
    assert result.stdout.count("the GPU is not used") == 1 and "backend cupy" not in result.stdout


@pytest.mark.parametrize("seen", ["all", pytest.param("one", marks=pytest.mark.slow)])
def test_nccl_exchanges_scores_and_sums_replicas(mpi_train, host, monkeypatch, seen):
    options = ("--nccl", "--placement", "owner", "--replicas", "2")
    # A rank sees all devices, or only its own.
    monkeypatch.setenv("FAKE_CUDA_DEVICES" if seen == "all" else "FAKE_CUDA", "5" if seen == "all" else "alone")
    result = mpi_train(5, "--backend", "cupy", *EXACT, *options, timeout=240)
    assert distance(host(*EXACT).tensors(), result.tensors()) <= 1e-10


def test_the_placement_table_shows_each_rank_s_device(mpi_train, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "2")
    monkeypatch.setenv("COLUMNS", "200")
    result = mpi_train(3, *EXACT)
    assert re.findall(r"device (\d) ", result.stdout)[:3] == ["0", "1", "0"]
    assert "backend cupy" in result.stdout


@pytest.mark.parametrize("method", ["dfa", "sil"])
def test_a_device_that_is_there_is_used(train, method):
    assert "backend cupy" in train(2, "--max-steps", "2", "--method", method).stdout


PROBE = """
import json
import os
import numpy as np
from psmpi.backend import make_backend
from psmpi.comm.bridge import GpuAware, Staged
from psmpi.comm.probe import probe
from psmpi.comm.world import start

world, ops = start(), make_backend("cupy")


class Early(GpuAware):
    "Does not wait for the device."

    def outgoing(self, array, pieces=()):
        return array

    incoming = outgoing


class Lost(GpuAware):
    "Loses what one rank sends."

    def outgoing(self, array, pieces=()):
        ops.synchronize()
        return np.zeros(array.shape, array.dtype) if world.rank == 1 else array


results = [probe(world, ops, kind(ops), size=999) for kind in (GpuAware, Staged, Early, Lost)]
if world.rank == 0:
    print(json.dumps(results))
"""


def test_mpi_takes_device_arrays_and_the_probe_finds_wrong_values(tmp_path):
    program = tmp_path / "probe.py"
    program.write_text(PROBE)
    status, out, err = launch(3, program)
    assert status == 0, err
    assert json.loads(out) == [True, True, False, False]


DIRECT = """
import sys
from psmpi.comm import probe
probe.ask_library = lambda: None
from psmpi.train import main
sys.exit(main())
"""


def test_a_gpu_aware_mpi_gives_the_same_weights(host, tmp_path):
    program, out = tmp_path / "direct.py", tmp_path / "run"
    program.write_text(DIRECT)
    ring = ("--method", "data_parallel", "--allreduce", "ring")
    for ranks, options in ((4, ("--placement", "owner", "--replicas", "2", "--colocate")), (2, ring)):
        command = (program, "--backend", "cupy", "--gpu-aware", *EXACT, *options, "--out", out / str(ranks))
        status, stdout, stderr = launch(ranks, *command)
        assert status == 0, stderr
        assert distance(host(*EXACT).tensors(), Trained(out / str(ranks), stdout).tensors()) <= 1e-10


@pytest.mark.slow
def test_parts_of_layers_by_a_gpu_aware_mpi_have_the_weights_of_the_host(tmp_path):
    program, out = tmp_path / "direct.py", tmp_path / "run"
    program.write_text(DIRECT)
    for name in ("dfa", "sil stored, two rows"):
        ranks, options = PARTS[name]
        tensors = []
        for command in (("-m", "psmpi.train", "--backend", "numpy"), (program, "--backend", "cupy", "--gpu-aware")):
            folder = out / name / command[-1]
            launcher = run if command[0] == "-m" else launch
            status, stdout, stderr = launcher(ranks, *command, *options, "--out", folder)
            assert status == 0, stderr
            tensors.append(Trained(folder, stdout).tensors())
        assert distance(*tensors) <= 1e-9
    # Compressed gradients go through host memory.
    topk = ("--method", "data_parallel", "--compression", "topk", "--max-steps", "3")
    status, _, stderr = launch(2, program, "--backend", "cupy", "--gpu-aware", *EXACT, *topk, "--out", out / "topk")
    assert status == 0, stderr


@pytest.mark.parametrize(
    ("options", "environment", "says"),
    [
        (("--backend", "cupy"), {"FAKE_CUDA": "driver"}, "no NVIDIA driver is loaded"),
        (("--backend", "cupy"), {"FAKE_CUDA": "old driver"}, "cupy-cuda12x"),
        (("--backend", "cupy"), {"FAKE_CUDA": "memory"}, "use a smaller --batch-size or more ranks"),
        (("--backend", "cupy"), {"FAKE_CUDA": "compiler"}, "NVRTC and the CUDA headers"),
        (("--backend", "cupy", "--gpu-aware"), {}, "not GPU-aware"),
        (("--backend", "cupy", "--nccl", "--method", "dfa"), {}, "--nccl is an option of --method psl, data_parallel"),
        (("--backend", "cupy", "--nccl", "--method", "sil"), {"FAKE_CUDA_DEVICES": "3"}, "over the ranks of a part"),
        (("--backend", "cupy", "--nccl"), {}, "3 ranks share 1 device"),
        (("--backend", "numpy", "--nccl"), {}, "--nccl is an option of --backend cupy"),
        (("--backend", "numpy", "--compute", "tf32"), {}, "--compute tf32 is an option of --backend cupy"),
        (("--dtype", "float64", "--compute", "tf32"), {}, "is for float32 weights"),
        (
            ("--backend", "numpy", "--convolution", "measured"),
            {},
            "--convolution measured is an option of --backend cupy",
        ),
        (("--compute", "float16", "--convolution", "cudnn"), {}, "computes with float32 and tf32"),
        (("--backend", "cupy", "--convolution", "cudnn"), {"FAKE_CUDNN": "import"}, "pip install 'psmpi[cudnn]'"),
    ],
)
def test_what_cannot_be_is_said_once_and_ends_the_job(monkeypatch, tmp_path, options, environment, says):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    launcher = launch if environment else run
    status, _, err = launcher(3, "-m", "psmpi.train", "--out", tmp_path / "run", "--max-steps", "2", *options)
    assert status != 0 and err.count(says) == 1, err
    assert "Traceback" not in err


def test_a_run_that_diverges_says_so_once(tmp_path):
    options = ("--backend", "cupy", "--optimizer", "sgd", "--lr", "1e38", "--clip", "0")
    status, _, err = run(3, "-m", "psmpi.train", "--out", tmp_path / "run", *options)
    assert status != 0 and err.count("a score is not a finite number") == 1, err
    assert "Traceback" not in err


@pytest.mark.gpu
def test_several_ranks_share_a_gpu(mpi_train, host, monkeypatch):
    monkeypatch.delenv("PYTHONPATH")
    # A process without the stand-in looks for a GPU.
    if "True" not in launch(1, "-c", "from psmpi.backend import gpu; print(gpu.available())")[1]:
        pytest.skip("no GPU here, or no CuPy for it")
    for ranks, options in ((1, ()), (3, ()), (3, ("--placement", "owner", "--colocate"))):
        result = mpi_train(ranks, "--backend", "cupy", *EXACT, *options)
        assert distance(host(*EXACT).tensors(), result.tensors()) <= 1e-9
