"""Companions that change the source images: their equations, against second implementations, and that they resume."""

from __future__ import annotations

import math

import mlflow
import numpy as np
import pytest
import torch
from conftest import small_settings
from scipy.spatial.transform import Rotation
from skimage.color import lab2rgb, rgb2lab
from skimage.exposure import match_histograms
from test_resume import Killed, Noise, assert_same, killed, settings
from torch import Tensor, nn

from dann_experiments import InputError, load_config
from dann_experiments.adaptation.build import COMPANIONS, build_companion
from dann_experiments.adaptation.companions.companion import WithCompanions
from dann_experiments.adaptation.companions.fda import FourierAdaptation
from dann_experiments.adaptation.companions.histogram import HistogramMatching
from dann_experiments.adaptation.companions.lab import lab_to_rgb, rgb_to_lab
from dann_experiments.adaptation.companions.moments import MomentMatching
from dann_experiments.adaptation.companions.style import Style, turned
from dann_experiments.adaptation.dann import SourceOnly
from dann_experiments.adaptation.method import Progress
from dann_experiments.config.companions import APPEARANCES, CompanionTerm
from dann_experiments.jobs import adapt
from dann_experiments.training.module import AdaptationModule

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def batch_of(source: Tensor, target: Tensor, valid: Tensor | None = None, known: Tensor | None = None):
    """A training batch; `valid` and `known` are the validity of source and target."""
    batch = {
        "source": {"image": source, "mask": torch.zeros(len(source), *source.shape[2:], dtype=torch.int64)},
        "target": {"image": target},
    }
    for part, mask in (("source", valid), ("target", known)):
        if mask is not None:
            batch[part] |= {"image": batch[part]["image"] * mask[:, None], "valid": mask}
    return batch


