"""Scores as plain functions on tensors: IoU and related metrics, label-free selection scores, and the domain gap probe.

They need no trainer, settings or MLflow. `docs/scores.md` shows how to use them on your own tensors.
"""

from dann_experiments.scores.average_precision import class_average_precision
from dann_experiments.scores.bnm import batch_nuclear_norm
from dann_experiments.scores.confusion import (
    class_f1,
    class_precision,
    class_recall,
    confusion_matrix,
    macro_mean,
    pixel_accuracy,
    row_shares,
)
from dann_experiments.scores.domain_probe import Probe, a_distance, mean_and_std, probe
from dann_experiments.scores.entropy import mean_entropy
from dann_experiments.scores.floor import constant_iou, predicted_shares, true_shares
from dann_experiments.scores.infomax import information_maximization
from dann_experiments.scores.iou import class_iou, mean_iou
from dann_experiments.scores.snd import neighborhood_density, soft_neighborhood_density

__all__ = [
    "Probe",
    "a_distance",
    "batch_nuclear_norm",
    "class_average_precision",
    "class_f1",
    "class_iou",
    "class_precision",
    "class_recall",
    "confusion_matrix",
    "constant_iou",
    "information_maximization",
    "macro_mean",
    "mean_and_std",
    "mean_entropy",
    "mean_iou",
    "neighborhood_density",
    "pixel_accuracy",
    "predicted_shares",
    "probe",
    "row_shares",
    "soft_neighborhood_density",
    "true_shares",
]
