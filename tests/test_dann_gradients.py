"""Who feels which loss: lambda acts once, on the network alone; the classifier learns at every lambda (DESIGN, DANN).

Networks here are tiny and in float64, so that gradients can be compared with those worked out by hand.
"""

import copy

import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import CombinedLoader
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from dann_experiments.adaptation.dann import DANNMethod, LambdaZero, SourceOnly
from dann_experiments.adaptation.domain_classifier import DomainClassifier, Pointwise
from dann_experiments.adaptation.method import Progress, StepOutputs
from dann_experiments.adaptation.schedules import ConstantScheduler, DANNScheduler
from dann_experiments.models.taps import resolve_taps
from dann_experiments.training.losses import segmentation_loss
from dann_experiments.training.module import AdaptationModule
from dann_experiments.training.optimizers import build_optimizer

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
IGNORED = 255
NOW = Progress(epoch=0, max_epochs=1, step=0, total_steps=1)
LR, DISCRIMINATOR_LR = 0.1, 0.02
EVERY_KIND = pytest.mark.parametrize("kind", ["pooled", "pixel", "patch"])
KINDS = pytest.mark.parametrize("kind", ["pooled", "pixel"])
TAPS = pytest.mark.parametrize(
    "layers", [["encoder.0"], ["encoder"], ["decoder"], ["encoder", "decoder"], ["head"]], ids=str
)
BEHIND = {  # parts of the network that run after the deepest tap
    "encoder.0": ("encoder.1", "encoder.3", "decoder", "head"),
    "encoder": ("decoder", "head"),
    "decoder": ("head",),
    "head": (),  # the tap is the end of the network
}


class TinyNetwork(nn.Module):
    """Encoder, decoder and head of a few hundred weights; logits of 3 classes."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.Tanh(), nn.Conv2d(6, 5, 1)
        )
        self.decoder = nn.Conv2d(5, 4, 3, padding=1)
        self.head = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 3, 1))

    def forward(self, images):
        return self.head(self.decoder(self.encoder(images)))


def images_and_masks(count, seed, size=8):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)
    return {"image": images, "mask": torch.randint(0, 3, (count, size, size), generator=generator)}


def batch_of(source=2, target=3):
    return {"source": images_and_masks(source, 1), "target": images_and_masks(target, 2)}


def make_module(layers, lambda_da=1.0, kind="pooled", method=None, schedule=None, optimizer="sgd", momentum=0.0):
    torch.manual_seed(0)
    network = TinyNetwork().double()
    taps = resolve_taps(network, layers, 3, size=8)
    if method is None:
        channels = [tap.channels for tap in taps]
        method = DANNMethod(layers, channels, kind, 7, DISCRIMINATOR_LR, lambda_da, schedule)

    def optimizer_of(groups):
        return build_optimizer(groups, optimizer, LR, (0.9, 0.999), momentum, 0.0)

    return AdaptationModule(network, method.double(), taps, optimizer_of, ignore_index=IGNORED)


def domain_gradients(module, batch):
    """Gradients of the differentiated domain loss alone, network's and classifiers', by name."""
    module.zero_grad()
    module.method.loss(module.step_outputs(batch), NOW).differentiated.backward()
    named = [*module.network.named_parameters(), *module.method.named_parameters()]
    return {name: parameter.grad for name, parameter in named}


def domain_loss_by_hand(module, outputs):
    """Mean over layers of the mean of the two domains' cross-entropies, no reversal anywhere."""
    losses = []
    for layer, classifier in zip(module.method.feature_layers, module.method.classifiers, strict=True):
        for domain, features in enumerate([outputs.source_features[layer], outputs.target_features[layer]]):
            logits = classifier(features)
            losses.append(functional.cross_entropy(logits, torch.full_like(logits[:, 0], domain).long()))
    return sum(losses) / len(losses)


