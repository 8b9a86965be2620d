"""The pass over tiles of classes on a stand-in for CuPy: it has the results of all scores at once, and never waits."""

import os

import numpy as np
import pytest
from helpers import cuda_host
from helpers.paths import FAKE
from helpers.runs import Trained, distance, run

from psmpi.backend import CupyOps, NumpyOps
from psmpi.comm.bridge import Staged
from psmpi.comm.group import Counter, Group
from psmpi.nn import device_tiles
from psmpi.nn.device_tiles import DeviceHead, DeviceTiledObjective, has_device_tiles
from psmpi.nn.losses import LOSSES, make_loss
from psmpi.nn.metric import Metric
from psmpi.nn.model import Model
from psmpi.nn.network import build
from psmpi.nn.objective import GRADIENT_LIMIT, Objective
from psmpi.testing import run_ranks
from psmpi.testing.poison import poisoned
from psmpi.training.class_sums import ClassSums

pytestmark = pytest.mark.skipif(cuda_host.compiler() is None, reason="no g++ to compile the CUDA kernels as C++")

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
CLASSES, SCALE = 13, 0.125
FUSED = [name for name in LOSSES if hasattr(CupyOps, f"{name}_loss")]
KINDS = {"trunk": (True, True), "no trunk": (False, True), "no biases": (True, False)}


def problem(dtype, trunk=True, bias=True, size=1.0, batch=33):
    layers = [{"type": "dense", "units": 7}, {"type": "tanh"}] if trunk else []
    network = build("head", (5,), [*layers, {"type": "dense", "units": CLASSES, "bias": bias}], CLASSES)
    rng = np.random.default_rng(0)
    w = (size * rng.normal(size=network.layout().size)).astype(dtype)
    return network, w, rng.normal(size=(5, batch)).astype(dtype), rng.integers(0, CLASSES, batch)


def linear(network, w):
    """Weights (1, units, inputs) and biases (1, units) of each dense layer, views of w."""
    return [part.w[0] for part in Model(network, network.layout(), w, None, NumpyOps()).parts]


def places(network):
    """For each dense layer, the positions of its weights and biases in the flat vector."""
    numbers = np.arange(network.layout().size, dtype=F64)
    return [np.concatenate([one.reshape(-1) for one in part]).astype(int) for part in linear(network, numbers)]


class Step:
    """A loss and its gradient, of all scores on the host or by tiles on the device."""

    def __init__(self, network, w, loss, ops, batch, classes=None, class_sums=None):
        self.ops, self.tiled = ops, ops.on_device
        self.g = ops.put(np.full_like(w, np.nan))
        self.model = Model(network, network.layout(), ops.put(w), self.g, ops, classes, tiled=self.tiled)
        self.objective = (DeviceTiledObjective if self.tiled else Objective)(loss, self.model, class_sums)
        self.objective.reserve(len(self.model.classes), batch)

    def __call__(self, x, labels, scale=SCALE):
        objective = self.objective
        objective.bring(labels)
        self.tape = self.model.forward(x)
        objective.losses(self.tape.scores, objective.targets(len(labels)), scale)
        objective.backward(self.tape)

    def results(self):
        return self.objective.value(), self.ops.host(self.g).copy(), self.objective.loss.clipped


def derive(ops, network, w, x, labels, loss):
    step = Step(network, w, loss, ops, len(labels))
    step(ops.put(x), labels)
    return step.results()


def both(name, dtype, problem, **settings):
    """(value, gradient, clipped terms) on the host, and on the device."""
    kappa = {"kappa": 1.5} if "kappa" in LOSSES[name].settings else {}
    return [derive(ops, *problem, make_loss(name, dtype, **kappa, **settings)) for ops in (NumpyOps(), CupyOps())]


@pytest.fixture
def tile(monkeypatch, stand_in):
    """tile(n): tiles of n classes from now on."""
    return lambda n: monkeypatch.setattr(device_tiles, "tile_size", lambda batch: n)


@pytest.mark.parametrize("size", [1, 4, 20])
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-12), (F32, 1e-5)], ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_loss_and_gradient_are_those_of_all_scores_at_once_on_the_host(name, dtype, tolerance, size, tile):
    tile(size)
    for kind in KINDS.values():
        (value, g, _), (device_value, device_g, _) = both(name, dtype, problem(dtype, *kind))
        assert device_value == pytest.approx(value, rel=tolerance)
        assert abs(device_g - g).max() <= tolerance * abs(g).max()


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize(("name", "size"), [("psl", 10), ("psl", 40), ("psl", 400), ("squared", 1e6), ("squared", 1e8)])
def test_very_large_derivatives_are_scaled_tile_by_tile(name, size, dtype, tile):
    """The largest derivatives differ from tile to tile, and those of the first tile are small."""
    tile(4)
    arguments = problem(dtype, trunk=False, size=size)
    for values in linear(*arguments[:2])[-1]:
        values[0][:4] /= 50
    (value, g, clipped), (device_value, device_g, device_clipped) = both(name, dtype, arguments)
    tolerance = 1e-3 if dtype == F32 else 1e-10
    assert device_value == pytest.approx(value, rel=tolerance) and device_clipped == clipped
    assert abs(device_g - g).max() <= tolerance * abs(g).max() and abs(device_g).max() <= GRADIENT_LIMIT[dtype]


