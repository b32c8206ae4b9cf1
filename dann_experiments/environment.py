"""Explains that a package is missing because the project's environment is not the one that runs. Imports nothing but Python."""

import sys

NEEDED = (
    "jsonargparse",
    "mlflow",
    "numpy",
    "pytorch_lightning",
    "torch",
    "yaml",
)  # missing where nothing was installed


def explain_missing(error: ModuleNotFoundError) -> int:
    """Print how to get the package that `error` misses, and return the exit code 2. Raises `error` again for a package that this
    project does not always need, or a module of the user's."""
    if (error.name or "").partition(".")[0] not in NEEDED:
        raise error
    print(
        f"Error: {error.name} is not installed for {sys.executable}. Activate the environment of this project (in its folder: "
        "source .venv/bin/activate), or install it there (make install).",
        file=sys.stderr,
    )
    return 2
