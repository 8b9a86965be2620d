"""Run several trainings one after the other in the same processes. An argument has the options of one, as JSON."""

import json
import sys

from psmpi.train import main

if __name__ == "__main__":
    sys.exit(max(main(json.loads(words)) for words in sys.argv[1:]))
