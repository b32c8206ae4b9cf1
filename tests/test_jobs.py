"""Whole runs on small pictures: what `adapt` leaves behind, and that three ways to start it give the same numbers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
import pytorch_lightning as pl
import segmentation_models_pytorch as smp
import torch
import yaml
from conftest import model_folder, small_settings

import dann_experiments
from dann_experiments import InputError, RunResult, adapt, evaluate, load_config, pretrain
from dann_experiments.__main__ import main
from dann_experiments.data.pixels import read_pixels
from dann_experiments.data.reading import Reading

PROJECT = Path(dann_experiments.__file__).parents[1]


def client(result: RunResult | None = None) -> mlflow.MlflowClient:
    """Of the store that `result` is in, else of the one in the current folder."""
    return mlflow.MlflowClient(
        tracking_uri=f"sqlite:///{Path('mlflow.db').resolve()}" if result is None else result.tracking_uri
    )


def steps(result: RunResult, metric: str) -> list[tuple[int, float]]:
    return history(client(result), result.run_id, metric)


def history(store: mlflow.MlflowClient, run_id: str, metric: str) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in store.get_metric_history(run_id, metric))


@pytest.fixture
def run(shared_runs) -> RunResult:
    """The adaptation that all tests share, for those that only look."""
    return shared_runs.result("adapt")


def test_a_run_shows_what_the_design_promises(run, shared_runs):
    found = client(run).get_run(run.run_id)
    assert found.info.status == "FINISHED"
    # 13 target images in batches of 3 make 4 steps an epoch; the source's 2 batches start again
    every_step = list(range(8))
    for metric in (
        "da/domain_loss",
        "da/domain_acc",
        "da/lambda",
        "loss/train_seg",
        "loss/train_da",
        "loss/train_total",
    ):
        assert [step for step, _ in steps(run, metric)] == every_step, metric
    each_epoch = (
        "iou/source_val",
        "iou/target_val",
        "class_iou/target_val/square",
        "class_iou/source_val/ground",
        "iou/gap_source_minus_target",
        "iou/source_drop_from_baseline",
        "loss/val_source",
        "loss/val_target",
    )
    for metric in each_epoch:
        assert [step for step, _ in steps(run, metric)] == [0, 4, 8], metric
    assert {"lr/network", "lr/discriminator", "time/epoch_seconds", "iou/target_test"} <= set(found.data.metrics)
    assert found.data.params["cfg.domain_adaptation.method.hidden_size"] == "16"
    tags = found.data.tags
    assert tags["dann.job"] == "adapt"
    assert tags["dann.method"] == "dann"
    assert tags["dann.selected_with_target_labels"] == "false"
    assert tags["seed"] == "0"
    assert tags["git.dirty"] in ("true", "false")
    assert tags["dann.source_run_id"] == run.source_run_id
    contexts = {item.tags[0].value: item.dataset for item in found.inputs.dataset_inputs}
    assert set(contexts) == {"source train", "source val", "target train", "target val", "target test"}
    assert all(len(dataset.digest) == 32 for dataset in contexts.values())
    files = {str(path.relative_to(run.artifacts)) for path in Path(run.artifacts).rglob("*") if path.is_file()}
    steps_shown = {int(re.search(r"\+step\+(\d+)\+", name)[1]) for name in files if name.startswith("images/")}
    assert steps_shown == {0, 4, 8}  # before and after each epoch
    assert {name for name in files if not name.startswith("images/")} == {
        "config.yaml", "checkpoints/best.ckpt", "checkpoints/last.ckpt",
        "figures/predictions_source.png", "figures/predictions_target.png",
        "figures/confusion_source_val.png", "figures/confusion_target_val.png", "figures/confusion_target_test.png",
        "figures/curves.png", "tables/class_iou.csv", "features.safetensors",
    }  # fmt: skip
    assert not (shared_runs.folder / "outputs" / run.run_id).exists()


def test_lambda_as_logged_starts_at_zero_and_follows_the_epochs(run):
    values = dict(steps(run, "da/lambda"))
    assert values[0] == 0.0
    assert values[7] == pytest.approx(2 / (1 + np.exp(-10 * 1 / 2)) - 1, abs=1e-6)


def test_lambda_in_batch_mode_ends_one_step_before_the_last_progress(pretrained_place, squares):
    settings = small_settings(squares, domain_adaptation__method__step_mode="batch", trainer__max_epochs=1)
    values = dict(steps(adapt(load_config(None, settings)), "da/lambda"))
    assert values[0] == 0.0
    assert values[3] == pytest.approx(2 / (1 + np.exp(-10 * 3 / 4)) - 1, abs=1e-6)


def test_the_logged_total_holds_lambda_once(run):
    logged = {
        name: dict(steps(run, name)) for name in ("loss/train_total", "loss/train_seg", "loss/train_da", "da/lambda")
    }
    for step in range(8):
        total = logged["loss/train_seg"][step] + logged["da/lambda"][step] * logged["loss/train_da"][step]
        assert logged["loss/train_total"][step] == pytest.approx(total, rel=1e-5)


def test_step_zero_shows_the_warm_start(run):
    pretrained = client(run).get_run(run.source_run_id).data.metrics
    assert dict(steps(run, "iou/target_val"))[0] == pretrained["iou/target_val"]
    assert run.baseline["iou/source_val"] == pretrained["iou/source_val"]


@pytest.mark.slow
def test_the_model_loads_in_a_new_process_without_pickles_and_gives_the_same_logits(run, squares, workplace):
    folder = model_folder(run.artifacts)
    facts = json.loads((folder / "dann.json").read_text())
    code = (
        "import pickle, sys, numpy as np, torch, segmentation_models_pytorch as smp\n"
        "pickle.load = pickle.loads = pickle.Unpickler = None\n"
        "torch.set_num_threads(1)\n"  # as here: with more, sums are added in another order
        f"net = smp.from_pretrained({str(folder)!r}).eval()\n"
        "x = torch.from_numpy(np.load(sys.argv[1]))\n"
        "with torch.no_grad(): np.save(sys.argv[2], net(x).numpy())\n"
    )
    image = torch.from_numpy(read_pixels(squares / "target_val" / "images" / "0.png", 3, Reading()).values).float()
    reading = {key: torch.tensor(value)[:, None, None] for key, value in
               facts["reading"]["target"].items() if key in ("low", "high", "mean", "std")}  # fmt: skip
    scaled = (image - reading["low"]) / (reading["high"] - reading["low"])
    pixels = (scaled - reading["mean"]) / reading["std"]
    np.save(workplace / "x.npy", pixels[None].numpy())
    subprocess.run([sys.executable, "-c", code, "x.npy", "y.npy"], check=True, capture_output=True, cwd=workplace)
    here = smp.from_pretrained(str(folder)).eval()
    checkpoint = torch.load(Path(run.artifacts) / "checkpoints" / "last.ckpt", weights_only=True)
    trained = {
        name.removeprefix("network."): value
        for name, value in checkpoint["state_dict"].items()
        if name.startswith("network.")
    }
    here.load_state_dict(trained)
    with torch.no_grad():
        expected = here(pixels[None])
    found = torch.from_numpy(np.load(workplace / "y.npy"))
    assert torch.allclose(found, expected, atol=1e-6), (found - expected).abs().max()
    assert facts["class_names"] == ["ground", "square"]


@pytest.mark.slow
def test_pretraining_is_found_again_unless_the_network_differs_and_is_then_a_run_of_its_own(
    pretrained_place, squares, shared_runs
):
    """The config.yaml of a run gives the same numbers again."""
    found_by_search = shared_runs.result("adapt")
    assert found_by_search.source_run_id == shared_runs.result("pretrain").run_id
    again = adapt(load_config(Path(found_by_search.artifacts) / "config.yaml"))
    assert again.source_run_id == found_by_search.source_run_id
    assert again.metrics == found_by_search.metrics
    known = {run.info.run_id for run in client().search_runs(["1"])}
    other = adapt(load_config(None, small_settings(squares, model__decoder_channels=[8, 8, 8], trainer__max_epochs=1)))
    new = [run for run in client().search_runs(["1"]) if run.info.run_id not in known]
    assert {run.data.tags["dann.job"]: run.info.run_id for run in new} == {
        "adapt": other.run_id,
        "pretrain": other.source_run_id,
    }
    assert len(new) == 2


@pytest.mark.slow
def test_python_command_line_and_notebook_give_the_same_metrics_to_the_bit(pretrained_place, squares, shared_runs):
    """The notebook's call is load_config(file, overrides) -> adapt, in a kernel of its own."""
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell, new_notebook

    (pretrained_place / "c.yaml").write_text(yaml.safe_dump(nested(small_settings(squares))))
    source = shared_runs.result("pretrain")
    with_source = {"domain_adaptation.pretrained_checkpoint.path": source.model_uri}
    assert main(["adapt", "--config", "c.yaml", "--source_checkpoint", source.model_uri]) == 0
    cells = [
        "from dann_experiments import adapt, load_config",
        f"result = adapt(load_config('c.yaml', {with_source}))",
    ]
    notebook = new_notebook(cells=[new_code_cell(cell) for cell in cells])
    resources = {"metadata": {"path": str(pretrained_place)}}
    NotebookClient(notebook, kernel_name="python3", resources=resources).execute()
    here = shared_runs.result("adapt")
    stores = [client(here), client(), client()]
    runs = client().search_runs([here.experiment_id], "tags.`dann.job` = 'adapt'")
    run_ids = [here.run_id, *(item.info.run_id for item in runs)]
    assert len(run_ids) == 3
    names = [name for name in runs[0].data.metrics if not name.startswith("time/")]
    for name in names:
        histories = [history(store, run_id, name) for store, run_id in zip(stores, run_ids, strict=True)]
        assert histories[0] == histories[1] == histories[2], name


