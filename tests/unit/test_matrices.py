"""Weight matrices that lie in a shard with all of their rows."""

import numpy as np
import pytest

from psmpi.errors import UserError
from psmpi.layout import Matrix, Parameter, Runs, hidden_weights, make_layout, whole_matrices
from psmpi.nn.zoo import make_network


def network(name, **settings):
    shape = {"widths": (), "layers": (), "blocks": (), "batch_norm": False, **settings}
    return make_network(name, (3, 32, 32) if name == "resnet" else (1, 28, 28), 10, **shape)


def test_hidden_matrices_are_all_but_the_first_and_last():
    layout = network("mlp", widths=(50, 40, 30)).layout()
    assert [p.name for p in hidden_weights(layout)] == ["dense2.weight", "dense3.weight"]
    matrices = whole_matrices(layout, Runs([(0, layout.size)]))
    assert [(m.rows, m.columns) for m in matrices] == [(40, 50), (30, 40)]
    for matrix, pieces in zip(matrices, (layout.by_parameter[2], layout.by_parameter[4]), strict=True):
        assert [p.offset for p in pieces] == [matrix.start]


def test_convolutions_are_units_by_unit_size():
    layout = network("lenet").layout()
    matrices = whole_matrices(layout, Runs([(0, layout.size)]))
    assert [(m.rows, m.columns) for m in matrices] == [(16, 150), (120, 256), (84, 120)]
    assert whole_matrices(layout, Runs()) == ()


@pytest.mark.parametrize("name", ["psnet", "mlp", "lenet", "resnet"])
def test_parts_of_blocks_have_the_matrices_of_the_whole_between_them(name):
    """Every block of the flat vector, wherever it lies in a shard, has the same matrices."""
    layout = network(name).layout()
    all_matrices = whole_matrices(layout, Runs([(0, layout.size)]))
    for step in (2, 3):
        part_matrices = []
        for k in range(step):
            runs = Runs.union((b.start, b.stop) for b in layout.blocks[k::step])
            values = np.arange(layout.size)
            local = np.concatenate([values[:0], *(values[a:b] for a, b in runs.intervals)])
            for matrix in whole_matrices(layout, runs):
                place = local[matrix.place]
                assert np.array_equal(place, np.arange(place[0], place[0] + place.size))
                part_matrices.append(Matrix(int(place[0]), matrix.rows, matrix.columns))
        assert sorted(part_matrices, key=lambda m: m.start) == list(all_matrices)
    assert all_matrices


def test_groups_of_a_block_diagonal_layer_are_matrices_each():
    everyone = frozenset({0, 1})
    parameters = [Parameter("first", (2, 3), 2), Parameter("middle", (4, 3, 5), 12), Parameter("last", (2, 12), 2)]
    uses = [[(0, 2, everyone)], [(0, 6, everyone), (6, 7, frozenset({0})), (7, 12, frozenset({1}))], [(0, 2, everyone)]]
    layout = make_layout(parameters, uses, 2)
    matrices = whole_matrices(layout, Runs([(0, layout.size)]))
    assert [(m.rows, m.columns) for m in matrices] == [(3, 5), (3, 5), (1, 5), (2, 5), (3, 5)]


def test_a_shard_with_some_rows_of_a_matrix_is_told_what_to_use():
    layout = network("mlp", widths=(50, 40, 30)).layout()
    start = layout.by_parameter[2][0].offset
    for runs in ([(start + 50, layout.size)], [(0, start + 1)], [(start + 100, start + 150)]):
        with pytest.raises(UserError, match=r"units 0 to 40 of dense2.weight .* use --masters 1"):
            whole_matrices(layout, Runs(runs))
    assert whole_matrices(layout, Runs([(0, start)])) == ()
