"""Weak target labels in training: the companion's equation, what it sees, what is refused, and how such runs are marked."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import read_sets, small_settings
from PIL import Image
from test_resume import Killed, Noise, assert_same, killed, settings

from dann_experiments import InputError, load_config
from dann_experiments.__main__ import main
from dann_experiments.adaptation.build import load_own_method
from dann_experiments.adaptation.companions.companion import WithCompanions
from dann_experiments.adaptation.companions.weak_labels import WeakLabels
from dann_experiments.adaptation.dann import LambdaZero, SourceOnly
from dann_experiments.adaptation.method import Progress, StepOutputs
from dann_experiments.comparison.arms import arms_of, cells_of
from dann_experiments.config import Config, config_to_yaml
from dann_experiments.config.comparison import NAMED_ARMS, CompareConfig
from dann_experiments.data.samples import Sample
from dann_experiments.data.weak_masks import with_masks_of
from dann_experiments.jobs import adapt, check_data
from dann_experiments.jobs.build import find_data, make_loaders
from dann_experiments.jobs.identity import run_digest
from dann_experiments.names import TARGET_TRAIN, TARGET_WEAK
from dann_experiments.training.batch_size import step_fits
from dann_experiments.training.module import AdaptationModule

FIRST = Progress(0, 1, 0, 10)
COMPANION = {"domain_adaptation.companions": ["weak_labels"]}


@pytest.fixture(scope="session")
def weak(squares, tmp_path_factory) -> Path:
    """Masks of the images in `squares`/target: class 1 in the right half, the upper quarter ignored."""
    folder = tmp_path_factory.mktemp("weak")
    mask = np.zeros((32, 32), np.uint8)
    mask[:, 16:] = 1
    mask[:8] = 255
    for image in (squares / "target" / "images").iterdir():
        Image.fromarray(mask).save(folder / f"{image.stem}.png")
    return folder


def entry_of(squares: Path, masks: Path, **more: object) -> dict[str, object]:
    return {"images": str(squares / "target" / "images"), "masks": str(masks), **more}


def config_of(squares: Path, masks: Path, used: bool = True, **more: object) -> Config:
    given = small_settings(squares, **more) | {"data.target.weak_labels": [entry_of(squares, masks)]}
    return load_config(None, given | (COMPANION if used else {}))


def outputs_of(logits: torch.Tensor, labels: torch.Tensor) -> StepOutputs:
    of_source = torch.zeros(len(logits), *logits.shape[2:], dtype=torch.int64)
    return StepOutputs(
        logits, of_source, torch.ones(of_source.shape), {}, {"segmentation_head": logits}, given_weak_labels=labels
    )


# the equation


def test_the_loss_is_the_mean_of_minus_log_p_over_the_labelled_pixels():
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(3, (2, 4, 5), generator=torch.Generator().manual_seed(1))
    labels[0, :2] = 255
    chances = logits.softmax(1)
    wanted = [
        -math.log(chances[image, labels[image, row, column], row, column])
        for image in range(2) for row in range(4) for column in range(5) if labels[image, row, column] != 255
    ]  # fmt: skip
    loss, more = WeakLabels().loss(outputs_of(logits, labels), FIRST)
    assert loss.item() == pytest.approx(sum(wanted) / len(wanted), rel=1e-5)
    assert len(wanted) == 30
    assert more == {}


def test_a_batch_without_any_label_has_the_loss_0_and_no_gradient():
    logits = torch.randn(1, 2, 4, 4, requires_grad=True)
    loss, _ = WeakLabels().loss(outputs_of(logits, torch.full((1, 4, 4), 255)), FIRST)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_it_asks_for_the_masks_its_weight_is_that_of_the_source_and_it_may_rise():
    method = WithCompanions(LambdaZero("encoder", 4, hidden_size=8), [WeakLabels(ramp=0.5)])
    assert method.needs == {"target_logits", "weak_labels"}
    part = method.companions[0]
    assert isinstance(part, WeakLabels)
    assert [part.weight_at(Progress(0, 1, step, 10)) for step in (0, 2, 5, 9)] == [0, 0.4, 1, 1]


def test_no_method_without_the_need_gets_the_masks():
    outputs = StepOutputs(torch.zeros(1), torch.zeros(1), torch.zeros(1), {}, {})
    with pytest.raises(AssertionError, match="weak_labels"):
        _ = outputs.weak_labels


# what the companion and the method see


def test_the_target_s_batches_are_the_same_with_and_without_weak_labels(squares, weak):
    """So DANN with them and without them see the same pixels in the same order, cropped and turned alike."""
    more = {"data__crop_size": 16, "data__target__augmentation": "light"}
    with_them, without = (
        make_loaders(config, read_sets(config)).training()
        for config in (config_of(squares, weak, **more), config_of(squares, weak, used=False, **more))
    )
    seen = 0
    for one, other in zip(with_them["target"], without["target"], strict=True):
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["index"], other["index"])
        assert "mask" not in other
        seen += len(one["mask"])
    assert seen == 12
    assert set(with_them) == set(without) == {"source", "target"}


def test_masks_turn_and_crop_with_their_images(squares, workplace):
    """The weak masks are made of the images here, so each crop must show the same."""
    for path in (squares / "target" / "images").iterdir():
        bright = np.array(Image.open(path).convert("L")) > 100
        Path("masks").mkdir(exist_ok=True)
        Image.fromarray(bright.astype(np.uint8)).save(Path("masks") / f"{path.stem}.png")
    config = config_of(squares, workplace / "masks", data__crop_size=16, data__target__augmentation="light")
    sets = read_sets(config)
    dataset = sets.sets[TARGET_WEAK]
    for number in range(20):
        item = dataset[number % len(dataset), number]
        image = torch.from_numpy(dataset.picture(item)) * 255
        gray = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
        assert ((gray > 100) == (item["mask"] == 1)).float().mean() > 0.98


def test_only_batches_hold_the_masks_so_that_nothing_scores_or_draws_them_as_truth(squares, weak):
    config = config_of(squares, weak, data__target__val=[], data__target__test=[])
    sets = read_sets(config)
    assert sets.sets[TARGET_WEAK].has_masks
    assert not sets.sets[TARGET_TRAIN].has_masks
    (target,) = [one for one in sets.domains if one.role == "target"]
    held_out, shown = sets.held_out(target), sets.shown(target)
    assert held_out is not None
    assert shown is not None
    assert "mask" not in held_out[0]
    assert "mask" not in shown[0]


def test_images_without_a_weak_mask_are_ignored_and_stay_in_the_batches(squares, weak):
    names = sorted(path.name for path in (squares / "target" / "images").iterdir())
    config = load_config(None, small_settings(squares) | COMPANION | {
        "data.target.weak_labels": [entry_of(squares, weak, names=names[:4])]
    })  # fmt: skip
    dataset = read_sets(config).sets[TARGET_WEAK]
    assert len(dataset) == 13
    labelled = [bool((dataset[index]["mask"] != 255).any()) for index in range(13)]
    assert labelled == [True] * 4 + [False] * 9


def test_a_mask_belongs_to_every_region_of_its_image_and_to_a_named_one_alone():
    image, mask, left, right = Path("a.png"), Path("m.png"), (0, 0, 4, 8), (4, 0, 8, 8)
    samples = [Sample(image, None, left), Sample(Path("b.png"), None), Sample(image, None, right)]
    whole = with_masks_of(samples, [Sample(image, mask)], "weak", "train")
    assert [one.mask for one in whole] == [mask, None, mask]
    named = with_masks_of(samples, [Sample(image, mask, right)], "weak", "train")
    assert [one.mask for one in named] == [None, None, mask]
    with pytest.raises(InputError, match=r"region \[0, 0, 2, 2\], which train does not have; leave region out"):
        with_masks_of(samples, [Sample(image, mask, (0, 0, 2, 2))], "weak", "train")
    with pytest.raises(InputError, match=r"image c\.png is not in train, whose images these masks belong to; add it"):
        with_masks_of(samples, [Sample(Path("c.png"), mask)], "weak", "train")


def test_several_target_domains_have_masks_of_their_own(squares, weak):
    names = sorted(path.name for path in (squares / "target" / "images").iterdir())
    images = str(squares / "target" / "images")

    def domain(chosen: list[str]) -> dict[str, object]:
        return {"train": [{"images": images, "names": chosen}], "weak_labels": [entry_of(squares, weak, names=chosen)]}

    given = small_settings(squares, data__target__train=[], data__target__val=[], data__target__test=[])
    given |= {"data.target.domains": {"one": domain(names[:6]), "two": domain(names[6:])}, "monitor.metric": None}
    config = load_config(None, given | COMPANION)
    batch = next(iter(make_loaders(config, read_sets(config)).training()["target"]))
    assert batch["mask"].shape == batch["image"][:, 0].shape
    assert set(batch["domain"].tolist()) == {1, 2}
    given["data.target.domains"] = {"one": domain(names[:6]), "two": domain(names[6:]) | {"weak_labels": []}}
    with pytest.raises(InputError, match=r"data\.target\.domains\.two\.weak_labels lists no images"):
        load_config(None, given | COMPANION)


def test_the_largest_batch_size_can_be_tried(squares):
    def make(network, method):
        return AdaptationModule(network, method, [], torch.optim.SGD)

    class Direct(WithCompanions):
        def loss(self, outputs, progress):
            assert outputs.weak_labels.shape == (2, 8, 8)
            return self.method.loss(outputs, progress)

    shape = torch.Size([3, 8, 8])
    method = Direct(SourceOnly(), [WeakLabels()])
    shapes, sizes = {"source": shape, "target": shape}, {"source": 2, "target": 2}
    assert step_fits(make, torch.nn.Conv2d(3, 2, 1), method, shapes, sizes, torch.device("cpu"))  # pyright: ignore


# refused


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (COMPANION, r"companions has weak_labels, but data\.target\.weak_labels lists no images; name images of data\.target"),
        ({"data.source.weak_labels": ["x"]}, r"data\.source\.weak_labels is for the target"),
        (COMPANION | {"data.target.weak_labels": ["target"]}, r"data\.target\.weak_labels.* needs one per image"),
        (COMPANION | {"data.target.weak_labels": ["target_val"]}, r"is not in data\.target\.train, whose images these"),
        ({"data.target.weak_labels": [{"masks": "x"}]}, r"data\.target\.weak_labels has the entry .*; a mapping takes"),
        ({"domain_adaptation.companions": [{"name": "weak_labels", "threshold": 0.5}], "data.target.weak_labels": ["x"]},
         r"companions\[0\]\.threshold is 0\.5, but weak_labels has no threshold"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_told(squares, workplace, changes, told):
    with pytest.raises(InputError, match=told):
        find_data(load_config(None, small_settings(squares) | changes))


class NeedsThem(LambdaZero):
    """A method of a user's own that asks for weak labels."""

    needs = frozenset({"weak_labels"})


