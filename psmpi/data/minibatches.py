"""The order in which training visits the samples: the same on every process, without communication."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from psmpi.errors import UserError, counted

# Key of these random numbers, which separates them from others drawn from the same seed.
_TAG = 0x6D696E69


class Minibatches:
    """Minibatches of `batch_size` of `n` samples; shuffle: a new random order in each epoch, else the order 0..n-1.

    Every epoch visits every sample once; its last minibatch may be smaller. UserError for a batch_size outside 1..n
    and for a negative seed.
    """

    def __init__(self, n: int, batch_size: int, seed: int, shuffle: bool = True) -> None:
        if batch_size < 1:
            raise UserError(f"batch size {batch_size}: a minibatch needs at least one sample; give 1..{n}")
        if batch_size > n:
            raise UserError(
                f"batch size {batch_size}: there {'is' if n == 1 else 'are'} only {counted(n, 'training sample')}; "
                f"give 1..{n}"
            )
        if seed < 0:
            raise UserError(f"seed {seed}: seeds are not negative; give 0 or more")
        self.n, self.batch_size, self.seed, self.shuffle = n, batch_size, seed, shuffle
        self._epoch: int | None = None
        self._order = np.empty(0, np.int64)

    @property
    def steps_per_epoch(self) -> int:
        """Number of minibatches in an epoch, with the last one, which may be smaller."""
        return -(-self.n // self.batch_size)

    def ids(self, epoch: int, step: int) -> npt.NDArray[np.int64]:
        """The sample ids (b,) int64, read-only, of minibatch `step` of `epoch`, both counted from 0.

        The ids depend on n, batch_size, seed, shuffle, epoch and step only, not on earlier calls. IndexError for a
        negative epoch and for a step outside 0..steps_per_epoch-1.
        """
        if epoch < 0 or not 0 <= step < self.steps_per_epoch:
            raise IndexError(
                f"epoch {epoch}, step {step}: epochs count from 0, steps are 0..{self.steps_per_epoch - 1}"
            )
        if epoch != self._epoch:
            self._order = self._shuffled(epoch)
            self._order.flags.writeable = False
            self._epoch = epoch
        return self._order[step * self.batch_size : (step + 1) * self.batch_size]

    def _shuffled(self, epoch: int) -> npt.NDArray[np.int64]:
        if not self.shuffle:
            return np.arange(self.n, dtype=np.int64)
        sequence = np.random.SeedSequence([self.seed, _TAG, epoch])
        return np.random.Generator(np.random.Philox(sequence)).permutation(self.n).astype(np.int64, copy=False)
