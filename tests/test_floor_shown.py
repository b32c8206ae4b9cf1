"""The floor and the classes in what people read: the terminal, tables of runs, and the report of a comparison."""

import csv
from pathlib import Path

import pytest

from dann_experiments.comparison.floors import classes_of, floor_notes, floor_of
from dann_experiments.comparison.result import Arm, ArmRun
from dann_experiments.reports import terminal

BEFORE = {"iou/target_val": 0.283, "class_iou/target_val/ground": 0.468, "class_iou/target_val/tree": 0.098}
AFTER = {
    "iou/target_val": 0.317, "floor/target_val": 0.315, "class_iou/target_val/ground": 0.57,
    "class_iou/target_val/tree": 0.064, "ap/target_val/ground": 0.6, "ap/target_val/tree": 0.29,
    "share/target_val/ground": 0.9, "share/target_val/tree": 0.1, "true_share/target_val/ground": 0.63,
    "true_share/target_val/tree": 0.37, "iou/source_val": 0.8, "floor/source_val": 0.4,
    "true_share/source_val/tree": 0.2, "true_share/source_val/ground": 0.8,
}  # fmt: skip


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line[1:-1].replace("┃", "│").split("│")] for line in text.splitlines()]


def test_the_table_of_a_run_has_floors_and_classes_and_says_which_score_is_near_its_floor(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    terminal.print_scores("adapt run x", {"before": BEFORE, "after": AFTER})
    out = capsys.readouterr().out
    rows = rows_of(out)
    assert ["", "iou/target_val", "iou/source_val"] in rows
    assert ["floor", "0.315", "0.400"] in rows
    assert "iou/target_val 0.317 is not clearly above its floor" in out
    assert "iou/source_val 0.8" not in out
    assert "classes of target_val" in out
    assert ["", "IoU before", "IoU", "average precision", "predicted share", "true share"] in rows
    assert ["tree", "0.098", "0.064", "0.290", "0.100", "0.370"] in rows


def test_a_run_without_target_labels_has_its_predicted_shares_beside_the_source_s_true_ones(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    known = {name: value for name, value in AFTER.items() if "target_val" not in name or name.startswith("share/")}
    terminal.print_scores("adapt run x", {"before": {}, "after": known})
    rows = rows_of(capsys.readouterr().out)
    assert ["", "predicted share", "true share in the source"] in rows
    assert ["tree", "0.100", "0.200"] in rows


def test_a_run_of_an_earlier_version_is_shown_without_a_floor(capsys):
    terminal.print_scores("adapt run x", {"before": {}, "after": {"iou/target_val": 0.3}})
    assert "floor" not in capsys.readouterr().out


def test_the_table_of_classes_of_a_run_has_shares_and_the_floor(shared_runs):
    result = shared_runs.result("adapt")
    with open(Path(result.artifacts) / "tables" / "class_iou.csv", encoding="utf-8") as file:
        rows = {(row["set"], row["class"]): row for row in csv.DictReader(file)}
    assert float(rows["target_val", "floor"]["iou_after"]) == pytest.approx(
        result.metrics["floor/target_val"], abs=1e-6
    )
    for column, metric in (("ap_after", "ap"), ("share_after", "share"), ("true_share", "true_share")):
        found = float(rows["target_val", "square"][column])
        assert found == pytest.approx(result.metrics[f"{metric}/target_val/square"], abs=1e-6)


# --- comparisons


def runs_with(*metrics: dict[str, float], arm: str = "DANN") -> list[ArmRun]:
    return [ArmRun(arm, seed, f"{arm}{seed}", found) for seed, found in enumerate(metrics)]


def test_the_floor_of_a_comparison_is_read_from_its_runs_also_if_only_new_ones_have_it():
    runs = runs_with({"iou/target_test": 0.5}, {"iou/target_test": 0.5, "floor/target_test": 0.3})
    assert floor_of(runs, "iou/target_test") == 0.3
    assert floor_of(runs, "iou/target_val") != floor_of(runs, "iou/target_val")  # unknown: NaN
    (said,) = floor_notes([Arm("DANN", "adapted")], {"DANN": {0: 0.5}}, "iou/target_val", float("nan"))
    assert "do not have the floor of iou/target_val" in said


def test_arms_near_the_floor_are_named_in_one_note():
    arms = [Arm(name, "adapted") for name in ("low", "high", "one seed", "below", "none")]
    scores = {
        "low": {0: 0.32, 1: 0.31, 2: 0.33}, "high": {0: 0.52, 1: 0.51, 2: 0.53}, "one seed": {0: 0.33},
        "below": {0: 0.2, 1: 0.21, 2: 0.2},
    }  # fmt: skip
    (said,) = floor_notes(arms, scores, "iou/target_val", 0.315)
    assert said.startswith(
        "low, one seed, below: iou/target_val is within noise of the floor or below it. The floor is 31.5"
    )
    assert list(floor_notes(arms[1:2], scores, "iou/target_val", 0.315)) == []


def test_the_classes_of_a_verdict_are_those_that_the_adapted_runs_have():
    runs = runs_with({"class_iou/target_val/tree_shrub": 0.1}, {"class_iou/target_val/tree_shrub": 0.2})
    runs += runs_with({"class_iou/target_val/tree_shrub": 0.4}, arm="source only")
    found = classes_of(runs, "iou/target_val", ["ground", "tree/shrub"], ("DANN", "", "source only"))
    assert list(found) == ["tree/shrub"]
    assert found["tree/shrub"].adapted == {0: 0.1, 1: 0.2}
    assert (found["tree/shrub"].control, found["tree/shrub"].source_only) == ({}, {0: 0.4})
