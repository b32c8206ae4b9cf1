"""What does a large set cost: the start of a job, and epochs whose tiles do not fit into memory? Against an earlier commit.

    python benchmarks/large_set.py [--part start epochs] [--tiles 350 700 1400] [--rounds N] [--folder FOLDER] [--keep FILE]
        [--write]

Tiles of 1024 x 1024 pixels (deflate GeoTIFFs, 3 MB decoded), half source with masks, half target. *start*: real processes from
the command line, each ended at its first training step, both versions in turn; their first start fills what they keep.
*epochs*: a process of each version goes through its training loaders, an epoch at a time in turn; crops of 512, batches of
8 + 8, `data.memory_gb: 1`; the first epoch is not counted. The network is the smallest there is. 1,400 tiles take 4 GB in FOLDER
(kept if given) and 5 GB for what is kept, and some 4 minutes a part. --keep adds the measurements to a JSON file, so that the
parts can be measured one by one, and --write puts all of them into docs/performance.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from earlier import earlier_version, environment_of
from large_set_tiles import make_tiles
from pages import circumstances, put
from start import until_first_step

from dann_experiments import load_config
from dann_experiments.jobs.build import make_network

PROJECT = Path(__file__).resolve().parents[1]
PARTS = ("start", "epochs")
NORMALIZATIONS = ("fixed", "domain")
VALIDATED = [[left, 0, left + 64, 64] for left in range(0, 1024, 64)]
"""Regions of the tiles for validation: enough images to probe the warm start, of few pixels, as its forwards are not what is
measured."""
Row = dict[str, Any]


def settings(tiles: Path, place: Path, count: int, **more: Any) -> dict[str, Any]:
    """Settings of a job on `count` tiles."""
    names = [f"{number:05d}.tif" for number in range(count // 2)]
    return {
        "model.arch": "unet", "model.encoder_name": "tu-test_resnet", "model.encoder_weights": None, "model.encoder_depth": 3,
        "model.decoder_channels": [16, 8, 8], "data.class_names": ["ground", "roof"], "data.root": str(tiles),
        "data.source.train": [{"images": "source/images", "masks": "source/masks", "names": names}],
        "data.target.train": [{"images": "target/images", "names": names}],
        **{
            f"data.{domain}.val": [
                {"images": f"{domain}_val/images", "masks": f"{domain}_val/masks", "region": one} for one in VALIDATED
            ]
            for domain in ("source", "target")
        },
        "data.crop_size": 512,
        "data.source.batch_size": 8, "data.target.batch_size": 8, "data.eval_batch_size": 1,
        "domain_adaptation.method.hidden_size": 16, "domain_adaptation.pretrained_checkpoint.path": str(place / "model.pt"),
        "trainer.accelerator": "cpu", "trainer.enable_progress_bar": False, "threads": 1,
    } | {key.replace("__", "."): value for key, value in more.items()}  # fmt: skip


@contextlib.contextmanager
def two_versions(place: Path) -> Iterator[dict[str, Path]]:
    """The folders of both versions, each with a user's cache of its own."""
    with earlier_version() as folder:
        for side in ("before", "ours"):
            (place / side).mkdir()
        yield {"before": folder, "ours": PROJECT}
    for side in ("before", "ours"):
        shutil.rmtree(place / side)


def starts(tiles: Path, place: Path, count: int, rounds: int, normalization: str) -> Iterator[Row]:
    """Yield, after each round, the seconds from the command to the first step of each version, its first start apart."""
    seconds: dict[str, list[float]] = {"before": [], "ours": []}
    first: dict[str, float] = {}
    chosen = settings(tiles, place, count, data__normalization=normalization)
    torch.save(make_network(load_config(None, chosen)).state_dict(), place / "model.pt")
    _write_settings(place / "config.yaml", chosen)
    command = ["-m", "dann_experiments", "adapt", "--config", str(place / "config.yaml")]
    with two_versions(place) as versions:
        for number in range(rounds + 1):
            for side, folder in versions.items():
                taken, _ = until_first_step(command, place, folder, {"XDG_CACHE_HOME": str(place / side)})
                print(f"{count} tiles, {normalization}, start {number} of {side}: {taken:.2f} s", flush=True)
                if number:
                    seconds[side].append(taken)
                else:
                    first[side] = taken
            yield {"part": "start", "tiles": count, "normalization": normalization, "first": first, **seconds}


