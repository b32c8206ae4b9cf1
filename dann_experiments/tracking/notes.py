"""Descriptions of runs and experiments in MLflow's pages: Markdown made of plain values, with links that work in these pages.

Names are escaped: they are text of users, and `lambda_da` would otherwise be set in italics.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from urllib.parse import quote

from dann_experiments.names import SOURCE_TEST, SOURCE_VAL, TARGET_TEST, TARGET_VAL, Job, Metric, SetName, Tag
from dann_experiments.scores.floor import near_floor
from dann_experiments.tracking.store import TRAINING_PAGES

MADE_FOR = {Tag.COMPARISON: "comparison", Tag.SWEEP_RUN_ID: "sweep"}
"""Tag with the id of the run for which a run was made -> words of the link to it."""
SHOWN: tuple[SetName, ...] = (TARGET_VAL, SOURCE_VAL, TARGET_TEST, SOURCE_TEST)
WEAK_LABELS_WORDS = "Uses weak target labels: masks that are not truth."
_MARKUP = re.compile(r"[\\`*_\[\]~|]")
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def escaped(text: str) -> str:
    """Return a text that Markdown shows as it is, in one line."""
    line = _MARKUP.sub(r"\\\g<0>", " ".join(text.split()))
    return "".join(_HTML.get(letter, letter) for letter in line)


def run_page(experiment_id: str, run_id: str, artifact: str | None = None) -> str:
    """Return the address of a run, or of one of its artifacts, as a fragment of MLflow's pages; it starts with `#`."""
    page = f"#/experiments/{quote(experiment_id, safe='')}/runs/{quote(run_id, safe='')}"
    return f"{page}{'' if artifact is None else f'/artifacts/{quote(artifact)}'}?{TRAINING_PAGES}"


def link(words: str, address: str) -> str:
    """Return a link in Markdown."""
    return f"[{escaped(words)}]({address.replace('(', '%28').replace(')', '%29')})"


def links_of(tags: Mapping[str, object], experiment_id: str) -> list[str]:
    """Return links to the comparison and the sweep for which a run with these tags was made, in the same experiment."""
    return [
        f"Made for {link(words, run_page(experiment_id, str(tags[tag])))}"
        for tag, words in MADE_FOR.items()
        if tag in tags
    ]


def iou_changes(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """Return `target val IoU 0.512 → 0.623` for each labeled set, of metrics by name; one number if there is none before. The
    floor follows, where it is known. With several domains, the set of each follows their mean."""
    found = []
    shown = [
        name
        for whole in SHOWN
        for name in (
            whole,
            *(SetName.parse(one.removeprefix(Metric.IOU)) for one in after if one.startswith(f"{Metric.iou(whole)}.")),
        )
    ]
    for name in shown:
        old, new = (values.get(Metric.iou(name), math.nan) for values in (before, after))
        if math.isfinite(new):
            floor = floor_beside(after, Metric.iou(name))
            beside = (
                f" (floor {floor:.3f}{', not clearly above it' * near_floor(new, floor)})"
                if math.isfinite(floor)
                else ""
            )
            found.append(f"{name.words} IoU {f'{old:.3f} → ' if math.isfinite(old) else ''}{new:.3f}{beside}")
    return found


def floor_beside(values: Mapping[str, float], name: str) -> float:
    """Return the floor of an `iou/SET` metric among metrics by name; NaN if it is not known."""
    return values.get(Metric.floor(name.removeprefix(Metric.IOU)), math.nan)


def near_floors(values: Mapping[str, float]) -> list[str]:
    """Return a sentence for each final score of a run that is near its floor or below it."""
    found = []
    for name, score in values.items():
        floor = floor_beside(values, name) if name.startswith(Metric.IOU) else math.nan
        if math.isfinite(floor) and math.isfinite(score) and near_floor(score, floor):
            found.append(
                f"{name} {score:.3f} is not clearly above its floor: {floor:.3f} is the score of a map that is one class "
                "everywhere. Look at the classes."
            )
    return found


def description(what: str, results: Sequence[str], links: Sequence[str] = (), text: str = "") -> str:
    """Return the description of a run: what it is with its results, then links (in Markdown), then an explanation."""
    opening = f"**{escaped(what)}**" + (f": {escaped(', '.join(results))}" if results else "") + "."
    return "\n\n".join(part for part in (opening, " · ".join(links), escaped(text)) if part)


def experiment_description() -> str:
    """Return the description of an experiment: what its runs are, how they are named, and which metrics matter."""
    jobs = (
        (Job.PRETRAIN, "trains the source model on labeled source images", "source model mnist seed 0"),
        (Job.ADAPT, "adapts it to the unlabeled target", "DANN mnist-m seed 0"),
        (Job.EVALUATE, "scores a model on all labeled images", "evaluation of DANN mnist-m seed 0"),
        (Job.COMPARE, "judges over several seeds whether adaptation helped", "compare mnist-m"),
        (Job.SWEEP, "searches for better settings, in runs of the job `trial`", "sweep digits16"),
        (Job.PREDICT, "writes class maps of images", "predict"),
        (Job.WEAK_LABELS, "writes masks that a rule makes of images", "weak-labels"),
        (Job.CHECK_DATA, "counts classes and draws both domains", "check-data mnist-m"),
    )
    metrics = (
        (Metric.TARGET_VAL_IOU, "mean IoU on the target; step 0 is the source model, before adaptation"),
        (Metric.SOURCE_VAL_IOU, "the same on the source: a fall means that the source is being forgotten"),
        (Metric.TARGET_TEST_IOU, "the same on the test images, once, with the final model"),
        (f"{Metric.FLOOR}...", "the score of a map that is one class everywhere: a score near it says nothing"),
        (Metric.PROBE_ACCURACY, "can a new classifier distinguish source and target by the features? 0.5: no"),
        (
            Metric.DOMAIN_ACCURACY,
            "accuracy of the run's own domain classifier; 1 / number of domains, 0.5 for two: confused",
        ),
        (f"{Metric.SELECT}...", "scores of the target that need no labels, for choosing epochs and trials"),
    )
    return "\n".join(
        [
            "**Unsupervised domain adaptation of segmentation networks (DANN)**, runs of `dann_experiments`.",
            "",
            f"The tag `{Tag.JOB}` says which job a run is:",
            "",
            *(f"- `{job}` {does}, for example *{escaped(name)}*" for job, does, name in jobs),
            "",
            "A name is the method (or the arm of a comparison), the target and the seed. *lambda = 0 control* is the same "
            "training without the adversary: what DANN gains over it is due to adaptation. A run of `compare` has the verdict.",
            "",
            "Metrics that matter:",
            "",
            *(f"- `{metric}`: {meaning}" for metric, meaning in metrics),
        ]
    )


def note_to_set(tags: Mapping[str, str]) -> dict[str, str]:
    """Return the tags that describe an experiment with these tags.

    None are returned if it has the description already, or one that a user wrote: the digest of ours is in a tag of its own.
    """
    present, text = tags.get(Tag.NOTE, ""), experiment_description()
    if present == text or (present.strip() and _digest(present) != tags.get(Tag.NOTE_DIGEST)):
        return {}
    return {Tag.NOTE_DIGEST: _digest(text), Tag.NOTE: text}


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
