"""One trial: draws values, runs `adapt`, and reports the score to the study. An error fails only this trial."""

from __future__ import annotations

import logging
import math
import time
import traceback
from collections.abc import Collection, Mapping
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from dann_experiments.config import Config, InputError, replace
from dann_experiments.config.comparison import ARM_NAMES
from dann_experiments.config.errors import StoreAway
from dann_experiments.config.untrusted import refuse_stored_code
from dann_experiments.jobs import RunResult, adapt, evaluate
from dann_experiments.jobs.checks import check_labels
from dann_experiments.jobs.identity import run_name, trial_name
from dann_experiments.names import Job, Metric, SetName, Tag
from dann_experiments.scores.selection import choice_value
from dann_experiments.tracking.store import without_secrets
from dann_experiments.training.monitor import metrics_to_choose_by
from sweeps.definition import parts_of_run
from sweeps.pruning import Pruned, PruningCallback, RunCallback
from sweeps.sampling import build_pruner, build_sampler, judges_by_parts
from sweeps.seeds import Training, attributes, constrain, mean_value
from sweeps.settings import SweepConfig
from sweeps.space import Space, settings_of
from sweeps.study import SOURCE_ONLY, SOURCE_WANTED, STORAGE_ERRORS, Sweep

log = logging.getLogger(__name__)
EACH_STEP = (
    Metric.DOMAIN_LOSS,
    Metric.DOMAIN_ACCURACY,
    Metric.SEGMENTATION_LOSS,
    Metric.ADAPTATION_LOSS,
    Metric.TOTAL_LOSS,
)
FEWEST_SEEDS_TO_PRUNE = 4  # all worse than those of the best trial: p = 1/16, below P_OF_SEEDS; with three 1/8
VALIDATED = (Metric.IOU, Metric.CLASS_IOU, Metric.VAL_LOSS)  # prefixes of the metrics that validation logs


def check_objective(sweep: SweepConfig, config: Config, labelled: Collection[SetName]) -> None:
    """Raise InputError for an objective that no run logs. Warn if it cannot be used for pruning."""
    if sweep.pruner_used == "wilcoxon" and sweep.seeds_per_trial <= FEWEST_SEEDS_TO_PRUNE:
        log.warning(
            "seeds_per_trial is %d: all seeds of each trial are trained, as pruner wilcoxon needs %d to end a trial.",
            sweep.seeds_per_trial, FEWEST_SEEDS_TO_PRUNE,
        )  # fmt: skip
    name = sweep.objective
    known = metrics_to_choose_by(config.class_names, config.data.domains)
    own_method = config.domain_adaptation.method.class_path is not None and not name.startswith(VALIDATED)
    if name in known:
        check_labels(labelled, "objective", name)
        return
    if name not in EACH_STEP and not name.startswith("da_layer/") and not own_method:
        raise InputError(
            f"objective is {name!r}, which these runs do not log; validation logs {known}, each step {list(EACH_STEP)}."
        )
    if sweep.pruner_used not in ("none", "wilcoxon"):
        log.warning("pruner %s has no effect: %s is not scored by validation.", sweep.pruner_used, name)


def run_tags(sweep: SweepConfig, name: str, trial: FrozenTrial, sweep_run_id: str) -> dict[str, str]:
    """Return the tags that link a run to its trial, its study and the run of the sweep."""
    tags = {
        Tag.JOB: Job.TRIAL,
        Tag.STUDY: name,
        Tag.TRIAL: str(trial.number),
        Tag.ROLE: trial.user_attrs["role"],
        Tag.SWEEP_RUN_ID: sweep_run_id,
    }
    if sweep.uses_target_labels:
        tags[Tag.SELECTED_WITH_TARGET_LABELS] = "true"
    if trial.user_attrs.get("retry_of") is not None:
        tags[Tag.RETRY_OF] = str(trial.user_attrs["retry_of"])
    if sweep.nested:
        tags["mlflow.parentRunId"] = sweep_run_id
    return tags


def trial_config(base: Config, overrides: Mapping[str, Any], point: Mapping[str, Any]) -> Config:
    """Return the settings of a trial: those of the sweep, changed by the drawn values and the overrides of its slot."""
    return replace(base, {**settings_of(point), **overrides})


def run_trial(
    study: Sweep, space: Space, sweep: SweepConfig, base: Config, slot: FrozenTrial, sweep_run_id: str
) -> None:
    """Run one claimed trial and report its result to the study.

    Raises only errors that are not those of the trial: the store or the storage is away, SIGINT, SIGTERM.
    """
    started = time.monotonic()
    sampler = build_sampler(sweep, space.conditional, slot.number, sweep.n_trials or 1)
    parts = parts_of_run(study)
    rule = (sweep.pruner_used, base.trainer.max_epochs, sweep.report_every_n_steps, parts)
    optuna_study = study.for_sampling(sampler, build_pruner(*rule))
    trial = optuna.Trial(optuna_study, slot._trial_id)
    reference = bool(slot.user_attrs["reference"])
    state, value = TrialState.FAIL, None
    try:
        point = {} if reference else space.suggest(trial)
        config = trial_config(base, slot.user_attrs["overrides"], point)
        named = config.domain_adaptation.method.class_path
        refuse_stored_code(named, sweep.allowed_classes, f"trial {slot.number} of study {study.name!r}")
        study.note(slot, seed=config.seed, sampler_seed=sweep.sampler_seed, point=settings_of(point))
        tags = run_tags(sweep, study.name, slot, sweep_run_id)
        value = mean_value(_trained(study, sweep, config, slot, trial, tags, parts if judges_by_parts(*rule) else None))
        state = TrialState.COMPLETE
    except Pruned:
        state = TrialState.PRUNED
    except (StoreAway, optuna.exceptions.UpdateFinishedTrialError, *STORAGE_ERRORS):
        raise
    except Exception as error:
        log.error("trial %d failed: %s", slot.number, without_secrets(traceback.format_exc()))
        study.note(slot, error=_reason(error))
    _free_memory()  # not in the handler above, where the traceback still refers to the trial's tensors
    study.note(slot, seconds=round(time.monotonic() - started, 2))
    optuna_study.tell(trial, value, state, skip_if_finished=True)


