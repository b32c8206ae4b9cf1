"""The arm that scores weak labels themselves, without a network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import small_settings
from PIL import Image

from dann_experiments import load_config
from dann_experiments.comparison.arms import arms_of, cells_of
from dann_experiments.comparison.parts import rule_notes
from dann_experiments.comparison.result import Arm, ArmRun
from dann_experiments.config import Config, InputError
from dann_experiments.config.comparison import NAMED_ARMS, CompareConfig
from dann_experiments.jobs.build import find_data
from dann_experiments.jobs.evaluate_weak_labels import evaluate_weak_labels, find_weak_labels
from dann_experiments.names import TARGET_VAL, TARGET_WEAK


@pytest.fixture(scope="session")
def rule(squares, tmp_path_factory) -> Path:
    """Masks of all target images of `squares`: class 1 in the right half, the upper quarter left open."""
    folder = tmp_path_factory.mktemp("rule")
    mask = np.zeros((32, 32), np.uint8)
    mask[:, 16:] = 1
    mask[:8] = 255
    for part in ("target", "target_val", "target_test"):
        (folder / part).mkdir()
        for image in (squares / part / "images").iterdir():
            Image.fromarray(mask).save(folder / part / f"{image.stem}.png")
    return folder


def entry(squares: Path, rule: Path, part: str) -> dict[str, str]:
    return {"images": str(squares / part / "images"), "masks": str(rule / part)}


def config_of(squares: Path, rule: Path, parts: tuple[str, ...] = ("target", "target_val"), **more: object) -> Config:
    given = {"data.target.weak_labels": [entry(squares, rule, part) for part in parts]}
    return load_config(None, small_settings(squares, **more) | given)


def test_the_rule_s_masks_are_scored_like_a_network_s_predictions(squares, rule, workplace):
    config = config_of(squares, rule)
    result = evaluate_weak_labels(config)
    masks = sorted((squares / "target_val" / "masks").iterdir())
    truth = np.stack([np.array(Image.open(path)) for path in masks])[:, 8:]  # the upper quarter is open
    said = np.zeros_like(truth)
    said[:, :, 16:] = 1
    known = truth != 255
    overlap = [
        ((said == k) & (truth == k) & known).sum() / (((said == k) | (truth == k)) & known).sum() for k in (0, 1)
    ]
    assert result.metrics[f"class_iou/target_val/{config.class_names[0]}"] == pytest.approx(overlap[0])
    assert result.metrics["iou/target_val"] == pytest.approx(np.mean(overlap))
    assert result.metrics[f"share/target_val/{config.class_names[1]}"] == pytest.approx((said == 1)[known].mean())
    assert result.metrics["weak_labels/open"] == pytest.approx(0.25, abs=0.02)
    assert not any(name.startswith(("ap/", "map/", "loss/")) for name in result.metrics)


def test_masks_for_scored_images_join_no_training(squares, rule):
    config = config_of(squares, rule, domain_adaptation__companions=["weak_labels"])
    found = find_data(config, (TARGET_WEAK, TARGET_VAL)).read()
    weak, val = found.sets[TARGET_WEAK], found.sets[TARGET_VAL]
    assert {Path(sample.image).parent.parent.name for sample in weak.samples} == {"target"}
    assert all("rule" not in str(sample.mask) for sample in val.samples)


def test_the_arm_needs_a_mask_for_every_scored_image(squares, rule, tmp_path):
    assert find_weak_labels(config_of(squares, rule)) == [TARGET_VAL]
    assert find_weak_labels(config_of(squares, rule, ("target",))) == []
    for name in sorted((rule / "target_val").iterdir())[1:]:
        (tmp_path / name.name).write_bytes(name.read_bytes())
    some = [entry(squares, rule, "target")] + [
        {"images": str(squares / "target_val" / "images" / name.name), "masks": str(name)}
        for name in tmp_path.iterdir()
    ]
    config = load_config(None, small_settings(squares) | {"data.target.weak_labels": some})
    assert find_weak_labels(config) == []
    with pytest.raises(
        InputError, match=r"arms\.mine scores weak labels, but .*weak_labels does not have a mask for every"
    ):
        arms_of(CompareConfig(arms={"mine": {"kind": "masks"}, "DANN": {}}), config)
    with pytest.raises(InputError, match="nothing to score; add them there"):
        evaluate_weak_labels(config)


def test_the_ladder_has_the_rule_as_a_rung_and_it_needs_no_source_model(squares, rule):
    config = config_of(squares, rule)
    settings = CompareConfig(arms={name: dict(arm) for name, arm in NAMED_ARMS["ladder"].items()})
    arms, _ = arms_of(settings, config)
    assert [arm.name for arm in arms if arm.kind == "masks"] == ["rule alone"]
    cells = cells_of([arm for arm in arms if arm.kind in ("masks", "source_only")], [0, 1], config, None)
    own = [cell for cell in cells if cell.arm.kind == "masks"]
    assert [(cell.job, cell.needs_source) for cell in own] == [("evaluate", False)] * 2
    other = config_of(squares, rule, ("target_val",))
    same = cells_of([cell.arm for cell in own[:1]], [0], other, None)
    assert same[0].digest != own[1].digest
    arms, notes = arms_of(settings, config_of(squares, rule, ("target",)))
    assert "rule alone" not in [arm.name for arm in arms]
    assert any(
        note.startswith("Left out: rule alone, as data.target.weak_labels does not have a mask for every")
        for note in notes
    )


def test_a_note_says_what_a_network_adds_to_the_rule_that_it_was_trained_on():
    arms = [Arm("rule alone", "masks"), Arm("weak labels", "adapted"), Arm("better", "adapted"), Arm("DANN", "adapted")]
    values = {
        "rule alone": [0.6, 0.6, 0.6],
        "weak labels": [0.59, 0.6, 0.58],
        "better": [0.7, 0.71, 0.72],
        "DANN": [0.5, 0.5, 0.5],
    }
    scores = {name: dict(enumerate(of_seeds)) for name, of_seeds in values.items()}
    tags = {"weak labels": {"dann.companions": "weak_labels"}, "better": {"dann.companions": "entropy, weak_labels"}}
    open_share = {"rule alone": {"weak_labels/open": 0.125}}
    runs = [
        ArmRun(name, seed, f"{name}{seed}", open_share.get(name, {}), {}, tags.get(name, {}), False)
        for name in scores for seed in range(3)
    ]  # fmt: skip
    notes = list(rule_notes(arms, runs, scores))
    assert len(notes) == 2
    assert "leave up to 12.5 % of the labeled pixels" in notes[0]
    assert notes[1].startswith("weak labels is -1.0 points against rule alone")
    assert not list(rule_notes(arms[1:], runs, scores))
