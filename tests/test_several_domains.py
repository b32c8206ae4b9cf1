"""Several named source and target domains: one class of the domain classifier each, and scores of each."""

from __future__ import annotations

import math
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from conftest import made_once, read_sets, small_settings, write_domain
from torch.nn import functional

from dann_experiments import InputError, load_config
from dann_experiments.adaptation.dann import DANNMethod, LambdaZero
from dann_experiments.adaptation.domain_classifier import DomainClassifier
from dann_experiments.adaptation.method import Progress, StepOutputs
from dann_experiments.comparison.compare import compare
from dann_experiments.config import Config, config_to_dict, config_to_yaml, replace
from dann_experiments.config.comparison import CompareConfig
from dann_experiments.config.parsing import config_from_dict
from dann_experiments.config.prediction import PredictConfig
from dann_experiments.jobs import RunResult, adapt, check_data, evaluate, predict
from dann_experiments.jobs.build import make_loaders
from dann_experiments.names import SOURCE_TRAIN, TARGET_TRAIN, OneDomain, SetName
from dann_experiments.training.alignment_text import explain
from dann_experiments.training.scoring import Scores, metrics_of_sets

NO_LISTS = {f"data.{one}": [] for one in ("source.train", "source.val", "target.train", "target.val", "target.test")}
TWO_OF_EACH = {
    "data.source.domains": {
        "summer": {"train": ["source"], "val": ["source_val"]},
        "winter": {"train": ["second"], "val": ["second_val"], "value_map": {0: "ground", 7: "square"}},
    },
    "data.target.domains": {
        "north": {"train": ["target"], "val": ["target_val"], "test": ["target_test"]},
        "south": {"train": ["gray"], "val": ["gray_val"]},
    },
}
NAMES = ["source.summer", "source.winter", "target.north", "target.south"]


