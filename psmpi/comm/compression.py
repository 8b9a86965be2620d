"""Compressed sums of gradients over ranks, with error feedback.

A compressor takes this rank's share g of a gradient, and returns an approximation of the sum over the N ranks, the same
on all of them. With p = N g + E, where E is the error of earlier steps, a rank sends C(p) and keeps E = p - C(p). Then
the sum of all applied gradients plus the mean of E is the sum of all gradients (Karimireddy et al. 2019).
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from psmpi.comm.group import Group
from psmpi.errors import UserError
from psmpi.layout import Layout


class Compressor:
    """A compressor of gradients (layout.size,) of `dtype`; memory: whether it keeps the error.

    tables: the arrays that this rank keeps between steps, of shape (1, any).
    """

    def __init__(self, group: Group, layout: Layout, dtype: np.dtype, memory: bool = True):
        self.group, self.size, self.dtype, self.memory = group, layout.size, np.dtype(dtype), memory
        self.residual = np.zeros(self.size if memory else 0, self.dtype)
        self.sent = np.empty(self.size, self.dtype)
        self.tables: dict[str, np.ndarray] = {"left": self.residual.reshape(1, -1)} if memory else {}

    @property
    def vectors(self) -> dict[str, np.ndarray]:
        """The tables of the length of a gradient whose mean over ranks is meaningful."""
        return {name: row.reshape(-1) for name, row in self.tables.items() if row.size == self.size and name != "right"}

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """All arrays that outlive a step."""
        return tuple(value for value in vars(self).values() if isinstance(value, np.ndarray))

    def reduce(self, g: np.ndarray) -> None:
        """Replace g (size,), in host or device memory, by the sum of the ranks' compressed shares."""
        wire = self.group.bridge.outgoing(g)
        wire *= self.group.size
        if self.memory:
            wire += self.residual
        self._reduce(wire)
        if self.memory:
            np.subtract(wire, self.sent, out=self.residual)
            self._correct()
        wire[...] = self._mean()
        self.group.bridge.arrived(g)

    def _reduce(self, p: np.ndarray) -> None:
        """Exchange the compressed p, and write this rank's share of the result to `sent`."""
        raise NotImplementedError

    def _mean(self) -> np.ndarray:
        """The mean over ranks of their compressed shares."""
        raise NotImplementedError

    def _correct(self) -> None:
        """Add the error made after the exchange to `residual`."""


