"""Independent subnet training: dealt units, the changes of a round, bytes, and accuracy."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from helpers.datasets import real
from helpers.runs import distance, run, usual_config

from psmpi.backend import make_backend
from psmpi.comm.transfers.strips import find_strips, shard_rows, strips_size
from psmpi.config import check
from psmpi.data import Batch, Minibatches, Resident, open_dataset
from psmpi.errors import UserError
from psmpi.layout import Runs
from psmpi.methods.ist.dealer import Dealer, dealt_layers, find_blocks
from psmpi.methods.ist.method import Settings
from psmpi.nn.cut import cut_stages
from psmpi.nn.init import initial_weights
from psmpi.nn.layers.residual import Residual
from psmpi.nn.losses import make_loss
from psmpi.nn.model import Model
from psmpi.nn.network import build
from psmpi.nn.zoo import make_network
from psmpi.registry import find_method
from psmpi.testing.conformance import Case, counters_equal_messages
from psmpi.train import parse
from psmpi.training.context import Context
from psmpi.training.rounds import Rounds
from psmpi.training.usual import usual

IST = ("--method", "ist", "--model", "mlp", "--loss", "nll", "--optimizer", "sgd", "--lr", "0.1", "--dtype", "float64")


class Alone:
    rank, size = 0, 1


def mlp(*widths, inputs=12, classes=4, **settings):
    return make_network("mlp", (inputs,), classes, widths=widths, **settings)


NETWORKS = {
    "mlp": lambda: mlp(12, 8),
    "uneven widths": lambda: mlp(10, 7, 9),
    "normalized": lambda: mlp(10, 8, batch_norm=True),
    "lenet": lambda: make_network("lenet", (1, 28, 28), 10, batch_norm=True),
    # All workers have its separable layers.
    "psnet": lambda: make_network("psnet", (1, 8, 8), 10),
    "normalized after flattening": lambda: build(
        "odd",
        (1, 6, 6),
        [
            {"type": "conv", "channels": 8, "kernel": 3},
            {"type": "mean_pool"},
            {"type": "flatten"},
            {"type": "batch_norm"},
            {"type": "relu"},
            {"type": "dense", "units": 4},
        ],
        4,
    ),
    "residual": lambda: make_network("resnet", (1, 8, 8), 10, widths=(6, 5), blocks=(1, 2)),
}


def tensors(layout, w):
    """Return copies of the parameters of a flat vector by name, of shape (units, weights of a unit)."""
    parameters = {p.name: np.full((p.units, p.unit_size), np.nan) for p in layout.parameters}
    for piece in layout.pieces():
        p = layout.parameters[piece.parameter]
        size = (piece.last - piece.first) * p.unit_size
        parameters[p.name][piece.first : piece.last] = w[piece.offset : piece.offset + size].reshape(-1, p.unit_size)
    return parameters


def method(net, **settings):
    base, local_steps = usual_config(), settings.pop("every", 20)
    config = replace(
        base,
        model=replace(base.model, dtype="float32"),
        objective=replace(base.objective, loss="nll"),
        optimization=replace(base.optimization, optimizer=settings.pop("optimizer", "sgd"), lr=0.1, clip=0.0),
        parallel=replace(base.parallel, method=settings.pop("method", "ist")),
    )
    config = config.changed(Rounds, local_steps=local_steps).changed(Settings, **settings)
    context = Context(Alone(), net, open_dataset("digits", ""), config, make_backend("auto"))
    return find_method(config.parallel.method)(context)


# Deals.


@pytest.mark.parametrize("strata", [False, True])
@pytest.mark.parametrize(("count", "workers"), [(16, 4), (18, 4), (11, 3), (25, 5)])
def test_groups_are_disjoint_cover_all_and_are_drawn_anew(count, workers, strata):
    net = mlp(count, count)
    dealer, same_dealer = (Dealer(net, workers, 7, strata=strata) for _ in range(2))
    layers = sorted(dealt_layers(net))
    drawn = []
    for number in range(4):
        for layer in layers:
            groups = dealer.groups(number, layer)
            assert sorted(np.concatenate(groups)) == list(range(count))
            assert all((np.diff(group) > 0).all() for group in groups)
            # Sizes are the same in every round, so that buffers are reused.
            assert [len(group) for group in groups] == [len(group) for group in dealer.groups(0, layer)]
            assert all(np.array_equal(a, b) for a, b in zip(groups, same_dealer.groups(number, layer), strict=True))
            drawn.append(np.concatenate(groups).tolist())
    assert len({str(groups) for groups in drawn}) == len(drawn)
    other_groups = Dealer(net, workers, 8, strata=strata).groups(0, layers[0])
    assert not all(np.array_equal(a, b) for a, b in zip(other_groups, dealer.groups(0, layers[0]), strict=True))


@pytest.mark.parametrize(("count", "workers", "share"), [(12, 4, 1 / 4), (10, 4, 0.26), (16, 2, 1 / 2)])
def test_of_a_hidden_matrix_a_part_is_trained_and_of_the_outer_ones_all(count, workers, share):
    net = mlp(count, count)
    deal = Dealer(net, workers, 0).deal(3)
    shapes = {p.name: (p.units, p.unit_size) for p in net.layout().parameters}
    for name, part in (("dense1.weight", 1.0), ("dense2.weight", share), ("dense3.weight", 1.0)):
        hits = np.zeros(shapes[name], int)
        for shares in deal:
            dealt = shares[name]
            assert len(dealt.owners) == 1
            rows = np.arange(shapes[name][0]) if dealt.rows is None else dealt.rows
            columns = np.arange(shapes[name][1]) if dealt.columns is None else dealt.columns
            hits[np.ix_(rows, columns)] += 1
        assert hits.max() == 1 and hits.mean() == pytest.approx(part, abs=1e-12)


@pytest.mark.parametrize("holders", [1, 2, 3])
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_round_changes_what_was_dealt_and_nothing_else(name, workers, holders):
    """Compare with indexing of named matrices: send the subnets, add random numbers to each, and put them back."""
    net = NETWORKS[name]()
    layout, rng = net.layout(), np.random.default_rng(0)
    w = rng.standard_normal(layout.size)
    blocks = name == "residual" and workers == 2
    dealer = Dealer(net, workers, 5, "blocks" if blocks else "units")
    deal = dealer.deal(2)
    shards = shard_rows(layout, holders)
    assert sum(shard.size for shard in shards) == layout.size
    held = [np.concatenate([w[a:b] for a, b in shard.intervals]) for shard in shards]
    before, after = tensors(layout, w), tensors(layout, w)
    sums = {key: np.zeros_like(values) for key, values in before.items()}
    returned = []
    for worker, shares in enumerate(deal):
        own = dealer.layouts[worker]
        vector = np.full(own.size, np.nan)
        plans = [find_strips(layout, shard, (k, holders), own, shares, worker) for k, shard in enumerate(shards)]
        for strips, shard in zip(plans, held, strict=True):
            message = np.full(strips_size(strips), np.nan)
            for strip in strips:
                strip.take(shard, message)
            for strip in strips:
                vector[strip.into : strip.into + strip.size] = message[strip.at : strip.at + strip.size]
        assert not np.isnan(vector).any()
        own_tensors = tensors(own, vector)
        for key, share in shares.items():
            source_values = before[share.source]
            rows = np.arange(len(source_values)) if share.rows is None else share.rows
            columns = np.arange(source_values.shape[1]) if share.columns is None else share.columns
            assert np.array_equal(own_tensors[key], source_values[np.ix_(rows, columns)]), key
        vector += rng.standard_normal(vector.size)
        own_tensors = tensors(own, vector)
        for key, share in shares.items():
            source = share.source
            rows = np.arange(len(after[source])) if share.rows is None else share.rows
            columns = np.arange(after[source].shape[1]) if share.columns is None else share.columns
            if len(share.owners) == 1:
                after[source][np.ix_(rows, columns)] = own_tensors[key]
            else:
                sums[source] += own_tensors[key] / len(share.owners)
                after[source] = sums[source]
        returned.append((plans, vector))
    for plans, vector in returned:
        for strips, shard in zip(plans, held, strict=True):
            message = np.full(strips_size(strips), np.nan)
            for strip in strips:
                message[strip.at : strip.at + strip.size] = vector[strip.into : strip.into + strip.size]
            for strip in strips:
                strip.put(message, shard)
    result = np.full(layout.size, np.nan)
    for shard, values in zip(shards, held, strict=True):
        for a, b in shard.intervals:
            result[a:b] = values[shard.local(a, b)]
    for key, values in tensors(layout, result).items():
        shared = any(len(s.owners) > 1 and s.source == key for shares in deal for s in shares.values())
        assert np.allclose(values, after[key], rtol=1e-15, atol=1e-15) if shared else np.array_equal(values, after[key])
        if workers > 1 and len(deal[0]) == len(before):
            assert not np.array_equal(values, before[key]), key


def test_nothing_trained_nothing_changed():
    trainer = method(mlp(16, 16, inputs=64, classes=10))
    before = trainer.w.host.copy()
    trainer._begin()
    trainer.steps = 1
    trainer.drain()
    assert np.array_equal(before, trainer.w.host) and trainer.scalars["rounds"] == 1


@pytest.mark.parametrize(
    ("widths", "inputs", "classes", "sizes"),
    [
        ((4096,), 4096, 35, {1: 16_928_768, 2: 8_464_384, 4: 4_232_192, 8: 2_116_096}),
        ((4096, 4096), 4096, 35, {1: 33_714_176, 2: 12_662_784}),
        ((1024, 1024), 784, 10, {1: 1_865_728, 4: 1_079_808 // 4}),
        ((64, 64, 64), 32, 8, {4: 32 * 16 + 2 * 16 * 16 + 8 * 16 + 6 * 16}),
    ],
)
def test_messages_have_the_sizes_of_the_formula(widths, inputs, classes, sizes):
    """A worker receives S(P) = d H/P + (L - 2) (H/P)^2 + K H/P + 2 (L - 1) H/P numbers."""
    net = mlp(*widths, inputs=inputs, classes=classes, batch_norm=True)
    layers, width = len(widths) + 1, widths[0]
    for workers, size in sizes.items():
        h = width // workers
        if workers != 4 or width != 1024:
            assert size == inputs * h + (layers - 2) * h * h + classes * h + 2 * (layers - 1) * h
        else:
            size = 784 * h + h * h + 10 * h + 4 * h
        dealer = Dealer(net, workers, 0)
        layout = net.layout()
        deal = dealer.deal(0)
        (shard,) = shard_rows(layout, 1)
        for worker in {0, workers - 1}:
            strips = find_strips(layout, shard, (0, 1), dealer.layouts[worker], deal[worker], worker)
            assert strips_size(strips) == dealer.layouts[worker].size == size


@pytest.mark.parametrize("options", [("--colocate",), ("--placement", "owner", "--strata")])
def test_the_counted_bytes_are_those_of_the_formula(train, options):
    # A round of two steps, and a round of one.
    options = (*IST, "--widths", "40", "40", "--batch-norm", "--local-steps", "2", "--max-steps", "3", "--epochs", "1",
               *options)  # fmt: skip
    last = train(2, *options).rows[-1]
    size = 64 * 20 + 20 * 20 + 10 * 20 + 4 * 20
    rounds, item = 2, 8
    if "--colocate" in options:
        # Only rank 0 holds weights: the other worker's subnet goes out and comes back.
        assert last["bytes_sent_by_rank"] == last["bytes_received_by_rank"] == [rounds * size * item] * 2
    else:
        # A rank sends (P - 1) / P of a subnet as a holder and as a worker, and receives as much.
        assert last["bytes_sent_by_rank"] == last["bytes_received_by_rank"] == [2 * rounds * size * item // 2] * 2
    assert last["rounds"] == rounds


def test_a_master_that_does_not_train_sends_every_subnet(train):
    last = train(3, *IST, "--widths", "40", "40", "--batch-norm", "--max-steps", "3", "--epochs", "1").rows[-1]
    size = 8 * (64 * 20 + 20 * 20 + 10 * 20 + 4 * 20)
    assert last["bytes_sent_by_rank"] == last["bytes_received_by_rank"] == [2 * size, size, size]


# Training.


def test_one_worker_trains_as_without_subnets_to_the_bit(train):
    options = ("--model", "mlp", "--widths", "24", "24", "--loss", "nll", "--max-steps", "40", "--epochs", "5",
               "--optimizer", "sgd", "--local-steps", "5")  # fmt: skip
    subnets, plain = (train(1, "--method", name, *options) for name in ("ist", "local_sgd"))
    for name, tensor in subnets.tensors().items():
        assert np.array_equal(tensor, plain.tensors()[name]), name
    assert subnets.rows[-1]["test_loss"] == plain.rows[-1]["test_loss"]
    assert subnets.rows[-1]["train_loss"] == plain.rows[-1]["train_loss"]


@pytest.mark.parametrize(("steps", "every", "rounds"), [(330, 20, 17), (82, 80, 2), (40, 20, 2)])
def test_every_step_reaches_the_network(steps, every, rounds):
    net = mlp(16, inputs=64, classes=10)
    subnets, plain = method(net, every=every), method(net, method="local_sgd")
    for k in range(steps):
        ids = np.arange(20) + 10 * (k % 100)
        subnets.step(Batch(ids), 0.01)
        plain.step(Batch(ids), 0.01)
    subnets.collect()
    assert np.array_equal(subnets.w.host, plain.w) and subnets.scalars["rounds"] == rounds
    # A second call has nothing to put back.
    subnets.collect()
    assert subnets.scalars["rounds"] == rounds


def test_each_worker_learns_from_its_own_slice_of_a_minibatch(train):
    """Compare a round of two workers with two plain networks, each trained on its half of the minibatches."""
    options = (*IST, "--widths", "8", "--max-steps", "3", "--epochs", "1", "--clip", "0", "--lr", "0.5")
    result = train(2, *options, "--colocate")
    data = open_dataset("digits", "")
    net = make_network("mlp", data.shape, 10, widths=(8,))
    layout, dealer = net.layout(), Dealer(net, 2, 0)
    w = np.empty(layout.size)
    full_range = Runs(((0, layout.size),))
    initial_weights(net, layout, full_range, w, seed=0)
    batches, resident = Minibatches(data.train.n, 100, 0, True), Resident(data.train, np.arange(data.train.n), w.dtype)
    loss, ops = make_loss("nll", w.dtype), make_backend("numpy")
    shares = dealer.deal(0)
    trained = []
    for worker, share in enumerate(shares):
        own = dealer.layouts[worker]
        part, g = np.empty(own.size), np.empty(own.size)
        strips = find_strips(layout, full_range, (0, 1), own, share, worker)
        for strip in strips:
            strip.take(w, part)
        model = Model(dealer.networks[worker], own, part, g, ops)
        for step in range(3):
            ids = np.array_split(batches.ids(0, step), 2)[worker]
            x, grad = np.empty((64, len(ids))), np.empty((10, len(ids)))
            resident.fetch(ids, x)
            tape = model.forward(x)
            loss(tape.scores, data.train.labels[ids], 1 / len(ids), grad)
            model.backward(tape, grad)
            part -= 0.5 * g
        trained.append((strips, part))
    for strips, part in trained:
        for strip in strips:
            strip.put(part, w)
    for name, tensor in tensors(layout, w).items():
        result_tensor = result.tensors()[f"weights/{name}"].reshape(tensor.shape)
        assert np.linalg.norm(tensor - result_tensor) <= 1e-12 * np.linalg.norm(tensor), name


@pytest.mark.slow
def test_holders_and_masters_train_alike(train):
    options = (*IST, "--widths", "26", "21", "--local-steps", "4", "--max-steps", "40", "--epochs", "3", "--batch-norm")
    runs = [
        train(4, *options, *more)
        for more in (("--colocate",), ("--colocate", "--masters", "2"), ("--placement", "owner"))
    ]
    runs.append(train(5, *options))
    for other_run in runs[1:]:
        for name, tensor in runs[0].tensors().items():
            assert np.array_equal(tensor, other_run.tensors()[name]), name
        assert other_run.rows[-1]["test_accuracy"] == runs[0].rows[-1]["test_accuracy"]
        assert other_run.rows[-1]["test_loss"] == pytest.approx(runs[0].rows[-1]["test_loss"], rel=1e-12)
        assert other_run.rows[-1]["train_loss"] == pytest.approx(runs[0].rows[-1]["train_loss"], rel=1e-12)


@pytest.mark.parametrize("model", ["psnet", "resnet", "resnet-blocks"])
def test_convolutions_and_blocks_on_any_holders(train, model):
    options = [*IST, "--local-steps", "3", "--max-steps", "8", "--epochs", "1"]
    options[3] = model.partition("-")[0]
    if model != "psnet":
        options += ["--widths", "4", "6", "--blocks", "1", "3"]
    if "blocks" in model:
        options += ["--deal", "blocks"]
    owner_run = train(3, *options, "--placement", "owner")
    colocated_run = train(3, *options, "--colocate")
    assert distance(owner_run.tensors(), colocated_run.tensors()) <= 1e-12
    assert owner_run.rows[-1]["test_loss"] == pytest.approx(colocated_run.rows[-1]["test_loss"], rel=1e-12)


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (3, ("--optimizer", "momentum", "--optimizer-state", "travel", "--colocate")),
        (3, ("--optimizer", "adam", "--lr", "0.01", "--placement", "owner")),
        (4, ("--masters", "2")),
    ],
)
def test_a_restart_goes_on_to_the_bit(train, tmp_path, ranks, options):
    # Checkpoints fall inside epochs and inside rounds.
    options = (*IST, "--widths", "24", "16", "--batch-norm", "--epochs", "2", "--checkpoint-every", "7",
               "--local-steps", "5", *options)  # fmt: skip
    full_run = train(ranks, *options)
    out = tmp_path / "cut"
    train(ranks, *options, "--max-steps", "21", out=out)
    resumed = train(ranks, *options, "--resume", "auto", out=out)
    for name, tensor in full_run.tensors().items():
        assert np.array_equal(tensor, resumed.tensors()[name]), name
    for key in ("test_loss", "test_accuracy", "bytes_sent", "rounds"):
        assert resumed.rows[-1][key] == full_run.rows[-1][key]
    assert resumed.rows[-1]["train_loss"] == pytest.approx(full_run.rows[-1]["train_loss"], rel=1e-12)


def test_rounds_are_counted_on_with_another_optimizer(train, tmp_path):
    options = (*IST, "--widths", "16", "--epochs", "4", "--local-steps", "3", "--colocate")
    out = tmp_path / "run"
    train(2, *options, "--max-steps", "15", out=out)
    resumed = train(
        2, *options, "--max-steps", "30", "--resume", "auto", "--optimizer", "adam", "--subnet-seed", "1", out=out
    )
    assert resumed.rows[-1]["rounds"] == 10 and "subnet_seed is 1" in resumed.stdout


def test_a_checkpoint_goes_on_on_other_ranks_and_by_other_methods(train, tmp_path):
    options = (*IST, "--widths", "24", "16", "--batch-norm", "--epochs", "4")
    out = tmp_path / "run"
    train(3, *options, "--max-steps", "15", out=out)
    resumed = train(4, *options, "--max-steps", "30", "--resume", "auto", "--placement", "owner", out=out)
    assert resumed.rows[-1]["step"] == 30 and resumed.rows[-1]["test_loss"] < resumed.rows[0]["test_loss"]
    options = ("--method", "data_parallel", *options[2:])
    last = train(2, *options, "--resume", "auto", out=out).rows[-1]
    assert last["test_loss"] < resumed.rows[-1]["test_loss"]


def test_the_state_of_the_optimizer_travels_with_the_weights(train):
    options = (*IST, "--optimizer", "momentum", "--widths", "24", "24", "--max-steps", "30", "--epochs", "3",
               "--local-steps", "3")  # fmt: skip
    travels, fresh = (train(1, *options, "--optimizer-state", kind) for kind in ("travel", "reset"))
    plain = train(1, "--method", "local_sgd", *options[2:])
    assert np.array_equal(travels.tensors()["weights/dense2.weight"], plain.tensors()["weights/dense2.weight"])
    assert np.array_equal(travels.tensors()["optimizer/v/dense2.weight"], plain.tensors()["optimizer/v/dense2.weight"])
    assert not np.array_equal(fresh.tensors()["weights/dense2.weight"], plain.tensors()["weights/dense2.weight"])
    by_placement = [train(4, *options, "--optimizer-state", "travel", *more)
                    for more in (("--colocate",), ("--placement", "owner"))]  # fmt: skip
    for name, tensor in by_placement[0].tensors().items():
        assert np.array_equal(tensor, by_placement[1].tensors()[name]), name
    # After the first round most of the middle matrix is untrained and has no momentum.
    first = train(4, *options[:-1], "20", "--max-steps", "2", "--optimizer-state", "travel", "--colocate")
    assert np.mean(first.tensors()["optimizer/v/dense2.weight"] == 0) >= 0.75


def test_adam_s_counts_travel_too(train):
    adam = ("--optimizer", "adam", "--lr", "0.01")
    options = (*IST, *adam, "--widths", "24", "24", "--epochs", "3", "--local-steps", "3")
    travels = train(1, *options, "--max-steps", "30", "--optimizer-state", "travel").tensors()
    plain = train(1, "--method", "local_sgd", *options[2:], "--max-steps", "30").tensors()
    for name in (name for name in plain if not name.startswith("rank/")):
        tensor = plain[name]
        assert np.linalg.norm(travels[name] - tensor) <= 1e-10 * np.linalg.norm(tensor), name
    # The vector t counts each weight's steps: a round steps all outer weights, and a quarter of the middle ones.
    last = train(4, *options, "--max-steps", "3", "--optimizer-state", "travel", "--colocate").tensors()
    assert (last["optimizer/t/dense1.weight"] == 3).all() and (last["optimizer/t/dense3.bias"] == 3).all()
    middle = last["optimizer/t/dense2.weight"]
    assert sorted(set(middle.ravel())) == [0, 3] and np.mean(middle == 3) == pytest.approx(1 / 4)


# Scales.


def test_without_normalization_the_mean_subnet_sees_what_the_network_sees():
    """The mean of the subnets' scores is the scores of the whole network."""
    net = mlp(8, inputs=6)
    layout, rng = net.layout(), np.random.default_rng(0)
    w = rng.standard_normal(layout.size)
    x = rng.standard_normal((6, 5))
    scores = Model(net, layout, w, None, make_backend("numpy")).forward(x).scores.copy()
    dealer = Dealer(net, 4, 0)
    total, rounds = np.zeros_like(scores), 50
    for number in range(rounds):
        for worker, shares in enumerate(dealer.deal(number)):
            own = dealer.layouts[worker]
            vector = np.empty(own.size)
            for strip in find_strips(layout, Runs(((0, layout.size),)), (0, 1), own, shares, worker):
                strip.take(w, vector)
            total += Model(dealer.networks[worker], own, vector, None, make_backend("numpy")).forward(x).scores
    # The four subnets of a round have every hidden unit once, so the mean is exact.
    assert np.allclose(total / (4 * rounds), scores, rtol=1e-12)


