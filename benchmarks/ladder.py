"""Methods by pairs of domains, and the regret of the choice without target labels: docs/ladder.md.

    python -m benchmarks.ladder add "Yellowstone -> Soaproot" RUN_ID [--tracking_uri URI] [--set rule|test]
    python -m benchmarks.ladder write

`add` reads a finished comparison (`compare --arms ladder`) from its store into docs/ladder.csv, one line per arm and seed; lines
of the same pair are replaced. `--set rule`: this pair was looked at while the rule of the choice was made; `test`: it was not;
`digits`: nor this one, which is made of digits and no real pair; `changes`: nor this one, whose changes are inserted.
`write` makes the tables of docs/ladder.md, and a short one in README.md, from that file alone.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.pages import DOCS, put
from dann_experiments.comparison.choice import COLUMNS, chosen_arm
from dann_experiments.names import Metric, Tag
from dann_experiments.tracking.store import Store, open_store

FILE = DOCS / "ladder.csv"
JUDGED = (Metric.TARGET_TEST_IOU, Metric.TARGET_VAL_IOU)
OTHERS = {
    "seed_agreement": 1, "seed and arms": 1, "consensus": 1, "share_distance": -1,
    "entropy": -1, "infomax": 1, "snd": 1, "bnm": 1,
}  # fmt: skip
"""Scores without target labels -> 1 if more is better, else -1; seed and arms: mean of seed_agreement and consensus."""
BASELINES = ("source_only", "control", "oracle")
LEAST_GAIN, MOST_LOSS = 0.03, 0.01
"""The goals: the chosen arm gains 3 points over source only on real pairs, and nowhere loses more than 1."""


def read(store: Store, pair: str, run_id: str, role: str) -> pd.DataFrame:
    """Return the lines of one comparison."""
    with tempfile.TemporaryDirectory() as folder:
        tables = Path(store.client.download_artifacts(run_id, "tables", folder))
        runs, choice = pd.read_csv(tables / "runs.csv"), pd.read_csv(tables / "choice.csv")
    outcomes = dict(one.rsplit(": ", 1) for one in store.client.get_run(run_id).data.tags[Tag.VERDICT].split("; "))
    metric = next(name for name in JUDGED if name in runs.columns)
    lines = []
    for row in runs.to_dict("records"):
        run = store.client.get_run(row["run_id"])
        minutes = (run.info.end_time - run.info.start_time) / 60000
        floor = run.data.metrics.get(Metric.floor(metric.removeprefix(Metric.IOU)), np.nan)
        lines.append(
            {
                "pair": pair, "set": role, "arm": row["arm"], "seed": row["seed"], "run_id": row["run_id"],
                "metric": metric, "score": row[metric], "floor": floor, "source": row.get(Metric.SOURCE_VAL_IOU, np.nan),
                "minutes": minutes, "outcome": outcomes.get(row["arm"], ""), "kind": row["kind"],
            }
        )  # fmt: skip
    known = choice.drop(columns=["kind", *set(choice.columns).difference(COLUMNS)])
    return pd.DataFrame(lines).merge(known, on="arm", how="left")


def add(pair: str, run_id: str, uri: str | None, role: str) -> None:
    """Put a comparison into the file."""
    lines = read(open_store(uri, None, for_runs=False), pair, run_id, role)
    known = pd.read_csv(FILE) if FILE.exists() else lines.iloc[:0]
    pd.concat([known[known["pair"] != pair], lines]).to_csv(FILE, index=False, float_format="%.5f")


def regrets(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row per pair: the arm that the rule chooses without labels, what it gains and what it loses to the best arm."""
    rows = []
    for pair, lines in table.groupby("pair", sort=False):
        scores = {arm: own.set_index("seed")["score"] for arm, own in lines.groupby("arm", sort=False)}
        kinds = dict(zip(lines["arm"], lines["kind"], strict=True))
        of_kind = {kind: scores[arm] for arm, kind in kinds.items() if kind in BASELINES}
        candidates = lines.drop_duplicates("arm").dropna(subset="consensus").loc[:, list(COLUMNS)]
        chosen, reason = chosen_arm(candidates)
        best = max(candidates["arm"], key=lambda arm, of=scores: of[arm].mean())
        taken = scores[chosen or next(arm for arm, kind in kinds.items() if kind == "source_only")]
        control = of_kind.get("control")
        rows.append(
            {
                "pair": pair, "set": lines["set"].iloc[0], "chosen": chosen or "none (source only)", "reason": reason,
                "score": taken.mean(), "gain": (taken - of_kind["source_only"]).mean(),
                "least gain": (taken - of_kind["source_only"]).min(),
                "over control": np.nan if control is None else (taken - control).mean(),
                "least over control": np.nan if control is None else (taken - control).min(),
                "best": best, "regret": scores[best].mean() - taken.mean(),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def scores_table(table: pd.DataFrame) -> str:
    """Return the table of arms by pairs: mean and standard deviation over seeds, with the verdict."""
    pairs, arms = list(dict.fromkeys(table["pair"])), list(dict.fromkeys(table["arm"]))
    marks = {
        "helped": " **helped**",
        "hurt": " hurt",
        "at the floor": " floor",
        "at the cost of a class": " class lost",
    }
    marks |= {"explained by BatchNorm statistics": " BatchNorm"}
    lines = [f"| | {' | '.join(pairs)} |", "|" + "---|" * (len(pairs) + 1)]
    for arm in arms:
        cells = []
        for pair in pairs:
            own = table[(table["pair"] == pair) & (table["arm"] == arm)]
            mark = marks.get(str(next(iter(own["outcome"]))), "") if len(own) else ""
            cells.append(f"{100 * own['score'].mean():.1f} ± {100 * own['score'].std():.1f}{mark}" if len(own) else "")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    floors = [f"{100 * table.loc[table['pair'] == pair, 'floor'].mean():.1f}" for pair in pairs]
    seeds = [str(table.loc[table["pair"] == pair, "seed"].nunique()) for pair in pairs]
    minutes = [f"{table.loc[table['pair'] == pair, 'minutes'].sum():.0f}" for pair in pairs]
    for name, cells in (("*floor*", floors), ("*seeds*", seeds), ("*minutes of all runs*", minutes)):
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def short_table(table: pd.DataFrame) -> str:
    """Return the README's table: baselines, DANN, the arm chosen without labels and the oracle, with verdicts, by pairs."""
    found = {row["pair"]: row for row in regrets(table).to_dict("records")}
    rows: dict[str, list[str]] = {
        name: [] for name in ("source only", "lambda = 0 control", "DANN", "chosen without labels", "oracle", "*floor*")
    }
    for pair, choice in found.items():
        lines = table[table["pair"] == pair]
        for name in ("source only", "lambda = 0 control", "DANN", "oracle"):
            rows[name].append(_score(lines[lines["arm"] == name]))
        own = lines[lines["arm"] == choice["chosen"]]
        rows["chosen without labels"].append(f"{choice['chosen']} {_score(own)}" if len(own) else choice["chosen"])
        rows["*floor*"].append(f"{100 * lines['floor'].mean():.1f}")
    head = [f"| | {' | '.join(found)} |", "|" + "---|" * (len(found) + 1)]
    return "\n".join([*head, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())])


def _score(lines: Any) -> str:
    """Return mean, standard deviation and the verdict, if there is one, of the lines of an arm on a pair."""
    outcome = str(lines["outcome"].fillna("").iloc[0])
    word = f" **{outcome}**" if outcome == "helped" else f" {outcome}"
    return f"{100 * lines['score'].mean():.1f} ± {100 * lines['score'].std():.1f}{word}".rstrip()


def choice_text(found: pd.DataFrame) -> str:
    """Return the table of choices, and how the goals were met."""
    columns = (
        "pair", "for the rule", "chosen without labels", "over source only", "least seed", "over control", "least seed",
        "best arm", "regret",
    )  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in found.to_dict("records"):
        numbers = [f"{100 * row[key]:+.1f}" for key in ("gain", "least gain", "over control", "least over control")]
        seen = {"rule": "made with it", "test": "not seen"}.get(row["set"], "not seen, not real")
        lines.append(
            f"| {row['pair']} | {seen} | {row['chosen']} | {' | '.join(numbers)} | {row['best']} | {100 * row['regret']:.1f} |"
        )
    return "\n".join(lines)


def others_text(table: pd.DataFrame) -> str:
    """Return what other scores would have chosen: gain over source only and regret on each pair, among plausible arms."""
    lines_of: dict[str, list[dict[str, Any]]] = {}
    for line in table.to_dict("records"):
        lines_of.setdefault(str(line["pair"]), []).append({str(key): value for key, value in line.items()})
    found = [f"| score | {' | '.join(lines_of)} | worst gain | mean regret |", "|" + "---|" * (len(lines_of) + 3)]
    for score, sign in OTHERS.items():
        cells, gains, lost = [], [], []
        for lines in lines_of.values():
            means = {arm: np.mean([line["score"] for line in lines if line["arm"] == arm]) for arm in arms_in(lines)}
            source = means[next(line["arm"] for line in lines if line["kind"] == "source_only")]
            for line in lines:
                line["seed and arms"] = (line["seed_agreement"] + line["consensus"]) / 2
            rows = [line for line in {one["arm"]: one for one in lines}.values() if not math.isnan(line["consensus"])]
            kept = [row for row in rows if not row["source_kept"] <= 0.5 and not row["guard"] >= 0.5]
            known = [row for row in kept if not math.isnan(row[score])]
            taken = max(known, key=lambda row: sign * row[score])["arm"]
            gains.append(means[taken] - source)
            lost.append(max(means[row["arm"]] for row in rows) - means[taken])
            cells.append(f"{taken} {100 * gains[-1]:+.1f}")
        found.append(f"| `{score}` | {' | '.join(cells)} | {100 * min(gains):+.1f} | {100 * np.mean(lost):.1f} |")
    return "\n".join(found)


def which_text(table: pd.DataFrame) -> str:
    """Return one row per pair: what DANN and the best rung gain, and what the rung chosen without labels gains."""
    lines = [
        "| pair | source only | oracle | DANN, over source only (over control) | best rung | chosen without labels |",
        "|---|---|---|---|---|---|",
    ]
    for row, (pair, own) in zip(regrets(table).to_dict("records"), table.groupby("pair", sort=False), strict=True):
        means: Any = own.groupby("arm", sort=False)["score"].mean()
        arm_of = {kind: arm for arm, kind in zip(own["arm"], own["kind"], strict=True)}
        source, control = means[arm_of["source_only"]], means[arm_of["control"]]
        best = f"{row['best']} {100 * (means[row['best']] - source):+.1f}"
        lines.append(
            f"| {pair} | {100 * source:.1f} | {100 * means[arm_of['oracle']]:.1f} | {100 * (means['DANN'] - source):+.1f} "
            f"({100 * (means['DANN'] - control):+.1f}) | {best} | {row['chosen']} {100 * row['gain']:+.1f} |"
        )
    return "\n".join(lines)


def arms_in(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the arms, in order."""
    return list(dict.fromkeys(line["arm"] for line in lines))


def write() -> None:
    """Make the tables anew."""
    table = pd.read_csv(FILE)
    put("ladder.md", "scores", scores_table(table))
    put("../README.md", "ladder", short_table(table))
    put("which-method.md", "which", which_text(table))
    put("ladder.md", "choice", choice_text(regrets(table)))
    put("ladder.md", "others", others_text(table))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add")
    adding.add_argument("pair")
    adding.add_argument("run_id")
    adding.add_argument("--tracking_uri")
    adding.add_argument("--set", choices=("rule", "test", "digits", "changes"), default="test")
    commands.add_parser("write")
    given = parser.parse_args()
    if given.command == "add":
        add(given.pair, given.run_id, given.tracking_uri, given.set)
    else:
        write()
