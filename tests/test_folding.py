"""BatchNorm folded into convolutions: the same logits, only where it is sure, and the network is given back as it was."""

from __future__ import annotations

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn

from dann_experiments.models.folding import channels_last, foldable, folded


def with_statistics(network: nn.Module, bands: int = 3) -> nn.Module:
    """The network, whose BatchNorms have numbers of their own, in eval mode."""
    torch.manual_seed(1)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None and layer.running_var is not None:
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            if layer.affine:
                nn.init.uniform_(layer.weight, 0.5, 2)
                nn.init.normal_(layer.bias)
    return network.eval()


@pytest.mark.parametrize("encoder", ["resnet18", "mobilenet_v2", "mit_b0"])
def test_folded_networks_have_the_same_logits_and_get_all_layers_back_to_the_bit(encoder):
    network = with_statistics(smp.create_model("unet", encoder, encoder_weights=None, in_channels=4, classes=3), 4)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    image = torch.randn(1, 4, 96, 64)
    norms = [layer for layer in network.modules() if type(layer) is nn.BatchNorm2d]
    pairs = foldable(network, 4)
    assert {norm for _, norm in pairs} == set(norms)
    with torch.no_grad():
        expected = network(image)
        with folded(pairs):
            calls = []
            handles = [norm.register_forward_hook(lambda *args: calls.append(args[1][0] is args[2])) for norm in norms]
            found = network(image)
            for handle in handles:
                handle.remove()
        again = network(image)
    assert calls == [True] * len(norms)  # no BatchNorm computed anything
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.equal(again, expected)
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


class Branching(nn.Module):
    """The output of the convolution goes to the BatchNorm, and past it."""

    def __init__(self, past: bool) -> None:
        super().__init__()
        self.convolution, self.norm, self.past = nn.Conv2d(3, 2, 3, padding=1), nn.BatchNorm2d(2), past

    def forward(self, images):
        values = self.convolution(images)
        return self.norm(values) + values if self.past else self.norm(values)


class Repeated(nn.Module):
    """The same layers twice."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, images):
        return self.norm(self.convolution(self.norm(self.convolution(images))))


class InPlace(nn.Module):
    """An activation in place between the two: the BatchNorm gets the very tensor of the convolution, with other values."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace=True), nn.BatchNorm2d(3))

    def forward(self, images):
        return self.layers(images)


def test_a_convolution_whose_output_goes_elsewhere_too_is_not_folded():
    assert len(foldable(with_statistics(Branching(False)), 3)) == 1
    assert foldable(with_statistics(Branching(True)), 3) == []
    assert foldable(with_statistics(Repeated()), 3) == []
    assert foldable(with_statistics(InPlace()), 3) == []


def test_batchnorms_without_running_statistics_and_layers_that_are_more_than_they_seem_are_not_folded():
    class More(nn.BatchNorm2d):
        def forward(self, input):
            return super().forward(input).relu()

    for norm in (nn.BatchNorm2d(2, track_running_stats=False), More(2)):
        assert foldable(with_statistics(nn.Sequential(nn.Conv2d(3, 2, 3), norm)), 3) == []


def test_statistics_that_change_between_blocks_are_those_of_the_block():
    network = with_statistics(nn.Sequential(nn.Conv2d(3, 2, 3, bias=False), nn.BatchNorm2d(2, affine=False)))
    pairs, image = foldable(network, 3), torch.randn(1, 3, 8, 8)
    norm = pairs[0][1]
    assert norm.running_mean is not None
    norm.running_mean += 1
    with torch.no_grad():
        expected = network(image)
        with folded(pairs):
            torch.testing.assert_close(network(image), expected)
    assert set(network.state_dict()) == {"0.weight", "1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_channels_last_in_the_block_and_the_weights_themselves_afterwards():
    network = with_statistics(smp.create_model("unet", "resnet18", encoder_weights=None, classes=3))
    weights, image = [*network.parameters()], torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = network(image)
        with channels_last(network):
            found = network(image)
            assert found.is_contiguous(memory_format=torch.channels_last)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert all(one is other for one, other in zip(network.parameters(), weights, strict=True))


def test_a_network_that_takes_no_image_of_the_size_looked_at_is_left_as_it_is():
    class Fixed(nn.Sequential):
        def forward(self, input):
            assert input.shape[-1] == 96
            return super().forward(input)

    assert foldable(Fixed(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).eval(), 3) == []
