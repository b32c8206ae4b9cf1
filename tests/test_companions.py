"""Losses on target images that combine with a method: their equations, what they cost, and that they resume."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import mlflow
import pytest
import torch
from conftest import small_settings
from test_resume import Killed, Noise, assert_same, killed, settings
from torch import Tensor, nn
from torch.nn import functional

from dann_experiments import InputError, load_config
from dann_experiments.adaptation.companions.companion import WithCompanions
from dann_experiments.adaptation.companions.entropy import EntropyMinimization, MaximumSquares
from dann_experiments.adaptation.companions.fda import FourierAdaptation
from dann_experiments.adaptation.companions.self_training import SelfTraining
from dann_experiments.adaptation.companions.style import Style
from dann_experiments.adaptation.dann import DANNMethod, LambdaZero, SourceOnly
from dann_experiments.adaptation.method import Progress, StepOutputs
from dann_experiments.jobs import adapt
from dann_experiments.training.module import AdaptationModule

FIRST = Progress(0, 1, 0, 10)


def outputs_of(logits: Tensor, valid: Tensor | None = None, **more: object) -> StepOutputs:
    """A step whose target predictions are `logits`."""
    labels = torch.zeros(len(logits), *logits.shape[2:], dtype=torch.int64)
    return StepOutputs(
        torch.zeros_like(logits), labels, torch.ones(labels.shape), {}, {"segmentation_head": logits}, valid, **more
    )  # fmt: skip


# ---- entropy and maximum squares


def test_the_entropy_is_1_for_even_predictions_and_0_for_certain_ones():
    """Vu et al. 2019, eq. 2: normalized by log K."""
    even, certain = torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    certain[:, 1] = 100
    for logits, wanted in ((even, 1.0), (certain, 0.0)):
        loss, _ = EntropyMinimization().loss(outputs_of(logits), FIRST)
        assert loss.item() == pytest.approx(wanted, abs=1e-6)


def test_the_entropy_is_that_of_the_distributions_of_torch_without_pixels_of_no_data():
    torch.manual_seed(0)
    logits, valid = torch.randn(2, 4, 3, 5), (torch.rand(2, 3, 5) > 0.5).float()
    loss, _ = EntropyMinimization().loss(outputs_of(logits, valid), FIRST)
    entropy = torch.distributions.Categorical(logits=logits.movedim(1, -1)).entropy() / math.log(4)
    assert loss.item() == pytest.approx(entropy[valid > 0].mean().item(), rel=1e-5)
    nothing, _ = EntropyMinimization().loss(outputs_of(logits, torch.zeros(2, 3, 5)), FIRST)
    assert nothing.item() == 0


def test_maximum_squares_without_class_weights_are_minus_half_the_mean_of_the_squares():
    """Chen et al. 2019, eq. 4."""
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 4)
    loss, _ = MaximumSquares(alpha=0).loss(outputs_of(logits), FIRST)
    assert loss.item() == pytest.approx(-(logits.softmax(1) ** 2).sum(1).mean().item() / 2, rel=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_maximum_squares_weigh_each_class_of_an_image_by_its_size(masked):
    """Chen et al. 2019, eq. 9, pixel by pixel."""
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 4)
    valid = (torch.rand(2, 4, 4) > 0.4).float() if masked else torch.ones(2, 4, 4)
    loss, _ = MaximumSquares().loss(outputs_of(logits, valid if masked else None), FIRST)
    wanted = 0.0
    for image, mask in zip(logits.softmax(1), valid, strict=True):
        of_class = torch.bincount(image.argmax(0)[mask > 0], minlength=3).clamp_min(1)
        for row, column, kind in itertools.product(range(4), range(4), range(3)):
            if mask[row, column]:
                size = of_class[kind] ** 0.2 * mask.sum() ** 0.8
                wanted -= float(image[kind, row, column] ** 2 / (2 * size)) / len(logits)
    assert loss.item() == pytest.approx(wanted, rel=1e-5)


# ---- self-training


def network_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 3, 1)
    )


def step_of(network: nn.Module, **more: object) -> StepOutputs:
    generator = torch.Generator().manual_seed(5)
    source, target = (torch.randn(2, 3, 6, 6, generator=generator) for _ in range(2))
    labels = torch.randint(3, (2, 6, 6), generator=generator)
    labels[0, 0] = 255
    return StepOutputs(
        torch.zeros(2, 3, 6, 6), labels, (labels != 255).float(), {}, {}, given_images=(source, target),
        given_forward=network, **more,
    )  # fmt: skip


def test_the_loss_of_self_training_written_out_for_each_pixel():
    """DACS (Tranheden et al. 2021, section 3) and DAFormer (Hoyer et al. 2022, eqs. 2 to 4)."""
    network = network_of()
    network[3].p = 0.0
    companion = SelfTraining(threshold=0.4, seed=3)
    companion.on_train_start(network)
    valid = torch.ones(2, 6, 6)
    valid[1, :, :2] = 0
    outputs = step_of(network, target_valid=valid)
    loss, metrics = companion.loss(outputs, FIRST)
    source, target = outputs.images
    with torch.no_grad():
        chances, labels = network(target).softmax(1).max(1)  # in the first step the teacher is the network itself
    share = float(((chances > 0.4) & (valid > 0)).sum() / valid.sum())
    assert metrics["da_part/self_training_certain"].item() == pytest.approx(share)
    generator = torch.Generator().manual_seed(3)
    mixed, wanted, weights = target.clone(), labels.clone(), torch.full((2, 6, 6), share)
    wanted[valid == 0] = 255
    for image in range(2):
        order = torch.randperm(3, generator=generator)[:2]  # two of three classes: half, rounded up
        for row, column in itertools.product(range(6), range(6)):
            if outputs.source_labels[image, row, column] in order:
                mixed[image, :, row, column] = source[image, :, row, column]
                wanted[image, row, column] = outputs.source_labels[image, row, column]
                weights[image, row, column] = 1
    losses = functional.cross_entropy(network(mixed), wanted, ignore_index=255, reduction="none")
    assert loss.item() == pytest.approx((losses * weights).mean().item(), rel=1e-5)


def test_the_teacher_is_the_average_of_the_paper_and_gets_no_gradient():
    """DAFormer, eq. 2, with a = min(1 - 1 / (i + 1), decay) at step i; one update per step however many batches it has."""
    network = network_of()
    companion = SelfTraining(ema_decay=0.6)
    companion.on_train_start(network)
    wanted = None
    for step in range(4):
        with torch.no_grad():
            network[0].weight.add_(1.0)
        weight = network[0].weight.detach().clone()
        decay = min(1 - 1 / (step + 1), 0.6)
        wanted = weight if wanted is None else decay * wanted + (1 - decay) * weight
        for _ in range(2):
            loss, _ = companion.loss(step_of(network), Progress(0, 1, step, 4))
        assert torch.allclose(companion.teacher.module[0].weight, wanted)
    loss.backward()
    assert all(parameter.grad is None for parameter in companion.teacher.parameters())
    assert network[0].weight.grad is not None


def test_the_teacher_predicts_by_the_statistics_of_the_batch_without_dropout_and_leaves_no_trace():
    network = network_of()
    companion = SelfTraining()
    companion.on_train_start(network)
    target = torch.randn(2, 3, 6, 6) * 5 + 3
    companion.train()
    before = {name: buffer.clone() for name, buffer in companion.teacher.named_buffers()}
    first, second = companion._pseudo_labels(target), companion._pseudo_labels(target)
    assert torch.equal(first[1], second[1])
    by_running = network.eval()(target).softmax(1).max(1).values
    assert not torch.allclose(first[1], by_running)
    assert all(torch.equal(before[name], buffer) for name, buffer in companion.teacher.named_buffers())


def test_images_of_two_sizes_are_refused():
    network = network_of()
    companion = SelfTraining()
    companion.on_train_start(network)
    outputs = step_of(network)
    object.__setattr__(outputs, "given_images", (outputs.images[0], outputs.images[1][..., :4]))
    with pytest.raises(InputError, match=r"set data\.crop_size"):
        companion.loss(outputs, FIRST)


# ---- together with a method


class Counting(nn.Sequential):
    """A network that counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, 4, 3, padding=1)
        self.segmentation_head = nn.Conv2d(4, 2, 1)
        self.passes: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.passes.append(len(images))
        return self.segmentation_head(self.encoder(images))


