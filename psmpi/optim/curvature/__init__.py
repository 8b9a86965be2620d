"""Curvature of element functions: their quasi-Newton operators, and the operations that these operators need."""

from psmpi.optim.curvature.operators import RULES, ElementOperators, Outcome, Rule
from psmpi.optim.curvature.recursion import recurse
from psmpi.optim.curvature.reference import CurvatureOps
from psmpi.optim.curvature.registry import curvature_ops
from psmpi.optim.curvature.restriction import Restriction

__all__ = ["RULES", "CurvatureOps", "ElementOperators", "Outcome", "Restriction", "Rule", "curvature_ops", "recurse"]
