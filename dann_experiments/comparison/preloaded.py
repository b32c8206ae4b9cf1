"""All that a worker of a comparison imports. The process that workers are forked from imports this module, once for all."""

from __future__ import annotations

from dann_experiments.tracking.processes import preload

MODULES = (
    "torch",
    "mlflow.store.tracking.sqlalchemy_store",
    "segmentation_models_pytorch",
    "rasterio",
    "dann_experiments.jobs",
    "dann_experiments.comparison.runner",
)

preload(MODULES)
