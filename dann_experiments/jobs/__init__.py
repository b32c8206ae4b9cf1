"""One function per job: `pretrain(config)`, `adapt(config)`, `evaluate(config)`, ...; each makes one tracked run."""

from dann_experiments.jobs.adapt import adapt, prepare
from dann_experiments.jobs.check_data import DataReport, check_data
from dann_experiments.jobs.evaluate import evaluate
from dann_experiments.jobs.export import ExportResult, export
from dann_experiments.jobs.predict import PredictResult, predict
from dann_experiments.jobs.pretrain import pretrain
from dann_experiments.jobs.result import RunResult
from dann_experiments.jobs.upkeep import Health, doctor, sync_runs
from dann_experiments.jobs.weak_labels import WeakLabelsResult, weak_labels

__all__ = [
    "DataReport",
    "ExportResult",
    "Health",
    "PredictResult",
    "RunResult",
    "WeakLabelsResult",
    "adapt",
    "check_data",
    "doctor",
    "evaluate",
    "export",
    "predict",
    "prepare",
    "pretrain",
    "sync_runs",
    "weak_labels",
]
