"""Patterns of sparse matrices in compressed rows: which inputs each unit of a sparse layer sees."""

from __future__ import annotations

import zlib
from base64 import b85decode, b85encode
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import sha256
from typing import NamedTuple

import numpy as np

from psmpi.errors import UserError

# What a pattern as text begins with: rows, columns, entries, and its numbers.
PACKED = "csr:"
# Entries are counted in 32 bits.
MOST = 2**31 - 1
# Numbers that are drawn at a time.
DRAWN = 1 << 20


class Transposed(NamedTuple):
    """The entries of a pattern by columns: those of column c are [starts[c], starts[c + 1]), by increasing row.

    starts (columns + 1,) int64; rows, entries (entries,) int32: the row of each, and its number in compressed rows.
    """

    starts: np.ndarray
    rows: np.ndarray
    entries: np.ndarray


@dataclass(frozen=True, eq=False)
class Pattern:
    """The places of the entries of a matrix (rows, inputs): row r has entries [starts[r], starts[r + 1]).

    starts (rows + 1,) int64; columns (entries,) int32, of a row each at most once. Patterns are equal where these are.
    Local patterns, whose columns are renumbered, may have them in any order.
    """

    starts: np.ndarray
    columns: np.ndarray
    inputs: int

    @classmethod
    def of(cls, starts: np.ndarray, columns: np.ndarray, inputs: int) -> Pattern:
        """A pattern from arrays of whole numbers; ValueError says what is wrong with them."""
        for name, array in (("starts", starts), ("columns", columns)):
            if array.ndim != 1 or array.dtype.kind not in "iu":
                raise ValueError(f"the {name} of rows are {array.dtype} {array.shape}, not whole numbers in a vector")
        if len(starts) < 2 or starts[0] != 0 or (starts[1:] < starts[:-1]).any() or starts[-1] != len(columns):
            raise ValueError(f"rows do not begin at 0, go up, and end at the {len(columns)} columns that there are")
        if not 0 < len(columns) <= MOST:
            raise ValueError(f"there are {len(columns):,} entries; expected 1 to {MOST:,}")
        if columns.min() < 0 or columns.max() >= inputs:
            raise ValueError(f"columns go from {columns.min()} to {columns.max()}; expected 0 to {inputs - 1}")
        made = cls(starts.astype(np.int64), columns.astype(np.int32), int(inputs))
        order = np.lexsort((made.columns, made.row_numbers))
        same = np.diff(made.columns[order]) == 0
        same &= np.diff(made.row_numbers) == 0
        if same.any():
            at = order[np.flatnonzero(same)[0]]
            raise ValueError(f"row {made.row_numbers[at]} has column {made.columns[at]} twice")
        for array in (made.starts, made.columns):
            array.flags.writeable = False
        return made

    @property
    def rows(self) -> int:
        return len(self.starts) - 1

    @property
    def size(self) -> int:
        """The number of entries."""
        return len(self.columns)

    @cached_property
    def fan_in(self) -> np.ndarray:
        """(rows,) int64: the entries of each row."""
        return np.diff(self.starts)

    @cached_property
    def fan_out(self) -> np.ndarray:
        """(inputs,) int64: the entries of each column."""
        return np.bincount(self.columns, minlength=self.inputs)

    @property
    def nbytes(self) -> int:
        """The bytes of its arrays, those by columns too where they have been made."""
        known = [self.starts, self.columns, *self.__dict__.get("transposed", ())]
        return sum(int(array.nbytes) for array in known)

    @property
    def row_numbers(self) -> np.ndarray:
        """(entries,) int32: the row of each entry."""
        return np.repeat(np.arange(self.rows, dtype=np.int32), self.fan_in)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the pattern."""
        found = sha256(f"{self.rows} {self.inputs}".encode())
        found.update(self.starts.astype("<i8").tobytes())
        found.update(self.columns.astype("<i4").tobytes())
        return found.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pattern) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Pattern({self.rows} x {self.inputs}, {self.size} entries, {self.digest[:12]})"

    @cached_property
    def transposed(self) -> Transposed:
        """The entries by columns."""
        order = np.argsort(self.columns, kind="stable").astype(np.int32)
        starts = np.concatenate([[0], np.cumsum(self.fan_out)])
        return Transposed(starts, self.row_numbers[order], order)

    def sorted(self) -> Pattern:
        """The same pattern with columns that increase within rows."""
        order = np.lexsort((self.columns, self.row_numbers))
        return Pattern(self.starts, self.columns[order], self.inputs)

    def restricted(self, kept: np.ndarray, inputs: np.ndarray) -> tuple[Pattern, np.ndarray]:
        """The pattern of some rows over some inputs, and the number of the first entry of each of these rows here.

        kept (rows,), inputs (inputs,) bool. ValueError where a row that is kept has an entry at an input that is not.
        """
        rows = np.flatnonzero(kept)
        sizes, firsts = self.fan_in[rows], self.starts[rows]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        entries = np.arange(starts[-1]) + np.repeat(firsts - starts[:-1], sizes)
        columns = self.columns[entries]
        if not inputs[columns].all():
            raise ValueError("a row of the pattern has an entry at an input that is not there")
        local = np.cumsum(inputs, dtype=np.int32) - 1
        return Pattern(starts, local[columns], int(inputs.sum())), firsts

    def packed(self) -> str:
        """The pattern as ASCII text without quotes and backslashes, see psmpi/checkpoint/FORMAT.md."""
        steps = np.diff(self.columns, prepend=np.int32(0))
        begins = self.starts[:-1][self.fan_in > 0]
        steps[begins] = self.columns[begins]
        numbers = np.concatenate([self.fan_in, steps]).astype("<i4")
        # The bytes of one weight side by side: most of the higher ones are 0.
        planes = np.ascontiguousarray(numbers.view(np.uint8).reshape(-1, 4).T)
        text = b85encode(zlib.compress(planes.tobytes(), 9)).decode()
        return f"{PACKED}{self.rows}:{self.inputs}:{self.size}:{text}"


@lru_cache(maxsize=256)
def unpack(text: str) -> Pattern:
    """The pattern that `Pattern.packed` has written; ValueError where the text is none."""
    head, *sizes = text.split(":", 4)
    if f"{head}:" != PACKED or len(sizes) != 4 or not all(one.isascii() and one.isdigit() for one in sizes[:3]):
        raise ValueError("it does not begin as one")
    rows, inputs, entries = (int(one) for one in sizes[:3])
    if not (0 < rows <= MOST and 0 < inputs <= MOST and 0 < entries <= min(MOST, rows * inputs)):
        raise ValueError(f"it says {rows} x {inputs} with {entries} entries")
    stream = zlib.decompressobj()
    try:
        data = stream.decompress(b85decode(sizes[3]), 4 * (rows + entries))
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if len(data) != 4 * (rows + entries) or not stream.eof:
        raise ValueError("its numbers are not as many as it says")
    planes = np.frombuffer(data, np.uint8).reshape(4, -1)
    numbers = np.ascontiguousarray(planes.T).view("<i4").reshape(-1).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(numbers[:rows])])
    if (numbers[:rows] < 0).any() or starts[-1] != entries:
        raise ValueError("its rows have other entries than it says")
    sums = np.cumsum(numbers[rows:])
    before = np.concatenate([[0], sums])[starts[:-1]]
    return Pattern.of(starts, sums - np.repeat(before, numbers[:rows]), inputs)


@lru_cache(maxsize=256)
def random_pattern(rows: int, inputs: int, fan_in: int, key: tuple[int, ...]) -> Pattern:
    """Rows of `fan_in` different columns each, all choices alike; a function of `key`, whole numbers from 0 up."""
    rng, found = np.random.default_rng(list(key)), []
    at_once = max(1, DRAWN // inputs)
    for first in range(0, rows, at_once):
        drawn = rng.random((min(at_once, rows - first), inputs))
        found.append(np.sort(np.argpartition(drawn, fan_in - 1, axis=1)[:, :fan_in], axis=1))
    starts = np.arange(rows + 1, dtype=np.int64) * fan_in
    return Pattern.of(starts, np.concatenate(found).reshape(-1), inputs)


@lru_cache(maxsize=256)
def radix_pattern(units: int, radix: int, stride: int, copies: int = 1) -> Pattern:
    """A layer of a RadiX-Net (Robinett and Kepner, "RadiX-Net: structured sparse matrices for deep neural networks",
    2019): the Kronecker product of ones (copies, copies) with P^0 + P^stride + ... + P^((radix - 1) stride).

    P is the cyclic permutation of units / copies places: row n has the columns n + j stride. In a mixed-radix system
    the stride of a layer is the product of the radices of the layers before it. UserError where they do not fit.
    """
    places = units // copies
    if units % copies:
        raise UserError(f"copies = {copies} does not divide the {units} units")
    if (radix - 1) * stride >= places:
        raise UserError(
            f"radix = {radix} and stride = {stride} go around {places} places more than once: let (radix - 1) stride "
            f"be less than {places}"
        )
    one = np.sort((np.arange(places)[:, None] + np.arange(radix) * stride) % places, axis=1)
    row = (np.arange(copies)[:, None] * places + one[:, None, :]).reshape(places, copies * radix)
    starts = np.arange(units + 1, dtype=np.int64) * (copies * radix)
    return Pattern.of(starts, np.tile(row, (copies, 1)).reshape(-1), units)


def radix_strides(units: int, radix: int) -> list[int]:
    """The strides of one mixed-radix system of equal radices: 1, radix, ..., as far as they go around `units` once."""
    found = [1]
    while found[-1] * radix * (radix - 1) < units:
        found.append(found[-1] * radix)
    return found
