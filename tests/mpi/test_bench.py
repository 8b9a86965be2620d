"""The benchmark commands: their counts, memory figures and messages. No test judges a measured time."""

import json
import re
import resource
import subprocess

import numpy as np
import pytest
from helpers.processes import finish, launch, start
from helpers.program_transfers import TRANSFERS
from helpers.runs import run

from psmpi.bench.compute import psmpi_step
from psmpi.bench.head import own_step, pytorch_step
from psmpi.bench.hosts import slow_hosts
from psmpi.bench.private import AT_ONCE, BY_TILES, IN_TILES
from psmpi.bench.private import own_step as own_step_of_private
from psmpi.bench.problems import LR, Minibatch, Problem, operations, problems
from psmpi.bench.pytorch import pytorch_step as unit_step
from psmpi.errors import UserError
from psmpi.nn.zoo import make_network

WIDE = """
[model]
model = "custom"
[[model.layers]]
type = "flatten"
[[model.layers]]
type = "dense"
units = {units}
[[model.layers]]
type = "sigmoid"
[[model.layers]]
type = "separable_dense"
units = {units}
groups = 10
[[model.layers]]
type = "sigmoid"
[[model.layers]]
type = "separable_dense"
units = 10
groups = 10
"""


def test_operations_are_those_of_the_unfused_network():
    """Compare with counts by hand: multiplications and additions of each layer's forward pass, weight gradients and
    input gradients."""
    counts = {name: operations(problem, 1) for name, problem in problems().items()}
    mlp = 2 * (2 * 784 * 1024 + 3 * 1024 * 1024 + 3 * 10 * 1024)
    assert counts["mlp"] == mlp
    lenet = 24 * 24 * 6 * 25 * 2 + (8 * 8 * 16 * 6 * 25 + 256 * 120 + 120 * 84 + 84 * 10) * 3
    assert counts["mnist-lenet"] == 2 * lenet
    assert counts["one-class"] < counts["mnist-psnet"]


@pytest.mark.parametrize("name", sorted(problems()))
def test_the_measured_step_is_a_training_step(name):
    """Adam's first step moves each weight by the learning rate, against its gradient."""
    problem = problems()[name]
    step, w, model = psmpi_step(problem, Minibatch(problem, 20), "auto")
    before = w.copy()
    step()
    moved = w - before
    nonzero = abs(model.g) > 1e-5
    assert nonzero.any() and np.allclose(moved[nonzero], -LR * np.sign(model.g[nonzero]), rtol=2e-2)


@pytest.mark.parametrize("kind", ["eager", "channels last"])
@pytest.mark.parametrize("name", sorted(problems()))
def test_pytorch_makes_the_same_steps(name, kind):
    pytest.importorskip("torch")
    problem = problems()[name]
    data = Minibatch(problem, 20)
    own_step, w, model = psmpi_step(problem, data, "auto")
    before = w.copy()
    torch_step, net = unit_step(problem, data, model, kind)
    torch_step()
    # Both sides still hold the gradient of their first step.
    own_step()
    weighted_modules = [module for module in net if hasattr(module, "weight")]
    parts = [part for part in model.parts if part.layer.linear]
    for module, part in zip(weighted_modules, parts, strict=True):
        for attribute, k in (("weight", 0), ("bias", 1)):
            own_gradient = np.concatenate([pair[k].reshape(-1) for pair in part.g])
            torch_gradient = getattr(module, attribute).grad.numpy().reshape(-1)
            assert abs(own_gradient - torch_gradient).max() <= 1e-5 * abs(torch_gradient).max()
    # No weight moves further than Adam's first step allows.
    nonzero = abs(model.g) > 1e-6
    moved = np.concatenate(
        [getattr(m, a).detach().numpy().reshape(-1) for m in weighted_modules for a in ("weight", "bias")]
    )
    assert nonzero.any() and abs(w - before).max() <= 1.01 * LR and np.isfinite(moved).all()


def test_compute_measures_side_by_side(tmp_path):
    pytest.importorskip("torch")
    options = ("--networks", "one-class", "mlp", "--pairs", "2", "--batch-size", "10")
    status, out, err = run(
        1, "-m", "psmpi.bench", "compute", *options, "--json", tmp_path / "a.json", "--plot", tmp_path / "a.png"
    )
    assert status == 0, err
    report = json.loads((tmp_path / "a.json").read_text())
    kinds = [(row["network"], row["kind"]) for row in report["rows"]]
    assert kinds == [("one-class", "eager"), ("one-class", "channels last"), ("mlp", "eager")]
    assert report["gemm_gflops"] > 0
    assert all(0 < row["low"] <= row["ratio"] <= row["high"] for row in report["rows"])
    assert (tmp_path / "a.png").stat().st_size > 1000 and "one-class" in out


