"""Entry point of `python -m sweeps`; see `cli.py`."""

import sys

from dann_experiments.environment import explain_missing

try:
    from sweeps.cli import main
except ModuleNotFoundError as missing:
    sys.exit(explain_missing(missing))

if __name__ == "__main__":
    sys.exit(main())
