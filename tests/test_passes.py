"""One pass over both domains gives the numbers of two: logits, features, gradients, statistics. Where it cannot, two are made."""

import copy

import pytest
import torch
from torch import nn

from dann_experiments.models.batchnorm import by_domain
from dann_experiments.models.networks import build_network
from dann_experiments.models.passes import choose, forward_to_taps, forward_twice
from dann_experiments.models.taps import resolve_taps

S, T = 3, 2
DOUBLE = {"rtol": 1e-7, "atol": 1e-9}


def network_of(arch="unet", encoder="resnet18", **arguments):
    torch.manual_seed(0)
    return build_network(arch, encoder, None, 3, 2, arguments).train()


def images_of(dtype=torch.float32, size=64):
    generator = torch.Generator().manual_seed(1)
    source = torch.randn(S, 3, size, size, generator=generator, dtype=dtype)
    return source, 2 * torch.randn(T, 3, size, size, generator=generator, dtype=dtype) + 1


def one_pass(network, layers, batchnorm="separate"):
    """How `choose` forwards them."""
    return choose(network, resolve_taps(network, layers, 3), batchnorm, 3)


@pytest.mark.slow
@pytest.mark.parametrize("batchnorm", ["separate", "source_only"])
@pytest.mark.parametrize(
    ("arch", "encoder", "layers"),
    [
        ("unet", "resnet18", ["encoder"]),
        ("unet", "resnet18", ["encoder.layer2"]),
        ("unet", "resnet18", ["encoder.1", "encoder.4"]),
        ("unet", "resnet18", ["encoder", "decoder"]),
        ("unet", "mobilenet_v2", ["encoder.3"]),
        ("unet", "timm-resnest14d", ["encoder"]),
        ("fpn", "resnet18", ["encoder"]),
        ("pspnet", "vgg11_bn", ["segmentation_head"]),
    ],
)
def test_one_pass_gives_the_numbers_of_two(arch, encoder, layers, batchnorm):
    """In double precision, in which other orders of summation cannot hide a difference."""
    arguments = {"psp_dropout": 0.0} if arch == "pspnet" else {"decoder_dropout": 0.0} if arch == "fpn" else {}
    network = network_of(arch, encoder, **arguments).double()
    passes = one_pass(network, layers, batchnorm)
    assert passes.cut is not None
    found = []
    for forward in (passes, lambda *of: forward_twice(*of, passes.taps, batchnorm == "source_only")):
        copied = copy.deepcopy(network)
        logits, source, target = forward(copied, *images_of(torch.float64))
        weights = torch.Generator().manual_seed(2)
        parts = [logits, *source.values(), *target.values()]
        sum((part * torch.randn(part.shape, generator=weights, dtype=part.dtype)).sum() for part in parts).backward()
        gradients = {name: value.grad for name, value in copied.named_parameters() if value.grad is not None}
        found.append((logits, source, target, gradients, dict(copied.named_buffers())))
    torch.testing.assert_close(found[0], found[1], **DOUBLE)


def test_maps_and_tokens_of_a_vision_transformer_are_split_by_domain():
    network = network_of("dpt", "tu-test_vit").double()
    network.segmentation_head.eval()  # has dropout
    passes = one_pass(network, ["encoder"])
    assert passes.cut is not None
    images = images_of(torch.float64)
    torch.testing.assert_close(passes(network, *images), forward_twice(network, *images, passes.taps), **DOUBLE)


@pytest.mark.parametrize(
    ("encoder", "behind"),
    [("resnet18", "layer3"), ("mit_b0", "block3"), ("mobilenet_v2", "features.7"), ("efficientnet-b0", "_blocks.5")],
)
def test_a_stage_named_by_its_number_is_reached_without_the_stages_behind_it(encoder, behind):
    network = network_of("unet", encoder).eval()
    images, _ = images_of()
    taps = resolve_taps(network, ["encoder.3"], 3)
    expected = network.encoder(images)[3]
    ran = []
    network.encoder.get_submodule(behind).register_forward_pre_hook(lambda module, inputs: ran.append(behind))
    torch.testing.assert_close(forward_to_taps(network, images, taps)["encoder.3"], expected)
    assert ran == []
    network.encoder(images)
    assert ran == [behind]  # it is a layer that the whole encoder needs


def test_layers_that_draw_random_numbers_for_the_target_keep_two_passes():
    assert one_pass(network_of("unet", "mit_b0"), ["encoder"]).cut is None  # stochastic depth
    network = network_of()
    network.encoder.layer1, network.encoder.layer2 = (
        nn.Sequential(stage, nn.Dropout(0.5)) for stage in (network.encoder.layer1, network.encoder.layer2)
    )
    assert one_pass(network, ["encoder"]).cut is None
    assert one_pass(network, ["encoder.maxpool"]).cut is not None  # behind it the source alone draws
    assert one_pass(network_of("fpn", "resnet18", decoder_dropout=0.5), ["encoder"]).cut is not None


class MixesImages(nn.Module):
    """A normalisation over the batch that is no BatchNorm of torch's."""

    def forward(self, values):
        return values - values.mean(0, keepdim=True)


def test_a_layer_that_mixes_images_in_a_way_of_its_own_keeps_two_passes():
    network = network_of()
    network.encoder.maxpool = nn.Sequential(network.encoder.maxpool, MixesImages())
    assert one_pass(network, ["encoder"]).cut is None
    assert one_pass(network, ["encoder.relu"]).cut is not None  # in front of it


@pytest.mark.parametrize("layer", ["encoder.layer2.1.bn2", "decoder.blocks.0"])
def test_a_tap_behind_which_maps_of_both_domains_meet_keeps_two_passes(layer):
    assert one_pass(network_of(), [layer]).cut is None


def test_images_of_another_size_in_the_target_take_two_passes():
    network = network_of()
    passes = one_pass(network, ["encoder"])
    source, target = images_of()[0], images_of(size=96)[1]
    expected = forward_twice(copy.deepcopy(network), source, target, passes.taps)
    torch.testing.assert_close(passes(network, source, target), expected)


def test_the_choice_changes_nothing():
    network = network_of()
    state, random = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    one_pass(network, ["encoder"])
    torch.testing.assert_close(network.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in network.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_frozen_layers_go_on_with_their_running_statistics_in_one_pass():
    network = network_of()
    frozen = network.encoder.bn1.eval()
    passes = one_pass(network, ["encoder"])
    assert passes.cut is not None
    before = frozen.running_mean.clone()
    passes(network, *images_of())
    assert torch.equal(frozen.running_mean, before)


def test_layers_are_given_back_when_a_forward_fails():
    network = network_of()
    with pytest.raises(RuntimeError), by_domain(network, 2):
        network(torch.randn(4, 2, 64, 64))
    assert not any("source_count" in vars(module) for module in network.modules())
    assert {type(module) for module in network.modules() if isinstance(module, nn.BatchNorm2d)} == {nn.BatchNorm2d}


def test_the_target_moves_running_statistics_after_the_source():
    norm = nn.BatchNorm2d(3)
    source, target = images_of()
    with by_domain(norm, S):
        norm(torch.cat([source, target]))
    expected = nn.BatchNorm2d(3)
    expected(source)
    expected(target)
    torch.testing.assert_close(norm.state_dict(), expected.state_dict(), rtol=0, atol=0)
