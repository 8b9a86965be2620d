"""An editable install of a checkout."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from helpers.paths import ROOT

setuptools = pytest.importorskip("setuptools", minversion="77", reason="a setuptools that reads pyproject.toml")

FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


@pytest.fixture
def checkout(tmp_path):
    """A checkout in a folder named psmpi, as git clone names it."""
    root = tmp_path / "psmpi"
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "psmpi", root / "psmpi", ignore=ignored)
    shutil.copytree(ROOT / "data", root / "data", ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, root)
    return root


def test_an_editable_install_is_found_from_the_folder_above_the_checkout(checkout, tmp_path):
    code = f"import setuptools.build_meta as build; print(build.build_editable({str(tmp_path)!r}))"
    # The build needs no C compiler.
    environment = {**os.environ, "CC": "false"}
    build = subprocess.run([sys.executable, "-c", code], cwd=checkout, env=environment, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    with zipfile.ZipFile(tmp_path / build.stdout.split()[-1]) as wheel:
        outer = [name for name in wheel.namelist() if ".dist-info/" not in name]
        assert [name for name in outer if not name.endswith(".pth")] == [], "an import hook"
        site = tmp_path / "site"
        wheel.extractall(site)
    code = f"import site; site.addsitedir({str(site)!r}); import psmpi; print(psmpi.__version__, psmpi.__file__)"
    without_path = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    imported = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, env=without_path, capture_output=True, text=True
    )
    assert imported.returncode == 0, imported.stderr
