"""Sparse samples: compressed rows, their minibatches and identity, and generated sparse tasks."""

import numpy as np
import pytest

from psmpi.backend import CompiledOps, NumpyOps, compiled
from psmpi.data import Dataset, Resident, Split, find_doubts, identify, open_dataset
from psmpi.data.compressed import ENTRIES, Compressed, checked
from psmpi.data.compressed_rows import CompressedRows
from psmpi.data.copies import compressed_fingerprints
from psmpi.data.planted import NOISE, distinct
from psmpi.data.private import OwnRows
from psmpi.data.split import frozen, hold_out
from psmpi.errors import UserError

N, F = 40, 23


def table(dtype=np.float32, n=N, seed=0):
    """A dense table with rows and columns of zeros."""
    rng = np.random.default_rng(seed)
    dense = (rng.random((n, F)) < 0.2) * rng.standard_normal((n, F))
    dense[::7], dense[:, 5] = 0, 0
    return dense.astype(dtype)


def arrays(dense):
    rows, columns = np.nonzero(dense)
    return np.searchsorted(rows, np.arange(len(dense) + 1)), columns, dense[rows, columns]


def compressed(dense):
    return checked("own", *arrays(dense), F)


def split_of(dense, source=None):
    return Split(frozen(np.arange(len(dense)) % 2), (F,), 1.0, source or CompressedRows(compressed(dense)))


@pytest.mark.parametrize("rows", [[], [0], [3, 4, 5], [39, 0, 0, 7], list(range(N)), [N - 1]])
def test_rows_are_taken_in_any_order(rows):
    dense = table()
    taken = compressed(dense).take(np.array(rows, np.int64))
    np.testing.assert_array_equal(taken.dense(), dense[rows])
    assert taken.starts[0] == 0 and len(taken.columns) == len(taken.values) == taken.starts[-1]


