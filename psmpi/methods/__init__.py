"""Training methods by name, one file each."""

from __future__ import annotations

from typing import Any

from psmpi.methods.base import Method, Place
from psmpi.methods.data_parallel import DataParallel
from psmpi.methods.dfa import DirectFeedback
from psmpi.methods.ist import IndependentSubnets
from psmpi.methods.local_sgd import LocalSGD
from psmpi.methods.psl import PartiallySeparable
from psmpi.methods.sil import SyntheticLabels

METHODS: dict[str, Any] = {
    "psl": PartiallySeparable,
    "data_parallel": DataParallel,
    "local_sgd": LocalSGD,
    "dfa": DirectFeedback,
    "ist": IndependentSubnets,
    "sil": SyntheticLabels,
}

__all__ = ["METHODS", "Method", "Place"]
