"""What each value of `domain_adaptation.batchnorm` does to BatchNorm, counted on real networks (docs/batchnorm.md).

S = 2 source and T = 3 target images of 32 x 32, of other mean and contrast; random weights.
"""

import copy
import functools

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dann_experiments.adaptation.dann import DANNMethod
from dann_experiments.config.errors import InputError
from dann_experiments.data.dataset import SegmentationDataset
from dann_experiments.data.labels import label_map
from dann_experiments.data.reading import Normalization
from dann_experiments.data.samples import Sample
from dann_experiments.models.batchnorm import (
    MOST_IMAGES,
    has_batchnorm,
    statistics_kept,
    statistics_loader,
    target_statistics,
)
from dann_experiments.models.networks import build_network
from dann_experiments.models.passes import forward_joint, forward_to_taps, forward_with_taps
from dann_experiments.models.taps import resolve_taps
from dann_experiments.training.module import AdaptationModule

S, T = 2, 3
MODES = ["separate", "joint", "source_only", "target_stats"]
UNET = ("unet", "resnet18", {"encoder_depth": 3, "decoder_channels": [16, 8, 8]})
PSPNET = (  # recipes/digits.yaml
    "pspnet",
    "vgg11_bn",
    {"encoder_depth": 1, "psp_out_channels": 64, "psp_dropout": 0.0, "upsampling": 2},
)
BOTH = pytest.mark.parametrize("name", ["unet", "pspnet"])


@functools.cache
def _built(name):
    torch.manual_seed(0)
    arch, encoder, arguments = {"unet": UNET, "pspnet": PSPNET}[name]
    return build_network(arch, encoder, None, 3, 2, arguments)


def network_of(name):
    return copy.deepcopy(_built(name)).train()


def images(count, seed, size=32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, generator=generator)


def batch_of():
    source = {"image": images(S, 1), "mask": torch.zeros(S, 32, 32, dtype=torch.long)}
    return {"source": source, "target": {"image": 3 * images(T, 2) + 2}}


def layers_of(network):
    """Every BatchNorm, in the order of the network's modules."""
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.BatchNorm2d)}


@functools.cache
def reached(name):
    """Those that a forward passes: SMP's encoders of a smaller depth keep the stages that they leave out."""
    network, passed = network_of(name), set()
    for layer_name, layer in layers_of(network).items():
        layer.register_forward_hook(lambda *_, layer_name=layer_name: passed.add(layer_name))
    network(images(2, 1))
    return passed


def statistics_of(network):
    return {name: value.clone() for name, value in network.state_dict().items() if "running" in name or "num_b" in name}


def counts_of(network, name):
    """Updates so far: {part: the set of counts of its layers}."""
    found = {}
    for layer_name, layer in layers_of(network).items():
        if layer_name in reached(name):
            found.setdefault(layer_name.split(".")[0], set()).add(int(layer.num_batches_tracked))
        else:
            assert int(layer.num_batches_tracked) == 0
    return found


def step_of(network, mode, layer):
    """One training step's forwards as the module makes them."""
    taps = resolve_taps(network, [layer], 3)
    method = DANNMethod([layer], [tap.channels for tap in taps], "pixel", 4, 1e-3)
    module = AdaptationModule(network, method, taps, lambda groups: torch.optim.SGD(groups, 0.1), batchnorm=mode)
    return module.step_outputs(batch_of())


def different(before, after):
    return [name for name in before if not torch.equal(before[name], after[name])]


@pytest.mark.parametrize(
    ("mode", "layer", "encoder", "decoder"),
    [
        ("separate", "encoder", 2, 1),
        ("separate", "decoder", 2, 2),
        ("separate", "segmentation_head", 2, 2),
        ("joint", "encoder", 1, 1),
        ("joint", "decoder", 1, 1),
        ("joint", "segmentation_head", 1, 1),
        ("source_only", "encoder", 1, 1),
        ("source_only", "decoder", 1, 1),
        ("source_only", "segmentation_head", 1, 1),
        ("target_stats", "encoder", 2, 1),
        ("target_stats", "decoder", 2, 2),
        ("target_stats", "segmentation_head", 2, 2),
    ],
)
@BOTH
def test_a_step_updates_the_statistics_of_encoder_and_decoder_so_often(name, mode, layer, encoder, decoder):
    network = network_of(name)
    step_of(network, mode, layer)
    assert counts_of(network, name) == {"encoder": {encoder}, "decoder": {decoder}}


