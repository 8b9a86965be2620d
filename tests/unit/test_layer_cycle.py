"""Multigrid in layer time over plain maps: exactness, fixed point, any number of ranks, messages, rates."""

from itertools import pairwise
from queue import Queue

import numpy as np
import pytest

from psmpi.backend import NumpyOps
from psmpi.comm.group import Counter, Group
from psmpi.comm.transfers import Boundary
from psmpi.comm.transfers.base import Handle
from psmpi.methods.layer_parallel.cycle import Cycle, evaluations, exact_cycles
from psmpi.methods.layer_parallel.line import Line, messages_of_cycle
from psmpi.testing import run_ranks

WIDTH, BATCH, T = 8, 7, 1.0
SIZE = WIDTH * BATCH


class Problem:
    """N residual layers of width 8 in NumPy; with `smooth` their weights change slowly with depth."""

    def __init__(self, n, smooth=False, seed=0):
        rng = np.random.default_rng(seed)
        self.n, self.h = n, T / n
        if smooth:
            ends = rng.normal(size=(3, WIDTH, WIDTH)) * 0.7
            t = np.linspace(0, 1, n)[:, None, None]
            self.k = ends[0] + np.cos(np.pi * t) * ends[1] + np.sin(2 * np.pi * t) * ends[2]
        else:
            self.k = rng.normal(size=(n, WIDTH, WIDTH)) * 0.7
        self.b = rng.normal(size=(n, WIDTH, 1)) * 0.1
        self.u0, self.wn = rng.normal(size=(2, SIZE))

    def step(self, i, stride, u):
        """Phi with the weights of layer i and the step of `stride` layers."""
        u = u.reshape(WIDTH, BATCH)
        return (u + self.h * stride * np.tanh(self.k[i] @ u + self.b[i])).reshape(-1)

    def adjoint(self, i, stride, state, w):
        state, w = state.reshape(WIDTH, BATCH), w.reshape(WIDTH, BATCH)
        slope = 1 - np.tanh(self.k[i] @ state + self.b[i]) ** 2
        return (w + self.h * stride * self.k[i].T @ (slope * w)).reshape(-1)

    def serial(self):
        """States (n + 1, SIZE), and adjoints in the order of the march, from the last point down."""
        u, w = [self.u0], [self.wn]
        for i in range(self.n):
            u.append(self.step(i, 1, u[-1]))
        for i in reversed(range(self.n)):
            w.append(self.adjoint(i, 1, u[i], w[-1]))
        return np.array(u), np.array(w)


class Counted:
    """Neighbours that count their sent messages."""

    def __init__(self, line):
        self.line, self.sent = line, 0

    def send(self, values):
        self.sent += self.line.outgoing is not None
        return self.line.send(values)

    def receive(self, into):
        return self.line.receive(into)


def solve(problem, ranks, factor, levels, relaxations, cycles, start=None, back=False):
    """States, or adjoints, after `cycles`; messages sent by each rank; residuals of each cycle."""
    serial, n = problem.serial(), problem.n // ranks
    exact = serial[1] if back else serial[0]

    def work(world):
        group = Group(world, range(ranks), Counter())
        boundaries = [Boundary(group, r, r + 1, SIZE, np.dtype(float)) for r in range(ranks - 1)]
        # The place of the rank in the direction of the pass.
        place = ranks - 1 - world.rank if back else world.rank
        line = Counted(Line(boundaries, world.rank, back))

        def forward(stride, j, x, out):
            out[...] = problem.step(place * n + j * stride, stride, x)

        def adjoint(stride, j, x, out):
            left = problem.n - (place * n + (j + 1) * stride)
            out[...] = problem.adjoint(left, stride, serial[0][left], x)

        cycle = Cycle(adjoint if back else forward, line, np.empty((n + 1) * SIZE), relaxations, NumpyOps())
        factors = (factor,) * (levels - 1)
        cycle.reserve(n, SIZE, factors)
        states = cycle.shape(n, SIZE, factors)
        states[...] = exact[0] if start is None else start[place * n : place * n + n + 1]
        cycle.run(cycles)
        return place, states.copy(), line.sent, cycle.residuals

    results = sorted(run_ranks(ranks, work, timeout=60), key=lambda result: result[0])
    for (_, left_states, *_), (_, right_states, *_) in pairwise(results):
        assert np.array_equal(left_states[-1], right_states[0]), "neighbours have different copies of a point"
    states = np.concatenate([results[0][1][:1], *(result[1][1:] for result in results)])
    residuals = np.sum([result[3] for result in results], axis=0)
    return states, [result[2] for result in results], residuals


