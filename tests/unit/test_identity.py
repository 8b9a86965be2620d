"""The identity of data sets does not depend on storage, and changes with the data."""

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
def identity_of(tmp_path):
    """identity_of(x, y, ...): the identity of a data set with these arrays, `at` samples of them for training."""
    count = iter(range(100))

    def call(x=X, y=Y, at=100, save=np.savez):
        path = tmp_path / f"{next(count)}.npz"
        save(path, x=x[:at], y=y[:at], x_test=x[at:], y_test=y[at:])
        return identify(open_dataset(str(path), None))

    return call


def test_it_does_not_depend_on_how_data_are_stored(identity_of):
    plain = identity_of()
    assert (
        plain
        == identity_of(save=np.savez_compressed)
        == identity_of(np.asfortranarray(X))
        == identity_of(y=Y.astype(">i2"))
    )
    floats = X.astype(np.float32)
    assert identity_of(floats) == identity_of(floats.astype(">f4")) != plain


def test_digests_are_of_all_targets_and_of_samples_from_all_over(identity_of):
    train = identity_of().train
    assert train.targets == hashlib.sha256(Y[:100].astype("<i8").tobytes()).hexdigest()[:32]
    sampled = X[:100].reshape(100, -1)[np.arange(64) * 100 // 64]
    assert train.values == hashlib.sha256(sampled.tobytes()).hexdigest()[:32]
    assert train.most == pytest.approx(sampled.max() / 255)


def save_hdf5(path, **arrays):
    with h5py.File(path, "w") as file:
        for key, values in arrays.items():
            file[key] = values


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed, save_hdf5])
def test_one_pixel_of_any_sample_makes_another_data_set(tmp_path, save):
    """A changed pixel of a training or test sample is told with its place."""
    path = tmp_path / ("own.h5" if save is save_hdf5 else "own.npz")

    def identity(x):
        save(path, x=x[:150], y=Y[:150], x_test=x[150:], y_test=Y[150:])
        return identify(open_dataset(str(path), None))

    before = identity(X)
    # Every sample in the quickest format, else every ninth: 9 and 64 parts have no common divisor.
    for sample in range(0, len(X), 1 if save is np.savez else 9):
        x = X.copy()
        x[sample, sample % 4, sample // 4 % 4] ^= 1
        (difference,) = differences(before, identity(x))
        kind, position, count = ("training", sample, 150) if sample < 150 else ("test", sample - 150, 50)
        first = max(k * count // 64 for k in range(64) if k * count // 64 <= position)
        assert difference.startswith(f"other values in the {kind} samples {first}"), (sample, difference)


def test_one_pixel_of_held_out_and_of_named_data_sets_is_seen(tmp_path):
    def check(changed, name, place):
        before = identify(open_dataset(name, place))
        content = bytearray(changed.read_bytes())
        content[-1001] ^= 1
        changed.write_bytes(content)
        (difference,) = differences(before, identify(open_dataset(name, place)))
        assert difference.startswith("other values in the t")

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


def test_checksums_are_of_all_samples_in_64_parts(identity_of):
    train = identity_of().train
    rows = X[:100].reshape(100, -1)
    parts = [rows[k * 100 // 64 : (k + 1) * 100 // 64].tobytes() for k in range(64)]
    assert train.seen == 100 and train.sums == "".join(f"{zlib.crc32(part):08x}" for part in parts)
    big_endian = X.astype(">f8")
    floats = [big_endian[k * 100 // 64 : (k + 1) * 100 // 64].astype("<f8").tobytes() for k in range(64)]
    assert identity_of(big_endian).train.sums == "".join(f"{zlib.crc32(part):08x}" for part in floats)


@pytest.mark.parametrize("name", ["plain.npz", "packed.npz", "turned.npz", "own.h5"])
def test_of_more_than_a_bound_runs_from_all_over_are_read_in_one_pass(tmp_path, monkeypatch, name):
    """The samples looked at do not depend on storage, stay within the bound, and leave no wide gaps."""
    n, size = 40_000, 64
    x, y = np.random.default_rng(1).integers(0, 256, (n, size)).astype(np.uint8), np.arange(n) % 5
    monkeypatch.setattr(module, "SEEN_BYTES", n * size // 5)
    save = {"packed.npz": np.savez_compressed, "own.h5": save_hdf5}.get(name, np.savez)
    arrays = {"y": y, "x_test": x[:70], "y_test": y[:70]}
    save(tmp_path / name, x=np.asfortranarray(x) if name == "turned.npz" else x, **arrays)
    split, read = open_dataset(str(tmp_path / name), None).train, []
    real_pieces = Split.pieces
    monkeypatch.setattr(Split, "pieces", lambda self, rows: read.append(rows) or real_pieces(self, rows))
    identity = identify_split(split)
    (rows,) = read
    assert (
        identity.seen == len(rows) <= n // 5 + 64
        and np.diff(rows).max() < 40
        and (rows[0], rows[-1] > n - 40) == (0, 1)
    )
    parts = [x[rows[(rows >= k * n // 64) & (rows < (k + 1) * n // 64)]].tobytes() for k in range(64)]
    assert identity.sums == "".join(f"{zlib.crc32(part):08x}" for part in parts)
    sampled = np.arange(64) * n // 64
    assert identity.values == hashlib.sha256(x[sampled].tobytes()).hexdigest()[:32]


@pytest.mark.parametrize(
    ("n", "size"), [(1, 10**9), (63, 10**8), (100, 10**7), (5000, 10**6), (5 * 10**6, 1), (10**6, 3000)]
)
def test_what_is_seen_stays_within_the_bound(n, size):
    count = min(64, n)
    sampled = np.arange(count) * n // count
    rows = module.seen_rows(n, size, sampled)
    assert np.all(np.diff(rows) > 0) and rows[0] >= 0 and rows[-1] < n and np.isin(sampled, rows).all()
    assert (len(rows) - count) * size <= module.SEEN_BYTES and len(rows) <= 2**22 + 64
    assert len(rows) * size * 2 > min(module.SEEN_BYTES, n * size) or size < 64


def test_ranks_of_a_host_look_at_the_samples_between_them(identity_of, tmp_path, monkeypatch):
    full = identity_of()
    path = str(tmp_path / "0.npz")
    shares = [identify(open_dataset(path, None), (k, 3)) for k in range(3)]
    check_same(full, {f"rank {k}": share for k, share in enumerate(shares)})
    blanks = [{k for k in range(64) if share.train.sums[8 * k] == "-"} for share in shares]
    assert [sorted(set(range(64)) - unseen) for unseen in blanks] == [list(range(k, 64, 3)) for k in range(3)]
    read, pieces = [], Split.pieces
    monkeypatch.setattr(Split, "pieces", lambda self, rows: read.append(len(rows)) or pieces(self, rows))
    monkeypatch.setattr(module, "SAMPLES", 4)
    identify(open_dataset(path, None), (1, 4))
    assert max(read) <= 100 // 4 + 4
    for sample in range(100):
        x = X.copy()
        x[sample] ^= 1
        np.savez(path, x=x[:100], y=Y[:100], x_test=x[100:], y_test=Y[100:])
        changed_shares = [identify(open_dataset(path, None), (k, 3)) for k in range(3)]
        with pytest.raises(UserError, match="is not that of rank 0: here other values in the training samples"):
            check_same(full, {f"rank {k}": share for k, share in enumerate(changed_shares)})


def test_identities_of_earlier_checkpoints_are_compared_on_what_they_have(identity_of):
    new = identity_of()
    old = {key: value for key, value in new.table().items() if key != "sums"}
    assert set(old["train"]) == {"samples", "dtype", "scale", "targets", "values", "most"}
    assert differences(Identity.of(old), new) == []
    x = X.copy()
    x[1] ^= 1
    assert "other values in the training samples (up to" in differences(Identity.of(old), identity_of(x))[0]
    # Sample 99 is not among the 64.
    x = X.copy()
    x[99] ^= 1
    assert differences(Identity.of(old), identity_of(x)) == [] != differences(new, identity_of(x))
    # Checksums of another version of psmpi cover other samples and are not compared.
    assert differences(replace(new, train=replace(new.train, seen=7)), identity_of(x)) == []


def test_places_of_changes_are_numbered(identity_of):
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
        assert f"other values in the training {says}" in differences(identity_of(), identity_of(x))[0]


def test_mnist_is_seen_whole():
    identity = identify(open_dataset("mnist", real("mnist")))
    assert (identity.train.seen, identity.test.seen) == (60_000, 10_000)


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
def test_every_change_is_told(identity_of, change, told):
    assert told in differences(identity_of(), identity_of(*change(X, Y)))


def test_the_same_data_have_no_differences(identity_of):
    assert differences(identity_of(), identity_of()) == []
    assert Identity.of(identity_of().table()) == identity_of()


def test_ranks_with_other_data_are_named(identity_of):
    own_identity = identity_of()
    check_same(own_identity, {"rank 0, host a": own_identity, "rank 1, host a": identity_of()})
    with pytest.raises(
        UserError, match=r"on rank 2, host b is not that of rank 0: here 100 training samples, there 90"
    ):
        check_same(
            own_identity, {"rank 0, host a": own_identity, "rank 2, host b": identity_of(X[:190], Y[:190], at=90)}
        )


def test_another_scale_is_seen(identity_of, tmp_path):
    trained = identity_of().train
    for values, other in ((X / 255, False), (X.astype(np.float32), True), ((X > 127).astype(np.uint8), True)):
        assert other_scale(trained, identity_of(values).test) is other


@pytest.mark.parametrize("values", [np.full((200, 3), np.nan), np.zeros((200, 3))])
def test_values_that_say_nothing_are_no_other_scale(identity_of, values):
    identity = identity_of(values)
    assert identity.train.most == 0 and not other_scale(identity_of().train, identity.train)


def test_identities_that_make_no_sense_are_refused(identity_of):
    for wrong in ({"seen": "1"}, {"sums": 3}, {"more": 1}):
        table = identity_of().table()
        table["sums"]["train"] |= wrong
        with pytest.raises(ValueError, match="data, sums, train"):
            Identity.of(table)
    for wrong in ({"samples": "1"}, {"targets": 3}, {"more": 1}):
        table = identity_of().table()
        table["train"] |= wrong
        with pytest.raises(ValueError, match="data, train"):
            Identity.of(table)


def test_few_samples_are_all_looked_at(identity_of):
    assert identify_split(open_dataset("digits", None).test).samples == 359
    assert identity_of(X, Y, at=3).train.samples == 3


def test_an_unknown_data_set_is_told_with_the_one_that_may_be_meant():
    with pytest.raises(UserError, match="unknown data set 'mnits'; did you mean mnist"):
        open_dataset("mnits", None)
    with pytest.raises(UserError, match="unknown data set 'flowers'; choose one of digits, peaks, mnist, cifar10"):
        open_dataset("flowers", None)


@pytest.mark.parametrize("name", TASKS)
def test_generated_tasks_are_the_same_for_the_same_seed_and_size(name):
    identity = identify(open_dataset(name, None, 1))
    assert differences(identity, identify(open_dataset(name, None, 1))) == []
    assert differences(identity, identify(open_dataset(name, None, 2)))
    assert differences(identity, identify(open_dataset(f"{name}:{TASKS[name][1] + 1}", None, 1)))
    assert Identity.of(identity.table()) == identity
