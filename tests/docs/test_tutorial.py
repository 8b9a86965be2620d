"""Every command of the tutorial, in its order, in an empty folder."""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from helpers.paths import ROOT
from helpers.terminal import CTRL_C, lines, on_terminal

PAGE = (ROOT / "docs" / "tutorial.md").read_text()
BLOCKS = re.findall(r"^```(bash|python|toml)\n(.*?)^```$", PAGE, re.M | re.S)
INSTALL, *COMMANDS = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
TABLE, NOTEBOOK = [block for kind, block in BLOCKS if kind == "python"]
(NETWORK,) = [block for kind, block in BLOCKS if kind == "toml"]


def typed(command: str) -> list[str]:
    """The words of a command, with psmpi and mpirun of this Python."""
    folder = Path(sys.executable).parent
    programs = {"psmpi": [sys.executable, "-m", "psmpi"], "mpirun": [str(folder / "mpirun")]}
    return [word for given in shlex.split(command) for word in programs.get(given, [given])]


def test_what_is_installed_is_there_to_install():
    """The continuous integration runs the command itself, with more extras."""
    extras = re.search(r"\[(.*)\]", INSTALL)[1].split(",")
    known = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M)
    assert f"pip install -e '.[{','.join(extras)}]'" == INSTALL and set(extras) <= set(known)


def test_the_commands_lead_from_a_table_to_a_network(tmp_path):
    environ = {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def run(words: list[str]) -> str:
        result = subprocess.run(
            words, cwd=tmp_path, env={**os.environ, **environ}, capture_output=True, text=True, timeout=200
        )
        assert result.returncode == 0, (words, result.stderr + result.stdout)
        return result.stdout

    run([sys.executable, "-c", TABLE])
    (tmp_path / "own.toml").write_text(NETWORK)
    output = {}
    for command in COMMANDS:
        if "--dataset flowers.csv --label species" in command:
            # Typed on a terminal, with Ctrl-C after epoch 5.
            keys = [(rb"epoch +5/300", CTRL_C, 0.0)]
            status, raw = on_terminal(typed(command), tmp_path, keys=keys, timeout=200, TERM="xterm", **environ)
            screen = lines(raw)
            hint = next(line for line in screen if "--resume auto" in line)
            assert status != 0 and "runs/flowers" in hint, screen
            assert any("144 training and 36 test samples" in line for line in screen), screen
        else:
            output[command] = run(typed(command))
    first, second = (text for command, text in output.items() if " doctor" in command)
    assert " 0 errors" in first and " 0 errors" in second and "latency" in second
    trained = next(text for command, text in output.items() if "--resume auto" in command)
    own_network = next(text for command, text in output.items() if "--config own.toml --lr" in command)
    assert "model custom: 339 parameters" in own_network and re.search(r"epoch 60/60 .*accuracy (9\d|100)", own_network)
    assert all((tmp_path / "runs" / name / "metrics.jsonl").exists() for name in ("dp", "ist"))
    assert "epoch 300/300" in trained and "best test accuracy" in trained
    assert float(re.search(r"best.* accuracy ([\d.]+) %", trained)[1]) > 90
    tested = next(text for command, text in output.items() if command == "psmpi predict runs/flowers")
    assert all(name in tested for name in ("setosa", "versicolor", "virginica", "confusion"))
    with (tmp_path / "predictions.csv").open() as file:
        predicted = [row["predicted"] for row in csv.DictReader(file)]
    assert len(predicted) == 12 and set(predicted) <= {"setosa", "versicolor", "virginica"}
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("curve.png", "both.png"))
    x = np.loadtxt(tmp_path / "new.csv", delimiter=",", skiprows=1, dtype=np.float32)
    session = onnxruntime.InferenceSession(tmp_path / "flowers.onnx")
    (scores,), metadata = session.run(None, {"x": x}), session.get_modelmeta().custom_metadata_map
    names = np.array(json.loads(metadata["classes"]))
    assert json.loads(metadata["columns"]) == ["length", "width", "area"]
    out = run([sys.executable, "-c", NOTEBOOK])
    # The exported network predicts the same classes as the one that Python loads.
    assert re.findall(r"'(\w+)'", out) == names[scores.argmax(1)].tolist() and float(out.split()[-1]) > 0.3
