"""The settings of partitioned quasi-Newton methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class NewtonSettings:
    """Partitioned quasi-Newton methods (plbfgs, plsr1, plse)."""

    globalization: Literal["trust-region", "line-search"] = "line-search"
    """What keeps partitioned quasi-Newton steps from being too long."""
    line_search: Literal["basic", "backtracking"] = "basic"
    """Of --globalization line-search. basic: lengthens a step that is good as it is, by 3/2 as long as the loss falls,
    whatever --sigma says; backtracking: only shortens."""
    first_step: Literal["unit", "last"] = "unit"
    """Of --globalization line-search, the length that a search tries first. unit: 1; last: ten times that of the step
    before, and at most 1, which takes fewer trials where steps are short, and after a search that found nothing the
    length where it ended."""
    extrapolation: Literal["none", "constant", "adaptive"] = "none"
    """Nesterov's extrapolation of partitioned quasi-Newton steps, by --momentum or adaptive."""
    memory: int = 5
    """Pairs that each element remembers."""
    merge_pairs: bool = False
    """One element for a pair of classes, not one for each of its two orders: half the memory."""
    initial: Literal["scaled", "identity"] = "scaled"
    """What an element's matrix starts from before its pairs: y^T y / s^T y times the identity, or the identity."""
    curvature: Literal["absolute", "relative"] = "absolute"
    """Test of s^T y in plbfgs and plse: above the rounding of the dtype, or above 1e-8 ||s|| ||y||."""
    damping: bool = False
    """Powell's damping of pairs of negative curvature, in plbfgs."""
    sigma: float = 0.0
    """Multiple of the identity that is added to the sum of the elements' matrices: more of it, shorter steps. It rises
    as a --schedule makes the learning rate fall."""
    scaling: Literal["none", "moments"] = "none"
    """Variables of partitioned quasi-Newton steps: the weights, or these times the fourth root of their gradients' mean
    squares (by --beta2, as in Adam), which makes the matrices start from a diagonal."""
    cg_tolerance: float = 1e-2
    """Residual, relative to the gradient, at which conjugate gradients end."""
    cg_iterations: int = 30
    """Products with the partitioned matrix in a step at most."""