def nested(flat: dict[str, object]) -> dict[str, object]:
    tree: dict[str, object] = {}
    for key, value in flat.items():
        *groups, name = key.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = value
    return tree


@pytest.mark.slow
def test_lambda_zero_equals_dann_with_lambda_da_zero_to_the_bit(pretrained_place, squares):
    control = adapt(load_config(None, small_settings(squares, domain_adaptation__method__name="lambda_zero")))
    dann = adapt(load_config(None, small_settings(squares, domain_adaptation__method__lambda_da=0.0)))
    assert control.metrics == dann.metrics
    assert {value for _, value in steps(control, "da/lambda")} == {0.0}


def test_source_only_trains_as_many_steps_and_logs_no_domain_metrics(pretrained_place, squares):
    result = adapt(load_config(None, small_settings(squares, domain_adaptation__method__name="source_only")))
    metrics = client().get_run(result.run_id).data.metrics
    # what the probe of the encoder tells needs no adversary
    assert {name for name in metrics if name.startswith("da/")} == {"da/probe_acc", "da/a_distance"}
    assert [step for step, _ in steps(result, "loss/train_seg")] == list(range(8))


def test_two_taps_log_their_own_numbers_and_the_mean_under_the_plain_names(pretrained_place, squares):
    settings = small_settings(squares, domain_adaptation__method__feature_layer=["encoder", "decoder"])
    result = adapt(load_config(None, settings))
    both = [dict(steps(result, f"da_layer/{layer}/domain_loss"))[3] for layer in ("encoder", "decoder")]
    assert dict(steps(result, "da/domain_loss"))[3] == pytest.approx(np.mean(both), rel=1e-5)


