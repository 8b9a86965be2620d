"""The fuzzer: its files, its counts, and a run of 100 s."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.paths import ROOT

from psmpi.testing.fuzz.__main__ import Tally, fuzz
from psmpi.testing.fuzz.kinds import KINDS
from psmpi.testing.fuzz.mutations import mutate, mutate_plain


def run(*words: str, timeout: float = 280) -> tuple[int, dict[str, Any], str]:
    command = [sys.executable, "-m", "psmpi.testing.fuzz", *words, "--json"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=timeout)
    return process.returncode, json.loads(process.stdout), process.stderr


def test_hostile_files_end_in_errors_of_psmpi() -> None:
    """No file leads to a traceback or a crash, takes more than 10 s, or 1 GB more than its size."""
    status, tallies, stderr = run("--count", "80", "--jobs", "1", "--seed", "24")
    assert status == 0, stderr
    assert set(tallies) == set(KINDS) and all(sum(tally["counts"].values()) == 80 for tally in tallies.values())


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_functions_of_seed_and_number(tmp_path: Path, kind: str) -> None:
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        path = KINDS[kind].make(np.random.default_rng([1, 2, 3]), tmp_path / name)
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        contents.append([file.stat().st_size for file in files])
    assert contents[0] == contents[1]


def test_outcomes_are_counted_and_what_takes_too_much_is_a_failure() -> None:
    tally = Tally()
    for outcome, seconds, grown in (
        ("sound", 0.1, 0), ("refused", 0.2, 0), ("lost", 0.0, 0), ("refused", 11.0, 0), ("sound", 0.1, 2 << 30),
        ("sound", 0.1, 1 << 30), ("traceback", 0.1, 0),
    ):  # fmt: skip
        tally.add(outcome, 7, "text", seconds, grown, 10)
    assert tally.counts == {"sound": 2, "refused": 1, "lost": 1, "slow": 1, "memory": 1, "traceback": 1}
    assert [failure["outcome"] for failure in tally.failures] == ["slow", "memory", "traceback"]
    assert tally.seconds == 11.0 and tally.grown == 2 << 30


def test_crashes_and_tracebacks_are_found(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    """A stand-in replaces the process that tries files."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, sys, json\n"
        "first, count = int(sys.argv[3]), int(sys.argv[4])\n"
        "for n in range(first, first + count):\n"
        "    print(json.dumps({'number': n, 'size': 5}), flush=True)\n"
        "    if n == 1: print(json.dumps({'stage': 'looking'}), flush=True); os.abort()\n"
        "    if n == 2: os.abort()\n"
        "    result = {'done': n, 'outcome': 'traceback' if n == 3 else 'sound', 'text': 'why'}\n"
        "    print(json.dumps({**result, 'seconds': 0.5, 'grown': 3}), flush=True)\n"
    )
    monkeypatch.setattr("psmpi.testing.fuzz.__main__.WORKER", [str(worker)])
    assert fuzz(("npz",), count=5, json=True) == 1
    out, err = capsys.readouterr()
    tally = json.loads(out)["npz"]
    assert tally["counts"] == {"sound": 2, "lost": 1, "crash": 1, "traceback": 1}
    assert "npz --seed 0 --first 2: crash" in err and "--first 3: traceback\nwhy" in err


def test_changes_change_something_most_of_the_time() -> None:
    rng, data = np.random.default_rng(0), bytes(range(256))
    assert sum(mutate(rng, data) != data for _ in range(200)) > 180
    value = {"a": [1, 2, {"b": 3.5}], "c": "text"}
    text = json.dumps(value)
    assert sum(json.dumps(mutate_plain(rng, value)) != text for _ in range(200)) > 180
    assert json.dumps(value) == text
