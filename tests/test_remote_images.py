"""Images on web servers and in buckets: real servers on this machine, one of which breaks off."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_raster
from PIL import Image
from rasterio.transform import from_origin

from dann_experiments import InputError
from dann_experiments.config.paths import remote_address
from dann_experiments.data import remote
from dann_experiments.data.pixels import read_pixels
from dann_experiments.data.rasters import Window, read_header
from dann_experiments.data.reading import Reading
from dann_experiments.data.samples import file_digest, find_samples
from dann_experiments.data.virtual import addresses, cache_folder, shown
from dann_experiments.prediction.find_images import find_work
from dann_experiments.prediction.stac import times_of

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
PLACE: dict[str, Any] = {"crs": "EPSG:32633", "transform": from_origin(500_000, 5_400_000, 10, 10)}
SECRET = "wJalrXUtnFEMI"
READING = Reading(scale=(0.0, 1.0))


@pytest.fixture(autouse=True)
def _own_cache(empty_place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(empty_place / "cache"))
    monkeypatch.setattr(remote, "DELAY", 0.01)
    remote._view.cache_clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("web")


@pytest.fixture(scope="module")
def web(folder: Path) -> Iterator[str]:
    """Address of a web server of the files in `folder`; see remote_server.py."""
    command = [sys.executable, str(Path(__file__).with_name("remote_server.py")), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        server.kill()


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """Address of moto's server of S3."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        for line in server.stderr:
            if "Running on" in line:
                break
        threading.Thread(target=server.stderr.read, daemon=True).start()  # else its log of requests fills the pipe
        urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/").close()
        yield f"http://127.0.0.1:{port}"
        server.kill()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client and an empty bucket `scenes`; the environment as a user sets it."""
    import boto3

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3_server,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="scenes")
    yield client
    for item in client.list_objects_v2(Bucket="scenes").get("Contents", ()):
        client.delete_object(Bucket="scenes", Key=item["Key"])
    client.delete_bucket(Bucket="scenes")


def picture(seed: int = 0, bands: int = 3, side: int = 300) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 5000, (bands, side, side)).astype(np.uint16)


def put(client: Any, name: str, values: np.ndarray) -> None:
    path = write_raster(Path("to_upload.tif"), values, **PLACE)
    client.upload_file(str(path), "scenes", name)


# Web servers


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ok", "etag", "busy", "no-head"])
def test_a_remote_image_is_read_as_the_file_is(web, folder, way):
    local = write_raster(
        folder / f"a {way}.tif", picture(), **PLACE, nodata=7, tiled=True, blockxsize=64, blockysize=64
    )
    address = f"{web}/{way}/{local.name.replace(' ', '%20') if way == 'ok' else local.name}"
    if way != "ok":
        local = local.rename(folder / f"{way}.tif")
        address = f"{web}/{way}/{way}.tif"
    else:
        local = local.rename(folder / "a.tif")
        address = f"/vsicurl/{web}/ok/a.tif"
    (sample,) = find_samples([address], Path.cwd(), "data.target.train")
    window = Window(100, 50, 150, 200)
    assert read_header(sample.image) == read_header(local)
    wanted, found = (read_pixels(path, 3, READING, window) for path in (local, sample.image))
    assert np.array_equal(found.values, wanted.values)
    assert np.array_equal(found.valid, wanted.valid)  # pyright: ignore[reportArgumentType]
    assert sample.image.stem == local.stem


@pytest.mark.parametrize("way", ["ok", "etag"])
def test_a_file_that_has_changed_has_another_digest(web, folder, way):
    path, address = folder / f"changing_{way}.tif", f"{web}/{way}/changing_{way}.tif"
    digests = []
    for seed in (0, 0, 1):
        write_raster(path, picture(seed), **PLACE)
        os.utime(path, (1000 + seed, 1000 + seed))
        digests.append(file_digest(remote.view(address, "x")))
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("compress", [None, "deflate"])
def test_a_server_that_breaks_off_is_an_error_not_gray_pixels(web, folder, compress):
    name = f"cut_{compress}.tif"
    write_raster(folder / name, picture(), **PLACE, compress=compress)
    path = remote.view(f"{web}/cut/{name}", "x")
    with pytest.raises(InputError, match=r"cut_.*cannot be read as an image"):
        read_pixels(path, 3, READING)


def test_a_server_that_is_away_or_lacks_the_file_is_named(web):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        away = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(
            InputError, match=rf"input names http://{away}/a\.tif: {away} does not answer .*tried 3 times"
        ):
            remote.view(f"http://{away}/a.tif", "input")
    with pytest.raises(InputError, match=r"ok/none\.tif: 127\.0\.0\.1:\d+ answers HTTP 404"):
        remote.view(f"{web}/ok/none.tif", "input")


def test_files_that_cannot_be_read_in_parts_are_refused(web, folder):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "a.png")
    with pytest.raises(InputError, match=r"a PNG file, which can only be read as a whole .*download it"):
        remote.view(f"{web}/ok/a.png", "x")
    write_raster(folder / "whole.tif", picture(), **PLACE)
    with pytest.raises(InputError, match=r"whole\.tif.*[Rr]ange"):
        read_pixels(remote.view(f"{web}/whole/whole.tif", "x"), 3, READING)
    for name in ("*.tif", ""):
        with pytest.raises(InputError, match="a web server lists no files"):
            remote.images(f"{web}/ok/{name}", "x")


def test_credentials_come_from_the_environment_alone_and_are_kept_nowhere(web, folder, monkeypatch):
    write_raster(folder / "p.tif", picture(), **PLACE)
    with pytest.raises(InputError, match=r"answers HTTP 401; credentials come from the environment"):
        remote.view(f"{web}/private/p.tif", "x")
    monkeypatch.setenv("GDAL_HTTP_USERPWD", "me:1234")
    path = remote.view(f"{web}/private/p.tif", "x")
    assert np.array_equal(read_pixels(path, 3, READING).values, picture())
    assert not any("1234" in file.read_text() for file in cache_folder().rglob("*.vrt"))


@pytest.mark.parametrize(
    "address",
    [
        "https://me:hunter2@host.org/a.tif",
        "https://host.org/a.tif?X-Amz-Credential=hunter2&X-Amz-Signature=hunter2",
        "https://host.org/a.tif?sv=2020&sig=hunter2",
        "https://host.org/a.tif?access_token=hunter2",
        "s3://KEY:hunter2@bucket/a.tif",
        "/vsicurl/https://me:hunter2@host.org/a.tif",
        "/vsis3/bucket/a.tif?token=hunter2",
    ],
)
def test_an_address_with_a_secret_is_refused_without_showing_it(address, workplace):
    for ask in (
        lambda: find_samples([address], Path.cwd(), "data.target.train"),
        lambda: find_samples([{"images": [address, "*.tif"]}], Path.cwd(), "data.target.train"),
        lambda: find_work([address], "out/", [], False),
    ):
        with pytest.raises(InputError, match="in the address, which would be kept with the run") as error:
            ask()
        assert "hunter2" not in str(error.value)


def test_addresses_and_paths_are_told_apart():
    assert remote_address("/vsicurl/https://host/a b.tif?v=2", "x") == "https://host/a b.tif?v=2"
    assert remote_address("HTTPS://host/a.tif", "x") == "https://host/a.tif"
    assert remote_address("/vsis3/bucket/a?.tif", "x") == "s3://bucket/a?.tif"
    for path in ("a.tif", "/data/a.tif", "s3/a.tif", "gs://bucket/a.tif", "/vsizip/a.zip/a.tif", "C:/a.tif"):
        assert remote_address(path, "x") is None


# Buckets


def test_a_pattern_in_a_bucket_is_listed_and_paired_with_masks_here(bucket):
    for number in range(2):
        put(bucket, f"2020/tile_{number}_RGB.tif", picture(number))
        write_raster(Path(f"masks/{number}.tif"), np.ones((1, 300, 300), np.uint8), **PLACE)
    put(bucket, "2020/deep/tile_9_RGB.tif", picture(9))
    entry = {"images": "s3://scenes/2020/tile_*_RGB.tif", "masks": "masks/*.tif"}
    samples = find_samples([entry], Path.cwd(), "data.source.train", "required")
    assert [(one.image.name, one.mask and one.mask.name) for one in samples] == [
        ("tile_0_RGB.vrt", "0.tif"), ("tile_1_RGB.vrt", "1.tif"),
    ]  # fmt: skip
    for number, one in enumerate(samples):
        assert np.array_equal(read_pixels(one.image, 3, READING).values, picture(number))
    assert not any(SECRET in file.read_text() for file in cache_folder().rglob("*.vrt"))


def test_a_folder_of_a_bucket_and_stacks_of_its_files(bucket):
    for name in ("x", "y"):
        for number, kind in enumerate(("B2", "B3")):
            put(bucket, f"{kind}/{name}.tif", picture(number, bands=1))
    (first, second) = find_samples(["s3://scenes/B2/"], Path.cwd(), "data.target.train")
    assert (first.image.stem, second.image.stem) == ("x", "y")
    for images in (["s3://scenes/B2/", "s3://scenes/B3/"], ["s3://scenes/B2/*.tif", "/vsis3/scenes/B3/*.tif"]):
        samples = find_samples([{"images": images}], Path.cwd(), "data.target.train")
        assert [one.image.stem for one in samples] == ["x", "y"]
        wanted = np.concatenate([picture(0, 1), picture(1, 1)])
        assert np.array_equal(read_pixels(samples[1].image, 2, READING).values, wanted)
    before = file_digest(samples[0].image)
    put(bucket, "B3/x.tif", picture(5, bands=1))
    (changed, _) = find_samples([{"images": images}], Path.cwd(), "data.target.train")
    assert file_digest(changed.image) != before


def test_lists_and_manifests_here_may_name_images_there(bucket):
    put(bucket, "a.tif", picture())
    write_raster(Path("m.tif"), np.ones((1, 300, 300), np.uint8), **PLACE)
    Path("l.txt").write_text("s3://scenes/a.tif m.tif\ns3://scenes/a.tif,m.tif\n")
    Path("t.csv").write_text("image,mask\ns3://scenes/a.tif,m.tif\n")
    for name in ("l.txt", "t.csv"):
        for sample in find_samples([name], Path.cwd(), "data.source.train", "required"):
            assert (sample.image.name, sample.mask) == ("a.vrt", Path.cwd() / "m.tif")
    Path("t.csv").write_text("image,mask\ns3://scenes/a.tif,s3://scenes/m.tif\n")
    with pytest.raises(InputError, match=r"t\.csv, line 2 is 's3://scenes/m\.tif', which is an address"):
        find_samples(["t.csv"], Path.cwd(), "data.source.train")


def test_maps_of_remote_images_are_named_by_them(bucket):
    for name in ("north/a", "south/a"):
        put(bucket, f"{name}.tif", picture())
    ((_, output),) = find_work(["s3://scenes/north/a.tif"], "map.tif", [], False)
    assert output == Path("map.tif")
    work = find_work(["s3://scenes/*/a.tif"], "maps/", [], False)
    assert [str(output) for _, output in work] == ["maps/north/a.tif", "maps/south/a.tif"]


def test_what_a_bucket_lacks_is_said(bucket, monkeypatch):
    for where, message in (
        ("s3://scenes/none.tif", "there is no such file"),
        ("s3://scenes/none/*.tif", "where there is no image"),
        ("s3://no-bucket/*.tif", "there is no such bucket"),
    ):
        with pytest.raises(InputError, match=message):
            remote.images(where, "x")
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(InputError, match=r"pip install --editable \S*\[s3\]"):
        remote.images("s3://scenes/a.tif", "x")
    monkeypatch.undo()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    with pytest.raises(InputError, match=r"http://127\.0\.0\.1:9 does not answer .*tried 3 times") as error:
        remote.images("s3://scenes/a.tif", "x")
    assert SECRET not in str(error.value)


def test_remote_images_and_stacks_are_shown_by_their_addresses(bucket, tmp_path):
    put(bucket, "x/a.tif", picture(1, 1))
    put(bucket, "x/b.tif", picture(2, 1))
    [one] = find_samples(["s3://scenes/x/a.tif"], tmp_path, "data.target.train")
    assert addresses(one.image) == ["s3://scenes/x/a.tif"]
    assert shown(one.image) == "s3://scenes/x/a.tif"
    entry = {"images": [["s3://scenes/x/a.tif", "s3://scenes/x/b.tif"]]}
    [both] = find_samples([entry], tmp_path, "data.target.train")
    assert addresses(both.image) == ["s3://scenes/x/a.tif", "s3://scenes/x/b.tif"]
    assert shown(both.image) == "s3://scenes/x/a.tif and 1 more"
    with pytest.raises(InputError, match="does not say when it was taken"):
        times_of(one.image, None)
