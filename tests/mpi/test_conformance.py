"""The conformance suite over all registered training methods, and over the one of the examples."""

import importlib.util

import pytest
from helpers.paths import ROOT

from psmpi import registry
from psmpi.registry import BUILTIN
from psmpi.testing.conformance import CHECKS, Case


def example():
    """The example's method, registered."""
    spec = importlib.util.spec_from_file_location("dsgd", ROOT / "examples" / "dsgd.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.RingSGD.name


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", [*BUILTIN, "example"])
def test_method(name, check, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    check(Case(example() if name == "example" else name, tmp_path))


def test_the_example_is_a_page():
    assert len((ROOT / "examples" / "dsgd.py").read_text().splitlines()) <= 60
