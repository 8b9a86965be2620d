"""Augmentation moves and mirrors images by the sample's number and the epoch."""

import numpy as np
import pytest
from helpers.runs import distance, run

from psmpi.backend import NumpyOps, make_backend
from psmpi.backend.compiled.library import level
from psmpi.data import Resident, open_dataset
from psmpi.data.augmented import with_augmentation
from psmpi.errors import UserError


def moved(image, down, right, mirror, reflect):
    """Move one image (channels, height, width) by slicing a padded copy, independently of the operation."""
    image = image[:, :, ::-1] if mirror else image
    margin = max(abs(down), abs(right))
    padded = np.pad(image, ((0, 0), (margin, margin), (margin, margin)), mode="reflect" if reflect else "constant")
    h, w = image.shape[1:]
    return padded[:, margin - down : margin - down + h, margin - right : margin - right + w]


@pytest.mark.parametrize("backend", ["numpy", "compiled"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 5), (3, 4, 7), (2, 9, 6)])
@pytest.mark.parametrize("reflect", [False, True])
def test_images_are_moved_and_mirrored(backend, dtype, shape, reflect):
    if backend == "compiled" and not level():
        pytest.skip("no kernels")
    rng, b = np.random.default_rng(0), 41
    x = rng.normal(size=(*shape, b)).astype(dtype)
    largest_move = min(shape[1:]) - 1
    moves = np.stack([*rng.integers(-largest_move, largest_move + 1, (2, b)), rng.integers(0, 2, b)]).astype(np.int32)
    out = np.full_like(x, np.nan)
    make_backend(backend, 1).move_images(x, moves, reflect, out)
    for k in range(b):
        assert np.array_equal(out[..., k], moved(x[..., k], *moves[:, k], reflect)), k


def test_images_are_moved_on_a_device_too(stand_in):
    x = np.random.default_rng(0).normal(size=(2, 5, 6, 7)).astype(np.float32)
    moves = np.array([[0, 1, -2, 3, 0, 0, 1], [2, 0, 1, -3, 0, 4, 0], [0, 1, 0, 1, 1, 0, 1]], np.int32)
    ops = make_backend("cupy", 1)
    for reflect in (False, True):
        out, expected = ops.put(np.empty_like(x)), np.empty_like(x)
        ops.move_images(ops.put(x), moves, reflect, out)
        NumpyOps().move_images(x, moves, reflect, expected)
        assert np.array_equal(ops.host(out), expected)


def augmented(words=("flip", "shift:2"), seed=3):
    return with_augmentation(open_dataset("digits", None), words, seed)


def test_moves_follow_from_seed_epoch_and_number():
    augmentation, ids = augmented().train.augmentation, np.arange(60_000)
    moves = augmentation.moves(ids)
    assert moves.dtype == np.int32 and np.array_equal(augmentation.moves(ids[7:20]), moves[:, 7:20])
    assert np.array_equal(augmented().train.augmentation.moves(ids), moves)
    other_moves = augmented(seed=4).train.augmentation.moves(ids)
    augmentation.epoch = 1
    for different in (other_moves, augmentation.moves(ids)):
        assert 0.7 < (different[:2] != moves[:2]).mean() < 0.9 and 0.45 < (different[2] != moves[2]).mean() < 0.55
    # The 50 moves are equally frequent, within 5 standard deviations of 60,000 draws.
    combined = np.bincount((moves[0] + 2) * 10 + (moves[1] + 2) * 2 + moves[2], minlength=50)
    assert np.abs(combined - 1200).max() < 5 * np.sqrt(1200)
    plain = augmented(("crop:1",)).train.augmentation
    assert not plain.moves(ids)[2].any() and set(plain.moves(ids)[0]) == {-1, 0, 1} and plain.fill == "reflect"
    assert not augmented(("flip",)).train.augmentation.moves(ids)[:2].any()


def test_minibatches_are_augmented_by_the_numbers_of_their_samples():
    data, plain = augmented(), open_dataset("digits", None)
    data.train.augmentation.epoch = 5
    rows, ids = np.arange(3, 900, 2), np.array([7, 5, 899, 5])
    out, expected = np.empty((64, 4), np.float32), np.empty((64, 4), np.float32)
    Resident(data.train, rows, np.float32).fetch(ids, out)
    Resident(plain.train, rows, np.float32).fetch(ids, expected)
    moves = data.train.augmentation.moves(ids)
    for k in range(4):
        image = moved(expected[:, k].reshape(1, 8, 8), *moves[:, k], False)
        assert np.array_equal(out[:, k].reshape(1, 8, 8), image)
    assert data.test.augmentation is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["flop"], "expected flip, and shift:N"), (["shift"], "expected flip"), (["shift:0"], "expected flip"),
        (["shift:1", "crop:1"], "expected flip"), (["flip", "flip"], "expected flip"), (["shift:-1"], "expected flip"),
        (["shift:8"], "cannot be moved by 8 pixels"),
    ],
)  # fmt: skip
def test_other_words_are_refused(words, says):
    with pytest.raises(UserError, match=says):
        augmented(words)


def test_samples_and_methods_that_have_no_images_are_refused():
    for name in ("adding", "sparse", "peaks", "digits:rows"):
        with pytest.raises(UserError, match="--augment flip is for images"):
            with_augmentation(open_dataset(name, None), ["flip"], 0)
    options = ("--method", "spann", "--model", "slabs", "--augment", "flip")
    status, _, err = run(2, "-m", "psmpi.train", *options)
    assert status == 1 and "with --method spann a rank has parts of the images" in " ".join(err.split())


@pytest.mark.parametrize("method", ["psl", "data_parallel"])
def test_ranks_and_a_resume_make_no_difference(train, tmp_path, method):
    options = ("--augment", "flip", "crop:2", "--epochs", "2", "--batch-size", "100", "--dtype", "float64")
    options += ("--method", method, "--seed", "1")
    one_rank, three_ranks = train(1, *options), train(3, *options)
    assert distance(one_rank.tensors(), three_ranks.tensors()) <= 1e-10
    plain = train(1, *options[3:])
    assert distance(one_rank.tensors(), plain.tensors()) > 1e-3
    out = tmp_path / "stopped"
    train(2, *options, "--max-steps", "20", out=out)
    resumed = train(2, "--resume", "auto", out=out)
    assert distance(one_rank.tensors(), resumed.tensors()) <= 1e-10
