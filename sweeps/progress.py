"""The progress display of a sweep: a live line on a terminal, otherwise one line per finished trial."""

from __future__ import annotations

import time

from optuna.trial import FrozenTrial, TrialState

from dann_experiments.config.durations import duration
from dann_experiments.workers.progress import Progress
from sweeps.ranking import drop_of, forgot
from sweeps.seeds import seeds_done, trainings_counted
from sweeps.study import Sweep, superseded


class StudyProgress(Progress):
    """Shows trials done, running, pruned and failed, the best so far, and the time left."""

    def __init__(self, study: Sweep, workers: int, deadline: float | None) -> None:
        super().__init__(study.name, len(study.counted()))
        self._study, self._workers, self._deadline = study, workers, deadline
        self._reported = {trial.number for trial in study.trials() if trial.state.is_finished()}

    def refresh(self) -> None:
        """Update the display."""
        line, done = self._line()
        for trial in self._study.trials():
            if trial.state.is_finished() and trial.number not in self._reported:
                self._reported.add(trial.number)
                self.ended(f"trial {trial.number} {describe_end(trial)}", line)
        self.update(done, line)

    def _line(self) -> tuple[str, int]:
        counts = self._study.counts()
        done = counts["complete"] + counts["pruned"] + counts["fail"]
        parts = [f"{done} of {sum(counts.values())} done", f"{counts['running']} running"]
        parts += [
            f"{counts[state]} {word}" for state, word in (("pruned", "pruned"), ("fail", "failed")) if counts[state]
        ]
        trained = trainings_counted(self._study)
        parts += [trained] if trained else []
        best = self._study.best()
        if best is not None:
            parts.append(f"best {best.value:.4f} (trial {best.number}{', forgot the source' if forgot(best) else ''})")
        left = self._seconds_left(counts["waiting"] + counts["running"])
        if left is not None:
            parts.append(f"about {duration(left)} left")
        return ", ".join(parts), done

    def _seconds_left(self, open_trials: int) -> float | None:
        lengths = [seconds for trial in self._study.counted() if (seconds := trial.user_attrs.get("seconds"))]
        if not lengths or not open_trials:
            return None
        left = sum(lengths) / len(lengths) * open_trials / max(1, min(self._workers, open_trials))
        return left if self._deadline is None else max(0.0, min(left, self._deadline - time.time()))


def describe_end(trial: FrozenTrial) -> str:
    """Describe how a trial ended, in a few words."""
    roles = {"recipe": " (the recipe's own values)", "control": " (lambda = 0 control)"}
    role = roles.get(str(trial.user_attrs.get("role")), "")
    if trial.state == TrialState.COMPLETE:
        if seeds_done(trial):
            role += f", mean of {seeds_done(trial)} seeds"
        fallen = "" if not forgot(trial) else f", but forgot the source (its IoU fell by {drop_of(trial) or 0:.3f})"
        return f"done{role}: {trial.value:.4f}{fallen}"
    if trial.state == TrialState.PRUNED:
        if seeds_done(trial):
            return f"pruned after {seeds_done(trial)} seeds"
        if "steps" in trial.user_attrs:
            return f"pruned after {trial.user_attrs['steps']} steps"
        return f"pruned after epoch {trial.user_attrs.get('epochs')}"
    if superseded(trial):
        return f"retried{role}: {trial.user_attrs.get('error')}"
    return f"FAILED{role}: {trial.user_attrs.get('error')}"
