"""Recurrent cells: the reference against finite differences, the kernels against the reference, chunks and lengths."""

import threading
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np
import pytest

from psmpi.backend import CompiledOps, NumpyOps, compiled
from psmpi.backend.compiled import recurrence

LEVELS = range(1, compiled.level() + 1)
KINDS = ["rnn", "gru", "lstm"]
F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
TOLERANCE = {F32: 1e-5, F64: 1e-12}

needs_kernels = pytest.mark.skipif(not compiled.level(), reason="no compiled kernels, or none for this processor")


@dataclass
class Problem:
    """A layer, its input, and the derivatives of a loss with respect to all states and to the last ones."""

    x: np.ndarray
    w: np.ndarray
    b: np.ndarray
    u: np.ndarray
    bias: np.ndarray
    before: np.ndarray
    dh: np.ndarray
    dlast: np.ndarray

    def copy(self):
        return Problem(*(getattr(self, field.name).copy() for field in fields(self)))


def problem(kind, inputs, units, steps, batch, dtype=F64, seed=0):
    rng = np.random.default_rng(seed)
    cells = NumpyOps().recurrence(kind, units, dtype)
    rows = cells.gates * units

    def normal(*shape, scale=1.0):
        return (scale * rng.standard_normal(shape)).astype(dtype)

    return Problem(
        normal(inputs, steps, batch), normal(rows, inputs, scale=inputs**-0.5), normal(rows),
        normal(rows, units, scale=0.8 * units**-0.5), normal(rows), normal(cells.carried, units, batch),
        normal(units, steps, batch), normal(cells.carried, units, batch),
    )  # fmt: skip


def part(lengths, first, last):
    """The lengths within steps [first, last)."""
    return None if lengths is None else np.clip(lengths - first, 0, last - first).astype(np.int32)


def passes(ops, kind, p, lengths=None, chunk=0, cells=None, bias=True):
    """States, last states and all gradients by name, computed in chunks of `chunk` steps.

    da and du: the gradients of x W + b and of the recurrent product.
    """
    units, steps, batch = p.dh.shape
    cells = cells or ops.recurrence(kind, units, p.x.dtype)
    cells.prepare(p.u)
    gates, rows = cells.gates, len(p.u)
    edges = [*range(0, steps, chunk or max(steps, 1)), steps]
    chunks, before = [], p.before.copy()
    # One product of all steps: products of chunks may be rounded in another way.
    xw = (p.w @ p.x.reshape(len(p.x), -1) + p.b[:, None]).reshape(rows, steps, batch)
    for first, last in pairwise(edges):
        k = last - first
        x = np.ascontiguousarray(p.x[:, first:last]).reshape(len(p.x), -1)
        a = np.ascontiguousarray(xw[:, first:last])
        h = np.full((units, k, batch), np.nan, p.x.dtype)
        stored = np.full((cells.kept, *h.shape), np.nan, p.x.dtype)
        chunk_lengths = part(lengths, first, last)
        cells.forward(a, p.bias if bias else None, before, h, stored, chunk_lengths)
        chunks.append((a, before, h, stored, chunk_lengths, x))
        before = np.stack([h[:, -1], *stored[:, :, -1]]) if kind == "lstm" else h[None, :, -1].copy()
    results = {name: np.zeros_like(getattr(p, name)) for name in ("w", "b", "u", "bias")}
    results |= {"h": np.concatenate([h for _, _, h, _, _, _ in chunks], axis=1), "last": before}
    results |= {"x": np.empty_like(p.x), "da": np.empty_like(xw), "du": np.empty_like(xw)}
    carry = p.dlast.copy()
    for number in reversed(range(len(chunks))):
        a, before, h, stored, chunk_lengths, x = chunks[number]
        first, last = edges[number], edges[number + 1]
        dh = np.ascontiguousarray(p.dh[:, first:last])
        cells.backward(a, before, h, stored, dh, carry, chunk_lengths)
        assert np.array_equal(dh, p.dh[:, first:last])
        du = np.concatenate((a[: 2 * units], stored[0])) if kind == "gru" else a
        states = np.concatenate((before[0][:, None], h[:, :-1]), axis=1)
        flat = a.reshape(rows, -1)
        results["da"][:, first:last], results["du"][:, first:last] = a, du
        results["w"] += flat @ x.T
        results["b"] += flat.sum(axis=1)
        results["u"] += du.reshape(rows, -1) @ states.reshape(units, -1).T
        results["bias"] += du.reshape(rows, -1).sum(axis=1)
        results["x"][:, first:last] = (p.w.T @ flat).reshape(x.shape[0], last - first, batch)
        if lengths is not None:
            padded = np.arange(last - first)[:, None] >= chunk_lengths
            assert not a[:, padded].any() and not du[:, padded].any()
    assert gates * units == rows
    return results | {"before": carry}


