"""Images of characters: their content, equal images in any order of reading, and refused sizes."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers.runs import run, trainer

from psmpi.data import differences, find_doubts, identify, locate, open_dataset, open_split
from psmpi.data.characters import CHARACTERS, FONTS, MOST, NOISE, SMALLEST, Drawings, outlines
from psmpi.errors import UserError

pytest.importorskip("matplotlib")


def images(split, rows):
    return split.read(rows).reshape(-1, *split.shape[1:])


def test_there_are_48_characters_in_many_variations():
    data = open_dataset("characters", None)
    assert len(set(CHARACTERS)) == data.outputs == 48 and data.shape == (1, 16, 16) and data.train.scale == 1 / 255
    assert (data.train.n, data.test.n) == (1920, 960) and data.train.dtype == np.uint8
    assert np.array_equal(data.train.labels, np.arange(1920) % 48)
    x = images(data.train, np.arange(1920))
    assert x.max(axis=(1, 2)).min() > 100 and len(np.unique(x.reshape(1920, -1), axis=0)) == 1920
    # The nearest training image of most test images shows the same character.
    tests = images(data.test, np.arange(960)).reshape(960, -1).astype(float)
    known = x.reshape(1920, -1).astype(float)
    nearest = ((known**2).sum(axis=1) - 2 * tests @ known.T).argmin(axis=1)
    assert (data.train.labels[nearest] == data.test.labels).mean() > 0.7


def test_images_are_the_same_however_they_are_read():
    split, reopened = (open_dataset("characters:20x3", None, 5).train for _ in range(2))
    assert split.n == 144
    expected = split.read(np.arange(144))
    rows = np.random.default_rng(0).permutation(144)
    assert np.array_equal(reopened.read(rows), expected[rows]) and np.array_equal(
        reopened.read([7, 7]), expected[[7, 7]]
    )
    with ThreadPoolExecutor(4) as pool:
        for values in pool.map(lambda _: split.read(np.arange(144)), range(8)):
            assert np.array_equal(values, expected)
    for name, seed in (("characters:20x3", 6), ("characters:20x3", -1)):
        assert not np.array_equal(open_dataset(name, None, seed).train.read(np.arange(144)), expected)
    test = open_dataset("characters:20x3", None, 5).test
    assert test.n == 96 and not (test.read(np.arange(96))[:, None] == expected).all(axis=2).any()


def test_a_sample_is_the_same_at_any_resolution():
    small = images(open_dataset("characters:16", None).train, np.arange(96))
    large = images(open_dataset("characters:128", None).train, np.arange(96))
    rough = large.reshape(96, 16, 8, 16, 8).mean(axis=(2, 4))
    # Averaged noise is close to its mean; each pixel of the small image has noise of its own.
    assert np.abs(rough - small).max() < NOISE and np.abs(rough - small).mean() < NOISE / 3


def test_letters_are_upright_and_as_large_as_is_said():
    """An L has its stroke at the left and its foot below; letters are 0.72 of the font's size high."""
    train = open_dataset("characters:100x20", None).train
    rows_of_l = CHARACTERS.index("L") + 48 * np.arange(20)
    ink = images(train, rows_of_l) > 150
    for image in ink:
        rows, columns = np.flatnonzero(image.any(axis=1)), np.flatnonzero(image.any(axis=0))
        height = rows[-1] - rows[0] + 1
        assert 62 * SMALLEST < height < 76 and columns[0] > 5 and columns[-1] < 95
        assert image[rows[-1] - height // 4 :].sum() > 1.3 * image[rows[0] : rows[0] + height // 4].sum()
        assert image[:, : columns.mean().astype(int)].sum() > image[:, columns.mean().astype(int) :].sum()


def test_all_fonts_have_all_characters():
    faces = outlines()
    assert len(faces) == len(FONTS) == len(set(FONTS))
    for face in faces:
        assert len(face) == 48
        for k, outline in enumerate(face):
            assert len(outline.points) == len(outline.codes) > 3 and np.abs(outline.points).max() < 1
            earlier = (face[j].points for j in range(k))
            assert all(
                outline.points.shape != points.shape or not np.allclose(outline.points, points) for points in earlier
            )


def test_large_images_are_drawn_one_by_one_and_fewer():
    for name, count in (
        ("characters:512", 21),
        ("characters:1024", 5),
        (f"characters:{MOST}", 1),
        ("characters:2048x3", 3),
    ):
        data = open_dataset(name, None)
        assert (data.train.n, data.test.n) == (48 * count, 48 * -(-count // 2))
    pieces = [values.shape for _, values in data.train.pieces(np.array([5, 90]))]
    assert pieces == [(1, 2048**2)] * 2


def test_the_identity_follows_from_the_numbers_and_no_image_is_drawn(monkeypatch):
    monkeypatch.setattr(Drawings, "pieces", None)
    dataset, prints = open_dataset("characters:64x2", None), []
    identity = identify(dataset, prints=prints)
    assert not prints and identity.train.values != identity.test.values
    assert differences(identity, identify(open_dataset("characters:64x2", None))) == []
    messages = differences(identity, identify(open_dataset("characters:64x2", None, 1)))
    assert len(messages) == 2 and "other values in the training samples" in messages[0]
    assert differences(identity, identify(open_dataset("characters:64x3", None)))


def test_nothing_is_odd_about_them_and_rows_of_them_are_sequences():
    data = open_dataset("characters", None)
    assert list(find_doubts(data)) == []
    for name, side in (("characters:rows", 16), ("characters:8:rows", 8), ("characters:8:pixels", 64)):
        assert open_dataset(name, None).shape[1] == side
        assert locate(name, None, print) == name
    assert open_split("characters:9", None, "test").shape == (1, 9, 9)


@pytest.mark.parametrize(
    "number", ["7", "4097", "16x0", "16x10001", "x", "16x", "-16", "16.0", "1e2", "9" * 30, "16x2x2"]
)
def test_other_sizes_are_refused(number):
    with pytest.raises(UserError, match=f"--dataset characters:{number}: expected characters:SIDE with SIDE from 8"):
        open_dataset(f"characters:{number}", None)


def test_without_matplotlib_its_extra_is_named(monkeypatch):
    outlines.cache_clear()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"drawn with matplotlib's fonts: pip install 'psmpi\[plot\]'"):
        open_dataset("characters", None)


def test_without_a_font_a_newer_matplotlib_is_asked_for(monkeypatch, tmp_path):
    outlines.cache_clear()
    monkeypatch.setattr("matplotlib.get_data_path", lambda: str(tmp_path))
    with pytest.raises(UserError, match=r"matplotlib has no font .*DejaVuSans\.ttf: install its newest version"):
        open_dataset("characters", None)


def test_characters_are_learnt_and_predicted(tmp_path):
    options = ("--dataset", "characters:12x20", "--model", "mlp", "--widths", "64", "--loss", "nll", "--epochs", "12")
    training = trainer(tmp_path)(2, *options, "--method", "data_parallel", "--batch-size", "32", out=tmp_path / "out")
    assert training.rows[-1]["test_accuracy"] > 0.4
    status, out, err = run(1, "-m", "psmpi.predict", "out", cwd=tmp_path)
    assert status == 0 and f"{100 * training.rows[-1]['test_accuracy']:.2f} %" in out, out + err
