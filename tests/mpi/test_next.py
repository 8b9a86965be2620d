"""In-network training: against simulations in NumPy and closed solutions, and the privacy of agents' samples."""

from json import loads

import numpy as np
import pytest
from helpers.datasets import real
from helpers.runs import run
from scipy.optimize import least_squares
from scipy.sparse import csr_array

from psmpi.backend import NumpyOps
from psmpi.checkpoint import newest
from psmpi.data import Batch, Minibatches, open_dataset
from psmpi.data.csr import PARTS
from psmpi.data.split import Split
from psmpi.methods.next.deal import deal_samples
from psmpi.methods.next.graph import make_graph, weights
from psmpi.nn.zoo import make_network
from psmpi.registry import find_method
from psmpi.testing import run_ranks
from psmpi.testing.conformance import Case, resumed_runs_end_the_same, tensors
from psmpi.train import parse
from psmpi.training.context import Context
from psmpi.training.usual import usual

AGENTS, SAMPLES, FEATURES = 6, 180, 5
LINEAR = '[model]\nmodel = "custom"\n[[model.layers]]\ntype = "dense"\nunits = 1\n'
# A step uses all samples; sorted samples make agents as different as possible.
FULL = ("--method", "next", "--agents", str(AGENTS), "--split", "sorted", "--loss", "squared", "--clip", "0",
        "--batch-size", str(SAMPLES), "--epochs", "1", "--dtype", "float64", "--threads", "1")  # fmt: skip
PLAIN = ("--optimizer", "sgd")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a noisy linear regression and a linear network."""
    path, rng = tmp_path_factory.mktemp("next"), np.random.default_rng(3)
    x = rng.normal(size=(SAMPLES + 40, FEATURES))
    y = x @ rng.normal(size=(FEATURES, 1)) + 0.3 + 0.5 * rng.normal(size=(len(x), 1))
    np.savez(path / "own.npz", x=x[:SAMPLES], y=y[:SAMPLES], x_test=x[SAMPLES:], y_test=y[SAMPLES:])
    (path / "linear.toml").write_text(LINEAR)
    return path


class Problem:
    """A training of the linear network, and its gradients and solution by dense linear algebra."""

    def __init__(self, folder, *options):
        words = ("--dataset", str(folder / "own.npz"), "--config", str(folder / "linear.toml"), *FULL, *options)
        self.config = usual(parse(list(words)))
        self.dataset = open_dataset(str(folder / "own.npz"), "")
        self.network = make_network("custom", self.dataset.shape, 1, **self.config.model.shape)
        data = np.load(folder / "own.npz")
        self.x, self.y = np.column_stack([data["x"], np.ones(SAMPLES)]), data["y"].reshape(-1)
        seed = self.config.run.seed
        self.own = deal_samples(self.dataset, AGENTS, "sorted", seed)
        # Positions of the weights and the bias in the flat vector.
        pieces = {self.network.layout().parameters[p.parameter].name: p.offset for p in self.network.layout().pieces()}
        self.order = [pieces["dense1.weight"] + k for k in range(FEATURES)] + [pieces["dense1.bias"]]

    def train(self, ranks, steps, look=None):
        """Train `steps` steps; return the weights (agents, 6). Results of look(method) after each step are kept by
        rank."""
        batches = Minibatches(SAMPLES, self.config.data.batch_size, self.config.run.seed, True)
        find_method("next").check(ranks, self.network, self.dataset, self.config)

        def work(world):
            method = find_method("next")(Context(world, self.network, self.dataset, self.config, NumpyOps()))
            looks = []
            for step in range(steps):
                method.step(Batch(batches.ids(step, 0)), self.config.optimization.lr)
                if look is not None:
                    looks.append(look(method))
            return method.w[:, self.order].copy(), looks, method.counter.sent

        self.found = run_ranks(ranks, work, timeout=120)
        return np.concatenate([w for w, *_ in self.found])

    def gradients(self, w):
        """Return each agent's gradient (agents, 6), scaled so that their mean is the gradient of the mean loss of all
        samples."""
        rows = []
        for row, ids in zip(w, self.own, strict=True):
            x = self.x[ids]
            rows.append(AGENTS / SAMPLES * 2 * x.T @ (x @ row - self.y[ids]))
        return np.array(rows)

    def start(self):
        """Return the weights that all agents start with."""
        return self.train(1, 0)

    def solution(self, l2=0.0):
        """Return the weights of least squares with l2 times the sum of squares of all weights."""
        gram = self.x.T @ self.x / SAMPLES + l2 * np.eye(FEATURES + 1)
        return np.linalg.solve(gram, self.x.T @ self.y / SAMPLES)


def simulate(problem, rule, steps, lr, graph="ring", **more):
    """Return the weights (agents, 6) after `steps` iterations by the formulas of the rule's paper."""
    c = weights(AGENTS, make_graph(graph, AGENTS, 0).links)
    w = problem.start()
    g = problem.gradients(w)
    y, before, mixed_before, g_before = g.copy(), None, None, None
    correction, start, known, known_mixed = (np.zeros_like(w) for _ in range(4))
    start += w
    for step in range(steps):
        g = problem.gradients(w)
        if rule == "dgd":
            w = c @ (w - lr * g)
        elif rule == "tracking":
            w = c @ (w - lr * y)
            y = c @ y + problem.gradients(w) - g
        elif rule == "next":
            tau, lam = more["tau"], more["lam"]
            z = w + lr * ((tau * w - y) / (tau + 2 * lam) - w)
            w = c @ z
            y = c @ y + problem.gradients(w) - g
        elif rule == "partial":
            tau, lam, wt = more["tau"], more["lam"], []
            for row, tracked, ids in zip(w, y, problem.own, strict=True):
                model = 2 / SAMPLES * problem.x[ids].T @ problem.x[ids] + (tau + 2 * lam) * np.eye(row.size)
                wt.append(row - np.linalg.solve(model, tracked + 2 * lam * row))
            w = c @ (w + lr * (np.array(wt) - w))
            y = c @ y + problem.gradients(w) - g
        elif rule == "kgt":
            w = w - lr * (g + correction)
            if (step + 1) % more["local"] == 0:
                z = start - w
                correction += (c @ z - z) / (more["local"] * lr)
                w = start = c @ (start - z)
        elif rule == "choco":
            w = w - lr * g
            sent = np.zeros_like(w)
            for row, change in zip(sent, w - known, strict=True):
                largest = np.argsort(-np.abs(change))[: more["count"]]
                row[largest] = change[largest]
            known, known_mixed = known + sent, known_mixed + c @ sent
            w = w + more["rate"] * (known_mixed - known)
        elif rule == "extra":
            is_first = before is None
            after = c @ w - lr * g if is_first else w + c @ w - (before + mixed_before) / 2 - lr * (g - g_before)
            before, mixed_before, g_before, w = w, c @ w, g, after
    return w


