"""A second job reads nothing of files that have not changed, and never takes one that has for one that has not."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rasterio.io
from conftest import small_settings, write_raster

from dann_experiments.config import Config, load_config
from dann_experiments.data import digests, headers, remembered
from dann_experiments.data.remembered import FILE, Facts, States, key_of, key_of_samples
from dann_experiments.data.samples import Sample, file_digest
from dann_experiments.jobs.build import find_data
from dann_experiments.names import OneDomain

TARGET = OneDomain("target")


@pytest.fixture
def root(squares: Path, tmp_path: Path) -> Path:
    """A copy of `squares` that a test may change."""
    return Path(shutil.copytree(squares, tmp_path / "data"))


class Work:
    """What jobs do with files from now on."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.hashed: list[Path] = []
        self.headers: list[Path] = []
        self.opened: list[str] = []
        hash_, header, reader = digests.file_digest, headers.checked_header, rasterio.io.DatasetReader
        patch.setattr(digests, "file_digest", lambda path, *more: self.hashed.append(path) or hash_(path, *more))
        patch.setattr(
            headers, "checked_header", lambda one, *more: self.headers.append(one.image) or header(one, *more)
        )
        patch.setattr(rasterio.io, "DatasetReader", lambda path: self.opened.append(path) or reader(path))

    def forget(self) -> None:
        for found in (self.hashed, self.headers, self.opened):
            found.clear()