def test_the_gradient_of_a_scaled_subnet_is_exact():
    dealer = Dealer(mlp(8, 6, inputs=5), 3, 0)
    net = dealer.networks[2]
    rng = np.random.default_rng(0)
    w, g = rng.standard_normal(net.layout().size), np.empty(net.layout().size)
    x, d = rng.standard_normal((5, 7)), rng.standard_normal((4, 7))
    model = Model(net, net.layout(), w, g, make_backend("numpy"))
    model.backward(model.forward(x), d.copy())
    exact, h = g.copy(), 1e-6
    for k in range(w.size):
        values = []
        for move in (h, -2 * h):
            w[k] += move
            values.append(float((model.forward(x).scores * d).sum()))
        w[k] += h
        assert abs((values[0] - values[1]) / (2 * h) - exact[k]) <= 1e-7 * abs(exact).max()


def test_where_normalization_follows_nothing_is_scaled():
    kinds = [type(layer).__name__ for layer in Dealer(mlp(8, 8, batch_norm=True), 4, 0).networks[0].layers]
    assert "Scale" not in kinds
    kinds = [type(layer).__name__ for layer in Dealer(mlp(8, 8), 4, 0).networks[0].layers]
    assert kinds.count("Scale") == 2
    # Vectors of unit length are not scaled either.
    net = make_network("head", (5,), 4, widths=(8, 8), scale=16.0)
    kinds = [type(layer).__name__ for layer in Dealer(net, 4, 0).networks[0].layers]
    assert kinds.count("Scale") == 1 and kinds[-2:] == ["UnitLength", "Cosine"]
    # Normalization in a residual branch does not normalize the skip connection.
    past = [{"type": "dense", "units": 8}, {"type": "dense", "units": 6},
            {"type": "residual", "layers": [{"type": "batch_norm"}]}, {"type": "dense", "units": 4}]  # fmt: skip
    kinds = [type(layer).__name__ for layer in Dealer(build("past", (5,), past, 4), 4, 0).networks[0].layers]
    assert kinds.count("Scale") == 1


