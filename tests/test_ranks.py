"""Several processes train one network: the same numbers as one, one run, each metric once, and no process left behind."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import mlflow
import psutil
import pytest
import torch
from conftest import model_folder, small_settings
from torch import nn
from torch.utils.data import Dataset

from dann_experiments import DANNScheduler, InputError
from dann_experiments.config import Config, TrainingFailed, load_config, replace
from dann_experiments.data.loaders import SeededOrder
from dann_experiments.jobs import RunResult, adapt, evaluate, pretrain
from dann_experiments.training import ranks
from dann_experiments.training.ranks import Rank
from dann_experiments.training.scoring import Scorer, SelectionScorer

WORLD = 2


class Numbers(Dataset):
    """A data set of so many items."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count


def on_all_ranks(meeting_point: Path, check: Callable[[int], None]) -> None:
    """Run `check(rank)` in WORLD processes that have met."""

    def run(index: int) -> None:
        Rank(index, WORLD, meeting_point).meet(torch.device("cpu"))
        check(index)
        ranks.leave()

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run, args=(index,)) for index in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * WORLD


@pytest.mark.parametrize(("count", "world"), [(12, 2), (13, 2), (14, 3), (5, 5)])
def test_ranks_share_one_order_without_overlap_and_equally(count, world):
    whole = list(SeededOrder(Numbers(count), 7))  # pyright: ignore[reportArgumentType]
    shares = [list(SeededOrder(Numbers(count), 7, (rank, world))) for rank in range(world)]  # pyright: ignore
    assert {len(share) for share in shares} == {count // world}
    # what all ranks take at one time is what one process would take then
    assert list(chain.from_iterable(zip(*shares, strict=True))) == whole[: count // world * world]


@pytest.mark.parametrize("done", range(4))
def test_a_share_goes_on_behind_any_item(done):
    def order() -> SeededOrder:
        return SeededOrder(Numbers(9), 7, (1, 2))  # pyright: ignore[reportArgumentType]

    first, later = order(), order()
    items, position = list(first), first.position(done)
    later.go_on_from(position, 0)
    assert list(later) == items[done:]


def test_what_the_ranks_say_together_is_what_one_would_say(tmp_path):
    torch.manual_seed(0)
    logits, labels = torch.randn(11, 3, 20, 20) * 3, torch.randint(0, 3, (11, 20, 20))
    labels[:, :3] = 255
    alone, unlabelled = Scorer(3, 255), SelectionScorer()
    alone.update(logits, labels)
    unlabelled.update(logits, labels != 255)

    def check(rank: int) -> None:
        part = slice(0, 4) if rank == 0 else slice(4, 11)
        scorer, selection = Scorer(3, 255), SelectionScorer(part.start)
        for image in range(part.start, part.stop):
            scorer.update(logits[image : image + 1], labels[image : image + 1])
            selection.update(logits[image : image + 1], labels[image : image + 1] != 255)
        assert (scorer.compute(True).confusion == alone.compute().confusion).all()
        assert scorer.compute(True).loss == pytest.approx(alone.compute().loss, rel=1e-6)  # float32 sums a batch
        assert selection.compute(True) == pytest.approx(unlabelled.compute(), rel=1e-6)
        assert scorer.compute().confusion.sum() < alone.compute().confusion.sum()  # unasked, each tells its own

        means = ranks.mean_of({"a": torch.tensor(float(rank)), "b": 2.0}, torch.device("cpu"))
        assert {name: float(value) for name, value in means.items()} == {"a": 0.5, "b": 2.0}
        assert ranks.gathered_texts("é" * (1 + 5 * rank), torch.device("cpu")) == ["é", "é" * 6]
        assert [part.tolist() for part in ranks.gathered(torch.arange(rank))] == [[], [0]]
        assert ranks.any_of(rank == 1, torch.device("cpu"))
        assert not ranks.any_of(False, torch.device("cpu"))
        norm = nn.BatchNorm1d(2)
        norm.running_mean.fill_(rank)  # pyright: ignore[reportOptionalMemberAccess]
        ranks.average_buffers(norm)
        assert norm.running_mean.tolist() == [0.5, 0.5]  # pyright: ignore[reportOptionalMemberAccess]
        assert norm.num_batches_tracked.item() == 0  # pyright: ignore[reportOptionalMemberAccess]

    on_all_ranks(tmp_path / "meeting_point", check)


def test_the_thinned_pixels_of_many_images_are_those_of_one_process(tmp_path):
    torch.manual_seed(0)
    logits = torch.randn(40, 2, 24, 24) * 2  # 40 x 256 slots, more than are compared
    unlabelled = SelectionScorer()
    unlabelled.update(logits)

    def check(rank: int) -> None:
        part = slice(0, 13) if rank == 0 else slice(13, 40)
        selection = SelectionScorer(part.start)
        selection.update(logits[part])
        merged = selection._sample.over_ranks(ranks.gathered)
        assert torch.equal(merged.rows(), unlabelled._sample.rows())

    on_all_ranks(tmp_path / "meeting_point", check)


def config_of(root: Path, folder: Path, **more: object) -> Config:
    more = {"trainer__devices": WORLD} | more
    return load_config(None, small_settings(root, tracking__uri=f"sqlite:///{folder}/mlflow.db", **more))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"trainer__devices": 4}, r"trainer.devices is 4, but data.target.val has 3 images, fewer than one for each"),
        ({"trainer__devices": 0}, r"trainer.devices is 0; give a number from 1 to"),
    ],
)
def test_devices_that_cannot_be_are_refused(workplace, squares, more, message):
    with pytest.raises(InputError, match=message):
        adapt(config_of(squares, workplace, data__target__val=["target_test"], **more))
    assert not (workplace / "mlruns").exists()


