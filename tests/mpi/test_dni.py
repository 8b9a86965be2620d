"""Decoupled neural interfaces: against a simulation in NumPy, against back-propagation, and under delays."""

from json import loads

import numpy as np
import pytest
from helpers.datasets import real
from helpers.paths import TESTS
from helpers.processes import launch
from helpers.runs import run
from scipy.special import log_softmax

from psmpi.backend import NumpyOps
from psmpi.checkpoint import newest, read_contents
from psmpi.data import Batch, Minibatches, open_dataset
from psmpi.nn.zoo import make_network
from psmpi.registry import find_method
from psmpi.testing import run_ranks
from psmpi.testing.conformance import tensors
from psmpi.train import parse
from psmpi.training.context import Context
from psmpi.training.usual import usual

DELAYS = TESTS / "helpers" / "program_delays.py"
WIDTHS, FEATURES, CLASSES, SAMPLES, BATCH = (7, 6, 5), 4, 3, 50, 16
PLAIN = ("--method", "dni", "--loss", "nll", "--optimizer", "sgd", "--lr", "0.3", "--synthesizer-lr", "0.3",
         "--clip", "0", "--dtype", "float64", "--batch-size", str(BATCH), "--threads", "1")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with points of three classes, and a network of four layers."""
    path, rng = tmp_path_factory.mktemp("dni"), np.random.default_rng(3)
    x = rng.normal(size=(SAMPLES + 20, FEATURES))
    y = (x @ rng.normal(size=(FEATURES, CLASSES))).argmax(axis=1)
    np.savez(path / "own.npz", x=x[:SAMPLES], y=y[:SAMPLES], x_test=x[SAMPLES:], y_test=y[SAMPLES:])
    layers = "".join(
        f'[[model.layers]]\ntype = "dense"\nunits = {n}\n[[model.layers]]\ntype = "tanh"\n' for n in WIDTHS
    )
    last = f'[[model.layers]]\ntype = "dense"\nunits = {CLASSES}\n'
    (path / "net.toml").write_text(f'[model]\nmodel = "custom"\n{layers}{last}')
    return path


def unpacked(layout, flat):
    """Return the parameters of a flat vector by name."""
    parameters = {p.name: np.empty((p.units, p.unit_size)) for p in layout.parameters}
    for piece in layout.pieces():
        for single in piece.singles():
            p = layout.parameters[single.parameter]
            size = (single.last - single.first) * p.unit_size
            parameters[p.name][single.first : single.last] = flat[single.offset : single.offset + size].reshape(
                -1, p.unit_size
            )
    return {p.name: parameters[p.name].reshape(p.shape) for p in layout.parameters}


class Problem:
    """A training in four blocks, and its data and minibatches for the simulation in NumPy."""

    def __init__(self, folder, *options, steps=23):
        words = ("--dataset", str(folder / "own.npz"), "--config", str(folder / "net.toml"), *PLAIN,
                 "--layer-blocks", "4", *options)  # fmt: skip
        self.config = usual(parse(list(words)))
        self.dataset = open_dataset(str(folder / "own.npz"), "")
        self.network = make_network("custom", self.dataset.shape, CLASSES, **self.config.model.shape)
        data = np.load(folder / "own.npz")
        self.x, self.y, self.steps = data["x"].T, data["y"], steps
        batches = Minibatches(SAMPLES, BATCH, self.config.run.seed, True)
        steps_per_epoch = batches.steps_per_epoch
        self.ids = [batches.ids(*divmod(k, steps_per_epoch)) for k in range(steps)]

    def train(self, ranks, steps=None, slow=None):
        """Train `steps` steps; return the parameters of the network and of the auxiliary networks by name."""
        steps = self.steps if steps is None else steps
        find_method("dni").check(ranks, self.network, self.dataset, self.config)

        def work(world):
            method = find_method("dni")(Context(world, self.network, self.dataset, self.config, NumpyOps()))
            for k in range(steps):
                if slow is not None:
                    slow(world.rank, k)
                method.step(Batch(self.ids[k]), self.config.optimization.lr)
            method.drain()
            runs, auxiliary_runs = method.shards[world.rank], method.auxiliary_w.owned[world.rank]
            return (
                runs,
                method.w.copy(),
                auxiliary_runs,
                method.auxiliary_w.array.copy(),
                method.counter.sent,
                method.auxiliary_w.layout,
            )

        self.found = run_ranks(ranks, work, timeout=120)
        layout, auxiliary_layout = self.network.layout(), self.found[0][5]
        flat, auxiliary_flat = np.full(layout.size, np.nan), np.full(auxiliary_layout.size, np.nan)
        for runs, w, auxiliary_runs, auxiliary_w, *_ in self.found:
            for vector, owned, values in ((flat, runs, w), (auxiliary_flat, auxiliary_runs, auxiliary_w)):
                for a, b in owned.intervals:
                    vector[a:b] = values[owned.local(a, b)]
        return {**unpacked(layout, flat), **unpacked(auxiliary_layout, auxiliary_flat)}

    def onehot(self, ids):
        return np.eye(CLASSES)[self.y[ids]].T


def simulate(problem, ahead=1, share=0.0, given=True, inputs=False, lr=0.3):
    """Return the parameters after the same steps, by the papers' formulas: block after block, without messages."""
    p = problem.train(1, 0)
    last, flight = len(WIDTHS), {}
    for k, ids in enumerate(problem.ids):
        if k >= ahead:
            past_ids, states, targets = flight.pop(k - ahead)
            for r in range(last):
                name = f"cut{r + 1}.gradient.dense1"
                if share < 1:
                    h = states[r]
                    synthesizer_input = np.vstack([h, problem.onehot(past_ids)]) if given else h
                    error = p[f"{name}.weight"] @ synthesizer_input + p[f"{name}.bias"][:, None] - targets[r]
                    p[f"{name}.weight"] -= lr * 2 / len(past_ids) * error @ synthesizer_input.T
                    p[f"{name}.bias"] -= lr * 2 / len(past_ids) * error.sum(axis=1)
                if inputs:
                    name, x = f"cut{r + 1}.inputs.dense1", problem.x[:, past_ids]
                    error = p[f"{name}.weight"] @ x + p[f"{name}.bias"][:, None] - states[r]
                    p[f"{name}.weight"] -= lr * 2 / len(past_ids) * error @ x.T
                    p[f"{name}.bias"] -= lr * 2 / len(past_ids) * error.sum(axis=1)
        b, x, xs, states, targets, gradients = len(ids), problem.x[:, ids], [], [], [], []
        for r in range(last + 1):
            if inputs and r:
                name = f"cut{r}.inputs.dense1"
                x = p[f"{name}.weight"] @ problem.x[:, ids] + p[f"{name}.bias"][:, None]
            xs.append(x)
            z = p[f"dense{r + 1}.weight"] @ x + p[f"dense{r + 1}.bias"][:, None]
            x = np.tanh(z) if r < last else z
            states.append(x)
        above = None
        for r in reversed(range(last + 1)):
            h = states[r]
            if r == last:
                g = np.exp(log_softmax(h, axis=0)) - problem.onehot(ids)
            else:
                name, g = f"cut{r + 1}.gradient.dense1", 0.0
                if share < 1:
                    synthesizer_input = np.vstack([h, problem.onehot(ids)]) if given else h
                    g = (1 - share) * (p[f"{name}.weight"] @ synthesizer_input + p[f"{name}.bias"][:, None])
                g = (g + share * above) * (1 - h * h)
            gradients.insert(0, g)
            above = p[f"dense{r + 1}.weight"].T @ g
            targets.insert(0, above)
        for r, g in enumerate(gradients):
            p[f"dense{r + 1}.weight"] -= lr / b * g @ xs[r].T
            p[f"dense{r + 1}.bias"] -= lr / b * g.sum(axis=1)
        # The target of a cut's synthesizer is the gradient from the block above the cut.
        flight[k] = ids, states, targets[1:]
    return p


