"""Real segmentation networks: where they can be tapped, and which layers run on which images in a training step.

S = 2 source and T = 3 target images of 64 x 64, random weights.
"""

import functools
import math
from contextlib import contextmanager

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader

from dann_experiments.adaptation.dann import DANNMethod
from dann_experiments.adaptation.method import Progress
from dann_experiments.config.errors import InputError
from dann_experiments.models.networks import build_network, logits_of_any_size
from dann_experiments.models.passes import (
    check_joint,
    choose,
    forward_joint,
    forward_to_taps,
    forward_with_taps,
)
from dann_experiments.models.taps import deepest_map, evaluating, list_layers, resolve_taps
from dann_experiments.training.losses import segmentation_loss
from dann_experiments.training.module import AdaptationModule
from dann_experiments.training.optimizers import build_optimizer

S, T = 2, 3
NOW = Progress(epoch=1, max_epochs=2, step=1, total_steps=2)
NETWORKS = [  # architecture, encoder, channels of the encoder's deepest map
    ("unet", "resnet18", 512),
    ("unet", "resnet50", 2048),
    ("unet", "efficientnet-b0", 320),
    ("unet", "mobilenet_v2", 1280),
    ("unet", "mit_b0", 256),
    ("unet", "tu-resnet18", 512),
    ("deeplabv3plus", "resnet18", 512),
    ("fpn", "resnet18", 512),
    ("segformer", "resnet18", 512),
]
EACH_NETWORK = pytest.mark.parametrize(("arch", "encoder", "channels"), NETWORKS)


@functools.cache
def network_of(arch="unet", encoder="resnet18"):
    torch.manual_seed(0)
    return build_network(arch, encoder, None, 3, 2, {})


@pytest.fixture
def unet():
    network = network_of()
    network.train()
    network.zero_grad()
    return network


def useful_layers(network):
    return [layer.name for layer in list_layers(network, 3) if layer.useful]


def make_module(network, layers, kind="pooled", batchnorm="separate"):
    torch.manual_seed(0)
    taps = resolve_taps(network, layers, 3)
    method = DANNMethod(layers, [tap.channels for tap in taps], kind, hidden_size=4, discriminator_lr=1e-3)

    def sgd(groups):
        return build_optimizer(groups, "sgd", 1e-3, (0.9, 0.999), 0.9, 0.0)

    module = AdaptationModule(network, method, taps, sgd, batchnorm=batchnorm)
    module.passes = choose(network, module.taps, batchnorm, 3)
    return module


def make_batch():
    generator = torch.Generator().manual_seed(1)
    masks = torch.randint(0, 2, (S, 64, 64), generator=generator)
    masks[:, :8] = 255
    return {
        "source": {"image": torch.randn(S, 3, 64, 64, generator=generator), "mask": masks},
        "target": {"image": torch.randn(T, 3, 64, 64, generator=generator)},
    }


def first_tensor(inputs):
    return inputs if isinstance(inputs, torch.Tensor) else first_tensor(inputs[0])