@pytest.mark.parametrize(
    ("companions", "passes"),
    [
        ([], 0),
        ([EntropyMinimization()], 0),
        ([MaximumSquares()], 0),
        ([SelfTraining()], 1),
        ([Style(), FourierAdaptation()], 0),
    ],
    ids=["none", "entropy", "squares", "self", "appearance"],
)
def test_what_is_not_asked_for_costs_no_forward_pass(companions, passes):
    """Self-training has one pass of the mixed images; its teacher is a copy, which counts for itself."""
    from dann_experiments.models.passes import Passes
    from dann_experiments.models.taps import Tap

    network = Counting()
    taps = [Tap(name, name, None, count, 1.0, copy=False) for name, count in (("encoder", 4), ("segmentation_head", 2))]
    plain = DANNMethod("encoder", 4, hidden_size=8)
    method = WithCompanions(plain, companions) if companions else plain
    module = AdaptationModule(network, method, taps, torch.optim.SGD)
    module.passes = Passes(module.taps, "separate", None)
    method.on_train_start(network)
    batch = {"source": {"image": torch.randn(2, 3, 8, 8), "mask": torch.randint(2, (2, 8, 8))},
             "target": {"image": torch.randn(3, 3, 8, 8)}}  # fmt: skip
    network.passes.clear()
    outputs = module.step_outputs(method.prepare(batch))
    method.loss(outputs, FIRST)
    assert network.passes == [2, 3] + [2] * passes


