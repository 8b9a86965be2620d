"""Settings of methods whose masters, which hold the weights, may be other ranks than the workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True)
class Masters:
    """Masters and workers."""

    table: ClassVar[str] = "masters"
    results: ClassVar[bool] = False

    placement: Literal["master", "owner"] = "master"
    """Holders of the weights that a worker computes with: the masters, or the workers themselves."""
    masters: int = 1
    """Ranks, from rank 0 on, that share the weights and the optimizer state."""
    colocate: bool = False
    """Masters are workers too."""