@pytest.fixture
def work(remembering: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    return Work(monkeypatch)


def measured(root: Path) -> Config:
    """Settings whose job hashes every file, reads every header, and measures the bands of both domains."""
    return load_config(None, small_settings(root, data__normalization="domain"))


def start(config: Config) -> tuple[dict[str, str], Any, Any]:
    data = find_data(config)
    found = {name: one.headers for name, one in data._sets.items()}
    return data.digests, found, [data.normalization(one) for one in config.data.domains]


def test_a_second_start_hashes_nothing_opens_nothing_and_finds_the_same(root, work):
    first = start(measured(root))
    assert len(work.hashed) == len({*work.hashed}) > 50
    work.forget()
    assert start(measured(root)) == first
    assert (work.hashed, work.headers, work.opened) == ([], [], [])


def test_of_many_files_the_one_that_changed_is_read_again(root, work):
    first = start(measured(root))
    changed = root / "source" / "images" / "3.png"
    shutil.copy(root / "source" / "images" / "4.png", changed)
    work.forget()
    second = start(measured(root))
    assert (work.hashed, work.headers) == ([changed], [changed])
    assert {name for name in first[0] if first[0][name] != second[0][name]} == {"source_train"}
    assert (first[2][0] != second[2][0], first[2][1] == second[2][1]) == (True, True)


def replaced(path: Path, content: bytes) -> None:
    """Another file of the same name."""
    path.with_suffix(".new").write_bytes(content)
    os.replace(path.with_suffix(".new"), path)


@pytest.mark.parametrize("write", [Path.write_bytes, replaced])
def test_a_file_of_the_same_size_and_time_is_hashed_again(tmp_path, work, write):
    file = tmp_path / "a.bin"
    file.write_bytes(b"before")
    known, found = file.stat(), []
    for content in (b"before", b"after!"):
        if content != file.read_bytes():
            write(file, content)
            os.utime(file, ns=(known.st_atime_ns, known.st_mtime_ns))
        facts = Facts(remembered.place())
        found.append(digests.Digests(facts, States()).of(file))
        facts.flush()
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (known.st_size, known.st_mtime_ns)
    assert found[1] == file_digest(file) != found[0]
    assert work.hashed == [file, file]


@pytest.mark.parametrize(("age_seconds", "kept"), [(0.0, False), (1.9, False), (2.1, True)])
def test_a_file_that_changed_just_before_it_was_hashed_is_in_doubt(tmp_path, work, monkeypatch, age_seconds, kept):
    """A second change within the same tick of the file system's clock would leave the same times."""
    monkeypatch.setattr(remembered, "DOUBT_NS", 2 * 10**9)
    file = tmp_path / "a.bin"
    file.write_bytes(b"before")
    changed = file.stat().st_ctime_ns
    monkeypatch.setattr(remembered.time, "time_ns", lambda: changed + int(age_seconds * 1e9))
    for _ in range(2):
        facts = Facts(remembered.place())
        digests.Digests(facts, States()).of(file)
        facts.flush()
    assert len(work.hashed) == (1 if kept else 2)


def test_a_file_that_changes_while_it_is_hashed_is_in_doubt(tmp_path, remembering, monkeypatch):
    file = tmp_path / "a.bin"
    file.write_bytes(b"before")

    def slowly(path: Path, *_: Any) -> bytes:
        found = file_digest(path)
        path.write_bytes(b"after!")
        return found

    monkeypatch.setattr(digests, "file_digest", slowly)
    facts = Facts(remembered.place())
    digests.Digests(facts, States()).of(file)
    facts.flush()
    assert not (remembering / FILE).exists()


@pytest.mark.parametrize("beside", ["0.tfw", "0.tif.aux.xml", "0.wld"])
def test_a_file_beside_an_image_counts_as_part_of_it(tmp_path, work, beside):
    for name in ("0", "0.b", "1"):
        write_raster(tmp_path / f"{name}.tif", np.ones((3, 8, 8), np.uint8))
    of_image = Sample(tmp_path / "0.tif", None), Sample(tmp_path / "1.tif", None)
    before = [key_of("x", States().of_samples([one]) or ()) for one in of_image]
    (tmp_path / beside).write_text("0.1\n0\n0\n-0.1\n0\n0\n")
    after = [key_of("x", States().of_samples([one]) or ()) for one in of_image]
    assert (before[0] != after[0], before[1] == after[1]) == (True, True)
    (tmp_path / beside).write_text("0.2\n0\n0\n-0.2\n0\n0\n")
    assert key_of("x", States().of_samples([of_image[0]]) or ()) != after[0]


def test_what_a_virtual_raster_shows_counts_and_one_that_names_an_address_is_never_remembered(tmp_path, work):
    write_raster(tmp_path / "0.tif", np.ones((3, 8, 8), np.uint8))
    text = (
        '<VRTDataset rasterXSize="8" rasterYSize="8"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>{}</SimpleSource>'
        "</VRTRasterBand></VRTDataset>"
    )
    (tmp_path / "a.vrt").write_text(text.format('<SourceFilename relativeToVRT="1">0.tif</SourceFilename>'))
    (tmp_path / "b.vrt").write_text(text.format("<SourceFilename>/vsicurl/https://example.org/0.tif</SourceFilename>"))
    local, remote = (Sample(tmp_path / f"{name}.vrt", None) for name in "ab")
    assert States().of_samples([remote]) is None
    for value in (1, 2):
        facts = Facts(remembered.place())
        write_raster(tmp_path / "0.tif", np.full((3, 8, 8), value, np.uint8))
        assert digests.Digests(facts, States()).of(local.image) == file_digest(local.image)
        facts.flush()
    assert work.hashed.count(tmp_path / "0.tif") == 2


def test_a_mask_beside_its_image_is_not_taken_for_a_side_file(tmp_path, work):
    image, mask = (write_raster(tmp_path / f"0.{kind}", np.ones((3, 8, 8), np.uint8)) for kind in ("tif", "vrt.tif"))
    alone, labelled = Sample(image, None), Sample(image, mask)
    states = [States().of_samples([one]) or [] for one in (alone, labelled)]
    assert {*states[0]} == {*states[1]}
    assert key_of_samples("x", states[0], [alone], {}) != key_of_samples("x", states[0], [labelled], {})


def test_remarks_on_headers_are_repeated(root, work, caplog):
    for file in (root / "source" / "images").iterdir():
        with rasterio.open(file) as image:
            values = image.read()
        write_raster(file.with_suffix(".tif"), values)
        file.unlink()
    path = root / "source" / "images" / "0.tif"
    with rasterio.open(path, "r+") as image:
        image.update_tags(TIFFTAG_IMAGEDESCRIPTION="ImageJ=1.53\nimages=4\n")
    said = []
    for _ in range(2):
        caplog.clear()
        start(measured(root))
        said.append([record.message for record in caplog.records if "pages" in record.message])
    assert said[0] == said[1] != []


def test_other_rules_are_other_facts(root, work):
    start(measured(root))
    work.forget()
    start(load_config(None, small_settings(root, data__normalization="domain", data__target__scale=[0, 100])))
    assert work.hashed == []
    assert {path.parent.parent.name for path in work.headers} == {"target", "target_val", "target_test"}


def test_another_version_of_the_program_reads_headers_again(root, work, monkeypatch):
    start(measured(root))
    work.forget()
    monkeypatch.setattr(remembered, "code", lambda: "another")
    start(measured(root))
    assert work.hashed == []
    assert work.headers


@pytest.mark.parametrize("damage", ["text", "empty", "half", "row", "table"])
def test_a_damaged_memory_is_ignored_and_written_again(root, work, remembering, damage):
    first, file = start(measured(root)), remembering / FILE
    if damage in ("text", "empty"):
        file.write_bytes(b"no database, for sure" * 100 if damage == "text" else b"")
    elif damage == "half":
        os.truncate(file, file.stat().st_size // 2 // 4096 * 4096)
    else:
        with closing(sqlite3.connect(file)) as connection, connection:
            if damage == "table":
                connection.execute("DROP TABLE facts")
            for key, value in (
                () if damage == "table" else connection.execute("SELECT key, value FROM facts").fetchall()
            ):
                other = value[:-9] + bytes([value[-9] ^ 1]) + value[-8:]
                connection.execute("UPDATE facts SET value = ? WHERE key = ?", (other, key))
    work.forget()
    assert start(measured(root)) == first
    assert work.hashed
    for _ in range(2):  # a file that is half there is found out by what is read of it
        work.forget()
        assert start(measured(root)) == first
    assert (work.hashed, work.headers) == ([], [])


def test_a_home_that_cannot_be_written_to_costs_no_run(root, work, remembering, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    first = start(measured(root))
    work.forget()
    assert start(measured(root)) == first
    assert work.hashed


def test_processes_that_start_together_write_one_memory(root, work, remembering):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=start, args=(measured(root),)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    work.forget()
    start(measured(root))
    assert (work.hashed, work.headers, work.opened) == ([], [], [])


def test_a_process_killed_while_it_writes_leaves_a_memory_that_can_be_used(tmp_path, remembering):
    code = (
        "import os\nfrom dann_experiments.data.remembered import Facts, place\nfacts = Facts(place())\n"
        "for number in range(10**9):\n    facts.put(number.to_bytes(16, 'big'), number)\n"
    )
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path})
    until = time.monotonic() + 60
    while not (remembering / FILE).exists() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.2)
    process.kill()
    process.wait()
    facts = Facts(remembered.place())
    facts.put(b"k" * 16, [1.5, "text"])
    facts.flush()
    assert Facts(remembered.place()).get([b"k" * 16]) == {b"k" * 16: [1.5, "text"]}


def test_the_memory_is_bounded_and_the_least_recently_used_goes(remembering, monkeypatch):
    monkeypatch.setattr(remembered, "MOST_FACTS", 8)
    days = iter(range(100))
    monkeypatch.setattr(remembered, "_today", lambda: day)
    keys = [bytes([number]) * 16 for number in range(9)]
    for key in keys[:8]:
        day, facts = next(days), Facts(remembered.place())
        facts.put(key, 0)
        facts.flush()
    day = next(days)
    assert keys[0] in Facts(remembered.place()).get([keys[0]])  # used today
    facts = Facts(remembered.place())
    facts.put(keys[8], 0)
    facts.flush()
    assert set(Facts(remembered.place()).get(keys)) == {keys[0], *keys[4:]}


def test_check_data_trusts_no_memory(root, work, workplace):
    from dann_experiments import check_data

    start(measured(root))
    work.forget()
    check_data(measured(root))
    assert len(work.headers) == sum(1 for _ in root.glob("*/images/*"))
