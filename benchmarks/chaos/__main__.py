"""Runs all of it, prints the table of what was lost, and writes it into docs/reliability.md.

python -m benchmarks.chaos [--seed N] [--write]    # 6 to 12 minutes on two cores; exit code 1 if anything is not as promised
python -m benchmarks.chaos --share 1/6             # what CI runs: a sixth of the counts and of the time; it writes nothing
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from benchmarks.chaos import inputs, kills, outages
from benchmarks.chaos.runs import Source, source_model, write_data
from benchmarks.pages import circumstances, put

PAGE = "reliability.md"
RUNS, OUTAGES, TOGETHER = 20, 10, 4
FEWEST_INPUTS, FEWEST_SAMPLES = 300, 50
LONGEST_STALL = 1.0
"""Seconds that tracking may hold up a training step."""


@dataclass(frozen=True)
class Line:
    """One count of the table."""

    text: str
    found: Any
    promised: str
    is_good: bool


@dataclass
class Chaos:
    """Where it happens, and what it is drawn from."""

    folder: Path
    seed: int
    start: float
    share: Fraction
    """The part of the runs, outages and drawn inputs that is tried; malicious files, of which each differs, are all tried."""

    @property
    def data(self) -> Path:
        """The pictures of all runs."""
        return self.folder / "data"

    def part_of(self, count: int) -> int:
        """Return this run's share of a count, rounded up."""
        return math.ceil(count * self.share)

    def tell(self, text: str) -> None:
        """A line of progress."""
        print(f"{time.monotonic() - self.start:5.0f} s  {text}", flush=True)

    def kills(self, source: Source) -> Iterator[Line]:
        """Training that is killed and resumed."""
        found, wanted = [], self.part_of(RUNS)
        for one in kills.kill_and_resume(self.folder / "kills", self.data, source, self.seed, wanted):
            found.append(one)
            judged = "nothing lost" if one.is_good else f"NOT AS PROMISED: {one}"
            self.tell(f"run {len(found)} of {wanted} (final model: {one.kind}) killed {', '.join(one.kills)}: {judged}")
        yield equal("runs killed (SIGKILL) at a random moment of training, and resumed", len(found), wanted)
        yield at_least(
            "kills in all (resumed runs are killed again, wherever they are)",
            sum(len(one.kills) for one in found),
            wanted,
        )
        yield equal(
            "... that ended FINISHED as the same MLflow run",
            sum(one.same_run and one.status == "FINISHED" for one in found),
            wanted,
        )
        yield equal(
            "... with final weights equal, bit for bit, to those of a run that nobody killed",
            sum(one.same_weights for one in found),
            wanted,
        )
        yield equal("... metric points missing", sum(one.missing for one in found), 0)
        yield equal("... metric points twice, or with another value", sum(one.surplus for one in found), 0)

    def outages(self, source: Source) -> Iterator[Line]:
        """A store that goes away."""
        away, ended, wanted = [], None, self.part_of(OUTAGES)
        for one in outages.take_the_store_away(self.folder / "outages", self.data, source, self.seed, wanted):
            if isinstance(one, outages.Logged):
                ended = one
                self.tell(f"the run ended: {one}")
            else:
                away.append(one)
                self.tell(f"outage {len(away)} of {wanted}: server killed {one.when}, away for {one.seconds:.1f} s")
        assert ended is not None
        yield equal(
            "times that the server (`mlflow server`) of a training run was killed (SIGKILL) and started again",
            len(away),
            wanted,
        )
        yield equal("... how the run ended", ended.status, "FINISHED")
        yield at_least("... metric points it logged", ended.points, 1)
        yield equal("... of them missing in the store", ended.missing, 0)
        yield equal("... in the store twice, or with another value", ended.surplus, 0)
        yield at_least("... pictures by step it logged", ended.pictures, 1)
        yield equal("... of them missing in the store, or there by half", ended.pictures_missing, 0)
        yield equal("... whether the store has the tag that was set last (one an epoch)", ended.has_tag, True)
        seconds, name = ended.longest
        told = ", ".join(f"{count} {call}" for call, count in ended.calls.items())
        text = f"... longest that tracking held the training thread, by `{name}`, in {told} calls"
        yield Line(
            text, f"{seconds:.3f} s", f"at most {LONGEST_STALL:.0f} s", bool(ended.calls) and seconds <= LONGEST_STALL
        )
        away_pause, there_pause = (f"{seconds:.2f} s" for seconds in ended.longest_pauses)
        text = "... longest pause between two steps, whatever the cause, while the server was away (while it was there)"
        yield Line(text, f"{away_pause} ({there_pause})", "", True)

    def together(self, source: Source) -> Iterator[Line]:
        """Runs that begin at once."""
        found, wanted = [], max(2, self.part_of(TOGETHER))
        for one in outages.start_together(self.folder / "together", self.data, source, wanted):
            found.append(one)
            self.tell(f"run {len(found)} of {wanted} side by side: {one}")
        yield equal("runs started at the same time into a sqlite store that was not there", len(found), wanted)
        yield equal(
            "... that ended FINISHED with exit code 0",
            sum((one.status, one.exit_code) == ("FINISHED", 0) for one in found),
            wanted,
        )
        yield equal("... with a complete history", sum(one.is_good for one in found), wanted)

    def drawn(self, source: Source) -> Iterator[Line]:
        """Inputs that are garbage."""
        found = inputs.count(self.folder, "drawn", inputs.DRAWN, self.seed, self.share)
        self.tell(f"drawn inputs: {dict(found)}")
        given = {name.removeprefix("given: "): count for name, count in found.items() if name.startswith("given: ")}
        told = ", ".join(f"{count} {name}" for name, count in given.items())
        yield at_least(
            f"drawn inputs given to the command line ({told})", sum(given.values()), self.part_of(FEWEST_INPUTS)
        )
        good = {end: found[f"ended: {end}"] for end in ("refused with one message", "taken")}
        told = ", ".join(f"{end}: {count}" for end, count in good.items())
        yield equal(
            f"... that ended with exit code 2 and one message, or with 0 ({told})",
            sum(good.values()),
            sum(given.values()),
        )
        yield equal("... tracebacks", found["ended: with a traceback"], 0)
        yield equal("... that ran code", found["executed"], 0)
        yield equal("... tests that they went through and that failed", found["tests failed"], 0)

    def malicious(self, source: Source) -> Iterator[Line]:
        """Files that run code where they are read carelessly."""
        found = inputs.count(self.folder, "malicious", inputs.MALICIOUS, self.seed)
        self.tell(f"malicious files: {dict(found)}")
        given = {name.removeprefix("samples: "): count for name, count in found.items() if name.startswith("samples: ")}
        told = ", ".join(f"{count} {name}" for name, count in given.items())
        yield at_least(f"malicious files read ({told})", sum(given.values()), FEWEST_SAMPLES)
        yield equal("... that ran code", found["executed"], 0)
        yield at_least(
            "... run on purpose, to see that a sample can run and is noticed", found["executed on purpose"], 1
        )
        yield equal("... tests that they went through and that failed", found["tests failed"], 0)


