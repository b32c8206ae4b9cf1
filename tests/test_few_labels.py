"""A few labelled target images: their labels join the segmentation loss of DANN and of the control alike."""

from __future__ import annotations

from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from conftest import read_sets, small_settings
from torch import nn

from dann_experiments import InputError, load_config
from dann_experiments.__main__ import main
from dann_experiments.adaptation.dann import SourceOnly
from dann_experiments.adaptation.method import StepOutputs
from dann_experiments.comparison.label_curve import compare_labels
from dann_experiments.config import Config, config_to_yaml, replace
from dann_experiments.config.comparison import CompareConfig
from dann_experiments.jobs import RunResult, adapt, check_data
from dann_experiments.jobs.build import find_data, make_loaders
from dann_experiments.jobs.identity import run_digest, source_digest
from dann_experiments.names import TARGET_LABELLED
from dann_experiments.training.module import AdaptationModule

LABELLED = {"data.target.train_labelled": ["target_val"], "data.target.val": ["target_test"], "data.target.test": []}


def config_of(root: Path, **more: object) -> Config:
    return load_config(
        None, small_settings(root) | LABELLED | {key.replace("__", "."): value for key, value in more.items()}
    )


def test_the_loss_is_the_mean_over_the_pixels_of_both():
    torch.manual_seed(0)
    network = nn.Conv2d(3, 2, 1)
    module = AdaptationModule(network, SourceOnly(), [], torch.optim.SGD)
    images, masks = torch.randn(3, 3, 4, 4), torch.randint(2, (3, 4, 4))
    masks[0, :2] = 255
    logits = network(images[:2])
    outputs = StepOutputs(logits, masks[:2], (masks[:2] != 255).float(), {}, {})
    found, _ = module.segmentation(*module._supervised(outputs, {"image": images[2:], "mask": masks[2:]}))
    expected = nn.functional.cross_entropy(network(images), masks, ignore_index=255)
    assert torch.allclose(found, expected)


def test_images_of_another_size_than_the_source_s_are_taken():
    network = nn.Conv2d(3, 2, 1)
    module = AdaptationModule(network, SourceOnly(), [], torch.optim.SGD)
    outputs = StepOutputs(
        network(torch.randn(2, 3, 4, 4)), torch.ones(2, 4, 4, dtype=torch.int64), torch.ones(2, 4, 4), {}, {}
    )
    logits, labels = module._supervised(
        outputs, {"image": torch.randn(1, 3, 6, 2), "mask": torch.zeros(1, 6, 2, dtype=torch.int64)}
    )
    assert logits.shape == (1, 2, 44, 1)
    assert labels.sum() == 32


@pytest.mark.parametrize(("batchnorm", "moves"), [("separate", True), ("source_only", False)])
def test_labelled_target_images_move_statistics_as_target_images_do(batchnorm, moves):
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))
    module = AdaptationModule(network, SourceOnly(), [], torch.optim.SGD, batchnorm=batchnorm)
    outputs = StepOutputs(torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64), torch.ones(1, 4, 4), {}, {})
    module._supervised(outputs, {"image": torch.randn(2, 3, 4, 4) + 5, "mask": torch.zeros(2, 4, 4, dtype=torch.int64)})
    assert bool(dict(network.named_buffers())["0.running_mean"].any()) == moves


def tags(result: RunResult) -> dict[str, str]:
    return mlflow.MlflowClient(result.tracking_uri).get_run(result.run_id).data.tags


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dann", "lambda_zero", "source_only"])
def test_every_method_learns_from_the_labels_and_the_run_says_so(squares, pretrained_place, method):
    """The target's labels are turned round: a network that learns from them gets worse on the source's kind of labels."""
    more: dict[str, object] = {"domain_adaptation__method__name": method, "trainer__max_epochs": 1}
    without = adapt(config_of(squares, data__target__labelled_count=0, **more))
    result = adapt(config_of(squares, data__target__labelled_count=2, **more))
    assert "dann.target_labels" not in tags(without)
    assert tags(result)["dann.target_labels"] == "2"
    first = [
        one.history().query("metric == 'loss/train_seg' and step == 0")["value"].item() for one in (without, result)
    ]
    assert first[0] != first[1]
    inputs = mlflow.MlflowClient(result.tracking_uri).get_run(result.run_id).inputs
    assert inputs is not None
    assert any(one.dataset.name.endswith("train_labelled") for one in inputs.dataset_inputs)


