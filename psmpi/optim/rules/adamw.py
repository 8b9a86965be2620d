"""Adam with decoupled weight decay."""

from __future__ import annotations

from psmpi.optim.decay import Decoupled
from psmpi.optim.rules.adam import Adam


class AdamW(Adam):
    """Adam with decoupled weight decay: w *= 1 - lr weight_decay (Loshchilov and Hutter 2019, Algorithm 2)."""

    summary = "Adam, decoupled weight decay (Loshchilov and Hutter 2019)"
    decay = Decoupled
