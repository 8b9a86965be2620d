"""Layers, losses and optimizers by name: those of psmpi, of installed packages, and of the program."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from psmpi import registry
from psmpi.config import Config, check, command_line, from_command_line, from_table, from_toml, to_toml, usual_numbers
from psmpi.errors import UserError
from psmpi.nn.layers import LAYERS, Layer
from psmpi.nn.losses import LOSSES, Loss, make_loss
from psmpi.nn.network import build
from psmpi.optim import OPTIMIZERS, FirstOrder, Hyper, find_optimizer, is_first_order, make_optimizer, optimizer_names
from psmpi.registry import own_alone

REGISTRIES = {
    "layer": (LAYERS, Layer, "dense"),
    "loss": (LOSSES, Loss, "psl"),
    "optimizer": (OPTIMIZERS, FirstOrder, "sgd"),
}


@dataclass(frozen=True)
class LossOptions:
    """A loss of a test (tried)."""

    table: ClassVar[str] = "tried"
    results: ClassVar[bool] = True

    strength: float = 0.5
    """Strength of something."""


@dataclass(frozen=True)
class StepOptions:
    """An optimizer of a test (stepped)."""

    table: ClassVar[str] = "stepped"
    results: ClassVar[bool] = True

    pull: int = 3
    """Pull of something."""


class Tried(Loss):
    formula = "nothing"
    options = LossOptions


class Stepped(FirstOrder):
    options = StepOptions
    rates = (0.5, 0.25, 0.125)


@pytest.fixture
def own(monkeypatch):
    """The program's classes, registered while a test runs."""
    for classes in (LAYERS, LOSSES, OPTIMIZERS):
        monkeypatch.setattr(classes, "registered", {})
    LOSSES.register("tried")(Tried)
    OPTIMIZERS.register("stepped")(Stepped)


@pytest.mark.parametrize("noun", REGISTRIES)
def test_a_name_is_taken_once_and_a_class_has_its_base(noun, monkeypatch):
    classes, base, taken = REGISTRIES[noun]
    monkeypatch.setattr(classes, "registered", {})
    own_class = type("Mine", (base,), {})
    assert classes.register("mine")(own_class) is own_class and classes["mine"] is own_class and "mine" in classes.names
    classes.register("mine")(own_class)
    for kind, name in ((type("Other", (base,), {}), "mine"), (own_class, taken)):
        with pytest.raises(ValueError, match=f"a {noun} called {name} is there already"):
            classes.register(name)(kind)
    with pytest.raises(ValueError, match=f"int is no {classes.base.replace(':', '.')}"):
        classes.register("strange")(int)
    with own_alone():
        assert "mine" not in classes and taken in classes


def test_names_of_partitioned_optimizers_are_psmpi_s(own):
    with pytest.raises(ValueError, match="called plse is there already"):
        OPTIMIZERS.register("plse")(type("Mine", (FirstOrder,), {}))
    assert optimizer_names()[-2:] == ("plse", "stepped") and is_first_order("stepped")


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """An installed package with entry points that cannot be imported, or are no classes of psmpi."""
    folder = tmp_path / "broken-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    groups = "\n".join(f"[{classes.group}]\ngone = no_such_module:X\nnone = fractions:Fraction" for classes, _, _ in
                       REGISTRIES.values())  # fmt: skip
    (folder / "entry_points.txt").write_text(groups)
    monkeypatch.syspath_prepend(tmp_path)
    for clear in (registry._entries.cache_clear, registry._all_entries.cache_clear):
        clear()
    yield
    for clear in (registry._entries.cache_clear, registry._all_entries.cache_clear):
        clear()


@pytest.mark.parametrize("noun", REGISTRIES)
def test_a_broken_package_ends_only_those_who_ask_for_its_class(noun, broken):
    classes, _, taken = REGISTRIES[noun]
    assert {"gone", "none"} <= set(classes.names) and not {"gone", "none"} & set(classes) and taken in set(classes)
    with pytest.raises(UserError, match=r"gone'?: no_such_module:X of an installed package cannot be imported"):
        classes.find("gone")
    with pytest.raises(UserError, match="fractions:Fraction of an installed package is no psmpi"):
        classes.find("none")


