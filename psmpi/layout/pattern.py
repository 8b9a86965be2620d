"""Patterns of sparse matrices in compressed rows: the inputs of each unit of a sparse layer."""

from __future__ import annotations

import zlib
from base64 import b85decode, b85encode
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import sha256
from typing import NamedTuple

import numpy as np

from psmpi.errors import UserError

# Prefix of a pattern as text. Rows, inputs, entries and the compressed numbers follow it.
PACKED = "csr:"
# Largest number of entries: entry numbers are int32.
MOST = 2**31 - 1
# Random numbers that are drawn at a time, which bounds the memory.
DRAWN = 1 << 20


class Transposed(NamedTuple):
    """Entries of a pattern by columns: entries [starts[c], starts[c + 1]) are in column c, by increasing row.

    starts (columns + 1,) int64; rows, entries (entries,) int32: row of each entry, and its number in compressed rows.
    """

    starts: np.ndarray
    rows: np.ndarray
    entries: np.ndarray


@dataclass(frozen=True, eq=False)
class Pattern:
    """Places of the entries of a matrix (rows, inputs): row r has entries [starts[r], starts[r + 1]).

    starts (rows + 1,) int64; columns (entries,) int32, each at most once in a row. Patterns with the same arrays and
    the same number of inputs are equal. In local patterns, whose columns are renumbered, the columns of a row may be
    in any order.
    """

    starts: np.ndarray
    columns: np.ndarray
    inputs: int

    @classmethod
    def of(cls, starts: np.ndarray, columns: np.ndarray, inputs: int) -> Pattern:
        """Return a pattern of arrays of whole numbers; raise ValueError for arrays that are not compressed rows."""
        for name, array in (("starts", starts), ("columns", columns)):
            if array.ndim != 1 or array.dtype.kind not in "iu":
                raise ValueError(f"the {name} are {array.dtype} {array.shape}; expected a vector of whole numbers")
        if len(starts) < 2 or starts[0] != 0 or (starts[1:] < starts[:-1]).any() or starts[-1] != len(columns):
            raise ValueError(
                f"the starts must begin at 0, not decrease, and end at the number of entries, {len(columns)}"
            )
        if not 0 < len(columns) <= MOST:
            raise ValueError(f"there are {len(columns):,} entries; expected 1 to {MOST:,}")
        if columns.min() < 0 or columns.max() >= inputs:
            raise ValueError(f"columns go from {columns.min()} to {columns.max()}; expected 0 to {inputs - 1}")
        pattern = cls(starts.astype(np.int64), columns.astype(np.int32), int(inputs))
        order = np.lexsort((pattern.columns, pattern.row_numbers))
        same = np.diff(pattern.columns[order]) == 0
        same &= np.diff(pattern.row_numbers) == 0
        if same.any():
            at = order[np.flatnonzero(same)[0]]
            raise ValueError(f"row {pattern.row_numbers[at]} has column {pattern.columns[at]} twice")
        for array in (pattern.starts, pattern.columns):
            array.flags.writeable = False
        return pattern

    @property
    def rows(self) -> int:
        return len(self.starts) - 1

    @property
    def size(self) -> int:
        """Number of entries."""
        return len(self.columns)

    @cached_property
    def fan_in(self) -> np.ndarray:
        """Number of entries of each row, (rows,) int64."""
        return np.diff(self.starts)

    @cached_property
    def fan_out(self) -> np.ndarray:
        """Number of entries of each column, (inputs,) int64."""
        return np.bincount(self.columns, minlength=self.inputs)

    @property
    def nbytes(self) -> int:
        """Bytes of the pattern's arrays, including `transposed` if it has been computed."""
        arrays = [self.starts, self.columns, *self.__dict__.get("transposed", ())]
        return sum(int(array.nbytes) for array in arrays)

    @property
    def row_numbers(self) -> np.ndarray:
        """Row of each entry, (entries,) int32."""
        return np.repeat(np.arange(self.rows, dtype=np.int32), self.fan_in)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the pattern's sizes and arrays, in hexadecimal."""
        checksum = sha256(f"{self.rows} {self.inputs}".encode())
        checksum.update(self.starts.astype("<i8").tobytes())
        checksum.update(self.columns.astype("<i4").tobytes())
        return checksum.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pattern) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Pattern({self.rows} x {self.inputs}, {self.size} entries, {self.digest[:12]})"

    @cached_property
    def transposed(self) -> Transposed:
        """Entries by columns."""
        order = np.argsort(self.columns, kind="stable").astype(np.int32)
        starts = np.concatenate([[0], np.cumsum(self.fan_out)])
        return Transposed(starts, self.row_numbers[order], order)

    def sorted(self) -> Pattern:
        """Return the same pattern with columns that increase within rows."""
        order = np.lexsort((self.columns, self.row_numbers))
        return Pattern(self.starts, self.columns[order], self.inputs)

    def restricted(self, kept: np.ndarray, inputs: np.ndarray) -> tuple[Pattern, np.ndarray]:
        """Return the pattern of the kept rows over the kept inputs, and the first entry of each kept row in `self`.

        kept (rows,), inputs (inputs,) bool; first entries (kept rows,) int64. ValueError if a kept row has an entry at
        an input that is not kept.
        """
        rows = np.flatnonzero(kept)
        sizes, firsts = self.fan_in[rows], self.starts[rows]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        entries = np.arange(starts[-1]) + np.repeat(firsts - starts[:-1], sizes)
        columns = self.columns[entries]
        if not inputs[columns].all():
            raise ValueError("a kept row of the pattern has an entry at an input that is not kept")
        local = np.cumsum(inputs, dtype=np.int32) - 1
        return Pattern(starts, local[columns], int(inputs.sum())), firsts

    def packed(self) -> str:
        """Return the pattern as ASCII text without quotes and backslashes, see psmpi/checkpoint/FORMAT.md."""
        steps = np.diff(self.columns, prepend=np.int32(0))
        begins = self.starts[:-1][self.fan_in > 0]
        steps[begins] = self.columns[begins]
        numbers = np.concatenate([self.fan_in, steps]).astype("<i4")
        # Bytes of the same significance lie together: most of the high bytes are 0 and compress well.
        planes = np.ascontiguousarray(numbers.view(np.uint8).reshape(-1, 4).T)
        text = b85encode(zlib.compress(planes.tobytes(), 9)).decode()
        return f"{PACKED}{self.rows}:{self.inputs}:{self.size}:{text}"


