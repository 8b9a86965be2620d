"""`python -m psmpi COMMAND`: the command `psmpi` of this Python."""

import sys

from psmpi.command import main

if __name__ == "__main__":
    sys.exit(main())
