"""Makes masks from a rule, for one image or many, in a tracked run with pictures to look at before believing them."""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dann_experiments.config import InputError
from dann_experiments.config.weak_labels import WeakLabelsConfig
from dann_experiments.data.indices import MEANINGS
from dann_experiments.data.nodata import default_nodata_bands, hides
from dann_experiments.jobs.many_images import log_settings, show_progress
from dann_experiments.names import Job, Metric, Tag
from dann_experiments.prediction.find_images import find_partners, find_work
from dann_experiments.prediction.rasters import SIGNATURE_TAG, Legend, read_decimated
from dann_experiments.prediction.rule_masks import (
    PICTURE_SIDE,
    Cut,
    Measured,
    Picture,
    Rule,
    Shares,
    Show,
    Subject,
    is_finished,
    legend_tags,
    measure,
    signature,
    write_mask,
)
from dann_experiments.reports.colors import class_colors
from dann_experiments.reports.images import display_image
from dann_experiments.reports.plots.weak_labels import Labeled, draw_index_histogram, draw_masks
from dann_experiments.tracking.run import TrackedRun, tracked_run
from dann_experiments.tracking.store import local_artifact_folder, open_store

log = logging.getLogger(__name__)
PICTURES = 3  # images in the picture, at most
MASKS, HISTOGRAM = "figures/masks.png", "figures/histogram.png"
PASSES = 3  # over all images: range, histogram, masks


@dataclass(frozen=True)
class WeakLabelsResult:
    """Finished masks of a rule."""

    run_id: str
    experiment_id: str
    tracking_uri: str = field(repr=False)
    """The store's address, including a password in it; not shown in repr."""
    images: tuple[Path, ...]
    outputs: tuple[Path, ...]
    """The masks, one per image, including those that were finished before."""
    thresholds: tuple[float, ...]
    """Of each image."""
    class_pixels: Mapping[str, int]
    """Number of pixels of background and foreground, in the masks written by this run."""
    ignored_pixels: Mapping[str, int]
    """Number of pixels with 255, by reason: margin, border, no data."""
    metrics: Mapping[str, float]
    artifacts: str | None = None
    """Folder of the run's files; None if it is not on this machine."""
    job: str = Job.WEAK_LABELS


@dataclass
class _Written:
    """The masks of this run."""

    shares: dict[int, Shares] = field(default_factory=dict)
    """Number of the image -> numbers of pixels."""
    pictures: dict[int, Picture] = field(default_factory=dict)

    @property
    def total(self) -> Shares:
        """The numbers of all masks together."""
        return Shares(*(sum(numbers) for numbers in zip(*self.shares.values(), strict=True))) if self.shares else _NONE


_NONE = Shares(0, 0, 0, 0, 0)


def weak_labels(settings: WeakLabelsConfig) -> WeakLabelsResult:
    """Write the mask of `settings.input` to `settings.output`; for several images, or a folder, one mask per image.

    Raises InputError for errors that the user can correct: those of settings and headers before a run is opened, unreadable
    pixels before a mask is written.
    """
    assert settings.rule is not None
    work = find_work(settings.inputs, settings.output, [], settings.overwrite)
    images = [image for image, _ in work]
    befores = find_partners(images, settings.befores, settings.output, "before") if settings.befores else {}
    rule = Rule(settings.rule, settings.read_bands, settings.nodata_values)
    subjects = _opened([(image, befores.get(image), output) for image, output in work], rule)
    store = open_store(settings.tracking.uri, settings.tracking.experiment)
    for parent in {subject.output.parent for subject in subjects}:
        parent.mkdir(parents=True, exist_ok=True)
    folder = Path(settings.tracking.folder)
    with tracked_run(
        store, settings.tracking.run_name, Job.WEAK_LABELS, {Tag.JOB: Job.WEAK_LABELS}, folder, use_claimed=True,
        system_metrics=settings.tracking.system_metrics,
    ) as run:  # fmt: skip
        log_settings(run, settings)
        with show_progress(PASSES * len(subjects), settings.progress) as show:
            measured = measure(subjects, settings.threshold == "otsu" and settings.otsu_over == "image", show)
            thresholds = _thresholds(settings, subjects, measured)
            _draw_histogram(run, settings, measured, thresholds)
            done = 2 * len(subjects)
            written = _write(run, settings, subjects, thresholds, lambda share, name: show(done + share, name))
        metrics = _describe(run, settings, subjects, thresholds, written)
    artifacts = local_artifact_folder(store, run.run_id)
    total, (background, foreground) = written.total, settings.ids
    names = settings.class_names
    return WeakLabelsResult(
        run.run_id, store.experiment_id, store.uri, tuple(images), tuple(subject.output for subject in subjects),
        tuple(thresholds), {names[background]: total.background, names[foreground]: total.foreground},
        {"margin": total.margin, "border": total.border, "no data": total.no_data}, metrics,
        None if artifacts is None else str(artifacts),
    )  # fmt: skip


