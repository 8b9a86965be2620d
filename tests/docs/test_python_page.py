"""The code of the page on Python, and that of the notebook, each run in its order in one process."""

import json
import re

import pytest
from helpers.paths import ROOT
from helpers.processes import launch


def blocks(path):
    """The blocks of Python of a page in order."""
    return re.findall(r"^```python\n(.*?)^```$", path.read_text(), re.M | re.S)


def needs(block):
    """The packages among scikit-learn and PyTorch that a block imports."""
    return [name for name in ("sklearn", "torch") if re.search(rf"^(from|import) {name}\b", block, re.M)]


def run(code, folder):
    status, out, err = launch(1, "-c", "\n".join(code), cwd=folder, timeout=200)
    assert status == 0, err + out
    return out


def test_the_blocks_of_the_page_run_in_order(tmp_path):
    code = [block for block in blocks(ROOT / "docs" / "python.md") if not needs(block)]
    out = run(code, tmp_path)
    assert len(code) == 4
    assert "unknown setting 'learning_rate'; did you mean lr?" in out and "{'dense1.weight': (32, 2)" in out


@pytest.mark.parametrize("package", ["sklearn", "torch"])
def test_the_block_that_needs_a_package_runs_after_them(package, tmp_path):
    pytest.importorskip(package, reason=f"psmpi[{package}], for a block of docs/python.md")
    all_blocks = blocks(ROOT / "docs" / "python.md")
    needed = [block for block in all_blocks if needs(block) in ([], [package])]
    assert len(needed) == 5
    run(needed, tmp_path)


def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    notebook = json.loads((ROOT / "examples" / "notebook.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell.get("outputs", []) == [] for cell in notebook["cells"]), "outputs are left out of the repository"
    # A notebook also shows the value of a cell's last line; the program does not.
    checks = ["assert run.scores['test_accuracy'] > 0.95", "assert (loaded.predict(x) == more.predict(x)).all()"]
    status, out, err = launch(1, "-c", "\n".join([*cells, *checks]), cwd=tmp_path, timeout=200)
    assert (status, err) == (0, "")
    assert "did you mean optimizer?" in out and "['blue' 'green' 'red']" in out and "10 True" in out
    assert list(tmp_path.iterdir()) == []
