"""Training methods by name. The module of a method is imported when the method is first used.

Another package adds a method by an entry point of the group `psmpi.methods`. A program adds one by `register` and then
calls `psmpi.train.main`.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from psmpi.errors import UserError

# Classes of methods, subclasses of psmpi.training.method.Method, which this module does not know.
Kind = type[Any]
M = TypeVar("M", bound=type[Any])

DEFAULT = "psl"
# What messages name to those whose network cannot be partitioned: a method that takes all networks on any ranks.
WHOLE = "data_parallel"

BUILTIN = {
    "psl": "psmpi.methods.psl.method:PartiallySeparable",
    "data_parallel": "psmpi.methods.data_parallel:DataParallel",
    "bptt": "psmpi.methods.bptt.method:TruncatedBackPropagation",
    "local_sgd": "psmpi.methods.local_sgd:LocalSGD",
    "dni": "psmpi.methods.dni.method:DecoupledInterfaces",
    "dfa": "psmpi.methods.dfa:DirectFeedback",
    "hogwild": "psmpi.methods.hogwild.method:Hogwild",
    "ist": "psmpi.methods.ist.method:IndependentSubnets",
    "layer_parallel": "psmpi.methods.layer_parallel.method:LayerParallel",
    "next": "psmpi.methods.next.method:InNetwork",
    "sil": "psmpi.methods.sil.method:SyntheticLabels",
    "spann": "psmpi.methods.spann.method:SpatialDomains",
    "tensor": "psmpi.methods.tensor.method:TensorParallel",
    "wavefront": "psmpi.methods.wavefront.method:Wavefront",
}

_registered: dict[str, Kind] = {}


def register(method: M) -> M:
    """Add a method under its `name`, as a decorator of its class. ValueError if the name is taken."""
    known = {**BUILTIN, **_installed()}
    if method.name in known or _registered.get(method.name, method).__qualname__ != method.__qualname__:
        raise ValueError(f"a training method called {method.name} is there already: choose another name")
    _registered[method.name] = method
    return method


@cache
def _installed() -> dict[str, EntryPoint]:
    """Entry points of other packages by name, without those that have the name of a built-in method."""
    return {one.name: one for one in entry_points(group="psmpi.methods") if one.name not in BUILTIN}


def method_names() -> tuple[str, ...]:
    """The names of all training methods, psmpi's own first."""
    return tuple(dict.fromkeys([*BUILTIN, *_installed(), *_registered]))


def find_method(name: str) -> Kind:
    """The class of the method called `name`; UserError if it is unknown or cannot be imported."""
    if name in _registered:
        return _registered[name]
    if name in BUILTIN:
        module, _, attribute = BUILTIN[name].partition(":")
        found: Kind = getattr(import_module(module), attribute)
        return found
    if name not in _installed():
        raise UserError(f"--method {name} is unknown: choose one of {', '.join(method_names())}")
    try:
        loaded: Kind = _installed()[name].load()
    except Exception as error:
        raise UserError(
            f"--method {name}: {_installed()[name].value} of an installed package cannot be imported ({error!r}): "
            "mend or remove that package"
        ) from None
    if not all(hasattr(loaded, what) for what in ("name", "summary", "settings", "check", "step")):
        raise UserError(
            f"--method {name}: {_installed()[name].value} of an installed package is no psmpi.training.method.Method: "
            "mend or remove that package"
        )
    return loaded


def all_methods() -> dict[str, Kind]:
    """All training methods by name, imported, without those of other packages that cannot be imported."""
    found = {}
    for name in method_names():
        # One that is broken is told of where it is asked for.
        with suppress(UserError):
            found[name] = find_method(name)
    return found


def summaries() -> dict[str, str]:
    """One line on each training method, by name."""
    return {name: method.summary for name, method in all_methods().items()}