def _trained(
    study: Sweep,
    sweep: SweepConfig,
    config: Config,
    slot: FrozenTrial,
    trial: optuna.Trial,
    tags: Mapping[str, str],
    parts: int | None,
) -> list[Training]:
    """Train with each seed and store the scores with the trial. Raises Pruned if the pruner ends it."""
    may_prune = slot.user_attrs["role"] == "search" and sweep.pruner_used != "none"
    threshold, found = config.monitor.forgetting_threshold, list[Training]()
    for index in range(sweep.seeds_per_trial):
        seeded = replace(config, {"seed": config.seed + index})
        name = trial_name(study.name, slot.number, seeded)
        seeded = replace(seeded, {"tracking.run_name": name, "tracking.registered_model_name": None})
        if sweep.seeds_per_trial == 1:
            every = sweep.report_every_n_steps
            callback = PruningCallback(trial, sweep.objective, may_prune, threshold, every, parts)
        else:
            callback = RunCallback(trial, sweep.objective, index * config.trainer.max_epochs)
        result = adapt(seeded, [callback], tags)
        scores, drop = scores_of(result.metrics), source_drop(result)
        scores |= {} if drop is None else {Metric.SOURCE_DROP: drop}
        study.note(slot, scores=scores, run_id=result.run_id)  # also if it has no valid objective
        value = _objective_value(result, sweep.objective)
        found.append(Training(seeded.seed, value, scores, result.run_id))
        if sweep.seeds_per_trial > 1:
            study.note(slot, **attributes(found))
            trial.report(value, step=index)
            if may_prune and len(found) < sweep.seeds_per_trial and trial.should_prune():
                constrain(trial, found, threshold)
                raise Pruned(f"pruned after {len(found)} of {sweep.seeds_per_trial} seeds")
            _free_memory()
    constrain(trial, found, threshold)
    return found


def score_source_model(study: Sweep, config: Config) -> None:
    """Score the unadapted model that all trials start from, in a separate run, and store its scores with the study.

    Does nothing if that is done or not wanted. After an error the study has no such scores; if the store or the storage is
    away, the error is raised.
    """
    if not study.attribute(SOURCE_WANTED) or study.attribute(SOURCE_ONLY) is not None:
        return
    try:
        named = replace(
            config, {"tracking.run_name": f"{study.name} {run_name(Job.EVALUATE, config, ARM_NAMES['source_only'])}"}
        )
        result = evaluate(named, {Tag.STUDY: study.name})
        study.set_attribute(SOURCE_ONLY, {"scores": scores_of(result.metrics), "run_id": result.run_id})
    except (StoreAway, *STORAGE_ERRORS):
        raise
    except Exception as error:
        log.warning("The unadapted source model could not be scored: %s", _reason(error))
    _free_memory()


def source_drop(result: RunResult) -> float | None:
    """Return how far the source's validation IoU of the final model is below that before the first step; None without labels."""
    before, after = result.baseline.get(Metric.SOURCE_VAL_IOU), result.metrics.get(Metric.SOURCE_VAL_IOU)
    return None if before is None or after is None else before - after


def _objective_value(result: RunResult, objective: str) -> float:
    """Return the final model's score; for a metric that is only logged during training, the mean of its last tenth of values.

    A select/ score counts as its worst value if the model forgot the source, as in the choice of an epoch (`choice_value`). Any
    other objective keeps its value: there only the constraint of `sweeps.ranking` puts the trial behind those that did not.
    """
    if objective in result.metrics:
        value = float(choice_value(objective, result.metrics))
    else:
        history = result.history()
        found = history[history["metric"] == objective]
        if found.empty:
            raise InputError(f"objective is {objective!r}, which run {result.run_id} did not log.")
        points = list(zip(found["step"].tolist(), found["value"].tolist(), strict=True))
        last = points[-max(1, len(points) // 10) :]
        for step, one in last:
            if not math.isfinite(one):
                raise FloatingPointError(
                    f"{objective} is {one} at step {step}, among the last tenth of its values, whose mean is the objective"
                )
        value = sum(one for _, one in last) / len(last)
    if not math.isfinite(value):
        raise FloatingPointError(f"{objective} is {value}")
    return value


def scores_of(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics of a run that are stored with its trial: IoU values and label-free target scores."""
    return {name: float(value) for name, value in metrics.items() if name.startswith((Metric.IOU, Metric.SELECT))}


def _reason(error: BaseException) -> str:
    text = without_secrets(" ".join(str(error).split()))
    return f"{type(error).__name__}: {text}"[:500]


def _free_memory() -> None:
    """Free the memory for the next trial; this matters most after an out-of-memory error."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
