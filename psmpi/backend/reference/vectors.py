"""Operations on flat vectors: linear combinations, scalar products and norms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from psmpi.backend.reference.arrays import Arrays

# Length of a piece of a vector. OpenBLAS splits dot products of 10,000 elements or more over threads: with shorter
# pieces, sums do not depend on the number of threads.
DOT = 1 << 13


class Vectors(Arrays):
    """Operations on vectors. Sums are accumulated in float64, piece by piece."""

    def squared_norm(self, g: np.ndarray) -> float:
        """The squared Euclidean norm of g (n,), accumulated in float64; 0.0 for an empty vector.

        Any finite float32 is squared without overflow; float64 components must be below 2^511.
        """
        total = 0.0
        for start in range(0, g.size, DOT):
            piece = g[start : start + DOT].astype(np.float64, copy=False)
            total += float(np.dot(piece, piece))
        return total

    def scale(self, g: np.ndarray, factor: float) -> None:
        """g *= factor, in place, in the dtype of g."""
        g *= factor

    # No warning of overflow, as on a device.
    @np.errstate(over="ignore", invalid="ignore")
    def combine(self, out: np.ndarray, *terms: tuple[float, np.ndarray]) -> None:
        """out (n,) = the sum of factor * array over one or more terms, in their order; all arrays (n,) of one dtype.

        Factors, products and sums are each rounded to the dtype. So the bits of an element depend neither on its
        position nor on the backend, except for subnormal float32 numbers. `out` may be the array of the first term
        only.
        """
        (first, start), *others = ((out.dtype.type(factor), array) for factor, array in terms)
        scratch = self._two_pieces(out.dtype)[0]
        for at in _pieces(out.size):
            into, product = out[at], scratch[: at.stop - at.start]
            if first == 1:
                np.copyto(into, start[at])
            elif first == -1:
                np.negative(start[at], out=into)
            else:
                np.multiply(start[at], first, out=into)
            for factor, array in others:
                if factor == 1:
                    into += array[at]
                elif factor == -1:
                    into -= array[at]
                else:
                    into += np.multiply(array[at], factor, out=product)

    def dots(self, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """The scalar products of pairs of vectors, (k,) float64 in host memory, accumulated in float64.

        All vectors are (n,) of one dtype. Pairs with the same first vector should be adjacent: each of its pieces is
        then read from memory once.
        """
        dots = np.zeros(len(pairs))
        scratch = self._two_pieces(np.dtype(np.float64))
        for at in _pieces(pairs[0][0].size if pairs else 0):
            left, right = scratch[:, : at.stop - at.start]
            last: np.ndarray | None = None
            for k, (a, b) in enumerate(pairs):
                if a.dtype == np.float64:
                    dots[k] += np.dot(a[at], b[at])
                    continue
                if a is not last:
                    np.copyto(left, a[at])
                    last = a
                np.copyto(right, b[at])
                dots[k] += np.dot(left, right)
        return dots

    def abs_sum(self, x: np.ndarray) -> float:
        """The sum of |x|, x (n,), accumulated in float64."""
        total, scratch = 0.0, self._two_pieces(x.dtype)[0]
        for at in _pieces(x.size):
            total += float(np.abs(x[at], out=scratch[: at.stop - at.start]).sum(dtype=np.float64))
        return total

    @np.errstate(over="ignore", invalid="ignore")
    def multiply(self, x: np.ndarray, by: np.ndarray) -> None:
        """x *= by, element by element; both (n,) of one dtype."""
        np.multiply(x, by, out=x)

    def _two_pieces(self, dtype: np.dtype) -> np.ndarray:
        """Scratch for two pieces of vectors, (2, DOT)."""
        return self.scratch("pieces", 2 * DOT, dtype).reshape(2, DOT)


def _pieces(n: int) -> Iterator[slice]:
    """Slices of at most DOT elements that cover n elements, in order."""
    for start in range(0, n, DOT):
        yield slice(start, min(start + DOT, n))