def fit(module, tmp_path, source=4, target=6, batch_size=2, **arguments):
    """Train for real; returns the trainer and the logged rows."""
    sets = {"source": images_and_masks(source, 1), "target": images_and_masks(target, 2)}
    loaders = {
        domain: DataLoader(
            [{key: value[i] for key, value in data.items()} for i in range(len(data["image"]))], batch_size
        )
        for domain, data in sets.items()
    }
    logger = CSVLogger(tmp_path)
    trainer = pl.Trainer(
        accelerator="cpu", logger=logger, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, log_every_n_steps=1, **arguments,
    )  # fmt: skip
    trainer.fit(module, CombinedLoader(loaders, "max_size_cycle"))
    return trainer, pd.read_csv(f"{logger.log_dir}/metrics.csv")


@EVERY_KIND
@TAPS
def test_the_network_feels_minus_lambda_times_the_gradient_of_the_domain_loss(layers, kind):
    batch = batch_of()
    reference = make_module(layers, kind=kind)
    loss = domain_loss_by_hand(reference, reference.step_outputs(batch))
    named = dict(reference.network.named_parameters())
    plain = dict(zip(named, torch.autograd.grad(loss, named.values(), allow_unused=True), strict=True))
    assert any(gradient is not None and gradient.abs().max() > 1e-6 for gradient in plain.values())
    for lambda_now in (0.0, 0.1, 1.0, 2.5):
        felt = domain_gradients(make_module(layers, lambda_now, kind), batch)
        for name, gradient in plain.items():
            if gradient is None or lambda_now == 0:
                assert felt[name] is None, name
            else:
                torch.testing.assert_close(felt[name], -lambda_now * gradient, msg=f"{name} at lambda {lambda_now}")


@EVERY_KIND
@TAPS
def test_at_lambda_0_no_gradient_is_computed_for_the_target(layers, kind):
    for lambda_now in (0.0, 0.5):
        module = make_module(layers, lambda_now, kind)
        outputs = module.step_outputs(batch_of())
        felt = []
        for features in outputs.target_features.values():
            features.register_hook(felt.append)
        (outputs.source_logits.sum() + module.method.loss(outputs, NOW).differentiated).backward()
        assert bool(felt) is (lambda_now > 0)


@TAPS
def test_the_control_forwards_the_target_without_a_graph_and_computes_what_dann_computes_at_lambda_0(layers):
    """Such a step is shorter (docs/performance.md, The control's step)."""
    channels = [tap.channels for tap in resolve_taps(TinyNetwork().double(), layers, 3, size=8)]
    found = []
    for kind in (DANNMethod, LambdaZero):
        torch.manual_seed(1)
        module = make_module(layers, method=kind(layers, channels, "pooled", 7, DISCRIMINATOR_LR, 0.0, None))
        outputs = module.step_outputs(batch_of())
        assert all(features.requires_grad is (kind is DANNMethod) for features in outputs.target_features.values())
        share = module.method.loss(outputs, NOW)
        (outputs.source_logits.square().mean() + share.differentiated).backward()
        named = [*module.network.named_parameters(), *module.method.named_parameters()]
        found.append({name: parameter.grad for name, parameter in named} | dict(module.network.named_buffers()))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


@EVERY_KIND
@TAPS
def test_the_classifier_feels_its_plain_gradient_at_every_lambda(layers, kind):
    batch = batch_of()
    reference = make_module(layers, kind=kind)
    named = dict(reference.method.named_parameters())
    loss = domain_loss_by_hand(reference, reference.step_outputs(batch))
    plain = dict(zip(named, torch.autograd.grad(loss, named.values()), strict=True))
    for lambda_now in (0.0, 0.1, 1.0, 2.5):
        felt = domain_gradients(make_module(layers, lambda_now, kind), batch)
        for name, gradient in plain.items():
            torch.testing.assert_close(felt[name], gradient, msg=f"{name} at lambda {lambda_now}")


@EVERY_KIND
def test_at_lambda_zero_the_classifier_learns_and_the_network_does_not(kind):
    felt = domain_gradients(make_module(["encoder"], 0.0, kind), batch_of())
    assert all(felt[name] is None for name in felt if name.startswith("encoder"))
    assert all(felt[name].abs().max() > 1e-6 for name in felt if name.startswith("classifiers"))