def value(kind, p, lengths, chunk):
    results = passes(NumpyOps(), kind, p, lengths, chunk)
    return float((results["h"] * p.dh).sum() + (results["last"] * p.dlast).sum())


def relative_error(actual, expected):
    return abs(actual - expected).max(initial=0.0) / max(1e-30, abs(expected).max(initial=0.0))


def agree(actual, expected, dtype):
    # Gradients of weights are left out: as sums over samples they may be small.
    for name in ("h", "last", "da", "du", "before"):
        assert not np.isnan(actual[name]).any() and relative_error(actual[name], expected[name]) <= TOLERANCE[dtype], (
            name
        )


def same(actual, expected):
    return all(np.array_equal(actual[name], expected[name]) for name in expected)


def ragged(steps, batch):
    """Lengths of samples; with enough samples every length from 0 to `steps` occurs."""
    return ((np.arange(batch) + 2) % (steps + 1)).astype(np.int32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [None, ragged(5, 6)], ids=["whole", "ragged"])
@pytest.mark.parametrize(("steps", "chunk"), [(1, 1), (5, 5), (5, 1), (5, 2)])
def test_gradients_match_central_differences(steps, chunk, lengths, kind):
    p = problem(kind, 3, 4, steps, 6)
    own_lengths = None if lengths is None else np.minimum(lengths, steps)
    gradients = passes(NumpyOps(), kind, p, own_lengths, chunk)
    rng = np.random.default_rng(1)
    for name in ("x", "w", "b", "u", "bias", "before"):
        gradient = gradients[name]
        for _ in range(8):
            index = tuple(int(rng.integers(n)) for n in gradient.shape)
            values = []
            for size in (1e-5, -1e-5):
                moved = p.copy()
                getattr(moved, name)[index] += size
                values.append(value(kind, moved, own_lengths, chunk))
            difference = (values[0] - values[1]) / 2e-5
            assert abs(difference - gradient[index]) <= 1e-7 * max(1, abs(gradient).max()), (name, index)


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_those_of_the_formulas(kind):
    """The formulas are evaluated sample by sample in a plain loop."""
    p, units = problem(kind, 3, 4, 5, 2), 4

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    results = passes(NumpyOps(), kind, p)
    for s in range(2):
        h, c = p.before[0, :, s], p.before[-1, :, s]
        for t in range(5):
            xw, u = p.w @ p.x[:, t, s] + p.b, p.u @ h + p.bias
            if kind == "rnn":
                h = np.tanh(xw + u)
            elif kind == "gru":
                r, z = np.split(sigmoid(xw + u)[: 2 * units], 2)
                h = (1 - z) * np.tanh(xw[2 * units :] + r * u[2 * units :]) + z * h
            else:
                i, f, g, o = np.split(xw + u, 4)
                c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
                h = sigmoid(o) * np.tanh(c)
            assert relative_error(results["h"][:, t, s], h) <= 1e-14


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("units", [1, 7, 40])
@pytest.mark.parametrize("batch", [1, 5, 64])
def test_chunks_of_the_reference_are_one_long_chunk_to_the_bit(batch, units, kind, dtype):
    p = problem(kind, 3, units, 7, batch, dtype)
    for lengths in (None, ragged(7, batch)):
        expected = passes(NumpyOps(), kind, p, lengths)
        for chunk in (1, 3):
            chunked = passes(NumpyOps(), kind, p, lengths, chunk)
            for name in ("h", "last", "before"):
                assert np.array_equal(chunked[name], expected[name]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "ops", [NumpyOps(), *(CompiledOps(level) for level in LEVELS)], ids=lambda ops: ops.description
)
def test_samples_of_unequal_length_are_those_of_their_own_length(ops, kind):
    """Values beyond the length of a sample may be NaN, and no gradient depends on them."""
    p = problem(kind, 3, 9, 6, 21)
    lengths = ragged(6, 21)
    for s, length in enumerate(lengths):
        p.x[:, length:, s] = 0
    clean = p.copy()
    for s, length in enumerate(lengths):
        p.x[:, length:, s] = np.nan
    expected, with_nan = passes(ops, kind, clean, lengths), passes(ops, kind, p, lengths)
    for name in ("h", "last", "u", "bias", "before"):
        assert np.array_equal(expected[name], with_nan[name]), name
    total = dict.fromkeys(("w", "b", "u", "bias"), 0)
    for s, length in enumerate(lengths):
        sample = Problem(*(np.ascontiguousarray(a[..., s : s + 1]) if a.ndim == 3 else a for a in vars(clean).values()))
        # Derivatives at padded steps belong to the last state.
        padding_dh = sample.dh[:, length:].sum(axis=1)
        sample.x, sample.dh = sample.x[:, :length].copy(), sample.dh[:, :length].copy()
        sample.dlast[0] += padding_dh
        unchanged = {"last": sample.before, "before": sample.dlast, "h": sample.dh}
        results = passes(ops, kind, sample) if length else unchanged
        assert relative_error(expected["h"][:, :length, s], results["h"][..., 0]) <= 1e-12
        assert np.array_equal(expected["h"][:, length:, s].T, np.tile(expected["last"][0, :, s], (6 - length, 1)))
        for name in ("last", "before"):
            assert relative_error(expected[name][..., s], results[name][..., 0]) <= 1e-12, name
        for name in total:
            total[name] = total[name] + results.get(name, 0)
    for name in total:
        assert relative_error(expected[name], total[name]) <= 1e-12, name