@pytest.mark.parametrize("label", [2, 12])
@pytest.mark.parametrize(("dtype", "bias"), [(F32, 12.0), (F32, 16.0), (F64, 12.0), (F64, 150.0)], ids=str)
def test_very_large_derivatives_of_one_class_go_on_into_the_layers_before(dtype, bias, label, tile):
    """Derivatives of earlier tiles and the labels' terms are scaled by the same power of two as those of the class."""
    tile(4)
    network, w, x, labels = problem(dtype)
    linear(network, w)[-1][1][0][9] = bias
    labels[:] = label
    # Every second sample has small derivatives.
    labels[::2] = 9
    (value, g, _), (device_value, device_g, _) = both("psl", dtype, (network, w, x, labels))
    tolerance = 1e-5 if dtype == F32 else 1e-10
    assert device_value == pytest.approx(value, rel=tolerance) and abs(g).max() < GRADIENT_LIMIT[dtype]
    for at in places(network):
        assert abs(device_g - g)[at].max() <= tolerance * abs(g[at]).max()


@pytest.mark.parametrize("name", FUSED)
def test_a_recorded_step_is_played_back_and_its_gradient_made_again(name, tile):
    """Minibatches of two sizes take turns."""
    tile(4)
    network, w, x, labels = problem(F64, size=4.0)
    ops = CupyOps()
    step, host_step = (Step(network, w, make_loss(name, F64, outputs=CLASSES), o, 33) for o in (ops, NumpyOps()))
    inputs = {b: (ops.put(np.ascontiguousarray(x[:, :b])), x[:, :b], labels[:b]) for b in (33, 17)}
    step.objective.bring(labels)

    def work(b, scale):
        step.tape = step.model.forward(inputs[b][0])
        step.objective.losses(step.tape.scores, step.objective.targets(b), scale)
        step.objective.backward(step.tape)
        return step.tape

    recorded, before = step.objective.record(work), ops.stream.launches
    for b in (33, 17) * 4:
        tape = recorded(b, 1 / b)
        host_step(*inputs[b][1:], 1 / b)
        value, g, clipped = host_step.results()
        for again in (False, True):
            if again:
                step.g.fill(np.nan)
                step.objective.again(tape)
            assert np.allclose(ops.host(step.g), g, rtol=1e-10, atol=1e-10 * abs(g).max())
        assert step.objective.value() == pytest.approx(value, rel=1e-10)
        assert step.objective.loss.clipped == clipped
    # Three calls launch no graph: the first one allocates memory, then each size has one call before it is recorded.
    assert ops.graphs and ops.stream.launches - before == 5


@pytest.fixture
def allocated_sizes(monkeypatch):
    """A list that receives the size, in elements, of each device array that is allocated from now on."""
    sizes = []
    for name in ("empty", "zeros"):
        allocate = getattr(CupyOps, name)

        def counted(self, size, dtype, allocate=allocate):
            sizes.append(size)
            return allocate(self, size, dtype)

        monkeypatch.setattr(CupyOps, name, counted)
    return sizes


def test_a_step_does_not_wait_and_has_no_array_of_all_scores(tile, allocated_sizes):
    tile(4)
    batch = 1000
    network, w, x, labels = problem(F32, batch=batch)
    ops = CupyOps()
    for name in FUSED:
        step, device_x = Step(network, w, make_loss(name, F32, outputs=CLASSES), ops, batch), ops.put(x)
        ops.synchronize()
        # The queue of the stand-in keeps its first entry until something waits.
        ops.stream.enqueue(first := lambda: None)
        step(device_x, labels)
        assert ops.stream.queue[0] is first
        assert np.isfinite(step.results()[0])
    assert 4 * batch < max(allocated_sizes) <= 7 * batch < CLASSES * batch


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_a_score_that_is_no_number_is_an_error_or_a_loss_that_is_none(name, lenient, tile):
    tile(4)
    network, w, x, labels = problem(F32)
    x[2, 5] = np.nan
    loss = make_loss(name, F32, outputs=CLASSES)
    loss.lenient = lenient
    if lenient:
        assert np.isnan(derive(CupyOps(), network, w, x, labels, loss)[0])
        return
    with pytest.raises(FloatingPointError, match="not a finite number"):
        derive(CupyOps(), network, w, x, labels, loss)