@BOTH
def test_inside_the_encoder_only_layers_up_to_the_tap_meet_the_target(name):
    layer = {"unet": "encoder.layer1", "pspnet": "encoder.features.0"}[
        name
    ]  # the latter stands before the first BatchNorm
    network = network_of(name)
    step_of(network, "separate", layer)
    counts = counts_of(network, name)
    assert counts["decoder"] == {1}
    assert counts["encoder"] == ({1, 2} if name == "unet" else {1})
    if name == "unet":
        assert int(network.encoder.layer1[1].bn2.num_batches_tracked) == 2
        assert int(network.encoder.layer2[0].bn1.num_batches_tracked) == 1


def first_layer(network):
    """The first BatchNorm and its inputs, in the order of the forwards made."""
    layer = next(iter(layers_of(network).values()))
    inputs = []
    layer.register_forward_pre_hook(lambda _, values: inputs.append(values[0].detach()))
    return layer, inputs


@pytest.mark.parametrize("mode", MODES)
@BOTH
def test_running_statistics_after_a_step_are_those_of_the_table(name, mode):
    """From mean 0 and variance 1 with momentum 0.1."""
    network = network_of(name)
    taps = resolve_taps(network, ["encoder"], 3)
    layer, inputs = first_layer(network)
    source, target = batch_of()["source"]["image"], batch_of()["target"]["image"]
    if mode == "joint":
        forward_joint(network, source, target, taps)
        assert [len(values) for values in inputs] == [S + T]
    else:
        forward_with_taps(network, source, taps)
        if mode == "source_only":
            with statistics_kept(network):
                forward_to_taps(network, target, taps)
        else:
            forward_to_taps(network, target, taps)
        assert [len(values) for values in inputs] == [S, T]
    parts = [(values.mean((0, 2, 3)), values.var((0, 2, 3))) for values in inputs]
    mean, variance = torch.zeros_like(parts[0][0]), torch.ones_like(parts[0][0])
    for part in parts[:1] if mode == "source_only" else parts:
        mean, variance = 0.9 * mean + 0.1 * part[0], 0.9 * variance + 0.1 * part[1]
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_var, variance)


@BOTH
def test_source_only_normalises_the_target_as_separate_does_and_keeps_source_alone(name):
    separate, source_only, alone = network_of(name), network_of(name), network_of(name)
    features = {mode: step_of(network, mode, "decoder").target_features["decoder"]
                for mode, network in (("separate", separate), ("source_only", source_only))}  # fmt: skip
    assert torch.equal(features["separate"], features["source_only"])
    alone(batch_of()["source"]["image"])
    torch.testing.assert_close(statistics_of(source_only), statistics_of(alone))
    assert len(different(statistics_of(separate), statistics_of(alone))) == 3 * len(reached(name))


def test_separate_statistics_settle_between_the_domains_and_leave_out_how_their_means_differ():
    """Twice the same step for ever: r = 0.9 (0.9 r + 0.1 s) + 0.1 t gives t the weight 0.1 / 0.19, s the weight 0.09 / 0.19."""
    source, target = batch_of()["source"]["image"], batch_of()["target"]["image"]
    separate, joint = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    for _ in range(200):
        separate(source)
        separate(target)
        joint(torch.cat([source, target]))
    dims = (0, 2, 3)
    torch.testing.assert_close(separate.running_mean, (9 * source.mean(dims) + 10 * target.mean(dims)) / 19)
    torch.testing.assert_close(separate.running_var, (9 * source.var(dims) + 10 * target.var(dims)) / 19)
    torch.testing.assert_close(joint.running_var, torch.cat([source, target]).var(dims))
    assert (joint.running_var > separate.running_var).all()


