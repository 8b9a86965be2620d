"""Compressed sums of gradients: sent and residual parts add up, and compressors have the properties of their papers."""

import numpy as np
import pytest
from helpers.datasets import real
from helpers.runs import distance, run

from psmpi.comm.compression import (
    COMPRESSORS,
    DGC,
    QSGD,
    PowerSGD,
    Sign,
    TopK,
    check_compression,
    make_compressor,
    tensors,
)
from psmpi.comm.group import Counter, Group
from psmpi.errors import UserError
from psmpi.nn.zoo import make_network
from psmpi.testing import run_ranks

F64 = np.dtype(np.float64)
SETTINGS = {"density": 0.1, "rank": 2, "levels": 15, "momentum": 0.9, "seed": 0}


def together(size, work):
    """Run work(group) on every rank; return the results in the order of ranks."""
    return run_ranks(size, lambda world: work(Group(world, range(size), Counter())))


def small():
    return make_network("mlp", (12,), 4, widths=(10, 8)).layout()


def gradient(layout, rank, step, size):
    """This rank's share of a gradient: its slice of a mean over `size` ranks."""
    return np.random.default_rng([rank, step]).normal(size=layout.size) / size


@pytest.mark.parametrize("ranks", [1, 3, 4])
@pytest.mark.parametrize("name", ["float16", "topk", "sign", "powersgd"])
def test_what_is_applied_and_what_is_left_are_all_gradients(name, ranks):
    layout, steps = small(), 50

    def work(group):
        compressor = make_compressor(name, group, layout, F64, True, **SETTINGS)
        applied = np.zeros(layout.size)
        for step in range(steps):
            g = gradient(layout, group.rank, step, ranks)
            compressor.reduce(g)
            applied += g
        return applied, compressor.left

    results = together(ranks, work)
    total = sum(gradient(layout, rank, step, ranks) for rank in range(ranks) for step in range(steps))
    applied = results[0][0]
    assert all(np.array_equal(applied, other_applied) for other_applied, _ in results)
    residual = np.mean([rank_residual for _, rank_residual in results], axis=0)
    assert abs(applied + residual - total).max() <= 1e-12 * abs(total).max()
    # Without the residual they differ: something was left out.
    assert abs(residual).max() > 1e-6 * abs(total).max()


def test_powersgd_projects_the_mean_on_what_its_columns_span():
    layout = small()

    def work(group):
        compressor = PowerSGD(group, layout, F64, rank=2)
        g = gradient(layout, group.rank, 0, 3)
        compressor.reduce(g)
        return g, compressor

    results = together(3, work)
    mean = sum(gradient(layout, rank, 0, 3) for rank in range(3))
    compressor = results[0][1]
    assert len(compressor.matrices) == 3 and len(compressor.whole) == 10 + 8 + 4
    for runs, shape, p, _ in compressor._factors():
        m, projected = (np.concatenate([v[run] for run in runs]).reshape(shape) for v in (mean, results[0][0]))
        assert abs(projected - p @ p.T @ m).max() <= 1e-12
        assert abs(p.T @ p - np.eye(2)).max() <= 1e-12
    assert abs(results[0][0][compressor.whole] - mean[compressor.whole]).max() <= 1e-15


def test_powersgd_comes_to_the_best_approximation_of_a_fixed_matrix():
    layout = small()

    def work(group):
        compressor = PowerSGD(group, layout, F64, memory=False, rank=2)
        for _ in range(200):
            g = gradient(layout, 0, 0, 1)
            compressor.reduce(g)
        return g, compressor

    ((g, compressor),) = together(1, work)
    for runs, shape in compressor.matrices:
        matrix, approximation = (
            np.concatenate([v[run] for run in runs]).reshape(shape) for v in (gradient(layout, 0, 0, 1), g)
        )
        best = np.sqrt((np.linalg.svd(matrix)[1][2:] ** 2).sum())
        assert np.linalg.norm(matrix - approximation) == pytest.approx(best, abs=1e-10)


