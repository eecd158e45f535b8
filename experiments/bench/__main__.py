"""`python -m experiments.bench`."""

import sys

from experiments.bench.command import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