class EveryKind(nn.Module):
    """One BatchNorm of each kind, on the same values."""

    def __init__(self, **arguments):
        super().__init__()
        kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
        self.norms = nn.ModuleList([kind(3, **arguments) for kind in kinds])

    def forward(self, values):  # (N, 3, H, W)
        flat, deep = values.flatten(2), values[..., None]
        return [norm(x).reshape(values.shape) for norm, x in zip(self.norms, (flat, values, deep, values), strict=True)]


@pytest.mark.parametrize(
    "arguments", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str
)
def test_statistics_of_every_kind_are_kept_and_the_forward_is_the_same(arguments):
    network = EveryKind(**arguments).train()
    network(images(4, 1))  # so that there is something to keep
    before = statistics_of(network)
    assert len(before) == (0 if "track_running_stats" in arguments else 12)
    with statistics_kept(network) as same:
        assert same is network
        inside = network(images(4, 2) + 1)
    assert different(before, statistics_of(network)) == []
    outside = network(images(4, 2) + 1)
    assert all(torch.equal(one, other) for one, other in zip(inside, outside, strict=True))
    assert different(before, statistics_of(network)) == list(before)  # moving again
    assert {norm.track_running_stats for norm in network.norms} == {"track_running_stats" not in arguments}


def test_a_layer_frozen_in_eval_mode_goes_on_using_its_running_statistics():
    network = EveryKind().train()
    frozen = network.norms[1].eval()
    frozen.running_mean.fill_(5.0)
    with statistics_kept(network):
        outputs = network(images(4, 2))
    torch.testing.assert_close(outputs[1], (images(4, 2) - 5) / (1 + 1e-5) ** 0.5)
    assert outputs[0].mean().abs() < 1e-5
    assert [norm.training for norm in network.norms] == [True, False, True, True]


def test_statistics_are_kept_when_the_mode_changes_inside_and_gradients_flow():
    network = network_of("unet")
    before = statistics_of(network)
    with statistics_kept(network):
        network(images(2, 1)).sum().backward()
        network.eval()
        inside = network(images(2, 1))
    assert torch.equal(inside, network(images(2, 1)))
    assert different(before, statistics_of(network)) == []
    assert next(network.parameters()).grad is not None


def test_an_exception_gives_everything_back():
    network = network_of("unet")
    network.encoder.bn1.track_running_stats = False  # somebody's own choice
    network(images(2, 1))
    before, tensors = statistics_of(network), dict(network.named_buffers())
    handle = network.segmentation_head.register_forward_hook(lambda *_: 1 / 0)  # behind every BatchNorm
    with pytest.raises(ZeroDivisionError), statistics_kept(network):
        network(images(2, 2) * 4)
    handle.remove()
    assert different(before, statistics_of(network)) == []
    tracking = {name: layer.track_running_stats for name, layer in layers_of(network).items()}
    assert [name for name, on in tracking.items() if not on] == ["encoder.bn1"]
    assert all(value is tensors[name] for name, value in network.named_buffers())  # an optimizer or EMA may hold them


def test_a_compiled_forward_keeps_statistics_inside_and_moves_them_outside():
    torch.compiler.reset()
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    compiled = torch.compile(network, backend="eager")
    for moved in (1, 2, 3):
        with statistics_kept(network):
            compiled(images(2, moved))
        compiled(images(2, moved))
        assert int(network[1].num_batches_tracked) == moved
    torch.compiler.reset()


def loader_of(whole, *sizes):
    parts = torch.split(whole, list(sizes))
    assert sum(map(len, parts)) == len(whole)
    return [{"image": part} for part in parts]


def by_torch(network, whole):
    """Statistics that torch itself keeps of one batch of everything."""
    reference = copy.deepcopy(network).train()
    for layer in layers_of(reference).values():
        layer.momentum = 1.0
    with torch.no_grad():
        reference(whole)
    return statistics_of(reference)


def uneven(count=11):
    """Images whose brightness and contrast differ much from one to the next."""
    return images(count, 3) * torch.arange(1, count + 1).reshape(-1, 1, 1, 1) + torch.arange(count).reshape(-1, 1, 1, 1)