def equal(result, expected, atol=1e-12):
    assert result.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(result[name], values, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (("--ahead", "1"), {}),
        (("--ahead", "3"), {"ahead": 3}),
        (("--ahead", "2", "--synthetic", "dni"), {"ahead": 2, "given": False}),
        (("--ahead", "1", "--bp-lambda", "0.4"), {"share": 0.4}),
        (("--ahead", "1", "--bp-lambda", "1", "--synthesizer-lr", "0"), {"share": 1.0}),
        (("--ahead", "2", "--synthetic-inputs"), {"ahead": 2, "inputs": True}),
    ],
    ids=["in turn", "ahead", "without targets", "mixed", "back-propagation", "inputs too"],
)
def test_blocks_learn_what_a_serial_simulation_does(folder, options, settings, ranks):
    problem = Problem(folder, *options)
    equal(problem.train(ranks), simulate(problem, **settings))


def test_the_whole_gradient_from_above_is_back_propagation(folder):
    problem = Problem(folder, "--ahead", "1", "--bp-lambda", "1", "--synthesizer-lr", "0")
    result = problem.train(4)
    words = ("--dataset", str(folder / "own.npz"), "--config", str(folder / "net.toml"), *PLAIN[2:8], *PLAIN[10:])
    config = usual(parse(["--method", "data_parallel", *words]))

    def work(world):
        method = find_method("data_parallel")(Context(world, problem.network, problem.dataset, config, NumpyOps()))
        for ids in problem.ids:
            method.step(Batch(ids), 0.3)
        method.collect()
        return method.state.vectors["weights"].copy()

    (flat,) = run_ranks(1, work)
    equal(result, unpacked(problem.network.layout(), flat))