def test_a_head_is_measured_side_by_side(tmp_path):
    torch = pytest.importorskip("torch")
    options = ("--classes", "1000", "--features", "8", "--batch-size", "20", "--pairs", "2", "--losses", "nll", "bce")
    status, out, err = launch(1, "-m", "psmpi.bench", "head", *options, "--json", tmp_path / "a.json")
    assert status == 0, err
    report = json.loads((tmp_path / "a.json").read_text())
    names = ["nll", "nll, in tiles", "bce", "bce, in tiles"]
    assert [row["loss"] for row in report["rows"]] == names and "1000 classes" in out
    assert all(0 < row["low"] <= row["ratio"] <= row["high"] for row in report["rows"])
    assert set(report["memory_mb"]) == {*names, "PyTorch"} and torch.__version__ == report["torch"]


@pytest.mark.parametrize("scale", [0.0, 16.0])
@pytest.mark.parametrize("name", ["nll", "nll, in tiles"])
def test_a_measured_head_makes_the_steps_of_pytorch(name, scale):
    """Compare psmpi's and PyTorch's weights after one step with cross-entropy."""
    pytest.importorskip("torch")
    shape = (50, 8, 20, scale)
    (own, weights), (torch_step, layer) = own_step(name, *shape, 1), pytorch_step(*shape)
    before = weights.copy()
    own()
    torch_step()
    assert abs(weights - before).max() == pytest.approx(1e-3, rel=0.01)
    # Adam's first steps follow the sign of the gradient, and rounding decides the sign of gradients near 0.
    assert (abs(weights - layer.weight.detach().numpy()) <= 1e-5).mean() > 0.99


def test_private_layers_are_measured_by_tiles_and_all_at_once(tmp_path):
    options = ("--classes", "90", "--batch-size", "5", "--pairs", "2", "--losses", "psl", "bce", "--threads", "1")
    status, out, err = launch(1, "-m", "psmpi.bench", "private", *options, "--json", tmp_path / "a.json")
    assert status == 0 and "90 classes" in out, err
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [(row["loss"], row["way"]) for row in rows] == [
        ("psl", "all at once"), ("psl", "by tiles"),
        ("bce", "all at once"), ("bce", "by tiles"), ("bce", "stepped in tiles"),
    ]  # fmt: skip
    assert all(0 < row["low"] <= row["ratio"] <= row["high"] and row["megabytes"] > 1 for row in rows)
    for wrong_options, message in (
        (("--classes", "1"), "whole number from 2"),
        (("--json", "/no/a"), "no such folder"),
    ):
        status, _, err = run(1, "-m", "psmpi.bench", "private", *wrong_options)
        assert status == 1 and message in err and "Traceback" not in err


@pytest.mark.parametrize("loss", ["psl", "nll"])
def test_measured_private_layers_make_the_same_steps(loss):
    problem = Problem(make_network("psnet", (1, 28, 28), 70), loss, tuple(range(70)))
    data, weights_by_way = Minibatch(problem, 6), {}
    for way in (AT_ONCE, BY_TILES, IN_TILES)[: 2 + (loss == "nll")]:
        step, model, _ = own_step_of_private(problem, data, 1, way)
        for _ in range(3):
            step()
        weights_by_way[way] = model.w
    largest = abs(weights_by_way[AT_ONCE]).max()
    for way, weights in weights_by_way.items():
        # Adam's first steps follow the sign of the gradient, and rounding decides the sign of gradients near 0.
        assert (abs(weights - weights_by_way[AT_ONCE]) <= 1e-5 * largest).mean() > 0.99, way


