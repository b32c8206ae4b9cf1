"""`compare` as a user meets it: real runs on small pictures, in real processes that fail, die and are stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import yaml
from conftest import small_settings, squares_in, write_domain
from test_sweeps import environment, finish, make_place, runs_of, until

from dann_experiments import DomainAdaptationMethod, InputError, RunResult, adapt, evaluate, load_config, pretrain
from dann_experiments.__main__ import main
from dann_experiments.comparison.arms import arms_of, cells_of, check_arms
from dann_experiments.comparison.collect import arms_of_runs
from dann_experiments.comparison.compare import ComparisonResult, _doubts, _given_source, _table, compare
from dann_experiments.comparison.result import ArmRun
from dann_experiments.comparison.runner import finished_run
from dann_experiments.config import Config, config_to_yaml, replace
from dann_experiments.config.comparison import CompareConfig
from dann_experiments.config.parsing import load_settings
from dann_experiments.names import Tag
from dann_experiments.reports.terminal import print_comparison
from dann_experiments.tracking.stale_runs import close_stale_runs
from dann_experiments.tracking.store import Store, open_store
from dann_experiments.tracking.values import last_values

METHOD = "domain_adaptation.method"
PATH = "domain_adaptation.pretrained_checkpoint.path"
ARMS = ["source only", "AdaBN", "lambda = 0 control", "DANN", "oracle"]
TARGET_SCORES = ["iou/target_val", "iou/target_test"]


def config_of(root: Path, **more: object) -> Config:
    """One epoch of each job; lambda grows by the batch, as it is 0 in the whole first epoch otherwise."""
    short = {"trainer__max_epochs": 1, "pretraining__max_epochs": 1, "domain_adaptation__method__step_mode": "batch"}
    return load_config(None, small_settings(root, **{"data__oracle": ["oracle"], **short, **more}))


def settings_of(**more: object) -> CompareConfig:
    return load_settings(CompareConfig, None, {"workers": 1, **more})


@dataclass
class Place:
    """A folder with pictures, a store and plain runs of seed 0."""

    root: Path
    config: Config
    plain: dict[str, RunResult]

    @property
    def store(self) -> Store:
        return open_store(self.config.tracking.uri, self.config.tracking.experiment)

    def runs(self, wanted: str = "") -> list:
        store = self.store
        return store.client.search_runs([store.experiment_id], wanted, max_results=1000)


@dataclass
class Compared(Place):
    """The same with the comparison of two seeds that was made after the plain runs."""

    result: ComparisonResult
    leaked: list[str]

    def ids(self, *arms: str) -> list[str]:
        return [run.run_id for run in self.result.comparison.runs if not arms or run.arm in arms]


def state() -> dict[str, object]:
    """What a call must leave as it found it."""
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": str(np.random.get_state()),
        "python": random.getstate(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "signals": [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)],
        "folder": os.getcwd(),
        "environment": dict(os.environ),
    }


@contextlib.contextmanager
def in_folder(folder: Path) -> Iterator[None]:
    """Makes it the current one, without MLflow variables from outside."""
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        for name in [name for name in os.environ if name.startswith("MLFLOW_") and "JOB_EXECUTION" not in name]:
            patch.delenv(name)
        yield


def plain_runs(folder: Path) -> Place:
    root = squares_in(folder / "pictures")
    write_domain(root / "oracle", 6, seed=9, inverted=True)
    config = config_of(root, tracking__uri=f"sqlite:///{folder / 'mlflow.db'}")
    return Place(root, config, {"source only": pretrain(config), "DANN": adapt(config)})


@pytest.fixture(scope="module")
def plain_place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("plain")
    with in_folder(folder):
        return plain_runs(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compared]:
    folder = tmp_path_factory.mktemp("compare")
    with in_folder(folder):
        plain = plain_runs(folder)
        before = state()
        result = compare(plain.config, settings_of(seeds=2))
        after = state()
        leaked = [name for name in before if before[name] != after[name]]
        yield Compared(plain.root, plain.config, plain.plain, result, leaked)


@pytest.fixture
def here(request: pytest.FixtureRequest) -> Iterator[Place]:
    """`place`, or for slow tests the plain runs alone, in its folder."""
    found = request.getfixturevalue("plain_place" if request.node.get_closest_marker("slow") else "place")
    with in_folder(found.root.parent):
        yield found


def missing(place: Place, config: Config, settings: CompareConfig) -> list[tuple[str, int]]:
    """Arm and seed of what a comparison would run."""
    cells = cells_of(
        arms_of(settings, config)[0], settings.seed_list(config.seed), config, _given_source(config, place.store)
    )
    return [(cell.arm.name, cell.seed) for cell in cells if finished_run(place.store, cell.digest) is None]


def test_every_arm_has_a_finished_run_of_every_seed(place):
    assert [arm.name for arm in place.result.comparison.arms] == ARMS
    runs = {(run.arm, run.seed): run for run in place.result.comparison.runs}
    assert set(runs) == {(arm, seed) for arm in ARMS for seed in (0, 1)}
    jobs = dict(zip(ARMS, ["pretrain", "evaluate", "adapt", "adapt", "pretrain"], strict=True))
    for (arm, seed), run in runs.items():
        found = place.store.client.get_run(run.run_id)
        assert found.info.status == "FINISHED"
        assert (found.data.tags["dann.job"], found.data.tags["seed"]) == (jobs[arm], str(seed))
        assert (found.data.tags.get("dann.comparison") == place.result.run_id) is not run.reused
        if not run.reused:
            assert found.data.tags["dann.arm"] == arm
            assert found.info.run_name == f"{arm} target seed {seed}"
            page = f"#/experiments/{place.store.experiment_id}/runs/{place.result.run_id}?"
            assert f"[comparison]({page}" in found.data.tags[Tag.NOTE]


def test_runs_that_plain_jobs_made_are_taken(place):
    runs = {(run.arm, run.seed): run for run in place.result.comparison.runs}
    assert {key for key, run in runs.items() if run.reused} == {("source only", 0), ("DANN", 0)}
    assert {arm: runs[arm, 0].run_id for arm in place.plain} == {
        arm: result.run_id for arm, result in place.plain.items()
    }


def test_each_seed_has_a_source_model_of_its_own_that_its_arms_start_from(place):
    sources = {run.seed: run.run_id for run in place.result.comparison.runs_of("source only")}
    assert len(set(sources.values())) == 2
    for run in place.result.comparison.runs:
        source = place.store.client.get_run(run.run_id).data.tags.get("dann.source_run_id")
        assert source == (None if run.arm in ("source only", "oracle") else sources[run.seed])


def test_lambda_is_zero_in_the_control_alone(place):
    lambdas = {
        arm: {value for run in place.result.comparison.runs_of(arm) for _, value in run.history["da/lambda"]}
        for arm in ("lambda = 0 control", "DANN")
    }
    assert lambdas["lambda = 0 control"] == {0.0}
    assert max(lambdas["DANN"]) > 0.9


def test_what_an_oracle_calls_its_source_is_not_shown_as_the_source(place):
    for run in place.result.comparison.runs_of("oracle"):
        own = place.store.client.get_run(run.run_id).data.metrics
        assert "iou/source_val" in own  # the target, as it trained on that
        assert own["iou/source_val"] == own["iou/target_val"] == run.metrics["iou/target_val"]
        assert not [name for name in run.metrics if "source" in name]
    table = place.result.table
    assert set(table[table["arm"] == "oracle"]["metric"]) >= set(TARGET_SCORES)
    assert not table[table["arm"] == "oracle"]["metric"].str.contains("source").any()


def test_the_comparison_keeps_report_picture_verdict_tables_and_settings(place):
    run = place.store.client.get_run(place.result.run_id)
    assert run.info.status == "FINISHED"
    assert (run.data.tags["dann.job"], run.data.tags["dann.verdict"]) == ("compare", "DANN: no evidence")
    note = run.data.tags[Tag.NOTE]
    assert note.startswith("**Comparison source → target**: DANN: no evidence.")
    assert f"[report](#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}/artifacts/report.html?" in note
    assert run.data.params["cfg.trainer.max_epochs"] == "1"
    artifacts = Path(str(place.result.artifacts))
    assert "<html" in (artifacts / "report.html").read_text()
    assert (artifacts / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert (artifacts / "verdict.txt").read_text() == place.result.verdicts[0].line + "\n"
    wanted = replace(place.config, {"tracking.experiment": "dann"})  # the name that it got
    assert load_config(artifacts / "config.yaml") == wanted
    runs = pd.read_csv(artifacts / "tables" / "runs.csv")
    assert sorted(runs["run_id"]) == sorted(place.ids())
    scores = pd.read_csv(artifacts / "tables" / "scores.csv").set_index(["arm", "metric"])
    values = [run.metrics["iou/target_test"] for run in place.result.comparison.runs_of("DANN")]
    assert scores.loc[("DANN", "iou/target_test"), "mean"] == pytest.approx(np.mean(values), abs=1e-6)
    assert run.data.metrics["compare/target_test/DANN/mean"] == pytest.approx(np.mean(values))
    floor = place.result.comparison.floor
    assert 0 < floor < 1
    assert run.data.metrics["floor/target_test"] == floor
    for name in ("floor/target_test", "map/target_test", "ap/target_test/square", "share/target_test/square"):
        values = [one.metrics[name] for one in place.result.comparison.runs_of("DANN")]
        assert scores.loc[("DANN", name), "mean"] == pytest.approx(np.mean(values), abs=1e-6)
    assert not Path("outputs", place.result.run_id).exists()


def test_seeds_threads_signals_and_environment_are_left_as_they_were(place):
    assert place.leaked == []


def test_the_same_command_again_runs_nothing_and_prints_table_verdict_and_report(here, capfd):
    Path("again.yaml").write_text((Path(str(here.result.artifacts)) / "config.yaml").read_text())
    count = len(here.runs())
    command = ["compare", "--config", "again.yaml", "--seeds", "2", "--tracking.folder", "elsewhere", "--threads", "2"]
    assert main([*command, "--trainer.enable_progress_bar", "true"]) == 0
    printed = " ".join(capfd.readouterr().out.split())
    assert "iou/target_test" in printed
    assert "DANN: no evidence. On iou/target_test, 2 seeds shared" in printed
    assert " floor " in printed
    assert "iou/target_test by class" in printed
    assert len(here.runs()) == count + 1
    again = here.runs("tags.`dann.job` = 'compare'")[0]
    assert again.info.run_id != here.result.run_id
    assert str(Path(again.info.artifact_uri.removeprefix("file://")) / "report.html") in printed.replace(" ", "")
    runs = pd.read_csv(Path(again.info.artifact_uri.removeprefix("file://")) / "tables" / "runs.csv")
    assert sorted(runs["run_id"]) == sorted(here.ids())
    assert runs["reused"].all()


def test_only_what_is_new_is_run(here):
    two, three = settings_of(seeds=2), settings_of(seeds=3)
    assert missing(here, here.config, two) == []
    assert missing(here, here.config, three) == [(arm, 2) for arm in ARMS]
    arms = {"lambda = 0 control": {"kind": "control"}, "DANN": None, "pixel": {f"{METHOD}.classifier": "pixel"}}
    assert missing(here, here.config, settings_of(seeds=2, arms=arms)) == [("pixel", 0), ("pixel", 1)]
    nested = {"DANN": {}, "pixel": {"domain_adaptation": {"method": {"classifier": "pixel"}}}}
    assert missing(here, here.config, settings_of(seeds=2, arms=nested)) == [("pixel", 0), ("pixel", 1)]


@pytest.mark.parametrize(
    ("setting", "new"),
    [
        ({"optimizer__lr": 5e-4}, {"lambda = 0 control", "DANN"}),
        ({"pretraining__optimizer__lr": 5e-4}, set(ARMS)),
        ({f"{METHOD}.lambda_schedule.gamma".replace(".", "__"): 5.0}, {"lambda = 0 control", "DANN"}),
        ({"data__target__batch_size": 4}, set(ARMS)),
        ({"tracking__folder": "x", "tracking__run_name": "x"}, set()),
        ({"threads": 2, "trainer__enable_progress_bar": True, "data__memory_gb": 1.0}, set()),
    ],
)
def test_a_setting_makes_new_runs_if_it_can_change_their_numbers(here, setting, new):
    config = config_of(here.root, tracking__uri=here.config.tracking.uri, **setting)
    found = {arm for arm, _ in missing(here, config, settings_of(seeds=2))}
    # AdaBN and the oracle read all settings but the adaptation's: whatever may matter makes them new
    assert found - {"AdaBN", "oracle"} == new - {"AdaBN", "oracle"}
    assert found >= new


def test_other_bytes_of_an_image_make_new_runs_and_other_names_of_files_none(here, tmp_path):
    import shutil

    shutil.copytree(here.root, tmp_path / "copy")
    moved = config_of(tmp_path / "copy", tracking__uri=here.config.tracking.uri)
    assert missing(here, moved, settings_of(seeds=1)) == []
    shutil.copy(tmp_path / "copy/target/images/0.png", tmp_path / "copy/target/images/1.png")
    assert {arm for arm, _ in missing(here, moved, settings_of(seeds=1))} == {"AdaBN", "lambda = 0 control", "DANN"}


class Troubled(DomainAdaptationMethod):
    """A method that adapts nothing, and gets into trouble in its first step: `raise`, `kill` its process, or `stop` the one
    that compares; only once if `marker` names a file, which says that it has been."""

    feature_layers = ("encoder",)
    uses_target = False

    def __init__(self, trouble: str, marker: str | None = None) -> None:
        super().__init__()
        self.trouble, self.marker = trouble, None if marker is None else Path(marker)

    def loss(self, outputs, progress):
        from dann_experiments import MethodLoss

        if self.marker is None or not self.marker.exists():
            if self.marker is not None:
                self.marker.touch()
            if self.trouble == "raise":
                raise Unsendable("too", "bad")
            if self.trouble == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.trouble == "stop":
                os.kill(
                    multiprocessing.parent_process().pid, signal.SIGTERM
                )  # the comparison, not what workers are forked from
                threading.Event().wait()  # until SIGTERM comes back
        zero = torch.zeros(())
        return MethodLoss(differentiated=outputs.source_logits.sum() * 0, value=zero, weight=0.0, metrics={})


class Unsendable(Exception):
    """Cannot be unpickled, as many libraries' errors: a pool of processes would break by it."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} {other}")


