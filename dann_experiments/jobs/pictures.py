"""Predicts a few images of each domain, for the figures of a run and for its pictures by step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.trainer.states import TrainerFn
from torch import nn

from dann_experiments.data.joined import Items
from dann_experiments.reports.images import display_image
from dann_experiments.reports.panel import Part, draw_panel
from dann_experiments.tracking.pictures import Pictures
from dann_experiments.training.scoring import predict_images

IN_FIGURES = 6  # images per domain in the prediction figures
IN_PANEL = 2  # images per domain in the pictures by step
MOST_STEPS = 20
"""Pictures by step of one run, at most."""
KEY = "images/predictions"  # the part before the slash is the heading of its section in MLflow


class Album:
    """At most `most` images, spread over a set, with predictions of several networks, or of one network at several times."""

    def __init__(self, dataset: Items | None, most: int = IN_FIGURES) -> None:
        self.images, items = [], []
        if dataset is not None:
            # spread over the set, so that more than one scene is shown if a manifest is sorted by scene
            indices = np.linspace(0, len(dataset) - 1, min(most, len(dataset)))
            items = [dataset[int(index)] for index in indices]
            stretch = dataset.headers[0].dtype != "uint8"
            self.images = [display_image(dataset.picture(item), stretch=stretch) for item in items]
        self.truth = [item["mask"].numpy() for item in items if "mask" in item]
        self.predictions: dict[str, list[np.ndarray]] = {}
        self._inputs = [item["image"] for item in items]

    def add(self, when: str, network: nn.Module) -> None:
        """Predict all images with the network as it is now, and keep the predictions under the name `when`."""
        self.predictions[when] = predict_images(network, self._inputs)

    def part(self, title: str, network: nn.Module, most: int) -> Part:
        """Return `most` of the images, spread over the album, with the predictions of the network as it is now."""
        chosen = [int(index) for index in np.linspace(0, len(self.images) - 1, min(most, len(self.images)))]
        truth = [self.truth[index] for index in chosen] if self.truth else []
        predictions = predict_images(network, [self._inputs[index] for index in chosen])
        return Part(title, [self.images[index] for index in chosen], truth, predictions)


class PicturesByStep(pl.Callback):
    """Logs a panel of images, masks and predictions after validations: before training, after the last epoch, and after evenly
    spaced epochs between, MOST_STEPS in all.

    Changes nothing of the training: the network's modes are restored, gradients and BatchNorm statistics are not touched, and no
    random number is drawn."""

    def __init__(self, albums: Mapping[str, Album], classes: int, pictures: Pictures) -> None:
        self._albums = {domain: album for domain, album in albums.items() if album.images}
        self._classes = classes
        self._pictures = pictures

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or not self._albums:
            return
        epoch = 0 if trainer.sanity_checking else trainer.current_epoch + 1
        if not is_shown(epoch, trainer.max_epochs or 0) or self._pictures.has(trainer.global_step):
            return
        network = pl_module.network
        assert isinstance(network, nn.Module)
        parts = [album.part(domain, network, IN_PANEL) for domain, album in self._albums.items()]
        self._pictures.log(draw_panel(parts, self._classes), trainer.global_step)


def is_shown(epoch: int, epochs: int) -> bool:
    """Return whether a picture is logged after this epoch, counted from 1; 0 is before training.

    >>> [epoch for epoch in range(51) if is_shown(epoch, 50)]
    [0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 36, 39, 42, 45, 48, 50]
    """
    return epoch in (0, epochs) or epoch % math.ceil(epochs / (MOST_STEPS - 1)) == 0
