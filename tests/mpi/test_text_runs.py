"""Trainings on texts: equal on any ranks, resumed on the same text only, predictions, and continuations of prompts."""

import json
from dataclasses import replace
from itertools import islice
from math import log

import numpy as np
import pytest
from helpers.runs import Trained, distance, run

from psmpi.backend import NumpyOps
from psmpi.checkpoint import read_contents
from psmpi.config import read_file
from psmpi.errors import UserError
from psmpi.nn.layers.workspace import Span
from psmpi.training import continuation
from psmpi.training.continuation import choose, go_on, load_model

LINE = "pack my box with five dozen jugs é\n"
OPTIONS = ("--model", "lstm", "--method", "data_parallel", "--loss", "nll", "--context", "12", "--threads", "1")


def failed(module, *options, ranks=1):
    status, _, err = run(ranks, "-m", module, *options)
    assert status == 1 and "Traceback" not in err and err.count("error: ") == 1, err
    return " ".join(err.split())


def train_on(ranks, text, out, *options):
    words = ("--dataset", text, "--out", out, *OPTIONS, *options)
    status, stdout, err = run(ranks, "-m", "psmpi.train", *words)
    assert status == 0, err
    return Trained(out, stdout)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """A training that has learnt a text of one repeated line by heart, and the path of the text."""
    folder = tmp_path_factory.mktemp("learnt")
    (folder / "lines.txt").write_text(LINE * 120)
    options = ("--widths", "32", "--epochs", "8", "--batch-size", "10", "--lr", "0.01")
    return train_on(1, folder / "lines.txt", folder / "run", *options), folder / "lines.txt"


def test_the_vocabulary_is_that_of_the_text(learnt):
    trained, _ = learnt
    config = read_file(str(trained.out / "config.toml"))
    assert config.model.vocabulary == len(set(LINE)) and config.data.context == 12
    contents = read_contents(trained.checkpoint)
    assert contents.characters == "".join(sorted(set(LINE))) and contents.by_step and contents.in_shape == (1, 12)
    assert trained.rows[-1]["test_accuracy"] > 0.9 and trained.rows[-1]["test_loss"] < log(2) / 2
    status, out, _ = run(1, "-m", "psmpi.inspect", "show", trained.out)
    assert status == 0 and f"a text of {len(set(LINE))} characters" in " ".join(out.split())
    status, out, err = run(1, "-m", "psmpi.predict", trained.out)
    assert status == 0 and "'é'" in out, err
    status, out, err = run(2, "-m", "psmpi.predict", trained.out, "--json")
    assert status == 0 and json.loads(out)["accuracy"] == trained.rows[-1]["test_accuracy"], err


def test_texts_train_the_same_on_any_ranks_and_resumed(tmp_path):
    (tmp_path / "lines.txt").write_text(LINE * 40)
    small_options = ("--dtype", "float64", "--widths", "6", "5", "--epochs", "1", "--batch-size", "10", "--lr", "0.01")
    one_rank, three_ranks = (
        train_on(ranks, tmp_path / "lines.txt", tmp_path / f"run{ranks}", *small_options) for ranks in (1, 3)
    )
    assert distance(one_rank.tensors(), three_ranks.tensors()) <= 1e-9
    for method in ("wavefront", "bptt"):
        # These methods read targets from the data set themselves.
        other_method = train_on(1, tmp_path / "lines.txt", tmp_path / method, *small_options, "--method", method)
        assert other_method.rows[-1]["test_loss"] == pytest.approx(one_rank.rows[-1]["test_loss"], rel=1e-2)
    train_on(1, tmp_path / "lines.txt", tmp_path / "cut", *small_options, "--max-steps", "5")
    status, _, err = run(2, "-m", "psmpi.train", "--out", tmp_path / "cut", "--resume", "auto", "--max-steps", "0")
    assert status == 0, err
    assert distance(one_rank.tensors(), Trained(tmp_path / "cut", "").tensors()) <= 1e-9


def test_a_run_goes_on_with_its_own_text_alone(learnt, tmp_path):
    trained, _ = learnt
    resume_options = ("--out", tmp_path / "run", "--resume", trained.checkpoint, "--epochs", "9")
    (tmp_path / "other.txt").write_text(LINE.replace("é", "è") * 120)
    message = failed("psmpi.train", *resume_options, "--dataset", tmp_path / "other.txt")
    assert (
        "other.txt is not the data set that checkpoint" in message and "other labels of the training samples" in message
    )
    message = failed("psmpi.train", *resume_options, "--dataset", "digits:rows")
    assert "digits:rows is not the data set that checkpoint" in message and "--context" not in message
    message = failed("psmpi.train", *resume_options, "--dataset", tmp_path / "other.txt", "--new-data")
    assert "is of a text of 26 characters" in message and "that has exactly the same ones" in message
    (tmp_path / "same.txt").write_text((LINE[5:] + LINE[:5]) * 120)
    words = (*resume_options, "--dataset", tmp_path / "same.txt", "--new-data", "--max-steps", "1")
    status, _, err = run(1, "-m", "psmpi.train", *words)
    assert status == 0, err


