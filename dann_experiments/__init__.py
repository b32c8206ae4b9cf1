"""Adapts segmentation networks to unlabeled domains with DANN, tracked in MLflow.

Public names load on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dann_experiments.adaptation.dann import DANNMethod, LambdaZero, SourceOnly
    from dann_experiments.adaptation.domain_classifier import DomainClassifier
    from dann_experiments.adaptation.gradient_reversal import GradientReversal
    from dann_experiments.adaptation.method import DomainAdaptationMethod, MethodLoss, Progress, StepOutputs
    from dann_experiments.adaptation.schedules import ConstantScheduler, DANNScheduler, LambdaScheduler, LinearScheduler
    from dann_experiments.comparison.compare import ComparisonResult, compare
    from dann_experiments.comparison.verdict import Verdict
    from dann_experiments.config import Config, InputError, TrainingFailed, load_config
    from dann_experiments.config.comparison import CompareConfig
    from dann_experiments.config.export import ExportConfig
    from dann_experiments.config.prediction import PredictConfig
    from dann_experiments.config.weak_labels import WeakLabelsConfig
    from dann_experiments.jobs.adapt import adapt
    from dann_experiments.jobs.check_data import DataReport, check_data
    from dann_experiments.jobs.evaluate import evaluate
    from dann_experiments.jobs.export import ExportResult, export
    from dann_experiments.jobs.predict import PredictResult, predict
    from dann_experiments.jobs.pretrain import pretrain
    from dann_experiments.jobs.result import RunResult
    from dann_experiments.jobs.weak_labels import WeakLabelsResult, weak_labels
    from dann_experiments.training.monitor import DomainAdaptationMonitorCallback

__version__ = "0.1.0"
_HOMES = {
    "DANNMethod": "adaptation.dann",
    "LambdaZero": "adaptation.dann",
    "SourceOnly": "adaptation.dann",
    "DomainClassifier": "adaptation.domain_classifier",
    "GradientReversal": "adaptation.gradient_reversal",
    "DomainAdaptationMethod": "adaptation.method",
    "MethodLoss": "adaptation.method",
    "Progress": "adaptation.method",
    "StepOutputs": "adaptation.method",
    "ConstantScheduler": "adaptation.schedules",
    "DANNScheduler": "adaptation.schedules",
    "LambdaScheduler": "adaptation.schedules",
    "LinearScheduler": "adaptation.schedules",
    "CompareConfig": "config.comparison",
    "ComparisonResult": "comparison.compare",
    "Verdict": "comparison.verdict",
    "compare": "comparison.compare",
    "Config": "config",
    "InputError": "config",
    "TrainingFailed": "config",
    "load_config": "config",
    "DataReport": "jobs.check_data",
    "ExportConfig": "config.export",
    "ExportResult": "jobs.export",
    "PredictConfig": "config.prediction",
    "PredictResult": "jobs.predict",
    "RunResult": "jobs.result",
    "WeakLabelsConfig": "config.weak_labels",
    "WeakLabelsResult": "jobs.weak_labels",
    "DomainAdaptationMonitorCallback": "training.monitor",
}
_JOBS = ("adapt", "check_data", "evaluate", "export", "predict", "pretrain", "weak_labels")

__all__ = [
    "CompareConfig",
    "ComparisonResult",
    "Config",
    "ConstantScheduler",
    "DANNMethod",
    "DANNScheduler",
    "DataReport",
    "DomainAdaptationMethod",
    "DomainAdaptationMonitorCallback",
    "DomainClassifier",
    "ExportConfig",
    "ExportResult",
    "GradientReversal",
    "InputError",
    "LambdaScheduler",
    "LambdaZero",
    "LinearScheduler",
    "MethodLoss",
    "PredictConfig",
    "PredictResult",
    "Progress",
    "RunResult",
    "SourceOnly",
    "StepOutputs",
    "TrainingFailed",
    "Verdict",
    "WeakLabelsConfig",
    "WeakLabelsResult",
    "adapt",
    "check_data",
    "compare",
    "evaluate",
    "export",
    "load_config",
    "predict",
    "pretrain",
    "weak_labels",
]


def __getattr__(name: str) -> Any:
    if name in _JOBS:
        return getattr(importlib.import_module(f"{__name__}.jobs.{name}"), name)
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
