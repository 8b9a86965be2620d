"""Tensor parallelism: training on every grid as on one process, bytes by formulas, and memory."""

from contextlib import suppress
from functools import partial

import numpy as np
import pytest

pytest.importorskip("mpi4py.MPI")

from helpers.runs import run, trainer
from helpers.trained import same, train_steps

from psmpi.backend import make_backend
from psmpi.comm.transfers import totals
from psmpi.errors import UserError
from psmpi.methods.tensor.cost import cheapest, received
from psmpi.methods.tensor.grid import Grid, all_grids
from psmpi.methods.tensor.plan import make_plan
from psmpi.registry import find_method
from psmpi.testing import run_ranks
from psmpi.testing.case import Case
from psmpi.testing.conformance import counters_equal_messages, resumed_runs_end_the_same
from psmpi.training.context import Context

MLP = (
    "--model",
    "mlp",
    "--widths",
    "28",
    "24",
    "--activation",
    "tanh",
    "--loss",
    "nll",
    "--optimizer",
    "sgd",
    "--lr",
    "0.1",
)
tiled = partial(train_steps, method="tensor")
# Numbers of ranks.
SIZES = (1, 2, 4, 6, 8, 12)


def problem(*options):
    return Case("tensor", ".", options).problem()


@pytest.fixture(scope="module")
def thirteen(tmp_path_factory):
    """Random samples of thirteen classes, 122 of them for training."""
    path, rng = tmp_path_factory.mktemp("data") / "thirteen.npz", np.random.default_rng(3)
    np.savez(path, x=rng.normal(size=(152, 21)).astype(np.float32), y=np.arange(152) % 13)
    return str(path)


@pytest.fixture(scope="module")
def serial():
    """serial(options, steps): the result of data parallelism on one rank, computed once."""
    results = {}

    def call(options, steps=20):
        if options not in results:
            results[options] = train_steps(1, options, steps)
        return results[options]

    return call


GRIDS = [",".join(map(str, grid.sizes)) for size in SIZES for grid in all_grids(size)]
KINDS = [(1, "1d"), (2, "1d"), (3, "1d"), (4, "1d"), (4, "1d-sharded"), (1, "2d"), (4, "2d"), (9, "2d"), (8, "3d")]


@pytest.mark.parametrize("grid", GRIDS)
def test_any_grid_trains_as_one_process(serial, thirteen, grid):
    """Axes do not divide all units, samples and rows evenly; the last minibatch has two samples."""
    ranks = int(np.prod(list(map(int, grid.split(",")))))
    options = (*MLP, "--dataset", thirteen, "--batch-size", "30")
    same(tiled(ranks, (*options, "--grid", grid)), serial(options))


@pytest.mark.parametrize(("ranks", "grid"), KINDS)
@pytest.mark.parametrize("saved", ["shards", "gathered"])
def test_named_grids_train_as_one_process(serial, ranks, grid, saved):
    options = (*MLP, "--batch-size", "36", "--grid", grid, "--saved", saved)
    same(tiled(ranks, options), serial((*MLP, "--batch-size", "36")))