@EVERY_KIND
@TAPS
def test_layers_behind_the_tap_get_no_domain_gradient(layers, kind):
    felt = domain_gradients(make_module(layers, 1.0, kind), batch_of())
    behind = [name for name in felt if name.startswith(BEHIND[layers[-1]])]
    before = [name for name in felt if not name.startswith((*BEHIND[layers[-1]], "classifiers"))]
    assert behind or layers == ["head"]
    assert before
    assert all(felt[name] is None for name in behind)
    assert all(felt[name] is not None for name in before)


def test_one_training_step_moves_the_network_by_both_losses_and_lambda_once(tmp_path):
    lambda_now = 0.3
    module = make_module(["encoder"], lambda_now)
    before = copy.deepcopy(module)
    fit(module, tmp_path, source=2, target=2, max_epochs=1)

    batch = batch_of(source=2, target=2)
    outputs = before.step_outputs(batch)
    segmentation = functional.cross_entropy(outputs.source_logits, batch["source"]["mask"])
    named = dict(before.named_parameters())
    by_segmentation = torch.autograd.grad(segmentation, named.values(), allow_unused=True, retain_graph=True)
    by_domain = torch.autograd.grad(domain_loss_by_hand(before, outputs), named.values(), allow_unused=True)
    after = dict(module.named_parameters())
    for name, by_seg, by_dom in zip(named, by_segmentation, by_domain, strict=True):
        if name.startswith("method"):
            expected = named[name] - DISCRIMINATOR_LR * by_dom
        elif by_dom is None:
            expected = named[name] - LR * by_seg
        else:
            expected = named[name] - LR * (by_seg - lambda_now * by_dom)
        torch.testing.assert_close(after[name], expected, msg=name)


def test_logged_total_is_the_segmentation_loss_plus_lambda_times_the_domain_loss(tmp_path):
    _, rows = fit(make_module(["encoder"], 0.5, schedule=DANNScheduler()), tmp_path, max_epochs=3)
    assert list(rows["step"]) == list(range(9))  # 3 epochs over the larger set of 3 batches
    expected = [0.0] * 3 + [0.5 * DANNScheduler().at(1 / 3)] * 3 + [0.5 * DANNScheduler().at(2 / 3)] * 3
    assert list(rows["da/lambda"]) == pytest.approx(expected, abs=1e-6)
    total = rows["loss/train_seg"] + rows["da/lambda"] * rows["loss/train_da"]
    assert list(rows["loss/train_total"]) == pytest.approx(list(total), abs=1e-5)
    assert list(rows["loss/train_da"]) == pytest.approx(list(rows["da/domain_loss"]), abs=1e-6)
    assert (rows["loss/train_da"] > 0.1).all()


def test_the_control_is_dann_with_lambda_zero_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    control = LambdaZero(["encoder"], 5, "pooled", 7, DISCRIMINATOR_LR, lambda_schedule=DANNScheduler())
    dann = DANNMethod(["encoder"], 5, "pooled", 7, DISCRIMINATOR_LR, 0.0, lambda_schedule=DANNScheduler())
    dann.load_state_dict(control.state_dict())
    trained = []
    for method in (control, dann):
        module = make_module(["encoder"], method=method, optimizer="adam")
        trained.append((module, fit(module, tmp_path, max_epochs=2)[1]))
    (first, first_rows), (second, second_rows) = trained
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert first_rows.equals(second_rows)


def test_at_lambda_zero_only_batchnorm_statistics_tell_the_network_from_source_only(tmp_path):
    control, source_only = make_module(["encoder"], 0.0), make_module([], method=SourceOnly())
    for module in (control, source_only):
        fit(module, tmp_path, max_epochs=2)
    differing = [
        name
        for name, tensor in control.network.state_dict().items()
        if not torch.equal(tensor, source_only.network.state_dict()[name])
    ]
    assert differing == ["encoder.1.running_mean", "encoder.1.running_var", "encoder.1.num_batches_tracked"]


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_every_parameter_is_in_one_optimizer_group_and_each_group_has_its_learning_rate(optimizer, tmp_path):
    module = make_module(["encoder", "decoder"], optimizer=optimizer)
    trainer, _ = fit(module, tmp_path, max_epochs=1)
    groups = {group["name"]: group for group in trainer.optimizers[0].param_groups}
    assert {name: group["lr"] for name, group in groups.items()} == {"network": LR, "discriminator": DISCRIMINATOR_LR}
    held = {name: {id(parameter) for parameter in group["params"]} for name, group in groups.items()}
    assert held["network"] == {id(parameter) for parameter in module.network.parameters()}
    assert held["discriminator"] == {id(parameter) for parameter in module.method.parameters()}
    assert sum(len(group["params"]) for group in groups.values()) == len(list(module.parameters()))