# Deals of residual blocks.


def test_blocks_of_the_longest_section_are_dealt_but_its_first():
    net = make_network("resnet", (1, 8, 8), 10, widths=(4, 6, 4), blocks=(2, 5, 1))
    dealt = find_blocks(net)
    blocks = [k for k, layer in enumerate(net.layers) if isinstance(layer, Residual)]
    assert dealt == blocks[3:7]
    for workers, least, counts in ((2, 1, [2, 2]), (3, 1, [2, 1, 1]), (6, 1, [1] * 6), (2, 3, [3, 3])):
        dealer = Dealer(net, workers, 1, "blocks", min_blocks=least)
        assert dealer.counts == counts
        for number in range(5):
            deal = dealer.deal(number)
            names = [{share.source for share in shares.values()} for shares in deal]
            assert set().union(*names) == {p.name for p in net.layout().parameters}
            for shares in deal:
                for share in shares.values():
                    assert share.owners == tuple(k for k in range(workers) if share.source in names[k])
    # Dealt blocks are scaled up for the blocks that a subnet lacks; the others keep their scale.
    scales = [layer.scale for layer in Dealer(net, 2, 1, "blocks").networks[0].layers if isinstance(layer, Residual)]
    assert scales == [1, 1, 1, 2, 2, 1]


