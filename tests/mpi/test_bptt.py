"""Truncated back-propagation through time against data parallelism, and against a simulation from the definitions."""

from dataclasses import dataclass

import numpy as np
import pytest
from helpers.runs import run

from psmpi.backend import NumpyOps, make_backend
from psmpi.data import Batch, open_dataset
from psmpi.nn.zoo import make_network
from psmpi.registry import find_method
from psmpi.testing import run_ranks
from psmpi.train import parse
from psmpi.training.context import Context
from psmpi.training.usual import usual

STEPS, CLASSES, LR, FUTURE_LR = 7, 4, 0.5, 0.05
BATCHES = [np.arange(13), np.arange(3, 16), np.arange(1, 14)]


class Problem:
    """Random sequences with one label each, or one label at each step, and a stack of recurrent layers."""

    def __init__(self, folder, kind="lstm", *options, by_step=True, ragged=True, layers=2):
        rng, n = np.random.default_rng(5), 24
        x, y = rng.normal(size=(n, STEPS, 3)), rng.integers(0, CLASSES, (n, STEPS) if by_step else n)
        lengths = rng.integers(1, STEPS + 1, n) if ragged else np.full(n, STEPS)
        lengths[0] = STEPS
        path, half = folder / "own.npz", (slice(0, 16), slice(16, None))
        arrays = {"x": x, "y": y, "lengths": lengths}
        np.savez(
            path, **{f"{k}{end}": v[s] for k, v in arrays.items() for end, s in zip(("", "_test"), half, strict=True)}
        )
        self.words = ("--dataset", str(path), "--model", kind, "--widths", *["5"] * layers, "--loss", "nll", "--clip",
                      "0", "--optimizer", "sgd", "--lr", str(LR), "--dtype", "float64", "--threads", "1", "--epochs",
                      "1", "--batch-size", "13", *options)  # fmt: skip
        self.dataset, self.kind, self.ragged = open_dataset(str(path), ""), kind, ragged
        self.by_step, self.layers = by_step, layers

    def steps(self, ranks, method, *options, batches=BATCHES, ops=NumpyOps):
        """Train on `batches`; return rank 0's `Result`, with the loss summed over ranks."""
        config = usual(parse(["--method", method, *self.words, *options]))
        shape, by_step = config.model.shape, self.by_step
        network = make_network(self.kind, self.dataset.shape, CLASSES, **shape, by_step=by_step)
        find_method(method).check(ranks, network, self.dataset, config)

        def work(world):
            trainer = find_method(method)(Context(world, network, self.dataset, config, ops()))
            first = named(trainer.layout, trainer.w.copy())
            for ids in batches:
                trainer.step(Batch(ids), LR)
            future = getattr(trainer, "future", None)
            future_weights = None if future is None else named(future.network.layout, future.network.w)
            return first, named(trainer.layout, trainer.w), future_weights, trainer.loss_sum, trainer.test()

        by_rank = run_ranks(ranks, work, timeout=120)
        assert all(np.array_equal(by_rank[0][1][name], result[1][name]) for result in by_rank for name in by_rank[0][1])
        loss = sum(result[3] for result in by_rank)
        return Result(by_rank[0][0], by_rank[0][1], by_rank[0][2], loss, by_rank[0][4])


@dataclass
class Result:
    """Parameters by name before (first) and after (weights) training, those of M (future), the sum of losses, test
    scores."""

    first: dict
    weights: dict
    future: dict | None
    loss: float
    test: dict


def named(layout, vector):
    """Return the parameters of a flat vector by name."""
    parameters = {}
    for p in layout.parameters:
        parameters[p.name] = np.concatenate([vector[a:b] for a, b in layout.runs_of_parameters({p.name}).intervals])
        parameters[p.name] = parameters[p.name].reshape(p.shape).copy()
    return parameters


def gap(first, second):
    """Return the largest difference of arrays of the same names, relative to the largest number of the first."""
    assert first.keys() == second.keys()
    largest = max(np.abs(value).max() for value in first.values())
    return max(np.abs(first[name] - second[name]).max() for name in first) / largest