# Twelve heads of three units, embedded characters, and a score of each character.
TRANSFORMER = (
    "--model", "transformer", "--widths", "36", "40", "--heads", "12", "--blocks", "1", "--context", "6",
    "--batch-size", "13", "--loss", "nll", "--optimizer", "adam", "--lr", "0.01", "--clip", "0.5",
)  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text of 900 characters, 26 kinds of them, in the order of a random walk."""
    path, rng = tmp_path_factory.mktemp("text") / "walk.txt", np.random.default_rng(1)
    path.write_text("".join(chr(97 + position % 26) for position in rng.integers(-2, 4, 900).cumsum()))
    return str(path)


SEVERAL = [(grid, int(np.prod(list(map(int, grid.split(",")))))) for grid in GRIDS]
SEVERAL += [(name, ranks) for ranks, name in KINDS] + [("3,3,3", 27)]


@pytest.mark.parametrize(
    ("grid", "ranks"),
    [pytest.param(*case, marks=pytest.mark.slow) if case[1] in (3, 6, 12, 27) else case for case in SEVERAL],
)
def test_a_transformer_trains_as_on_one_process(serial, text, grid, ranks):
    """Attention is dealt by heads and layer normalization by units; clipping counts copies of a gradient once."""
    options = (*TRANSFORMER, "--dataset", text)
    same(tiled(ranks, (*options, "--grid", grid), steps=6), serial(options, 6))


# Four layers, and minibatches, whose sizes all axes divide.
EVEN = ("--dataset", "digits", "--model", "mlp", "--widths", "144", "144", "144", "--batch-size", "144")
NUMBER = 8


def on_ranks(ranks, options, look):
    """Return look(method) of each rank."""
    network, dataset, config = Case("tensor", ".", options).problem()
    kind = find_method("tensor")

    def work(world):
        return look(kind(Context(world, network, dataset, config, make_backend("auto"))))

    return run_ranks(ranks, work, timeout=120)


@pytest.mark.parametrize("grid", ["2,2,2", "1,2,3", "3,2,2", "4,1,1", "1,1,4", "2,3,1"])
@pytest.mark.parametrize("saved", ["shards", "gathered"])
def test_bytes_are_those_of_the_formula(grid, saved):
    """Words received: ((pj - 1) SX + (pi - 1) SW + (pl - 1) SY) / P in forward, and as many in backward.

    With saved shards, backward gathers X and W again, but not the last two weights, which are still held. The formula
    is of the layers between the first, whose inputs are the samples, and the last; axes take turns.
    """
    i, j, l = map(int, grid.split(","))  # noqa: E741
    ranks, batch = i * j * l, 144
    options = (*EVEN, "--grid", grid, "--saved", saved)

    def look(method):
        tiles = method.plan.tiles
        share = batch // i
        sent = [
            totals(method.products[name].messages(share, not tile.reads_samples), method.rank)[1]
            for name, tile in tiles.items()
        ]
        return sent, NUMBER * received(method.plan, method.rank, batch, saved == "gathered")

    for sent, stated in on_ranks(ranks, options, look):
        assert sum(sent) == stated
        for number, (gathered, summed) in {1: (l, j), 2: (j, l)}.items():
            x = y = 144 * batch
            w = 144 * 144
            once = (gathered - 1) * x + (i - 1) * w
            regathered = once if number == 1 else (gathered - 1) * x
            expected = 2 * (once + (summed - 1) * y) + (regathered if saved == "shards" else 0)
            assert sent[number] == NUMBER * expected / ranks


@pytest.mark.parametrize("root", [2, 3])
def test_bytes_of_panels_are_those_of_the_formula(root):
    """3 (q - 1) / q^2 (SX + SW) words received, forward and backward."""

    def look(method):
        messages = method.products["dense2"].messages(144 // root, True)
        return totals(messages, method.rank)[1], NUMBER * received(method.plan, method.rank, 144, False)

    expected = 3 * (root - 1) * (144 * 144 + 144 * 144) / root**2
    by_rank = on_ranks(root**2, (*EVEN, "--grid", "2d"), look)
    assert [result[0] for result in by_rank] == [NUMBER * expected] * root**2


@pytest.mark.parametrize("sharded", [False, True])
def test_bytes_in_one_dimension_are_those_of_a_pair(sharded):
    """2 (P - 1) / P (SZ + SX) words received for two layers: an all-reduce forward, one backward."""
    ranks = 4

    def look(method):
        # The second and third layer are a pair, whose first layer deals its outputs.
        names = ["dense2", "dense3"]
        return sum(totals(method.products[name].messages(144, True), method.rank)[1] for name in names)

    name = "1d-sharded" if sharded else "1d"
    by_rank = on_ranks(ranks, (*EVEN, "--grid", name, "--saved", "gathered"), look)
    assert by_rank == [NUMBER * 2 * (ranks - 1) * 2 * 144 * 144 / ranks] * ranks


@pytest.mark.parametrize(("ranks", "grid"), [(8, "3d"), (6, "1,2,3"), (4, "1d-sharded"), (4, "2d")])
def test_a_rank_holds_its_share(ranks, grid):
    """Weights and saved activations, with vectors that ranks share, are at most 1.1 times those of one rank over the
    ranks."""

    def look(method):
        return method.w.nbytes + method.model.activation_bytes

    one_rank = on_ranks(1, EVEN, look)[0]
    assert max(on_ranks(ranks, (*EVEN, "--grid", grid), look)) <= 1.1 * one_rank / ranks


PLAIN = ("--model", "mlp", "--widths", "24", "16")
LIMITS = [
    (4, (*PLAIN, "--grid", "cube"), "--grid cube: expected auto, 1d, 1d-sharded, 2d, 3d, or the ranks along three"),
    (4, (*PLAIN, "--grid", "2,2"), "--grid 2,2: expected auto"),
    (4, (*PLAIN, "--grid", "4,0,1"), "--grid 4,0,1: expected auto"),
    (4, (*PLAIN, "--grid", "2,2,2"), "--grid 2,2,2 is of 8 ranks, and there are 4: start 8"),
    (3, (*PLAIN, "--grid", "2d"), "--grid 2d needs a square number of ranks, and there are 3: start 1 or 4"),
    (9, (*PLAIN, "--grid", "3d"), "--grid 3d needs the cube of a number of ranks, and there are 9: start 8 or 27"),
    (7, (*PLAIN, "--grid", "3d"), "there are 7: start 1 or 8"),
    (16, (*PLAIN, "--grid", "1,16,1"), "dense3 of --model mlp has 10 units, and a grid of 1 x 16 x 1 ranks deals them"),
    (8, (*PLAIN, "--widths", "6", "16", "--grid", "1d"), "dense1 of --model mlp has 6 units"),
    (
        3,
        (*TRANSFORMER, "--dataset", "copying:2", "--heads", "2", "--grid", "1,3,1"),
        "has 2 heads, and a grid of 1 x 3",
    ),
    (4, (*PLAIN, "--batch-size", "3", "--grid", "4,1,1"), "--batch-size 3 is dealt to 4 ranks .* use --batch-size 4"),
    (4, (*PLAIN, "--batch-norm", "--batch-size", "359", "--grid", "4,1,1"), "--batch-size 359 leaves 2 samples"),
    (
        4,
        ("--model", "deep", "--widths", "8", "--depth", "4", "--grid", "1,2,2"),
        "an even number of dense layers",
    ),
    (2, ("--model", "psnet"), "conv1 of --model psnet is none of the layers that --method tensor cuts"),
    (2, ("--dataset", "digits:rows", "--model", "lstm"), "lstm1 of --model lstm is none of the layers"),
    (
        2,
        ("--config", "groups.toml", "--model", "custom"),
        r"dense1 \(.*\) of --model custom is cut into groups",
    ),
    (
        2,
        ("--config", "norm.toml", "--model", "custom"),
        r"layer_norm1 \(.*\) of --model custom is before all",
    ),
    (2, ("--config", "block.toml", "--model", "custom"), r"residual1 \(.*\) of --model custom is before all"),
    (2, (*PLAIN, "--optimizer", "lbfgs"), "--optimizer lbfgs .* use a first-order one"),
    (2, (*PLAIN, "--optimizer", "muon"), "--optimizer muon steps whole matrices"),
    (2, (*PLAIN, "--optimizer", "plbfgs"), "--optimizer plbfgs is an option of --method psl"),
]


@pytest.mark.parametrize(("ranks", "options", "says"), LIMITS, ids=[case[2][:30] for case in LIMITS])
def test_limits_name_the_fix(tmp_path, monkeypatch, ranks, options, says):
    monkeypatch.chdir(tmp_path)
    files = {
        "groups": '{type = "separable_dense", units = 10, groups = 2}',
        "norm": '{type = "layer_norm"}',
        "block": '{type = "residual", layers = [{type = "dense", units = 8}, {type = "dense", units = 64}]}',
    }
    for name, layer in files.items():
        layers = f'{{type = "flatten"}}, {layer}, {{type = "dense", units = 10}}'
        (tmp_path / f"{name}.toml").write_text(f'[model]\nmodel = "custom"\nlayers = [{layers}]\n')
    network, dataset, config = problem(*options)
    with pytest.raises(UserError, match=says):
        find_method("tensor").check(ranks, network, dataset, config)


@pytest.mark.parametrize("grid", ["2d", "2,2,1", "1,1,1"])
def test_a_limit_ends_the_job_with_one_message(tmp_path, grid):
    words = ("--method", "tensor", *PLAIN, "--grid", grid, "--epochs", "1", "--lr", "0.001", "--batch-size", "30")
    status, out, err = run(3, "-m", "psmpi.train", "--out", tmp_path / "out", *words, timeout=20)
    message = out + err
    assert status != 0 and "Traceback" not in message and message.count(f"--grid {grid}") == 1, message


def test_a_checkpoint_opens_on_any_grid(tmp_path, text):
    """Resume a training on a cube of eight ranks on other grids, at a rate that moves no weight."""
    train = trainer(tmp_path)
    options = ("--method", "tensor", *TRANSFORMER, "--dataset", text, "--dtype", "float64", "--max-steps", "4")
    cube = train(8, *options, "--grid", "3d")
    cube_tensors = cube.tensors()
    for ranks, grid in ((1, "auto"), (4, "2d"), (4, "1d"), (6, "3,1,2")):
        resume_options = ("--resume", cube.checkpoint, "--max-steps", "5", "--lr", "1e-14", "--grid", grid)
        resumed_tensors = train(ranks, "--method", "tensor", *resume_options).tensors()
        for name, tensor in cube_tensors.items():
            if name.startswith("weights/"):
                np.testing.assert_allclose(resumed_tensors[name], tensor, rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", ["psl", "logistic", "hinge", "bce", "squared"])
def test_losses_that_are_of_several_ranks_scores_train_as_on_one(serial, loss):
    """With --kappa 30 derivatives are so large that all ranks scale them down by the same power of two."""
    steep = ("--kappa", "30") if loss == "psl" else ()
    options = (*MLP[:-6], "--loss", loss, "--optimizer", "sgd", "--lr", "0.1", "--clip", "0.3", *steep)
    same(tiled(4, (*options, "--grid", "1,2,2"), steps=5), serial(options, 5))


@pytest.mark.parametrize("grid", ["1,2,2", "2d", "2,2,1"])
def test_values_at_each_step_are_learnt_as_on_one_process(serial, tmp_path, grid):
    """Sequences have several lengths, and some ranks' shares of labels have no step that counts."""
    rng = np.random.default_rng(0)
    x, lengths = rng.normal(size=(60, 5, 3)).astype(np.float32), rng.integers(1, 6, 60)
    values = rng.normal(size=(60, 5, 6))
    values[np.arange(5) >= lengths[:, None]] = np.nan
    labels = np.where(rng.random((60, 5)) < 0.1, rng.integers(0, 6, (60, 5)), -1)
    labels[:, 0] = np.where(np.arange(60) % 3, labels[:, 0], np.arange(60) % 6)
    model = ("--model", "transformer", "--widths", "12", "--blocks", "1", "--batch-size", "4", "--lr", "0.01")
    for name, targets, loss in (("values", values, "squared"), ("labels", labels, "nll")):
        np.savez(tmp_path / f"{name}.npz", x=x, y=targets, lengths=lengths)
        options = ("--dataset", str(tmp_path / f"{name}.npz"), *model, "--loss", loss, "--optimizer", "sgd")
        same(tiled(4, (*options, "--grid", grid), steps=6), serial(options, 6))


