"""Optimizers by name: a new one is a file in `rules/` and a line here, or a class of another package or program.

docs/own_optimizer.md describes the latter.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from numpy.typing import DTypeLike

from psmpi.backend import NumpyOps
from psmpi.errors import UserError
from psmpi.layout import Matrix
from psmpi.optim.base import Hyper, Optimizer, check_settings
from psmpi.optim.first_order import FirstOrder
from psmpi.optim.lbfgs import LBFGS
from psmpi.optim.partitioned import PLBFGS, PLSE, PLSR1
from psmpi.optim.rules.adam import Adam
from psmpi.optim.rules.adamw import AdamW
from psmpi.optim.rules.counted_adam import CountedAdam, CountedAdamW
from psmpi.optim.rules.lion import Lion
from psmpi.optim.rules.momentum import Momentum
from psmpi.optim.rules.muon import Muon
from psmpi.optim.rules.nesterov import Nesterov
from psmpi.optim.rules.rmsprop import RMSprop
from psmpi.optim.rules.sgd import SGD
from psmpi.optim.trust_region import LSR1, LBFGSTrustRegion
from psmpi.registry import Registry

# Optimizers that step a shard without other ranks' gradients of elements.
OWN: dict[str, type[Optimizer]] = {
    "sgd": SGD,
    "momentum": Momentum,
    "nesterov": Nesterov,
    "adam": Adam,
    "adamw": AdamW,
    "rmsprop": RMSprop,
    "lion": Lion,
    "muon": Muon,
    "lbfgs": LBFGS,
    "lbfgs-tr": LBFGSTrustRegion,
    "lsr1-tr": LSR1,
}
# Optimizers that need the gradient of each element of the loss.
PARTITIONED: dict[str, type[Optimizer]] = {"plbfgs": PLBFGS, "plsr1": PLSR1, "plse": PLSE}
OPTIMIZERS: Registry[type[Optimizer]] = Registry(
    "optimizer", "--optimizer {!r}", "psmpi.optim.base:Optimizer", OWN, taken=PARTITIONED
)
# All optimizers by name.
ALL_OPTIMIZERS: Mapping[str, type[Optimizer]] = ChainMap(PARTITIONED, OPTIMIZERS)  # type: ignore[arg-type]
# Versions of optimizers that count steps for each weight.
COUNTED: dict[str, type[Optimizer]] = {"adam": CountedAdam, "adamw": CountedAdamW}


def optimizer_names() -> tuple[str, ...]:
    """The names of all optimizers, psmpi's own first."""
    return (*OWN, *PARTITIONED, *OPTIMIZERS.names[len(OWN) :])


def optimizer_summaries() -> dict[str, str]:
    """The line on each optimizer in the help, by name."""
    return {name: kind.summary for name, kind in ALL_OPTIMIZERS.items()}


def find_optimizer(name: str) -> type[Optimizer]:
    """The class of the optimizer called `name`; UserError for an unknown name."""
    return PARTITIONED[name] if name in PARTITIONED else OPTIMIZERS.find(name, optimizer_names())


def is_first_order(name: str) -> bool:
    """Whether an optimizer's step is a function of one gradient and its state, without searches or pairs of steps."""
    return issubclass(find_optimizer(name), FirstOrder)


def make_optimizer(
    name: str,
    n: int,
    dtype: DTypeLike,
    hyper: Hyper,
    ops: NumpyOps | None = None,
    counted: bool = False,
    matrices: Sequence[Matrix] | None = None,
    own: Any = None,
) -> Optimizer:
    """Make the optimizer called `name` for a shard of n elements of `dtype` (float32 or float64), stepped by `ops`.

    hyper: settings, of which the optimizer takes those that it uses. counted: count steps for each weight, so that
    weights may be exchanged together with their state. matrices: the whole matrices of the shard, for optimizers with
    `needs_matrices`; None if unknown. own: an object of the optimizer's `options`, the defaults if None.

    UserError for an unknown name or dtype; for a setting out of its range, used or not; and for an optimizer that needs
    matrices if they are unknown or weights are exchanged.
    """
    kind = find_optimizer(name)
    check_settings(**asdict(hyper))
    settings = kind.chosen(hyper)
    if kind.needs_matrices:
        if matrices is None or counted:
            lacks = "weights come and go" if counted else "the matrices of a shard are not known"
            raise UserError(f"--optimizer {name} steps whole matrices, and here {lacks}: use --optimizer adamw")
        settings["matrices"] = matrices
    if counted:
        if name not in COUNTED and getattr(kind, "counts", False):
            raise UserError(
                f"--optimizer {name} counts its steps for all weights together, and here weights come and go: use "
                f"--optimizer {' or '.join(COUNTED)}"
            )
        kind = COUNTED.get(name, kind)
    if kind.options is not None:
        settings["own"] = own
    return kind(n, dtype, **settings, ops=ops)
