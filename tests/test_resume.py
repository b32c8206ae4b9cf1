"""Runs that are killed go on: the same weights to the bit, a history without gap or double, damaged checkpoints passed over."""

from __future__ import annotations

import contextlib
import copy
import math
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import model_folder, small_settings
from mlflow.entities import Param, RunTag
from pytorch_lightning.utilities import CombinedLoader
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset

from dann_experiments import DomainAdaptationMethod, InputError, MethodLoss
from dann_experiments.checkpoints import files
from dann_experiments.config import Config, config_to_yaml, load_config, replace
from dann_experiments.data.loaders import SeededOrder
from dann_experiments.jobs import RunResult, adapt, pretrain
from dann_experiments.jobs.resume import as_the_run, checkpoint_to_go_on_from, run_to_go_on, settings_to_resume
from dann_experiments.tracking.processes import process_name
from dann_experiments.tracking.store import open_store
from dann_experiments.training.checkpointing import Checkpoints
from dann_experiments.training.random_states import random_states, restore

JOBS: Mapping[str, Callable[..., RunResult]] = {"adapt": adapt, "pretrain": pretrain}


class Noise(pl.Callback):
    """Numbers of every random state enter every step, so that a state that is not put back shows in the weights."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        batch["source"]["image"] += 0.01 * (torch.rand(()) + np.random.rand() + random.random())


class Killed(pl.Callback):
    """Ends its own process as the kernel does, at the first time that `hook` is called after `step` steps."""

    def __init__(self, hook: str, step: int) -> None:
        self.step = step
        setattr(self, hook, self.strike)

    def strike(self, trainer: pl.Trainer, *args: Any, **more: Any) -> None:
        if trainer.global_step >= self.step and not trainer.sanity_checking:
            os.kill(os.getpid(), signal.SIGKILL)


class KilledWhileWriting(pl.Callback):
    """Ends its own process when the checkpoint of `step` is half on the disk."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_start(self, trainer, pl_module):
        whole = files._Hashing.write

        def half(hashing, data):
            if f"step_{self.step}." in hashing._file.name and hashing._file.tell() > 10_000:
                hashing._file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(hashing, data)

        files._Hashing.write = half  # pyright: ignore[reportAttributeAccessIssue]


class KilledBehindEverything(pl.Callback):
    """Ends its own process when all results are written, before the store is told."""

    def on_train_start(self, trainer, pl_module):
        close = Checkpoints.close

        def close_and_end(checkpoints):
            close(checkpoints)
            os.kill(os.getpid(), signal.SIGKILL)

        Checkpoints.close = close_and_end


def killed(job: str, config: Config, *callbacks: pl.Callback, resume: str | None = None) -> None:
    """Run a job in a process of its own, which must end by SIGKILL."""
    process = multiprocessing.get_context("fork").Process(target=lambda: JOBS[job](config, callbacks, resume=resume))
    process.start()
    process.join(1200)
    assert process.exitcode == -signal.SIGKILL


def settings(root: Path, folder: Path, store: Path | None = None, **more: object) -> Config:
    """A run in a store of its own in `folder`, a copy of `store` if given: the source starts again in mid-epoch (2 of 4
    batches), crops are random."""
    folder.mkdir()
    if store is not None:
        shutil.copy(store, folder / "mlflow.db")
    return load_config(
        None,
        small_settings(
            root, tracking__uri=f"sqlite:///{folder}/mlflow.db", tracking__folder=str(folder / "outputs"),
            data__source__augmentation="light", data__target__augmentation="strong", data__crop_size=24,
            optimizer__schedule="annealed", pretraining__optimizer__schedule="one_cycle", optimizer__name="adamw",
            trainer__checkpoint_every_n_steps=3, domain_adaptation__method__step_mode="batch", pretraining__max_epochs=2,
        ) | {key.replace("__", "."): value for key, value in more.items()},
    )  # fmt: skip


@dataclass
class Whole:
    """The jobs, never killed."""

    pretrained: RunResult
    adapted: RunResult
    store: Path
    """A copy of the store after pretraining, so that each test begins with adaptation."""