def test_the_best_checkpoint_by_a_target_metric_is_tagged_and_can_be_the_model(pretrained_place, squares, capsys):
    settings = small_settings(
        squares, monitor__metric="iou/target_val", monitor__final_model="best", trainer__max_epochs=3,
        trainer__enable_progress_bar=True,
    )  # fmt: skip
    result = adapt(load_config(None, settings))
    lines = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines() if "iou/target_val " in line]
    assert lines == ["epoch 1/3", "epoch 2/3", "epoch 3/3", "final weights"]
    assert client().get_run(result.run_id).data.tags["dann.selected_with_target_labels"] == "true"
    seen = [value for step, value in steps(result, "iou/target_val") if step > 0]
    assert result.metrics["iou/target_val"] == pytest.approx(max(seen), abs=1e-9)


def test_a_set_smaller_than_its_batch_trains_and_says_so(workplace, squares, caplog):
    settings = small_settings(squares, data__source__batch_size=64, trainer__max_epochs=1)
    result = adapt(load_config(None, settings))
    assert "fewer than its batch size 64" in caplog.text
    assert len(steps(result, "loss/train_seg")) == 4


def test_training_masks_of_the_target_are_never_opened(pretrained_place, squares, tmp_path):
    from conftest import write_domain

    write_domain(tmp_path / "labelled_target", 5, seed=9)
    opened: list[str] = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    labelled = [str(tmp_path / "labelled_target")]
    adapt(load_config(None, small_settings(squares, data__target__train=labelled, trainer__max_epochs=1)))
    assert [name for name in opened if "labelled_target/images" in name]
    assert not [name for name in opened if "labelled_target/masks" in name]


