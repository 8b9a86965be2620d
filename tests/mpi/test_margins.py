"""Cosine scores, with and without a margin: formulas, gradients, tiles, ranks, tests and predictions."""

import tracemalloc

import numpy as np
import pytest

pytest.importorskip("mpi4py.MPI")

from helpers.paths import ROOT
from helpers.runs import run, same_run, save_many
from scipy.ndimage import affine_transform
from scipy.special import expit, softmax

from psmpi.backend import CompiledOps, NumpyOps
from psmpi.backend.compiled.library import level
from psmpi.layout import Runs
from psmpi.nn import tail
from psmpi.nn.cut import has_head
from psmpi.nn.init import initial_weights
from psmpi.nn.losses import LOSSES, make_loss
from psmpi.nn.margin import LARGEST, make_margin
from psmpi.nn.model import Model
from psmpi.nn.network import build
from psmpi.nn.objective import Objective
from psmpi.nn.tiles import TiledObjective
from psmpi.nn.zoo import make_network
from psmpi.optim.first_order import FirstOrder

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
BACKENDS = ["numpy", pytest.param("compiled", marks=pytest.mark.skipif(level() == 0, reason="no compiled kernels"))]
SCALE = 5.0
# Kinds and sizes of margins; with sizes above 1.2 many angles exceed pi.
MARGINS = [("arcface", 0.0), ("arcface", 0.4), ("arcface", 1.3), ("cosface", 0.3)]
OPTIONS = [("--scale", "5", "--margin", str(size), "--margin-kind", kind) if size else ("--scale", "5")
           for kind, size in MARGINS]  # fmt: skip

every_loss = pytest.mark.parametrize("name", LOSSES)
every_margin = pytest.mark.parametrize(("kind", "size"), MARGINS)


def pairs_of(values, known):
    """Return parameters for all values and margins; quick are one margin a value, and all margins of `known` values."""
    value_list = list(values)
    return [
        pytest.param(value, kind, size, marks=[] if value in known or k % len(MARGINS) == m else [pytest.mark.slow])
        for k, value in enumerate(value_list)
        for m, (kind, size) in enumerate(MARGINS)
    ]


def options_of(kind, size):
    return OPTIONS[MARGINS.index((kind, size))]


def with_margin(cosine, kind, size):
    """Return the label's score divided by the scale, from its cosine."""
    angle = np.arccos(cosine)
    if kind == "cosface":
        return cosine - size
    return np.where(angle + size <= np.pi, np.cos(angle + size), cosine - size * np.sin(size))


@pytest.mark.parametrize(("kind", "size"), MARGINS[1:])
def test_margins_and_their_slopes_are_those_of_the_angles(kind, size):
    cosines, h = np.linspace(-0.999, 0.999, 300), 1e-7
    scores, slopes = np.stack([SCALE * cosines, np.ones(300)]), np.empty(300)
    labels = np.where(np.arange(300) % 5, 0, 7)
    NumpyOps().add_margins(scores, labels, *make_margin(kind, size, SCALE, F64), slopes)
    labelled = labels == 0
    np.testing.assert_allclose(scores[0, labelled], SCALE * with_margin(cosines[labelled], kind, size), atol=1e-12)
    np.testing.assert_array_equal(scores[0, ~labelled], SCALE * cosines[~labelled])
    shifted = [with_margin(cosines + move, kind, size) for move in (-h, h)]
    steady = labelled & (abs(cosines + np.cos(size)) > 2 * h)
    np.testing.assert_allclose(slopes[steady], ((shifted[1] - shifted[0]) / (2 * h))[steady], rtol=1e-5)
    assert (scores[1] == 1).all() and (slopes[~labelled] == 1).all()


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_a_label_in_its_row_s_direction_has_a_slope_that_rounding_bears(dtype):
    scores, slopes = np.array([[SCALE, SCALE * (1 + 1e-7), -SCALE, np.nan]], dtype), np.empty(4)
    NumpyOps().add_margins(scores, np.zeros(4, int), *make_margin("arcface", 0.5, SCALE, dtype), slopes)
    assert (slopes[:2] > 100).all() and (slopes[:2] <= np.finfo(dtype).eps ** -0.5).all()
    assert scores[0, 0] == pytest.approx(SCALE * np.cos(0.5), rel=1e-3) and slopes[2] == 1 and np.isnan(scores[0, 3])


def network_of(classes, trunk=True):
    layers = [{"type": "dense", "units": 7}, {"type": "tanh"}] if trunk else []
    return build("head", (5,), [*layers, {"type": "cosine", "units": classes, "scale": SCALE}], classes)