def test_the_losses_are_added_with_their_weights_and_the_method_s_own_stays():
    torch.manual_seed(0)
    logits = torch.randn(2, 2, 4, 4)
    features = {"encoder": torch.randn(2, 4, 4, 4), "segmentation_head": logits}
    outputs = StepOutputs(logits, torch.zeros(2, 4, 4).long(), torch.ones(2, 4, 4), features, features)
    plain = DANNMethod("encoder", 4, hidden_size=8)
    parts = [EntropyMinimization(0.5), MaximumSquares(0.25, ramp=0.4)]
    combined = WithCompanions(plain, parts)
    progress = Progress(0, 1, 2, 10)
    alone, both = plain.loss(outputs, progress), combined.loss(outputs, progress)
    entropy, squares = (part.loss(outputs, progress)[0] for part in parts)
    added = 0.5 * entropy + 0.25 * (0.2 / 0.4) * squares  # the ramp is half way up at a fifth of the training
    assert torch.allclose(both.differentiated, alone.differentiated + added)
    assert torch.allclose(both.added, added)
    assert both.metrics["da_part/entropy"].item() == pytest.approx(entropy.item())
    assert both.metrics["da/domain_loss"] == alone.metrics["da/domain_loss"]
    assert combined.aligned_layers == ("encoder",)
    assert not any(torch.as_tensor(value).requires_grad for value in both.metrics.values())


def test_the_control_gives_the_network_the_gradient_of_the_companions_alone():
    torch.manual_seed(0)
    logits = torch.randn(2, 2, 4, 4, requires_grad=True)
    maps = torch.randn(2, 4, 4, 4, requires_grad=True)
    features = {"encoder": maps, "segmentation_head": logits}
    outputs = StepOutputs(logits, torch.zeros(2, 4, 4).long(), torch.ones(2, 4, 4), features, features)
    method = WithCompanions(LambdaZero("encoder", 4, hidden_size=8), [EntropyMinimization(1.0)])
    method.loss(outputs, Progress(0, 1, 5, 10)).differentiated.backward()
    assert maps.grad is None
    assert logits.grad.any()


@pytest.mark.parametrize(("companion", "learns"), [(EntropyMinimization(1.0), True), (Style(), False)])
def test_a_companion_with_a_loss_on_target_images_gives_the_control_their_gradient(companion, learns):
    control = LambdaZero("encoder", 4, hidden_size=8)
    assert not control.learns_from_target
    assert WithCompanions(control, [companion]).learns_from_target is learns


def test_source_only_with_a_companion_uses_the_target():
    assert WithCompanions(SourceOnly(), [SelfTraining()]).uses_target
    assert not SourceOnly().uses_target