@contextmanager
def batches_seen(network, *names):
    """How many images were in the input of each named module, one number a run of the module."""
    seen = {name: [] for name in names}

    def hook(name):
        return lambda module, inputs: seen[name].append(len(first_tensor(inputs)))

    handles = [network.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    yield seen
    for handle in handles:
        handle.remove()


@EACH_NETWORK
def test_channels_of_each_layer_are_read_from_the_network(arch, encoder, channels):
    network = network_of(arch, encoder)
    layers = {layer.name: layer for layer in list_layers(network, 3) if layer.useful}
    stages = [layer for name, layer in layers.items() if name.startswith("encoder.")]
    assert layers["encoder"].channels == network.encoder.out_channels[-1] == channels
    # out_channels[0] are the image's bands, and mit encoders have a stage of no channels
    assert [stage.channels for stage in stages] == [count for count in network.encoder.out_channels[1:] if count]
    assert [tap.channels for tap in resolve_taps(network, list(layers), 3)] == [it.channels for it in layers.values()]


@pytest.mark.parametrize("kind", ["pooled", "pixel", "patch"])
@EACH_NETWORK
def test_a_training_step_works_with_a_tap_at_every_useful_layer(arch, encoder, channels, kind):
    network, batch = network_of(arch, encoder).train(), make_batch()
    useful = useful_layers(network)
    assert len(useful) >= 7
    assert set(useful) >= {"encoder", "decoder", "segmentation_head"}
    # the classifiers see no more of a layer than its channels, so few layers serve for the other kinds
    layer_lists = {
        "pooled": [*([name] for name in useful if name != "segmentation_head"), ["encoder", "decoder"]],
        "pixel": [[useful[2]], ["encoder", "decoder"]],
        "patch": [["segmentation_head"]],
    }
    for layers in layer_lists[kind]:
        network.zero_grad()
        module = make_module(network, layers, kind)
        optimizer = build_optimizer(
            [{"params": list(network.parameters())}, *module.method.param_groups()], "sgd", 1e-3, (0.9, 0.9), 0.0, 0.0
        )
        watched = [next(network.encoder.parameters()), *network.segmentation_head.parameters()]
        watched += module.method.parameters()
        before = [parameter.detach().clone() for parameter in watched]
        outputs = module.step_outputs(batch)
        share = module.method.loss(outputs, NOW)
        (segmentation_loss(outputs.source_logits, outputs.source_labels, 255) + share.differentiated).backward()
        optimizer.step()
        assert outputs.source_logits.shape == (S, 2, 64, 64), layers
        for layer in layers:
            assert outputs.source_features[layer].shape[0] == S, layers
            assert outputs.target_features[layer].shape == (T, *outputs.source_features[layer].shape[1:]), layers
        assert math.isfinite(share.value), layers
        assert all(parameter.isfinite().all() for parameter in module.parameters()), layers
        moved = [not torch.equal(old, new) for old, new in zip(before, watched, strict=True)]
        assert moved[0], layers
        assert moved[-1], layers


@EACH_NETWORK
def test_target_features_are_those_that_the_whole_forward_would_give(arch, encoder, channels):
    network, images = network_of(arch, encoder), make_batch()["target"]["image"]
    taps = resolve_taps(network, useful_layers(network), 3)
    with evaluating(network):
        _, whole = forward_with_taps(network, images, taps)
        for tap in taps:  # the target stops at this one
            torch.testing.assert_close(forward_to_taps(network, images, [tap])[tap.name], whole[tap.name])


@EACH_NETWORK
@pytest.mark.parametrize("layers", [["encoder"], ["encoder", "decoder"], ["segmentation_head"]], ids=str)
def test_in_eval_mode_a_joint_forward_gives_what_separate_forwards_give(arch, encoder, channels, layers):
    network, batch = network_of(arch, encoder), make_batch()
    taps = resolve_taps(network, layers, 3)
    source_images, target_images = batch["source"]["image"], batch["target"]["image"]
    with evaluating(network):
        logits, source = forward_with_taps(network, source_images, taps)
        target = forward_to_taps(network, target_images, taps)
        joint_logits, joint_source, joint_target = forward_joint(network, source_images, target_images, taps)
    torch.testing.assert_close(joint_logits, logits, rtol=1e-3, atol=1e-4)
    for layer in layers:
        torch.testing.assert_close(joint_source[layer], source[layer], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(joint_target[layer], target[layer], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layers", [["encoder"], ["encoder.layer2"], ["encoder.layer1", "encoder"]], ids=str)
def test_with_a_tap_in_the_encoder_the_decoder_runs_once_on_source_images_alone(unet, layers):
    module, batch = make_module(unet, layers), make_batch()
    norm = next(part for part in unet.decoder.modules() if isinstance(part, nn.BatchNorm2d))
    batches_before = int(norm.num_batches_tracked)
    with batches_seen(unet, "encoder", "decoder", "segmentation_head") as seen:
        module.step_outputs(batch)
    assert seen == {"encoder": [S + T], "decoder": [S], "segmentation_head": [S]}
    assert int(norm.num_batches_tracked) == batches_before + 1


def test_with_a_tap_at_the_decoder_the_head_runs_once_on_source_images_alone(unet):
    module = make_module(unet, ["decoder"])
    with batches_seen(unet, "encoder", "decoder", "segmentation_head") as seen:
        module.step_outputs(make_batch())
    assert seen == {"encoder": [S + T], "decoder": [S + T], "segmentation_head": [S]}


@pytest.mark.parametrize(
    ("layer", "up_to_it"),
    [
        ("encoder.layer2", [S + T]),
        ("encoder.3", [S + T]),
        ("encoder.layer2.1.bn2", [S, T]),
    ],  # its sum needs both domains
)
def test_layers_behind_a_tapped_stage_do_not_run_on_target_images(unet, layer, up_to_it):
    module = make_module(unet, [layer])
    with batches_seen(unet, "encoder.layer1", "encoder.layer2", "encoder.layer3", "encoder.layer4") as seen:
        module.step_outputs(make_batch())
    assert seen == {
        "encoder.layer1": up_to_it, "encoder.layer2": up_to_it, "encoder.layer3": [S], "encoder.layer4": [S],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("layers", "deepest"),
    [(["encoder"], [S + T]), (["encoder.layer2"], [S]), (["encoder.layer2.1.bn2"], [S + T])],
    ids=str,
)
def test_with_joint_batchnorm_the_encoder_runs_once_on_both_domains_and_the_decoder_on_source(unet, layers, deepest):
    module = make_module(unet, layers, batchnorm="joint")
    with batches_seen(unet, "encoder", "encoder.layer4", "decoder", "segmentation_head") as seen:
        outputs = module.step_outputs(make_batch())
    assert seen == {"encoder": [S + T], "encoder.layer4": deepest, "decoder": [S], "segmentation_head": [S]}
    assert len(outputs.source_logits) == S
    assert len(outputs.source_features[layers[0]]) == S
    assert len(outputs.target_features[layers[0]]) == T


def test_with_joint_batchnorm_and_a_tap_at_the_decoder_the_head_runs_once_on_source(unet):
    module = make_module(unet, ["encoder", "decoder"], batchnorm="joint")
    with batches_seen(unet, "encoder", "decoder", "segmentation_head") as seen:
        outputs = module.step_outputs(make_batch())
    assert seen == {"encoder": [S + T], "decoder": [S + T], "segmentation_head": [S]}
    assert {name: len(features) for name, features in outputs.target_features.items()} == {"encoder": T, "decoder": T}


def test_with_joint_batchnorm_and_a_tap_at_the_head_the_logits_are_those_of_the_source(unet):
    module = make_module(unet, ["segmentation_head"], "patch", batchnorm="joint")
    with batches_seen(unet, "encoder", "decoder", "segmentation_head") as seen:
        outputs = module.step_outputs(make_batch())
    assert seen == {"encoder": [S + T], "decoder": [S + T], "segmentation_head": [S + T]}
    assert torch.equal(outputs.source_logits, outputs.source_features["segmentation_head"])
    assert len(outputs.target_features["segmentation_head"]) == T


def test_joint_batchnorm_normalises_with_the_statistics_of_the_mixture(unet):
    norm, batch = unet.encoder.bn1, make_batch()
    images = torch.cat([batch["source"]["image"], batch["target"]["image"]])
    norm.reset_running_stats()
    with torch.no_grad():
        make_module(unet, ["encoder"], batchnorm="joint").step_outputs(batch)
        mixture = unet.encoder.conv1(images).mean((0, 2, 3))
    assert int(norm.num_batches_tracked) == 1
    torch.testing.assert_close(norm.running_mean, norm.momentum * mixture, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layer", ["decoder.blocks.0", "segmentation_head.0"])
def test_joint_batchnorm_is_refused_with_a_tap_where_the_domains_cannot_be_parted(unet, layer):
    with pytest.raises(InputError, match=f"batchnorm is 'joint'.*not with '{layer}'.*'separate'"):
        check_joint(resolve_taps(unet, ["encoder", layer], 3))


@pytest.mark.parametrize("layers", [["encoder"], ["encoder.layer2"], ["decoder"], ["encoder", "segmentation_head"]])
def test_joint_batchnorm_is_allowed_in_the_encoder_and_with_the_whole_decoder_or_head(unet, layers):
    check_joint(resolve_taps(unet, layers, 3))


def test_the_decoder_of_a_real_network_never_feels_the_domain_loss_of_the_encoder(unet):
    module = make_module(unet, ["encoder"])
    module.method.loss(module.step_outputs(make_batch()), NOW).differentiated.backward()
    assert all(
        parameter.grad is None for parameter in [*unet.decoder.parameters(), *unet.segmentation_head.parameters()]
    )
    assert all(parameter.grad.abs().max() > 0 for parameter in unet.encoder.parameters())


class ModesSeen(pl.Callback):
    """The modes of all modules at each forward of the network, in training and in validation."""

    def __init__(self):
        self.training, self.validation = [], []

    def on_train_start(self, trainer, pl_module):
        def look(module, inputs):
            kept = self.training if torch.is_grad_enabled() else self.validation
            kept.append({name for name, part in pl_module.named_modules() if name and not part.training})

        pl_module.network.encoder.register_forward_pre_hook(look)


@pytest.mark.parametrize("frozen", [[], ["encoder.bn1", "encoder.layer1.0.bn1"]], ids=str)
def test_training_steps_run_in_train_mode_and_frozen_modules_stay_frozen(frozen, tmp_path):
    network = build_network("unet", "resnet18", None, 3, 2, {})
    for name in frozen:
        network.get_submodule(name).eval()
    batch = make_batch()
    items = [{"image": image, "mask": batch["source"]["mask"][0]} for image in batch["target"]["image"]]
    modes = ModesSeen()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=-1, callbacks=[modes], default_root_dir=tmp_path,
        log_every_n_steps=1,
    )  # fmt: skip
    loaders = CombinedLoader({"source": DataLoader(items, 3), "target": DataLoader(items, 3)}, "max_size_cycle")
    trainer.fit(make_module(network, ["encoder"]), loaders, DataLoader(items, 3))
    assert modes.training == [{f"network.{name}" for name in frozen}] * 2  # 2 epochs, both domains in one pass
    assert len(modes.validation) == 2
    assert all("network.decoder" in names for names in modes.validation)


@pytest.mark.parametrize("fails", [False, True])
def test_evaluating_gives_every_module_its_own_mode_back(fails):
    network = build_network("unet", "resnet18", None, 3, 2, {})
    for name in ("encoder.bn1", "decoder.blocks.1"):
        network.get_submodule(name).eval()
    network.decoder.blocks[1].conv1.train()  # train inside eval inside train
    before = {name: part.training for name, part in network.named_modules()}
    assert set(before.values()) == {True, False}
    try:
        with evaluating(network) as same:
            assert same is network
            assert not any(part.training for part in network.modules())
            assert not torch.is_grad_enabled()
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert {name: part.training for name, part in network.named_modules()} == before
    assert torch.is_grad_enabled()


def test_looking_up_layers_changes_nothing_in_the_network():
    network = build_network("unet", "resnet18", None, 3, 2, {})
    network.encoder.bn1.eval()
    modes = [part.training for part in network.modules()]
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    list_layers(network, 3)
    resolve_taps(network, ["encoder", "decoder"], 3)
    with pytest.raises(InputError):
        resolve_taps(network, ["encoder.nowhere"], 3)
    assert [part.training for part in network.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert not any(part._forward_hooks for part in network.modules())


def test_no_hook_is_left_in_the_network_after_a_step(unet):
    batch = make_batch()
    for batchnorm in ("separate", "joint"):
        make_module(unet, ["encoder.layer2"], batchnorm=batchnorm).step_outputs(batch)
    batch["target"]["image"] = batch["target"]["image"][:, :2]  # two bands, where three are needed
    for batchnorm in ("separate", "joint"):
        with pytest.raises(RuntimeError):
            make_module(unet, ["encoder.layer2"], batchnorm=batchnorm).step_outputs(batch)
    assert not any(part._forward_hooks for part in unet.modules())


def test_a_tap_that_the_next_layer_overwrites_in_place_gives_its_own_output_for_both_domains(unet):
    images = make_batch()["target"]["image"]
    taps = resolve_taps(unet, ["encoder.bn1"], 3)
    with evaluating(unet):
        expected = unet.encoder.bn1(unet.encoder.conv1(images))
        _, whole = forward_with_taps(unet, images, taps)
        partial = forward_to_taps(unet, images, taps)
        joint = forward_joint(unet, images, images, taps)
    assert expected.min() < 0  # the ReLU behind it has not been over it
    for features in (whole, partial, joint[1], joint[2]):
        torch.testing.assert_close(features["encoder.bn1"], expected)


def test_of_a_layer_that_runs_twice_both_domains_give_the_first_output(unet):
    images = make_batch()["target"]["image"]
    taps = resolve_taps(unet, ["encoder.layer1.0.relu"], 3)
    block = unet.encoder.layer1[0]
    with evaluating(unet):
        stem = unet.encoder.maxpool(unet.encoder.relu(unet.encoder.bn1(unet.encoder.conv1(images))))
        expected = block.bn1(block.conv1(stem)).relu()
        _, whole = forward_with_taps(unet, images, taps)
        partial = forward_to_taps(unet, images, taps)
    torch.testing.assert_close(whole["encoder.layer1.0.relu"], expected)
    torch.testing.assert_close(partial["encoder.layer1.0.relu"], expected)


@pytest.mark.parametrize(
    "layer", ["encoder.layer9", "encoder.9", "encoder.layer4.0.9", "decoder.0", "nothing", "", "0"]
)
def test_an_unknown_layer_is_refused_with_the_list_of_useful_ones(unet, layer):
    with pytest.raises(InputError) as refusal:
        resolve_taps(unet, [layer], 3)
    assert repr(layer) in str(refusal.value)
    assert str(useful_layers(unet)) in str(refusal.value)


def test_a_stage_without_channels_is_refused():
    with pytest.raises(InputError, match=r"names 'encoder\.1'"):
        resolve_taps(network_of("unet", "mit_b0"), ["encoder.1"], 3)


def test_encoder_k_picks_map_k_of_the_encoder(unet):
    images = make_batch()["target"]["image"]
    names = {f"encoder.{index}": index for index in range(1, 6)}
    taps = resolve_taps(unet, list(names), 3)
    assert [(tap.channels, tap.stride) for tap in taps] == [(64, 2), (64, 4), (128, 8), (256, 16), (512, 32)]
    with evaluating(unet):
        maps = unet.encoder(images)
        features = forward_to_taps(unet, images, taps)
    for name, index in names.items():
        torch.testing.assert_close(features[name], maps[index])


def test_a_module_of_that_name_goes_before_map_k():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 7, 1))
    assert [tap.module for tap in resolve_taps(nn.ModuleDict({"encoder": network}).encoder, ["1"], 3)] == ["1"]


def test_encoder_means_its_deepest_map_that_has_channels():
    maps = [torch.zeros(1, channels, 4, 4) for channels in (3, 5, 0)]
    assert deepest_map(maps) is maps[1]
    assert deepest_map(tuple(maps[:2])) is maps[1]
    with pytest.raises(TypeError):
        deepest_map([torch.zeros(3), None])


def test_useful_layers_of_a_unet_are_the_encoder_its_stages_the_decoder_and_the_head(unet):
    useful = [(it.name, it.channels, it.stride) for it in list_layers(unet, 3) if it.useful]
    assert useful == [
        ("encoder.relu", 64, 2),
        ("encoder.layer1", 64, 4),
        ("encoder.layer2", 128, 8),
        ("encoder.layer3", 256, 16),
        ("encoder.layer4", 512, 32),
        ("encoder", 512, 32),
        ("decoder", 16, 1),
        ("segmentation_head", 2, 1),
    ]


def test_each_layer_is_listed_once_and_can_be_tapped(unet):
    layers = {layer.name: layer for layer in list_layers(unet, 3)}
    assert len(layers) == len(list_layers(unet, 3)) > 60
    for tap in resolve_taps(unet, list(layers), 3):
        assert (tap.channels, tap.stride) == (layers[tap.name].channels, layers[tap.name].stride), tap.name


def test_the_last_map_of_a_vision_transformer_is_tapped():
    """Its encoder returns maps and tokens, each in a list."""
    network = build_network("dpt", "tu-test_vit", None, 3, 2, {})
    (tap,) = resolve_taps(network, ["encoder"], 3)
    assert (tap.channels, tap.stride) == (64, 16)
    images = torch.randn(1, 3, 64, 64)
    with evaluating(network):
        maps, tokens = network.encoder(images)
        assert torch.equal(forward_to_taps(network, images, [tap])["encoder"], maps[-1])
    assert tokens[-1].ndim == 3


@pytest.mark.parametrize(("height", "width"), [(64, 64), (50, 70), (33, 32)])
def test_images_of_any_size_get_logits_of_their_own_size(unet, height, width):
    with evaluating(unet):
        logits = logits_of_any_size(unet, torch.randn(1, 3, height, width))
    assert logits.shape == (1, 2, height, width)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("unet", "resnet99", None, 3, 2, {}), "resnet99"),
        (("unet", "resnet18", None, 3, 2, {"psp_dropout": 0.1}), "unet takes no psp_dropout; it takes"),
        (("unet", "resnet18", "atlantis", 3, 2, {}), "atlantis"),
        (("unet", "tu-nest_tiny", None, 3, 2, {}), "fewer stages than unet asks for.*smaller model.encoder_depth"),
    ],
)
def test_a_network_that_does_not_exist_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        build_network(*settings)
