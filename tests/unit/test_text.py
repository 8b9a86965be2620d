"""Texts as data sets: windows of characters, their targets, and refused files."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from psmpi.checkpoint import Contents
from psmpi.data import Resident, differences, find_doubts, identify, open_dataset, open_split
from psmpi.data.text import MOST, encode
from psmpi.errors import UserError
from psmpi.layout import Layout

SONG = "The ö of the ship\r\nand the 😀 of the sea\n" * 60


def save(tmp_path, content, name="song.txt"):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def words(dataset, tokens):
    return "".join(dataset.train.characters[int(k)] for k in np.ravel(tokens))


@pytest.mark.parametrize("context", [1, 7, 64])
@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
def test_windows_follow_each_other_and_targets_are_the_next_characters(tmp_path, monkeypatch, context, chunk):
    """Windows equal slices of the string, for any size of the chunks that are read."""
    monkeypatch.setattr("psmpi.data.text.CHUNK_BYTES", chunk)
    dataset = open_dataset(save(tmp_path, SONG), None, context=context)
    assert dataset.train.characters == "".join(sorted(set(SONG)))
    assert dataset.outputs == dataset.train.vocabulary == len(set(SONG)) and dataset.shape == (1, context)
    edge = len(SONG) - len(SONG) // 10
    for split, part in ((dataset.train, SONG[:edge]), (dataset.test, SONG[edge:])):
        assert split.tokens and split.by_step and split.lengths is None
        assert split.n == (len(part) - 1) // context
        for k in (0, 1, split.n - 1):
            start = k * context
            assert words(dataset, split.read([k])) == part[start : start + context]
            assert words(dataset, split.targets[k]) == part[start + 1 : start + 1 + context]
    resident = Resident(dataset.train, np.arange(dataset.train.n), np.float32)
    batch = resident.batch(np.array([3, 1]), np.empty(2 * context, np.float32))
    assert (
        batch.targets.dtype == np.int64 and batch.targets.shape == (context, 2) and batch.inputs.shape == (context, 2)
    )
    assert words(dataset, batch.inputs[:, 1]) == SONG[context : 2 * context]
    assert words(dataset, batch.targets[:, 0]) == SONG[3 * context + 1 : 4 * context + 1]


def test_all_is_the_whole_text_and_given_characters_number_it(tmp_path):
    path = save(tmp_path, SONG)
    all_windows = open_split(path, None, "all", context=10)
    assert all_windows.n == (len(SONG) - 1) // 10
    larger_alphabet = "".join(sorted({*SONG, "A", "z"}))
    dataset = open_dataset(path, None, context=10, characters=larger_alphabet)
    assert dataset.outputs == len(larger_alphabet) and words(dataset, dataset.train.read([2])) == SONG[20:30]
    with pytest.raises(UserError, match=r"the character 'ö' \(U\+00F6\) is not among the"):
        open_dataset(path, None, characters="".join(sorted(set(SONG) - {"ö"})))
    np.testing.assert_array_equal(encode("ab a", " ab"), [1, 2, 0, 1])
    with pytest.raises(UserError, match=r"the character '\\x07' \(U\+0007\) is not among the 3 that"):
        encode("a\a", " ab")


def test_a_text_is_as_it_is_in_the_file(tmp_path):
    """A byte-order mark at the beginning is dropped; elsewhere it is a character."""
    plain, marked = (open_dataset(save(tmp_path, content), None) for content in (SONG, b"\xef\xbb\xbf" + SONG.encode()))
    assert "\r" in plain.train.characters and identify(plain) == identify(marked)
    within = open_dataset(save(tmp_path, "\ufeff" + SONG + "\ufeff"), None)
    assert "\ufeff" in within.train.characters
    control = open_dataset(save(tmp_path, ("\0\x1b[31m\x7f\u2028" + "a" * 100_000) * 3), None)
    assert control.train.characters[0] == "\0" and control.train.n > 4000


def test_a_text_takes_one_or_two_bytes_a_character(tmp_path):
    path = save(tmp_path, "abcdefgh" * 250_000)
    tracemalloc.start()
    dataset = open_dataset(path, None)
    current, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert dataset.train.targets.dtype == np.int8 and current < 2.2e6 and peak < 20e6, (current, peak)
    wide = open_dataset(save(tmp_path, "".join(map(chr, range(0x4E00, 0x5300))) * 2), None)
    assert wide.train.targets.dtype == np.int16 and wide.train.targets.base is not None


@pytest.mark.parametrize(
    ("content", "context", "parts"),
    [
        (b"", 64, ["the text is empty", "650 characters or more"]),
        (b"\xef\xbb\xbf", 64, ["the text is empty"]),
        ("a" * 1000, 64, ["all 1,000 characters are 'a' (U+0061)", "give another text"]),
        (b"ab" * 400 + b"\xe9t\xe9", 64, ["byte 800 (counted from 0) is 0xe9", "iconv -f LATIN1 -t UTF-8"]),
        (b"ab" * 400 + "é".encode()[:1], 64, ["byte 800 (counted from 0) is 0xc3"]),
        ("ab".encode("utf-16") * 400, 64, ["UTF-16 or UTF-32", "iconv -f UTF-16"]),
        (
            "ab" * 10,
            64,
            ["20 characters, of which the last tenth, 2", "takes 65", "--context 1 or less", "650 or"],
        ),
        ("ab" * 9, 64, ["18 characters", ": use a text of 650 or more"]),
        ("ab" * 324, 64, ["648 characters, of which the last tenth, 64", "--context 63 or less"]),
        ("ab" * 1000, 5000, ["takes 5001", "--context 199 or less", "50,010 or more"]),
        ("".join(map(chr, range(0x10000, 0x10000 + MOST + 1))), 64, ["32,769 distinct characters", "32,768 at most"]),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, content, context, parts):
    path = save(tmp_path, content)
    with pytest.raises(UserError) as error:
        open_dataset(path, None, context=context)
    for part in (path, *parts):
        assert part in str(error.value)


def test_windows_just_fit(tmp_path):
    dataset = open_dataset(save(tmp_path, "ab" * 325), None)
    assert dataset.train.n == 9 and dataset.test.n == 1
    with pytest.raises(UserError, match="8 characters, and a window of 8 takes 9"):
        open_split(save(tmp_path, "ab" * 4), None, "all", context=8)
    assert open_split(save(tmp_path, "ab" * 4), None, "all", context=7).n == 1


def test_files_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UserError, match=r"folder.txt: a directory, and not a file"):
        open_dataset("folder.txt", tmp_path)
    with pytest.raises(UserError, match=r"none.txt: no such file in"):
        open_dataset("none.txt", tmp_path)
    path = save(tmp_path, SONG)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(UserError, match=r"the file cannot be read \(Permission denied\)"):
        open_dataset(path, None)


def test_a_text_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    from psmpi.data import text

    path = save(tmp_path, SONG)
    real = text._code_points
    for changed in (SONG + "the", SONG[:-1], SONG.replace("T", "?")):
        calls = iter((SONG, changed))

        def points(source, calls=calls):
            yield from real(type(source)(save(tmp_path, next(calls))))

        monkeypatch.setattr(text, "_code_points", points)
        with pytest.raises(UserError, match="was changed while it was read"):
            open_dataset(path, None)


def test_malformed_files_are_refused_or_read_whole(tmp_path):
    """Bytes are flipped, cut and inserted at random: what Python decodes is read, and errors name Python's byte."""
    rng = np.random.default_rng(0)
    base, refused = bytearray(SONG.encode()), 0
    for k in range(60):
        data = bytearray(base)
        for _ in range(int(rng.integers(1, 4))):
            position = int(rng.integers(len(data)))
            kind = rng.integers(4)
            if kind == 0:
                data[position] ^= 1 << int(rng.integers(8))
            elif kind == 1:
                del data[position : position + int(rng.integers(1, 400))]
            elif kind == 2:
                data[position:position] = rng.bytes(int(rng.integers(1, 5)))
            else:
                data = data[: position + 1]
        path = save(tmp_path, bytes(data), f"{k}.txt")
        try:
            text = bytes(data).decode()
        except UnicodeDecodeError as error:
            refused += 1
            with pytest.raises(
                UserError, match=rf"byte {error.start:,} \(counted from 0\) is {data[error.start]:#04x}"
            ):
                open_dataset(path, None, context=5)
            continue
        if len(text) < 70:
            with pytest.raises(UserError):
                open_dataset(path, None, context=5)
            continue
        dataset = open_dataset(path, None, context=5)
        assert words(dataset, dataset.train.read(np.arange(9))) == text.removeprefix("\ufeff")[:45]
    assert 10 < refused < 55


