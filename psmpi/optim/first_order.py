"""Base class of first-order optimizers.

Each update rule has a file in `rules/` and states its vectors, its settings and its update of a chunk. Weight decay is
a separate class, see `decay`. Scalars are Python floats, which take the dtype of the arrays: float32 shards are stepped
in float32.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike

from psmpi.backend import NumpyOps
from psmpi.errors import UserError
from psmpi.optim.base import CHUNK, AllSum, Closure, Hyper, Optimizer, check_eps, check_settings, chunks
from psmpi.optim.decay import Coupled, WeightDecay


class FirstOrder(Optimizer):
    """Base class of update rules: weight decay and `update`, chunk by chunk, or in one pass of a fused operation.

    The names in `settings` are keywords of the constructor and attributes. UserError for a setting out of its range,
    for an eps that is 0 in `dtype`, and on a device that has no kernel of the rule; TypeError for a setting that the
    rule does not use.
    """

    # Names of the state's vectors, in the order in which `update` and the fused operation take them.
    names: ClassVar[tuple[str, ...]] = ()
    # Name of the fused operation that steps a whole shard in one pass, if the backend has it. The signature is
    # operation(w, g, *vectors, *arguments(lr)).
    operation: ClassVar[str] = ""
    # Whether scalars["t"] counts the steps, including the current step.
    counts: ClassVar[bool] = False
    decay: ClassVar[type[WeightDecay]] = Coupled
    weight_decay: float = 0.0
    eps: float

    def __init__(
        self, n: int, dtype: DTypeLike, *, ops: NumpyOps | None = None, own: Any = None, **settings: float | None
    ) -> None:
        strange = settings.keys() - set(self.settings)
        if strange:
            raise TypeError(
                f"{type(self).__name__} has no {', '.join(sorted(strange))}: use {', '.join(self.settings)}"
            )
        check_settings(**settings)
        super().__init__(n, dtype, names=self.names, ops=ops, own=own)
        for name, value in self.chosen(Hyper(**settings)).items():  # type: ignore[arg-type]
            setattr(self, name, float(value))
        if "eps" in self.settings:
            check_eps(self.eps, self.dtype)
        self.weights = self.decay(self.weight_decay)
        if self.counts:
            self.scalars["t"] = 0
        self.fused = self.ops.fused(self.operation)
        if self.fused is None and self.ops.on_device:
            raise UserError(f"--backend {self.ops.name} has no kernel of {type(self).__name__}: use --backend compiled")
        self.scratch = np.empty((2, min(n, CHUNK)), self.dtype)

    def step(self, w: np.ndarray, g: np.ndarray, lr: float, allsum: AllSum, closure: Closure | None = None) -> None:
        self.check_shard(w, g)
        self.begin()
        # A NumPy float64 as lr would promote float32 chunks to float64.
        self.sweep(w, g, float(lr), list(self.vectors.values()))

    def begin(self) -> None:
        """Begin a step that consists of calls of `step_piece`."""
        if self.counts:
            self.scalars["t"] += 1

    def step_piece(self, w: np.ndarray, g: np.ndarray, lr: float, at: slice) -> None:
        """Step the elements `at` of the shard w (n,) along their gradient g; each element once, after `begin`."""
        self.sweep(w[at], g, float(lr), [vector[at] for vector in self.vectors.values()])

    def sweep(self, w: np.ndarray, g: np.ndarray, lr: float, vectors: list[np.ndarray]) -> None:
        """Step weights w (k,) of the shard along g (k,); vectors: their elements of the state's vectors, (k,) each."""
        if self.fused is not None:
            self.fused(w, g, *vectors, *self.arguments(lr))
            return
        decay = self.weights.apply if self.weight_decay else None
        for at in chunks(w.size):
            size = at.stop - at.start
            a, b = self.scratch[0, :size], self.scratch[1, :size]
            w_at, g_at = w[at], g[at]
            if decay is not None:
                decay(w_at, g_at, lr, a)
            self.update(w_at, g_at, lr, [vector[at] for vector in vectors], a, b)

    def arguments(self, lr: float) -> tuple[float, ...]:
        """Return the scalar arguments of the fused operation, which follow the vectors."""
        raise NotImplementedError

    def update(
        self, w: np.ndarray, g: np.ndarray, lr: float, state: list[np.ndarray], a: np.ndarray, b: np.ndarray
    ) -> None:
        """Step one chunk w (k,) in place along g (k,); `state` in the order of `names`; scratch a, b (k,)."""
        raise NotImplementedError