def test_other_texts_are_predicted_in_the_characters_that_were_learnt(learnt, tmp_path):
    """A text of fewer characters is encoded with the training's numbers of characters."""
    trained, _ = learnt
    (tmp_path / "few.txt").write_text("box with five jugs\n" * 100)
    options = (trained.out, "--dataset", tmp_path / "few.txt", "--split", "all", "--json", "--out", tmp_path / "p.npz")
    status, _, err = run(1, "-m", "psmpi.predict", *options)
    assert status == 0, err
    characters = read_contents(trained.checkpoint).characters
    labels = np.load(tmp_path / "p.npz")["labels"]
    assert "".join(characters[k] for k in labels[0]) == "ox with five"
    (tmp_path / "new.txt").write_text(LINE.replace("x", "X") * 100)
    message = failed("psmpi.predict", trained.out, "--dataset", tmp_path / "new.txt")
    assert "the character 'X' (U+0058) is not among the 26 that the network has been trained on" in message


def going_on(*options):
    status, out, err = run(1, "-m", "psmpi.predict", *options)
    assert status == 0 and err == "", err
    return out


def test_a_prompt_is_gone_on_with(learnt):
    trained, _ = learnt
    for prompt in ("p", "pack my", LINE[-20:] + "pack"):
        out = going_on(trained.out, "--prompt", prompt, "--characters", "80", "--temperature", "0")
        assert out[: len(prompt)] == prompt and len(out) == len(prompt) + 81 and out[-1] == "\n"
        start = (LINE * 3).index(prompt)
        assert out[:-1] == (LINE * 6)[start : start + len(out) - 1]
    continuations = {
        seed: going_on(trained.out, f"--prompt={'p'}", "--temperature", "3", "--seed", seed, "--characters", "60")
        for seed in ("0", "1")
    }
    assert continuations["0"] != continuations["1"]
    assert continuations["0"] == going_on(trained.out, "--prompt", "p", "--temperature", "3", "--characters", "60")
    assert continuations["0"].startswith(
        going_on(trained.out, "--prompt", "p", "--temperature", "3", "--characters", "9")[:-1]
    )


def test_each_character_is_of_a_pass_over_the_window_before_it(learnt):
    """Compare with passes of another model over the last characters without padding; buffers are allocated once."""
    trained, _ = learnt
    contents = read_contents(trained.checkpoint)
    model, other_model = (load_model(trained.checkpoint, contents, NumpyOps(), 10**9) for _ in range(2))
    text, following = "five jugs", go_on(model, contents.characters, "five jugs", 0.8, 5)
    rooms = set()
    for count in range(20):
        tokens = np.array([contents.characters.index(c) for c in text[-12:]], np.float32)
        scores = other_model.forward(tokens.reshape(1, -1, 1), None, Span()).scores[:, -1, 0]
        character = next(following)
        rooms.add(id(model.room))
        assert character == contents.characters[choose(scores, 0.8, 5, count)]
        text += character
    assert len(rooms) == 1


def test_windows_are_no_longer_than_the_text(learnt):
    """A checkpoint may claim windows of any length."""
    trained, _ = learnt
    contents = read_contents(trained.checkpoint)
    continuations = []
    for steps in (12, 10**12):
        model = load_model(trained.checkpoint, replace(contents, in_shape=(1, steps)), NumpyOps(), 11)
        assert model.in_shape == (1, 11)
        continuations.append("".join(islice(go_on(model, contents.characters, "pack", 1.0, 3), 7)))
    assert continuations[0] == continuations[1]


def test_characters_are_drawn_from_the_softmax():
    scores = np.array([1.0, -2.0, 3.0, 2.5, -9.0], np.float32)
    for temperature in (0.7, 2.0):
        shares = np.exp(scores.astype(float) / temperature)
        shares /= shares.sum()
        frequencies = np.bincount([choose(scores, temperature, 3, k) for k in range(4000)], minlength=5) / 4000
        assert np.abs(frequencies - shares).max() < 4 * np.sqrt(0.25 / 4000)
    for temperature in (0, 1e-300):
        assert {choose(scores, temperature, 3, k) for k in range(20)} == {2}
    assert len({choose(scores, 1e300, 3, k) for k in range(200)}) == 5
    for bad in (np.nan, np.inf):
        with pytest.raises(UserError, match="are not finite"):
            choose(np.array([0, bad]), 1.0, 0, 0)