@pytest.fixture(scope="module")
def whole(squares, tmp_path_factory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    config = settings(squares, folder / "runs")
    pretrained, store = pretrain(config), folder / "pretrained.db"
    with closing(sqlite3.connect(folder / "runs" / "mlflow.db")) as source, closing(sqlite3.connect(store)) as copy:
        source.backup(copy)
    return Whole(pretrained, adapt(config, [Noise()]), store)


def run_ids(config: Config, job: str) -> list[str]:
    client = mlflow.MlflowClient(tracking_uri=config.tracking.uri)
    return [run.info.run_id for run in client.search_runs(["1"], f"tags.`dann.job` = '{job}'")]


def weights(result: RunResult) -> bytes:
    assert result.artifacts is not None
    return (model_folder(result.artifacts) / "model.safetensors").read_bytes()


def values(result: RunResult) -> list[tuple[str, int, float]]:
    """Everything logged but times, which differ; NaN as None."""
    return [
        (row.metric, row.step, None if math.isnan(row.value) else row.value)  # pyright: ignore
        for row in result.history().itertuples()
        if not row.metric.startswith("time/")  # pyright: ignore
    ]


def assert_same(resumed: RunResult, whole: RunResult, once: bool = True) -> None:
    """The same run to the bit, each value of the history once."""
    assert weights(resumed) == weights(whole)
    found, wanted = values(resumed), values(whole)
    if once:
        assert len({(metric, step) for metric, step, _ in found}) == len(found)
        assert found == wanted
    assert set(found) == set(wanted)  # scores of the best weights that equal the last ones' need not stand twice
    assert resumed.metrics == whole.metrics
    assert resumed.baseline == whole.baseline
    times = resumed.history().query("metric == 'time/epoch_seconds'")
    assert list(times["step"]) == list(whole.history().query("metric == 'time/epoch_seconds'")["step"])
    assert times["value"].between(0, 600).all()
    run = mlflow.MlflowClient(tracking_uri=resumed.tracking_uri).get_run(resumed.run_id)
    assert run.info.status == "FINISHED"
    for one in ("last.ckpt", "best.ckpt"):
        found, wanted = (torch.load(Path(str(run.artifacts)) / "checkpoints" / one, weights_only=True)
                         for run in (resumed, whole))  # fmt: skip
        assert found["global_step"] == wanted["global_step"]
        assert str(found.get("callbacks", {}).get("Curves")) == str(wanted.get("callbacks", {}).get("Curves"))
        torch.testing.assert_close(found["state_dict"], wanted["state_dict"], rtol=0, atol=0, equal_nan=True)
    assert {path.name for path in (Path(str(resumed.artifacts)) / "checkpoints").iterdir()} == {
        "last.ckpt",
        "best.ckpt",
    }


def test_a_run_killed_in_mid_epoch_goes_on_in_the_same_run_to_the_same_weights(workplace, squares, whole):
    config = settings(squares, workplace / "killed", whole.store)
    killed("adapt", config, Noise(), Killed("on_train_batch_start", 3))  # the source has started again
    (run_id,) = run_ids(config, "adapt")
    checkpoints = Path(config.tracking.folder) / run_id / "checkpoints"
    assert [path.name for path in checkpoints.glob("*.ckpt")] == ["step_3.ckpt"]
    resumed = adapt(config, [Noise()], resume="auto")
    assert resumed.run_id == run_id
    assert_same(resumed, whole.adapted)


MOMENTS = {
    "before any step": Killed("on_train_start", 0),
    "in the first step, before a checkpoint": Killed("on_before_optimizer_step", 1),
    "writing the first checkpoint": KilledWhileWriting(3),
    "behind the last step of an epoch": Killed("on_train_batch_end", 4),
    "in validation": Killed("on_validation_batch_end", 4),
    "at an epoch's end": Killed("on_train_epoch_end", 4),
    "behind everything": KilledBehindEverything(),
    "behind an epoch's checkpoint": Killed("on_train_epoch_start", 4),
    "behind the first step of an epoch": Killed("on_train_batch_end", 5),
    "writing a later one": KilledWhileWriting(6),
    "in the second epoch": Killed("on_train_batch_start", 7),
    "behind the last checkpoint": Killed("on_train_end", 8),
}


@pytest.mark.slow
@pytest.mark.parametrize("moments", [list(MOMENTS)[:7], list(MOMENTS)[7:]], ids=["up to validation", "second epoch"])
def test_whatever_the_moments_of_kills_the_run_ends_as_if_there_had_been_none(workplace, squares, whole, moments):
    """One run, killed at each moment in turn: what a kill leaves in files and store is what the next process finds."""
    config = settings(squares, workplace / "killed", whole.store)
    for number, moment in enumerate(moments):
        killed("adapt", config, Noise(), MOMENTS[moment], resume="auto" if number else None)
    assert_same(adapt(config, [Noise()], resume="auto"), whole.adapted)


@pytest.mark.slow
def test_pretraining_that_is_killed_goes_on_also_when_adapt_started_it(workplace, squares, whole):
    """2 batches an epoch: killed by itself in the first epoch and while writing its end, by way of adapt in the second."""
    config = settings(squares, workplace / "killed", trainer__checkpoint_every_n_steps=1)
    killed("pretrain", config, Killed("on_train_batch_start", 1))
    (run_id,) = run_ids(config, "pretrain")
    killed("pretrain", config, KilledWhileWriting(2), resume=run_id)
    killed("pretrain", config, Killed("on_train_batch_start", 3), resume=run_id)
    killed("adapt", config, Killed("on_train_batch_start", 5), resume="auto")
    (adapted,) = run_ids(config, "adapt")
    client = mlflow.MlflowClient(tracking_uri=config.tracking.uri)
    assert client.get_run(adapted).data.tags["dann.source_run_id"] == run_id
    assert run_ids(config, "pretrain") == [run_id]
    model = model_folder(client.get_run(run_id).info.artifact_uri) / "model.safetensors"
    assert model.read_bytes() == weights(whole.pretrained)


@pytest.mark.slow
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_is_killed_again(workplace, squares, whole):
    config = settings(squares, workplace / "killed", whole.store)
    killed("adapt", config, Noise(), Killed("on_train_batch_start", 7))  # checkpoints of 4 and 6 steps are kept
    (run_id,) = run_ids(config, "adapt")
    checkpoints = Path(config.tracking.folder) / run_id / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("step_*.ckpt")) == ["step_4.ckpt", "step_6.ckpt"]
    spoiled(checkpoints / "step_6.ckpt", "flipped")
    killed("adapt", config, Noise(), Killed("on_train_batch_start", 5), resume=run_id)
    assert_same(adapt(config, [Noise()], resume=run_id), whole.adapted)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {"data__num_workers": 2},
        {"domain_adaptation__batchnorm": "target_stats", "optimizer__schedule": "cosine", "optimizer__name": "sgd"},
        # channels_last: the state of adamw too has the order of the weights
        {"trainer__limit_train_batches": 3, "optimizer__schedule": "one_cycle", "trainer__channels_last": True},
    ],
    ids=["workers", "target_stats", "limited channels_last"],
)
def test_other_settings_go_on_to_the_same_weights_too(workplace, squares, whole, more):
    uninterrupted = whole.adapted  # workers change no number
    if "data__num_workers" not in more:
        uninterrupted = adapt(settings(squares, workplace / "whole", whole.store, **more), [Noise()])
    config = settings(squares, workplace / "killed", whole.store, **more, trainer__checkpoint_every_n_steps=1)
    killed("adapt", config, Noise(), Killed("on_train_batch_start", 5))
    assert_same(adapt(config, [Noise()], resume="auto"), uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "damaged"), [("behind everything", False), ("behind the last checkpoint", True)])