@pytest.fixture(scope="session")
def domains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of `squares`, a second source (its masks hold 7 for a square) and a second target."""
    from conftest import squares_in
    from PIL import Image

    def make(root: Path) -> None:
        squares_in(root)
        for name, count, seed in (("second", 3, 6), ("second_val", 2, 7)):
            for path in (write_domain(root / name, count, seed) / "masks").glob("*.png"):
                Image.fromarray(np.asarray(Image.open(path)) * 7).save(path)
        write_domain(root / "gray", 4, seed=8, masks=False)
        write_domain(root / "gray_val", 3, seed=9)
        write_domain(root / "gray_oracle", 3, seed=10)

    return made_once(tmp_path_factory, "domains", make)


def config_of(root: Path, **more: object) -> Config:
    return load_config(
        None, small_settings(root) | NO_LISTS | TWO_OF_EACH | {key.replace("__", "."): one for key, one in more.items()}
    )


@pytest.fixture(scope="session")
def adapted(domains: Path, new_store, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """One adaptation of two sources to two targets."""
    folder = tmp_path_factory.mktemp("adapted")
    new_store(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = config_of(
            domains, tracking__uri=f"sqlite:///{folder}/mlflow.db", tracking__folder=str(folder / "runs")
        )
        return adapt(config)


# ---- settings


def test_a_named_domain_has_the_settings_of_its_group_but_for_its_own(domains):
    config = config_of(domains, data__source__augmentation="light", data__source__bands=[1, 2, 3])
    summer, winter = (config.data.domains[OneDomain("source", name)] for name in ("summer", "winter"))
    assert summer.augmentation == winter.augmentation == "light"
    assert winter.bands == [1, 2, 3]
    assert winter.value_map == {0: "ground", 7: "square"}
    assert summer.value_map is None
    assert [str(one) for one in config.data.domains] == NAMES


def test_a_preset_may_be_shared_and_the_scene_differ():
    named = {"urban": {"scene": "Urban"}, "rural": {"scene": "Rural"}}
    config = load_config(
        None,
        {"data.source.preset": "loveda", "data.source.domains": named, "model.classes": 7, "data.embedded.name": None},
    )
    urban, rural = (config.data.domains[OneDomain("source", name)].train[0] for name in named)
    assert urban != rural
    assert "Urban" in str(urban)


def test_settings_survive_a_file_and_digests_of_one_domain_do_not_change(domains):
    config = config_of(domains)
    assert config_from_dict(config_to_dict(config)) == config
    path = domains.parent / f"{domains.name}.yaml"
    path.write_text(config_to_yaml(config))
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data.source.train": ["source"]}, r"data\.source\.train and data\.source\.domains are both set"),
        ({"data.source.batch_size": 1}, r"data\.source\.batch_size is 1, fewer than the 2 domains"),
        ({"data.source.domains": {"a b": {}}}, r"data\.source\.domains has the name 'a b'"),
        (
            {"data.source.domains": {"a": {"batch_size": 2}}},
            r"data\.source\.domains\.a\.batch_size cannot be set for one",
        ),
        ({"data.source.domains": {"a": {"trian": []}}}, r"data\.source\.domains\.a: unknown setting 'trian'"),
        ({"data.source.domains": {"a": None}}, r"data\.source\.domains\.a is None; give a mapping"),
        ({"data.source.domains": ["a"]}, r"data\.source\.domains is \['a'\]"),
        ({"data.source.domains": {"a": {"bands": [0, 1, 2]}}}, r"data\.source\.domains\.a\.bands is \[0, 1, 2\]"),
        (
            {"data.source.domains": {"a": {"value_map": {"x": "ground"}}}},
            r"data\.source\.domains\.a\.value_map has the key",
        ),
        ({"data.source.domains": {"a": {"val": ["source_val"]}}}, r"data\.source\.domains\.a\.train is empty"),
        ({"data.oracle": ["target_val"]}, r"data\.oracle is a list, but the target has the domains"),
        ({"data.oracle": {"east": ["target_val"]}}, r"data\.oracle names the domain 'east'; those of the target are"),
        ({"monitor.metric": "iou/target_val.east"}, r"monitor\.metric is 'iou/target_val\.east'"),
    ],
)
def test_wrong_settings_are_told(domains, workplace, changes, told):
    with pytest.raises(InputError, match=told):
        read_sets(load_config(None, small_settings(domains) | NO_LISTS | TWO_OF_EACH | changes))


# ---- data


def test_each_batch_holds_equally_many_images_of_each_domain_with_their_labels(domains):
    loaders = make_loaders(config_of(domains, data__target__batch_size=4), read_sets(config_of(domains)))
    training = loaders.training()
    for role, labels in (("source", [0, 0, 1, 1]), ("target", [2, 2, 3, 3])):
        for batch in training[role]:
            assert sorted(batch["domain"].tolist()) == labels
    order = [index for index, _ in training["source"].sampler]
    assert len(order) == 13
    assert set(order) == set(range(10)) - (set(range(10)) - set(order)) | {
        10,
        11,
        12,
    }  # all three of winter, some of summer


def test_on_several_ranks_each_rank_gets_every_domain(domains):
    from dann_experiments.data.loaders import SeededOrder

    dataset = read_sets(config_of(domains)).get(SOURCE_TRAIN)
    assert dataset is not None
    whole = [index for index, _ in SeededOrder(dataset, 0)][:12]
    of_ranks = [[index for index, _ in SeededOrder(dataset, 0, (rank, 2))] for rank in range(2)]
    for own in of_ranks:
        assert [index >= 10 for index in own[:4]] == [False, True, False, True]
    assert sorted(whole) == sorted(of_ranks[0] + of_ranks[1])


def test_an_order_can_be_resumed_in_the_middle(domains):
    from dann_experiments.data.loaders import SeededOrder

    dataset = read_sets(config_of(domains)).get(SOURCE_TRAIN)
    assert dataset is not None
    order, later = SeededOrder(dataset, 3), SeededOrder(dataset, 3)
    passes = [list(order), list(order)]
    assert passes[0] != passes[1]
    again = SeededOrder(dataset, 3)
    list(again)
    iterator = iter(again)
    [next(iterator) for _ in range(5)]
    later.go_on_from(again.position(5), 0)
    assert list(later) == passes[1][5:]


def test_each_domain_is_read_by_its_own_rules(domains):
    sets = read_sets(config_of(domains))
    joined = sets.get(SOURCE_TRAIN)
    assert joined is not None
    items = [joined[index] for index in range(len(joined))]
    assert all(set(item["mask"].unique().tolist()) == {0, 1} for item in items)
    assert [int(item["index"]) for item in items] == list(range(13))
    assert joined.name_of(11).startswith(str(domains / "second"))
    assert joined.count_classes()[0].sum() == 13 * 32 * 32
    assert sets.sets[SetName("target", "train", "north")].samples[0].mask is None
    assert len(sets.get(TARGET_TRAIN) or ()) == 17


def test_images_are_batched_if_only_one_domain_lacks_data(domains):
    config = config_of(domains, data__crop_size=32)
    config = replace(config, {"data.source.domains": {
        "summer": {"train": ["source"], "val": ["source_val"], "nodata": 7},
        "winter": TWO_OF_EACH["data.source.domains"]["winter"],
    }})  # fmt: skip
    for batch in make_loaders(config, read_sets(config)).training()["source"]:
        assert batch["valid"].shape == batch["mask"].shape


# ---- the classifier


def step(logits_of: dict[str, torch.Tensor], domains: dict[str, torch.Tensor]) -> StepOutputs:
    source, target = logits_of["source"], logits_of["target"]
    labels = torch.zeros(len(source), 2, 2, dtype=torch.int64)
    return StepOutputs(
        torch.zeros(len(source), 2, 2, 2), labels, torch.ones(len(source), 2, 2), {"encoder": source}, {"encoder": target},
        None, domains["source"], domains["target"],
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["pooled", "pixel", "patch"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_is_the_mean_of_the_mean_cross_entropies_of_the_domains(kind, masked):
    """Written out domain by domain; a domain without an image in the batch counts nowhere."""
    torch.manual_seed(0)
    method = DANNMethod("encoder", 4, classifier=kind, hidden_size=8, domains=5)
    features = {"source": torch.randn(3, 4, 8, 8), "target": torch.randn(3, 4, 8, 8)}
    labels = {"source": torch.tensor([0, 1, 0]), "target": torch.tensor([2, 4, 4])}
    outputs = step(features, labels)
    valid = (torch.rand(3, 8, 8) > 0.3).float() if masked else torch.ones(3, 8, 8)
    object.__setattr__(outputs, "source_valid", valid)
    found = method.loss(outputs, Progress(0, 1, 1, 2))
    classifier = method.classifiers[0]
    assert isinstance(classifier, DomainClassifier)
    losses, accuracies = [], []
    for side in ("source", "target"):
        for label in labels[side].unique().tolist():
            own = labels[side] == label
            counted = valid[own] if side == "source" else None
            loss, accuracy = classifier.domain_loss(features[side][own], label, counted)
            losses.append(loss)
            accuracies.append(accuracy)
    assert found.differentiated is not None
    assert torch.allclose(found.differentiated, torch.stack(losses).mean(), atol=1e-6)
    assert torch.allclose(torch.as_tensor(found.metrics["da/domain_acc"]), torch.stack(accuracies).mean(), atol=1e-6)
    assert not any(torch.as_tensor(value).requires_grad for value in found.metrics.values())  # logged later: a leak


def test_a_classifier_that_knows_nothing_has_loss_ln_d_and_accuracy_one_d_th():
    method = DANNMethod("encoder", 4, hidden_size=8, domains=4)
    for parameter in method.parameters():
        torch.nn.init.zeros_(parameter)
    outputs = step({"source": torch.randn(4, 4, 2, 2), "target": torch.randn(4, 4, 2, 2)},
                   {"source": torch.tensor([0, 1, 0, 1]), "target": torch.tensor([2, 3, 2, 3])})  # fmt: skip
    found = method.loss(outputs, Progress(0, 1, 0, 1))
    assert found.differentiated is not None
    assert found.differentiated.item() == pytest.approx(math.log(4))
    assert float(found.metrics["da/domain_acc"]) == pytest.approx(1 / 4)


def test_the_network_gets_minus_lambda_times_the_gradient_and_the_control_none():
    torch.manual_seed(0)
    given = {"source": torch.randn(2, 4, 2, 2), "target": torch.randn(2, 4, 2, 2)}
    labels = {"source": torch.tensor([0, 1]), "target": torch.tensor([2, 2])}
    gradients = []
    for kind, weight in ((DANNMethod, 0.7), (LambdaZero, 0.7), (DANNMethod, 1.4)):
        torch.manual_seed(1)
        method = kind("encoder", 4, hidden_size=8, lambda_da=weight, lambda_schedule=None, domains=3)
        features = {side: maps.clone().requires_grad_() for side, maps in given.items()}
        share = method.loss(step(features, labels), Progress(0, 1, 0, 1))
        assert share.differentiated is not None
        share.differentiated.backward()
        gradients.append(features["target"].grad)
    torch.manual_seed(1)
    classifier = DANNMethod("encoder", 4, hidden_size=8, domains=3).classifiers[0]
    features = {side: maps.clone().requires_grad_() for side, maps in given.items()}
    plain = [functional.cross_entropy(classifier(features[side][own]), labels[side][own])
             for side, own in (("source", [0]), ("source", [1]), ("target", [0, 1]))]  # fmt: skip
    torch.stack(plain).mean().backward()
    assert torch.allclose(gradients[0], -0.7 * features["target"].grad, atol=1e-7)
    assert gradients[1] is None
    assert torch.allclose(gradients[2], 2 * gradients[0], atol=1e-7)


@pytest.mark.parametrize(
    ("accuracy", "domains", "told"),
    [
        (0.5, 2, "is confused (balanced accuracy 0.50, chance is 0.50)"),
        (0.6, 2, "is confused"),
        (0.61, 2, "can still distinguish some"),
        (0.9, 2, "hardly errs"),
        (0.39, 2, "mistakes the domains for each other"),
        (0.25, 4, "is confused (balanced accuracy 0.25, chance is 0.25 for 4 domains)"),
        (0.5, 4, "can still distinguish some"),
        (0.85, 4, "hardly errs"),
        (0.1, 4, "mistakes the domains for each other"),
    ],
)
def test_the_accuracy_is_judged_against_the_chance_level_of_its_number_of_domains(accuracy, domains, told):
    assert told in explain(accuracy, None, None, domains=domains)


# ---- scores


def test_the_score_of_a_role_is_the_mean_of_its_domains():
    first, second = Scores(np.array([[3, 1], [0, 4]]), 0.1), Scores(np.array([[2, 2], [2, 2]]), 0.3)
    empty = Scores(np.zeros((2, 2), np.int64), math.nan)
    found = metrics_of_sets(
        {SetName("target", "val", name): one for name, one in (("a", first), ("b", second), ("c", empty))}, ["x", "y"]
    )
    assert found["iou/target_val"] == pytest.approx((first.iou + second.iou) / 2)
    assert found["iou/target_val.a"] == first.iou
    assert found["class_iou/target_val/y"] == pytest.approx((4 / 5 + 2 / 6) / 2)
    assert math.isnan(found["iou/target_val.c"])
    assert metrics_of_sets({SetName("target", "val"): first}, ["x", "y"]) == first.metrics("target_val", ["x", "y"])


def test_a_run_has_the_scores_of_each_domain_and_a_classifier_of_four_classes(adapted):
    for name in ("source_val.summer", "source_val.winter", "target_val.north", "target_val.south", "target_test.north"):
        assert 0 <= adapted.metrics[f"iou/{name}"] <= 1
    for role, names in (("source_val", ("summer", "winter")), ("target_val", ("north", "south"))):
        mean = np.mean([adapted.metrics[f"iou/{role}.{name}"] for name in names])
        assert adapted.metrics[f"iou/{role}"] == pytest.approx(mean)
    assert adapted.metrics["iou/target_test"] == adapted.metrics["iou/target_test.north"]
    assert 0 <= adapted.metrics["da/domain_acc_val"] <= 1
    client = mlflow.MlflowClient(adapted.tracking_uri)
    run = client.get_run(adapted.run_id)
    assert run.data.tags["dann.target"] == "north + south"
    assert "chance is 0.25 for 4 domains" in run.data.tags["dann.alignment"]
    assert "target north val IoU" in run.data.tags["mlflow.note.content"]
    inputs = {one.dataset.name for one in run.inputs.dataset_inputs}
    assert {"summer train", "winter train", "north train", "south test"} - inputs == {"south test"}
    losses = adapted.history().query("metric == 'da/domain_loss' and step == 0")["value"]
    assert losses.item() == pytest.approx(math.log(4), abs=0.4)


def test_the_model_knows_each_domain_and_predict_takes_one(adapted, domains, workplace):
    model = f"runs:/{adapted.run_id}/model"

    def settings(domain: str, output: str) -> PredictConfig:
        from dann_experiments.config.parsing import load_settings

        return load_settings(PredictConfig, None, {
            "model": model, "input": str(domains / "gray_val" / "images"), "output": output, "domain": domain,
            "tracking.uri": adapted.tracking_uri, "progress": False, "accelerator": "cpu",
        })  # fmt: skip

    assert len(predict(settings("target.south", "south")).outputs) == 3
    assert len(predict(settings("target", "both")).outputs) == 3  # both are read alike
    with pytest.raises(InputError, match=r"domain is 'target\.east', but model .* knows how to read images of \["):
        predict(settings("target.east", "east"))
    with pytest.raises(InputError, match=r"domain is 'nowhere'"):
        settings("nowhere", "x")


def test_evaluate_scores_each_domain_and_their_mean(adapted, domains, workplace):
    config = config_of(domains, domain_adaptation__pretrained_checkpoint__path=f"runs:/{adapted.run_id}/model",
                       tracking__uri=adapted.tracking_uri)  # fmt: skip
    found = evaluate(config).metrics
    for name in ("target_val", "target_val.north", "target_val.south", "source_val.winter", "target_test.north"):
        assert found[f"iou/{name}"] == pytest.approx(adapted.metrics[f"iou/{name}"])
    assert "f1/target_val.south/square" in found
    by_target = evaluate(replace(config, {"domain_adaptation.batchnorm": "target_stats"}))
    assert by_target.metrics["iou/target_val"] != found["iou/target_val"]


def test_check_data_counts_each_domain(domains, workplace):
    report = check_data(config_of(domains))
    assert report.problems == []
    assert {"source_train.summer", "source_train.winter", "target_val.south"} <= set(report.counts.index)
    assert set(report.bands.index.get_level_values("domain")) == set(NAMES)


def test_a_file_in_two_domains_is_told(domains, workplace):
    named = {"a": {"train": ["source"]}, "b": {"train": ["source"]}}
    problems = check_data(config_of(domains, data__source__domains=named)).problems
    assert problems
    assert "data.source.domains.b.train: image" in problems[0]


@pytest.mark.slow
def test_a_comparison_judges_the_mean_and_shows_each_domain(domains, workplace):
    scored = {
        "north": {"train": ["target"], "val": ["target_test"]},
        "south": {"train": ["gray"], "val": ["gray_val"]},
    }
    oracle = {"north": ["target_val"], "south": ["gray_oracle"]}
    config = config_of(domains, data__oracle=oracle, data__target__domains=scored, trainer__max_epochs=1)
    result = compare(config, CompareConfig(seeds=1))
    assert {"source only", "AdaBN", "lambda = 0 control", "DANN", "oracle"} == set(result.table["arm"])
    page = (Path(str(result.artifacts)) / "report.html").read_text()
    assert "iou/target_val.north" in page
    assert "iou/target_val.south" in page


# ---- faults that a trial found


@pytest.mark.slow
@pytest.mark.parametrize(
    "targets",
    [
        {"north": {"train": ["target"], "val": ["target_val"]}, "south": {"train": ["gray"], "val": ["plain"]}},
        {"north": {"train": ["target"], "val": ["plain"]}, "south": {"train": ["gray"], "val": ["gray_val"]}},
        {"north": {"train": ["target"], "val": ["target_val"]}, "south": {"train": ["gray"]}},
        {"north": {"train": ["target"]}, "south": {"train": ["gray"]}},
    ],
    ids=["the second without masks", "the first without masks", "the second without images", "none"],
)
def test_a_target_without_validation_labels_is_left_out_of_the_score(domains, pretrained_place, targets, tmp_path):
    write_domain(tmp_path / "plain", 3, seed=11, masks=False)
    targets = {
        name: {**own, "val": [str(tmp_path / "plain") if one == "plain" else one for one in own.get("val", [])]}
        for name, own in targets.items()
    }
    result = adapt(config_of(domains, data__target__domains=targets, trainer__max_epochs=1))
    labelled = [name for name, own in targets.items() if own["val"] and "plain" not in own["val"][0]]
    scored = [f"iou/target_val.{name}" for name in labelled]
    assert sorted(name for name in result.metrics if name.startswith("iou/target_val.")) == sorted(scored)
    assert ("iou/target_val" in result.metrics) == bool(labelled)
    pictures = {path.name for path in (Path(str(result.artifacts)) / "figures").glob("predictions_target*")}
    assert pictures == {"predictions_target.north.png", "predictions_target.south.png"}


def test_a_score_of_a_domain_without_labels_cannot_be_chosen_by(domains, workplace):
    named = {"north": {"train": ["target"], "val": ["target_val"]}, "south": {"train": ["gray"]}}
    for metric in ("iou/target_val.south", "class_iou/target_val.south/square"):
        config = config_of(domains, data__target__domains=named, monitor__metric=metric)
        with pytest.raises(InputError, match=r"needs labeled images in data\.target\.domains\.south\.val"):
            read_sets(config)
    read_sets(config_of(domains, data__target__domains=named, monitor__metric="iou/target_val.north"))
    with pytest.raises(InputError, match=r"did you mean 'iou/target_val\.south'\?"):
        read_sets(config_of(domains, monitor__metric="iou/target_val.sout"))


def test_a_note_names_the_targets_that_the_judged_score_does_not_cover(domains):
    from dann_experiments.comparison.compare import _not_judged
    from dann_experiments.comparison.result import ArmRun

    run = ArmRun("DANN", 0, "", {"iou/target_test": 0.5, "iou/target_test.north": 0.5}, {}, {}, False)
    (note,) = _not_judged(config_of(domains), "iou/target_test", [run])
    assert note.startswith("iou/target_test is the mean over 1 of 2 target domains: south has no such images")
    assert not list(_not_judged(config_of(domains), "", [run]))


def test_labels_of_a_domain_replace_those_of_its_group(domains):
    config = config_of(
        domains, data__source__value_map={0: "ground", 7: "square"},
        data__source__domains={"a": {"train": ["second"]}, "b": {"train": ["x"], "color_map": {"0,0,0": "ground"}}},
    )  # fmt: skip
    a, b = config.data.of_role("source").values()
    assert a.value_map == {0: "ground", 7: "square"}
    assert (b.value_map, b.color_map) == (None, {"0,0,0": "ground"})


@pytest.mark.parametrize("name", [False, None])
def test_names_that_yaml_reads_as_something_else_are_told(name):
    with pytest.raises(
        InputError, match=r"data\.source\.domains has the key .*; *write it in quotes|write it in quotes"
    ):
        load_config(None, {"data.source.domains": {name: {"train": ["x"]}}})


def test_a_model_with_one_target_says_that_it_reads_another_like_it(domains, shared_runs, workplace, caplog):
    from conftest import copy_store

    copy_store(shared_runs.folder / "after_adapt" / "mlflow.db", workplace)
    run_id = shared_runs.result("adapt").run_id
    evaluate(config_of(domains, domain_adaptation__pretrained_checkpoint__path=f"runs:/{run_id}/model"))
    assert "The model has one target, without a name: images of target.south are read" in caplog.text


def test_tables_of_many_scores_stand_upright(capsys):
    from dann_experiments.reports.terminal import print_scores

    values = {f"iou/target_val.region_{number}": 0.1 * number for number in range(8)}
    print_scores("title", {"before": values, "after": values})
    lines = capsys.readouterr().out.splitlines()
    assert any("iou/target_val.region_7" in line and "0.700" in line for line in lines)
