"""All that a worker of a sweep imports. The process that workers are forked from imports this module, once for all of them."""

from __future__ import annotations

from dann_experiments.tracking.processes import preload

MODULES = (
    "torch",
    "mlflow.store.tracking.sqlalchemy_store",
    "segmentation_models_pytorch",
    "rasterio",
    "sweeps.objective",
    "sweeps.worker",
)

preload(MODULES)