def _opened(work: Sequence[tuple[Path, Path | None, Path]], rule: Rule) -> list[Subject]:
    """Read all headers. Raises one InputError for all files that cannot be used."""
    subjects, problems = [], []
    for image, before, output in work:
        try:
            subjects.append(Subject.open(image, before, output, rule))
        except InputError as error:
            problems.append(str(error))
    if problems:
        shown = "\n".join(problems[:20])
        raise InputError(shown if len(work) == 1 else f"{len(problems)} of {len(work)} images cannot be used:\n{shown}")
    offset = [subject.image for subject in subjects if subject.has_offset]
    _warn(
        offset,
        "declares offsets of its values, which the index does not know: it takes the values as stored. Subtract them first.",
    )
    return subjects


def _thresholds(settings: WeakLabelsConfig, subjects: Sequence[Subject], measured: Measured) -> list[float]:
    """Return the threshold of each image. Raises InputError if Otsu's method finds none."""
    if not isinstance(settings.threshold, str):
        return [float(settings.threshold)] * len(subjects)
    if measured.histogram is None:
        raise InputError(
            f"no pixel of {'the images' if len(subjects) > 1 else subjects[0].image} has data and a value of the index, so there "
            "is no threshold; look at nodata and at the numbers of the bands."
        )
    if settings.otsu_over == "image":
        # an image without any value is ignored as a whole, whatever the threshold is
        common = measured.histogram.otsu() if None in measured.otsu else 0.0
        return [common if own is None else own for own in measured.otsu]
    if measured.histogram.is_coarse:
        low, high = measured.histogram.edges[[0, -1]]
        log.warning(
            "Single values of the index lie far away from nearly all others (%.4g to %.4g), so Otsu's threshold is rough: look "
            "at the histogram; name wrong values in nodata, or give the threshold as a number.", low, high,
        )  # fmt: skip
    return [measured.histogram.otsu()] * len(subjects)


def _write(
    run: TrackedRun, settings: WeakLabelsConfig, subjects: Sequence[Subject], thresholds: Sequence[float], show: Show
) -> _Written:
    """Write all masks that are not there already. Raises one InputError, at the end, for those that cannot be written."""
    from dann_experiments import __version__

    background, foreground = settings.ids
    cut = Cut(settings.side == "above", background, foreground, settings.margin, settings.border)
    names, result, problems = settings.class_names, _Written(), []
    shown = {round(place) for place in np.linspace(0, len(subjects) - 1, PICTURES)}
    for number, (subject, threshold) in enumerate(zip(subjects, thresholds, strict=True)):
        signed = signature(subject, threshold, cut, names)
        tags = {
            **legend_tags(subject.rule, threshold, cut), "software": f"dann_experiments {__version__}",
            "dann_run_id": run.run_id, SIGNATURE_TAG: signed,
        }  # fmt: skip
        legend = Legend(names, class_colors(len(names)), tags)
        try:
            if is_finished(subject, signed, settings.overwrite):
                log.info("%s is already finished.", subject.output)
                continue
            name = subject.image.name
            made, picture = write_mask(
                subject,
                threshold,
                cut,
                legend,
                lambda share, at=number, name=name: show(at + share, name),
                number in shown,
            )
        except InputError as error:
            if len(subjects) == 1:
                raise
            log.error("%s", error)
            problems.append(str(error))
            continue
        result.shares[number] = made
        if picture is not None:
            result.pictures[number] = picture
        show(number + 1, name)
    _warn_of(subjects, result)
    if problems:
        listed = "\n".join(problems[:20])
        raise InputError(
            f"{len(problems)} of {len(subjects)} images have no mask; the others are done. Fix these and start again:\n{listed}"
        )
    return result


