"""CUDA kernels of a head that is computed tile by tile, on the CPU, against NumPy."""

from itertools import pairwise

import numpy as np
import pytest
from helpers import cuda_host
from test_cuda_kernels import F64, TOLERANCE, Guarded, draw, near, real_types

pytestmark = pytest.mark.skipif(cuda_host.compiler() is None, reason="no g++ to run the CUDA kernels on the CPU")

CLASSES, INPUTS, BATCH = 11, 5, 33
# Edges of tiles, and their size. Derivatives are scaled down by 2 to these exponents: in each tile, and in the end.
TILES, TILE = (0, 4, 8, 11), 4
EXPONENTS, LAST = (0, 30, 55), 60
# Labels among this rank's classes, with repetitions, and among classes of other ranks, before and after these.
LABELS = np.random.default_rng(3).integers(-3, CLASSES + 3, BATCH)
OWN = (LABELS >= 0) & (LABELS < CLASSES)


@pytest.fixture
def device(dtype):
    return Guarded(dtype)


def report(exponent):
    """A report whose derivatives are scaled by 2^-exponent."""
    return np.array([0.0, 0.0, 0.0, 2.0 ** (exponent - 1) if exponent else 7.0])


def rows(device, rng, dtype, apart):
    """Views of weights and biases, and the arguments of a kernel for them.

    apart: they are two arrays, else each bias follows its row of weights in one array.
    """
    if apart:
        weights, biases = device.of(draw(rng, dtype, CLASSES, INPUTS)), device.of(draw(rng, dtype, CLASSES))
        return weights, biases, (weights, INPUTS, biases, 1)
    table = device.of(draw(rng, dtype, CLASSES, INPUTS + 1))
    # A kernel takes the address of the first element.
    vector = table.reshape(-1)
    return table[:, :-1], table[:, -1], (vector, INPUTS + 1, vector[INPUTS:], INPUTS + 1)


both_layouts = pytest.mark.parametrize("apart", [True, False])


@real_types
@both_layouts
def test_labels_have_the_scores_of_their_rows(apart, dtype, device):
    rng = np.random.default_rng(0)
    weights, biases, arguments = rows(device, rng, dtype, apart)
    features, out = device.of(draw(rng, dtype, INPUTS, BATCH)), device.array(BATCH, F64)
    shape = (CLASSES, INPUTS, BATCH)
    device("head_labels", (2,), (16,), *shape, features, device.of(LABELS), *arguments, out)
    scores = weights.astype(F64) @ features.astype(F64) + biases[:, None]
    expected = np.where(OWN, scores[LABELS.clip(0, CLASSES - 1), np.arange(BATCH)].astype(dtype), 0)
    near(out, expected.astype(F64), TOLERANCE[dtype])
    assert np.array_equal(out, out.astype(dtype))


