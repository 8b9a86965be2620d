"""Adam with decoupled weight decay."""

from __future__ import annotations

from psmpi.optim.decay import Decoupled
from psmpi.optim.rules.adam import Adam


class AdamW(Adam):
    """Adam, with the weights shrunk by 1 - lr weight_decay beside the step (Loshchilov and Hutter 2019,
    Algorithm 2).
    """

    decay = Decoupled