def test_training_that_raises_is_failed_with_its_traceback(pretrained_place, squares):
    class Bang(pl.Callback):
        def on_train_batch_end(self, *args, **kwargs):
            raise RuntimeError("bang at the end of a step")

    with pytest.raises(RuntimeError, match="bang"):
        adapt(load_config(None, small_settings(squares)), callbacks=[Bang()])
    found = client().search_runs(["1"], "tags.`dann.job` = 'adapt'")[0]
    assert found.info.status == "FAILED"
    artifacts = Path(found.info.artifact_uri.removeprefix("file://"))
    assert "bang at the end of a step" in (artifacts / "traceback.txt").read_text()
    assert history(client(), found.info.run_id, "loss/train_seg")[0][0] == 0


def test_evaluate_scores_a_run_s_model_to_the_same_numbers(run, squares, workplace):
    settings = small_settings(
        squares, domain_adaptation__pretrained_checkpoint__path=run.model_uri, tracking__uri=run.tracking_uri
    )
    result = evaluate(load_config(None, settings))
    ious = {name: value for name, value in run.metrics.items() if "iou/" in name}
    assert {name: result.metrics[name] for name in ious} == ious
    assert client(result).get_run(result.run_id).data.tags["dann.source_run_id"] == run.run_id


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"domain_adaptation__method__feature_layer": "encoder.layer9"}, "layers that do: ["),
        ({"domain_adaptation__method__in_channels": 7}, "give 48, or null"),
        ({"data__source__train": []}, "data.source.train is empty"),
        ({"data__target__train": ["nowhere"]}, "nowhere, which does not exist"),
        ({"monitor__metric": "iou/target_val", "data__target__val": []}, "needs labeled images in data.target.val"),
        ({"model__psp_dropout": 0.1}, "unet takes no psp_dropout"),
        ({"model__encoder_name": "resnet17"}, "resnet17"),
        ({"tracking__uri": "http://127.0.0.1:9"}, "no server answers there"),
        (
            {"tracking__uri": "postgresql://me:hidden@127.0.0.1:9/runs"},
            r"tracking.uri is 'postgresql://127.0.0.1:9/runs', but no database answers at 127.0.0.1, port 9 (Connection refused)",
        ),
        ({"tracking__uri": "sqlite:////nowhere/at/all.db"}, "does not exist"),
        ({"domain_adaptation__pretrained_checkpoint__path": "none.ckpt"}, "none.ckpt, which does not exist"),
        ({"domain_adaptation__pretrained_checkpoint__path": "runs:/abc"}, "tracking store does not have"),
        ({"domain_adaptation__pretrained_checkpoint__path": "models:/no@champion"}, "tracking store does not have"),
        ({"data__crop_size": 30, "model__arch": "fpn", "model__decoder_channels": None}, "needs a multiple of 8"),
        ({"data__crop_size": 64, "data__pad_to_crop": False}, "smaller than data.crop_size"),
        ({"data__crop_size": 1024}, "smaller than data.crop_size"),
        (
            {"monitor__metric": "select/bnm", "data__source__val": [], "data__target__val": []},
            "add labeled images in data.source.val",
        ),
        ({"monitor__metric": "foo"}, "it is one of ['iou/gap_source_minus_target'"),
        ({"tracking__folder": __file__}, "which is not writable"),
        ({"tracking__uri": "sqlite:///notes.txt"}, "which cannot be used"),
        ({"domain_adaptation__method__class_path": "no.such.Method"}, "cannot be imported"),
        ({"domain_adaptation__method__class_path": "pathlib.Path"}, "not a subclass of dann_experiments"),
        (
            {"domain_adaptation__batchnorm": "joint", "domain_adaptation__method__feature_layer": "decoder.blocks.0"},
            "'joint'",
        ),
    ],
)
def test_wrong_input_is_refused_before_a_run_is_made(workplace, squares, settings, message):
    Path("notes.txt").write_text("no store")
    with pytest.raises(InputError) as error:
        adapt(load_config(None, small_settings(squares, **settings)))
    assert message in str(error.value)
    if Path("mlflow.db").exists():
        assert not client().search_runs([item.experiment_id for item in client().search_experiments()])