def test_a_method_of_one_s_own_that_asks_for_them_is_told_that_only_the_companion_gets_them():
    with pytest.raises(InputError, match=r"NeedsThem', which needs weak_labels; only the companion weak_labels"):
        load_own_method(f"{__name__}.NeedsThem", {}, {})


def test_the_command_ends_with_2_and_writes_nothing(squares, workplace, capsys):
    Path("c.yaml").write_text(config_to_yaml(load_config(None, small_settings(squares))))
    words = ["adapt", "--config", "c.yaml", "--domain_adaptation.companions", "[weak_labels]"]
    assert main(words) == 2
    assert "data.target.weak_labels lists no images" in capsys.readouterr().err


def test_masks_of_another_size_or_with_unknown_ids_are_told_as_others_are(squares, weak, workplace):
    shutil.copytree(weak, "weak")
    first, second = sorted(Path("weak").iterdir())[:2]
    Image.fromarray(np.zeros((16, 32), np.uint8)).save(first)
    Image.fromarray(np.full((32, 32), 7, np.uint8)).save(second)
    config = config_of(squares, workplace / "weak")
    with pytest.raises(InputError, match=f"{first.name}"):
        find_data(config)
    problems = " ".join(check_data(config).problems)
    assert first.name in problems
    assert second.name in problems


