"""The imports that all workers need. The fork server, from which workers are forked, imports this module once for all."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import warnings

from dann_experiments.config.imports import quick_imports

MODULES = (
    "torch",
    "pytorch_lightning",
    "mlflow.store.tracking.sqlalchemy_store",
    "segmentation_models_pytorch",
    "rasterio",
)

with contextlib.suppress(
    OSError
):  # torch searches the current folder, which may be removed meanwhile: change to one that stays
    here = os.getcwd()
    sys.path[:] = [entry or here for entry in sys.path]
    os.chdir("/")
with warnings.catch_warnings(), quick_imports():  # the parent process shows the warnings
    warnings.simplefilter("ignore")
    for name in MODULES:
        with contextlib.suppress(Exception):  # the worker imports it again and logs the error
            importlib.import_module(name)