def test_top_k_and_signs_contract_as_their_papers_say():
    layout = small()
    v = gradient(layout, 0, 0, 1)

    def work(group):
        compressors = []
        for kind in (TopK, Sign):
            compressor = kind(group, layout, F64, **({"density": 0.1} if kind is TopK else {}))
            compressor.reduce(v.copy())
            compressors.append(compressor)
        return compressors

    ((topk, sign),) = together(1, work)
    assert topk.k == round(0.1 * layout.size)
    assert (topk.left**2).sum() <= (1 - topk.k / layout.size) * (v**2).sum()
    assert sorted(abs(topk.sent[topk.sent != 0])) == sorted(abs(v))[-topk.k :]
    for runs in tensors(layout):
        values, residual = (np.concatenate([a[run] for run in runs]) for a in (v, sign.left))
        share = 1 - abs(values).sum() ** 2 / (len(values) * (values**2).sum())
        assert (residual**2).sum() == pytest.approx(share * (values**2).sum(), rel=1e-12)


def test_random_rounding_is_unbiased_and_its_variance_bounded():
    layout = make_network("mlp", (3,), 2, widths=(2,)).layout()
    v = gradient(layout, 0, 0, 1)
    draws, levels = 40_000, 4

    def work(group):
        compressor = QSGD(group, layout, F64, levels=levels)
        rounded = np.empty((draws, layout.size))
        for k in range(draws):
            rounded[k] = v
            compressor.reduce(rounded[k])
        return rounded

    (samples,) = together(1, work)
    errors = samples.std(axis=0) / np.sqrt(draws)
    assert (abs(samples.mean(axis=0) - v) <= 4 * errors + 1e-15).all()
    d = layout.size
    variance = ((samples - v) ** 2).sum(axis=1).mean()
    assert 0 < variance <= min(d / levels**2, np.sqrt(d) / levels) * (v**2).sum()


def test_dgc_that_sends_all_is_momentum():
    layout = small()

    def work(group):
        unmasked = DGC(group, layout, F64, density=1.0, momentum=0.9, masking=False)
        masked = DGC(group, layout, F64, density=1.0, momentum=0.9)
        sums = []
        for step in range(20):
            gradients = [gradient(layout, group.rank, step, 2) for _ in range(2)]
            unmasked.reduce(gradients[0])
            masked.reduce(gradients[1])
            sums.append(gradients)
        return sums

    steps, _ = together(2, work)
    velocity = np.zeros(layout.size)
    for step, (unmasked_sum, masked) in enumerate(steps):
        mean = sum(gradient(layout, rank, step, 2) for rank in range(2))
        velocity = 0.9 * velocity + mean
        assert abs(unmasked_sum - velocity).max() <= 1e-14
        # Masking clears the momentum of sent entries, here of all.
        assert abs(masked - mean).max() <= 1e-14


def test_float16_holds_small_and_large_numbers():
    layout = small()

    def work(group):
        sums = []
        for factor in (1e-30, 1.0, 1e30, 0.0):
            g = factor * gradient(layout, group.rank, 0, 2)
            make_compressor("float16", group, layout, F64, False, **SETTINGS).reduce(g)
            sums.append(g)
        return sums

    mean = sum(gradient(layout, rank, 0, 2) for rank in range(2))
    for factor, reduced in zip((1e-30, 1.0, 1e30), together(2, work)[0], strict=False):
        # float16 keeps eleven binary digits, of the shares and of the mean.
        assert abs(reduced - factor * mean).max() <= 2**-10 * factor * abs(mean).max()
    assert not together(2, work)[0][3].any()


@pytest.mark.parametrize("name", [pytest.param(c, marks=[pytest.mark.slow] * (c == "qsgd")) for c in COMPRESSORS])
def test_a_compressed_run_goes_on_bit_for_bit(train, tmp_path, name):
    options = (
        "--method",
        "data_parallel",
        "--compression",
        name,
        "--epochs",
        "10",
        "--batch-size",
        "64",
        "--lr",
        "0.05",
    )
    options += ("--optimizer", "sgd", *(("--density", "0.05") if name in ("topk", "dgc") else ()))
    out = tmp_path / "begun"
    train(3, *options, "--max-steps", "7", out=out)
    result = train(3, *options, "--max-steps", "12", "--resume", "auto", out=out)
    assert distance(train(3, *options, "--max-steps", "12").tensors(), result.tensors()) == 0
    on_two_ranks = train(2, *options, "--max-steps", "13", "--resume", "auto", out=out)
    note = "the random numbers of this many ranks" if name == "qsgd" else "the compression residuals of this many ranks"
    assert note in on_two_ranks.stdout