def test_callbacks_are_refused_with_several_processes(empty_place, squares):
    import pytorch_lightning as pl

    for job in (adapt, pretrain):
        with pytest.raises(InputError, match=r"trainer.devices is 2, but callbacks run in one process"):
            job(config_of(squares, empty_place), [pl.Callback()])
    assert not (empty_place / "mlflow.db").exists()


def history(result: RunResult) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for row in result.history().itertuples():
        found.setdefault(row.metric, []).append((row.step, row.value))  # pyright: ignore
    return found


@pytest.mark.slow
def test_two_processes_make_one_run_with_each_metric_once_and_scores_of_all_images(workplace, squares):
    """One step of each of two ranks is one of a process with batches of twice the size: the network has no BatchNorm."""
    plain = {
        "model__encoder_name": "vgg11", "model__decoder_use_norm": False, "optimizer__name": "sgd", "optimizer__lr": 0.05,
        "pretraining__optimizer__name": "sgd", "data__source__augmentation": "light", "data__crop_size": 24,
        "domain_adaptation__method__discriminator_lr": 0.01, "domain_adaptation__method__step_mode": "batch",
        "pretraining__optimizer__lr": 0.05, "monitor__final_model": "best", "monitor__metric": "iou/target_val",
    }  # fmt: skip
    two = config_of(squares, workplace, **plain, data__source__batch_size=2, data__target__batch_size=3)
    together = adapt(two)
    alone = adapt(replace(two, {"trainer.devices": 1, "data.source.batch_size": 4, "data.target.batch_size": 6}))
    ours, theirs = history(together), history(alone)
    assert set(ours) == set(theirs)
    for metric, points in ours.items():
        steps = [step for step, _ in points]
        assert steps == [step for step, _ in theirs[metric]], metric
        if metric.startswith(("loss/", "da/lambda", "lr/")):
            wanted = [value for _, value in theirs[metric]]
            assert [value for _, value in points] == pytest.approx(wanted, rel=1e-3, abs=1e-5), metric
    steps = len(ours["da/lambda"])
    schedule = DANNScheduler(gamma=10.0)
    assert [value for _, value in ours["da/lambda"]] == pytest.approx(
        [schedule.get_lambda(step, steps) for step in range(steps)]
    )
    client = mlflow.MlflowClient(two.tracking.uri)
    assert [run.info.status for run in client.search_runs(["1"])] == ["FINISHED"] * 3  # with the one source model
    # every image counts once: the scores of validation are those of one process with the same weights
    scored = evaluate(replace(two, {"domain_adaptation.pretrained_checkpoint.path": f"runs:/{together.run_id}/model"}))
    for metric in ("iou/source_val", "iou/target_val"):
        assert together.metrics[metric] == pytest.approx(scored.metrics[metric], abs=1e-6)
    assert not list(Path("outputs").rglob("process_*"))


