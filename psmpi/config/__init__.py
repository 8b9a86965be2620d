"""The settings of a run; the command line, the TOML file and the help are made from their dataclasses."""

from psmpi.config.carried import (
    changes,
    given_names,
    used_settings,
    with_names,
    with_usual,
    without_anew,
    without_unused,
)
from psmpi.config.ranges import Choices, Least, check_ranges, listed, option
from psmpi.config.sections import Data, LossSettings, NetworkSettings, Optimization, Parallel, Run
from psmpi.config.terminal import Terminal
from psmpi.config.text import defaults, from_table, from_toml, given, parse_toml, read_file, tables_in, to_toml
from psmpi.config.tree import (
    Config,
    Settings,
    check,
    command_line,
    few_options,
    from_command_line,
    from_few_options,
    kinds_of_settings,
)
from psmpi.config.usual import Numbers, usual_numbers

__all__ = [
    "Choices",
    "Config",
    "Data",
    "Least",
    "LossSettings",
    "NetworkSettings",
    "Numbers",
    "Optimization",
    "Parallel",
    "Run",
    "Settings",
    "Terminal",
    "changes",
    "check",
    "check_ranges",
    "command_line",
    "defaults",
    "few_options",
    "from_command_line",
    "from_few_options",
    "from_table",
    "from_toml",
    "given",
    "given_names",
    "kinds_of_settings",
    "listed",
    "option",
    "parse_toml",
    "read_file",
    "tables_in",
    "to_toml",
    "used_settings",
    "usual_numbers",
    "with_names",
    "with_usual",
    "without_anew",
    "without_unused",
]
