"""`python -m psmpi.config`: print the page docs/configuration.md."""

import sys

from psmpi.config.page import page

if __name__ == "__main__":
    sys.stdout.write(page())