def test_an_exponential_that_overflows_is_an_error_where_clipping_is_off(tile):
    tile(4)
    with pytest.raises(FloatingPointError, match="--exp-clip is off"):
        derive(CupyOps(), *problem(F32, trunk=False, size=400), make_loss("psl", F32, exp_clip="off"))


@pytest.mark.parametrize("name", FUSED)
def test_tests_count_as_with_all_scores_at_once(name, tile, monkeypatch):
    monkeypatch.setattr("psmpi.nn.tail.tile_size", lambda batch: 5)
    network, w, x, labels = problem(F32)
    ops, metric = CupyOps(), Metric(make_loss(name, F32, outputs=CLASSES), CLASSES)
    expected = metric.sums(Model(network, network.layout(), w, None, NumpyOps()).forward(x).scores, labels)
    model = Model(network, network.layout(), ops.put(w), None, ops, tiled=True)
    sums = metric.sums_by_tiles(DeviceHead(model), model.forward(ops.put(x)).scores, labels, np.arange(CLASSES))
    assert sums[0] == pytest.approx(expected[0], rel=1e-6) and np.array_equal(sums[1:], expected[1:])


def test_only_losses_that_the_device_computes_go_by_tiles_there(tile):
    tile(4)
    network, ops = problem(F32)[0], CupyOps()
    tiled = [name for name in LOSSES if has_device_tiles(network, CLASSES, 33, make_loss(name, F32), ops)]
    assert tiled == FUSED and "hinge" not in tiled
    assert not has_device_tiles(network, 4, 33, make_loss("nll", F32), ops)


@pytest.fixture
def train_head(train, tmp_path, monkeypatch, tile):
    """train_head(ranks, backend, *options): train a head of 37 classes, on the device in tiles of 5."""
    for real in ("float", "double"):
        cuda_host.load(real)
    monkeypatch.setenv("PYTHONPATH", str(FAKE), prepend=os.pathsep)
    tile(5)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(150, 6)), np.arange(150) % 37
    np.savez(tmp_path / "data.npz", x=x, y=y, x_test=x[:60] + 0.1, y_test=y[:60])
    head = ("--dataset", tmp_path / "data.npz", "--model", "head", "--widths", "9", "--batch-size", "40")

    def call(ranks, backend, *options):
        return train(ranks, "--backend", backend, *call.options, *options)

    call.options = (*head, "--epochs", "3", "--lr", "0.01", "--dtype", "float64", "--colocate")
    return call


@pytest.fixture
def objectives(monkeypatch):
    """A list that receives each `DeviceTiledObjective` that is constructed from now on."""
    created, construct = [], DeviceTiledObjective.__init__

    def counted(self, *args):
        created.append(self)
        construct(self, *args)

    monkeypatch.setattr(DeviceTiledObjective, "__init__", counted)
    return created


@pytest.mark.parametrize("name", FUSED)
def test_trainings_by_tiles_have_the_weights_and_bytes_of_the_host(name, train_head, objectives):
    """Minibatches have two sizes. One loss is also trained without CUDA graphs."""
    for ranks in (1, 3):
        host_run = train_head(ranks, "numpy", "--loss", name)
        assert not objectives
        device_run = train_head(ranks, "cupy", "--loss", name)
        assert len(objectives) == ranks
        for objective in objectives:
            # The work between two exchanges is played back.
            works = (objective.make, objective.finish) if objective.others is not None else ()
            assert all(any(work.made.values()) for work in works)
        objectives.clear()
        assert distance(host_run.tensors(), device_run.tensors()) <= 1e-10
        for row, expected in zip(device_run.rows, host_run.rows, strict=True):
            for key in ("test_accuracy", "test_top5", "bytes_sent_by_rank", "bytes_received_by_rank"):
                assert row.get(key) == expected.get(key)
            for key in expected.keys() & {"train_loss", "test_loss"}:
                assert row[key] == pytest.approx(expected[key], rel=1e-10)
    if name == "nll":
        device_run = train_head(3, "cupy", "--loss", name, "--no-cuda-graphs")
        assert distance(host_run.tensors(), device_run.tensors()) <= 1e-10


@pytest.mark.parametrize("name", ["psl", "nll", "bce"])
def test_the_layers_before_may_be_computed_on_slices(name, train_head):
    host_run, device_run = (train_head(3, backend, "--loss", name, "--trunk", "split") for backend in ("numpy", "cupy"))
    assert distance(host_run.tensors(), device_run.tensors()) <= 1e-10
    assert device_run.rows[-1]["bytes_sent_by_rank"] == host_run.rows[-1]["bytes_sent_by_rank"]