def test_at_first_only_the_last_block_and_the_synthesizer_below_it_learn(folder):
    problem = Problem(folder, "--ahead", "1")
    start, after_one, after_two = (problem.train(4, steps) for steps in (0, 1, 2))
    last, below = ({f"{name}.{part}" for part in ("weight", "bias")} for name in ("dense4", "dense3"))
    synthesizer = {"cut3.gradient.dense1.weight", "cut3.gradient.dense1.bias"}
    assert not any(values.any() for name, values in start.items() if "gradient" in name)
    assert {name for name in start if not np.array_equal(start[name], after_one[name])} == last
    assert {name for name in start if not np.array_equal(start[name], after_two[name])} == last | synthesizer | below


@pytest.mark.parametrize("ahead", [1, 2, 4])
@pytest.mark.parametrize("more", [(), ("--synthetic-inputs",), ("--local-loss", "greedy")])
def test_delays_change_nothing(folder, ahead, more):
    """Ranks sleep at random and end with the same bits."""
    from time import sleep

    problem = Problem(
        folder, "--ahead", str(ahead), *more, "--optimizer", "adam", "--lr", "0.01", "--synthesizer-lr", "0", steps=60
    )
    undelayed = problem.train(1)
    rngs = [np.random.default_rng(rank) for rank in range(4)]
    delayed = problem.train(4, slow=lambda rank, k: sleep(float(rngs[rank].uniform(0, 0.005))))
    assert all(np.array_equal(undelayed[name], delayed[name]) for name in undelayed)


STRESS = [(4, 1), (4, 2), (4, 4), (512, 1), (512, 4)]


@pytest.mark.parametrize(
    ("width", "ahead"), [(512, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in STRESS)]
)
def test_late_ranks_of_mpi_end_where_one_process_does(tmp_path, width, ahead):
    """Blocks sleep at random; MPI copies short messages at once, and long ones wait for their receiver."""
    steps = "300" if ahead != 2 else "100"
    options = ("--method", "dni", "--layer-blocks", "4", "--model", "mlp", "--widths", *[str(width)] * 3, "--max-steps",
               steps, "--ahead", str(ahead), "--loss", "nll", "--dtype", "float64", "--threads", "1")  # fmt: skip
    status, _, err = run(1, "-m", "psmpi.train", *options, "--out", tmp_path / "calm", timeout=240)
    assert status == 0, err
    status, _, err = launch(4, DELAYS, *options, "--out", tmp_path / "late", timeout=240)
    assert status == 0, err
    calm, late = (tensors(newest(tmp_path / name)) for name in ("calm", "late"))
    assert calm.keys() == late.keys() and all(np.array_equal(calm[name], late[name]) for name in calm)


