"""Optimizers by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

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

# Those that step a shard by themselves.
OPTIMIZERS: dict[str, type[Optimizer]] = {
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
# All of them.
ALL_OPTIMIZERS: dict[str, type[Optimizer]] = {**OPTIMIZERS, "plbfgs": PLBFGS, "plsr1": PLSR1, "plse": PLSE}
# Those whose step is a function of one gradient and their state: no searches, no pairs of steps.
FIRST_ORDER = frozenset(name for name, kind in OPTIMIZERS.items() if issubclass(kind, FirstOrder))
# Those that count their steps, with a count for each weight.
COUNTED: dict[str, type[Optimizer]] = {"adam": CountedAdam, "adamw": CountedAdamW}


def find_optimizer(name: str) -> type[Optimizer]:
    """The class of the optimizer called `name`; UserError for an unknown name."""
    if name not in ALL_OPTIMIZERS:
        raise UserError(f"--optimizer {name!r} is unknown: choose one of {', '.join(ALL_OPTIMIZERS)}")
    return ALL_OPTIMIZERS[name]


def make_optimizer(
    name: str,
    n: int,
    dtype: DTypeLike,
    hyper: Hyper,
    ops: NumpyOps | None = None,
    counted: bool = False,
    matrices: Sequence[Matrix] | None = None,
) -> Optimizer:
    """The optimizer called `name` for a shard of n elements of `dtype` (float32 or float64), stepped by `ops`.

    counted: its state is of each weight alone, of one that counts steps too, so that weights may come and go with it.
    matrices: the whole matrices of the shard, for optimizers that set `needs_matrices`; None where they are not known.

    It takes from `hyper` the settings its formula has. UserError for an unknown name or dtype, for any setting out of
    its range, used by this optimizer or not: a value that no optimizer accepts is a slip in any case; and for an
    optimizer that needs matrices where they are not known, or where weights come and go.
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
        kind = COUNTED.get(name, kind)
    return kind(n, dtype, **settings, ops=ops)
