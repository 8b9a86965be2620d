"""Tables of comma-separated values."""

import csv
import gzip
import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from psmpi.data import open_dataset, open_split, tabletext
from psmpi.data.tabletext import Form, by_record, fast
from psmpi.errors import UserError

FLOWERS = """sepal length,sepal width,species
5.1,3.5,setosa
4.9,-3e-1,virginica
4.7,.5,setosa
4.6,3.,"ver, sicolor"
5.0,+3.6,virginica
"""


def write(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_a_table_has_samples_and_names_of_classes(tmp_path: Path) -> None:
    split = open_split(write(tmp_path / "flowers.csv", FLOWERS), None, "all")
    assert split.names == ("setosa", "ver, sicolor", "virginica") and split.labels.tolist() == [0, 2, 0, 1, 2]
    expected = [[5.1, 3.5], [4.9, -0.3], [4.7, 0.5], [4.6, 3], [5, 3.6]]
    read = split.read(np.arange(5))
    assert read.dtype == np.float32 and np.array_equal(read, np.array(expected, np.float32))
    data = open_dataset(str(tmp_path / "flowers.csv"), None)
    assert (data.train.n, data.test.n, data.outputs, data.held_out) == (4, 1, 3, True)


@pytest.mark.parametrize(
    ("text", "label", "x", "y"),
    [
        ("1,2,0\n3,4,1\n", "", [[1, 2], [3, 4]], [0, 1]),
        ("1,2,0\n3,4,1\n", "1", [[2, 0], [4, 1]], [1, 3]),
        ("a,b,c\n1,2,0\n3,4,1\n", "", [[1, 2], [3, 4]], [0, 1]),
        ("a,Class,c\n1,2,0\n3,4,1\n", "", [[1, 0], [3, 1]], [2, 4]),
        ("a,y,label\n1,2,0\n3,4,1\n", "", [[1, 2], [3, 4]], [0, 1]),
        ("a,y,label\n1,2,0\n3,4,1\n", "y", [[1, 0], [3, 1]], [2, 4]),
        ("a,y,label\n1,2,0\n3,4,1\n", "1", [[2, 0], [4, 1]], [1, 3]),
        ("0,1,label\n1,2,cat\n3,4,dog\n", "", [[1, 2], [3, 4]], ["cat", "dog"]),
        ("1,2,0\n3,4,1\n", "2", [[1, 0], [3, 1]], [2, 4]),
        ("1;2;0\r\n3;4;1\r\n", "", [[1, 2], [3, 4]], [0, 1]),
        ("1\t2\t0\n3\t4\t1", "", [[1, 2], [3, 4]], [0, 1]),
        ("\ufeffa,b\n\n 1 , cat\n\n2,dog \n\n", "", [[1], [2]], ["cat", "dog"]),
        ('"a","b"\n"1","cat"\n"2","a ""dog"""\n', "", [[1], [2]], ["cat", 'a "dog"']),
        ('"a\nb","c"\n1,"0"\n2,"1"\n', "", [[1], [2]], [0, 1]),
        ("1,0.5\n2,7\n", "", [[1], [2]], [0.5, 7.0]),
        ("1,True,cat\n0,FALSE,dog\n", "", [[1, 1], [0, 0]], ["cat", "dog"]),
        ("1,True\n0,false\n", "", [[1], [0]], ["True", "false"]),
        ("1,1\n0,2\n3,a\n", "", [[1], [0], [3]], ["1", "2", "a"]),
        ("1,a b\n0,c\n", "", [[1], [0]], ["a b", "c"]),
        ("1,5\n0,-7\n", "", [[1], [0]], [5, -7]),
    ],
)
@pytest.mark.parametrize("block", [4, 1 << 20])
def test_tables_of_all_forms_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, label: str, x: Any, y: Any, block: int
) -> None:
    monkeypatch.setattr(tabletext, "BLOCK", block)
    split = open_split(write(tmp_path / "own.csv", text), None, "all", label=label)
    assert np.array_equal(split.read(np.arange(len(x))), np.array(x, np.float32))
    if isinstance(y[0], float):
        assert split.targets.tolist() == [[target] for target in y]
    else:
        assert ([split.names[k] for k in split.labels] if split.names else split.labels.tolist()) == (
            list(map(str, y)) if split.names else y
        )


