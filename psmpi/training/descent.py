"""One optimizer step from a gradient: clipping, the update rule, and what a line search asks for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from psmpi.comm.group import Group
from psmpi.layout import Layout, Runs
from psmpi.optim import AllSum
from psmpi.training.context import Context


def no_sum(values: np.ndarray) -> np.ndarray:
    """The sum over shards where one rank has the whole vector: `values` themselves."""
    return values


class Descent:
    """The optimizer of this rank's weights `runs`. allsum: sums over all shards; world: ranks that add up losses."""

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
        """layout: that of w and g, if it is not `runs` of the network's; it serves to name parameters in messages."""
        self.ops, self.clip, self.allsum, self.world = context.ops, context.config.optimization.clip, allsum, world
        self.optimizer = context.optimizer(runs, counted)
        self.numbers, self.layout, self.runs = context.numbers, context.layout, runs
        if layout is not None:
            self.layout, self.runs = layout, Runs(((0, layout.size),))

    def step(self, w: np.ndarray, g: np.ndarray, lr: float) -> None:
        """Step w (n,) along its gradient g (n,), which is overwritten."""
        if self.clip > 0:
            self.numbers.clip(g, self.clip, self.allsum, self.ops, self.layout, self.runs)
        # An empty shard steps too, so that the optimizer's scalars stay the same on all ranks.
        self.optimizer.step(w, g, lr, self.allsum)

    def sound(self, loss: float, g: np.ndarray, share: int | None = None) -> bool:
        """Whether loss and g (n,) are finite on all ranks, see `Numbers.sound`."""
        return self.numbers.sound(self.ops, loss, [(g, self.runs)], self.layout, share)

    def search(self, w: np.ndarray, g: np.ndarray, lr: float, gradient: Callable[[bool], float]) -> float:
        """Make a step for which the optimizer may need several gradients; returns this rank's share of the first loss.

        gradient(trial): fills g and returns this rank's share of the loss; of a trial a loss that is not finite is
        infinity. A step with a loss or gradient that is not finite is left out, and counts a loss of 0.
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