# unused


def test_unused_weak_labels_change_no_digest_and_no_number(squares, weak, pretrained_place):
    plain = load_config(None, small_settings(squares, trainer__max_epochs=1))
    unused = config_of(squares, weak, used=False, trainer__max_epochs=1)
    used = config_of(squares, weak, trainer__max_epochs=1)
    digests = {name: find_data(config).digests for name, config in (("plain", plain), ("unused", unused))}
    assert digests["plain"] == digests["unused"]
    for job in ("adapt", "pretrain", "evaluate"):
        assert run_digest(job, plain, digests["plain"], "x") == run_digest(job, unused, digests["unused"], "x")
    assert run_digest("adapt", used, find_data(used).digests, "x") != run_digest("adapt", plain, digests["plain"], "x")
    one, other = adapt(plain), adapt(unused)
    pd.testing.assert_frame_equal(_series(one), _series(other))


def _series(result) -> pd.DataFrame:
    history = result.history()
    known = history[~history["metric"].str.startswith(("time/", "system/"))]
    return known[["metric", "step", "value"]].sort_values(["metric", "step"]).reset_index(drop=True)


def test_other_masks_make_another_run(squares, weak, workplace):
    shutil.copytree(weak, "weak")
    before = find_data(config_of(squares, workplace / "weak")).digests
    changed = sorted(Path("weak").iterdir())[0]
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(changed)
    after = find_data(config_of(squares, workplace / "weak")).digests
    assert {name for name in before if before[name] != after[name]} == {"target_weak_labels"}