def problem(network, dtype=F64, batch=33):
    rng = np.random.default_rng(0)
    w = rng.normal(size=network.layout().size).astype(dtype)
    return w, rng.normal(size=(5, batch)).astype(dtype), rng.integers(0, network.classes, batch)


def losing(name, dtype, kind, size, classes=13, **settings):
    loss = make_loss(name, dtype, outputs=classes, **settings)
    loss.scale, loss.margin = SCALE, make_margin(kind, size, SCALE, dtype)
    return loss


class Derived:
    """An objective of a network, and its gradient g at given weights w."""

    def __init__(self, network, w, batch, loss, ops, tiled):
        self.w, self.g = w, np.full_like(w, np.nan)
        self.model = Model(network, network.layout(), w, self.g, ops, tiled=tiled)
        self.objective = (TiledObjective if tiled else Objective)(loss, self.model)
        self.objective.reserve(network.classes, batch)

    def __call__(self, x, labels):
        """Return the loss, and write its gradient to g."""
        self.tape = self.model.forward(x)
        self.objective.losses(self.tape.scores, labels, 1 / len(labels))
        self.objective.backward(self.tape)
        return self.objective.value()


def make_ops(backend):
    return CompiledOps() if backend == "compiled" else NumpyOps()


@pytest.fixture
def tile(monkeypatch):
    """tile(n): let tiles have n classes."""
    return lambda n: monkeypatch.setattr(tail, "tile_size", lambda batch: n)


WEIGHTS = [(name, {}) for name in LOSSES] + [("psl", {"weights": "current"})]


@pytest.mark.parametrize("tiled", [False, True])
@every_margin
@pytest.mark.parametrize(("name", "settings"), WEIGHTS, ids=str)
def test_gradients_match_central_differences(name, settings, kind, size, tiled, tile):
    if tiled and settings:
        pytest.skip("weighed samples have no tiles")
    tile(4)
    network = network_of(13)
    w, x, labels = problem(network, batch=9)
    derive, h = Derived(network, w, 9, losing(name, F64, kind, size, **settings), NumpyOps(), tiled), 1e-6
    derive(x, labels)
    g = derive.g.copy()
    for i in np.random.default_rng(1).permutation(w.size)[:40]:
        values = []
        for move in (h, -2 * h):
            w[i] += move
            values.append(derive(x, labels))
        w[i] += h
        assert g[i] == pytest.approx((values[0] - values[1]) / (2 * h), abs=1e-6 * max(1, abs(g).max()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-12), (F32, 3e-5)], ids=str)
@every_margin
@every_loss
def test_tiles_make_the_loss_and_gradient_of_all_scores_at_once(name, kind, size, dtype, tolerance, backend, tile):
    for trunk, classes in ((True, 1), (True, 4), (False, 20)):
        tile(classes)
        network = network_of(13, trunk)
        assert has_head(network)
        w, x, labels = problem(network, dtype)
        untiled = Derived(network, w, 33, losing(name, dtype, kind, size), NumpyOps(), False)
        tiled = Derived(network, w, 33, losing(name, dtype, kind, size), make_ops(backend), True)
        assert tiled(x, labels) == pytest.approx(untiled(x, labels), rel=tolerance)
        assert abs(tiled.g - untiled.g).max() <= tolerance * abs(untiled.g).max()
        before = tiled.g.copy()
        tiled.g.fill(np.nan)
        tiled.objective.again(tiled.tape)
        assert np.allclose(tiled.g, before, rtol=1e-6 if dtype == F32 else 1e-12, atol=0)


@pytest.mark.parametrize(("name", "kind", "size"), pairs_of(LOSSES, ("nll",)))
def test_tiles_on_any_ranks_make_the_steps_of_all_scores_on_one(name, kind, size, train, tmp_path, monkeypatch):
    options = (*save_many(tmp_path), "--loss", name, *options_of(kind, size))
    untiled = train(1, *options)
    for ranks, classes, more in ((3, 5, ()), (2, 50, ("--placement", "owner"))):
        monkeypatch.setattr(tail, "tile_size", lambda batch, classes=classes: classes)
        assert same_run(untiled, train(ranks, *options, "--colocate", *more))


