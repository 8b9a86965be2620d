"""The identity of data sets: the same for the same data however stored, another for every change."""

import hashlib

import numpy as np
import pytest

from psmpi.data import Identity, check_same, differences, identify, identify_split, open_dataset, other_scale
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
    with pytest.raises(UserError, match="unknown data set 'flowers'; choose one of digits, mnist, cifar10"):
        open_dataset("flowers", None)
