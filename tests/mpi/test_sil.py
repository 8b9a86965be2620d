"""Synthetic intermediate labels: the labels, what each part learns from, what is sent, and what is learned."""

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


def trained(net, steps, *, one=None, lr=0.01, **settings):
    """One process's run of so many steps, or what is left of them of a run that is begun."""
    one = one or method(net, **settings)
    batches = Minibatches(N, 50, 0, settings.get("shuffle", True))
    for step in range(int(one.scalars["steps"]) if "steps" in one.scalars else 0, steps):
        one.step(Batch(batches.ids(*divmod(step, PER_EPOCH))), lr)
    one.collect()
    return one


def flat(result, layout):
    """The weights of a checkpoint as the flat vector."""
    tensors, vector = result.tensors(), np.empty(layout.size)
    for piece in layout.pieces():
        parameter = layout.parameters[piece.parameter]
        rows = tensors[f"weights/{parameter.name}"].reshape(parameter.units, -1)[piece.first : piece.last]
        vector[piece.offset : piece.offset + rows.size] = rows.reshape(-1)
    return vector


def differ(one, result):
    """How far the weights of a run on many ranks are from those of one process, relative."""
    mine = one.state.vectors["weights"]
    return np.linalg.norm(flat(result, one.layout) - mine) / np.linalg.norm(mine)


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
        apart = [np.linalg.norm(s[:, i] - s[:, j]) for i in range(47) for j in range(i)]
        assert 6.2 * kappa <= np.mean(apart) <= 6.9 * kappa
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
        drawn = draw_targets(law, 100, 10, 0, 1, 1.0)
        assert low <= drawn.min() and drawn.max() <= high


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
    near = [np.argmin([np.linalg.norm(best[:, i] - s[:, j]) for j in range(5)]) for i in range(40)]
    assert np.array_equal(reader.nearest(best), near)


# What each part learns.


@pytest.mark.parametrize("law", ["uniform", "sign"])
def test_gradients_of_both_parts_are_those_of_differences(law):
    # tanh: its loss has no kinks between two points.
    one = method(network(12, 9, 8, activation="tanh"), parts=2, labels=law, labels_scale=2.0)
    rng, labels = np.random.default_rng(1), one.dataset.train.labels[:20]
    for part in one.parts.values():
        x = rng.random((part.inputs, 20))
        value, gradient = part.learn(x, labels, 1 / 20), None
        gradient = part.g.copy()
        if not part.last:
            s = draw_targets(law, part.units, 10, 0, 1, 2.0).astype(float)
            assert value == pytest.approx(((part.forward(x) - s[:, labels]) ** 2).mean() / 4, rel=1e-12)
        for i in rng.choice(part.w.size, 40, replace=False):
            kept, values = part.w[i], []
            for h in (1e-5, -1e-5):
                part.w[i] = kept + h
                values.append(part.learn(x, labels, 1 / 20))
            part.w[i] = kept
            assert abs((values[0] - values[1]) / 2e-5 - gradient[i]) <= 1e-8