@pytest.mark.parametrize("grid", ["3,1,1", "2,2,1"])
def test_statistics_of_batch_normalization_are_of_all_samples(serial, grid):
    options = (*MLP, "--batch-norm", "--batch-size", "45")
    same(tiled(int(np.prod(list(map(int, grid.split(","))))), (*options, "--grid", grid), steps=8), serial(options, 8))


@pytest.mark.parametrize("grid", ["1,2,2", "1d", "2,2,1", "2d"])
@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_losses_that_are_no_numbers_end_it_or_are_left_out(tmp_path, grid, mode):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 8)).astype(np.float32)
    x[7] = 3e38
    np.savez(tmp_path / "bad.npz", x=x, y=np.arange(100) % 6)
    words = ("--method", "tensor", "--dataset", "bad.npz", *PLAIN, "--loss", "nll", "--lr", "0.001", "--epochs", "2")
    words = (*words, "--batch-size", "30", "--on-nan", mode, "--grid", grid)
    status, out, err = run(4, "-m", "psmpi.train", "--out", "run", *words, cwd=tmp_path, timeout=60)
    message = " ".join((out + err).split())
    assert (status == 0) == (mode == "skip") and "Traceback" not in message, message
    assert ("skipped" in message) if mode == "skip" else message.count("is not a finite number") == 1, message
    # The message names the layer that overflows, not the layers after it.
    assert "layer dense1 is the first to put out inf" in message and "sample 7 of" in message, message