def error(states, exact):
    return np.linalg.norm(states - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("relaxations", [0, 1, 2])
@pytest.mark.parametrize(("n", "factor", "levels"), [(16, 4, 2), (36, 4, 2), (16, 2, 3), (64, 4, 3)])
def test_enough_cycles_are_exact(n, factor, levels, relaxations, back):
    problem = Problem(n)
    exact = problem.serial()[back]
    enough = exact_cycles(n, (factor,) * (levels - 1), relaxations)
    assert enough == -(-n // ((relaxations + 1) * factor))
    assert error(solve(problem, 1, factor, levels, relaxations, enough, back=back)[0], exact) <= 1e-11
    # Each cycle makes some more points exact, and the first cycle not all of them.
    for cycles in range(1, enough):
        reach = min(n, cycles * (relaxations + 1) * factor + factor - 1)
        states = solve(problem, 1, factor, levels, relaxations, cycles, back=back)[0]
        assert error(states[: reach + 1], exact[: reach + 1]) <= 1e-11
        if cycles == 1 and reach < n - factor:
            assert error(states, exact) > 1e-11


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("relaxations", [0, 1])
@pytest.mark.parametrize(("n", "factor", "levels"), [(16, 4, 2), (64, 2, 4), (64, 4, 3)])
def test_a_cycle_leaves_the_solution_alone(n, factor, levels, relaxations, back):
    problem = Problem(n)
    exact = problem.serial()[back]
    states, _, residuals = solve(problem, 1, factor, levels, relaxations, 1, start=exact, back=back)
    assert error(states, exact) <= 1e-14
    assert residuals[0, 0] == 0 < residuals[0, 1]


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize(("n", "factor", "levels"), [(32, 4, 2), (64, 2, 4)])
def test_any_number_of_ranks_finds_the_same_bits(n, factor, levels, back):
    problem = Problem(n)
    for relaxations in (0, 1):
        one_rank, _, residuals = solve(problem, 1, factor, levels, relaxations, 2, back=back)
        assert error(one_rank, problem.serial()[back]) > 1e-9
        for ranks in (2, 4, 8):
            states, _, rank_residuals = solve(problem, ranks, factor, levels, relaxations, 2, back=back)
            assert np.array_equal(states, one_rank)
            np.testing.assert_allclose(rank_residuals, residuals, rtol=1e-12)


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_one_level_is_the_serial_loop(ranks, back):
    problem = Problem(16)
    states, sent, _ = solve(problem, ranks, 2, 1, 1, 5, back=back)
    assert np.array_equal(states, problem.serial()[back])
    assert sent == [1] * (ranks - 1) + [0]


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("relaxations", [0, 1, 2])
@pytest.mark.parametrize(("n", "factor", "levels"), [(32, 4, 2), (64, 2, 4)])
def test_messages_are_counted_before(n, factor, levels, relaxations, ranks, back):
    for cycles in (1, 3):
        _, sent, _ = solve(Problem(n), ranks, factor, levels, relaxations, cycles, back=back)
        messages = cycles * messages_of_cycle(levels, relaxations)
        assert messages == cycles * ((levels - 1) * relaxations + 1)
        assert sent == [messages] * (ranks - 1) + [0]


@pytest.mark.parametrize("back", [False, True])
def test_errors_fall_by_ten_a_cycle(back):
    """N = 64, T = 1, smooth weights, factor 4, FCF."""
    problem = Problem(64, smooth=True)
    exact = problem.serial()[back]
    errors = [error(solve(problem, 1, 4, 2, 1, cycles, back=back)[0], exact) for cycles in (1, 2, 3, 4)]
    assert all(10 * after <= before for before, after in pairwise(errors)), errors
    residuals = solve(problem, 1, 4, 2, 1, 4, back=back)[2][:, 0] ** 0.5
    assert all(10 * after <= before for before, after in pairwise(residuals)), residuals


def test_steps_that_are_no_multiple_are_refused():
    cycle = Cycle(lambda *_: None, None, np.empty(100), 1, NumpyOps())
    with pytest.raises(ValueError, match="6 steps are not a multiple of 4"):
        cycle.shape(6, 3, (4,))


class Clock:
    """Neighbours that send their time: a step takes 1, and a receiver waits for the sender's time."""

    def __init__(self, previous, following):
        self.previous, self.following, self.now = previous, following, 0

    def send(self, values):
        if self.following is not None:
            self.following.put(self.now)
        return Handle([])

    def receive(self, into):
        return self

    def finish(self):
        if self.previous is not None:
            self.now = max(self.now, self.previous.get(timeout=30))


@pytest.mark.parametrize("ranks", [1, 2, 4, 16])
@pytest.mark.parametrize("relaxations", [0, 1, 2])
@pytest.mark.parametrize(("n", "factors"), [(64, (4,)), (128, (2, 2, 2)), (256, (4, 4)), (16, ())])
def test_the_cost_model_is_the_time_of_ranks_that_wait_for_each_other(n, factors, relaxations, ranks):
    for cycles in (1, 2, 3):
        queues = [None, *(Queue() for _ in range(ranks - 1)), None]

        def work(world, queues=queues, cycles=cycles):
            clock = Clock(queues[world.rank], queues[world.rank + 1])

            def march(stride, j, x, out):
                clock.now += 1

            cycle = Cycle(march, clock, np.zeros(n // ranks + 1), relaxations, NumpyOps())
            cycle.reserve(n // ranks, 1, factors)
            cycle.shape(n // ranks, 1, factors)
            cycle.run(cycles)
            return clock.now

        assert max(run_ranks(ranks, work, timeout=60)) == evaluations(n, ranks, factors, relaxations, cycles)
    if factors == (4,):
        # 3 N / P + N / m with one relaxation, 2 N / P + N / m without.
        assert evaluations(n, ranks, factors, relaxations, 1) == (2 + relaxations) * n // ranks + n // 4
