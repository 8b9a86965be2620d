"""The identity of data sets: the same for the same data however stored, another for every change."""

import hashlib
import zlib
from dataclasses import replace

import h5py
import numpy as np
import pytest
from helpers.datasets import make_cifar, real, write

from psmpi.data import Identity, check_same, differences, identify, identify_split, open_dataset, other_scale
from psmpi.data import identity as module
from psmpi.data.split import Split
from psmpi.data.tasks import TASKS
from psmpi.errors import UserError

RNG = np.random.default_rng(0)
X, Y = RNG.integers(0, 256, (200, 4, 4)).astype(np.uint8), np.arange(200) % 5


@pytest.fixture
def made(tmp_path):
    """made(x, y, ...): the identity of a data set with these arrays, half of them for the test."""
    count = iter(range(100))

    def call(x=X, y=Y, at=100, save=np.savez):
        path = tmp_path / f"{next(count)}.npz"
        save(path, x=x[:at], y=y[:at], x_test=x[at:], y_test=y[at:])
        return identify(open_dataset(str(path), None))

    return call


def test_it_does_not_depend_on_how_data_are_stored(made):
    plain = made()
    assert plain == made(save=np.savez_compressed) == made(np.asfortranarray(X)) == made(y=Y.astype(">i2"))
    floats = X.astype(np.float32)
    assert made(floats) == made(floats.astype(">f4")) != plain