def test_what_does_not_fit_texts_is_said(learnt, train, tmp_path):
    trained, text = learnt
    for ranks, options, expected in (
        (1, ("--prompt", "pañ"), "--prompt: the character 'ñ' (U+00F1) is not among the 26"),
        (1, ("--prompt", ""), "--prompt is empty"),
        (1, ("--prompt", "p", "--characters", "0"), "--characters 0: expected a whole number from 1 up"),
        (1, ("--prompt", "p", "--temperature", "-1"), "--temperature -1.0: expected 0, or a finite number"),
        (1, ("--prompt", "p", "--temperature", "nan"), "--temperature nan: expected 0, or a finite number"),
        (1, ("--prompt", "p", "--seed", "-1"), "--seed -1: expected a whole number"),
        (1, ("--prompt", "p", "--threads", "-1"), "--threads -1: expected 0 to 1024"),
        (1, ("--prompt", "p", "--split", "all"), "--split applies to predictions of samples"),
        (1, ("--seed", "3"), "--seed applies to the continuation of a text: add --prompt TEXT"),
        (2, ("--prompt", "p"), "on one process, and there are 2 ranks: leave mpirun out"),
    ):
        assert expected in failed("psmpi.predict", trained.out, *options, ranks=ranks), options
    digits = train(1, "--epochs", "1", "--max-steps", "1")
    assert "is not of a text" in failed("psmpi.predict", digits.out, "--prompt", "p")
    part = tmp_path / "part.h5"
    status, _, err = run(1, "-m", "psmpi.inspect", "cut", trained.out, "--classes", "4", "6", "--out", part)
    assert status == 0, err
    assert "has a part of the characters' scores" in failed("psmpi.predict", part, "--prompt", "p")
    plain = ("--dataset", text, "--method", "data_parallel", "--loss", "nll")
    message = failed("psmpi.train", *plain, "--model", "lstm", "--context", "5000", ranks=2)
    assert "a window of --context 5000 takes 5001: use --context 419 or less" in message
    for context in ("64", "10"):
        message = failed("psmpi.train", "--dataset", "digits:rows", "--model", "lstm", "--context", context)
        assert f"--context {context} is of texts (--dataset FILE.txt), and the data set here is digits:rows" in message
    assert "--context 0: expected a whole number from 1 up" in failed("psmpi.train", *plain, "--context", "0")
    assert "use --model rnn, gru, lstm, transformer, or custom" in failed("psmpi.train", *plain)
    assert "the vocabulary has 7" in failed("psmpi.train", *plain, "--model", "gru", "--vocabulary", "7")
    assert "are no images: leave :rows out" in failed("psmpi.train", "--dataset", f"{text}:rows", "--model", "lstm")


def test_sums_modulo_a_number_are_learnt(train):
    """The data set has a fixed vocabulary, and the network learns the training samples by heart."""
    options = ("--dataset", "modular_addition:11", "--model", "gru", "--widths", "32", "--method", "data_parallel")
    numbers = ("--loss", "nll", "--epochs", "60", "--batch-size", "10", "--lr", "0.02", "--checkpoint-every", "9999")
    trained = train(1, *options, *numbers)
    assert read_file(str(trained.out / "config.toml")).model.vocabulary == 12
    assert trained.rows[-1]["train_loss"] < 0.1 < 2 < trained.rows[0]["train_loss"]


def test_a_numbered_draw_is_of_continuations_alone(monkeypatch):
    scores = np.zeros(97)
    draws = [choose(scores, 1.0, 0, k) for k in range(9)]
    monkeypatch.setattr(continuation, "_TAG", 1)
    assert draws != [choose(scores, 1.0, 0, k) for k in range(9)]


def test_a_transformer_goes_on_from_a_short_prompt(tmp_path):
    """The last step is of the prompt's last character and attends to no padding; the training ran on four ranks."""
    (tmp_path / "lines.txt").write_text(LINE * 60)
    sizes = ("--widths", "32", "--heads", "4", "--blocks", "1", "--epochs", "8", "--batch-size", "10", "--lr", "0.01")
    words = ("--method", "tensor", "--model", "transformer", *sizes)
    trained = train_on(4, tmp_path / "lines.txt", tmp_path / "run", *words)
    contents = read_contents(trained.checkpoint)
    model, other_model = (load_model(trained.checkpoint, contents, NumpyOps(), 10**9) for _ in range(2))
    text, following = "f", go_on(model, contents.characters, "f", 0.8, 5)
    for count in range(16):
        tokens = np.array([contents.characters.index(c) for c in text[-12:]], np.float32)
        scores = other_model.forward(tokens.reshape(1, -1, 1), None, Span()).scores[:, -1, 0]
        assert next(following) == contents.characters[choose(scores, 0.8, 5, count)]
        text += contents.characters[choose(scores, 0.8, 5, count)]
    assert going_on(trained.out, "--prompt", "five dozen", "--temperature", "0")[:16] == "five dozen jugs "
