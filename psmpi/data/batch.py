"""A minibatch: the ids of its samples and the arrays that a rank has of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples `ids` (b,) int64 of a split.

    inputs: (features, b), in the backend's memory. targets: labels (b,) int64 or values (outputs, b) float64, in host
    memory; for sequences with a target at each step (steps, b) or (outputs, steps, b). lengths: (b,) int32, the steps
    of each sequence; None: all steps. Fields that a rank does not need are None.
    """

    ids: npt.NDArray[np.int64]
    inputs: Any = None
    targets: npt.NDArray[Any] | None = None
    lengths: npt.NDArray[np.int32] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def share(self, number: int, of: int) -> Batch:
        """A batch with the ids of share `number` of `of` shares, which are consecutive and nearly equal in size."""
        return Batch(np.array_split(self.ids, of)[number])