@real_types
@pytest.mark.parametrize("bad", [None, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("cuts", [(0, 11), TILES, range(12)], ids=str)
def test_normalizers_of_tiles_are_those_of_all_classes(cuts, bad, dtype, device):
    rng = np.random.default_rng(0)
    scores = 50 * draw(rng, dtype, CLASSES, BATCH)
    # The largest score of a tile grows from tile to tile in sample 0, and falls in sample 1.
    scores[:, 0], scores[:, 1] = np.arange(CLASSES), -np.arange(CLASSES)
    if bad is not None:
        scores[6, 2] = bad
    labels, out = device.of(LABELS), device.array((3, BATCH), F64)
    for first, stop in pairwise(cuts):
        tile = device.of(scores[first:stop])
        device("add_normalizers", (2,), (16,), first, stop - first, BATCH, tile, labels, out)
    with np.errstate(invalid="ignore"):
        top = scores.max(axis=0).astype(F64)
        total = np.exp(scores - top).sum(axis=0)
    sound = np.isfinite(total)
    assert sound.sum() == BATCH - (bad in (np.inf,) or bad is np.nan)
    near(out[0], top, 0)
    near(out[1][sound], total[sound], 1e-13)
    assert not np.isfinite(out[1][~sound]).any()
    own = np.where(OWN, scores[LABELS.clip(0, CLASSES - 1), np.arange(BATCH)], 0)
    assert np.array_equal(out[2], own.astype(F64), equal_nan=True)


@real_types
@pytest.mark.parametrize("rests", [True, False])
def test_what_tiles_find_is_added_up(rests, dtype, device):
    rng = np.random.default_rng(0)
    values, terms = rng.normal(size=(3, 4)), rng.normal(size=(3, BATCH))
    labels, tile_labels, total = device.of(LABELS), device.array(BATCH, np.int64, 0), device.array(BATCH, F64)
    previous, reports = None, [device.of(current) for current in values]
    for current, rest, stop in zip(reports, terms, TILES[1:], strict=True):
        tile_terms = device.of(rest) if rests else None
        arguments = (labels, previous, tile_terms, current, total if rests else None, tile_labels)
        device("next_tile", (2,), (16,), stop, BATCH, *arguments)
        assert np.array_equal(tile_labels, LABELS - stop)
        previous = current
    sums, largest = values.sum(axis=0), values.max(axis=0)
    assert reports[-1] == pytest.approx([sums[0], largest[1], sums[2], largest[3]], rel=1e-14)
    assert np.isnan(total).all() if not rests else np.allclose(total, terms.sum(axis=0), rtol=1e-13)
    # NaN in either report remains.
    for first, then in ((np.nan, 1.0), (1.0, np.nan)):
        current, later = device.of(np.full(4, first)), device.of(np.full(4, then))
        device("next_tile", (1,), (16,), 0, BATCH, labels, current, None, later, None, tile_labels)
        assert np.isnan(later).all()


@real_types
@pytest.mark.parametrize(("before", "after"), [(0, 0), (0, 40), (40, 40), (40, 90)])
def test_parts_are_added_as_the_largest_derivative_so_far_scales_them(before, after, dtype, device):
    rng = np.random.default_rng(0)
    sums, part = draw(rng, dtype, INPUTS, BATCH), draw(rng, dtype, INPUTS, BATCH) * dtype.type(1e-9)
    out = device.of(sums)
    device(
        "add_part", (2,), (16,), sums.size, device.of(part), device.of(report(before)), device.of(report(after)), out
    )
    assert np.array_equal(out, np.ldexp(sums, before - after) + part)


@real_types
def test_the_report_of_a_head_has_the_largest_derivative_and_what_is_no_number(dtype, device):
    rest, last, out = np.linspace(-3, 2, BATCH), np.array([1.5, 2.5, 3.0, 0.5]), device.array(4, F64)
    labels = device.of(LABELS)
    device("head_report", (1,), (256,), CLASSES, BATCH, labels, device.of(rest), device.of(last), out)
    assert np.array_equal(out, [*last[:3], abs(rest[OWN]).max()])
    device("head_report", (1,), (256,), CLASSES, BATCH, labels, device.of(rest / 100), device.of(last), out)
    assert np.array_equal(out, last)
    device("head_report", (1,), (256,), CLASSES, BATCH, labels, None, device.of(last), out)
    assert np.array_equal(out, last)
    # An infinite term makes the loss NaN, whether the label is of this rank or of another.
    for sample in np.flatnonzero(OWN)[0], np.flatnonzero(~OWN)[0]:
        rest[sample] = np.inf
        device("head_report", (1,), (256,), CLASSES, BATCH, labels, device.of(rest), device.of(last), out)
        assert np.isnan(out[0]) and np.array_equal(out[1:3], last[1:3])
        rest[sample] = 0


@real_types
@both_layouts
@pytest.mark.parametrize("bias", [True, False])
def test_rows_of_tiles_are_scaled_alike_and_completed(bias, apart, dtype, device):
    """The rows have the gradient of all scores, scaled once."""
    rng = np.random.default_rng(0)
    weights, biases, (table, row, bias_rows, step) = rows(device, rng, dtype, apart)
    arguments = (table, row, bias_rows if bias else None, step if bias else 0)
    features, labels, final = device.of(draw(rng, dtype, INPUTS, BATCH)), device.of(LABELS), device.of(report(LAST))
    reports = device.of(np.stack([report(e) for e in EXPONENTS]))
    rest = device.of(2.0**58 * rng.normal(size=BATCH))
    shifts = np.repeat(np.subtract(EXPONENTS, LAST), np.diff(TILES))
    expected = [np.ldexp(weights, shifts[:, None]), np.ldexp(biases, shifts) if bias else biases.copy()]
    device("scale_rows", (2,), (16,), CLASSES * (INPUTS + 1), INPUTS, TILE, reports, final, *arguments)
    assert np.array_equal(weights, expected[0]) and np.array_equal(biases, expected[1])
    equal_reports = device.of(np.stack([report(LAST)] * 3))
    device("scale_rows", (2,), (16,), CLASSES * (INPUTS + 1), INPUTS, TILE, equal_reports, final, *arguments)
    assert np.array_equal(weights, expected[0])

    marked = (np.arange(CLASSES)[:, None] == LABELS) * np.ldexp(rest, -LAST)
    expected = [weights - marked @ features.T.astype(F64), biases - marked.sum(axis=1) * bias]
    shape = (CLASSES, INPUTS, BATCH)
    device("close_rows", (BATCH,), (4,), *shape, features, labels, rest, final, *arguments)
    for actual, reference in zip((weights, biases), expected, strict=True):
        near(actual, reference, TOLERANCE[dtype])


@real_types
@both_layouts
def test_gradients_of_features_are_completed(apart, dtype, device):
    rng = np.random.default_rng(0)
    weights, _, (table, row, *_) = rows(device, rng, dtype, apart)
    sums, rest = draw(rng, dtype, INPUTS, BATCH), 2.0**58 * rng.normal(size=BATCH)
    out, (last, final) = device.of(sums), (device.of(report(e)) for e in (EXPONENTS[-1], LAST))
    shape = (CLASSES, INPUTS, BATCH)
    device("close_features", (2,), (16,), *shape, device.of(LABELS), device.of(rest), table, row, last, final, out)
    marked = (np.arange(CLASSES)[:, None] == LABELS) * np.ldexp(rest, -LAST)
    near(out, np.ldexp(sums.astype(F64), EXPONENTS[-1] - LAST) - weights.T.astype(F64) @ marked, TOLERANCE[dtype])