SETTINGS = {
    "dgd": ({}, ()),
    "tracking": ({}, ()),
    "extra": ({}, ()),
    "kgt": ({"local": 4}, ("--local-steps", "4")),
    "choco": ({"count": 2, "rate": 0.4}, ("--gossip-density", "0.34", "--gossip-rate", "0.4")),
}


@pytest.mark.parametrize("ranks", [1, 2, 6])
@pytest.mark.parametrize("rule", list(SETTINGS))
def test_rules_are_those_of_their_papers(folder, rule, ranks):
    settings, options = SETTINGS[rule]
    problem = Problem(folder, *PLAIN, "--rule", rule, "--lr", "0.05", *options)
    expected = simulate(problem, rule, 30, 0.05, **settings)
    np.testing.assert_allclose(problem.train(ranks, 30), expected, rtol=0, atol=1e-12)


def test_next_with_l2_is_its_formula_and_without_a_step_along_the_tracker(folder):
    rule_options = ("--rule", "next", "--tau", "2.5", "--lr", "0.2")
    problem = Problem(folder, *PLAIN, *rule_options, "--regularizer", "l2", "--regularizer-weight", "0.05")
    expected = simulate(problem, "next", 40, 0.2, tau=2.5, lam=0.05)
    np.testing.assert_allclose(problem.train(3, 40), expected, rtol=0, atol=1e-12)
    # w = C (w - (a / tau) y).
    result = Problem(folder, *PLAIN, *rule_options).train(2, 40)
    tracked = Problem(folder, *PLAIN, "--rule", "tracking", "--lr", str(0.2 / 2.5)).train(2, 40)
    np.testing.assert_allclose(result, tracked, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("rule", "steps", "options"),
    [
        ("tracking", 500, ("--lr", "0.05")),
        ("tracking", 500, ("--lr", "0.05", "--link-probability", "0.5", "--graph", "complete")),
        ("extra", 500, ("--lr", "0.05")),
        ("kgt", 2000, ("--lr", "0.01", "--local-steps", "5")),
        ("next", 500, ("--lr", "0.3", "--tau", "6", "--mu", "1e-3")),
    ],
)
def test_agents_agree_on_the_solution_of_all_samples(folder, rule, steps, options):
    """Each agent sees only its own samples, and agents' samples differ."""
    problem = Problem(folder, *PLAIN, "--rule", rule, *options)
    w = problem.train(2, steps)
    np.testing.assert_allclose(w, np.tile(problem.solution(), (AGENTS, 1)), rtol=0, atol=1e-9)