@pytest.mark.parametrize(
    ("ranks", "more", "operations"),
    [
        (3, (), ("Bcast", "Scatterv", "Gatherv", "Allreduce")),
        (2, ("--colocate", "--placement", "owner", "--trunk", "split"), ("Isend", "Wait(Irecv)", "Allreduce")),
        (2, ("--method", "data_parallel"), ("Iallreduce", "Wait(Iallreduce)")),
        (3, ("--method", "ist", "--local-steps", "2"), ()),
        (1, (), ()),
    ],
    ids=str,
)
def test_a_step_is_what_ranks_do_in_it(tmp_path, ranks, more, operations):
    """The table has all ranks, the kinds of time of a rank add up to its step, and the trace has all operations."""
    options = ("--steps", "5", *more, "--trace", tmp_path / "trace.json")
    status, out, err = launch(ranks, "-m", "psmpi.bench", "step", "--json", *options)
    assert status == 0, err
    report = json.loads(out.splitlines()[-1])
    assert report["steps"] == 5 and [row["rank"] for row in report["rows"]] == list(range(ranks))
    for row in report["rows"]:
        times = [row[f"{kind}_ms"] for kind in ("compute", "optimizer", "wait", "transfer")]
        assert all(value >= 0 for value in times) and times[0] > 0
        assert sum(times) == pytest.approx(row["step_ms"], rel=1e-6)
        assert row["name"].startswith(f"rank {row['rank']} ") and (row["bytes_sent"] > 0) == (ranks > 1)
    assert any(row["optimizer_ms"] > 0 for row in report["rows"])
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert set(operations) <= {event["name"] for event in events if event.get("cat") == "operation"}
    assert sum(event["name"] == "optimizer" for event in events) >= 5


def test_a_step_is_drawn_and_shown(tmp_path):
    pytest.importorskip("matplotlib")
    status, out, err = launch(2, "-m", "psmpi.bench", "step", "--steps", "3", "--plot", tmp_path / "step.png")
    assert status == 0 and "1 worker of 0-9" in out and "milliseconds a step" in out, err
    assert (tmp_path / "step.png").stat().st_size > 5000


def test_a_step_says_what_is_wrong_before_it_begins(tmp_path):
    for options, message in (
        (("--steps", "0"), "--steps 0"),
        (("--trace", "/nonexistent/a.json"), "--trace /nonexistent/a.json: there is no such folder"),
        (("--momentum", "0.9"), "--momentum"),
    ):
        status, _, err = run(1, "-m", "psmpi.bench", "step", *options)
        assert status == 1 and message in err and "Traceback" not in err


@pytest.mark.slow
def test_ways_to_share_a_step_are_compared(tmp_path):
    options = ("--rounds", "1", "--batch-size", "20", "--json", tmp_path / "a.json")
    status, out, err = launch(1, "-m", "psmpi.bench", "trunk", *options)
    assert status == 0, err
    rows = {row["way"]: row for row in json.loads((tmp_path / "a.json").read_text())["rows"]}
    assert list(rows) == [
        "one process", "as many processes, apart", "replicated", "split", "replica rows", "data_parallel"
    ]  # fmt: skip
    assert rows["one process"]["speedup"] == 1 and rows["one process"]["megabytes_sent"] == 0
    # A split trunk also sends features: 12 x 6 x 6 numbers a sample, half of 20 samples each way.
    extra_megabytes = rows["split"]["megabytes_sent"] - rows["replicated"]["megabytes_sent"]
    assert extra_megabytes == pytest.approx(20 * 432 * 4 / 1e6) and "split" in out


def test_a_way_that_cannot_be_is_left_out(monkeypatch):
    from psmpi.bench import trunk

    def steps(ranks, words, module=""):
        if "--replicas" in words:
            raise UserError("python ... failed: psmpi, rank 0 of 2 on here: error: every worker has to see all of it")
        return {"ms_per_step": 1.0, "megabytes": 1.0, "megabytes_sent": 0.0}

    monkeypatch.setattr(trunk, "_steps", steps)
    status, out, err = run(1, "-m", "psmpi.bench", "trunk", "--rounds", "2", "--options=--batch-norm")
    assert status == 0 and "replica rows is left out: every worker has to see all of it" in out, err
    status, _, err = run(1, "-m", "psmpi.bench", "trunk", "--json", "/nowhere/a.json")
    assert status == 1 and "there is no such folder" in err


@pytest.mark.parametrize("backend", [pytest.param("numpy", marks=pytest.mark.slow), "auto"])
def test_kernels_are_measured_beside_a_copy(tmp_path, backend):
    options = ("--backend", backend, "--megabytes", "2", "--repeats", "3", "--json", tmp_path / "a.json")
    status, out, err = run(1, "-m", "psmpi.bench", "kernels", *options)
    assert status == 0, err
    report = json.loads((tmp_path / "a.json").read_text())
    rows, cells = report["rows"], report["cells"]
    assert {row["name"] for row in cells} == {
        f"{what} of {kind}" for what in ("states", "gradients") for kind in ("rnn", "gru", "lstm")
    }
    assert all(row["gflop_per_s"] > 0 and row["product_gflop_per_s"] > 0 for row in cells)
    assert all(0 < row["low"] <= row["share"] <= row["high"] for row in cells) and "share of the product" in out
    assert {"bias and sigmoid", "max pooling", "squared norm"} <= {row["name"] for row in rows}
    assert all(row["gb_per_s"] > 0 and row["copy_gb_per_s"] > 0 for row in rows)
    assert all(0 < row["low"] <= row["share"] <= row["high"] for row in rows) and "share of the copy" in out


