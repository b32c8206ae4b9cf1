"""Tiles that are blended: the weights are a partition of unity, and the map is the one of the whole raster at once."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dann_experiments.config import InputError
from dann_experiments.data.rasters import Window
from dann_experiments.models.networks import logits_of_any_size
from dann_experiments.prediction.tiling import Axis, Plan, Tiler, grid_stride, plan_axis, plan_tiles, ramp_weights

CPU = torch.device("cpu")


@st.composite
def axes(draw: st.DrawFn) -> tuple[Axis, int, int, int, int]:
    """An axis, and the length, tile size, overlap and stride that it was made for."""
    stride = draw(st.sampled_from([1, 2, 8, 32]))
    tile = draw(st.integers(1, 200))
    overlap = draw(st.integers(0, tile // 2))
    length = draw(st.integers(1, 3000))
    return plan_axis(length, tile, overlap, stride), length, tile, overlap, stride


def weights(axis: Axis) -> np.ndarray:
    """(tiles, length): the weight of each tile at each pixel, 0 where it is not used."""
    result = np.zeros((len(axis.starts), axis.length))
    ramp = ramp_weights(axis.ramp).numpy()
    for index in range(len(axis.starts)):
        start, end = axis.used(index)
        result[index, start:end] = 1
        if index > 0:
            result[index, start : start + axis.ramp] = ramp
        if index < axis.last:
            result[index, end - axis.ramp : end] = 1 - ramp
    return result


@given(axes())
@settings(deadline=None, max_examples=300)
def test_the_weights_of_all_tiles_sum_to_one_at_every_pixel(drawn):
    axis = drawn[0]
    found = weights(axis)
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-6)
    assert found.min() >= 0
    assert (found > 0).sum(0).max() <= 2
    assert found[0, 0] == found[-1, -1] == 1


@given(axes())
@settings(deadline=None, max_examples=300)
def test_a_tile_is_used_only_a_quarter_of_the_overlap_away_from_its_own_borders(drawn):
    axis, length, tile, overlap, stride = drawn
    assert axis.starts[0] == 0
    assert length <= axis.starts[-1] + axis.tile < length + stride
    assert all(start % stride == 0 for start in axis.starts)
    for index in range(axis.last):
        assert axis.starts[index] + axis.tile - axis.starts[index + 1] >= overlap
        assert axis.used(index)[1] <= axis.starts[index] + axis.tile - overlap // 4
        assert axis.used(index + 1)[0] >= axis.starts[index + 1] + overlap // 4
    if axis.last:
        assert axis.tile % stride == 0
        assert tile <= axis.tile < tile + 2 * stride


@pytest.mark.slow
@given(axes(), axes())
@settings(deadline=None, max_examples=100)
def test_the_pieces_cover_the_raster_once(rows, columns):
    plan = Plan(rows[0], columns[0])
    covered = np.zeros((plan.rows.length, plan.columns.length), np.uint8)
    for piece in plan.pieces():
        assert piece.height >= 0
        assert piece.width >= 0
        covered[piece.top : piece.top + piece.height, piece.left : piece.left + piece.width] += 1
    assert (covered == 1).all()


def test_no_more_tiles_than_needed():
    assert plan_axis(512, 512, 128, 32).starts == (0,)
    assert plan_axis(513, 512, 128, 32).starts == (0, 32)  # reaches beyond the raster by less than the stride
    assert plan_axis(896, 512, 128, 32).starts == (0, 384)
    assert plan_axis(12_000, 512, 128, 1).starts[-1] == 12_000 - 512
    assert len(plan_axis(12_000, 512, 128, 1).starts) == -(-(12_000 - 128) // (512 - 128))


class Local(nn.Module):
    """Class scores from a few pixels around: 3 x 3 convolutions, each adding one pixel to the receptive radius."""

    def __init__(self, bands: int, classes: int, radius: int = 3) -> None:
        super().__init__()
        torch.manual_seed(1)
        layers: list[nn.Module] = []
        for number in range(radius):
            layers += [nn.Conv2d(bands if number == 0 else 8, 8, 3, padding=1), nn.Tanh()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(8, classes, 1))
        self.layers[-1].weight.data *= 10  # so that no class wins everywhere

    def forward(self, images):
        return self.layers(images)


class Strided(nn.Module):
    """The same on a grid of every fourth pixel, enlarged again: where the grid lies matters."""

    requires_divisible_input_shape = True
    encoder = SimpleNamespace(output_stride=4)

    def __init__(self, bands: int, classes: int) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.down = nn.Conv2d(bands, 8, 4, stride=4)
        self.local = Local(8, classes, radius=1)

    def forward(self, images):
        return nn.functional.interpolate(self.local(torch.tanh(3 * self.down(images))), scale_factor=4, mode="nearest")


def tiled(
    network: nn.Module, image: torch.Tensor, plan: Plan, classes: int, batch_size: int = 4,
    valid: np.ndarray | None = None, with_probabilities: bool = True,
) -> tuple[np.ndarray, np.ndarray | None]:  # fmt: skip
    """The whole map (H, W), and its probabilities (K, H, W), as the tiler gives them."""

    def read(window: Window) -> tuple[torch.Tensor, np.ndarray | None]:
        box = (slice(window.top, window.top + window.height), slice(window.left, window.left + window.width))
        return image[:, *box], None if valid is None else valid[box]

    ids = np.full(image.shape[1:], 99, np.uint8)
    probabilities = np.zeros((classes, *image.shape[1:]), np.uint8) if with_probabilities else None
    tiler = Tiler(network, plan, classes, batch_size, CPU, with_probabilities)
    for row in range(len(plan.rows.starts)):
        for piece in tiler.row(row, read):
            top, left, height, width = piece.window
            box = (slice(top, top + height), slice(left, left + width))
            ids[box] = piece.ids
            if probabilities is not None:
                assert piece.probabilities is not None
                probabilities[:, *box] = piece.probabilities
    return ids, probabilities


def untiled(network: nn.Module, image: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Map and probabilities (floating point) of the whole image in one forward."""
    network.eval()
    with torch.no_grad():
        found = logits_of_any_size(network, image[None]).softmax(1)[0]
    return found.argmax(0).numpy().astype(np.uint8), found.numpy()