# The simulation processes one sample and one step at a time, with derivatives by the chain rule.


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def forward_cell(kind, w, x, h, c):
    """Return (h, c, intermediate values) of one step from the states (h, c)."""
    a = w["weight"] @ x + w["recurrent"] @ h + w["bias"]
    if kind == "rnn":
        new = np.tanh(a)
        return new, c, (x, h, c, new)
    i, f, g, o = np.split(a, 4)
    i, f, g, o = sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
    cell = f * c + i * g
    return o * np.tanh(cell), cell, (x, h, c, i, f, g, o, cell)


def backward_cell(kind, w, kept, dh, dc, grad):
    """Return (dx, dh, dc) of the previous step from dh and dc of this step; add weight gradients to grad."""
    if kind == "rnn":
        x, h, _, new = kept
        da = dh * (1 - new**2)
        dc_before = dc
    else:
        x, h, c, i, f, g, o, cell = kept
        dcell = dc + dh * o * (1 - np.tanh(cell) ** 2)
        da = np.concatenate([
            dcell * g * i * (1 - i), dcell * c * f * (1 - f), dcell * i * (1 - g**2), dh * np.tanh(cell) * o * (1 - o)
        ])  # fmt: skip
        dc_before = dcell * f
    grad["weight"] += np.outer(da, x)
    grad["recurrent"] += np.outer(da, h)
    grad["bias"] += da
    return w["weight"].T @ da, w["recurrent"].T @ da, dc_before


class Simulation:
    """Section 2.2 of Jaderberg et al. (2017) in loops: plain gradient descent, and a linear M that starts at 0."""

    def __init__(self, problem, first, unroll, synthetic):
        self.kind, self.p, self.unroll, self.synthetic = problem.kind, problem, unroll, synthetic
        self.w = {name: value.copy() for name, value in first.items()}
        recurrent = [name.rpartition(".")[0] for name in first if name.endswith(".recurrent")]
        self.layers = recurrent
        self.head = next(layer for name in first if (layer := name.rpartition(".")[0]) not in recurrent)
        self.units = len(first[f"{recurrent[0]}.recurrent"][0])
        self.carried = 2 if self.kind == "lstm" else 1
        size = self.carried * self.units * len(recurrent)
        self.m, self.bias, self.loss, self.square = np.zeros((size, size)), np.zeros(size), 0.0, 0.0

    def of(self, layer, source):
        return {k: source[f"{layer}.{k}"] for k in ("weight", "recurrent", "bias")}

    def step(self, ids):
        train = self.p.dataset.train
        x = train.read(ids).reshape(len(ids), *self.p.dataset.shape)
        lengths = np.full(len(ids), STEPS) if train.lengths is None else train.lengths[ids]
        count = int((train.targets[ids] >= 0).sum()) if self.p.by_step else len(ids)
        states = [[(np.zeros(self.units), np.zeros(self.units)) for _ in self.layers] for _ in ids]
        for a in range(0, STEPS, self.unroll):
            z = min(a + self.unroll, STEPS)
            grad = {name: np.zeros_like(value) for name, value in self.w.items()}
            gm, gb, loss = np.zeros_like(self.m), np.zeros_like(self.bias), 0.0
            unit, returned = np.sqrt(self.square), 0.0
            for k, sample in enumerate(ids):
                first_states = self.flat(states[k])
                stop = min(z, lengths[k])
                states[k], passed = self.ahead(states[k], x[k], a, stop)
                last_states = self.flat(states[k])
                future = np.zeros(len(last_states))
                if self.synthetic and lengths[k] > z:
                    future = unit * (self.m @ last_states + self.bias) / count
                share, back = self.back(passed, train.targets[sample], a, stop, lengths[k], future, grad, count)
                loss += share
                if self.synthetic and 0 < a < lengths[k]:
                    returned += count**2 * (back @ back)
                    error = self.m @ first_states + self.bias - count * back / (unit or 1)
                    gm += 2 / len(ids) * np.outer(error, first_states)
                    gb += 2 / len(ids) * error
            for name in self.w:
                self.w[name] -= LR * grad[name]
            if a and unit:
                self.m -= FUTURE_LR * gm
                self.bias -= FUTURE_LR * gb
            if a:
                mean = returned / len(ids) / len(self.bias)
                self.square = 0.99 * self.square + 0.01 * mean if self.square else mean
            self.loss += loss * len(ids)

    def flat(self, states):
        """Concatenate the states of all layers: h, and c too for an lstm."""
        return np.concatenate([part for pair in states for part in pair[: self.carried]])

    def ahead(self, states, x, a, stop):
        passed, states = [], list(states)
        for t in range(a, stop):
            inputs, kept = x[:, t], []
            for k, layer in enumerate(self.layers):
                h, c, cell_values = forward_cell(self.kind, self.of(layer, self.w), inputs, *states[k])
                states[k], inputs = (h, c), h
                kept.append(cell_values)
            passed.append((inputs, kept))
        return states, passed

    def back(self, passed, targets, a, stop, length, future, grad, count):
        """Return a sample's loss over the steps [a, stop) and the gradient of the states before them."""
        parts, loss = np.split(future, len(self.layers) * self.carried), 0.0
        dstates = [parts[k : k + self.carried] for k in range(0, len(parts), self.carried)]
        dstates = [[*own, np.zeros(self.units)][:2] for own in dstates]
        for t in reversed(range(a, stop)):
            top, kept = passed[t - a]
            label = targets[t] if self.p.by_step else (targets if t == length - 1 else -1)
            dh = np.zeros(self.units)
            if label >= 0:
                v, bias = self.w[f"{self.head}.weight"], self.w[f"{self.head}.bias"]
                scores = v @ top + bias
                chances = np.exp(scores - scores.max())
                chances /= chances.sum()
                loss -= np.log(chances[label]) / count
                d = (chances - np.eye(len(chances))[label]) / count
                grad[f"{self.head}.weight"] += np.outer(d, top)
                grad[f"{self.head}.bias"] += d
                dh = v.T @ d
            for k in reversed(range(len(self.layers))):
                layer = self.layers[k]
                dx, *dstates[k] = backward_cell(
                    self.kind, self.of(layer, self.w), kept[k], dstates[k][0] + dh, dstates[k][1],
                    self.of(layer, grad),
                )  # fmt: skip
                dh = dx
        return loss, self.flat([tuple(pair) for pair in dstates])


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
@pytest.mark.parametrize("by_step", [False, True], ids=["label", "steps"])
@pytest.mark.parametrize("kind", ["rnn", "lstm", "gru"])
def test_one_window_is_data_parallelism(tmp_path, kind, by_step, ragged, ranks):
    problem = Problem(tmp_path, kind, by_step=by_step, ragged=ragged)
    expected = problem.steps(ranks, "data_parallel")
    for unroll in ("7", "30"):
        result = problem.steps(ranks, "bptt", "--unroll", unroll, "--future", "synthetic")
        assert gap(result.weights, expected.weights) <= 1e-12
        assert result.loss == pytest.approx(expected.loss, rel=1e-12) and result.test == expected.test