def processes_of(pid: int) -> list[psutil.Process]:
    """The other ranks of the run in process `pid`."""
    return [one for one in psutil.Process(pid).children() if "other_ranks" in " ".join(one.cmdline())]


def started(config: Config, resume: str | None = None) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=lambda: adapt(config, resume=resume))
    process.start()
    return process


def until_saved(name: str, process: multiprocessing.process.BaseProcess) -> None:
    """Return when the run in `process` has saved this checkpoint."""
    while not list(Path("outputs").glob(f"*/checkpoints/{name}")):
        assert process.is_alive(), f"it ended before it saved {name}"
        time.sleep(0.01)


@pytest.fixture
def killing(workplace, squares) -> Config:
    """A run of many steps, with its source model ready, whose network drops out features."""
    config = config_of(
        squares, workplace, model__arch="pspnet", model__encoder_name="mobilenet_v2", model__decoder_channels=None,
        trainer__max_epochs=5, data__source__batch_size=2, data__target__batch_size=2, trainer__checkpoint_every_n_steps=2,
        trainer__devices=1,
    )  # fmt: skip
    pretrain(config)
    return replace(config, {"trainer.devices": WORLD})


def adapted(config: Config) -> str | None:
    runs = mlflow.MlflowClient(config.tracking.uri).search_runs(["1"], "tags.`dann.job` = 'adapt'")
    return runs[0].info.run_id if runs else None


@pytest.mark.slow
def test_a_run_whose_rank_dies_and_that_is_killed_after_that_goes_on_to_the_same_weights(killing):
    process = started(killing)
    until_saved("step_4.ckpt", process)
    (other,) = processes_of(process.pid)
    assert WORLD == 2
    other.kill()
    process.join()
    run_id = str(adapted(killing))
    client = mlflow.MlflowClient(killing.tracking.uri)
    assert client.get_run(run_id).info.status == "FAILED"
    told = Path(client.download_artifacts(run_id, "traceback.txt")).read_text()
    assert "TrainingFailed: process 2 of 2 was killed by SIGKILL" in told

    process = started(killing, resume=run_id)
    until_saved("step_10.ckpt", process)
    others = processes_of(process.pid)
    assert len(others) == WORLD - 1
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    psutil.wait_procs(others)  # none outlives the first
    resumed = adapt(killing, resume="auto")
    assert resumed.run_id == run_id
    whole = adapt(killing)
    found, wanted = (model_folder(result.artifacts) / "model.safetensors" for result in (resumed, whole))
    assert found.read_bytes() == wanted.read_bytes()
    for metric, points in history(whole).items():
        if not metric.startswith("time/"):
            assert history(resumed)[metric] == points, metric


@pytest.mark.slow
def test_a_loss_that_is_no_number_ends_all_ranks_with_one_message_and_the_last_good_state(workplace, squares):
    config = config_of(squares, workplace, trainer__devices=1)
    pretrain(config)
    with pytest.raises(TrainingFailed, match=r"Step \d+ \(epoch \d\): .*nan.*Source batch: .*\.png"):
        adapt(replace(config, {"trainer.devices": WORLD, "optimizer.lr": 1e30, "optimizer.name": "sgd"}))
    run = mlflow.MlflowClient(config.tracking.uri).get_run(str(adapted(config)))
    assert run.info.status == "FAILED"
    kept = torch.load(
        Path(run.info.artifact_uri.removeprefix("file://")) / "checkpoints" / "last.ckpt", weights_only=True
    )
    assert all(math.isfinite(float(tensor.sum())) for tensor in kept["state_dict"].values())