def test_two_methods_are_compared(tmp_path):
    options = ("--ranks", "2", "--rates", "0", "--epochs", "1", "--repeats", "1", "--json", tmp_path / "a.json")
    status, out, err = run(1, "-m", "psmpi.bench", "network", "--methods", "psl-owner", "data_parallel", *options)
    assert status == 0, err
    rows = {row["method"]: row for row in json.loads((tmp_path / "a.json").read_text())["rows"]}
    assert list(rows) == ["psl-owner", "data_parallel"] and "data_parallel, unlimited: accuracy" in out
    assert rows["data_parallel"]["megabytes_sent"] == pytest.approx(15 * 4 * 4800 / 1e6)
    assert rows["psl-owner"]["megabytes_sent"] < rows["data_parallel"]["megabytes_sent"] / 2


@pytest.mark.slow
def test_methods_are_compared_on_this_machine(tmp_path):
    options = ("--ranks", "2", "--rates", "0", "--epochs", "1", "--repeats", "2", "--json", tmp_path / "a.json")
    status, out, err = run(1, "-m", "psmpi.bench", "network", *options)
    assert status == 0, err
    rows = {row["method"]: row for row in json.loads((tmp_path / "a.json").read_text())["rows"]}
    assert list(rows) == ["psl", "psl-owner", "data_parallel", "local_sgd"]
    for name, row in rows.items():
        assert row["ms_per_step"] > 0 and row["megabytes_held"] > 0 and len(row["seconds_of_all"]) == 2
        assert f"{name}, unlimited: accuracy" in out
    # 15 steps; data_parallel sends and receives the gradient of 4,800 weights in each.
    assert rows["data_parallel"]["megabytes_sent"] == pytest.approx(15 * 4 * 4800 / 1e6)
    assert rows["psl-owner"]["megabytes_sent"] < rows["data_parallel"]["megabytes_sent"] / 2
    assert rows["psl"]["accuracy"] == pytest.approx(rows["data_parallel"]["accuracy"], abs=0.02)


@pytest.mark.slow
def test_links_between_hosts_are_as_slow_as_asked_for(tmp_path):
    try:
        with slow_hosts(2, 100.0) as names:
            assert len(names) == 2
    except UserError as error:
        pytest.skip(f"no network namespaces here: {error}")
    namespaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert not any(name in namespaces for name in names)
    options = ("--methods", "data_parallel", "--ranks", "2", "--rates", "20", "--model", "mlp", "--loss", "nll",
               "--widths", "400", "400", "--epochs", "1", "--json", tmp_path / "a.json")  # fmt: skip
    status, _, err = launch(1, "-m", "psmpi.bench", "network", *options)
    assert status == 0, err
    (row,) = json.loads((tmp_path / "a.json").read_text())["rows"]
    # The sent bytes take this time at 20 Mbit/s; the first burst of a link is not throttled.
    assert row["seconds"] >= 0.9 * row["megabytes_sent"] * 8 / 20


def test_network_says_what_cannot_be():
    for options, message in (
        (("--rates", "-1"), "expected numbers from 0"),
        (("--rates", "0", "--delay-ms", "50"), "needs links of up to 100 Mbit/s"),
        (("--rates", "10", "--delay-ms", "-1"), "--delay-ms -1: expected"),
        (("--ranks", "0"), "from 1 up"),
        (("--rates", "0", "--limit", "1", "--epochs", "5000"), "not done after 1 s"),
        (("--rates", "0", "--dataset", "nothing"), "nothing"),
    ):
        status, _, err = run(1, "-m", "psmpi.bench", "network", *options)
        assert status == 1 and message in err and "Traceback" not in err, err


