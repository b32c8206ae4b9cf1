"""What a sweep shows while it runs: a live line on a terminal, a line for each trial that ends elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from optuna.trial import FrozenTrial, TrialState

from sweeps.study import Sweep, superseded


class Progress:
    """Shows trials done, running, pruned and failed, the best so far, and the time left."""

    def __init__(self, study: Sweep, workers: int, deadline: float | None) -> None:
        self._study, self._workers, self._deadline = study, workers, deadline
        self._shown = {trial.number for trial in study.trials() if trial.state.is_finished()}
        self._live = None
        if sys.stdout.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as RichProgress

            self._live = RichProgress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[line]}"),
                console=Console(),
            )
            self._task = self._live.add_task(study.name, line="", total=len(study.counted()))

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self) -> None:
        """Show what has changed."""
        line, done = self._line()
        ended = [
            trial for trial in self._study.trials() if trial.state.is_finished() and trial.number not in self._shown
        ]
        for trial in ended:
            self._shown.add(trial.number)
            text = f"trial {trial.number} {describe_end(trial)}"
            if self._live is not None:
                self._live.console.print(text, highlight=False)
            else:
                print(f"{text}   [{line}]", flush=True)
        if self._live is not None:
            self._live.update(self._task, completed=done, line=line)

    def _line(self) -> tuple[str, int]:
        counts = self._study.counts()
        done = counts["complete"] + counts["pruned"] + counts["fail"]
        parts = [f"{done} of {sum(counts.values())} done", f"{counts['running']} running"]
        parts += [
            f"{counts[state]} {word}" for state, word in (("pruned", "pruned"), ("fail", "failed")) if counts[state]
        ]
        best = self._study.best()
        if best is not None:
            parts.append(f"best {best.value:.4f} (trial {best.number})")
        left = self._seconds_left(counts["waiting"] + counts["running"])
        if left is not None:
            parts.append(f"about {_duration(left)} left")
        return ", ".join(parts), done

    def _seconds_left(self, open_trials: int) -> float | None:
        lengths = [seconds for trial in self._study.counted() if (seconds := trial.user_attrs.get("seconds"))]
        if not lengths or not open_trials:
            return None
        left = sum(lengths) / len(lengths) * open_trials / max(1, min(self._workers, open_trials))
        return left if self._deadline is None else max(0.0, min(left, self._deadline - time.time()))


def describe_end(trial: FrozenTrial) -> str:
    """How a trial ended, in a few words."""
    roles = {"recipe": " (the recipe's own values)", "control": " (lambda = 0 control)"}
    role = roles.get(str(trial.user_attrs.get("role")), "")
    if trial.state == TrialState.COMPLETE:
        return f"done{role}: {trial.value:.4f}"
    if trial.state == TrialState.PRUNED:
        return f"pruned after epoch {trial.user_attrs.get('epochs')}"
    if superseded(trial):
        return f"put in again{role}: {trial.user_attrs.get('error')}"
    return f"FAILED{role}: {trial.user_attrs.get('error')}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{round(seconds)} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"
