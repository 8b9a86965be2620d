"""Training methods by name: psmpi's own, those of installed packages, and those that a program registers."""

import pytest

from psmpi import registry
from psmpi.config import Config, check, command_line, from_command_line, from_table, from_toml, to_toml
from psmpi.errors import UserError
from psmpi.registry import BUILTIN, METHODS, all_methods, find_method, method_names, register
from psmpi.training.method import Method

PLUGIN = '''
from dataclasses import dataclass
from typing import ClassVar

from psmpi.training.copies import Copies


@dataclass(frozen=True)
class Settings:
    """Settings of a plugin (other)."""

    table: ClassVar[str] = "other"
    results: ClassVar[bool] = True

    strength: float = 0.5
    """Strength of something."""


class Other(Copies):
    name = "other"
    summary = "a method of another package"
    settings = (Settings,)
'''


def forget():
    """Look for installed packages again."""
    registry._entries.cache_clear()
    registry._all_entries.cache_clear()


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    """An installed package with a method, and one whose method cannot be imported."""
    (tmp_path / "other_plugin.py").write_text(PLUGIN)
    for name, target in (("other", "other_plugin:Other"), ("broken", "no_such_module:Method")):
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(f"[psmpi.methods]\n{name} = {target}\n")
    monkeypatch.syspath_prepend(tmp_path)
    forget()
    yield
    forget()


def test_every_method_of_the_package_has_its_name_and_says_what_it_is():
    for name in BUILTIN:
        method = find_method(name)
        assert issubclass(method, Method) and method.name == name and method.summary
        assert all(kind.__doc__ and kind.table for kind in method.settings)


def test_an_installed_method_is_found_with_its_settings(plugins):
    assert set(method_names()) >= {*BUILTIN, "other", "broken"}
    kind = find_method("other").settings[0]
    config = from_table({"parallel": {"method": "other"}, "other": {"strength": 2}}, Config(), "here")
    check(config)
    assert config.of(kind).strength == 2.0 and from_toml(to_toml(config), "again") == config
    assert from_command_line(command_line(config)()) == config


def test_a_broken_package_is_told_of_where_it_is_asked_for(plugins):
    assert "broken" not in all_methods() and "other" in all_methods()
    with pytest.raises(UserError, match="no_such_module:Method of an installed package cannot be imported"):
        find_method("broken")


def test_a_setting_of_an_installed_method_is_refused_with_others(plugins):
    with pytest.raises(UserError, match="--strength is of --method other, and the method here is psl"):
        check(from_table({"other": {"strength": 2}}, Config(), "here"))


def test_a_file_of_a_method_that_is_not_here_is_read_all_the_same():
    text = to_toml(Config()) + "\n[gone]\nspeed = 3\n"
    assert from_toml(text, "there", foreign=True) == Config()
    with pytest.raises(UserError, match=r"unknown table \[gone\]"):
        from_toml(text, "there")


def test_an_unknown_method_is_told_of_with_the_known_ones():
    with pytest.raises(UserError, match=f"--method fast is unknown: choose one of {', '.join(BUILTIN)}"):
        find_method("fast")


def test_a_name_is_taken_once(monkeypatch):
    monkeypatch.setattr(METHODS, "registered", {})

    class Mine(Method):
        name = "mine"
        summary = "a method"

    assert register(Mine) is Mine and find_method("mine") is Mine
    # The same class again, as where a program is imported twice.
    register(Mine)
    other_class = type("Theirs", (Method,), {"name": "mine"})
    with pytest.raises(ValueError, match="called mine is there already"):
        register(other_class)
    with pytest.raises(ValueError, match="called psl is there already"):
        register(type("Mine", (Method,), {"name": "psl"}))


def test_tables_of_earlier_versions_are_read():
    """Files of earlier versions have other tables for settings of methods, and defaults of other methods."""
    earlier = {
        "parallel": {"method": "local_sgd", "partition": "scores", "masters": 1, "replicas": 0, "threads": 2},
        "replicated": {"local_steps": 7, "outer_lr": 0.7, "allreduce": "ring", "density": 0.01},
        "alignment": {"feedback": "normal", "feedback_seed": 0},
        "synthetic": {"part_epochs": [], "hand_over": "stored"},
        "optimization": {"optimizer": "adam", "momentum": 0.9, "beta2": 0.999},
    }
    config = from_table(earlier, Config(), "before")
    check(config)
    current = from_table(
        {
            "parallel": {"method": "local_sgd", "threads": 2},
            "local_sgd": {"outer_lr": 0.7},
            "rounds": {"local_steps": 7},
            "sums": {"allreduce": "ring"},
            "optimization": {"momentum": 0.9, "beta2": 0.999},
        },
        Config(),
        "now",
    )
    assert config == current and from_toml(to_toml(config), "again") == config
    with pytest.raises(UserError, match=r"unknown setting 'speed' in \[replicated\]"):
        from_table({"replicated": {"speed": 3}}, Config(), "before")
    with pytest.raises(UserError, match=r"unknown setting 'masters' in \[data\]"):
        from_table({"data": {"masters": 3}}, Config(), "before")