def test_records_are_those_of_pythons_csv(tmp_path: Path) -> None:
    """Numbers, and labels with delimiters, quotes and newlines, as the csv module writes them in all its ways."""
    rng = random.Random(0)
    for case in range(60):
        n, features = rng.randint(1, 30), rng.randint(1, 5)
        values = [[rng.choice([rng.uniform(-9, 9), rng.randint(-99, 99)]) for _ in range(features)] for _ in range(n)]
        labels = [rng.choice(["a", "b c", 'd"e', "f,g", "h\ni", "é", "1"]) for _ in range(n)] + ["z"]
        values.append([0.5] * features)
        buffer = io.StringIO(newline="")
        quoting = rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
        end = rng.choice(["\n", "\r\n"])
        writer = csv.writer(buffer, quoting=quoting, lineterminator=end)
        writer.writerow([f"f{k}" for k in range(features)] + ["label"])
        writer.writerows([*row, label] for row, label in zip(values, labels, strict=True))
        split = (
            open_split(write(tmp_path / f"{case}.csv", buffer.getvalue()), None, "all")
            if "h\ni" not in labels
            else None
        )
        if split is None:
            # No name has a newline.
            with pytest.raises(UserError, match="printable"):
                open_split(write(tmp_path / f"{case}.csv", buffer.getvalue()), None, "all")
            continue
        assert [split.names[k] for k in split.labels] == labels
        assert np.array_equal(split.read(np.arange(n + 1)), np.array(values, np.float32))


def test_blocks_are_read_as_records_are_one_by_one() -> None:
    """Random fields that the fast reader accepts have the values that the csv module and float() read."""
    rng, compared = random.Random(1), 0
    for _ in range(4000):
        fields = [
            "1",
            "-2.5",
            "3e2",
            ".5",
            "+1",
            "x",
            "",
            "nan",
            "1.2.3",
            "1-2",
            "1 2",
            "e",
            "--1",
            "1e5",
            '"7"',
            "true",
            "0x1",
            "1_0",
            "inf",
        ]
        weights = [8, 8, 4, 4, 4] + [1] * 14
        rows = [",".join(rng.choices(fields, weights, k=2)) for _ in range(rng.randint(1, 3))]
        text = ("\n".join(rows) + "\n").encode()
        for form in (Form(",", ("", ""), -1), Form(",", ("", ""), 1), Form(",", ("", ""), 1, True)):
            fast_rows = fast(text, form)
            if fast_rows is None:
                continue
            compared += 1
            expected = by_record(text, form, "t", 1)
            assert (
                np.array_equal(fast_rows.values, expected.values)
                and fast_rows.labels.tolist() == expected.labels.tolist()
            )
            assert fast_rows.real == expected.real
    assert compared > 1000


