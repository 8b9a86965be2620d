"""Layers, losses, optimizers and methods outside the package: those of the examples and of installed packages."""

import importlib
import re
import subprocess
import sys

import pytest
from helpers.paths import ROOT
from helpers.processes import launch

from psmpi.checkpoint import newest
from psmpi.nn.layers import LAYERS
from psmpi.testing import train
from psmpi.testing.conformance import rows, tensors

EXAMPLES = ROOT / "examples"
PAGE = ROOT / "docs" / "own_method.md"
OPTIONS = {
    "own_layer": ("--config", EXAMPLES / "own_layer.toml", "--colocate"),
    "own_loss": ("--loss", "squared_hinge", "--gap", "2", "--partition", "pairs", "--colocate"),
    "own_optimizer": ("--optimizer", "adagrad", "--start", "0.1", "--colocate"),
    "dsgd": ("--method", "dsgd", "--self-weight", "0.5"),
}
# Messages of commands that need the piece and are started without its program.
UNKNOWN = {
    "own_layer": "unknown layer type 'prelu'",
    "own_loss": "--loss 'squared_hinge' is unknown",
    "own_optimizer": "--optimizer 'adagrad' is unknown",
    "dsgd": "--method dsgd is unknown",
}


def execute(*words, ranks=1, **options):
    status, out, err = launch(ranks, *map(str, words), timeout=240, **options)
    return status, out + err


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_a_program_with_a_piece_of_its_own_has_all_commands(name, tmp_path):
    program, run = EXAMPLES / f"{name}.py", tmp_path / "run"
    words = (program, "train", *OPTIONS[name], "--max-steps", "30", "--threads", "1", "--out", run)
    status, output = execute(*words, ranks=2)
    assert status == 0, output
    assert f"mpirun -n 2 python {program} train --resume auto --out {run}" in output
    status, output = execute("-m", "psmpi", "train", "--resume", "auto", "--out", run, "--max-steps", "31")
    assert status == 1 and UNKNOWN[name] in output and "start the program that registers" in output, output
    status, output = execute(program, "train", "--resume", "auto", "--out", run, "--max-steps", "31", "--threads", "1")
    assert status == 0 and "resumed from" in output, output
    status, output = execute("-m", "psmpi", "predict", run)
    assert (status, UNKNOWN[name] in output) == ((1, True) if name == "own_layer" else (0, False)), output


def test_a_network_with_a_layer_of_a_program_is_exported(tmp_path):
    pytest.importorskip("onnxruntime", reason="psmpi[export]")
    program, run = EXAMPLES / "own_layer.py", tmp_path / "run"
    status, output = execute(program, "train", *OPTIONS["own_layer"], "--max-steps", "5", "--out", run)
    assert status == 0, output
    status, output = execute(program, "inspect", "export", run, "--out", tmp_path / "n.onnx")
    assert status == 0 and "onnxruntime's scores differ" in output, output


def test_a_layer_without_an_export_is_named(tmp_path):
    pytest.importorskip("onnxruntime", reason="psmpi[export]")
    program, run = tmp_path / "mine.py", tmp_path / "run"
    program.write_text((EXAMPLES / "own_layer.py").read_text().replace("def export(", "def other("))
    status, output = execute(program, "train", *OPTIONS["own_layer"], "--max-steps", "2", "--out", run)
    assert status == 0, output
    status, output = execute(program, "inspect", "export", run, "--out", tmp_path / "n.onnx")
    assert (
        status == 1 and "layer prelu1 has no ONNX export: write Part.export" in output and "Traceback" not in output
    ), output


def test_a_method_that_saves_no_weights_is_refused_at_its_start(tmp_path):
    (page,) = re.findall(r"<!-- file: summed.py -->\n```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    words = ("train", "--method", "summed", "--max-steps", "5", "--threads", "1", "--out", tmp_path / "run")
    for text, status, message in (
        (page.replace("        self.keep_state()\n", ""), 1, "--method summed declares no vector weights"),
        (page, 0, "best"),
    ):
        (tmp_path / "summed.py").write_text(text)
        exit_status, output = execute(tmp_path / "summed.py", *words, ranks=2)
        assert exit_status == status and message in output and "Traceback" not in output, output


def test_methods_that_cut_a_network_cut_a_layer_of_one_s_own_too(tmp_path, monkeypatch):
    monkeypatch.setattr(LAYERS, "registered", {})
    monkeypatch.delitem(sys.modules, "own_layer", raising=False)
    monkeypatch.syspath_prepend(EXAMPLES)
    importlib.import_module("own_layer")
    (tmp_path / "net.toml").write_text(
        '[model]\nmodel = "custom"\nlayers = [{type = "flatten"}, {type = "dense", units = 20}, {type = "prelu"}, '
        '{type = "dense", units = 20}, {type = "prelu"}, {type = "dense", units = 10}]\n'
    )
    losses = {}
    for method, ranks in (("data_parallel", 1), ("psl", 2), ("tensor", 2), ("spann", 2)):
        out = tmp_path / method
        words = ["--method", method, "--config", tmp_path / "net.toml", "--loss", "nll", "--dtype", "float64"]
        result = train(ranks, [*words, "--epochs", "1", "--batch-size", "40", "--lr", "0.01", "--out", out])
        assert result.status == 0, result.stderr
        losses[method] = rows(out)[-1]["train_loss"]
    assert list(losses.values()) == pytest.approx([losses["data_parallel"]] * 4, rel=1e-9), losses


@pytest.mark.parametrize("name", OPTIONS)
def test_an_example_is_a_page_whose_docstring_says_how_to_run_it(name):
    text = (EXAMPLES / f"{name}.py").read_text()
    assert len(text.splitlines()) < 80 and f"Run: mpirun -n 2 python examples/{name}.py train " in text


def test_a_layer_of_an_installed_package_needs_no_program(tmp_path):
    site = tmp_path / "site"
    folder = site / "own_layer-1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: own_layer\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[psmpi.layers]\nprelu = own_layer:PReLU\n")
    (site / "own_layer.py").write_text((EXAMPLES / "own_layer.py").read_text())
    runs = []
    for start in ([EXAMPLES / "own_layer.py"], ["-m", "psmpi"]):
        runs.append(tmp_path / f"run{len(runs)}")
        words = [*start, "train", *OPTIONS["own_layer"], "--max-steps", "5", "--threads", "1", "--out", runs[-1]]
        environ = {"PYTHONPATH": f"{ROOT}:{site}" if "-m" in start else str(ROOT), "PATH": "/usr/bin:/bin"}
        completed = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=environ)
        assert completed.returncode == 0, completed.stderr
    first, second = (tensors(newest(run)) for run in runs)
    assert first.keys() == second.keys() and all((first[name] == second[name]).all() for name in first)
