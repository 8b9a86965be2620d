"""Slabs: gradients beyond the edges, initial weights, and default widths of halos."""

import numpy as np
import pytest

from psmpi.backend import NumpyOps
from psmpi.errors import UserError
from psmpi.nn.model import Model
from psmpi.nn.network import Network, build
from psmpi.nn.slabs import slabs


def slab(in_shape=(16,), **settings):
    table = {"type": "slab", "units": 8, "domains": 4, **settings}
    return build("custom", in_shape, [table, {"type": "flatten"}], int(np.prod(table["units"]))).layers[0]


def test_weights_beyond_both_edges_have_the_gradient_0_whatever_was_there():
    layer, rng = slab(halo=2), np.random.default_rng(0)
    network = Network("slab", (16,), (layer,))
    layout = network.layout()
    w, g = rng.standard_normal(layout.size), np.full(layout.size, np.nan)
    x, dy = rng.standard_normal((16, 5)), rng.standard_normal((8, 5))
    model = Model(network, layout, w, g, NumpyOps())
    model.backward(model.forward(x), dy.copy())
    # Each domain has two outputs, and a window of its four inputs and two more on either side.
    padded = np.pad(x, [(2, 2), (0, 0)])
    expected = np.stack([dy[2 * d : 2 * d + 2] @ padded[4 * d : 4 * d + 8].T for d in range(4)])
    gradient = g[: expected.size].reshape(4, 2, 8)
    assert np.allclose(gradient, expected, rtol=1e-13)
    assert (
        not gradient[0, :, :2].any()
        and not gradient[-1, :, -2:].any()
        and gradient[0, :, 2:].all()
        and gradient[-1, :, :-2].all()
    )


@pytest.mark.parametrize(
    ("kind", "gain", "bound"),
    # A window of 4 + 2 * 2 inputs, 2 outputs: Glorot and Bengio (2010), eq. 16; He et al. (2015), eq. 10, uniform.
    [("xavier", 1.0, np.sqrt(6 / 10)), ("xavier", 2.0, 2 * np.sqrt(6 / 10)), ("he", 1.0, np.sqrt(6 / 8)),
     ("pytorch", 1.0, 1 / np.sqrt(8))],
)  # fmt: skip
def test_initial_weights_are_uniform_by_the_window_and_the_outputs_of_a_domain(kind, gain, bound):
    initial = slab(halo=2).initial(kind, gain)
    assert set(initial) == {"slab1.weight"} and initial["slab1.weight"].law == "uniform"
    assert initial["slab1.weight"].value == pytest.approx(bound, rel=1e-14)


@pytest.mark.parametrize(
    ("in_shape", "settings", "halo"),
    [
        ((128,), {}, 4),
        ((64,), {}, 2),
        ((60,), {}, 1),
        ((16,), {}, 1),
        ((4,), {"units": 4}, 1),
        ((64,), {"domains": 1}, 0),
        # An eighth of the narrowest side of a tile that is cut.
        ((3, 64, 96), {"units": [8, 8], "domains": [2, 2]}, 4),
        ((3, 96, 64), {"units": [8, 8], "domains": [2, 1]}, 6),
    ],
)
def test_a_halo_that_a_table_does_not_give_is_an_eighth_of_a_domain_and_at_least_1(in_shape, settings, halo):
    assert slab(in_shape, **settings).halo == halo


@pytest.mark.parametrize(
    ("in_shape", "domains", "halos"),
    [
        # Flat images: a row of their pixels, and no more than a domain has.
        ((1, 8, 20), (4,), [20, 2]),
        ((3, 8, 12), (4,), [12, 2]),
        ((1, 2, 32), (4,), [16, 2]),
        # Other samples: an eighth of a domain.
        ((160,), (4,), [5, 2]),
        ((8,), (4,), [1, 2]),
        # Tiles: an eighth of the narrower side.
        ((1, 32, 64), (2, 2), [2, 1]),
    ],
)
def test_the_halos_of_a_network_of_slabs(in_shape, domains, halos):
    tables = slabs((64, 64), domains, -1, 10, in_shape)
    layers = build("custom", in_shape, tables, 10).layers
    assert [layer.halo for layer in layers if type(layer).__name__ == "Slab"] == halos
    with_halo = build("custom", in_shape, slabs((64, 64), domains, 1, 10, in_shape), 10).layers
    assert [layer.halo for layer in with_halo if type(layer).__name__ == "Slab"] == [1, 1]


@pytest.mark.parametrize("domains", [(1,), (1, 1)])
def test_a_halo_where_there_is_no_neighbouring_domain_is_refused(domains):
    words = " ".join(map(str, domains))
    with pytest.raises(UserError, match=f"--halo 9: with --domains {words} there is no neighbouring .* --domains 2"):
        slabs((64,), domains, 9, 10, (1, 8, 8))
    for halo in (-1, 0):
        assert slabs((64,), domains, halo, 10, (1, 8, 8))
    assert slabs((64,), (1, 2), 1, 10, (1, 8, 8))