def test_the_identity_is_of_the_characters_too(tmp_path):
    """The identity differs for other letters in the same places, for one changed letter, and for another window."""
    identity = identify(open_dataset(save(tmp_path, SONG), None))
    assert identify(open_dataset(save(tmp_path, SONG, "other.txt"), None)) == identity
    for changed in (SONG.replace("😀", "😁"), SONG[:500] + "a" + SONG[501:], SONG[:-500] + "a" + SONG[-499:]):
        assert differences(identity, identify(open_dataset(save(tmp_path, changed, "other.txt"), None)))
    assert differences(identity, identify(open_dataset(save(tmp_path, SONG), None, context=32)))


def test_characters_of_the_test_alone_are_told(tmp_path):
    rng = np.random.default_rng(0)
    text = "".join(rng.choice(list("abcd "), 5000))
    assert list(find_doubts(open_dataset(save(tmp_path, text), None))) == []
    (doubt,) = find_doubts(open_dataset(save(tmp_path, text[:-300] + "xyzuvwuuuu" + text[-290:]), None))
    assert doubt.startswith("6 characters of the last tenth of the text, ") and "'u' (U+0075), 'v'" in doubt
    assert doubt.endswith("and 1 more")


def test_checkpoints_hold_the_characters():
    characters = "".join(sorted('\0\x1b"\\ aé\u2028😀'))
    contents = Contents("", (1, 4), Layout((), (), len(characters)), by_step=True, characters=characters)
    texts = contents.texts()
    assert texts["characters"].isascii() and Contents.of(texts).characters == characters
    assert "characters" not in replace(contents, characters="").texts()
    for wrong in ('"ab"', "7", '["a"]', '"' + "b" * len(characters) + '"', '"' + "a" * 400_000 + '"', '"\\ud800"'):
        with pytest.raises((ValueError, TypeError)):
            Contents.of({**texts, "characters": wrong})