def test_a_run_that_does_not_use_them_says_so_in_one_line(squares, weak, pretrained_place, caplog):
    adapt(config_of(squares, weak, used=False, trainer__max_epochs=1))
    said = [one.getMessage() for one in caplog.records if "weak_labels" in one.getMessage()]
    assert said == [
        "data.target.weak_labels is not used, because domain_adaptation.companions has no weak_labels; add it to train on "
        "these masks."
    ]


# in runs


def test_a_run_learns_the_masks_and_is_marked_everywhere(squares, weak, pretrained_place, capsys):
    """The masks say right half; a network trained on them with a large weight puts class 1 there."""
    config = config_of(squares, weak, trainer__max_epochs=3, optimizer__lr=3e-3)
    result = adapt(config)
    run = mlflow.MlflowClient(result.tracking_uri).get_run(result.run_id)
    tags = run.data.tags
    assert (tags["dann.weak_labels"], tags["dann.companions"]) == ("true", "weak_labels")
    assert tags["dann.selected_with_target_labels"] == "false"
    assert "dann.target_labels" not in tags
    assert "weak target labels" in tags["mlflow.note.content"]
    assert run.info.run_name == "DANN + weak labels target seed 0"
    history = result.history().query("metric == 'da_part/weak_labels'").sort_values("step")["value"].to_numpy()
    assert history[-3:].mean() < history[:3].mean()
    assert run.inputs is not None
    assert any(one.dataset.name == "target weak_labels" for one in run.inputs.dataset_inputs)
    (file,) = [path for path in Path("mlruns").rglob("README.md") if result.run_id in path.read_text()]
    card = file.read_text()
    assert "trained on weak target labels" in card
    assert "No target labels were used to train it" not in card
    capsys.readouterr()
    assert main(["runs"]) == 0
    assert "DANN (uses weak target labels)" in " ".join(capsys.readouterr().out.split())


def test_a_source_model_is_not_marked(squares, weak, workplace):
    from dann_experiments import pretrain

    result = pretrain(config_of(squares, weak, pretraining__max_epochs=1))
    tags = mlflow.MlflowClient(result.tracking_uri).get_run(result.run_id).data.tags
    assert "dann.weak_labels" not in tags