def drawn_batch(bands: int = 3, masked: bool = False, seed: int = 0):
    """Four source images and one target image of other colours, with a wedge of nodata in each if `masked`."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randn(4, bands, 12, 10, generator=generator).cumsum(2) * 0.3
    target = torch.randn(1, bands, 12, 10, generator=generator).cumsum(3) * 0.8 + 1
    if not masked:
        return batch_of(source, target)
    valid, known = torch.ones(4, 12, 10), torch.ones(1, 12, 10)
    valid[:, :3], valid[1, :, 5:], known[:, 8:, 2:] = 0, 0, 0
    return batch_of(source, target, valid, known)


def images_of(companion, batch) -> Tensor:
    return companion.prepare(batch)["source"]["image"]


def of_kind(name: str, probability: float | None = 1.0, seed: int = 0):
    return build_companion(CompanionTerm(name, probability=probability), seed, 255)  # pyright: ignore[reportArgumentType]


# ---- what all of them do


@pytest.mark.parametrize("bands", [1, 3, 5])
@pytest.mark.parametrize("name", APPEARANCES)
def test_pixels_without_data_stay_0_and_enter_no_statistics_and_labels_stay(name, bands):
    batch = drawn_batch(bands, masked=True)
    given = {role: dict(part) for role, part in batch.items()}
    copies = {role: part["image"].clone() for role, part in batch.items()}
    made = of_kind(name).prepare(batch)
    valid = batch["source"]["valid"][:, None].expand_as(copies["source"])
    assert not made["source"]["image"][valid == 0].any()
    assert (made["source"]["image"] != copies["source"])[valid > 0].float().mean() > 0.9
    assert made["source"]["mask"] is given["source"]["mask"]
    assert made["target"] is batch["target"]
    assert all(torch.equal(batch[role]["image"], copies[role]) for role in batch)  # the given batch is not changed
    for role in batch:  # other values where there is no data change nothing
        lacking = batch[role]["valid"][:, None] == 0
        batch[role] = batch[role] | {"image": torch.where(lacking, 7.0, batch[role]["image"])}
    again = images_of(of_kind(name), batch)
    assert torch.equal(again[valid > 0], made["source"]["image"][valid > 0])


@pytest.mark.parametrize("name", APPEARANCES)
def test_the_probability_is_the_share_of_images_that_change_and_no_other_draw_depends_on_it(name):
    batch = batch_of(torch.randn(400, 3, 2, 2), torch.randn(1, 3, 2, 2))
    every, some = (images_of(of_kind(name, share), batch) for share in (1.0, 0.3))
    same = (some == batch["source"]["image"]).flatten(1).all(1)
    assert same.float().mean().item() == pytest.approx(0.7, abs=0.06)
    assert torch.equal(some[~same], every[~same])
    assert torch.equal(images_of(of_kind(name, 0.0), batch), batch["source"]["image"])


@pytest.mark.parametrize("name", APPEARANCES)
def test_the_draws_depend_on_the_seed_and_go_on_from_their_state(name):
    generator = torch.Generator().manual_seed(3)
    batch = batch_of(torch.randn(8, 3, 4, 4, generator=generator), torch.randn(8, 3, 4, 4, generator=generator))
    first, other = of_kind(name, None), of_kind(name, None, seed=1)
    assert not torch.equal(images_of(first, batch), images_of(other, batch))
    resumed = of_kind(name, None)
    resumed.load_state_dict(first.state_dict())
    before = torch.random.get_rng_state()
    following = images_of(first, batch)
    assert torch.equal(images_of(resumed, batch), following)
    assert not torch.equal(images_of(of_kind(name, None), batch), following)
    assert torch.equal(torch.random.get_rng_state(), before)  # a stream of its own


def test_two_companions_choose_their_images_independently():
    chosen = [
        (images_of(of_kind(name, 0.5), batch) != batch["source"]["image"]).flatten(1).any(1)
        for batch in [batch_of(torch.randn(400, 3, 2, 2), torch.randn(1, 3, 2, 2))]
        for name in APPEARANCES
    ]
    for number, one in enumerate(chosen):
        for other in chosen[:number]:
            assert (one == other).float().mean().item() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("name", APPEARANCES)
def test_half_precision_of_the_network_does_not_reach_the_changes(name):
    batch = drawn_batch()
    wanted = images_of(of_kind(name), batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(images_of(of_kind(name), batch), wanted)
    half = {role: part | {"image": part["image"].bfloat16()} for role, part in batch.items()}
    assert images_of(of_kind(name), half).dtype == torch.bfloat16


@pytest.mark.parametrize("name", [name for name in APPEARANCES if name != "style"])
def test_the_target_image_itself_stays_as_it_is_and_one_without_data_changes_nothing(name):
    target = drawn_batch(masked=True)["target"]
    batch = {"source": dict(target), "target": target}
    assert torch.allclose(images_of(of_kind(name), batch), target["image"], atol=1e-5)
    empty = batch_of(torch.randn(2, 3, 4, 4), torch.zeros(1, 3, 4, 4), known=torch.zeros(1, 4, 4))
    assert torch.equal(images_of(of_kind(name), empty), empty["source"]["image"])


@pytest.mark.parametrize("name", [name for name in APPEARANCES if name != "style"])
def test_every_target_image_of_the_batch_is_taken_equally_often(name):
    levels = torch.arange(4.0)[:, None, None, None].expand(4, 1, 2, 2)
    batch = batch_of(torch.randn(800, 1, 2, 2), levels)
    means = images_of(of_kind(name), batch).mean((1, 2, 3)).round()
    shares = torch.bincount(means.long(), minlength=4) / 800
    assert shares.tolist() == pytest.approx([0.25] * 4, abs=0.06)


# ---- style


def test_a_turn_of_a_third_is_another_order_of_the_bands_and_grey_stays():
    images = torch.randn(2, 3, 4, 4)
    third = torch.full((2, 1, 1, 1), 2 * math.pi / 3)
    assert torch.allclose(turned(images, third), images.roll(1, 1), atol=1e-6)
    assert torch.allclose(turned(images, 3 * third), images, atol=1e-5)
    grey = images[:, :1].expand_as(images)
    assert torch.allclose(turned(grey, 0.4 * third), grey, atol=1e-6)


@pytest.mark.parametrize("bands", [3, 4])
def test_style_written_out_for_each_image(bands):
    """With the rotations of scipy, draw by draw."""
    batch, seen = drawn_batch(bands, masked=True), set()
    companion = Style(1.0, seed=5)
    generator = torch.Generator()
    generator.set_state(companion.draws.get_state())
    for _ in range(4):
        made = images_of(companion, batch)
        torch.rand(4, generator=generator)  # which images are changed
        order = torch.rand(4, bands, generator=generator).argsort(1)
        angle, grey, contrast, brightness = (torch.rand(4, generator=generator) for _ in range(4))
        for number in range(4):
            image = batch["source"]["image"][number][order[number]].double().numpy()
            if bands == 3:
                turn = Rotation.from_rotvec(2 * math.pi * float(angle[number]) * np.ones(3) / math.sqrt(3))
                image = turn.apply(image.reshape(3, -1).T).T.reshape(image.shape)
            if grey[number] < 0.2:
                image = np.broadcast_to(image.mean(0), image.shape)
            valid = batch["source"]["valid"][number].numpy()
            mean = image[:, valid > 0].mean(1)[:, None, None]
            wanted = mean + (0.6 + 0.8 * float(contrast[number])) * (image - mean)
            wanted = (wanted + 0.8 * float(brightness[number]) - 0.4) * valid
            assert np.allclose(made[number].numpy(), wanted, atol=1e-5)
            seen.add(bool(grey[number] < 0.2))
    assert seen == {True, False}


# ---- moments


@pytest.mark.parametrize("masked", [False, True])
def test_the_moments_become_those_of_the_target_image(masked):
    """Reinhard et al. 2001, eqs. 10 and 11, image by image."""
    batch = drawn_batch(5, masked)
    made = images_of(MomentMatching(1.0), batch)
    valid, known = (
        batch[role].get("valid", torch.ones(len(part["image"]), 12, 10)) > 0 for role, part in batch.items()
    )
    theirs = batch["target"]["image"][0][:, known[0]]
    for number, mask in enumerate(valid):
        own = batch["source"]["image"][number][:, mask]
        scaled = (own - own.mean(1, keepdim=True)) / own.std(1, correction=0, keepdim=True)
        wanted = scaled * theirs.std(1, correction=0, keepdim=True) + theirs.mean(1, keepdim=True)
        assert torch.allclose(made[number][:, mask], wanted, atol=1e-5)


def test_an_image_of_one_value_becomes_the_target_s_mean():
    made = images_of(MomentMatching(1.0), batch_of(torch.full((1, 3, 4, 4), 0.5), torch.randn(1, 3, 4, 4) + 2))
    assert torch.isfinite(made).all()
    assert made.std((2, 3)).max() < 1e-4


def test_lab_is_that_of_scikit_image():
    images = torch.rand(2, 3, 9, 7)
    images[0, :, 0] = torch.tensor([0.0, 0.01, 1.0])[:, None]
    lab = rgb_to_lab(images)
    assert np.allclose(lab.movedim(1, -1).numpy(), rgb2lab(images.movedim(1, -1).numpy()), atol=2e-3)
    assert torch.allclose(lab_to_rgb(lab), images, atol=1e-4)
    beyond = lab * torch.tensor([1.0, 1.6, 1.6])[:, None, None]
    wanted = lab2rgb(beyond.movedim(1, -1).double().numpy())
    assert np.allclose(lab_to_rgb(beyond).movedim(1, -1).numpy(), wanted, atol=2e-3)


def scaled_module(method, scaling) -> AdaptationModule:
    network = nn.Sequential(nn.Conv2d(3, 2, 1))
    return AdaptationModule(network, method, [], torch.optim.SGD, scaling=scaling)


@pytest.mark.filterwarnings("ignore:.*out of the Lab")
def test_moments_in_lab_are_those_of_the_raw_images_and_look_like_the_target_to_the_network():
    """Reinhard's transfer with scikit-image, for images that each domain normalizes by itself."""
    torch.manual_seed(0)
    raw = torch.rand(2, 3, 8, 8) * 0.3 + 0.2, torch.rand(1, 3, 8, 8) * torch.tensor([0.6, 0.3, 0.2])[:, None, None]
    scaling = torch.stack([MEAN, MEAN / 2]), torch.stack([STD, STD * 0.7])
    source, target = (
        (image - scaling[0][n][:, None, None]) / scaling[1][n][:, None, None] for n, image in enumerate(raw)
    )
    method = WithCompanions(SourceOnly(), [MomentMatching(1.0, "lab")])
    assert "raw_images" in method.needs
    module = scaled_module(method, scaling)
    made = images_of(method, module._with_scaling(batch_of(source, target)))
    theirs = rgb2lab(raw[1][0].movedim(0, -1).numpy())
    for number in range(2):
        own = rgb2lab(raw[0][number].movedim(0, -1).numpy())
        lab = (own - own.mean((0, 1))) / own.std((0, 1)) * theirs.std((0, 1)) + theirs.mean((0, 1))
        wanted = (torch.from_numpy(lab2rgb(lab)) - MEAN / 2) / (STD * 0.7)
        assert torch.allclose(made[number].movedim(0, -1), wanted.float(), atol=5e-3)