@needs_kernels
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("units", [1, 5, 12, 13, 37])
@pytest.mark.parametrize("batch", [1, 4, 7, 16, 33, 50])
def test_kernels_compute_what_the_reference_does(batch, units, kind, level, dtype):
    p = problem(kind, 4, units, 5, batch, dtype)
    cells = CompiledOps(level).recurrence(kind, units, dtype)
    for lengths in (None, ragged(5, batch)):
        for chunk in (5, 2, 1):
            for bias in (True, False):
                expected = passes(NumpyOps(), kind, p, lengths, chunk, bias=bias)
                agree(passes(CompiledOps(level), kind, p, lengths, chunk, cells, bias), expected, dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_of_a_layer_as_large_as_real_ones(kind, level, dtype):
    p = problem(kind, 64, 256, 12, 40, dtype)
    agree(passes(CompiledOps(level), kind, p), passes(NumpyOps(), kind, p), dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_gates_of_the_kernels_are_those_of_the_reference(kind, level, dtype):
    """Arrays between the forward and the backward pass are compared too: a caller may read them."""
    p = problem(kind, 4, 11, 3, 9, dtype)
    results = []
    for ops in (NumpyOps(), CompiledOps(level)):
        cells = ops.recurrence(kind, 11, dtype)
        cells.prepare(p.u)
        a = (p.w @ p.x.reshape(4, -1) + p.b[:, None]).reshape(-1, 3, 9)
        h, stored = np.empty((11, 3, 9), dtype), np.empty((cells.kept, 11, 3, 9), dtype)
        cells.forward(a, p.bias, p.before, h, stored, None)
        forward = [stored.copy()] + ([a.copy()] if kind != "rnn" else [])
        carry = p.dlast.copy()
        cells.backward(a, p.before, h, stored, p.dh, carry, None)
        results.append((*forward, h, a, carry, *([stored] if kind == "gru" else [])))
    for actual, expected in zip(*reversed(results), strict=True):
        assert relative_error(actual, expected) <= TOLERANCE[dtype]


@needs_kernels
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 20, 64, 100])
def test_threads_and_chunks_compute_the_same_bits(batch, kind, level, dtype, monkeypatch):
    p = problem(kind, 4, 19, 5, batch, dtype)
    for lengths in (None, ragged(5, batch)):
        expected = passes(CompiledOps(level), kind, p, lengths)
        for threads in (2, 3, 8):
            monkeypatch.setattr(recurrence, "WORK", 1)
            assert same(passes(CompiledOps(level, threads), kind, p, lengths), expected)
        monkeypatch.setattr(recurrence, "WORK", 10**12)
        assert same(passes(CompiledOps(level, 4), kind, p, lengths), expected)
        chunked = passes(CompiledOps(level), kind, p, lengths, 2)
        assert all(np.array_equal(chunked[name], expected[name]) for name in ("h", "last", "before"))


