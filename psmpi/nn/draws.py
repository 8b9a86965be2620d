"""Draws of many NumPy generators at once, bit-identical to the draws of each generator.

`np.random.default_rng([*key, unit])` is the generator PCG64 (O'Neill, "PCG: A family of simple fast space-efficient
statistically good algorithms", 2014: 128-bit state, output XSL-RR), seeded from the integers by a SeedSequence
(O'Neill, "Developing a seed_seq alternative", 2015). Making a generator takes about as long as drawing 8,000 numbers.
For rows of few numbers, this module therefore steps all generators together: a step is a few array operations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Words = list[np.ndarray]

# Words of a SeedSequence's pool, and the constants of its hash.
POOL = 4
INIT_A, MULT_A, INIT_B, MULT_B = 0x43B0D7E5, 0x931E8875, 0x8B51F9DD, 0x58F38DED
MIX_L, MIX_R = 0xCA01F9DD, 0x4973F715
# The multiplier of PCG64, as its high and low half.
PCG = 0x2360ED051FC65DA4, 0x4385DF649FCCF645
# Generators that step together, and steps whose numbers are written to the rows together.
SIDE, COLUMNS = 1 << 13, 16
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def draw_rows(out: np.ndarray, key: Sequence[int], first: int, low: float, high: float) -> None:
    """Fill row k of `out` with `np.random.default_rng([*key, first + k]).uniform(low, high, size)`.

    out: (units, size), float32 or float64, of any strides; key: non-negative integers; first + units <= 2^32.
    """
    units, size = out.shape
    if 2 * size > units:
        for k in range(units):
            out[k] = np.random.default_rng([*key, first + k]).uniform(low, high, size)
        return
    for begin in range(0, units, SIDE):
        some = out[begin : begin + SIDE]
        hi, lo, inc_hi, inc_lo = _states(key, np.arange(first + begin, first + begin + len(some), dtype=np.uint32))
        columns = np.empty((min(COLUMNS, size), len(some)))
        for k in range(0, size, COLUMNS):
            drawn = columns[: size - k]
            for column in drawn:
                hi, lo = _step(hi, lo, inc_hi, inc_lo)
                turn = hi >> np.uint64(58)
                mixed = hi ^ lo
                value = mixed >> turn
                # A shift by 64 gives 0 in NumPy.
                value |= mixed << (np.uint64(64) - turn)
                value >>= np.uint64(11)
                # NumPy takes 53 bits for a number in [0, 1). The factor 2^-53 is exact, so it can be joined with the
                # width of the interval.
                np.multiply(value, (high - low) * 2.0**-53, out=column)
                column += low
            some[:, k : k + COLUMNS] = drawn.T


def _states(key: Sequence[int], units: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return high and low half of the state, then of the increment, of each unit's PCG64, (units,) uint64 each."""
    words = _seed_words(key, units)
    start_hi, start_lo, seq_hi, seq_lo = (words[2 * k] | words[2 * k + 1] << HALF for k in range(4))
    one = np.uint64(1)
    inc_hi, inc_lo = seq_hi << one | seq_lo >> np.uint64(63), seq_lo << one | one
    # PCG64 starts at 0: the first step gives the increment, to which the seed is added.
    lo = inc_lo + start_lo
    hi = inc_hi + start_hi + (lo < start_lo)
    return *_step(hi, lo, inc_hi, inc_lo), inc_hi, inc_lo


def _step(hi: np.ndarray, lo: np.ndarray, inc_hi: np.ndarray, inc_lo: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return high and low half of state * PCG + increment modulo 2^128."""
    mult_hi, mult_lo = map(np.uint64, PCG)
    m1, m0 = mult_lo >> HALF, mult_lo & LOW
    l1, l0 = lo >> HALF, lo & LOW
    # The high half of the product of the low halves.
    middle = l0 * m0
    middle >>= HALF
    middle += l1 * m0
    other = l0 * m1
    other += middle & LOW
    other >>= HALF
    middle >>= HALF
    new_hi = hi * mult_lo
    new_hi += l1 * m1
    new_hi += middle
    new_hi += other
    new_hi += lo * mult_hi
    new_hi += inc_hi
    new_lo = lo * mult_lo
    new_lo += inc_lo
    new_hi += new_lo < inc_lo
    return new_hi, new_lo


def _seed_words(key: Sequence[int], units: np.ndarray) -> Words:
    """Return SeedSequence([*key, unit]).generate_state(8) of each unit: eight arrays (units,) uint64 below 2^32."""
    entropy: Words = [np.full(units.shape, word, np.uint32) for number in key for word in _words(number)]
    entropy.append(units)
    hashing = _Hash(INIT_A, MULT_A)
    nothing = np.zeros(units.shape, np.uint32)
    pool = [hashing(entropy[k] if k < len(entropy) else nothing) for k in range(POOL)]
    for source in range(POOL):
        for target in range(POOL):
            if source != target:
                pool[target] = _mix(pool[target], hashing(pool[source]))
    for word in entropy[POOL:]:
        for target in range(POOL):
            pool[target] = _mix(pool[target], hashing(word))
    hashing = _Hash(INIT_B, MULT_B)
    return [hashing(pool[k % POOL]).astype(np.uint64) for k in range(2 * POOL)]


def _words(number: int) -> list[int]:
    """Return the 32-bit words of a non-negative integer, the lowest first; 0 has one word."""
    words = [number & 0xFFFFFFFF]
    while number := number >> 32:
        words.append(number & 0xFFFFFFFF)
    return words


class _Hash:
    """Hash function of a SeedSequence, whose constant changes with each call."""

    def __init__(self, constant: int, multiplier: int):
        self.constant, self.multiplier = constant, multiplier

    def __call__(self, value: np.ndarray) -> np.ndarray:
        value = value ^ np.uint32(self.constant)
        self.constant = self.constant * self.multiplier & 0xFFFFFFFF
        value *= np.uint32(self.constant)
        value ^= value >> np.uint32(16)
        return value


def _mix(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    mixed: np.ndarray = x * np.uint32(MIX_L) - y * np.uint32(MIX_R)
    mixed ^= mixed >> np.uint32(16)
    return mixed