def test_networks_are_cut_between_residual_blocks():
    net = make_network("resnet", (1, 8, 8), 10, widths=(4, 6), blocks=(1, 2))
    stages = cut_stages(net)
    assert stages[0][0] == 0 and stages[-1][1] == len(net.layers) and all(a[1] == b[0] for a, b in pairwise(stages))
    for first, stop in stages:
        kinds = [type(layer).__name__ for layer in net.layers[first:stop]]
        assert kinds.count("Residual") + kinds.count("Conv") + kinds.count("Dense") == 1


# Batch normalization.


def test_the_gradient_of_batch_normalization_is_exact():
    net = mlp(6, 5, inputs=7, batch_norm=True)
    layout = net.layout()
    names = {p.name for p in layout.parameters}
    # The normalization of the scores has no parameters, and none has running statistics.
    assert names == {"dense1.weight", "dense2.weight", "dense3.weight", *(f"batch_norm{k}.{kind}" for k in (1, 2)
                     for kind in ("weight", "bias"))}  # fmt: skip
    rng = np.random.default_rng(0)
    w, g = np.empty(layout.size), np.empty(layout.size)
    initial_weights(net, layout, Runs(((0, layout.size),)), w, seed=0)
    x, d = rng.standard_normal((7, 30)), rng.standard_normal((4, 30))
    model = Model(net, layout, w, g, make_backend("numpy"))
    model.backward(model.forward(x), d.copy())
    exact, h = g.copy(), 1e-6
    for k in range(layout.size):
        values = []
        for move in (h, -2 * h):
            w[k] += move
            values.append(float((model.forward(x).scores * d).sum()))
        w[k] += h
        assert abs((values[0] - values[1]) / (2 * h) - exact[k]) <= 1e-8 * max(1, abs(exact).max())


