"""Chunks of time, diagonals of layers and chunks, and layers dealt to ranks."""

from itertools import pairwise

import pytest

from psmpi.errors import UserError
from psmpi.methods.wavefront.schedule import back_diagonals, diagonals, usual_steps
from psmpi.methods.wavefront.settings import deal
from psmpi.nn.layers.chain import leaves
from psmpi.nn.sequences import chunks
from psmpi.nn.zoo import make_network


@pytest.mark.parametrize("steps, each", [(12, 1), (12, 2), (12, 5), (7, 3), (7, 7), (1, 1)])
@pytest.mark.parametrize("layers", [1, 2, 4, 9])
def test_diagonals_visit_each_cell_once_and_after_those_it_needs(layers, steps, each):
    edges = chunks(steps, each)
    assert [step for a, b in edges for step in range(a, b)] == list(range(steps))
    count, visited = len(edges), set()
    assert count == -(-steps // each)
    ahead = list(diagonals(layers, count))
    assert len(ahead) == layers + count - 1
    for cells in ahead:
        for lane, c in cells:
            assert (lane, c) not in visited
            assert (lane == 0 or (lane - 1, c) in visited) and (c == 0 or (lane, c - 1) in visited)
        visited |= set(cells)
    assert len(visited) == layers * count
    back, visited = list(back_diagonals(layers, count)), set()
    assert len(back) == layers + count - 1
    for cells in back:
        for lane, c in cells:
            assert (lane, c) not in visited
            assert (lane == layers - 1 or (lane + 1, c) in visited) and (c == count - 1 or (lane, c + 1) in visited)
        visited |= set(cells)
    assert len(visited) == layers * count


def test_chunks_are_enough_for_all_lanes():
    assert usual_steps(100, 1) == 100
    for steps, lanes in ((100, 2), (128, 4), (5000, 16)):
        count = len(chunks(steps, usual_steps(steps, lanes)))
        assert count >= 4 * lanes, "lanes wait for at most a fifth of their time"
    assert usual_steps(5, 4) == 1


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
def test_layers_are_dealt_by_their_multiplications(ranks):
    network = make_network("lstm", (8, 20), 10, widths=(64, 16, 16, 32, 16, 16))
    dealt = deal(network, ranks, 1, 0)
    runs = [dealt.layers(rank) for rank in range(ranks)]
    assert runs[0][0] == 0 and runs[-1][1] == len(network.layers) and dealt.head == (6, 8)
    assert all(a[1] == b[0] for a, b in pairwise(runs))

    def cost(first, stop):
        return sum(layer.macs for layer in leaves(network.layers[first:stop]))

    def best(first, parts):
        """The least largest cost of recurrent layers from `first` on, by brute force."""
        if parts == 1:
            return cost(first, 6)
        return min(max(cost(first, k), best(k, parts - 1)) for k in range(first + 1, 6 - parts + 2))

    assert max(cost(*lanes[0]) for lanes in dealt.ranks) == best(0, ranks)


def test_equal_layers_are_dealt_evenly():
    network = make_network("gru", (30, 20), 10, widths=(30,) * 8)
    assert [deal(network, 4, 1, 0).layers(rank)[0] for rank in range(4)] == [0, 2, 4, 6]
    lanes = deal(network, 2, 2, 5)
    assert lanes.ranks == (((0, 2), (2, 4)), ((4, 6), (6, 8))) and lanes.steps == 5


def test_more_ranks_or_threads_than_layers_are_refused():
    network = make_network("rnn", (8, 20), 10, widths=(5, 5))
    with pytest.raises(UserError, match="has 2 for 3 ranks: start 2 or fewer"):
        deal(network, 3, 1, 0)
    with pytest.raises(UserError, match="--skew 2: rank 0 has 1 recurrent layer: use --skew 1 or less"):
        deal(network, 2, 2, 0)
