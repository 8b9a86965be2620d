"""Operations in C, where the kernels were built for this processor."""

from psmpi.backend.compiled.library import NAMES, function, level, missing, pointers
from psmpi.backend.compiled.ops import CompiledOps

__all__ = ["NAMES", "CompiledOps", "function", "level", "missing", "pointers"]
