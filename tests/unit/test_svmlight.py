"""Texts of sparse samples, and compressed rows in arrays: reading, refusals, training and prediction."""

import bz2
import gzip
import lzma

import numpy as np
import pytest
import scipy.sparse
from helpers.runs import run, trainer

from psmpi.data import card, differences, identify, open_dataset, open_split, svmtext, together
from psmpi.data.identity import Identity
from psmpi.data.split import Numbering
from psmpi.data.svmlight import is_svmlight
from psmpi.errors import UserError

TEXT = "+1 1:0.5 3:-2e-1\n-1 2:1\n-1\n+1 1:.25 2:4. 4:+7\n-1 3:1E+2\n"
DENSE = [[0.5, 0, -0.2, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0.25, 4, 0, 7], [0, 0, 100, 0]]


def write(folder, text, name="own.svm"):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(folder / name)


def open_all(path):
    return open_split(path, None, "all")


def random_text(n, features, seed=0, first=1, share=0.2):
    """A text, and its samples (n, features) and labels."""
    rng = np.random.default_rng(seed)
    dense = np.round((rng.random((n, features)) < share) * rng.standard_normal((n, features)), 3)
    labels = np.where(dense.sum(axis=1) + 0.1 * rng.standard_normal(n) > 0, 1, -1)
    lines = [
        " ".join([f"{label:+d}", *(f"{k + first}:{row[k]:g}" for k in np.flatnonzero(row))])
        for label, row in zip(labels, dense, strict=True)
    ]
    return "\n".join(lines) + "\n", dense.astype(np.float32), labels


def test_a_text_is_read_as_it_says(tmp_path):
    split = open_all(write(tmp_path, TEXT))
    np.testing.assert_allclose(split.compressed.dense(), np.array(DENSE, np.float32))
    assert split.labels.tolist() == [1, 0, 0, 1, 0] and split.shape == (4,)
    assert split.compressed.dtype == np.float32 and split.numbering == Numbering(1, (-1, 1), 4)
    assert np.array_equal(split.read([3, 0]), np.array(DENSE, np.float32)[[3, 0]])


@pytest.mark.parametrize(
    "changed",
    [
        TEXT.replace("\n", "\r\n"),
        TEXT[:-1],
        "\ufeff" + TEXT,
        "# made by hand\n" + TEXT.replace("\n", " # a comment: 3:4, 5\n") + "#\n",
        "\n" + TEXT.replace(" ", "\t  ") + "\n \n",
        TEXT.replace("+1 ", "1 "),
    ],
)
def test_spaces_newlines_and_comments_change_nothing(tmp_path, changed):
    plain, respelled = open_all(write(tmp_path, TEXT)), open_all(write(tmp_path, changed, "other.svm"))
    assert np.array_equal(plain.compressed.dense(), respelled.compressed.dense())
    assert np.array_equal(plain.labels, respelled.labels)


