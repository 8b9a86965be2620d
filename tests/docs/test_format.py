"""FORMAT.md against the files of runs."""

import json
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers.arrays import ranks_are_threads
from helpers.runs import run

import psmpi.checkpoint
from psmpi import checkpoint
from psmpi.checkpoint.format import HEADER, seal

TEXT = Path(psmpi.checkpoint.__file__).with_name("FORMAT.md").read_text()
MLP = ("--model", "mlp", "--widths", "12", "8")
# Options and numbers of ranks of trainings whose checkpoints hold different data sets.
RUNS = [
    (("--optimizer", "sgd", "--batch-norm"), 1),
    (("--optimizer", "lbfgs"), 1),
    (("--partition", "pairs", "--optimizer", "plbfgs", "--extrapolation", "constant", "--scaling", "moments"), 1),
    (("--psl-weights", "remembered"), 1),
    (("--method", "data_parallel", "--compression", "dgc", *MLP), 2),
    (("--method", "data_parallel", "--compression", "qsgd", *MLP), 1),
    (("--method", "data_parallel", "--compression", "powersgd", *MLP), 1),
    (("--method", "local_sgd", "--outer-lr", "0.7", "--outer-momentum", "0.9", *MLP), 2),
    (("--method", "ist", "--optimizer-state", "travel", *MLP), 2),
    (("--method", "dfa", *MLP), 2),
    (("--method", "data_parallel", "--dataset", "text.txt", "--context", "8", "--model", "gru", "--widths", "8"), 1),
    (("--dataset", "table.csv", "--model", "linear"), 1),
    (("--method", "sil", *MLP), 1),
    (("--method", "sil", "--hand-over", "stale", *MLP), 1),
]


def tables():
    """The rows of FORMAT.md's tables, as pairs (names in the first column, other columns)."""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in TEXT.splitlines() if line[:3] == "| `"]
    return [(re.findall(r"`([^`]+)`", first), rest) for first, *rest in rows]


def patterns():
    """The regular expression of each path in the tables, by path."""
    named = {path: [] for names, _ in tables() for path in names if path.startswith("/")}
    for path in named:
        named[path] = re.compile(re.sub("NAME|VECTOR|SPACE", "[^/]+", path))
    return named


def data_sets(path):
    shapes = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: shapes.update({f"/{name}": item.shape} if hasattr(item, "shape") else {}))
    return shapes


@pytest.fixture(scope="module")
def files(tmp_path_factory):

    paths = []
    (tmp_path_factory.getbasetemp() / "text.txt").write_text("to be, or not to be. " * 20)
    (tmp_path_factory.getbasetemp() / "table.csv").write_text("p,q,kind\n" + "1,2,cat\n3,4,dog\n5,6,eel\n" * 10)
    for number, (options, ranks) in enumerate(RUNS):
        out = tmp_path_factory.mktemp("formats") / f"run{number}"
        words = ("--out", out, "--max-steps", "2", *options)
        status, _, err = run(ranks, "-m", "psmpi.train", *words, cwd=tmp_path_factory.getbasetemp())
        assert status == 0, err
        paths.append(checkpoint.available(out)[-1])
    status, _, err = run(1, "-m", "psmpi.inspect", "cut", paths[0], "--classes", "3", "--out", out / "part.h5")
    assert status == 0, err
    with ranks_are_threads():
        folder = psmpi.fit(np.eye(6), list("abcabc"), np.eye(6), list("abcabc"), epochs=1, out=out / "named").folder
    return [*paths, out / "part.h5", checkpoint.available(folder)[-1]]


def test_every_path_of_every_file_is_in_the_tables_and_every_row_in_a_file(files):
    named = patterns()
    seen = set()
    for path in files:
        for name in data_sets(path):
            # No method writes tensors of a SPACE.
            rows = [row for row, pattern in named.items() if "SPACE" not in row and pattern.fullmatch(name)]
            assert len(rows) == 1, f"{name} of {path} is in {rows}"
            seen |= set(rows)
    assert seen == {row for row in named if "SPACE" not in row}