def test_nothing_to_compress_is_no_trouble(train):
    options = ("--method", "data_parallel", "--compression", "powersgd", "--powersgd-rank", "100", "--model", "mlp")
    train(2, *options, "--widths", "32", "--loss", "nll", "--max-steps", "3", "--epochs", "1")


BYTES = {
    # Bytes of a step on 4 ranks: gathered segments both ways; index and value; bit and scale; code and norm.
    "float16": lambda size, k, n: 2 * 2 * size * 3 // 4,
    "topk": lambda size, k, n: 8 * k * 3,
    "dgc": lambda size, k, n: 8 * k * 3,
    "sign": lambda size, k, n: (-(-size // 8) + 4 * n) * 3,
    "qsgd": lambda size, k, n: (size + 4) * 3,
}


@pytest.mark.parametrize("name", BYTES)
def test_a_step_sends_what_it_says(train, name):
    result = train(4, "--method", "data_parallel", "--compression", name, "--max-steps", "5", "--epochs", "1")
    weights = [t for key, t in result.tensors().items() if key.startswith("weights/")]
    size = sum(t.size for t in weights)
    expected = 5 * BYTES[name](size, round(0.01 * size), len(weights))
    for sent in result.rows[-1]["bytes_sent_by_rank"]:
        assert abs(sent - expected) <= 5 * 16


def test_powersgd_sends_two_thin_matrices_and_the_vectors(train):
    options = ("--compression", "powersgd", "--powersgd-rank", "4", "--model", "mlp", "--widths", "32", "24")
    result = train(4, "--method", "data_parallel", *options, "--max-steps", "5", "--epochs", "1")
    thin = 4 * ((32 + 64) + (24 + 32) + (10 + 24))
    expected = 5 * 4 * 2 * 3 * (thin + 32 + 24 + 10) // 4
    for sent in result.rows[-1]["bytes_sent_by_rank"]:
        assert abs(sent - expected) <= 5 * 4 * 6


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--compression", "topk", "--density", "0"), "expected a share above 0"),
        (("--compression", "powersgd", "--powersgd-rank", "0"), "expected 1 or more columns"),
        (("--compression", "qsgd", "--qsgd-levels", "128"), "expected 1 to 127"),
        (("--compression", "sign", "--optimizer", "lbfgs"), "needs the exact one: use a first-order optimizer"),
        (("--compression", "sign", "--method", "local_sgd"), "is of --method data_parallel"),
    ],
)
def test_what_cannot_be_is_said(tmp_path, options, says):
    status, _, err = run(2, "-m", "psmpi.train", "--out", tmp_path / "run", "--method", "data_parallel", *options)
    assert status != 0 and err.count(says) == 1 and "Traceback" not in err, err
    with pytest.raises(UserError):
        check_compression(2.0, 1, 1)


@pytest.mark.slow
def test_mnist_after_two_epochs_needs_the_memory(train):
    """The bounds follow a small run of the same setting with 3.2 % test error without compression."""
    folder = real("mnist") / "mnist"
    setting = ("--dataset", "mnist", "--data-dir", folder, "--model", "mlp", "--widths", "256", "256", "--loss", "nll",
               "--batch-size", "128", "--optimizer", "momentum", "--lr", "0.05", "--clip", "0", "--epochs", "2",
               "--threads", "1")  # fmt: skip

    def wrong(method, *options):
        return 1 - train(4, "--method", method, *setting, *options).rows[-1]["test_accuracy"]

    plain = wrong("data_parallel")
    assert plain <= 0.04
    for options in (("--compression", "powersgd"), ("--compression", "topk")):
        with_memory = wrong("data_parallel", *options)
        assert with_memory <= plain + 0.01
        assert wrong("data_parallel", *options, "--no-error-feedback") >= with_memory + 0.01
    assert wrong("local_sgd", "--local-steps", "8") <= plain + 0.01
