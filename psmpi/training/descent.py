"""One optimizer step from a gradient: clipping, the update rule, and what a line search asks for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from psmpi.comm.group import Group
from psmpi.layout import Layout, Runs
from psmpi.optim import AllSum
from psmpi.training.context import Context


def no_sum(values: np.ndarray) -> np.ndarray:
    """Sums over the shards of a vector that one rank has whole."""
    return values


class Descent:
    """Steps the weights of `runs`, this rank's; `allsum` sums over all shards, and losses are added up over `world`."""

    def __init__(
        self,
        context: Context,
        runs: Runs,
        *,
        allsum: AllSum = no_sum,
        world: Group | None = None,
        counted: bool = False,
        layout: Layout | None = None,
    ):
        """layout: of w and g themselves, to name parameters, where they do not lie as `runs` say."""
        self.ops, self.clip, self.allsum, self.world = context.ops, context.config.optimization.clip, allsum, world
        self.optimizer = context.optimizer(runs, counted)
        self.numbers, self.layout, self.runs = context.numbers, context.layout, runs
        if layout is not None:
            self.layout, self.runs = layout, Runs(((0, layout.size),))

    def step(self, w: np.ndarray, g: np.ndarray, lr: float) -> None:
        """Step along g (n,), the gradient of w (n,), which is used up."""
        if self.clip > 0:
            self.numbers.clip(g, self.clip, self.allsum, self.ops, self.layout, self.runs)
        # With an empty shard too: the optimizer's scalars stay the same on all ranks.
        self.optimizer.step(w, g, lr, self.allsum)

    def sound(self, loss: float, g: np.ndarray, share: int | None = None) -> bool:
        """Whether to step along g (n,): `Numbers.sound`."""
        return self.numbers.sound(self.ops, loss, [(g, self.runs)], self.layout, share)

    def search(self, w: np.ndarray, g: np.ndarray, lr: float, gradient: Callable[[bool], float]) -> float:
        """Step where the optimizer may ask for more than one gradient; returns this rank's share of the first loss.

        gradient(trial) fills g and returns this rank's share of the loss; a `trial` that is not finite is infinity. A
        step that is not sound is not made, and its loss 0.
        """
        loss = gradient(False)
        if not self.sound(loss, g):
            return 0.0
        if not self.optimizer.needs_closure:
            self.step(w, g, lr)
            return loss
        tried = 0

        def objective() -> float:
            nonlocal tried
            share = gradient(True) if tried else loss
            tried += 1
            assert self.world is not None
            return float(self.world.agree(np.array([share]))[0])

        self.optimizer.step(w, g, lr, self.allsum, objective)
        return loss