@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
@pytest.mark.parametrize("by_step", [False, True], ids=["label", "steps"])
@pytest.mark.parametrize("future", ["none", "synthetic"])
@pytest.mark.parametrize("kind", ["rnn", "lstm"])
def test_windows_are_those_of_a_simulation(tmp_path, kind, future, by_step, ragged):
    """One to three windows on 1 and 3 ranks: weights, M's weights and losses after three minibatches."""
    problem = Problem(tmp_path, kind, by_step=by_step, ragged=ragged)
    options = ("--future", future, *(("--future-lr", str(FUTURE_LR)) if future == "synthetic" else ()))
    for unroll in (7, 4, 3):
        for ranks in (1, 3):
            result = problem.steps(ranks, "bptt", "--unroll", str(unroll), *options)
            simulated = Simulation(problem, result.first, unroll, future == "synthetic")
            for ids in BATCHES:
                simulated.step(ids)
            assert gap(result.weights, simulated.w) <= 1e-11
            assert gap(result.weights, result.first) > 1e-3
            assert result.loss == pytest.approx(simulated.loss, rel=1e-11)
            if future == "synthetic" and unroll < 7:
                future_arrays = list(result.future.values())
                assert np.abs(future_arrays[0] - simulated.m).max() <= 1e-11 * np.abs(simulated.m).max()
                assert np.abs(future_arrays[1] - simulated.bias).max() <= 1e-11 * np.abs(simulated.bias).max()


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_ranks_change_the_order_of_sums_alone(tmp_path, kind):
    """M has hidden layers, and the last minibatch leaves one rank without samples."""
    problem = Problem(tmp_path, kind, "--optimizer", "adam", "--lr", "0.01", "--clip", "1")
    options = ("bptt", "--unroll", "2", "--future", "synthetic", "--future-hidden", "6", "7")
    batches = [*BATCHES, np.arange(2)]
    one_rank, three_ranks = (problem.steps(ranks, *options, batches=batches) for ranks in (1, 3))
    assert gap(one_rank.weights, three_ranks.weights) <= 1e-9 and gap(one_rank.future, three_ranks.future) <= 1e-9
    assert gap(one_rank.weights, problem.steps(1, *options, batches=BATCHES).weights) > 1e-6