@pytest.mark.parametrize(
    ("text", "label", "says"),
    [
        ("a,b,c\n1,Paris,0\n2,Rome,1\n", "", r"line 2, column 2 \(b\): found 'Paris', .*get_dummies.*--label b"),
        ("1,2,0\n2,x,1\n", "", "line 2, column 2: found 'x', and features are numbers"),
        ("1,2,0\n,3,1\n", "", r"line 2, column 1: the value is missing \(''\)"),
        ("a,b,c\n1,2,0\n\n1,NaN,0\n", "", r"line 4, column 2 \(b\): the value is missing \('NaN'\)"),
        ("a,b,c\n1,2,cat\n1,3,\n", "", r"line 3, column 3 \(c\): the value is missing"),
        ("a,b,c\n1,2,cat\n1,3,NA\n", "", r"line 3, column 3 \(c\): the value is missing"),
        ("1,2,0\n1,inf,1\n", "", "line 2, column 2: found 'inf': write a finite number"),
        ("1,2,0\n1,1e39,1\n", "", "line 2, column 2: found '1e39', beyond 3.4e\\+38"),
        ("1,2,0\n1,1\n", "", "line 2: 2 fields, and the first line has 3"),
        ("1,2,0\n1,1,1,1\n", "", "line 2: 4 fields"),
        ('1,2,0\n1,"1,1\n', "", "line 2: 2 fields"),
        (",a,label\n0,1,2\n", "", "column 1 has no name .*index=False"),
        ("a,a,label\n0,1,2\n", "", "columns 1 and 2 are both called 'a'"),
        ("a,b,c\n0,1,2\n", "d", r"--label d: .* 3 columns \(columns a, b, c\): give the name of one, or its number"),
        ("0,1,2\n", "4", r"--label 4: .* 3 columns \(no names\)"),
        ("0,1,2\n", "0", "--label 0"),
        ("0\n1\n", "", "1 column; expected features and a label"),
        ("", "", "no sample in the file"),
        ("\n\n", "", "no sample in the file"),
        ("a,b\n", "", "no sample in the file but the names of columns"),
        (b"1,2\n3,\xff\n", "", "line 2: the byte 0xff is not UTF-8"),
        ("1,2\n".encode("utf-16"), "", "no table in UTF-8"),
        (b"PK\3\4\0\0", "", "it is a zip file"),
        ("1,9007199254740993\n1,9007199254740994\n", "", "found the label .* expected integers below"),
        ("1," + "a" * 500 + "\n2,b\n", "", "a label of 500 bytes"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, text: str | bytes, label: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        open_split(write(tmp_path / "own.csv", text), None, "all", label=label)


def test_a_quoted_field_without_end_is_refused_before_it_fills_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tabletext, "BLOCK", 1000)
    monkeypatch.setattr(tabletext, "LONG", 5000)
    with pytest.raises(UserError, match=r"line 1: a record of more than .* is a quoted field not closed"):
        open_split(write(tmp_path / "own.csv", '1,"a\n' + "2,b\n" * 9000), None, "all")


def test_a_table_beside_has_the_test_samples(tmp_path: Path) -> None:
    write(tmp_path / "own.csv", "a,b,label\n1,2,cat\n3,4,dog\n")
    write(tmp_path / "own_test.csv", "a,b,label\n5,6,eel\n")
    data = open_dataset(str(tmp_path / "own.csv"), None)
    assert data.train.names == ("cat", "dog", "eel") and data.test.labels.tolist() == [2] and not data.held_out
    write(tmp_path / "own_test.csv", "a,c,label\n5,6,eel\n")
    with pytest.raises(UserError, match=r"column 2 \(c\), in own.csv column 2 \(b\)"):
        open_dataset(str(tmp_path / "own.csv"), None)
    write(tmp_path / "own_test.csv", "a,label\n5,eel\n")
    with pytest.raises(UserError, match=r"has 2 columns, own\.csv 3"):
        open_dataset(str(tmp_path / "own.csv"), None)


def test_a_table_without_labels_is_known_by_its_columns(tmp_path: Path) -> None:
    name = write(tmp_path / "new.csv", "a,b\n1,2\n3,4\n")
    split = open_split(name, None, "all", features=2, names=("cat", "dog"))
    assert split.labels.tolist() == [-1, -1] and split.names == ("cat", "dog")
    assert np.array_equal(split.read(np.arange(2)), [[1, 2], [3, 4]])
    says = "no column of labels or values; found x; to predict samples without labels or values add --split"
    with pytest.raises(UserError, match=says):
        open_split(name, None, "test", features=2, predicted=True)


def test_packed_tables_are_read(tmp_path: Path) -> None:
    (tmp_path / "own.csv.gz").write_bytes(gzip.compress(FLOWERS.encode()))
    assert open_split(str(tmp_path / "own.csv.gz"), None, "all").n == 5
    (tmp_path / "own.csv").write_bytes(gzip.compress(FLOWERS.encode()))
    with pytest.raises(UserError, match="no table in UTF-8"):
        open_split(str(tmp_path / "own.csv"), None, "all")
    with pytest.raises(UserError, match=r"--label 1: of a\.npz the array y has the labels"):
        np.savez(tmp_path / "a.npz", x=np.zeros((5, 1)), y=np.arange(5) % 2)
        open_dataset(str(tmp_path / "a.npz"), None, label="1")


def test_features_of_a_network_are_found_by_their_names(tmp_path: Path) -> None:
    """Features are found in any column; without names in the first line they are taken by position."""
    known = ("a", "b", "c")
    expected = np.array([[1, 2, 3], [4, 5, 6]], np.float32)

    def read(text: str, label: str = "") -> tuple[Any, Any]:
        (tmp_path / "new.csv").write_text(text)
        where = (str(tmp_path / "new.csv"), None, "all", 0, 64, label)
        split = open_split(*where, names=("x", "y"), features=3, columns=known)
        return split.read(np.arange(split.n)), split.labels.tolist()

    for text in ("a,b,c\n1,2,3\n4,5,6\n", "c,a,b\n3,1,2\n6,4,5\n", "1,2,3\n4,5,6\n"):
        values, labels = read(text)
        assert np.array_equal(values, expected) and labels == [-1, -1]
    for text, label in (("c,kind,b,a\n3,y,2,1\n6,x,5,4\n", "kind"), ("kind,c,b,a\ny,3,2,1\nx,6,5,4\n", "other")):
        values, labels = read(text, label)
        assert np.array_equal(values, expected) and labels == [1, 0]
    for text, label, says in (
        ("a,b\n1,2\n", "kind", "no column 'c'; the network was trained on a, b, c, and the table has a, b"),
        ("a,b,d\n1,2,3\n", "", "no column 'c'"), ("a,b,c,d,e\n1,2,3,4,x\n", "", "2 columns more, d, e"),
        ("a,b,c,d,e\n1,2,3,4,x\n", "e", "the column 'd' is no feature"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says):
            read(text, label)
    (tmp_path / "own.csv").write_text("a,kind,b,c\n" + "1,x,2,3\n4,y,5,6\n" * 6)
    assert open_dataset(str(tmp_path / "own.csv"), None, 0, 64, "kind").test.columns == known
