"""The account of memory counts each byte of the declared arrays once."""

import numpy as np
import pytest

from psmpi.backend import NumpyOps
from psmpi.layout import Ownership, Runs
from psmpi.optim import Hyper, make_optimizer
from psmpi.training.account import Account
from psmpi.training.state import State


@pytest.mark.parametrize(
    ("slices", "counted"),
    [
        ([slice(0, 10), slice(0, 10)], 10),
        ([slice(2, 5), slice(0, 10)], 10),
        ([slice(0, 6), slice(4, 10), slice(3, 7)], 10),
        ([slice(0, 2), slice(8, 10), slice(1, 9)], 10),
        ([slice(0, 3), slice(5, 5), slice(5, 9)], 7),
    ],
)
def test_bytes_shared_by_arrays_count_once(slices, counted):
    account, memory = Account(), np.zeros(10)
    for part in slices:
        account.hold("weights", memory[part])
    assert account.bytes() == {"weights": 8 * counted}


def test_shared_bytes_count_at_the_first_and_other_arrays_apart():
    account, memory = Account(), np.zeros(10)
    account.hold("weights", memory)
    account.hold("buffers", memory[:3], np.zeros(2))
    account.include(lambda: {"buffers": 5, "samples": 7})
    assert account.bytes() == {"weights": 80, "buffers": 16 + 5, "samples": 7}


def test_what_is_allocated_anew_is_counted_as_it_is_now():
    account, arrays = Account(), [np.zeros(1)]
    account.ask("activations", lambda: (arrays[0], 3))
    assert account.bytes() == {"activations": 11}
    arrays[0] = np.zeros(4)
    assert account.bytes() == {"activations": 35}


def test_the_state_counts_what_is_declared():
    state = State(NumpyOps(), Ownership((Runs(((0, 6),)),)), 0)
    optimizer = make_optimizer("adam", 6, np.float64, Hyper())
    state.vector("weights", np.zeros(6))
    state.optimizer(optimizer)
    state.table("left", np.zeros((1, 3)))
    state.pieces("handed", [(np.zeros(4), [(slice(0, 4), slice(0, 4))]), (np.zeros(2), [(slice(4, 6), slice(0, 2))])])
    work = sum(array.nbytes for array in (*optimizer.work, optimizer.scratch))
    # Optimizer: two moments, the table and the two pieces; buffers: one copy of all pieces.
    assert state.account.bytes() == {"weights": 48, "optimizer": 96 + work + 24 + 48, "buffers": 48}
