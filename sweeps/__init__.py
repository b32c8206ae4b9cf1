"""Searches hyperparameters with Optuna: everything that starts many runs. `python -m sweeps --help`."""