def test_a_run_killed_behind_its_last_step_ends_with_its_best_weights_and_their_scores(
    workplace, squares, whole, moment, damaged, caplog
):
    best = {"monitor__final_model": "best", "monitor__metric": "loss/val_target"}
    config = settings(squares, workplace / "killed", whole.store, **best)
    killed("adapt", config, Noise(), MOMENTS[moment])
    if not damaged:
        uninterrupted = adapt(settings(squares, workplace / "whole", whole.store, **best), [Noise()])
        # the chosen weights' scores stand beside the last ones'
        assert_same(adapt(config, [Noise()], resume="auto"), uninterrupted, once=False)
        return
    (path,) = Path(config.tracking.folder).glob("*/checkpoints/best*.ckpt")
    spoiled(path, "flipped")
    resumed = adapt(config, [Noise()], resume="auto")
    assert "the best checkpoint is damaged or gone" in caplog.text
    last = torch.load(Path(str(resumed.artifacts)) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    final = load_file(model_folder(resumed.artifacts) / "model.safetensors")
    assert all(torch.equal(last[f"network.{name}"], value) for name, value in final.items())


class Teacher(DomainAdaptationMethod):
    """Keeps a slow copy of the network, made at the start of training and put in its place at the end."""

    feature_layers = ("encoder",)

    def on_train_start(self, network):
        self.slow = copy.deepcopy(network).requires_grad_(False)
        self.__dict__["fast"] = network  # seen, not owned

    def loss(self, outputs, progress):
        with torch.no_grad():
            for slow, fast in zip(self.slow.parameters(), self.fast.parameters(), strict=True):
                slow.lerp_(fast, 0.3)
        return MethodLoss(None, None, 0.0)

    def on_train_end(self, network):
        network.load_state_dict(self.slow.state_dict())


@pytest.mark.slow
def test_a_method_gets_its_state_back_and_is_told_the_end_that_a_kill_kept_from_it(workplace, squares, whole):
    own = {"domain_adaptation__method__class_path": f"{__name__}.Teacher"}
    config = settings(squares, workplace / "killed", whole.store, **own)
    killed("adapt", config, Noise(), Killed("on_train_batch_start", 5))
    killed("adapt", config, Noise(), Killed("on_train_end", 8), resume="auto")
    uninterrupted = adapt(settings(squares, workplace / "whole", whole.store, **own), [Noise()])
    assert_same(adapt(config, [Noise()], resume="auto"), uninterrupted)


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_from_its_artifacts(workplace, squares, whole):
    """SIGTERM closes the run: its folder is gone and its checkpoints are artifacts."""

    class Stopped(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 5:
                os.kill(os.getpid(), signal.SIGTERM)

    config = settings(squares, workplace / "killed", whole.store)
    with pytest.raises(SystemExit):
        adapt(config, [Noise(), Stopped()])
    (run_id,) = run_ids(config, "adapt")
    assert not (Path(config.tracking.folder) / run_id).exists()
    client = mlflow.MlflowClient(tracking_uri=config.tracking.uri)
    assert {item.path for item in client.list_artifacts(run_id, "checkpoints")} == {
        "checkpoints/last.ckpt", "checkpoints/best.ckpt",
    }  # fmt: skip
    asked = settings_to_resume(run_id, "adapt", None, {"tracking.uri": config.tracking.uri})
    assert_same(adapt(asked, [Noise()], resume=run_id), whole.adapted)


# --- orders, states, files: without a run ---


class Numbers(Dataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: tuple[int, int]) -> torch.Tensor:
        return torch.tensor(index)


def two_domains(workers: int) -> dict[str, DataLoader]:
    return {
        name: DataLoader(
            data, size, sampler=SeededOrder(data, seed), drop_last=True, num_workers=workers,  # pyright: ignore
            generator=torch.Generator().manual_seed(seed), persistent_workers=workers > 0,
        )
        for name, data, size, seed in (("source", Numbers(7), 3, 1), ("target", Numbers(16), 3, 2))
    }  # fmt: skip


def batches(loaders: Mapping[str, DataLoader], epochs: int, first_epoch: int = 0, first_batch: int = 0) -> list[str]:
    """What training sees, fetched as Lightning fetches: a new iterator before each epoch, never asked past its end."""
    combined, seen = CombinedLoader(dict(loaders), "max_size_cycle"), []
    iterator = iter(combined)
    for epoch in range(first_epoch, epochs):
        for loader in loaders.values():
            loader.sampler.set_epoch(epoch)  # pyright: ignore
        if epoch > first_epoch:
            iterator = iter(combined)
        for _ in range(first_batch if epoch == first_epoch else 0, len(combined)):
            seen.append(str(next(iterator)[0]))
    return seen


@pytest.mark.parametrize("done", range(15))
def test_the_order_goes_on_behind_any_batch_as_if_nothing_had_happened(done):
    whole = batches(two_domains(0), 3)
    assert len(whole) == len(set(whole)) == 15
    assert batches(two_domains(2), 3) == whole if done == 0 else True
    first, epoch, batch = two_domains(0), done // 5, done % 5
    seen = batches(first, epoch) if epoch else []
    combined = CombinedLoader(dict(first), "max_size_cycle")
    iterator = iter(combined)
    for loader in first.values():
        loader.sampler.set_epoch(epoch)  # pyright: ignore
    for _ in range(batch):
        seen.append(str(next(iterator)[0]))
    assert seen == whole[:done]
    if not done:
        return
    later = two_domains(done % 2)
    for name, loader in first.items():
        in_pass = (batch - 1) % len(loader) + 1
        position = loader.sampler.position(in_pass * 3 if batch else None)  # pyright: ignore
        later[name].sampler.go_on_from(position, epoch)  # pyright: ignore
    assert batches(later, 3, epoch, batch) == whole[done:]


def test_the_order_of_a_new_epoch_is_that_of_the_published_results():
    """One number a pass is drawn beside the order, and another order between passes of one epoch alone."""
    loaders = two_domains(0)
    batches(loaders, 1)
    for domain, count, seed, drawn in (("target", 16, 2, "no no"), ("source", 7, 1, "no yes yes no")):
        generator, order = torch.Generator().manual_seed(seed), []
        for between in drawn.split():
            if between == "yes":
                torch.randperm(count, generator=generator)
            torch.empty((), dtype=torch.int64).random_(generator=generator)
            order = torch.randperm(count, generator=generator).tolist()
        loaders[domain].sampler.set_epoch(1)  # pyright: ignore
        assert [index for index, _ in loaders[domain].sampler] == order


def test_random_states_come_back_and_are_plain_values(tmp_path):
    def draw():
        return random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), torch.rand(3).tolist()

    draw()  # gauss and randn keep a second number for later
    files.write({"states": random_states()}, tmp_path / "step_1.ckpt")
    wanted = draw()
    draw()
    restore(files.read(tmp_path / "step_1.ckpt")["states"])
    assert draw() == wanted


def spoiled(path: Path, how: str) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    changed = {
        "empty": b"", "truncated": content[:middle], "longer": content + b"x",
        "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
    }  # fmt: skip
    path.write_bytes(changed[how])


@pytest.mark.parametrize("how", ["empty", "truncated", "longer", "flipped"])
@pytest.mark.parametrize("beside", [True, False])
def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_is_used(tmp_path, caplog, how, beside):
    for step in (8, 12, 100):  # 100 is newer than 12, though not by its letters
        files.write({"step": step, "weights": torch.arange(1000)}, tmp_path / f"step_{step}.ckpt")
    assert files.newest_intact(tmp_path) == tmp_path / "step_100.ckpt"
    spoiled(tmp_path / "step_100.ckpt", how)
    if not beside:
        if how == "longer":
            pytest.skip("bytes behind an archive do no harm to what is in it")
        (tmp_path / "step_100.ckpt.blake2b").unlink()
    assert files.newest_intact(tmp_path) == tmp_path / "step_12.ckpt"
    assert files.read(tmp_path / "step_12.ckpt")["step"] == 12
    assert "step_100.ckpt is damaged" in caplog.text
    with pytest.raises(ValueError, match="damaged"):
        files.read(tmp_path / "step_100.ckpt")


def test_a_kill_while_the_files_get_their_last_names_leaves_the_best_weights_findable(tmp_path, monkeypatch):
    class Kill(BaseException):
        pass

    for renames in range(3):
        folder = tmp_path / str(renames)
        files.write({"weights": "best"}, folder / "best_2.ckpt")
        files.write({files.OWN: {"best_step": 2}, "global_step": 4}, folder / "step_4.ckpt")
        left = iter(range(renames))

        def replace(source, target, left=left, really=os.replace):
            if next(left, None) is None:
                raise Kill
            really(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "replace", replace)
            with pytest.raises(Kill) if renames < 2 else contextlib.nullcontext():
                files.finish(folder, 2)
        files.reopen(folder)
        assert files.newest_intact(folder) == folder / "step_4.ckpt"
        found = files.best_of(folder, 2)
        assert found is not None
        assert files.read(found) == {"weights": "best"}


def test_what_could_not_be_loaded_without_running_code_is_told_from_what_can():
    assert files.is_plain({"a": [1, 2.5, None, True, "x", torch.zeros(2)], "b": {"c": (1,)}})
    for foreign in (Path("x"), np.float64(1), {"a": [object()]}, {Path("x"): 1}):
        assert not files.is_plain(foreign)


def test_a_checkpoint_that_is_not_yet_whole_has_no_name(tmp_path, monkeypatch):
    files.write({"step": 1}, tmp_path / "step_1.ckpt")

    def power_fails(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", power_fails)
    with pytest.raises(KeyboardInterrupt):
        files.write({"step": 2}, tmp_path / "step_2.ckpt")
    assert files.newest_intact(tmp_path) == tmp_path / "step_1.ckpt"
    files.forget_after(tmp_path, 1)
    assert {path.name for path in tmp_path.iterdir() if "2.ckpt.b" not in path.name} == {
        "step_1.ckpt", "step_1.ckpt.blake2b",
    }  # fmt: skip


# --- which run goes on: a store, but no training ---


def some_run(
    config: Config, status: str = "RUNNING", job: str = "adapt", process: str = "gone", digest: str = "d"
) -> str:
    """A run as a killed process leaves it."""
    store = open_store(config.tracking.uri, config.tracking.experiment)
    name = {"alive": process_name(), "gone": process_name().rpartition(":")[0] + ":1.00", "elsewhere": "moon:1:1.00"}
    run_id = store.client.create_run(store.experiment_id).info.run_id
    tags = {"dann.job": job, "dann.process": name[process], "dann.digest": digest}
    params = [Param("cfg.threads", "1"), Param("cfg.tracking.folder", config.tracking.folder)]
    store.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()], params=params)
    if status != "RUNNING":
        store.client.set_terminated(run_id, status)
    folder = Path(config.tracking.folder) / run_id
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config_to_yaml(config))
    return run_id