def troubled(trouble: str, marker: Path | None = None) -> dict[str, object]:
    arguments = {"trouble": trouble, "marker": None if marker is None else str(marker)}
    return {f"{METHOD}.class_path": f"{__name__}.Troubled", f"{METHOD}.init_args": arguments}


@pytest.mark.slow
def test_a_killed_process_is_survived_and_a_failed_arm_is_noted_while_the_others_stand(here, monkeypatch):
    arms = {
        "DANN": {},
        "pixel": {f"{METHOD}.classifier": "pixel"},
        "failing": troubled("raise"),
        "killed once": troubled("kill", here.root / "killed"),
        "killed always": troubled("kill"),
        "lambda = 0 control": {"kind": "control"},
    }
    claimed = here.store.client.create_run(here.store.experiment_id).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", claimed)  # as `mlflow run` does; those of the workers are runs of their own
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(here.config.tracking.uri))
    result = compare(here.config, settings_of(seeds=1, workers=2, arms=arms))
    assert result.run_id == claimed
    ended = {run.arm: run for run in result.comparison.runs}
    assert set(ended) == {"source only", "DANN", "pixel", "killed once", "lambda = 0 control"}
    assert {arm for arm, run in ended.items() if run.reused} == {"source only", "DANN"}
    assert here.store.client.get_run(ended["pixel"].run_id).data.params[f"cfg.{METHOD}.classifier"] == "pixel"
    notes = "\n".join(result.comparison.notes)
    assert "failing, seed 0: no run (Unsendable: too bad)." in notes
    assert "killed always, seed 0: no run (its process was killed by SIGKILL" in notes
    assert "killed once, seed" not in notes  # a note about a floor may name the arm
    statuses: dict[str, list[str]] = {}
    for run in here.runs(f"tags.`dann.comparison` = '{result.run_id}'"):
        statuses.setdefault(run.data.tags["dann.arm"], []).append(run.info.status)
    assert {arm: sorted(found) for arm, found in statuses.items()} == {
        "pixel": ["FINISHED"],
        "lambda = 0 control": ["FINISHED"],
        "failing": ["FAILED"],
        "killed once": ["FINISHED", "KILLED"],
        "killed always": ["KILLED", "KILLED"],
    }
    verdicts = {verdict.arm: verdict.outcome for verdict in result.verdicts}
    assert set(verdicts) == {"DANN", "pixel", "failing", "killed once", "killed always"}
    logs = list((Path(str(result.artifacts)) / "logs").glob("worker-*.log"))
    assert any("Unsendable" in log.read_text() for log in logs)