def test_values_are_learnt_as_on_one_process(serial, tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(90, 8)).astype(np.float32)
    np.savez(tmp_path / "values.npz", x=x, y=np.sin(x @ rng.normal(size=(8, 5))))
    options = (
        "--dataset",
        str(tmp_path / "values.npz"),
        *PLAIN,
        "--activation",
        "tanh",
        "--loss",
        "squared",
        "--lr",
        "0.01",
    )
    same(tiled(6, (*options, "--grid", "2,3,1"), steps=8), serial(options, 8))


def test_auto_takes_the_grid_of_least_bytes():
    network = problem("--model", "mlp", "--widths", "64", "64", "64")[0]
    chosen = cheapest(12, network, 400, False)
    words_by_grid = {}
    for grid in all_grids(12):
        with suppress(UserError):
            plan = make_plan(network, grid)
            words_by_grid[grid.sizes] = max(received(plan, rank, 400, False) for rank in range(12))
    assert len(words_by_grid) > 5 and words_by_grid[chosen.grid.sizes] == min(words_by_grid.values())
    # Wide layers and few samples are cut by units, many samples by samples.
    assert cheapest(4, network, 4, False).grid.sizes[0] == 1 and cheapest(4, network, 4000, False).grid.sizes == (
        4,
        1,
        1,
    )


