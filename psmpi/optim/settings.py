"""Settings of all optimizers, and their ranges."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from psmpi.errors import UserError

# Values for settings that are None; a class of optimizers may have other values (`Optimizer.usual`).
USUAL = {"momentum": 0.9, "beta2": 0.999}


@dataclass(frozen=True)
class Hyper:
    """Settings of all optimizers; each uses those its formula has. `make_optimizer` checks all of them."""

    momentum: float | None = None
    """Momentum of momentum, nesterov, muon and --extrapolation constant. If not given: 0.9, for muon 0.95."""
    beta1: float = 0.9
    """Decay of the first moment in adam, adamw and muon's AdamW, and of the interpolation in lion's step."""
    beta2: float | None = None
    """Decay of the second moment in adam, adamw, muon's AdamW and --scaling moments, and of lion's moment. If not
    given: 0.999, for lion 0.99."""
    eps: float = 1e-8
    """Term added to the root in adam, adamw, muon's AdamW, rmsprop and --scaling moments."""
    alpha: float = 0.99
    """Decay of the mean square in rmsprop."""
    weight_decay: float = 0.0
    """L2 penalty; 0: none. It is decoupled in adamw, lion and muon."""
    history: int = 10
    """Pairs that lbfgs, lbfgs-tr and lsr1-tr remember."""
    max_evals: int = 20
    """Largest number of function evaluations in a line search of lbfgs."""


def given(hyper: Hyper, name: str) -> float:
    """Return setting `name` (momentum or beta2) of `hyper`, with the usual value in place of None."""
    value = getattr(hyper, name)
    return float(USUAL[name] if value is None else value)


def check_settings(**settings: float | None) -> None:
    """Raise UserError for a setting, given by its name in `Hyper`, that is out of its range."""
    for name, value in settings.items():
        if value is None:
            continue
        option = f"--{name.replace('_', '-')} {value}"
        if name in ("momentum", "beta1", "beta2", "alpha"):
            if not 0 <= value < 1:
                raise UserError(f"{option}: expected a number from 0 up to, not including, 1")
        elif name == "eps":
            if not 0 < value < np.inf:
                raise UserError(f"{option}: expected a finite number above 0")
        elif name == "weight_decay":
            if not 0 <= value < np.inf:
                raise UserError(f"{option}: expected a finite number, 0 or more")
        elif name == "history":
            if value < 1:
                raise UserError(f"{option}: expected 1 or more pairs to remember")
        elif name == "max_evals" and value < 2:
            # The first evaluation is at the start of the step, the second one is the first trial.
            raise UserError(f"{option}: expected 2 or more function evaluations a step")


def check_eps(eps: float, dtype: np.dtype) -> None:
    """Raise UserError for an eps that rounds to 0 in `dtype`: a weight without gradient would be stepped by 0 / 0."""
    check_settings(eps=eps)
    tiny = float(np.finfo(dtype).tiny)
    if eps < tiny:
        raise UserError(f"--eps {eps}: rounds to 0 in {dtype}, use {tiny:.3g} or more")