@pytest.mark.slow
def test_a_comparison_that_is_stopped_closes_all_runs_as_killed_and_goes_on_when_called_again(here):
    marker = here.root / "stopped"
    arms = {"stopped": troubled("stop", marker), "next": {"optimizer.lr": 2e-3}}
    settings = settings_of(seeds=1, arms=arms)
    with pytest.raises(SystemExit) as end:
        compare(here.config, settings)
    assert end.value.code == 143
    stopped = here.runs("tags.`dann.job` = 'compare'")[0]
    assert stopped.info.status == "KILLED"
    children = here.runs(f"tags.`dann.comparison` = '{stopped.info.run_id}'")
    assert [(run.data.tags["dann.arm"], run.info.status) for run in children] == [("stopped", "KILLED")]
    result = compare(here.config, settings)
    assert {run.arm for run in result.comparison.runs} == {"source only", "stopped", "next"}
    assert not here.runs("attributes.status = 'RUNNING'")


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_comparison_that_is_killed_takes_its_workers_along_and_the_same_command_completes_it(signum, code, tmp_path):
    place = make_place(tmp_path, trainer__max_epochs=2)
    (place / "arms.yaml").write_text("{arms: {source only: {kind: source_only}, DANN: {}}}")
    words = ["compare", "--config", "config.yaml", "--arms", "arms.yaml", "--seeds", "1", "--workers", "1"]

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "dann_experiments", *words], cwd=place, env=environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def worker() -> psutil.Process:
        run = next(run for run in runs_of(place, "adapt") if run.info.status == "RUNNING")
        return psutil.Process(int(run.data.tags["dann.process"].rsplit(":", 2)[1]))

    process = start()
    killed = until(worker, process)
    os.kill(process.pid, signum)
    finish(process, code)
    killed.wait(120)
    finish(start())
    statuses = {job: sorted(run.info.status for run in runs_of(place, job)) for job in ("pretrain", "adapt", "compare")}
    assert statuses == {"pretrain": ["FINISHED"], "adapt": ["FINISHED", "KILLED"], "compare": ["FINISHED", "KILLED"]}