@needs_kernels
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_whole_samples_among_shorter_ones_keep_their_bits(kind, level):
    p = problem(kind, 4, 19, 5, 37, F32)
    all_full, some_cut = (passes(CompiledOps(level), kind, p, lengths) for lengths in (None, ragged(5, 37)))
    full = ragged(5, 37) == 5
    assert full.sum() > 3 and same(passes(CompiledOps(level), kind, p, np.full(37, 5, np.int32)), all_full)
    assert all(np.array_equal(all_full[name][..., full], some_cut[name][..., full]) for name in ("h", "last", "before"))


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_minibatches_and_weights_may_change_from_pass_to_pass(kind):
    """Buffers grow with the minibatch and with nothing else."""
    ops = CompiledOps()
    cells, sizes = ops.recurrence(kind, 13, F32), []
    for seed, (steps, batch) in enumerate([(3, 5), (2, 40), (7, 5), (9, 40), (1, 33)]):
        p = problem(kind, 4, 13, steps, batch, F32, seed)
        agree(passes(ops, kind, p, cells=cells), passes(NumpyOps(), kind, p), F32)
        sizes.append([array.ctypes.data for array in cells.arrays()])
    assert sizes[1] == sizes[2] == sizes[3] == sizes[4] and len(sizes[1]) == 3


@needs_kernels
def test_layers_may_be_computed_at_the_same_time():
    ops = CompiledOps(threads=2)
    problems = [problem(kind, 4, 70, 9, 40, F32, seed) for seed, kind in enumerate(KINDS * 2)]
    results = [None] * len(problems)

    def work(k):
        for _ in range(5):
            results[k] = passes(ops, (KINDS * 2)[k], problems[k])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, p in enumerate(problems):
        assert same(results[k], passes(ops, (KINDS * 2)[k], p))


@needs_kernels
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_tanh_and_sigmoid_hold_at_both_ends(level, dtype):
    """States of cells without weights are within 4 units in the last place of the functions in a wider type."""
    ops = CompiledOps(level)
    ends = [-np.inf, np.inf, np.nan, 0.0, 1e30, -1e30, np.finfo(dtype).max]
    x = np.concatenate([np.linspace(-85, 85, 5001), np.linspace(-1, 1, 5001), np.logspace(-30, 2, 400), ends])
    x = x.astype(dtype).reshape(1, 1, -1)
    batch, wide = x.size, x.ravel().astype(np.longdouble)
    h, zeros = np.empty_like(x), np.zeros((2, 1, batch), dtype)

    def close(actual, expected):
        finite = np.isfinite(wide)
        assert (abs(actual - expected)[finite] <= 4 * np.finfo(dtype).eps * abs(expected)[finite]).all()
        assert np.isnan(actual).tolist() == np.isnan(wide).tolist()

    cells = ops.recurrence("rnn", 1, dtype)
    cells.prepare(np.zeros((1, 1), dtype))
    cells.forward(x.copy(), None, zeros[:1], h, np.empty((0, 1, 1, batch), dtype), None)
    with np.errstate(all="ignore"):
        close(h.ravel(), np.tanh(wide))
    assert h.ravel()[-7:-5].tolist() == [-1, 1] and h.ravel()[-4:].tolist() == [0, 1, -1, 1]
    cells = ops.recurrence("lstm", 1, dtype)
    cells.prepare(np.zeros((4, 1), dtype))
    a, stored = np.concatenate([x] * 4), np.empty((1, 1, 1, batch), dtype)
    cells.forward(a, None, zeros, h, stored, None)
    with np.errstate(all="ignore"):
        inside = abs(wide) <= 85
        gates = 1 / (1 + np.exp(-np.where(inside, wide, 0)))
        for gate in (0, 1, 3):
            gate_values = a[gate].ravel()
            assert (abs(gate_values - gates)[inside] <= 4 * np.finfo(dtype).eps * gates[inside]).all()
            assert np.isnan(gate_values[-5]) and gate_values[-6] == 1 == gate_values[-1] == gate_values[-3]
            assert 0 <= gate_values[-7] < 1e-36 and 0 <= gate_values[-2] < 1e-36
        close(a[2].ravel(), np.tanh(wide))


@needs_kernels
def test_arrays_of_another_kind_are_refused():
    ops = CompiledOps()
    p = problem("lstm", 3, 4, 2, 3, F32)
    cells = ops.recurrence("lstm", 4, F32)
    with pytest.raises(ValueError, match="a kernel needs contiguous"):
        cells.prepare(p.u.astype(np.float64))
    cells.prepare(p.u)
    h, stored = np.empty((4, 2, 3), np.float32), np.empty((1, 4, 2, 3), np.float32)
    a = np.zeros((16, 2, 3), np.float32)
    with pytest.raises(ValueError, match="a kernel needs contiguous"):
        cells.forward(a, p.bias, p.before, h.astype(np.float64), stored, None)
    with pytest.raises(ValueError, match="a kernel needs contiguous"):
        cells.forward(a, None, p.before, h, stored, np.ones(3, np.int64))
    for wrong in (a[:12], a[:, :1].copy()):
        with pytest.raises(ValueError, match="shape"):
            cells.forward(wrong, None, p.before, h, stored, None)