def test_next_finds_the_regularized_solution(folder):
    options = ("--rule", "next", "--lr", "0.3", "--tau", "6", "--regularizer-weight", "0.05")
    problem = Problem(folder, *PLAIN, *options, "--regularizer", "l2")
    w = problem.train(1, 500)
    np.testing.assert_allclose(w, np.tile(problem.solution(0.05), (AGENTS, 1)), rtol=0, atol=1e-10)
    # At the minimum of f + 0.05 |w|_1 the gradient of f is in -0.05 times the subdifferential of |w|_1.
    problem = Problem(folder, *PLAIN, *options, "--regularizer", "l1")
    w = problem.train(1, 800)
    np.testing.assert_allclose(w, np.tile(w.mean(axis=0), (AGENTS, 1)), rtol=0, atol=1e-9)
    gradient = problem.gradients(w).mean(axis=0)
    nonzero = np.abs(w[0]) > 1e-6
    np.testing.assert_allclose(gradient[nonzero], -0.05 * np.sign(w[0][nonzero]), rtol=0, atol=1e-8)
    assert (np.abs(gradient[~nonzero]) <= 0.05 + 1e-8).all()


PARTIAL = ("--rule", "next", "--linearization", "partial", "--threads", "1")


def curvature(problem):
    """Return the largest eigenvalue of the mean squared error's second derivatives."""
    return float(np.linalg.eigvalsh(2 / SAMPLES * problem.x.T @ problem.x)[-1])


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [1, 3, 6])
def test_next_that_linearises_the_network_alone_finds_the_regularized_solution(folder, blocks):
    """For a linear network the convex model of `Inner` is the agent's loss itself."""
    tau = str(curvature(Problem(folder)))
    options = (*PLAIN, *PARTIAL, "--lr", "0.3", "--tau", tau, "--mu", "1e-3", "--inner-blocks", str(blocks))
    l2 = ("--regularizer", "l2", "--regularizer-weight", "0.05")
    problem = Problem(folder, *options, *l2)
    expected = np.tile(problem.solution(0.05), (AGENTS, 1))
    np.testing.assert_allclose(problem.train(2, 300), expected, rtol=0, atol=1e-10)
    problem = Problem(folder, *options, *l2, "--graph", "complete", "--link-probability", "0.5")
    np.testing.assert_allclose(problem.train(1, 250), expected, rtol=0, atol=1e-10)


def test_iterations_that_linearise_the_network_alone_are_their_formula(folder):
    more = ("--lr", "0.2", "--tau", "0.7", "--regularizer", "l2", "--regularizer-weight", "0.05")
    problem = Problem(folder, *PLAIN, *PARTIAL, *more)
    expected = simulate(problem, "partial", 20, 0.2, tau=0.7, lam=0.05)
    np.testing.assert_allclose(problem.train(3, 20), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        ("l1", "full"), ("box", "full"), ("ball", "full"), ("box", "partial"),
        *(pytest.param(kind, "partial", marks=pytest.mark.slow) for kind in ("l1", "ball")),
    ],
)  # fmt: skip
def test_next_finds_the_solution_in_a_set(folder, rule, kind):
    """Check the optimality conditions of the loss of all samples: those of the subgradient, or of the normal cone."""
    problem = Problem(folder)
    size = {"box": 0.4, "ball": 0.6}.get(kind, 0.05)
    assert np.abs(problem.solution()).max() > 0.6
    more = (
        ("--regularizer", "l1", "--regularizer-weight", "0.05") if kind == "l1" else ("--constraint", f"{kind}:{size}")
    )
    tau = str(curvature(problem))
    problem = Problem(folder, *PLAIN, *PARTIAL, "--linearization", rule, "--lr", "0.3", "--tau", tau, *more)
    w = problem.train(2, 400)
    np.testing.assert_allclose(w, np.tile(w.mean(axis=0), (AGENTS, 1)), rtol=0, atol=1e-9)
    w, slope = w[0], problem.gradients(w).mean(axis=0)
    if kind == "l1":
        nonzero = np.abs(w) > 1e-6
        np.testing.assert_allclose(slope[nonzero], -size * np.sign(w[nonzero]), rtol=0, atol=1e-8)
        assert (np.abs(slope[~nonzero]) <= size + 1e-8).all()
    elif kind == "box":
        inside = np.abs(w) < size - 1e-9
        assert 0 < inside.sum() < len(w) and np.abs(w).max() <= size
        np.testing.assert_allclose(slope[inside], 0, rtol=0, atol=1e-8)
        assert (slope[~inside] * w[~inside] < 0).all()
    else:
        assert np.linalg.norm(w) == pytest.approx(size, abs=1e-9)
        np.testing.assert_allclose(slope, w * (slope @ w) / (w @ w), rtol=0, atol=1e-8)