VARIANTS = {
    "transformer": (*TRANSFORMER, "--grid", "1d-sharded", "--context", "2"),
    "normalized": ("--batch-norm", "--grid", "auto"),
    "whole": ("--grid", "1d", "--saved", "gathered", "--no-prefetch"),
    "panels": ("--grid", "2d"),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    "check", [counters_equal_messages, resumed_runs_end_the_same], ids=lambda check: check.__name__
)
def test_variants_conform(tmp_path, text, monkeypatch, name, check):
    data = ("--dataset", text) if name == "transformer" else ()
    if name == "normalized":
        # A grid along samples, over which statistics are summed.
        monkeypatch.setattr("psmpi.methods.tensor.cost.all_grids", lambda ranks: [Grid((ranks, 1, 1))])
    check(Case("tensor", tmp_path, (*VARIANTS[name], *data)))


def test_what_is_trained_where_no_network_is_named_is_told(tmp_path):
    status, out, err = run(2, "-m", "psmpi.train", "--out", tmp_path / "run", "--method", "tensor", "--max-steps", "1")
    output = " ".join((out + err).split())
    assert status == 0 and "no network is named: this is --dataset copying:5 --model transformer" in output, output
    status, out, err = run(1, "-m", "psmpi.train", "--method", "tensor", "--help")
    assert "If no --model is given: --dataset copying:5 --model transformer" in " ".join(out.split())
