"""Where tests and what they read lie."""

from pathlib import Path

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent
FAKE = TESTS / "fake"