@pytest.mark.slow
def test_a_comparison_of_which_no_adapted_run_is_left_fails_and_says_why(here, capsys):
    Path("arms.yaml").write_text(yaml.safe_dump({"arms": {"failing": troubled("raise")}, "seeds": 1}))
    Path("again.yaml").write_text(config_to_yaml(here.config))
    assert main(["compare", "--config", "again.yaml", "--arms", "arms.yaml", "--workers", "1"]) == 1
    assert "Unsendable: too bad" in capsys.readouterr().err
    assert here.runs("tags.`dann.job` = 'compare'")[0].info.status == "FAILED"


def test_runs_that_a_killed_comparison_left_open_are_closed_and_those_of_the_living_are_not(here):
    from dann_experiments.tracking.processes import process_name

    machine, _, started = process_name().rsplit(":", 2)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    gone = f"{machine}:{dead.pid}:{started}"

    def open_run(**tags: str) -> str:
        names = {f"dann.{name}": value for name, value in tags.items()}
        return here.store.client.create_run(here.store.experiment_id, tags=names).info.run_id

    expected = {
        open_run(job="compare", process=gone): "KILLED",
        open_run(job="adapt", comparison="x", process=gone): "KILLED",
        open_run(job="adapt", process=gone): "KILLED",  # of no comparison, but dead as well
        open_run(job="adapt"): "RUNNING",  # of something that does not say
        open_run(job="compare", process=process_name()): "RUNNING",
        open_run(job="compare", process="elsewhere:1:0"): "RUNNING",
    }
    close_stale_runs(here.store, "compare")
    found = {run_id: here.store.client.get_run(run_id).info.status for run_id in expected}
    for run_id in expected:
        here.store.client.delete_run(run_id)
    assert found == expected