@pytest.mark.slow
def test_agents_find_what_one_process_finds_of_a_network(tmp_path):
    """A 6-8-1 network and ten agents with 40 samples each, which differ: the loss of the mean weights is within a
    quarter of the best."""
    rng, n = np.random.default_rng(0), 400
    x = rng.uniform(-1, 1, size=(n, 6))
    y = np.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2] + 0.5 * np.cos(3 * x[:, 3]) + 0.02 * rng.normal(size=n)
    np.savez(tmp_path / "own.npz", x=x, y=y[:, None], x_test=x[:9], y_test=y[:9, None])
    layers = ('type = "dense"\nunits = 8', 'type = "tanh"', 'type = "dense"\nunits = 1')
    (tmp_path / "small.toml").write_text(
        '[model]\nmodel = "custom"\n' + "".join(f"[[model.layers]]\n{layer}\n" for layer in layers)
    )
    words = (*FULL, *PLAIN, *PARTIAL, "--agents", "10", "--batch-size", str(n), "--graph", "erdos:0.25", "--tau", "0.1",
             "--graph-seed", "3", "--lr", "0.1", "--mu", "0.01", "--regularizer", "l2", "--regularizer-weight", "1e-3",
             "--dataset", str(tmp_path / "own.npz"), "--config", str(tmp_path / "small.toml"))  # fmt: skip
    config, dataset = usual(parse(list(words))), open_dataset(str(tmp_path / "own.npz"), "")
    network = make_network("custom", dataset.shape, 1, **config.model.shape)

    def work(world):
        method = find_method("next")(Context(world, network, dataset, config, NumpyOps()))

        def residuals(w):
            method.x[...] = w
            scores = method.inner.jacobian.model.forward(np.ascontiguousarray(x.T)).scores[0]
            return np.concatenate([(scores - y) / n**0.5, 1e-3**0.5 * w])

        starts = [method.w[0].copy(), *(0.3 * np.random.default_rng(k).normal(size=method.x.size) for k in range(4))]
        best = min(2 * least_squares(residuals, start).cost for start in starts)
        for _ in range(2000):
            method.step(Batch(np.arange(n)), 0.1)
        w = method.w.mean(axis=0)
        assert np.abs(method.w - w).max() < 1e-3
        return float(residuals(w) @ residuals(w)) / best

    (ratio,) = run_ranks(1, work, timeout=1000)
    assert 1 <= ratio <= 1.25


def test_without_tracking_agents_stay_apart(folder):
    spread = {}
    for rule in ("tracking", "dgd"):
        w = Problem(folder, *PLAIN, "--rule", rule, "--lr", "0.05").train(1, 1500)
        spread[rule] = np.abs(w - w.mean(axis=0)).max()
    assert spread["dgd"] > 100 * spread["tracking"] and spread["dgd"] > 1e-3


@pytest.mark.slow
def test_choco_that_sends_all_is_dgd_and_converges_near_it_with_a_third(folder):
    dgd = Problem(folder, *PLAIN, "--rule", "dgd", "--lr", "0.02")
    all_components = Problem(
        folder, *PLAIN, "--rule", "choco", "--lr", "0.02", "--gossip-density", "1", "--gossip-rate", "1"
    )
    np.testing.assert_allclose(all_components.train(2, 50), dgd.train(2, 50), rtol=0, atol=1e-12)
    third = Problem(
        folder, *PLAIN, "--rule", "choco", "--lr", "0.002", "--gossip-density", "0.34", "--gossip-rate", "0.3"
    )
    w = third.train(3, 3000)
    assert np.abs(w.mean(axis=0) - third.solution()).max() < 0.02
    # A step sends two of six components, as value and index, over each of the two links that leave a rank.
    assert third.found[0][2] == 3000 * 2 * 2 * 2 * 8


