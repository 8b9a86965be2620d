"""Labels that are strings, truth values or other integers than 0..C-1, as classes with names."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from psmpi.data import Resident, find_doubts, identify, open_dataset, open_split
from psmpi.data.describe import describe
from psmpi.data.names import LONGEST, MOST, check_names
from psmpi.errors import UserError

X = np.random.default_rng(0).random((12, 3)).astype(np.float32)
ANIMALS = np.array(["dog", "ant", "cat"])[np.arange(12) % 3]


def save(path: Path, **arrays: Any) -> str:
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            for key, values in arrays.items():
                text = values.dtype.kind == "U"
                file.create_dataset(key, data=values.astype(object) if text else values)
    else:
        for key, values in arrays.items():
            np.save(path.with_name(f"{path.stem}_{key}.npy"), values)
        path = path.with_name(f"{path.stem}_x.npy")
    return str(path)


@pytest.mark.parametrize("end", [".npz", ".h5", ".npy"])
@pytest.mark.parametrize(
    ("y", "names"),
    [
        (ANIMALS, ("ant", "cat", "dog")),
        (np.char.encode(ANIMALS), ("ant", "cat", "dog")),
        (np.char.encode(np.char.replace(ANIMALS, "a", "é"), "utf-8"), ("cét", "dog", "ént")),
        (np.arange(12) % 2 == 1, ("False", "True")),
        (np.ones(12, bool), ("False", "True")),
        (np.arange(12) % 3 + 1, ("1", "2", "3")),
        ((np.arange(12) % 3 * 5 - 5).astype(np.int8), ("-5", "0", "5")),
        (np.arange(12) % 2 * 10**12, ("0", "1000000000000")),
        ((np.arange(12) % 3).astype(np.uint16), ()),
    ],
)
def test_labels_are_numbered_in_their_order(tmp_path: Path, end: str, y: Any, names: tuple[str, ...]) -> None:
    split = open_split(save(tmp_path / f"own{end}", x=X, y=y), None, "all")
    distinct = {label.decode() if isinstance(label, bytes) else str(label) for label in y.tolist()}
    assert split.names == names and split.labels.dtype == np.int64
    if names:
        assert [names[k] for k in split.labels] == [
            label.decode() if isinstance(label, bytes) else str(label) for label in y.tolist()
        ]
        assert distinct <= set(names)
    else:
        assert np.array_equal(split.labels, y)


@pytest.mark.parametrize("end", [".npz", ".h5", ".npy"])
def test_training_and_test_labels_are_numbered_together(tmp_path: Path, end: str) -> None:
    tests = np.array(["bee", "dog"])
    data = open_dataset(save(tmp_path / f"own{end}", x=X, y=ANIMALS, x_test=X[:2] + 1, y_test=tests), None)
    assert data.outputs == 4 and data.train.names == data.test.names == ("ant", "bee", "cat", "dog")
    assert data.test.labels.tolist() == [1, 3] and data.train.labels[:3].tolist() == [3, 0, 2]
    assert "the class bee has test samples and no training samples" in list(find_doubts(data))
    assert "the classes ant, cat have training samples and no test samples" in list(find_doubts(data))


def test_labels_are_numbered_as_a_network_knows_them(tmp_path: Path) -> None:
    name = save(tmp_path / "own.npz", x=X, y=ANIMALS)
    known = ("zebra", "dog", "cat", "ant")
    assert open_split(name, None, "all", names=known).labels[:3].tolist() == [1, 3, 2]
    with pytest.raises(UserError, match=r"the label 'dog', .* on the classes cat, ant: give samples of these"):
        open_split(name, None, "all", names=("cat", "ant"))
    with pytest.raises(UserError, match="labels are strings, as 'ant', and the network knows numbers of classes alone"):
        open_split(name, None, "all", names=())
    numbers = save(tmp_path / "numbers.npz", x=X, y=np.arange(12) % 3 + 4)
    assert set(open_split(numbers, None, "all", names=()).labels) == {4, 5, 6}
    assert open_split(numbers, None, "all", names=("6", "5", "4")).labels[:3].tolist() == [2, 1, 0]
    np.savez(tmp_path / "none.npz", x=X)
    assert open_split(str(tmp_path / "none.npz"), None, "all", names=known).names == known


def test_other_names_are_another_data_set(tmp_path: Path) -> None:
    named, renamed = (
        identify(open_dataset(save(tmp_path / f"{k}.npz", x=X, y=y), None))
        for k, y in enumerate((ANIMALS, np.char.replace(ANIMALS, "dog", "eel")))
    )
    assert named.train.targets != renamed.train.targets and named.train.values == renamed.train.values


@pytest.mark.parametrize("end", [".npz", ".h5"])
@pytest.mark.parametrize(
    ("y", "says"),
    [
        (np.where(np.arange(12) == 5, "", ANIMALS), "an empty label"),
        (np.where(np.arange(12) == 5, "a\x1b[31m", ANIMALS), r"the label 'a\\x1b\[31m'; expected names of 1 to 100"),
        (np.where(np.arange(12) == 5, "a" * 101, ANIMALS), "the label 'aaa"),
        (np.where(np.arange(12) == 5, "a" * 2000, ANIMALS), "labels of .* bytes; expected names of 100 characters"),
        (np.array([b"\xff"] * 12), r"the label b'\\xff' is not UTF-8"),
        (np.full(12, 2**64 - 1, np.uint64), "18446744073709551615; expected integers below"),
    ],
)
def test_strings_that_are_no_names_are_refused(tmp_path: Path, end: str, y: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        open_dataset(save(tmp_path / f"own{end}", x=X, y=y), None)


def test_names_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psmpi.data.names.MOST", 2)
    with pytest.raises(UserError, match="3 different labels, of which there can be 2: are they classes"):
        open_dataset(save(tmp_path / "own.npz", x=X, y=ANIMALS), None)
    # Integers with more than MOST distinct values stay numbers, as do those with gaps and MANY or more values.
    split = open_split(save(tmp_path / "own.npz", x=X, y=np.arange(12) % 3 * 2), None, "all")
    assert split.names == () and split.labels.max() == 4
    monkeypatch.setattr("psmpi.data.names.MOST", 20)
    monkeypatch.setattr("psmpi.data.names.MANY", 2)
    assert open_split(save(tmp_path / "own.npz", x=X, y=np.arange(12) % 3 * 2 + 1), None, "all").labels.max() == 5
    assert open_split(save(tmp_path / "own.npz", x=X, y=np.arange(12) % 3 + 1), None, "all").names == ("1", "2", "3")


@pytest.mark.parametrize(
    "names", [[], ["a", "a"], ["a", ""], ["a", "b" * (LONGEST + 1)], ["a", "\n"], ["a", 1], ["a"] * (MOST + 1)]
)
def test_names_of_files_are_checked(names: list[Any]) -> None:
    with pytest.raises(ValueError):
        check_names(names)
    assert check_names(["b", "a" * LONGEST]) == ("b", "a" * LONGEST)


@pytest.mark.parametrize("end", [".npz", ".h5", ".npy"])
@pytest.mark.parametrize("dtype", ["i1", "<i2", ">i4", "<i8", "<u2", "<u4", "u8", "?", "<f2"])
def test_samples_are_numbers_of_any_width(tmp_path: Path, end: str, dtype: str) -> None:
    x = (np.arange(36).reshape(12, 3) % 7).astype(dtype)
    split = open_split(save(tmp_path / f"own{end}", x=x, y=np.arange(12) % 3), None, "all")
    out = np.empty((3, 4), np.float32)
    Resident(split, np.arange(12), np.float32).fetch([3, 0, 11, 3], out)
    assert split.scale == 1 and np.array_equal(out, x[[3, 0, 11, 3]].T.astype(np.float32))


def test_pairs_are_found_by_their_folder_or_samples(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for key, values in {"x": X, "y": ANIMALS, "x_test": X[:4], "y_test": ANIMALS[:4]}.items():
        np.save(folder / f"{key}.npy", values)
    for name, data_dir in (("mine", tmp_path), (str(folder), None), (str(folder / "x.npy"), None)):
        data = open_dataset(name, data_dir)
        assert (data.train.n, data.test.n, data.outputs, data.held_out) == (12, 4, 3, False)
        np.testing.assert_array_equal(data.train.read(np.arange(12)), X)
    np.save(folder / "all.npy", X)
    np.save(folder / "f_x.npy", np.asfortranarray(X))
    np.save(folder / "f_y.npy", ANIMALS)
    np.save(folder / "o_x.npy", np.array([[1], [1, 2]], object), allow_pickle=True)
    np.save(folder / "o_y.npy", ANIMALS[:2])
    (folder / "t_x.npy").write_bytes((folder / "x.npy").read_bytes()[:-1])
    (folder / "t_y.npy").write_bytes((folder / "y.npy").read_bytes())
    (folder / "z_x.npy").write_bytes(b"PK\3\4")
    for name, says in (
        ("all.npy", "a single array; expected a pair: save samples as all_x.npy"),
        ("f_x.npy", "Fortran order"),
        ("o_x.npy", "an array of Python objects"),
        ("t_x.npy", "found 271 bytes, expected 272"),
        ("z_x.npy", "a zip file"),
        ("none_x.npy", "no such file"),
    ):
        with pytest.raises(UserError, match=says):
            open_dataset(str(folder / name), None)


@pytest.mark.parametrize("end", [".npz", ".h5", ".npy"])
def test_images_may_have_their_channels_last(tmp_path: Path, end: str) -> None:
    x = np.random.default_rng(0).integers(0, 256, (12, 4, 6, 3)).astype(np.uint8)
    last, first = (
        save(tmp_path / f"{name}{end}", x=values, y=ANIMALS)
        for name, values in (("last", x), ("first", x.transpose(0, 3, 1, 2)))
    )
    last_data, first_data = (open_dataset(name, None, channels_last=name == last) for name in (last, first))
    assert last_data.shape == first_data.shape == (3, 4, 6) and last_data.train.n == 10
    for split in ("train", "test"):
        a, b = getattr(last_data, split), getattr(first_data, split)
        assert np.array_equal(a.read(np.arange(a.n)), b.read(np.arange(b.n)))
    views = [open_dataset(f"{name}:rows", None, channels_last=name == last).train for name in (last, first)]
    assert views[0].shape == (18, 4) and np.array_equal(*(view.read(np.arange(10)) for view in views))
    for name in ("digits", "own.csv", save(tmp_path / f"flat{end}", x=X, y=ANIMALS)):
        with pytest.raises(UserError, match="--layout nhwc is for images"):
            open_dataset(name, None, channels_last=True)


def test_channels_in_another_place_are_told(tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((12, 8, 9, 3)).astype(np.float32)
    name = save(tmp_path / "own.npz", x=x, y=np.arange(12) % 2)
    assert "if the channels come last, add --layout nhwc" in " ".join(find_doubts(open_dataset(name, None)))
    assert list(find_doubts(open_dataset(name, None, channels_last=True))) == []
    name = save(tmp_path / "own.npz", x=x.transpose(0, 3, 1, 2), y=ANIMALS)
    assert "leave --layout nhwc out" in " ".join(find_doubts(open_dataset(name, None, channels_last=True)))


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"y": ANIMALS}, "12 test samples of shape 3, float32 from 0 to 2; 3 classes: ant (4), cat (4), dog (4)"),
        ({"y": np.arange(12)}, "; 12 classes: 0 (1), 1 (1), 2 (1), 3 (1), 4"),
        ({"x": np.arange(156).reshape(12, 13), "y": np.arange(12) // 2}, "shape 13, int64 from 0 to 155; 6 classes: 0"),
        ({"y": np.arange(12) * 0.5}, "1 value to learn from 0 to 5.5"),
        ({"x": np.full((12, 2, 2), 255, np.uint8), "y": ANIMALS}, "1 x 2 x 2, uint8 from 255 to 255, divided by 255;"),
    ],
)  # fmt: skip
def test_a_line_says_what_the_data_are(tmp_path: Path, arrays: dict[str, Any], says: str) -> None:
    filled = {"x": np.tile(np.arange(3, dtype=np.float32), (12, 1)), **arrays}
    name = save(tmp_path / "own.npz", **filled, x_test=filled["x"], y_test=filled["y"])
    assert describe(open_dataset(name, None)).startswith("data own.npz: ") and says in describe(
        open_dataset(name, None)
    )
    many = save(tmp_path / "many.npz", x=np.zeros((60, 2)), y=np.maximum(np.arange(60) % 20, 1) - 1)
    assert "; 19 classes of 2 to 5 samples" in describe(open_dataset(many, None))


def test_lines_about_generated_data_are_told() -> None:
    assert "sparse float32 from" in describe(open_dataset("sparse", None))
    assert "samples of shape 1 x 16 x 16" in describe(open_dataset("characters", None))
    assert "tokens from " in describe(open_dataset("ratings", None))
    assert "classes at each step" in describe(open_dataset("copying", None))