@pytest.mark.parametrize(("name", "margin"), [("psl", ()), ("nll", ("--margin", "0.3"))], ids=str)
def test_a_rank_may_have_no_label_of_a_minibatch(name, margin, train, tmp_path, monkeypatch):
    """Minibatches have two samples, fewer than there are ranks."""
    monkeypatch.setattr(tail, "tile_size", lambda batch: 3)
    options = (*save_many(tmp_path), "--loss", name, "--scale", "8", *margin, "--batch-size", "2", "--max-steps", "5")
    assert same_run(train(1, *options), train(4, *options, "--colocate"))


def test_features_beyond_the_dtype_are_told(tmp_path):
    """Features that overflow are an error, and do not become vectors of zeros, which learn nothing."""
    rng = np.random.default_rng(0)
    x, y = rng.random((60, 5)).astype(np.float32), np.arange(60) % 6
    x[7] = 1e25
    np.savez(tmp_path / "huge.npz", x=x, y=y, x_test=x[10:30], y_test=y[10:30])
    message = refused("--dataset", tmp_path / "huge.npz", "--model", "head", "--scale", "8", "--loss", "nll")
    assert "the loss is not a finite number" in message and "cosine1.unit is the first to put out NaN" in message


def refused(*words):
    status, _, err = run(1, "-m", "psmpi.train", "--epochs", "1", *words)
    assert status == 1 and "Traceback" not in err
    return " ".join(err.split())


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.pairwise])
def test_pairs_of_classes_make_the_steps_of_all(name, train, tmp_path):
    options = (*save_many(tmp_path), "--loss", name, *OPTIONS[1])
    by_classes, by_pairs = train(1, *options), train(3, *options, "--partition", "pairs", "--colocate")
    assert same_run(by_classes, by_pairs)


def test_a_network_of_a_file_ends_in_cosines_too(train, tmp_path):
    options = (*save_many(tmp_path)[:2], "--lr", "0.01", "--epochs", "3", "--margin", "0.4", "--loss", "nll")
    trunk = '[[model.layers]]\ntype = "dense"\nunits = 9\n'
    head, custom = tmp_path / "head.toml", tmp_path / "custom.toml"
    head.write_text(f'[model]\nmodel = "head"\nscale = 5.0\n{trunk}')
    custom.write_text(f'[model]\nmodel = "custom"\n{trunk}[[model.layers]]\ntype = "cosine"\nunits = 37\nscale = 5.0\n')
    options = (*options, "--dtype", "float64", "--batch-size", "50")
    first, second = (train(1, *options, "--config", file) for file in (head, custom))
    assert same_run(first, second)
    custom.write_text(f'[model]\nmodel = "custom"\n{trunk}[[model.layers]]\ntype = "dense"\nunits = 37\n')
    message = refused(*options, "--config", custom)
    assert 'the scores here are none: let [[model.layers]] end in a layer of type "cosine"' in message


@pytest.mark.parametrize(
    ("name", "kind", "size"), pairs_of([name for name, loss in LOSSES.items() if loss.immediate], ("nll",))
)
def test_rows_that_are_stepped_in_their_tiles_step_as_others(name, kind, size, train, tmp_path, monkeypatch):
    options, pieces = (*save_many(tmp_path), "--loss", name, *options_of(kind, size)), []
    options = (*options, "--clip", "0", "--weight-decay", "0.01")
    untiled, step_piece = train(1, *options), FirstOrder.step_piece
    monkeypatch.setattr(FirstOrder, "step_piece", lambda *arguments: (pieces.append(arguments), step_piece(*arguments)))
    monkeypatch.setattr(tail, "tile_size", lambda batch: 5)
    for ranks in (1, 3):
        pieces.clear()
        assert same_run(untiled, train(ranks, *options, "--colocate", "--placement", "owner")) and pieces


# Derivatives with respect to scores c (b, 8), for one-hot targets t (b, 8).
SLOPES = {
    "nll": lambda c, t: softmax(c, axis=1) - t,
    "bce": lambda c, t: expit(c - np.log(7) - SCALE / 2) - t,
}