# Mistakes.


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--widths", "3"), "has 3 units, and 4 workers need 4"),
        (("--deal", "blocks"), "residual blocks of one kind"),
        (("--optimizer", "lbfgs"), "use a first-order one"),
        (("--batch-size", "3"), "without a sample"),
        (("--masters", "5"), "expected 1 to 4"),
        (("--local-steps", "0"), "1 or more steps"),
        (("--partition", "pairs"), "is of --method psl"),
        (("--outer-lr", "0.5"), "is of --method local_sgd"),
        (("--subnet-seed", "-1"), "from 0 up"),
        (("--batch-norm", "--batch-size", "7"), "with a single sample"),
        (("--min-blocks", "2"), "is for --deal blocks"),
    ],
)
def test_mistakes_are_named(options, says):
    config = usual(parse([*IST, "--colocate", *options]))
    data = open_dataset("digits", "")
    with pytest.raises(UserError, match=says):
        check(config)
        net = make_network(config.model.model, data.shape, data.outputs, **config.model.shape)
        find_method("ist").check(4, net, data, config)


def test_a_mistake_is_named_once():
    status, _, err = run(4, "-m", "psmpi.train", *IST, "--colocate", "--widths", "3")
    err = " ".join(err.split())
    assert status == 1 and err.count("has 3 units, and 4 workers need 4") == 1 and "Traceback" not in err, err