def test_the_runs_of_a_comparison_give_its_table_and_verdict_again(here):
    count = len(here.runs())
    result = compare(here.config, settings_of(runs=here.ids()))
    assert len(here.runs()) == count + 1
    pd.testing.assert_frame_equal(result.table, here.result.table)
    assert [verdict.line for verdict in result.verdicts] == [verdict.line for verdict in here.result.verdicts]
    assert result.comparison.panel_seed == here.result.comparison.panel_seed
    assert len(result.comparison.panels) == len(here.result.comparison.panels) > 0
    assert (
        here.store.client.get_run(result.run_id).info.run_name == "compare target"
    )  # not as the run it took settings from


def test_runs_of_an_earlier_version_compare_as_before_and_a_note_says_that_their_floor_is_unknown(here, monkeypatch):
    new = ("floor/", "map/", "ap/", "share/", "true_share/")
    monkeypatch.setattr(
        "dann_experiments.comparison.collect.last_values",
        lambda run: {name: value for name, value in last_values(run).items() if not name.startswith(new)},
    )
    result = compare(here.config, settings_of(runs=here.ids()))
    assert math.isnan(result.comparison.floor)
    assert [verdict.line for verdict in result.verdicts] == [verdict.line for verdict in here.result.verdicts]
    known = here.result.table[~here.result.table["metric"].str.startswith(new)].reset_index(drop=True)
    pd.testing.assert_frame_equal(result.table, known)
    (said,) = [note for note in result.comparison.notes if "floor" in note]
    assert said.startswith("These runs do not have the floor of iou/target_test")


