"""The settings of partitioned quasi-Newton methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class NewtonSettings:
    """Partitioned quasi-Newton methods (plbfgs, plsr1, plse)."""

    globalization: Literal["trust-region", "line-search"] = "line-search"
    """Control of the length of partitioned quasi-Newton steps (Raynaud, Orban and Bigeon, G-2023-41).

    trust-region: a bound on the step that adapts to the model's predictions
    line-search: a search along the step for a sufficient decrease
    """
    line_search: Literal["basic", "backtracking"] = "basic"
    """Search of --globalization line-search.

    basic: lengthen a good first step by 3/2 while the loss falls, also with --sigma; else shorten it
    backtracking: only shorten the first step
    """
    first_step: Literal["unit", "last"] = "unit"
    """First trial length of --globalization line-search.

    unit: 1
    last: ten times the last length, at most 1; after a failed search, the length where it ended
    """
    extrapolation: Literal["none", "constant", "adaptive"] = "none"
    """Nesterov's extrapolation of partitioned quasi-Newton steps.

    none: no extrapolation
    constant: by --momentum
    adaptive: by a sequence that adapts to the steps
    """
    memory: int = 5
    """Pairs that each element remembers."""
    merge_pairs: bool = False
    """One element for each pair of classes in place of one for each of its two orders. Halves the memory."""
    initial: Literal["scaled", "identity"] = "scaled"
    """Initial matrix of an element, before its pairs.

    scaled: y^T y / s^T y times the identity
    identity: the identity
    """
    curvature: Literal["absolute", "relative"] = "absolute"
    """Test of a pair's curvature s^T y in plbfgs and plse.

    absolute: above the rounding of the dtype
    relative: above 1e-8 ||s|| ||y||
    """
    damping: bool = False
    """Powell's damping of pairs with negative curvature, in plbfgs."""
    sigma: float = 0.0
    """Multiple of the identity that is added to the sum of the elements' matrices. A larger one gives shorter steps. It
    rises as --schedule lowers the learning rate."""
    scaling: Literal["none", "moments"] = "none"
    """Scaling of the variables in partitioned quasi-Newton steps.

    none: the weights themselves
    moments: the weights times the fourth root of their gradients' mean squares (decay --beta2), so that the matrices
        start from a diagonal
    """
    cg_tolerance: float = 1e-2
    """Residual, relative to the gradient, at which conjugate gradients end."""
    cg_iterations: int = 30
    """Largest number of conjugate gradient iterations in a step, one product with the matrix each."""