def test_more_entries_than_are_copied_at_once_are_taken():
    lengths = np.array([ENTRIES // 2 + 5, 3, 0, ENTRIES + 7, 2])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    columns = np.concatenate([np.arange(k) for k in lengths]).astype(np.int32)
    rows = Compressed(starts, columns, np.arange(starts[-1], dtype=np.float64), 2 * ENTRIES)
    taken, order = rows.take(np.array([4, 3, 0, 1, 2, 3])), [4, 3, 0, 1, 2, 3]
    for name in ("columns", "values"):
        parts = [getattr(rows, name)[starts[k] : starts[k + 1]] for k in order]
        np.testing.assert_array_equal(getattr(taken, name), np.concatenate(parts))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("stored", [np.float32, np.float64])
@pytest.mark.parametrize("make", [NumpyOps, CompiledOps])
def test_minibatches_are_those_of_dense_samples(make, stored, dtype):
    if make is CompiledOps and not compiled.level():
        pytest.skip("no compiled kernels")
    dense, rows = table(stored), np.arange(1, N, 2)
    resident = Resident(split_of(dense), rows, dtype, make())
    for ids in ([], [1], [39, 3, 3, 7]):
        out = np.full((F, len(ids)), np.nan, dtype)
        resident.fetch(ids, out)
        np.testing.assert_array_equal(out, dense[ids].T.astype(dtype))
    samples = resident.compressed
    np.testing.assert_array_equal(samples.dense(), dense[rows].astype(dtype))
    assert samples.dtype == dtype and resident.nbytes == samples.nbytes + rows.nbytes
    np.testing.assert_array_equal(resident.rows([39, 3, 3]).dense(), dense[[39, 3, 3]].astype(dtype))
    with pytest.raises(ValueError, match="1 ids are not resident"):
        resident.rows([2])
    with pytest.raises(ValueError, match="are dense"):
        Resident(open_dataset("digits", None).train, [0], dtype, make()).rows([0])


def test_a_split_has_its_rows_compressed_in_its_own_order():
    dense = table()
    train, test = hold_out(np.arange(N) % 3 == 1, split_of(dense))
    np.testing.assert_array_equal(test.compressed.dense(), dense[1::3])
    np.testing.assert_array_equal(test.read([0, 5, 1]), dense[[1, 16, 4]])
    pieces = [values.copy() for _, values in train.pieces(np.arange(train.n))]
    np.testing.assert_array_equal(np.concatenate(pieces), train.compressed.dense())
    assert open_dataset("digits", None).train.compressed is None
    own = Split(frozen(np.zeros(N, int)), (F,), 1.0, OwnRows(test, 10, N))
    np.testing.assert_array_equal(Resident(own, [11, 12], np.float32).compressed.dense(), dense[[4, 7]])


def test_no_dense_copy_is_ever_made_of_sparse_samples():
    """A dense row alone would take 8 GB."""
    features = 1 << 31
    rows = checked("own", np.arange(101), np.arange(100) * 2_000_000, np.ones(100), features - 1)
    split = Split(frozen(np.arange(100) % 2), (features - 1,), 1.0, CompressedRows(rows))
    dataset = Dataset("own", 2, split.shape, *hold_out(np.arange(100) % 5 == 4, split))
    prints = []
    identify(dataset, prints=prints)
    assert len(np.unique(np.concatenate(prints))) == 100
    assert list(find_doubts(dataset, prints)) == []
    assert Resident(dataset.train, np.arange(80), np.float32).nbytes < 3000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"starts": [0, 2]}, "the starts of 1 rows with 3 entries"),
        ({"starts": [1, 2, 3]}, "expected them to ascend from 0"),
        ({"starts": [0, 3, 2, 3]}, "expected them to ascend from 0"),
        ({"starts": [[0, 3]]}, "the starts of the rows are int64 of shape"),
        ({"starts": [0.0, 3.0]}, "expected a vector of integers"),
        ({"columns": [0, 1]}, "2 columns and 3 values"),
        ({"columns": [0, 1, 23]}, "sample 1 has the column 23; expected 0 to 22"),
        ({"columns": [-1, 1, 2]}, "sample 0 has the column -1"),
        ({"columns": [4, 4, 2]}, "sample 0 has the column 4 twice"),
        ({"values": [1.0, np.nan, 2.0]}, "sample 0 has values that are not finite"),
        ({"values": [1.0, 0.0, np.inf]}, "sample 1 has values that are not finite"),
        ({"values": [1j, 0, 0]}, "the values of the rows are complex128"),
        ({"features": 0}, "0 features; expected 1 to"),
        ({"features": 1 << 31}, "features; expected 1 to 2,147,483,647"),
    ],
)
def test_arrays_that_are_no_compressed_rows_are_refused(change, message):
    good = {"starts": [0, 2, 3], "columns": [0, 4, 2], "values": [1.0, 2.0, 3.0], "features": F}
    assert checked("own", **{k: np.array(v) if isinstance(v, list) else v for k, v in good.items()}).n == 2
    changed = {k: np.array(v) if isinstance(v, list) else v for k, v in {**good, **change}.items()}
    with pytest.raises(UserError, match=message):
        checked("own", **changed)


def test_columns_are_put_in_order_and_whole_numbers_become_floats():
    rows = checked("own", np.array([0, 3, 3, 5]), np.array([4, 0, 9, 7, 1]), np.array([1, 2, 3, 4, 5]), F)
    assert rows.columns.tolist() == [0, 4, 9, 1, 7] and rows.values.tolist() == [2, 1, 3, 5, 4]
    assert rows.dtype == np.float32 and rows.columns.dtype == np.int32 and rows.starts.dtype == np.int64
    assert checked("own", np.array([0, 1]), np.array([0]), np.array([1 << 25]), 1).dtype == np.float64


def test_values_that_training_cannot_hold_are_named_with_their_sample():
    rows = Compressed(np.array([0, 1, 2]), np.array([0, 1], np.int32), np.array([1.0, 1e300]), 2)
    split = Split(frozen(np.array([0, 1])), (2,), 1.0, CompressedRows(rows))
    with pytest.raises(UserError, match=r"sample 1 has values beyond 3\.4e"):
        Resident(split, [0, 1], np.float32)
    Resident(split, [0, 1], np.float64)
    rows.values[0] = np.nan
    with pytest.raises(UserError, match="sample 0 has values that are not finite"):
        Resident(split, [0, 1], np.float64)