@pytest.mark.parametrize(
    ("height", "width", "tile", "overlap", "batch_size", "classes"),
    [(200, 170, 64, 16, 4, 3), (64, 300, 64, 32, 3, 2), (65, 40, 64, 16, 1, 5), (31, 29, 64, 16, 4, 3), (129, 131, 40, 20, 7, 4)],
)  # fmt: skip
def test_where_the_overlap_covers_what_the_network_sees_the_blended_map_is_the_untiled_map(
    height, width, tile, overlap, batch_size, classes
):
    network = Local(3, classes)  # sees 3 pixels far; a quarter of each overlap is 4 or more
    image = torch.randn(3, height, width, generator=torch.Generator().manual_seed(0))
    ids, probabilities = tiled(network, image, plan_tiles(height, width, tile, overlap, 1), classes, batch_size)
    wanted_ids, wanted = untiled(network, image)
    assert (np.bincount(wanted_ids.ravel(), minlength=classes) > 20).all()  # there is something to get wrong
    np.testing.assert_array_equal(ids, wanted_ids)
    assert probabilities is not None
    assert np.abs(probabilities / 254 - wanted).max() <= 1 / 254


def test_tiles_of_a_strided_network_lie_on_its_own_grid():
    network = Strided(2, 3)
    image = torch.randn(2, 203, 158, generator=torch.Generator().manual_seed(0))
    plan = plan_tiles(203, 158, 64, 32, grid_stride(network))
    assert len(plan.rows.starts) > 3
    np.testing.assert_array_equal(tiled(network, image, plan, 3)[0], untiled(network, image)[0])


def test_without_an_overlap_the_borders_of_the_tiles_show():
    """The counterpart of the two tests above: they could fail."""
    network = Local(3, 3)
    image = torch.randn(3, 192, 128, generator=torch.Generator().manual_seed(0))  # whole tiles of 64
    assert (tiled(network, image, plan_tiles(192, 128, 64, 0, 1), 3)[0] != untiled(network, image)[0]).mean() > 0.005


def test_a_network_that_says_the_same_everywhere_is_blended_to_the_last_bit():
    class Constant(nn.Module):
        def forward(self, images):
            return torch.tensor([0.1, 0.1, 0.7])[None, :, None, None].expand(len(images), 3, *images.shape[-2:])

    _, probabilities = tiled(Constant(), torch.zeros(1, 150, 150), plan_tiles(150, 150, 32, 16, 1), 3)
    assert probabilities is not None
    assert len(np.unique(probabilities[0])) == len(np.unique(probabilities[2])) == 1


