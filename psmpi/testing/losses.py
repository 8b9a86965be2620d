"""Checks of losses: derivatives, pairs of classes, and classes divided among ranks. docs/own_loss.md uses them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, permutations
from typing import Any

import numpy as np

from psmpi.nn.losses import LOSSES, Loss, make_loss

STEP = 1e-6
F64 = np.dtype(np.float64)


def check_loss(name: str, classes: int = 6, batch: int = 12, **settings: Any) -> None:
    """AssertionError unless the loss called `name` agrees with its definition, for each task that it can learn.

    Derivatives equal central differences; losses of samples add up; the shares of ranks with some classes each add up
    to the loss, and so do the elements of a pairwise loss. settings: keywords of `make_loss`.
    """
    for task in LOSSES.find(name).tasks:
        rng = np.random.default_rng(0)
        scores = 2 * rng.normal(size=(classes, batch))
        targets = rng.integers(0, classes, batch) if task == "classes" else rng.normal(size=(classes, batch))
        given = {**settings, "task": task}
        loss = make_loss(name, F64, outputs=classes, **given)
        derivatives_match_differences(loss, scores, targets)
        _samples_add_up(loss, scores, targets)
        if task == "classes":
            for cuts in ((classes,), (1, classes - 1), (2, 0, classes - 2), (1,) * classes):
                value, grad = loss_by_parts(name, F64, scores, targets, cuts, **given)[:2]
                whole = np.empty(scores.shape)
                _close(value, loss(scores, targets, 0.5, whole), f"the loss on ranks with {cuts} classes")
                _close(grad, whole, f"derivatives on ranks with {cuts} classes")
            if loss.pairwise:
                elements_add_up(loss, scores, targets)


def _close(value: Any, expected: Any, what: str, tolerance: float = 1e-10) -> None:
    far, size = np.linalg.norm(np.subtract(value, expected)), float(np.linalg.norm(expected))
    assert far <= tolerance * max(1.0, size), f"{what}: it differs by {far / max(1.0, size):.1e}"


def derivatives_match_differences(loss: Loss, scores: np.ndarray, targets: np.ndarray, tolerance: float = 1e-7) -> None:
    """Derivatives (classes, b) are central differences of the value."""
    grad = np.empty(scores.shape)
    loss(scores, targets, 0.5, grad)
    for at in np.ndindex(scores.shape):
        values = []
        for step in (STEP, -STEP):
            moved = scores.copy()
            moved[at] += step
            values.append(loss(moved, targets, 0.5))
        difference = (values[0] - values[1]) / (2 * STEP)
        assert abs(difference - grad[at]) <= tolerance * max(1, np.abs(grad).max()), (
            f"the derivative by score {at[0]} of sample {at[1]} is {grad[at]:.9g}, by differences {difference:.9g}"
        )


def _samples_add_up(loss: Loss, scores: np.ndarray, targets: np.ndarray) -> None:
    whole, apart = np.empty(scores.shape), np.empty(scores.shape)
    value, total = loss(scores, targets, 0.5, whole), 0.0
    for at in (slice(0, 1), slice(1, None)):
        grad = np.empty(scores[:, at].shape)
        total += loss(np.ascontiguousarray(scores[:, at]), targets[..., at], 0.5, grad)
        apart[:, at] = grad
    _close(total, value, "the losses of two minibatches, and of both together")
    _close(apart, whole, "the derivatives of two minibatches, and of both together")


def elements_add_up(loss: Loss, scores: np.ndarray, labels: np.ndarray, tolerance: float = 1e-10) -> None:
    """The elements of all pairs of classes, with the constant of each sample, are the loss."""
    classes = len(scores)
    whole, summed = np.empty(scores.shape), np.zeros(scores.shape)
    value, total = loss(scores, labels, 0.5, whole), 0.5 * loss.constants(None, len(labels))
    for i, j in permutations(range(classes), 2):
        if i < j:
            pairs, grad = np.zeros((classes, classes), bool), np.empty(scores.shape)
            pairs[i, j] = pairs[j, i] = True
            total += loss(scores, labels, 0.5, grad, pairs)
            summed += grad
            others = [k for k in range(classes) if k not in (i, j)]
            assert not grad[others].any(), f"the element of classes {i} and {j} has derivatives by others"
    _close(total, value, "the sum of the elements, and the loss", tolerance)
    _close(summed, whole, "the sum of the elements' derivatives, and those of the loss", tolerance)


def loss_by_parts(
    name: str,
    dtype: np.dtype,
    scores: np.ndarray,
    labels: np.ndarray,
    cuts: Sequence[int],
    scale: float = 0.5,
    **settings: Any,
) -> tuple[float, np.ndarray, int]:
    """Value, derivatives and clipped terms by ranks with the scores of cuts[k] classes each, which exchange sums."""
    starts = np.cumsum([0, *cuts])
    spans = [slice(a, b) for a, b in pairwise(starts.tolist())]
    made = [make_loss(name, dtype, outputs=len(scores), **settings) for _ in cuts]
    summaries = [loss.summarize(scores[at], labels - at.start) for loss, at in zip(made, spans, strict=True)]
    sizes = [made[0].summary_size(count) for count in cuts]
    if made[0].sums:
        assert [len(summary) for summary in summaries] == sizes, "`summarize` returns other rows than `summary_size`"
    value, grad, rests = 0.0, np.full(scores.shape, np.nan), np.zeros((len(cuts), len(labels)))
    for k, (loss, at) in enumerate(zip(made, spans, strict=True)):
        own = labels - at.start
        given = None
        if loss.gathers:
            given = loss.merge(np.concatenate(summaries).astype(dtype), (starts - at.start).tolist(), own)
        elif loss.sums:
            given = np.sum(summaries, axis=0)
        value += loss.terms(scores[at], own, scale, given, grad[at], rests[k])
    for loss, at in zip(made, spans, strict=True):
        if "terms" in loss.sums:
            value += loss.close(grad[at], labels - at.start, rests.sum(axis=0), scale)
    return value, grad, sum(loss.clipped for loss in made)