PARTS = {
    "kills": Chaos.kills,
    "outages": Chaos.outages,
    "together": Chaos.together,
    "drawn": Chaos.drawn,
    "malicious": Chaos.malicious,
}


def equal(text: str, found: Any, promised: Any) -> Line:
    """A count that must be this one."""
    return Line(text, found, str(promised), found == promised)


def at_least(text: str, found: int, promised: int) -> Line:
    """A count that must not be less."""
    return Line(text, found, f"at least {promised}", found >= promised)


def table(lines: Sequence[Line]) -> str:
    """All counts as a Markdown table."""
    rows = [
        f"| {line.text} | {line.found}{'' if line.is_good else ' **(not as promised)**'} | {line.promised} |"
        for line in lines
    ]
    return "\n".join(["| what was done | found | promised |", "|---|---|---|", *rows])


def share(text: str) -> Fraction:
    """Read the argument of `--share`."""
    try:
        found = Fraction(text)
    except (ValueError, ZeroDivisionError):
        found = Fraction(0)
    if not 0 < found <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and up to 1, such as 1/3")
    return found


def import_what_runs_need() -> None:
    """Once, so that each process that is forked has it."""
    import alembic.command  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
    import segmentation_models_pytorch  # noqa: F401
    import sklearn.linear_model
    import sklearn.model_selection  # noqa: F401


def main() -> int:
    """All parts, or one; 1 if anything is not as promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--only", choices=PARTS, help="one part alone, which is not written")
    parser.add_argument(
        "--share", type=share, default=Fraction(1), help="try this part of all counts, which is not written"
    )
    known = parser.parse_args()
    if known.write and (known.only or known.share != 1):
        parser.error(f"docs/{PAGE} holds the full counts of all parts: --write goes with neither --share nor --only")
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        del os.environ[name]
    torch.set_num_threads(1)
    import_what_runs_need()
    lines: list[Line] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        chaos = Chaos(Path(folder), known.seed, time.monotonic(), Fraction(known.share))
        write_data(chaos.data, known.seed)
        source = source_model(chaos.folder / "source", chaos.data)
        for name, part in PARTS.items():
            if known.only in (None, name):
                lines += part(chaos, source)
        took = time.monotonic() - chaos.start
    on = circumstances("torch", "mlflow", "pytorch-lightning")
    worked = sum(os.times()[:4])
    told = f"`python -m benchmarks.chaos --seed {known.seed}`, {took:.0f} s ({worked:.0f} s of processor); {on}"
    print(f"\n{table(lines)}\n\n{told}")
    if known.write:
        put(PAGE, "counts", f"{table(lines)}\n\n{told}")
    bad = Counter(line.is_good for line in lines)[False]
    print(f"\n{bad or 'No'} count{'' if bad == 1 else 's'} of {len(lines)} not as promised.", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