@pytest.mark.slow
def test_a_real_network_shows_no_seams():
    """Where tiles pass into each other the blended map differs from the untiled one as rarely as within tiles."""
    torch.manual_seed(0)
    network = smp.Unet("resnet18", encoder_weights=None, classes=3, encoder_depth=3, decoder_channels=[16, 8, 8])
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.normal(size=(1, 3, 45, 45))).float()
    image = nn.functional.interpolate(coarse, size=(640, 640), mode="bicubic")[0] + 0.3 * torch.randn(3, 640, 640)
    network.train()
    with torch.no_grad():  # BatchNorm statistics that fit the images, and classes of equal size
        for _ in range(30):
            network(image[None, :, :256, :256])
        network.eval()
        network.segmentation_head[0].bias.data -= network(image[None]).mean((0, 2, 3))
    wanted = untiled(network, image)[0]
    assert np.bincount(wanted.ravel(), minlength=3).min() > 0.1 * wanted.size
    rates = {}
    for overlap in (0, 128):
        plan = plan_tiles(640, 640, 256, overlap, grid_stride(network))
        different = tiled(network, image, plan, 3, with_probabilities=False)[0] != wanted
        near = np.zeros(640, bool)
        for index in range(plan.rows.last):
            end = plan.rows.used(index)[1]
            near[max(end - plan.rows.ramp - 8, 0) : end + 8] = True
        along = near[:, None] | near[None, :]
        rates[overlap] = (different[along].mean(), different[~along].mean())
    assert rates[0][0] > 0.03  # cut hard, the seams show
    assert rates[128][0] < 0.05 * rates[0][0]
    assert rates[128][0] < 1.5 * rates[128][1] + 0.002


def test_pixels_without_data_are_nodata_and_tiles_without_any_are_not_forwarded():
    class Counting(Local):
        seen = 0

        def forward(self, images):
            Counting.seen += len(images)
            return super().forward(images)

    network = Counting(3, 3)
    image = torch.randn(3, 128, 256, generator=torch.Generator().manual_seed(0))
    valid = np.ones((128, 256), bool)
    valid[:, 100:] = False
    valid[:5] = False
    ids, probabilities = tiled(network, image, plan_tiles(128, 256, 64, 16, 1), 3, valid=valid)
    assert probabilities is not None
    assert (ids[~valid] == 255).all()
    assert (probabilities[:, ~valid] == 255).all()
    np.testing.assert_array_equal(ids[valid], untiled(Local(3, 3), image)[0][valid])
    assert Counting.seen == 3 * 3  # of 3 x 5 tiles, the three columns that begin before pixel 100


@pytest.mark.parametrize("classes", [2, 255])
def test_two_to_255_classes(classes):
    network = Local(1, classes)
    image = 3 * torch.randn(1, 60, 70, generator=torch.Generator().manual_seed(0))
    ids, _ = tiled(network, image, plan_tiles(60, 70, 32, 16, 1), classes)
    np.testing.assert_array_equal(ids, untiled(network, image)[0])
    assert ids.max() < 255


def test_a_cpu_takes_few_pixels_at_a_time_and_no_tile_twice():
    sizes: list[torch.Size] = []
    network = Local(3, 2)
    network.register_forward_pre_hook(lambda layer, inputs: sizes.append(inputs[0].shape))
    for side, most in ((512, 1), (256, 4), (64, 5)):
        sizes.clear()
        tiled(network, torch.rand(3, side, 5 * side), plan_tiles(side, 5 * side, side, 0, 1), 2, batch_size=5)
        assert max(len(size) and size[0] for size in sizes) == most
        assert sum(size.numel() for size in sizes) == 3 * 5 * side**2


def test_going_on_from_the_carried_rows_gives_the_same():
    network = Local(3, 3)
    image = torch.randn(3, 150, 100, generator=torch.Generator().manual_seed(0))
    plan = plan_tiles(150, 100, 64, 32, 1)

    def read(window: Window):
        return image[:, window.top : window.top + window.height, window.left : window.left + window.width], None

    first, second = (Tiler(network, plan, 3, 2, CPU) for _ in range(2))
    list(first.row(0, read))
    second.carry.copy_(first.carry)
    for one, other in zip(first.row(1, read), second.row(1, read), strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)


def test_modes_are_given_back_and_a_network_of_other_classes_is_refused():
    network = Local(3, 3)
    network.train()
    network.layers[0].eval()
    image = torch.zeros(3, 40, 40)
    tiled(network, image, plan_tiles(40, 40, 32, 16, 1), 3)
    assert network.training
    assert not network.layers[0].training
    with pytest.raises(InputError, match="logits of shape"):
        tiled(network, image, plan_tiles(40, 40, 32, 16, 1), 4)
