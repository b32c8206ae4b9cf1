"""The classifier that judges the predicted map (decision 6): what it sees, and who gets which gradient."""

from __future__ import annotations

import pytest
import segmentation_models_pytorch as smp
import torch

from dann_experiments import DANNMethod, DomainClassifier
from dann_experiments.adaptation.method import Progress
from dann_experiments.models.passes import forward_joint
from dann_experiments.models.taps import resolve_taps
from dann_experiments.training.module import AdaptationModule


def test_it_judges_class_probabilities_so_a_shift_of_all_logits_changes_nothing():
    torch.manual_seed(0)
    classifier = DomainClassifier(3, 8, "patch", on_logits=True)
    logits = torch.randn(2, 3, 32, 32)
    assert classifier(logits).shape == (2, 2, 8, 8)
    assert torch.allclose(classifier(logits), classifier(logits + 7.0), atol=1e-5)


def test_it_tells_apart_maps_that_differ_in_shape_alone():
    """Same share of foreground, drawn as bars or as single pixels: no per-pixel decision can tell these apart."""
    torch.manual_seed(0)
    bars = torch.zeros(16, 16)
    bars[:, ::4] = 1
    dots = bars.flatten()[torch.randperm(256)].view(16, 16)
    maps = [torch.stack([5 - 10 * shape, 10 * shape - 5])[None] for shape in (bars, dots)]
    accuracies = {}
    for kind in ("pixel", "patch"):
        classifier = DomainClassifier(2, 16, kind, on_logits=True)
        optimizer = torch.optim.Adam(classifier.parameters(), 1e-2)
        for _ in range(60):
            parts = [classifier.domain_loss(features, domain) for domain, features in enumerate(maps)]
            optimizer.zero_grad()
            sum(loss for loss, _ in parts).backward()
            optimizer.step()
        accuracies[kind] = sum(float(accuracy) for _, accuracy in parts) / 2
    assert accuracies["patch"] > 0.95
    assert accuracies["pixel"] < 0.6


@pytest.mark.parametrize("batchnorm", ["separate", "joint"])
def test_the_whole_network_feels_it_and_ignored_pixels_do_not_count(batchnorm):
    torch.manual_seed(0)
    network = smp.Unet("resnet18", encoder_weights=None, encoder_depth=2, decoder_channels=[8, 8], classes=3)
    taps = resolve_taps(network, ["segmentation_head"], 3)
    assert (taps[0].channels, taps[0].stride) == (3, 1.0)
    method = DANNMethod("segmentation_head", 3, classifier="patch", hidden_size=8, lambda_schedule=None)
    module = AdaptationModule(network, method, taps, lambda groups: torch.optim.Adam(groups, 1e-3), batchnorm=batchnorm)
    batch = {
        "source": {"image": torch.randn(2, 3, 32, 32), "mask": torch.full((2, 32, 32), 255)},
        "target": {"image": torch.randn(3, 3, 32, 32)},
    }
    outputs = module.step_outputs(batch)
    assert outputs.source_logits.shape[0] == outputs.source_features["segmentation_head"].shape[0] == 2
    assert outputs.target_features["segmentation_head"].shape == (3, 3, 32, 32)
    share = method.loss(outputs, Progress(0, 1, 0, 1))
    share.differentiated.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.segmentation_head.parameters())
    classifier = method.classifiers[0]
    nothing_counts, _ = classifier.domain_loss(outputs.source_features["segmentation_head"], 0, outputs.source_valid)
    assert float(nothing_counts) == 0.0


def test_a_joint_forward_at_the_head_gives_the_source_s_logits_alone():
    network = smp.Unet("resnet18", encoder_weights=None, encoder_depth=2, decoder_channels=[8, 8], classes=3).eval()
    taps = resolve_taps(network, ["encoder", "segmentation_head"], 3)
    source, target = torch.randn(2, 3, 32, 32), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        logits, source_features, target_features = forward_joint(network, source, target, taps)
        assert torch.allclose(logits, network(source), atol=1e-5)
        assert torch.allclose(target_features["segmentation_head"], network(target), atol=1e-5)
    assert source_features["encoder"].shape[0] == 2


def test_at_other_layers_it_judges_the_features_themselves_however_small_the_map():
    torch.manual_seed(0)
    method = DANNMethod("encoder", 3, classifier="patch", hidden_size=8)
    assert not method.classifiers[0].on_logits
    features = torch.randn(2, 3, 1, 1)
    assert not torch.allclose(method.classifiers[0](features), method.classifiers[0](features + 7.0))
    assert DANNMethod("segmentation_head", 3, classifier="patch", hidden_size=8).classifiers[0].on_logits