@pytest.fixture(scope="module")
def one_store(squares, tmp_path_factory, whole) -> Config:
    return settings(squares, tmp_path_factory.mktemp("store") / "store", whole.store)


@pytest.fixture
def config(workplace, one_store) -> Config:
    return one_store


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"status": "FINISHED"}, "is FINISHED"),
        ({"process": "alive"}, "is still writing"),
        ({"job": "pretrain"}, "a run of pretrain"),
    ],
)
def test_a_run_that_cannot_go_on_is_refused(config, run, message):
    with pytest.raises(InputError, match=message):
        adapt(config, resume=some_run(config, **run))


def test_an_unknown_run_is_refused(config):
    with pytest.raises(InputError, match="has no such run"):
        adapt(config, resume="0" * 32)


def test_a_run_of_another_machine_goes_on_when_named_and_is_left_out_by_auto(config, caplog):
    run_id = some_run(config, process="elsewhere", digest="moon")
    store = open_store(config.tracking.uri, config.tracking.experiment)
    assert run_to_go_on(store, "adapt", run_id, "moon", config) == run_id
    assert "make sure it has ended" in caplog.text
    assert run_to_go_on(store, "adapt", "auto", "moon", config) is None
    assert f"use resume={run_id}" in caplog.text


def test_auto_takes_the_newest_unfinished_run_of_the_same_job_and_digest(config, caplog):
    caplog.set_level("INFO")
    store = open_store(config.tracking.uri, config.tracking.experiment)
    assert run_to_go_on(store, "adapt", "auto", "mine", config) is None
    assert "a new run is started" in caplog.text
    some_run(config, status="KILLED", digest="mine")
    newest = some_run(config, status="FAILED", digest="mine")
    for other in ({"status": "FINISHED"}, {"job": "pretrain"}, {"digest": "e"}, {"process": "alive"}):
        some_run(config, **{"digest": "mine", **other})
    assert run_to_go_on(store, "adapt", "auto", "mine", config) == newest
    with pytest.raises(InputError, match="threads is 2, but 1 in run"):
        run_to_go_on(store, "adapt", "auto", "mine", load_config(None, {"threads": 2}))