def test_check_data_shows_the_set_used_or_not(squares, weak, workplace):
    for used in (True, False):
        config = config_of(squares, weak, used=used)
        report = check_data(config)
        assert report.problems == []
        row = report.counts.loc["target_weak_labels"]
        assert row["images"] == 13
        assert row["not labelled"] == pytest.approx(0.25)
        assert row[list(config.class_names)].tolist() == [0.5, 0.5]


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(workplace, squares, weak):
    more = {
        "domain_adaptation__companions": "[{name: weak_labels, ramp: 0.5}]",
        "data__target__weak_labels": [entry_of(squares, weak)],
    }
    uninterrupted = adapt(settings(squares, workplace / "whole", **more), [Noise()])
    config = settings(squares, workplace / "killed", **more, trainer__checkpoint_every_n_steps=1)
    killed("adapt", config, Noise(), Killed("on_train_batch_start", 3))
    assert_same(adapt(config, [Noise()], resume="auto"), uninterrupted)


@pytest.mark.slow
def test_two_processes_use_them_too(squares, weak, pretrained_place):
    result = adapt(config_of(squares, weak, trainer__max_epochs=1, trainer__devices=2))
    assert math.isfinite(result.metrics["iou/target_val"])


# in comparisons


def ladder() -> CompareConfig:
    return CompareConfig(arms={name: dict(arm) for name, arm in NAMED_ARMS["ladder"].items()}, seeds=1)


def test_the_ladder_has_their_rungs_only_where_there_are_masks(squares, weak):
    rungs = ["weak labels", "DANN + weak labels"]
    arms, notes = arms_of(ladder(), load_config(None, small_settings(squares)))
    assert not {arm.name for arm in arms} & set(rungs)
    assert "Left out: rule alone, weak labels, DANN + weak labels, as data.target.weak_labels lists no masks." in notes
    arms, notes = arms_of(ladder(), config_of(squares, weak, used=False))
    assert [arm.name for arm in arms if "weak" in arm.name] == rungs
    assert not any("weak" in note and note.startswith("No ") for note in notes)


def test_other_arms_have_the_digests_that_they_have_without_the_masks_and_their_own_depend_on_them(
    squares, weak, workplace
):
    oracle = [{"images": "target_val/images", "masks": "target_val/masks"}]
    shutil.copytree(weak, "others")
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(sorted(Path("others").iterdir())[0])
    of = {}
    for name, config in (
        ("without", load_config(None, small_settings(squares, data__oracle=oracle))),
        ("with", config_of(squares, weak, used=False, data__oracle=oracle)),
        ("with others", config_of(squares, workplace / "others", used=False, data__oracle=oracle)),
    ):
        arms, _ = arms_of(ladder(), config)
        of[name] = {cell.arm.name: cell.digest for cell in cells_of(arms, [0], config, None)}
    own = {name: digest for name, digest in of["with"].items() if "weak" not in name}
    assert own == of["without"]
    assert len(set(of["with"].values())) == len(of["with"]) == len(own) + 2
    changed = {name for name, digest in of["with others"].items() if digest != of["with"][name]}
    assert changed == {"weak labels", "DANN + weak labels"}


@pytest.mark.slow
def test_one_comparison_says_what_they_and_the_adversary_add(squares, weak, workplace, capsys):
    Path("c.yaml").write_text(config_to_yaml(config_of(squares, weak, used=False, trainer__max_epochs=1)))
    Path("arms.yaml").write_text(
        "arms:\n  lambda = 0 control: {kind: control}\n  DANN: {}\n"
        "  weak labels: {domain_adaptation: {method: {name: lambda_zero}, companions: [weak_labels]}}\n"
        "  DANN + weak labels: {domain_adaptation: {companions: [weak_labels]}}\n"
    )
    assert main(["compare", "--config", "c.yaml", "--arms", "arms.yaml", "--seeds", "1", "--workers", "1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "weak labels and DANN + weak labels use weak target labels, masks that are not truth" in said
    (table,) = Path("mlruns").rglob("parts.csv")
    assert set(pd.read_csv(table)["part"]) == {"adversary", "weak_labels"}
