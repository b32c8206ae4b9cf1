"""Pictures by step: named as MLflow names them, sent while a run goes on, and without any effect on the training."""

from __future__ import annotations

import errno
import re
import sqlite3
import threading
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
from mlflow import MlflowClient
from PIL import Image
from test_sender import Refusing
from test_sweep_cluster import free_port, start_server, stop_server
from test_sweeps import until

from dann_experiments import adapt, load_config
from dann_experiments.jobs.pictures import MOST_STEPS, is_shown
from dann_experiments.reports.colors import paint
from dann_experiments.reports.panel import GAP, HEADING, WIDTH, Part, draw_panel
from dann_experiments.tracking.pictures import LOGGED_IMAGES, Pictures
from dann_experiments.tracking.run import tracked_run
from dann_experiments.tracking.sender import Sender
from dann_experiments.tracking.store import open_store
from tests.conftest import small_settings

PICTURE = Image.new("RGB", (8, 4))


def names_in(client: MlflowClient, run_id: str) -> list[str]:
    return sorted(Path(item.path).name for item in client.list_artifacts(run_id, "images"))


def steps_of(names: list[str]) -> list[int]:
    """The steps of the pictures, in order, each with its small copy."""
    steps = Counter(int(re.findall(r"\+step\+(\d+)\+", name)[0]) for name in names)
    assert set(steps.values()) <= {2}, names
    return sorted(steps)


def test_files_and_tag_have_the_form_of_mlflow_s_own(workplace):
    store = open_store(None, "x")
    with tracked_run(store, None, "x", {}, workplace / "out", use_claimed=False) as run:
        Pictures(run, "a/b").log(PICTURE, 7)
    own = store.client.create_run(store.experiment_id).info.run_id
    store.client.log_image(own, PICTURE, key="a/b", step=7)

    def form(run_id: str) -> list[str]:
        return [re.sub(r"\d{10,}|[0-9a-f]{8}(-[0-9a-f]+){4}", "*", name) for name in names_in(store.client, run_id)]

    assert form(run.run_id) == form(own)
    tags = [store.client.get_run(run_id).data.tags.get(LOGGED_IMAGES) for run_id in (run.run_id, own)]
    assert tags == ["True", "True"]


def test_a_file_is_sent_while_the_run_goes_on_and_again_only_if_it_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr("dann_experiments.tracking.sender.SPILL_SECONDS", 0.01)
    monkeypatch.setattr("dann_experiments.tracking.sender.SEND_SECONDS", 0.0)
    store, file = Refusing(), tmp_path / "f.png"
    sender = Sender(store, "r", tmp_path)
    file.write_text("x")
    sender.put_file(file)
    until(lambda: len(store.files) == 1, pause=0.001)
    sender.put_file(file)
    file.write_text("longer")
    sender.put_file(file)
    assert sender.close("FINISHED")
    assert len(store.files) == 2


def test_half_written_files_are_not_sent(workplace):
    store = open_store(None, "x")
    with tracked_run(store, None, "x", {}, workplace / "out", use_claimed=False) as run:
        Pictures(run, "a").log(PICTURE, 0)
        (run.folder / "images" / "b.png.part").write_text("x")
    assert len(names_in(store.client, run.run_id)) == 2


def test_a_disk_that_is_full_leaves_pictures_out_with_one_warning(workplace, caplog, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, "full", str(path))

    store = open_store(None, "x")
    with tracked_run(store, None, "x", {}, workplace / "out", use_claimed=False) as run:
        pictures = Pictures(run, "a")
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", full)
            for step in (0, 1):
                pictures.log(PICTURE, step)
        pictures.log(PICTURE, 2)
    assert steps_of(names_in(store.client, run.run_id)) == [2]
    assert caplog.text.count("without this picture") == 1


@pytest.mark.parametrize("epochs", [1, 2, 19, 20, 21, 50, 1000])
def test_the_first_and_the_last_are_among_at_most_twenty_evenly_spaced_pictures(epochs):
    shown = [epoch for epoch in range(epochs + 1) if is_shown(epoch, epochs)]
    assert len(shown) <= MOST_STEPS
    assert (shown[0], shown[-1]) == (0, epochs)
    assert len(set(np.diff(shown[:-1]))) <= 1