def test_what_starts_from_a_model_chosen_by_target_labels_is_tagged_too(workplace, squares):
    chosen = small_settings(squares, monitor__metric="iou/target_val", monitor__final_model="best")
    source = pretrain(load_config(None, chosen))
    result = adapt(load_config(None, small_settings(squares, trainer__max_epochs=1)))
    assert result.source_run_id == source.run_id
    assert client().get_run(result.run_id).data.tags["dann.selected_with_target_labels"] == "true"


def test_without_target_labels_the_pictures_show_the_target_all_the_same(pretrained_place, squares):
    settings = small_settings(squares, data__target__val=[], data__target__test=[], trainer__max_epochs=1)
    result = adapt(load_config(None, settings))
    assert "iou/target_val" not in result.metrics
    assert (Path(str(result.artifacts)) / "figures" / "predictions_target.png").is_file()


def test_clipping_is_a_group_s_own_so_the_control_does_not_feel_its_classifier(pretrained_place, squares):
    losses = set()
    for hidden_size in (16, 64):
        settings = small_settings(
            squares,
            domain_adaptation__method__name="lambda_zero",
            domain_adaptation__method__hidden_size=hidden_size,
            trainer__gradient_clip_val=0.05,
            trainer__max_epochs=1,
            optimizer__name="sgd",
        )
        losses.add(steps(adapt(load_config(None, settings)), "loss/val_source")[-1][1])
    assert len(losses) == 1


def test_a_run_table_shows_runs_of_one_source_model_and_the_same_data_alone(pretrained_place, squares):
    from dann_experiments.jobs.overview import overview

    adapt(
        load_config(None, small_settings(squares, domain_adaptation__method__name="lambda_zero", data__target__val=[]))
    )
    config = load_config(None, small_settings(squares))
    assert list(overview(config).table.index) == ["source only", "lambda = 0 control"]
    adapt(config)
    assert list(overview(config).table.index) == ["source only", "DANN"]


def test_passwords_of_the_store_reach_neither_params_nor_config_yaml():
    from dann_experiments.jobs.identity import public_settings

    config = load_config(None, {"tracking.uri": "http://me:secret@127.0.0.1:5000"})
    assert "secret" not in str(public_settings(config, "dann"))