def test_the_loss_of_labels_does_not_depend_on_their_scale():
    y = np.random.default_rng(0).normal(size=(30, 8))
    labels, found = np.arange(8) % 10, []
    for kappa in (1.0, 8.0):
        grad = np.empty_like(y)
        loss = TargetDistance(draw_targets("uniform", 30, 10, 0, 1, kappa), kappa)
        found.append((loss(kappa * y, labels, 0.5, grad), kappa * grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12) and np.allclose(found[0][1], found[1][1], rtol=1e-12)


def test_recovery_has_the_gradient_of_the_whole_network():
    net = network(12, 9, 8)
    one = method(net, parts=3, recovery_epochs=1, epochs=4)
    whole = method(net, name="data_parallel")
    # From the same weights, drawn by unit, to the same gradient.
    ids = np.arange(50)
    loss = whole.gradient(Batch(ids))
    one._learn_joined(ids, np.arange(50))
    assert one.loss_sum == pytest.approx(50 * loss, rel=1e-12)
    for part in one.parts.values():
        at = np.concatenate([np.arange(a, b) for a, b in part.runs.intervals])
        assert np.array_equal(part.w, whole.w[at])
        assert abs(part.g - whole.g[at]).max() <= 1e-13 * abs(whole.g).max()


@pytest.mark.parametrize("optimizer", ["adam", "momentum"])
def test_a_single_part_is_conventional_training_bit_for_bit(optimizer):
    one, whole = (
        trained(network(40, 30), 3 * PER_EPOCH, optimizer=optimizer, clip=0.0, name=name, **settings)
        for name, settings in (("sil", {"parts": 1}), ("data_parallel", {}))
    )
    assert one.state.vectors.keys() == whole.state.vectors.keys()
    for name, vector in one.state.vectors.items():
        assert np.array_equal(vector, whole.state.vectors[name])
    assert one.loss_sum == whole.loss_sum and one.test() == whole.test()
    assert one.diagnostics()["macs"] == conventional([one.parts[0].cost], N, 3)


@pytest.mark.parametrize("shuffle", [True, False])
def test_stored_inputs_are_those_of_their_samples(shuffle):
    one = method(network(40, 30, 20), parts=2, optimizer="adam", shuffle=shuffle)
    left, right = one.parts.values()
    batches, seen = Minibatches(N, 50, 0, shuffle), []
    learn = right.learn
    right.learn = lambda x, labels, *rest: seen.append((x.copy(), labels.copy())) or learn(x, labels, *rest)
    for step in range(3 * PER_EPOCH):
        ids = batches.ids(*divmod(step, PER_EPOCH))
        one.step(Batch(ids), 1e-3)
        if seen:
            x, labels = seen.pop()
            assert np.array_equal(x, right.stored[ids].T) and np.array_equal(labels, one.dataset.train.labels[ids])
    # The left part has not moved since they were made.
    chosen = np.random.default_rng(0).choice(N, 100, replace=False)
    for i in chosen:
        piece = np.arange(i // 100 * 100, min(i // 100 * 100 + 100, N))
        assert np.array_equal(left.forward(one.chain.fetch(one.train, piece))[:, i % 100], right.stored[i])
    y = left.forward(one.chain.fetch(one.train, chosen))
    assert np.allclose(right.forward(y.copy()), right.forward(right.stored[chosen].T.copy()), rtol=1e-6)


def test_what_parts_learn_from_when_all_learn_at_once():
    seen = []

    def watched(way):
        one = method(network(40, 30, 20), parts=2, hand_over=way, labels_noise=0.1, epochs=2)
        part, batches = one.parts[1], Minibatches(N, 50, 0)
        learn = part.learn
        part.learn = lambda x, *rest: seen.append(x.copy()) or learn(x, *rest)
        for step in range(PER_EPOCH + 1):
            kept = one.parts[0].w.copy()
            one.step(Batch(batches.ids(*divmod(step, PER_EPOCH))), 1e-2)
        columns = draw_targets("uniform", 30, 10, 0, 1, 1.0).astype(np.float64)
        of = [columns[:, one.dataset.train.labels[batches.ids(*divmod(s, PER_EPOCH))]] for s in range(PER_EPOCH + 1)]
        return one, kept, of, batches

    one, kept, of, batches = watched("stale")
    assert all(np.array_equal(x, y) for x, y in zip(seen[:-1], of[:-1], strict=True))
    # In the second epoch the outputs of the weights at the end of the first.
    assert np.array_equal(one.handed[: kept.size], kept) and not np.array_equal(kept, one.parts[0].w)
    one.parts[0].w[...] = kept
    y = one.parts[0].forward(one.chain.fetch(one.train, batches.ids(1, 0)))
    assert np.allclose(seen[-1], y, rtol=1e-12)
    seen.clear()
    one, kept, of, batches = watched("labels")
    noise = np.concatenate([x - y for x, y in zip(seen, of, strict=True)], axis=1)
    assert noise.std() == pytest.approx(0.1, rel=0.02) and abs(noise.mean()) < 1e-3
    assert one.chain.handed_bytes == 0 and one.chain.macs == (N + 50) * sum(
        part.cost.training() for part in one.parts.values()
    )


# What is sent, and where.


def test_parts_do_not_move_while_another_learns(train, tmp_path):
    options = (*SMALL, "--epochs", "5", "--recovery-epochs", "1")
    out = tmp_path / "begun"
    begun = method(network(40, 30, 20), parts=2)
    left = weights(train(2, *options, "--max-steps", 2 * PER_EPOCH, out=out))
    right = train(2, *options, "--max-steps", 4 * PER_EPOCH, "--resume", "auto", out=out)
    middle, rows = weights(right), right.rows
    part = begun.parts[1]
    drawn = np.concatenate([t.ravel() for t in of_layers(left, "dense3", "dense4").values()])
    assert np.array_equal(np.sort(drawn), np.sort(part.w))
    assert distance(of_layers(left, "dense1", "dense2"), of_layers(middle, "dense1", "dense2")) == 0
    assert distance(of_layers(left, "dense3", "dense4"), of_layers(middle, "dense3", "dense4")) > 0
    # Parts of a network are no other weights than the network's.
    assert [row["phase"] for row in rows] == ["part 1", "part 1", "part 2", "part 2"]
    handed = 8 * N * 30
    assert [row["bytes_sent"] for row in rows] == [0, 0, handed, handed]
    assert [row["handed_bytes"] for row in rows] == [0, 0, handed, handed]
    assert rows[-1]["bytes_sent_by_rank"] == [handed, 0] and rows[-1]["bytes_received_by_rank"] == [0, handed]
    # An epoch of the whole sends outputs and their gradients.
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
    """Bytes and MACs as they should be, and the weights of one rank."""
    net = network(40, 30, 20)
    alone = trained(net, 6 * PER_EPOCH, epochs=6, parts=2, hand_over=way)
    many = train(ranks, *SMALL, "--epochs", "6", "--parts", "2", "--hand-over", way)
    assert differ(alone, many) <= 1e-10
    expected = N * macs(*(count(net, *stage) for stage in split_layers(net, 2)))
    assert many.rows[-1]["macs"] == alone.diagnostics()["macs"] == expected
    assert many.rows[-1]["handed_bytes"] == 8 * N * floats and alone.chain.handed_bytes == 0
    if ranks == 2:
        assert many.rows[-1]["bytes_sent"] == 8 * N * floats


def test_many_ranks_train_as_one_does(train):
    """200 steps and more of each phase; with two ranks a part the sums over these are in another order."""
    options = (*SMALL, "--parts", "2", "--epochs", "21", "--recovery-epochs", "7")
    alone = trained(network(40, 30, 20), 21 * PER_EPOCH, epochs=21, parts=2, recovery_epochs=7)
    two, four = (train(ranks, *options) for ranks in (2, 4))
    assert 7 * PER_EPOCH >= 200
    assert differ(alone, two) <= 1e-12 and differ(alone, four) <= 1e-9
    score, found = alone.test(), alone.diagnostics()
    assert score["accuracy"] > 0.9 and found["phase"] == "recovery"
    for result, close in ((two, 1e-9), (four, 1e-6)):
        assert result.rows[-1]["test_loss"] == pytest.approx(score["loss"], rel=close)
        for key in ("target_distance", "nearest_accuracy", "least_squares_accuracy", "macs", "dead_units"):
            assert result.rows[-1][key] == pytest.approx(found[key], rel=close)
    # What is handed over goes to one rank, which shares it with the other.
    sent = four.rows[7]["bytes_sent"] - four.rows[6]["bytes_sent"]
    size, right = 8 * N * 30, of_layers(weights(four), "dense3", "dense4")
    summed = PER_EPOCH * 8 * sum(t.size for t in right.values()) * 2
    assert sent == 2 * size + summed and four.rows[7]["handed_bytes"] == size


@pytest.mark.parametrize("way", ["stored", "stale"])
def test_three_parts_of_a_network_of_separable_layers(train, way):
    """Convolutions at the cuts, and weights of one part between those of another in the flat vector."""
    options = ("--method", "sil", "--parts", "3", "--hand-over", way, "--epochs", "4", "--recovery-epochs", "1",
               "--loss", "nll", "--dtype", "float64", "--lr", "0.01", "--batch-size", "50")  # fmt: skip
    alone = trained(make_network("psnet", (1, 8, 8), 10), 4 * PER_EPOCH, parts=3, recovery_epochs=1, hand_over=way)
    many = train(3, *options)
    assert differ(alone, many) <= 1e-12
    alone.test()
    assert many.rows[-1]["nearest_accuracy"] == pytest.approx(alone.diagnostics()["nearest_accuracy"])


@pytest.mark.parametrize("way", ["stored", "stale"])
def test_clipped_gradients_are_those_of_one_rank(train, way):
    options = (*SMALL, "--parts", "2", "--epochs", "3", "--recovery-epochs", "1", "--clip", "0.05", "--hand-over", way,
               "--optimizer", "sgd", "--lr", "0.1")  # fmt: skip
    alone, free = (
        trained(network(40, 30, 20), 3 * PER_EPOCH, epochs=3, parts=2, recovery_epochs=1, clip=clip, hand_over=way,
                optimizer="sgd", lr=0.1)
        for clip in (0.05, 0.0)
    )  # fmt: skip
    four = train(4, *options)
    assert differ(alone, four) <= 1e-12 and differ(free, four) > 1e-3


# Phases, and going on in each of them.


def take_up(begun, again):
    """Restore a method from another, as from a checkpoint."""
    for name, vector in again.state.vectors.items():
        vector[...] = begun.state.vectors[name]
    again.scalars.update(begun.scalars)
    again.state.restore()
    again.restored(False, frozenset())


def same(one, other):
    assert one.scalars == other.scalars
    assert all(np.array_equal(vector, other.state.vectors[name]) for name, vector in one.state.vectors.items())


@pytest.mark.parametrize(
    ("way", "name"),
    [
        *(("stored", "psnet"), ("recompute", "mlp"), ("stale", "psnet"), ("labels", "mlp")),
        *(
            pytest.param(*both, marks=pytest.mark.slow)
            for both in (("stored", "mlp"), ("recompute", "psnet"), ("stale", "mlp"), ("labels", "psnet"))
        ),
    ],
)
def test_one_rank_goes_on_bit_for_bit(way, name):
    """In the left part, at the hand-over, in the right part, at and in the recovery."""
    net = network(40, 30, 20) if name == "mlp" else make_network("psnet", (1, 8, 8), 10)
    settings = {"parts": 2, "epochs": 5, "recovery_epochs": 1, "hand_over": way}
    whole = trained(net, 5 * PER_EPOCH, **settings)
    for end in (10, 2 * PER_EPOCH, 2 * PER_EPOCH + 9, 4 * PER_EPOCH, 4 * PER_EPOCH + 8):
        begun, again = trained(net, end, **settings), method(net, **settings)
        take_up(begun, again)
        same(trained(net, 5 * PER_EPOCH, one=again), whole)


def test_three_parts_go_on_from_the_end_of_each():
    """Where a phase begins, what the part before makes is handed over: it needs what it was handed over itself."""
    net, settings = network(40, 30, 20), {"parts": 4, "epochs": 5, "recovery_epochs": 1, "hand_over": "stored"}
    whole = trained(net, 5 * PER_EPOCH, **settings)
    for end in range(PER_EPOCH, 5 * PER_EPOCH, PER_EPOCH):
        begun, again = trained(net, end, **settings), method(net, **settings)
        for part in again.parts.values():
            part.stored.fill(np.nan)
        take_up(begun, again)
        same(trained(net, 5 * PER_EPOCH, one=again), whole)


def test_a_plan_that_is_another_at_a_restart_is_noticed():
    net = network(40, 30, 20)
    begun = trained(net, PER_EPOCH, parts=2, epochs=2)
    again = method(net, parts=4, epochs=4)
    again.scalars.update(begun.scalars)
    with pytest.raises(UserError, match="use --parts 2"):
        again.state.restore()
        again.restored(False, frozenset())
    # More epochs: what would go on is another part, which begins with a fresh optimizer.
    begun = trained(net, 2 * PER_EPOCH + 5, parts=2, epochs=4)
    again = method(net, parts=2, epochs=8)
    take_up(begun, again)
    assert any(vector.any() for name, vector in begun.state.vectors.items() if name != "weights")
    assert not any(vector.any() for part in again.parts.values() for vector in part.optimizer.vectors.values())


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_begin_behind_a_flattening_and_with_the_padding(parts):
    """Features that separable layers do not see, and a padded convolution: as of one network."""
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
    whole = Model(net, layout, w[: layout.part(range(10)).size], None, make_backend("numpy")).forward(x).scores
    for stage in split_layers(net, parts):
        runs = net.runs(layout, *stage) - layout.dead
        local = np.concatenate([w[a:b] for a, b in runs.intervals])
        x = Model(net, layout, local, None, make_backend("numpy"), layers=stage).forward(x).scores
        x = x.reshape(-1, 7).copy()
    assert np.allclose(x, whole, rtol=1e-12)


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
    whole = train(ranks, *options)
    assert distance(whole.tensors(), result.tensors()) == 0
    for key in ("macs", "handed_bytes", "bytes_sent", "test_loss", "target_distance"):
        assert whole.rows[-1][key] == result.rows[-1][key]


def test_a_run_goes_on_on_other_ranks_and_from_another_method(train, tmp_path):
    options, out = (*SMALL, "--epochs", "4", "--parts", "2"), tmp_path / "begun"
    begun = 2 * PER_EPOCH + 9
    train(2, *options, "--max-steps", begun, out=out)
    result = train(1, *options, "--resume", "auto", out=out)
    assert differ(trained(network(40, 30, 20), 4 * PER_EPOCH, parts=2), result) <= 1e-10
    # The phase is that of the run's steps, whoever made the first ones.
    plain = ["data_parallel" if word == "sil" else word for word in SMALL]
    out = tmp_path / "other"
    train(1, *plain, "--epochs", "4", "--max-steps", begun, out=out)
    rows = train(2, *options, "--resume", "auto", out=out).rows
    assert [row.get("phase") for row in rows] == [None, None, "part 2", "part 2"] and rows[-1]["test_accuracy"] > 0.85


def test_optimizers_are_fresh_in_each_phase():
    one = method(network(40, 30, 20), parts=2, clip=0.0, recovery_epochs=2)
    for k, phase in enumerate(one.phases):
        trained(None, phase.start * PER_EPOCH, one=one)
        before = one.w.copy()
        trained(None, phase.start * PER_EPOCH + 1, one=one)
        assert one.scalars["t"] == 1
        for part in one.parts.values():
            if part.number in phase.parts:
                # After one step from nothing the mean of gradients is a tenth of the gradient (Adam).
                assert np.allclose(part.optimizer.vectors["m"], 0.1 * part.g, rtol=1e-10, atol=1e-300)
        # And a first step is as long as the learning rate, or nothing.
        moved = abs(one.w - before)
        assert moved.max() <= 0.01 * (1 + 1e-9) and np.count_nonzero(moved > 0.0099) > 100, k


@pytest.mark.parametrize("way", ["stored", "recompute", "stale", "labels"])
def test_a_step_allocates_no_arrays(way):
    one = method(network(400, 600, 200), parts=2, hand_over=way, epochs=3, recovery_epochs=1)
    batches = Minibatches(N, 50, 0)
    for step in (PER_EPOCH + 3, 2 * PER_EPOCH + 3):
        trained(None, step, one=one)
        ids = batches.ids(*divmod(step, PER_EPOCH))
        tracemalloc.start()
        try:
            one.step(Batch(ids), 1e-3)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        # The outputs at the cut have 240,000 bytes; NumPy's own buffer is 65,536.
        assert peak < 100_000


def test_phases_divide_the_epochs():
    def spans(*given, **settings):
        return [(p.name, p.start, p.stop) for p in plan_phases(*given, Settings(**settings))]

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
    assert [Assignment(2, 6).parts_of(r) for r in range(2)] == [[0, 1, 2], [3, 4, 5]]
    assert [Assignment(4, 2).parts_of(r) for r in range(4)] == [[0], [0], [1], [1]]
    assert [Assignment(6, 2).rank(1, row) for row in range(3)] == [3, 4, 5]
    net = network(20, 20, 20)
    assert [count_parts(size, net, 0) for size in (1, 2, 3, 4)] == [2, 2, 3, 4]
    assert count_parts(1, network(), 0) == 1
    for size, asked, says in ((8, 0, "--parts 4"), (3, 2, "--parts 3"), (2, 3, "--parts 4"), (5, 0, "--parts 1")):
        with pytest.raises(UserError, match=f"use {says}$"):
            count_parts(size, net, asked)
    layers = make_network("lenet", (1, 28, 28), 10)
    assert cut_activation(layers, split_layers(layers, 2)[0][1]) == "sigmoid"
    assert cut_activation(network(20, 20), split_layers(network(20, 20), 3)[0][1]) == "relu"


# What it costs.


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
    whole = count(net, 0, len(net.layers))
    assert whole.forward == 24**2 * 6 * 25 + 8**2 * 16 * 150 + 256 * 120 + 120 * 84 + 840
    assert whole.parameters == net.layout().size and whole.first == 24**2 * 6 * 25


# What a person is told, and what is learned.


@pytest.mark.parametrize(
    ("ranks", "options", "says"),
    [
        (3, ("--parts", "2"), "use --parts 3"),
        (3, ("--epochs", "2"), "use --epochs 3 or more"),
        (2, ("--part-epochs", "2", "2", "--epochs", "5"), "add up to 4, not to --epochs 5: use --epochs 4"),
        (2, ("--optimizer", "lbfgs"), "use a first-order one"),
        (2, ("--labels-scale", "0"), "from 1e-6 to 1e6"),
        (2, ("--hand-over", "labels", "--labels-noise", "-1"), "expected 0 (none) or a number above it"),
        (2, ("--labels-noise", "0.5"), "is an option of --hand-over labels"),
        (2, ("--labels-seed", "-1"), "from 0 up"),
        (2, ("--labels", "orthogonal", "--widths", "20", "5", "20"), "10 vectors of 5 units cannot be"),
        (4, ("--parts", "1", "--batch-size", "3"), "--batch-size 4 or more"),
        (1, ("--method", "psl", "--hand-over", "stale"), "--hand-over is an option of --method sil"),
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
    told = " ".join(err.split())
    assert status != 0 and told.count("use --parts 3") == 1 and "Traceback" not in err, err


def test_labels_out_of_reach_are_warned_of(train):
    result = train(1, *SIL, "--widths", "20", "5", "--parts", "3", "--labels", "sign", "--max-steps", "1")
    told = " ".join(result.stdout.split())
    assert told.count("ends in relu, which does not reach all of --labels sign --labels-scale 1") == 2
    assert "part 2 has 5 outputs for 10 classes" in told

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
    """Accuracies as they were found in small runs of these settings; the bytes are those of 60,000 times 256 floats."""
    folder = real("mnist") / "mnist"
    setting = ("--model", "mlp", "--widths", *["256"] * 5, "--dataset", "mnist", "--data-dir", folder, "--loss", "nll",
               "--batch-size", "128", "--clip", "0", "--threads", "1")  # fmt: skip
    epochs = ("--epochs", "7", "--part-epochs", "4", "3")
    apart = train(2, "--method", "sil", *setting, *epochs, timeout=280)
    last = apart.rows[-1]
    (nearest,), (solved,), joined = last["nearest_accuracy"], last["least_squares_accuracy"], last["test_accuracy"]
    assert nearest >= 0.973 and joined >= 0.973
    assert abs(joined - nearest) <= 0.007 and abs(solved - nearest) <= 0.003
    assert [row["handed_bytes"] for row in apart.rows] == [0] * 4 + [61_440_000] * 3
    whole = train(1, "--method", "data_parallel", *setting, "--epochs", "5", timeout=280)
    assert joined >= whole.rows[-1]["test_accuracy"] - 0.005