def test_digests_are_of_all_targets_and_of_samples_from_all_over(made):
    found = made().train
    assert found.targets == hashlib.sha256(Y[:100].astype("<i8").tobytes()).hexdigest()[:32]
    some = X[:100].reshape(100, -1)[np.arange(64) * 100 // 64]
    assert found.values == hashlib.sha256(some.tobytes()).hexdigest()[:32]
    assert found.most == pytest.approx(some.max() / 255)


def save_hdf5(path, **arrays):
    with h5py.File(path, "w") as file:
        for key, values in arrays.items():
            file[key] = values


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed, save_hdf5])
def test_one_pixel_of_any_sample_makes_another_data_set(tmp_path, save):
    """Of training and test samples, and with the place told."""
    path = tmp_path / ("own.h5" if save is save_hdf5 else "own.npz")

    def identity(x):
        save(path, x=x[:150], y=Y[:150], x_test=x[150:], y_test=Y[150:])
        return identify(open_dataset(str(path), None))

    before = identity(X)
    # All of them in the quickest format; 9 and the 64 parts have no common divisor.
    for sample in range(0, len(X), 1 if save is np.savez else 9):
        x = X.copy()
        x[sample, sample % 4, sample // 4 % 4] ^= 1
        (found,) = differences(before, identity(x))
        kind, at, count = ("training", sample, 150) if sample < 150 else ("test", sample - 150, 50)
        first = max(k * count // 64 for k in range(64) if k * count // 64 <= at)
        assert found.startswith(f"other values in the {kind} samples {first}"), (sample, found)


def test_one_pixel_of_held_out_and_of_named_data_sets_is_seen(tmp_path):
    def check(changed, name, place):
        before = identify(open_dataset(name, place))
        content = bytearray(changed.read_bytes())
        content[-1001] ^= 1
        changed.write_bytes(content)
        (found,) = differences(before, identify(open_dataset(name, place)))
        assert found.startswith("other values in the t")

    save_hdf5(tmp_path / "own.h5", y=Y, x=RNG.random((200, 40)))
    check(tmp_path / "own.h5", str(tmp_path / "own.h5"), None)
    make_cifar(tmp_path, (40, 40, 40, 40, 40, 40))
    for name in ("data_batch_3.bin", "test_batch.bin"):
        check(next(tmp_path.rglob(name)), "cifar10", tmp_path)
    for part in ("train", "t10k"):
        header = np.array([0x803, 200, 4, 4], ">i4").tobytes()
        write(tmp_path / "mnist" / f"{part}-images-idx3-ubyte", header + X.tobytes())
        write(
            tmp_path / "mnist" / f"{part}-labels-idx1-ubyte",
            header[:3] + b"\1" + header[4:8] + Y.astype("u1").tobytes(),
        )
    for path in tmp_path.glob("mnist/*images*"):
        check(path, "mnist", tmp_path)


def test_checksums_are_of_all_samples_in_64_parts(made):
    found = made().train
    little = X[:100].reshape(100, -1)
    parts = [little[k * 100 // 64 : (k + 1) * 100 // 64].tobytes() for k in range(64)]
    assert found.seen == 100 and found.sums == "".join(f"{zlib.crc32(part):08x}" for part in parts)
    big = X.astype(">f8")
    floats = [big[k * 100 // 64 : (k + 1) * 100 // 64].astype("<f8").tobytes() for k in range(64)]
    assert made(big).train.sums == "".join(f"{zlib.crc32(part):08x}" for part in floats)


@pytest.mark.parametrize("name", ["plain.npz", "packed.npz", "turned.npz", "own.h5"])
def test_of_more_than_a_bound_runs_from_all_over_are_read_in_one_pass(tmp_path, monkeypatch, name):
    """The samples that are seen are the same however stored, within the bound, and no two are far apart."""
    n, size = 40_000, 64
    x, y = np.random.default_rng(1).integers(0, 256, (n, size)).astype(np.uint8), np.arange(n) % 5
    monkeypatch.setattr(module, "SEEN_BYTES", n * size // 5)
    save = {"packed.npz": np.savez_compressed, "own.h5": save_hdf5}.get(name, np.savez)
    arrays = {"y": y, "x_test": x[:70], "y_test": y[:70]}
    save(tmp_path / name, x=np.asfortranarray(x) if name == "turned.npz" else x, **arrays)
    split, read = open_dataset(str(tmp_path / name), None).train, []
    real_pieces = Split.pieces
    monkeypatch.setattr(Split, "pieces", lambda self, rows: read.append(rows) or real_pieces(self, rows))
    found = identify_split(split)
    (rows,) = read
    assert (
        found.seen == len(rows) <= n // 5 + 64 and np.diff(rows).max() < 40 and (rows[0], rows[-1] > n - 40) == (0, 1)
    )
    parts = [x[rows[(rows >= k * n // 64) & (rows < (k + 1) * n // 64)]].tobytes() for k in range(64)]
    assert found.sums == "".join(f"{zlib.crc32(part):08x}" for part in parts)
    some = np.arange(64) * n // 64
    assert found.values == hashlib.sha256(x[some].tobytes()).hexdigest()[:32]


@pytest.mark.parametrize(
    ("n", "size"), [(1, 10**9), (63, 10**8), (100, 10**7), (5000, 10**6), (5 * 10**6, 1), (10**6, 3000)]
)
def test_what_is_seen_stays_within_the_bound(n, size):
    count = min(64, n)
    some = np.arange(count) * n // count
    rows = module.seen_rows(n, size, some)
    assert np.all(np.diff(rows) > 0) and rows[0] >= 0 and rows[-1] < n and np.isin(some, rows).all()
    assert (len(rows) - count) * size <= module.SEEN_BYTES and len(rows) <= 2**22 + 64
    assert len(rows) * size * 2 > min(module.SEEN_BYTES, n * size) or size < 64


def test_ranks_of_a_host_look_at_the_samples_between_them(made, tmp_path, monkeypatch):
    whole = made()
    path = str(tmp_path / "0.npz")
    shares = [identify(open_dataset(path, None), (k, 3)) for k in range(3)]
    check_same(whole, {f"rank {k}": one for k, one in enumerate(shares)})
    blanks = [{k for k in range(64) if one.train.sums[8 * k] == "-"} for one in shares]
    assert [sorted(set(range(64)) - some) for some in blanks] == [list(range(k, 64, 3)) for k in range(3)]
    read, pieces = [], Split.pieces
    monkeypatch.setattr(Split, "pieces", lambda self, rows: read.append(len(rows)) or pieces(self, rows))
    monkeypatch.setattr(module, "SAMPLES", 4)
    identify(open_dataset(path, None), (1, 4))
    assert max(read) <= 100 // 4 + 4
    for sample in range(100):
        x = X.copy()
        x[sample] ^= 1
        np.savez(path, x=x[:100], y=Y[:100], x_test=x[100:], y_test=Y[100:])
        there = [identify(open_dataset(path, None), (k, 3)) for k in range(3)]
        with pytest.raises(UserError, match="is not that of rank 0: here other values in the training samples"):
            check_same(whole, {f"rank {k}": one for k, one in enumerate(there)})


def test_identities_of_earlier_checkpoints_are_compared_on_what_they_have(made):
    new = made()
    old = {key: value for key, value in new.table().items() if key != "sums"}
    assert set(old["train"]) == {"samples", "dtype", "scale", "targets", "values", "most"}
    assert differences(Identity.of(old), new) == []
    x = X.copy()
    x[1] ^= 1
    assert "other values in the training samples (up to" in differences(Identity.of(old), made(x))[0]
    # Sample 99 is not among the 64.
    x = X.copy()
    x[99] ^= 1
    assert differences(Identity.of(old), made(x)) == [] != differences(new, made(x))
    # Those of another version of psmpi, which looks at other samples.
    assert differences(replace(new, train=replace(new.train, seen=7)), made(x)) == []


def test_places_of_changes_are_numbered(made):
    for samples, says in (
        ([40], "samples 40-41 ("),
        ([99], "samples 98-99"),
        ([1, 2, 3], "samples 1-3 ("),
        ([1, 50, 99], "samples 1-2, 50, 98-99"),
        ([1, 20, 50, 70, 99], "samples 1-2, 20, 50 and others"),
        (range(100), "samples (up to"),
    ):
        x = X.copy()
        x[list(samples)] ^= 1
        assert f"other values in the training {says}" in differences(made(), made(x))[0]


def test_mnist_is_seen_whole():
    found = identify(open_dataset("mnist", real("mnist")))
    assert (found.train.seen, found.test.seen) == (60_000, 10_000)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda x, y: (x[::-1], y[::-1]), "other labels of the training samples, or in another order"),
        (lambda x, y: (x, (y + 1) % 5), "other labels of the training samples, or in another order"),
        (lambda x, y: (x, np.where(np.arange(200) == 7, 5, y)), "classes 5, there 6"),
        (lambda x, y: (x // 2, y), "other values in the training samples (up to 1, there 0.498)"),
        (lambda x, y: (x.astype(np.float32), y), "training samples of uint8 times 0.003922, there float32"),
        (lambda x, y: (x.reshape(200, 16), y), "samples of shape (1, 4, 4), there (16,)"),
        (lambda x, y: (x, y.astype(float)), "targets for classes, there regression"),
        (lambda x, y: (np.concatenate([x, x[:9]]), np.concatenate([y, y[:9]])), "100 test samples, there 109"),
    ],
)
def test_every_change_is_told(made, change, told):
    assert told in differences(made(), made(*change(X, Y)))


def test_the_same_data_have_no_differences(made):
    assert differences(made(), made()) == []
    assert Identity.of(made().table()) == made()


def test_ranks_with_other_data_are_named(made):
    here = made()
    check_same(here, {"rank 0, host a": here, "rank 1, host a": made()})
    with pytest.raises(
        UserError, match=r"on rank 2, host b is not that of rank 0: here 100 training samples, there 90"
    ):
        check_same(here, {"rank 0, host a": here, "rank 2, host b": made(X[:190], Y[:190], at=90)})


def test_another_scale_is_seen(made, tmp_path):
    trained = made().train
    for values, other in ((X / 255, False), (X.astype(np.float32), True), ((X > 127).astype(np.uint8), True)):
        assert other_scale(trained, made(values).test) is other


@pytest.mark.parametrize("values", [np.full((200, 3), np.nan), np.zeros((200, 3))])
def test_values_that_say_nothing_are_no_other_scale(made, values):
    found = made(values)
    assert found.train.most == 0 and not other_scale(made().train, found.train)


def test_identities_that_make_no_sense_are_refused(made):
    for wrong in ({"seen": "1"}, {"sums": 3}, {"more": 1}):
        table = made().table()
        table["sums"]["train"] |= wrong
        with pytest.raises(ValueError, match="data, sums, train"):
            Identity.of(table)
    for wrong in ({"samples": "1"}, {"targets": 3}, {"more": 1}):
        table = made().table()
        table["train"] |= wrong
        with pytest.raises(ValueError, match="data, train"):
            Identity.of(table)


def test_few_samples_are_all_looked_at(made):
    assert identify_split(open_dataset("digits", None).test).samples == 359
    assert made(X, Y, at=3).train.samples == 3


def test_an_unknown_data_set_is_told_with_the_one_that_may_be_meant():
    with pytest.raises(UserError, match="unknown data set 'mnits'; did you mean mnist"):
        open_dataset("mnits", None)
    with pytest.raises(UserError, match="unknown data set 'flowers'; choose one of digits, peaks, mnist, cifar10"):
        open_dataset("flowers", None)


@pytest.mark.parametrize("name", TASKS)
def test_generated_tasks_are_the_same_for_the_same_seed_and_size(name):
    one = identify(open_dataset(name, None, 1))
    assert differences(one, identify(open_dataset(name, None, 1))) == []
    assert differences(one, identify(open_dataset(name, None, 2)))
    assert differences(one, identify(open_dataset(f"{name}:{TASKS[name][1] + 1}", None, 1)))
    assert Identity.of(one.table()) == one
