"""Decoded images that stay on disk: decoded once per machine, the same to the byte, bounded, and never those of other files."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_settings, write_raster
from test_shared_data import counted, lacking, read_sets, same

from dann_experiments.config import Config, InputError, load_config
from dann_experiments.data import lasting_cache, remembered
from dann_experiments.data.image_sets import ImageSets
from dann_experiments.data.lasting_cache import FOLDER
from dann_experiments.data.memory import Arrays
from dann_experiments.jobs.identity import run_digest
from dann_experiments.jobs.shared_data import shared_data
from dann_experiments.names import SOURCE_TRAIN, Job

IMAGES = 10 + 4 + 13 + 5 + 3  # of `squares`


@pytest.fixture
def cache(remembering: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of decoded sets, in which small ones are kept, too."""
    monkeypatch.setattr(lasting_cache, "LARGE", 0)
    return remembering / FOLDER


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The image files that are decoded from now on."""
    return counted(monkeypatch)


@pytest.fixture
def root(squares: Path, tmp_path: Path) -> Path:
    """A copy of `squares` that a test may change."""
    return Path(shutil.copytree(squares, tmp_path / "data"))


def settings(root: Path, **more: Any) -> Config:
    return load_config(None, small_settings(root, **more))


def alone(config: Config) -> ImageSets:
    """The sets as a job reads them that keeps nothing on disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lasting_cache, "LARGE", 10**12)
        return read_sets(config)


def plain(arrays: Arrays) -> list[Any]:
    """The bytes of an item, with types and shapes."""
    return [None if one is None else (one.dtype, one.shape, one.tobytes()) for one in arrays]


def epoch(sets: ImageSets) -> None:
    for one in sets.sets.values():
        for index in range(len(one)):
            one[(index, 3)]


def test_a_second_job_decodes_nothing_and_every_item_is_the_same(root, cache, reads):
    config = settings(root, data__memory_gb=0)
    direct = alone(config)
    reads.clear()
    first = read_sets(config)
    assert len(reads) == IMAGES
    epoch(first)
    second = read_sets(config)
    epoch(second)
    assert len(reads) == IMAGES
    for mine in (first, second):
        for name, one in direct.sets.items():
            for index in range(len(one)):
                assert plain(mine.sets[name].read(index)) == plain(one.decode(index))
    assert first.digests == second.digests == direct.digests


def test_a_set_on_disk_takes_no_memory(root, cache):
    sets = read_sets(settings(root, data__memory_gb=1.0)).sets.values()
    epoch(read_sets(settings(root)))
    assert all(one.memory.bytes_left == 1e9 and not one._kept for one in sets)


@pytest.mark.parametrize("windows", ["grid", "random"])
def test_windows_without_data_and_counts_of_classes_are_those_of_direct_reading(tmp_path, cache, windows, reads):
    root = lacking(tmp_path / "data")
    more = {"data__window_size": 32, "data__windows": windows, "data__target__test": [], "data__crop_size": 16}
    more |= {f"data__{domain}__scale": [0, 1000] for domain in ("source", "target")}
    config = settings(root, **more)
    direct = alone(config)
    read_sets(config)
    before = len(reads)
    found = read_sets(config)
    assert same(direct, found)
    for mine, its in zip(found.sets.values(), direct.sets.values(), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(mine.count_classes(), its.count_classes(), strict=True))
    assert len(reads) == before
    read_sets(settings(root, **more, seed=5))
    assert (len(reads) > before) == (windows == "random")  # the seed decides where random windows lie


