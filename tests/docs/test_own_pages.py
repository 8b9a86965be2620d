"""Tables of the pages on networks, losses and optimizers against the registries, and examples in docs/own_*.md."""

import re

import pytest
from helpers.paths import ROOT

from psmpi.nn.layers import LAYERS
from psmpi.nn.losses import LOSSES
from psmpi.nn.zoo import MODELS
from psmpi.optim import OPTIMIZERS, optimizer_names
from psmpi.optim.schedules import SCHEDULES

TABLES = {
    "networks.md": (*LAYERS.own, *MODELS),
    "losses.md": tuple(LOSSES.own),
    "optimizers.md": (*OPTIMIZERS.own, *optimizer_names(), *SCHEDULES),
}
EXAMPLES = {
    "own_layer.md": ("own_layer.py", "own_layer.toml"),
    "own_loss.md": ("own_loss.py",),
    "own_optimizer.md": ("own_optimizer.py",),
    "own_method.md": ("dsgd.py",),
}


@pytest.mark.parametrize("page", TABLES)
def test_everything_that_is_registered_is_in_a_table_of_its_page(page):
    rows = re.findall(r"^\| (`[^|]*) \|", (ROOT / "docs" / page).read_text(), re.M)
    listed = {name for row in rows for name in re.findall(r"`([\w-]+)`", row)}
    assert set(TABLES[page]) <= listed, sorted(set(TABLES[page]) - listed)


@pytest.mark.parametrize(("page", "name"), [(page, name) for page, names in EXAMPLES.items() for name in names])
def test_an_example_is_in_its_page_in_full(page, name):
    text = (ROOT / "docs" / page).read_text()
    kind = "toml" if name.endswith("toml") else "python"
    assert f"<!-- file: {name} -->\n```{kind}\n{(ROOT / 'examples' / name).read_text()}```\n" in text
