"""What all workers import. The fork server, the process that workers are forked from, imports this module once for all."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import warnings

MODULES = (
    "torch",
    "pytorch_lightning",
    "mlflow.store.tracking.sqlalchemy_store",
    "segmentation_models_pytorch",
    "rasterio",
)

with contextlib.suppress(OSError):  # the current folder may be removed while torch searches it: use one that stays
    here = os.getcwd()
    sys.path[:] = [entry or here for entry in sys.path]
    os.chdir("/")
with warnings.catch_warnings():  # the parent shows its own
    warnings.simplefilter("ignore")
    for name in MODULES:
        with contextlib.suppress(Exception):  # the worker meets the error again and reports it in its log
            importlib.import_module(name)
