"""Entry point of `python -m dann_experiments`; see `cli.py`."""

import sys

from dann_experiments.cli import main

if __name__ == "__main__":
    sys.exit(main())