def test_the_first_images_are_used_each_step_has_its_own_batch(squares):
    config = config_of(squares, data__target__labelled_count=3, data__target__labelled_batch_size=2)
    sets = read_sets(config)
    all_of_them = read_sets(config_of(squares)).sets[TARGET_LABELLED]
    assert [one.image for one in sets.sets[TARGET_LABELLED].samples] == [one.image for one in all_of_them.samples[:3]]
    loader = make_loaders(config, sets).training()["labelled"]
    batch = next(iter(loader))
    assert batch["image"].shape[0] == batch["mask"].shape[0] == 2


def test_labelled_images_may_be_among_all_target_images_but_not_among_the_scored_ones(squares, workplace):
    labelled = {"images": "target_val/images", "masks": "target_val/masks"}
    fine = config_of(squares, data__target__train=["target", {"images": "target_val/images"}])
    assert check_data(fine).problems == []
    scored = config_of(squares, data__target__train_labelled=[labelled], data__target__val=["target_val"])
    problems = check_data(scored).problems
    assert problems
    assert all("target_val" in text for text in problems)


def test_runs_differ_by_the_number_of_labels_and_source_models_do_not(squares):
    digests = {}
    for count in (0, 2, 3):
        config = config_of(squares, data__target__labelled_count=count)
        data = find_data(config)
        digests[count] = run_digest("adapt", config, data.digests, "x"), source_digest(config, data.digests)
        names = [name for name in data.digests if name not in ("target_train", "target_train_labelled")]
        of_source = run_digest("pretrain", config, {name: data.digests[name] for name in names})
        assert digests.setdefault("pretrain", of_source) == of_source
    assert len({digests[count][0] for count in (0, 2, 3)}) == 3
    assert len({digests[count][1] for count in (0, 2, 3)}) == 1


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data.source.train_labelled": ["x"]}, r"data\.source\.train_labelled is for the target"),
        ({"data.target.train_labelled": [], "data.target.labelled_count": 2}, r"labelled_count has no effect"),
        ({"data.target.labelled_count": -1}, r"data\.target\.labelled_count is -1"),
        ({"data.target.labelled_count": 50}, r"labelled_count is 50, but data\.target\.train_labelled has 5 images"),
        ({"data.target.train_labelled": ["target"]}, r"data\.target\.train_labelled"),  # has no masks
    ],
)
def test_wrong_settings_are_told(squares, workplace, changes, told):
    with pytest.raises(InputError, match=told):
        find_data(replace(config_of(squares), changes))


def test_a_resumable_position_is_kept_for_the_labelled_images_too(squares):
    config = config_of(squares)
    loaders = make_loaders(config, read_sets(config)).training()
    orders = [np.array([index for index, _ in loader.sampler][:5]) for loader in loaders.values()]  # pyright: ignore
    assert set(loaders) == {"source", "target", "labelled"}
    assert len(orders[2]) == 5


@pytest.mark.slow
def test_one_command_shows_the_curve_over_the_number_of_labels(squares, workplace, capsys):
    """0 and 2 labels: arms that use none are made once, each number has its own control and verdict."""
    (workplace / "c.yaml").write_text(config_to_yaml(config_of(squares, data__target__labelled_count=None)))
    words = ["compare", "--config", "c.yaml", "--labelled", "[0, 2]", "--seeds", "2", "--workers", "1"]
    assert main([*words, "--trainer.max_epochs", "1"]) == 0
    printed = capsys.readouterr().out
    assert "by labeled target images" in printed
    client = mlflow.MlflowClient()
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()])
    names = [run.info.run_name for run in runs]
    made = {
        "source only target seed 0": 1,
        "DANN target 0 labels seed 1": 1,
        "DANN target 2 labels seed 1": 1,
        "lambda = 0 control target 2 labels seed 0": 1,
        "compare target 2 labels": 1,
    }
    for expected, times in made.items():
        assert names.count(expected) == times, (expected, names)
    (curve,) = [run for run in runs if str(run.info.run_name).startswith("Target labels")]
    folder = Path(str(curve.info.artifact_uri))
    rows = (folder / "tables" / "labels.csv").read_text().splitlines()
    assert rows[0] == "labels,arm,kind,metric,n,mean,std,verdict"
    assert [row.split(",")[0] for row in rows[1:]] == ["0"] * 4 + ["2"] * 4
    assert (folder / "figures" / "labels.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"labelled": [0, 50]}, r"labelled_count is 50, but data\.target\.train_labelled has 5 images"),
        ({"labelled": [1, 1]}, r"labelled is \[1, 1\]; give different numbers"),
        ({"labelled": [-1]}, r"labelled is \[-1\]"),
        ({"labelled": [1], "runs": ["x"]}, r"labelled has no effect with runs"),
    ],
)
def test_wrong_numbers_of_labels_are_told_before_anything_is_trained(squares, workplace, changes, told):
    with pytest.raises(InputError, match=told):
        compare_labels(config_of(squares), CompareConfig(**changes))
