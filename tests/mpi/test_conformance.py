"""The conformance suite on all registered training methods and on the example's method."""

import importlib
import sys

import pytest
from helpers.paths import ROOT

from psmpi.registry import BUILTIN, METHODS
from psmpi.testing.conformance import CHECKS, Case


def example(monkeypatch):
    """Register the example's method while the test runs, and return its name."""
    monkeypatch.setattr(METHODS, "registered", {})
    monkeypatch.delitem(sys.modules, "dsgd", raising=False)
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("dsgd").RingSGD.name


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", [*BUILTIN, pytest.param("example", marks=pytest.mark.slow)])
def test_method(name, check, tmp_path, monkeypatch):
    check(Case(example(monkeypatch) if name == "example" else name, tmp_path))