@pytest.mark.parametrize(
    ("ranks", "tiled"),
    [(1, True), (3, False), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, False), (3, True)))],
)
@pytest.mark.parametrize(("name", "kind", "size"), pairs_of(SLOPES, ("nll",)))
def test_twenty_steps_are_those_of_plain_formulas(name, kind, size, ranks, tiled, train, tmp_path, monkeypatch):
    """Compare with gradient descent on normalized features and rows, written out with angles."""
    if tiled:
        monkeypatch.setattr(tail, "tile_size", lambda batch: 2)
    rng, samples = np.random.default_rng(0), np.arange(50)
    x, y = rng.normal(size=(50, 6)), samples % 8
    np.savez(tmp_path / "data.npz", x=x, y=y, x_test=x[:8], y_test=y[:8])
    options = ("--dataset", tmp_path / "data.npz", "--model", "head", "--widths", "16", "9", "--scale", "5",
               "--loss", name, "--margin", size, "--optimizer", "sgd", "--lr", "0.5", "--clip", "0",
               "--dtype", "float64", "--batch-size", "50", "--epochs", "20",
               "--checkpoint-every", "20", "--colocate", "--placement", "owner")  # fmt: skip
    trained = train(ranks, *options, *(("--margin-kind", kind) if size else ())).tensors()

    network = make_network("head", (6,), 8, widths=(16, 9), scale=SCALE)
    layout = network.layout()
    start = np.empty(layout.size)
    initial_weights(network, layout, Runs(((0, layout.size),)), start, seed=0)
    tensors = {p.name: np.empty(p.shape) for p in layout.parameters}
    for piece in layout.pieces():
        into = tensors[layout.parameters[piece.parameter].name]
        rows = into.reshape(len(into), -1)[piece.first : piece.last]
        rows[...] = start[piece.offset : piece.offset + rows.size].reshape(rows.shape)
    v, (w, b), (t, c) = tensors["cosine1.weight"], *([tensors[f"dense{k}.{key}"] for key in ("weight", "bias")]
                                                    for k in (1, 2))  # fmt: skip
    for _ in range(20):
        z = x @ w.T + b
        h = np.maximum(z, 0) @ t.T + c
        sizes, lengths = np.linalg.norm(h, axis=1, keepdims=True), np.linalg.norm(v, axis=1, keepdims=True)
        u, unit = h / sizes, v / lengths
        cosines = u @ unit.T
        scores, own = SCALE * cosines, cosines[samples, y]
        scores[samples, y] = SCALE * with_margin(own, kind, size)
        d = SCALE * SLOPES[name](scores, np.eye(8)[y]) / 50
        angle = np.arccos(own)
        if kind == "arcface":
            d[samples, y] *= np.where(angle + size <= np.pi, np.sin(angle + size) / np.sin(angle), 1)
        du, dunit = d @ unit, d.T @ u
        dh = (du - (du * u).sum(axis=1, keepdims=True) * u) / sizes
        dz = dh @ t * (z > 0)
        v -= 0.5 * (dunit - (dunit * unit).sum(axis=1, keepdims=True) * unit) / lengths
        for values, into, d in ((np.maximum(z, 0), (t, c), dh), (x, (w, b), dz)):
            into[0][...] -= 0.5 * d.T @ values
            into[1][...] -= 0.5 * d.sum(axis=0)
    for key, values in tensors.items():
        np.testing.assert_allclose(trained[f"weights/{key}"], values, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LARGEST)
@every_loss
def test_no_array_of_all_scores_is_ever_made(name, kind, backend):
    classes, batch = 20_000, 256
    network = network_of(classes)
    w, x, labels = problem(network, F32, batch)
    tracemalloc.start()
    try:
        derive = Derived(network, w, batch, losing(name, F32, kind, 0.3, classes), make_ops(backend), True)
        derive(x, labels)
        assert tracemalloc.get_traced_memory()[1] < 4 * classes * batch / 2
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("tiled", [False, True])
def test_margins_are_of_training_alone(tiled, train, tmp_path, monkeypatch):
    """Tests and predictions use cosines times the run's scale, without the margin."""
    if tiled:
        monkeypatch.setattr(tail, "tile_size", lambda batch: 5)
    options = (*save_many(tmp_path), "--loss", "nll", "--lr", "1e-9", "--scale", "5")
    plain, margin = train(1, *options), train(2, *options, "--margin", "0.5", "--colocate")
    assert margin.rows[-1]["train_loss"] > plain.rows[-1]["train_loss"] + 1
    for key in ("test_loss", "test_accuracy", "test_top5"):
        assert margin.rows[-1][key] == pytest.approx(plain.rows[-1][key], rel=1e-6)
    weights = {name.removeprefix("weights/"): values for name, values in margin.tensors().items()}
    x = np.load(tmp_path / "data.npz")["x_test"]
    h = x @ weights["dense1.weight"].T + weights["dense1.bias"]
    cosines = (h / np.linalg.norm(h, axis=1, keepdims=True)) @ weights["cosine1.weight"].T
    cosines /= np.linalg.norm(weights["cosine1.weight"], axis=1)
    status, _, err = run(2, "-m", "psmpi.predict", margin.out, "--out", tmp_path / "out.npz")
    assert status == 0, err
    np.testing.assert_allclose(np.load(tmp_path / "out.npz")["scores"], 5 * cosines, rtol=1e-9, atol=1e-9)


