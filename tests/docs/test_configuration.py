"""docs/configuration.md is the page that psmpi makes from the settings."""

import subprocess
import sys

from helpers.paths import ROOT

from psmpi.config import from_table, parse_toml
from psmpi.config.page import OPENING, page
from psmpi.config.text import Config


def test_the_page_is_current():
    printed = subprocess.run([sys.executable, "-m", "psmpi.config"], capture_output=True, text=True, check=True).stdout
    assert printed == page()
    assert (ROOT / "docs" / "configuration.md").read_text() == printed, "python -m psmpi.config > docs/configuration.md"


def test_the_example_of_the_page_is_a_configuration():
    text = OPENING.partition("```toml\n")[2].partition("```")[0]
    config = from_table(parse_toml(text), Config(), "example")
    assert config != Config() and config.optimization.optimizer == "adamw"