def test_a_cut_costs_one_message_each_way(folder):
    problem = Problem(folder, "--ahead", "2", steps=8)
    problem.train(4)
    samples = sum(map(len, problem.ids))
    up, down = [8 * n * samples for n in WIDTHS], [8 * n * samples for n in WIDTHS]
    assert [sent for *_, sent, _ in problem.found] == [up[0], down[0] + up[1], down[1] + up[2], down[2]]
    problem = Problem(folder, "--local-loss", "greedy", steps=8)
    problem.train(4)
    # Downwards goes a credit of one number for each minibatch.
    assert [sent for *_, sent, _ in problem.found] == [up[0], 64 + up[1], 64 + up[2], 64]


@pytest.mark.parametrize("kind", ["greedy", "predsim"])
def test_local_losses_teach_each_block_from_its_own_outputs(folder, kind):
    """Compare the first step with finite differences of each block's own loss."""
    problem = Problem(folder, "--local-loss", kind, steps=1)
    start, after = problem.train(2, 0), problem.train(2, 1)
    ids = problem.ids[0]
    labels, onehot = problem.y[ids], problem.onehot(ids)

    def cosines(f):
        f = f - f.mean(axis=0)
        f = f / np.sqrt((f * f).sum(axis=0))
        return f.T @ f

    def loss(p, r):
        x = problem.x[:, ids]
        for k in range(r):
            x = np.tanh(start[f"dense{k + 1}.weight"] @ x + start[f"dense{k + 1}.bias"][:, None])
        h = np.tanh(p[f"dense{r + 1}.weight"] @ x + p[f"dense{r + 1}.bias"][:, None])
        name = f"cut{r + 1}.scores.dense1"
        scores = p[f"{name}.weight"] @ h + p[f"{name}.bias"][:, None]
        score_loss = -log_softmax(scores, axis=0)[labels, np.arange(len(ids))].mean()
        if kind == "greedy":
            return score_loss
        name = f"cut{r + 1}.features.dense1"
        difference = cosines(p[f"{name}.weight"] @ h + p[f"{name}.bias"][:, None]) - cosines(onehot)
        return 0.01 * score_loss + 0.99 * (difference * difference).mean()

    for r in range(3):
        names = [f"dense{r + 1}.weight", f"cut{r + 1}.scores.dense1.weight", f"cut{r + 1}.scores.dense1.bias"]
        names += [f"cut{r + 1}.features.dense1.weight"] if kind == "predsim" else []
        for name in names:
            slope = np.zeros(start[name].shape)
            for index in np.ndindex(slope.shape):
                moved = {key: values.copy() for key, values in start.items()}
                moved[name][index] += 1e-6
                above = loss(moved, r)
                moved[name][index] -= 2e-6
                slope[index] = (above - loss(moved, r)) / 2e-6
            np.testing.assert_allclose((start[name] - after[name]) / 0.3, slope, rtol=0, atol=1e-7, err_msg=name)