def test_raw_images_are_given_back_by_the_label_of_each_image_s_domain():
    """With several domains, images of one batch may have several normalizations."""
    scaling = torch.stack([MEAN, MEAN + 1, MEAN + 2]), torch.stack([STD, 2 * STD, 3 * STD])
    module = scaled_module(SourceOnly(), scaling)
    raw = torch.rand(2, 3, 4, 4)
    labels = torch.tensor([2, 0])
    source = (raw - scaling[0][labels][..., None, None]) / scaling[1][labels][..., None, None]
    batch = {"source": {"image": source, "domain": labels}}
    part = module._with_scaling(batch)["source"]
    assert torch.allclose(part["image"] * part["std"] + part["mean"], raw, atol=1e-6)
    assert set(batch["source"]) == {"image", "domain"}


# ---- histogram


@pytest.mark.parametrize("levels", [None, 6], ids=["all different", "many equal"])
def test_the_histogram_is_matched_as_by_scikit_image(levels):
    batch = drawn_batch(masked=True)
    if levels:
        for part in batch.values():
            part["image"] = (part["image"] * 2).round() / levels
    made = images_of(HistogramMatching(1.0), batch)
    known = batch["target"]["valid"][0] > 0
    for number, mask in enumerate(batch["source"]["valid"] > 0):
        for band in range(3):
            own = batch["source"]["image"][number, band][mask].numpy()
            theirs = batch["target"]["image"][0, band][known].numpy()
            assert np.allclose(made[number, band][mask].numpy(), match_histograms(own, theirs), atol=1e-5)


