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
    """Holders of weights.

    master: master ranks hold shards of the weights; workers get copies of their parts
    owner: workers hold the weights of their own parts
    """
    masters: int = 1
    """Number of master ranks, from rank 0 on. Masters share the weights and the optimizer state."""
    colocate: bool = False
    """Let masters be workers too."""
