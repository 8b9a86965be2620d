"""Warnings on data sets that can be trained on and are probably mistakes."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from helpers.datasets import make_cifar, real
from helpers.runs import run

from psmpi.data import Dataset, Prints, find_doubts, identify, locate, open_dataset
from psmpi.data import identity as identity_module
from psmpi.data.copies import fingerprints
from psmpi.data.tasks import TASKS

RNG = np.random.default_rng(0)
X, Y = RNG.random((40, 5, 6)).astype(np.float32), np.arange(40) % 4
PIXELS = RNG.integers(0, 256, (40, 5, 6))
FOR_TEST = {"x_test": RNG.random((20, 5, 6)).astype(np.float32), "y_test": Y[:20]}


def file_doubts(path: Path, packed: bool = False, **arrays: Any) -> list[str]:
    if path.suffix == ".npz":
        (np.savez_compressed if packed else np.savez)(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for key, values in arrays.items():
                file.create_dataset(key, data=values, compression="gzip" if packed else None)
    return doubts(open_dataset(str(path), None))


def doubts(dataset: Dataset) -> list[str]:
    prints: list[Prints] = []
    identify(dataset, prints=prints)
    return list(find_doubts(dataset, prints))


@pytest.mark.parametrize("end", [".npz", ".h5"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "arrays",
    [
        {"x": X, "y": Y},
        {"x": X, "y": Y, **FOR_TEST},
        {"x": X - 0.5, "y": Y * 0.5},
        {"x": PIXELS.astype(np.uint8), "y": Y},
        {"x": (PIXELS / 255).astype(np.float32), "y": Y},
        {"x": (PIXELS > 127).astype(np.float32), "y": Y},
        {"x": RNG.normal(size=(40, 3, 8, 8)), "y": Y},
        {"x": RNG.normal(size=(40, 3, 8, 3)), "y": Y},
        {"x": RNG.integers(0, 9, (40, 7)).astype(float), "y": Y},
        {"x": RNG.normal(0, 2, (40, 30)), "y": RNG.normal(size=(40, 3))},
        {"x": X, "y": RNG.integers(0, 10**6, 40).astype(float)},
    ],
)
def test_sound_data_sets_raise_no_doubts(tmp_path: Path, end: str, packed: bool, arrays: dict[str, Any]) -> None:
    assert file_doubts(tmp_path / f"own{end}", packed, **arrays) == []


def test_data_sets_with_a_name_raise_no_doubts(tmp_path: Path) -> None:
    make_cifar(tmp_path, (40, 40, 40, 40, 40, 40))
    for name, place in (("digits", None), ("cifar10", tmp_path)):
        assert doubts(open_dataset(name, place)) == []
    assert doubts(open_dataset("mnist", real("mnist"))) == []


@pytest.mark.parametrize("end", [".npz", ".h5"])
@pytest.mark.parametrize(
    ("y", "says"),
    [
        (Y * 0 + 3, ["all samples have the label 3: there is nothing to tell apart"]),
        (Y + 1, []),
        (Y * 2 + 10, []),
        (np.where(Y == 2, 1, Y), []),
        (np.where(np.arange(40) < 6, 255, Y).astype(np.uint8), ["255 is a class: if it marks samples to be ignored"]),
        (np.where(np.arange(40) < 6, -1, Y), ["-1 is a class: if it marks samples without a label, remove these"]),
    ],
)
def test_numbers_that_may_be_marks_are_told(tmp_path: Path, end: str, y: Any, says: list[str]) -> None:
    for extra in ({}, {"x_test": 1 - X, "y_test": y}):
        warnings = file_doubts(tmp_path / f"own{end}", x=X, y=y, **extra)
        assert len(warnings) == len(says)
        for warning, pattern in zip(warnings, says, strict=True):
            assert re.match(pattern, warning), warning


def test_classes_of_one_split_alone_are_told(tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    assert file_doubts(path, x=X, y=np.arange(40) % 10, x_test=1 - X, y_test=np.arange(40) % 3) == [
        "the classes 3, 4, 5, 6, 7 and 2 more have training samples and no test samples"
    ]
    assert file_doubts(path, x=X, y=Y, x_test=1 - X, y_test=np.arange(40) % 6) == [
        "the classes 4, 5 have test samples and no training samples"
    ]
    assert file_doubts(path, x=X, y=np.where(np.arange(40) == 7, 4, Y)) == [
        "the class 4 has training samples and no test samples"
    ]
    assert file_doubts(path, x=X, y=np.arange(40) % 5) == []
    np.savez(path, x=X, y=np.arange(40) % 5)
    assert "the class 4 has test samples and no training samples" in list(
        find_doubts(open_dataset(str(path), None, -1))
    )


def test_values_that_are_all_the_same_are_told(tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    assert "the value 2 in column 1 of y" in file_doubts(path, x=X, y=np.stack([Y * 0.3, np.full(40, 2.0)], 1))[0]


@pytest.mark.parametrize("y", [Y * 1.0, np.eye(4)[Y], (Y > 1) * 1.0])
def test_whole_numbers_are_values_to_who_asks_for_the_squared_error(
    train: Callable[..., Any], tmp_path: Path, y: Any
) -> None:
    """Without --loss squared whole numbers are refused, and the error says how to save classes."""
    assert file_doubts(tmp_path / "own.npz", x=X, y=y) == []
    options = (
        "--dataset",
        tmp_path / "own.npz",
        "--model",
        "mlp",
        "--widths",
        "4",
        "--epochs",
        "1",
        "--batch-size",
        "8",
    )
    for ranks, extra in ((1, ()), (2, ("--method", "data_parallel"))):
        training = train(ranks, *options, "--loss", "squared", *extra)
        assert "warning" not in training.stdout and len(training.rows) == 1
    status, _, err = run(1, "-m", "psmpi.train", *options)
    assert status == 1 and "or save labels as integers, y.astype(np.int64), of one-hot rows" in " ".join(err.split())


def test_samples_of_zeros_are_told(tmp_path: Path) -> None:
    """Files of interrupted writers end in such samples."""
    half = np.where(np.arange(40)[:, None] < 30, RNG.random((40, 9)), 0)
    assert file_doubts(tmp_path / "own.npz", x=half, y=Y)[0].startswith(
        "10 of 40 samples looked at are zeros throughout"
    )
    few = np.where(np.arange(40)[:, None] < 37, RNG.random((40, 9)), 0)
    assert file_doubts(tmp_path / "own.npz", x=few, y=Y) == []


@pytest.mark.parametrize("end", [".npz", ".h5"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("x", "says"),
    [
        (
            PIXELS.astype(np.float32),
            r"x has values up to 255, .*: divide it by a number \(pixels: by 255, or save them as uint8\)$",
        ),
        (PIXELS.reshape(40, 30).astype(np.float64), "x has values up to 255"),
        (PIXELS.astype(np.float32) // 16, "x has values up to 15, "),
        (PIXELS.astype(np.float32) * 257, "x has values up to 65535, .* divide it by a number$"),
        ((PIXELS > 127).astype(np.uint8), r"x is uint8, .* values up to 1 only, .* save it as x.astype\(np.float32\)$"),
        ((PIXELS // 16).astype(np.uint8), r"x is uint8, .* values up to 15 only, .* x.astype\(np.float32\) / 15$"),
        (np.full((40, 9), 0.5), "all values looked at in x are 0.5"),
        (RNG.random((40, 8, 9, 3)), r"samples of the shape \(8, 9, 3\) are taken for 8 channels of 9 x 3"),
        (RNG.random((40, 28, 28, 1)), r"samples of the shape \(28, 28, 1\) .* come last, add --layout nhwc"),
    ],
)
def test_samples_that_are_not_scaled_or_turned_are_told(
    tmp_path: Path, end: str, packed: bool, x: Any, says: str
) -> None:
    (warning,) = file_doubts(tmp_path / f"own{end}", packed, x=x, y=Y)
    assert re.match(says, warning), warning
    assert file_doubts(tmp_path / f"own{end}", packed, x=x, y=Y, x_test=x[:20], y_test=Y[:20])[:1] == [warning]


def test_test_samples_of_another_scale_are_told(tmp_path: Path) -> None:
    for train_x, test_x, says in ((X, X * 255, "0.9.*, x_test up to 25"), (X * 1e4, -X, "99.*, x_test up to 0.9")):
        *_, warning = file_doubts(tmp_path / "own.npz", x=train_x, y=Y, x_test=test_x, y_test=Y)
        assert re.match(f"x has values up to {says}.*: scale both alike", warning), warning


@pytest.mark.parametrize("end", [".npz", ".h5"])
@pytest.mark.parametrize("packed", [False, True])
def test_test_samples_that_are_training_samples_are_told(tmp_path: Path, end: str, packed: bool) -> None:
    path = tmp_path / f"own{end}"
    for x in (X, (X - 0.5).astype(np.float64), PIXELS.astype(np.uint8), np.sign(X - 0.5)):
        unseen = x[:, ::-1].copy() if x.dtype == np.uint8 else -x
        for count, mixed in ((40, x), (20, x[:20]), (15, np.concatenate([unseen[:25], x[::-1][:15]]))):
            (warning,) = file_doubts(path, packed, x=x, y=Y, x_test=mixed, y_test=Y[: len(mixed)])
            assert warning.startswith(f"{count} of the {len(mixed)} test samples are training samples too, so that"), (
                warning
            )
        assert file_doubts(path, packed, x=x, y=Y, x_test=unseen, y_test=Y) == []


def test_samples_that_are_alike_by_chance_are_not_told(tmp_path: Path) -> None:
    """Rows of a few categories repeat by chance, also within the training samples."""
    for categories in (2, 5):
        rows = RNG.integers(0, categories, (600, 4)).astype(np.float32)
        arrays = {"x": rows[:400], "y": np.arange(400) % 4, "x_test": rows[400:], "y_test": np.arange(200) % 4}
        assert file_doubts(tmp_path / "own.npz", **arrays) == []
        assert file_doubts(tmp_path / "own.npz", x=rows, y=np.arange(600) % 4) == []


def test_one_copy_of_a_hundred_samples_is_no_more_than_collections_have(tmp_path: Path) -> None:
    x = RNG.random((400, 9))
    arrays = {"x": x, "y": np.arange(400) % 4, "y_test": np.arange(200) % 4}
    for count in (2, 3):
        x_test = np.concatenate([RNG.random((200 - count, 9)), x[:count]])
        assert len(file_doubts(tmp_path / "own.npz", x_test=x_test, **arrays)) == (count > 2)


def test_copies_among_samples_of_which_a_fifth_is_held_out_are_told(tmp_path: Path) -> None:
    x = RNG.random((100, 9))
    (warning,) = file_doubts(tmp_path / "own.npz", x=np.concatenate([x, x]), y=np.arange(200) % 4)
    match = re.match(r"x has samples more than once, so that (\d+) of the 40 test samples, which", warning)
    data = open_dataset(str(tmp_path / "own.npz"), None)
    train, test = ([row.tobytes() for row in split.read(np.arange(split.n))] for split in (data.train, data.test))
    assert match is not None and int(match[1]) == sum(row in train for row in test) > 4
    assert file_doubts(tmp_path / "own.npz", x=np.concatenate([x, x[:9]]), y=np.arange(109) % 4) == []


def test_of_large_sets_copies_are_looked_for_among_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = RNG.random((5000, 30)).astype(np.float32), np.arange(5000) % 4
    monkeypatch.setattr(identity_module, "SEEN_BYTES", x.nbytes // 2)
    (warning,) = file_doubts(tmp_path / "own.h5", x=x, y=y, x_test=x[::5], y_test=y[::5])
    count = re.match(r"(\d+) of the 1,000 test samples looked at are training samples too", warning)
    assert count is not None and 400 < int(count[1]) < 600


def test_fingerprints_are_the_same_for_the_same_samples_alone() -> None:
    for x in (
        X.reshape(40, -1),
        PIXELS.reshape(40, -1).astype(np.uint8)[:, :29],
        np.sign(RNG.random((4000, 64)) - 0.5),
    ):
        prints = fingerprints(x)
        assert len(set(prints.tolist())) == len(np.unique(x, axis=0)) == len(x)
        assert np.array_equal(fingerprints(x[5:9]), prints[5:9])
    signs = np.array([[a, b, c] for a in (1, -1) for b in (1, -1) for c in (1, -1)], np.float64)
    assert len(set(fingerprints(signs).tolist())) == 8


def test_a_file_of_the_same_name_in_the_current_folder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for end, folder in ((".npz", "data"), (".h5", "data"), (".h5", ".")):
        file_doubts(Path(folder) / f"own{end}", x=X, y=Y)
    messages: list[str] = []
    assert locate("own.npz", "data", messages.append) == str(tmp_path / "data" / "own.npz") and messages == []
    assert locate("own.h5", "data", messages.append) == str(tmp_path / "data" / "own.h5")
    assert messages.pop().startswith("warning: the data set is data/own.h5, and there is another own.h5: name")
    assert locate("own.h5", ".", messages.append) == str(tmp_path / "own.h5")
    assert locate("data/own.h5", None, messages.append) == str(tmp_path / "data" / "own.h5")
    assert locate("digits", "data", messages.append) == "digits" and messages == []


def test_looking_at_a_packed_file_unpacks_its_first_samples_only(tmp_path: Path) -> None:
    """The damage in the middle of the file is not reached."""
    x = RNG.integers(0, 256, (4000, 50, 50)).astype(np.uint8)
    name = tmp_path / "own.npz"
    np.savez_compressed(name, x=x, y=np.arange(4000) % 4)
    content = bytearray(name.read_bytes())
    at = len(content) // 2
    content[at : at + 8] = bytes(8)
    name.write_bytes(content)
    data = open_dataset(str(name), None)
    tracemalloc.start()
    assert list(find_doubts(data)) == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000


def test_training_says_once_what_is_doubtful(tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", x=PIXELS.astype(np.float32), y=np.where(Y == 2, 9, Y))
    # A loss and a rate that stay finite with such values.
    options = ("--dataset", "own.npz", "--epochs", "1", "--batch-size", "8", "--out", "run")
    options += ("--lr", "1e-5", "--loss", "nll", "--model", "mlp", "--widths", "4", "--method", "data_parallel")
    status, out, err = run(2, "-m", "psmpi.train", *options, cwd=tmp_path)
    assert status == 0, err
    assert out.count("warning: 9 is a class") == 1 and out.count("warning: x has values up to") == 1


@pytest.mark.parametrize("name", [*TASKS, "modular_addition:12"])
def test_nothing_is_odd_about_generated_tasks(name: str) -> None:
    assert doubts(open_dataset(name, None)) == []


def test_a_text_is_doubted_for_what_it_repeats_alone(tmp_path: Path) -> None:
    text = "".join(np.random.default_rng(0).choice(list("ab cd\n"), 9000))
    for name, content in (("own.txt", text), ("again.txt", text + text[:1000])):
        (tmp_path / name).write_text(content)
    assert doubts(open_dataset(str(tmp_path / "own.txt"), None)) == []
    (warning,) = doubts(open_dataset(str(tmp_path / "again.txt"), None))
    assert "test samples are training samples too" in warning