def test_settings_of_this_method_are_refused_by_others():
    status, _, err = run(1, "-m", "psmpi.train", "--deal", "blocks")
    assert status == 1 and "--deal is of --method ist" in " ".join(err.split())
    status, _, err = run(2, "-m", "psmpi.train", *IST, "--placement", "owner", "--masters", "2")
    assert status == 1 and "leave --masters" in " ".join(err.split())
    with pytest.raises(UserError, match="expected 1 to 2"):
        Dealer(make_network("resnet", (1, 8, 8), 10), 2, 0, "blocks", min_blocks=3)
    grouped = build("grouped", (8,), [{"type": "separable_dense", "units": 8, "groups": 4},
                    {"type": "separable_dense", "units": 4, "groups": 4}], 4)  # fmt: skip
    with pytest.raises(UserError, match="no layer whose units the next layer reads as a whole"):
        Dealer(grouped, 2, 0)
    # Layer normalization needs all units of its layer, so the layer is not dealt.
    layers = [{"type": "dense", "units": 8}, {"type": "layer_norm"}, {"type": "dense", "units": 6}]
    normalized = build("together", (8,), [*layers, {"type": "gelu"}, {"type": "dense", "units": 4}], 4)
    assert Dealer(normalized, 2, 0).layers == {2: 4}


# Accuracy.


@pytest.mark.slow
def test_subnets_of_mnist_learn_as_they_should(train):
    """784-512-512-10 with batch normalization, 4 workers with 128 samples each, 2,340 steps: 94.55 +- 0.17 %."""
    options = ("--method", "ist", "--model", "mlp", "--widths", "512", "512", "--batch-norm", "--loss", "nll",
               "--init", "pytorch", "--optimizer", "sgd", "--lr", "0.01", "--clip", "0", "--dataset", "mnist",
               "--data-dir", real("mnist"), "--batch-size", "512", "--epochs", "20", "--max-steps", "2340",
               "--checkpoint-every", "2340", "--colocate")  # fmt: skip
    last = train(4, *options, timeout=280).rows[-1]
    assert last["step"] == 2340 and last["test_accuracy"] == pytest.approx(0.9455, abs=0.005)


def test_bytes_of_travelling_state_are_those_of_the_messages(tmp_path):
    counters_equal_messages(Case("ist", tmp_path, ("--optimizer-state", "travel", "--batch-size", "400")))
