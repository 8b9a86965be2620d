"""What an installation consists of."""

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
    """A checkout whose folder is called psmpi, as that of a clone is."""
    place = tmp_path / "psmpi"
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "psmpi", place / "psmpi", ignore=ignored)
    shutil.copytree(ROOT / "data", place / "data", ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, place)
    return place


def test_an_editable_install_is_found_from_the_folder_above_the_checkout(checkout, tmp_path):
    code = f"import setuptools.build_meta as build; print(build.build_editable({str(tmp_path)!r}))"
    # Without a C compiler it is made all the same.
    environment = {**os.environ, "CC": "false"}
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / done.stdout.split()[-1]) as wheel:
        outer = [name for name in wheel.namelist() if ".dist-info/" not in name]
        assert [name for name in outer if not name.endswith(".pth")] == [], "an import hook"
        site = tmp_path / "site"
        wheel.extractall(site)
    code = f"import site; site.addsitedir({str(site)!r}); import psmpi; print(psmpi.__version__, psmpi.__file__)"
    known = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, env=known, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
