"""Spans of sequences: the steps of a minibatch that count, which passes need besides the values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.data import Resident
from psmpi.errors import UserError
from psmpi.nn.layers.embedding import Embedding
from psmpi.nn.layers.workspace import WHOLE, Span
from psmpi.nn.network import Network


def make_span(lengths: np.ndarray | None, ops: NumpyOps) -> Span:
    """The span of whole sequences with lengths (b,), put on the backend; None: all steps count."""
    return WHOLE if lengths is None else Span(ops.put(lengths))


def chunk_spans(samples: Resident, ids: np.ndarray, edges: Sequence[tuple[int, int]], ops: NumpyOps) -> list[Span]:
    """The span of each chunk of the sequences `ids` (b,); edges: (first, last + 1) step of each chunk."""
    lengths, last, spans = samples.lengths(ids), len(edges) - 1, []
    for c, (a, b) in enumerate(edges):
        own = None if lengths is None else ops.put(np.clip(lengths - a, 0, b - a).astype(np.int32))
        spans.append(Span(own, begins=c == 0, ends=c == last))
    return spans


def recorder(network: Network, ops: NumpyOps) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`ops.record`, or for sequences, whose lengths change, a function that records nothing."""
    return as_it_is if network.sequences else ops.record


def check_tokens(network: Network, samples: Resident, kind: str) -> None:
    """UserError for tokens without an embedding, values with one, and tokens beyond the vocabulary.

    kind: of the samples, for messages, as "training".
    """
    first = network.layers[0]
    if isinstance(first, Embedding) and not samples.tokens:
        raise UserError(
            f"the {kind} samples are values, and the network takes them for tokens: leave --vocabulary out, or "
            f"{first.name} of [[model.layers]]; tokens are integers (samples, steps) beside lengths"
        )
    if samples.tokens and not isinstance(first, Embedding):
        raise UserError(
            "the samples are tokens, whole numbers, and the network takes them for values: add --vocabulary "
            f"{max(1, samples.largest + 1)} to --model rnn, gru, lstm or transformer, or begin [[model.layers]] with "
            "an embedding; of values save x.astype(np.float32)"
        )
    if isinstance(first, Embedding) and samples.largest >= first.vocabulary:
        raise UserError(
            f"the {kind} samples have the token {samples.largest}, and the vocabulary has {first.vocabulary}, 0 to "
            f"{first.vocabulary - 1}: use --vocabulary {samples.largest + 1}, or of {first.name} vocabulary = "
            f"{samples.largest + 1}"
        )


def as_it_is(work: Callable[..., Any]) -> Callable[..., Any]:
    """`work` itself, not recorded."""
    return work