@EVERY_KIND
def test_source_is_labelled_0_and_target_1(kind):
    module = make_module(["encoder"], kind=kind)
    last = module.method.classifiers[0].layers[-1]
    nn.init.zeros_(last.weight)
    last.bias.data = torch.tensor([3.0, 0.0], dtype=torch.float64)  # says source, always
    features = torch.randn(2, 5, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        as_source = module.method.classifiers[0].domain_loss(features, domain=0)
        as_target = module.method.classifiers[0].domain_loss(features, domain=1)
    assert [float(value) for value in as_source] == pytest.approx([0.0485874, 1.0], abs=1e-6)
    assert [float(value) for value in as_target] == pytest.approx([3.0485874, 0.0], abs=1e-6)
    metrics = module.method.loss(module.step_outputs(batch_of()), NOW).metrics
    assert float(metrics["da/domain_acc"]) == 0.5  # balanced over domains, though there are more target images
    assert float(metrics["da/domain_loss"]) == pytest.approx((0.0485874 + 3.0485874) / 2, abs=1e-6)


@EVERY_KIND
def test_both_domains_weigh_equally_whatever_their_batch_sizes(kind):
    module = make_module(["encoder"], kind=kind)
    nn.init.normal_(module.method.classifiers[0].layers[-1].weight, std=3.0)
    with torch.no_grad():
        outputs = module.step_outputs(batch_of(source=2, target=6))
        share = module.method.loss(outputs, NOW)
        # cross_entropy and softmax worked out from the logits: source 0, target 1
        losses = [
            -module.method.classifiers[0](features["encoder"]).log_softmax(1)[:, domain]
            for domain, features in enumerate([outputs.source_features, outputs.target_features])
        ]
    assert float(share.value) == pytest.approx(float(losses[0].mean() + losses[1].mean()) / 2, abs=1e-6)
    assert float(share.value) != pytest.approx(float(torch.cat(losses).mean()), abs=1e-4)
    assert float(share.differentiated) == float(share.value)


def test_with_several_layers_the_domain_loss_is_their_mean_and_each_layer_is_shown():
    module = make_module(["encoder", "decoder"])
    metrics = module.method.loss(module.step_outputs(batch_of()), NOW).metrics
    for name in ("domain_loss", "domain_acc"):
        layers = [float(metrics[f"da_layer/{layer}/{name}"]) for layer in ("encoder", "decoder")]
        assert float(metrics[f"da/{name}"]) == pytest.approx(sum(layers) / 2)
    encoder = make_module(["encoder"]).method.loss(module.step_outputs(batch_of()), NOW).metrics
    assert not [name for name in encoder if name.startswith("da_layer")]


def half_ignored_step(module, changed_by=0.0):
    """Features (2, 5, 4, 4) behind labels (2, 8, 8) whose right half is ignored; that half shifted by `changed_by`."""
    batch = batch_of()
    batch["source"]["mask"][:, :, 4:] = IGNORED
    outputs = module.step_outputs(batch)
    features = outputs.source_features["encoder"].detach().clone()
    features[..., 2:] += changed_by
    features.requires_grad_()
    return StepOutputs(
        outputs.source_logits,
        outputs.source_labels,
        outputs.source_valid,
        {"encoder": features},
        outputs.target_features,
    )


@KINDS
def test_ignored_pixels_are_left_out_of_the_domain_loss(kind):
    module = make_module(["encoder"], kind=kind, schedule=ConstantScheduler())
    step = half_ignored_step(module)
    loss = module.method.loss(step, NOW).differentiated
    features = step.source_features["encoder"]
    labelled_half = StepOutputs(
        step.source_logits, step.source_labels, torch.ones_like(step.source_valid), {"encoder": features[..., :2]},
        step.target_features,
    )  # fmt: skip
    for same in (labelled_half, half_ignored_step(module, changed_by=100.0)):
        assert float(loss.detach()) == pytest.approx(float(module.method.loss(same, NOW).value), abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, features)
    assert gradient[..., 2:].count_nonzero() == 0
    assert gradient[..., :2].abs().max() > 1e-6


def test_an_output_classifier_leaves_out_the_positions_whose_pixels_are_ignored():
    classifier = DomainClassifier(3, 7, "patch")
    logits = torch.randn(2, 3, 8, 8)
    valid = torch.ones(2, 8, 8)
    valid[:, :, 4:] = 0  # the right one of two columns of decisions
    loss, _ = classifier.domain_loss(logits, 1, valid)
    expected = -classifier(logits).log_softmax(1)[:, 1, :, :1].mean()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)


