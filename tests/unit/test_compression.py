"""Compressed sums of gradients: what is applied and what is left add up, and the properties their papers state."""

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
    """work(group) on every rank; what each returns."""
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
        return applied, compressor.residual

    found = together(ranks, work)
    everything = sum(gradient(layout, rank, step, ranks) for rank in range(ranks) for step in range(steps))
    applied = found[0][0]
    assert all(np.array_equal(applied, other) for other, _ in found)
    left = np.mean([left for _, left in found], axis=0)
    assert abs(applied + left - everything).max() <= 1e-12 * abs(everything).max()
    # And without what is left they are not: something was left out.
    assert abs(left).max() > 1e-6 * abs(everything).max()


def test_powersgd_projects_the_mean_on_what_its_columns_span():
    layout = small()

    def work(group):
        compressor = PowerSGD(group, layout, F64, rank=2)
        g = gradient(layout, group.rank, 0, 3)
        compressor.reduce(g)
        return g, compressor

    found = together(3, work)
    mean = sum(gradient(layout, rank, 0, 3) for rank in range(3))
    compressor = found[0][1]
    assert len(compressor.matrices) == 3 and len(compressor.uncompressed) == 10 + 8 + 4
    for at, shape, p, _ in compressor._factors():
        m, found_m = (np.concatenate([v[run] for run in at]).reshape(shape) for v in (mean, found[0][0]))
        assert abs(found_m - p @ p.T @ m).max() <= 1e-12
        assert abs(p.T @ p - np.eye(2)).max() <= 1e-12
    assert abs(found[0][0][compressor.uncompressed] - mean[compressor.uncompressed]).max() <= 1e-15


def test_powersgd_comes_to_the_best_approximation_of_a_fixed_matrix():
    layout = small()

    def work(group):
        compressor = PowerSGD(group, layout, F64, memory=False, rank=2)
        for _ in range(200):
            g = gradient(layout, 0, 0, 1)
            compressor.reduce(g)
        return g, compressor

    ((g, compressor),) = together(1, work)
    for at, shape in compressor.matrices:
        matrix, found = (np.concatenate([v[run] for run in at]).reshape(shape) for v in (gradient(layout, 0, 0, 1), g))
        best = np.sqrt((np.linalg.svd(matrix)[1][2:] ** 2).sum())
        assert np.linalg.norm(matrix - found) == pytest.approx(best, abs=1e-10)


def test_top_k_and_signs_contract_as_their_papers_say():
    layout = small()
    v = gradient(layout, 0, 0, 1)

    def work(group):
        found = []
        for kind in (TopK, Sign):
            compressor = kind(group, layout, F64, **({"density": 0.1} if kind is TopK else {}))
            compressor.reduce(v.copy())
            found.append(compressor)
        return found

    ((topk, sign),) = together(1, work)
    assert topk.k == round(0.1 * layout.size)
    assert (topk.residual**2).sum() <= (1 - topk.k / layout.size) * (v**2).sum()
    assert sorted(abs(topk.sent[topk.sent != 0])) == sorted(abs(v))[-topk.k :]
    for at in tensors(layout):
        mine, left = (np.concatenate([a[run] for run in at]) for a in (v, sign.residual))
        share = 1 - abs(mine).sum() ** 2 / (len(mine) * (mine**2).sum())
        assert (left**2).sum() == pytest.approx(share * (mine**2).sum(), rel=1e-12)


def test_random_rounding_is_unbiased_and_its_variance_bounded():
    layout = make_network("mlp", (3,), 2, widths=(2,)).layout()
    v = gradient(layout, 0, 0, 1)
    draws, levels = 40_000, 4

    def work(group):
        compressor = QSGD(group, layout, F64, levels=levels)
        found = np.empty((draws, layout.size))
        for k in range(draws):
            found[k] = v
            compressor.reduce(found[k])
        return found

    (found,) = together(1, work)
    errors = found.std(axis=0) / np.sqrt(draws)
    assert (abs(found.mean(axis=0) - v) <= 4 * errors + 1e-15).all()
    d = layout.size
    variance = ((found - v) ** 2).sum(axis=1).mean()
    assert 0 < variance <= min(d / levels**2, np.sqrt(d) / levels) * (v**2).sum()


def test_dgc_that_sends_all_is_momentum():
    layout = small()

    def work(group):
        whole = DGC(group, layout, F64, density=1.0, momentum=0.9, masking=False)
        masked = DGC(group, layout, F64, density=1.0, momentum=0.9)
        found = []
        for step in range(20):
            both = [gradient(layout, group.rank, step, 2) for _ in range(2)]
            whole.reduce(both[0])
            masked.reduce(both[1])
            found.append(both)
        return found

    found, _ = together(2, work)
    velocity = np.zeros(layout.size)
    for step, (whole, masked) in enumerate(found):
        mean = sum(gradient(layout, rank, step, 2) for rank in range(2))
        velocity = 0.9 * velocity + mean
        assert abs(whole - velocity).max() <= 1e-14
        # What is sent is forgotten, here all: no momentum is left.
        assert abs(masked - mean).max() <= 1e-14


def test_float16_holds_small_and_large_numbers():
    layout = small()

    def work(group):
        found = []
        for factor in (1e-30, 1.0, 1e30, 0.0):
            g = factor * gradient(layout, group.rank, 0, 2)
            make_compressor("float16", group, layout, F64, False, **SETTINGS).reduce(g)
            found.append(g)
        return found

    mean = sum(gradient(layout, rank, 0, 2) for rank in range(2))
    for factor, found in zip((1e-30, 1.0, 1e30), together(2, work)[0], strict=False):
        # Eleven binary digits, of the shares and of the mean.
        assert abs(found - factor * mean).max() <= 2**-10 * factor * abs(mean).max()
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
    other = train(2, *options, "--max-steps", "13", "--resume", "auto", out=out)
    said = "the random numbers of this many ranks" if name == "qsgd" else "the compression residuals of this many ranks"
    assert said in other.stdout


def test_nothing_to_compress_is_no_trouble(train):
    options = ("--method", "data_parallel", "--compression", "powersgd", "--powersgd-rank", "100", "--model", "mlp")
    train(2, *options, "--widths", "32", "--loss", "nll", "--max-steps", "3", "--epochs", "1")


BYTES = {
    # Of 4 ranks, a step: gathered segments both ways; index and value; bit and scale; code and norm.
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
        (("--compression", "sign", "--method", "local_sgd"), "is an option of --method data_parallel"),
    ],
)
def test_what_cannot_be_is_said(tmp_path, options, says):
    status, _, err = run(2, "-m", "psmpi.train", "--out", tmp_path / "run", "--method", "data_parallel", *options)
    assert status != 0 and err.count(says) == 1 and "Traceback" not in err, err
    with pytest.raises(UserError):
        check_compression(2.0, 1, 1)


@pytest.mark.slow
def test_mnist_after_two_epochs_needs_the_memory(train):
    """The figures that a small run of the same setting had: 3.2 % wrong without compression."""
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