def test_what_is_in_flight_is_left_where_it_has_no_meaning(tmp_path):
    """Resume with another --ahead, with other synthesizers, and from another method; a note names the part that starts
    afresh."""
    options = ("--model", "mlp", "--widths", "20", "20", "20", "--loss", "nll")
    first = tmp_path / "first"
    status, _, err = run(2, "-m", "psmpi.train", "--method", "dni", "--layer-blocks", "4", *options, "--max-steps", "7",
                         "--out", first)  # fmt: skip
    assert status == 0, err
    for name, more, note in (
        ("ahead", ("--layer-blocks", "4", "--ahead", "3"), "does not hold the minibatches in flight"),
        (
            "hidden",
            ("--layer-blocks", "4", "--synthesizer-hidden", "9"),
            "does not hold the auxiliary networks of 4 blocks",
        ),
        ("blocks", ("--layer-blocks", "2"), "does not hold the auxiliary networks of 2 blocks"),
    ):
        words = ("--method", "dni", *options, *more, "--resume", first, "--max-steps", "12", "--out", tmp_path / name)
        status, out, err = run(2, "-m", "psmpi.train", *words)
        assert status == 0 and note in out, (name, out + err)
    words = (
        "--method",
        "dni",
        *options,
        "--resume",
        tmp_path / "dp",
        "--max-steps",
        "12",
        "--out",
        tmp_path / "end",
    )
    status, _, err = run(1, "-m", "psmpi.train", "--method", "data_parallel", *options, "--max-steps", "3", "--out",
                         tmp_path / "dp")  # fmt: skip
    assert status == 0, err
    status, out, err = run(2, "-m", "psmpi.train", *words)
    assert status == 0 and "start from initial weights" in out, out + err


def test_minibatches_in_flight_of_other_steps_or_other_samples_are_not_learnt_from(folder, tmp_path):
    """After other minibatches, or on other samples, synthesizers learn from the following minibatches only and keep
    their step counts."""
    data = dict(np.load(folder / "own.npz"))
    np.savez(tmp_path / "few.npz", **{name: values[:20] for name, values in data.items()})
    out = tmp_path / "run"
    words = ("--config", folder / "net.toml", "--loss", "nll", "--batch-size", "5", "--lr", "0.01", "--out", out)
    own = ("--dataset", folder / "own.npz")
    after = ("--resume", "auto", "--method", "dni", "--layer-blocks", "4")
    runs = (
        (("--method", "data_parallel", *own, "--epochs", "2", *words), None),
        ((*after, *own, "--epochs", "3", *words), (30, 20, 8)),
        ((*after, *own, "--epochs", "4", *words[:4], "--batch-size", "10", *words[6:]), (20, 15, 11)),
        ((*after, "--dataset", tmp_path / "few.npz", "--new-data", "--epochs", "5", *words), (20, 16, 13)),
    )
    for options, expected in runs:
        status, stdout, err = run(2, "-m", "psmpi.train", *options)
        assert status == 0 and "Traceback" not in err, stdout + err
        if expected is not None:
            scalars = read_contents(newest(out)).scalars
            assert tuple(scalars[name] for name in ("steps", "since", "fits")) == expected, (scalars, stdout)