@pytest.mark.parametrize("tracking", ["full", "minibatch"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_trackers_keep_the_mean_of_the_gradients(folder, tracking, dtype):
    """Check every iteration, with links that fail, and with gradients of all samples or of minibatches."""

    def look(method):
        return method.rule.vectors["tracker"].copy(), method.rule.vectors["gradient"].copy()

    options = ("--tracking", tracking, "--dtype", dtype, "--link-probability", "0.7", "--lr", "0.02")
    problem = Problem(folder, *PLAIN, *options)
    problem.train(2, 60, look)
    bound = 1e-12 if dtype == "float64" else 1e-5
    for by_rank in zip(*(rows for _, rows, _ in problem.found), strict=True):
        y, g = (np.concatenate([vectors[k] for vectors in by_rank]).mean(axis=0) for k in (0, 1))
        assert np.abs(y - g).max() <= bound * max(1.0, np.abs(g).max())


def test_ranks_change_nothing_and_a_link_costs_two_vectors_a_step(folder):
    problem = Problem(folder, "--graph", "exponential", "--lr", "0.01")
    one_rank = problem.train(1, 20)
    for ranks in (2, 4, 6):
        assert np.array_equal(problem.train(ranks, 20), one_rank), ranks
    # An agent has 4 neighbours, 1, 2, 4 and 5 places on, and sends them its weights and tracker, 6 float64 each.
    degrees = make_graph("exponential", AGENTS, 0).degrees
    assert [sent for *_, sent in problem.found] == [20 * d * 2 * 6 * 8 for d in degrees]


def test_no_rank_reads_the_samples_of_another(folder, monkeypatch):
    from threading import get_ident

    reads, read = {}, Split.read

    def noting(self, rows):
        if self.n == SAMPLES:
            reads.setdefault(get_ident(), []).extend(np.asarray(rows).tolist())
        return read(self, rows)

    monkeypatch.setattr(Split, "read", noting)
    problem = Problem(folder)
    problem.train(3, 3)
    assert len(reads) == 3
    own = [set(np.concatenate(problem.own[k : k + 2]).tolist()) for k in (0, 2, 4)]
    assert sorted(map(set, reads.values()), key=min) == sorted(own, key=min)


def test_scores_of_every_agent_are_told(tmp_path):
    out = tmp_path / "run"
    options = ("--method", "next", "--epochs", "2", "--split", "skewed:2", "--model", "mlp", "--widths", "20")
    status, stdout, err = run(2, "-m", "psmpi.train", *options, "--out", out)
    assert status == 0 and "8 agents with 2 neighbours each, spectral gap 0.195" in stdout, err
    row = loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    accuracies = row["agents_accuracy"]
    assert len(accuracies) == 8 and row["worst_accuracy"] == min(accuracies)
    assert row["mean_accuracy"] == pytest.approx(np.mean(accuracies))
    assert (
        row["disagreement"] > 0
        and row["tracking_error"] < 1e-5
        and row["spectral_gap"] == pytest.approx(0.195, abs=1e-3)
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--graph", "tree"), "neither a graph nor a file"),
        (("--graph", "erdos:0"), "a probability above 0"),
        (("--agents", "2"), "every rank needs an agent"),
        (("--agents", "4000"), "training samples only"),
        (("--split", "skewed"), "skewed:K"),
        (("--rule", "next"), "add --optimizer sgd"),
        (("--rule", "extra", *PLAIN, "--link-probability", "0.5"), "needs every link in every exchange"),
        (("--tau", "3"), "--tau is an option of --rule next"),
        (("--rule", "next", *PLAIN, "--tau", "0"), "--tau 0"),
        (("--local-steps", "3"), "--local-steps is an option of --rule kgt"),
        (("--regularizer", "l2", "--rule", "next", *PLAIN), "give both, or none"),
        (("--optimizer", "muon"), "steps whole matrices"),
        (("--on-nan", "skip"), "cannot leave out a single step"),
        (("--agents", "60", "--tracking", "minibatch", "--batch-size", "32"), "leaves some of 60 agents"),
        (("--beta1", "2"), "beta1"),
        (("--graph-seed", "5"), "nothing is drawn"),
        (("--linearization", "partial"), "--linearization is an option of --rule next"),
        ((*PARTIAL[:4], *PLAIN, "--model", "mlp", "--widths", "200"), "10,000 weights at most"),
        ((*PARTIAL[:4], *PLAIN, "--model", "mlp", "--widths", "20", "--batch-norm"), "one sample at a time"),
        (("--rule", "next", *PLAIN, "--inner-blocks", "2"), "is an option of --linearization partial"),
        ((*PARTIAL[:4], *PLAIN, "--model", "mlp", "--widths", "20", "--inner-blocks", "2", "--constraint", "ball:3"),
          "separate blocks cannot keep one length"),
        (("--rule", "next", *PLAIN, "--constraint", "box:-1"), "expected none, box:B"),
        ((*PARTIAL[:4], *PLAIN, "--model", "mlp", "--widths", "20", "--loss", "hinge"), "hinge has kinks"),
        (("--rule", "next", *PLAIN, "--lr", "2"), "is 1 at most"),
        (("--agents", "40", "--split", "skewed:1", "--tracking", "minibatch", "--batch-size", "40", "--model", "mlp",
          "--batch-norm"), "with a single sample"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_message(tmp_path, options, says):
    status, out, err = run(3, "-m", "psmpi.train", "--method", "next", *options, "--out", tmp_path / "run")
    assert status == 1 and (out + err).count(says) == 1 and "Traceback" not in err, out + err


def test_other_agents_start_from_the_mean(tmp_path):
    options = ("--method", "next", "--max-steps", "3", "--out", tmp_path / "run")
    status, _, err = run(2, "-m", "psmpi.train", *options)
    assert status == 0, err
    for steps, more in (("4", ()), ("5", ("--rule", "choco"))):
        words = (*options[:2], "--resume", "auto", "--agents", "6", *more, "--max-steps", steps, *options[4:])
        status, out, err = run(2, "-m", "psmpi.train", *words)
        assert status == 0 and "does not hold the weights of these agents" in out, out + err


MIDDLE = ("--rule", "kgt", "--optimizer", "sgd", "--local-steps", "5", "--lr", "0.01")


@pytest.mark.parametrize(
    "options",
    [MIDDLE, ("--rule", "choco"), ("--tracking", "minibatch", "--link-probability", "0.5")],
    ids=["within a round of local steps", "choco", "links that fail"],
)
def test_a_resumed_run_ends_in_the_same_bits_on_other_ranks(tmp_path, options):
    case = Case("next", tmp_path, options)
    resumed_runs_end_the_same(case)
    full_run, resumed_run = case.run(1, "--max-steps", "12"), case.run(4, "--max-steps", "7")
    case.run(2, "--max-steps", "12", "--resume", "auto", out=resumed_run)
    full_tensors, resumed_tensors = tensors(newest(full_run)), tensors(newest(resumed_run))
    agents = [name for name in full_tensors if not name.startswith("weights/")]
    assert agents and all(np.array_equal(full_tensors[name], resumed_tensors[name]) for name in agents)


def test_what_was_sent_over_other_links_is_forgotten(folder):
    """Choco's vectors belong to one graph; with another graph they start at zero."""
    problem, steps = Problem(folder, *PLAIN, "--rule", "choco", "--lr", "0.01"), 5

    def work(world):
        method = find_method("next")(Context(world, problem.network, problem.dataset, problem.config, NumpyOps()))
        for _ in range(steps):
            method.step(Batch(np.arange(SAMPLES)), 0.01)
        assert np.abs(method.rule.near).max() > 0
        method.restored(True, frozenset())
        assert np.abs(method.rule.near).max() > 0
        method.scalars["graph"] = 1
        method.restored(True, frozenset())
        return float(np.abs(method.rule.near).max() + np.abs(method.rule.known).max())

    assert run_ranks(2, work) == [0.0, 0.0]


def test_the_worst_error_is_the_largest(folder, tmp_path):
    words = ("--dataset", folder / "own.npz", "--config", folder / "linear.toml", *FULL, *PLAIN, "--rule", "dgd")
    status, _, err = run(2, "-m", "psmpi.train", *words, "--lr", "0.1", "--out", tmp_path / "run")
    assert status == 0, err
    row = loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["worst_rmse"] == max(row["agents_rmse"]) > min(row["agents_rmse"])


@pytest.fixture
def files(tmp_path):
    """Write a file for each of three ranks, with samples that differ; return the samples and targets of all ranks."""
    rng, x, y = np.random.default_rng(8), [], []
    truth = rng.normal(size=(FEATURES, 1))
    for rank, count in enumerate((40, 50, 30)):
        x.append(rng.normal(loc=rank - 1, size=(count, FEATURES)))
        y.append(x[-1] @ truth + 0.3 * rank + 0.1 * rng.normal(size=(count, 1)))
        np.savez(tmp_path / f"own-{rank}.npz", x=x[-1], y=y[-1], x_test=x[-1][:7], y_test=y[-1][:7])
    (tmp_path / "linear.toml").write_text(LINEAR)
    return np.concatenate(x), np.concatenate(y).reshape(-1)


def private(folder, *options, batch=60, epochs=1):
    return ("-m", "psmpi.train", "--method", "next", "--agents", "6", "--private-data", *PLAIN, "--lr", "0.02",
            "--loss", "squared", "--clip", "0", "--batch-size", str(batch), "--dtype", "float64", "--threads", "1",
            "--epochs", str(epochs), "--dataset", folder / "own-{rank}.npz", "--config",
            folder / "linear.toml", *options)  # fmt: skip


@pytest.mark.parametrize("sparse", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_agents_with_private_data_find_the_solution_of_all_of_it(tmp_path, files, sparse):
    for rank in range(3 * sparse):
        with np.load(tmp_path / f"own-{rank}.npz") as saved:
            matrices = {key: csr_array(values) for key, values in saved.items() if key.startswith("x")}
            parts = {f"{key}_{part}": getattr(m, part) for key, m in matrices.items() for part in PARTS}
            np.savez(tmp_path / f"own-{rank}.npz", **parts, y=saved["y"], y_test=saved["y_test"])
    x, y = np.column_stack([files[0], np.ones(len(files[1]))]), files[1]
    out = tmp_path / "run"
    status, stdout, err = run(3, *private(tmp_path, "--out", out, epochs=25, batch=1))
    assert status == 0, stdout + err
    trained = tensors(newest(out))
    expected = np.linalg.lstsq(x, y, rcond=None)[0]
    w = np.append(trained["weights/dense1.weight"].reshape(-1), trained["weights/dense1.bias"])
    np.testing.assert_allclose(w, expected, rtol=0, atol=1e-8)
    row = loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    test_rows = np.concatenate([np.arange(first, first + 7) for first in (0, 40, 90)])
    error = np.sqrt(np.mean((x[test_rows] @ expected - y[test_rows]) ** 2))
    assert row["test_rmse"] == pytest.approx(error, rel=1e-6)


def test_a_training_on_private_data_goes_on_with_the_same_data_alone(tmp_path, files):
    full_run, cut_run = tmp_path / "whole", tmp_path / "part"
    for out, steps in ((full_run, "9"), (cut_run, "5")):
        status, _, err = run(3, *private(tmp_path, "--max-steps", steps, "--out", out, epochs=9))
        assert status == 0, err
    resume_options = ("--max-steps", "9", "--resume", "auto", "--out", cut_run)
    status, stdout, err = run(2, *private(tmp_path, *resume_options, epochs=9))
    assert status == 1 and err.count("is not the data set that checkpoint") == 1, stdout + err
    status, stdout, err = run(3, *private(tmp_path, *resume_options, epochs=9))
    assert status == 0, stdout + err
    first, second = tensors(newest(full_run)), tensors(newest(cut_run))
    assert first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)
    data = dict(np.load(tmp_path / "own-1.npz"))
    data["y"][3] += 1
    np.savez(tmp_path / "own-1.npz", **data)
    status, stdout, err = run(3, *private(tmp_path, *resume_options, epochs=9))
    assert status == 1 and err.count("is not the data set that checkpoint") == 1, stdout + err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": np.zeros((20, 3)), "y": np.zeros((20, 1)), "x_test": np.zeros((4, 3)), "y_test": np.zeros((4, 1))},
         "samples of shape"),
        ({"x": np.zeros((20, FEATURES)), "y": np.arange(20) % 3, "x_test": np.zeros((4, FEATURES)),
          "y_test": np.arange(4) % 3}, "targets that are"),
        ({"x": np.zeros((20, FEATURES)), "y": np.zeros((20, 2)), "x_test": np.zeros((4, FEATURES)),
          "y_test": np.zeros((4, 2))}, "targets of so many values: 1, rank 2 2"),
        ({"x": np.zeros((1, FEATURES)), "y": np.zeros((1, 1)), "x_test": np.zeros((4, FEATURES)),
          "y_test": np.zeros((4, 1))}, "a rank has 1 training sample for its 2 agents"),
    ],
    ids=["shape", "kind", "values", "samples"],
)  # fmt: skip
def test_private_data_that_do_not_fit_are_one_message(tmp_path, files, change, says):
    np.savez(tmp_path / "own-2.npz", **change)
    status, out, err = run(3, *private(tmp_path, "--out", tmp_path / "run"))
    assert status == 1 and (out + err).count(says) == 1 and "Traceback" not in err, out + err


def test_private_data_that_are_not_there_or_not_meant_are_one_message(tmp_path, files):
    (tmp_path / "own-1.npz").unlink()
    status, out, err = run(3, *private(tmp_path, "--out", tmp_path / "run"))
    assert status == 1 and (out + err).count("own-1.npz") == 1, out + err
    words = ("-m", "psmpi.train", "--method", "data_parallel", "--dataset", tmp_path / "own-{rank}.npz", "--config",
             tmp_path / "linear.toml", "--loss", "squared")  # fmt: skip
    status, out, err = run(2, *words, "--out", tmp_path / "run")
    assert status == 1 and (out + err).count("stands for the number of a rank") == 1, out + err


def test_a_graph_file_that_is_not_the_same_on_all_hosts_is_refused(folder, tmp_path):
    """A patched graph_of gives two ranks different graphs, like files of one name on two hosts."""
    from psmpi.errors import UserError
    from psmpi.methods.next import method as module

    problem = Problem(folder)
    graphs = [make_graph(kind, AGENTS, 0) for kind in ("ring", "complete")]

    def work(world):
        with pytest.raises(UserError, match="is not the same on all hosts"):
            find_method("next")(Context(world, problem.network, problem.dataset, problem.config, NumpyOps()))

    from threading import get_ident

    threads = {}

    def graph_of_rank(settings):
        return graphs[threads.setdefault(get_ident(), len(threads)) % 2]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "graph_of", graph_of_rank)
        run_ranks(2, work)


