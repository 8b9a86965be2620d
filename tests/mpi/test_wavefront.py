"""Recurrent layers over ranks, chunk by chunk, against the serial network."""

import numpy as np
import pytest
from helpers.datasets import real
from helpers.processes import launch
from helpers.runs import distance, run, trainer

from psmpi.backend import NumpyOps
from psmpi.data import Batch, open_dataset
from psmpi.layout import Runs
from psmpi.methods.wavefront.lane import Lane
from psmpi.nn.model import Model
from psmpi.nn.objective import Objective
from psmpi.nn.zoo import make_network
from psmpi.registry import find_method
from psmpi.testing import run_ranks
from psmpi.train import parse
from psmpi.training.context import Context
from psmpi.training.usual import usual

KINDS = ("rnn", "lstm", "gru")


class Problem:
    """Random sequences with one label each, or one label at each step, and a stack of recurrent layers."""

    def __init__(self, folder, kind, steps, units, layers, *options, by_step=False, ragged=False, dtype="float64"):
        rng, n = np.random.default_rng(5), 24
        self.x = rng.normal(size=(n, steps, 3)).astype(dtype)
        y = rng.integers(0, 4, (n, steps) if by_step else n)
        lengths = rng.integers(1, steps + 1, n) if ragged else np.full(n, steps)
        lengths[0] = steps
        path = folder / "own.npz"
        half = slice(0, 16), slice(16, None)
        arrays = {"x": self.x, "y": y, "lengths": lengths}
        np.savez(
            path, **{f"{k}{end}": v[s] for k, v in arrays.items() for end, s in zip(("", "_test"), half, strict=True)}
        )
        words = ("--dataset", str(path), "--model", kind, "--widths", *[str(units)] * layers, "--loss", "nll", "--clip",
                 "0", "--optimizer", "sgd", "--lr", "1", "--dtype", dtype, "--method", "wavefront", "--threads", "1",
                 "--epochs", "1", "--batch-size", "16")  # fmt: skip
        self.config = usual(parse([*words, *options]))
        self.dataset = open_dataset(str(path), "")
        model = self.config.model
        self.network = make_network(kind, self.dataset.shape, 4, **model.shape, by_step=by_step)
        self.layout = self.network.layout()
        self.ids = np.arange(13)

    def weights(self):
        """Return random weights with variance 1 / (last dimension), so that recurrent matrices do not expand."""
        w = np.random.default_rng(1).normal(size=self.layout.size)
        for p in self.layout.parameters:
            runs = self.layout.runs_of_parameters({p.name})
            for a, b in runs.intervals:
                w[a:b] /= np.sqrt(p.shape[-1])
        return w.astype(self.config.model.dtype)

    def serial(self):
        """Return gradient and loss of the minibatch by one pass over whole sequences."""
        context = Context(Alone(), self.network, self.dataset, self.config, NumpyOps())
        w, loss = self.weights(), context.loss()
        model = Model(self.network, self.layout, w, np.zeros_like(w), NumpyOps())
        objective, train = Objective(loss, model), self.dataset.train
        x = train.read(self.ids).T.astype(w.dtype)
        objective.reserve(4, len(self.ids) * max(1, self.network.steps))
        objective.bring(train.targets[self.ids].T)
        lengths = train.lengths[self.ids]
        from psmpi.nn.layers.workspace import Span

        tape = model.forward(np.ascontiguousarray(x), None, Span(lengths))
        objective.derive(tape, tape.scores, objective.targets(len(self.ids)), 1 / train.count(self.ids))
        return model.g.copy(), objective.value()

    def step(self, ranks, before=lambda method: None):
        """Return gradient and loss of one step on `ranks` ranks."""
        find_method("wavefront").check(ranks, self.network, self.dataset, self.config)
        w = self.weights()

        def work(world):
            method = find_method("wavefront")(Context(world, self.network, self.dataset, self.config, NumpyOps()))
            runs = method.shards[world.rank]
            slices = [slice(a, b) for a, b in runs.intervals]
            own_w = np.concatenate([w[s] for s in slices])
            method.w[...] = own_w
            before(method)
            method.step(Batch(self.ids), 1.0)
            return runs, method.g.copy(), method.loss_sum, method.counter.sent, method.messages(0, len(self.ids))

        g, loss = np.full(self.layout.size, np.nan), 0.0
        self.found = run_ranks(ranks, work, timeout=120)
        for runs, part, share, *_ in self.found:
            for a, b in runs.intervals:
                g[a:b] = part[runs.local(a, b)]
            loss += share / len(self.ids)
        return g, loss


class Alone:
    rank, size = 0, 1