def test_cosines_are_made_all_at_once(train_head, objectives):
    options = ("--loss", "nll", "--scale", "8", "--margin", "0.3")
    host_run, device_run = (train_head(3, backend, *options) for backend in ("numpy", "cupy"))
    assert not objectives and distance(host_run.tensors(), device_run.tensors()) <= 1e-10


@pytest.mark.parametrize("ranks", [1, 2])
def test_trainings_and_their_tests_have_no_array_of_all_scores(ranks, train_head, allocated_sizes, monkeypatch):
    monkeypatch.setattr("psmpi.nn.tail.tile_size", lambda batch: 5)
    train_head(ranks, "cupy", "--loss", "nll", "--batch-size", "75", "--epochs", "2")
    # The largest array has the outputs of the trunk.
    assert max(allocated_sizes) == 75 * 9 < 75 * (37 // ranks)


@pytest.mark.parametrize("mode", ["stop", "skip"])
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("name", ["psl", "nll"])
def test_what_is_no_number_is_said_and_skipped_as_on_the_host(name, ranks, mode, train_head, tmp_path, monkeypatch):
    """A sample has scores beyond float32, or the last rank's gradient has NaN, and the message names a layer."""
    monkeypatch.setattr("psmpi.nn.tail.tile_size", lambda batch: 5)
    rng = np.random.default_rng(0)
    x, y = rng.random((150, 6)).astype(np.float32), np.arange(150) % 37
    x[17] = 3.3e38
    np.savez(tmp_path / "huge.npz", x=x, y=y, x_test=x[20:60], y_test=y[20:60])
    huge = ("--dataset", tmp_path / "huge.npz", "--dtype", "float32")
    for bad, options in ((None, huge), (ranks - 1, ("--max-steps", "5"))):
        runs = []
        for backend in ("numpy", "cupy"):
            out = tmp_path / f"{backend} {bad}"
            words = (*train_head.options, "--loss", name, *options, "--on-nan", mode)
            words = (*words, "--backend", backend, "--out", out)
            # Step 1 is not recorded.
            with poisoned(lambda rank, step, bad=bad: (rank, step) == (bad, 1)):
                status, stdout, stderr = run(ranks, "-m", "psmpi.train", *words)
            assert status == (mode == "stop") and "Traceback" not in stderr, stderr
            text = stderr if mode == "stop" else stdout
            at = text.index("is not a finite number" if mode == "stop" else "skipped, ")
            # A line of the message may end within a name.
            runs.append((" ".join(text[at:].split())[:180], out))
        assert runs[0][0] == runs[1][0]
        assert ("dense1" if bad is None else "dense") in runs[0][0]
        if mode == "skip":
            host_run, device_run = (Trained(out, "") for _, out in runs)
            assert distance(host_run.tensors(), device_run.tensors()) <= (1e-5 if bad is None else 1e-10)
            skipped = [run.rows[-1]["events"]["steps_skipped"] for run in (host_run, device_run)]
            assert skipped == [3 if bad is None else 1] * 2


@pytest.mark.parametrize(
    ("trunk", "dtype", "bias"),
    [
        (False, F32, 40.0),
        (False, F32, 80.0),
        (False, F32, 100.0),
        (False, F64, 640.0),
        (True, F32, 16.0),
        (True, F64, 99.0),
    ],
    ids=str,
)
def test_large_terms_of_another_rank_scale_what_labels_add_down(trunk, dtype, bias, tile):
    """All labels are on one rank and the large scores on the other; the gradient is limited as on one rank."""
    tile(4)
    network, w, x, labels = problem(dtype, trunk)
    layout, labels = network.layout(), labels % 6
    linear(network, w)[-1][1][0][9] = bias
    loss = lambda: make_loss("psl", dtype, outputs=CLASSES)  # noqa: E731

    def part(world):
        ops, (first, stop) = CupyOps(), ((0, 6), (6, CLASSES))[world.rank]
        runs = layout.part(range(first, stop))
        own_weights = np.concatenate([w[a:b] for a, b in runs.intervals])
        sums = ClassSums(Group(world, range(2), Counter(), Staged(ops)), loss(), (6, CLASSES - 6), dtype, ops)
        step = Step(network, own_weights, loss(), ops, len(labels), range(first, stop), sums)
        step(ops.put(x), labels - first)
        own_gradient, g, at = np.zeros(len(w)), step.results()[1], 0
        for a, b in runs.intervals:
            own_gradient[a:b], at = g[at : at + b - a], at + b - a
        return own_gradient

    _, expected, _ = derive(NumpyOps(), network, w, x, labels, loss())
    actual = sum(run_ranks(2, part))
    for at in places(network):
        assert abs(actual - expected)[at].max() <= 1e-4 * abs(expected[at]).max()
    assert abs(actual).max() <= GRADIENT_LIMIT[dtype]
