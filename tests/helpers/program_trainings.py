"""Trainings in the same processes, one after the other: each argument has the options of one, as JSON."""

import json
import sys

from psmpi.train import main

if __name__ == "__main__":
    sys.exit(max(main(json.loads(words)) for words in sys.argv[1:]))