def test_the_settings_are_the_run_s_own_and_others_are_refused_by_key_and_both_values(config):
    run_id, uri = some_run(config), config.tracking.uri
    here = {"tracking.uri": uri, "tracking.folder": config.tracking.folder}
    assert settings_to_resume(run_id, "adapt", None, here) == config
    assert settings_to_resume(run_id, "adapt", None, here | {"trainer.max_epochs": "2"}) == config
    changed = settings_to_resume(run_id, "adapt", None, here | {"data.num_workers": "3"})
    assert changed.data.num_workers == 3
    with pytest.raises(InputError, match=r"trainer.max_epochs is 7, but 2 in the run to resume"):
        settings_to_resume(run_id, "adapt", None, here | {"trainer.max_epochs": "7"})
    Path("c.yaml").write_text("optimizer: {lr: 0.5}\n")
    with pytest.raises(InputError, match=r"optimizer.lr is 0.5, but 0.001 in the run"):
        settings_to_resume(run_id, "adapt", "c.yaml", here)
    with pytest.raises(InputError, match="unknown setting"):
        settings_to_resume(run_id, "adapt", None, here | {"trainer.max_epoch": "7"})
    store = open_store(uri, config.tracking.experiment)
    with pytest.raises(InputError, match=r"optimizer.lr is 0.5, but 0.001 in the run"):
        as_the_run(store, run_id, "adapt", replace(config, {"optimizer.lr": 0.5}))


