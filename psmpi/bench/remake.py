"""Running the commands of recorded figures: their requirements, their process, and their results."""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from psmpi.bench.network import launcher, run_program
from psmpi.bench.recorded import UNITS, Figure
from psmpi.errors import UserError

# The folder that holds the package, and in a checkout the tests and examples beside it.
ROOT = Path(__file__).parent.parent.parent
DATASETS = ("mnist", "cifar10")


def programs(command: str) -> list[list[str]]:
    """The words of each command of a text in which `&&` joins commands."""
    parts: list[list[str]] = [[]]
    for word in shlex.split(command):
        if word == "&&":
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def missing(figure: Figure, data_dir: str) -> str:
    """The reason why the figure cannot be made here; "" if it can."""
    if not figure.remade:
        return "a person reads it"
    if "{data}" in figure.command and not data_dir:
        return "it needs --data-dir"
    for words in programs(figure.command):
        for word in words:
            if word.startswith(("tests/", "examples/")) and not (ROOT / word.partition("::")[0]).exists():
                return f"{word} is in a checkout alone"
        dataset = words[words.index("--dataset") + 1].partition(":")[0] if "--dataset" in words else ""
        if dataset in DATASETS and not _has_files(dataset, data_dir):
            return f"{dataset} is not in --data-dir"
    return ""


@cache
def _has_files(dataset: str, data_dir: str) -> bool:
    """Whether the folder holds the files of a data set."""
    from psmpi.data import open_dataset

    try:
        open_dataset(dataset, data_dir, 0)
    except UserError:
        return False
    return True


@dataclass(frozen=True)
class Made:
    """The results of a command.

    rows: of metrics.jsonl of its last training. table: the JSON of a measurement. seconds: of the processor.
    """

    rows: list[dict[str, Any]]
    table: Any
    seconds: float

    def numbers(self, figure: Figure) -> tuple[float, ...]:
        """The numbers of a figure in its unit. UserError if the results lack one of them."""
        factor, offset = UNITS[figure.unit]
        # As the documents round them: a hundredth of a percent, else five places.
        places = 2 if figure.unit in ("%", "% wrong") else 5
        return tuple(round(factor * self._number(figure.id, key) + offset, places) for key in figure.read)

    def _number(self, name: str, key: str) -> float:
        path, _, epoch = key.partition("@")
        number: Any = self.table
        if self.rows:
            chosen = [row for row in self.rows if row["epoch"] == int(epoch)] if epoch else self.rows[-1:]
            number = chosen[0] if chosen else {}
        for part in path.split("."):
            try:
                number = number[int(part)] if isinstance(number, list) else number[part]
            except (KeyError, IndexError, TypeError, ValueError):
                raise UserError(f"figure {name}: its command leaves no {key}; correct `read` or the command") from None
        return float(number)


def make(command: str, data_dir: str, limit: int) -> Made:
    """Run the command in a temporary folder. UserError if it fails or takes more than `limit` seconds."""
    used = _used()
    with tempfile.TemporaryDirectory() as name:
        folder, out, text = Path(name), "", ""
        for count, words in enumerate(programs(command)):
            words = [word.replace("{data}", str(Path(data_dir).absolute())) for word in words]
            if "train" in words[:5] and "--out" not in words:
                words += ["--out", f"run-{count}"]
            if "train" in words[:5]:
                out = words[words.index("--out") + 1]
            text = run_program(_typed(words), limit=limit, cwd=folder)
        return Made(_rows(folder / out) if out else [], _table(folder, text), _used() - used)


def _typed(words: Sequence[str]) -> list[str]:
    """The words with this Python, the mpirun beside it, and files of the checkout by their paths."""
    command: list[str] = []
    for word in words:
        if word == "psmpi":
            command += [sys.executable, "-m", "psmpi"]
        elif word == "python":
            command.append(sys.executable)
        elif word == "mpirun":
            command.append(launcher())
        elif word.startswith(("tests/", "examples/")):
            command.append(str(ROOT / word))
        else:
            command.append(word)
    return command


def _rows(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _table(folder: Path, text: str) -> Any:
    """The JSON of a measurement: its only .json file, or the last line of its output."""
    for path in folder.glob("*.json"):
        return json.loads(path.read_text())
    last = text.strip().rpartition("\n")[2]
    return json.loads(last) if re.match(r"[\[{]", last) else None


def _used() -> float:
    """Processor seconds of the finished child processes of this process."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def machine() -> str:
    """Processor, kernels and libraries of this machine: the order of sums depends on them."""
    import numpy as np
    from threadpoolctl import threadpool_info

    from psmpi.backend import compiled
    from psmpi.backend.compiled.library import NAMES

    try:
        names = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(errors="replace"), re.MULTILINE)
    except OSError:
        names = None
    model = names[1].strip() if names else platform.machine()
    blas = [
        f"{one['internal_api']} {one['version'] or ''} for {one.get('architecture') or 'unknown'}"
        for one in threadpool_info()
        if one["user_api"] == "blas"
    ]
    kernels = NAMES[compiled.level()] or "no"
    return f"{model}, {os.cpu_count()} cores, {kernels} kernels; " + ", ".join([f"NumPy {np.__version__}", *blas])