@pytest.mark.parametrize("change", ["value", "column", "length"])
def test_the_identity_of_sparse_samples_is_of_values_columns_and_lengths(change):
    dense = table()
    before = identify(Dataset("own", 2, (F,), split_of(dense), split_of(dense)))
    row = int(np.flatnonzero((dense != 0).sum(axis=1) > 1)[-1])
    column = int(np.flatnonzero(dense[row])[0])
    value, dense[row, column] = dense[row, column], 2 if change == "value" else 0
    if change == "column":
        dense[row, int(np.flatnonzero(dense[row] == 0)[0])] = value
    after = identify(Dataset("own", 2, (F,), split_of(dense), split_of(dense)))
    assert before.train.dtype == "sparse float32" and before.train.seen == N
    assert before.train.values != after.train.values and before.train.sums != after.train.sums


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_have_the_same_fingerprint_where_they_are_the_same(dtype):
    dense = np.concatenate([table(dtype), table(dtype)[::-1], table(dtype, seed=1)])
    prints = compressed_fingerprints(compressed(dense))
    _, kinds = np.unique(dense, axis=0, return_inverse=True)
    assert len(np.unique(prints)) == len(np.unique(kinds))
    assert all(len(np.unique(prints[kinds.ravel() == k])) == 1 for k in range(kinds.max() + 1))
    assert (prints[(dense == 0).all(axis=1)] == 0).all()
    words = np.array([[1, 2], [2, 1]], np.uint32).view(np.float64).ravel()
    swapped = compressed_fingerprints(Compressed(np.arange(3), np.zeros(2, np.int32), words, 1))
    assert swapped[0] != swapped[1], "the words of a value have factors of their own"


def test_test_samples_that_are_training_samples_are_told():
    dense = table(n=200)
    prints = []
    dataset = Dataset("own", 2, (F,), split_of(dense), split_of(dense[:50]))
    identify(dataset, prints=prints)
    assert any("are training samples too" in doubt for doubt in find_doubts(dataset, prints))


def test_numbers_are_drawn_without_repetition_and_small_ones_more_often():
    drawn = distinct(4000, 6, 30, np.random.default_rng(0))
    assert all(len(set(row)) == 6 for row in drawn.tolist()) and drawn.min() >= 0 and drawn.max() == 29
    first = np.bincount(drawn.ravel(), minlength=30) / 4000
    assert first[0] > 2 * first[29] > 0


def test_sparse_samples_have_a_planted_solution():
    data = open_dataset("sparse:300", None)
    assert data.outputs == 2 and data.shape == (300,) and (data.train.n, data.test.n) == (8000, 2000)
    rows = data.train.compressed
    assert (np.diff(rows.starts) == 10).all() and (np.diff(rows.columns.reshape(-1, 10)) > 0).all()
    # Logistic regression by Newton's method.
    x, y, w = rows.dense().astype(float), data.train.targets, np.zeros(300)
    for _ in range(12):
        p = 1 / (1 + np.exp(-x @ w))
        w += np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + np.eye(300), x.T @ (y - p) - w)
    right = ((data.test.compressed.dense() @ w > 0) == data.test.targets).mean()
    assert 0.75 < right < 0.95
    assert np.array_equal(rows.values, open_dataset("sparse:300", None).train.compressed.values)
    assert not np.array_equal(rows.values, open_dataset("sparse:300", None, 1).train.compressed.values)


def test_ratings_are_entries_of_a_matrix_of_low_rank():
    data = open_dataset("ratings:400", None)
    assert data.task == "regression" and data.shape == (1, 2) and data.train.tokens and data.train.vocabulary == 600
    pairs = [split.read(np.arange(split.n)) for split in (data.train, data.test)]
    all_pairs = np.concatenate(pairs)
    assert (
        all_pairs[:, 0].max() == 399 and all_pairs[:, 1].min() == 400 and len(np.unique(all_pairs, axis=0)) == 400 * 44
    )
    assert (np.bincount(pairs[0][:, 0]) == 40).all() and (np.bincount(pairs[1][:, 0]) == 4).all()
    # Alternating least squares.
    rows, columns, values = pairs[0][:, 0], pairs[0][:, 1] - 400, data.train.targets[:, 0]
    u, v = np.zeros((400, 5)), np.random.default_rng(0).standard_normal((200, 5))
    for _ in range(40):
        for factor, fixed, own_ids, fixed_ids in ((u, v, rows, columns), (v, u, columns, rows)):
            for k in range(len(factor)):
                a = fixed[fixed_ids[own_ids == k]]
                factor[k] = np.linalg.solve(a.T @ a + 0.05 * np.eye(5), a.T @ values[own_ids == k])
    guess = (u[pairs[1][:, 0]] * v[pairs[1][:, 1] - 400]).sum(axis=1)
    assert np.sqrt(((guess - data.test.targets[:, 0]) ** 2).mean()) < 2 * NOISE