@pytest.mark.parametrize("noun", REGISTRIES)
def test_a_look_at_a_stranger_s_file_knows_psmpi_s_classes_alone(noun, broken, own):
    classes, _, taken = REGISTRIES[noun]
    with own_alone():
        assert set(classes.names) == set(classes.own) and taken in classes
        assert not {"gone", "none", "tried", "stepped"} & {*classes.names, *classes}
        with pytest.raises(UserError, match="unknown"):
            classes.find("gone")
    assert "gone" in classes


def test_settings_of_a_loss_and_an_optimizer_are_those_of_the_command_line_and_of_files(own):
    table = {
        "objective": {"loss": "tried"}, "optimization": {"optimizer": "stepped"},
        "tried": {"strength": 2}, "stepped": {"pull": 7},
    }  # fmt: skip
    config = from_table(table, Config(), "here")
    check(config)
    assert config.of(LossOptions).strength == 2.0 and config.chosen.keys() >= {"tried", "stepped"}
    assert from_toml(to_toml(config), "again") == config
    assert from_command_line(command_line(config)()) == config
    assert usual_numbers(100, config).lr == 0.5
    for table, says in (
        ({"tried": {"strength": 2}}, "--strength is of --loss tried, and the loss here is psl"),
        ({"stepped": {"pull": 7}}, "--pull is of --optimizer stepped, and the optimizer here is adam"),
    ):
        with pytest.raises(UserError, match=says):
            check(from_table(table, Config(), "here"))
    assert make_loss("tried", np.dtype(np.float32), own=LossOptions(3.0)).own.strength == 3.0
    assert make_optimizer("stepped", 4, np.float32, Hyper()).own.pull == 3


def test_two_settings_of_one_name_are_refused(own, monkeypatch):
    monkeypatch.setattr(StepOptions, "table", "tried")
    with pytest.raises(UserError, match=r"--optimizer stepped has a table \[tried\], which is there already"):
        command_line(Config())
    monkeypatch.setattr(StepOptions, "table", "stepped")

    @dataclass(frozen=True)
    class Momentum:
        table: ClassVar[str] = "other"
        results: ClassVar[bool] = True
        momentum: float = 0.5

    monkeypatch.setattr(Stepped, "options", Momentum)
    with pytest.raises(UserError, match=r"the setting momentum of \[\w+\] is one of \[\w+\] too"):
        command_line(Config())


def test_a_checkpoint_of_a_loss_and_an_optimizer_that_are_not_here_is_read(own):
    table = {"objective": {"loss": "tried"}, "optimization": {"optimizer": "stepped"}, "tried": {"strength": 2}}
    text = to_toml(from_table(table, Config(), "here"))
    for classes in (LOSSES, OPTIMIZERS):
        classes.registered.clear()
    config = from_toml(text, "there", foreign=True)
    assert (config.objective.loss, config.optimization.optimizer) == ("tried", "stepped")
    with pytest.raises(
        UserError, match=r"\[objective\] loss = 'tried': choose one of psl, .*; for losses of other pac"
    ):
        from_toml(text, "there")
    with pytest.raises(UserError, match=r"--loss 'tried' is unknown: choose one of psl, .* start the program that reg"):
        check(config)
    with pytest.raises(UserError, match=r"--optimizer 'stepped' is unknown: choose one of sgd, .*plse; for optimizers"):
        find_optimizer("stepped")
    with pytest.raises(
        UserError, match=r"unknown layer type 'mine'; .*nown are dense, .*; for layers of other packages"
    ):
        build("custom", (3,), [{"type": "mine"}], 3)


def test_an_optimizer_that_counts_steps_is_refused_where_weights_come_and_go(own):
    OPTIMIZERS.register("counting")(type("Counting", (FirstOrder,), {"counts": True}))
    with pytest.raises(UserError, match=r"--optimizer counting counts its steps for all weights together"):
        make_optimizer("counting", 4, np.float32, Hyper(), counted=True)