def test_compute_says_what_it_needs():
    try:
        import torch  # noqa: F401
    except ImportError:
        for measure in ("compute", "head"):
            status, _, err = run(1, "-m", "psmpi.bench", measure, "--pairs", "1")
            assert status == 1 and "pip install 'psmpi[torch]'" in err
        return
    status, _, err = run(1, "-m", "psmpi.bench", "head", "--classes", "1")
    assert status == 1 and "--classes 1: expected 2 or more" in err
    for options, message in (
        (("--pairs", "0"), "--pairs 0"),
        (("--json", "/nonexistent/a.json"), "no such folder"),
        (("--plot", "a.xyz"), "ends in .png"),
        (("--convolution", "measured"), "--convolution measured is an option of --backend cupy"),
    ):
        status, _, err = run(1, "-m", "psmpi.bench", "compute", *options)
        assert status == 1 and message in err and "Traceback" not in err


IMAGES = """
[model]
model = "custom"
[[model.layers]]
type = "conv"
channels = 20
kernel = 3
[[model.layers]]
type = "{pool}"
[[model.layers]]
type = "sigmoid"
[[model.layers]]
type = "separable_conv"
channels = 40
kernel = 3
groups = 10
[[model.layers]]
type = "relu"
[[model.layers]]
type = "tanh"
[[model.layers]]
type = "flatten"
[[model.layers]]
type = "separable_dense"
units = 10
groups = 10
"""
FLAT = """
[model]
model = "custom"
[[model.layers]]
type = "sigmoid"
[[model.layers]]
type = "flatten"
[[model.layers]]
type = "sigmoid"
[[model.layers]]
type = "dense"
units = 10
"""


@pytest.mark.parametrize("backend", ["auto", "numpy"])
@pytest.mark.parametrize("pool", ["mean_pool", "max_pool", ""])
def test_memory_of_images_is_what_the_network_needs(pool, backend, tmp_path):
    rng = np.random.default_rng(0)
    n = 600
    np.savez(tmp_path / "data.npz", x=rng.integers(0, 255, (n, 3, 32, 32), np.uint8), y=np.arange(n) % 10)
    config = tmp_path / "images.toml"
    config.write_text(IMAGES.format(pool=pool) if pool else FLAT)
    options = ("--dataset", tmp_path / "data.npz", "--config", config, "--batch-size", "300", "--backend", backend)
    status, out, err = run(1, "-m", "psmpi.bench", "memory", "--json", *options)
    assert status == 0, err
    (row,) = json.loads(out)
    held, needed = sum(row["held"].values()), sum(row["needed"].values())
    assert needed > 10e6
    assert held <= 1.1 * needed and needed <= 1.1 * held and row["traced"] <= 1.1 * needed, row


def test_memory_refuses_what_training_does(tmp_path):
    status, _, err = run(1, "-m", "psmpi.bench", "memory", "--threads", "-1")
    assert status == 1 and "--threads -1" in err and "Traceback" not in err
    status, _, err = run(1, "-m", "psmpi.bench", "memory", "--method", "data_parallel")
    assert status == 1 and "see the placement table" in " ".join(err.split()) and "Traceback" not in err


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (1, ()),
        (3, ("--placement", "owner")),
        pytest.param(3, ("--placement", "master", "--backend", "numpy"), marks=pytest.mark.slow),
        pytest.param(4, ("--partition", "pairs"), marks=pytest.mark.slow),
        pytest.param(4, ("--placement", "owner", "--replicas", "3", "--optimizer", "momentum"), marks=pytest.mark.slow),
    ],
)
def test_memory_is_what_the_network_needs(ranks, options, tmp_path):
    """Held arrays are within a tenth of the network's need, and traced allocations at most a tenth above, where the
    need is over 10 MB."""
    config = tmp_path / "wide.toml"
    config.write_text(WIDE.format(units=6000))
    status, out, err = launch(ranks, "-m", "psmpi.bench", "memory", "--config", config, "--json", *options)
    assert status == 0, err
    large = 0
    for row in json.loads(out):
        held, needed = sum(row["held"].values()), sum(row["needed"].values())
        if needed > 10e6:
            large += 1
            assert held <= 1.1 * needed and needed <= 1.1 * held, row
            assert row["traced"] <= 1.1 * needed, row
    assert large >= ranks - 1


def test_memory_is_shown_as_a_table():
    status, out, err = launch(2, "-m", "psmpi.bench", "memory", "--placement", "owner")
    assert status == 0 and "traced / needed" in out, err


