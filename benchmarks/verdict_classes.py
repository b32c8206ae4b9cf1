"""How often is help claimed at the floor, or at the cost of a class? Scores of classes drawn with a known answer.

    python benchmarks/verdict_classes.py [--cases 1000] [--write]

IoUs of 2, 5 and 19 classes are drawn for source only (S), control (C = S) and adapted (D), over 3, 5 and 10 seeds, with normal
noise and heavy tails (Student's t, 3 degrees of freedom), of which a share of 0.2 is common to the classes of a run; then `judge`
is asked with and without the classes. A second table draws scores at and above the floor. Ends with an error if help is claimed
in more than 5 % of the cases of any noise and spread where a class is given up or the score is the floor. `--write` puts
the tables into docs/verdict.md. About two minutes.
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from typing import Any

import numpy as np
from pages import circumstances, put
from verdict import SEEDS, SPREADS, percent, standard

from dann_experiments.comparison.verdict import ClassScores, judge

SHAPES = ("normal", "heavy tails")
BOUND = 0.05
COMMON = 0.2
"""Share of the variance that all classes of a run have in common."""
BASES = {2: (45, 30), 5: (70, 60, 50, 40, 20), 19: tuple(np.linspace(75, 20, 19))}
"""Number of classes -> their IoU in S, in points; the last is the rarest."""
LOST = {
    "the last class is given up (to 1), the mean gains 3": ("to", 1, 3),
    "the last class loses 10, the mean gains 5": ("by", -10, 5),
    "the last class is given up (to 1), the mean gains 10": ("to", 1, 10),
}
GAINED = {
    "every class gains 5": ("by", 5, 5),
    "every class gains 10": ("by", 10, 10),
    "the last class gains nothing, the mean 5": ("by", 0, 5),
    "the last class loses 2, the mean gains 5": ("by", -2, 5),
}


def effects(count: int, how: str, last: float, mean: float) -> np.ndarray:
    """Gain of each class in points; the classes before the last share what the mean needs."""
    of_last = last - BASES[count][-1] if how == "to" else last
    return np.array([(mean * count - of_last) / (count - 1)] * (count - 1) + [of_last])


def draw(rng: np.random.Generator, shape: str, spread: float, gains: np.ndarray, cases: int, seeds: int) -> np.ndarray:
    """IoUs (cases; arms S, C, D; classes; seeds), 0 to 1."""
    count = len(gains)
    own = standard(rng, shape, (3 * cases * count, seeds)).reshape(cases, 3, count, seeds)
    common = standard(rng, shape, (3 * cases, seeds)).reshape(cases, 3, 1, seeds)
    noise = spread * (np.sqrt(1 - COMMON) * own + np.sqrt(COMMON) * common)
    start = np.array(BASES[count])[None, None, :, None]
    change = np.stack([np.zeros(count), np.zeros(count), gains])[None, :, :, None]
    return np.clip((start + change + noise) / 100, 0, 1)


def asked(ious: np.ndarray, with_classes: bool) -> list[str]:
    """The verdict of each case."""
    found = []
    for case in ious:
        source, control, adapted = (dict(enumerate(arm)) for arm in case.mean(1).tolist())
        arms = case.tolist()
        classes = {
            str(index): ClassScores(*(dict(enumerate(arms[arm][index])) for arm in (2, 1, 0)))
            for index in range(case.shape[1] if with_classes else 0)
        }
        found.append(judge("D", "iou", adapted, control, source, classes=classes).outcome)
    return found


def class_table(cases: int) -> tuple[list[str], float]:
    """Lines of the table, and the largest share of help claimed where a class is given up."""
    rng = np.random.default_rng(0)
    lines = [
        "| truth | classes | helped, by the mean alone | helped | of these least to most | at the cost of a class |",
        "|---|---|---|---|---|---|",
    ]
    worst = 0.0
    for (name, (how, last, mean)), count in product((LOST | GAINED).items(), BASES):
        gains, cells = effects(count, how, last, mean), []
        for seeds in SEEDS:
            rows = []
            for shape, spread in product(SHAPES, SPREADS):
                ious = draw(rng, shape, spread, gains, cases, seeds)
                known, alone = asked(ious, True), asked(ious, False)
                rows.append([alone.count("helped"), known.count("helped"), known.count("at the cost of a class")])
            shares = np.array(rows) / cases
            alone, helped, cost = shares.mean(0)
            span = f"{100 * shares[:, 1].min():.1f} to {100 * shares[:, 1].max():.1f}"
            cells.append([*(f"{100 * share:.1f}" for share in (alone, helped)), span, f"{100 * cost:.1f}"])
            if name in LOST:
                worst = max(worst, float(shares[:, 1].max()))
        columns = [", ".join(column) + " %" for column in zip(*cells, strict=True)]
        lines.append(f"| {name} | {count} | {' | '.join(columns)} |")
    return lines, worst


def floor_table(cases: int) -> tuple[list[str], float]:
    """The same for a score that is as far above the floor as the truth says, and 10 points above S and C."""
    rng = np.random.default_rng(1)
    lines = [
        "| D above the floor | seeds | helped if the floor is not known | helped, mean; worst | at the floor |",
        "|---|---|---|---|---|",
    ]
    worst = 0.0
    for above, seeds in product((0, 3, 10), SEEDS):
        rows: list[Any] = []
        for shape, spread in product(SHAPES, SPREADS):
            arms = spread * standard(rng, shape, (3 * cases, seeds)).reshape(3, cases, seeds)
            arms += 30 + np.array([0, 0, 10])[:, None, None]
            said: dict[bool, list[str]] = {True: [], False: []}
            for case in (arms / 100).transpose(1, 0, 2).tolist():
                source, control, adapted = (dict(enumerate(arm)) for arm in case)
                for known, found in said.items():
                    floor = (40 - above) / 100 if known else float("nan")
                    found.append(judge("D", "iou", adapted, control, source, floor=floor).outcome)
            rows.append([said[False].count("helped"), said[True].count("helped"), said[True].count("at the floor")])
        shares = np.array(rows) / cases
        unknown, helped, at = shares.mean(0)
        if above == 0:
            worst = max(worst, float(shares[:, 1].max()))
        most = percent(shares[:, 1].max())
        lines.append(f"| {above} points | {seeds} | {percent(unknown)} | {percent(helped)}; {most} | {percent(at)} |")
    return lines, worst


def main() -> None:
    """Draw, print, and write into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="for each truth, noise, spread and number of seeds")
    parser.add_argument("--write", action="store_true")
    known = parser.parse_args()
    classes, of_classes = class_table(known.cases)
    floor, of_floor = floor_table(known.cases)
    end = ["", f"{known.cases:,} cases for each noise and spread. {circumstances('numpy', 'scipy')}"]
    for name, lines in (("classes", classes + end), ("floor", floor + end)):
        print(f"\n{name}\n" + "\n".join(lines))
        if known.write:
            put("verdict.md", name, "\n".join(lines))
    if max(of_classes, of_floor) > BOUND:
        sys.exit(
            f"Help is claimed in {percent(of_classes)} (classes) and {percent(of_floor)} (floor): the bound is {BOUND}."
        )


if __name__ == "__main__":
    main()
