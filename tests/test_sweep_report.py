"""What the report of a sweep says of its own numbers: what importances rest on, and ties between winner and control."""

from __future__ import annotations

import os
from pathlib import Path

import optuna
import pytest
from conftest import small_settings
from optuna.trial import TrialState

from dann_experiments import load_config
from dann_experiments.tracking.store import open_store
from sweeps.confirm import _Contest
from sweeps.definition import describe
from sweeps.figures import importances_note
from sweeps.report import below_source_note, write_report
from sweeps.sampling import build_pruner
from sweeps.settings import SweepConfig
from sweeps.space import read_space
from sweeps.study import SOURCE_ONLY, Slot, Sweep, open_storage

KEYS = ("optimizer.lr", "optimizer.weight_decay", "trainer.gradient_clip_val", "domain_adaptation.method.lambda_da",
        "domain_adaptation.method.discriminator_lr", "domain_adaptation.method.lambda_schedule.gamma")  # fmt: skip


def study_of(count: int, keys: tuple[str, ...]) -> Sweep:
    """A study in which nothing matters."""
    config = load_config(None, small_settings(Path("nowhere")))
    sweep = SweepConfig(
        space={key: {"type": "float", "low": 1e-3, "high": 0.1} for key in keys}, study="s", n_trials=count
    )
    space = read_space(sweep.space, config)
    study = Sweep.create(open_storage("journal.log"), "s", maximizes=True)
    describe(study, sweep, space, config, count)
    study.add([Slot("control", {}, reference=True), *[Slot("search", {})] * count, Slot("search", {})])
    for number in range(count + 1):
        slot = study.claim("host:1:0", "t")
        assert slot is not None
        seen = study.for_sampling(optuna.samplers.RandomSampler(seed=number), build_pruner("none", 3))
        trial = optuna.Trial(seen, slot._trial_id)
        if number:
            study.note(slot, point=space.suggest(trial))
        seen.tell(trial, 0.5 + (number * 7 % 5) / 100, TrialState.COMPLETE)
    return study


@pytest.mark.slow
@pytest.mark.parametrize("keys", [KEYS[:2], KEYS], ids=["two settings", "six settings"])
def test_importances_are_shown_with_the_spread_of_the_scores_and_a_warning(workplace, keys):
    study, folder = study_of(20, keys), Path("report")
    folder.mkdir()
    write_report(study, open_store(None, "e"), folder)
    words = "Importances from 20 complete trials, which scored from 0.5 to 0.54 (standard deviation 0.0145): a hint at most."
    report, page = (folder / "report.md").read_text(), (folder / "figures" / "study.html").read_text()
    assert words in report
    assert words in page
    assert ("The contour shows the 5 most important settings" in report) is (len(keys) > 5)
    assert (folder / "figures" / "importances.png").stat().st_size > 5000


@pytest.mark.slow
@pytest.mark.parametrize("keys", [KEYS[:2], KEYS], ids=["two settings", "six settings"])
def test_importances_of_few_trials_are_refused_with_the_reason(workplace, keys):
    study, folder = study_of(19, keys), Path("report")
    (folder / "figures").mkdir(parents=True)
    (folder / "figures" / "importances.png").write_text("of an earlier report")
    write_report(study, open_store(None, "e"), folder)
    report, page = (folder / "report.md").read_text(), (folder / "figures" / "study.html").read_text()
    assert "importances: not drawn (19 complete trials of the search are too few: below 20, Optuna's estimate" in report
    assert "Importances from" not in report + page
    assert ("The contour shows 5 of the settings." in report) is (len(keys) > 5)
    assert not (folder / "figures" / "importances.png").exists()
    assert (folder / "figures" / "contour.png").stat().st_size > 5000


@pytest.mark.parametrize(("count", "warned"), [(49, True), (50, False)])
def test_importances_of_fifty_trials_come_without_a_warning(workplace, count, warned):
    note = importances_note(study_of(count, KEYS[:2]))
    assert note.startswith(f"Importances from {count} complete trials, which scored from 0.5 to 0.54")
    assert ("hint" in note) is warned


@pytest.mark.parametrize(("score", "told"), [(0.5401, True), (0.5399, False), (None, False)])
def test_a_report_says_if_no_trial_beats_the_source_model(workplace, score, told):
    """The best of the made trials has 0.54."""
    study = study_of(5, KEYS[:2])
    assert below_source_note(study) is None
    study.set_attribute(SOURCE_ONLY, {"scores": {"iou/target_val": score}, "run_id": "1"})
    assert (below_source_note(study) is not None) is told


def test_a_report_names_the_settings_of_the_best_by_their_place_and_pages_by_their_address(workplace):
    study = study_of(2, KEYS[3:5])
    folder = Path("studies") / "s"
    folder.mkdir(parents=True)
    write_report(study, open_store(None, None, for_runs=False), folder)
    text = (folder / "report.md").read_text()
    assert "`dann adapt --config studies/s/best_config.yaml`" in text
    assert "chart of all trials: http://127.0.0.1:5000/#/experiments/" in text
    assert "## All trials" in text  # one of them waits, so they are more than the best
    assert "3 complete, 1 waiting" in text
    control = next(line for line in text.splitlines() if "(control)" in line).split("|")
    columns = next(line for line in text.splitlines() if "lambda_da" in line).split("|")
    named = {name.strip(): value.strip() for name, value in zip(columns, control, strict=True)}
    assert named["lambda_da"] == ""
    assert named["discriminator_lr"] != ""


def test_a_winner_that_is_as_good_as_the_control_does_not_beat_it(workplace):
    parent = study_of(2, KEYS[:2])
    control, *others = parent.trials(TrialState.COMPLETE)
    contest = _Contest(parent, others, [1, 2])
    study = Sweep.create(open_storage("journal.log"), "s-confirm", maximizes=True)
    for scores, beats in (
        ({control.number: 0.5}, False),
        ({control.number: 0.4}, True),
        ({control.number: 0.6}, False),
    ):
        study.storage.delete_study(study.study_id)
        study = Sweep.create(open_storage("journal.log"), "s-confirm", maximizes=True)
        study.add(contest.slots())
        while (slot := study.claim("host:1:0", "t")) is not None:
            value = scores.get(slot.user_attrs["candidate"], 0.5)
            study.storage.set_trial_state_values(slot._trial_id, TrialState.COMPLETE, [value])
        winner, table = contest.winner(study), contest.table(study)
        assert winner is not None
        assert winner.number == others[0].number
        assert contest.beats_control(table, winner) is beats


@pytest.mark.slow
def test_a_notebook_shows_its_own_figures_after_those_of_a_study_were_drawn(tmp_path):
    import nbformat
    from nbclient import NotebookClient

    cells = [
        "from pathlib import Path; import optuna; import matplotlib.pyplot as plt",
        "from dann_experiments.reports.plots.study import draw_study",
        "study = optuna.create_study(); study.optimize(lambda trial: trial.suggest_float('x', 0, 1), n_trials=3)",
        "_ = draw_study(study, Path('figures'), 'score', {}, 'note')",
        "assert len(list(Path('figures').glob('*.png'))) > 1; _ = plt.subplots()",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute(
        env=environ
    )
    assert any("image/png" in output.get("data", {}) for output in notebook.cells[-1].outputs)