def test_source_models_are_found_by_the_runs_that_start_from_them(here):
    arms, runs, notes = arms_of_runs(here.store, here.ids("DANN", "lambda = 0 control"))
    assert [arm.name for arm in arms] == ["source only", "lambda = 0 control", "DANN"]
    found = {(run.seed, run.run_id) for run in runs if run.arm == "source only"}
    assert found == {(run.seed, run.run_id) for run in here.result.comparison.runs_of("source only")}
    assert notes == []


@pytest.mark.slow
def test_one_source_model_may_be_the_start_of_several_seeds_and_is_then_scored_not_trained(here):
    source = here.plain["source only"]
    config = config_of(here.root, tracking__uri=here.config.tracking.uri, **{PATH.replace(".", "__"): source.model_uri})
    other = adapt(load_config(None, {**flat(config), "seed": 7, "trainer.enable_progress_bar": False}))
    _, runs, _ = arms_of_runs(here.store, [here.plain["DANN"].run_id, other.run_id])
    sources = {run.seed: run for run in runs if run.arm == "source only"}
    assert {seed: run.run_id for seed, run in sources.items()} == {0: source.run_id, 7: source.run_id}
    # seed 0 and 7 of DANN are there, so that scoring the model is all that is left
    result = compare(config, settings_of(seeds=[0, 7], arms={"DANN": {}}))
    made = here.runs(f"tags.`dann.comparison` = '{result.run_id}'")
    assert [run.data.tags["dann.job"] for run in made] == ["evaluate", "evaluate"]
    for run in result.comparison.runs_of("source only"):
        assert run.metrics["iou/target_test"] == source.metrics["iou/target_test"]
    again, _, _ = arms_of_runs(here.store, [run.run_id for run in result.comparison.runs])
    assert [arm.name for arm in again] == ["source only", "DANN"]
    scored = compare(here.config, settings_of(runs=[run.run_id for run in result.comparison.runs]))
    pd.testing.assert_frame_equal(scored.table, result.table)


def flat(config: Config) -> dict[str, object]:
    from dann_experiments.config import flatten

    return flatten(config)


def test_a_source_model_in_a_file_is_known_by_its_bytes(here, tmp_path):
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).write_bytes(content)
    first, same, other = (
        _given_source(load_config(None, {PATH: str(tmp_path / name)}), here.store) for name in ("a", "b", "c")
    )
    assert first == same != other