def test_images_of_other_sizes_are_matched():
    batch = batch_of(torch.randn(2, 3, 9, 5), torch.randn(3, 3, 4, 14))
    for name in APPEARANCES:
        assert images_of(of_kind(name), batch).shape == (2, 3, 9, 5)


# ---- FDA


@pytest.mark.parametrize("band", [0, 1, 3])
def test_the_lowest_frequencies_are_exchanged_as_in_the_paper(band):
    """Yang & Soatto 2020, eq. 3, on raw images as the paper has them: with the whole spectrum, its centre in the middle."""
    torch.manual_seed(0)
    raw = torch.rand(2, 3, 12, 10), torch.rand(1, 3, 12, 10) * 0.4 + 0.3
    source, target = ((image - MEAN[:, None, None]) / STD[:, None, None] for image in raw)
    made = images_of(FourierAdaptation(1.0, band), batch_of(source, target)).double().numpy()
    made = made * STD[:, None, None].numpy() + MEAN[:, None, None].numpy()
    own, theirs, found = (np.fft.fftshift(np.fft.fft2(image), (-2, -1)) for image in (raw[0], raw[1], made))
    inside = np.zeros((12, 10), bool)
    inside[6 - band : 7 + band, 5 - band : 6 + band] = True  # frequency 0 is at row 6, column 5
    wanted = np.where(inside, np.abs(theirs), np.abs(own)) * np.exp(1j * np.angle(own))
    assert np.allclose(found, wanted, atol=1e-3)
    assert np.allclose(made, np.fft.ifft2(np.fft.ifftshift(wanted, (-2, -1))).real, atol=1e-5)


def test_band_0_exchanges_the_mean_alone():
    batch = drawn_batch()
    source, target = batch["source"]["image"], batch["target"]["image"]
    wanted = source - source.mean((2, 3), keepdim=True) + target.mean((2, 3), keepdim=True)
    assert torch.allclose(images_of(FourierAdaptation(1.0, 0), batch), wanted, atol=1e-5)