@pytest.mark.parametrize("ranks", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_the_parts_of_a_quasi_newton_step_are_told(ranks):
    options = (
        "--partition",
        "pairs",
        "--optimizer",
        "plbfgs",
        "--cg-iterations",
        "4",
        "--merge-pairs",
        "--batch-size",
        "30",
    )
    status, out, err = launch(ranks, "-m", "psmpi.bench", "optimizer", "--json", *options)
    assert status == 0, err
    report = json.loads(out)
    assert sum(row["elements"] for row in report["ranks"]) == 45
    assert 2 < report["products"] <= 4 and report["trials"] >= 1
    for row in report["ranks"]:
        times = [row[name] for name in ("gradients", "values", "products", "pairs", "communication")]
        assert max(times) > 0 and row["step"]["low"] <= row["step"]["median"] <= row["step"]["high"]
        assert (row["gradients"] > 0) == (row["elements"] > 0) and (row["bytes_sent"] > 0) == (ranks > 1)
    if ranks > 1:
        # For each product the master sends every worker the shared block and the blocks of the worker's classes.
        assert report["ranks"][0]["bytes_sent"] > 4 * 4800 * report["products"]
    else:
        status, out, err = run(ranks, "-m", "psmpi.bench", "optimizer", *options)
        assert status == 0 and "products and" in out and "communication" in out, err


def test_the_parts_of_other_steps_are_refused():
    status, _, err = run(1, "-m", "psmpi.bench", "optimizer", "--optimizer", "adam")
    assert status == 1 and "plbfgs" in err and "Traceback" not in err


PEAK = """
import runpy, sys
sys.argv = ["psmpi.train", *sys.argv[1:]]
try:
    runpy.run_module("psmpi.train", run_name="__main__")
except SystemExit:
    pass
[line] = [line for line in open("/proc/self/status") if line.startswith("VmPeak")]
sys.stdout.write("peak %s\\n" % line.split()[1])
"""


@pytest.mark.slow
def test_nine_ranks_train_what_one_process_cannot_hold(tmp_path):
    """Limit each process's address space: the peak of a small run on as many ranks, plus half the bytes of the wide
    network's weights, gradient and Adam moments."""
    small, wide = tmp_path / "small.toml", tmp_path / "wide.toml"
    small.write_text(WIDE.format(units=40))
    wide.write_text(WIDE.format(units=11000))
    parameters = 65 * 11000 + 10 * 1100 * 1101 + 10 * 1101
    vector_bytes = 4 * 4 * parameters
    options = ("--placement", "owner", "--max-steps", "3", "--threads", "1", "--config")
    peaks = []
    for ranks in (1, 9):
        status, out, err = launch(ranks, "-c", PEAK, *options, small, "--out", tmp_path / f"small{ranks}")
        assert status == 0, err
        peaks += [int(kilobytes) << 10 for kilobytes in re.findall(r"peak (\d+)", out)]
    assert len(peaks) == 10
    # Nine ranks start threads that a single rank does not; threads take address space, though no memory.
    limits = {1: peaks[0] + vector_bytes // 2, 9: max(peaks[1:]) + vector_bytes // 2}

    def limited(ranks):
        return lambda: resource.setrlimit(resource.RLIMIT_AS, (limits[ranks], limits[ranks]))

    train = ("-m", "psmpi.train", *options, wide, "--out")
    status, out, err = finish(start(1, *train, tmp_path / "one", preexec_fn=limited(1)), 120)
    assert status == 1 and "out of memory" in err and "more ranks" in err, err
    status, out, err = finish(start(9, *train, tmp_path / "nine", preexec_fn=limited(9)), 200)
    assert status == 0 and f"{parameters:,} parameters" in out, err
    assert list((tmp_path / "nine" / "checkpoints").glob("step-*.h5")), out + err


def test_the_start_with_many_classes_is_timed():
    options = ("--classes", "3000", "--features", "5", "--repeats", "1")
    status, out, err = run(1, "-m", "psmpi.bench", "start", *options, "--method", "data_parallel", "--json")
    assert status == 0, err
    report = json.loads(out)
    assert report["weights_megabytes"] == 4 * 3000 * 6 / 1e6
    assert 0 < report["ready_seconds"] == report["ready_seconds_of_all"][0] and report["rank_megabytes"] > 10
    status, _, err = run(1, "-m", "psmpi.bench", "start", "--classes", "1")
    assert status == 1 and "--classes 1: expected a whole number from 2 up" in err


def test_the_recorder_is_timed_beside_steps_without_it(monkeypatch):
    monkeypatch.setattr("psmpi.bench.recorder.SECONDS", 0.5)
    options = ("--method", "data_parallel", "--loss", "nll", "--model", "mlp", "--widths", "8", "--threads", "1")
    status, out, err = run(2, "-m", "psmpi.bench", "recorder", *options, "--json")
    assert status == 0, err
    report = json.loads(out)
    # Two operations: start the sum of the gradient, and wait for it.
    assert report["operations"] == 2 and report["pairs"] >= 10 and report["low"] <= report["ratio"] <= report["high"]
    assert report["ratio"] == pytest.approx(report["ms_recorded"] / report["ms"])
    # Recorded calls are cheap.
    assert 0 < report["watch_ms"] < 1000
    assert 0 < report["call_us"] < report["wait_us"] < 10
    status, _, err = run(1, "-m", "psmpi.bench", "recorder")
    assert status == 1 and "a single rank has no operations to record" in err


@pytest.mark.slow
def test_predictions_are_measured_beside_steps(tmp_path):
    """The test bounds times from below only, because other tests share the machine."""
    options = ("--methods", "psl", "local_sgd", "--rates", "0", "--sleep-ms", "1", "--json", tmp_path / "a.json")
    status, out, err = launch(1, "-m", "psmpi.bench", "predict", *options)
    assert status == 0, err
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["psl", "local_sgd"] and "psl, unlimited: predicted" in out
    for row in rows:
        # Passes sleep 1 ms each, so a step takes at least 2 ms.
        assert min(*row["predicted_ms"], *row["measured_ms"]) > 2 and len(row["predicted_ms"]) == 3
        assert row["links"]["within"][0][0] == 0


def test_what_cannot_be_predicted_is_one_message():
    options = ("--methods", "psl", "--rates", "0", "--options=--optimizer lbfgs")
    status, _, err = launch(1, "-m", "psmpi.bench", "predict", *options)
    assert status == 1 and err.count("no time can be said before") == 1 and "Traceback" not in err


def test_links_are_timed_and_planned_with(tmp_path):
    path = tmp_path / "links.json"
    status, out, err = launch(2, "-m", "psmpi.bench", "links", "--save", path)
    assert status == 0 and "between ranks of a host" in out, err
    status, out, err = launch(1, "-m", "psmpi.plan", "--ranks", "2", "--links", path, "--json", "--no-others")
    assert status == 0 and json.loads(out)["plans"][0]["ms_per_step"] > 0, err
    status, _, err = launch(1, "-m", "psmpi.bench", "links")
    assert status == 1 and "a link has two ends" in err


@pytest.mark.slow
def test_transfers_are_timed_beside_bare_calls(tmp_path):
    from psmpi.bench.moves import MOVES

    options = ("--kilobytes", "4", "--pairs", "2", "--json", tmp_path / "a.json")
    status, out, err = launch(2, "-m", "psmpi.bench", "comm", *options)
    assert status == 0 and "Neighbor_allgather" in out, err
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert {row["transfer"] for row in rows} == set(MOVES) == set(TRANSFERS)
    assert all(row["us"] > 0 and row["bare_us"] > 0 and row["bytes"] > 1000 for row in rows)
    status, _, err = launch(1, "-m", "psmpi.bench", "comm")
    assert status == 1 and "a transfer needs ranks" in err
    status, _, err = launch(1, "-m", "psmpi.bench", "comm", "--transfers", "ghosts")
    assert status == 1 and "expected some of spread, deal" in err


@pytest.mark.slow
def test_decoupled_blocks_are_timed_beside_a_pipeline_of_the_same_blocks(tmp_path):
    """With passes that sleep, three blocks in lock-step take six passes a minibatch, and decoupled blocks two."""
    options = ("--ranks", "3", "--ahead", "2", "--width", "8", "--batch-size", "40", "--sleep-ms", "20")
    status, out, err = launch(1, "-m", "psmpi.bench", "decoupled", *options, "--json", tmp_path / "a.json")
    assert status == 0, err
    (row,) = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert row["ranks"] == 3 and row["ms"].keys() == {"lock-step", "ahead 2"} and "ahead 2" in out
    # No block is faster than its sleeping passes.
    assert min(row["ms"]["lock-step"]) >= 120 and min(row["ms"]["ahead 2"]) >= 40
    status, _, err = launch(1, "-m", "psmpi.bench", "decoupled", "--ranks", "1")
    assert status == 1 and "expected numbers from 2 to 250" in err


def test_recurrent_layers_are_timed_beside_their_products(tmp_path):
    options = ("--kinds", "lstm", "gru", "rnn", "--layers", "2", "--steps", "5", "--units", "8", "--batch-size", "4")
    run_options = ("--chunk-steps", "2", "--rounds", "2", "--json", tmp_path / "a.json")
    status, out, err = launch(1, "-m", "psmpi.bench", "recurrent", *options, *run_options)
    assert status == 0, err
    rows = json.loads((tmp_path / "a.json").read_text())
    assert [row["kind"] for row in rows] == ["lstm", "gru", "rnn"] and "products alone" in out
    assert all(len(row["ms"]["psmpi"]) == 2 and row["products ms"] > 0 for row in rows)
    status, _, err = launch(1, "-m", "psmpi.bench", "recurrent", "--steps", "5", "--chunk-steps", "6")
    assert status == 1 and "--chunk-steps 6: expected 0 to 5" in err


@pytest.mark.slow
def test_a_transformer_is_timed_beside_its_products(tmp_path):
    options = ("--blocks", "2", "--steps", "5", "--width", "8", "--heads", "2", "--batch-size", "4", "--rounds", "2")
    status, out, err = launch(1, "-m", "psmpi.bench", "transformer", *options, "--json", tmp_path / "a.json")
    assert status == 0, err
    (row,) = json.loads((tmp_path / "a.json").read_text())
    assert "products alone" in out and len(row["ms"]["psmpi"]) == 2 and row["products ms"] > 0
    status, _, err = launch(1, "-m", "psmpi.bench", "transformer", "--width", "10", "--heads", "4")
    assert status == 1 and "--heads 4 does not divide the width, 10" in err


@pytest.mark.slow
def test_a_wavefront_is_timed_beside_its_schedule(tmp_path):
    """With chunks that sleep, R ranks take at least M + R - 1 chunks each way."""
    options = ("--ranks", "1", "3", "--layers", "3", "--units", "4", "--batch-size", "4", "--steps", "8")
    run_options = (
        "--chunk-steps",
        "2",
        "--sleep-ms",
        "20",
        "--rounds",
        "1",
        "--repeats",
        "1",
        "--json",
        tmp_path / "a.json",
    )
    status, out, err = launch(1, "-m", "psmpi.bench", "wavefront", *options, *run_options)
    assert status == 0, err
    rows = json.loads((tmp_path / "a.json").read_text())
    assert [row["least ms"] for row in rows] == [160, 240] and "off by %" in out
    assert all(min(row["ms"]) >= row["least ms"] for row in rows)


@pytest.mark.slow
def test_passes_through_layers_are_timed_beside_the_cost_model(tmp_path):
    """With layers that sleep, a pass on four ranks takes at least its longest chain of evaluations."""
    options = ("--ranks", "4", "--depth", "32", "--width", "4", "--batch-size", "20", "--sleep-ms", "10")
    run_options = ("--rounds", "1", "--json", tmp_path / "a.json")
    status, out, err = launch(1, "-m", "psmpi.bench", "layers", *options, *run_options)
    assert status == 0, err
    (row,) = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert (row["ranks"], row["forward"]["evaluations"], row["adjoint"]["evaluations"]) == (4, 52, 32)
    for name, least_ms in (("forward", 520), ("adjoint", 320)):
        assert row[name]["measured"] >= least_ms and row[name]["exact"] >= 320 and "off by %" in out
    status, _, err = launch(1, "-m", "psmpi.bench", "layers", "--ranks", "0")
    assert status == 1 and "expected numbers from 1 to 250" in err


@pytest.mark.slow
def test_networks_of_slabs_are_timed_on_characters(tmp_path):
    pytest.importorskip("matplotlib")
    options = ("--sides", "16", "24", "--variations", "2", "--domains", "4", "--epochs", "1", "--ranks", "2")
    files = ("--json", tmp_path / "a.json", "--plot", tmp_path / "a.png")
    status, out, err = launch(1, "-m", "psmpi.bench", "characters", *options, *files)
    assert status == 0, err
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    # Two slab layers with half as many neurons as pixels, each on its domain and a halo, then a layer of scores.
    for row, side in zip(rows, (16, 24), strict=True):
        n, width = side * side // 4, side * side // 8
        halos = min(side, n), max(1, width // 8)
        expected = 4 * width * (n + 2 * halos[0] + 1) + 4 * width * (width + 2 * halos[1] + 1) + 48 * (4 * width + 1)
        assert row["weights"] == expected and row["steps"] == 2
        assert f"{expected:,}" in out
    assert (tmp_path / "a.png").stat().st_size > 1000
    status, _, err = launch(1, "-m", "psmpi.bench", "characters", "--ranks", "0")
    assert status != 0 and "--ranks 0: expected a whole number from 1 up" in err
