"""Run several trainings one after the other in the same processes. Each argument: a training's options, a JSON list."""

import json
import sys

from psmpi.train import main

if __name__ == "__main__":
    sys.exit(max(main(json.loads(words)) for words in sys.argv[1:]))
