"""Operations in C, for processors with AVX2 or AVX-512."""

from psmpi.backend.compiled.library import NAMES, function, level, missing, pointers
from psmpi.backend.compiled.ops import CompiledOps

__all__ = ["NAMES", "CompiledOps", "function", "level", "missing", "pointers"]