def epochs(tiles: Path, place: Path, count: int, rounds: int) -> Iterator[Row]:
    """Yield, after each round, images per second of both loaders together, of each version, from the second epoch."""
    rates: dict[str, list[float]] = {"before": [], "ours": []}
    _write_settings(place / "config.yaml", settings(tiles, place, count, data__memory_gb=1.0))
    with two_versions(place) as versions, contextlib.ExitStack() as stack:
        processes = {}
        for side, folder in versions.items():
            environ = {**environment_of(folder, threads=1), "XDG_CACHE_HOME": str(place / side)}
            code = Path(__file__).with_name("large_set_epochs.py")
            processes[side] = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, str(code), str(place / "config.yaml")], env=environ, text=True,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                )
            )  # fmt: skip
            stack.callback(processes[side].kill)
        for number in range(rounds + 1):
            for side, process in processes.items():
                process.stdin.write("epoch\n")
                process.stdin.flush()
                rate = float(process.stdout.readline())
                print(f"{count} tiles, epoch {number} of {side}: {rate:.1f} images/s", flush=True)
                if number:
                    rates[side].append(rate)
            yield {"part": "epochs", "tiles": count, "normalization": "", **rates}


def _write_settings(file: Path, chosen: dict[str, Any]) -> None:
    """Write only these settings, which both versions know."""
    tree: dict[str, Any] = {}
    for key, value in chosen.items():
        *groups, last = key.split(".")
        place = tree
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
    file.write_text(yaml.safe_dump(tree))


def tables(rows: Sequence[Row]) -> str:
    """Both tables; measurements of the same thing count together."""

    def found(part: str) -> Iterator[tuple[str, list[float], list[float], Row]]:
        own = [row for row in rows if row["part"] == part and row["ours"]]
        for normalization, count in sorted({(row["normalization"], row["tiles"]) for row in own}):
            same = [row for row in own if (row["normalization"], row["tiles"]) == (normalization, count)]
            before, ours = ([value for row in same for value in row[side]] for side in ("before", "ours"))
            yield f"{count:,}", before, ours, same[0]

    def shown(values: Sequence[float]) -> str:
        return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"

    lines = [
        "| tiles | `data.normalization` | second start before, s | ours, s | ours / before | first start before, s | ours, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for count, before, ours, row in found("start"):
        ratio, first = statistics.median(ours) / statistics.median(before), row["first"]
        lines.append(
            f"| {count} | {row['normalization']} | {shown(before)} | {shown(ours)} | {ratio:.2f} | {first['before']:.1f} "
            f"| {first['ours']:.1f} |"
        )
    epochs = list(found("epochs"))
    if epochs:
        lines += ["", "| tiles | loaders before, images/s | ours, images/s | ours / before |", "|---|---|---|---|"]
    for count, before, ours, _ in epochs:
        ratio = statistics.median(ours) / statistics.median(before)
        lines.append(f"| {count} | {shown(before)} | {shown(ours)} | {ratio:.1f} |")
    load = f"load of the machine {os.getloadavg()[1]:.1f}"
    return "\n".join([*lines, "", f"Median (smallest to largest); {load}. {circumstances('torch', 'rasterio')}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--tiles", nargs="+", type=int, default=[350, 700, 1400])
    parser.add_argument("--normalization", nargs="+", choices=NORMALIZATIONS, default=NORMALIZATIONS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="folder of the tiles, made there if missing")
    parser.add_argument("--keep", type=Path, help="JSON file to which the measurements are added")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/performance.md")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended early"))  # so that what is temporary goes
    rows: list[Row] = json.loads(options.keep.read_text()) if options.keep and options.keep.exists() else []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        tiles = (options.folder or place / "tiles").resolve()
        if options.part:
            make_tiles(tiles, max(options.tiles))
        for count in options.tiles:
            measured = [starts(tiles, place, count, options.rounds, one) for one in options.normalization]
            measured = measured if "start" in options.part else []
            if "epochs" in options.part:
                measured.append(epochs(tiles, place, count, options.rounds))
            for one in measured:
                for number, row in enumerate(one):
                    rows[len(rows) - (number > 0) :] = [row]
                    _keep(options.keep, rows)
    text = tables(rows)
    print(text)
    if options.write:
        put("performance.md", "large_set", text)


def _keep(file: Path | None, rows: Sequence[Row]) -> None:
    if file is not None:
        part = file.with_suffix(".part")
        part.write_text(json.dumps(rows))
        os.replace(part, file)


if __name__ == "__main__":
    main()