class Float16(Compressor):
    """Half the bytes: each rank sums a segment in `dtype`, from and to float16 messages.

    A power of two in front of a segment scales its largest number to the upper end of float16's range: numbers below
    the normal range lose digits, and take NumPy ten times as long.
    """

    def __init__(self, group: Group, layout: Layout, dtype: np.dtype, memory: bool = True):
        super().__init__(group, layout, dtype, memory)
        n, size = group.size, self.size
        self.edges = [size * k // n for k in range(n + 1)]
        # One element more for the scale of each segment.
        self.counts = [b - a + 1 for a, b in pairwise(self.edges)]
        self.own_slice = slice(self.edges[group.rank], self.edges[group.rank + 1])
        self.half = np.empty(size + n, np.float16)
        self.received = np.empty((n, self.counts[group.rank]), np.float16)
        self.mean = np.empty(size, self.dtype)
        self.rounding_error = np.zeros(self.counts[group.rank] - 1, self.dtype)

    def _segment(self, k: int) -> np.ndarray:
        return self.half[self.edges[k] + k : self.edges[k + 1] + k + 1]

    @staticmethod
    def _pack(values: np.ndarray, out: np.ndarray) -> None:
        peak = float(np.abs(values).max(initial=0.0))
        exponent = 15 - int(np.frexp(peak)[1]) if 0 < peak < np.inf else 0
        # A power of two, so that scaling is exact.
        most = 126 if values.dtype == np.float32 else 1000
        exponent = max(-most, min(most, exponent))
        out[0] = exponent
        np.multiply(values, 2.0**exponent, out=out[1:], dtype=values.dtype, casting="same_kind")

    def _unpack(self, packed: np.ndarray, out: np.ndarray) -> None:
        # In `dtype`: NumPy 1 would multiply in float16.
        np.multiply(packed[1:], 2.0 ** -float(packed[0]), out=out, dtype=self.dtype, casting="same_kind")

    def _reduce(self, p: np.ndarray) -> None:
        for k in range(self.group.size):
            at = slice(self.edges[k], self.edges[k + 1])
            self._pack(p[at], self._segment(k))
            self._unpack(self._segment(k), self.sent[at])
        self.group.alltoallv(self.half, self.counts, self.received)
        mean, one = self.mean[self.own_slice], np.empty_like(self.rounding_error)
        mean.fill(0)
        for packed in self.received:
            self._unpack(packed, one)
            mean += one
        mean /= self.group.size
        own = self._segment(self.group.rank)
        self._pack(mean, own)
        self._unpack(own, one)
        np.subtract(mean, one, out=self.rounding_error)
        self.group.gather_all(self.half, self.counts)

    def _correct(self) -> None:
        # The error of the mean, which this rank alone knows, counts for all ranks.
        self.residual[self.own_slice] += self.group.size * self.rounding_error

    def _mean(self) -> np.ndarray:
        for k in range(self.group.size):
            self._unpack(self._segment(k), self.mean[self.edges[k] : self.edges[k + 1]])
        return self.mean


class TopK(Compressor):
    """The k components of largest magnitude, k = density times all (Aji and Heafield 2017)."""

    def __init__(self, group: Group, layout: Layout, dtype: np.dtype, memory: bool = True, density: float = 0.01):
        super().__init__(group, layout, dtype, memory)
        self.k = min(self.size, max(1, round(density * self.size)))
        self.positions, self.values = np.empty(self.k, np.int32), np.empty(self.k, self.dtype)
        self.all_positions, self.all_values = (
            np.empty((group.size, self.k), a.dtype) for a in (self.positions, self.values)
        )
        self.sums = np.zeros(self.size, self.dtype)

    def _choose(self, p: np.ndarray) -> None:
        self.positions[...] = np.argpartition(np.abs(p), self.size - self.k)[self.size - self.k :]
        np.take(p, self.positions, out=self.values, mode="clip")

    def _reduce(self, p: np.ndarray) -> None:
        self._choose(p)
        self.sent.fill(0)
        self.sent[self.positions] = self.values
        self.group.allgather(self.positions, self.all_positions)
        self.group.allgather(self.values, self.all_values)

    def _mean(self) -> np.ndarray:
        self.sums.fill(0)
        # Ranks are added in order, so that the sum has the same bits everywhere.
        for at, values in zip(self.all_positions, self.all_values, strict=True):
            self.sums[at] += values
        self.sums /= self.group.size
        return self.sums


class DGC(TopK):
    """Top-k of accumulated gradients with momentum; sent components are reset to 0 (Lin et al. 2018).

    masking: whether the momentum of sent components is reset, too. The optimizer should have no momentum.
    """

    def __init__(
        self,
        group: Group,
        layout: Layout,
        dtype: np.dtype,
        memory: bool = True,
        density: float = 0.01,
        momentum: float = 0.9,
        masking: bool = True,
    ):
        super().__init__(group, layout, dtype, memory, density)
        self.momentum, self.masking = momentum, masking
        self.moving = np.zeros(self.size, self.dtype)
        self.tables["moving"] = self.moving.reshape(1, -1)

    def reduce(self, g: np.ndarray) -> None:
        wire = self.group.bridge.outgoing(g)
        self.moving *= self.dtype.type(self.momentum)
        self.moving += self.group.size * wire
        # The memory holds sums of these.
        np.divide(self.moving, self.group.size, out=wire)
        self.group.bridge.arrived(g)
        super().reduce(g)
        if self.masking:
            self.moving[self.positions] = 0


class Sign(Compressor):
    """A bit a component and a scale a tensor, the mean magnitude (Karimireddy et al. 2019, EF-signSGD)."""

    def __init__(self, group: Group, layout: Layout, dtype: np.dtype, memory: bool = True):
        super().__init__(group, layout, dtype, memory)
        self.tensors = tensors(layout)
        self.scales = np.empty(len(self.tensors), self.dtype)
        self.bits = np.empty(-(-self.size // 8), np.uint8)
        self.all_scales = np.empty((group.size, len(self.scales)), self.dtype)
        self.all_bits = np.empty((group.size, len(self.bits)), np.uint8)
        self.sums = np.empty(self.size, self.dtype)

    def _signs(self, bits: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
        np.multiply(np.unpackbits(bits, count=self.size), 2, out=out, casting="unsafe")
        out -= 1
        for at, scale in zip(self.tensors, scales, strict=True):
            for run in at:
                out[run] *= scale

    def _reduce(self, p: np.ndarray) -> None:
        for k, at in enumerate(self.tensors):
            self.scales[k] = sum(np.abs(p[run]).sum(dtype=np.float64) for run in at) / sum(r.stop - r.start for r in at)
        self.bits[...] = np.packbits(p >= 0)
        self._signs(self.bits, self.scales, self.sent)
        self.group.allgather(self.bits, self.all_bits)
        self.group.allgather(self.scales, self.all_scales)

    def _mean(self) -> np.ndarray:
        self.sums.fill(0)
        one = np.empty_like(self.sums)
        for bits, scales in zip(self.all_bits, self.all_scales, strict=True):
            self._signs(bits, scales, one)
            self.sums += one
        self.sums /= self.group.size
        return self.sums


class QSGD(Compressor):
    """Random rounding to `levels` multiples of the norm over levels: unbiased (Alistarh et al. 2017)."""

    def __init__(
        self, group: Group, layout: Layout, dtype: np.dtype, memory: bool = False, levels: int = 15, seed: int = 0
    ):
        super().__init__(group, layout, dtype, memory)
        self.levels, self.seed = levels, seed
        self.steps = np.zeros((1, 1), np.int64)
        self.tables["draws"] = self.steps
        self.codes, self.norm = np.empty(self.size, np.int8), np.empty(1, self.dtype)
        self.all_codes = np.empty((group.size, self.size), np.int8)
        self.all_norms = np.empty((group.size, 1), self.dtype)

    def _reduce(self, p: np.ndarray) -> None:
        self.norm[0] = np.sqrt(np.dot(p.astype(np.float64), p.astype(np.float64)))
        # The random numbers are keyed by the rank's slice of the minibatch.
        rng = np.random.default_rng([self.seed, int(self.steps[0, 0]), self.group.rank])
        self.steps += 1
        if self.norm[0] > 0:
            scaled = np.abs(p) * (self.levels / self.norm[0])
            whole = np.floor(scaled + rng.random(self.size))
            np.copyto(self.codes, np.copysign(np.minimum(whole, self.levels), p), casting="unsafe")
        else:
            self.codes.fill(0)
        np.multiply(self.codes, self.norm[0] / self.levels, out=self.sent, casting="same_kind")
        self.group.allgather(self.codes, self.all_codes)
        self.group.allgather(self.norm, self.all_norms)

    def _mean(self) -> np.ndarray:
        factors = self.all_norms / (self.levels * self.group.size)
        mean: np.ndarray = np.einsum("ri,r->i", self.all_codes, factors[:, 0], dtype=self.dtype, casting="same_kind")
        return mean


class PowerSGD(Compressor):
    """Matrices as products of two with `rank` columns, by one step of subspace iteration (Vogels et al. 2019).

    Vectors, and matrices that would not become smaller, are summed as they are.
    """

    def __init__(
        self, group: Group, layout: Layout, dtype: np.dtype, memory: bool = True, rank: int = 2, seed: int = 0
    ):
        super().__init__(group, layout, dtype, memory)
        self.rank = rank
        self.matrices: list[tuple[list[slice], tuple[int, int]]] = []
        whole: list[slice] = []
        for at, parameter in zip(tensors(layout), layout.parameters, strict=True):
            size = sum(run.stop - run.start for run in at)
            rows = size // parameter.unit_size
            shape = rows, parameter.unit_size
            if rank <= min(shape) and rank * sum(shape) < size:
                self.matrices.append((at, shape))
            else:
                whole += at
        self.uncompressed = np.concatenate([np.arange(run.start, run.stop) for run in whole] or [np.empty(0, int)])
        rng = np.random.default_rng(seed)
        # The same start on all ranks; each step starts from the last factors.
        right = sum(shape[1] for _, shape in self.matrices) * rank
        self.q = rng.standard_normal(right).astype(self.dtype)
        self.p = np.empty(sum(shape[0] for _, shape in self.matrices) * rank, self.dtype)
        self.dense = np.empty(len(self.uncompressed), self.dtype)
        self.result = np.empty(self.size, self.dtype)
        if right:
            self.tables["right"] = self.q.reshape(1, -1)

    def _factors(self) -> list[tuple[list[slice], tuple[int, int], np.ndarray, np.ndarray]]:
        factors, left, right = [], 0, 0
        for at, (rows, columns) in self.matrices:
            p = self.p[left : left + rows * self.rank].reshape(rows, self.rank)
            q = self.q[right : right + columns * self.rank].reshape(columns, self.rank)
            factors.append((at, (rows, columns), p, q))
            left, right = left + p.size, right + q.size
        return factors

    def _reduce(self, m: np.ndarray) -> None:
        n, factors = self.group.size, self._factors()
        made = [np.concatenate([m[run] for run in at]).reshape(shape) for at, shape, _, _ in factors]
        for matrix, (_, _, p, q) in zip(made, factors, strict=True):
            np.matmul(matrix, q, out=p)
        self.group.allreduce(self.p)
        for matrix, (_, _, p, q) in zip(made, factors, strict=True):
            # The sum serves as well as the mean: only directions of columns matter.
            p[...] = np.linalg.qr(p)[0]
            np.matmul(matrix.T, p, out=q)
        self.q /= n
        self.group.allreduce(self.q)
        np.take(m, self.uncompressed, out=self.dense, mode="clip")
        self.dense /= n
        self.group.allreduce(self.dense)
        for at, _, p, q in factors:
            product = (p @ q.T).reshape(-1)
            start = 0
            for run in at:
                self.result[run] = product[start : start + run.stop - run.start]
                start += run.stop - run.start
        self.sent[...] = self.result
        # Vectors are sent whole, without an error.
        self.sent[self.uncompressed] = m[self.uncompressed]
        self.result[self.uncompressed] = self.dense

    def _mean(self) -> np.ndarray:
        return self.result


def tensors(layout: Layout) -> list[list[slice]]:
    """The slices of the flat vector that form each parameter, in the order of its units."""
    slices: list[list[slice]] = [[] for _ in layout.parameters]
    for piece in sorted(layout.pieces(), key=lambda piece: piece.first):
        size = layout.parameters[piece.parameter].unit_size * (piece.last - piece.first)
        slices[piece.parameter].append(slice(piece.offset, piece.offset + size))
    return slices


COMPRESSORS: dict[str, tuple[type[Compressor], tuple[str, ...]]] = {
    "float16": (Float16, ()),
    "topk": (TopK, ("density",)),
    "dgc": (DGC, ("density", "momentum")),
    "sign": (Sign, ()),
    "qsgd": (QSGD, ("levels", "seed")),
    "powersgd": (PowerSGD, ("rank", "seed")),
}


def check_compression(density: float, rank: int, levels: int) -> None:
    """UserError for a setting out of the range of its compressor."""
    if not 0 < density <= 1:
        raise UserError(f"--density {density}: expected a share above 0 and up to 1")
    if rank < 1:
        raise UserError(f"--powersgd-rank {rank}: expected 1 or more columns")
    if not 1 <= levels <= 127:
        raise UserError(f"--qsgd-levels {levels}: expected 1 to 127")


def make_compressor(
    name: str, group: Group, layout: Layout, dtype: np.dtype, memory: bool, **settings: float
) -> Compressor:
    """Make the compressor called `name`, with the settings that it uses."""
    kind, takes = COMPRESSORS[name]
    # Random rounding is unbiased and needs no memory; DGC has a memory of its own.
    memory = (memory and kind is not QSGD) or kind is DGC
    return kind(group, layout, dtype, memory, **{key: settings[key] for key in takes})
