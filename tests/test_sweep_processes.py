"""Sweeps of real processes that end before their time: workers and drivers that are killed or stopped, trials that fail."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import psutil
import pytest
from test_sweeps import (
    GAMMA,
    PROJECT,
    check_ended,
    environment,
    finish,
    make_place,
    run_words,
    runs_of,
    said,
    study_in,
    sweeps,
    until,
    worker_in_a_run,
)

from sweeps.seeds import seeds_done
from sweeps.study import superseded

__all__ = ["said"]  # a fixture


@pytest.mark.slow
def test_failing_trials_fail_alone_and_too_many_in_a_row_end_the_sweep_with_the_cause(tmp_path, said):
    place = make_place(tmp_path, {"optimizer.lr": {"type": "float", "low": 1e36, "high": 1e37}})
    message = said(place, *run_words(place, "--n_trials", "6", "--max_failures", "2", "--workers", "1"), code=1)
    assert "the last 2 trials failed" in message
    assert "TrainingFailed" in message
    study = study_in(place)
    errors = {trial.number: str(trial.user_attrs.get("error")) for trial in study.counted()}
    failed = [trial for trial in study.counted() if "TrainingFailed" in errors[trial.number]]
    assert len(failed) in (2, 3)  # another may have been under way when the second failure was seen
    assert study.counts()["waiting"] > 0
    assert [trial.state.name for trial in study.trials()[:2]] == ["COMPLETE", "COMPLETE"]  # their own learning rate
    client = mlflow.MlflowClient(f"sqlite:///{place / 'mlflow.db'}")
    for trial in failed:
        run_id = trial.user_attrs["run_id"]
        assert client.get_run(run_id).info.status == "FAILED"
        assert "traceback.txt" in {item.path for item in client.list_artifacts(run_id)}
    assert runs_of(place, "sweep")[0].info.status == "FAILED"
    assert "Stopped" in (place / "studies" / "s" / "report.md").read_text()


@pytest.mark.slow
def test_timeout_starts_no_further_trial_and_resume_runs_those_that_are_missing(tmp_path, said):
    place = make_place(tmp_path, trainer__max_epochs=2)
    said(place, *run_words(place, "--n_trials", "4", "--workers", "1", "--timeout", "0.1", "--nested", "true"))
    assert len(study_in(place).trials()) == 4
    waiting = sum(trial.state.name == "WAITING" for trial in study_in(place).trials())
    assert waiting == 4
    said(place, "resume", "--study", "s", "--workers", "1")
    check_ended(place, 4)
    parents = {run.data.tags["mlflow.parentRunId"] for run in runs_of(place, "trial")}
    assert parents <= {run.info.run_id for run in runs_of(place, "sweep")}


@pytest.mark.slow
def test_a_killed_worker_costs_no_trial_and_a_second_driver_is_refused(tmp_path, said):
    place = make_place(tmp_path, trainer__max_epochs=2)
    process = sweeps(place, *run_words(place, "--n_trials", "4", "--workers", "2"))
    os.kill(until(lambda: worker_in_a_run(place), process), signal.SIGKILL)
    assert "being run by another process" in said(place, *run_words(place), code=2)
    finish(process)
    check_ended(place, 4)
    study = study_in(place)
    assert len(study.trials()) == 5
    gone = [trial for trial in study.trials() if superseded(trial)]
    assert len(gone) == 1
    statuses = {run.data.tags["dann.trial"]: run.info.status for run in runs_of(place, "trial")}
    assert statuses[str(gone[0].number)] == "KILLED"


@pytest.mark.slow
def test_a_sweep_that_is_stopped_twice_and_killed_leaves_no_worker_and_no_open_run_and_is_completed(tmp_path):
    place = make_place(tmp_path, trainer__max_epochs=2)

    def begun(*words: str) -> tuple[subprocess.Popen, psutil.Process]:
        """A sweep in the middle of a trial, and the worker that runs it."""
        process = sweeps(place, *words)
        return process, psutil.Process(until(lambda: worker_in_a_run(place), process))

    words = run_words(place, "--n_trials", "4", "--workers", "1")
    for signum, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process, worker = begun(*words)
        os.kill(process.pid, signum)
        finish(process, code)
        assert not worker.is_running()
        study = study_in(place)
        assert len(study.counted()) == 4
        assert not [trial for trial in study.trials() if trial.state.name == "RUNNING"]
        assert {run.info.status for run in runs_of(place, "sweep")} == {"KILLED"}
        assert {run.info.status for run in runs_of(place, "trial")} <= {"FINISHED", "KILLED"}
        assert (place / "studies" / "s" / "report.md").exists()
        (place / "studies" / "s" / "report.md").unlink()
        words = ["resume", "--study", "s", "--workers", "2"]
    process, worker = begun(*words)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    finish(sweeps(place, *words))
    check_ended(place, 4)
    assert not worker.is_running()
    assert sorted(run.info.status for run in runs_of(place, "sweep")) == ["FINISHED", "KILLED", "KILLED", "KILLED"]


def imported_by_the_fork_server(pid: int) -> str:
    """Names of the files that the fork server of a process has mapped."""
    with contextlib.suppress(psutil.Error):  # it ended meanwhile
        for child in psutil.Process(pid).children():
            if "forkserver" in " ".join(child.cmdline()):
                return " ".join(mapped.path for mapped in child.memory_maps())
    return ""


@pytest.mark.slow
def test_ctrl_c_while_the_libraries_are_imported_says_how_to_go_on_without_a_traceback(tmp_path):
    place = make_place(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "sweeps", *run_words(place)], cwd=place, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    until(lambda: "torch" in imported_by_the_fork_server(process.pid), process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, printed = process.communicate()
    assert process.returncode == 130
    assert "Stopped before the first trial. Repeat the command to start again.\n" in printed
    assert "Traceback" not in printed  # of any process; half imported libraries may say what they leaked


@pytest.mark.slow
def test_mlflow_run_starts_a_sweep(tmp_path, request):
    place = make_place(tmp_path, trainer__max_epochs=2)
    study = f"test-{os.getpid()}"  # `mlflow run` puts it into the project's own folder
    for name in (study, f"{study}-confirm"):
        request.addfinalizer(lambda name=name: shutil.rmtree(PROJECT / "studies" / name, ignore_errors=True))
    binaries = Path(sys.executable).parent
    command = [
        str(binaries / "mlflow"),
        "run",
        str(PROJECT),
        "-e",
        "sweep",
        "--env-manager",
        "local",
        "--experiment-name",
        "x",
    ]
    for name, value in {"config": place / "config.yaml", "space": place / "space.yaml", "study": study, "n_trials": 2,
                        "workers": 1, "trainer.max_epochs": 1, "confirm_top": 1, "confirm_seeds": 1}.items():  # fmt: skip
        command += ["-P", f"{name}={value}"]
    path = f"{binaries}{os.pathsep}{os.environ['PATH']}"
    uri = f"sqlite:///{place / 'mlflow.db'}"
    environ = environment() | {"PATH": path, "MLFLOW_TRACKING_URI": uri}
    done = subprocess.run(command, cwd=place, env=environ, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    sweep_runs = runs_of(place, "sweep")
    claimed = [run for run in sweep_runs if "mlflow.project.entryPoint" in run.data.tags]
    assert len(claimed) == 1  # the run that `mlflow run` made is the sweep's own
    assert {run.info.experiment_id for run in [*sweep_runs, *runs_of(place, "trial")]} == {
        claimed[0].info.experiment_id
    }
    assert all(run.info.status == "FINISHED" for run in [*sweep_runs, *runs_of(place, "trial")])


@pytest.mark.slow
def test_a_worker_killed_between_the_seeds_of_a_trial_costs_nothing_and_its_seeds_count_once(tmp_path):
    place = make_place(tmp_path, {GAMMA: {"type": "float", "low": 1, "high": 20}}, trainer__max_epochs=2)
    process = sweeps(place, *run_words(place, "--n_trials", "3", "--workers", "1", "--seeds_per_trial", "3"))

    def in_the_second_seed() -> tuple[int, int] | None:
        for trial in study_in(place).trials():
            if trial.state.name == "RUNNING" and seeds_done(trial) in (1, 2):
                return trial.number, int(trial.user_attrs["worker"].rsplit(":", 2)[1])
        return None

    number, worker = until(in_the_second_seed, process)
    os.kill(worker, signal.SIGKILL)
    said = finish(process)
    check_ended(place, 3)
    study = study_in(place)
    assert [trial.number for trial in study.trials() if superseded(trial)] == [number]
    done = seeds_done(study.trials()[number])
    assert "9 of 9 trainings done (3 seeds per trial)" in said
    assert f"{done} more by trials that were run again from their first seed" in said
    runs = {run.info.run_id: run for run in runs_of(place, "trial")}
    for trial in study.counted():
        own = [runs[run_id] for run_id in trial.user_attrs["run_ids"]]
        assert [run.data.tags["seed"] for run in own] == ["0", "1", "2"]
        assert {run.data.tags["dann.trial"] for run in own} == {str(trial.number)}
        assert {run.info.status for run in own} == {"FINISHED"}
        assert trial.value == pytest.approx(sum(run.data.metrics["iou/target_val"] for run in own) / 3)
    of_the_dead = [run for run in runs.values() if run.data.tags["dann.trial"] == str(number)]
    assert [run.info.status for run in of_the_dead].count("FINISHED") in (done, done + 1)
    assert len(runs) == 9 + len(of_the_dead)