@pytest.mark.parametrize("kind", ["rnn", "lstm", "gru"])
def test_kernels_in_c_see_the_weights_of_each_window(tmp_path, kind):
    """The C kernels pack recurrent weights, and every window changes the weights."""
    problem, options = Problem(tmp_path, kind), ("bptt", "--unroll", "2", "--future", "synthetic")
    expected = problem.steps(1, *options)
    result = problem.steps(1, *options, ops=lambda: make_backend("auto", 1))
    assert gap(result.weights, expected.weights) <= 1e-11 and gap(result.future, expected.future) <= 1e-10


def test_very_large_derivatives_come_to_the_same(tmp_path, monkeypatch):
    """The loss scales large derivatives down by a power of two; the method scales M's prediction alike."""
    problem = Problem(tmp_path, "lstm", by_step=True)
    options = ("--unroll", "3", "--future", "synthetic", "--loss", "psl")
    expected = problem.steps(1, "bptt", *options)
    for module in ("psmpi.backend.reference.losses", "psmpi.methods.bptt.method"):
        monkeypatch.setattr(f"{module}.exponent_of", lambda peak: 3)
    result = problem.steps(1, "bptt", *options)
    assert gap(result.weights, expected.weights) <= 1e-12 and gap(result.future, expected.future) <= 1e-12


def test_a_resumed_training_ends_in_the_same_bits(train, tmp_path):
    options = ("--method", "bptt", "--dataset", "repeat_copy:3", "--model", "gru", "--widths", "6", "5", "--loss",
               "nll", "--unroll", "4", "--future", "synthetic", "--future-hidden", "8", "--epochs", "1")  # fmt: skip
    for ranks in (1, 3):
        full_run = train(ranks, *options, "--max-steps", "12", out=tmp_path / f"whole{ranks}")
        train(ranks, *options, "--max-steps", "5", out=tmp_path / f"cut{ranks}")
        resumed = train(ranks, "--resume", "auto", "--max-steps", "12", out=tmp_path / f"cut{ranks}")
        full_tensors, resumed_tensors = full_run.tensors(), resumed.tensors()
        assert full_tensors.keys() == resumed_tensors.keys() and all(
            np.array_equal(full_tensors[name], resumed_tensors[name]) for name in full_tensors
        )


def test_other_options_of_the_future_start_it_afresh(train, tmp_path):
    options = ("--method", "bptt", "--dataset", "copying:2", "--model", "lstm", "--widths", "6", "--loss", "nll",
               "--unroll", "4", "--epochs", "1", "--dtype", "float64")  # fmt: skip
    train(2, *options, "--max-steps", "3", out=tmp_path / "cut")
    resume_options = ("--future", "synthetic", "--resume", "auto", "--max-steps")
    for steps, hidden in (("5", ()), ("7", ("--future-hidden", "9"))):
        trained = train(2, *resume_options, steps, *hidden, out=tmp_path / "cut")
        assert trained.rows[-1]["step"] == int(steps) and "sequence_accuracy" in trained.rows[-1]


def refused(*options):
    status, _, err = run(1, "-m", "psmpi.train", "--method", "bptt", *options)
    assert status == 1 and "Traceback" not in err and err.count("error: ") == 1, err
    return " ".join(err.split())