def test_a_panel_has_masks_and_predictions_in_the_colors_of_the_classes_and_is_small():
    generator = np.random.default_rng(0)
    images = [generator.random((90, 60, 3)), generator.random((20, 30, 3))]
    ids = [np.full((90, 60), 1), np.full((20, 30), 2)]
    panel = draw_panel([Part("source", images, ids, ids), Part("target", images, [], ids)], 3)
    pixels, tile = np.asarray(panel.convert("RGB")), (panel.width - GAP) // 5 - GAP
    assert panel.width <= WIDTH
    for column in (1, 2, 4):  # mask and prediction of the source, prediction of the target
        for row, name in enumerate((1, 2)):
            at = pixels[HEADING + row * (tile + GAP) + 5, GAP + column * (tile + GAP) + 5]
            assert at.tolist() == paint(np.array([[name]]), 3)[0, 0].tolist()


class Killed(pl.Callback):
    """Ends a run after an epoch, before the checkpoint of this epoch is saved."""

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking and trainer.current_epoch == 1:
            raise RuntimeError("killed")


def weights_of(run_id: str) -> bytes:
    (path,) = Path(MlflowClient().download_artifacts(run_id, "model")).glob("*.safetensors")
    return path.read_bytes()


def metrics_of(run_id: str) -> set[tuple]:
    with closing(sqlite3.connect("mlflow.db")) as connection:
        asked = "SELECT key, step, value, is_nan FROM metrics WHERE run_uuid = ? AND key NOT LIKE 'time/%'"
        return set(connection.execute(asked, (run_id,)))


@pytest.mark.slow
def test_results_are_the_same_to_the_bit_without_pictures_and_for_a_run_that_was_killed_and_resumed(
    squares, pretrained_place
):
    def config(images: bool):
        own = {"domain_adaptation.batchnorm": "target_stats", "data.source.augmentation": "strong"}
        return load_config(None, small_settings(squares, trainer__max_epochs=3, tracking__images=images, seed=4) | own)

    plain, shown = (adapt(config(images)).run_id for images in (False, True))
    with pytest.raises(RuntimeError, match="killed"):
        adapt(config(True), callbacks=[Killed()])
    resumed = adapt(config(True), resume="auto").run_id
    client = MlflowClient()
    assert weights_of(plain) == weights_of(shown) == weights_of(resumed)
    assert metrics_of(plain) == metrics_of(shown) == metrics_of(resumed)
    assert names_in(client, plain) == []
    assert steps_of(names_in(client, shown)) == steps_of(names_in(client, resumed)) == [0, 4, 8, 12]
    assert client.get_run(plain).data.tags["dann.digest"] == client.get_run(shown).data.tags["dann.digest"]


@pytest.mark.slow
def test_a_server_that_is_killed_three_times_gets_every_picture_and_every_point(workplace, monkeypatch):
    monkeypatch.setattr("dann_experiments.tracking.sender.SEND_SECONDS", 0.1)
    port = free_port()
    server = start_server(workplace, port)
    try:
        store = open_store(f"http://127.0.0.1:{port}", "away")
        with tracked_run(store, None, "x", {}, workplace / "out", use_claimed=False, system_metrics=True) as run:
            pictures, step = Pictures(run, "a"), 0
            for _ in range(3):
                until(lambda: not run.sender._files and not run.sender._memory)
                stop_server(server)
                for _ in range(10):
                    run.log_metrics({"loss": float(step)}, step)
                    pictures.log(PICTURE, step)
                    step += 1
                server = start_server(workplace, port)
            files = len(list((run.folder / "images").iterdir()))
        names = names_in(store.client, run.run_id)
        assert len(names) == files == 60
        assert steps_of(names) == list(range(30))
        history = store.client.get_metric_history(run.run_id, "loss")
        assert sorted((point.step, point.value) for point in history) == [(one, float(one)) for one in range(30)]
        assert store.client.get_run(run.run_id).data.tags[LOGGED_IMAGES] == "True"
    finally:
        stop_server(server)
    assert not [thread for thread in threading.enumerate() if thread.name == "system-metrics"]
