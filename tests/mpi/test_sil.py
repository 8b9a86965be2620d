"""Synthetic intermediate labels: the labels, the gradients of parts, messages, restarts, costs and accuracy."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from helpers.datasets import real
from helpers.runs import distance, run, usual_config

from psmpi.backend import make_backend
from psmpi.config import check
from psmpi.data import Batch, Minibatches, open_dataset
from psmpi.errors import UserError
from psmpi.methods.sil.cost import apart, conventional, count
from psmpi.methods.sil.plan import LAWS, Assignment, Settings, count_parts, cut_activation, plan_phases
from psmpi.methods.sil.targets import LabelReader, TargetDistance, draw_targets
from psmpi.nn.cut import split_layers
from psmpi.nn.model import Model
from psmpi.nn.network import build
from psmpi.nn.zoo import make_network
from psmpi.registry import find_method
from psmpi.train import parse
from psmpi.training.context import Context
from psmpi.training.usual import usual

SIL = ("--method", "sil", "--model", "mlp", "--loss", "nll", "--threads", "1")
SMALL = (*SIL, "--widths", "40", "30", "20", "--dtype", "float64", "--lr", "0.01", "--batch-size", "50")
# Training samples of digits.
N = open_dataset("digits", "").train.n
PER_EPOCH = -(-N // 50)


class Alone:
    rank, size = 0, 1


def network(*units, activation="relu", inputs=64):
    layers = [{"type": "flatten"}]
    for n in units:
        layers += [{"type": "dense", "units": n}, {"type": activation}]
    return build("test", (1, 8, 8), [*layers, {"type": "dense", "units": 10}], 10)


def method(net, *, optimizer="adam", clip=1.0, epochs=4, name="sil", shuffle=True, **settings):
    base = usual_config()
    config = replace(
        base,
        data=replace(base.data, batch_size=50, shuffle=shuffle),
        model=replace(base.model, dtype="float64"),
        objective=replace(base.objective, loss="nll"),
        optimization=replace(base.optimization, optimizer=optimizer, clip=clip),
        run=replace(base.run, epochs=epochs),
    ).changed(Settings, **settings)
    dataset = open_dataset("digits", "")
    find_method(name).check(1, net, dataset, config)
    return find_method(name)(Context(Alone(), net, dataset, config, make_backend("auto")))


def trained(net, steps, *, trainer=None, lr=0.01, **settings):
    """Train on one process until `steps` steps are made, from the start or on with the method `trainer`; return the
    method."""
    trainer = trainer or method(net, **settings)
    batches = Minibatches(N, 50, 0, settings.get("shuffle", True))
    for step in range(int(trainer.scalars["steps"]) if "steps" in trainer.scalars else 0, steps):
        trainer.step(Batch(batches.ids(*divmod(step, PER_EPOCH))), lr)
    trainer.collect()
    return trainer


def flat(result, layout):
    """Return the weights of a checkpoint as the flat vector."""
    tensors, vector = result.tensors(), np.empty(layout.size)
    for piece in layout.pieces():
        parameter = layout.parameters[piece.parameter]
        rows = tensors[f"weights/{parameter.name}"].reshape(parameter.units, -1)[piece.first : piece.last]
        vector[piece.offset : piece.offset + rows.size] = rows.reshape(-1)
    return vector


def relative_distance(trainer, result):
    """Return the relative distance of the weights of a run from those of a method on one process."""
    own_w = trainer.state.vectors["weights"]
    return np.linalg.norm(flat(result, trainer.layout) - own_w) / np.linalg.norm(own_w)


def weights(result):
    return {name: tensor for name, tensor in result.tensors().items() if name.startswith("weights/")}


def of_layers(tensors, *layers):
    return {name: t for name, t in tensors.items() if name.split("/")[-1].split(".")[0] in layers}


# The labels.


def test_labels_are_those_of_seed_and_part_alone():
    for kappa in (0.3, 1.0, 10.0):
        s = draw_targets("uniform", 256, 47, 3, 1, kappa)
        assert s.shape == (256, 47) and s.dtype == np.float32
        assert s.min() >= 0 and s.max() < kappa
        distances = [np.linalg.norm(s[:, i] - s[:, j]) for i in range(47) for j in range(i)]
        assert 6.2 * kappa <= np.mean(distances) <= 6.9 * kappa
        assert np.array_equal(s, draw_targets("uniform", 256, 47, 3, 1, kappa))
        assert not np.array_equal(s, draw_targets("uniform", 256, 47, 3, 2, kappa))
        assert not np.array_equal(s, draw_targets("uniform", 256, 47, 4, 1, kappa))


def test_the_laws_of_labels():
    sign, gaussian = (draw_targets(law, 400, 10, 0, 1, 2.0) for law in ("sign", "gaussian"))
    assert set(np.unique(sign)) == {-2, 2} and abs(sign.mean()) < 0.2
    assert gaussian.std() == pytest.approx(2, rel=0.05) and abs(gaussian.mean()) < 0.15
    s = draw_targets("orthogonal", 400, 10, 0, 1, 2.0).astype(float)
    assert np.allclose(s.T @ s, 4 * 400 / 12 * np.eye(10), atol=1e-4)
    with pytest.raises(ValueError, match="cannot be orthogonal"):
        draw_targets("orthogonal", 9, 10, 0, 1, 1.0)
    for law, (low, high) in LAWS.items():
        labels = draw_targets(law, 100, 10, 0, 1, 1.0)
        assert low <= labels.min() and labels.max() <= high


def test_probabilities_are_what_the_best_outputs_hold():
    rng = np.random.default_rng(0)
    s = draw_targets("uniform", 50, 5, 0, 1, 1.0).astype(np.float64)
    p = rng.dirichlet(np.ones(5), 40).T
    best, reader = s @ p, LabelReader(s)
    assert abs(reader.probabilities(best) - p).max() <= 1e-10

    def expected(o):
        return (p * ((o[:, None] - s[:, :, None]) ** 2).sum(axis=0)).sum()

    for _ in range(20):
        assert expected(best + 1e-3 * rng.normal(size=best.shape)) > expected(best)
    nearest = [np.argmin([np.linalg.norm(best[:, i] - s[:, j]) for j in range(5)]) for i in range(40)]
    assert np.array_equal(reader.nearest(best), nearest)


# Gradients of parts.


@pytest.mark.parametrize("law", ["uniform", "sign"])
def test_gradients_of_both_parts_are_those_of_differences(law):
    # With tanh the loss has no kinks between the two points.
    trainer = method(network(12, 9, 8, activation="tanh"), parts=2, labels=law, labels_scale=2.0)
    rng, labels = np.random.default_rng(1), trainer.dataset.train.labels[:20]
    for part in trainer.parts.values():
        x = rng.random((part.inputs, 20))
        value, gradient = part.learn(x, labels, 1 / 20), None
        gradient = part.g.copy()
        if not part.last:
            s = draw_targets(law, part.units, 10, 0, 1, 2.0).astype(float)
            assert value == pytest.approx(((part.forward(x) - s[:, labels]) ** 2).mean() / 4, rel=1e-12)
        for i in rng.choice(part.w.size, 40, replace=False):
            weight, values = part.w[i], []
            for h in (1e-5, -1e-5):
                part.w[i] = weight + h
                values.append(part.learn(x, labels, 1 / 20))
            part.w[i] = weight
            assert abs((values[0] - values[1]) / 2e-5 - gradient[i]) <= 1e-8


def test_the_loss_of_labels_does_not_depend_on_their_scale():
    y = np.random.default_rng(0).normal(size=(30, 8))
    labels, results = np.arange(8) % 10, []
    for kappa in (1.0, 8.0):
        grad = np.empty_like(y)
        loss = TargetDistance(draw_targets("uniform", 30, 10, 0, 1, kappa), kappa)
        results.append((loss(kappa * y, labels, 0.5, grad), kappa * grad))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-12) and np.allclose(
        results[0][1], results[1][1], rtol=1e-12
    )


def test_recovery_has_the_gradient_of_the_whole_network():
    net = network(12, 9, 8)
    trainer = method(net, parts=3, recovery_epochs=1, epochs=4)
    plain = method(net, name="data_parallel")
    # Both methods draw the same initial weights, unit by unit.
    ids = np.arange(50)
    loss = plain.gradient(Batch(ids))
    trainer._learn_joined(ids, np.arange(50))
    assert trainer.loss_sum == pytest.approx(50 * loss, rel=1e-12)
    for part in trainer.parts.values():
        indices = np.concatenate([np.arange(a, b) for a, b in part.runs.intervals])
        assert np.array_equal(part.w, plain.w[indices])
        assert abs(part.g - plain.g[indices]).max() <= 1e-13 * abs(plain.g).max()


@pytest.mark.parametrize("optimizer", ["adam", "momentum"])
def test_a_single_part_is_conventional_training_bit_for_bit(optimizer):
    single, plain = (
        trained(network(40, 30), 3 * PER_EPOCH, optimizer=optimizer, clip=0.0, name=name, **settings)
        for name, settings in (("sil", {"parts": 1}), ("data_parallel", {}))
    )
    assert single.state.vectors.keys() == plain.state.vectors.keys()
    for name, vector in single.state.vectors.items():
        assert np.array_equal(vector, plain.state.vectors[name])
    assert single.loss_sum == plain.loss_sum and single.test() == plain.test()
    assert single.diagnostics()["macs"] == conventional([single.parts[0].cost], N, 3)


@pytest.mark.parametrize("shuffle", [True, False])
def test_stored_inputs_are_those_of_their_samples(shuffle):
    trainer = method(network(40, 30, 20), parts=2, optimizer="adam", shuffle=shuffle)
    left, right = trainer.parts.values()
    batches, learn_calls = Minibatches(N, 50, 0, shuffle), []
    learn = right.learn
    right.learn = lambda x, labels, *rest: learn_calls.append((x.copy(), labels.copy())) or learn(x, labels, *rest)
    for step in range(3 * PER_EPOCH):
        ids = batches.ids(*divmod(step, PER_EPOCH))
        trainer.step(Batch(ids), 1e-3)
        if learn_calls:
            x, labels = learn_calls.pop()
            assert np.array_equal(x, right.stored[ids].T) and np.array_equal(labels, trainer.dataset.train.labels[ids])
    # The left part has not moved since it computed the stored inputs.
    sample = np.random.default_rng(0).choice(N, 100, replace=False)
    for i in sample:
        piece = np.arange(i // 100 * 100, min(i // 100 * 100 + 100, N))
        assert np.array_equal(left.forward(trainer.chain.fetch(trainer.train, piece))[:, i % 100], right.stored[i])
    y = left.forward(trainer.chain.fetch(trainer.train, sample))
    assert np.allclose(right.forward(y.copy()), right.forward(right.stored[sample].T.copy()), rtol=1e-6)


def test_what_parts_learn_from_when_all_learn_at_once():
    inputs = []

    def train_watched(way):
        trainer = method(network(40, 30, 20), parts=2, hand_over=way, labels_noise=0.1, epochs=2)
        part, batches = trainer.parts[1], Minibatches(N, 50, 0)
        learn = part.learn
        part.learn = lambda x, *rest: inputs.append(x.copy()) or learn(x, *rest)
        for step in range(PER_EPOCH + 1):
            w_before = trainer.parts[0].w.copy()
            trainer.step(Batch(batches.ids(*divmod(step, PER_EPOCH))), 1e-2)
        columns = draw_targets("uniform", 30, 10, 0, 1, 1.0).astype(np.float64)
        label_columns = [
            columns[:, trainer.dataset.train.labels[batches.ids(*divmod(s, PER_EPOCH))]] for s in range(PER_EPOCH + 1)
        ]
        return trainer, w_before, label_columns, batches

    trainer, w_before, label_columns, batches = train_watched("stale")
    assert all(np.array_equal(x, y) for x, y in zip(inputs[:-1], label_columns[:-1], strict=True))
    # The second epoch learns from outputs of the weights at the end of the first.
    assert np.array_equal(trainer.handed[: w_before.size], w_before) and not np.array_equal(
        w_before, trainer.parts[0].w
    )
    trainer.parts[0].w[...] = w_before
    y = trainer.parts[0].forward(trainer.chain.fetch(trainer.train, batches.ids(1, 0)))
    assert np.allclose(inputs[-1], y, rtol=1e-12)
    inputs.clear()
    trainer, w_before, label_columns, batches = train_watched("labels")
    noise = np.concatenate([x - y for x, y in zip(inputs, label_columns, strict=True)], axis=1)
    assert noise.std() == pytest.approx(0.1, rel=0.02) and abs(noise.mean()) < 1e-3
    assert trainer.chain.handed_bytes == 0 and trainer.chain.macs == (N + 50) * sum(
        part.cost.training() for part in trainer.parts.values()
    )


# Messages.


def test_parts_do_not_move_while_another_learns(train, tmp_path):
    options = (*SMALL, "--epochs", "5", "--recovery-epochs", "1")
    out = tmp_path / "begun"
    initial = method(network(40, 30, 20), parts=2)
    first_weights = weights(train(2, *options, "--max-steps", 2 * PER_EPOCH, out=out))
    second_run = train(2, *options, "--max-steps", 4 * PER_EPOCH, "--resume", "auto", out=out)
    second_weights, rows = weights(second_run), second_run.rows
    part = initial.parts[1]
    initial_values = np.concatenate([t.ravel() for t in of_layers(first_weights, "dense3", "dense4").values()])
    assert np.array_equal(np.sort(initial_values), np.sort(part.w))
    assert distance(of_layers(first_weights, "dense1", "dense2"), of_layers(second_weights, "dense1", "dense2")) == 0
    assert distance(of_layers(first_weights, "dense3", "dense4"), of_layers(second_weights, "dense3", "dense4")) > 0
    assert [row["phase"] for row in rows] == ["part 1", "part 1", "part 2", "part 2"]
    handed = 8 * N * 30
    assert [row["bytes_sent"] for row in rows] == [0, 0, handed, handed]
    assert [row["handed_bytes"] for row in rows] == [0, 0, handed, handed]
    assert rows[-1]["bytes_sent_by_rank"] == [handed, 0] and rows[-1]["bytes_received_by_rank"] == [0, handed]
    # An epoch of recovery sends outputs and their gradients.
    last = train(2, *options, "--resume", "auto", out=out).rows[-1]
    assert last["phase"] == "recovery" and last["handed_bytes"] == last["bytes_sent"] == handed + 2 * 8 * N * 30
    costs = [count(network(40, 30, 20), *stage) for stage in split_layers(network(40, 30, 20), 2)]
    assert last["macs"] == apart(costs, N, (2, 2), 1)


@pytest.mark.parametrize(
    ("ranks", "way", "floats", "macs"),
    [
        (2, "recompute", 3 * 30, lambda left, right: 3 * left.training() + 3 * right.training() + 3 * left.forward),
        (4, "stale", 5 * 30, lambda left, right: 6 * (left.training() + right.training()) + 5 * left.forward),
        (4, "labels", 0, lambda left, right: 6 * (left.training() + right.training())),
    ],
)
def test_other_ways_to_hand_over(train, ranks, way, floats, macs):
    """Compare weights with those of one rank, and bytes and MACs with their formulas."""
    net = network(40, 30, 20)
    one_rank = trained(net, 6 * PER_EPOCH, epochs=6, parts=2, hand_over=way)
    many_ranks = train(ranks, *SMALL, "--epochs", "6", "--parts", "2", "--hand-over", way)
    assert relative_distance(one_rank, many_ranks) <= 1e-10
    expected = N * macs(*(count(net, *stage) for stage in split_layers(net, 2)))
    assert many_ranks.rows[-1]["macs"] == one_rank.diagnostics()["macs"] == expected
    assert many_ranks.rows[-1]["handed_bytes"] == 8 * N * floats and one_rank.chain.handed_bytes == 0
    if ranks == 2:
        assert many_ranks.rows[-1]["bytes_sent"] == 8 * N * floats


def test_many_ranks_train_as_one_does(train):
    """Each phase has 200 steps or more; with two ranks a part, sums over the part are in another order."""
    options = (*SMALL, "--parts", "2", "--epochs", "21", "--recovery-epochs", "7")
    one_rank = trained(network(40, 30, 20), 21 * PER_EPOCH, epochs=21, parts=2, recovery_epochs=7)
    two_ranks, four_ranks = (train(ranks, *options) for ranks in (2, 4))
    assert 7 * PER_EPOCH >= 200
    assert relative_distance(one_rank, two_ranks) <= 1e-12 and relative_distance(one_rank, four_ranks) <= 1e-9
    score, diagnostics = one_rank.test(), one_rank.diagnostics()
    assert score["accuracy"] > 0.9 and diagnostics["phase"] == "recovery"
    for result, tolerance in ((two_ranks, 1e-9), (four_ranks, 1e-6)):
        assert result.rows[-1]["test_loss"] == pytest.approx(score["loss"], rel=tolerance)
        for key in ("target_distance", "nearest_accuracy", "least_squares_accuracy", "macs", "dead_units"):
            assert result.rows[-1][key] == pytest.approx(diagnostics[key], rel=tolerance)
    # Handed-over outputs go to one rank of the next part, which sends them to the other.
    sent = four_ranks.rows[7]["bytes_sent"] - four_ranks.rows[6]["bytes_sent"]
    size, right = 8 * N * 30, of_layers(weights(four_ranks), "dense3", "dense4")
    summed = PER_EPOCH * 8 * sum(t.size for t in right.values()) * 2
    assert sent == 2 * size + summed and four_ranks.rows[7]["handed_bytes"] == size


@pytest.mark.parametrize("way", ["stored", "stale"])
def test_three_parts_of_a_network_of_separable_layers(train, way):
    """Parts are cut at convolutions, and in the flat vector weights of one part lie between those of another."""
    options = ("--method", "sil", "--parts", "3", "--hand-over", way, "--epochs", "4", "--recovery-epochs", "1",
               "--loss", "nll", "--dtype", "float64", "--lr", "0.01", "--batch-size", "50")  # fmt: skip
    one_rank = trained(make_network("psnet", (1, 8, 8), 10), 4 * PER_EPOCH, parts=3, recovery_epochs=1, hand_over=way)
    many_ranks = train(3, *options)
    assert relative_distance(one_rank, many_ranks) <= 1e-12
    one_rank.test()
    assert many_ranks.rows[-1]["nearest_accuracy"] == pytest.approx(one_rank.diagnostics()["nearest_accuracy"])


@pytest.mark.parametrize("way", ["stored", "stale"])
def test_clipped_gradients_are_those_of_one_rank(train, way):
    options = (*SMALL, "--parts", "2", "--epochs", "3", "--recovery-epochs", "1", "--clip", "0.05", "--hand-over", way,
               "--optimizer", "sgd", "--lr", "0.1")  # fmt: skip
    one_rank, unclipped = (
        trained(network(40, 30, 20), 3 * PER_EPOCH, epochs=3, parts=2, recovery_epochs=1, clip=clip, hand_over=way,
                optimizer="sgd", lr=0.1)
        for clip in (0.05, 0.0)
    )  # fmt: skip
    four_ranks = train(4, *options)
    assert relative_distance(one_rank, four_ranks) <= 1e-12 and relative_distance(unclipped, four_ranks) > 1e-3


# Phases and restarts.


def take_up(source, target):
    """Restore the method `target` from `source`, as from a checkpoint."""
    for name, vector in target.state.vectors.items():
        vector[...] = source.state.vectors[name]
    target.scalars.update(source.scalars)
    target.state.restore()
    target.restored(False, frozenset())


def same(first, second):
    assert first.scalars == second.scalars
    assert all(np.array_equal(vector, second.state.vectors[name]) for name, vector in first.state.vectors.items())


@pytest.mark.parametrize(
    ("way", "name"),
    [
        *(("stored", "psnet"), ("recompute", "mlp"), ("stale", "psnet"), ("labels", "mlp")),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("stored", "mlp"), ("recompute", "psnet"), ("stale", "mlp"), ("labels", "psnet"))
        ),
    ],
)
def test_one_rank_goes_on_bit_for_bit(way, name):
    """Restart in the left part, at the hand-over, in the right part, and at and in the recovery."""
    net = network(40, 30, 20) if name == "mlp" else make_network("psnet", (1, 8, 8), 10)
    settings = {"parts": 2, "epochs": 5, "recovery_epochs": 1, "hand_over": way}
    full = trained(net, 5 * PER_EPOCH, **settings)
    for end in (10, 2 * PER_EPOCH, 2 * PER_EPOCH + 9, 4 * PER_EPOCH, 4 * PER_EPOCH + 8):
        cut, resumed = trained(net, end, **settings), method(net, **settings)
        take_up(cut, resumed)
        same(trained(net, 5 * PER_EPOCH, trainer=resumed), full)


def test_three_parts_go_on_from_the_end_of_each():
    """At the start of a phase the previous part computes its outputs, from inputs that were handed over to it."""
    net, settings = network(40, 30, 20), {"parts": 4, "epochs": 5, "recovery_epochs": 1, "hand_over": "stored"}
    full = trained(net, 5 * PER_EPOCH, **settings)
    for end in range(PER_EPOCH, 5 * PER_EPOCH, PER_EPOCH):
        cut, resumed = trained(net, end, **settings), method(net, **settings)
        for part in resumed.parts.values():
            part.stored.fill(np.nan)
        take_up(cut, resumed)
        same(trained(net, 5 * PER_EPOCH, trainer=resumed), full)


def test_a_plan_that_is_another_at_a_restart_is_noticed():
    net = network(40, 30, 20)
    cut = trained(net, PER_EPOCH, parts=2, epochs=2)
    resumed = method(net, parts=4, epochs=4)
    resumed.scalars.update(cut.scalars)
    with pytest.raises(UserError, match="use --parts 2"):
        resumed.state.restore()
        resumed.restored(False, frozenset())
    # With more epochs the run goes on in another part, which begins with a fresh optimizer.
    cut = trained(net, 2 * PER_EPOCH + 5, parts=2, epochs=4)
    resumed = method(net, parts=2, epochs=8)
    take_up(cut, resumed)
    assert any(vector.any() for name, vector in cut.state.vectors.items() if name != "weights")
    assert not any(vector.any() for part in resumed.parts.values() for vector in part.optimizer.vectors.values())


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_begin_behind_a_flattening_and_with_the_padding(parts):
    """Parts with unused features and a padded convolution compute the scores of the whole network."""
    layers = [
        {"type": "conv", "channels": 4, "kernel": 3}, {"type": "relu"},
        {"type": "conv", "channels": 4, "kernel": 3, "pad": 1}, {"type": "relu"}, {"type": "mean_pool"},
        {"type": "flatten"}, {"type": "separable_dense", "units": 20, "groups": 10}, {"type": "tanh"},
        {"type": "separable_dense", "units": 10, "groups": 10},
    ]  # fmt: skip
    net = build("odd", (1, 8, 8), layers, 10)
    stages = split_layers(net, 4)
    assert [type(net.layers[first]).__name__ for first, _ in stages] == ["Conv", "Pad", "Dense", "Dense"]
    layout = net.layout()
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal(layout.size), rng.standard_normal((64, 7))
    full_scores = Model(net, layout, w[: layout.part(range(10)).size], None, make_backend("numpy")).forward(x).scores
    for stage in split_layers(net, parts):
        runs = net.runs(layout, *stage) - layout.dead
        local = np.concatenate([w[a:b] for a, b in runs.intervals])
        x = Model(net, layout, local, None, make_backend("numpy"), layers=stage).forward(x).scores
        x = x.reshape(-1, 7).copy()
    assert np.allclose(x, full_scores, rtol=1e-12)


@pytest.mark.parametrize(
    ("ranks", "way", "ends"),
    [
        (2, "stored", (10, 2 * PER_EPOCH, 2 * PER_EPOCH + 9, 4 * PER_EPOCH + 8)),
        (4, "stale", (2 * PER_EPOCH + 9,)),
    ],
)
def test_a_run_goes_on_bit_for_bit(train, tmp_path, ranks, way, ends):
    options = (*SMALL, "--parts", "2", "--epochs", "5", "--recovery-epochs", "1", "--hand-over", way)
    out = tmp_path / "begun"
    for end in ends:
        train(ranks, *options, "--max-steps", end, *(("--resume", "auto") if end != ends[0] else ()), out=out)
    result = train(ranks, *options, "--resume", "auto", out=out)
    full_run = train(ranks, *options)
    assert distance(full_run.tensors(), result.tensors()) == 0
    for key in ("macs", "handed_bytes", "bytes_sent", "test_loss", "target_distance"):
        assert full_run.rows[-1][key] == result.rows[-1][key]


def test_a_run_goes_on_on_other_ranks_and_from_another_method(train, tmp_path):
    options, out = (*SMALL, "--epochs", "4", "--parts", "2"), tmp_path / "begun"
    first_steps = 2 * PER_EPOCH + 9
    train(2, *options, "--max-steps", first_steps, out=out)
    result = train(1, *options, "--resume", "auto", out=out)
    assert relative_distance(trained(network(40, 30, 20), 4 * PER_EPOCH, parts=2), result) <= 1e-10
    # The phase is that of the run's steps, whatever method made the first ones.
    plain = ["data_parallel" if word == "sil" else word for word in SMALL]
    out = tmp_path / "other"
    train(1, *plain, "--epochs", "4", "--max-steps", first_steps, out=out)
    rows = train(2, *options, "--resume", "auto", out=out).rows
    assert [row.get("phase") for row in rows] == [None, None, "part 2", "part 2"] and rows[-1]["test_accuracy"] > 0.85


def test_optimizers_are_fresh_in_each_phase():
    trainer = method(network(40, 30, 20), parts=2, clip=0.0, recovery_epochs=2)
    for k, phase in enumerate(trainer.phases):
        trained(None, phase.start * PER_EPOCH, trainer=trainer)
        before = trainer.w.copy()
        trained(None, phase.start * PER_EPOCH + 1, trainer=trainer)
        assert trainer.scalars["t"] == 1
        for part in trainer.parts.values():
            if part.number in phase.parts:
                # After Adam's first step the mean of gradients is a tenth of the gradient.
                assert np.allclose(part.optimizer.vectors["m"], 0.1 * part.g, rtol=1e-10, atol=1e-300)
        # Adam's first step moves a weight by the learning rate, or not at all.
        moved = abs(trainer.w - before)
        assert moved.max() <= 0.01 * (1 + 1e-9) and np.count_nonzero(moved > 0.0099) > 100, k


@pytest.mark.parametrize("way", ["stored", "recompute", "stale", "labels"])
def test_a_step_allocates_no_arrays(way):
    trainer = method(network(400, 600, 200), parts=2, hand_over=way, epochs=3, recovery_epochs=1)
    batches = Minibatches(N, 50, 0)
    for step in (PER_EPOCH + 3, 2 * PER_EPOCH + 3):
        trained(None, step, trainer=trainer)
        ids = batches.ids(*divmod(step, PER_EPOCH))
        tracemalloc.start()
        try:
            trainer.step(Batch(ids), 1e-3)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        # The outputs at the cut have 240,000 bytes; NumPy's own buffer is 65,536.
        assert peak < 100_000


def test_phases_divide_the_epochs():
    def spans(*arguments, **settings):
        return [(p.name, p.start, p.stop) for p in plan_phases(*arguments, Settings(**settings))]

    assert spans(2, 7) == [("part 1", 0, 4), ("part 2", 4, 7)]
    assert spans(2, 7, recovery_epochs=2, part_epochs=(1, 4)) == [
        ("part 1", 0, 1), ("part 2", 1, 5), ("recovery", 5, 7)
    ]  # fmt: skip
    assert spans(3, 4, recovery_epochs=1, hand_over="stale") == [("all parts", 0, 3), ("recovery", 3, 4)]
    with pytest.raises(UserError, match="add up to 6, not to --epochs 7: use --epochs 6"):
        spans(2, 7, part_epochs=(2, 3), recovery_epochs=1)
    with pytest.raises(UserError, match="expected a number from 1 up for each of 2 part"):
        spans(2, 7, part_epochs=(2, 3, 2))
    with pytest.raises(UserError, match="leave it out"):
        spans(2, 7, part_epochs=(4, 3), hand_over="labels")


def test_ranks_and_parts():
    assert [Assignment(2, 6).held(r) for r in range(2)] == [[0, 1, 2], [3, 4, 5]]
    assert [Assignment(4, 2).held(r) for r in range(4)] == [[0], [0], [1], [1]]
    assert [Assignment(6, 2).rank(1, row) for row in range(3)] == [3, 4, 5]
    net = network(20, 20, 20)
    assert [count_parts(size, net, 0) for size in (1, 2, 3, 4)] == [2, 2, 3, 4]
    assert count_parts(1, network(), 0) == 1
    for size, asked, message in ((8, 0, "--parts 4"), (3, 2, "--parts 3"), (2, 3, "--parts 4"), (5, 0, "--parts 1")):
        with pytest.raises(UserError, match=f"use {message}$"):
            count_parts(size, net, asked)
    layers = make_network("lenet", (1, 28, 28), 10)
    assert cut_activation(layers, split_layers(layers, 2)[0][1]) == "sigmoid"
    assert cut_activation(network(20, 20), split_layers(network(20, 20), 3)[0][1]) == "relu"


# Costs.


def test_costs_of_the_example():
    net = make_network("mlp", (1, 28, 28), 10, widths=(256,) * 5)
    left, right = parts = [count(net, *stage) for stage in split_layers(net, 2)]
    assert (left.parameters, right.parameters) == (332_544, 134_154) and net.layout().size == 466_698
    assert (left.forward, right.forward) == (331_776, 133_632) and (left.first, right.first) == (784 * 256, 256 * 256)
    assert left.training() == 3 * 331_776 - 784 * 256 and left.training(inputs=True) == 3 * 331_776
    assert f"{conventional(parts, 60_000, 20):.4e}" == "1.4346e+12"
    assert f"{apart(parts, 60_000, (10, 10), 1):.3e}" == "7.696e+11"
    assert apart(parts, 60_000, (10, 10), 1) / conventional(parts, 60_000, 20) == pytest.approx(0.536, abs=5e-4)
    assert apart(parts, 60_000, (10, 10)) / conventional(parts, 60_000, 20) == pytest.approx(0.486, abs=5e-4)


def test_costs_of_convolutions():
    net = make_network("lenet", (1, 28, 28), 10)
    full_cost = count(net, 0, len(net.layers))
    assert full_cost.forward == 24**2 * 6 * 25 + 8**2 * 16 * 150 + 256 * 120 + 120 * 84 + 840
    assert full_cost.parameters == net.layout().size and full_cost.first == 24**2 * 6 * 25


# Error messages, warnings and accuracy.


@pytest.mark.parametrize(
    ("ranks", "options", "says"),
    [
        (3, ("--parts", "2"), "use --parts 3"),
        (3, ("--epochs", "2"), "use --epochs 3 or more"),
        (2, ("--part-epochs", "2", "2", "--epochs", "5"), "add up to 4, not to --epochs 5: use --epochs 4"),
        (2, ("--optimizer", "lbfgs"), "use a first-order one"),
        (2, ("--labels-scale", "0"), "from 1e-6 to 1e6"),
        (2, ("--hand-over", "labels", "--labels-noise", "-1"), "expected 0 (none) or a number above it"),
        (2, ("--labels-noise", "0.5"), "is for --hand-over labels"),
        (2, ("--labels-seed", "-1"), "from 0 up"),
        (2, ("--labels", "orthogonal", "--widths", "20", "5", "20"), "10 vectors of 5 units cannot be"),
        (4, ("--parts", "1", "--batch-size", "3"), "--batch-size 4 or more"),
        (1, ("--method", "psl", "--hand-over", "stale"), "--hand-over is of --method sil"),
    ],
)
def test_what_cannot_be_is_said(ranks, options, says):
    config = usual(parse([*SIL, "--widths", "20", "20", "20", *options]))
    with pytest.raises(UserError) as error:
        check(config)
        dataset = open_dataset("digits", "")
        net = make_network("mlp", dataset.shape, dataset.outputs, widths=config.model.widths)
        find_method("sil").check(ranks, net, dataset, config)
    assert says in str(error.value)


def test_what_cannot_be_is_said_once(tmp_path):
    status, _, err = run(3, "-m", "psmpi.train", "--out", tmp_path / "run", *SIL, "--parts", "2")
    message = " ".join(err.split())
    assert status != 0 and message.count("use --parts 3") == 1 and "Traceback" not in err, err


def test_labels_out_of_reach_are_warned_of(train):
    result = train(1, *SIL, "--widths", "20", "5", "--parts", "3", "--labels", "sign", "--max-steps", "1")
    output = " ".join(result.stdout.split())
    assert output.count("ends in relu, which does not reach all of --labels sign --labels-scale 1") == 2
    assert "part 2 has 5 outputs for 10 classes" in output

    def warned(kind, *options):
        return bool([*find_method("sil").warnings(2, network(20, 20, activation=kind), parse([*SIL, *options]))])

    assert not warned("relu") and not warned("relu", "--labels-scale", "5")
    assert warned("sigmoid", "--labels-scale", "5") and not warned("sigmoid")
    assert warned("tanh", "--labels", "gaussian") and not warned("identity", "--labels", "gaussian")


def test_a_run_that_diverges_ends_the_job(tmp_path):
    options = ("--widths", "20", "20", "20", "--optimizer", "sgd", "--lr", "1e38", "--clip", "0")
    status, _, err = run(2, "-m", "psmpi.train", "--out", tmp_path / "run", *SIL, *options, timeout=30)
    assert status != 0 and err.count("not a finite number") == 1 and "Traceback" not in err, err


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_mnist_is_learned(train):
    """Bounds on accuracies from small runs of these settings; the handed bytes are 60,000 times 256 floats."""
    folder = real("mnist") / "mnist"
    setting = ("--model", "mlp", "--widths", *["256"] * 5, "--dataset", "mnist", "--data-dir", folder, "--loss", "nll",
               "--batch-size", "128", "--clip", "0", "--threads", "1")  # fmt: skip
    epochs = ("--epochs", "7", "--part-epochs", "4", "3")
    sil_run = train(2, "--method", "sil", *setting, *epochs, timeout=280)
    last = sil_run.rows[-1]
    (nearest,), (solved,), joined = last["nearest_accuracy"], last["least_squares_accuracy"], last["test_accuracy"]
    assert nearest >= 0.973 and joined >= 0.973
    assert abs(joined - nearest) <= 0.007 and abs(solved - nearest) <= 0.003
    assert [row["handed_bytes"] for row in sil_run.rows] == [0] * 4 + [61_440_000] * 3
    plain_run = train(1, "--method", "data_parallel", *setting, "--epochs", "5", timeout=280)
    assert joined >= plain_run.rows[-1]["test_accuracy"] - 0.005
