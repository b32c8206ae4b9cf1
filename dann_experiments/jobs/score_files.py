"""Writes the scores of labeled sets as tables and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from dann_experiments.names import SetName
from dann_experiments.reports.plots.confusion import draw_confusion
from dann_experiments.scores import macro_mean, row_shares
from dann_experiments.training.scoring import Scores


def write_scores(folder: Path, scores: Mapping[SetName, Scores], class_names: Sequence[str]) -> None:
    """Write tables and figures to the run's folder."""
    tables = folder / "tables"
    tables.mkdir(parents=True, exist_ok=True)
    whole = [_score_table(str(name), found, class_names) for name, found in scores.items()]
    pd.concat(whole).to_csv(tables / "scores.csv", index=False, float_format="%.6f")
    for name, found in scores.items():
        counts = pd.DataFrame(found.confusion, index=pd.Index(class_names, name="truth"), columns=list(class_names))
        counts.to_csv(tables / f"confusion_{name}.csv")
        shares = pd.DataFrame(row_shares(found.confusion), index=counts.index, columns=counts.columns)
        shares.to_csv(tables / f"confusion_{name}_normalised.csv", float_format="%.6f")
        title = f"{name.words}: mean IoU {found.iou:.3f}"
        draw_confusion(folder / "figures" / f"confusion_{name}.png", found.confusion, class_names, title)


def _score_table(name: str, scores: Scores, class_names: Sequence[str]) -> pd.DataFrame:
    """Return one row per class, then `mean` and `floor`; a score that is not defined is an empty field."""
    columns = {
        "iou": scores.class_iou, "precision": scores.class_precision, "recall": scores.class_recall, "f1": scores.class_f1,
        "average_precision": np.full(len(class_names), np.nan) if scores.class_ap is None else scores.class_ap,
    }  # fmt: skip
    pixels = {"truth_pixels": scores.truth_pixels, "predicted_pixels": scores.predicted_pixels}
    table = pd.DataFrame({"set": name, "class": list(class_names), **columns, **pixels})
    mean = pd.DataFrame(
        {"set": [name], "class": ["mean"], **{key: [macro_mean(value)] for key, value in columns.items()}}
    )
    floor = pd.DataFrame({"set": [name], "class": ["floor"], "iou": [scores.floor]})
    return pd.concat([table, mean, floor]).astype(dict.fromkeys(pixels, "Int64"))