@pytest.mark.parametrize(("end", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_packed_texts_are_read_and_damaged_ones_refused(tmp_path, end, pack):
    text, dense, _ = random_text(300, 40)
    packed = pack(text.encode())
    split = open_all(write(tmp_path, packed, f"own.svm{end}"))
    assert np.array_equal(split.compressed.dense(), dense[:, : split.features])
    with pytest.raises(UserError, match=r"damaged, truncated|cannot be read"):
        open_all(write(tmp_path, packed[: len(packed) // 2], f"half.svm{end}"))
    with pytest.raises(UserError, match=r"damaged, truncated|cannot be read"):
        open_all(write(tmp_path, text, f"plain.svm{end}"))
    with pytest.raises(UserError, match=rf"it is packed as \{end}, with which its name has to end"):
        open_all(write(tmp_path, packed, "packed.svm"))


@pytest.mark.parametrize("block", [7, 64, 1000, 1 << 20])
def test_blocks_of_any_size_give_the_same_samples(tmp_path, monkeypatch, block):
    text, dense, labels = random_text(200, 30, seed=3)
    monkeypatch.setattr(svmtext, "BLOCK", block)
    split = open_all(write(tmp_path, text))
    assert np.array_equal(split.compressed.dense(), dense) and np.array_equal(2 * split.labels - 1, labels)


NO_NUMBER = "expected a number, as -0.5 or 1e-3"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 3:1 2:1", "line 3, column 7: found the index 2 after 3; indices of a line have to ascend"),
        ("1 3:1 3:1", "line 3, column 7: found the index 3 twice"),
        ("1 3:nan", "line 3, column 3: found the value 'nan'; expected a finite number"),
        ("1 3:-Inf", "found the value '-Inf'; expected a finite number"),
        ("nan 3:1", "line 3: found the label 'nan'; expected a finite number"),
        ("1e999 3:1", "found the label '1e999', which float64 does not hold"),
        ("1 3:1e999", "found the value '1e999', which float64 does not hold"),
        ("1 3:1e39", r"found the value '1e39', beyond 3\.4e\+38: divide"),
        ("1,2 3:1", "found the labels '1,2'; a sample has one label here"),
        ("1 qid:4 3:1", "column 3: found 'qid:4': samples are ranked within queries"),
        ("3:1 4:1", "line 3: found '3:1' in the place of the label: begin the line with 0"),
        ("1 :1", "column 3: found ':1'; expected index:value, as 17:0.5"),
        ("1 3:", "found '3:'; expected index:value"),
        ("1 3 : 1", "column 3: found '3'; expected index:value"),
        ("1 3:1 4:2:5", f"column 7: found the value '2:5'; {NO_NUMBER}"),
        ("1 3.0:1", "found '3.0:1'; expected index:value"),
        ("1 -3:1", "found '-3:1'; expected index:value"),
        ("1 2147483648:1", "found the index '2147483648'; expected 2,147,483,647 at most"),
        ("1 99999999999999999999999:1", "found the index '99999999999999999999999'; expected 2,147,483,647 at most"),
        ("1 3:1.5.3", f"found the value '1.5.3'; {NO_NUMBER}"),
        ("1 3:1-2", f"found the value '1-2'; {NO_NUMBER}"),
        ("1 3:--2", f"found the value '--2'; {NO_NUMBER}"),
        ("1 3:.", f"found the value '.'; {NO_NUMBER}"),
        ("1 3:1e", f"found the value '1e'; {NO_NUMBER}"),
        ("1 3:1e5.3", f"found the value '1e5.3'; {NO_NUMBER}"),
        ("1 3:0x10", f"found the value '0x10'; {NO_NUMBER}"),
        ("1 3:1_000", f"found the value '1_000'; {NO_NUMBER}"),
        ("one 3:1", f"line 3: found the label 'one'; {NO_NUMBER}"),
        ("1 3:1 \xe9", "found 'é'; expected index:value"),
        ("1 1 3:1", "column 3: found '1'; expected index:value"),
        ("1 3:" + "7" * 50 + "x", "found the value '7777777777777777777777777777777777777777...'"),
    ],
)
def test_lines_that_are_not_in_order_are_refused_with_their_place(tmp_path, line, message):
    with pytest.raises(UserError, match=message) as error:
        open_all(write(tmp_path, f"1 1:2 # first\n\n{line}\n-1 2:3\n"))
    assert str(error.value).startswith(f"{tmp_path}/own.svm, line 3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no sample in the file"),
        ("# nothing\n\n", "there is no sample in the file"),
        (b"1 1:2\n\x00\x01", "of an unknown format, and no text of samples"),
        (b"\x89HDF\r\n\x1a\n\0\0", r"it is an HDF5 file \(\.h5\), and no text of samples"),
        ("3 1:1\n5 1:1\n4 1:2\n", "the labels are 3, 4, 5; expected two different integers, or classes numbered"),
        ("9007199254740994 1:1\n1 1:1\n", r"found the label 9007199254740994; expected integers below 2\^53"),
        ("1 1:1\n-1 2:1\n", "the file has 2 samples, too few to hold out a fifth for testing"),
        ("".join(f"{k} 1:1\n" for k in range(6)), "each of the 6 samples has a label of its own"),
    ],
)
def test_texts_that_are_no_data_set_are_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        open_dataset(write(tmp_path, text), None)


def test_a_packed_text_that_repeats_itself_is_not_unpacked_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr("psmpi.data.files.UNPACKED_BYTES", 1 << 20)
    with pytest.raises(UserError, match="nearly all of it repeats itself"):
        open_all(write(tmp_path, gzip.compress(b"1 1:1\n" * 1_000_000), "own.svm.gz"))


def test_the_operations_on_all_bytes_agree_with_those_line_by_line():
    """On texts with one or two bytes changed both readers give the same samples, or both refuse."""
    rng, refused = np.random.default_rng(0), 0
    replacements = [*b"0123456789+-.eE:# \t\n,nx\x7f", 200]
    for trial in range(4000):
        text = bytearray(random_text(4, 6, seed=trial % 50, share=0.5)[0].encode())
        if trial % 3:
            text = text.replace(b"0.", b"4e-1")
        for _ in range(1 + trial % 2):
            text[rng.integers(len(text) - 1)] = replacements[rng.integers(len(replacements))]
        plain = svmtext.COMMENT.sub(b"", bytes(text))
        fast_rows = svmtext.fast(plain)
        try:
            expected = svmtext.by_line(plain, "own", 1)
        except UserError:
            assert fast_rows is None, plain
            refused += 1
            continue
        assert fast_rows is not None, plain
        assert fast_rows.real_line == expected.real_line
        for actual, reference in zip(fast_rows, expected, strict=True):
            np.testing.assert_array_equal(actual, reference)
    assert 1000 < refused < 3500


@pytest.mark.parametrize(
    ("labels", "known", "found", "outputs"),
    [
        (["-1", "+1", "-1"], (-1, 1), [0, 1, 0], 2),
        (["0", "1", "1"], (0, 1), [0, 1, 1], 2),
        (["2", "1", "2"], (1, 2), [1, 0, 1], 2),
        (["7", "-3", "7"], (-3, 7), [1, 0, 1], 2),
        (["1", "2", "3"], (1,), [0, 1, 2], 3),
        (["0", "2", "1"], (0,), [0, 2, 1], 3),
        (["5", "5", "5"], (5,), [0, 0, 0], 1),
        (["1.0", "2", "-3e-1"], (), [1.0, 2.0, -0.3], 1),
    ],
)
def test_labels_are_classes_or_values(tmp_path, labels, known, found, outputs):
    path = write(tmp_path, "".join(f"{label} 1:1\n" for label in labels))
    write(tmp_path, "".join(f"{label} 1:1\n" for label in labels[::-1]), "own.svm.t")
    data = open_dataset(path, None)
    assert data.train.numbering.labels == known and data.outputs == outputs
    assert data.train.targets.ravel().tolist() == found and data.test.targets.ravel().tolist() == found[::-1]
    assert data.task == ("classes" if known else "regression")


@pytest.mark.parametrize("block", [9, 1 << 20])
@pytest.mark.parametrize("label", ["1.5", "1.0", "1e0", "-.5"])
def test_a_test_label_that_is_no_integer_among_classes_is_refused_with_its_line(tmp_path, monkeypatch, label, block):
    monkeypatch.setattr(svmtext, "BLOCK", block)
    path = write(tmp_path, TEXT)
    tests = f"-1 1:0.5\n# none\n\n+1 2:1e2\n{label} 1:1\n-1\n2.5\n"
    write(tmp_path, tests, "own.svm.t")
    with pytest.raises(UserError, match=r"own\.svm\.t, line 5: .* write an integer here, .* own\.svm with a point"):
        open_dataset(path, None)
    # Both remedies of the message help, and all values of a test may be whole numbers.
    write(tmp_path, tests.replace(f"\n{label} ", "\n1 ").replace("2.5", "1"), "own.svm.t")
    assert open_dataset(path, None).task == "classes"
    for written in (tests, "1 1:1\n"):
        write(tmp_path, TEXT.replace("-1 3", "-1.0 3"))
        write(tmp_path, written, "own.svm.t")
        assert open_dataset(path, None).task == "regression"


@pytest.mark.parametrize("beside", ["own.svm.t", "own.t.svm", "own.svm.t.bz2", "own.t.svm.gz"])
def test_test_samples_lie_beside_and_have_the_same_features(tmp_path, beside):
    pack = {".bz2": bz2.compress, ".gz": gzip.compress}.get(beside[beside.rfind(".") :], bytes)
    path = write(tmp_path, TEXT)
    write(tmp_path, pack(b"-1 0:2 6:1\n+1 1:1\n"), beside)
    data = open_dataset(path, None)
    assert data.shape == data.test.shape == (7,) and not data.held_out
    np.testing.assert_allclose(data.train.compressed.dense()[:, 1:5], np.array(DENSE, np.float32))
    assert data.test.compressed.dense().tolist() == [[2, 0, 0, 0, 0, 0, 1], [0, 1, 0, 0, 0, 0, 0]]
    assert is_svmlight(beside) and open_all(str(tmp_path / beside)).n == 2
    write(tmp_path, TEXT, "own.svm.t.xz")
    with pytest.raises(UserError, match="the test samples may be those of own"):
        open_dataset(path, None)


def test_a_fifth_is_held_out_by_the_split_seed_and_named_by_its_number_in_the_file(tmp_path):
    text, dense, labels = random_text(200, 30)
    path = write(tmp_path, text)
    for seed in (0, 1, -1):
        data = open_dataset(path, None, seed)
        assert data.held_out and (data.train.n, data.test.n) == (160, 40)
        for split in (data.train, data.test):
            rows = [int(split.source.place(k).rpartition(" ")[2]) for k in range(split.n)]
            assert np.array_equal(split.read(np.arange(split.n)), dense[rows])
            assert np.array_equal(split.labels, labels[rows] > 0)
    assert rows == list(range(4, 200, 5))


def test_predicted_texts_are_numbered_as_those_that_were_trained_on(tmp_path):
    trained = open_dataset(write(tmp_path, TEXT), None).train.numbering
    assert trained == (1, (-1, 1), 4)
    path = write(tmp_path, "+1 1:3\n+1 2:1\n", "new.svm")
    split = open_split(path, None, "all", numbering=trained)
    assert split.labels.tolist() == [1, 1] and split.shape == (4,) and split.read([0])[0, 0] == 3
    unknown = open_split(write(tmp_path, "0 1:3\n0 2:1\n", "new.svm"), None, "all", numbering=trained)
    assert unknown.labels.tolist() == [-1, -1]
    with pytest.raises(UserError, match="sample 1 has the label 2; what the network was trained on has -1 and 1"):
        open_split(write(tmp_path, "1 1:3\n2 2:1\n", "new.svm"), None, "all", numbering=trained)
    with pytest.raises(UserError, match="found the index 0, and what the network was trained on has features numbered"):
        open_split(write(tmp_path, "1 0:3\n", "new.svm"), None, "all", numbering=trained)
    class_numbers = Numbering(0, (1,), 9)
    assert open_split(write(tmp_path, "3 1:3\n", "new.svm"), None, "all", numbering=class_numbers).labels.tolist() == [
        2
    ]
    with pytest.raises(UserError, match="sample 0 has the label -2; what the network was trained on has labels from 1"):
        open_split(write(tmp_path, "-2 1:3\n", "new.svm"), None, "all", numbering=class_numbers)
    table = identify(open_dataset(str(tmp_path / "own.svm"), None)).table()
    assert Identity.of(table).numbering == trained and table["numbering"] == {"first": 1, "labels": [-1, 1]}
    zero = Identity.of({**table, "numbering": {"first": 0, "labels": [-1, 1]}})
    assert differences(Identity.of(table), zero) == ["features numbered from 1, there from 0"]
    for wrong in ({"first": 2, "labels": []}, {"first": 1, "labels": ["x"]}, {"first": 1}, 3):
        with pytest.raises((ValueError, KeyError, TypeError)):
            Identity.of({**table, "numbering": wrong})


def test_a_text_is_trained_on_predicted_and_gone_on_with(tmp_path):
    text, _, labels = random_text(400, 30, seed=5)
    write(tmp_path, text)
    train = trainer(tmp_path)
    options = ("--model", "linear", "--loss", "hinge", "--method", "data_parallel", "--lr", "0.02", "--epochs", "8")
    options += ("--batch-size", "16")
    training = train(2, "--dataset", "own.svm", *options, out=tmp_path / "out")
    assert training.rows[-1]["test_accuracy"] > 0.85
    # Texts of one class with fewer features, or without labels, have the scores of the same samples in an array.
    for name, rows, zeros in (("few.svm", np.flatnonzero(labels > 0)[:9], False), ("none.svm", np.arange(7), True)):
        lines = [f"0 {line.split(' ', 1)[1]}" if zeros else line for line in text.splitlines()]
        write(tmp_path, "\n".join(" ".join(lines[k].split()[:3]) for k in rows), name)
        text_samples = open_split(str(tmp_path / name), None, "all", numbering=Numbering(1, (-1, 1), 30))
        np.savez(tmp_path / "few.npz", x=text_samples.compressed.dense(), y=np.maximum(labels[rows], 0))
        scores = []
        for data in (name, "few.npz"):
            status, stdout, err = run(
                1, "-m", "psmpi.predict", "out", "--dataset", data, "--split", "all", "--out", "p.npz", cwd=tmp_path
            )
            assert status == 0, err
            assert ("no accuracy" in stdout) == (zeros and data == name), stdout
            with np.load(tmp_path / "p.npz") as predictions:
                scores.append(predictions["scores"])
        np.testing.assert_allclose(scores[0], scores[1], rtol=1e-5, atol=1e-6)
    train(1, "--resume", "out", "--epochs", "9", out=tmp_path / "out")
    write(tmp_path, text.replace("-1 ", "2 "), "own.svm")
    resume_options = ("--resume", "out", "--epochs", "10", "--new-data", "--out", "out")
    status, _, err = run(1, "-m", "psmpi.train", *resume_options, cwd=tmp_path)
    assert status != 0 and "numbered otherwise" in err and "the labels -1 and 1, there 1 and 2" in err, err


# Compressed rows in arrays.


def arrays(matrix, key="x"):
    parts = {"data": matrix.data, "indices": matrix.indices, "indptr": matrix.indptr, "shape": matrix.shape}
    return {f"{key}_{part}": np.asarray(values) for part, values in parts.items()}


@pytest.fixture
def matrix():
    return scipy.sparse.random(50, 20, 0.2, "csr", random_state=0)


@pytest.mark.parametrize("kind", ["npz", "packed npz", "h5"])
def test_matrices_of_scipy_are_read(tmp_path, matrix, kind):
    y, contents = np.arange(50) % 3, {}
    contents = {**arrays(matrix), "y": y, **arrays(matrix[:7], "x_test"), "y_test": y[:7]}
    if kind == "h5":
        import h5py

        path = tmp_path / "own.h5"
        with h5py.File(path, "w") as file:
            for name, values in contents.items():
                file[name] = values
    else:
        path = tmp_path / "own.npz"
        (np.savez_compressed if kind == "packed npz" else np.savez)(path, **contents)
    data = open_dataset(str(path), None)
    assert data.shape == (20,) and data.outputs == 3 and data.train.compressed.dtype == np.float64
    assert np.array_equal(data.train.compressed.dense(), matrix.toarray())
    assert np.array_equal(data.test.read(np.arange(7)), matrix.toarray()[:7])
    assert data.train.source.place(3) == f"{path}, x: sample 3"
    np.savez(path.with_suffix(".npz"), **arrays(matrix), y=y)
    half = open_dataset(str(path.with_suffix(".npz")), None)
    assert half.held_out and half.train.n + half.test.n == 50
    np.savez(path.with_suffix(".npz"), **arrays(matrix))
    assert open_split(str(path.with_suffix(".npz")), None, "all").labels.tolist() == [-1] * 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_shape": None}, "no array 'x_shape', beside x_data, x_indices, x_indptr"),
        ({"x": np.zeros((50, 20))}, "found x too, beside x_data"),
        ({"lengths": np.ones(50, int)}, "found lengths beside sparse samples"),
        ({"x_shape": np.array([50.0, 20.0])}, "x_shape is float64 of shape"),
        ({"x_shape": np.array([50, 20, 1])}, r"x_shape is int64 of shape \(3,\)"),
        ({"x_shape": np.array([49, 20])}, "x_indptr has 51 numbers and x_shape says 49 samples"),
        ({"x_shape": np.array([50, 3])}, "expected 0 to 2, as there are 3 features"),
        ({"x_data": np.ones((2, 100))}, r"x_data is float64 of shape \(2, 100\); expected a vector of numbers"),
        ({"x_data": np.array(["a"] * 200)}, "x_data is <U1 of shape"),
        ({"x_indices": np.ones(200)}, "x_indices is float64 of shape .* expected a vector of integers"),
        ({"x_indptr": np.zeros(51, int)}, "expected them to ascend from 0 to the number of entries"),
        ({"y": np.zeros(49, int)}, "49 labels in y for 50 samples in x"),
        ({"x_test": np.zeros((5, 20)), "y_test": np.zeros(5, int)}, "one of x and x_test is sparse"),
    ],
)
def test_arrays_that_are_no_matrix_are_refused(tmp_path, matrix, change, message):
    contents = {**arrays(matrix), "y": np.arange(50) % 3, **change}
    np.savez(tmp_path / "own.npz", **{name: values for name, values in contents.items() if values is not None})
    with pytest.raises(UserError, match=message):
        open_dataset(str(tmp_path / "own.npz"), None)


def test_a_matrix_without_labels_is_told_how_to_be_saved_with_them(tmp_path, matrix):
    scipy.sparse.save_npz(tmp_path / "own.npz", matrix)
    with pytest.raises(UserError, match=r"as scipy\.sparse\.save_npz writes it, .* np\.savez\(NAME, x_data="):
        open_dataset(str(tmp_path / "own.npz"), None)


def test_ranks_with_private_texts_are_refused(tmp_path):
    data = open_dataset(write(tmp_path, TEXT), None)
    with pytest.raises(UserError, match="--private-data: a text of sparse samples"):
        together(data, [card(identify(data))] * 2, 0)