def test_a_file_that_changed_in_place_is_decoded_again_and_the_old_set_goes(root, cache, reads):
    config, file = settings(root), root / "source" / "masks" / "3.png"
    read_sets(config)
    known, before = file.stat(), {path.name for path in cache.glob("*.bin")}
    other = bytearray(file.read_bytes())
    file.write_bytes((root / "source" / "masks" / "4.png").read_bytes()[: len(other)].ljust(len(other), b"\0"))
    os.utime(file, ns=(known.st_atime_ns, known.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (known.st_size, known.st_mtime_ns)
    reads.clear()
    assert same(read_sets(config), alone(config))
    assert len(reads) == 10 + IMAGES
    after = {path.name for path in cache.glob("*.bin")}
    assert (len(before - after), len(after)) == (1, len(before))


def test_a_file_in_doubt_is_not_kept(root, cache, monkeypatch):
    monkeypatch.setattr(remembered, "DOUBT_NS", 3600 * 10**9)
    assert same(read_sets(settings(root)), alone(settings(root)))
    assert not cache.exists()


@pytest.mark.parametrize("why", ["bound", "disk", "folder", "off", "fills up"])
def test_where_there_is_no_room_images_are_read_as_before(root, cache, remembering, reads, monkeypatch, why):
    config = settings(root, data__disk_cache_gb={"bound": 1e-6, "off": 0}.get(why, 1))
    if why == "folder":
        remembering.parent.mkdir(parents=True)
        remembering.write_text("a file")
    free = iter([10**12] * 3)
    if why in ("disk", "fills up"):
        usage = lambda _: SimpleNamespace(free=next(free, 0) if why == "fills up" else 0)  # noqa: E731
        monkeypatch.setattr(lasting_cache.shutil, "disk_usage", usage)
    assert same(read_sets(config), alone(config))
    assert not list(cache.glob("*.*[!k]")) if cache.is_dir() else True  # but locks
    before = len(reads)
    read_sets(config)
    assert len(reads) == before + IMAGES


def test_the_set_used_longest_ago_makes_room(tmp_path, cache):
    roots = []
    for number in range(3):
        for name in ("source", "source_val", "target", "target_val", "target_test"):
            for index in range(3):
                values = np.full((3, 64, 64), 10 * number + index + (name == "source"), np.uint8)
                values[0, :9] = len(name)
                write_raster(tmp_path / f"{number}" / name / "images" / f"{index}.tif", values)
                if name != "target":
                    write_raster(
                        tmp_path / f"{number}" / name / "masks" / f"{index}.tif", np.eye(64, dtype=np.uint8)[None]
                    )
        roots.append(tmp_path / f"{number}")
    one = 15 * 4 * 64 * 64

    def kept() -> set[str]:
        return {path.stem for path in cache.glob("*.bin")}

    def read(number: int) -> None:
        read_sets(settings(roots[number], data__disk_cache_gb=2.2 * one / 1e9))
        time.sleep(0.02)

    read(0)
    first = kept()
    read(1)
    second = kept() - first
    read(0)  # used again
    read(2)
    assert first <= kept()
    assert len(second & kept()) <= 1
    assert sum(path.stat().st_size for path in cache.iterdir()) < 2.4 * one


def test_sets_of_one_job_do_not_drive_each_other_out(root, cache, reads):
    config = settings(root, data__disk_cache_gb=1.2e-4, data__memory_gb=0)  # room for some of the sets
    read_sets(config)
    kept = {path.name for path in cache.glob("*.bin")}
    reads.clear()
    epoch(read_sets(config))
    assert 0 < len(reads) < IMAGES
    assert {path.name for path in cache.glob("*.bin")} == kept


@pytest.mark.parametrize("damage", ["flipped", "cut", "index", "gone"])
def test_a_damaged_set_is_ignored_and_written_again(root, cache, damage, reads):
    config = settings(root)
    read_sets(config)
    for file in cache.glob("*.json" if damage == "index" else "*.bin"):
        if damage == "flipped":
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        elif damage == "gone":
            file.unlink()
        else:
            os.truncate(file, file.stat().st_size // 2)
    assert same(read_sets(config), alone(config))
    read_sets(config)
    reads.clear()
    assert same(read_sets(config), read_sets(config))
    assert not reads


def test_jobs_that_start_together_decode_each_image_once(root, cache):
    config = settings(root)
    context = multiprocessing.get_context("fork")
    answers, barrier = context.Queue(), context.Barrier(3)

    def read() -> None:
        with pytest.MonkeyPatch.context() as patch:
            found = counted(patch)
            barrier.wait(60)
            epoch(read_sets(config))
            answers.put(len(found))

    processes = [context.Process(target=read) for _ in range(3)]
    for process in processes:
        process.start()
    assert sum(answers.get(timeout=120) for _ in processes) == IMAGES
    for process in processes:
        process.join()


def test_what_a_killed_process_was_writing_is_removed(root, cache, monkeypatch):
    config = settings(root)
    context = multiprocessing.get_context("fork")

    def killed() -> None:
        write = lasting_cache.write_array

        def some(file: Any, array: Any) -> Any:
            found = write(file, array)
            file.flush()
            os._exit(9)
            return found

        monkeypatch.setattr(lasting_cache, "write_array", some)
        read_sets(config)

    process = context.Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == 9
    assert list(cache.glob("*.part*"))
    assert same(read_sets(config), alone(config))
    assert not list(cache.glob("*.part*"))


def test_a_bad_file_is_reported_before_anything_is_kept(root, cache):
    (root / "source" / "masks" / "3.png").write_bytes((root / "source" / "images" / "3.png").read_bytes())
    with pytest.raises(InputError, match=r"3\.png"):
        read_sets(settings(root))
    assert not list(cache.glob("*.bin*"))


def test_a_set_goes_to_processes_that_load_without_its_pixels(root, cache):
    one = read_sets(settings(root)).sets[SOURCE_TRAIN]
    sent = pickle.dumps(one)
    assert len(sent) < 60_000
    there = pickle.loads(sent)
    assert torch.equal(there[(2, 5)]["image"], one[(2, 5)]["image"])
    for path in cache.iterdir():
        path.unlink()
    assert torch.equal(pickle.loads(sent)[(2, 5)]["image"], one[(2, 5)]["image"])  # from the files


def test_workers_of_a_sweep_map_the_same_set(root, cache, tmp_path, reads):
    config = settings(root, data__memory_gb=0)
    with shared_data(tmp_path / "outputs") as folder:
        for _ in range(2):
            epoch(read_sets(config))
        assert folder is not None
        assert not list(folder.glob("*.bin"))
    assert len(reads) == IMAGES


def test_the_limit_of_the_disk_is_no_part_of_a_run_s_digest(squares):
    one, other = (run_digest(Job.ADAPT, settings(squares, data__disk_cache_gb=size), {}, "x") for size in (0, 5))
    assert one == other