@pytest.mark.slow
def test_agents_with_two_classes_each_learn_all_of_mnist(train):
    """After as many epochs the worst agent is within a point of one process with all samples; with --rule dgd it is
    not."""
    setting = ("--dataset", "mnist", "--data-dir", real("mnist") / "mnist", "--model", "mlp", "--widths", "64",
               "--loss", "nll", "--batch-size", "200", "--lr", "0.002", "--epochs", "10", "--threads", "1")  # fmt: skip
    central = train(1, "--method", "data_parallel", *setting).rows[-1]["test_accuracy"]
    agents_options = ("--method", "next", "--agents", "8", "--tracking", "minibatch", "--split", "skewed:2")
    assert train(2, *agents_options, *setting).rows[-1]["worst_accuracy"] >= central - 0.01
    assert train(2, *agents_options, "--rule", "dgd", *setting).rows[-1]["worst_accuracy"] < central - 0.05


def test_the_same_private_file_twice_is_told(tmp_path, files):
    for rank in (0, 2):
        (tmp_path / f"own-{rank}.npz").write_bytes((tmp_path / "own-1.npz").read_bytes())
    status, stdout, err = run(3, *private(tmp_path, "--out", tmp_path / "run"))
    assert status == 0 and stdout.count("have the same training samples") == 1, stdout + err


def test_a_set_that_comes_with_a_resume_holds_from_its_first_step(tmp_path):
    options = ("--method", "next", "--rule", "next", *PLAIN, "--tau", "5", "--lr", "0.01", "--model", "mlp", "--widths",
               "20", "--out", tmp_path / "run")  # fmt: skip
    for steps, more in (("3", ()), ("4", ("--resume", "auto", "--constraint", "box:0.05"))):
        status, stdout, err = run(2, "-m", "psmpi.train", *options, "--max-steps", steps, *more)
        assert status == 0, stdout + err
    saved = tensors(newest(tmp_path / "run"))
    assert max(np.abs(saved[name]).max() for name in saved if name.startswith("weights/")) <= 0.05 + 1e-7


def test_derivatives_of_scores_are_in_the_memory_that_is_needed(folder):
    needs = []
    for kind in ("full", "partial"):
        problem = Problem(folder, *PLAIN, "--rule", "next", "--linearization", kind)
        kind = find_method("next")
        needs.append(kind.needed(2, problem.network, problem.dataset, problem.config))
    rows, size = SAMPLES // AGENTS, FEATURES + 1
    for full, partial in zip(*needs, strict=True):
        assert partial["buffers"] - full["buffers"] == 8 * (rows * size + size**2)
