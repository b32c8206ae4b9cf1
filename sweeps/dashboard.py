"""The note that optuna-dashboard shows with a trial: here the address of its run in MLflow.

optuna-dashboard (0.21, `_note.py`) keeps the notes of trials as system attributes of the study: `dashboard:TRIAL_ID:note_ver`, a
number that grows with each change, and the text in parts of at most 2045 characters, `dashboard:TRIAL_ID:note_str:0` and so on.
"""

from __future__ import annotations

import optuna

from dann_experiments.tracking.notes import link, run_page
from dann_experiments.tracking.saved_views import address
from dann_experiments.tracking.store import Store

MOST_CHARACTERS = 2045


def run_line(store: Store, run_id: str, name: str) -> str:
    """Return a link to a run, in Markdown. Without a server it leads to the `mlflow ui` that the user has to start."""
    return link(name, address(store.uri, run_page(store.experiment_id, run_id)))


def add_to_note(trial: optuna.Trial, line: str) -> None:
    """Add a line to the note of a trial, below what is there: a user may have written on it. A note of full length is kept."""
    storage, study_id, start = trial.storage, trial.study._study_id, f"dashboard:{trial._trial_id}:"
    known = storage.get_study_system_attrs(study_id)
    if known.get(f"{start}note_str:1"):  # a long note of a user
        return
    before = known.get(f"{start}note_str:0", "")
    text = f"{before}\n\n{line}" if before else line
    if len(text) > MOST_CHARACTERS:
        return
    storage.set_study_system_attr(study_id, f"{start}note_str:0", text)
    storage.set_study_system_attr(study_id, f"{start}note_ver", int(known.get(f"{start}note_ver", 0)) + 1)