# ---- in runs


@pytest.mark.parametrize("batchnorm", ["separate", "joint"])
def test_a_run_logs_each_companion_and_says_so_in_name_and_tags(squares, pretrained_place, batchnorm):
    config = load_config(None, small_settings(
        squares, domain_adaptation__companions="[entropy, {name: self_training, threshold: 0.6}]", trainer__max_epochs=1,
        domain_adaptation__batchnorm=batchnorm,
    ))  # fmt: skip
    result = adapt(config)
    run = mlflow.MlflowClient(result.tracking_uri).get_run(result.run_id)
    assert run.info.run_name == "DANN + entropy + self training target seed 0"
    assert run.data.tags["dann.companions"] == "entropy, self_training"
    history = result.history().set_index(["metric", "step"])["value"]
    assert 0 < history["da_part/entropy", 0] <= 1
    assert 0 <= history["da_part/self_training_certain", 0] <= 1
    parts = 1e-3 * history["da_part/entropy", 1] + history["da_part/self_training", 1]
    weighted = history["da/lambda", 1] * history["loss/train_da", 1]
    total = history["loss/train_seg", 1] + weighted + parts
    assert history["loss/train_total", 1] == pytest.approx(total, rel=1e-4)


def test_an_evaluation_and_a_source_model_do_not_depend_on_companions(squares):
    from dann_experiments.jobs.identity import run_digest

    plain, with_one = (
        load_config(None, small_settings(squares, domain_adaptation__companions=names)) for names in ("[]", "[entropy]")
    )
    for job in ("evaluate", "pretrain"):
        assert run_digest(job, plain, {}, "x") == run_digest(job, with_one, {}, "x")
    assert run_digest("adapt", plain, {}, "x") != run_digest("adapt", with_one, {}, "x")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dann", "source_only"])
def test_a_killed_run_with_a_teacher_goes_on_to_the_same_weights(method, workplace, squares):
    more = {
        "domain_adaptation__companions": "[self_training, maximum_squares]",
        "domain_adaptation__method__name": method,
    }
    uninterrupted = adapt(settings(squares, workplace / "whole", **more), [Noise()])
    config = settings(squares, workplace / "killed", **more, trainer__checkpoint_every_n_steps=1)
    killed("adapt", config, Noise(), Killed("on_train_batch_start", 3))
    assert_same(adapt(config, [Noise()], resume="auto"), uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [{"trainer__ema_decay": 0.9}, {"trainer__devices": 2}], ids=["average", "two processes"]
)
def test_a_teacher_goes_with_averaged_weights_and_several_processes(squares, pretrained_place, more):
    from dann_experiments.checkpoints.weights import read_weights

    more = {"trainer__max_epochs": 1, "domain_adaptation__companions": "[self_training]"} | more
    result = adapt(load_config(None, small_settings(squares, **more)))
    assert math.isfinite(result.metrics["iou/target_val"])
    names = set(read_weights(Path(str(result.artifacts)) / "checkpoints" / "last.ckpt"))
    assert not any("teacher" in name for name in names)  # one network, which can be the next run's source model


@pytest.mark.parametrize(
    ("companions", "told"),
    [
        ("[entropi]", r"domain_adaptation\.companions\[0\]\.name is 'entropi'; .*; did you mean 'entropy'\?"),
        ("[entropy, entropy]", r"domain_adaptation\.companions is \['entropy', 'entropy'\]; name each once"),
        ("[{name: entropy, threshold: 0.5}]", r"companions\[0\]\.threshold is 0\.5, but entropy has no threshold"),
        ("[{name: entropy, wight: 1}]", r"companions\[0\] has the key 'wight'; .*; did you mean 'weight'\?"),
        ("[{name: entropy, weight: -1}]", r"companions\[0\]\.weight is -1"),
        ("[{name: self_training, ema_decay: 1}]", r"companions\[0\]\.ema_decay is 1"),
        ("[3]", r"domain_adaptation\.companions\[0\] is 3"),
    ],
)
def test_wrong_companions_are_told(companions, told):
    with pytest.raises(InputError, match=told):
        load_config(None, {"domain_adaptation.companions": companions})
