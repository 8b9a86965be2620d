"""Continuation of a text, character by character, by a network that was trained on a text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from psmpi import checkpoint
from psmpi.backend import NumpyOps
from psmpi.checkpoint import Contents
from psmpi.config import from_toml
from psmpi.data.text import encode
from psmpi.errors import UserError
from psmpi.layout import Runs
from psmpi.nn.layers.workspace import WHOLE, Span
from psmpi.nn.model import Model
from psmpi.nn.zoo import make_network

# Keeps these random numbers apart from all others drawn from the same seed.
_TAG = 0x74657874


def check_text(contents: Contents, path: Path, prompt: str) -> None:
    """UserError unless the checkpoint is a whole network for texts that knows all characters of the prompt."""
    if not contents.characters:
        raise UserError(
            f"--prompt: checkpoint {path} is not of a text: give one of a training on --dataset FILE.txt, or leave "
            "--prompt out"
        )
    if contents.part is not None:
        raise UserError(
            f"--prompt: {path} has a part of the characters' scores: give the checkpoint that it is cut from"
        )
    try:
        encode(prompt, contents.characters)
    except UserError as error:
        raise UserError(f"--prompt: {error}") from None


def load_model(path: Path, contents: Contents, ops: NumpyOps, most: int) -> Model:
    """The model of the checkpoint at `path`, whole, on the host, for texts of `most` characters at most.

    Windows are those of the training, but no longer than `most`: a file may state any length.
    """
    own = from_toml(contents.config, str(path), foreign=True).model
    network = make_network(
        own.model, contents.in_shape, contents.layout.classes, **own.shape, by_step=contents.by_step, task=contents.task
    )
    network = network.with_steps(min(most, network.in_shape[1]))
    layout = network.layout()
    w = np.empty(layout.size, own.dtype)
    checkpoint.load(path, layout, Runs(((0, layout.size),)), {"weights": w}, None)
    return Model(network, layout, w, None, ops)


def go_on(model: Model, characters: str, prompt: str, temperature: float, seed: int) -> Iterator[str]:
    """Yield the characters that follow a prompt, without end.

    Each character is chosen (see `choose`) by the scores of the last step of a pass over the text before it, as far
    back as the windows of the model reach. UserError if the prompt has characters that the model does not know.
    """
    steps = model.in_shape[1]
    text = encode(prompt, characters)[-steps:].tolist()
    window, lengths = np.zeros((steps, 1), model.w.dtype), np.zeros(1, np.int32)
    count = 0
    while True:
        window[: len(text), 0] = text
        lengths[:] = len(text)
        span = WHOLE if len(text) == steps else Span(lengths)
        scores = model.forward(window, None, span).scores[:, len(text) - 1, 0]
        chosen = choose(scores, temperature, seed, count)
        yield characters[chosen]
        text = [*text, chosen][-steps:]
        count += 1


def choose(scores: np.ndarray, temperature: float, seed: int, number: int) -> int:
    """A class by its scores (classes,): the argmax at temperature 0, else a draw from softmax(scores / temperature).

    number: index of the draw, which with the seed keys the random number. UserError for scores that are not finite.
    """
    if not np.isfinite(scores).all():
        raise UserError(
            "the network's scores are not finite numbers: take a checkpoint from before its training diverged"
        )
    if temperature == 0:
        return int(scores.argmax())
    scaled = scores.astype(np.float64)
    with np.errstate(over="ignore", under="ignore"):
        sums = np.exp((scaled - scaled.max()) / temperature).cumsum()
    sequence = np.random.SeedSequence([seed, _TAG, number])
    drawn = np.random.Generator(np.random.Philox(sequence)).random()
    return min(int(np.searchsorted(sums, drawn * sums[-1], side="right")), len(scores) - 1)
