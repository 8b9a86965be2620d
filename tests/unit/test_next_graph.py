"""Graphs of agents, their weights, and the deal of samples."""

import numpy as np
import pytest

from psmpi.backend import NumpyOps
from psmpi.data import open_dataset
from psmpi.errors import UserError
from psmpi.methods.next.deal import deal_samples
from psmpi.methods.next.graph import Graph, components, make_graph, weights
from psmpi.methods.next.settings import Settings, owners


def test_metropolis_weights_of_random_graphs():
    """Some agents have no link."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        n = int(rng.integers(1, 12))
        links = [(a, b) for b in range(n) for a in range(b) if rng.random() < 0.3]
        c = weights(n, links)
        assert np.array_equal(c, c.T) and (c >= 0).all()
        np.testing.assert_allclose(c.sum(axis=0), 1, rtol=0, atol=1e-14)
        degrees = np.bincount(np.array(links, int).reshape(-1), minlength=n)
        for a in range(n):
            assert c[a, a] >= 1 / n and (c[a, a] == 1) == (degrees[a] == 0)
            for b in range(n):
                expected = 1 / (1 + max(degrees[a], degrees[b])) if (min(a, b), max(a, b)) in links else 0
                assert a == b or c[a, b] == expected


def test_gaps_are_those_of_the_eigenvalues():
    # A ring's weights are 1/3 each: eigenvalues (1 + 2 cos(2 pi k / n)) / 3.
    for n in (3, 8, 16):
        sizes = np.sort(np.abs(1 + 2 * np.cos(2 * np.pi * np.arange(n) / n)) / 3)
        assert make_graph("ring", n, 0).gap == pytest.approx(1 - sizes[-2], abs=1e-12)
    assert make_graph("complete", 5, 0).gap == pytest.approx(1)
    assert make_graph("ring", 1, 0).gap == 1 and make_graph("ring", 2, 0).links == ((0, 1),)


def test_graphs_have_their_links():
    assert make_graph("grid", 6, 0).links == ((0, 1), (0, 3), (1, 2), (1, 4), (2, 5), (3, 4), (4, 5))
    assert make_graph("exponential", 8, 0).degrees == (5,) * 8
    assert len(make_graph("complete", 7, 0).links) == 21
    drawn = make_graph("erdos:0.4", 12, 5)
    assert drawn == make_graph("erdos:0.4", 12, 5) != make_graph("erdos:0.4", 12, 6)
    assert len(components(12, drawn.links)) == 1


def test_links_fail_alike_for_all_and_as_often_as_asked():
    graph = Graph(20, make_graph("complete", 20, 0).links, 0.3, 7)
    share = np.mean([len(graph.active(k)) for k in range(200)]) / len(graph.links)
    assert share == pytest.approx(0.3, abs=0.02)
    same_seed = Graph(20, graph.links, 0.3, 7)
    assert [same_seed.active(k) for k in (5, 3, 5)] == [graph.active(k) for k in (5, 3, 5)]


def test_a_file_has_links_of_its_own(tmp_path):
    path = tmp_path / "links.txt"
    path.write_text("# a triangle, and a tail\n0 1\n1 2\n2 0\n2 3\n")
    assert make_graph(str(path), 4, 0).links == ((0, 1), (0, 2), (1, 2), (2, 3))
    path.write_text("0 1\n1 0\n1 2\n2 1\n")
    assert make_graph(str(path), 3, 0).links == ((0, 1), (1, 2))
    for text, says in (
        ("0 1\n1 0\n1 2\n", "one way only (1 2)"),
        ("0 1\n2 3\n", "falls into 2 parts, one of them the agent(s) 0 1"),
        ("0 1 2\n", "--graph " + str(path) + ":1: '0 1 2'"),
        ("0 4\n", "agents are numbered 0 to 3"),
        ("1 1\n", "no link to itself"),
        ("", "falls into 4 parts"),
    ):
        path.write_text(text)
        with pytest.raises(UserError) as error:
            make_graph(str(path), 4, 0)
        assert says in str(error.value)
    with pytest.raises(UserError, match="none of 100 draws"):
        make_graph("erdos:0.01", 30, 0)


def test_every_sample_is_of_one_agent():
    dataset = open_dataset("digits", "")
    labels = dataset.train.labels
    for dealing in ("iid", "sorted", "skewed:2"):
        dealt = deal_samples(dataset, 8, dealing, 0)
        assert np.array_equal(np.sort(np.concatenate(dealt)), np.arange(dataset.train.n))
        kinds = [len(np.unique(labels[ids])) for ids in dealt]
        # A piece of a sixteenth of the samples, sorted by class, has two classes at most.
        assert min(kinds) == 10 if dealing == "iid" else max(kinds) <= {"sorted": 3, "skewed:2": 4}[dealing]


def test_minima_of_convex_models():
    """The derivative at the minimum is 0, by finite differences; with l1 it is a subgradient."""
    rng = np.random.default_rng(1)
    w, y = rng.normal(size=(2, 6))
    for kind in ("none", "l2", "l1"):
        s = Settings(rule="next", tau=1.7, regularizer=kind, regularizer_weight=0.4 if kind != "none" else 0.0)

        def value(x, s=s, kind=kind):
            r = {"none": 0.0, "l2": x @ x, "l1": np.abs(x).sum()}[kind]
            return y @ (x - w) + s.tau / 2 * (x - w) @ (x - w) + s.regularizer_weight * r

        minimum = y.copy()
        minimum *= -1 / s.tau
        minimum += w
        s.terms.nearest(NumpyOps(), minimum, s.tau)
        for k in range(6):
            for step in (1e-6, -1e-6):
                moved = minimum.copy()
                moved[k] += step
                assert value(moved) >= value(minimum)
            slope = (value(minimum + 1e-6 * np.eye(6)[k]) - value(minimum - 1e-6 * np.eye(6)[k])) / 2e-6
            assert abs(slope) <= (1e-6 if minimum[k] or kind != "l1" else 0.4)


def test_agents_are_dealt_to_ranks_in_order():
    assert owners(8, 3) == (0, 0, 0, 1, 1, 1, 2, 2)