def test_every_vector_is_in_its_table(files):
    named = {name for names, _ in tables() for name in names if not name.startswith("/")}
    vectors = {vector for path in files for vector in checkpoint.read_contents(path).vectors}
    assert {"s0" if v[0] == "s" and v[1:].isdigit() else "y0" if v[0] == "y" else v for v in vectors} == named


def test_shapes_are_those_of_the_tables(files):
    """Tables of elements and ranks: the number of axes, and the sizes that are named in FORMAT.md."""
    shapes = {}
    for names, rest in tables():
        if names[0].startswith(("/elements", "/rank")):
            written = re.findall(r"\(([^()]+)\)", rest[0])
            for k, name in enumerate(names):
                shapes[name] = written[min(k, len(written) - 1)].rstrip(",").split(", ")
    for path in files:
        contents, sets = checkpoint.read_contents(path), data_sets(path)
        sizes = {"weights": contents.layout.size, "ranks": contents.provenance["ranks"], "m": 5, "2 m": 10}
        sizes |= {"2": 2, "1": 1, "elements": 90}
        for name, shape in sets.items():
            if name in shapes:
                assert len(shape) == len(shapes[name])
                for axis, word in zip(shape, shapes[name], strict=True):
                    assert sizes.get(word, axis) == axis, (name, shape, shapes[name])


def test_texts_have_the_keys_that_are_named(files):
    for path in files:
        with h5py.File(path) as file:
            texts = {name: item.asstr()[0] for name, item in file.items() if isinstance(item, h5py.Dataset)}
            assert file.attrs["format"] == checkpoint.FORMAT and file.userblock_size == HEADER
        for names, rest in tables():
            name = names[0].lstrip("/")
            if name in ("progress", "random", "provenance", "placement"):
                keys, quoted = json.loads(texts[name]), set(re.findall(r"`([a-z_]+)`", rest[0]))
                missing = (
                    quoted - keys.keys() - {"cut_from", "average_of", "sparsified_from", "sparsity", "git", "parallel"}
                )
                assert not missing, f"{name} of {path} lacks {missing}"
                assert name != "progress" or quoted == keys.keys()


def in_older_format(path, target):
    """Write a copy of a file in the older format, with the tables of ranks in `/elements`; return its path."""
    target.parent.mkdir(parents=True)
    target.write_bytes(path.read_bytes())
    with h5py.File(target, "r+") as file:
        file.move("rank", "elements")
    seal(target)
    return target


@pytest.mark.parametrize(
    "options", [("--method", "local_sgd"), ("--method", "data_parallel", "--compression", "dgc", "--density", "0.05")]
)
def test_files_with_the_tables_of_ranks_among_elements_are_read(train, tmp_path, options):
    """A run of two ranks resumes from such a file bit for bit."""
    options = (*options, *MLP, "--epochs", "1", "--dtype", "float64", "--max-steps")
    first, uninterrupted = train(2, *options, "5"), train(2, *options, "9")
    assert any(name.startswith("rank/") for name in first.tensors())
    older_file = in_older_format(first.checkpoint, tmp_path / "old" / "checkpoints" / first.checkpoint.name)
    resumed = train(2, *options, "9", "--resume", older_file)
    assert "does not hold" not in resumed.stdout
    expected, actual = uninterrupted.tensors(), resumed.tensors()
    assert expected.keys() == actual.keys() and all(np.array_equal(expected[k], actual[k]) for k in expected)
    status, out, err = run(1, "-m", "psmpi.inspect", "diff", first.checkpoint, older_file, "--json")
    assert status == 0 and json.loads(out)["identical"], err
    # Another number of ranks cannot use the tables of ranks, and says so.
    assert "the checkpoint does not hold" in train(1, *options, "6", "--resume", older_file).stdout