def test_limits_are_said(tmp_path):
    rows = ("--dataset", "digits:rows", "--model", "lstm", "--widths", "5")
    assert "is for sequences" in refused("--dataset", "digits", "--model", "mlp")
    assert "has none: use --model rnn, gru or lstm" in refused("--dataset", "digits:rows", "--model", "mlp")
    assert "evaluates the loss more than once" in refused(*rows, "--optimizer", "lbfgs")
    assert "--psl-weights current is not for" in refused(*rows, "--psl-weights", "current")
    assert "--future-hidden 0: expected widths" in refused(*rows, "--future", "synthetic", "--future-hidden", "0")
    assert "are for --future synthetic" in refused(*rows, "--future-lr", "0.1")
    assert "expected a number from 0" in refused(*rows, "--future", "synthetic", "--future-lr", "-1")
    lstm, dense = '[[model.layers]]\ntype = "lstm"\nunits = 5\n', '[[model.layers]]\ntype = "dense"\nunits = 10\n'
    (tmp_path / "net.toml").write_text(f'[model]\nmodel = "custom"\n{lstm}[[model.layers]]\ntype = "flatten"\n{dense}')
    options = ("--config", tmp_path / "net.toml", "--epochs", "1", "--lr", "0.1", "--batch-size", "10")
    assert "needs all steps at once" in refused("--dataset", "digits:rows", *options)


@pytest.mark.slow
def test_predictions_bring_gradients_from_beyond_the_window():
    """On copying with fixed weights, predictions bring the sum of the windows' gradients nearer to the gradient of
    whole sequences."""
    fixed = ["--dataset", "copying:1", "--model", "lstm", "--widths", "32", "--loss", "nll", "--clip", "0", "--threads",
             "1", "--epochs", "6", "--batch-size", "100", "--lr", "1e-12", "--dtype", "float64"]  # fmt: skip
    dataset, gradients = open_dataset("copying:1", None), {}
    for name, options in (
        ("whole", ("--unroll", "21")),
        ("none", ("--unroll", "7")),
        ("synthetic", ("--unroll", "7", "--future", "synthetic", "--future-lr", "0.001")),
    ):
        config = usual(parse(["--method", "bptt", *fixed, *options]))
        network = make_network("lstm", dataset.shape, 8, **config.model.shape, by_step=True)

        def work(world, network=network, config=config, learns=name == "synthetic"):
            method = find_method("bptt")(Context(world, network, dataset, config, make_backend("auto", 1)))
            for k in range(400 if learns else 0):
                method.step(Batch(np.arange(100) + 100 * (k % 80)), 1e-12)
            total, step = np.zeros(method.g.size), method.descent.step
            method.descent.step = lambda w, g, lr: (np.add(total, g, out=total), step(w, g, lr))
            method.step(Batch(np.arange(8000, 10000)), 1e-12)
            return named(method.layout, total)

        (gradients[name],) = run_ranks(1, work, timeout=300)

    def cosine(name, key):
        a, b = gradients[name][key].ravel(), gradients["whole"][key].ravel()
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    layer = next(key.rpartition(".")[0] for key in gradients["whole"] if key.endswith(".recurrent"))
    for key in (f"{layer}.weight", f"{layer}.recurrent"):
        print(key, cosine("none", key), cosine("synthetic", key))
        assert cosine("synthetic", key) > cosine("none", key) + 0.1


@pytest.mark.slow
def test_synthetic_gradients_learn_where_truncation_does_not(train):
    """On copying over 11 steps in windows of 7, plain truncation stops improving after five epochs."""
    options = ("--method", "bptt", "--dataset", "copying:1", "--model", "lstm", "--widths", "32", "--loss", "nll",
               "--batch-size", "100", "--lr", "0.001", "--unroll", "7", "--epochs", "15", "--threads", "1")  # fmt: skip
    plain = train(1, *options, timeout=400).rows
    synthetic = train(1, *options, "--future", "synthetic", "--future-lr", "0.005", timeout=400).rows
    assert plain[-1]["train_loss"] > plain[4]["train_loss"] - 0.05
    assert synthetic[-1]["train_loss"] < synthetic[4]["train_loss"] - 0.1
    assert synthetic[-1]["train_loss"] < plain[-1]["train_loss"] - 0.1