def test_a_target_image_of_another_size_counts_as_resized():
    """A sum of waves that fit into the image is the same picture at any size."""

    def waves(side: int) -> Tensor:
        place = torch.arange(side) / side * 2 * math.pi
        return (1 + place.sin()[:, None] + 0.5 * (place[:, None] + place).cos())[None, None]

    source = torch.randn(1, 1, 12, 12)
    made = [images_of(FourierAdaptation(1.0, 2), batch_of(source, waves(side))) for side in (12, 20)]
    assert torch.allclose(*made, atol=1e-5)


def test_a_band_wider_than_the_image_takes_what_there_is():
    batch = drawn_batch()
    assert torch.isfinite(images_of(FourierAdaptation(1.0, 1000), batch)).all()


# ---- in runs


@pytest.mark.parametrize("name", APPEARANCES)
def test_nothing_is_forwarded_or_logged_for_them(name):
    method = WithCompanions(SourceOnly(), [of_kind(name)])
    assert method.uses_target == (name != "style")
    passes = []
    network = nn.Sequential(nn.Conv2d(3, 2, 1))
    network.register_forward_pre_hook(lambda _, inputs: passes.append(inputs[0]))
    module = AdaptationModule(network, method, [], torch.optim.SGD)
    batch = method.prepare(drawn_batch())
    outputs = module.step_outputs(batch)
    assert len(passes) == 1
    assert torch.equal(passes[0], batch["source"]["image"])
    share = method.loss(outputs, Progress(0, 1, 0, 10))
    assert (share.differentiated, share.added, dict(share.metrics)) == (None, None, {})


def test_a_run_says_which_changes_it_had(squares, pretrained_place):
    config = load_config(None, small_settings(
        squares, domain_adaptation__companions="[style, {name: fda, band: 2}]", trainer__max_epochs=1,
    ))  # fmt: skip
    result = adapt(config)
    run = mlflow.MlflowClient(result.tracking_uri).get_run(result.run_id)
    assert run.info.run_name == "DANN + style + fda target seed 0"
    assert run.data.tags["dann.companions"] == "style, fda"
    assert not any(name.startswith("da_part/") for name in run.data.metrics)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("companions", "more"),
    [
        ("[style]", {}),
        ("[{name: moments, space: lab}, histogram, fda, style, self_training]", {"data__normalization": "domain"}),
    ],
    ids=["style", "all"],
)
def test_a_killed_run_goes_on_with_the_same_changes(companions, more, workplace, squares):
    more = more | {"domain_adaptation__companions": companions}
    uninterrupted = adapt(settings(squares, workplace / "whole", **more), [Noise()])
    config = settings(squares, workplace / "killed", **more, trainer__checkpoint_every_n_steps=1)
    killed("adapt", config, Noise(), Killed("on_train_batch_start", 3))
    assert_same(adapt(config, [Noise()], resume="auto"), uninterrupted)


@pytest.mark.parametrize(
    ("companions", "told"),
    [
        (
            "[{name: style, weight: 1}]",
            r"companions\[0\]\.weight is 1\.0, but style changes the source images and has no loss",
        ),
        (
            "[{name: fda, ramp: 0.5}]",
            r"companions\[0\]\.ramp is 0\.5, but fda changes the source images and has no loss",
        ),
        (
            "[{name: entropy, probability: 0.5}]",
            r"companions\[0\]\.probability is 0\.5, but entropy has no probability",
        ),
        ("[{name: moments, band: 1}]", r"companions\[0\]\.band is 1, but moments has no band"),
        ("[{name: fda, space: lab}]", r"companions\[0\]\.space is lab, but fda has no space"),
        ("[{name: fda, band: -1}]", r"companions\[0\]\.band is -1"),
        ("[{name: style, probability: 2}]", r"companions\[0\]\.probability is 2"),
        ("[stile]", r"companions\[0\]\.name is 'stile'; .*; did you mean 'style'\?"),
    ],
)
def test_wrong_options_are_told(companions, told):
    with pytest.raises(InputError, match=told):
        load_config(None, {"domain_adaptation.companions": companions})


def test_the_settings_know_every_kind():
    assert set(COMPANIONS) >= set(APPEARANCES)
    assert {name for name, kind in COMPANIONS.items() if not hasattr(kind, "loss")} == set(APPEARANCES)