@KINDS
def test_a_position_with_some_ignored_pixels_weighs_by_its_labelled_share(kind):
    classifier = DomainClassifier(5, 7, kind)
    features = torch.randn(1, 5, 1, 2)
    valid = torch.tensor([[[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]])  # shares 1/4 and 1
    loss, _ = classifier.domain_loss(features, 0, valid)
    if kind == "pooled":
        expected = -classifier((0.25 * features[..., :1] + features[..., 1:]) / 1.25).log_softmax(1)[0, 0]
    else:
        a_position = -classifier(features).log_softmax(1)[0, 0, 0]
        expected = (0.25 * a_position[0] + a_position[1]) / 1.25
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)


def test_at_one_position_a_pointwise_convolution_is_the_linear_layer_that_it_is():
    layer = Pointwise(5, 7)
    features = torch.randn(3, 5, 1, 1, requires_grad=True)
    twice = torch.cat([features, features], 3)  # as a convolution
    alone, whole = layer(features), layer(twice)
    torch.testing.assert_close(alone, whole[..., :1])
    gradients = torch.autograd.grad(alone.square().sum(), [features, *layer.parameters()])
    expected = torch.autograd.grad(whole.square().sum() / 2, [features, *layer.parameters()])
    torch.testing.assert_close(gradients, expected)


@EVERY_KIND
def test_an_image_without_labelled_pixels_is_left_out_of_the_domain_loss(kind):
    classifier = DomainClassifier(5, 7, kind)
    features = torch.randn(3, 5, 4, 4)
    valid = torch.ones(3, 8, 8)
    valid[1] = 0
    found = classifier.domain_loss(features, 0, valid)
    expected = classifier.domain_loss(features[[0, 2]], 0)
    torch.testing.assert_close(found, expected)


def test_a_training_step_takes_the_ignored_pixels_from_the_labels():
    batch = batch_of()
    batch["source"]["mask"][:, :, 4:] = IGNORED
    valid = make_module(["encoder"]).step_outputs(batch).source_valid
    assert (valid[:, :, :4] == 1).all()
    assert (valid[:, :, 4:] == 0).all()


def test_the_segmentation_loss_is_the_mean_over_labelled_pixels():
    data = images_and_masks(2, 1)
    logits = data["image"].clone().requires_grad_()  # (2, 3, 8, 8): as good as any
    labels = data["mask"].clone()
    labels[:, :, 4:] = IGNORED
    loss = segmentation_loss(logits, labels, IGNORED)
    expected = -logits[..., :4].log_softmax(1).gather(1, labels[:, None, :, :4]).mean()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[..., 4:].count_nonzero() == 0


def test_a_batch_without_labelled_pixels_has_segmentation_loss_zero_and_gradient_zero():
    logits = images_and_masks(2, 1)["image"].requires_grad_()
    loss = segmentation_loss(logits, torch.full((2, 8, 8), IGNORED), IGNORED)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert float(loss.detach()) == 0.0
    assert gradient.count_nonzero() == 0


def test_source_only_needs_no_target_images(tmp_path):
    module = make_module([], method=SourceOnly())
    outputs = module.step_outputs({"source": images_and_masks(2, 1)})
    assert outputs.target_features == {}
    assert module.method.loss(outputs, NOW).differentiated is None
    _, rows = fit(module, tmp_path, max_epochs=1)
    assert list(rows["loss/train_total"]) == list(rows["loss/train_seg"])
    assert "da/domain_loss" not in rows