@BOTH
@pytest.mark.parametrize("sizes", [(11,), (4, 4, 3), (1, 8, 2)], ids=str)
def test_target_statistics_of_the_first_layer_are_torch_s_own_of_all_images_at_once(name, sizes):
    network = network_of(name)
    first = next(iter(layers_of(network)))
    expected = by_torch(network, uneven())
    target_statistics(network, loader_of(uneven(), *sizes))
    found = statistics_of(network)
    for kind in ("running_mean", "running_var"):
        torch.testing.assert_close(found[f"{first}.{kind}"], expected[f"{first}.{kind}"], rtol=1e-4, atol=1e-5)
    if sizes == (11,):  # in one batch every layer's
        for key in (key for key in found if "running" in key):
            torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5)


def test_target_statistics_are_not_the_average_of_batch_variances():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    whole = torch.cat([images(4, 1), images(4, 2) + 10])
    target_statistics(network, loader_of(whole, 4, 4))
    with torch.no_grad():
        values = network[0](whole)
    torch.testing.assert_close(network[1].running_var, values.var((0, 2, 3)))
    averaged = (values[:4].var((0, 2, 3)) + values[4:].var((0, 2, 3))) / 2
    assert ((network[1].running_var - averaged).abs() > 0.1 * averaged).all()


@BOTH
def test_the_order_of_batches_and_what_the_layers_held_before_change_nothing(name):
    one, other = network_of(name), network_of(name)
    other(images(2, 9) * 50)
    batches = loader_of(uneven(), 4, 4, 3)
    target_statistics(one, batches)
    target_statistics(other, batches[::-1])
    found, turned = statistics_of(one), statistics_of(other)
    for key in (key for key in found if "running" in key):
        torch.testing.assert_close(found[key], turned[key], rtol=1e-5, atol=1e-6)


def test_each_image_is_forwarded_once_and_no_more_than_wanted():
    network = network_of("unet")
    forwarded = []
    network.register_forward_hook(lambda _, inputs, output: forwarded.append((len(inputs[0]), output.requires_grad)))
    target_statistics(network, loader_of(uneven(), 4, 4, 3))
    assert forwarded == [(4, False), (4, False), (3, False)]
    forwarded.clear()
    target_statistics(network, loader_of(uneven(), 4, 4, 3), most_images=5)
    assert forwarded == [(4, False), (4, False)]
    assert 500 <= MOST_IMAGES <= 10_000


def test_only_running_means_and_variances_change_and_modes_are_given_back():
    network = network_of("unet")
    network.decoder.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes = {name: module.training for name, module in network.named_modules()}
    target_statistics(network, loader_of(uneven(), 11))
    changed = different(before, network.state_dict())
    # those in eval mode too, and no num_batches_tracked
    assert changed == [name for name in before if "running" in name and name.rpartition(".")[0] in reached("unet")]
    assert any(name.startswith("decoder") for name in changed)
    assert {name: module.training for name, module in network.named_modules()} == modes
    assert all(layer.track_running_stats for layer in layers_of(network).values())
    assert not any(layer._forward_pre_hooks for layer in layers_of(network).values())


def test_dropout_draws_nothing_while_statistics_are_taken():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(0.5), nn.BatchNorm2d(4)).train()
    target_statistics(network, loader_of(uneven(), 11))
    with torch.no_grad():
        torch.testing.assert_close(network[2].running_mean, network[0](uneven()).mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    assert network[1].training


def test_layers_that_no_image_reaches_stay_and_those_used_twice_count_twice():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.shared, self.unused = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, values):
            first = self.conv(values)
            self.seen = [first, first * 5 + 3]
            return sum(self.shared(x) for x in self.seen)

    network = Network()
    target_statistics(network, loader_of(uneven(), 11))
    torch.testing.assert_close(network.shared.running_var, torch.cat(network.seen).var((0, 2, 3)), rtol=1e-4, atol=1e-4)
    assert torch.equal(network.unused.running_mean, torch.zeros(3))


def test_images_whose_sides_the_network_cannot_divide_are_taken_too():
    network = network_of("unet")
    target_statistics(network, [{"image": images(3, 1, size=30)}])
    assert (network.encoder.bn1.running_mean != 0).all()


