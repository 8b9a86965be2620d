"""Settings of the ranks that hold the weights, of methods in which masters and workers may be different ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True)
class Masters:
    """Masters and workers."""

    table: ClassVar[str] = "masters"
    results: ClassVar[bool] = False

    placement: Literal["master", "owner"] = "master"
    """Who steps a worker's private weights: the masters, or the worker that owns them; in independent subnet training,
    who holds the network: the masters or all ranks."""
    masters: int = 1
    """Ranks, from rank 0 on, that share the weights and the optimizer state."""
    colocate: bool = False
    """Masters are workers too."""