def test_without_target_labels_there_is_a_note_and_no_verdict_and_mlflow_run_has_its_run(here, monkeypatch, capsys):
    unlabelled = {"data__target__val": [], "data__target__test": [], "data__oracle": []}
    config = config_of(here.root, tracking__uri=here.config.tracking.uri, **unlabelled)
    pretrain(config)
    adapt(config)
    claimed = here.store.client.create_run(here.store.experiment_id).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", claimed)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(here.config.tracking.uri))
    result = compare(config, settings_of(seeds=1, arms={"DANN": {}}))
    assert result.run_id == claimed
    assert all(run.reused for run in result.comparison.runs)
    assert result.verdicts == []
    assert result.comparison.metric == ""
    run = here.store.client.get_run(claimed)
    assert (run.info.status, run.data.tags["dann.verdict"]) == ("FINISHED", "no target labels")
    assert "No target labels" in (Path(str(result.artifacts)) / "verdict.txt").read_text()
    assert not any(name.startswith("iou/target") for one in result.comparison.runs for name in one.metrics)
    assert set(result.comparison.panels[0].predictions) == {"source only", "DANN"}  # though pretraining read no target
    print_comparison(result.comparison, result.table)
    assert "Note: No target labels" in capsys.readouterr().out
    # no labels to score by at all: an empty table
    bare = [dataclasses.replace(one, metrics={}) for one in result.comparison.runs]
    empty = dataclasses.replace(result.comparison, runs=bare)
    print_comparison(empty, _table(empty))
    assert "Note: No target labels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (lambda here: [*here.ids("DANN"), "0" * 32], f"runs names {'0' * 32}, which the tracking store does not have"),
        (lambda here: here.ids("source only"), "runs names no adaptation run"),
        (lambda here: here.ids("source only", "oracle"), "runs names no adaptation run"),
        (lambda here: [*here.ids("DANN"), here.result.run_id], "a run of compare; give runs of adapt"),
        (lambda here: [*here.ids("DANN"), twin(here)], "two runs of one arm (DANN) with one seed"),
        (lambda here: [*here.ids("DANN"), twin(here, status="FAILED")], "whose status is FAILED; give finished runs"),
        (lambda here: [*here.ids("DANN"), twin(here, seed="1", source="x")], "start from different source models"),
        (lambda here: [twin(here, seed="9", source="x")], "runs needs x, the source model of the runs of seed 9"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused_in_one_message(here, choose, message, capsys):
    count = len(here.runs())
    ids = choose(here)
    more = len(here.runs()) - count
    arguments = ["compare", "--tracking.uri", str(here.config.tracking.uri), "--runs", *ids]
    assert main(arguments) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert error.startswith("Error: ")
    assert message in error
    assert "Traceback" not in error
    assert len(here.runs()) == count + more


def twin(here: Place, status: str = "FINISHED", seed: str = "0", source: str | None = None) -> str:
    """Another run of plain DANN in the store, without its files."""
    client, old = here.store.client, here.store.client.get_run(here.plain["DANN"].run_id)
    tags = {key: value for key, value in old.data.tags.items() if key.startswith("dann.") and key != "dann.digest"}
    tags |= {"seed": seed} | ({"dann.source_run_id": source} if source else {})
    run_id = client.create_run(here.store.experiment_id, tags=tags).info.run_id
    client.log_batch(run_id, params=[mlflow.entities.Param(key, value) for key, value in old.data.params.items()])
    client.set_terminated(run_id, status)
    return run_id


def test_runs_scored_on_other_images_of_the_target_are_refused(here):
    config = config_of(here.root, tracking__uri=here.config.tracking.uri, data__target__test=["target_val"])
    other = evaluate(load_config(None, {**flat(config), PATH: here.plain["source only"].model_uri}))
    with pytest.raises(InputError, match="were scored on different images"):
        arms_of_runs(here.store, [*here.ids("DANN"), other.run_id])


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ({"DANN": {"optimizer.lrr": 1}}, "arms.DANN: unknown setting 'optimizer.lrr'; did you mean"),
        ({"DANN": {"optimizer": {"lrr": 1}}}, "arms.DANN: unknown setting 'optimizer.lrr'; did you mean"),
        ({"DANN": {"optimizer.lr": "fast"}}, "arms.DANN: optimizer.lr is 'fast'"),
        ({"DANN": {"kind": "dann"}}, "arms.DANN.kind is 'dann'; give one of source_only"),
        (
            {"DANN": {}, "a": {"kind": "control"}, "b": {"kind": "control"}},
            "arms holds 2 arms of kind control; keep one",
        ),
        ({"a": {"kind": "control"}}, "arms holds no arm of kind adapted"),
        ({"DANN": {}, "best": {"kind": "oracle"}}, "arms.best is an oracle, but data.oracle names no"),
        ({"DANN": {}, "s": {"kind": "source_only", "optimizer.lr": 0.1}}, "arms.s changes ['optimizer.lr'], but"),
        ({"DANN": {"seed": 3}}, "arms.DANN sets seed to 3, but all arms share it"),
        ({"DANN": {PATH: "x.ckpt"}}, f"arms.DANN sets {PATH} to 'x.ckpt', but all arms share it"),
        ({"DANN": {"data.target.test": ["source"]}}, "arms.DANN sets data.target.test to ['source'], but arms start"),
        ({"DANN": {"model.encoder_name": "resnet34"}}, "arms.DANN sets model.encoder_name to 'resnet34', but arms"),
        ({"DANN": {}, "c": {"kind": "control", f"{METHOD}.name": "dann"}}, "makes an arm of kind control"),
        ({"source only": {}}, "arms.source only is not of kind source_only"),
        ({"DANN": {f"{METHOD}.feature_layer": "encoder.layer9"}}, "arms.DANN: "),
        ({"DANN": {"data.crop_size": 1024}}, "arms.DANN: "),
        ({"DANN": 3}, "arms"),
    ],
)
def test_wrong_arms_are_refused_before_anything_runs(here, arms, message, capsys):
    config = config_of(here.root, tracking__uri=here.config.tracking.uri, data__oracle=[])
    Path("config.yaml").write_text(yaml.safe_dump(nested(flat(config))))
    Path("wrong.yaml").write_text(yaml.safe_dump({"arms": arms, "seeds": 1}))
    count = len(here.runs())
    assert main(["compare", "--config", "config.yaml", "--arms", "wrong.yaml"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert message in error
    assert "Traceback" not in error
    assert len(here.runs()) == count


def nested(settings: dict[str, object]) -> dict[str, object]:
    tree: dict[str, object] = {}
    for key, value in settings.items():
        *groups, name = key.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})  # pyright: ignore
        node[name] = value
    return tree


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "seeds is 0; give their number"),
        (["--seeds", "-1"], "seeds is -1; give their number"),
        (["--seeds", "[1, 1]"], "seeds is [1, 1]"),
        (["--seeds", "[-1]"], "seeds is [-1]; seeds are whole numbers from 0"),
        (["--seeds", "4000000000"], "seeds is 4000000000; give their number, at most 1000"),
        (["--seeds", "many"], "seeds is 'many'"),
        (["--workers", "0"], "workers is 0"),
        (["--launcher", "ray"], "launcher is 'ray', but tracking.uri is"),
        (["--ray_address", "10.0.0.1:6379"], "ray_address has no effect with launcher: processes"),
        (["--arms", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["--runs"], "--runs has no value"),
        (["--runs", "a", "a"], "runs names a run twice"),
        (["--sees", "3"], "unknown setting 'sees'"),
    ],
)
def test_wrong_settings_of_a_comparison_are_told_in_one_message(here, arguments, message, capsys):
    assert main(["compare", *arguments]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert error.startswith("Error: ")
    assert message in error


def test_arms_that_differ_from_the_control_in_more_than_the_adversary_are_named(here):
    arms = {"c": {"kind": "control"}, "pixel": {f"{METHOD}.classifier": "pixel"}, "long": {"trainer.max_epochs": 9}}
    _, notes = arms_of(settings_of(arms=arms), here.config)
    assert [note for note in notes if "differs" in note] == [
        "long differs from the control in more than the adversary (trainer.max_epochs): what it gains over the control may "
        "be due to that."
    ]


def test_usual_arms_without_oracle_images_are_four_and_say_so(here):
    config = config_of(here.root, data__oracle=[])
    arms, notes = arms_of(CompareConfig(), config)
    assert [arm.name for arm in arms] == ARMS[:4]
    assert notes == ["No oracle: data.oracle names no labeled training images of the target."]


def test_checking_arms_draws_no_random_numbers(here):
    config = config_of(here.root)
    cells = cells_of(arms_of(CompareConfig(seeds=1), config)[0], [0], config, None)
    before = state()
    check_arms(cells)
    assert state() == before


def test_the_workers_of_a_comparison_find_all_sets_decoded(place, tmp_path, monkeypatch):
    found = []

    class Began(Exception):
        """The workers would begin."""

    def run_cells(*arguments: Any) -> None:
        *_, pool, decoded = arguments
        found.extend(decoded.glob("*.json"))
        pool.stop()
        raise Began

    monkeypatch.setattr("dann_experiments.comparison.compare.run_cells", run_cells)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Began):
        compare(config_of(place.root, tracking__uri=f"sqlite:///{tmp_path}/mlflow.db"), settings_of(seeds=1))
    assert len(found) == 5  # source train and val, target train, val and test
    assert not (tmp_path / "outputs" / ".decoded").exists()


@pytest.mark.parametrize(
    ("at_the_end", "said"), [({"select/source_kept": 0.0}, "forgot the source"), ({}, "forgot the source"),
    ({"select/source_kept": 1.0}, "in between, but not at the end")],
)  # fmt: skip
def test_a_run_that_came_back_to_the_source_is_not_said_to_have_forgotten_it(at_the_end, said):
    run = ArmRun("DANN", 0, "a", at_the_end, {}, {"dann.forgot_source": "true"}, False)
    (note,) = _doubts([run], ["DANN"])
    assert said in note
    assert ("forgot" in note.partition(":")[0]) == (at_the_end.get("select/source_kept") != 1)