@pytest.mark.parametrize("by_step", [False, True], ids=["label", "steps"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_serial_network(tmp_path, kind, by_step):
    """4 layers, 12 steps, chunks of 3 steps, or of 5 with a shorter last one; ragged sequences too."""
    for steps, ragged in (("3", False), ("5", False), ("5", True)):
        problem = Problem(tmp_path, kind, 12, 5, 4, "--chunk-steps", steps, by_step=by_step, ragged=ragged)
        expected, loss = problem.serial()
        for ranks in (1, 2, 4):
            g, step_loss = problem.step(ranks)
            assert np.abs(g - expected).max() <= 1e-12 * np.abs(expected).max()
            assert step_loss == pytest.approx(loss, rel=1e-12)


def test_derivatives_of_chunks_are_scaled_alike(tmp_path):
    """With psl and large scores, derivatives of one chunk are too large for a backward pass, and those of others are
    not."""
    problem = Problem(tmp_path, "rnn", 12, 5, 3, "--chunk-steps", "5", "--loss", "psl", by_step=True)
    original_weights = problem.weights

    def large_weights():
        w = original_weights()
        for a, b in problem.layout.runs_of_parameters({"dense1.weight"}).intervals:
            w[a:b] *= 30
        return w

    problem.weights = large_weights
    expected, loss = problem.serial()
    for ranks in (1, 3):
        g, step_loss = problem.step(ranks)
        assert np.abs(g - expected).max() <= 1e-12 * np.abs(expected).max() and step_loss == pytest.approx(
            loss, rel=1e-12
        )


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-11), ("float32", 1e-5)])
@pytest.mark.parametrize("kind", KINDS)
def test_long_sequences_stay_as_close(tmp_path, kind, dtype, tolerance):
    """4 layers of 64 units, 128 steps, chunks of 8."""
    problem = Problem(tmp_path, kind, 128, 64, 4, "--chunk-steps", "8", dtype=dtype)
    expected, _ = problem.serial()
    for ranks in (1, 4):
        g, _ = problem.step(ranks)
        assert np.abs(g - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_and_threads_change_the_order_alone(tmp_path, kind):
    """With the same chunks gradients have the same bits, whichever rank and thread computes a chunk, and when."""
    gradients = []
    for ranks, skew in ((1, "1"), (1, "2"), (1, "4"), (2, "1"), (2, "2"), (4, "1")):
        problem = Problem(tmp_path, kind, 12, 5, 4, "--chunk-steps", "5", "--skew", skew, ragged=True)
        gradients.append(problem.step(ranks)[0])
    assert all(np.array_equal(gradients[0], gradient) for gradient in gradients)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_clocks_in_the_messages_end_when_they_should(tmp_path, ranks, monkeypatch):
    """Chunks carry clocks: forward takes M + R - 1 chunk times, and backward as many."""
    clocks = {}

    def tick(lane, arriving):
        own = clocks.setdefault(id(lane), 0.0)
        clocks[id(lane)] = max(own, float(arriving)) + 1
        return clocks[id(lane)]

    lane_forward, lane_backward = Lane.forward, Lane.backward

    def forward(self, c, x, span):
        arrived = x.flat[0] if clocked[id(self)] else 0.0
        y = lane_forward(self, c, x, span)
        y[...] = tick(self, arrived)
        return y

    def backward(self, c, dy, dx, add):
        arrived = dy.flat[0] if back_clocked[id(self)] else 0.0
        lane_backward(self, c, dy, dx, add)
        clock = tick(self, arrived)
        if dx is not None:
            dx[...] = clock

    problem = Problem(tmp_path, "rnn", 12, 5, 4, "--chunk-steps", "2")
    clocked, back_clocked, ends = {}, {}, {}

    def before(method):
        (lane,) = method.pipeline.lanes
        clocked[id(lane)], back_clocked[id(lane)] = not method.first, not method.last
        pipeline_backward = method.pipeline.backward

        def begin_back(*arguments):
            ends["ahead", method.rank], clocks[id(lane)] = clocks[id(lane)], 0.0
            pipeline_backward(*arguments)
            ends["back", method.rank] = clocks[id(lane)]

        method.pipeline.backward = begin_back

    monkeypatch.setattr(Lane, "forward", forward)
    monkeypatch.setattr(Lane, "backward", backward)
    problem.step(ranks, before)
    count = 6
    assert [ends["ahead", k] for k in range(ranks)] == [count + k for k in range(ranks)]
    assert [ends["back", k] for k in range(ranks)] == [count + ranks - 1 - k for k in range(ranks)]


def test_a_step_makes_one_message_a_chunk_boundary_and_direction(tmp_path):
    """A message has k B H words, also for a shorter last chunk of k steps; without clipping there are no others."""
    problem = Problem(tmp_path, "lstm", 12, 5, 4, "--chunk-steps", "5")
    problem.step(4)
    b, sizes = len(problem.ids), [5 * 5 * 8, 5 * 5 * 8, 2 * 5 * 8]
    up = [(k, k + 1, b * n) for k in range(3) for n in sizes]
    for rank, (*_, sent, messages) in enumerate(problem.found):
        assert sorted(messages) == sorted(up + [(to, source, n) for source, to, n in up])
        assert sent == sum(n for source, _, n in messages if source == rank)


def test_a_training_resumed_on_other_ranks_goes_on(train, tmp_path):
    options = ("--method", "wavefront", "--dataset", "repeat_copy:2", "--model", "gru", "--widths", "6", "5", "4",
               "--loss", "nll", "--dtype", "float64", "--epochs", "1")  # fmt: skip
    full_run = train(2, *options, "--max-steps", "12")
    train(3, *options, "--max-steps", "5", out=tmp_path / "cut")
    resumed = train(1, "--resume", "auto", "--max-steps", "12", out=tmp_path / "cut")
    assert distance(full_run.tensors(), resumed.tensors()) <= 1e-9


def refused(ranks, *options):
    status, _, err = run(ranks, "-m", "psmpi.train", "--method", "wavefront", *options)
    assert status == 1 and "Traceback" not in err and err.count("error: ") == 1, err
    return " ".join(err.split())


def test_what_is_said_goes_before_what_is_usual(train, tmp_path):
    """The data and widths of a configuration file go before the method's usual ones."""
    (tmp_path / "own.toml").write_text(
        '[data]\ndataset = "copying:3"\n[model]\nwidths = [5, 6]\n[parallel]\nmethod = "wavefront"\n'
    )
    trained = train(1, "--config", tmp_path / "own.toml", "--epochs", "1", "--max-steps", "2", "--loss", "nll")
    config = (trained.out / "config.toml").read_text()
    assert (
        'dataset = "copying:3"' in config and 'model = "lstm"' in config and "64" not in config.split("widths")[1][:30]
    )


def test_limits_are_said(tmp_path):
    rows = ("--dataset", "digits:rows", "--model", "lstm", "--widths", "5", "5")
    assert "has 2 for 3 ranks: start 2 or fewer" in refused(3, *rows)
    assert "--chunk-steps 9: sequences have 8 steps" in refused(2, *rows, "--chunk-steps", "9")
    assert "--skew 2: rank 0 has 1 recurrent layer" in refused(2, *rows, "--skew", "2")
    assert "is for sequences" in refused(2, "--model", "mlp")
    assert "evaluates the loss more than once" in refused(2, *rows, "--optimizer", "lbfgs")
    assert "has none: use --model rnn, gru or lstm" in refused(1, "--dataset", "digits:rows", "--model", "mlp")
    assert "--psl-weights remembered" in refused(2, *rows, "--psl-weights", "remembered")
    lstm, flat = '[[model.layers]]\ntype = "lstm"\nunits = 5\n', '[[model.layers]]\ntype = "flatten"\n'
    dense = '[[model.layers]]\ntype = "{}dense"\nunits = {}\ngroups = {}\n'
    last = '[[model.layers]]\ntype = "last"\n'
    for layers, message in (
        (lstm + flat + dense.format("", 10, 1).replace("groups = 1\n", ""), "needs all steps at once"),
        (lstm + dense.format("separable_", 20, 10) + last + dense.format("separable_", 10, 10), "of single classes"),
    ):
        (tmp_path / "net.toml").write_text(f'[model]\nmodel = "custom"\n{layers}')
        options = ("--config", tmp_path / "net.toml", "--epochs", "1", "--lr", "0.1", "--batch-size", "10")
        if "single" in message:
            layers = layers.replace("units = 5", "units = 10")
            (tmp_path / "net.toml").write_text(f'[model]\nmodel = "custom"\n{layers}')
        assert message in refused(1, "--dataset", "digits:rows", *options)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_rows_of_mnist_are_read(tmp_path):
    """Five epochs of 28 rows as 28 steps, two layers of 128: 98 % of the test images."""
    options = ("--dataset", "mnist:rows", "--data-dir", real("mnist"), "--model", "lstm", "--widths", "128", "128",
               "--loss", "nll", "--epochs", "5", "--batch-size", "64", "--lr", "0.002")  # fmt: skip
    trained = trainer(tmp_path, launch)(2, "--method", "wavefront", *options, timeout=1700)
    assert trained.rows[-1]["test_accuracy"] >= 0.98


def test_runs_of_the_flat_vector_follow_each_other(tmp_path):
    """Lanes and head of each rank are slices of its shard."""
    problem = Problem(tmp_path, "lstm", 6, 5, 4, "--skew", "2")

    def work(world):
        method = find_method("wavefront")(Context(world, problem.network, problem.dataset, problem.config, NumpyOps()))
        views = [lane.model.w for lane in method.pipeline.lanes] + ([method.head.w] if method.head is not None else [])
        ends = np.cumsum([0, *(view.size for view in views)])
        assert all(np.shares_memory(view, method.w[a:b]) for view, a, b in zip(views, ends, ends[1:], strict=False))
        return method.shards[world.rank]

    union = Runs.union(pair for runs in run_ranks(2, work) for pair in runs.intervals)
    assert union == Runs(((0, problem.layout.size),))


def test_a_plan_is_of_what_is_usual_too():
    status, out, err = run(1, "-m", "psmpi.plan", "--method", "wavefront", "--ranks", "2", "--no-others")
    assert status == 0 and "model lstm" in out, err