def test_checkpoints_of_cosines_are_looked_into_cut_and_exported(train, tmp_path):
    trained = train(1, *save_many(tmp_path), "--loss", "nll", "--scale", "5", "--margin", "0.5")
    part = tmp_path / "part.h5"
    for command in (("stats", trained.out), ("cut", trained.out, "--classes", "3", "20", "--out", part)):
        status, _, err = run(1, "-m", "psmpi.inspect", *command)
        assert status == 0, err
    pytest.importorskip("onnxruntime")
    for source in (trained.out, part):
        status, out, err = run(1, "-m", "psmpi.inspect", "export", source, "--out", tmp_path / "net.onnx")
        assert status == 0 and "onnxruntime's scores differ from psmpi's by" in out, err


@pytest.mark.parametrize("more", [(), ("--scale", "8"), ("--margin", "0.2"), ("--margin", "0")], ids=str)
def test_a_run_goes_on_with_its_scale_and_margin_or_with_others(more, train, tmp_path):
    options = (*save_many(tmp_path), "--loss", "nll", *OPTIONS[-1])
    full_run, cut_run = train(1, *options), train(1, *options, "--epochs", "1")
    assert same_run(full_run, train(1, "--resume", cut_run.checkpoint, "--epochs", "3", *more)) == (not more)


@pytest.mark.parametrize("method", ["data_parallel", "local_sgd", "ist", "sil", "dfa"])
def test_every_method_takes_cosines_and_margins(method, train, tmp_path):
    options = (*save_many(tmp_path), "--widths", "30", "20", "--loss", "nll", "--scale", "8", "--margin", "0.2")
    trained = train(2, *options, "--method", method)
    assert np.isfinite(trained.rows[-1]["test_loss"]) and 0 < trained.rows[-1]["train_loss"] < 20
    if method in ("data_parallel", "dfa"):
        assert same_run(train(1, *options, "--method", method), trained)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--model mlp --scale 16", "--scale is for --model head, but the model is mlp"),
        ("--model head --scale -1", "--scale -1: expected a number above 0"),
        ("--model head --scale nan", "--scale nan: expected a finite number"),
        ("--model head --margin 0.5", "--margin 0.5 is put between cosines, and the scores here are none: add --scale"),
        ("--margin 0.5", "use --model head --scale 16"),
        ("--model head --scale 16 --margin 1.6", "--margin 1.6: expected an angle from 0 to pi/2"),
        ("--model head --scale 16 --margin -0.1", "--margin -0.1: expected an angle"),
        ("--model head --scale 16 --margin 2.1 --margin-kind cosface", "expected a number from 0 to 2"),
        ("--model head --scale 16 --margin-kind cosface", "--margin-kind is of a margin: add --margin"),
        ("--model head --scale 16 --margin 0.5 --optimizer plbfgs --partition pairs", "takes terms apart"),
    ],
)
def test_what_cannot_be_is_refused(words, says):
    assert says in refused(*words.split())


def test_the_example_turns_scales_and_shifts_as_scipy_does(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    from many_classes import copies

    images = np.random.default_rng(1).random((7, 28, 28))
    result, rng = copies(images, np.random.default_rng(0)), np.random.default_rng(0)
    drawn = [rng.uniform(low, high, (7, 1, 1)).ravel() for low, high in ((-15, 15), (0.9, 1.1), (-2, 2), (-2, 2))]
    noise = rng.normal(0, 12, result.shape)
    for k, (degrees, size, *shift) in enumerate(zip(*drawn, strict=True)):
        cos, sin = np.cos(np.deg2rad(degrees)) / size, np.sin(np.deg2rad(degrees)) / size
        turn = np.array([[cos, -sin], [sin, cos]])
        offset = 13.5 + np.array(shift) - turn @ [13.5, 13.5]
        moved = affine_transform(images[k], turn, offset, order=1, mode="grid-constant")
        np.testing.assert_allclose(result[k], np.clip(255 * moved + noise[k], 0, 255), atol=1)


def test_values_to_learn_are_no_cosines(tmp_path):
    np.savez(tmp_path / "data.npz", x=np.ones((30, 3)), y=np.ones((30, 2)))
    message = refused("--dataset", tmp_path / "data.npz", "--loss", "squared", "--model", "head", "--scale", "16")
    assert "a network of cosines (--scale) is for classes, and " in message