@lru_cache(maxsize=256)
def unpack(text: str) -> Pattern:
    """Return the pattern of a text that `Pattern.packed` wrote; raise ValueError for any other text."""
    head, *sizes = text.split(":", 4)
    if (
        f"{head}:" != PACKED
        or len(sizes) != 4
        or not all(number.isascii() and number.isdigit() for number in sizes[:3])
    ):
        raise ValueError(f"it does not begin with {PACKED}ROWS:INPUTS:ENTRIES:")
    rows, inputs, entries = (int(number) for number in sizes[:3])
    if not (0 < rows <= MOST and 0 < inputs <= MOST and 0 < entries <= min(MOST, rows * inputs)):
        raise ValueError(f"its header says {rows} x {inputs} with {entries} entries, which is not possible")
    stream = zlib.decompressobj()
    try:
        data = stream.decompress(b85decode(sizes[3]), 4 * (rows + entries))
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if len(data) != 4 * (rows + entries) or not stream.eof:
        raise ValueError("it has more or fewer numbers than its header says")
    planes = np.frombuffer(data, np.uint8).reshape(4, -1)
    numbers = np.ascontiguousarray(planes.T).view("<i4").reshape(-1).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(numbers[:rows])])
    if (numbers[:rows] < 0).any() or starts[-1] != entries:
        raise ValueError("its rows have more or fewer entries than its header says")
    sums = np.cumsum(numbers[rows:])
    before = np.concatenate([[0], sums])[starts[:-1]]
    return Pattern.of(starts, sums - np.repeat(before, numbers[:rows]), inputs)


@lru_cache(maxsize=256)
def random_pattern(rows: int, inputs: int, fan_in: int, key: tuple[int, ...]) -> Pattern:
    """Return a pattern of `fan_in` different columns a row, drawn uniformly; key: the seed, non-negative integers."""
    rng, chosen = np.random.default_rng(list(key)), []
    at_once = max(1, DRAWN // inputs)
    for first in range(0, rows, at_once):
        drawn = rng.random((min(at_once, rows - first), inputs))
        chosen.append(np.sort(np.argpartition(drawn, fan_in - 1, axis=1)[:, :fan_in], axis=1))
    starts = np.arange(rows + 1, dtype=np.int64) * fan_in
    return Pattern.of(starts, np.concatenate(chosen).reshape(-1), inputs)


@lru_cache(maxsize=256)
def radix_pattern(units: int, radix: int, stride: int, copies: int = 1) -> Pattern:
    """A layer of a RadiX-Net (Robinett and Kepner, "RadiX-Net: structured sparse matrices for deep neural networks",
    2019): the Kronecker product of ones (copies, copies) with P^0 + P^stride + ... + P^((radix - 1) stride).

    P is the cyclic permutation of units / copies places: row n has the columns n + j stride. In a mixed-radix system
    the stride of a layer is the product of the radices of the layers before it. UserError if `copies` does not divide
    `units` or if (radix - 1) stride >= units / copies.
    """
    places = units // copies
    if units % copies:
        raise UserError(f"copies = {copies} does not divide the {units} units")
    if (radix - 1) * stride >= places:
        raise UserError(
            f"radix = {radix} and stride = {stride} go around {places} places more than once: let (radix - 1) stride "
            f"be less than {places}"
        )
    cycle = np.sort((np.arange(places)[:, None] + np.arange(radix) * stride) % places, axis=1)
    row = (np.arange(copies)[:, None] * places + cycle[:, None, :]).reshape(places, copies * radix)
    starts = np.arange(units + 1, dtype=np.int64) * (copies * radix)
    return Pattern.of(starts, np.tile(row, (copies, 1)).reshape(-1), units)


def radix_strides(units: int, radix: int) -> list[int]:
    """Return the strides 1, radix, radix^2, ... of a mixed-radix system of equal radices, while they fit `units`."""
    strides = [1]
    while strides[-1] * radix * (radix - 1) < units:
        strides.append(strides[-1] * radix)
    return strides