def test_another_optimizer_begins_with_the_synthesizers_too(tmp_path):
    options = ("--method", "dni", "--model", "mlp", "--widths", "20", "--loss", "nll", "--out", tmp_path / "run")
    for optimizer, steps in (("adam", "9"), ("adamw", "14")):
        words = ("--optimizer", optimizer, "--max-steps", steps, "--resume", "auto")
        status, stdout, err = run(2, "-m", "psmpi.train", *options, *words)
        assert status == 0, stdout + err
    assert "does not hold the optimizers of the auxiliary networks" in stdout
    scalars = read_contents(newest(tmp_path / "run")).scalars
    assert scalars["t"] == 5 and scalars["fits"] == 5


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "nesterov", "muon", "lion", "rmsprop", "adamw"])
def test_synthesizers_bear_the_usual_rate_of_each_optimizer(tmp_path, optimizer):
    words = ("--method", "dni", "--loss", "nll", "--optimizer", optimizer, "--epochs", "2", "--out", tmp_path / "run")
    status, stdout, err = run(2, "-m", "psmpi.train", *words)
    assert status == 0, stdout + err
    rows = [loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["test_loss"] < 2.4


@pytest.mark.parametrize("options", [("--local-loss", "predsim"), ("--synthetic-inputs",), ("--synthetic", "dni")])
def test_convolutions_train(tmp_path, options):
    words = ("--method", "dni", "--model", "psnet", "--loss", "nll", "--max-steps", "40", *options)
    status, _, err = run(2, "-m", "psmpi.train", *words, "--out", tmp_path / "run")
    assert status == 0, err


@pytest.mark.parametrize("shape", [(6,), (1, 6, 6)], ids=["features", "images"])
def test_synthesizers_are_given_the_targets(tmp_path, shape):
    """Targets are one-hot labels or values; at a cut of images each number fills a plane."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=(40, *shape))
    tables = '[[model.layers]]\ntype = "dense"\nunits = 5\n'
    if len(shape) == 3:
        tables = 2 * '[[model.layers]]\ntype = "conv"\nchannels = 2\nkernel = 3\n'
    flat = '[[model.layers]]\ntype = "flatten"\n' if len(shape) == 3 else ""
    for targets, units, loss in ((rng.integers(3, size=40), 3, "nll"), (rng.normal(size=(40, 2)), 2, "squared")):
        np.savez(tmp_path / "own.npz", x=x, y=targets, x_test=x[:9], y_test=targets[:9])
        last = f'{flat}[[model.layers]]\ntype = "dense"\nunits = {units}\n'
        (tmp_path / "net.toml").write_text(f'[model]\nmodel = "custom"\n{tables}{last}')
        words = ("--method", "dni", "--dataset", str(tmp_path / "own.npz"), "--config", str(tmp_path / "net.toml"),
                 "--loss", loss, "--batch-size", "8", "--dtype", "float64", "--layer-blocks",
                 "3" if len(shape) == 3 else "2")  # fmt: skip
        config, dataset = usual(parse(list(words))), open_dataset(str(tmp_path / "own.npz"), "")
        network = make_network("custom", dataset.shape, units, **config.model.shape)

        def work(world, config=config, dataset=dataset, network=network, units=units):
            block = find_method("dni")(Context(world, network, dataset, config, NumpyOps())).blocks[0]
            ids = np.array([5, 17, 2])
            h = np.random.default_rng(1).normal(size=(block.units, 3))
            block._predict(h, ids)
            x = block.networks["gradient"].x(3)
            return h, x[: block.units].copy(), x[block.units :].reshape(units, -1, 3).copy()

        ((h, outputs, target_inputs),) = run_ranks(1, work)
        ids = [5, 17, 2]
        expected = np.eye(units)[targets[ids]].T if loss == "nll" else targets[ids].T
        assert np.array_equal(outputs, h)
        assert np.array_equal(target_inputs, np.broadcast_to(expected[:, None], target_inputs.shape))
        # The first convolution leaves 4 x 4 pixels.
        assert target_inputs.shape[1] == (16 if len(shape) == 3 else 1)


def test_errors_of_predicted_gradients_are_told_and_fall(tmp_path):
    words = ("--method", "dni", "--model", "mlp", "--widths", "40", "40", "--loss", "nll", "--epochs", "12")
    status, _, err = run(2, "-m", "psmpi.train", *words, "--out", tmp_path / "run")
    assert status == 0, err
    rows = [loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, last = (row["synthetic_error"] for row in (rows[0], rows[-1]))
    assert len(first) == 1 and 0 < last[0] < first[0] and last[0] < 1
    assert rows[-1]["test_accuracy"] > 0.9


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--layer-blocks", "7"), "the model has at most 2 blocks"),
        (("--layer-blocks", "1"), "dni needs two or more"),
        (("--bp-lambda", "0.5"), "add --ahead 1"),
        (("--bp-lambda", "1.5", "--ahead", "1"), "from 0 to 1"),
        (("--synthesizer-lr", "-1"), "from 0 to"),
        (("--ahead", "0"), "--ahead 0"),
        (("--local-loss", "greedy", "--synthetic", "dni"), "uses no synthetic gradients"),
        (("--local-loss", "greedy", "--synthesizer-hidden", "5"), "--synthesizer-hidden is for synthesizers"),
        (("--synthesizer-hidden", "0"), "widths from 1 up"),
        (("--synthetic-inputs", "--bp-lambda", "1", "--ahead", "1"), "use one"),
        (("--optimizer", "lbfgs"), "each block has its own gradient"),
        (("--on-nan", "skip"), "cannot leave out a single step"),
        (("--synthesizer-hidden", "5", "--batch-size", "1"), "a single sample"),
        (("--bp-lambda", "1", "--ahead", "1", "--synthesizer-lr", "0.1"), "without synthesizers"),
    ],
)
def test_what_cannot_be_is_one_message(tmp_path, options, says):
    status, out, err = run(2, "-m", "psmpi.train", "--method", "dni", "--model", "mlp", "--widths", "20", *options,
                           "--out", tmp_path / "run")  # fmt: skip
    assert status == 1 and (out + err).count(says) == 1 and "Traceback" not in err, out + err


@pytest.mark.slow
def test_mnist_is_learned_as_by_back_propagation(train, tmp_path):
    """Three hidden layers of 256 with batch normalization and ReLU; the bounds are errors of small runs of these
    settings."""
    folder, config = real("mnist") / "mnist", tmp_path / "net.toml"
    hidden = (
        '[[model.layers]]\ntype = "dense"\nunits = 256\nbias = false\n[[model.layers]]\ntype = "batch_norm"\n'
        '[[model.layers]]\ntype = "relu"\n'
    )
    last = '[[model.layers]]\ntype = "dense"\nunits = 10\n'
    config.write_text(f'[model]\nmodel = "custom"\n[[model.layers]]\ntype = "flatten"\n{3 * hidden}{last}')
    setting = ("--method", "dni", "--config", config, "--dataset", "mnist", "--data-dir", folder, "--loss", "nll",
               "--batch-size", "256", "--lr", "0.001", "--epochs", "6", "--layer-blocks", "4")  # fmt: skip

    def error(*options):
        return 1 - train(2, *setting, *options).rows[-1]["test_accuracy"]

    backward_error = error("--ahead", "1", "--bp-lambda", "1")
    for ahead in ("1", "2", "4"):
        assert error("--ahead", ahead) <= min(backward_error + 0.005, 0.03)
    # Later gradients teach less, and synthesizers without targets do not know the class.
    assert error("--ahead", "20") <= 0.04
    assert error("--synthetic", "dni", "--synthesizer-hidden", "1024") > 0.05
    assert error("--local-loss", "greedy") <= 0.03


@pytest.mark.slow
def test_blocks_without_normalization_learn_while_they_are_ahead(train, tmp_path):
    """After 3,000 steps on four ranks the error is within 1.5 points of --ahead 1."""
    data, config = open_dataset("mnist", str(real("mnist") / "mnist")), tmp_path / "net.toml"
    x, x_test = (split.read(np.arange(count)) for split, count in ((data.train, 20_000), (data.test, 10_000)))
    np.savez(tmp_path / "own.npz", x=x, y=data.train.targets[:20_000], x_test=x_test, y_test=data.test.targets)
    hidden = '[[model.layers]]\ntype = "dense"\nunits = 128\n[[model.layers]]\ntype = "relu"\n'
    last = '[[model.layers]]\ntype = "dense"\nunits = 10\n'
    config.write_text(f'[model]\nmodel = "custom"\ninit = "he"\n{3 * hidden}{last}')
    setting = ("--method", "dni", "--config", config, "--dataset", tmp_path / "own.npz", "--loss", "nll",
               "--batch-size", "256", "--lr", "0.001", "--epochs", "38", "--max-steps", "3000")  # fmt: skip
    in_turn, *ahead = (
        1 - train(4, *setting, "--ahead", n, timeout=240).rows[-1]["test_accuracy"] for n in ("1", "2", "3")
    )
    assert max(ahead) <= in_turn + 0.015 and in_turn <= 0.04
