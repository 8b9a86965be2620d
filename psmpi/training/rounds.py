"""Settings of methods whose ranks train apart from each other in rounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from psmpi.config import Config
from psmpi.errors import UserError


@dataclass(frozen=True)
class Rounds:
    """Rounds of local training."""

    table: ClassVar[str] = "rounds"
    results: ClassVar[bool] = True

    local_steps: int = 20
    """Steps of a rank between two exchanges. A round of subnetworks also ends with an epoch, at a checkpoint and at
    --max-steps."""


def check_rounds(config: Config, what: str) -> None:
    """UserError for --local-steps below 1; what: the end of the message."""
    steps = config.of(Rounds).local_steps
    if steps < 1:
        raise UserError(f"--local-steps {steps}: expected 1 or more steps {what}")