def test_a_run_whose_data_changed_is_refused(config):
    store = open_store(config.tracking.uri, config.tracking.experiment)
    with pytest.raises(InputError, match="have changed since"):
        run_to_go_on(store, "adapt", some_run(config, digest="other"), "d", config)


def test_a_class_named_by_settings_out_of_the_store_is_not_imported_unasked(config):
    own = load_config(None, {"domain_adaptation.method.class_path": "somebody.Evil", "tracking.uri": config.tracking.uri,
                             "tracking.folder": config.tracking.folder})  # fmt: skip
    run_id = some_run(own)
    store = open_store(config.tracking.uri, config.tracking.experiment)
    kept = Path(config.tracking.folder) / run_id / "config.yaml"
    store.client.log_artifact(run_id, str(kept))
    kept.unlink()
    here = {"tracking.uri": config.tracking.uri}
    with pytest.raises(InputError, match=r"somebody.Evil.*set it yourself"):
        settings_to_resume(run_id, "adapt", None, here)
    named = settings_to_resume(run_id, "adapt", None, here | {"domain_adaptation.method.class_path": "somebody.Evil"})
    assert named.domain_adaptation.method.class_path == "somebody.Evil"


def test_checkpoints_among_the_artifacts_are_fetched_where_the_folder_is_gone(config, caplog):
    caplog.set_level("INFO")
    run_id = some_run(config, status="KILLED")
    store, folder = open_store(config.tracking.uri, config.tracking.experiment), Path(config.tracking.folder) / run_id
    assert checkpoint_to_go_on_from(store, run_id, folder) is None
    assert "starts from its beginning" in caplog.text
    files.write({"step": 3}, folder / "checkpoints" / "step_3.ckpt")
    store.client.log_artifacts(run_id, str(folder))
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()
    assert checkpoint_to_go_on_from(store, run_id, folder) == folder / "checkpoints" / "step_3.ckpt"