def _warn_of(subjects: Sequence[Subject], written: _Written) -> None:
    """Warn about masks that can hardly be meant."""
    empty, whole, flat = [], [], []
    for number, shares in written.shares.items():
        subject = subjects[number]
        if shares.no_data == subject.pixels:
            empty.append(subject.image)
        elif not shares.background or not shares.foreground:
            whole.append(subject.image)
        if subject.grid.crs is not None and subject.output.suffix.lower() == ".png":
            flat.append(subject.output)
    _warn(empty, "has no pixel with data and a value of the index: every pixel of its mask is 255.")
    _warn(
        whole, "has a mask with one class at most: the threshold lies beyond its values, or everything else is ignored."
    )
    _warn(flat, "is no GeoTIFF, so it does not have the georeference of the image.")


def _warn(paths: Sequence[Path], what: str) -> None:
    if paths:
        more = f" The same holds for {len(paths) - 1} more." if len(paths) > 1 else ""
        log.warning("%s %s%s", paths[0], what, more)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _draw_histogram(
    run: TrackedRun, settings: WeakLabelsConfig, measured: Measured, thresholds: Sequence[float]
) -> None:
    assert settings.rule is not None
    if measured.histogram is None:
        return
    background, foreground = (settings.class_names[index] for index in settings.ids)
    below_above = (background, foreground) if settings.side == "above" else (foreground, background)
    used = [threshold for threshold, found in zip(thresholds, measured.ranges, strict=True) if found.count]
    draw_index_histogram(
        run.folder / HISTOGRAM, measured.histogram.edges, measured.histogram.counts, used, settings.margin,
        MEANINGS[settings.rule], below_above, f"Values of the index in {_counted(len(measured.ranges), 'image')}",
    )  # fmt: skip


def _describe(
    run: TrackedRun, settings: WeakLabelsConfig, subjects: Sequence[Subject], thresholds: Sequence[float], written: _Written
) -> dict[str, float]:  # fmt: skip
    """Log metrics, a table of all masks of this run and the picture; return the metrics."""
    assert settings.rule is not None
    total, pixels = written.total, max(sum(written.total), 1)
    metrics = {"masks": float(len(written.shares)), "pixels": float(sum(total))}
    if written.shares:
        metrics |= {f"{name}_share": count / pixels for name, count in total._asdict().items()}
    if len(set(thresholds)) == 1:
        metrics["threshold"] = thresholds[0]
    metrics = {f"{Metric.WEAK_LABELS}{name}": value for name, value in metrics.items()}
    run.log_metrics(metrics, step=0)
    names = [settings.class_names[index] for index in settings.ids]
    path = run.folder / "tables" / "class_shares.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        ignored = ["ignored: margin", "ignored: border", "no data"]
        writer.writerow(["image", "mask", "threshold", *(f"pixels of {name}" for name in names), *ignored])
        for number, shares in written.shares.items():
            subject = subjects[number]
            writer.writerow([subject.image, subject.output, repr(thresholds[number]), *shares])
    if written.pictures:
        rows = [
            Labeled(subjects[number].image.name, _display(subjects[number], settings), one.index, one.ids, thresholds[number])
            for number, one in written.pictures.items()
        ]  # fmt: skip
        draw_masks(run.folder / MASKS, rows, MEANINGS[settings.rule], settings.class_names)
    return metrics


def _display(subject: Subject, settings: WeakLabelsConfig) -> np.ndarray:
    """Return the reduced image for display: (h, w, 3), 0..1. Red, green and blue if they are known, else the first bands."""
    header, reading = subject.header, subject.readings[0][1]
    colors = (settings.red, settings.green, settings.blue)
    bands = [band for band in colors if band is not None]
    if len(bands) < 3:
        bands = header.data_bands[: 3 if header.bands >= 3 else 1]
    values = read_decimated(subject.image, bands, PICTURE_SIDE)
    if header.dtype == "uint8":
        return display_image(values.astype(np.float32) / 255)
    known = np.isfinite(values).all(0)
    known &= ~hides(values, reading.nodata_of(header, bands), default_nodata_bands(header.dtype))
    low, high = np.percentile(values[:, known], (2, 98)) if known.any() else (0.0, 1.0)
    scaled = (np.where(known, values, low).astype(np.float32) - low) / max(float(high - low), 1e-6)
    return display_image(np.clip(scaled, 0, 1))
