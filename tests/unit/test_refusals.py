"""The alternatives in the error about a refused network are not refused themselves."""

import re
from dataclasses import replace

import numpy as np
import pytest
from helpers.runs import usual_config

from psmpi.data import Dataset, Split
from psmpi.data.split import frozen
from psmpi.errors import UserError
from psmpi.methods.psl.plan import Settings
from psmpi.nn.network import build
from psmpi.nn.zoo import MODELS, make_network
from psmpi.registry import all_methods, find_method

METHODS = [name for name in all_methods() if name in ("psl", "data_parallel", "local_sgd", "ist", "dfa", "sil")]
SHAPES = [(1, 8, 8), (3, 32, 32), (20,), (1, 28, 28), (3, 224, 224), (2, 8, 6)]


def digits_of(shape):
    def split(n):
        # The samples are never read.
        return Split(frozen(np.arange(n) % 10), shape, 1.0, None)

    return Dataset("mine", 10, shape, split(40), split(10))


def refusal(shape, ranks, model, method, replicas=0):
    """The error of a refused training, or an empty string."""
    config = usual_config()
    config = replace(
        config, model=replace(config.model, model=model), parallel=replace(config.parallel, method=method)
    ).changed(Settings, replicas=replicas)
    try:
        network = make_network(model, shape, 10)
        find_method(method).check(ranks, network, digits_of(shape), config)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize(
    ("model", "shape"),
    [
        # A sparse network of 150,528 inputs takes seconds to make.
        pytest.param(model, shape, marks=[pytest.mark.slow] * ((model, shape) == ("radix", (3, 224, 224))))
        for model in MODELS
        if model != "custom"
        for shape in SHAPES
    ],
    ids=str,
)
def test_what_is_named_instead_of_a_refused_network_is_taken(model, shape, ranks):
    for method in METHODS:
        message = refusal(shape, ranks, model, method)
        if not message:
            continue
        named = re.findall(r"--(model|method|replicas) ([\w-]+)", message.partition("se ")[2])
        alternatives = [(option, value) for option, value in named if value != "custom"]
        assert alternatives, message
        if "on several ranks with --method" in message:
            # The alternatives are used together, and on one rank the model alone.
            change = dict(alternatives) if ranks > 1 and method == "psl" else {"model": dict(alternatives)["model"]}
            changes = [change]
        else:
            changes = [{option: int(value) if option == "replicas" else value} for option, value in alternatives]
        for change in changes:
            assert not refusal(shape, ranks, **{"model": model, "method": method, **change}), (message, change)


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        (
            [{"type": "separable_dense", "units": 10, "groups": 10}],
            ["the last 4 of 64 inputs are not used, because each of 10 groups takes 6; 70 inputs would all be used"],
        ),
        ([{"type": "separable_dense", "units": 20, "groups": 4}, {"type": "dense", "units": 10}], []),
        (
            [{"type": "separable_dense", "units": units, "groups": groups} for units, groups in ((33, 11), (10, 10))],
            ["the last 9 of 64 inputs", "the last 3 of 33 inputs"],
        ),
    ],
)  # fmt: skip
def test_inputs_that_do_not_divide_into_groups_are_noted(layers, says):
    notes = build("mine", (64,), layers, 10).notes
    assert len(notes) == len(says)
    for note, text in zip(notes, says, strict=True):
        assert text in note


def test_what_no_window_of_a_pooling_sees_is_noted():
    table = [{"type": "max_pool", "size": 3}, {"type": "flatten"}, {"type": "dense", "units": 10}]
    (note,) = build("mine", (1, 11, 9), table, 10).notes
    assert "windows of 3 x 3 do not cover the last 2 of 11 rows" in note and "columns" not in note
    assert not build("mine", (1, 9, 9), table, 10).notes


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_built_in_networks_use_all_their_inputs(shape):
    for model in MODELS:
        if model != "custom" and not refusal(shape, 1, model, "psl"):
            assert make_network(model, shape, 10).notes == []
