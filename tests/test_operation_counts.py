"""What a run may cost, as counts of operations, which no other work changes: a guard against slow regressions."""

import collections
import contextlib
import functools

import pytest
import pytorch_lightning as pl
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dann_experiments import DomainClassifier, adapt, load_config
from dann_experiments.training.bad_numbers import BadNumbers
from dann_experiments.training.monitor import DomainAdaptationMonitorCallback
from tests.conftest import copy_store, small_settings

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "bincount")
"""Operations whose result has to reach the host before the program goes on (`.item()`, `bool()`, sizes that depend on values)."""


class Waits(TorchDispatchMode):
    """Names of the operations for which a program would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        self.operations += 1
        by_mask = name in ("index", "index_put", "index_put_") and any(
            item is not None and item.dtype in (torch.bool, torch.uint8) for item in args[1]
        )
        if name.strip("_") in {waiting.strip("_") for waiting in WAITING} or name.startswith("unique") or by_mask:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


class Counting(pl.Callback):
    """Forwards of the network's parts, by images, and what steps wait for."""

    def __init__(self) -> None:
        self.images: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
        self.waits: list[Waits] = []
        self.when = "training"

    def on_fit_start(self, trainer, pl_module):
        for part in ("encoder", "decoder"):
            getattr(pl_module.network, part).register_forward_hook(
                lambda module, inputs, output, part=part: self._seen(part, output)
            )
        (watch,) = [callback for callback in trainer.callbacks if isinstance(callback, BadNumbers)]
        watch.at_once = False  # as on a GPU

    def _seen(self, part, output):
        last = output[-1] if isinstance(output, (list, tuple)) else output
        self.images[self.when][part] += len(last)

    def on_validation_start(self, trainer, pl_module):
        self.when = f"validation {trainer.sanity_checking}"

    def on_validation_end(self, trainer, pl_module):
        self.when = "training"

    def on_train_end(self, trainer, pl_module):
        self.when = "after"

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.waits.append(Waits())
        self.waits[-1].__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.waits[-1].__exit__(None, None, None)


@pytest.fixture(scope="module")
def counted(squares, shared_runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("counted")
    copy_store(shared_runs.folder / "after_pretrain" / "mlflow.db", folder)

    @functools.cache
    def run(classifier):
        counting, kind = Counting(), {"domain_adaptation__method__classifier": classifier}
        kind["tracking__images"] = False  # they predict a few images again, after each validation
        settings = small_settings(squares, tracking__uri=f"sqlite:///{folder}/mlflow.db", trainer__max_epochs=1, **kind)
        with contextlib.chdir(folder):
            adapt(load_config(None, settings), callbacks=[counting])
        return counting

    return run


STEPS, SOURCE, TARGET = 4, 4, 3  # 13 target images in batches of 3; batches of 4 and 3 images
VALIDATION = 4 + 5  # images of both domains


def test_no_target_image_meets_the_decoder_and_each_meets_the_encoder_once(counted):
    images = counted("pooled").images["training"]
    assert images == {"encoder": STEPS * (SOURCE + TARGET), "decoder": STEPS * SOURCE}


def test_a_validation_image_is_forwarded_once(counted):
    images = counted("pooled").images
    assert images["validation True"] == {"encoder": VALIDATION, "decoder": VALIDATION}  # the warm start
    assert images["validation False"] == {"encoder": VALIDATION, "decoder": VALIDATION}


@pytest.mark.parametrize("classifier", ["pooled", "pixel", "patch"])
def test_a_training_step_waits_for_nothing(counted, classifier):
    steps = counted(classifier).waits
    assert len(steps) == STEPS
    assert all(step.operations > 100 for step in steps)  # the count sees the step
    assert [step.names for step in steps[1:]] == [[]] * 3  # the first decides at once (decision 10)


def test_the_loss_and_the_scores_without_labels_share_one_softmax_a_batch(tmp_path):
    logits, labels = torch.randn(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.int64)
    monitor = DomainAdaptationMonitorCallback(3)
    with Operations() as operations:
        outputs = {"logits": logits, "labels": labels, "valid": torch.ones(2, 8, 8)}
        monitor.on_validation_batch_end(pl.Trainer(logger=False, default_root_dir=tmp_path), None, outputs, None, 0, 1)
    assert operations.counts["_log_softmax"] == 1
    assert operations.counts["_softmax"] == 0
    assert operations.counts["argmax"] == operations.counts["max"] == 0  # slow on a CPU over a dimension in the middle


def test_a_pooled_classifier_runs_no_convolution_forward_or_backward():
    classifier = DomainClassifier(6, 8)
    features = torch.randn(3, 6, 4, 4, requires_grad=True)
    with Operations() as operations:
        classifier(features).sum().backward()
    assert not [name for name in operations.counts if "convolution" in name]
    assert operations.counts["addmm"] == 3