@pytest.mark.parametrize(("batches", "message"), [([], "has none"), ([{"image": images(1, 1)}], "two images or more")])
def test_statistics_that_cannot_be_taken_are_refused_and_change_nothing(batches, message):
    network = build_network(
        "deeplabv3", "resnet18", None, 3, 2, {}
    )  # its pooling branch has a BatchNorm on one position
    network(images(2, 1))
    before = statistics_of(network)
    with pytest.raises(InputError, match=message):
        target_statistics(network, batches)
    assert different(before, statistics_of(network)) == []
    assert all(module.training for module in network.modules())


def test_an_error_in_the_middle_changes_nothing():
    def broken():
        yield {"image": images(2, 1)}
        raise OSError("a file is gone")

    network = network_of("unet")
    before = statistics_of(network)
    with pytest.raises(OSError, match="a file is gone"):
        target_statistics(network, broken())
    assert different(before, statistics_of(network)) == []
    assert not any(layer._forward_pre_hooks for layer in layers_of(network).values())


def test_a_network_has_batchnorm_if_one_keeps_running_statistics():
    assert all(has_batchnorm(network_of(name)) for name in ("unet", "pspnet"))
    plain = [nn.Conv2d(3, 3, 1), nn.GroupNorm(1, 3), nn.InstanceNorm2d(3, track_running_stats=True)]
    assert not has_batchnorm(nn.Sequential(*plain))
    assert not has_batchnorm(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)))
    assert has_batchnorm(nn.Sequential(*plain, nn.SyncBatchNorm(3)))


def set_of(folder, sizes, **arguments):
    """A training set of images of one value each: its number."""
    samples = []
    for number, size in enumerate(sizes):
        path = folder / f"{number:02}.png"
        Image.fromarray(np.full((size, size, 3), number, np.uint8)).save(path)
        samples.append(Sample(path, None))
    plain = Normalization((0.0,) * 3, (1.0,) * 3, (0.0,) * 3, (1.0,) * 3)
    return SegmentationDataset(samples, label_map(["a", "b"], 255, None, None, ()), plain, training=True, **arguments)


def test_the_statistics_loader_gives_whole_items_unchanged_in_the_same_order_each_time(tmp_path):
    dataset = set_of(tmp_path, [32] * 10, crop_size=16, augmentation="strong")
    loader = statistics_loader(dataset, 4)
    state = torch.get_rng_state()
    rounds = [[(batch["index"].tolist(), batch["image"]) for batch in loader] for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert [indices for indices, _ in rounds[0]] == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]  # from all over the set
    for (indices, one), (_, other) in zip(*rounds, strict=True):
        assert one.shape == (len(indices), 3, 32, 32)
        assert torch.equal(one, other)
        assert one.unique().numel() == len(indices)
    assert (dataset.training, dataset.crop_size, dataset.augmentation) == (True, 16, "strong")


@pytest.mark.parametrize(
    ("sizes", "batch_size", "expected"),
    [
        ([16] * 5, 4, [[0, 2, 4], [1, 3]]),
        ([16] * 5, 1, [[0, 2, 4], [1, 3]]),
        ([16] * 3, 2, [[0, 1, 2]]),
        ([16], 4, [[0]]),
        ([16, 16, 32, 32, 16, 16, 32], 2, [[0, 4], [2, 3, 6], [1, 5]]),
    ],
)
def test_batches_for_statistics_hold_one_size_and_two_images_or_more(tmp_path, sizes, batch_size, expected):
    loader = statistics_loader(set_of(tmp_path, sizes), batch_size)
    assert [batch["index"].tolist() for batch in loader] == expected


@BOTH
def test_weights_train_to_the_same_bits_whether_the_target_moves_the_running_statistics_or_not(name):
    trained = {}
    for mode in ("separate", "source_only"):
        network = network_of(name)
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        for _ in range(2):
            optimizer.zero_grad()
            step_of(network, mode, "decoder").target_features["decoder"].square().mean().backward()
            optimizer.step()
        trained[mode] = dict(network.named_parameters())
        assert not torch.equal(trained[mode]["encoder.conv1.weight" if name == "unet" else "encoder.features.0.weight"],
                               next(_built(name).parameters()))  # fmt: skip
    assert different(*trained.values()) == []
